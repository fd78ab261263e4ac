"""What a comparison says, in words: numbers as one reads them, and sentences that claim no more than their intervals carry."""

from bootstrap import FEWEST
from common.runtime import counted

NAMES = {"lora": "LoRA", "head": "the head alone"}  # of methods, in a sentence
SPLITS = {"val": "validation", "test": "test"}
P_SHOWN = 0.05  # McNemar's p below which two classifiers differ


# Numbers ---------------------------------------------------------------------------------------------------------------


def number(x, unit: str = "") -> str:
    """A number as one reads it: 8,123,456 or 0.861 or 12.4."""
    if x is None:
        return "unknown"
    if isinstance(x, int):
        text = f"{x:,}"
    elif 0 < abs(x) < 0.01:
        text = f"{x:.2g}"
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


def interval(ends) -> str:
    return "unknown" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def signed(ends) -> str:
    """The ends of a difference: "-0.037 to +0.040"; with a digit more where both are small."""
    if ends is None:
        return "unknown"
    digits = 3 if max(map(abs, ends)) >= 0.01 else 4
    return f"{ends[0]:+.{digits}f} to {ends[1]:+.{digits}f}"


# One run, or the runs of one method, against another -------------------------------------------------------------------


def verdict(run: dict, other: dict, metric: str, higher_is_better: bool, by_method: bool) -> str:
    """One sentence about a row against another: what it reaches, and what it took. by_method: call rows by their method."""
    a, b = (NAMES.get(r["method"], r["method"]) if by_method else r["label"] for r in (run, other))
    x, y = run["metric"], other["metric"]
    subject = f"T{a[1:]}" if a == NAMES["head"] else a  # a run keeps its name as it is
    text = f"{subject} reaches {metric} {number(x)} against {number(y)} of {b}"
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
    """What the samples and seeds say of a row's difference to the one it is compared with."""
    if "difference" not in run:
        return ", no difference shown" if "samples" in run else ""
    shown = "a difference" if is_shown(run) else "no difference shown"
    return f"; {shown} by {evidence(run)}: 95 % interval {signed(run['difference'])}{mcnemar_said(run)}"


def evidence(run: dict, split: str = "") -> str:
    """What a difference rests on: "3 seeds and 320 samples"; of a run that says no seed, its samples."""
    seeds = run.get("shared", [None])
    samples = counted(run["samples"], f"{split} sample".strip())
    return samples if None in seeds else f"{'one seed' if len(seeds) == 1 else counted(len(seeds), 'seed')} and {samples}"


def is_shown(run: dict) -> bool:
    """Whether a row's difference is more than chance: its interval holds no 0, and McNemar's test, where there is one, agrees.

    The exact test is needed where few samples tell the two apart: four to none are no evidence, but an interval without 0.
    """
    low, high = run["difference"]
    p = (run.get("agreement") or {}).get("p", 0.0)
    return not low <= 0 <= high and p < P_SHOWN


def mcnemar_said(run: dict) -> str:
    p = (run.get("agreement") or {}).get("p")
    return "" if p is None else f", McNemar p {p_value(p)}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# What may be claimed ---------------------------------------------------------------------------------------------------


def judge(run: dict, higher_is_better: bool) -> dict:
    """What may be said of a row's difference to the one it is compared with: {"kind", "by", "seeds"}.

    kind: worse or better (by: at least so much), none (no difference is shown; by: the loss is at most so much), few (samples),
    unknown (nothing says what is chance). seeds: how many the two have in common; 0 where no seed is known.
    """
    seeds = len([seed for seed in run.get("shared", []) if seed is not None])
    if "difference" not in run:
        few = run.get("samples", FEWEST) < FEWEST
        return {"kind": "few" if few else "unknown", "by": None, "seeds": seeds}
    low, high = run["difference"] if higher_is_better else [-end for end in reversed(run["difference"])]  # of what is gained
    if not is_shown(run):
        return {"kind": "none", "by": max(0.0, -low), "seeds": seeds}
    return {"kind": "better" if low > 0 else "worse", "by": low if low > 0 else -high, "seeds": seeds}


def in_short(judgement: dict) -> str:
    """A judgement as a cell of a table: "worse by at least 0.012", "no difference shown; worse by at most 0.062"."""
    by = None if judgement["by"] is None else number(judgement["by"])
    text = {
        "worse": f"worse by at least {by}",
        "better": f"better by at least {by}",
        "none": "no difference shown" + (f"; worse by at most {by}" if judgement["by"] else ""),
        "few": "too few samples to tell",
        "unknown": "chance is not known",
    }[judgement["kind"]]
    return text + (" (one seed)" if judgement["seeds"] == 1 else "")


