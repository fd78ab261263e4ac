"""Finds keypoints in your pictures with a fine-tuned pose model.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --boxes ../../outputs/detection/predictions/full/predictions.json

Without --boxes a picture is taken whole, as one figure. Leaves the pictures with keypoints and skeleton drawn and
predictions.json (COCO keypoint results) in outputs/pose/predictions/<method>/.
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
    boxes: str = ""  # JSON file of boxes around figures: COCO detection results or annotations; empty: the whole picture
    box_threshold: Share = 0.5  # boxes with a lower score are left alone
    threshold: Share = 0.2  # keypoints with a lower score are not drawn; all are saved
    batch_size: BatchSize = 1  # figures at a time
    output_dir: str = ""  # where the results go; empty: outputs/pose/predictions/<method>


def draw_pictures(poses: dict, points, folder: Path) -> None:
    """Saves every picture with its figures, and lists them. poses: {path: [(places (K, 2), which are sure (K,))]}."""
    from common.vision.pictures import decode
    from metrics import draw_poses

    print(f"{'picture':40} {'figures':>7} {'sure keypoints':>15}")
    for number, (path, figures) in enumerate(poses.items(), start=1):
        if figures:
            draw_poses(decode(path), figures, points).save(folder / f"{number:04d}_{path.stem}.png")
            sure = sum(int(drawn.sum()) for _, drawn in figures)
            print(f"{path.name[:40]:40} {len(figures):7} {f'{sure} of {len(figures) * len(points.names)}':>15}")


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    if not config.input:
        raise UserError("--input is needed: a picture, a folder of pictures, or a glob in quotes")
    # Heavy imports wait until the flags are read, so that --help answers at once.
    import torch

    from common.checkpoint import write_json
    from common.folders import newest_best, predictions_folder
    from common.runtime import progress_bar, start_accelerator
    from common.samples import Faults
    from common.vision.pictures import find_pictures
    from data import Preprocess, eval_loader, figures_only
    from figure_boxes import place_boxes
    from keypoints import KeypointSet
    from metrics import detect
    from model import load_checkpoint

    pictures, faults = find_pictures(config.input), Faults()
    framed = place_boxes(pictures, config.boxes, config.box_threshold, faults)
    accelerator = start_accelerator(config)
    config.checkpoint = config.checkpoint or str(newest_best("pose", method))
    model, processor, origin = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    points = KeypointSet.from_json(model.facts)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    dataset = figures_only(framed, Preprocess(processor, model.facts["input_size"]), points, faults)
    faults.report()
    root = predictions_folder(config, origin)

    poses, results, seconds = {path: [] for path in pictures}, [], 0.0
    for batch in progress_bar(eval_loader(dataset, config.batch_size), "looking"):
        began = time.perf_counter()
        (found,) = detect(model, [batch])
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        seconds += took
        for item in found:
            sample, (box, _) = dataset.samples[item["index"]], dataset.box(item["index"])
            scores = item["scores"]
            poses[sample.path].append((item["points"], scores >= config.threshold))
            keypoints = [float(v) for (x, y), s in zip(item["points"], scores, strict=True) for v in (x, y, s)]
            picture = {"image_id": pictures.index(sample.path) + 1, "file_name": str(sample.path), "category_id": 1}
            score = float(scores.mean()) * sample.score
            results.append({**picture, "bbox": box.tolist(), "keypoints": keypoints, "score": score})
    draw_pictures(poses, points, root)
    write_json(root / "predictions.json", results)
    count = sum(bool(found) for found in poses.values())
    print(f"{count} pictures, {len(results)} figures, {1000 * seconds / count:.1f} ms a picture (model only)")
    print(f"saved {root}: one picture each, and predictions.json")


if __name__ == "__main__":
    cli(main)
