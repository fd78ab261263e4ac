"""A comparison as tables, Markdown and what the terminal shows."""

import re

from bootstrap import interval_over_seeds
from common.card import command, spoken
from common.config import UserError
from compare_runs import SEPARATE
from compare_words import (
    SPLITS,
    evidence,
    in_short,
    interval,
    megabytes,
    number,
    p_value,
    percent,
    ratio,
    signed,
    smaller,
    times,
)

NEW_HEADS = {"classification", "detection", "pose"}  # tasks whose model may start with a head that knows nothing yet
SHORT = 12  # characters of a hash that are shown


# Tables ----------------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns of equal width, so that it reads well in a terminal, too."""
    lines = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in [head, *rows]]
    widths, words = [max(len(row[i]) for row in lines) for i in range(len(head))], columns_of_words(rows)

    def line(cells):
        return "| " + " | ".join(f"{cell:{'<' if i in words else '>'}{widths[i]}}" for i, cell in enumerate(cells)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in words else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def columns_of_words(rows: list[list[str]]) -> set[int]:
    """The columns that are set flush left: the first, and those where a cell begins with a letter ("unknown" is a number)."""
    return {0} | {i for row in rows for i, cell in enumerate(row) if str(cell)[:1].isalpha() and cell != "unknown"}


def facts_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows) with a column for each row of runs, a line for each fact."""
    runs, metric, test = record["runs"], record["metric"], record["split"] == "test"

    def row(name, key, show=number):
        return [name, *(show(run.get(key)) for run in runs)]

    return ["", *labels_of(record)], [
        row(f"{metric} before training", "metric_before"),
        row(f"{metric}, test split" if test else f"{metric} best", "metric"),
        *([row("95 % interval", "interval", interval)] if any("interval" in run for run in runs) else []),
        *([row(f"{metric} best (val)", "metric_best")] if test else []),
        row(f"{metric} final", "metric_final"),
        row("best epoch", "best_epoch"),
        row("trained parameters", "trained_parameters"),
        row("of all parameters", "trained_percent", percent),
        row("checkpoint", "checkpoint_bytes", megabytes),
        row("training steps", "train_seconds", lambda x: number(x, "s")),
        row("whole run", "seconds", lambda x: number(x, "s")),
        row("samples per second", "samples_per_second", lambda x: "unknown" if x is None else f"{x:,.1f}"),
        row(f"peak memory ({record['memory'].upper()})", "peak_memory_bytes", megabytes),
    ]


def metrics_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows) with every number among the metrics of the split that is compared; no rows where there is none."""
    names = dict.fromkeys(name for run in record["runs"] for name in run["metrics"] if name not in ("epoch", "step"))
    return ["", *labels_of(record)], [[name, *(number(run["metrics"].get(name)) for run in record["runs"])] for name in names]


def labels_of(record: dict) -> list[str]:
    return [run["label"] for run in record["runs"]]


def methods_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows) with the base as it is and each method in a row: what it reaches, how sure that is, what it takes."""
    metric, base = record["metric"], record["compared_with"]
    head = ["method", metric, f"minus {base}", "checkpoint", "95 % interval", "of seeds alone", "seeds", "McNemar p", "ECE"]
    head += ["trained", "training", "memory", "lr"]
    before, where = record["before"], "" if record["before_split"] == record["split"] else " (val)"
    rows = [[before_name(record) + where, number(before), *[""] * (len(head) - 2)]]
    for run in sorted(record["runs"], key=lambda run: run["checkpoint_bytes"] or 0):
        p = (run.get("agreement") or {}).get("p")
        rows.append([
            run["label"],
            number(run["metric"]),
            signed(run["difference"]) if "difference" in run else "",
            megabytes(run["checkpoint_bytes"]),
            interval(run["interval"]) if "interval" in run else "",
            over_seeds(run, record["higher_is_better"]),
            str(len(run["seeds"])),
            "" if p is None else p_value(p),
            number(run["metrics"]["ece"]) if run["metrics"].get("ece") is not None else "",
            number(run["trained_parameters"]),
            number(run["train_seconds"], "s"),
            megabytes(run["peak_memory_bytes"]),
            "" if run["lr"] is None else f"{run['lr']:g}",
        ])  # fmt: skip
    shown = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    return [head[i] for i in shown], [[row[i] for i in shown] for row in rows]


def before_name(record: dict) -> str:
    return "before training" if record["task"] in NEW_HEADS else "base as it is"


def over_seeds(run: dict, higher_is_better: bool) -> str:
    """Student's interval, cut where no metric can be: errors are not below 0, shares (accuracy, mAP, Dice) not above 1."""
    values = [each["metric"] for each in run["runs"]]
    ends = interval_over_seeds(values) if None not in values else None
    return "" if ends is None else interval([max(ends[0], 0.0), min(ends[1], 1.0) if higher_is_better else ends[1]])


