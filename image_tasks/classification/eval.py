"""Scores a fine-tuned classifier: accuracy, F1, top-5, calibration, and its most confident mistakes.

    python eval.py                                           # the newest outputs/classification/full, on its validation data
    python eval.py --checkpoint ~/runs/full/checkpoints/best --data_dir ~/pictures --split test

Leaves eval.json (for another split than val: eval_<split>.json) in the run folder, and beside it in eval_<split>/ the
report as text and JSON, samples.json with the answer for each picture, the confusion matrix, F1 of each class, the
calibration and a page of mistakes.
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
    data_dir: str = ""  # folder or CSV file as for training; empty: the data that the checkpoint was trained on
    exclude: str = ""  # text file of samples to leave out; empty: on the data of the training, that of the training
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    subset: bool = False  # score data that lacks some of the checkpoint's classes; else that is an error
    batch_size: BatchSizeOrZero = 0  # pictures at a time; 0: as in training
    num_workers: Workers = 0  # processes that prepare batches; 0: the main one does
    output_dir: str = ""  # where the results go; empty: the run folder


def main(argv=None, method="full", doc=None):
    config = parse(EvalConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json, write_text
    from common.class_metrics import calibration, class_report, class_table, classification_metrics, score_table, softmax
    from common.folders import check_data_dir, eval_places
    from common.plots import draw_calibration
    from common.record import of_split
    from common.runtime import counted, guard, start_accelerator
    from common.saved_models import choose_checkpoint
    from common.vision.pages import draw_mistakes
    from common.vision.scoring import predict, save_samples
    from data import load_for_eval
    from metrics import draw_evaluation
    from model import load_checkpoint

    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "classification", method)
    check_data_dir(config.data_dir, origin)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    loader, classes, name = load_for_eval(config, processor, origin)
    file, folder = eval_places(config)
    labels, logits = predict(accelerator.prepare_model(model, evaluation_mode=True), loader)
    metrics = classification_metrics(labels, logits, classes)

    about = {"data": name, "split": config.split, "pictures": len(labels), "base": origin["base"]}
    write_json(file, {**about, "config": asdict(config), "metrics": of_split(metrics, config.split)})
    save_samples(loader.dataset, labels, logits, folder)
    text, report = class_report(labels, logits, classes)
    write_text(folder / "report.txt", text)
    write_json(folder / "report.json", report)
    with guard("the pictures"):
        draw_evaluation(labels, logits, classes, folder)
        draw_calibration(*calibration(labels, softmax(logits.astype(float))), folder / "calibration.png")
        draw_mistakes(loader.dataset, labels, logits, folder / "mistakes.png")

    print(f"{name}, {config.split} split, {counted(len(labels), 'picture')}, {len(classes)} classes\n")
    print(f"{score_table(metrics, len(labels))}\n\n{class_table(labels, logits, classes)}\n")
    print(f"saved {file}, and report and pictures in {folder}")


if __name__ == "__main__":
    cli(main)
