"""Says what LoRA saved and what it cost: compares finished runs by their summary.json.

    python scripts/compare.py                                  # the newest full and lora run, where one task has both (and
                                                               # the newest with the head alone, where there is one)
    python scripts/compare.py --task detection                 # the same for this task
    python scripts/compare.py outputs/detection/full outputs/detection/lora outputs/detection/lora_r32

Prints a verdict and a table, and leaves compare.md, compare.json and compare.png in outputs/<task>/compare/. Runs that
are not alike in data, base model, metric or training budget are refused; --force compares them anyway, and says so. What
each sample gave (samples.json) says how much of a difference is chance of these samples: 95 % intervals by a paired bootstrap.
"""

import argparse
import sys
from pathlib import Path
from types import NoneType

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.checkpoint import read_json, write_json, write_text  # noqa: E402
from common.config import UserError, cli, project_root  # noqa: E402

SCHEMA_VERSION = 1
MUST_AGREE = ("task", "data.sha256", "base.sha256", "metrics.name", "config.epochs", "config.max_steps_per_epoch")
KINDS = {  # of what is read of a summary, where it is there
    str: ("task", "method", "run_name", "status", "ended", "metrics.name", "data.sha256", "base.sha256"),
    dict: ("config", "metrics", "metrics.before", "metrics.best", "metrics.final", "data.left_out", "environment"),
    int: (
        *("parameters.trainable", "parameters.total", "checkpoint_bytes", "metrics.best.epoch", "peak_memory_bytes.cpu"),
        *("peak_memory_bytes.gpu", "config.batch_size", "config.gradient_accumulation_steps", "environment.processes"),
    ),
    list: ("notes",),
    float: ("train_seconds", "seconds", "samples_per_second"),
}
SEPARATE = {"run_name", "output_dir", "resume", "overwrite"}  # settings that have to differ, or say nothing


# Reading ---------------------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict:
    """The summary of a run folder. UserError, in one line, where there is none or it is not one that this script knows."""
    path = folder if folder.name == "summary.json" else folder / "summary.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: there is no {path.name} in it")
    summary = read_json(path)
    version = summary.get("schema_version") if isinstance(summary, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version!r}; this script reads version {SCHEMA_VERSION}")
    for key, kind in ((key, kind) for kind, keys in KINDS.items() for key in keys):
        if not isinstance(value(summary, key), (kind, int, NoneType) if kind is float else (kind, NoneType)):
            raise UserError(f"{path} is damaged: its {key} is {str(value(summary, key))[:40]!r}")
    for when in ("before", "best", "final"):
        for name, x in (value(summary, f"metrics.{when}") or {}).items():
            if not isinstance(x, int | float | dict | None):
                raise UserError(f"{path} is damaged: its metrics.{when}.{name} is {str(x)[:40]!r}")
    return summary


def value(summary: dict, key: str):
    """What stands under a dotted key such as "metrics.best.map_50"; None where there is nothing."""
    for part in key.split("."):
        summary = summary.get(part) if isinstance(summary, dict) else None
    return summary


def find_pair(runs_dir: Path, task: str) -> list[Path]:
    """The newest finished full and lora run folder of a task that are alike, and one of the head alone where there is one.

    Without a task: of the one task that has both.
    """
    runs = {}  # task -> method -> folders, the newest first
    for path, summary in sorted(readable(runs_dir), key=lambda pair: pair[1].get("ended") or "", reverse=True):
        if summary.get("status") == "finished":
            runs.setdefault(str(summary.get("task")), {}).setdefault(summary.get("method"), []).append(path.parent)
    pairs = [name for name, methods in runs.items() if {"full", "lora"} <= set(methods)]
    if task:
        missing = [method for method in ("full", "lora") if method not in runs.get(task, {})]
        if missing:
            raise UserError(f"no finished {' and no finished '.join(missing)} run of {task} below {runs_dir}; train it first")
    elif len(pairs) != 1:
        found = f"{', '.join(sorted(pairs))} have both: say which with --task" if pairs else "no task has both"
        raise UserError(f"looked below {runs_dir} for a finished full and a finished lora run of one task: {found}")
    methods = runs[task or pairs[0]]
    newest = [methods["full"][0], methods["lora"][0]]
    every = ([full, lora] for lora in methods["lora"] for full in methods["full"])
    chosen = next((pair for pair in every if not unlike(pair)), newest)
    if chosen != newest:
        print(f"{newest[0]} and {newest[1]} are newer, but no fair comparison: {'; '.join(unlike(newest))}", file=sys.stderr)
    # A linear probe, if it is of the same data and budget: how far one gets without touching the base.
    heads = [folder for folder in methods.get("head", []) if not unlike([*chosen, folder])]
    if methods.get("head") and not heads:
        why = "; ".join(unlike([*chosen, methods["head"][0]]))
        print(f"left out {methods['head'][0]}, the newest run of the head alone: {why}", file=sys.stderr)
    return [*chosen, *heads[:1]]


