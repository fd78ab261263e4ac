"""Run folders as a comparison needs them: read without belief, alike or not, those that differ in their seed alone as one row."""

import os
import re
import sys
from hashlib import sha256
from pathlib import Path
from types import NoneType

from common.checkpoint import MANIFEST, read_json
from common.config import UserError

SCHEMA_VERSION = 1
MUST_AGREE = ("task", "base.sha256", "metrics.name", "config.epochs", "config.max_steps_per_epoch")
KINDS = {  # of what is read of a summary, where it is there
    str: (
        "task",
        "method",
        "run_name",
        "status",
        "ended",
        "metrics.name",
        "data.sha256",
        "data.name",
        "base.sha256",
        "base.name",
    ),
    dict: ("config", "metrics", "metrics.before", "metrics.best", "metrics.final", "data.left_out", "environment"),
    int: (
        *("parameters.trainable", "parameters.total", "checkpoint_bytes", "metrics.best.epoch", "peak_memory_bytes.cpu"),
        *("peak_memory_bytes.gpu", "config.batch_size", "config.gradient_accumulation_steps", "environment.processes"),
        "environment.threads",
        *("config.seed", "data.train", "data.val"),
    ),
    list: ("notes",),
    float: ("config.lr", "train_seconds", "seconds", "samples_per_second"),
}
SEPARATE = {"run_name", "output_dir", "resume", "overwrite"}  # settings that have to differ, or say nothing
RATES = {"lr", "lr_head"}  # of runs that differ in these alone one row is shown: the others are of a sweep
LARGEST = 1e18  # a number beyond it is no size, time or metric
MOST_NAMED = 6  # runs that a note names


# Reading ---------------------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict:
    """The summary of a run folder. UserError, in one line, where there is none or it is not one that this script knows."""
    path = folder if folder.name == "summary.json" else folder / "summary.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: there is no {path.name} in it")
    summary = read_json(path)
    version = summary.get("schema_version") if isinstance(summary, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {str(version)[:40]}; this script reads version {SCHEMA_VERSION}")
    for key, kind in ((key, kind) for kind, keys in KINDS.items() for key in keys):
        found = value(summary, key)
        kinds = (int, float, NoneType) if kind is float else (kind, NoneType)
        if not isinstance(found, kinds) or not is_sane(found):
            raise UserError(f"{path} is damaged: its {key} is {str(found)[:40]!r}")
    for when in ("before", "best", "final"):
        check_metrics(value(summary, f"metrics.{when}") or {}, f"{path} is damaged: its metrics.{when}")
    return summary


def check_metrics(metrics: dict, fault: str) -> None:
    """UserError, which begins with `fault`, where one of the metrics is no number, null or numbers by name."""
    for name, x in metrics.items():
        if not isinstance(x, int | float | dict | None) or not is_sane(x):
            raise UserError(f"{fault}.{name[:40]} is {str(x)[:40]!r}")
        if isinstance(x, dict):
            check_metrics(x, f"{fault}.{name[:40]}")


def is_sane(x) -> bool:
    """Whether a number can be one of a run's; what is no number, is."""
    return not isinstance(x, int | float) or abs(x) < LARGEST  # NaN is not


def value(summary: dict, key: str):
    """What stands under a dotted key such as "metrics.best.map_50"; None where there is nothing."""
    for part in key.split("."):
        summary = summary.get(part) if isinstance(summary, dict) else None
    return summary


def seed_of(summary: dict) -> int | None:
    return value(summary, "config.seed")


def read_test(folder: Path, metric: str) -> dict | None:
    """The metrics of a run on the test split, as its eval script left them; None where it did not. UserError: damaged."""
    path = folder / "eval_test.json"
    if not path.is_file() or not (folder / "eval_test" / "samples.json").is_file():
        return None
    metrics = value(read_json(path), "metrics")
    if not isinstance(metrics, dict):
        raise UserError(f"{path} is damaged: it has no metrics; evaluate the run again")
    check_metrics(metrics, f"{path} is damaged: its metrics")
    return metrics if isinstance(metrics.get(metric), int | float) else None


def run_ids(runs) -> dict[str, str]:
    """{name of a run folder: what its best checkpoint is told by}: the sha256 of its weights' own, "" where nothing says them.

    What was made of a run is not of another that was trained under its name afterwards.
    """
    found = {}
    for run in map(Path, runs):
        path = run / "checkpoints" / "best" / MANIFEST
        entries = read_json(path) if path.is_file() else None
        entries = entries if isinstance(entries, dict) else {}
        weights = sorted(str(entry) for name, entry in entries.items() if name.endswith(".safetensors"))
        found[run.name] = sha256("".join(weights).encode()).hexdigest()[:16] if weights else ""
    return found


def readable(runs_dir: Path):
    """Yields (path, summary) of every run below runs_dir; those that cannot be read are named."""
    for path in sorted(runs_dir.glob("*/[!.]*/summary.json")):
        try:
            yield path, read_summary(path)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)


