"""The report on a CLIP classifier, with the base's zero-shot answers beside it, and its pictures."""

from pathlib import Path

import numpy as np

# needs: scikit-learn
from common.class_metrics import class_scores, confusion
from common.plots import draw_confusion, extremes, figure, save_figure, with_counts
from common.vision.pages import draw_some
from common.vision.scoring import logits_of, save_samples


def draw_performance(labels, logits, classes: list[str], path: Path, zero_shot=None) -> None:
    """Precision, recall and F1 of each class that has samples; of more than 40 classes, of those with the lowest and highest F1.

    zero_shot: logits of the base, whose F1 is marked.
    """
    *scores, support = class_scores(labels, logits, classes)
    there = np.flatnonzero(support)
    picked, note = extremes(scores[2][there].tolist())
    chosen, rows, names = there[picked], np.arange(len(picked)), with_counts(classes, support)
    drawing, ((axis,),) = figure(1, 1, 8, max(2.5, 0.42 * len(chosen) + 1.4))
    for i, name in enumerate(("precision", "recall", "F1")):
        axis.barh(rows + 0.25 * (i - 1), scores[i][chosen], 0.23, color=f"C{i}", label=name)
    if zero_shot is not None:
        points = class_scores(labels, zero_shot, classes)[2][chosen]
        axis.plot(points, rows + 0.25, ls="", marker="D", ms=5, color="black", clip_on=False, label="F1, zero-shot")
    axis.set_yticks(rows, [names[k] for k in chosen], fontsize=8)
    drawing.suptitle(f"Precision, recall and F1 of each class (samples){note}", fontsize=11)
    axis.set(xlabel="score", xlim=(0, 1.02), ylim=(len(chosen) - 0.4, -0.6))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(drawing, path)


def draw_evaluation(labels, logits, classes: list[str], folder: Path, zero_shot=None) -> None:
    """confusion_matrix.png and class_performance.png in the folder."""
    draw_confusion(confusion(labels, logits, classes), classes, folder / "confusion_matrix.png")
    draw_performance(labels, logits, classes, folder / "class_performance.png", zero_shot)


def draw_results(model, dataset, folder: Path) -> None:
    """samples.json of a run, plots/ with confusion_matrix.png and class_performance.png, and predictions/validation.png."""
    labels, logits = logits_of(model, dataset)
    save_samples(dataset, labels, logits, folder)
    draw_evaluation(labels, logits, dataset.classes, folder / "plots")
    draw_some(dataset, labels, logits, folder / "predictions" / "validation.png")


def zero_shot_comparison(labels, tuned, base) -> dict:
    """How many pictures both models get right, only one of them, or none: {"both", "only_tuned", "only_zero_shot", "neither"}."""
    ours, theirs = tuned.argmax(axis=1) == labels, base.argmax(axis=1) == labels
    counts = {"both": ours & theirs, "only_tuned": ours & ~theirs, "only_zero_shot": ~ours & theirs, "neither": ~ours & ~theirs}
    return {key: int(value.sum()) for key, value in counts.items()}
