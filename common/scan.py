"""Looking at the files of a data set once: what is known of them is kept for the next start."""

import hashlib
import json
import operator
import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.runtime import cores, gather_lists, process_index, progress_bar
from common.sample_cache import SampleCache
from common.samples import Faults, attempt

SCAN_FORMAT = "LoRA Workshop scan 1"  # the first entry of a scan file
LARGEST_SCAN = 2**28  # bytes; about 100 for each file, so room for the 1.3 million of ImageNet


def in_parts(items: list, work, text: str) -> list:
    """[work(item)] on all the cores there are, with a progress bar. Several processes do a part each, and all get all.

    For work that waits, or that leaves Python's lock as decoders do. work must not raise: the other processes would wait.
    """
    if not items and process_index()[1] == 1:
        return []
    rank, world = process_index()
    mine, done = items[rank::world], []
    with ThreadPoolExecutor(cores()) as pool, progress_bar(None, text, total=len(mine)) as bar:
        for first in range(0, len(mine), 64):  # `map` of all at once could not be interrupted
            part = mine[first : first + 64]
            done += pool.map(work, part)
            bar.update(len(part))
    places = [place for first in range(world) for place in range(first, len(items), world)]
    results = dict(zip(places, gather_lists(done), strict=True))
    return [results[place] for place in range(len(items))]


@dataclass
class FileReader:
    """How to look at a kind of file. look(path) reads its header and gives the facts that `fields` names, whole numbers
    above 0; BadFile where it is no such file. kind names the reader and its version: what another one found is not believed.
    With `more`, as many as there are in a file follow these: the labels of a mask.
    """

    kind: str
    fields: tuple[str, ...]
    look: Callable[[Path], tuple[int, ...]]
    more: bool = False


class Scan:
    """What is known of the files of a data set, so that a second start need not look at them again.

    Kept in the user's cache folder, a JSON file for each folder of data: both scripts of a pair, eval and every copy of the
    project share it wherever their runs lie, and it may be deleted at any time. An entry holds as long as the file has the
    same number of bytes and the same modification time (nanoseconds):

        path in the folder -> [bytes, mtime_ns, facts or null, fault or "", whether it was read to the end]

    facts are whole numbers from the file's header (width, height, orientation ...). A scan file that is damaged, huge, of
    another kind or on a disk that cannot be written is as good as none.
    """

    def __init__(self, paths: list[Path], reader: FileReader):
        self.paths = [os.path.abspath(path) for path in paths]
        self.reader, self.changed = reader, False
        self.kind = f"{reader.kind}: {', '.join(reader.fields)}"
        try:
            self.folder = os.path.join(os.path.commonpath({os.path.dirname(path) for path in self.paths}), "")
            name = hashlib.sha256(os.fsencode(f"{self.kind} {self.folder}")).hexdigest()[:24]
            self.file = user_cache() / "scans" / f"{name}.json"
        except (RuntimeError, ValueError):  # no home, no path, several disks of Windows
            self.folder, self.file = "", None
        self.entries = [None] * len(self.paths)

    def name(self, path: Path) -> str:
        """How a file is told apart from the others: its path from the folder that holds them all (every patient has a ct.nii)."""
        return os.path.abspath(path).removeprefix(self.folder)

    def look(self, text: str) -> None:
        """Fills the entries, from the scan file or with a look at the file's header."""
        known, stamps = self.read(), []
        for number, path in enumerate(self.paths):
            try:
                facts = os.stat(path)
                stamps.append([facts.st_size, facts.st_mtime_ns])
            except OSError:
                stamps.append([-1, -1])  # not kept; the reader says what is wrong
            entry = known.get(path[len(self.folder) :])
            if well_formed(entry, len(self.reader.fields), self.reader.more) and entry[:2] == stamps[number]:
                self.entries[number] = entry
        new = sorted(set(gather_lists([number for number, entry in enumerate(self.entries) if entry is None])))

        def look_at(number):
            facts, fault, lasting = attempt(self.reader.look, Path(self.paths[number]))
            facts = facts and [*map(operator.index, facts)]  # a header read with numpy has numbers that JSON does not know
            return self.note(number, [*(stamps[number] if lasting else (-1, -1)), facts, fault, False])

        for number, entry in zip(new, in_parts(new, look_at, text), strict=True):
            self.note(number, entry)

    def prove(self, numbers: list[int], load, text: str) -> None:
        """Has load(place) read to the end the files of these entries that nobody has read yet; place: in `numbers`.

        Only a BadFile is kept as the file's fault: every task shares the scan, and another one may do well with the file.
        """
        new = [place for place, number in enumerate(numbers) if not self.entries[number][4]]
        new = sorted(set(gather_lists(new)))

        def read_whole(place):
            size, mtime, facts, _, _ = self.entries[numbers[place]]
            _, fault, lasting = attempt(load, place)
            return self.note(numbers[place], [*((size, mtime) if lasting else (-1, -1)), facts, fault, True])

        for place, entry in zip(new, in_parts(new, read_whole, text), strict=True):
            self.note(numbers[place], entry)

    def note(self, number: int, entry: list) -> list:
        self.entries[number], self.changed = entry, True  # at once: what is known when a scan is interrupted is kept
        return entry

    def read(self) -> dict:
        """The scan file's entries, unchecked; {} where there is none that can be used."""
        try:
            facts = self.file.stat()
            if facts.st_size > LARGEST_SCAN or not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for, for ever
                return {}
            content = json.loads(self.file.read_text(encoding="utf-8"))
            head, files = content["head"], content["files"]
            return files if head == [SCAN_FORMAT, self.kind, self.folder] and isinstance(files, dict) else {}
        except (AttributeError, OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError):
            return {}

    def save(self) -> None:
        """Writes the scan file, if there is news: whole or not at all, with what other processes have written meanwhile.

        Of two that write in the same moment one wins; what is lost is looked at again.
        """
        if not self.file or not self.changed or int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return
        news = {p[len(self.folder) :]: e for p, e in zip(self.paths, self.entries, strict=True) if e and e[0] >= 0}
        content = {"head": [SCAN_FORMAT, self.kind, self.folder], "files": {**self.read(), **news}}
        aside = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, suffix=".tmp", delete=False) as file:
                aside = file.name
                file.write(json.dumps(content, separators=(",", ":")))
            os.replace(aside, self.file)
        except OSError:  # what is known is then found out again
            pass
        finally:
            if aside and os.path.exists(aside):
                os.remove(aside)


