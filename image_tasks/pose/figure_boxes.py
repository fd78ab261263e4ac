"""Boxes around figures for infer.py: which picture each belongs to."""

import math
from pathlib import Path

from common.checkpoint import read_json
from common.config import UserError
from common.samples import Faults


def place_boxes(pictures: list[Path], boxes: str, threshold: float, faults: Faults) -> list[tuple[Path, list | None, float]]:
    """(picture, box or None for the whole picture, score) of every figure to look at; boxes: a file for read_boxes, or empty."""
    if not boxes:
        return [(path, None, 1.0) for path in pictures]
    known, framed = read_boxes(Path(boxes).expanduser()), []
    for path in pictures:
        sure = [(path, box, score) for box, score in known.get(path.name, []) if score >= threshold]
        framed += sure
        if not sure:
            faults.add(f"picture without a box of score {threshold} or more in {boxes}", path.name)
    if not framed:
        raise UserError(f"--boxes {boxes} has no box of score {threshold} or more for any of the {len(pictures)} pictures")
    return framed


def read_boxes(path: Path) -> dict[str, list[tuple[list[float], float]]]:
    """File name -> [(box x, y, w, h, score)] of a JSON file: COCO detection results with file_name, or COCO annotations.

    Names count without their folders: results hold the paths of another day.
    """
    table, boxes = read_json(path), {}
    try:
        names = {image["id"]: image["file_name"] for image in table["images"]} if isinstance(table, dict) else {}
        for row in table["annotations"] if isinstance(table, dict) else table:
            name = row.get("file_name") or names[row["image_id"]]
            box = [float(v) for v in row["bbox"]]
            if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
                raise ValueError
            boxes.setdefault(Path(name).name, []).append((box, float(row.get("score", 1.0))))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"--boxes {path}: expected COCO results (rows with file_name, bbox x, y, w, h and score) or COCO annotations "
            f"(images, annotations), every box with an area"
        ) from None
    return boxes
