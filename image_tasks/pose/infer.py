"""Finds keypoints in your pictures with a fine-tuned pose model.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --boxes ../../outputs/detection/predictions/full/1/predictions.json

Without --boxes a picture is taken whole, as one figure. Leaves the pictures with keypoints and skeleton drawn,
predictions.json (COCO keypoint results) and predictions.csv (a line for each keypoint, x and y in pixels) in a new folder
each time: outputs/pose/predictions/<method>/<number>/.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSize, LoadConfig, Share, cli, parse  # noqa: E402


@dataclass(kw_only=True)
class InferConfig(LoadConfig):
    input: str  # a picture, a folder of pictures, or a glob in quotes
    boxes: str = ""  # boxes around figures: COCO detection results or annotations (JSON), or CSV; empty: the whole picture
    box_threshold: Share = 0.5  # boxes with a lower score are left alone
    threshold: Share = 0.2  # keypoints with a lower score are not drawn; all are saved
    pictures: bool = True  # save each picture with its figures drawn
    batch_size: BatchSize = 1  # figures at a time; more is faster on a GPU
    output_dir: str = ""  # where the results go; empty: a new outputs/pose/predictions/<method>/<number>


def draw_pictures(poses: dict, points, folder: Path) -> None:
    """Saves every picture with its figures, as JPEG. poses: {path: [(places (K, 2), which are sure (K,))]}."""
    from common.vision.pictures import decode
    from pages import draw_poses

    for number, (path, figures) in enumerate(poses.items(), start=1):
        if figures:
            drawn = draw_poses(decode(path), figures, points)
            drawn.save(folder / f"{number:04d}_{path.stem[:60]}.jpg", quality=90, subsampling=0)


def list_pictures(poses: dict) -> None:
    """Prints a line for each picture with a figure."""
    from common.samples import short_names

    shown = [path for path, figures in poses.items() if figures]
    names = short_names(shown)
    width = min(60, max(map(len, names)))
    print(f"{'picture':{width}} {'figures':>7} {'sure keypoints':>15}")
    for path, name in zip(shown, names, strict=True):
        sure, every = sum(int(drawn.sum()) for _, drawn in poses[path]), sum(len(drawn) for _, drawn in poses[path])
        print(f"{name[-60:]:{width}} {len(poses[path]):7} {f'{sure} of {every}':>15}")


def save_tables(results: list[dict], points, folder: Path) -> None:
    """predictions.json (COCO keypoint results) and predictions.csv, a line for each keypoint."""
    from common.checkpoint import write_json
    from common.tables import write_table

    write_json(folder / "predictions.json", results)
    rows = []
    for number, result in enumerate(results, start=1):
        values = iter(result["keypoints"])
        for name, x, y, score in zip(points.names, values, values, values, strict=True):
            rows.append([result["file_name"], number, name, f"{x:.2f}", f"{y:.2f}", f"{score:.4f}"])
    write_table(folder / "predictions.csv", ["file_name", "figure", "keypoint", "x", "y", "score"], rows)


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    import torch

    from common.batches import eval_loader
    from common.folders import predictions_folder
    from common.runtime import counted, progress_bar, start_accelerator
    from common.samples import Faults
    from common.saved_models import choose_checkpoint
    from common.vision.pictures import find_pictures
    from data import Preprocess, collate, figures_only
    from figure_boxes import place_boxes
    from keypoints import KeypointSet
    from metrics import detect
    from model import load_checkpoint

    pictures, faults = find_pictures(config.input), Faults()
    framed = place_boxes(pictures, config.boxes, config.box_threshold, faults)
    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "pose", method)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    points = KeypointSet.from_json(model.facts)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    dataset = figures_only(framed, Preprocess(processor, model.facts["input_size"]), points, faults)
    faults.report()
    root = predictions_folder(config, origin)

    poses, results, seconds = {path: [] for path in pictures}, [], 0.0
    number_of = {path: number for number, path in enumerate(pictures, start=1)}
    for batch in progress_bar(eval_loader(dataset, collate, config.batch_size), "looking"):
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
            picture = {"image_id": number_of[sample.path], "file_name": str(sample.path), "category_id": 1}
            score = float(scores.mean()) * sample.score
            results.append({**picture, "bbox": box.tolist(), "keypoints": keypoints, "score": score})
    save_tables(results, points, root)
    list_pictures(poses)
    if config.pictures:
        draw_pictures(poses, points, root)
    count = sum(bool(found) for found in poses.values())
    many = f"{counted(count, 'picture')}, {counted(len(results), 'figure')}"
    print(f"{many}, {1000 * seconds / count:.1f} ms a picture (model only)")
    print(f"saved predictions.json and predictions.csv{', and the pictures,' if config.pictures else ''} in {root}")


if __name__ == "__main__":
    cli(main)
