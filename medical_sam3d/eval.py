"""Scores the meshes of a fine-tuned model on held-out organs, beside interpolation and the base; leaves a page to turn them on.

    python eval.py                                           # the newest outputs/medical_sam3d/full, on its validation data
    python eval.py --split test --tolerance 1                # NSD within 1 mm
    python eval.py --checkpoint ~/runs/full/checkpoints/best --data_dir ~/Task04_Hippocampus --every 3

Leaves eval.json (for another split than val: eval_<split>.json) in the run folder, and beside it in eval_<split>/ report.md,
results.csv (a row for each case, organ and system), scores.png, planes.png (predictions over the truth) and page.html, all in
one file. --latents optimise adds what the decoder could do if it knew the truth, which takes a while.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSizeOrZero, LoadConfig, Range, Workers, cli, parse  # noqa: E402


@dataclass
class EvalConfig(LoadConfig):
    data_dir: str = ""  # folder of volumes and masks; empty: the data that the checkpoint was trained on
    exclude: str = ""  # text file of samples to leave out; empty: on the data of the training, that of the training
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    organs: str = ""  # names of organs, with commas between them; empty: those that the model was trained on
    every: Annotated[int, Range(1, 100, or_zero=True)] = 0  # the model sees each n-th slice of a mask; 0: as in training
    tolerance: Annotated[float, Range(0.01, 100)] = 2.0  # mm, within which a surface counts as right in NSD
    latents: Literal["given", "optimise"] = "given"  # optimise: also score latents fitted to the truth, an upper bound
    batch_size: BatchSizeOrZero = 0  # organs at a time; 0: as in training. No metric depends on it
    num_workers: Workers = 0  # processes that prepare batches; 0: the main one does
    output_dir: str = ""  # where the results go; empty: the run folder


def main(argv=None, method="full", doc=None):
    config = parse(EvalConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from dataclasses import replace

    from common.checkpoint import write_json
    from common.folders import check_data_dir, eval_places
    from common.record import of_split, without_nan
    from common.runtime import counted, guard, process_index, start_accelerator
    from common.saved_models import choose_checkpoint
    from data import load_for_eval
    from metrics import organ_metrics, save_samples
    from model import load_checkpoint
    from scores_report import leave_results, say_scores
    from systems import LABELS, UNTRAINED, by_organ, differences, load_untrained, of_system, score_systems, system_scores

    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "medical_sam3d", method)
    check_data_dir(config.data_dir, origin)
    model, processor, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    processor = replace(processor, every=config.every or processor.every)
    loader, name = load_for_eval(config, processor, origin)
    file, folder = eval_places(config)
    base, own = load_untrained(origin, config, accelerator.device), LABELS[origin["method"]]
    systems = ({} if base is None else {UNTRAINED: base}) | {own: model}
    with accelerator.autocast():
        rows = score_systems(systems, loader, config.tolerance, model.decoder if config.latents == "optimise" else None)
    if process_index()[0]:
        return
    found = of_system(rows, own)
    metrics = without_nan(of_split(organ_metrics(loader.dataset, found), config.split))  # distances of a miss are infinite

    about = {"data": name, "split": config.split, "organs": len(found), "patients": len({row["patient"] for row in found})}
    about |= {"every": loader.dataset.every, "tolerance_mm": config.tolerance, "base": origin["base"]}
    scores = {"systems": system_scores(rows), "per_organ": by_organ(rows), "differences": differences(rows, own)}
    write_json(file, {**about, "config": asdict(config), "metrics": metrics, **scores})
    save_samples(loader.dataset, found, folder / "samples.json")
    with guard("the report, its pictures and the page"), accelerator.autocast():
        leave_results(folder, config, about, rows, own, loader, systems)

    print(f"{name}, {config.split} split, {counted(about['organs'], 'organ')} of {counted(about['patients'], 'patient')}")
    say_scores(rows, own)
    print(f"saved {file}, the report {folder / 'report.md'}, and a page to turn the meshes on, {folder / 'page.html'}")


if __name__ == "__main__":
    cli(main)
