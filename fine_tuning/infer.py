"""Says which classes your pictures show, with a fine-tuned CLIP.

    python infer.py --input photo.jpg                        # or a folder, or a glob in quotes: "shots/*.png"
    python infer.py --input shots/ --checkpoint ~/runs/full/checkpoints/best --top_k 3 --pictures

Leaves predictions.json and predictions.txt, and the pictures on request, in a new folder each time:
outputs/clip/predictions/<method>/<number>/.
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
    output_dir: str = ""  # where the results go; empty: a new outputs/clip/predictions/<method>/<number>


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json, write_text
    from common.folders import predictions_folder
    from common.runtime import counted, start_accelerator
    from common.samples import Faults, printable
    from common.saved_models import choose_checkpoint
    from common.vision.pages import draw_answer
    from common.vision.pictures import find_pictures
    from predictor import Predictor

    paths, faults = find_pictures(config.input), Faults()
    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "clip", method)
    predictor = Predictor(config.checkpoint, config.model, accelerator.device, config.merge)
    predictor.model = accelerator.prepare_model(predictor.model, evaluation_mode=True)  # computes in --precision
    root = predictions_folder(config, origin)

    results, lines, total = [], [], 0.0
    for path, answers, ms in predictor.classify_files(paths, config.top_k, config.batch_size, faults):
        results.append({"file_name": str(path), "milliseconds": round(ms, 2), "predictions": answers})
        total += ms
        lines += [f"{printable(str(path))}  ({ms:.1f} ms)"]
        lines += [f"  {a['class']:28} {a['probability']:7.4f}  {'#' * round(40 * a['probability'])}" for a in answers]
        if config.pictures:
            draw_answer(path, answers, root / f"{len(results):04d}_{path.stem[:60]}.png")
    faults.report()
    if not results:
        raise UserError(f"--input {config.input}: no picture there that can be decoded")
    write_json(root / "predictions.json", results)
    write_text(root / "predictions.txt", "\n".join(lines) + "\n")
    print("\n".join(lines[:60]) + ("\n..." if len(lines) > 60 else ""))
    print(f"{counted(len(results), 'picture')}, {total / len(results):.1f} ms a picture (model only)")
    print(f"saved predictions.json and predictions.txt{', and the pictures,' if config.pictures else ''} in {root}")


if __name__ == "__main__":
    cli(main)
