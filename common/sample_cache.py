"""A cache of samples in memory, loaded as they are used, and data sets over one; stand-ins for bad files; free memory."""

import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.batches import number_from
from common.config import UserError
from common.runtime import cores
from common.samples import attempt

STAND_INS = 20  # so many other samples are tried in the place of one that cannot be read
NEW = 0  # what a SampleCache knows of a sample
KEPT = 1
FAILED = 2


class SampleCache:
    """cache[i] is load(items[i]), an array of shape shapes[i] and one dtype: loaded at its first use, and kept if it is among
    the first that fit into `limit` bytes. ValueError or OSError where it cannot be loaded, TypeError for another dtype.

    The memory is shared with data workers, whoever loads a sample first (where workers are not forked they keep nothing).
    """

    def __init__(self, items: list, load, shapes: list[tuple], limit: int, dtype: str = "uint8"):
        import numpy as np
        import torch

        self.items, self.load, self.shapes, self.dtype = items, load, shapes, np.dtype(dtype)
        self.starts, self.bytes, room = [], 0, True  # where a sample's bytes begin; -1: not kept
        for shape in shapes:
            size = math.prod(shape) * self.dtype.itemsize
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
            view = np.frombuffer(self.memory, self.dtype, math.prod(shape), start).reshape(shape)
            if self.state[index] == KEPT:
                return view
        try:
            array = self.load(self.items[index])
            if array.shape != shape:
                raise ValueError(f"file that has changed since it was looked at, {array.shape} instead of {shape}")
        except (OSError, ValueError):
            self.state[index] = FAILED
            raise
        if array.dtype != self.dtype:  # copied into the cache, floats would become other numbers without a word
            raise TypeError(f"{self.items[index].path} was loaded as {array.dtype}; the cache was told {self.dtype}")
        if view is None:
            return array
        view[...] = array
        self.state[index] = KEPT  # after the bytes are there: a sibling may be waiting for this
        return view

    def fill(self, indices) -> None:
        """Loads those that are to be kept and are not yet, on all cores; a data worker, one of many, leaves them to their use."""
        import torch

        if torch.utils.data.get_worker_info() is not None:
            return
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
        faults = [attempt(self.__getitem__, i)[1] or "file that could not be read for a while" for i in new]
        return [(str(self.items[i].path), fault) for i, fault in zip(new, faults, strict=True)]

    def __getstate__(self):
        return {**self.__dict__, "memory": None}  # for a worker that is not forked


class CachedSamples:
    """What every data set here has: samples that are read through self.cache, a SampleCache, and asked for by (epoch, index).

    For torch it is a map-style data set. The run is told what turns out to be bad (see Run.batches).
    """

    def place(self, index: int) -> int:
        """Of a sample in the cache."""
        return index

    def new_faults(self) -> list[tuple[str, str]]:
        """See SampleCache."""
        return self.cache.new_faults()

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict]:
        """The items of a batch: a DataLoader asks for them at once, so that what is new can be loaded on all cores."""
        self.cache.fill(self.place(index) for _, index in keys)
        return [self[key] for key in keys]


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
