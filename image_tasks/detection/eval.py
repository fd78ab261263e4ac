"""Scores a fine-tuned detector: COCO average precision, curves, some pictures and its worst.

    python eval.py                                           # the newest outputs/detection/full, on its validation data
    python eval.py --checkpoint ~/runs/full/checkpoints/best --data_dir ~/boxes --split test

Leaves eval.json (for another split than val: eval_<split>.json) in the run folder, and beside it in eval_<split>/ the
precision-recall curves, bars for each class, and pages of predictions and of the worst pictures.
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
    data_dir: str = ""  # COCO, VOC or YOLO folder; empty: the data that the checkpoint was trained on
    data_format: Literal["auto", "coco", "voc", "yolo"] = "auto"  # layout of data_dir; auto looks what is there
    exclude: str = ""  # text file of samples to leave out; empty: on the data of the training, that of the training
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    batch_size: BatchSizeOrZero = 0  # pictures at a time; 0: as in training. AP does not depend on it, the loss a little
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
    from data import load_for_eval
    from metrics import coco_eval, coco_metrics, draw_evaluation, predict, save_samples, shown_from
    from model import load_checkpoint
    from pages import draw_pages

    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "detection", method)
    check_data_dir(config.data_dir, origin)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    loader, classes, name = load_for_eval(config, processor, origin)
    file, folder = eval_places(config)
    found, loss = predict(accelerator.prepare_model(model, evaluation_mode=True), processor, loader)
    samples = loader.dataset.samples
    scored = coco_eval(samples, found, classes)
    metrics = of_split({"val_loss": loss, **coco_metrics(scored, classes)}, config.split)

    about = {"data": name, "split": config.split, "pictures": len(samples), "base": origin["base"]}
    write_json(file, {**about, "config": asdict(config), "metrics": metrics})
    save_samples(scored, samples, classes, folder / "samples.json")
    with guard("the pictures"):
        if scored:
            draw_evaluation(scored, classes, folder)
        draw_pages(loader.dataset, found, classes, shown_from(scored), folder / "predictions.png", folder / "worst.png")

    print(f"{name}, {config.split} split, {counted(len(samples), 'picture')}")
    for key, value in metrics.items():
        if not isinstance(value, dict):
            print(f"  {key:12} {'absent' if value is None else f'{value:.4f}'}")
    for label in classes if scored else []:
        values = [metrics[key][label] for key in ("per_class_map_50", "per_class_map")]
        print("  {:12} AP50 {}  AP {}".format(label, *("absent" if v is None else f"{v:.4f}" for v in values)))
    print(f"saved {file}, and pictures in {folder}")


if __name__ == "__main__":
    cli(main)
