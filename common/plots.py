"""Pictures of a run. matplotlib is imported when one is drawn, and needs no screen: a notebook's own settings stay."""

import math
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

DPI = 120
# Of metrics that are no shares, however small they are.
UNITS = {"pixel_error": "pixels", "pixel_error_median": "pixels", "mae": "pixels", "hd95": "mm", "assd": "mm"}
MAX_SIDE = 4000  # pixels of a picture's longer side: what is larger is drawn coarser, in 64 MB at most
FEW_CLASSES = 40  # so many are all drawn
MOST_CONFUSED = 30  # of more than that, so many in a confusion matrix
RIGHT = "#1f6fd6"  # these two are told apart by people who see red and green alike
WRONG = "#d62728"
SURE_BIN = 10  # samples in a bin of the calibration from which on its accuracy says something


# ---- text ------------------------------------------------------------------------------------------------------------


def font_file() -> Path:
    """The font of all pictures: the one that comes with matplotlib, which knows most alphabets."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def drawn_text(text: str, most: int = 40) -> str:
    """`text` as it can be drawn: on one line of at most `most` characters (the middle is left out).

    What has no glyph in the font (Chinese, emoji, control characters, bytes of a name that is not UTF-8) is written as its
    code, as Python would: names stay apart, where boxes would all look alike.
    """
    from matplotlib.font_manager import get_font

    glyphs = get_font(font_file())
    visible = [c for c in " ".join(text.split()) if unicodedata.category(c) != "Cf"]  # Cf: marks that turn or join others
    known = [c if c.isprintable() and glyphs.get_char_index(ord(c)) else ascii(c)[1:-1] for c in visible]
    text = "".join(known)
    start, end = math.ceil((most - 1) / 2), (most - 1) // 2
    return text if len(text) <= most else f"{text[:start]}…{text[-end:]}"


def plot_text(text: str, most: int = 40) -> str:
    """drawn_text for matplotlib, to which two dollar signs would be a formula."""
    return drawn_text(text, most).replace("$", r"\$")


def with_counts(names: list[str], counts) -> list[str]:
    """The names as labels; with the number of samples of each, where counts has them."""
    labels = [plot_text(name) for name in names]
    return labels if counts is None else [f"{label} ({int(n)})" for label, n in zip(labels, counts, strict=True)]


# ---- figures ---------------------------------------------------------------------------------------------------------


def figure(rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 4.0):
    """(figure, 2-D array of axes) without a screen. width, height: inches of one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=DPI)
    FigureCanvasAgg(drawing)  # not by pyplot, which would choose a backend for the whole process, and keep the figure
    axes = drawing.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return drawing, axes


def save_figure(drawing, path: Path) -> None:
    """Writes the figure as PNG, its longer side no longer than MAX_SIDE pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # of glyphs and of panels that have no room: the picture shows both
        warnings.simplefilter("ignore", UserWarning)
        drawing.savefig(path, dpi=min(DPI, MAX_SIDE / max(drawing.get_size_inches())))


# ---- curves ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """record[key] over record["step"], of the records that have it."""

    records: list[dict]
    key: str
    label: str
    style: dict

    def points(self) -> list[tuple[int, float]]:
        return [(record["step"], record[self.key]) for record in self.records if record.get(self.key) is not None]


class Panel(NamedTuple):
    """Lines that share a unit."""

    title: str
    unit: str
    lines: list[Line]
    logarithmic: bool = False  # where the values are positive, and differ by more than ten times


def draw_curves(records: list[dict], best_name: str, best: dict, resumed_at: list[int], path: Path) -> None:
    """curves.png: losses, their parts, validation metrics, learning rates and gradient norms over optimizer steps.

    The best epoch and the places where the run was resumed are marked. One unit to an axis: metrics from 0 to 1 share one,
    any other has its own.

    records: the lines of metrics.jsonl, step lines (loss, lr) and epoch lines (train_loss, val_loss, metrics) mixed. Where
    several losses or rates have names (loss_gen, lr_gen), each has a curve of its own.
    """
    steps, epochs = [r for r in records if "epoch" not in r], [r for r in records if "epoch" in r]
    panels = [*loss_panels(steps, epochs), *metric_panels(epochs, best_name)]
    panels += [Panel("Learning rate", "learning rate", named_lines(steps, "lr", "learning rate"))]
    panels += [Panel("Gradient", "norm before clipping", named_lines(steps, "grad_norm", "norm"), logarithmic=True)]
    panels = [panel for panel in panels if any(line.points() for line in panel.lines)]
    columns = 2 if len(panels) in (2, 4) else 3
    drawing, axes = figure(math.ceil(len(panels) / columns), columns, 5.2, 4.2)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_panel(axis, panel)
        axis.axvline(best["step"], color="0.2", ls="--", lw=1, label=f"best epoch ({best['epoch']})")
        if any(line.key == best_name for line in panel.lines) and best.get(best_name) is not None:
            axis.plot(best["step"], best[best_name], color="0.2", marker="*", ms=12, ls="", zorder=5)
        for i, step in enumerate(resumed_at):
            axis.axvline(step, color="0.5", ls=":", lw=1, label="resumed" if i == 0 else None)
        axis.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False)  # below: clear of lines
    save_figure(drawing, path)


def draw_panel(axis, panel: Panel) -> None:
    """The panel's lines; few points are dots, too, for a line between two of them says nothing of what lies between."""
    for line in panel.lines:
        points = line.points()
        if points:
            dots = {"marker": "."} if len(points) <= 40 else {}
            axis.plot(*zip(*points, strict=True), **dots | line.style, label=plot_text(line.label))
    values = [value for curve in axis.lines for value in curve.get_ydata()]
    if panel.logarithmic and 0 < 10 * min(values) < max(values):
        axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)  # there is no half step
    axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)