def readable(runs_dir: Path):
    """Yields (path, summary) of every run below runs_dir; those that cannot be read are named."""
    for path in sorted(runs_dir.glob("*/[!.]*/summary.json")):
        try:
            yield path, read_summary(path)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)


def unlike(folders: list[Path]) -> list[str]:
    return differences([read_summary(folder) for folder in folders], [folder.name for folder in folders])


def global_batch(summary: dict) -> int | None:
    """Samples behind one optimizer step, over all processes."""
    size = value(summary, "config.batch_size")
    many = (value(summary, "config.gradient_accumulation_steps") or 1) * (value(summary, "environment.processes") or 1)
    return size * many if size else None


def differences(summaries: list[dict], labels: list[str]) -> list[str]:
    """Why these runs are no fair comparison: a phrase for each field, with the value of every run."""
    fields = {key: [value(s, key) for s in summaries] for key in MUST_AGREE}
    fields["batch_size x gradient_accumulation_steps x processes"] = [global_batch(s) for s in summaries]
    found = {key: values for key, values in fields.items() if any(v != values[0] for v in values)}
    statuses = [s.get("status") for s in summaries]
    if set(statuses) != {"finished"}:
        found["status"] = statuses
    phrases = []
    for key, values in found.items():
        length = 16 if key.endswith("sha256") else None
        phrases.append(f"{key}: " + ", ".join(f"{str(v)[:length]} ({label})" for v, label in zip(values, labels, strict=True)))
    return phrases


# Saying ----------------------------------------------------------------------------------------------------------------


def facts(summary: dict, label: str, folder: Path, memory: str) -> dict:
    """What is compared, of one run; None where it is not known. memory: "gpu" or "cpu"."""
    trained, total = value(summary, "parameters.trainable"), value(summary, "parameters.total")
    metric = value(summary, "metrics.name")
    return {
        "label": label,
        "folder": str(folder),
        "method": summary.get("method"),
        "trained_parameters": trained,
        "trained_percent": 100 * trained / total if trained is not None and total else None,
        "checkpoint_bytes": summary.get("checkpoint_bytes"),
        "train_seconds": summary.get("train_seconds"),
        "seconds": summary.get("seconds"),
        "samples_per_second": summary.get("samples_per_second"),
        "peak_memory_bytes": value(summary, f"peak_memory_bytes.{memory}"),
        **{f"metric_{when}": value(summary, f"metrics.{when}.{metric}") for when in ("before", "best", "final")},
        "best_epoch": value(summary, "metrics.best.epoch"),
    }


def add_intervals(runs: list[dict], base: dict, metric: str) -> str | None:
    """Adds what bootstrap.intervals says to the runs that have a samples.json of this metric. A note where some have none."""
    from bootstrap import FEWEST, intervals, read_samples

    records = {run["label"]: read_samples(Path(run["folder"]), metric) for run in runs}
    missing = [label for label, record in records.items() if record is None]
    if base["label"] in missing:
        return f"No samples.json of {metric} in {base['folder']}, so how much of a difference is chance is not known."
    have = [run for run in runs if run["label"] not in missing]
    for run, found in zip(have, intervals([records[run["label"]] for run in have], have.index(base)), strict=True):
        run.update(found)
    if base["samples"] < FEWEST:
        return f"{base['samples']} samples are too few to tell any difference."
    without = missing + [run["label"] for run in have if run is not base and "difference" not in run]
    return f"Of {', '.join(without)} there is no interval: no samples.json, or of other samples." if without else None


def number(x, unit: str = "") -> str:
    """A number as one reads it: 8,123,456 or 0.861 or 12.4."""
    if x is None:
        return "unknown"
    if isinstance(x, int):
        text = f"{x:,}"
    elif 0 < abs(x) < 0.01:
        text = f"{x:.3g}"
    else:
        text = f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"
    return text + (f" {unit}" if unit else "")


