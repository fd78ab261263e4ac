"""The report on a CLIP classifier, with the base's zero-shot answers beside it, and its pictures."""

from pathlib import Path

import numpy as np

# needs: scikit-learn
from common.class_metrics import class_report, confusion
from common.plots import draw_confusion, draw_history, figure, save_figure
from common.vision.pages import draw_page
from common.vision.scoring import logits_of

PANELS = {"Loss": ("train_loss", "val_loss"), "Metrics": ("accuracy", "top5", "precision", "recall", "f1")}
COMPARED = ("accuracy", "balanced_accuracy", "top5", "precision", "recall", "f1", "ece", "val_loss")


def score_table(metrics: dict, zero_shot: dict | None) -> str:
    """Lines of text: each number of the tuned model and, where it is known, of the base's zero-shot answers."""
    lines = [f"{'':20}{'tuned':>10}{'zero-shot':>12}" if zero_shot else f"{'':20}{'tuned':>10}"]
    for key in COMPARED:
        values = [scores[key] for scores in (metrics, zero_shot) if scores]
        words = ["absent" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"{key.removeprefix('val_'):20}{words[0]:>10}" + (f"{words[1]:>12}" if zero_shot else ""))
    return "\n".join(lines)


def draw_performance(labels, logits, classes: list[str], path: Path, zero_shot=None) -> None:
    """Precision, recall and F1 of each class as bars; zero_shot: logits of the base, whose F1 is marked."""
    table = class_report(labels, logits, classes)[1]
    places, drawing = np.arange(len(classes)), None
    drawing, ((axis,),) = figure(1, 1, max(6, 0.9 * len(classes) + 2), 4.5)
    for i, name in enumerate(("precision", "recall", "f1-score")):
        axis.bar(places + 0.27 * (i - 1), [table[c][name] for c in classes], 0.25, color=f"C{i}", label=name)
    if zero_shot is not None:
        base = class_report(labels, zero_shot, classes)[1]
        points = [base[c]["f1-score"] for c in classes]
        axis.plot(places + 0.27, points, ls="", marker="D", color="black", label="f1-score, zero-shot")
    crowded = len(classes) > 8 or max(map(len, classes)) > 12
    axis.set_xticks(places, classes, rotation=90 if crowded else 0, fontsize=8)
    axis.set(title="Each class", ylabel="score", ylim=(0, 1.05))
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(drawing, path)


def draw_evaluation(labels, logits, classes: list[str], folder: Path, zero_shot=None) -> None:
    """confusion_matrix.png and class_performance.png in the folder."""
    draw_confusion(confusion(labels, logits, classes), classes, folder / "confusion_matrix.png")
    draw_performance(labels, logits, classes, folder / "class_performance.png", zero_shot)


def draw_results(model, dataset, history: list[dict], folder: Path) -> None:
    """plots/ of a run: loss.png, metrics.png, confusion_matrix.png, class_performance.png; predictions/validation.png."""
    labels, logits = logits_of(model, dataset)
    draw_history(history, PANELS, folder / "plots")
    draw_evaluation(labels, logits, dataset.classes, folder / "plots")
    some = np.random.default_rng(0).permutation(len(labels))[:12]
    draw_page(dataset, labels, logits, dataset.classes, some, folder / "predictions" / "validation.png")


def zero_shot_comparison(labels, tuned, base, classes: list[str]) -> dict:
    """How many pictures both models get right, only one of them, or none: {"both", "only_tuned", "only_zero_shot", "neither"}."""
    ours, theirs = tuned.argmax(axis=1) == labels, base.argmax(axis=1) == labels
    counts = {"both": ours & theirs, "only_tuned": ours & ~theirs, "only_zero_shot": ~ours & theirs, "neither": ~ours & ~theirs}
    return {key: int(value.sum()) for key, value in counts.items()}
