"""Reads boxes in YOLO's format: one text file per picture, and one that names the classes."""

import math
import os
import re
from collections import Counter
from pathlib import Path

from boxes import Sample, distinct_classes, make_sample
from common.config import UserError, load_yaml
from common.samples import SPLIT_NAMES, Faults, FileFinder, name_parts, read_text, split_of, visible_entries
from common.vision.pictures import picture_endings, pictures_below

# A folder of pictures -> that of their labels, which has the same place otherwise.
LABEL_FOLDERS = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS", "JPEGImages": "labels"}


# ---- what names the classes and the splits ---------------------------------------------------------------------------


def yolo_file(data_dir: Path, lists: bool = True) -> Path | None:
    """What names the classes: data.yaml or another YAML with names; or a list, CVAT's obj.names or Label Studio's classes.txt."""
    folders = [data_dir, data_dir / "labels"]
    files = [Path(entry.path) for folder in folders for entry in visible_entries(folder) if entry.is_file()]
    yamls = [p for p in files if p.suffix.lower() in (".yaml", ".yml")]
    named = [p for p in yamls if p.stem in ("data", "dataset")] or [p for p in yamls if re.search(rb"^names\s*:", peek(p), re.M)]
    plain = [p for p in files if p.suffix == ".names"] + [p for p in files if p.name == "classes.txt"]
    return next(iter(named + (plain if lists else [])), None)


