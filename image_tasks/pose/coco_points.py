"""Reads keypoints in COCO's format: one JSON per split, as COCO itself and CVAT, FiftyOne and Roboflow lay them out."""

import math
from pathlib import Path

import numpy as np

from common.checkpoint import read_json
from common.config import UserError
from common.samples import SPLIT_NAMES, Faults, split_of, visible_entries
from common.vision.foreign import program_hint
from keypoints import KEYPOINT_FILE, NO_BOX, Sample, claimed_size, picture_finder

OTHER_TASKS = ("captions", "instances", "stuff", "panoptic", "image_info")  # COCO's annotations that hold no keypoints


def coco_files(data_dir: Path) -> dict[str, list[Path]]:
    """Split -> annotation file, from the usual places: annotations/person_keypoints_train2017.json, train/*.json, ...

    Several where it is not clear which one counts.
    """
    inner = [data_dir / entry.name for entry in visible_entries(data_dir) if entry.is_dir()]
    notes = [folder for folder in inner if folder.name.lower() == "annotations"]
    places = [*notes, *(folder for folder in inner if split_of(folder.name)), data_dir]
    every = [path for place in places for path in json_files(place)]
    found = {}
    for split in SPLIT_NAMES:
        mine = [path for path in every if (split_of(path.parent.name) or split_of(path.stem, alone=False)) == split]
        if mine:
            found[split] = likeliest(mine)
    if "train" not in found:  # one whose name says nothing, such as CVAT's person_keypoints_default.json
        single = [path for path in every if path not in sum(found.values(), []) and not split_of(path.parent.name)]
        single = [path for path in likeliest(single) if b'"annotations"' in path.read_bytes()]
        if single:
            found = {"train": single, **found}
    return found


def likeliest(files: list[Path]) -> list[Path]:
    """Of several files of one split those called as COCO calls them, or else those with keypoints."""
    if len(files) > 1:
        files = [path for path in files if path.name.startswith("person_keypoints")] or files
    if len(files) > 1:
        files = [path for path in files if b'"keypoints"' in path.read_bytes()] or files
    return files


def json_files(folder: Path) -> list[Path]:
    files = [folder / entry.name for entry in visible_entries(folder) if entry.is_file()]
    files = [path for path in files if path.suffix.lower() == ".json" and path.name != KEYPOINT_FILE]
    return [path for path in files if not path.name.startswith(OTHER_TASKS)]


def read_coco(data_dir: Path, files: dict[str, list[Path]], faults: Faults):
    """(splits, keypoint names, whether they are names, what the data says of them), as describe_keypoints wants them."""
    tables = {}
    for split, (path, *others) in files.items():
        if others:
            raise UserError(f"{path} and {others[0].name} may both be the {split} annotations; merge them, or move one away")
        table = read_json(path)
        table = table if isinstance(table, dict) else {}
        absent = [key for key in ("images", "annotations", "categories") if not isinstance(table.get(key), list)]
        if absent and split != "test":
            raise UserError(f"{path} is no COCO file: it has no list {absent[0]!r}{program_hint(path)}")
        if not absent:  # a test set may come without labels; it is no use here then
            tables[split] = (path, table)
    if not tables:
        raise UserError(
            f"{data_dir} has no annotations but {', '.join(path.name for path, *_ in files.values())}, without keypoints"
        )
    first = next(iter(tables))  # of train, if it is there
    names, own = coco_keypoints(*tables[first])
    for path, table in tables.values():
        other, _ = coco_keypoints(path, table)
        if other != names:
            raise UserError(f"{path} has other keypoints ({', '.join(other[:5])} ...) than {files[first][0].name}")
    splits = {split: read_coco_split(data_dir, split, *tables[split], len(names), faults) for split in tables}
    return splits, names, True, own


