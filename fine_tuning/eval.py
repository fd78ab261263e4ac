"""Scores a fine-tuned CLIP: top-1, top-5, precision, recall, F1, beside the zero-shot answers of its base.

    python eval.py                                           # the newest outputs/clip/full, on its validation data
    python eval.py --checkpoint ~/runs/full/checkpoints/best --data_dir ../data/dogs --split test

Leaves eval.json (for another split than val: eval_<split>.json) in the run folder, and beside it in eval_<split>/
evaluation_report.txt, evaluation_results.json, samples.json (the answer for each picture), confusion_matrix.png,
class_performance.png, calibration.png and mistakes.png.
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
    zero_shot: bool = True  # score the base's own zero-shot answers, too, where the base is at hand (nothing is fetched)
    prompts: str = ""  # sentences with {label} for the zero-shot answers, separated by |; empty: those of the training
    batch_size: BatchSizeOrZero = 0  # pictures at a time; 0: as in training
    num_workers: Workers = 0  # processes that prepare batches; 0: the main one does
    output_dir: str = ""  # where the results go; empty: the run folder


def main(argv=None, method="full", doc=None):
    config = parse(EvalConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json, write_text
    from common.class_metrics import calibration, class_report, class_table, classification_metrics, score_table, softmax
    from common.config import UserError
    from common.folders import check_data_dir, eval_places
    from common.plots import draw_calibration
    from common.record import of_split
    from common.runtime import counted, guard, say, start_accelerator
    from common.saved_models import choose_checkpoint
    from common.vision.pages import draw_mistakes
    from common.vision.scoring import predict, save_samples
    from data import load_for_eval
    from metrics import draw_evaluation, zero_shot_comparison
    from model import load_checkpoint, zero_shot_model

    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "clip", method)
    check_data_dir(config.data_dir, origin)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    loader, classes, name = load_for_eval(config, processor, origin)
    file, folder = eval_places(config)
    labels, logits = predict(accelerator.prepare_model(model, evaluation_mode=True), loader)
    metrics = classification_metrics(labels, logits, classes)
    baseline, zero_shot = None, None
    if config.zero_shot:
        try:
            where, prompts = config.model or origin["base"]["name"], config.prompts or origin["prompts"]
            base = zero_shot_model(where, origin["base"]["sha256"], classes, prompts)
            baseline = predict(accelerator.prepare_model(base, evaluation_mode=True), loader)[1]
            zero_shot = classification_metrics(labels, baseline, classes)
        except UserError as error:
            say(f"no zero-shot answers beside it: {error}")

    about = {"data": name, "split": config.split, "pictures": len(labels), "base": origin["base"]}
    numbers = {"metrics": of_split(metrics, config.split), "zero_shot": zero_shot and of_split(zero_shot, config.split)}
    write_json(file, {**about, "config": asdict(config), **numbers})
    save_samples(loader.dataset, labels, logits, folder)
    text, report = class_report(labels, logits, classes)
    results = {**about, **numbers, "classes": report}
    scores = score_table(metrics, len(labels), zero_shot)
    summary = [f"{name}, {config.split} split, {counted(len(labels), 'picture')}, {len(classes)} classes", scores]
    if zero_shot:
        results["answers"] = zero_shot_comparison(labels, logits, baseline)
        summary.append("right answers: " + ", ".join(f"{key.replace('_', ' ')} {n}" for key, n in results["answers"].items()))
    write_json(folder / "evaluation_results.json", results)
    write_text(folder / "evaluation_report.txt", "\n\n".join([*summary, text]))
    with guard("the pictures"):
        draw_evaluation(labels, logits, classes, folder, baseline)
        draw_calibration(*calibration(labels, softmax(logits.astype(float))), folder / "calibration.png")
        draw_mistakes(loader.dataset, labels, logits, folder / "mistakes.png")
    print("\n\n".join([*summary, class_table(labels, logits, classes)]))
    print(f"\nsaved {file}, and report and pictures in {folder}")


if __name__ == "__main__":
    cli(main)
