"""Which recordings are one sound: copies of a file, and the same take in another format, quieter, as mp3, at another rate."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from audio import open_audio, read_blocks, resample
from common.checkpoint import sha256_of
from common.scan import FileReader
from slices import LEVEL_STEP, QUIETER, frame_powers, from_db, loud_power

READER = 3  # goes up when look_at_sound finds something else in some file: scans of before are not believed
STEPS = 40  # of an outline: the level in so many equal parts of what sounds in a recording, five to a number of the scan
DEEPEST = 60  # dB below its loudest part, where an outline ends
ALIKE = 4  # dB between outlines, root mean square: closer ones are listened to
SAME_LENGTH = 0.2  # s, from the first to the last that sounds
SAME_WAVE = 0.7  # correlation of two waves: an mp3 of a take has 0.9 and more, another take of the same words below 0.3
COMPARED_RATE = 8000  # Hz
COMPARED_SECONDS = 600


def sound_reader() -> FileReader:
    """look_at_sound, for a scan."""
    import soundfile

    facts = ("samples", "rate", "sounding", "digest", *(f"outline{number}" for number in range(STEPS // 5)))
    version = f"soundfile {soundfile.__version__} ({soundfile.__libsndfile_version__})"
    return FileReader(f"sounds, reader {READER} with {version}", facts, look_at_sound)


def look_at_sound(path: Path) -> tuple[int, ...]:
    """(samples, rate, frames that sound, digest of the file, outline ...) of a recording, whole numbers above 0.

    BadFile as of open_audio.
    """
    source = open_audio(path)
    whole_frames = 500 * max(1, round(source.rate * LEVEL_STEP)) / source.rate  # s
    powers = np.concatenate([frame_powers(sound.wave, source.rate) for sound in source.blocks(whole_frames)])
    sounding = np.flatnonzero(powers > loud_power(powers) * from_db(-QUIETER))
    first, last = (sounding[0], sounding[-1] + 1) if len(sounding) else (0, len(powers))
    # Silent files are no copies: each is refused under its own name.
    digest = sha256_of(path) if len(sounding) else hashlib.sha256(os.fsencode(path)).hexdigest()
    energy = np.interp(np.linspace(first, last, STEPS + 1), np.arange(len(powers) + 1), np.concatenate([[0], np.cumsum(powers)]))
    energies = np.maximum(np.diff(energy), 1e-20)
    levels = 10 * np.log10(energies / energies.max())
    outline = np.round((levels.clip(-DEEPEST, 0) + DEEPEST) * 4).astype(int) + 1  # quarters of a dB, 1 to 241
    numbers = [int.from_bytes(bytes(outline[first : first + 5].tolist()), "big") for first in range(0, STEPS, 5)]
    return source.samples, source.rate, int(last - first), int(digest[:10], 16) + 1, *numbers


def outline_of_sound(facts) -> np.ndarray:
    """The levels (STEPS,) in dB that look_at_sound found."""
    return np.frombuffer(b"".join(int(number).to_bytes(5, "big") for number in facts[4:]), np.uint8) / 4.0


def exact_copies(facts: list) -> list[int]:
    """For each recording the place of the first whose file is the same, byte for byte: its own where there is none."""
    first = {}
    return [first.setdefault(tuple(own[:4]), place) for place, own in enumerate(facts)]


def near_copies(paths: list[Path], facts: list) -> list[int]:
    """For each recording the place of the first that has its sound: in another format, quieter, at another rate; else its own.

    Of like lengths and outlines the waves are correlated, whose peak neither level nor delay changes.
    """
    seconds = np.array([own[2] * LEVEL_STEP for own in facts])
    outlines = np.array([outline_of_sound(own) for own in facts]).reshape(-1, STEPS)
    coarse = outlines.reshape(-1, STEPS // 5, 5).mean(axis=2)
    load = lru_cache(maxsize=8)(compared_wave)  # up to 19 MB each
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
        both = slice(max(0, delay), STEPS + min(0, delay))
        best = np.minimum(best, (outlines[:, both] - np.roll(own, delay)[both]).std(axis=1))
    return best


def compared_wave(path: Path) -> np.ndarray:
    """Its first COMPARED_SECONDS at COMPARED_RATE; no more of a long one is decoded."""
    sound = next(iter(read_blocks(path, COMPARED_SECONDS)))
    return resample(sound.wave, sound.rate, COMPARED_RATE)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The peak of the normalised cross-correlation of two waves, whatever the delay and the sign; 0 with silence."""
    from scipy.fft import irfft, next_fast_len, rfft

    size = next_fast_len(len(one) + len(other))
    product = irfft(rfft(one, size) * np.conj(rfft(other, size)), size)
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.abs(product).max()) / scale if scale else 0.0
