"""Says what LoRA saved and what it cost: compares finished runs by what they left in their folders.

    python scripts/compare.py                                  # the newest full and lora runs, where one task has both (and
                                                               # what else is alike: the head alone, other ranks and methods)
    python scripts/compare.py --task detection                 # the same for this task
    python scripts/compare.py outputs/detection/full outputs/detection/lora outputs/detection/lora_r32
    python scripts/compare.py --all                            # every task, on one page
    python scripts/compare.py --all --train                    # first trains what is missing: three seeds of each method
    python scripts/compare.py --all --runs_dir outputs runs/real --results docs/results.md

Prints a verdict and a table, and leaves compare.md, compare.json, compare.png and compare.html, one page with everything in
it, in outputs/<task>/compare/ (of --all: outputs/compare/). Runs that differ in their seed alone are one row, with its mean.
Runs that are not alike in data, base model, metric or training budget are refused; --force compares them anyway, and says so.
What each sample gave (samples.json) says how much of a difference is chance: 95 % intervals by a paired bootstrap. Where every
run was scored on the test split (eval.py --split test), the metric is that of the test split.
"""

import argparse
import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.checkpoint import read_json, write_json, write_text  # noqa: E402
from common.config import UserError, cli, project_root  # noqa: E402
from common.folders import check_place  # noqa: E402
from compare_beside import look_closer, read_closer  # noqa: E402
from compare_runs import (  # noqa: E402
    differences,
    facts,
    find_rows,
    finished,
    group,
    is_sane,
    label_of,
    read_summary,
    read_sweep,
    read_test,
    row_facts,
    settings_of,
    value,
)

# Where the tasks' eval scripts say what the base as it is reaches; {} is the metric.
OF_THE_BASE = ("zero_shot.{}", "systems.base as it is.{}.mean", "held_out.base as it is.{}.value")


# One comparison --------------------------------------------------------------------------------------------------------


def compared(rows: list, force: bool, left_out: list[str]) -> dict:
    """Everything that is found out about rows of (run folder, summary). UserError for runs that are not alike."""
    from compare_text import lora_of
    from compare_words import claim, judge, verdict

    summaries, unfair = [s for row in rows for _, s in row], why_unfair([run for row in rows for run in row], force)
    metric, up = value(summaries[0], "metrics.name"), bool(value(summaries[0], "metrics.higher_is_better"))
    if not metric:
        raise UserError(f"{rows[0][0][0]}/summary.json names no metric (metrics.name): its run never came to an evaluation")
    found, base, about = measured(rows, metric)
    methods = [row["method"] for row in found]
    by_method = len(set(methods)) == len(methods) and set(methods) <= {"full", "lora", "head"}
    chance = add_chance(found, base, metric, about["split"])
    task, beside = str(summaries[0].get("task")), Path(base["folder"]).parent
    closer, stale = read_closer(beside / "compare", found)
    record = {
        "task": task,
        "title": task,
        "heading": f"{task}: {', '.join(row['label'] for row in found)}" + (" (not a fair comparison)" if unfair else ""),
        "verdict": [verdict(row, base, metric, up, by_method) for row in found if row is not base],
        "forced": bool(unfair),
        "notes": unfair + remarks(summaries, found) + about.pop("notes") + chance + stale,
        "left_out": left_out,
        "metric": metric,
        "higher_is_better": up,
        **about,
        "compared_with": base["label"],
        "runs": found,
        "configs": [settings_of(row[0][1]) for row in rows],
        "provenance": provenance(rows),
        "sweep": read_sweep(beside),
        **closer,
        "beside": str(beside / "compare"),
    }
    lora = lora_of(record)
    taken = {key: [lora[key], base[key]] for key in ("checkpoint_bytes", "peak_memory_bytes", "train_seconds")}
    name = "LoRA" if (lora["method"], base["method"]) == ("lora", "full") else lora["label"]
    judged = {"claim": claim(lora, base, record), "claimed": name, "judgement": judge(lora, up), "taken": taken}
    return record | judged | {"per_class": class_differences(lora, base)}