def finished(runs_dir: Path) -> dict[str, list[tuple[Path, dict]]]:
    """task -> (run folder, summary) of its finished runs below runs_dir, the newest first."""
    runs = {}
    for path, summary in sorted(readable(runs_dir), key=lambda pair: pair[1].get("ended") or "", reverse=True):
        if summary.get("status") == "finished":
            runs.setdefault(str(summary.get("task")), []).append((path.parent, summary))
    return runs


# Alike or not ----------------------------------------------------------------------------------------------------------


def global_batch(summary: dict) -> int | None:
    """Samples behind one optimizer step, over all processes."""
    size = value(summary, "config.batch_size")
    many = (value(summary, "config.gradient_accumulation_steps") or 1) * (value(summary, "environment.processes") or 1)
    return size * many if size else None


def differences(summaries: list[dict], labels: list[str]) -> list[str]:
    """Why these runs are no fair comparison: a phrase for each field, with the value of every run.

    Data without split folders are split by the seed. So their hash must be the same among runs of one seed; of runs of several
    seeds the folder and the number of samples must be.
    """
    fields = {key: [value(s, key) for s in summaries] for key in MUST_AGREE}
    fields["batch_size x gradient_accumulation_steps x processes"] = [global_batch(s) for s in summaries]
    found = {key: values for key, values in fields.items() if any(v != values[0] for v in values)}
    hashes, seeds = [value(s, "data.sha256") for s in summaries], [seed_of(s) for s in summaries]
    paired = len(set(seeds)) < len(seeds)  # else no two of them have seen the same, and all must agree
    if any(
        a != b and (s == t or not paired) for a, s in zip(hashes, seeds, strict=True) for b, t in zip(hashes, seeds, strict=True)
    ):
        found["data.sha256"] = hashes
    elif any(h != hashes[0] for h in hashes):
        whole = [(value(s, "data.name"), (value(s, "data.train") or 0) + (value(s, "data.val") or 0)) for s in summaries]
        found |= {"data and its number of samples": whole} if any(w != whole[0] for w in whole) else {}
    statuses = [s.get("status") for s in summaries]
    if set(statuses) != {"finished"}:
        found["status"] = statuses
    phrases = []
    for key, values in found.items():
        length = 16 if key.endswith("sha256") else 80
        phrases.append(f"{key}: " + ", ".join(f"{str(v)[:length]} ({label})" for v, label in zip(values, labels, strict=True)))
    return phrases


def unlike(runs: list[tuple[Path, dict]]) -> list[str]:
    return differences([summary for _, summary in runs], [folder.name for folder, _ in runs])


def settings_of(summary: dict) -> dict:
    """The settings of a run, as they can be shown: what is neither a number that is finite nor a text is written as one."""
    config = value(summary, "config") or {}
    return {str(key): x if isinstance(x, str | int | float | None) and is_sane(x) else str(x)[:200] for key, x in config.items()}


def method_key(summary: dict, without=()) -> tuple:
    """What tells methods apart: the method and each setting that the weights depend on, but for the seed.

    What is off, is not there: a run of before the project had a setting is like one of today that leaves it off.
    """
    from common.folders import OF_THE_PLACE

    config = {key: x for key, x in (value(summary, "config") or {}).items() if x and x != "none"}
    return summary.get("method"), *sorted((k, str(x)) for k, x in config.items() if k not in OF_THE_PLACE | {"seed", *without})


