"""What a run and eval leave to look at: what was said of each picture, confusion matrix, F1 of each class, pages of pictures."""

from pathlib import Path

import numpy as np

from common.class_metrics import class_scores, confusion
from common.plots import draw_bars, draw_confusion
from common.vision.pages import draw_some
from common.vision.scoring import logits_of, save_samples


def draw_results(model, dataset, folder: Path) -> None:
    """samples.json of a run, plots/ with confusion_matrix.png and f1_per_class.png, and predictions/validation.png."""
    labels, logits = logits_of(model, dataset)
    save_samples(dataset, labels, logits, folder)
    draw_evaluation(labels, logits, dataset.classes, folder / "plots")
    draw_some(dataset, labels, logits, folder / "predictions" / "validation.png")


def draw_evaluation(labels: np.ndarray, logits: np.ndarray, classes: list[str], folder: Path) -> None:
    """confusion_matrix.png and f1_per_class.png in the folder."""
    draw_confusion(confusion(labels, logits, classes), classes, folder / "confusion_matrix.png")
    *_, f1, counts = class_scores(labels, logits, classes)
    scores = {name: score if count else None for name, score, count in zip(classes, f1, counts, strict=True)}
    draw_bars(scores, "F1 of each class (samples)", "F1", folder / "f1_per_class.png", top=1.05, counts=counts)
