"""Reads keypoints in Ultralytics' format: a data.yaml with kpt_shape, and a text file per picture."""

import math
from pathlib import Path

import numpy as np

from common.config import UserError, load_yaml
from common.runtime import say
from common.samples import Faults, read_text, visible_entries
from common.vision.yolo_folders import LabelFinder, yolo_splits
from keypoints import MOST_KEYPOINTS, Sample


def yolo_file(data_dir: Path) -> Path | None:
    """The YAML file in data_dir that says how many keypoints a figure has, if there is one."""
    files = [data_dir / entry.name for entry in visible_entries(data_dir) if entry.is_file()]
    files = [path for path in files if path.suffix.lower() in (".yaml", ".yml") and path.stat().st_size < 2**20]
    return next((path for path in files if b"kpt_shape" in path.read_bytes()), None)


def read_yolo(data_dir: Path, file: Path, faults: Faults):
    """(splits, keypoint names, whether they are names, what the data says of them), as describe_keypoints wants them."""
    settings = load_yaml(file)
    try:
        count = int(settings["kpt_shape"][0])
        if not 1 <= count <= MOST_KEYPOINTS or settings["kpt_shape"] not in ([count, 2], [count, 3]):
            raise ValueError
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise UserError(
            f"{file} must hold kpt_shape: [keypoints, 2 or 3 numbers for each], of at most {MOST_KEYPOINTS} keypoints"
        ) from None
    classes = settings.get("names")
    if isinstance(classes, (list, dict)) and len(classes) > 1:
        say(f"{file}: figures of {len(classes)} classes are told apart by nothing but their keypoints here")
    names, own = yolo_names(file, settings.get("kpt_names"), count), {}
    if settings.get("flip_idx") is not None:
        own["flip_pairs"] = yolo_flips(file, settings["flip_idx"], count)
    if "skeleton" in settings:
        own["skeleton"] = settings["skeleton"]
    finder, splits = LabelFinder(data_dir, faults), {}
    for split, pictures in yolo_splits(data_dir, settings, faults).items():
        splits[split] = [sample for path in pictures for sample in read_labels(path, finder.find(path), count, faults)]
    finder.name_unused()
    return splits, names or [str(i) for i in range(count)], bool(names), own


def yolo_names(file: Path, given, count: int) -> list[str]:
    """The keypoints' names: a list, or one for each class, which must be alike; none where there are none."""
    lists = list(given.values()) if isinstance(given, dict) else [given] if given else []
    if not all(isinstance(names, list) and len(names) == count for names in lists):
        raise UserError(f"{file}: kpt_names must be a list of {count} names, or one for each class")
    if any(names != lists[0] for names in lists):
        raise UserError(f"{file}: kpt_names differ from class to class; one model knows one set of keypoints")
    return [str(name) for name in lists[0]] if lists else []


def yolo_flips(file: Path, order, count: int) -> list[list[int]]:
    """Pairs counted from 1 of flip_idx, which says for each keypoint, counted from 0, which one it is in a mirrored picture."""
    fits = isinstance(order, list) and all(type(other) is int for other in order) and sorted(order) == list(range(count))
    if not fits or any(order[other] != i for i, other in enumerate(order)):
        raise UserError(f"{file}: flip_idx must pair {count} keypoints, counted from 0: each with the one it changes places with")
    return [[i + 1, other + 1] for i, other in enumerate(order) if i < other]


def read_labels(picture: Path, file: Path | None, count: int, faults: Faults) -> list[Sample]:
    """The figures of a picture: lines `class cx cy w h` and then x y or x y visibility of each keypoint, all in fractions."""
    samples, seen = [], set()
    for number, line in enumerate(read_text(file, faults).splitlines() if file else [], start=1):
        where = f"{file.name} line {number}"
        try:
            if line.strip() and line in seen:
                faults.add("line that is given twice", where)
            elif line.strip():
                seen.add(line)
                points, labelled, box = yolo_figure([float(cell) for cell in line.split()], count)
                if (points[~labelled] > 0).any():
                    faults.note("keypoint with coordinates but visibility 0, which counts as unlabelled", where)
                samples.append(Sample(picture, None, points, labelled, box, math.nan, where, relative=True))
        except ValueError:
            faults.add(f"line that is no figure of {count} keypoints", where)
    return samples


def yolo_figure(numbers: list[float], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points (K, 2), labelled (K,), box x, y, w, h) of a line's numbers. ValueError where they are of another number."""
    x, y, w, h = numbers[1:5]
    values = np.array(numbers[5:] or [0] * 3 * count)  # a box alone has no keypoint that counts
    if len(values) not in (2 * count, 3 * count):
        raise ValueError
    values = values.reshape(count, -1)
    # Without a visibility what nobody marked stands at 0, 0 or below.
    labelled = ~(values[:, 2] <= 0) if values.shape[1] == 3 else (values != 0).any(axis=1) & ~(values < 0).any(axis=1)
    return values[:, :2], labelled, np.array([x - w / 2, y - h / 2, w, h])
