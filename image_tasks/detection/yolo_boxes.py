"""Reads boxes in YOLO's format: one text file per picture, and one that names the classes."""

import math
import re
from collections import Counter
from pathlib import Path

from boxes import Sample, distinct_classes, make_sample
from common.config import UserError, load_yaml
from common.samples import Faults, read_text, split_of, visible_entries
from common.vision.yolo_folders import LabelFinder, yolo_splits

# ---- what names the classes and the splits ---------------------------------------------------------------------------


def yolo_file(data_dir: Path, lists: bool = True) -> Path | None:
    """What names the classes: data.yaml or another YAML with names; or a list, CVAT's obj.names or Label Studio's classes.txt."""
    own = [Path(entry.path) for entry in visible_entries(data_dir) if entry.is_dir() and split_of(entry.name)]
    folders = [data_dir, data_dir / "labels", *own]
    files = [Path(entry.path) for folder in folders for entry in visible_entries(folder) if entry.is_file()]
    yamls = [p for p in files if p.suffix.lower() in (".yaml", ".yml")]
    named = [p for p in yamls if p.stem in ("data", "dataset")] or [p for p in yamls if re.search(rb"^names\s*:", peek(p), re.M)]
    plain = [p for p in files if p.suffix == ".names"] + [p for p in files if p.name in ("classes.txt", "_darknet.labels")]
    return next(iter(named + (plain if lists else [])), None)


def peek(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(2**20)
    except OSError:
        return b""


def yolo_settings(file: Path, faults: Faults) -> tuple[list[str], dict[int, int], dict]:
    """(class names, number in the label files -> class index, the rest: folders or lists of splits)."""
    if file.suffix.lower() in (".yaml", ".yml"):
        settings = load_yaml(file)
        names = settings.get("names") if isinstance(settings, dict) else None
    else:
        names = [line.strip() for line in read_text(file, faults).splitlines() if line.strip()]
        data = file.with_suffix(".data")  # CVAT: obj.data has lines "train = data/train.txt"
        lines = read_text(data, faults).splitlines() if data.is_file() else []
        settings = {key.strip(): value.strip() for key, sign, value in (line.partition("=") for line in lines) if sign}
    try:
        numbered = dict(enumerate(names)) if isinstance(names, list) else {int(number): name for number, name in names.items()}
        classes = distinct_classes([str(numbered[number]).strip() for number in sorted(numbered)], file)
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{file} must hold `names:`, the list of class names") from None
    return classes, {number: index for index, number in enumerate(sorted(numbered))}, settings


# ---- pictures and labels ---------------------------------------------------------------------------------------------


def read_yolo(data_dir: Path, faults: Faults):
    file = yolo_file(data_dir)
    classes, index, settings = yolo_settings(file, faults)
    reader = LabelReader(data_dir, index, "kpt_shape" in settings, faults)
    splits = yolo_splits(data_dir, settings, faults)
    splits = {split: [reader.read(path) for path in pictures] for split, pictures in splits.items()}
    reader.finder.name_unused()
    if reader.unknown[len(classes)] and not reader.counts[0] and min(index, default=1) == 0:
        raise UserError(
            f"{data_dir}: the label files count classes from 1 to {len(classes)}, and {file.name} from 0; "
            f"if they are right, write into it: names: {{1: {', 2: '.join(classes[:2])} ...}}"
        )
    return splits, classes


class LabelReader:
    """Reads the label files of pictures. Afterwards counts and unknown tell how often each class number stood there."""

    def __init__(self, data_dir: Path, index: dict[int, int], posed: bool, faults: Faults):
        self.finder, self.index, self.posed, self.faults = LabelFinder(data_dir, faults), index, posed, faults
        self.counts, self.unknown = Counter(), Counter()

    def read(self, picture: Path) -> Sample:
        """`class cx cy w h` a line, in fractions. No file: no objects.

        One more number is a detector's confidence. Still more are keypoints behind the box, where data.yaml has kpt_shape
        (posed); else a polygon, whose bounding box counts.
        """
        file, rows = self.finder.find(picture), []
        for number, line in enumerate(read_text(file, self.faults).splitlines() if file else [], start=1):
            try:
                label, *box = yolo_row(line.split(), self.posed) if line.strip() else [None]
            except ValueError:
                self.faults.add("box that cannot be read", f"{file.name} line {number}")
                rows.append(None)
                continue
            if label in self.index:
                self.counts[label] += 1
                rows.append((*box, self.index[label], False, math.nan))
            elif label is not None:
                self.unknown[label] += 1
                rows.append(None)
                self.faults.add("box of a class number without a name", f"{file.name} line {number}: {label:g}")
        return make_sample(picture, None, rows, relative=True)


def yolo_row(cells: list[str], posed: bool) -> tuple:
    """(class number, x1, y1, x2, y2) of a line's cells. ValueError where they are no box."""
    label, *values = map(float, cells)
    if len(values) < 4 or not label.is_integer() or (len(values) > 5 and len(values) % 2 and not posed):
        raise ValueError
    if len(values) > 5 and not posed:
        return label, min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, w, h = values[:4]
    return label, x - w / 2, y - h / 2, x + w / 2, y + h / 2
