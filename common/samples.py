"""Samples of a data set, whatever they are: what was wrong with them, loading them once, splits, memory for a cache."""

import hashlib
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.runtime import progress, say

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass
class Faults:
    """What was wrong with a data set: fault -> where, in the order found."""

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, fault: str, where) -> None:
        self.found[fault].append(str(where))

    def counts(self) -> dict[str, int]:
        return {fault: len(places) for fault, places in sorted(self.found.items())}

    def report(self) -> None:
        for fault, places in sorted(self.found.items()):
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            say(f"left out, {fault} ({len(places)}): {', '.join(places[:3])}{more}")


def load_all(samples: list, load, faults: Faults, cache_bytes: int, text: str):
    """Loads every sample's picture once: (usable samples, their (height, width), cache, bytes used).

    load(sample) gives ((height, width), pixels), with pixels an array or tensor; its OSError or ValueError, "fault" or "fault,
    detail", is noted under the name sample.path. The pixels are kept while they fit into cache_bytes (None for the rest).
    """

    def look(sample):
        try:
            return load(sample), ""
        except (OSError, ValueError) as error:
            return None, str(error)

    good, shapes, cache, used = [], [], [], 0
    with ThreadPoolExecutor(4) as pool:  # decoding leaves Python's lock; `map` with many pictures would hold them all
        for first in progress(range(0, len(samples), 64), f"checking {text} pictures"):
            part = samples[first : first + 64]
            for sample, (loaded, error) in zip(part, pool.map(look, part), strict=True):
                if loaded is None:
                    fault, _, detail = error.partition(", ")
                    faults.add(fault, f"{sample.path.name} ({detail})" if detail else sample.path.name)
                    continue
                shape, pixels = loaded
                good.append(sample)
                shapes.append(tuple(shape))
                used += pixels.nbytes
                cache.append(pixels if used <= cache_bytes else None)
    return good, shapes, cache, min(used, cache_bytes)


def cache_limit(cache: str) -> int:
    """A quarter of the memory that is free now, shared by the processes of this machine; 0 with --cache off."""
    import os

    import psutil

    if cache == "off":
        return 0
    return psutil.virtual_memory().available // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def split_off(names: list[str], seed: int) -> list[bool]:
    """Which of two or more samples become validation data where there is none: about a fifth, at least one, never all.

    A hash of (seed, name) decides for each sample alone, so that adding samples moves no other.
    """
    hashes = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    bound = min(max(bytes([51]), min(hashes) + b"0"), max(hashes))  # 51 / 256 is a fifth
    return [place < bound for place in hashes]


def inside(folder: Path, name: str) -> Path | None:
    """folder/name; None where nothing is there, or outside the folder (an annotation is not trusted to point anywhere)."""
    path = folder / name
    if not os.path.exists(path):  # no exception, either, for a name that no file could have
        return None
    return path if path.resolve().is_relative_to(folder.resolve()) else None
