"""A picture and its boxes, as the readers of each format give them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError
from common.runtime import say


@dataclass
class Sample:
    """A picture and its boxes. boxes: (N, 4) float; labels: (N,) class index; crowd: (N,) bool; area: (N,) or NaN."""

    path: Path
    size: tuple[int, int] | None  # (width, height) that the annotation claims; YOLO claims none
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    relative: bool = False  # YOLO: boxes are fractions of width and height until the picture is opened
    annotated: bool = False  # whether its annotation has a box, be it one that can be used or not


def make_sample(path, size, rows, relative=False) -> Sample:
    """rows: (x1, y1, x2, y2, label, crowd, area) for each box; None for one that cannot be read."""
    table = np.array([row for row in rows if row], dtype=np.float64).reshape(-1, 7)
    return Sample(path, size, table[:, :4], table[:, 4].astype(int), table[:, 5] > 0, table[:, 6], relative, bool(rows))


def distinct_classes(classes: list[str], where) -> list[str]:
    """The class names as they are. UserError where two are called the same: which of them a box means, nobody could tell."""
    if doubled := next((name for name in classes if classes.count(name) > 1), None):
        raise UserError(f"{where}: the class name {doubled!r} stands for two classes; give one of them another name")
    return classes


def mark_fractions(where, samples: list[Sample]) -> None:
    """Marks samples whose boxes all are fractions of their pictures: no pictures have all their boxes in the first pixel."""
    boxes = np.concatenate([sample.boxes for sample in samples] or [np.zeros((0, 4))])
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if any(sample.relative for sample in samples) or not len(boxes) or boxes.max() > 1 or not (boxes % 1).any():
        return
    say(f"{where}: boxes from 0 to 1 are fractions of the picture's width and height")
    for sample in samples:
        sample.relative, sample.area = True, np.full(len(sample.boxes), np.nan)
