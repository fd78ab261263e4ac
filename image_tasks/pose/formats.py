"""Reads keypoint annotations - COCO JSON or CSV - into one form. Knows no model; opens no picture.

Files from outside are checked here: what is malformed is named, counted and left out; what makes the whole set unusable is a
UserError. Coordinates leave in pixels of the picture as a person sees it, whole numbers at pixel centres.
"""

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import read_json
from common.config import UserError
from common.runtime import say
from common.samples import SPLIT_NAMES, Faults, FileFinder, choose_layout, hold_out
from common.vision.pictures import IMAGE_ENDINGS

UNIFORM_SIGMA = 0.05  # how far people's clicks scatter, as a share of the figure's size, where the data does not say: strict
# Standard deviations of COCO's annotators for its 17 keypoints, from nose to ankles (cocodataset.org, keypoint evaluation).
COCO_SIGMAS = (
    0.026,
    0.025,
    0.025,
    0.035,
    0.035,
    0.079,
    0.079,
    0.072,
    0.072,
    0.062,
    0.062,
    0.107,
    0.107,
    0.087,
    0.087,
    0.089,
    0.089,
)
COCO_NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
              "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
              "right_ankle")  # fmt: skip
LAYOUTS = "COCO keypoints (annotations/*.json) or CSV (a file with train in its name: picture, x, y, x, y ...)"
KEYPOINT_FILE = "keypoints.json"  # in data_dir, or in a checkpoint: names, skeleton, flip_pairs, sigmas


@dataclass
class Sample:
    """A figure. points: (K, 2) x, y; labelled: (K,) bool, those that count; box: x, y, w, h, or None for the whole picture."""

    path: Path
    size: tuple[int, int] | None  # (width, height) that the annotation claims; CSV claims none
    points: np.ndarray
    labelled: np.ndarray
    box: np.ndarray | None
    area: float  # of the figure, in square pixels; NaN where the data does not say
    where: str  # how messages call it
    score: float = 1.0  # of a box that a detector found


@dataclass
class KeypointSet:
    """What the keypoints are called and how they belong together. Pairs count from 0 here, from 1 in files, as in COCO."""

    names: list[str]
    skeleton: list[tuple[int, int]]  # lines to draw
    flip_pairs: list[tuple[int, int]]  # what changes places in a mirrored picture
    sigmas: list[float]  # for OKS: how far people's clicks scatter, as a share of the figure's size
    named: bool  # False where the data has no names, and numbers stand in

    def to_json(self) -> dict:
        def from_one(pairs):
            return [[a + 1, b + 1] for a, b in pairs]

        pairs = {"skeleton": from_one(self.skeleton), "flip_pairs": from_one(self.flip_pairs)}
        return {"names": self.names, **pairs, "sigmas": self.sigmas, "named": self.named}

    @classmethod
    def from_json(cls, facts: dict):
        names = [str(name) for name in facts["names"]]
        pairs = (read_pairs(facts[key], names, KEYPOINT_FILE) for key in ("skeleton", "flip_pairs"))
        return cls(names, *pairs, [float(s) for s in facts["sigmas"]], bool(facts["named"]))


def read_pairs(values, names: list[str], where: str) -> list[tuple[int, int]]:
    """Pairs of keypoints, each a name or a number from 1, as pairs of indices. UserError where one names no keypoint."""
    pairs = []
    if not isinstance(values, (list, tuple, type(None))):
        raise UserError(f"{where}: {str(values)[:60]} is no list of pairs of keypoints")
    for pair in values or []:
        try:
            a, b = (names.index(v) if isinstance(v, str) else int(v) - 1 for v in pair)
            if not (0 <= a < len(names) and 0 <= b < len(names) and a != b):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{where}: {pair} is no pair of keypoints (two names, or two numbers from 1 to {len(names)})"
            ) from None
        pairs.append((a, b))
    return pairs


def flip_pairs_from_names(names: list[str]) -> list[tuple[int, int]]:
    """Pairs that differ in left and right (or a leading or trailing l and r); empty unless every sided name has its partner."""
    swaps = {"left": "right", "right": "left", "l": "r", "r": "l"}
    parts = [re.split(r"([^a-zA-Z]+|(?<=[a-z])(?=[A-Z]))", name.lower() if name.isupper() else name) for name in names]
    lowered = [tuple(part.lower() for part in p) for p in parts]
    mirrored = [tuple(swaps.get(part, part) for part in p) for p in lowered]
    if any(m not in lowered for m in mirrored):
        return []
    return [(i, lowered.index(m)) for i, m in enumerate(mirrored) if i < lowered.index(m)]


