"""Pictures of a run. matplotlib is imported when one is drawn, and needs no screen: a notebook's own settings stay."""

from pathlib import Path


def figure(rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 4.0):
    """(figure, 2-D array of axes) without a screen. width, height: inches of one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(drawing)  # not by pyplot, which would choose a backend for the whole process, and keep the figure
    axes = drawing.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return drawing, axes


def save_figure(drawing, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)


def curve(axis, records: list[dict], key: str, **style) -> None:
    """record[key] over record["step"], of the records that have it."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def draw_curves(records: list[dict], best_name: str, best: dict, resumed_at: list[int], path: Path) -> None:
    """curves.png: losses, validation metrics and learning rates over optimizer steps; best epoch and resume points marked.

    records: the lines of metrics.jsonl, step lines (loss, lr) and epoch lines (train_loss, val_loss, metrics) mixed. Where
    several losses or rates have names (loss_gen, lr_gen), each has a curve of its own, and the losses a logarithmic axis.
    """
    steps = [r for r in records if "epoch" not in r]
    epochs = [r for r in records if "epoch" in r]
    trained = [key for key in epochs[-1] if key.startswith("train_loss")]
    names = [k for k, v in epochs[-1].items() if isinstance(v, float) and k not in (*trained, "val_loss")]
    names = [best_name] + [name for name in names if name != best_name][:5]
    drawing, ((losses, metrics, rates),) = figure(1, 3)
    several = len(trained) > 1
    for i, key in enumerate(trained):
        one, label = key.removeprefix("train_"), key.removeprefix("train_loss_") if several else "training"
        curve(
            losses, steps, one, color=f"C{2 * i}" if several else "0.8", alpha=0.4 if several else 1, label=f"{label}, one step"
        )
        curve(losses, epochs, key, color=f"C{2 * i}", marker=".", label=f"{label}, epoch mean")
    curve(losses, epochs, "val_loss", color="C1", marker=".", label="validation")
    if several and all(min(line.get_ydata()) > 0 for line in losses.lines):
        losses.set_yscale("log")
    losses.set(title="Loss", xlabel="optimizer step", ylabel="loss")
    for i, name in enumerate(names):
        curve(metrics, epochs, name, marker=".", lw=2.5 if name == best_name else 1, color=f"C{i}", label=name)
    metrics.set(title="Validation metrics", xlabel="optimizer step", ylabel="value")
    for i, key in enumerate(sorted({key for r in steps for key in r if key == "lr" or key.startswith("lr_")})):
        curve(rates, steps, key, color=f"C{2 + i}", label=key.replace("lr", "learning rate").replace("_", ", "))
    rates.set(title="Learning rate", xlabel="optimizer step", ylabel="learning rate")
    for axis in (losses, metrics, rates):
        axis.axvline(best["step"], color="C3", ls="--", lw=1, label=f"best epoch ({best['epoch']})")
        for i, step in enumerate(resumed_at):
            axis.axvline(step, color="0.4", ls=":", lw=1, label="resumed" if i == 0 else None)
        axis.legend(fontsize=8)
    save_figure(drawing, path)


def draw_history(history: list[dict], panels: dict[str, tuple[str, ...]], folder: Path) -> None:
    """A picture for each panel, named like it: the values of these names over epochs (0: before training).

    history: one dict an epoch, with "epoch" and numbers; values that are missing or None leave a gap.
    """
    for title, names in panels.items():
        drawing, ((axis,),) = figure(1, 1, 7, 4.5)
        for i, name in enumerate(names):
            points = [(r["epoch"], r[name]) for r in history if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", color=f"C{i}", label=name.replace("_", " "))
        axis.set(title=title, xlabel="epoch", ylabel="value" if len(names) > 1 else names[0].replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
        save_figure(drawing, folder / f"{title.lower()}.png")


def draw_confusion(counts, names: list[str], path: Path) -> None:
    """Confusion matrix: a row for each true class, a column for each predicted one; shares of the row, counts written in.

    counts: (K, K) array of numbers of samples.
    """
    import numpy as np

    counts = np.asarray(counts)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = max(4.5, 0.55 * len(names) + 2)
    drawing, ((axis,),) = figure(1, 1, side + 1, side)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    if len(names) <= 30:  # more would not be readable
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, count or "", ha="center", va="center", color=color, fontsize=8)
    if len(names) <= 60:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(title="Confusion matrix (counts; colour: share of the true class)", xlabel="predicted class", ylabel="true class")
    drawing.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    save_figure(drawing, path)


def draw_bars(values: dict[str, float | None], title: str, unit: str, path: Path, top: float | None = None) -> None:
    """A bar for each name; None is drawn as no bar. top: the axis' upper end."""
    drawing, ((axis,),) = figure(1, 1, max(5, 0.5 * len(values) + 2), 4)
    bars = axis.bar(range(len(values)), [value or 0 for value in values.values()], color="C0")
    if len(values) <= 40:
        axis.bar_label(bars, ["" if v is None else f"{v:.2f}" for v in values.values()], fontsize=7)
    crowded = len(values) > 8 or max(map(len, values)) > 9
    axis.set_xticks(range(len(values)), values, rotation=90 if crowded else 0, fontsize=8 if len(values) <= 40 else 6)
    axis.set(title=title, ylabel=unit, ylim=(0, top))
    axis.set_axisbelow(True)
    save_figure(drawing, path)


def draw_calibration(error: float, rows: list, path: Path) -> None:
    """Accuracy over confidence, with the share of the samples below. error, rows: what class_metrics.calibration gives."""
    share, sure, right = zip(*rows, strict=True)
    drawing, ((axis,),) = figure(1, 1, 6, 5)
    axis.bar(sure, share, width=0.05, color="0.85", label="share of the samples")
    axis.plot([0, 1], [0, 1], ls="--", color="0.5", label="perfectly calibrated")
    axis.plot(sure, right, marker="o", color="C0", label="accuracy at this confidence")
    axis.set(title=f"Calibration (expected calibration error {error:.3f})", xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8, loc="upper left")
    save_figure(drawing, path)
