"""A figure and what its keypoints are called: names, skeleton, what changes places in a mirrored picture, sigmas for OKS."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import read_json
from common.config import UserError
from common.file_finder import FileFinder
from common.runtime import say
from common.samples import split_of, visible_entries
from common.vision.pictures import picture_endings

UNIFORM_SIGMA = 0.05  # how far people's clicks scatter, as a share of the figure's size, where the data does not say: strict
# Standard deviations of COCO's annotators for its 17 keypoints, from nose to ankles (cocodataset.org, keypoint evaluation).
COCO_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
               0.089)  # fmt: skip
COCO_NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
              "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
              "right_ankle")  # fmt: skip
MOST_KEYPOINTS = 1000  # a heatmap for each: what has more columns is hardly a table of keypoints
NO_BOX = (math.nan,) * 4  # as an array, a box without area
KEYPOINT_FILE = "keypoints.json"  # in data_dir, or in a checkpoint: names, skeleton, flip_pairs, sigmas


@dataclass
class Sample:
    """A figure. points: (K, 2) x, y; labelled: (K,) bool, those that count.

    box: x, y, w, h; None for the whole picture. One without an area (NO_BOX) is put around the labelled points later.
    """

    path: Path
    size: tuple[int, int] | None  # (width, height) that the annotation claims; CSV claims none
    points: np.ndarray
    labelled: np.ndarray
    box: np.ndarray | None
    area: float  # of the figure, in square pixels; NaN where the data does not say
    where: str  # how messages call it
    score: float = 1.0  # of a box that a detector found
    relative: bool = False  # points and box are fractions of width and height until the picture is opened


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


def read_skeleton(values, names: list[str], where: str) -> list[tuple[int, int]]:
    """read_pairs of a data set's skeleton, which may count from 0. It is only drawn, so one that makes no sense stops nothing."""
    try:
        if any(type(end) is int and end == 0 for pair in values or [] for end in pair):
            values = [[end + 1 if isinstance(end, int) else end for end in pair] for pair in values]
        return read_pairs(values, names, where)
    except (TypeError, UserError) as error:
        say(f"no skeleton is drawn: {error}")
        return []


def flip_pairs_from_names(names: list[str]) -> list[tuple[int, int]]:
    """Pairs that differ in left and right; empty unless every sided name has its partner.

    A side is a word of the name (left_eye, eyeL, l-ear), or what a name begins or ends with where its partner is there, too
    (lefteye, Lear, ankler).
    """
    swaps = {"left": "right", "right": "left", "l": "r", "r": "l"}
    lowered = [name.lower() for name in names]

    def mirrored(name: str) -> str:
        words = re.split(r"([^a-zA-Z]+|(?<=[a-z])(?=[A-Z]))", name.lower() if name.isupper() else name)
        swapped, name = "".join(swaps.get(word.lower(), word.lower()) for word in words), name.lower()
        glued = [swaps[side] + name.removeprefix(side) for side in swaps if name.startswith(side)]
        glued += [name.removesuffix(side) + swaps[side] for side in swaps if name.endswith(side)]
        return swapped if swapped != name else next((other for other in glued if other in lowered), name)

    others = [mirrored(name) for name in names]
    if any(other not in lowered for other in others):
        return []
    partners = [lowered.index(other) for other in others]
    if any(partners[partner] != i for i, partner in enumerate(partners)):
        return []
    return [(i, partner) for i, partner in enumerate(partners) if i < partner]


def describe_keypoints(names: list[str], named: bool, own: dict, where: str, to_train: bool = True) -> KeypointSet:
    """The KeypointSet of a data set; own: the skeleton, flip_pairs and sigmas that the data gives. Says aloud what it lacks.

    to_train: whether pictures will be mirrored, so that it matters which keypoints are pairs.
    """
    if len(names) > MOST_KEYPOINTS:
        raise UserError(f"{where} has {len(names)} keypoints a figure; a model knows at most {MOST_KEYPOINTS}")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise UserError(f"{where}: two keypoints are called {doubled[0]!r}")
    flips = read_pairs(own["flip_pairs"], names, where) if "flip_pairs" in own else flip_pairs_from_names(names)
    if len({i for pair in flips for i in pair}) != 2 * len(flips):
        raise UserError(f"{where}: flip_pairs names a keypoint twice")
    if flips and to_train:
        shown = [f"{names[a]} and {names[b]}" for a, b in flips]
        source = "as the data says" if "flip_pairs" in own else "by their names"
        say(f"a mirrored picture swaps, {source}: {', '.join(shown[:4])}{' ...' if len(shown) > 4 else ''}")
    elif to_train:
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
    return KeypointSet(names, read_skeleton(own.get("skeleton"), names, where), flips, sigmas, named)


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


def mark_fractions(where, samples: list[Sample]) -> None:
    """Marks samples whose coordinates all are fractions: no pictures have all their points in the first pixel."""
    points = np.concatenate([sample.points[sample.labelled] for sample in samples] or [np.zeros((0, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    if any(sample.relative for sample in samples) or not len(points) or not (points % 1).any():
        return
    if (np.abs(points - 0.5) <= 1).all():
        say(f"{where}: coordinates from 0 to 1 are fractions of the picture's width and height")
        if any(sample.box is not None and np.nanmax(sample.box, initial=0) > 2 for sample in samples):
            raise UserError(f"{where}: points in fractions of the picture, and boxes in pixels")
        for sample in samples:
            sample.relative, sample.area = True, math.nan


def picture_finder(data_dir: Path, file: Path, split: str) -> FileFinder:
    """Finds the pictures that an annotation file names: in folders named after its split or a part of its name, beside it, below.

    So training_frames_keypoints.csv has its pictures in training/, and person_keypoints_Upper.json in images/Upper/.
    """
    words = file.stem.lower().split("_")
    parts = {"_".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}
    roots = [data_dir / entry.name for entry in visible_entries(data_dir) if entry.is_dir()]
    roots += [folder / entry.name for folder in roots if folder.name.lower() == "images" for entry in visible_entries(folder)]
    named = [folder for folder in roots if folder.name.lower() in parts or split_of(folder.name) == split]
    named = [folder for folder in named if folder.is_dir()]
    return FileFinder([*named, file.parent, data_dir / "images", data_dir], picture_endings())


def claimed_size(width, height) -> tuple[int, int] | None:
    """(width, height), or None where an annotation gives none that could be."""
    try:
        size = int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None
