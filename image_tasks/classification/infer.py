"""Says what your pictures show, with a fine-tuned classifier.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --checkpoint ~/runs/full/checkpoints/best --top_k 3 --pictures

Leaves predictions.csv and predictions.json in outputs/classification/predictions/<method>/, and the pictures on request.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import LoadConfig, UserError, cli, parse  # noqa: E402


@dataclass
class InferConfig(LoadConfig):
    input: str = ""  # a picture, a folder of pictures, or a glob in quotes
    top_k: int = 5  # so many classes for each picture, the most probable first
    pictures: bool = False  # save each picture with its classes written below it
    batch_size: int = 1  # pictures at a time; more is faster on a GPU
    output_dir: str = ""  # where the results go; empty: outputs/classification/predictions/<method>


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    if not config.input:
        raise UserError("--input is needed: a picture, a folder of pictures, or a glob in quotes")
    if config.top_k < 1 or config.batch_size < 1:
        raise UserError("--top_k and --batch_size must be at least 1")
    # Heavy imports wait until the flags are read, so that --help answers at once.
    import csv

    import torch

    from common.batches import EvalBatches
    from common.checkpoint import write_json
    from common.class_metrics import softmax
    from common.folders import newest_best, predictions_folder
    from common.runtime import progress, start_accelerator
    from common.samples import Faults
    from common.vision.labelled import collate, pictures_only
    from common.vision.pages import draw_answer
    from common.vision.pictures import find_pictures
    from common.vision.preprocess import ClassifierPreprocess
    from model import load_checkpoint

    paths = find_pictures(config.input)
    accelerator = start_accelerator(config)
    config.checkpoint = config.checkpoint or str(newest_best("classification", method))
    model, processor, origin = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    model, classes = accelerator.prepare_model(model, evaluation_mode=True), origin["classes"]
    faults = Faults()
    dataset = pictures_only(paths, classes, ClassifierPreprocess(processor), faults)
    faults.report()
    root = predictions_folder(config, origin)

    results, seconds = [], 0.0
    print(f"{'picture':40} {'class':24} {'probability':>11} {'ms':>8}")
    for keys in progress(EvalBatches([0] * len(dataset), config.batch_size), "classifying"):
        batch = collate([dataset[key] for key in keys])
        began = time.perf_counter()
        with torch.inference_mode():
            logits = model(pixel_values=batch["pixel_values"].to(accelerator.device)).logits.float().cpu().numpy()
        took = time.perf_counter() - began
        seconds += took
        for index, probabilities in zip(batch["index"].tolist(), softmax(logits.astype(float)), strict=True):
            best = probabilities.argsort()[::-1][: config.top_k]
            answers = [{"class": classes[k], "probability": float(probabilities[k])} for k in best]
            path, ms = dataset.samples[index].path, round(1000 * took / len(keys), 2)
            results.append({"file_name": str(path), "milliseconds": ms, "predictions": answers})
            print(f"{path.name[:40]:40} {answers[0]['class'][:24]:24} {answers[0]['probability']:11.4f} {ms:8.1f}")
            if config.pictures:
                draw_answer(path, answers, root / f"{index + 1:04d}_{path.stem}.png")
    write_json(root / "predictions.json", results)
    with open(root / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "rank", "class", "probability", "milliseconds"])
        for row in results:
            for rank, answer in enumerate(row["predictions"], 1):
                answer = [answer["class"], f"{answer['probability']:.6f}"]
                table.writerow([row["file_name"], rank, *answer, row["milliseconds"]])
    print(f"{len(results)} pictures, {1000 * seconds / len(results):.1f} ms a picture (model only)")
    print(f"saved predictions.csv and predictions.json{' and the pictures' if config.pictures else ''} in {root}")


if __name__ == "__main__":
    cli(main)