def user_cache() -> Path:
    """The user's folder for what may be deleted at any time: LORA_WORKSHOP_CACHE, or ~/.cache/lora_workshop.

    RuntimeError where there is neither that nor a home.
    """
    own, general = os.environ.get("LORA_WORKSHOP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(general or Path.home() / ".cache") / "lora_workshop"


def well_formed(entry, count: int, more: bool = False) -> bool:
    """Whether something from a scan file can be an entry with `count` facts, or more: whoever wrote the file is not known."""
    if not (isinstance(entry, list) and len(entry) == 5):
        return False
    size, mtime, facts, fault, whole = entry
    if not (type(size) is int and type(mtime) is int and type(whole) is bool):
        return False
    if not (isinstance(fault, str) and len(fault) < 500 and fault.isprintable()):
        return False
    if facts is None:
        return fault != ""
    enough = isinstance(facts, list) and (len(facts) == count or (more and len(facts) > count))
    return enough and all(type(v) is int and 0 < v < 2**48 for v in facts)


def check_files(
    items: list, reader: FileReader, measure, load, faults: Faults, cache_bytes: int, text: str, whole: bool = True, dtype="uint8"
):
    """(numbers of the items whose files are good, SampleCache of these) of items that each have a path.

    measure(item, facts) gives the shape of what load(item) will give, an array of `dtype`. They name a fault by a ValueError,
    "fault" or "fault, detail"; of a BadFile the scan keeps it. With `whole` every file is read to the end once, if no scan has
    done so before, and what is read stays in the cache while it fits into cache_bytes; else only headers are looked at, and a
    file with a good one may turn out bad when it is used. text: what the progress bar calls the files.
    """
    scan = Scan([item.path for item in items], reader)
    try:
        scan.look(f"looking at {text}")
        good, shapes = [], []
        for number, (item, entry) in enumerate(zip(items, scan.entries, strict=True)):
            _, _, facts, fault, read_whole = entry
            try:
                # Without `whole` only what a header tells: what is left out must not depend on who read the file before.
                if fault and (whole or not read_whole):
                    raise ValueError(fault)
                shapes.append(tuple(measure(item, facts)))
                good.append(number)
            except ValueError as error:
                faults.add_error(str(error), scan.name(item.path))
        cache = SampleCache([items[number] for number in good], load, shapes, cache_bytes, dtype)
        if whole:
            scan.prove(good, cache.__getitem__, f"checking {text}")
    finally:  # also when it is interrupted: what is known now need not be looked at again
        scan.save()
    if not whole:
        return good, cache
    sound = [place for place, number in enumerate(good) if not scan.entries[number][3]]
    for number in good:
        if scan.entries[number][3]:
            faults.add_error(scan.entries[number][3], scan.name(items[number].path))
    return [good[place] for place in sound], cache.only(sound)