# Runs of one seed each, as rows ----------------------------------------------------------------------------------------


def group(runs: list[tuple[Path, dict]]) -> tuple[list[list[tuple[Path, dict]]], list[tuple[Path, dict]]]:
    """(rows of runs that are alike but for their seed, by seed; runs of a seed that a newer run of the row has, too).

    A run that says no seed is a row of its own. Rows are in the order of the runs that they begin with.
    """
    rows, older = {}, []
    for run in sorted(runs, key=lambda run: run[1].get("ended") or "", reverse=True):
        seed = seed_of(run[1])
        row = rows.setdefault(str(run[0]) if seed is None else method_key(run[1]), {})
        if seed in row:
            older.append(run)
        row.setdefault(seed, run)
    places = {str(folder): i for i, (folder, _) in enumerate(runs)}
    rows = [[row[seed] for seed in sorted(row, key=lambda seed: seed or 0)] for row in rows.values()]
    return sorted(rows, key=lambda row: min(places[str(folder)] for folder, _ in row)), older


def label_of(row: list[tuple[Path, dict]]) -> str:
    """The run's name, or what the names of several have in common: "lora" of lora_s0, lora_s1 and lora_s2."""
    names = [str(summary.get("run_name")) for _, summary in row]
    if len(row) == 1:
        return names[0]
    return re.sub(r"(^|[_-])(s|seed)?[_-]?$", "", os.path.commonprefix(names)) or str(row[0][1].get("method"))


def find_pair(runs: list[tuple[Path, dict]], runs_dir: Path, task: str) -> list[tuple[Path, dict]]:
    """The newest full and the newest lora run of a task that are alike; where none are, the newest of each. UserError: none."""
    methods = {method: [run for run in runs if run[1].get("method") == method] for method in ("full", "lora")}
    if missing := [method for method, found in methods.items() if not found]:
        raise UserError(f"no finished {' and no finished '.join(missing)} run of {task} below {runs_dir}; train it first")
    newest = [methods["full"][0], methods["lora"][0]]
    every = ([full, lora] for lora in methods["lora"] for full in methods["full"])
    chosen = next((pair for pair in every if not unlike(pair)), newest)
    if chosen != newest:
        print(
            f"{newest[0][0]} and {newest[1][0]} are newer, but no fair comparison: {'; '.join(unlike(newest))}", file=sys.stderr
        )
    return chosen


def find_rows(runs: list[tuple[Path, dict]], runs_dir: Path, task: str) -> tuple[list[list[tuple[Path, dict]]], list[str]]:
    """(rows to compare: full first, then lora, then what else is alike with them; the runs that are left out, and why).

    Of rows that differ in their learning rate alone the one with the most seeds is taken, of these that of the best rate of a
    sweep, of these the newest.
    """
    pair = find_pair(runs, runs_dir, task)
    others = {str(run[0]): unlike([*pair, run]) for run in runs if run not in pair}
    alike = [run for run in runs if not others.get(str(run[0]))]
    rows, older = group(alike)
    best = {method: value(read_sweep(pair[0][0].parent), f"{method}.best") for method in ("full", "lora", "head")}

    def rank(row):
        _, summary = row[0]
        newest = max(summary.get("ended") or "" for _, summary in row)
        return len(row), value(summary, "config.lr") == best.get(summary.get("method"), "none"), newest

    chosen = {}
    for row in sorted(rows, key=rank, reverse=True):
        chosen.setdefault(method_key(row[0][1], RATES), row)
    order = {"full": 0, "lora": 1, "head": 2}
    taken = sorted(chosen.values(), key=lambda row: order.get(row[0][1].get("method"), 3))
    kept = {str(run[0]) for row in taken for run in row}
    reasons = {str(run[0]): "a newer run has this seed" for run in older}
    reasons |= {place: why[0] for place, why in others.items() if why}
    left = [
        f"{run[0].name} ({reasons.get(str(run[0]), 'another learning rate, or older')})"
        for run in runs
        if str(run[0]) not in kept
    ]
    if left:
        more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
        print(f"left out of {task}: {', '.join(left[:MOST_NAMED])}{more}", file=sys.stderr)
    return taken, left


