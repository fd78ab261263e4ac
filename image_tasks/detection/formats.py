"""Reads detection annotations - COCO, Pascal VOC or YOLO - into one form. Knows no model; opens no picture.

Files from outside are checked here: what is malformed is named, counted and left out; what makes the whole set
unusable is a UserError. Boxes leave as (x1, y1, x2, y2) in pixels of the picture as a person sees it.
"""

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError
from common.runtime import say
from common.samples import SPLIT_NAMES, Faults, inside, split_off
from common.vision.pictures import IMAGE_ENDINGS


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
    if data_format == "auto":
        fitting = [name for name, sign in there.items() if sign]
        if len(fitting) != 1:
            what = f"looks like {' and '.join(fitting)}" if fitting else "is none of the layouts that are known"
            raise UserError(
                f"--data_dir {data_dir} {what}; expected COCO (annotations/*.json), VOC (Annotations/, JPEGImages/) or "
                f"YOLO (data.yaml, images/, labels/); --data_format chooses one"
            )
        data_format = fitting[0]
    elif not there[data_format]:
        raise UserError(f"--data_format {data_format}: {data_dir} does not have that layout")
    splits, classes = readers[data_format](data_dir, faults)
    if not splits.get("train"):
        raise UserError(f"{data_dir} ({data_format}) has no training pictures")
    if not classes:
        raise UserError(f"{data_dir} ({data_format}) names no classes")
    if not splits.get("val"):
        every = splits["train"]
        if len(every) < 2:
            raise UserError(f"{data_dir} has one training picture and no validation split: too few")
        chosen = split_off([s.path.name for s in every], seed)
        splits["val"] = [s for s, mine in zip(every, chosen, strict=True) if mine]
        splits["train"] = [s for s, mine in zip(every, chosen, strict=True) if not mine]
        count = len(splits["val"])
        say(f"no validation split in {data_dir}: {count} of {len(every)} training pictures, chosen by seed {seed}, become it")
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
    files = coco_files(data_dir)
    tables = {}
    for split, path in files.items():
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from None
        table = table if isinstance(table, dict) else {}
        absent = [key for key in ("images", "annotations", "categories") if not isinstance(table.get(key), list)]
        if absent and split != "test":
            raise UserError(f"{path} is no COCO file: it has no list {absent[0]!r}")
        if not absent:  # a test set may come without labels (image_info_test2017.json); it is no use here then
            tables[split] = (path, table)
    try:
        categories = sorted(tables["train"][1]["categories"], key=lambda c: c["id"])
        classes = [str(c["name"]) for c in categories]
        used = {a.get("category_id") for a in tables["train"][1]["annotations"] if isinstance(a, dict)}
    except (KeyError, TypeError) as error:
        raise UserError(f"{files['train']}: a category without id and name, or an id that is no number ({error})") from None
    if 0 not in used and len(classes) > 1 and all(c.get("supercategory") == classes[0] for c in categories[1:]):
        classes = classes[1:]  # Roboflow's exports list the group of the classes itself as category 0
    doubled = {name for name in classes if classes.count(name) > 1}
    if doubled:
        raise UserError(f"{files['train']}: the category name {sorted(doubled)[0]!r} stands for two categories")
    splits = {split: read_coco_split(data_dir, split, path, table, classes, faults) for split, (path, table) in tables.items()}
    return splits, classes


def read_coco_split(data_dir: Path, split: str, path: Path, table: dict, classes: list[str], faults: Faults) -> list[Sample]:
    categories = [c for c in table["categories"] if isinstance(c, dict) and str(c.get("name")) in classes]
    index = {c.get("id"): classes.index(str(c["name"])) for c in categories}
    rows = defaultdict(list)
    for a in table["annotations"]:
        where = f"{path.name} annotation {a.get('id') if isinstance(a, dict) else a}"
        try:
            x, y, w, h = (float(v) for v in a["bbox"])
            label, area = index[a["category_id"]], float(a.get("area") or math.nan)
            rows[a["image_id"]].append((x, y, x + w, y + h, label, bool(a.get("iscrowd", 0)), area))
        except (KeyError, TypeError, ValueError, OverflowError):
            faults.add("box that cannot be read", where)
    names = SPLIT_NAMES[split]
    folders = [path.parent, *(data_dir / part for n in names for part in (n, f"{n}2017", f"images/{n}", f"images/{n}2017"))]
    folders += [data_dir / "images", data_dir]
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
        places = (place for folder in folders if (place := inside(folder, name)) and place.is_file())
        place = next(places, None)
        if place is None:
            faults.add("picture that is not there", name)
            continue
        samples.append(make_sample(place, size, rows.pop(image_id, [])))
    for image_id in rows:
        if image_id not in seen:
            faults.add("boxes of an image that is not listed", f"{path.name} image id {image_id}")
    return samples