def all_table(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) with each comparison in a row: the verdict, what it rests on, what LoRA takes of what full takes."""
    head = ["task", "data", "LoRA against full", "by", "metric", "LoRA", "full", "head alone", "checkpoint", "memory", "time"]
    rows = []
    for record in records:
        named = {run["method"]: run for run in reversed(record["runs"])} | {"lora": lora_of(record)}
        size, memory, seconds = (record["taken"][key] for key in ("checkpoint_bytes", "peak_memory_bytes", "train_seconds"))
        factor = f" ({smaller(*size, 'smaller', 'larger')})" if all(size) else ""
        rows.append([
            record["task"],
            spoken(record["data"]),
            in_short(record["judgement"]),
            evidence(named["lora"], SPLITS[record["split"]]) if "samples" in named["lora"] else "",
            record["metric"] + ("" if record["higher_is_better"] else ", less is better"),
            number(named["lora"]["metric"]),
            number(named["full"]["metric"]),
            number(named["head"]["metric"]) if "head" in named else "",
            f"{megabytes(size[0])} for {megabytes(size[1])}{factor}",
            *("unknown" if (share := ratio(*both)) is None else times(share) for both in (memory, seconds)),
        ])  # fmt: skip
    return head, rows


def lora_of(record: dict) -> dict:
    """The row that a comparison is about: LoRA's, else the first that is not the one compared with."""
    others = [run for run in record["runs"] if run["label"] != record["compared_with"]]
    return next((run for run in others if run["method"] == "lora"), others[0])


# Markdown --------------------------------------------------------------------------------------------------------------


def one_page(record: dict) -> tuple[str, str]:
    """(what the terminal shows of a comparison, the whole of it as Markdown)."""
    several = any(len(run["seeds"]) > 1 for run in record["runs"])
    parts = [*record["verdict"], *(f"Note: {note}" for note in record["notes"])]
    parts += [table(*methods_table(record))] if several else []
    parts += [table(*facts_table(record))]
    shown = "\n\n".join(parts) + "\n"
    picture = "\n![metric, checkpoint size, trained parameters and training time of the runs](compare.png)\n"
    return shown, f"# {record['heading']}\n\n{shown}{picture}{rest_of_page(record)}"


def rest_of_page(record: dict) -> str:
    """The other metrics, the settings that differ, and how to read it all, as Markdown."""
    runs, text = record["runs"], ""
    head, rows = metrics_table(record)
    if rows:
        what = "of the best epoch" if record["split"] == "val" else "of the test split"
        text += f"\n## All metrics {what}\n\n{table(head, rows)}\n"
    if rows := settings_that_differ(record):
        text += f"\n## Settings that differ\n\n{table(head, rows)}\n"
    if "agreement" in lora_of(record):
        text += f"\n## Who is right\n\n{table(*agreement_table(record))}\n"
    for title, head, rows in behaviour_tables(record):
        text += f"\n## {title}\n\n{table(head, rows)}\n"
    text += "\n## How to read it\n\n" + "".join(f"- {line}\n" for line in how_to_read([record]))
    return text + "\n" + "".join(f"- {run['label']}: `{each['folder']}`\n" for run in runs for each in run["runs"])


