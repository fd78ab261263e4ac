"""Reads boxes in COCO's format: one JSON per split, from whatever tool wrote it."""

import math
import mmap
from collections import defaultdict
from pathlib import Path

import numpy as np

from boxes import Sample, distinct_classes, make_sample
from common.checkpoint import read_json
from common.config import UserError
from common.file_finder import FileFinder
from common.samples import SPLIT_NAMES, Faults, split_of, visible_entries
from common.vision.foreign import program_hint
from common.vision.pictures import picture_endings

OTHER_TASKS = ("captions", "stuff", "panoptic", "image_info")  # how COCO's files without boxes begin
UNTRAINED = "box of a class that the training data has not"


# ---- finding the files -----------------------------------------------------------------------------------------------


def coco_files(data_dir: Path) -> dict[str, list[Path]]:
    """Split -> its annotation file; several where it is not clear which one counts.

    The usual places, in this order: annotations/instances_train2017.json (COCO, CVAT), train/_annotations.coco.json (Roboflow)
    or train/labels.json (FiftyOne), train.json; one file that names no split (labels.json, result.json) is training data.
    """
    folders = [Path(entry.path) for entry in visible_entries(data_dir) if entry.is_dir()]
    inner = json_files(data_dir, [folder for folder in folders if folder.name.lower() in ("annotations", "annotation")])
    outer, found = json_files(data_dir, [data_dir]), {}
    for split in SPLIT_NAMES:
        files = [p for p in inner if split_of(p.stem, alone=False) == split]
        files = files or json_files(data_dir, [folder for folder in folders if split_of(folder.name) == split])
        files = files or [p for p in outer if split_of(p.stem, alone=False) == split]
        if files:
            found[split] = likeliest(files)
    rest = [p for p in inner + outer if p not in sum(found.values(), []) and split_of(p.stem, alone=False) is None]
    return found if "train" in found or not rest else {"train": likeliest(rest), **found}


def json_files(data_dir: Path, folders: list[Path]) -> list[Path]:
    """The JSON files in these folders that may hold boxes: by what they are called, or else by what they mention."""
    files = [Path(entry.path) for folder in folders for entry in visible_entries(folder) if entry.name.lower().endswith(".json")]
    files = [p for p in files if not p.name.startswith(OTHER_TASKS)]
    called = {p: str(p.relative_to(data_dir)).lower() for p in files}
    return [p for p in files if any(word in called[p] for word in ("annotation", "instances", "coco")) or mentions_boxes(p)]


def mentions_boxes(path: Path) -> bool:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return all(text.find(word) >= 0 for word in (b'"images"', b'"annotations"'))
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def likeliest(files: list[Path]) -> list[Path]:
    """Of several files of one split those with objects; the people of COCO's keypoints only where there are no others."""

    def rank(path):
        return (not mentions_boxes(path), path.name.startswith("person_keypoints"), not path.name.startswith("instances"))

    best = min(map(rank, files)) if len(files) > 1 else None
    return [p for p in files if best is None or rank(p) == best]


def picture_folders(data_dir: Path, split: str, file: Path) -> list[Path]:
    """Where the pictures of an annotation file may lie, whatever tool wrote it."""
    subset = file.stem.removeprefix("instances_")  # CVAT: annotations/instances_<subset>.json and images/<subset>/
    named = [Path(e.path) for place in (data_dir, data_dir / "images") for e in visible_entries(place) if e.is_dir()]
    named = [folder for folder in named if split_of(folder.name) == split]
    folders = [file.parent, data_dir / "images" / subset, *named, *(p / part for p in named for part in ("images", "data"))]
    return [folder for folder in [*folders, data_dir / "images", data_dir / "data", data_dir] if folder.is_dir()]


# ---- reading them ----------------------------------------------------------------------------------------------------


