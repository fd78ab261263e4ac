"""Pages of pictures with what a model says of them."""

from pathlib import Path

import numpy as np

from common.class_metrics import softmax
from common.plots import figure, save_figure
from common.vision.pictures import decode


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
