"""Finds objects in your pictures with a fine-tuned detector.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --checkpoint ~/runs/full/checkpoints/best --threshold 0.3

Leaves the pictures with boxes drawn and predictions.json (COCO results) in outputs/detection/predictions/<method>/.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSize, LoadConfig, Share, UserError, cli, parse  # noqa: E402


@dataclass
class InferConfig(LoadConfig):
    input: str = ""  # a picture, a folder of pictures, or a glob in quotes
    threshold: Share = 0.5  # boxes with a lower score are not drawn, listed or saved
    batch_size: BatchSize = 1  # pictures at a time; only those that the model sees in the same shape go together
    output_dir: str = ""  # where the results go; empty: outputs/detection/predictions/<method>


def coco_results(boxes, labels, scores, classes: list[str]) -> list[dict]:
    """Boxes (N, 4) xyxy in pixels, as COCO lists them: [x, y, width, height], categories from 1."""
    from metrics import xywh

    return [
        {"category_id": int(label) + 1, "category_name": classes[label], "bbox": xywh(box), "score": float(score)}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    if not config.input:
        raise UserError("--input is needed: a picture, a folder of pictures, or a glob in quotes")
    # Heavy imports wait until the flags are read, so that --help answers at once.
    import torch

    from common.batches import EvalBatches
    from common.checkpoint import write_json
    from common.folders import newest_best, predictions_folder
    from common.runtime import progress_bar, start_accelerator
    from common.samples import Faults
    from common.vision.pictures import decode, find_pictures
    from data import Preprocess, collate, pictures_only
    from metrics import detect, draw_boxes
    from model import load_checkpoint

    pictures = find_pictures(config.input)
    accelerator = start_accelerator(config)
    config.checkpoint = config.checkpoint or str(newest_best("detection", method))
    model, processor, origin = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    model, classes = accelerator.prepare_model(model, evaluation_mode=True), origin["classes"]
    faults = Faults()
    dataset = pictures_only(pictures, Preprocess(processor, origin["image_size"]), faults)
    faults.report()
    root = predictions_folder(config, origin)

    results, seconds, shapes = [], 0.0, [dataset.shape(i) for i in range(len(dataset))]
    print(f"{'picture':40} {'objects':>7} {'ms':>8}")
    for keys in progress_bar(EvalBatches(shapes, config.batch_size), "detecting"):
        batch = collate([dataset[key] for key in keys])
        began = time.perf_counter()
        (found,) = detect(model, processor, [batch], with_loss=False)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        seconds += took
        for item in found:
            sample, sure = dataset.samples[item["index"]], item["scores"] >= config.threshold
            boxes, labels, scores = item["boxes"][sure], item["labels"][sure], item["scores"][sure]
            drawn = draw_boxes(decode(sample.path), boxes, labels, classes, scores)
            drawn.save(root / f"{item['index'] + 1:04d}_{sample.path.stem}.png")
            picture = {"image_id": item["index"] + 1, "file_name": str(sample.path)}
            results += [{**picture, **row} for row in coco_results(boxes, labels, scores, classes)]
            print(f"{sample.path.name[:40]:40} {len(boxes):7} {1000 * took / len(found):8.1f}")
    write_json(root / "predictions.json", results)
    print(f"{len(dataset)} pictures, {len(results)} objects, {1000 * seconds / len(dataset):.1f} ms a picture (model only)")
    print(f"saved {root}: one picture each, and predictions.json")


if __name__ == "__main__":
    cli(main)
