"""Reads keypoints from tables: CSV with a row for every figure, or for all of a picture; DeepLabCut's among them."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError
from common.runtime import say
from common.samples import SPLIT_NAMES, Faults, split_of, visible_entries
from common.tables import read_table
from common.vision.pictures import is_picture
from csv_columns import Columns, columns_of, is_empty, read_box, to_number
from keypoints import NO_BOX, Sample, claimed_size, picture_finder

HEADER_LINES = 4  # DeepLabCut with several animals: scorer, individuals, bodyparts, coords


@dataclass
class Table:
    path: Path
    columns: Columns
    width: int
    rows: list[tuple[int, list[str]]]  # (line number, cells)
    comma: bool  # 1,5 stands for 1.5


# ---- files -------------------------------------------------------------------------------------------------------------


def csv_files(data_dir: Path) -> dict[str, list[Path]]:
    """Split -> its tables, by the split's name in theirs or their folder's; a single one holds the training data.

    A DeepLabCut project has one in the folder of every video: they are training data together.
    """
    inner = [data_dir / entry.name for entry in visible_entries(data_dir) if entry.is_dir()]
    places = [data_dir, *(folder for folder in inner if folder.name.lower() in ("annotations", "labels"))]
    files = [path for place in places for path in tables_in(place)]
    found = {}
    for split in SPLIT_NAMES:
        mine = [path for path in files if split_of(path.stem, alone=False) == split]
        mine = mine or [path for folder in inner if split_of(folder.name) == split for path in tables_in(folder)]
        if mine:
            found[split] = mine[:1]
        if mine[1:]:
            say(f"{mine[0]} has the {split} split; not read: {', '.join(str(path) for path in mine[1:4])}")
    collected = [path for path in files if path.name.startswith("CollectedData")]
    if not found and 1 in (len(files), len(collected)):
        found = {"train": collected or files}
    videos = [path for pattern in ("labeled-data/*", "*") for path in sorted(data_dir.glob(f"{pattern}/CollectedData*.csv"))]
    if "train" not in found and videos:
        doubled = [folder for folder, many in Counter(path.parent for path in videos).items() if many > 1]
        if doubled:
            raise UserError(f"{doubled[0]} holds the CollectedData of several scorers; keep one")
        found = {"train": videos, **found}
    return found


def tables_in(folder: Path) -> list[Path]:
    files = [folder / entry.name for entry in visible_entries(folder) if entry.is_file()]
    return [path for path in files if path.suffix.lower() in (".csv", ".tsv")]


def read_csv(data_dir: Path, files: dict[str, list[Path]], faults: Faults):
    """(splits, keypoint names, whether they are names, nothing else that the data says of them)."""
    tables = [(split, open_table(path, faults)) for split, paths in files.items() for path in paths]
    first, splits = tables[0][1], {}
    for split, table in tables:
        order = same_order(first, table)
        for chosen, sample in read_csv_split(data_dir, split, table, order, faults):
            splits.setdefault(chosen, []).append(sample)
    figures = Counter(sample.path for samples in splits.values() for sample in samples)
    crowded = sum(many > 1 for many in figures.values())
    if crowded and first.columns.stems == [""]:
        raise UserError(
            f"{first.path}: several rows of a picture have one x and y each; expected a figure's keypoints in one row"
        )
    if crowded or any(len(table.columns.figures) > 1 for _, table in tables):
        told = f"{crowded} of {len(figures)} pictures have several figures"
        say(f"{data_dir}: {told}; each is cut out by its box, or around its keypoints")
        for sample in (sample for samples in splits.values() for sample in samples):
            sample.box = np.array(NO_BOX) if sample.box is None else sample.box
    return splits, first.columns.names, first.columns.named, {}


def same_order(first: Table, table: Table) -> list[int]:
    """The places of the first table's keypoints in another's."""
    ours, theirs = first.columns, table.columns
    if set(ours.stems) == set(theirs.stems):
        return [theirs.stems.index(stem) for stem in ours.stems]
    if len(ours.stems) != len(theirs.stems) or (ours.named and theirs.named):
        raise UserError(f"{table.path} has {len(theirs.stems)} keypoints, others in number or name than {first.path.name}")
    return list(range(len(ours.stems)))


def open_table(path: Path, faults: Faults) -> Table:
    """A table with its columns told apart. UserError where they cannot be."""
    lines = list(read_table(path, faults))
    if not lines:
        raise UserError(f"{path} is empty")
    first = next((n for n, (_, cells) in enumerate(lines) if is_data(cells)), len(lines))
    if first > HEADER_LINES and first < len(lines):
        raise UserError(f"{path}: {first} lines before the first that holds a picture's name and numbers; keep one header")
    header = [cells for _, cells in lines[: min(first, HEADER_LINES)] if sum(map(bool, cells)) > 1]
    width = max(map(len, header or [lines[0][1]]))
    while not any(len(cells) >= width and cells[width - 1] for _, cells in lines):
        width -= 1  # lines that end in a separator
    if width < 3:
        raise UserError(f"{path}: {width} columns; expected the picture's name, then x and y of every keypoint")
    header = [[*cells, *[""] * width][:width] for cells in header]
    rows = [(line, cells if any(cells[width:]) else cells[:width]) for line, cells in lines[first:]]
    columns = columns_of(path, header, [cells for _, cells in rows if len(cells) == width], width, faults)
    used = [column for figure in columns.figures for places in figure for column in places[:2]]
    cells = {cells[column] for _, cells in rows if len(cells) == width for column in (*used, *columns.box.values())}
    return Table(path, columns, width, rows, decimal_comma(path, cells))


def is_data(cells: list[str]) -> bool:
    """Whether a line is no header: it names a picture file or, as names may lack endings, has numbers that do not just count."""
    if any(map(is_picture, cells)):
        return True
    filled = [cell for cell in cells[1:] if cell]
    numbers = [value for value in (to_number(cell, True) for cell in filled) if not math.isnan(value)]
    counted = all(b - a == 1 for a, b in zip(numbers, numbers[1:], strict=False))
    return bool(cells[0]) and 2 * len(numbers) > len(filled) and not counted


# ---- rows --------------------------------------------------------------------------------------------------------------


def read_csv_split(data_dir: Path, split: str, table: Table, order: list[int], faults: Faults) -> list[tuple[str, Sample]]:
    """[(split, sample)]: the table's split, or that which a column names. order: where it has the first table's keypoints."""
    columns, path, finder = table.columns, table.path, picture_finder(data_dir, table.path, split)
    samples, splits, seen = [], [], set()
    for line, row in table.rows:
        where = f"{path.name} line {line}"
        if len(row) != table.width:
            faults.add("row of another length", f"{where}: {len(row)} columns instead of {table.width}")
            continue
        name = "/".join(filter(None, (row[column] for column in columns.picture)))
        place = finder.find(name, faults) if name else faults.add("row without a picture", where)
        for figure in columns.figures if place else ():
            points, labelled = read_points(row, [figure[i] for i in order], table.comma, where, faults)
            if len(columns.figures) > 1 and not labelled.any():
                continue  # an individual that is not in this picture
            key = (place, points.tobytes())
            if key in seen:
                faults.add("row that is given twice", f"{where}: {name}")
                continue
            seen.add(key)
            size = claimed_size(*(to_number(row[columns.size[side]], table.comma) for side in "wh")) if columns.size else None
            splits.append(split if columns.split is None else split_of(row[columns.split]))
            samples.append(Sample(place, size, points, labelled, read_box(row, columns.box, table.comma), math.nan, where))
    return list(zip(splits, samples, strict=True))


def read_points(row: list[str], figure: list, comma: bool, where: str, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """(points (K, 2), labelled (K,)) of a figure in a row."""
    points, labelled = np.full((len(figure), 2), math.nan), np.ones(len(figure), dtype=bool)
    for k, (x, y, v) in enumerate(figure):
        points[k] = to_number(row[x], comma), to_number(row[y], comma)
        if is_empty(row[x]) and is_empty(row[y]):
            unlabelled = "empty"
        elif points[k].tolist() in ([-1, -1], [0, 0]):
            unlabelled = f"{points[k, 0]:.0f}, {points[k, 1]:.0f}"
        elif v is not None and (to_number(row[v], comma) <= 0 or row[v].lower() in ("false", "no")):
            unlabelled = "of visibility 0"
        else:
            continue
        labelled[k] = False
        faults.note(f"keypoint that is {unlabelled}, which counts as unlabelled", where)
    return points, labelled


def decimal_comma(path: Path, cells: set[str]) -> bool:
    """Whether numbers are written 1,5. UserError where commas may part thousands."""
    commas = [cell for cell in cells if re.fullmatch(r"[-+]?\d+,\d+", cell)]
    others = [cell for cell in cells if re.fullmatch(r"[-+]?\d+(\.\d+)?", cell)]
    if commas and (any("." in cell for cell in others) or (others and all(cell[-4] == "," for cell in commas if cell[-4:]))):
        raise UserError(f"{path}: is {commas[0]} beside {others[0]} a thousand or a fraction? Write numbers with a decimal point")
    return bool(commas)
