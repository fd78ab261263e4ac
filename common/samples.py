"""Samples of a data set, whatever they are: what is wrong with them, listing and reading their files, splits."""

import codecs
import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from common.config import UserError
from common.runtime import say

# Split -> the words that stand for it, the commonest first; split_of finds them in any case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
# What else may stand in the name of a split's folder: training_set, Train Images, seg_train.
SPLIT_FILLERS = "set data dataset split folder seg obj images image imgs img pictures photos frames files labels"
# Folders and files that a system leaves in data of others; names with a dot in front (.git, ._a.jpg) are as little data.
SYSTEM_NAMES = frozenset(("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"))


# ---- faults ------------------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """What was wrong with a data set: fault -> where, in the order found; and how what was not plain was understood (notes).

    As a context manager it is reported when a UserError leaves the block, for the faults are most often its cause.
    """

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        if isinstance(error, UserError):
            self.report()

    def add(self, fault: str, where) -> None:
        self.found[fault].append(str(where))

    def note(self, note: str, where) -> None:
        """Something that is used, but not as it stands: said in the report, not counted as left out."""
        self.notes[note].append(str(where))

    def add_error(self, error: str, name: str) -> None:
        """Notes an error's text, "fault" or "fault, detail"."""
        fault, _, detail = error.partition(", ")
        self.add(fault, f"{name} ({detail})" if detail else name)

    def take(self, other: "Faults") -> None:
        """Adds what another found."""
        for mine, theirs in ((self.found, other.found), (self.notes, other.notes)):
            for what, places in theirs.items():
                mine[what] += places

    def counts(self) -> dict[str, int]:
        return {fault: len(places) for fault, places in sorted(self.found.items())}

    def reason(self) -> str:
        """What an error that nothing is left goes on with: the fault, where all have the same one; else nothing."""
        return f", all for one reason: {next(iter(self.found))}" if len(self.found) == 1 else ""

    def report(self) -> None:
        for what, table in (("left out", self.found), ("note", self.notes)):
            for fault, places in sorted(table.items()):
                more = f" and {len(places) - 3} more" if len(places) > 3 else ""
                say(f"{what}, {fault} ({len(places)}): {', '.join(map(printable, places[:3]))}{more}")


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


# ---- listing and reading files -----------------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's or a tool's, and no data: .git, .ipynb_checkpoints, __MACOSX ..."""
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM_NAMES


def visible_entries(folder) -> list[os.DirEntry]:
    """What is in a folder but is not hidden, in order of the names; nothing where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError:
        return []


def files_below(folder: Path, faults: Faults | None = None) -> list[str]:
    """The paths of the files in a folder at any depth, in order of their parts; hidden files and folders are none.

    faults is told of what is neither file nor folder: whoever opens a pipe waits for ever.

    Links to folders are followed, under the names that they have here, but no folder is read twice: not one around `folder`,
    so that a link to it is no loop, and of two ways to a folder the one without a link counts.
    """
    found, folders, links, read = [], [os.fspath(folder)], [], set()
    for place in Path(os.path.abspath(folder)).parents:
        read.add(folder_identity(place))
    while folders or links:
        place = folders.pop() if folders else links.pop()
        identity = folder_identity(place)
        if identity is None or identity in read:
            continue
        read.add(identity)
        for entry in visible_entries(place):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_dir():
                links.append(entry.path)
            elif entry.is_file() or not os.path.exists(entry.path):  # a link to what is gone is named by whoever opens it
                found.append(entry.path)
            elif faults is not None:
                faults.add("pipe or device, no file", os.path.relpath(entry.path, folder))
    return sorted(found, key=lambda path: path.split(os.sep))


def folder_identity(folder) -> tuple[int, int] | None:
    """(device, inode) of a folder, by whatever path one comes to it; None where there is none."""
    try:
        facts = os.stat(folder)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def read_text(file: Path, faults: Faults) -> str:
    """What a text file of somebody's says, whatever program wrote it. OSError where it cannot be read.

    UTF-8 with or without a byte order mark, or UTF-16 (by its mark, or by the zero bytes of its first letters); else a Windows
    code page, which no file names: the western one is taken, and faults has a note of it.
    """
    content = Path(file).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    if b"\0" in content[:2]:
        return content.decode("utf-16-be" if content[0] == 0 else "utf-16-le", errors="replace")
    text, guessed = decode_bytes(content)
    if guessed:
        faults.note("text that is not UTF-8, read as Windows-1252", Path(file).name)
    return text


def readable(name: str) -> str:
    """The name of a file or folder as text that can be printed and written, also where its bytes are not UTF-8."""
    return decode_bytes(os.fsencode(name))[0]


def printable(name: str) -> str:
    """The same as one line: line feeds, and what would command a terminal, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in readable(name))


def decode_bytes(content: bytes) -> tuple[str, bool]:
    """(text, whether its encoding is a guess) of UTF-8, with or without a byte order mark, or else Windows-1252."""
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace"), True


def choose_layout(data_dir: Path, data_format: str, there: dict, expected: str, hint=lambda folder: "") -> str:
    """The layout to read data_dir by: data_format, or with "auto" the only one whose sign is there.

    there: layout -> what shows it (false: nothing does). UserError where none or several fit; `expected` describes all, and
    hint(data_dir) may say what else is there.
    """
    if data_format != "auto":
        if not there.get(data_format):
            raise UserError(f"--data_format {data_format}: {data_dir} does not have that layout")
        return data_format
    fitting = [name for name, sign in there.items() if sign]
    if len(fitting) != 1:
        what = "is none of the layouts that are known" + hint(data_dir)
        what = f"looks like {' and '.join(fitting)}" if fitting else what
        raise UserError(f"--data_dir {data_dir} {what}; expected {expected}; --data_format chooses one")
    return fitting[0]