def read_coco(data_dir: Path, faults: Faults):
    tables = {}
    for split, paths in coco_files(data_dir).items():
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1].name} may both be the {split} annotations; merge them, or move one away")
        table = read_json(paths[0])
        table = table if isinstance(table, dict) else {}
        absent = [key for key in ("images", "annotations", "categories") if not isinstance(table.get(key), list)]
        if absent and split != "test":
            raise UserError(f"{paths[0]} is no COCO file: it has no list {absent[0]!r}{program_hint(paths[0])}")
        if not absent:  # a test set may come without labels (image_info_test2017.json); it is no use here then
            tables[split] = (paths[0], table)
    if not tables:
        raise UserError(f"{data_dir} has no COCO file with annotations")
    classes = coco_classes(next(iter(tables.values()))[0], [table for _, table in tables.values()], faults)
    splits = {split: read_coco_split(data_dir, split, path, table, classes, faults) for split, (path, table) in tables.items()}
    return splits, classes


def coco_classes(path: Path, tables: list[dict], faults: Faults) -> list[str]:
    """The names of the categories of the first table, read from path, in order of their ids."""
    try:
        categories = sorted(tables[0]["categories"], key=lambda c: id_order(c["id"]))
        classes = [str(c["name"]).strip() for c in categories]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a category without id and name, or an id that is no number ({error})") from None
    if len(classes) > 1 and categories[0]["id"] in (0, "0"):
        # Roboflow's exports list the group of the classes as category 0, other tools the background.
        group = all(c.get("supercategory") == classes[0] for c in categories[1:])
        notes = (a for table in tables for a in table["annotations"] if isinstance(a, dict))
        if (group or classes[0].strip("_").lower() == "background") and all(a.get("category_id") not in (0, "0") for a in notes):
            faults.note("category 0, which has no box and names the group of the others or the background: no class", classes[0])
            classes = classes[1:]
    return distinct_classes(classes, path)


def id_order(value):
    """A category's id as what the classes are sorted by. TypeError where it is no number and no text."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() else value
    if not isinstance(value, (int, float)):
        raise TypeError(f"id {str(value)[:40]}")
    return value


def same_id(value) -> str:
    """An id as it is compared where files disagree on its kind: 7, 7.0, "7" and "007" are one."""
    text = str(value).strip().removesuffix(".0")
    return text.lstrip("0") or text


def read_coco_split(data_dir: Path, split: str, path: Path, table: dict, classes: list[str], faults: Faults) -> list[Sample]:
    rows = coco_boxes(path, table, classes, faults)
    finder = FileFinder(picture_folders(data_dir, split, path), picture_endings())
    names, listed = {}, {}  # id -> name; picture -> (size, ids)
    for image in table["images"]:
        try:
            name, image_id = str(image["file_name"]), image["id"]
            known = names.setdefault(image_id, name)
        except (KeyError, TypeError):
            faults.add("image entry without id and file_name", f"{path.name} {str(image)[:60]}")
            continue
        if known != name:
            raise UserError(f"{path}: image id {image_id} is given twice, to {known} and to {name}")
        if place := finder.find(name, faults):
            size = claimed_size(image)
            known, ids = listed.setdefault(place, (size, []))
            if known == size:
                ids.append(image_id)
            else:
                faults.add("picture that is listed twice, with two sizes", name)
    join_ids(path, rows, names, faults)
    samples = []
    for place, (size, mine) in listed.items():
        if len(mine) > 1:
            faults.note("picture that is listed twice, and taken once with all its boxes", place.name)
        boxes = rows.get(mine[0], []) if len(mine) == 1 else dict.fromkeys(row for i in mine for row in rows.get(i, []))
        samples.append(make_sample(place, size, list(boxes)))
    return samples


def claimed_size(image: dict) -> tuple[int, int] | None:
    """(width, height) as an image entry gives them; None where it does not, and the picture's own count."""
    try:
        size = (int(image["width"]), int(image["height"]))
        return size if min(size) > 0 else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def join_ids(path: Path, rows: dict, names: dict, faults: Faults) -> None:
    """Gives the boxes of image ids that are written in another way than in the list of images (7, "7") to their image."""
    strange = [image_id for image_id in rows if image_id not in names]
    listed = {same_id(image_id): image_id for image_id in names} if strange else {}
    for image_id in strange:
        if (mine := listed.get(same_id(image_id))) is None:
            faults.add("boxes of an image that is not listed", f"{path.name} image id {image_id}")
        else:
            rows[mine] += rows.pop(image_id)


