"""The samples on which a full and a LoRA run differ most: as pictures, as sounds, or as meshes over the truth.

    python scripts/disagreements.py --full outputs/pose/full --lora outputs/pose/lora
    python scripts/disagreements.py --full ~/runs/clip/full_s0 --lora ~/runs/clip/lora_s0 --most 4 --data_dir ~/dogs

Ranks them by samples.json of both runs (of the test split where both were scored on it, else of the validation data): pictures
with one class each of which one run has the class right, the surest first; else by the difference of the metric. Leaves
disagreements.json and a picture, sound or plane view of each in <runs_dir>/<task>/compare/, where compare.py finds them.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from bootstrap import read_samples  # noqa: E402
from common.checkpoint import read_json, write_json  # noqa: E402
from common.config import Range, Threads, UserError, cli, one_line, parse  # noqa: E402
from common.runtime import counted  # noqa: E402
from compare_runs import run_ids  # noqa: E402
from task_modules import METRICS, open_data, task_of  # noqa: E402

LABELS = {"full": "full", "lora": "LoRA"}


@dataclass
class DisagreementsConfig:
    """Settings; the comment of a line is its help text."""

    full: str  # run folder of train.py
    lora: str  # run folder of train_lora.py
    most: Annotated[int, Range(1, 100)] = 12  # samples at most
    split: Literal["", "val", "test"] = ""  # whose samples; empty: test where both runs were scored on it, else val
    data_dir: str = ""  # where the data is now; empty: where it was in training
    output_dir: str = ""  # where the files go; empty: compare/ beside the runs
    threads: Threads = 0  # CPU threads of this process; 0: as torch chooses


def disagreements(full: Path, lora: Path, folder: Path, most: int = 12, split: str = "", data_dir: str = "") -> list[dict]:
    """[{"file", "what", "full", "lora", "picture" | "audio" | "mesh": file in `folder`}], by a process: one task each.

    UserError, in one line, where the runs cannot be compared so.
    """
    flags = {"full": full, "lora": lora, "output_dir": folder, "most": most, "split": split, "data_dir": data_dir}
    in_process(Path(__file__), {name: value for name, value in flags.items() if value})
    return read_json(Path(folder) / "disagreements.json")["samples"]


def in_process(script: Path, flags: dict) -> None:
    """Runs a script over one task with these flags. UserError with its last line where it fails; what else it says is shown."""
    command = [sys.executable, str(script), *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]
    done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{script.name} ended with {done.returncode}: {one_line(last).removeprefix('error: ')}")


# ---- which samples ---------------------------------------------------------------------------------------------------


def same_samples(runs: dict[str, Path], split: str, metric: str) -> tuple[str, dict[str, dict]]:
    """(split, method -> its samples.json) of one split of both runs. UserError where there is none, or it is of other samples."""
    both = " and ".join(map(str, runs.values()))
    places = {"test": [run / "eval_test" for run in runs.values()], "val": list(runs.values())}
    for name in [split] if split else ["test", "val"]:
        records = dict(zip(runs, (read_samples(place, metric) for place in places[name]), strict=True))
        if all(records.values()):
            files = [{row["file"] for row in record["rows"]} for record in records.values()]
            if files[0] != files[1]:
                raise UserError(
                    f"{' and '.join(map(str, runs.values()))} were not scored on the same samples of the {name} split"
                )
            return name, records
    missing = f"of the {split} split " if split else ""
    raise UserError(f"{both} have no samples.json {missing}both: score them with eval.py")


def most_different(records: dict[str, dict], most: int) -> list[dict]:
    """[{"file", "what", "full", "lora"}] of the samples on which two records of a split differ, the most different first."""
    rows = {method: {row["file"]: row for row in record["rows"]} for method, record in records.items()}
    record = records["full"]
    told = by_box if "found" in record["rows"][0] else by_label if "label" in record["rows"][0] else by_value
    try:
        found = [told(rows["full"][file], rows["lora"][file], record) | {"file": file} for file in rows["full"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"a samples.json is damaged ({type(error).__name__}: {error}); evaluate the run again") from None
    found = sorted((one for one in found if one["gap"] > 0), key=lambda one: -one["gap"])  # stable: then as in the file
    return [{key: one[key] for key in ("file", "what", "full", "lora")} for one in found[:most]]


def by_label(full: dict, lora: dict, record: dict) -> dict:
    """A picture with one class: they differ where one of them has it right, the more the surer both are."""
    classes = record["classes"]
    said = [f"{classes[row['guess']]} {row['probability']:.2f} ({'right' if row['right'] else 'wrong'})" for row in (full, lora)]
    gap = (full["probability"] + lora["probability"]) * (full["right"] != lora["right"])
    return {"what": f"true: {classes[full['label']]}", "full": said[0], "lora": said[1], "gap": gap}


def by_box(full: dict, lora: dict, record: dict) -> dict:
    """A picture with boxes: by the difference of its average precision, as if there were no other picture."""
    import numpy as np

    from average_precision import average_precisions

    full_ap, lora_ap = (float(average_precisions([row], record["classes"], np.ones((1, 1), int))[0]) for row in (full, lora))
    what = ", ".join(f"{count} {name}" for name, count in full["truth"].items()) or "no boxes"
    gap = abs(full_ap - lora_ap)
    return {"what": what, "full": f"AP {full_ap:.3f}", "lora": f"AP {lora_ap:.3f}", "gap": 0.0 if np.isnan(gap) else gap}


def by_value(full: dict, lora: dict, record: dict) -> dict:
    """A sample with a value: by the difference of the two."""
    a, b = float(full["value"]), float(lora["value"])
    better = LABELS["full" if (a > b) == record["higher_is_better"] else "lora"]
    metric = record["metric"]
    return {"what": f"{better} is better", "full": f"{metric} {a:.3f}", "lora": f"{metric} {b:.3f}", "gap": abs(a - b)}


# ---- showing them ----------------------------------------------------------------------------------------------------


def show_disagreements(config: DisagreementsConfig) -> Path:
    """Writes disagreements.json and what it names; the folder of them. This process is the runs' task's from then on."""
    from common.folders import check_data_dir, check_place

    runs = {method: Path(getattr(config, method)).expanduser().absolute() for method in LABELS}
    found = {method: task_of(run) for method, run in runs.items()}
    task, other = (origin["task"] for _, origin in found.values())
    if task != other:
        raise UserError(f"{runs['full']} is of {task} and {runs['lora']} of {other}: they have no sample in common")
    folder = Path(config.output_dir).expanduser() if config.output_dir else runs["full"].parent / "compare"
    check_place("--output_dir", folder)
    check_data_dir(config.data_dir, found["full"][1])
    split, records = same_samples(runs, config.split, METRICS[task][0])
    chosen = most_different(records, config.most)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("disagreement_*"):  # of a call before
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shown = draw_all(chosen, task, found, split, config.data_dir, folder) if chosen else []
    write_json(folder / "disagreements.json", {"runs": run_ids(runs.values()), "samples": shown})
    print(f"{counted(len(shown), 'sample')} of the {split} split on which the two differ most: {folder / 'disagreements.json'}")
    return folder


def draw_all(chosen: list[dict], task: str, found: dict, split: str, data_dir: str, folder: Path) -> list[dict]:
    """The chosen samples with the files that show them. One whose file is gone, or cannot be read, is named and left out."""
    from common.runtime import guard, progress_bar, quiet
    from disagreement_views import View, indices_by_name, view_of
    from task_modules import load

    with quiet():
        loaded = {LABELS[method]: load(place) for method, (place, _) in found.items()}
    models, origins = ({name: each[place] for name, each in loaded.items()} for place in (0, 2))
    processor = loaded["full"][1]
    data = open_data(found["full"][0], processor, origins["full"], data_dir, split, 1)
    view = View(task, models, origins, processor, data, folder)
    places, shown = indices_by_name(task, data.loader.dataset), []
    for number, one in enumerate(progress_bar(chosen, "drawing"), start=1):
        if one["file"] not in places:
            print(f"left out: {one['file']}, which the data has no more, or which can no longer be read")
            continue
        with guard(f"the view of {one['file']}"):
            shown.append(one | view_of(view, one, places[one["file"]], f"disagreement_{number:02}"))
    return shown


def main(argv=None):
    config = parse(DisagreementsConfig, argv)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    show_disagreements(config)


if __name__ == "__main__":
    cli(main)
