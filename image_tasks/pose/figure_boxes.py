"""Boxes around figures for infer.py, and which picture each belongs to."""

import math
from collections import defaultdict
from pathlib import Path

from common.checkpoint import read_json
from common.config import UserError
from common.file_finder import name_parts
from common.samples import Faults
from common.tables import read_table
from common.vision.pictures import is_picture
from csv_columns import box_columns, read_box, to_number

EXPECTED = (
    "expected COCO results (rows with file_name, bbox x, y, w, h and score), COCO annotations (images, annotations), or a CSV "
    "with a picture's name, x, y, w, h (or xmin, ymin, xmax, ymax) and score in columns of these names"
)


def place_boxes(pictures: list[Path], boxes: str, threshold: float, faults: Faults) -> list[tuple[Path, list | None, float]]:
    """(picture, box or None for the whole picture, score) of every figure to look at; boxes: a file for read_boxes, or empty."""
    if not boxes:
        return [(path, None, 1.0) for path in pictures]
    file = Path(boxes).expanduser()
    known = read_boxes(file, faults)
    framed, named = [], match_names(pictures, known, file)
    for path in pictures:
        sure = [(path, box, score) for name in named[path] for box, score in known[name] if score >= threshold]
        framed += sure
        if not sure:
            faults.add(f"picture without a box of score {threshold} or more in {boxes}", path.name)
    if not framed:
        faults.report()
        raise UserError(f"--boxes {boxes} has no box of score {threshold} or more for any of the {len(pictures)} pictures")
    return framed


def match_names(pictures: list[Path], names, file: Path) -> dict[Path, list[str]]:
    """Picture -> the names in a file of boxes that mean it: those that share most of the last parts of its path, if any.

    Results hold the paths of another day or machine, so names count from their end. UserError where a name fits two pictures
    equally well, or two names of different pictures fit one.
    """
    own, theirs = {path: name_parts(path.absolute()) for path in pictures}, {name: name_parts(name) for name in names}
    by_base, named = defaultdict(list), {path: [] for path in pictures}
    for path, parts in own.items():
        by_base[parts[-1]].append(path)
    for name, parts in theirs.items():
        shared = {path: common_end(own[path], parts) for path in by_base.get(parts[-1] if parts else "", [])}
        most = max(shared.values(), default=0)
        best = [path for path, many in shared.items() if many == most]
        if len(best) > 1:
            raise UserError(f"--boxes {file}: {name} may be {best[0]} or {best[1]}; its rows need more of the path")
        for path in best:
            named[path].append(name)
    for path, found in named.items():
        most = max((common_end(own[path], theirs[name]) for name in found), default=0)
        closest = [name for name in found if common_end(own[path], theirs[name]) == most]
        whole = max(closest, key=lambda name: len(theirs[name]), default=None)
        # a.jpg beside cam1/a.jpg may mean the same picture, cam2/a.jpg does not
        named[path] = [name for name in found if common_end(theirs[name], theirs[whole]) == len(theirs[name])]
        if other := [name for name in closest if name not in named[path]]:
            raise UserError(f"--boxes {file}: {path} may be {whole} or {other[0]}; give --input the folder above")
    return named


def common_end(a: list[str], b: list[str]) -> int:
    """How many last parts two paths have in common."""
    return next((n for n, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b)))


def read_boxes(path: Path, faults: Faults) -> dict[str, list[tuple[list[float], float]]]:
    """File name -> [(box x, y, w, h, score)] of a file (see EXPECTED). Boxes without an area are named in faults."""
    boxes = defaultdict(list)
    try:
        rows = table_rows(path, faults) if path.suffix.lower() in (".csv", ".tsv") else json_rows(path)
        for number, (name, box, score) in enumerate(rows, start=1):
            box, score = [float(value) for value in box], float(score)
            if len(box) != 4 or not name_parts(name):
                raise ValueError
            if math.isfinite(score) and all(map(math.isfinite, box)) and min(box[2:]) > 0:
                boxes[name].append((box, score))
            else:
                faults.add("box without an area or a score", f"{path.name} row {number}: {name}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"--boxes {path}: {EXPECTED}") from None
    return boxes


def json_rows(path: Path):
    """Yields (file name, box, score). Raises what the reading of another content raises."""
    table = read_json(path)
    names = {image["id"]: image["file_name"] for image in table["images"]} if isinstance(table, dict) else {}
    for row in table["annotations"] if isinstance(table, dict) else table:
        name = row.get("file_name") or names[row["image_id"]]
        if not isinstance(name, str):
            raise TypeError
        yield name, row["bbox"], row.get("score", 1.0)


def table_rows(path: Path, faults: Faults):
    """Yields (file name, box, score) of a CSV file. KeyError where its header does not name the columns."""
    lines = [cells for _, cells in read_table(path, faults)]
    labels = lines[0] if lines else []
    box, scores = box_columns(labels), [c for c, label in enumerate(labels) if label.lower() in ("score", "confidence", "conf")]
    if not box or len(lines) < 2:
        raise KeyError
    picture = next((c for c, cell in enumerate(lines[1]) if is_picture(cell)), 0)
    for cells in lines[1:]:
        cells = [*cells, *[""] * len(labels)]
        yield cells[picture], read_box(cells, box, comma=False), to_number(cells[scores[0]], False) if scores else 1.0
