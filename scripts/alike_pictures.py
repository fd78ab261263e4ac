"""Which pictures of a data set are one: the same file, or the same picture saved again, resized, lighter or darker.

A picture is known by a thumbnail of 16 x 16 in YCbCr. Its 64-bit perceptual hash (pHash: the signs of the 8 x 8 lowest
frequencies of a cosine transform, against their median) finds candidates without comparing all with all; their thumbnails decide.
"""

import hashlib
import io
from collections import defaultdict
from pathlib import Path

import numpy as np

# needs: pillow, scipy
from common.scan import FileReader
from common.vision.pictures import FORMATS, READER, decode, picture_faults

FINGERPRINT = 1  # goes up when look_at_picture finds something else in some picture
MODES = ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "I", "1", "LA", "YCbCr", "F", "HSV", "LAB", "PA", "La", "RGBa", "RGBX")
SIDE = 16  # of the grey thumbnail; its two colour parts have half of it
THUMB = SIDE * SIDE * 3 // 2  # bytes
HASH_BITS = 7  # of 64 by which the hashes of candidates differ at most: then one of four words differs in one bit or none
DIFFERENCE = 0.1  # of its contrast by which the grey thumbnail of one picture differs from the other's, root mean square
COLOUR = 4.0  # of 255, by which its colours do, in the mean
CONTRAST = (0.6, 1.6)  # times as much contrast that one picture may have as the other
PLAIN = 3.0  # standard deviation of a grey thumbnail below which a picture shows too little to be known by
CHUNK = 2**15  # rows at a time while candidates are looked up


def fingerprint_reader() -> FileReader:
    """look_at_picture, for a scan."""
    import PIL

    facts = ("digest", "mode", *(f"thumb{number}" for number in range(-(-THUMB // 5))))
    return FileReader(
        f"picture fingerprints {FINGERPRINT}, reader {READER} with Pillow {PIL.__version__}", facts, look_at_picture
    )


def look_at_picture(path: Path) -> tuple[int, ...]:
    """(digest of the file, 1 + its mode's place in MODES, thumbnail: five bytes a number), whole numbers above 0.

    The picture is decoded to its end, as for training. BadFile as of decode.
    """
    from PIL import Image

    content = path.read_bytes()
    pixels = decode(content)
    with picture_faults():
        mode = Image.open(io.BytesIO(content), formats=FORMATS).mode
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX).convert("YCbCr")
    grey, *colours = small.split()
    parts = [grey, *(part.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX) for part in colours)]
    thumb = b"".join(part.tobytes() for part in parts)
    numbers = [1 + int.from_bytes(thumb[first : first + 5], "big") for first in range(0, THUMB, 5)]
    place = MODES.index(mode) if mode in MODES else len(MODES)
    return 1 + int(hashlib.sha256(content).hexdigest()[:10], 16), 1 + place, *numbers


def thumbs_of(facts: list) -> np.ndarray:
    """The thumbnails (N, THUMB) float32 that look_at_picture found: 256 of Y, then 64 of Cb and of Cr, each 0 to 255."""
    rows = [b"".join(int(n - 1).to_bytes(5, "big") for n in own[2:])[-THUMB - 1 :] for own in facts]
    last = THUMB % 5  # the last number has fewer bytes, at its end
    rows = [row[:-5] + row[-last:] if last else row for row in rows]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(facts), THUMB).astype(np.float32)


def perceptual_hashes(thumbs: np.ndarray) -> np.ndarray:
    """64 bits (N,) uint64 of thumbnails (N, THUMB): pHash (Zauner 2010), by a transform of 16 x 16."""
    from scipy.fft import dctn

    grey = thumbs[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbs), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)  # without the mean, which says how light it is
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64) if len(thumbs) else np.zeros(0, np.uint64)