# ---- Pascal VOC: one XML per picture ---------------------------------------------------------------------------------


def read_voc(data_dir: Path, faults: Faults):
    """Corner coordinates are taken as they stand (LabelImg's way). `difficult` boxes are treated as crowd: not scored."""
    import xml.etree.ElementTree as ElementTree

    pictures = {p.stem: p for p in sorted((data_dir / "JPEGImages").glob("*")) if p.suffix.lower() in IMAGE_ENDINGS}
    listed = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            file = data_dir / "ImageSets" / "Main" / f"{name}.txt"
            if split not in listed and file.is_file():
                listed[split] = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if "train" not in listed:
        file = data_dir / "ImageSets" / "Main" / "trainval.txt"
        every = [p.stem for p in sorted((data_dir / "Annotations").glob("*.xml"))]
        stems = file.read_text(encoding="utf-8").split() if file.is_file() else every
        held_out = {stem for stems_ in listed.values() for stem in stems_}
        listed["train"] = [stem for stem in stems if stem not in held_out]
    parsed = defaultdict(list)
    for split, stems in listed.items():
        for stem in stems:
            file = inside(data_dir / "Annotations", f"{stem}.xml")
            try:
                root = ElementTree.parse(file).getroot()
                size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
                boxes = []
                for number, thing in enumerate(root.iter("object")):
                    corners = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
                    try:
                        corners = [float(c) for c in corners]
                        boxes.append((*corners, thing.findtext("name").strip(), thing.findtext("difficult", "0").strip() == "1"))
                    except (TypeError, ValueError, AttributeError):
                        faults.add("box that cannot be read", f"{stem}.xml object {number + 1}")
            except (OSError, TypeError, ValueError, ElementTree.ParseError):
                faults.add("annotation that cannot be read", f"{stem}.xml")
                continue
            if stem not in pictures:
                faults.add("picture that is not there", f"JPEGImages/{stem}.*")
                continue
            parsed[split].append((pictures[stem], size if all(size) else None, boxes))
    classes = sorted({box[4] for rows in parsed.values() for _, _, boxes in rows for box in boxes})
    splits = {}
    for split, rows in parsed.items():
        splits[split] = [
            make_sample(path, size, [(*b[:4], classes.index(b[4]), b[5], math.nan) for b in boxes]) for path, size, boxes in rows
        ]
    return splits, classes


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
    for split, aliases in SPLIT_NAMES.items():
        entries = [settings.get(alias) for alias in aliases if isinstance(settings.get(alias), str)]
        # Paths in data.yaml are often of another machine or relative to elsewhere: their last parts are tried, too.
        tries = [part for e in entries for part in (e, "/".join(Path(e).parts[-2:]), Path(e).name)]
        tries += [p for alias in aliases for p in (f"images/{alias}", f"{alias}/images", f"images/{alias}2017")]
        tries += ["images"] if split == "train" else []
        for entry in tries:
            place = inside(data_dir, entry)
            if place and place.is_dir():
                pictures = [p for p in sorted(place.rglob("*")) if p.suffix.lower() in IMAGE_ENDINGS]
            elif place and place.is_file() and place.suffix == ".txt":
                lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
                pictures = [p for line in lines if (p := inside(data_dir, line))]
                for line in lines:
                    if not inside(data_dir, line):
                        faults.add("picture that is not there", f"{place.name}: {line}")
            else:
                continue
            posed = "kpt_shape" in settings
            splits[split] = [read_yolo_sample(p, data_dir, len(classes), posed, faults) for p in pictures]
            break
    return splits, classes


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
    if file.is_file():
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                label, *values = (float(v) for v in line.split())
                if not 0 <= label < classes or label != int(label) or len(values) < 4:
                    raise ValueError
            except ValueError:
                faults.add("box that cannot be read", f"{file.name} line {number}")
                continue
            if len(values) >= 6 and len(values) % 2 == 0 and not posed:
                corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
            else:
                x, y, w, h = values[:4]
                corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            rows.append((*corners, label, False, math.nan))
    return make_sample(picture, None, rows, relative=True)