def megabytes(count) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.0f} MB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def percent(x) -> str:
    return "unknown" if x is None else f"{x:.1f} %" if x >= 10 else f"{x:.2f} %" if x >= 0.1 else f"{x:.2g} %"


def ratio(a, b) -> float | None:
    return a / b if a is not None and b else None


def times(x: float) -> str:
    return f"{x:,.0f}x" if x >= 20 else f"{x:.1f}x" if x >= 2 else f"{x:.2f}x"


def smaller(a, b, less: str, more: str) -> str:
    """How a compares with b in words: "4.8x smaller"; less and more are the words for it."""
    text = times(max(a, b) / min(a, b))
    return "the same" if text == "1.00x" else f"{text} {less if a < b else more}"


def verdict(run: dict, other: dict, metric: str, higher_is_better: bool, by_method: bool) -> str:
    """One sentence about a run against another: what it reaches, and what it took. by_method: call runs by their method."""
    words = {"lora": "LoRA", "head": "the head alone"}
    a, b = (words.get(r["method"], r["method"]) if by_method else r["label"] for r in (run, other))
    x, y = run["metric_best"], other["metric_best"]
    text = f"{a} reaches {metric} {number(x)} against {number(y)} of {b}"
    if x is not None and y is not None:
        x, y = round(x, 9), round(y, 9)  # sums in another order are no difference
        better = "the same" if x == y else "better" if (x > y) == higher_is_better else "worse"
        gap = "" if x == y else f"{number(abs(float(x - y)))} "
        text += f" ({gap}{better}{by_chance(run)})"
    few, many = run["trained_parameters"], other["trained_parameters"]
    if few and many:
        text += f", with {number(few)} trained parameters against {number(many)} ({smaller(few, many, 'fewer', 'more')})"
    size, whole = run["checkpoint_bytes"], other["checkpoint_bytes"]
    if size and whole:
        text += f", a checkpoint of {megabytes(size)} against {megabytes(whole)} ({smaller(size, whole, 'smaller', 'larger')})"
    costs = {"training time": "train_seconds", "peak memory": "peak_memory_bytes"}
    costs = [f"{times(r)} the {word}" for word, key in costs.items() if (r := ratio(run[key], other[key]))]
    return text + (", " if costs else "") + " and ".join(costs) + "."


def by_chance(run: dict) -> str:
    """What the samples say of a run's difference to the one it is compared with."""
    if "difference" not in run:
        return ", no difference shown" if "samples" in run else ""
    low, high = run["difference"]
    shown = "no difference shown" if low <= 0 <= high else "a difference"
    return f"; {shown} by {run['samples']} samples: 95 % interval {low:+.3f} to {high:+.3f}"


def remarks(summaries: list[dict], runs: list[dict]) -> list[str]:
    """What a reader of the numbers should know: a run that learnt nothing, machines or versions that differ."""
    found = []
    for s, run in zip(summaries, runs, strict=True):
        before, best = run["metric_before"], run["metric_best"]
        up = value(s, "metrics.higher_is_better")
        if before is not None and best is not None and (best <= before if up else best >= before):
            found.append(f"{run['label']} did not get better than before training ({number(before)}, best {number(best)}).")
        found += [f"{run['label']}: {note}." for note in s.get("notes") or []]
        if left := value(s, "data.left_out"):
            found.append(f"{run['label']} left out: " + ", ".join(f"{count} with {fault}" for fault, count in left.items()) + ".")
    for key in ("device", "torch", "threads", "processes"):
        values = [value(s, f"environment.{key}") for s in summaries]
        if any(v != values[0] for v in values):
            found.append(f"{key} differs ({', '.join(map(str, values))}): times and memory are not like for like.")
    if all(value(s, "data.sha256") is None or value(s, "base.sha256") is None for s in summaries):
        found.append("The summaries do not say which data or which base was used (sha256), so that was not checked.")
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns of equal width, so that it reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(cells)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def interval(ends) -> str:
    return "unknown" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def main_table(runs: list[dict], metric: str, memory: str) -> str:
    def row(name, key, show=number):
        return [name, *(show(run.get(key)) for run in runs)]

    return table(
        ["", *(run["label"] for run in runs)],
        [
            row(f"{metric} before training", "metric_before"),
            row(f"{metric} best", "metric_best"),
            *([row("95 % interval", "interval", interval)] if any("interval" in run for run in runs) else []),
            row(f"{metric} final", "metric_final"),
            row("best epoch", "best_epoch"),
            row("trained parameters", "trained_parameters"),
            row("of all parameters", "trained_percent", percent),
            row("checkpoint", "checkpoint_bytes", megabytes),
            row("training steps", "train_seconds", lambda x: number(x, "s")),
            row("whole run", "seconds", lambda x: number(x, "s")),
            row("samples per second", "samples_per_second", lambda x: "unknown" if x is None else f"{x:,.1f}"),
            row(f"peak memory ({memory.upper()})", "peak_memory_bytes", megabytes),
        ],
    )


