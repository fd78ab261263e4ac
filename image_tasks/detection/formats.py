"""Reads detection annotations - COCO, Pascal VOC or YOLO - into one form. Knows no model; opens no picture.

Files from outside are checked here: what is malformed is named, counted and left out; what makes the whole set
unusable is a UserError. Boxes leave as (x1, y1, x2, y2) in pixels of the picture as a person sees it.
"""

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import read_json
from common.config import UserError
from common.samples import SPLIT_NAMES, Faults, FileFinder, choose_layout, hold_out, inside
from common.vision.pictures import is_picture, pictures_below

LAYOUTS = "COCO (annotations/*.json), VOC (Annotations/, JPEGImages/) or YOLO (data.yaml, images/, labels/)"


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


def read_dataset(data_dir: Path, data_format: str, seed: int, faults: Faults):
    """(splits, classes, format): splits maps train, val and perhaps test to lists of Sample; classes are names in order.

    data_format: "auto" recognises the layout by what is there. Without a val split about a fifth of train becomes it: a
    hash of (seed, file name) decides for each picture alone, so that adding pictures moves no other.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir: there is no folder {data_dir}")
    readers = {"voc": read_voc, "yolo": read_yolo, "coco": read_coco}
    there = {"voc": (data_dir / "Annotations").is_dir(), "yolo": yolo_yaml(data_dir), "coco": coco_files(data_dir)}
    data_format = choose_layout(data_dir, data_format, there, LAYOUTS)
    splits, classes = readers[data_format](data_dir, faults)
    if not splits.get("train"):
        raise UserError(f"{data_dir} ({data_format}) has no training pictures")
    if not classes:
        raise UserError(f"{data_dir} ({data_format}) names no classes")
    if not splits.get("val"):
        names = [s.path.name for s in splits["train"]]
        splits["train"], splits["val"] = hold_out(splits["train"], names, seed, data_dir, "pictures")
    return splits, classes, data_format


# ---- COCO: one JSON per split ----------------------------------------------------------------------------------------


def coco_files(data_dir: Path) -> dict[str, Path]:
    """Split -> annotation file, from the usual places: annotations/instances_train2017.json, train/_annotations.coco.json ..."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        places = ("annotations/instances_{}*.json", "{}/*.json", "annotations/*{}*.json", "{}*.json")
        for pattern in [place.format(name) for name in names for place in places]:
            other = ("captions", "person_keypoints", "stuff", "panoptic")  # COCO's annotations for other tasks
            files = [p for p in sorted(data_dir.glob(pattern)) if not p.name.startswith(other)]
            files = [p for p in files if split == "train" or "train" not in p.name]  # trainval.json is no validation split
            if files:
                found[split] = files[0]
                break
    if "train" not in found:
        single = sorted([*data_dir.glob("annotations/*.json"), *data_dir.glob("*.json")])
        single = [p for p in single if p not in found.values()]
        if len(single) == 1:
            found["train"] = single[0]
    return found if "train" in found else {}


def read_coco(data_dir: Path, faults: Faults):
    files, tables = coco_files(data_dir), {}
    for split, path in files.items():
        table = read_json(path)
        table = table if isinstance(table, dict) else {}
        absent = [key for key in ("images", "annotations", "categories") if not isinstance(table.get(key), list)]
        if absent and split != "test":
            raise UserError(f"{path} is no COCO file: it has no list {absent[0]!r}")
        if not absent:  # a test set may come without labels (image_info_test2017.json); it is no use here then
            tables[split] = (path, table)
    classes = coco_classes(*tables["train"])
    splits = {split: read_coco_split(data_dir, split, path, table, classes, faults) for split, (path, table) in tables.items()}
    return splits, classes


def coco_classes(path: Path, table: dict) -> list[str]:
    """The names of a COCO file's categories, in order of their ids."""
    try:
        categories = sorted(table["categories"], key=lambda c: c["id"])
        classes = [str(c["name"]) for c in categories]
        used = {a.get("category_id") for a in table["annotations"] if isinstance(a, dict)}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a category without id and name, or an id that is no number ({error})") from None
    if 0 not in used and len(classes) > 1 and all(c.get("supercategory") == classes[0] for c in categories[1:]):
        classes = classes[1:]  # Roboflow's exports list the group of the classes itself as category 0
    doubled = {name for name in classes if classes.count(name) > 1}
    if doubled:
        raise UserError(f"{path}: the category name {sorted(doubled)[0]!r} stands for two categories")
    return classes


def read_coco_split(data_dir: Path, split: str, path: Path, table: dict, classes: list[str], faults: Faults) -> list[Sample]:
    rows = coco_boxes(path, table, classes, faults)
    names = SPLIT_NAMES[split]
    folders = [path.parent, *(data_dir / part for n in names for part in (n, f"{n}2017", f"images/{n}", f"images/{n}2017"))]
    finder = FileFinder([*folders, data_dir / "images", data_dir])
    samples, seen = [], set()
    for image in table["images"]:
        try:
            name, image_id, size = str(image["file_name"]), image["id"], (int(image["width"]), int(image["height"]))
            doubled = image_id in seen
        except (KeyError, TypeError, ValueError, OverflowError):
            faults.add("image entry without id, file_name, width and height", f"{path.name} {str(image)[:60]}")
            continue
        if doubled:
            raise UserError(f"{path}: image id {image_id} is given twice")
        seen.add(image_id)
        place = finder.find(name)
        if place is None:
            faults.add("picture that is not there", name)
        else:
            samples.append(make_sample(place, size, rows.pop(image_id, [])))
    for image_id in rows:
        if image_id not in seen:
            faults.add("boxes of an image that is not listed", f"{path.name} image id {image_id}")
    return samples


def coco_boxes(path: Path, table: dict, classes: list[str], faults: Faults) -> dict:
    """Image id -> rows for make_sample."""
    categories = [c for c in table["categories"] if isinstance(c, dict) and str(c.get("name")) in classes]
    index = {c.get("id"): classes.index(str(c["name"])) for c in categories}
    rows = defaultdict(list)
    for a in table["annotations"]:
        try:
            x, y, w, h = map(float, a["bbox"])
            label, area = index[a["category_id"]], float(a.get("area") or math.nan)
            rows[a["image_id"]].append((x, y, x + w, y + h, label, bool(a.get("iscrowd", 0)), area))
        except (KeyError, TypeError, ValueError, OverflowError):
            faults.add("box that cannot be read", f"{path.name} annotation {a.get('id') if isinstance(a, dict) else a}")
    return rows


# ---- Pascal VOC: one XML per picture ---------------------------------------------------------------------------------


def read_voc(data_dir: Path, faults: Faults):
    """Corner coordinates are taken as they stand (LabelImg's way). `difficult` boxes are treated as crowd: not scored."""
    from xml.etree.ElementTree import ParseError

    pictures = {p.stem: p for p in sorted((data_dir / "JPEGImages").glob("*")) if is_picture(p.name)}
    finder, parsed = FileFinder([data_dir / "Annotations"]), defaultdict(list)
    for split, stems in voc_stems(data_dir).items():
        for stem in stems:
            try:
                size, boxes = read_voc_file(finder.find(f"{stem}.xml"), faults)
            except (OSError, TypeError, ValueError, ParseError):
                faults.add("annotation that cannot be read", f"{stem}.xml")
                continue
            if stem not in pictures:
                faults.add("picture that is not there", f"JPEGImages/{stem}.*")
                continue
            parsed[split].append((pictures[stem], size, boxes))
    classes = sorted({box[4] for rows in parsed.values() for _, _, boxes in rows for box in boxes})
    splits = {}
    for split, rows in parsed.items():
        splits[split] = [
            make_sample(path, size, [(*b[:4], classes.index(b[4]), b[5], math.nan) for b in boxes]) for path, size, boxes in rows
        ]
    return splits, classes


def voc_stems(data_dir: Path) -> dict[str, list[str]]:
    """Split -> names without ending, from ImageSets/Main; without these every annotation is training data."""
    listed, lists = {}, data_dir / "ImageSets" / "Main"
    for split, names in SPLIT_NAMES.items():
        for file in (lists / f"{name}.txt" for name in names):
            if split not in listed and file.is_file():
                listed[split] = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if "train" not in listed:
        file = lists / "trainval.txt"
        every = [p.stem for p in sorted((data_dir / "Annotations").glob("*.xml"))]
        stems = file.read_text(encoding="utf-8").split() if file.is_file() else every
        held_out = {stem for stems_ in listed.values() for stem in stems_}
        listed["train"] = [stem for stem in stems if stem not in held_out]
    return listed


def read_voc_file(file: Path | None, faults: Faults):
    """((width, height) or None, [(x1, y1, x2, y2, name, difficult)]) of an annotation. Raises what its reading raises."""
    import xml.etree.ElementTree as ElementTree

    root, boxes = ElementTree.parse(file).getroot(), []
    size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    for number, thing in enumerate(root.iter("object")):
        corners = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            corners = [float(c) for c in corners]
            boxes.append((*corners, thing.findtext("name").strip(), thing.findtext("difficult", "0").strip() == "1"))
        except (TypeError, ValueError, AttributeError):
            faults.add("box that cannot be read", f"{file.name} object {number + 1}")
    return size if all(size) else None, boxes


# ---- YOLO: one text file per picture ---------------------------------------------------------------------------------


def yolo_yaml(data_dir: Path) -> Path | None:
    files = sorted([*data_dir.glob("*.yaml"), *data_dir.glob("*.yml")])
    named = [p for p in files if p.stem in ("data", "dataset")]
    return (named or files or [None])[0]


def read_yolo(data_dir: Path, faults: Faults):
    import yaml

    path = yolo_yaml(data_dir)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = settings["names"]
        if isinstance(names, str):
            raise TypeError
        classes = [str(names[i]) for i in range(len(names))]  # a list, or {0: ..., 1: ...}
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path} must hold `names:`, the list of class names") from None
    splits = {}
    for split in SPLIT_NAMES:
        pictures = yolo_pictures(data_dir, split, settings, faults)
        if pictures is not None:
            posed = "kpt_shape" in settings
            splits[split] = [read_yolo_sample(p, data_dir, len(classes), posed, faults) for p in pictures]
    return splits, classes


def yolo_pictures(data_dir: Path, split: str, settings: dict, faults: Faults) -> list[Path] | None:
    """The pictures of a split: in the folder or the list that data.yaml names, or in a usual folder; None where there is none."""
    aliases = SPLIT_NAMES[split]
    entries = [settings.get(alias) for alias in aliases if isinstance(settings.get(alias), str)]
    # Paths in data.yaml are often of another machine or relative to elsewhere: their last parts are tried, too.
    tries = [part for e in entries for part in (e, "/".join(Path(e).parts[-2:]), Path(e).name)]
    tries += [p for alias in aliases for p in (f"images/{alias}", f"{alias}/images", f"images/{alias}2017")]
    tries += ["images"] if split == "train" else []
    for place in (inside(data_dir, entry) for entry in tries):
        if place and place.is_dir():
            return pictures_below(place)
        if place and place.is_file() and place.suffix == ".txt":
            return listed_pictures(data_dir, place, faults)
    return None


def listed_pictures(data_dir: Path, file: Path, faults: Faults) -> list[Path]:
    """The pictures that a text file names, one a line."""
    found, finder = [], FileFinder([data_dir])
    for line in map(str.strip, file.read_text(encoding="utf-8").splitlines()):
        if picture := line and finder.find(line):
            found.append(picture)
        elif line:
            faults.add("picture that is not there", f"{file.name}: {line}")
    return found


def read_yolo_sample(picture: Path, data_dir: Path, classes: int, posed: bool, faults: Faults) -> Sample:
    """`class cx cy w h` a line, in fractions. No file: no objects.

    More numbers are keypoints behind the box, where data.yaml has kpt_shape (posed); else a polygon, whose bounding box counts.
    """
    parts = list(Path(os.path.relpath(picture, data_dir)).parts)  # a list in data.yaml may name it by an absolute path
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    file = (data_dir / Path(*parts)).with_suffix(".txt")
    rows = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [yolo_row(line.split(), classes, posed)] if line.strip() else []
        except ValueError:
            faults.add("box that cannot be read", f"{file.name} line {number}")
    return make_sample(picture, None, rows, relative=True)


def yolo_row(cells: list[str], classes: int, posed: bool) -> tuple:
    """A row for make_sample. ValueError where the cells are no box of a known class."""
    label, *values = map(float, cells)
    if not 0 <= label < classes or label != int(label) or len(values) < 4:
        raise ValueError
    if len(values) >= 6 and len(values) % 2 == 0 and not posed:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]), label, False, math.nan
    x, y, w, h = values[:4]
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2, label, False, math.nan