def why_unfair(runs: list[tuple[Path, dict]], force: bool) -> list[str]:
    """A note that says why runs are no fair comparison, or none. UserError instead of a note without --force."""
    names = [str(summary.get("run_name")) for _, summary in runs]
    labels = [name if names.count(name) == 1 else str(folder) for name, (folder, _) in zip(names, runs, strict=True)]
    reasons = "; ".join(differences([s for _, s in runs], labels))
    if reasons and not force:
        raise UserError(f"these runs are no fair comparison; {reasons}. --force compares them anyway")
    return [f"Not a fair comparison (--force); {reasons}."] if reasons else []


def measured(rows: list, metric: str) -> tuple[list[dict], dict, dict]:
    """(the facts of each row, of the row they are compared with, {"split", "memory", "before", ..., "notes"})."""
    runs = [run for row in rows for run in row]
    memory = "gpu" if all(value(s, "peak_memory_bytes.gpu") for _, s in runs) else "cpu"
    tested = {str(folder): read_test(folder, metric) for folder, _ in runs}
    split = "val" if None in tested.values() else "test"
    labels = [label_of(row) for row in rows]
    labels = [name if labels.count(name) == 1 else str(row[0][0]) for name, row in zip(labels, rows, strict=True)]
    found = [
        row_facts([facts(s, folder, memory, tested[str(folder)] if split == "test" else None) for folder, s in row], label)
        for row, label in zip(rows, labels, strict=True)
    ]
    base = next((row for row in found if row["method"] == "full"), found[0])
    before, where = before_of(base, metric, split)
    some = split == "val" and any(tested.values())
    notes = ["Not every run was scored on the test split (eval.py --split test): the validation split measures."] if some else []
    return found, base, {"split": split, "memory": memory, "before": before, "before_split": where, "notes": notes}


def add_chance(rows: list[dict], base: dict, metric: str, split: str) -> list[str]:
    """Adds what the samples say to the rows whose runs have a samples.json of this metric. Notes where some have none."""
    from bootstrap import FEWEST, agreement, intervals, read_samples

    place = "eval_test" if split == "test" else ""
    records = [{run["seed"]: read_samples(Path(run["folder"]) / place, metric) for run in row["runs"]} for row in rows]
    records = [{seed: record for seed, record in each.items() if record} for each in records]
    whole = [len(each) == len(row["runs"]) for each, row in zip(records, rows, strict=True)]
    missing = [row["label"] for row, has in zip(rows, whole, strict=True) if not has]
    if base["label"] in missing:
        return [f"No samples.json of {metric} of {base['label']}, so how much of a difference is chance is not known."]
    have, own = (
        [row for row, has in zip(rows, whole, strict=True) if has],
        [r for r, has in zip(records, whole, strict=True) if has],
    )
    at = next(i for i, row in enumerate(have) if row is base)
    for row, found, record in zip(have, intervals(own, at), own, strict=True):
        row.update(found)
        if "difference" in found and (seen := agreement(record, own[at])):
            row["agreement"] = seen
    if base["samples"] < FEWEST:
        return [f"{base['samples']} samples are too few to tell any difference."]
    without = missing + [row["label"] for row in have if row is not base and "difference" not in row]
    notes = [f"Of {', '.join(without)} there is no interval: no samples.json, or of other samples."] if without else []
    for row in have:
        shared = row.get("shared", row["seeds"])
        if len(row["seeds"]) == len(base["seeds"]) == 1:
            continue
        if alone := sorted({*row["seeds"], *base["seeds"]} - {*shared}, key=str) if "difference" in row else []:
            notes.append(
                f"{row['label']} and {base['label']} do not share seed {', '.join(map(str, alone))}; the rest are paired."
            )
    return notes


