"""Metrics of a classifier by scikit-learn, and pictures of what it gets right and wrong."""

from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

# needs: scikit-learn
from common.labelled import collate
from common.pictures import decode
from common.plots import figure, save_figure
from common.runtime import gather_lists, progress


def predict(model, loader) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N,), logits (N, K)) of the loader's pictures, of all processes, in the order of the data set."""
    found = dict(gather_lists(classify(model, progress(loader, "evaluating"))))  # processes repeat a batch to have equally many
    order = sorted(found)
    return np.array([loader.dataset.samples[i].label for i in order]), np.stack([found[i] for i in order])


@torch.no_grad()
def classify(model, batches) -> list[tuple[int, np.ndarray]]:
    """(index, logits (K,)) of every picture in the batches."""
    model = extract_model_from_parallel(model).eval()
    device = next(model.parameters()).device
    rows = []
    for batch in batches:
        logits = model(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu().numpy()
        rows += zip(batch["index"].tolist(), logits, strict=True)
    return rows


def logits_of(model, dataset) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N,), logits (N, K)) of a whole data set, by this process alone."""
    parts = [range(first, min(first + 32, len(dataset))) for first in range(0, len(dataset), 32)]
    batches = (collate([dataset[(0, i)] for i in part]) for part in parts)  # no loader: that has this process's share only
    logits = np.stack([row for _, row in classify(model, batches)])
    labels = np.array([sample.label for sample in dataset.samples])
    return labels, logits


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def classification_metrics(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> dict:
    """Numbers from 0 to 1 (val_loss: mean cross entropy in nats). Means over classes count each class that occurs the same.

    balanced_accuracy is the mean recall; ece the expected calibration error (`calibration`). A class that does not occur: null.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score

    probabilities = softmax(logits.astype(np.float64))
    guesses, every = probabilities.argmax(axis=1), np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(labels, guesses, labels=every, zero_division=0)
    there = support > 0
    return {
        "val_loss": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean()),
        "accuracy": float(accuracy_score(labels, guesses)),
        "balanced_accuracy": float(recall[there].mean()),
        "precision": float(precision[there].mean()),
        "recall": float(recall[there].mean()),
        "f1": float(f1[there].mean()),
        "top5": float(top_k_accuracy_score(labels, probabilities, k=5, labels=every)) if len(classes) > 5 else None,
        "ece": calibration(labels, probabilities)[0],
        "per_class_f1": {name: float(f1[k]) if there[k] else None for k, name in enumerate(classes)},
    }


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15):
    """(expected calibration error, rows of (share of the pictures, mean confidence, accuracy) for each bin that is not empty).

    The pictures are sorted into `bins` equal intervals of the probability of their predicted class; the error is the mean
    over pictures of |confidence - accuracy| of their bin (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = [((place == b).mean(), confidence[place == b].mean(), right[place == b].mean()) for b in np.unique(place)]
    return float(sum(share * abs(sure - hit) for share, sure, hit in rows)), rows


def evaluate(model, loader, classes: list[str]) -> dict:
    """The metrics of a model on a loader's data. Used in training and by eval.py."""
    return classification_metrics(*predict(model, loader), classes)


def confusion(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> np.ndarray:
    """(K, K) numbers of pictures: rows are true classes, columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(len(classes)))


def report(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> tuple[str, dict]:
    """scikit-learn's classification report as text and as a dict."""
    from sklearn.metrics import classification_report

    options = {"labels": np.arange(len(classes)), "target_names": classes, "zero_division": 0}
    guesses = logits.argmax(axis=1)
    return (
        classification_report(labels, guesses, digits=4, **options),
        classification_report(labels, guesses, output_dict=True, **options),
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_calibration(labels: np.ndarray, logits: np.ndarray, path: Path) -> None:
    """Accuracy over confidence, with the share of the pictures below."""
    error, rows = calibration(labels, softmax(logits.astype(np.float64)))
    share, sure, right = np.array(rows).T
    drawing, ((axis,),) = figure(1, 1, 6, 5)
    axis.bar(sure, share, width=0.05, color="0.85", label="share of the pictures")
    axis.plot([0, 1], [0, 1], ls="--", color="0.5", label="perfectly calibrated")
    axis.plot(sure, right, marker="o", color="C0", label="accuracy at this confidence")
    axis.set(title=f"Calibration (expected calibration error {error:.3f})", xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8, loc="upper left")
    save_figure(drawing, path)


def draw_page(dataset, labels, logits, classes: list[str], indices, path: Path) -> None:
    """A page of pictures, each with its true class, and what was predicted with which probability; mistakes in red."""
    indices = list(indices)
    columns = max(1, min(4, len(indices)))
    rows = max(1, -(-len(indices) // columns))
    drawing, axes = figure(rows, columns, width=2.6, height=2.8)
    for axis in axes.flat:
        axis.axis("off")
    if not indices:
        axes[0, 0].set_title("no mistakes", fontsize=9)
    for axis, index in zip(axes.flat, indices, strict=False):
        probabilities = softmax(logits[index].astype(np.float64))
        guess = int(probabilities.argmax())
        axis.imshow(decode(dataset.samples[index].path))
        text = f"{dataset.samples[index].path.name}\ntrue: {classes[labels[index]]}\n{classes[guess]} {probabilities[guess]:.2f}"
        axis.set_title(text, fontsize=8, color="black" if guess == labels[index] else "C3")
    save_figure(drawing, path)


def worst_first(labels: np.ndarray, logits: np.ndarray) -> list[int]:
    """Indices of the wrong predictions, the most confident first."""
    sure, wrong = softmax(logits.astype(np.float64)).max(axis=1), logits.argmax(axis=1) != labels
    return sorted(np.flatnonzero(wrong).tolist(), key=lambda index: (-sure[index], index))


def draw_answer(source: Path, answers: list[dict], path: Path) -> None:
    """The picture, with bars of its most probable classes beside it."""
    drawing, ((left, right),) = figure(1, 2, width=4, height=3)
    left.imshow(decode(source))
    left.axis("off")
    left.set_title(source.name, fontsize=8)
    names, values = [a["class"] for a in answers], [a["probability"] for a in answers]
    bars = right.barh(range(len(names))[::-1], values, color="C0")
    right.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    right.set_yticks(range(len(names))[::-1], names, fontsize=8)
    right.set(xlim=(0, 1.15), xlabel="probability")
    save_figure(drawing, path)