def coco_boxes(path: Path, table: dict, classes: list[str], faults: Faults) -> dict:
    """Image id -> rows for make_sample."""
    numbers, rows = {name: number for number, name in enumerate(classes)}, defaultdict(list)
    listed = {same_id(c.get("id")) for c in table["categories"] if isinstance(c, dict)}
    categories = [c for c in table["categories"] if isinstance(c, dict) and str(c.get("name")).strip() in numbers]
    index = {same_id(c.get("id")): numbers[str(c["name"]).strip()] for c in categories}
    index.update({c["id"]: numbers[str(c["name"]).strip()] for c in categories if isinstance(c.get("id"), (int, float, str))})
    for a in table["annotations"]:
        try:
            box, category = a.get("bbox"), a["category_id"]
            x, y, w, h = map(float, box or outline_box(a["segmentation"]))
            if not (w > 0 and h > 0) and a.get("segmentation"):
                x, y, w, h = outline_box(a["segmentation"])
            label = index[category if category in index else same_id(category)]
            crowd, area = a.get("iscrowd") not in (0, None, "0"), float(a.get("area") or math.nan)
            rows[a["image_id"]].append((x, y, x + w, y + h, label, crowd, area))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError):
            fault = box_fault(a, listed, index)
            faults.add(fault, f"{path.name} annotation {a.get('id') if isinstance(a, dict) else a}")
            if fault != UNTRAINED and isinstance(a, dict) and isinstance(a.get("image_id"), (int, float, str)):
                rows[a["image_id"]].append(None)
            continue
        if not box:
            faults.note("outline without a bbox: the box around it counts", f"{path.name} annotation {a.get('id')}")
    return rows


def box_fault(annotation, listed: set[str], known) -> str:
    """Why an annotation gave no box. listed: ids of the file's categories; known: those whose class is one of the data set's."""
    category = same_id(annotation["category_id"]) if isinstance(annotation, dict) and "category_id" in annotation else None
    if category is None or category in known:
        return "box that cannot be read"
    return UNTRAINED if category in listed else "box of a category that is not listed"


def outline_box(segmentation) -> tuple[float, float, float, float]:
    """(x, y, w, h) around polygons [[x, y, x, y ...] ...] or an RLE. ValueError, TypeError or KeyError where it is neither."""
    if isinstance(segmentation, dict):
        height, width = map(int, segmentation["size"])
        ends = np.cumsum(rle_runs(segmentation["counts"]))  # pixels down the columns, one column after the other
        if height < 1 or ends[-1] != height * width or (np.diff(ends) < 0).any():
            raise ValueError
        first, last = ends[0:-1:2], ends[1::2] - 1  # of each run of the object
        first, last = first[first <= last], last[first <= last]
        whole = (first // height != last // height).any()  # a run that goes on in the next column touches both ends of it
        y1, y2 = (0, height - 1) if whole else ((first % height).min(), (last % height).max())
        x1, x2 = first[0] // height, last[-1] // height
        return float(x1), float(y1), float(x2 - x1 + 1), float(y2 - y1 + 1)
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    xs, ys = ([float(v) for polygon in polygons for v in polygon[side::2]] for side in (0, 1))
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def rle_runs(counts) -> list[int]:
    """The run lengths of an RLE, background first. As text they are written by COCO's API (rleToString in maskApi.c): five bits
    and "goes on" a letter, the lowest first, from the third run on as the difference to the last but one."""
    if isinstance(counts, list):
        return counts
    runs, value, shift = [], 0, 0
    for letter in counts.encode():
        bits = letter - 48
        if shift > 60:
            raise ValueError("a run longer than any picture")
        value, shift = value | (bits & 31) << shift, shift + 5
        if not bits & 32:
            value -= 1 << shift if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