def before_of(base: dict, metric: str, split: str) -> tuple[float | None, str]:
    """(the metric of the base as it is, the split that it is of): on the test split where eval scored it there, too."""
    if split == "test":
        found = read_json(Path(base["folder"]) / "eval_test.json")
        scores = (value(found, place.format(metric)) for place in OF_THE_BASE)
        if (score := next((x for x in scores if isinstance(x, int | float) and is_sane(x)), None)) is not None:
            return score, "test"
    return base["metric_before"], "val"


def class_differences(run: dict, base: dict) -> dict | None:
    """{"metric", "values": class -> [difference in each shared seed]} of the first metric that is there by class; or None."""
    mine, other = ({each["seed"]: each["metrics"] for each in row["runs"]} for row in (run, base))
    shared = [seed for seed in mine if seed in other]
    for key in (key for key in mine[next(iter(mine))] if key.startswith("per_")):
        values = {}
        for seed in shared:
            a, b = (found if isinstance(found := part[seed].get(key), dict) else {} for part in (mine, other))
            for name in a:
                if isinstance(a[name], int | float) and isinstance(b.get(name), int | float):
                    values.setdefault(name, []).append(a[name] - b[name])
        if len(values) > 1:
            return {"metric": key, "values": values}
    return None


def remarks(summaries: list[dict], rows: list[dict]) -> list[str]:
    """What a reader of the numbers should know: a run that learnt nothing, machines or versions that differ."""
    from compare_words import number

    found, up = [], value(summaries[0], "metrics.higher_is_better")
    for row in rows:
        before, best = row["metric_before"], row["metric_best"]
        if before is not None and best is not None and (best <= before if up else best >= before):
            found.append(f"{row['label']} did not get better than before training ({number(before)}, best {number(best)}).")
    said = {}  # what a run says of itself -> the runs that say it
    for s in summaries:
        texts = [f": {str(note)[:300]}." for note in s.get("notes") or []]
        if left := value(s, "data.left_out"):
            faults = (f"{str(count)[:20]} with {fault[:80]}" for fault, count in left.items())
            texts.append(f" left out: {', '.join(faults)}.")
        for text in texts:
            said.setdefault(text, []).append(str(s.get("run_name"))[:80])
    found += [", ".join(names) + text for text, names in said.items()]
    for key in ("device", "torch", "threads", "processes"):
        values = [str(value(s, f"environment.{key}"))[:60] for s in summaries]
        if any(v != values[0] for v in values):
            shown = ", ".join(values if len(values) < 4 else dict.fromkeys(values))
            found.append(f"{key} differs ({shown}): times and memory are not like for like.")
    if all(value(s, "data.sha256") is None or value(s, "base.sha256") is None for s in summaries):
        found.append("The summaries do not say which data or which base was used (sha256), so that was not checked.")
    return list(dict.fromkeys(found))


def provenance(rows: list) -> dict:
    """Versions, machine, hashes, and the commands that repeat the runs."""
    summary, summaries = rows[0][0][1], [s for row in rows for _, s in row]
    scripts = [("train.py" if s.get("method") == "full" else "train_lora.py", folder) for row in rows for folder, s in row]
    names = ("python", "torch", "transformers", "peft", "platform")
    found = {key: str(value(summary, f"environment.{key}") or "")[:80] for key in names}
    on = ((str(value(s, "environment.device"))[:80], value(s, "environment.threads")) for s in summaries)
    found["machine"] = "; ".join(
        dict.fromkeys(device + (f", threads of a run: {threads}" if threads else "") for device, threads in on)
    )
    hashes = dict.fromkeys(str(value(s, "data.sha256")) for s in summaries)
    found |= {"base_name": value(summary, "base.name"), "base_sha256": value(summary, "base.sha256")}
    found |= {"data_name": value(summary, "data.name"), "data_sha256": value(summary, "data.sha256"), "splits": len(hashes)}
    return found | {"commands": [f"python {script} --config {folder / 'config.yaml'}" for script, folder in scripts]}


