"""Which columns of a table hold a keypoint's x and y, read from its header.

Where the header says nothing they are taken in pairs; where it could be read in two ways, the table is refused: shuffled points
would be learnt without anything to be seen.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.config import UserError
from common.runtime import say
from common.samples import Faults, split_of
from common.vision.pictures import is_picture

# Last words of a column's label. The first say whether a keypoint is labelled; the others belong to one, but are not used.
VISIBILITY = ("v", "vis", "visible", "visibility")
NO_COORDINATE = ("likelihood", "confidence", "conf", "score", "prob", "p", "z", "occluded", "occlusion", "occ")
SIDES = {"w": "w", "width": "w", "h": "h", "height": "h"}
SPLIT_LABELS = ("split", "subset", "set", "partition", "usage", "fold")
UNIT_WORDS = ("px", "pixel", "pixels", "coord", "coords", "coordinate", "coordinates")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")  # left_eyeX: left, eye, X
# A label without its separators and capitals: of a box, or of the picture's size.
BOX_LABEL = re.compile(r"(?:bbox|boundingbox|bndbox|box|bb|rect|roi)(\w+)|([xy](?:min|max)|(?:min|max)[xy])")
BOX_PARTS = {
    **{"x": "x", "left": "x", "xmin": "x", "minx": "x", "x1": "x", "y": "y", "top": "y", "ymin": "y", "miny": "y", "y1": "y"},
    **{"right": "right", "xmax": "right", "maxx": "right", "x2": "right"},
    **{"bottom": "bottom", "ymax": "bottom", "maxy": "bottom", "y2": "bottom"},
    **SIDES,
}
SIZE_LABEL = re.compile(r"(?:image|img|picture|pic|photo|frame|original|orig)?(w|h)(?:idth|eight)?")


@dataclass
class Columns:
    """Which columns of a table hold what, counted from 0."""

    picture: list[int]  # the parts of its path
    stems: list[str]  # what the header calls the keypoints; numbers from 0 where it says nothing
    figures: list[list[tuple[int, int, int | None]]]  # of every figure in a row: x, y and visibility of its K keypoints
    box: dict[str, int] = field(default_factory=dict)  # x and y with w and h, or with right and bottom
    size: dict[str, int] = field(default_factory=dict)  # w and h of the picture
    split: int | None = None  # which split a row belongs to

    @property
    def named(self) -> bool:
        return not all(re.fullmatch(r"\D?\d+|", stem) for stem in self.stems)

    @property
    def names(self) -> list[str]:
        return self.stems if self.named else [str(i) for i in range(len(self.stems))]


def columns_of(path: Path, header: list[list[str]], rows: list[list[str]], width: int, faults: Faults) -> Columns:
    titles = {cells[0].lower(): cells for cells in header}
    collected = "bodyparts" in titles and "coords" in titles  # DeepLabCut
    labels = header_labels(header, width)
    named = ([c for c, cell in enumerate(cells) if is_picture(cell)] for cells in rows[:100])
    pictures = next(filter(None, named), [])
    if not pictures:  # names without endings
        called = re.compile("image|file|picture|img|path|name|frame", re.IGNORECASE)
        pictures = [c for c, label in enumerate(labels) if called.search(label) and role(label, labels)[0] == ""] or [0]
    picture = list(range(pictures[0] + 1)) if collected else pictures[:1]
    others = [c for c in range(width) if c not in picture]
    if collected:
        individuals = titles.get("individuals", [""] * width)
        roles = {c: (titles["coords"][c].lower(), titles["bodyparts"][c], individuals[c]) for c in others}
    else:
        roles = {c: (*role(labels[c], labels), "") for c in others}
    if not any(kind in ("x", "y") for kind, *_ in roles.values()):
        return columns_by_place(path, picture, labels, rows)
    split = next((c for c in others if labels[c].lower() in SPLIT_LABELS and all(split_of(cells[c]) for cells in rows)), None)
    roles = {c: role_ for c, role_ in roles.items() if c != split}
    columns = columns_by_label(path, picture, labels, roles, faults)
    columns.split = split
    return columns


def header_labels(header: list[list[str]], width: int) -> list[str]:
    """A label for every column. Of several lines all but the last go on until the next word: nose over x and y."""
    header = [["" if cell.startswith("Unnamed") else cell for cell in cells] for cells in header]
    for cells in header[:-1]:
        for column in range(1, width):
            cells[column] = cells[column] or cells[column - 1]
    return [" ".join(filter(None, parts)) for parts in zip(*header, strict=True)] or [""] * width


def role(label: str, labels: list[str]) -> tuple[str, str]:
    """(what a column holds, of which keypoint) by its label: ("x", "left_eye") for left_eyeX, "x left_eye", "left_eye (x)" ...

    What: x, y, v, w, h; "other" for what belongs to a keypoint and is not used, box and size with their part; "" for all else.
    """
    words = [word for word in WORD.finditer(label) if word[0].lower() not in UNIT_WORDS]
    plain = "".join(word[0].lower() for word in words)
    if box := BOX_LABEL.fullmatch(plain):
        part = BOX_PARTS.get(box[1] or box[2])
        return ("box " + part, "") if part else ("", "")
    if size := SIZE_LABEL.fullmatch(plain):
        return (size[1] if plain in SIDES else "size " + size[1]), ""
    for word, rest in ((words[-1], words[:-1]), (words[0], words[1:])) if words else ():
        kind = word[0].lower()
        if kind not in ("x", "y"):
            numbered = kind in VISIBILITY and "".join(w[0] for w in rest).isdecimal()  # v1, beside x1 and y1
            last = {**SIDES, **dict.fromkeys(VISIBILITY, "v"), **dict.fromkeys(NO_COORDINATE, "other")}
            kind = last.get(kind) if word is words[-1] or numbered else None
        if kind:
            return kind, label[rest[0].start() : rest[-1].end()] if rest else ""
    glued = {"x": "y", "y": "x"}.get(label[-1:].lower())  # nosex, where there is a nosey
    if glued and f"{label[:-1]}{glued}".lower() in map(str.lower, labels):
        return label[-1].lower(), label[:-1]
    return "", ""


def columns_by_label(path: Path, picture: list[int], labels: list[str], roles: dict, faults: Faults) -> Columns:
    """roles: column -> (what it holds, of which keypoint, of which figure)."""
    bare = [(c, kind) for c, (kind, stem, _) in sorted(roles.items()) if not stem and kind in ("x", "y", "v")]
    if len({kind for _, kind in bare}) < len(bare):
        return columns_by_order(path, picture, bare)
    found, box, size = {}, {}, {}
    for column, (kind, stem, figure) in sorted(roles.items()):
        group, _, part = kind.partition(" ")
        place = {"box": box, "size": size}.get(group, found.setdefault((figure, stem), {}) if kind in tuple("xyvwh") else None)
        if place is None:
            if kind == "" and labels[column]:
                faults.note("column that is not used", f"{path.name}: {labels[column]}")
        elif (part or kind) in place:
            raise UserError(f"{path}: two columns are {labels[column]!r}; which is meant?")
        else:
            place[part or kind] = column
    framed = [key for key, parts in found.items() if {"x", "y", "w", "h"} <= parts.keys()]
    if framed:
        box = found.pop(framed[0])
    elif {"w", "h"} <= found.get(("", ""), {}).keys():
        size = size or found[("", "")]
    for parts in found.values():
        if ("x" in parts) != ("y" in parts):
            there = labels[parts.get("x", parts.get("y"))]
            raise UserError(f"{path}: column {there!r} has no partner: a keypoint has an x and a y, as nose_x, nose_y")
    points = {key: (parts["x"], parts["y"], parts.get("v")) for key, parts in found.items() if "x" in parts}
    return whole_figures(path, Columns(picture, [], [], usable_box(box), size), points, faults)


def whole_figures(path: Path, columns: Columns, points: dict, faults: Faults) -> Columns:
    """The columns with their figures filled in. points: (figure, keypoint) -> its columns."""
    by_figure = {}
    for (figure, stem), places in points.items():
        by_figure.setdefault(figure, {})[stem] = places
    if not by_figure:
        raise UserError(f"{path}: its header names no keypoint; expected columns such as nose_x, nose_y")
    columns.stems = list(max(by_figure.values(), key=len))
    for figure, parts in by_figure.items():
        if set(parts) == set(columns.stems):
            columns.figures.append([parts[stem] for stem in columns.stems])
        else:
            faults.add("individual with other keypoints than the first", f"{path.name} {figure}")
    numbered = [stem for stem in columns.stems if re.fullmatch(r"\d*", stem)]
    if columns.named and numbered:
        box = f"x{numbered[0]}, y{numbered[0]} ..."
        raise UserError(f"{path}: keypoints have names, but {box} numbers: is that a box? Call it xmin, ymin, xmax, ymax")
    centre = [stem for stem in columns.stems if stem.lower() in ("c", "center", "centre")]
    if centre and columns.size:
        raise UserError(f"{path}: is {centre[0]} with width and height a box? Call it xmin, ymin, xmax, ymax, or leave it out")
    return columns


def usable_box(box: dict[str, int]) -> dict[str, int]:
    whole = {"x", "y"} <= box.keys() and ({"w", "h"} <= box.keys() or {"right", "bottom"} <= box.keys())
    return box if whole else {}


def columns_by_order(path: Path, picture: list[int], bare: list[tuple[int, str]]) -> Columns:
    """Of a header that says x and y over and over, without names: x, y, x, y or x, y, v, x, y, v or x, x, y, y."""
    kinds, places = "".join(kind for _, kind in bare), [column for column, _ in bare]
    count = kinds.count("x")
    if kinds in ("xy" * count, "xyv" * count):
        step = len(kinds) // count
        points = [(*places[i : i + 2], places[i + 2] if step == 3 else None) for i in range(0, len(places), step)]
    elif kinds == "x" * count + "y" * count:
        points = [(x, y, None) for x, y in zip(places[:count], places[count:], strict=True)]
    else:
        raise UserError(f"{path}: columns {', '.join(kinds[:9])} ... could be paired in several ways; name them nose_x, nose_y")
    return Columns(picture, [str(i) for i in range(count)], [points])


def columns_by_place(path: Path, picture: list[int], labels: list[str], rows: list[list[str]]) -> Columns:
    """Of a header without x and y, or of none: the columns behind the picture's name, x and y by turns."""
    places = list(range(picture[-1] + 1, len(labels))) or list(range(picture[0]))
    told = [labels[c] for c in places]
    names = told[::2] if all(told[::2]) and all(b in ("", a) for a, b in zip(told[::2], told[1::2], strict=False)) else []
    if not names and not all(re.fullmatch(r"[\d.]*", label) for label in told):
        raise UserError(
            f"{path}: its header ({', '.join(told[:4])} ...) says of no column that it is x or y; name them nose_x, nose_y"
        )
    if len(places) % 2:
        raise UserError(f"{path}: {len(places) + 1} columns; expected the picture's name, then x and y of every keypoint")
    values = np.array([[to_number(cells[c], True) for c in places] for cells in rows[:2000]]).reshape(-1, len(places))
    if len(places) % 3 == 0 and len(values) and np.isin(values[:, 2::3], (0, 1, 2)).all():
        raise UserError(
            f"{path}: every third column holds 0, 1, 2 alone: x, y, visibility? Give it a header: nose_x, nose_y, nose_v"
        )
    if halves_move_together(values):
        raise UserError(f"{path}: is it all x and then all y? The header does not say; name the columns nose_x, nose_y")
    say(f"{path} does not say which columns are x and y: they are read as x, y, x, y ...")
    points = [(x, y, None) for x, y in zip(places[::2], places[1::2], strict=True)]
    return Columns(picture, names or [str(i) for i in range(len(points))], [points])