# What other scripts leave beside the runs -------------------------------------------------------------------------------


def read_beside(path: Path, check):
    """check(content) of a JSON file beside the runs; None where there is none, or it is not as expected, which is said.

    A runs_dir may hold several pairs of a task, and a file of what was found out about one of them.
    """
    if not path.is_file():
        return None
    try:
        return check(read_json(path))
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        print(f"left out: {path} is damaged ({type(error).__name__}: {str(error)[:200]})", file=sys.stderr)
        return None


def read_sweep(folder: Path) -> dict | None:
    """sweep.json of a task's folder: method -> {"rates", "metric" (null: the run failed), "best", "default"}; None: no file."""

    def check(found):
        arms = {method: arm for method, arm in found.items() if isinstance(arm, dict) and "rates" in arm}
        for arm in arms.values():
            check_numbers(arm["rates"], arm["metric"], [arm.get("best"), arm.get("default")])
            if len(arm["rates"]) != len(arm["metric"]) or min(arm["rates"]) <= 0:
                raise ValueError("a rate is without its metric, or not above 0")
        arms = {method: {key: arm.get(key) for key in ("rates", "metric", "best", "default")} for method, arm in arms.items()}
        return {method: arm for method, arm in arms.items() if any(y is not None for y in arm["metric"])} or None

    return read_beside(folder / "sweep.json", check)


def check_numbers(*lists) -> None:
    """ValueError where something in the lists is neither a number that is finite nor None."""
    if odd := [x for found in lists for x in found if not isinstance(x, int | float | None) or not is_sane(x)]:
        raise ValueError(f"{str(odd[0])[:40]!r} is no number")


# What is compared of a row ---------------------------------------------------------------------------------------------


def facts(summary: dict, folder: Path, memory: str, test: dict | None) -> dict:
    """What is compared, of one run; None where it is not known. memory: "gpu" or "cpu". test: its metrics on the test split."""
    trained, total = value(summary, "parameters.trainable"), value(summary, "parameters.total")
    metric = value(summary, "metrics.name")
    best = value(summary, "metrics.best") or {}
    return {
        "folder": str(folder),
        "method": summary.get("method"),
        "seed": seed_of(summary),
        "metric": best.get(metric) if test is None else test.get(metric),
        "metrics": best if test is None else test,
        "lr": value(summary, "config.lr"),
        "trained_parameters": trained,
        "trained_percent": 100 * trained / total if trained is not None and total else None,
        "checkpoint_bytes": summary.get("checkpoint_bytes"),
        "train_seconds": summary.get("train_seconds"),
        "seconds": summary.get("seconds"),
        "samples_per_second": summary.get("samples_per_second"),
        "peak_memory_bytes": value(summary, f"peak_memory_bytes.{memory}"),
        **{f"metric_{when}": value(summary, f"metrics.{when}.{metric}") for when in ("before", "best", "final")},
        "best_epoch": best.get("epoch"),
    }


def row_facts(runs: list[dict], label: str) -> dict:
    """The facts of a row: means over its runs, which are kept under "runs"; of one run its own."""
    row = {"label": label, "folder": runs[0]["folder"], "method": runs[0]["method"], "seeds": [run["seed"] for run in runs]}
    for key in runs[0]:
        if key not in (*row, "seed", "metrics"):
            row[key] = mean_of([run[key] for run in runs])
    names = dict.fromkeys(name for run in runs for name, x in run["metrics"].items() if isinstance(x, int | float))
    row["metrics"] = {name: mean_of([run["metrics"].get(name) for run in runs]) for name in names}
    return row | {"runs": runs}


def mean_of(values: list):
    """The mean; None where one is not known; a whole number of whole numbers, and what all agree on as it is."""
    if any(not isinstance(x, int | float) for x in values):
        return None
    mean = values[0] if len(set(values)) == 1 else sum(values) / len(values)
    return round(mean) if all(isinstance(x, int) for x in values) else mean