# Several tasks ---------------------------------------------------------------------------------------------------------


def compare_all(runs_dirs: list[Path], force: bool, look: bool = False) -> tuple[list[dict], list[str]]:
    """(a comparison of each task and data set that has runs of both kinds, notes on those that cannot be compared)."""
    records, notes = [], []
    for runs_dir in runs_dirs:
        for task, runs in finished(runs_dir).items():
            sets = {}
            for run in runs:
                sets.setdefault((str(value(run[1], "data.name")), str(value(run[1], "base.name"))), []).append(run)
            for (data, _), own in sets.items():
                try:
                    rows, left = find_rows(own, runs_dir, task)
                    record = compared(rows, force, left)
                    record = look_closer(record) if look else record
                    records.append(record | {"title": task, "data": Path(data).name})
                except UserError as error:
                    notes.append(f"{task} on {Path(data).name} is not compared: {error}")
    for record in records:  # a task that is there once is its own name
        if sum(other["task"] == record["task"] for other in records) > 1:
            record["title"] = f"{record['task']} on {record['data']}"
    order = {task: i for i, task in enumerate(("classification", "detection", "pose", "clip", "voice_rvc", "medical_sam3d"))}
    return sorted(records, key=lambda record: order.get(record["task"], len(order))), notes


def report_all(runs_dirs: list[Path], force: bool, look: bool, output_dir: Path, results: Path | None) -> str:
    """Writes the report over all tasks; returns what to print. UserError where nothing can be compared."""
    from compare_page import html_page
    from compare_plots import draw_pareto
    from compare_text import all_pages, results_page
    from compare_words import overall

    records, notes = compare_all(runs_dirs, force, look)
    if not records:
        raise UserError(f"nothing to compare below {', '.join(map(str, runs_dirs))}: {'; '.join(notes) or 'there are no runs'}")
    sentence = overall(records)
    shown, text = all_pages(sentence, records, notes)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "compare.json", {"sentence": sentence, "notes": notes, "comparisons": records})
    draw_pareto(records, output_dir / "compare.png")
    write_text(output_dir / "compare.md", text)
    write_text(output_dir / "compare.html", html_page("Full or LoRA?", sentence, records, notes))
    said = f"{shown}\nwrote compare.md, compare.json, compare.png and compare.html to {output_dir}"
    if results:
        picture = results.with_suffix(".png")
        results.parent.mkdir(parents=True, exist_ok=True)
        draw_pareto(records, picture)
        write_text(results, results_page(sentence, records, notes, picture.name))
        said += f", {results} and {picture}"
    return said


def report_one(rows: list, left_out: list[str], force: bool, look: bool, output_dir: Path | None, runs_dir: Path) -> str:
    """Writes the report of one comparison; returns what to print. UserError for runs that are not alike."""
    from compare_page import html_page
    from compare_plots import draw_bars_of_runs
    from compare_text import one_page

    record = compared(rows, force, left_out)
    record = look_closer(record) if look else record
    output_dir = output_dir or runs_dir / record["task"] / "compare"
    output_dir.mkdir(parents=True, exist_ok=True)
    shown, text = one_page(record)
    write_json(output_dir / "compare.json", record)
    write_text(output_dir / "compare.md", text)
    draw_bars_of_runs(record, output_dir / "compare.png")
    write_text(
        output_dir / "compare.html", html_page(record["heading"], record["claim"], [record], [], output_dir / "compare.png")
    )
    return f"{shown}\nwrote compare.md, compare.json, compare.png and compare.html to {output_dir}"


# Putting it together ---------------------------------------------------------------------------------------------------


def rows_of(folders: list[Path]) -> list:
    """Rows of the named runs: those that differ in their seed alone are one; an older one of the same seed has its own."""
    rows, older = group([(folder, read_summary(folder)) for folder in folders])
    return rows + [[run] for run in older]


