"""Says what your pictures show, with a fine-tuned classifier.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --checkpoint ~/runs/full/checkpoints/best --top_k 3 --pictures

Leaves predictions.json and predictions.csv, and the pictures on request, in a new folder each time:
outputs/classification/predictions/<method>/<number>/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSize, Count, LoadConfig, UserError, cli, parse  # noqa: E402


@dataclass(kw_only=True)
class InferConfig(LoadConfig):
    input: str  # a picture, a folder of pictures, or a glob in quotes
    top_k: Count = 5  # so many classes for each picture, the most probable first
    pictures: bool = False  # save each picture with its classes beside it
    batch_size: BatchSize = 1  # pictures at a time; more is faster on a GPU
    output_dir: str = ""  # where the results go; empty: a new outputs/classification/predictions/<method>/<number>


def answer_rows(results: list[dict]) -> list[list]:
    """A row for each picture and class, the most probable first: file name, rank, class, probability, milliseconds."""
    return [
        [row["file_name"], rank, answer["class"], f"{answer['probability']:.6f}", row["milliseconds"]]
        for row in results
        for rank, answer in enumerate(row["predictions"], start=1)
    ]


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json
    from common.folders import predictions_folder
    from common.runtime import counted, start_accelerator
    from common.samples import Faults, short_names
    from common.saved_models import choose_checkpoint
    from common.tables import write_table
    from common.vision.pages import draw_answer
    from common.vision.pictures import find_pictures
    from predictor import Predictor

    paths, faults = find_pictures(config.input), Faults()
    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "classification", method)
    predictor = Predictor(config.checkpoint, config.model, accelerator.device, config.merge)
    predictor.model = accelerator.prepare_model(predictor.model, evaluation_mode=True)  # computes in --precision
    root, names = predictions_folder(config, origin), dict(zip(paths, short_names(paths), strict=True))

    results, total = [], 0.0
    width = min(60, max(map(len, names.values())))
    print(f"{'picture':{width}} {'class':24} {'probability':>11} {'ms':>8}")
    for path, answers, ms in predictor.classify_files(paths, config.top_k, config.batch_size, faults):
        results.append({"file_name": str(path), "milliseconds": round(ms, 2), "predictions": answers})
        total += ms
        print(f"{names[path][-60:]:{width}} {answers[0]['class'][:24]:24} {answers[0]['probability']:11.4f} {ms:8.1f}")
        if config.pictures:
            draw_answer(path, answers, root / f"{len(results):04d}_{path.stem[:60]}.png")
    faults.report()
    if not results:
        raise UserError(f"--input {config.input}: no picture there that can be decoded")
    write_json(root / "predictions.json", results)
    columns = ["file_name", "rank", "class", "probability", "milliseconds"]
    write_table(root / "predictions.csv", columns, answer_rows(results))
    print(f"{counted(len(results), 'picture')}, {total / len(results):.1f} ms a picture (model only)")
    print(f"saved predictions.json and predictions.csv{', and the pictures,' if config.pictures else ''} in {root}")


if __name__ == "__main__":
    cli(main)
