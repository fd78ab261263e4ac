"""Samples of a data set, whatever they are: faults, finding and checking their files, splits, a cache in memory."""

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.batches import number_from
from common.config import UserError
from common.runtime import gather_lists, process_index, progress, say

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SCAN_FORMAT = "LoRA Workshop scan 1"  # the first entry of a scan file
LARGEST_SCAN = 2**28  # bytes; about 100 for each file, so room for the 1.3 million of ImageNet
STAND_INS = 20  # so many other samples are tried in the place of one that cannot be read
NEW = 0  # what a SampleCache knows of a sample
KEPT = 1
FAILED = 2


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


# ---- looking at files, once --------------------------------------------------------------------------------------------


def in_parts(items: list, work, text: str) -> list:
    """[work(item)] on all the cores there are, with a progress bar. Several processes do a part each, and all get all.

    For work that waits, or that leaves Python's lock as decoders do. work must not raise: the other processes would wait.
    """
    if not items and process_index()[1] == 1:
        return []
    rank, world = process_index()
    mine, done = items[rank::world], []
    with ThreadPoolExecutor(cores()) as pool, progress(None, text, total=len(mine)) as bar:
        for first in range(0, len(mine), 64):  # `map` of all at once could not be interrupted
            part = mine[first : first + 64]
            done += pool.map(work, part)
            bar.update(len(part))
    places = [place for first in range(world) for place in range(first, len(items), world)]
    results = dict(zip(places, gather_lists(done), strict=True))
    return [results[place] for place in range(len(items))]


def cores() -> int:
    """Cores that this process may use; those of the machine are shared by the processes of a run."""
    many = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, many // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@dataclass
class FileReader:
    """How to look at a kind of file. look(path) reads its header and gives the facts that `fields` names, whole numbers
    above 0; ValueError, "fault" or "fault, detail", where it is no such file. kind names the reader and its version: what
    another one found is not believed.
    """

    kind: str
    fields: tuple[str, ...]
    look: Callable[[Path], tuple[int, ...]]


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

    def look(self, text: str) -> None:
        """Fills the entries, from the scan file or with a look at the file's header."""
        known, stamps = self.read(), []
        for number, path in enumerate(self.paths):
            try:
                stat = os.stat(path)
                stamps.append([stat.st_size, stat.st_mtime_ns])
            except OSError:
                stamps.append([-1, -1])  # not kept; the reader says what is wrong
            entry = known.get(path[len(self.folder) :])
            if well_formed(entry, len(self.reader.fields)) and entry[:2] == stamps[number]:
                self.entries[number] = entry
        new = sorted(set(gather_lists([number for number, entry in enumerate(self.entries) if entry is None])))

        def look_at(number):
            facts, fault, lasting = attempt(self.reader.look, Path(self.paths[number]))
            return self.note(number, [*(stamps[number] if lasting else (-1, -1)), facts and list(facts), fault, False])

        for number, entry in zip(new, in_parts(new, look_at, text), strict=True):
            self.note(number, entry)

    def prove(self, numbers: list[int], load, text: str) -> None:
        """Has load(place) read to the end the files of these entries that nobody has read yet; place: in `numbers`."""
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
            if self.file.stat().st_size > LARGEST_SCAN:
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
        except OSError:
            if aside and os.path.exists(aside):
                os.remove(aside)


