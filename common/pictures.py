"""Pictures from outside: finding, decoding and checking them, a cache in memory, and a record of what was wrong."""

import hashlib
import io
import os
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# needs: pillow
from common.config import UserError
from common.runtime import progress, say

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
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


def decode(source: Path | bytes, claimed: tuple[int, int] | None = None) -> np.ndarray:
    """A picture file as uint8 RGB, (height, width, 3), turned upright as its EXIF orientation says.

    claimed: the annotation's (width, height). If it is the size of the stored, unturned picture, whoever drew the boxes
    ignored the orientation, so it is ignored here, too. ValueError says what is wrong with the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            image.load()
            stored = image.size
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("no picture that can be decoded") from None
    except Exception as error:  # on a damaged file a decoder may raise anything: struct.error, TypeError, SyntaxError ...
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"picture that cannot be decoded, {reason[0]}") from None
    image = image if claimed and claimed == stored and claimed != upright.size else upright
    if claimed and claimed != image.size:
        raise ValueError(f"picture of another size than its annotation says, {image.size} instead of {claimed}")
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip everything above 255
        values = np.asarray(image).astype(np.float64)
        eight_bits = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values / (1 if eight_bits else 257)).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("picture of floating-point numbers, whose range is not known")
    return np.array(image.convert("RGB"))


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


def find_pictures(pattern: str) -> list[Path]:
    """The picture files that a path names: a file, a folder (its pictures), or a glob in quotes."""
    import glob

    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*")) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    found = [p for p in found if p.is_file() and p.suffix.lower() in IMAGE_ENDINGS]
    if not found:
        raise UserError(f"--input {pattern}: no picture there ({', '.join(IMAGE_ENDINGS)})")
    return found
