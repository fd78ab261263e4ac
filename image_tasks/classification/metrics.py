"""The plots of a run: losses and metrics over epochs, confusion matrix, F1 of each class, a page of pictures."""

from pathlib import Path

import numpy as np

from common.class_metrics import classification_metrics, confusion
from common.plots import draw_bars, draw_confusion, draw_history
from common.vision.pages import draw_page
from common.vision.scoring import logits_of

PANELS = {"Loss": ("train_loss", "val_loss"), "Metrics": ("accuracy", "precision", "recall", "f1")}


def draw_results(model, dataset, history: list[dict], folder: Path) -> None:
    """plots/ of a run: loss.png, metrics.png, confusion_matrix.png, f1_per_class.png; and predictions/validation.png."""
    labels, logits = logits_of(model, dataset)
    draw_history(history, PANELS, folder / "plots")
    draw_evaluation(labels, logits, dataset.classes, folder / "plots")
    some = np.random.default_rng(0).permutation(len(labels))[:12]
    draw_page(dataset, labels, logits, dataset.classes, some, folder / "predictions" / "validation.png")


def draw_evaluation(labels: np.ndarray, logits: np.ndarray, classes: list[str], folder: Path) -> None:
    """confusion_matrix.png and f1_per_class.png in the folder."""
    draw_confusion(confusion(labels, logits, classes), classes, folder / "confusion_matrix.png")
    scores = classification_metrics(labels, logits, classes)["per_class_f1"]
    draw_bars(scores, "F1 of each class", "F1", folder / "f1_per_class.png", top=1.05)