def loss_panels(steps: list[dict], epochs: list[dict]) -> list[Panel]:
    """Losses of training and validation, and the parts that the training loss is made of, where the script gave them."""
    trained = [key for key in epochs[-1] if key.startswith("train_loss")]
    several, lines = len(trained) > 1, []
    for i, key in enumerate(trained):
        label, color = (key.removeprefix("train_loss_"), f"C{2 * i}") if several else ("training", "C0")
        lines.append(Line(steps, key.removeprefix("train_"), f"{label}, one step", {"color": color, "alpha": 0.3}))
        lines.append(Line(epochs, key, f"{label}, epoch mean", {"color": color}))
    lines.append(Line(epochs, "val_loss", "validation", {"color": "C1", "lw": 2}))
    names = sorted({key for r in steps for key in r if key.startswith("loss_")} - {key.removeprefix("train_") for key in trained})
    whole = [name for name in names if not name[-1].isdigit()] or names  # a number at the end: one layer's copy of a part
    parts = [
        Line(steps, name, name.removeprefix("loss_").replace("_", " "), {"color": f"C{i}"}) for i, name in enumerate(whole[:10])
    ]
    return [Panel("Loss", "loss", lines, several), Panel("Parts of the training loss", "loss", parts, logarithmic=True)]


def metric_panels(epochs: list[dict], best_name: str) -> list[Panel]:
    """Validation metrics: up to six that run from 0 to 1 in one panel, up to two others in one each, the deciding one first."""
    names = [key for r in epochs for key, v in r.items() if isinstance(v, float) and "loss" not in key]
    names = sorted(dict.fromkeys(names), key=lambda name: name != best_name)
    values = {name: [r.get(name) for r in epochs] for name in names}
    different = [name for i, name in enumerate(names) if values[name] not in [values[n] for n in names[:i]]]
    shares = [name for name in different if name not in UNITS and all(v is None or 0 <= v <= 1 for v in values[name])]
    others = [name for name in different if name not in shares][:2]

    def line(name, color):
        return Line(epochs, name, name.replace("_", " "), {"color": color, "lw": 2.5 if name == best_name else 1.2})

    together = Panel("Validation metrics", "from 0 to 1", [line(name, f"C{i}") for i, name in enumerate(shares[:6])])
    spoken = {name: name.replace("_", " ") for name in others}
    apart = [Panel(f"Validation: {spoken[name]}", UNITS.get(name, spoken[name]), [line(name, "C0")]) for name in others]
    return [*apart, together] if best_name in others else [together, *apart]


def named_lines(steps: list[dict], what: str, alone: str) -> list[Line]:
    """A line for `what` and each what_<name> in the step lines."""
    keys = sorted({key for r in steps for key in r if key == what or key.startswith(f"{what}_")})
    return [
        Line(steps, key, key.removeprefix(f"{what}_") if key != what else alone, {"color": f"C{i}"}) for i, key in enumerate(keys)
    ]


# ---- classes ---------------------------------------------------------------------------------------------------------