def describe_keypoints(names: list[str], named: bool, own: dict, where: str) -> KeypointSet:
    """The KeypointSet of a data set; own: the skeleton, flip_pairs and sigmas that the data gives. Says aloud what it lacks."""
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise UserError(f"{where}: two keypoints are called {doubled[0]!r}")
    flips = read_pairs(own["flip_pairs"], names, where) if "flip_pairs" in own else flip_pairs_from_names(names)
    if len({i for pair in flips for i in pair}) != 2 * len(flips):
        raise UserError(f"{where}: flip_pairs names a keypoint twice")
    if not flips:
        say("no mirrored pictures in training: neither the data nor the keypoints' names tell left from right")
    sigmas = own.get("sigmas")
    try:
        sigmas = sigmas and [float(s) for s in sigmas]
    except (TypeError, ValueError):
        raise UserError(f"{where}: sigmas must be numbers") from None
    if sigmas and (len(sigmas) != len(names) or not all(0 < s < math.inf for s in sigmas)):
        raise UserError(f"{where}: {len(sigmas)} sigmas for {len(names)} keypoints; there must be a positive one for each")
    if not sigmas and tuple(name.lower() for name in names) == COCO_NAMES:
        sigmas = list(COCO_SIGMAS)
        say("OKS with COCO's own sigmas for its 17 keypoints")
    if not sigmas:
        sigmas = [UNIFORM_SIGMA] * len(names)
        say(f"OKS with sigma {UNIFORM_SIGMA} for every keypoint: the data gives none")
    return KeypointSet(names, read_pairs(own.get("skeleton"), names, where), flips, sigmas, named)


