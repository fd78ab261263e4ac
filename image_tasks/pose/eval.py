"""Scores a fine-tuned pose model: pixel error, PCK, NME and OKS average precision, curves, and its worst pictures.

    python eval.py                                           # the newest outputs/pose/full, on its validation data
    python eval.py --checkpoint ~/runs/full/checkpoints/best --data_dir ~/points --split test

Leaves eval.json (for another split than val: eval_<split>.json) in the run folder, and beside it in eval_<split>/ the PCK
curve, bars for each keypoint, and pages of predictions and of the worst pictures.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSizeOrZero, LoadConfig, Workers, cli, parse  # noqa: E402


@dataclass
class EvalConfig(LoadConfig):
    data_dir: str = ""  # COCO keypoints, CSV or YOLO folder; empty: the data that the checkpoint was trained on
    data_format: Literal["auto", "coco", "csv", "yolo"] = "auto"  # layout of data_dir; auto looks what is there
    exclude: str = ""  # text file of samples to leave out; empty: on the data of the training, that of the training
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    batch_size: BatchSizeOrZero = 0  # figures at a time; 0: as in training. No metric depends on it
    num_workers: Workers = 0  # processes that prepare batches; 0: the main one does
    output_dir: str = ""  # where the results go; empty: the run folder


def main(argv=None, method="full", doc=None):
    config = parse(EvalConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json
    from common.folders import check_data_dir, eval_places
    from common.record import of_split
    from common.runtime import counted, guard, start_accelerator
    from common.saved_models import choose_checkpoint
    from data import Preprocess, load_for_eval
    from metrics import draw_evaluation, pose_metrics, predict, save_samples
    from model import load_checkpoint
    from pages import draw_pages

    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "pose", method)
    check_data_dir(config.data_dir, origin)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    preprocess = Preprocess(processor, model.facts["input_size"])
    loader, points, name = load_for_eval(config, preprocess, model.facts, origin)
    file, folder = eval_places(config)
    found, loss = predict(accelerator.prepare_model(model, evaluation_mode=True), loader)
    dataset = loader.dataset
    metrics = of_split({"val_loss": loss, **pose_metrics(dataset, found, points)}, config.split)

    about = {"data": name, "split": config.split, "figures": len(dataset), "base": origin["base"]}
    write_json(file, {**about, "config": asdict(config), "metrics": metrics})
    save_samples(dataset, found, folder / "samples.json")
    with guard("the pictures"):
        draw_evaluation(dataset, found, points, folder)
        draw_pages(dataset, found, points, folder / "predictions.png", folder / "worst.png")

    print(f"{name}, {config.split} split, {counted(len(dataset), 'figure')}")
    for key, value in metrics.items():
        if not isinstance(value, dict):
            print(f"  {key:18} {'absent' if value is None else f'{value:.4f}'}")
    print("mean error of each keypoint, in pixels")
    for label, value in metrics["per_keypoint_pixel_error"].items():
        print(f"  {label:18} {'absent' if value is None else f'{value:.2f}'}")
    print(f"saved {file}, and pictures in {folder}")


if __name__ == "__main__":
    cli(main)
