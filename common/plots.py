"""Pictures of a run. matplotlib is imported when one is drawn, with a backend that needs no screen."""

from pathlib import Path


def figure(rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 4.0):
    """(figure, 2-D array of axes) without a screen. width, height: inches of one panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", dpi=120
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return drawing, axes


def save_figure(drawing, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)
    plt.close(drawing)


def draw_curves(records: list[dict], best_name: str, best: dict, resumed_at: list[int], path: Path) -> None:
    """curves.png: loss, validation metrics and learning rate over optimizer steps; best epoch and resume points marked.

    records: the lines of metrics.jsonl, step lines (loss, lr) and epoch lines (train_loss, val_loss, metrics) mixed.
    """
    steps = [r for r in records if "lr" in r]
    epochs = [r for r in records if "epoch" in r]
    names = [k for k, v in epochs[-1].items() if isinstance(v, float) and k not in ("train_loss", "val_loss")]
    names = [best_name] + [name for name in names if name != best_name][:5]
    drawing, ((losses, metrics, rates),) = figure(1, 3)
    losses.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="0.8", label="training, one step")
    for key, label, color in (("train_loss", "training, epoch mean", "C0"), ("val_loss", "validation", "C1")):
        points = [(r["step"], r[key]) for r in epochs if r.get(key) is not None]
        if points:
            losses.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
    losses.set(title="Loss", xlabel="optimizer step", ylabel="loss")
    for i, name in enumerate(names):
        points = [(r["step"], r[name]) for r in epochs if r.get(name) is not None]
        if points:
            wide = name == best_name
            metrics.plot(*zip(*points, strict=True), marker=".", lw=2.5 if wide else 1, color=f"C{i}", label=name)
    metrics.set(title="Validation metrics", xlabel="optimizer step", ylabel="value")
    rates.plot([r["step"] for r in steps], [r["lr"] for r in steps], color="C2", label="learning rate")
    rates.set(title="Learning rate", xlabel="optimizer step", ylabel="learning rate")
    for axis in (losses, metrics, rates):
        axis.axvline(best["step"], color="C3", ls="--", lw=1, label=f"best epoch ({best['epoch']})")
        for i, step in enumerate(resumed_at):
            axis.axvline(step, color="0.4", ls=":", lw=1, label="resumed" if i == 0 else None)
        axis.legend(fontsize=8)
    save_figure(drawing, path)
