"""Finding files by the names that annotations give them, which were written on other machines and are not trusted."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from common.runtime import say
from common.samples import Faults, files_below, split_of


def inside(folder: Path, name: str) -> Path | None:
    """folder/name without "." and ".."; None where nothing is there, or where the name leaves the folder.

    An annotation is not trusted to point anywhere, so its text is judged. A link in the folder is the user's own and may lead
    out: to a hub's cache, to another disk.
    """
    root = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(root, name))
    if not Path(path).is_relative_to(root) or not os.path.exists(path):  # no exception, either, for a name no file could have
        return None
    return folder / os.path.relpath(path, root)


def name_parts(name) -> list[str]:
    """The parts of a path as they are compared: whatever the slashes, the case, the form of Unicode, and %20 for a space."""
    text = unquote(str(name)).rpartition("?d=")[2].replace("\\", "/")  # ?d=: how Label Studio serves a local file
    parts = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split("/")
    return [part for part in parts if part not in ("", ".", "..")]


class FileFinder:
    """Finds files by the names that annotations give them, in the folders where they may lie, and never outside of these.

    A name is first taken as it stands, with each folder listed once. One of another machine (D:/old/a.jpg, ../../upload/a.jpg),
    file system or web server then gets the file below the folders that shares most of its last parts. That lies in a folder
    named like a split only if the name says so (or with any_split): train/1.jpg and val/1.jpg are different pictures.

    endings: of the files that are looked for, in lower case; names may lack them. Empty: files of all kinds.
    """

    def __init__(self, folders, endings: tuple[str, ...] = (), any_split: bool = False):
        self.folders, self.endings, self.any_split = list(dict.fromkeys(folders)), endings, any_split
        self.listings = {}  # part of names before the last slash -> [(folder, {name: the file's in it})]
        self.told = False  # that names do not stand for the files that they say

    def find(self, name: str, faults: Faults | None = None, what: str = "picture") -> Path | None:
        """The file of that name, or None, which faults is told: there is none, or there are several as good as each other."""
        if path := self.find_as_it_stands(name):
            return path
        found = self.find_by_last_parts(name)
        if len(found) == 1:
            if not self.told:
                say(f"{name} is not there as it stands; {found[0]} is taken for it, and others are found in the same way")
            self.told = True
            return found[0]
        if faults is not None:
            fault = f"{what} whose name fits several files" if found else f"{what} that is not there"
            faults.add(fault, f"{name} ({found[0]}, {found[1]})" if found else name)
        return None

    def find_as_it_stands(self, name: str) -> Path | None:
        """The file of exactly that name, with its ending or without, in the first folder that has it."""
        head, tail = os.path.split(name)
        if head not in self.listings:
            self.listings[head] = [listing for folder in self.folders if (listing := self.list_files(folder, head))]
        for folder, files in self.listings[head]:
            if tail in files:
                return folder / files[tail]
        return None

    def list_files(self, folder: Path, head: str) -> tuple[Path, dict[str, str]] | None:
        """(folder/head, {name: name of the file in it}), where one file has a name without its ending that, too."""
        try:
            if not (place := inside(folder, head)):
                return None
            with os.scandir(place) as entries:
                files = {entry.name: entry.name for entry in entries if entry.is_file()}
        except OSError:
            return None
        stems = [(os.path.splitext(name)[0], name) for name in files if self.endings and name.lower().endswith(self.endings)]
        counts = Counter(stem for stem, _ in stems)
        return place, {**{stem: name for stem, name in stems if counts[stem] == 1}, **files}

    def find_by_last_parts(self, name: str) -> list[Path]:
        """The files that share most of the name's last parts; of these, those in the first of the folders that has one."""
        *parents, tail = name_parts(name) or [""]
        uploaded = re.sub("^[0-9a-f]{8}-", "", tail)  # Label Studio puts this before the names of files that it is given
        keys = [*(f"{parent}/{tail}" for parent in parents[-1:]), tail, uploaded]  # first the few that lie in such a folder
        return next(filter(None, (self.find_most_alike(key, parents) for key in keys)), [])

    def find_most_alike(self, key: str, parents: list[str]) -> list[Path]:
        """Of the files that `below` has for the key, those whose folders share most with the parents."""
        ranks = defaultdict(list)
        for path, (own, between, rank) in self.below.get(key, {}).items():
            pairs = zip(reversed(own), reversed(parents), strict=False)
            shared = next((n for n, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(own), len(parents)))
            unnamed = between[: max(0, len(between) - shared)]  # the folders above it that the name says nothing of
            if self.any_split or not any(map(split_of, unnamed)):
                ranks[-shared, len(self.folders) if unnamed else rank].append(path)
        there = ([Path(path) for path in ranks[rank] if os.path.isfile(path)] for rank in sorted(ranks))
        return next(filter(None, there), [])  # a link may lead nowhere

    @cached_property
    def below(self) -> dict[str, dict[str, tuple[list[str], list[str], int]]]:
        """Last part of a name as it is compared, with and without its ending, alone and behind its folder's -> {file: facts}.

        The facts: the parts of its path above it; those of them below the folder that it was found in; this folder's number.
        """
        found = defaultdict(dict)
        for rank, folder in enumerate(self.folders):
            for path in files_below(folder):
                if path.lower().endswith(self.endings or ""):
                    *own, tail = name_parts(path) or [""]
                    between = os.path.relpath(path, folder).split(os.sep)[:-1]
                    for key in {tail, os.path.splitext(tail)[0]} if self.endings else {tail}:
                        for long in (key, *(f"{parent}/{key}" for parent in own[-1:])):
                            facts = found[long].setdefault(path, (own, between, rank))
                            if len(between) < len(facts[1]):  # of two of the folders that have it the inner one counts
                                found[long][path] = own, between, rank
        return found
