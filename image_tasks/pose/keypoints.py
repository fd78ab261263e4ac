"""A figure and what its keypoints are called: names, skeleton, what changes places in a mirrored picture, sigmas for OKS."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import read_json
from common.config import UserError
from common.runtime import say

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
