"""Finds objects in your pictures with a fine-tuned detector.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --checkpoint ~/runs/full/checkpoints/best --threshold best

Leaves the pictures with boxes drawn, predictions.json (COCO results) and predictions.csv (left, top, width, height in pixels)
in a new folder each time: outputs/detection/predictions/<method>/<number>/.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSize, LoadConfig, Share, cli, parse  # noqa: E402


@dataclass(kw_only=True)
class InferConfig(LoadConfig):
    input: str  # a picture, a folder of pictures, or a glob in quotes
    threshold: Share | Literal["best"] = 0.5  # boxes with a lower score are left out; best: where F1 was best in validation
    nms: Share = 0.7  # of two boxes of a class that overlap by a larger IoU, the surer one stays; 1: both. eval scores both
    pictures: bool = True  # save each picture with its boxes drawn
    batch_size: BatchSize = 1  # pictures at a time; only those that the model sees in the same shape go together
    output_dir: str = ""  # where the results go; empty: a new outputs/detection/predictions/<method>/<number>


def coco_results(boxes, labels, scores, classes: list[str]) -> list[dict]:
    """Boxes (N, 4) xyxy in pixels, as COCO lists them: [x, y, width, height], categories from 1."""
    from metrics import xywh

    return [
        {"category_id": int(label) + 1, "category_name": classes[label], "bbox": xywh(box), "score": float(score)}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]


def labels_in_words(labels, classes: list[str]) -> str:
    """`2 circle, 1 star`: how many of which class, the most frequent first."""
    counts = Counter(classes[int(label)] for label in labels)
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def save_picture(path: Path, found: dict, classes: list[str], folder: Path) -> None:
    """The picture with its boxes, as JPEG: of a photograph of 12 million pixels a tenth of the bytes and of the time of PNG."""
    from common.vision.pictures import decode
    from pages import draw_boxes

    drawn = draw_boxes(decode(path), found["boxes"], found["labels"], classes, found["scores"])
    drawn.save(folder / f"{found['index'] + 1:04d}_{path.stem[:60]}.jpg", quality=90, subsampling=0)


def save_answers(dataset, answers: dict[int, dict], classes: list[str], folder: Path) -> int:
    """predictions.json (COCO results) and predictions.csv, in the order of the pictures; how many objects they hold."""
    from common.checkpoint import write_json
    from common.tables import write_table

    results = []
    for index, found in sorted(answers.items()):
        picture = {"image_id": index + 1, "file_name": str(dataset.samples[index].path)}
        results += [{**picture, **row} for row in coco_results(found["boxes"], found["labels"], found["scores"], classes)]
    write_json(folder / "predictions.json", results)
    columns = ["file_name", "class", "score", "left", "top", "width", "height"]
    rows = [[r["file_name"], r["category_name"], f"{r['score']:.4f}", *(f"{v:.1f}" for v in r["bbox"])] for r in results]
    write_table(folder / "predictions.csv", columns, rows)
    return len(results)


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    import torch

    from common.batches import EvalBatches
    from common.folders import predictions_folder
    from common.runtime import counted, progress_bar, start_accelerator
    from common.samples import Faults, short_names
    from common.saved_models import choose_checkpoint
    from common.vision.pictures import find_pictures
    from data import Preprocess, collate, pictures_only
    from metrics import confident, detect, least_score
    from model import load_checkpoint

    pictures = find_pictures(config.input)
    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "detection", method)
    threshold = least_score(config.threshold, origin)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    model, faults = accelerator.prepare_model(model, evaluation_mode=True), Faults()
    dataset = pictures_only(pictures, Preprocess(processor, origin["image_size"]), faults)
    faults.report()
    root, names = predictions_folder(config, origin), short_names([sample.path for sample in dataset.samples])

    answers, seconds = {}, 0.0
    width = min(60, max(map(len, names)))
    print(f"{'picture':{width}} {'ms':>8}  objects")
    for keys in progress_bar(EvalBatches(dataset.shapes, config.batch_size), "detecting"):
        batch = collate([dataset[key] for key in keys])
        began = time.perf_counter()
        (found,) = detect(model, processor, [batch], with_loss=False)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        seconds += took
        for item in found:
            answers[item["index"]] = item = confident(item, threshold, config.nms)
            what = labels_in_words(item["labels"], origin["classes"]) or "none"
            print(f"{names[item['index']][-60:]:{width}} {1000 * took / len(found):8.1f}  {what}")
            if config.pictures:
                save_picture(dataset.samples[item["index"]].path, item, origin["classes"], root)
    count = save_answers(dataset, answers, origin["classes"], root)
    took = f"{1000 * seconds / len(dataset):.1f} ms a picture (model only)"
    print(f"{counted(len(dataset), 'picture')}, {counted(count, 'object')} with a score of {threshold:.3g} or more, {took}")
    print(f"saved predictions.json and predictions.csv{', and the pictures,' if config.pictures else ''} in {root}")


if __name__ == "__main__":
    cli(main)