def rest_of_page(summaries: list[dict], runs: list[dict]) -> str:
    """The other metrics of the best epochs, the settings that differ, and how to read it all, as Markdown."""
    text, labels = "", [run["label"] for run in runs]
    best = [value(s, "metrics.best") or {} for s in summaries]
    names = dict.fromkeys(name for b in best for name, x in b.items() if isinstance(x, int | float))
    names = [name for name in names if name not in ("epoch", "step")]
    if names:
        text += "\n## All metrics of the best epoch\n\n"
        text += table(["", *labels], [[name, *(number(b.get(name)) for b in best)] for name in names]) + "\n"
    configs = [s.get("config") or {} for s in summaries]
    names = dict.fromkeys(name for c in configs for name in c if name not in SEPARATE)
    rows = [[name, *(str(c.get(name, "-")) for c in configs)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if rows:
        text += "\n## Settings that differ\n\n" + table(["", *labels], rows) + "\n"
    text += "\n## How to read it\n\n"
    text += "- *best* is the epoch that the validation metric chose; the same samples choose it and measure it, for every run.\n"
    text += "- *95 % interval*: where the metric lies if the validation samples are drawn anew (bootstrap, the same draws for "
    text += "every run). A difference whose interval holds 0 is not shown. The best epoch was chosen on these samples.\n"
    text += "- These are single runs. Another `--seed` shows how much of a difference is chance of the training.\n"
    text += "- *checkpoint* is what you keep of a run. An adapter also needs its base model, once for all adapters.\n"
    text += "- *peak memory* on a CPU counts the whole process, libraries included; on a GPU what torch had allocated.\n"
    return text + "\n" + "".join(f"- {run['label']}: `{run['folder']}`\n" for run in runs)


def draw(runs: list[dict], metric: str, higher_is_better: bool, title: str, path: Path) -> None:
    """compare.png: the metric before training and at its best, checkpoint size, trained parameters, training time."""
    from common.plots import figure, plot_text, save_figure

    drawing, (panels,) = figure(1, 4, width=max(3.4, 1.1 * len(runs)), height=4.2)
    colors = [f"C{i}" for i in range(len(runs))]

    def bars(panel, key, shift=0.0, width=0.6, scale=1.0, show=number, **look):
        values = [run[key] for run in runs]
        drawn = panel.bar([i + shift for i in range(len(runs))], [(v or 0) / scale for v in values], width, color=colors, **look)
        panel.bar_label(drawn, [show(v) for v in values], padding=2, fontsize=8)

    direction = "higher" if higher_is_better else "lower"
    bars(panels[0], "metric_before", -0.2, 0.38, alpha=0.35)
    bars(panels[0], "metric_best", 0.2, 0.38, show=lambda _: "")
    for i, run in enumerate(runs):
        ends = run.get("interval", [])
        panels[0].vlines([i + 0.2] * len(ends[:1]), ends[:1], ends[1:], color="0.2", lw=1.5)
        place = (i + 0.2, max([run["metric_best"] or 0, *ends]))  # above the interval, which would strike it through
        panels[0].annotate(number(run["metric_best"]), place, (0, 2), textcoords="offset points", ha="center", fontsize=8)
    panels[0].plot([], color="0.2", label="95 % interval")
    panels[0].set(title=metric, ylabel=f"{metric} ({direction} is better)")
    panels[0].bar(0, 0, color="0.4", alpha=0.35, label="before training")  # for the legend alone
    panels[0].bar(0, 0, color="0.4", label="best epoch")
    bars(panels[1], "checkpoint_bytes", scale=1e6, show=megabytes)
    panels[1].set(title="Checkpoint", ylabel="size (MB)")
    bars(panels[2], "trained_parameters", scale=1e6)
    panels[2].set(title="Trained parameters", ylabel="parameters (millions)")
    bars(panels[3], "train_seconds", show=lambda v: number(v, "s"))
    panels[3].set(title="Training time", ylabel="time in training steps (s)")
    for panel in panels:
        tilted = dict(rotation=20, ha="right") if sum(len(run["label"]) for run in runs) > 24 else {}
        panel.set_xticks(range(len(runs)), [plot_text(run["label"]) for run in runs], **tilted)
        panel.grid(axis="x", visible=False)
        panel.set_axisbelow(True)
        panel.margins(y=0.12)
    drawing.legend(fontsize=9, loc="outside lower left", ncols=3, frameon=False)
    drawing.suptitle(plot_text(title, 100))
    save_figure(drawing, path)


# Putting it together ---------------------------------------------------------------------------------------------------


def compare(folders: list[Path], force: bool, output_dir: Path | None, runs_dir: Path) -> str:
    """Writes compare.md, compare.json and compare.png; returns what to print. UserError for runs that are not alike."""
    summaries = [read_summary(folder) for folder in folders]
    names = [str(s.get("run_name")) for s in summaries]
    labels = [n if names.count(n) == 1 else str(folder) for n, folder in zip(names, folders, strict=True)]
    reasons = differences(summaries, labels)
    if reasons and not force:
        raise UserError(f"these runs are no fair comparison; {'; '.join(reasons)}. --force compares them anyway")

    memory = "gpu" if all(value(s, "peak_memory_bytes.gpu") for s in summaries) else "cpu"
    runs = [facts(s, label, folder, memory) for s, label, folder in zip(summaries, labels, folders, strict=True)]
    metric, up = value(summaries[0], "metrics.name"), bool(value(summaries[0], "metrics.higher_is_better"))
    base = next((run for run in runs if run["method"] == "full"), runs[0])
    methods = [run["method"] for run in runs]
    chance = add_intervals(runs, base, metric)
    by_method = len(set(methods)) == len(methods) and set(methods) <= {"full", "lora", "head"}
    sentences = [verdict(run, base, metric, up, by_method) for run in runs if run is not base]
    forced = [f"Not a fair comparison (--force); {'; '.join(reasons)}."] if reasons else []
    notes = forced + remarks(summaries, runs) + ([chance] if chance else [])

    task = str(summaries[0].get("task"))
    page = "\n\n".join([*sentences, *(f"Note: {note}" for note in notes), main_table(runs, metric, memory)]) + "\n"
    output_dir = output_dir or runs_dir / task / "compare"
    output_dir.mkdir(parents=True, exist_ok=True)
    title = f"{task}: {', '.join(labels)}"
    record = {
        "task": task,
        "verdict": sentences,
        "forced": bool(reasons),
        "notes": notes,
        "metric": metric,
        "higher_is_better": up,
        "memory": memory,
        "compared_with": base["label"],
        "runs": runs,
    }
    write_json(output_dir / "compare.json", record)
    picture = "\n![metric, checkpoint size, trained parameters and training time of the runs](compare.png)\n"
    write_text(output_dir / "compare.md", f"# {title}\n\n{page}{picture}{rest_of_page(summaries, runs)}")
    draw(runs, metric, up, title + (" (not a fair comparison)" if reasons else ""), output_dir / "compare.png")
    return f"{page}\nwrote compare.md, compare.json and compare.png to {output_dir}"


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, two or more")
    parser.add_argument("--task", default="", help="compare the newest finished full and lora run of this task")
    parser.add_argument("--runs_dir", "--runs-dir", type=Path, help="where --task looks (default: outputs/ beside common/)")
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="where the files go (default: outputs/<task>/compare)")
    parser.add_argument("--force", action="store_true", help="compare runs that differ in more than their method, and say so")
    args = parser.parse_args(argv)
    runs_dir = (args.runs_dir or project_root() / "outputs").expanduser()
    folders = [folder.expanduser() for folder in args.runs]
    if folders and args.task:
        raise UserError("give run folders or --task, not both")
    if len({folder.resolve() for folder in folders}) != len(folders) or len(folders) == 1:
        raise UserError("a comparison needs two or more different run folders")
    folders = folders or find_pair(runs_dir, args.task)
    print(compare(folders, args.force, args.output_dir and args.output_dir.expanduser(), runs_dir))


if __name__ == "__main__":
    cli(main)
