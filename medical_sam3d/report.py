"""What organs are like before anybody trains on them: how many, how large, whose, what was left out; and pictures of them."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common.checkpoint import write_text
from common.plots import figure, plot_text, save_figure
from common.runtime import counted
from pages import Shown, draw_planes
from prepared import Item
from preparing import known_facts

PICTURED = 6  # organs in the picture of slices
SHOWN = 25  # organs in the printed table
FEW = 10  # patients below which a metric on those that are held out says little
HEADS = ["organ", "n", "ml, mean", "ml, least to most", "spacing, mm", "left out"]


def report_on(items: list[Item], about: dict, folder: Path) -> str:
    """Writes report.md, slices.png and volumes.png into the folder; returns what is to be printed of it."""
    folder = Path(folder)
    facts = [known_facts(folder, item.path.stem) for item in items]
    text = report_text(items, facts, about)
    write_text(folder / "report.md", text)
    draw_planes([Shown(item.name, item.load(), {}) for item in choose_pictured(items)], folder / "slices.png", "mask")
    draw_volumes(items, facts, folder / "volumes.png")
    rows = organ_rows(items, facts, about)
    more = f"\nand {len(rows) - SHOWN} more organs in report.md" if len(rows) > SHOWN else ""
    return table(HEADS, rows[:SHOWN]) + more


# ---- text ------------------------------------------------------------------------------------------------------------------


def report_text(items: list[Item], facts: list[dict], about: dict) -> str:
    """The report in Markdown. about: what prepared.json says; facts: of each item, as preparing.known_facts has them."""
    patients, scans = len({item.patient for item in items}), len({item.case for item in items})
    spoken = f"{counted(len(items), 'organ')} in {counted(scans, 'scan')} of {counted(patients, 'patient')}"
    parts = [f"# Organs to train on\n\n{spoken}. Volumes are of the voxels, in ml; spacings in mm."]
    parts.append(table(HEADS, organ_rows(items, facts, about)))
    parts.append("![slices of some organs](slices.png)\n\n![volumes of all organs](volumes.png)")
    parts.append("## Splits\n\n" + table(["split", "patients", "scans", "organs"], split_rows(items)))
    if said := advice(items):
        parts.append("\n".join(f"- {line}" for line in said))
    parts.append(f"## Left out: {len(about['left_out'])}\n\n" + grouped([(e["fault"], e["name"]) for e in about["left_out"]]))
    notes = [(note, where) for note, places in sorted(about["notes"].items()) for where in places]
    parts.append(f"## Worth knowing\n\n{grouped(notes)}")
    return "\n\n".join(parts) + "\n"


def organ_rows(items: list[Item], facts: list[dict], about: dict) -> list[list]:
    """A row for each organ, those with most cases first."""
    rows, lost = [], Counter(organ for entry in about["left_out"] for organ in entry["organs"])
    counts = Counter(item.organ for item in items)
    for organ, count in counts.most_common():
        own = [noted for item, noted in zip(items, facts, strict=True) if item.organ == organ]
        ml, spacing = np.array([noted["ml"] for noted in own]), np.array([noted["spacing"] for noted in own])
        low, high = (" x ".join(f"{size:.3g}" for size in sizes) for sizes in (spacing.min(0), spacing.max(0)))
        spaced = low if low == high else f"{low} to {high}"
        rows.append([organ, count, f"{ml.mean():.3g}", f"{ml.min():.3g} to {ml.max():.3g}", spaced, lost[organ]])
    return rows + [[organ, 0, "", "", "", count] for organ, count in lost.items() if organ not in counts]


def split_rows(items: list[Item]) -> list[list]:
    splits = defaultdict(list)
    for item in items:
        splits[item.split or "not said"].append(item)
    order = ("train", "val", "test", "not said")
    rows = []
    for split in sorted(splits, key=order.index):
        own = splits[split]
        rows.append([split, len({item.patient for item in own}), len({item.case for item in own}), len(own)])
    return rows


def advice(items: list[Item]) -> list[str]:
    """What the splits mean for a training, and what speaks against them."""
    lines, said = [], {item.split for item in items}
    patients = defaultdict(set)
    for item in items:
        patients[item.patient].add(item.split)
    if len(patients) < 2:
        lines.append("One patient: nobody can be held out, so nothing can be trained; inference works.")
    elif "val" not in said:
        lines.append("No validation split: training holds out about a fifth of the patients, all scans of a patient together.")
    if 1 < len(patients) < FEW:
        lines.append(f"{len(patients)} patients: metrics on the few that are held out say little.")
    if both := [patient for patient, splits in patients.items() if len(splits) > 1]:
        lines.append(f"WARNING: patients in several splits: {', '.join(both[:5])}; their metrics flatter.")
    return lines


def grouped(pairs: list[tuple[str, str]]) -> str:
    """(what, where) pairs as a list, each "what" once."""
    places = defaultdict(list)
    for what, where in pairs:
        what, _, detail = what.partition(", ")
        places[what].append(f"{where} ({detail})" if detail else where)
    return "\n".join(f"- {what} ({len(names)}): {', '.join(names)}" for what, names in places.items()) or "Nothing."


def table(heads: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


# ---- pictures --------------------------------------------------------------------------------------------------------------


def choose_pictured(items: list[Item]) -> list[Item]:
    """Up to PICTURED items: one of each organ, then more of them, of as many cases as can be."""
    chosen, used = [], Counter()
    while len(chosen) < min(PICTURED, len(items)):
        rest = [item for item in items if item not in chosen]
        best = min(rest, key=lambda item: (used["organ", item.organ], used["case", item.case]))
        used.update([("organ", best.organ), ("case", best.case)])
        chosen.append(best)
    return chosen


def draw_volumes(items: list[Item], facts: list[dict], path: Path) -> None:
    """A line of dots for each organ: the volume of each of its cases."""
    organs = [organ for organ, _ in Counter(item.organ for item in items).most_common()]
    drawing, axes = figure(width=6.5, height=1 + 0.28 * len(organs))
    axis = axes[0, 0]
    for place, organ in enumerate(organs):
        ml = np.array([noted["ml"] for item, noted in zip(items, facts, strict=True) if item.organ == organ])
        spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(ml)) if len(ml) > 1 else np.zeros(1)
        axis.plot(ml, place + spread, "o", ms=4, alpha=0.6, color="#1f6fd6", mew=0)
    low, high = min(noted["ml"] for noted in facts), max(noted["ml"] for noted in facts)
    axis.set(xlabel="volume, ml", ylim=(len(organs) - 0.5, -0.5))
    if high > 30 * low:  # a scale of powers of ten, so that small organs are no dots at zero
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    else:
        axis.set_xlim(0, 1.05 * high)
    axis.set_yticks(range(len(organs)), [plot_text(organ, 28) for organ in organs])
    save_figure(drawing, path)