def near_hashes(hashes: np.ndarray) -> list[list[int]]:
    """For each of U different hashes the places of those that differ in HASH_BITS bits or fewer, its own among them.

    By four words of 16 bits each (multi-index hashing, Norouzi et al. 2012): the cost grows with what is alike, not as U x U.
    """
    near = [{place} for place in range(len(hashes))]
    for word in range(4):
        part = ((hashes >> np.uint64(16 * word)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ordered = part[order]
        for flip in (0, *(1 << bit for bit in range(16))):
            for first in range(0, len(hashes), CHUNK):
                rows = np.arange(first, min(first + CHUNK, len(hashes)))
                wanted = part[rows] ^ flip
                low, high = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
                counts = high - low
                starts = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
                one, other = np.repeat(rows, counts), order[starts + np.arange(counts.sum())]
                close = (one < other) & (np.bitwise_count(hashes[one] ^ hashes[other]) <= HASH_BITS)
                for a, b in zip(one[close].tolist(), other[close].tolist(), strict=True):
                    near[a].add(b)
                    near[b].add(a)
    return [sorted(places) for places in near]


def same_picture(thumb: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the thumbnails (K, THUMB) show the picture of one (THUMB,), whatever their light and contrast: (K,) bool."""
    grey, greys = thumb[: SIDE * SIDE], others[:, : SIDE * SIDE]
    own, theirs = grey - grey.mean(), greys - greys.mean(axis=1, keepdims=True)
    spread = np.maximum(theirs.std(axis=1), 1e-6)
    gain = (theirs @ own) / (theirs**2).sum(axis=1).clip(1e-6)
    gain = gain.clip(*CONTRAST)
    residual = np.sqrt(((gain[:, None] * theirs - own) ** 2).mean(axis=1))
    colour, colours = thumb[SIDE * SIDE :] - 128, others[:, SIDE * SIDE :] - 128
    apart = np.abs(gain[:, None] * colours - colour).mean(axis=1)
    return (residual <= DIFFERENCE * np.minimum(own.std(), spread)) & (apart <= COLOUR)


def mirrored(thumbs: np.ndarray) -> np.ndarray:
    """The thumbnails (N, THUMB) of the pictures' mirror images, left for right."""
    grey = thumbs[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)[:, :, ::-1]
    colours = thumbs[:, SIDE * SIDE :].reshape(-1, 2, SIDE // 2, SIDE // 2)[:, :, :, ::-1]
    return np.concatenate([grey.reshape(len(thumbs), SIDE * SIDE), colours.reshape(len(thumbs), SIDE * SIDE // 2)], axis=1)


def mirror_images(thumbs: np.ndarray) -> list[tuple[int, int]]:
    """[(place, later place)] of the pictures of which the second is a mirror image of the first, by their thumbnails."""
    if not len(thumbs):
        return []
    flipped = mirrored(thumbs)
    unique, kinds = np.unique(perceptual_hashes(np.concatenate([thumbs, flipped])), return_inverse=True)
    near, plain = near_hashes(unique), thumbs[:, : SIDE * SIDE].std(axis=1) < PLAIN
    earlier, found = defaultdict(list), []
    for place in range(len(thumbs)):
        if plain[place]:
            continue
        candidates = sorted(other for kind in near[kinds[len(thumbs) + place]] for other in earlier[kind])
        alike = np.flatnonzero(same_picture(flipped[place], thumbs[candidates])) if candidates else []
        if len(alike):
            found.append((candidates[alike[0]], place))
        earlier[kinds[place]].append(place)
    return found


def first_of_each(facts: list, thumbs: np.ndarray) -> list[tuple[int, bool]]:
    """For each picture (the place of the first that it is the same as, or its own; whether the files are the same, too).

    facts: of look_at_picture, in the order in which a picture becomes the first. Each is compared with firsts alone, so that
    the pictures of a film do not all become one by way of each other.
    """
    unique, kinds = np.unique(perceptual_hashes(thumbs), return_inverse=True)
    near, plain = near_hashes(unique), thumbs[:, : SIDE * SIDE].std(axis=1) < PLAIN if len(thumbs) else []
    by_digest, firsts, found = {}, defaultdict(list), []
    for place, own in enumerate(facts):
        if (original := by_digest.setdefault(own[0], place)) != place:
            found.append((found[original][0], True if found[original][0] == original else found[original][1]))
            continue
        candidates = [] if plain[place] else sorted(first for kind in near[kinds[place]] for first in firsts[kind])
        alike = np.flatnonzero(same_picture(thumbs[place], thumbs[candidates])) if candidates else []
        if len(alike):
            found.append((candidates[alike[0]], False))
            continue
        found.append((place, True))
        firsts[kinds[place]].append(place)
    return found