def rows_of_task(runs_dir: Path, task: str) -> tuple[list, list[str]]:
    """(rows of a task, the runs that are left out); without a name, of the one task that has both a full and a lora run."""
    runs = finished(runs_dir)
    pairs = [name for name, found in runs.items() if {"full", "lora"} <= {s.get("method") for _, s in found}]
    if not task and len(pairs) != 1:
        found = f"{', '.join(sorted(pairs))} have both: say which with --task, or --all" if pairs else "no task has both"
        raise UserError(f"looked below {runs_dir} for a finished full and a finished lora run of one task: {found}")
    return find_rows(runs.get(task or pairs[0], []), runs_dir, task or pairs[0])


def train(tasks: list[str], args, runs_dir: Path) -> None:
    """Trains what a comparison of these tasks needs and is not below runs_dir yet. UserError for flags that cannot be."""
    from run_all import RunAllConfig, train_missing

    config = RunAllConfig(seeds=args.seeds, data_dir=args.data_dir)  # which checks them
    seeds = [int(seed) for seed in config.seeds.split(",")]
    train_missing(tasks, seeds, runs_dir=str(runs_dir), data_dirs=config.data_dirs, sweep_lr=args.sweep_lr)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, two or more")
    parser.add_argument("--task", default="", help="compare the newest finished full and lora runs of this task")
    parser.add_argument("--all", action="store_true", help="compare every task that has runs; of several data sets each")
    parser.add_argument(
        "--runs_dir", "--runs-dir", type=Path, nargs="+", help="where --task and --all look (default: outputs/ beside common/)"
    )
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="where the files go (default: outputs/<task>/compare)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="with --all: also write this Markdown page of the results")
    parser.add_argument("--train", action="store_true", help="with --task or --all: first train what is missing, by run_all.py")
    parser.add_argument("--seeds", default="0,1,2", help="with --train: of each method a run by each of these (default: 0,1,2)")
    parser.add_argument(
        "--sweep_lr", "--sweep-lr", action="store_true", help="with --train: at the best learning rate of each method"
    )
    parser.add_argument(
        "--data_dir", "--data-dir", default="", help="with --train: task=folder, with commas between; else the demo"
    )
    parser.add_argument(
        "--look", action="store_true", help="also make what needs the models: samples they differ on, rank curve, behaviour"
    )
    parser.add_argument("--force", action="store_true", help="compare runs that differ in more than their method, and say so")
    args = parser.parse_args(argv)
    runs_dirs = [folder.expanduser() for folder in args.runs_dir or [project_root() / "outputs"]]
    folders, output_dir = [folder.expanduser() for folder in args.runs], args.output_dir and args.output_dir.expanduser()
    if (bool(folders) + bool(args.task) + args.all) > 1:
        raise UserError("give run folders, --task or --all, not both")
    if len({folder.resolve() for folder in folders}) != len(folders) or len(folders) == 1:
        raise UserError("a comparison needs two or more different run folders")
    if not args.all and (args.results or len(runs_dirs) > 1):
        raise UserError("--results and several folders of --runs_dir are for --all")
    if args.train and (folders or not (args.task or args.all)):
        raise UserError("--train needs --task or --all, which say what to train")
    if (args.sweep_lr or args.data_dir) and not args.train:
        raise UserError("--sweep_lr and --data_dir say how to train: give --train, too")
    if output_dir:
        check_place("--output_dir", output_dir)
    if args.results:
        check_place("--results", args.results.expanduser().parent)
    if args.train:
        from task_modules import FOLDERS

        train([args.task] if args.task else list(FOLDERS), args, runs_dirs[0])
    if args.all:
        results = args.results and args.results.expanduser()
        print(report_all(runs_dirs, args.force, args.look, output_dir or runs_dirs[0] / "compare", results))
    else:
        rows, left_out = (rows_of(folders), []) if folders else rows_of_task(runs_dirs[0], args.task)
        print(report_one(rows, left_out, args.force, args.look, output_dir, runs_dirs[0]))


if __name__ == "__main__":
    cli(main)
