"""A picture and its boxes, as the readers of each format give them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError


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


def make_sample(path, size, rows, relative=False) -> Sample:
    """rows: (x1, y1, x2, y2, label, crowd, area) for each box."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return Sample(path, size, table[:, :4], table[:, 4].astype(int), table[:, 5] > 0, table[:, 6], relative)


def distinct_classes(classes: list[str], where) -> list[str]:
    """The class names as they are. UserError where two are called the same: which of them a box means, nobody could tell."""
    if doubled := next((name for name in classes if classes.count(name) > 1), None):
        raise UserError(f"{where}: the class name {doubled!r} stands for two classes; give one of them another name")
    return classes