def claim(run: dict, other: dict, record: dict) -> str:
    """What one reads first of a comparison: the claim, what it rests on, what is saved, what the head alone gives."""
    found, metric = judge(run, record["higher_is_better"]), record["metric"]
    a, b = (r["label"] if run["method"] == other["method"] else NAMES.get(r["method"], r["method"]) for r in (run, other))
    numbers = " against ".join(number(metric_over(row, run.get("shared", []))) for row in (run, other))
    numbers = f"{metric} {numbers}"
    split = SPLITS[record["split"]]
    if found["kind"] in ("worse", "better", "none"):
        numbers += f"; the difference lies within {signed(run['difference'])}{mcnemar_said(run)}, by {evidence(run, split)}"
    text = {
        "worse": f"{a} is worse than {b} by at least {number(found['by'])} ({numbers}).",
        "better": f"{a} is better than {b} by at least {number(found['by'])} ({numbers}).",
        "none": f"No difference is shown between {a} and {b}; if {a} is worse, by at most {number(found['by'])} ({numbers}).",
        "few": f"{a} and {b} cannot be told apart by {counted(run.get('samples', 0), f'{split} sample')} ({numbers}).",
        "unknown": f"{a} reaches {numbers} of {b}; how much of that is chance is not known.",
    }[found["kind"]]
    if found["seeds"] == 1:
        text += " That is one seed: another training may turn out otherwise."
    if run["checkpoint_bytes"] and other["checkpoint_bytes"]:
        size, whole = run["checkpoint_bytes"], other["checkpoint_bytes"]
        text += f" Its checkpoint has {megabytes(size)} against {megabytes(whole)} ({smaller(size, whole, 'smaller', 'larger')})."
    if head := next((row for row in record["runs"] if row["method"] == "head" and row is not run), None):
        text += f" The head alone reaches {number(head['metric'])}."
    return text


def sizes(least: float, most: float) -> list[str]:
    """Ends of a range of factors by which something is smaller: ["4.8x", "32x smaller"], ["2.0x larger", "3.0x smaller"]."""
    ends = dict.fromkeys(smaller(1.0, factor, "smaller", "larger") for factor in (least, most))
    return [end.removesuffix(" smaller") if least >= 1 and i + 1 < len(ends) else end for i, end in enumerate(ends)]


def metric_over(run: dict, seeds: list) -> float | None:
    """A row's mean over the seeds that are compared; of all where it has none of them."""
    values = [each["metric"] for each in run.get("runs", []) if each["seed"] in seeds]
    return sum(values) / len(values) if values and None not in values else run["metric"]


def shares(records: list[dict], key: str) -> list[float]:
    """What LoRA takes of a thing as a share of what full takes, of the comparisons where both are known."""
    return [share for record in records if (share := ratio(*record["taken"][key]))]


def overall(records: list[dict]) -> str:
    """One sentence over all comparisons; each is counted for what its interval carries, and named where that is not "none"."""
    kinds = {}
    for record in records:
        kinds.setdefault(record["judgement"]["kind"], []).append(record)

    def named(kind, extent=False):
        found = kinds.get(kind, [])
        names = [r["title"] + (f" by at least {number(r['judgement']['by'])} {r['metric']}" if extent else "") for r in found]
        return f"{len(found)} ({', '.join(names)})"

    parts = [f"no difference is shown in {len(kinds['none'])}"] if "none" in kinds else []
    parts += [f"LoRA is worse in {named('worse', True)}"] if "worse" in kinds else []
    parts += [f"LoRA is better in {named('better', True)}"] if "better" in kinds else []
    parts += [f"samples are too few to judge in {named('few')}"] if "few" in kinds else []
    parts += [f"there are no samples to judge by in {named('unknown')}"] if "unknown" in kinds else []
    listed = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    text = f"Of {counted(len(records), 'comparison')} of LoRA with full fine-tuning, {listed}"
    if factors := sorted(1 / share for share in shares(records, "checkpoint_bytes")):
        text += f"; its checkpoints are {' to '.join(sizes(factors[0], factors[-1]))}"
    if memory := shares(records, "peak_memory_bytes"):  # time is in the tables: it tells of the machine's other work, too
        text += f"; training takes {' to '.join(dict.fromkeys(times(x) for x in (min(memory), max(memory))))} the memory"
    single = [r["title"] for r in records if r["judgement"]["seeds"] == 1]
    if single:
        text += "; one seed only" + ("" if len(single) == len(records) else f" of {', '.join(single)}")
    return text + "."