def settings_that_differ(record: dict) -> list[list[str]]:
    configs = record["configs"]
    names = dict.fromkeys(name for config in configs for name in config if name not in SEPARATE)
    rows = [[name, *(str(config.get(name, "-"))[:60] for config in configs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def agreement_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows): of how many answers both are right, one of the two, neither."""
    run, other = lora_of(record), record["compared_with"]
    found = run["agreement"]
    total = sum(found[key] for key in ("both", "first", "second", "neither"))

    def cell(key):
        return f"{found[key]:,} ({100 * found[key] / total:.1f} %)"

    head = [f"answers to {found['samples']} samples", f"{other} right", f"{other} wrong"]
    rows = [[f"{run['label']} right", cell("both"), cell("first")], [f"{run['label']} wrong", cell("second"), cell("neither")]]
    return head, rows


def behaviour_tables(record: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """[(title, head, rows)] of what behaviour.py measured of one pair of runs; none where it did not."""
    if not (found := record["behaviour"]):
        return []
    scores = [
        ["as it is" if name == "none" else name, number(x["full"]), number(x["lora"]), signed(x["difference"])]
        for name, x in found["corrupted"].items()
    ]
    names = {"base": "base", "full": "full", "lora": "LoRA beside its base", "lora_merged": "LoRA merged"}
    moved = {"base": 0.0} | found["drift"] | {"lora_merged": found["drift"]["lora"]}
    times_of = [[text, f"{found['milliseconds'][key]:.1f}", number(moved[key])] for key, text in names.items()]
    return [
        ("Under corrupted inputs", [f"{found['metric']}, {found['split']} split", "full", "LoRA", "LoRA minus full"], scores),
        ("Time for one sample, drift from the base", ["", f"ms ({found['device']})", "drift"], times_of),
    ]


def how_to_read(records: list[dict]) -> list[str]:
    """What the words and numbers of these comparisons mean: a line each."""
    test, seeds = any(r["split"] == "test" for r in records), max(len(run["seeds"]) for r in records for run in r["runs"])
    lines = ["*best* is the epoch that the validation metric chose; the same samples choose it and measure it, for every run."]
    if test:
        lines = ["The metric is that of the test split, which chose nothing; the validation split chose the epoch."]
        if any(r["split"] == "val" for r in records):
            lines += ["Where there is no test split, or a run was not scored on it, the validation split chose and measures it."]
    drawn = "bootstrap, the same draws for every run"
    lines += [
        f"*95 % interval*: where the metric lies if the samples are drawn anew ({drawn})"
        + (" and other seeds are trained. *Of seeds alone*: Student's t of what the seeds gave." if seeds > 1 else ".")
        + " A difference whose interval holds 0 is not shown, which is not to say that there is none."
    ]
    if len(records) > 1:
        lines += ["Each interval is of 95 %: of twenty comparisons without any difference one would show one."]
    if any("agreement" in run for r in records for run in r["runs"]):
        lines += [
            "*McNemar p*: how likely it is that one of the two is right so much more often where only one is, if none of them is "
            "better; each sample has one vote. A difference is shown where p is below 0.05, too."
        ]
    if any("ece" in run["metrics"] for r in records for run in r["runs"]):
        lines += [
            "*ECE*, the expected calibration error: how far the probability that a model gives its answers is from how often "
            "they are right, on average (15 bins). Less is better. It has no interval here."
        ]
    if any(r["behaviour"] for r in records):
        lines += [
            "*Under corrupted inputs*: the runs of one seed, scored again with noise (half a channel's standard deviation), blur "
            "(2 % of the longer side) or 0.4 of the contrast on what the model gets. The interval is of the samples alone.",
            "*drift*: how far the features that the head gets have moved from the base's, as a share of their length: how much "
            "of the base was left behind, not whether that does harm. *ms*: medians of calls with one sample, all taking turns.",
        ]
    if not all(r["sweep"] for r in records):
        lines += [
            "No rate was searched where there is no table of rates: *lr* is then that of the runs, mostly the script's default."
        ]
    if seeds > 1:
        lines += ["Where there are several seeds, numbers are means over them, and seeds are compared with themselves."]
    else:
        lines += ["These are single runs. Another `--seed` shows how much of a difference is chance of the training."]
    lines += [
        "*checkpoint* is what you keep of a run. An adapter also needs its base model, once for all adapters.",
        "*memory* is the peak of training: on a CPU of the whole process, libraries included; on a GPU what torch had allocated. "
        "*training* is the time in training steps; a machine that had other work to do shows in it.",
    ]
    return lines


def all_pages(sentence: str, records: list[dict], notes: list[str]) -> tuple[str, str]:
    """(what the terminal shows of several comparisons, the whole of them as Markdown)."""
    shown = "\n\n".join(
        [sentence, table(*all_table(records)), *(f"{r['title']}: {r['claim']}" for r in records), *(f"Note: {n}" for n in notes)]
    )
    text = f"# Full or LoRA?\n\n{sentence}\n\n{table(*all_table(records))}\n"
    text += "".join(f"\nNote: {note}\n" for note in notes)
    for record in records:
        text += f"\n## {record['title']}\n\n{record['claim']}\n\n{table(*methods_table(record))}\n"
        text += "".join(f"\nNote: {note}\n" for note in record["notes"])
        text += f"\n{made_by(record)}\n"
    text += "\n## How to read it\n\n" + "".join(f"- {line}\n" for line in how_to_read(records))
    return shown + "\n", text


def made_by(record: dict) -> str:
    """Which base and data, on which machine, with which versions: one paragraph."""
    return f"{base_and_data(record)} {versions_of(record)}."


def base_and_data(record: dict) -> str:
    where = record["provenance"]
    base, data = (
        f"{spoken(where[f'{what}_name'])} (sha256 {(where[f'{what}_sha256'] or 'unknown')[:SHORT]})" for what in ("base", "data")
    )
    return f"Base {base}, data {data}{', a split for each seed' if where['splits'] > 1 else ''}."


def versions_of(record: dict) -> str:
    where = record["provenance"]
    return ", ".join([where["machine"], *(f"{x} {where[x]}" for x in ("python", "torch", "transformers", "peft") if where[x])])


# docs/results.md -------------------------------------------------------------------------------------------------------


def results_page(sentence: str, records: list[dict], notes: list[str], picture: str) -> str:
    """The page of results that goes with the project: verdicts and tables alone, and no path of the machine that made them.

    picture: the name of a file beside the page, sizes against metrics.
    """
    text = f"# Results: full fine-tuning against LoRA\n\n**{sentence}**\n\n{table(*all_table(records))}\n\n"
    text += "*checkpoint*, *memory* and *time* (which tells of the machine's other work, too): what LoRA takes for what full "
    text += "fine-tuning takes. Each row has a section below;"
    text += " [comparing](comparing.md) says what the words claim, and where the intervals come from.\n\n"
    text += f"![checkpoint size against the metric, a panel for each comparison]({picture})\n\n"
    text += f"Machine and versions: {'; '.join(dict.fromkeys(map(versions_of, records)))}. Made from run folders of "
    text += "`scripts/run_all.py` by `python scripts/compare.py --all --results docs/results.md`.\n"
    text += "".join(f"\nNot in it: {without_places(note)}\n" for note in notes)
    text += "".join(map(results_section, records))
    return text + "\n## How to read it\n\n" + "".join(f"- {line}\n" for line in how_to_read(records))


def results_section(record: dict) -> str:
    """A comparison on the page of results: claim, methods, who is right, what a reader should know, how to repeat it."""
    parts = [f"## {record['task']} on {spoken(record['data'])}", record["claim"], table(*methods_table(record))]
    parts += [agreement_line(record)] if "agreement" in lora_of(record) else []
    parts += [f"{title}:\n\n{table(head, rows)}" for title, head, rows in behaviour_tables(record)]
    parts += [rank_line(record)] if record["rank_curve"] else []
    parts += [f"Note: {without_places(note)}" for note in record["notes"]]
    parts += [base_and_data(record)]
    commands = commands_of(record)
    parts += ["\n".join(["```text", *commands, "```"])] if commands else []
    return "\n" + "\n\n".join(parts) + "\n"


def agreement_line(record: dict) -> str:
    """The table of agreement as one sentence."""
    run, other = lora_of(record), record["compared_with"]
    found = run["agreement"]
    total = sum(found[key] for key in ("both", "first", "second", "neither"))
    both, first, second, neither = (f"{100 * found[key] / total:.1f} %" for key in ("both", "first", "second", "neither"))
    return f"Of the answers both have {both} right, {run['label']} alone {first}, {other} alone {second}, neither {neither}."


def rank_line(record: dict) -> str:
    """The rank curve as one sentence."""
    curve = record["rank_curve"]
    points = ", ".join(f"{r}: {number(y)}" for r, y in zip(curve["ranks"], curve["full"], strict=True))
    return f"The full run's update, cut to a rank without training ({curve['metric']}, {curve['split']} split): {points}."


def commands_of(record: dict) -> list[str]:
    """The command that repeats each method, without places of one machine; none of a task or settings that are not of today."""
    from run_all import settings_of
    from task_modules import FOLDERS, ROOT

    if record["task"] not in FOLDERS:
        return []
    folder, seeds = FOLDERS[record["task"]], sorted({seed for run in record["runs"] for seed in run["seeds"]} - {None})
    lines = [
        f"cd {folder.relative_to(ROOT)}  # each with --seed {', '.join(map(str, seeds))}, then eval.py --split {record['split']}"
    ]
    for run, then in zip(record["runs"], record["configs"], strict=True):
        try:
            config = settings_of(folder / ("train.py" if run["method"] == "full" else "train_lora.py"), [])
        except UserError:
            return []
        for name in vars(config).keys() & then.keys() - {"seed"}:
            setattr(config, name, then[name])
        lines.append(command(run["method"], config))
    return lines


def without_places(note: str) -> str:
    """A note without the folders of one machine: of a path its last part."""
    return re.sub(r"(?<![\w.])~?(?:/[^\s/:;,)]+)*/([^\s/:;,)]+)", r"\1", note)
