"""Samples of a data set, whatever they are: what is wrong with them, finding their files, splits."""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from common.config import UserError
from common.runtime import say

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


# ---- faults ------------------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """What was wrong with a data set: fault -> where, in the order found.

    As a context manager it is reported when a UserError leaves the block, for the faults are most often its cause.
    """

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        if isinstance(error, UserError):
            self.report()

    def add(self, fault: str, where) -> None:
        self.found[fault].append(str(where))

    def add_error(self, error: str, name: str) -> None:
        """Notes an error's text, "fault" or "fault, detail"."""
        fault, _, detail = error.partition(", ")
        self.add(fault, f"{name} ({detail})" if detail else name)

    def counts(self) -> dict[str, int]:
        return {fault: len(places) for fault, places in sorted(self.found.items())}

    def report(self) -> None:
        for fault, places in sorted(self.found.items()):
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            say(f"left out, {fault} ({len(places)}): {', '.join(places[:3])}{more}")


class BadFile(ValueError):
    """What is wrong with a file itself, "fault" or "fault, detail", whatever it is to be used for: a reader's word on it.

    A ValueError of another kind is a task's: an annotation that claims another size, a preprocessing that cannot take it.
    """


def attempt(work, *arguments):
    """(result or None, fault or "", whether it lies in the file and stays) of work, whose ValueError names a fault."""
    try:
        return work(*arguments), "", True
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error  # the disk's and the memory's troubles pass; what is in the file stays
        passes = isinstance(cause, MemoryError) or getattr(cause, "errno", None) is not None
        lasting = isinstance(error, BadFile) and not passes
        return None, "".join(c if c.isprintable() else "?" for c in str(error))[:400], lasting


# ---- finding files -----------------------------------------------------------------------------------------------------


def choose_layout(data_dir: Path, data_format: str, there: dict, expected: str) -> str:
    """The layout to read data_dir by: data_format, or with "auto" the only one whose sign is there.

    there: layout -> what shows it (false: nothing does). UserError where none or several fit; `expected` describes all.
    """
    if data_format != "auto":
        if not there[data_format]:
            raise UserError(f"--data_format {data_format}: {data_dir} does not have that layout")
        return data_format
    fitting = [name for name, sign in there.items() if sign]
    if len(fitting) != 1:
        what = f"looks like {' and '.join(fitting)}" if fitting else "is none of the layouts that are known"
        raise UserError(f"--data_dir {data_dir} {what}; expected {expected}; --data_format chooses one")
    return fitting[0]


def inside(folder: Path, name: str) -> Path | None:
    """folder/name; None where nothing is there, or outside the folder (an annotation is not trusted to point anywhere)."""
    path = folder / name
    if not os.path.exists(path):  # no exception, either, for a name that no file could have
        return None
    return path if path.resolve().is_relative_to(folder.resolve()) else None


class FileFinder:
    """Finds files by the names that annotations give them, in the folders where they may lie, and never outside of these.

    Each folder is listed once: a plain file in a listing lies inside, and needs no look at the disk of its own.
    """

    def __init__(self, folders):
        self.folders = list(dict.fromkeys(folders))
        self.listings = {}  # part of names before the last slash -> [(folder, {last part: whether it is a plain file})]

    def find(self, name: str) -> Path | None:
        """The first folder's file of that name; None where there is none, or it lies elsewhere (a link, "..")."""
        head, tail = os.path.split(name)
        if head not in self.listings:
            self.listings[head] = [(folder, self.list_files(folder, head)) for folder in self.folders]
        for folder, files in self.listings[head]:
            plain = files.get(tail)
            if plain or (plain is False and self.is_file_inside(folder, name)):
                return folder / name
        # Not listed, but perhaps there: some file systems take names that differ in case or in Unicode's forms for equal.
        return next((folder / name for folder in self.folders if self.is_file_inside(folder, name)), None)

    @staticmethod
    def list_files(folder: Path, head: str) -> dict[str, bool]:
        try:
            with os.scandir(inside(folder, head) or "") as entries:
                return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
        except OSError:
            return {}

    @staticmethod
    def is_file_inside(folder: Path, name: str) -> bool:
        path = inside(folder, name)
        return path is not None and path.is_file()


# ---- splits ------------------------------------------------------------------------------------------------------------


def split_off(names: list[str], seed: int) -> list[bool]:
    """Which samples become validation data where there is none: those of about a fifth of the names, at least one, never all.

    names: each sample's own name, or that of its group (speaker, patient, video): samples of one name stay together. A hash
    of (seed, name) decides for each name alone, so that adding samples moves no other. UserError where all have one name.
    """
    hashes = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    if len(set(hashes)) < 2:
        raise UserError(f"{len(names)} samples of one group, {', '.join(names[:1])}: none can be held out to validate on")
    bound = min(max(bytes([51]), min(hashes) + b"0"), max(hashes))  # 51 / 256 is a fifth
    return [place < bound for place in hashes]


def hold_out(samples: list, names: list[str], seed: int, where: Path, what: str = "samples") -> tuple[list, list]:
    """(training, validation) samples by split_off, said aloud; `what` the names stand for: pictures, speakers ..."""
    every = len(set(names))
    if every < 2:
        raise UserError(f"{where} has no validation split, and too few training {what} to hold any out: {every}")
    chosen = split_off(names, seed)
    train, val = ([s for s, mine in zip(samples, chosen, strict=True) if mine is side] for side in (False, True))
    many = len({name for name, mine in zip(names, chosen, strict=True) if mine})
    say(f"no validation split in {where}: {many} of {every} training {what}, chosen by seed {seed}, become it")
    return train, val