def peek(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(2**20)
    except OSError:
        return b""


def yolo_settings(file: Path, data_dir: Path, faults: Faults) -> tuple[list[str], dict[int, int], dict]:
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


# ---- which pictures --------------------------------------------------------------------------------------------------


def read_yolo(data_dir: Path, faults: Faults):
    file = yolo_file(data_dir)
    classes, index, settings = yolo_settings(file, data_dir, faults)
    pictures = {split: yolo_pictures(data_dir, split, settings, faults) for split in SPLIT_NAMES}
    held_out = {path for split in ("val", "test") for path in pictures[split] or []}
    shared = [path for path in pictures["train"] or [] if path in held_out]
    if 0 < len(shared) < len(pictures["train"] or []):  # `train: images`, and val in a folder of it
        pictures["train"] = [path for path in pictures["train"] if path not in held_out]
        faults.notes["picture of two splits: it is not trained on"] += [path.name for path in shared]
    reader, splits = LabelReader(data_dir, index, "kpt_shape" in settings, faults), {}
    for split in (split for split in SPLIT_NAMES if pictures[split] is not None):
        splits[split] = [reader.read(path) for path in pictures[split]]
    if reader.unknown[len(classes)] and not reader.counts[0] and min(index, default=1) == 0:
        raise UserError(
            f"{data_dir}: the label files count classes from 1 to {len(classes)}, and {file.name} from 0; "
            f"if they are right, write into it: names: {{1: {', 2: '.join(classes[:2])} ...}}"
        )
    return splits, classes


def yolo_pictures(data_dir: Path, split: str, settings: dict, faults: Faults) -> list[Path] | None:
    """The pictures of a split, in the folders and lists that the settings name or in a usual folder; None where there is none."""
    entries = [value for key, value in settings.items() if isinstance(key, str) and key.lower() in SPLIT_NAMES[split]]
    entries = [e for value in entries for e in (value if isinstance(value, list) else [value]) if isinstance(e, str) and e]
    found = []
    for entry in entries:
        place = find_place(data_dir, str(settings.get("path") or ""), entry, split)
        if place:
            found += pictures_at(data_dir, place, split, faults)
        elif split != "test":  # many name one that did not come along
            faults.add(f"folder or list of the {split} split that is not there", entry)
    if not found:
        folders = usual_folders(data_dir, split)
        found = [path for folder in folders[:1] for path in pictures_at(data_dir, folder, split, faults)] if folders else None
    for path, times in Counter(found or []).items():
        if times > 1:
            faults.note("picture that is listed twice, and taken once", path.name)
    return found and list(dict.fromkeys(found))


def find_place(data_dir: Path, root: str, entry: str, split: str) -> Path | None:
    """The folder or list in data_dir that an entry means; root: the data set's folder where it was made, perhaps elsewhere.

    Paths are often of another machine: the more of their last parts fit, the better. One that has lost the name of its split
    on the way (images, of ../train/images) is not believed.
    """
    whole = [part for part in name_parts(entry) if "*" not in part]
    named = any(split_of(part) == split for part in whole)
    tries = [name_parts(root) + whole, *(whole[start:] for start in range(len(whole)))]
    for parts in tries if whole else [[]]:
        place = descend(data_dir, parts)
        if place and (not named or any(split_of(part) == split for part in parts)):
            return place
    return None


def descend(folder: Path, parts: list[str]) -> Path | None:
    """What lies at these parts, as name_parts gives them, below the folder."""
    for part in parts:
        entries = [entry for entry in visible_entries(folder) if name_parts(entry.name) == [part]]
        if not entries:
            return None
        folder = folder / entries[0].name
    return folder


def usual_folders(data_dir: Path, split: str) -> list[Path]:
    """Where the pictures of a split lie when nothing names the place, the likeliest first."""
    rooms = [data_dir / "images", data_dir / "Images", data_dir]
    named = [Path(e.path) for room in rooms for e in visible_entries(room) if e.is_dir() and split_of(e.name) == split]
    folders = [folder / "images" if (folder / "images").is_dir() else folder for folder in named]
    folders += [*rooms[:2], data_dir / "obj_train_data", data_dir] if split == "train" else []
    return [folder for folder in folders if folder.is_dir()]


def pictures_at(data_dir: Path, place: Path, split: str, faults: Faults) -> list[Path]:
    """The pictures below a folder, or those that a text file names, one a line."""
    if place.is_dir():
        return pictures_below(place)
    finder = FileFinder([data_dir, place.parent, *usual_folders(data_dir, split)], picture_endings())
    lines = [line.strip() for line in read_text(place, faults).splitlines()]
    return [path for path in (finder.find(line, faults) for line in lines if line) if path]


# ---- labels ----------------------------------------------------------------------------------------------------------


class LabelReader:
    """Reads the label files of pictures. Afterwards counts and unknown tell how often each class number stood there."""

    def __init__(self, data_dir: Path, index: dict[int, int], posed: bool, faults: Faults):
        self.data_dir, self.index, self.posed, self.faults = data_dir, index, posed, faults
        self.listings = {}  # folder -> {name, as it is and as it is compared: label file}
        self.counts, self.unknown = Counter(), Counter()

    def read(self, picture: Path) -> Sample:
        """`class cx cy w h` a line, in fractions. No file: no objects.

        One more number is a detector's confidence. Still more are keypoints behind the box, where data.yaml has kpt_shape
        (posed); else a polygon, whose bounding box counts.
        """
        file, rows = self.find(picture), []
        for number, line in enumerate(read_text(file, self.faults).splitlines() if file else [], start=1):
            try:
                label, *box = yolo_row(line.split(), self.posed) if line.strip() else [None]
            except ValueError:
                self.faults.add("box that cannot be read", f"{file.name} line {number}")
                continue
            if label in self.index:
                self.counts[label] += 1
                rows.append((*box, self.index[label], False, math.nan))
            elif label is not None:
                self.unknown[label] += 1
                self.faults.add("box of a class number without a name", f"{file.name} line {number}: {label:g}")
        return make_sample(picture, None, rows, relative=True)

    def find(self, picture: Path) -> Path | None:
        """A picture's label file: in the folder that belongs to its own, or beside it."""
        parts = Path(os.path.relpath(picture.parent, self.data_dir)).parts
        swapped = [(*parts[:n], LABEL_FOLDERS[part], *parts[n + 1 :]) for n, part in enumerate(parts) if part in LABEL_FOLDERS]
        name = f"{picture.stem}.txt"
        for folder in [*swapped[::-1], parts, ("labels", *parts)]:
            if folder not in self.listings:
                entries = visible_entries(self.data_dir.joinpath(*folder))
                files = {entry.name: Path(entry.path) for entry in entries if entry.name.lower().endswith(".txt")}
                self.listings[folder] = {**{name_parts(file)[-1]: path for file, path in files.items()}, **files}
            if file := self.listings[folder].get(name) or self.listings[folder].get(name_parts(name)[-1]):
                return file
        return None


def yolo_row(cells: list[str], posed: bool) -> tuple:
    """(class number, x1, y1, x2, y2) of a line's cells. ValueError where they are no box."""
    label, *values = map(float, cells)
    if len(values) < 4 or not label.is_integer() or (len(values) > 5 and len(values) % 2 and not posed):
        raise ValueError
    if len(values) > 5 and not posed:
        return label, min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, w, h = values[:4]
    return label, x - w / 2, y - h / 2, x + w / 2, y + h / 2
