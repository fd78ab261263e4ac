"""Runs an image classifier over pictures with one class each."""

from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from common.batches import whole_batches
from common.class_metrics import classification_metrics, sample_rows
from common.record import write_samples
from common.runtime import gather_lists, progress_bar
from common.vision.labelled import collate


def predict(model, loader) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N,), logits (N, K)) of the loader's pictures, of all processes, in the order of the data set."""
    found = dict(gather_lists(classify(model, progress_bar(loader, "evaluating"))))  # some twice: batches are shared out evenly
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
    logits = np.stack([row for _, row in classify(model, whole_batches(dataset, collate, 32))])
    labels = np.array([sample.label for sample in dataset.samples])
    return labels, logits


def evaluate(model, loader, classes: list[str]) -> dict:
    """The metrics of a model on a loader's data. Used in training and by eval.py."""
    return classification_metrics(*predict(model, loader), classes)


def save_samples(dataset, labels: np.ndarray, logits: np.ndarray, folder: Path) -> None:
    """samples.json in the folder: what was said of each picture."""
    rows = sample_rows([sample.name for sample in dataset.samples], labels, logits)
    write_samples(folder / "samples.json", "balanced_accuracy", True, rows, classes=dataset.classes)
