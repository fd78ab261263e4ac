"""Which recordings are one sound: the same samples in another file, or the same take quieter, as mp3, at another rate."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from audio import open_audio, read_audio, resample
from common.scan import FileReader

READER = 1  # goes up when look_at_sound finds something else in some file: scans of before are not believed
STEPS = 40  # of an outline: the level in so many equal parts of a recording, five to a number of the scan
DEEPEST = 60  # dB below its loudest part, where an outline ends
ALIKE = 4  # dB between outlines, root mean square: closer ones are listened to
SAME_LENGTH = 0.2  # s; coders add silence of up to about 0.1 s
SAME_WAVE = 0.7  # correlation of two waves: an mp3 of a take has 0.9 and more, another take of the same words below 0.3
COMPARED_RATE = 8000  # Hz
COMPARED_SECONDS = 600


def sound_reader() -> FileReader:
    """look_at_sound, for a scan."""
    import soundfile

    outline = tuple(f"outline{number}" for number in range(STEPS // 5))
    version = f"soundfile {soundfile.__version__} ({soundfile.__libsndfile_version__})"
    return FileReader(f"sounds, reader {READER} with {version}", ("samples", "rate", "digest", *outline), look_at_sound)


def look_at_sound(path: Path) -> tuple[int, ...]:
    """(samples, rate, digest of what is decoded, outline ...) of a recording, whole numbers above 0. BadFile as of open_audio."""
    source = open_audio(path)
    digest, energies, place = hashlib.sha256(), np.zeros(STEPS), 0
    for block in source.mono_blocks():
        digest.update(block.tobytes())
        steps = (np.arange(place, place + len(block)) * STEPS) // source.samples
        energies += np.bincount(steps, np.square(block, dtype=np.float64), STEPS)
        place += len(block)
    levels = 10 * np.log10(np.maximum(energies, 1e-20) / max(energies.max(), 1e-20))
    outline = np.round((levels.clip(-DEEPEST, 0) + DEEPEST) * 4).astype(int) + 1  # quarters of a dB, 1 to 241
    numbers = [int.from_bytes(bytes(outline[first : first + 5].tolist()), "big") for first in range(0, STEPS, 5)]
    return source.samples, source.rate, int.from_bytes(digest.digest()[:5], "big") + 1, *numbers


def outline_of(facts) -> np.ndarray:
    """The levels (STEPS,) in dB that look_at_sound found."""
    return np.frombuffer(b"".join(int(number).to_bytes(5, "big") for number in facts[3:]), np.uint8) / 4.0


def exact_copies(facts: list) -> list[int]:
    """For each recording the place of the first that has the same samples at the same rate: its own where there is none."""
    first = {}
    return [first.setdefault(tuple(own[:3]), place) for place, own in enumerate(facts)]


def near_copies(paths: list[Path], facts: list) -> list[int]:
    """For each recording the place of the first that it is a take of: quieter, coded with loss, at another rate; else its own.

    Of like lengths and outlines the waves are correlated, whose peak neither level nor delay changes.
    """
    seconds = np.array([own[0] / own[1] for own in facts])
    outlines = np.array([outline_of(own) for own in facts]).reshape(-1, STEPS)
    coarse = outlines.reshape(-1, STEPS // 5, 5).mean(axis=2)
    load = lru_cache(maxsize=64)(compared_wave)
    first = list(range(len(paths)))
    for place in range(1, len(paths)):
        near = np.flatnonzero(np.abs(seconds[:place] - seconds[place]) <= SAME_LENGTH)
        near = near[(coarse[near] - coarse[place]).std(axis=1) < 2 * ALIKE]  # quickly
        for other in near[outline_distances(outlines[near], outlines[place]) < ALIKE]:
            if first[other] == other and correlation(load(paths[other]), load(paths[place])) > SAME_WAVE:
                first[place] = int(other)
                break
    return first


def outline_distances(outlines: np.ndarray, own: np.ndarray) -> np.ndarray:
    """dB (root mean square) from each outline (n, STEPS) to one, at the best of a few delays, whatever their levels."""
    best = np.full(len(outlines), np.inf)
    for delay in range(-3, 4):
        common = slice(max(0, delay), STEPS + min(0, delay))
        best = np.minimum(best, (outlines[:, common] - np.roll(own, delay)[common]).std(axis=1))
    return best


def compared_wave(path: Path) -> np.ndarray:
    sound = read_audio(path)
    return resample(sound.wave[: COMPARED_SECONDS * sound.rate], sound.rate, COMPARED_RATE)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The peak of the normalised cross-correlation of two waves, whatever the delay and the sign; 0 with silence."""
    from scipy.fft import irfft, next_fast_len, rfft

    size = next_fast_len(len(one) + len(other))
    product = irfft(rfft(one, size) * np.conj(rfft(other, size)), size)
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.abs(product).max()) / scale if scale else 0.0
