"""Reads keypoints from CSV: a row per picture, its name and then x, y of every keypoint."""

import csv
import math
import re
from pathlib import Path

import numpy as np

from common.config import UserError
from common.samples import SPLIT_NAMES, Faults, FileFinder
from common.vision.pictures import is_picture
from keypoints import Sample


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
    header = not is_picture(first[0].strip())
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