def halves_move_together(values: np.ndarray) -> bool:
    """Whether columns (N, 2 K) look like all x and then all y.

    As a figure moves, all its x rise and fall together, and all its y, once the pictures' scale is taken out. So the columns
    of one axis correlate with each other more than with the other axis's: by about 1.5 in faces; noise is rarely 0.7 apart.
    """
    values = values[np.isfinite(values).all(axis=1)]
    count = values.shape[1] // 2
    if len(values) < 8 or count < 3:
        return False
    values = values - values.mean(axis=0)
    scale = values.mean(axis=1)
    values = values - np.outer(scale, values.T @ scale) / max(scale @ scale, 1e-9)
    with np.errstate(invalid="ignore", divide="ignore"):
        alike = np.nan_to_num(np.corrcoef(values.T))

    def apart(x, y):
        return (alike[x, x].mean() + alike[y, y].mean()) / 2 - alike[x, y].mean()

    turns = apart(slice(0, None, 2), slice(1, None, 2))
    return bool(apart(slice(count), slice(count, None)) > turns + 0.7)


def box_columns(labels: list[str]) -> dict[str, int]:
    """The columns of a table of boxes, as Columns.box has them; empty where the header does not name four that make a box."""
    plain = ["".join(word[0].lower() for word in WORD.finditer(label)) for label in labels]
    parts = [BOX_PARTS.get(re.sub("^(bbox|boundingbox|bndbox|box)(?=.)", "", label)) for label in plain]
    return usable_box({part: column for column, part in reversed(list(enumerate(parts))) if part})


def read_box(row: list[str], box: dict[str, int], comma: bool) -> np.ndarray | None:
    if not box:
        return None
    values = {part: to_number(row[column], comma) for part, column in box.items()}
    x, y = values["x"], values["y"]
    sides = (values["w"], values["h"]) if "w" in values else (values["right"] - x, values["bottom"] - y)
    return np.array([x, y, *sides])


def is_empty(cell: str) -> bool:
    return cell.lower() in ("", "nan", "na", "n/a", "none", "null", "-")


def to_number(cell: str, comma: bool) -> float:
    """NaN where it is none. comma: a comma stands for the decimal point."""
    try:
        return float(cell.replace(",", ".") if comma else cell)
    except ValueError:
        return math.nan