def data_folder(data_dir: Path, known) -> Path:
    """The folder that holds the data: data_dir, or what it wraps in a folder that is all it has, as archives do.

    known(folder): whether it shows a layout. UserError where data_dir is no folder.
    """
    if not data_dir.is_dir():
        why = ": it is a file; unpack archives, and name the folder that holds the data" if data_dir.exists() else ""
        raise UserError(f"--data_dir: there is no folder {data_dir}{why}")
    folder, inner = data_dir, visible_entries(data_dir)
    while len(inner) == 1 and inner[0].is_dir() and not known(folder):
        folder = folder / inner[0].name
        inner = visible_entries(folder)
    return folder if known(folder) else data_dir


# ---- splits ------------------------------------------------------------------------------------------------------------


@cache
def split_of(name: str, alone: bool = True) -> str | None:
    """The split that a name stands for: Training, VAL, test_set, train2017, seg_train; None where it names none, or several.

    alone: nothing but the split and what kind of thing it is (SPLIT_FILLERS) may be named, so that a steam_train is none;
    without it any other word may stand there (instances_Train, training_frames_keypoints).
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # TrainImages
    words = [word for word in re.findall(r"[^\W\d_]+", apart.lower()) if word not in SPLIT_FILLERS.split()]
    split_of_word = {spelling: split for split, spellings in SPLIT_NAMES.items() for spelling in spellings}
    found = [split_of_word.get(word.removesuffix("set")) for word in words]
    splits = {split for split in found if split}
    return splits.pop() if len(splits) == 1 and not (alone and None in found) else None


def split_folders(folder: Path) -> dict[str, Path]:
    """Split -> the folder in `folder` that is named after it. UserError where two of them stand for one split."""
    found = {}
    for entry in visible_entries(folder):
        split = split_of(entry.name)
        if split and entry.is_dir():
            if split in found:
                raise UserError(f"{folder} holds {found[split].name}/ and {entry.name}/, both of the {split} split; keep one")
            found[split] = folder / entry.name
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def split_by_folders(samples: list, root: Path, faults: Faults) -> dict[str, list]:
    """Split -> samples of one list, each with a path: as folder_splits says, or all of them training samples."""
    found = defaultdict(list)
    for split, sample in zip(folder_splits([sample.path for sample in samples], root, faults), samples, strict=True):
        found[split].append(sample)
    return dict(found)


def folder_splits(paths: list[Path], root: Path, faults: Faults) -> list[str]:
    """The splits of files that one list names, by their folders in root, where some are training's and others not; else train.

    What somebody has held out is not trained on because one file lists it all.
    """
    parts = [Path(os.path.relpath(path, root)).parts[:-1] for path in paths]
    splits = [next(filter(None, map(split_of, folders)), "train") for folders in parts]
    if "train" not in splits or len(set(splits)) == 1:
        return ["train"] * len(paths)
    faults.note("file that lists several splits, which are told apart by their folders", root.name)
    return splits


def split_off(names: list[str], seed: int) -> list[bool]:
    """Which samples become validation data where there is none: those of about a fifth of the names, at least one, never all.

    names: each sample's own name, or that of its group (speaker, patient, video): samples of one name stay together. A hash
    of (seed, name) decides for each name alone, so that adding samples moves no other. UserError where all have one name.
    """
    hashes = [hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest() for name in names]
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


def chosen_split(splits: dict[str, list], split: str, where) -> list:
    """The samples of one split of the data in `where`. UserError, which names the others, where there is no such split."""
    if split not in splits:
        raise UserError(f"{where} has no {split} split; it has {', '.join(splits) or 'nothing that can be used'}")
    return splits[split]


def note_shared(splits: dict[str, list], faults: Faults) -> None:
    """Notes each file (sample.path) that is trained on and validated on."""
    train, val = (dict.fromkeys(str(sample.path) for sample in splits.get(split, [])) for split in ("train", "val"))
    for path in train:
        if path in val:
            faults.note("file that is trained on and validated on, so that the metrics flatter", os.path.basename(path))


# ---- names -------------------------------------------------------------------------------------------------------------


def note_alike(classes: list[str], faults: Faults) -> None:
    """A note of class names that differ in nothing but capitals, spaces and signs: they may be one class."""
    alike = defaultdict(list)
    for name in classes:
        alike[re.sub(r"[\W_]", "", name.casefold()) or name].append(name)
    for names in alike.values():
        if len(names) > 1:
            faults.note("classes whose names are nearly the same", " and ".join(names))


def short_names(paths: list[Path]) -> list[str]:
    """What to call files where people read it: by name, or by path from the folder that holds all if two are named alike.

    Each is a line that can be printed, and no two files have the same.
    """
    paths = [path.absolute() for path in paths]
    different = set(paths)
    names = {path: path.name for path in different}
    if len(set(names.values())) < len(different):
        root = Path(os.path.commonpath([path.parent for path in different]))
        names = {path: path.relative_to(root).as_posix() for path in different}
    shown = {path: printable(name) for path, name in names.items()}
    if len(set(shown.values())) < len(different):  # of an e with an accent, one in UTF-8 and one in Windows-1252
        shown = {path: ascii(name)[1:-1] for path, name in names.items()}
    return [shown[path] for path in paths]
