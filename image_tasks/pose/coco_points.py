"""Reads keypoints in COCO's format: one JSON per split."""

import math
from pathlib import Path

import numpy as np
from keypoints import KEYPOINT_FILE, Sample

from common.checkpoint import read_json
from common.config import UserError
from common.samples import SPLIT_NAMES, Faults, FileFinder


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