def read_dataset(data_dir: Path, data_format: str, seed: int, faults: Faults):
    """(splits, KeypointSet, format): splits maps train, val and perhaps test to lists of Sample.

    data_format: "auto" recognises the layout by what is there. Without a val split about a fifth of the training pictures
    becomes it: a hash of (seed, file name) decides for each picture alone, so that adding pictures moves no other.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir: there is no folder {data_dir}")
    there = {"coco": coco_files(data_dir), "csv": csv_files(data_dir)}
    data_format = choose_layout(data_dir, data_format, there, LAYOUTS)
    reader = read_coco if data_format == "coco" else read_csv
    splits, names, named, own = reader(data_dir, there[data_format], faults)
    if (data_dir / KEYPOINT_FILE).is_file():
        names, named, own = add_keypoint_file(data_dir / KEYPOINT_FILE, names, named, own)
    points = describe_keypoints(names, named, own, str(data_dir))
    if not splits.get("train"):
        raise UserError(f"{data_dir} ({data_format}) has no training pictures with keypoints")
    if not splits.get("val"):
        pictures = [s.path.name for s in splits["train"]]  # the figures of one picture stay together
        splits["train"], splits["val"] = hold_out(splits["train"], pictures, seed, data_dir, "pictures")
    return splits, points, data_format


def add_keypoint_file(file: Path, names: list[str], named: bool, own: dict) -> tuple[list[str], bool, dict]:
    """What the data says of its keypoints, and over it what a keypoints.json beside it says."""
    given = read_json(file)
    if not isinstance(given, dict):
        raise UserError(f"{file} must hold an object with names, skeleton, flip_pairs, sigmas")
    if not isinstance(given.get("names", []), list):
        raise UserError(f"{file}: names must be a list")
    if given.get("names") and len(given["names"]) != len(names):
        raise UserError(f"{file} names {len(given['names'])} keypoints, the data has {len(names)}")
    names, named = ([str(n) for n in given["names"]], True) if given.get("names") else (names, named)
    return names, named, {**own, **{key: given[key] for key in ("skeleton", "flip_pairs", "sigmas") if key in given}}


# ---- COCO: one JSON per split ----------------------------------------------------------------------------------------


def coco_files(data_dir: Path) -> dict[str, Path]:
    """Split -> annotation file, from the usual places: annotations/person_keypoints_train2017.json, train/*.json, ..."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        places = ("annotations/person_keypoints_{}*.json", "{}/*.json", "annotations/*{}*.json", "{}*.json", "*_{}*.json")
        for pattern in [place.format(name) for name in names for place in places]:
            other = ("captions", "instances", "stuff", "panoptic", "image_info")  # COCO's annotations for other tasks
            files = [p for p in sorted(data_dir.glob(pattern)) if not p.name.startswith(other)]
            files = [p for p in files if split == "train" or "train" not in p.name]  # trainval.json is no validation split
            if files:
                found[split] = files[0]
                break
    if "train" not in found:
        single = sorted([*data_dir.glob("annotations/*.json"), *data_dir.glob("*.json")])
        single = [p for p in single if p not in found.values() and p.name != KEYPOINT_FILE]
        if len(single) == 1:
            found["train"] = single[0]
    return found if "train" in found else {}


def read_coco(data_dir: Path, files: dict[str, Path], faults: Faults):
    tables = {}
    for split, path in files.items():
        table = read_json(path)
        table = table if isinstance(table, dict) else {}
        absent = [key for key in ("images", "annotations", "categories") if not isinstance(table.get(key), list)]
        if absent and split != "test":
            raise UserError(f"{path} is no COCO file: it has no list {absent[0]!r}")
        if not absent:  # a test set may come without labels; it is no use here then
            tables[split] = (path, table)
    names, own = coco_keypoints(*tables["train"])
    for path, table in tables.values():
        other, _ = coco_keypoints(path, table)
        if other != names:
            raise UserError(f"{path} has other keypoints ({', '.join(other[:5])} ...) than {files['train'].name}")
    splits = {split: read_coco_split(data_dir, split, *tables[split], len(names), faults) for split in tables}
    return splits, names, True, own


def coco_keypoints(path: Path, table: dict) -> tuple[list[str], dict]:
    """(names, {"skeleton", "flip_pairs", "sigmas"} as far as they are given) of a COCO file; all its categories must agree."""
    posed = [c for c in table["categories"] if isinstance(c, dict) and isinstance(c.get("keypoints"), list) and c["keypoints"]]
    if not posed:
        raise UserError(f"{path}: no category has a list of keypoints; are these annotations of boxes only?")
    names = [str(name) for name in posed[0]["keypoints"]]
    for category in posed[1:]:
        if [str(name) for name in category["keypoints"]] != names:
            two = f"{posed[0].get('name')!r} and {category.get('name')!r}"
            raise UserError(f"{path}: the categories {two} have different keypoints; one model knows one set")
    return names, {key: posed[0][key] for key in ("skeleton", "flip_pairs", "sigmas") if key in posed[0]}


def read_coco_split(data_dir: Path, split: str, path: Path, table: dict, count: int, faults: Faults) -> list[Sample]:
    pictures = coco_pictures(data_dir, split, path, table, faults)
    posed = [c.get("id") for c in table["categories"] if isinstance(c, dict) and c.get("keypoints")]
    samples, seen, orphans = [], set(), set()
    for a in table["annotations"]:
        where = f"{path.name} annotation {a.get('id') if isinstance(a, dict) else str(a)[:40]}"
        try:
            crowd, image_id, known = bool(a.get("iscrowd", 0)), a["image_id"], a["category_id"] in posed
            points, labelled, box, area = coco_figure(a, count)
            doubled, listed = a.get("id") in seen, image_id in pictures
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            faults.add(f"annotation without image_id, category_id, bbox and {count} keypoints", where)
            continue
        seen.add(a.get("id", where))
        if crowd:
            faults.add("crowd annotation", where)
        elif not known:
            faults.add("annotation of a category without keypoints", where)
        elif doubled:
            faults.add("annotation whose id is given twice", where)
        elif not listed:
            orphans.add(image_id)
        elif pictures[image_id]:
            samples.append(Sample(*pictures[image_id], points, labelled, box, area, where))
    for image_id in orphans:
        faults.add("annotations of an image that is not listed", f"{path.name} image id {image_id}")
    return samples


def coco_pictures(data_dir: Path, split: str, path: Path, table: dict, faults: Faults) -> dict:
    """Image id -> (path, (width, height)), or None where its picture is of no use."""
    folders = [path.parent]
    folders += [data_dir / part for n in SPLIT_NAMES[split] for part in (n, f"{n}2017", f"images/{n}", f"images/{n}2017")]
    finder, pictures, names = FileFinder([*folders, data_dir / "images", data_dir]), {}, set()
    for image in table["images"]:
        try:
            name, image_id, size = str(image["file_name"]), image["id"], (int(image["width"]), int(image["height"]))
            doubled = image_id in pictures
        except (KeyError, TypeError, ValueError, OverflowError):
            faults.add("image entry without id, file_name, width and height", f"{path.name} {str(image)[:60]}")
            continue
        if doubled:
            raise UserError(f"{path}: image id {image_id} is given twice")
        place = finder.find(name)
        pictures[image_id] = place and (place, size)
        if place is None:
            faults.add("picture that is not there", name)
        elif name in names:
            faults.add("picture that is listed twice", name)
            pictures[image_id] = None
        names.add(name)
    return pictures


def coco_figure(annotation: dict, count: int):
    """(points (K, 2), labelled (K,), box (4,), area) of an annotation. Raises what its reading raises; ValueError: too few."""
    values = np.array(list(map(float, annotation.get("keypoints") or [0] * 3 * count))).reshape(-1, 3)
    box, area = np.array(list(map(float, annotation["bbox"]))), float(annotation.get("area") or math.nan)
    if len(values) != count or len(box) != 4:
        raise ValueError
    values[np.isnan(values[:, 2]), :2] = math.nan  # named later, as keypoints that are no numbers
    return values[:, :2], ~(values[:, 2] <= 0), box, area  # 0: not labelled; 1: labelled, but hidden; 2: visible


# ---- CSV: a row per picture, its name and then x, y of every keypoint -------------------------------------------------


def csv_files(data_dir: Path) -> dict[str, Path]:
    """Split -> CSV file, by the split's name in the file's; a single CSV holds the training data."""
    files, found = sorted(data_dir.glob("*.csv")), {}
    for split, names in SPLIT_NAMES.items():
        mine = [p for p in files if any(name in p.name.lower() for name in names) and p not in found.values()]
        if mine:
            found[split] = mine[0]
    if len(files) == 1:
        found = {"train": files[0]}
    return found if "train" in found else {}


def read_csv(data_dir: Path, files: dict[str, Path], faults: Faults):
    tables = {split: read_csv_rows(path) for split, path in files.items()}
    names, named = tables["train"][0]
    for split, ((other, other_named), _) in tables.items():
        if len(other) != len(names) or (named and other_named and other != names):
            raise UserError(f"{files[split]} has {len(other)} keypoints, others in number or name than {files['train'].name}")
    splits = {
        split: read_csv_split(data_dir, split, files[split], rows, len(names), faults) for split, (_, rows) in tables.items()
    }
    return splits, names, named, {}


def read_csv_rows(path: Path) -> tuple[tuple[list[str], bool], list[tuple[int, list[str]]]]:
    """((keypoint names, whether the header gave them), [(line number, cells)]) of a CSV file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty")
    first = rows[0][1]
    if len(first) < 3 or len(first) % 2 == 0:
        raise UserError(f"{path}: {len(first)} columns; expected the picture's name, then x and y of every keypoint")
    header = not first[0].strip().lower().endswith(IMAGE_ENDINGS)
    count = len(first) // 2
    names = []
    for x, y in zip(first[1::2], first[2::2], strict=True) if header else ():
        stems = [re.fullmatch(rf"(.+?)[ _.-]?{axis}", cell.strip(), re.IGNORECASE) for cell, axis in ((x, "x"), (y, "y"))]
        if all(stems) and stems[0][1] == stems[1][1]:
            names.append(stems[0][1])
    named = len(names) == count and not all(re.fullmatch(r"\D?\d+", name) for name in names)
    return (names if named else [str(i) for i in range(count)], named), rows[1:] if header else rows


def read_csv_split(data_dir: Path, split: str, path: Path, rows, count: int, faults: Faults) -> list[Sample]:
    pieces = path.stem.split("_")
    near = ["_".join(pieces[:n]) for n in range(len(pieces), 0, -1)]  # training_frames_keypoints, training_frames, training
    near += [part for n in SPLIT_NAMES[split] for part in (n, f"images/{n}")]
    finder = FileFinder([*(data_dir / part for part in near), data_dir / "images", data_dir])
    samples, seen = [], set()
    for line, row in rows:
        name = row[0].strip()
        if len(row) != 1 + 2 * count:
            faults.add("row of another length", f"{path.name} line {line}: {len(row)} columns instead of {1 + 2 * count}")
            continue
        place = finder.find(name)
        if place is None:
            faults.add("picture that is not there", name or f"{path.name} line {line}")
            continue
        if place in seen:
            faults.add("picture that is listed twice", f"{path.name} line {line}: {name}")
            continue
        seen.add(place)
        values = np.array([to_number(cell) for cell in row[1:]]).reshape(-1, 2)
        samples.append(Sample(place, None, values, np.ones(len(values), dtype=bool), None, math.nan, f"{path.name} line {line}"))
    return samples


def to_number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


# ---- boxes for infer.py ----------------------------------------------------------------------------------------------


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