def user_cache() -> Path:
    """The user's folder for what may be deleted at any time: LORA_WORKSHOP_CACHE, or ~/.cache/lora_workshop.

    RuntimeError where there is neither that nor a home.
    """
    own, general = os.environ.get("LORA_WORKSHOP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(general or Path.home() / ".cache") / "lora_workshop"


def well_formed(entry, count: int) -> bool:
    """Whether something from a scan file can be an entry with `count` facts: whoever wrote the file is not known."""
    if not (isinstance(entry, list) and len(entry) == 5):
        return False
    size, mtime, facts, fault, whole = entry
    if not (type(size) is int and type(mtime) is int and type(whole) is bool):
        return False
    if not (isinstance(fault, str) and len(fault) < 500 and fault.isprintable()):
        return False
    if facts is None:
        return fault != ""
    return isinstance(facts, list) and len(facts) == count and all(type(v) is int and 0 < v < 2**48 for v in facts)


def attempt(work, *arguments):
    """(result or None, fault or "", whether trying again would give the same) of work, whose ValueError names a fault."""
    try:
        return work(*arguments), "", True
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error  # the disk's and the memory's troubles pass; what is in the file stays
        passes = isinstance(cause, MemoryError) or getattr(cause, "errno", None) is not None
        return None, "".join(c if c.isprintable() else "?" for c in str(error))[:400], not passes


def check_files(items: list, reader: FileReader, measure, load, faults: Faults, cache_bytes: int, text: str, whole: bool = True):
    """(numbers of the items whose files are good, SampleCache of these) of items that each have a path.

    measure(item, facts) gives the shape of what load(item) will give, a uint8 array. They and the reader name a fault by a
    ValueError, "fault" or "fault, detail". With `whole` every file is read to the end once, if no scan has done so before,
    and what is read stays in the cache while it fits into cache_bytes; else only headers are looked at, and a file may turn
    out bad when it is used. text: what the progress bar calls the files.
    """
    scan = Scan([item.path for item in items], reader)
    try:
        scan.look(f"looking at {text}")
        good, shapes = [], []
        for number, (item, entry) in enumerate(zip(items, scan.entries, strict=True)):
            _, _, facts, fault, _ = entry
            try:
                if not facts or (fault and whole):
                    raise ValueError(fault)
                shapes.append(tuple(measure(item, facts)))
                good.append(number)
            except ValueError as error:
                faults.add_error(str(error), item.path.name)
        cache = SampleCache([items[number] for number in good], load, shapes, cache_bytes)
        if whole:
            scan.prove(good, cache.__getitem__, f"checking {text}")
    finally:  # also when it is interrupted: what is known now need not be looked at again
        scan.save()
    if not whole:
        return good, cache
    sound = [place for place, number in enumerate(good) if not scan.entries[number][3]]
    for number in good:
        if scan.entries[number][3]:
            faults.add_error(scan.entries[number][3], items[number].path.name)
    return [good[place] for place in sound], cache.only(sound)


# ---- a cache in memory -------------------------------------------------------------------------------------------------


class SampleCache:
    """cache[i] is load(items[i]), a uint8 array of shape shapes[i]: loaded at its first use, and kept if it is among the
    first that fit into `limit` bytes. ValueError or OSError where it cannot be loaded.

    The memory is shared with data workers, whoever loads a sample first (where workers are not forked they keep nothing).
    """

    def __init__(self, items: list, load, shapes: list[tuple], limit: int):
        import torch

        self.items, self.load, self.shapes = items, load, shapes
        self.starts, self.bytes, room = [], 0, True  # where a sample's bytes begin; -1: not kept
        for size in map(math.prod, shapes):
            room = room and self.bytes + size <= limit
            self.starts.append(self.bytes if room else -1)
            self.bytes += size if room else 0
        # Anonymous shared memory takes room only as it is filled, and a container's small /dev/shm does not bound it.
        self.memory = memoryview(mmap.mmap(-1, max(1, self.bytes)))
        self.state = torch.zeros(len(items), dtype=torch.uint8).share_memory_()
        self.told = set()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def kept(self) -> int:
        """How many samples there is room for."""
        return sum(start >= 0 for start in self.starts)

    def __getitem__(self, index: int):
        import numpy as np

        shape, start = self.shapes[index], self.starts[index]
        view = None
        if start >= 0 and self.memory is not None:
            view = np.frombuffer(self.memory, np.uint8, math.prod(shape), start).reshape(shape)
            if self.state[index] == KEPT:
                return view
        try:
            array = self.load(self.items[index])
            if array.shape != shape:
                raise ValueError(f"file that has changed since it was looked at, {array.shape} instead of {shape}")
        except (OSError, ValueError):
            self.state[index] = FAILED
            raise
        if view is None:
            return array
        view[...] = array
        self.state[index] = KEPT  # after the bytes are there: a sibling may be waiting for this
        return view

    def fill(self, indices) -> None:
        """Loads those that are to be kept and are not yet, on all cores."""
        new = [i for i in dict.fromkeys(indices) if self.starts[i] >= 0 and self.state[i] == NEW]
        if len(new) > 1 and self.memory is not None and cores() > 1:
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(lambda i: attempt(self.__getitem__, i), new))

    def only(self, indices: list[int]):
        """The cache of some of the items, with what it holds of them."""
        part = object.__new__(SampleCache)
        part.__dict__.update(self.__dict__, told=set())  # the memory is the same
        part.items, part.shapes, part.starts = ([values[i] for i in indices] for values in (self.items, self.shapes, self.starts))
        part.state = self.state[indices].share_memory_()
        return part

    def new_faults(self) -> list[tuple[str, str]]:
        """[(path, fault)] of the samples that could not be loaded, by this process or its workers, since the last call."""
        new = [i for i in (self.state == FAILED).nonzero().flatten().tolist() if i not in self.told]
        self.told.update(new)
        faults = [attempt(self.load, self.items[i])[1] or "file that could not be read for a while" for i in new]
        return [(str(self.items[i].path), fault) for i, fault in zip(new, faults, strict=True)]

    def __getstate__(self):
        return {**self.__dict__, "memory": None}  # for a worker that is not forked


def first_readable(dataset, read, index: int, *key):
    """(index, read(index)) of a sample of the data set; in training of another one where its file turns out to be bad.

    key: (seed, epoch), and what else tells this draw from others; epoch 0 is evaluation. Which other sample it is is a
    function of key and index: resumed runs and the other script of the pair see the same. UserError where the sample, and
    in training all that were tried in its place, cannot be read.
    """
    tries = STAND_INS if key[1] > 0 else 0
    fault = None
    others = (number_from(*key, index, "stand-in", number) % len(dataset) for number in range(tries))
    for chosen in (index, *others):
        try:
            return chosen, read(chosen)
        except (OSError, ValueError) as error:
            fault = fault or error
    more = f" (nor can {tries} others that were tried in its place)" if tries else ""
    raise UserError(f"{dataset.name(index)}: {fault}{more}") from None


def cache_limit(cache: str) -> int:
    """A quarter of the memory that is free now, shared by the processes of this machine; 0 with --cache off."""
    return 0 if cache == "off" else free_memory() // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the machine has free, or the control groups around it allow, if less.

    root: where proc/ and sys/ lie, for tests. In a group what the kernel would give back (unused file cache) counts as free.
    """
    import psutil

    free = psutil.virtual_memory().available
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return free
    for line in lines:  # "0::/a/b" in version 2, "9:memory:/a/b" in version 1
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = mount / place.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for all groups below; in a container the path may be the host's
            if folder.is_relative_to(mount):
                free = min(free, free_in_group(folder, *names))
    return max(0, free)


def free_in_group(folder: Path, limit: str, usage: str, reclaimable: str) -> float:
    """Limit - usage of one control group, in bytes; infinite where it has no limit."""
    try:
        free = int((folder / limit).read_text()) - int((folder / usage).read_text())
    except (OSError, ValueError):  # no such file; "max"
        return math.inf
    try:
        rows = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
        return free + int(rows.get(reclaimable, 0))
    except (OSError, ValueError):
        return free