def coco_keypoints(path: Path, table: dict) -> tuple[list[str], dict]:
    """(names, {"skeleton", "flip_pairs", "sigmas"} as far as they are given) of a COCO file.

    Categories that have keypoints, and figures, must agree in them.
    """
    posed = [c for c in table["categories"] if isinstance(c, dict) and isinstance(c.get("keypoints"), list) and c["keypoints"]]
    if not posed:
        raise UserError(f"{path}: no category has a list of keypoints; are these annotations of boxes only?")
    used = [number(a.get("category_id")) for a in table["annotations"] if isinstance(a, dict) and a.get("keypoints")]
    posed = [c for c in posed if number(c.get("id")) in used] or posed
    names = [str(name) for name in posed[0]["keypoints"]]
    for category in posed[1:]:
        if [str(name) for name in category["keypoints"]] != names:
            two = f"{posed[0].get('name')!r} and {category.get('name')!r}"
            raise UserError(f"{path}: the categories {two} have different keypoints; one model knows one set")
    return names, {key: posed[0][key] for key in ("skeleton", "flip_pairs", "sigmas") if key in posed[0]}


def number(value):
    """An id as it is compared: some programs write 7, others "7"."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value


def read_coco_split(data_dir: Path, split: str, path: Path, table: dict, count: int, faults: Faults) -> list[Sample]:
    pictures = coco_pictures(data_dir, split, path, table, faults)
    posed = [number(c.get("id")) for c in table["categories"] if isinstance(c, dict) and c.get("keypoints")]
    samples, seen, orphans = [], set(), set()
    for a in table["annotations"]:
        where = f"{path.name} annotation {a.get('id') if isinstance(a, dict) else str(a)[:40]}"
        try:
            crowd, image_id, known = bool(a.get("iscrowd", 0)), number(a["image_id"]), number(a["category_id"]) in posed
            points, labelled, box, area = coco_figure(a, count, where, faults)
            key = (image_id, repr(a.get("keypoints")), repr(a.get("bbox")))
            doubled, listed = key in seen, image_id in pictures
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            faults.add(f"annotation without image_id, category_id and {count} keypoints", where)
            continue
        if crowd:
            faults.add("crowd annotation", where)
        elif not known:
            faults.add("annotation of a category without keypoints", where)
        elif not listed:
            orphans.add(image_id)
        elif doubled:
            faults.add("annotation that is given twice", where)
        elif pictures[image_id]:
            seen.add(key)
            samples.append(Sample(*pictures[image_id], points, labelled, box, area, where))
    for image_id in orphans:
        faults.add("annotations of an image that is not listed", f"{path.name} image id {image_id}")
    return samples


def coco_pictures(data_dir: Path, split: str, path: Path, table: dict, faults: Faults) -> dict:
    """Image id -> (path, (width, height) or None where it claims none), or None where its picture is not there.

    A picture that is listed under two ids, as in files that were merged, has the figures of both.
    """
    finder, pictures = picture_finder(data_dir, path, split), {}
    for image in table["images"]:
        try:
            name, image_id = str(image["file_name"]), number(image["id"])
            doubled = image_id in pictures
        except (KeyError, TypeError):
            faults.add("image entry without id and file_name", f"{path.name} {str(image)[:60]}")
            continue
        if doubled:
            raise UserError(f"{path}: image id {image_id} is given twice")
        place = finder.find(name, faults)
        pictures[image_id] = place and (place, claimed_size(image.get("width"), image.get("height")))
    return pictures


def coco_figure(annotation: dict, count: int, where: str, faults: Faults):
    """(points (K, 2), labelled (K,), box (4,), area) of an annotation. Raises what its reading raises; ValueError: too few.

    The box holds NaN where there is none that could be read.
    """
    values = np.array(list(map(float, annotation.get("keypoints") or [0] * 3 * count)))
    if len(values) == 2 * count:
        values = values.reshape(-1, 2)
        values = np.column_stack([values, 2 * (values != 0).any(axis=1)])
        faults.note("keypoints without visibility: all count but those at 0, 0", where)
    values = values.reshape(-1, 3)
    if len(values) != count:
        raise ValueError
    values[np.isnan(values[:, 2]), :2] = math.nan  # named later, as keypoints that are no numbers
    labelled = ~(values[:, 2] <= 0)  # 0: not labelled; 1: labelled, but hidden; 2: visible
    if (values[~labelled, :2] > 0).any():
        faults.note("keypoint with coordinates but visibility 0, which counts as unlabelled", where)
    try:
        box = list(map(float, annotation["bbox"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        box = ()
    box = np.array(box if len(box) == 4 else NO_BOX)
    return values[:, :2], labelled, box, float(annotation.get("area") or math.nan)
