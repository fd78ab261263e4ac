"""Samples that a user leaves out: the list that --exclude names, and what it stands for in the data."""

import os
import stat
import unicodedata
from functools import lru_cache
from pathlib import Path

from common.config import UserError
from common.runtime import counted
from common.samples import Faults, read_text, readable

LARGEST_LIST = 2**24  # bytes; some 200,000 paths


class Exclusions:
    """What a text file lists, a path a line: a file or folder, absolute or below the data folder. "" for the file: nothing.

    Empty lines and lines that begin with # are passed over. UserError where the file is no such list.
    """

    def __init__(self, file: str, data_dir: Path):
        self.name = readable(Path(file).name)
        self.root = data_dir if data_dir.is_dir() else data_dir.parent  # a CSV file, a single recording
        self.entries = {listed_place(self.root / line): line for line in read_list(file)} if file else {}
        self.found = set()  # places that were some sample's
        self.told = set()  # paths that faults knows of
        self.kept = 0  # samples that are not listed

    def __contains__(self, path) -> bool:
        """Whether a file, or a folder that it lies in, is listed."""
        if not self.entries:
            return False
        place = listed_place(path)
        listed = [str(p) for p in (Path(place), *Path(place).parents) if str(p) in self.entries]
        self.found.update(listed)
        return bool(listed)

    def leave_out(self, samples: list, faults: Faults, path_of=lambda sample: sample.path) -> list:
        """The samples that are not listed; faults is told of the others, each file once."""
        kept = []
        for sample in samples:
            path = path_of(sample)
            if path not in self:
                kept.append(sample)
            elif path not in self.told:
                self.told.add(path)
                faults.add(f"excluded by {self.name}", readable(os.path.relpath(path, self.root)))
        self.kept += len(kept)
        return kept

    def note_strangers(self, faults: Faults) -> None:
        """Notes the lines that stood for no sample: a slip of the pen, or the list of other data.

        UserError where none of the samples that went through leave_out was kept.
        """
        if self.told and not self.kept:
            every = len(self.told)
            raise UserError(f"--exclude: {self.name} lists {every} of the {counted(every, 'file')} there: nothing is left to use")
        for place, line in self.entries.items():
            if place not in self.found:
                faults.note(f"line of {self.name} that is no sample of this data", line[:200])


def exclude_from(splits: dict[str, list], file: str, data_dir: Path, faults: Faults) -> dict[str, list]:
    """Split -> its samples, each with a path, without those that a list excludes."""
    excluded = Exclusions(file, data_dir)
    splits = {split: excluded.leave_out(samples, faults) for split, samples in splits.items()}
    excluded.note_strangers(faults)
    return splits


def exclude_for_eval(config, origin: dict) -> str:
    """The list for an evaluation: --exclude, or on the data that the checkpoint was trained on that of its training."""
    return getattr(config, "exclude", "") or ("" if config.data_dir else origin.get("exclude", ""))


def read_list(file: str) -> list[str]:
    """The lines of a list. UserError in one line for whatever is none."""
    path = Path(file).expanduser()
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for, for ever
            raise UserError(f"--exclude {file} is no file; give a text file with a path a line")
        if facts.st_size > LARGEST_LIST:
            raise UserError(f"--exclude {file} has {facts.st_size / 1e6:.0f} MB, so it is no list of paths")
        text = read_text(path, Faults())
    except (OSError, ValueError) as error:
        raise UserError(f"--exclude {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if "\0" in text:
        raise UserError(f"--exclude {file} is no text; expected a path a line")
    lines = (line.strip() for line in text.split("\n"))
    return [os.path.expanduser(line) for line in lines if line and not line.startswith("#")]


def listed_place(path) -> str:
    """A path as two are compared: absolute, through no linked folder, in one form of Unicode.

    The last part stays what it is called: of a file and a link to it, one may be excluded without the other.
    """
    folder, name = os.path.split(os.path.abspath(path))
    return unicodedata.normalize("NFC", readable(os.path.join(real_folder(folder), name)))


@lru_cache(maxsize=2**14)
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)