def draw_confusion(counts, names: list[str], path: Path) -> None:
    """Confusion matrix: a row for each true class, a column for each predicted one; counts, coloured by their share of the row.

    Right answers are blue, mistakes red. Of more than 40 classes those 30 are shown that are most often taken for another or
    another for them, and the rest as one.

    counts: (K, K) array of numbers of samples.
    """
    import numpy as np

    counts, title = np.asarray(counts), "Confusion matrix"
    support, rest = counts.sum(axis=1), []
    if len(names) > FEW_CLASSES:
        mistakes = support + counts.sum(axis=0) - 2 * counts.diagonal()
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CONFUSED])
        title += f": the {MOST_CONFUSED} most confused of {len(names)} classes"
        counts, support, names, rest = with_rest(counts, shown), support[shown], [names[k] for k in shown], ["any other class"]
    labels = [*with_counts(names, support), *rest]
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    colors = np.where(np.eye(len(labels), dtype=bool), 1, -1) * np.sqrt(shares)  # the root: one mistake in ten is seen, too
    side = max(4.5, 0.36 * len(labels) + 2.5)
    drawing, ((axis,),) = figure(1, 1, side + 1.5, side)
    image = axis.imshow(colors, cmap="RdBu", vmin=-1, vmax=1)
    axis.grid(False)
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(labels)), [plot_text(name) for name in [*names, *rest]], rotation=90, fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set(title=title, xlabel="predicted class", ylabel="true class (samples)")
    bar = drawing.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    bar.set_ticks([-1, -(0.5**0.5), -(0.1**0.5), 0, 0.1**0.5, 0.5**0.5, 1])
    bar.set_ticklabels(["all mistaken", "50 %", "10 %", "0", "10 %", "50 %", "all right"], fontsize=8)
    save_figure(drawing, path)


def with_rest(counts, shown):
    """(K, K) counts -> (S + 1, S + 1) counts of the S shown classes and, last, of all others; what stays among those is 0."""
    import numpy as np

    among = counts[np.ix_(shown, shown)]
    to_others = counts[shown].sum(axis=1) - among.sum(axis=1)
    from_others = counts[:, shown].sum(axis=0) - among.sum(axis=0)
    return np.block([[among, to_others[:, None]], [from_others[None], np.zeros((1, 1), counts.dtype)]])


def extremes(values: list, most: int = FEW_CLASSES) -> tuple[list[int], str]:
    """(which of the values to draw, what to add to the title): all of a few, else the lowest and the highest that there are."""
    if len(values) <= most:
        return list(range(len(values))), ""
    order = sorted((i for i, value in enumerate(values) if value is not None), key=lambda i: values[i])
    half = most // 2
    chosen = order if len(order) <= most else order[:half] + order[-half:]
    return chosen, f": the {half} lowest and {half} highest of {len(values)}"


def draw_bars(values: dict[str, float | None], title: str, unit: str, path: Path, top: float | None = None, counts=None) -> None:
    """A bar for each name, the first on top; of more than 40 names the lowest and the highest. None: no samples, no bar.

    top: the axis' end. counts: numbers of samples, in the order of the names.
    """
    chosen, note = extremes(list(values.values()))
    labels, numbers = with_counts(list(values), counts), list(values.values())
    drawing, ((axis,),) = figure(1, 1, 7, max(2.5, 0.26 * len(chosen) + 1.2))
    bars = axis.barh(range(len(chosen)), [numbers[i] or 0 for i in chosen], color="C0", height=0.7)
    axis.bar_label(bars, ["no samples" if numbers[i] is None else f"{numbers[i]:.2f}" for i in chosen], fontsize=8, padding=3)
    axis.set_yticks(range(len(chosen)), [labels[i] for i in chosen], fontsize=8)
    axis.set(xlabel=unit, ylim=(len(chosen) - 0.4, -0.6))
    axis.set_xlim(0, top or 1.1 * max([v or 0 for v in numbers], default=0) or 1)  # room for the numbers
    drawing.suptitle(title + note, fontsize=11)
    save_figure(drawing, path)


def draw_calibration(error: float, rows: list, path: Path) -> None:
    """Accuracy over confidence with its 95 % interval, and below how many samples each point stands for.

    Points of fewer than 10 samples are faint. error, rows: what class_metrics.calibration gives.
    """
    from common.class_metrics import wilson

    drawing, ((axis,), (below,)) = figure(2, 1, 6, 3.2)
    axis.plot([0, 1], [0, 1], ls="--", color="0.5", label="perfectly calibrated")
    for count, sure, right in rows:
        low, high = wilson(round(right * count), count)
        faint = {"alpha": 1 if count >= SURE_BIN else 0.3, "color": "C0" if count >= SURE_BIN else "0.4"}
        axis.errorbar(sure, right, [[right - low], [high - right]], marker="o", capsize=3, **faint)
    axis.plot([], [], marker="o", color="C0", label="accuracy, 95 % interval")
    if any(count < SURE_BIN for count, _, _ in rows):
        axis.plot([], [], marker="o", ls="", color="0.4", alpha=0.3, label=f"of fewer than {SURE_BIN} samples")
    total = sum(count for count, _, _ in rows)
    title = f"Calibration of {total} samples (expected calibration error {error:.3f})"
    axis.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(-0.02, 1.04))
    drawing.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)  # no corner is free of points for sure
    bars = below.bar([sure for _, sure, _ in rows], [count for count, _, _ in rows], width=0.04, color="0.7")
    below.bar_label(bars, fontsize=8)
    below.set(xlabel="confidence", ylabel="samples", xlim=(0, 1))
    save_figure(drawing, path)
