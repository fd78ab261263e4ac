"""The sound that is to be converted, however long: samples on disk, and of every 10 ms its level and F0."""

import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# needs: soxr
from common.samples import BadFile
from f0 import F0_HOP, RATE_16K, SILENT_AT_ALL, SILENT_DB, extract_f0

SHORTEST = 60  # frames; shorter sounds are padded with silence for the analyses, whose windows they would not fill
F0_BLOCK = 3000  # frames that F0 is tracked in at a time ...
F0_MARGIN = 104  # ... and heard besides on either side; both whole numbers of 80 ms, as f0.py wants its parts
PAUSE = 8  # frames: shorter silences are part of speech (stops)
LOUD = 40  # frames: the loudest so many in a row are what silence is judged by, and not a click


class SampleFile:
    """float32 samples in a nameless file on disk: memory does not grow with their number. It goes with its object."""

    def __init__(self):
        self.file, self.length = tempfile.TemporaryFile(prefix="voice"), 0

    def append(self, wave: np.ndarray) -> None:
        self.file.seek(0, os.SEEK_END)
        self.file.write(np.ascontiguousarray(wave, np.float32).data)
        self.length += len(wave)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples start to stop; zeros beyond either end."""
        first, last = min(max(0, start), self.length), max(0, min(stop, self.length))
        self.file.seek(4 * first)
        part = np.frombuffer(self.file.read(4 * max(0, last - first)), np.float32)
        before = min(max(0, -start), stop - start)
        return np.pad(part, (before, stop - start - before - len(part)))


@dataclass
class Original:
    """What is converted. samples: at 16 kHz, high-passed; length, rate: as recorded; level: (T,) RMS of each frame of 10 ms.

    T is even: content has a frame for every two.
    """

    samples: SampleFile
    length: int
    rate: int
    level: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.level)

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    def wave(self, start: int, stop: int) -> np.ndarray:
        """The samples of frames start to stop."""
        return self.samples.read(start * F0_HOP, stop * F0_HOP)


def read_original(blocks: Iterable[tuple[np.ndarray, int]]) -> Original:
    """Takes (wave (n,) float32 mono, rate), piece after piece, to 16 kHz. BadFile where there is no sample."""
    import soxr
    from scipy.signal import butter, sosfilt, sosfilt_zi

    samples, length, rate, resampler = SampleFile(), 0, 0, None
    # Rumble and what is left of a DC offset are no voice. Of second order, which rings for 10 ms: steeper ones fill pauses.
    sections = butter(2, 48, "highpass", fs=RATE_16K, output="sos")
    state = None

    def take(part):
        nonlocal state
        if len(part):
            state = sosfilt_zi(sections) * part[0] if state is None else state
            part, state = sosfilt(sections, part, zi=state)
            samples.append(part)

    for wave, rate in blocks:
        resampler = resampler or soxr.ResampleStream(rate, RATE_16K, 1, dtype="float32", quality="HQ")
        length += len(wave)
        take(resampler.resample_chunk(wave))
    if not length:
        raise BadFile("no samples in it")
    take(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    frames = max(SHORTEST, 2 * math.ceil(length / rate * RATE_16K / (2 * F0_HOP)))
    parts = (samples.read(at * F0_HOP, min(at + 1000, frames) * F0_HOP) for at in range(0, frames, 1000))
    level = np.concatenate([np.sqrt(np.square(part.reshape(-1, F0_HOP)).mean(axis=1)) for part in parts])
    return Original(samples, length, rate, level)


def track_f0(original: Original, method: str, silent: np.ndarray) -> np.ndarray:
    """F0 (T,) in Hz, 0 where unvoiced or silent; found block by block, each heard with a second more on either side."""
    found, loudest = np.zeros(original.frames, np.float32), loudness(original.level)
    for start in range(0, original.frames, F0_BLOCK):
        stop = min(start + F0_BLOCK, original.frames)
        if not silent[start:stop].all():
            first = max(0, start - F0_MARGIN)
            wave = original.wave(first, min(stop + F0_MARGIN, original.frames))
            found[start:stop] = extract_f0(wave, method, loudest=loudest)[start - first : stop - first]
    return np.where(silent, 0, found)


def loudness(level: np.ndarray) -> float:
    """dB of full scale of the loudest 0.4 s."""
    return 10 * math.log10(max(moving_power(level, LOUD).max(), 1e-12))


def moving_power(level: np.ndarray, width: int) -> np.ndarray:
    """(T,) mean square of the `width` levels around each."""
    from scipy.ndimage import uniform_filter1d

    return uniform_filter1d(np.square(level, dtype=np.float64), width).clip(0)  # a running sum may end just below zero


def silent_frames(level: np.ndarray, shortest: int = PAUSE) -> np.ndarray:
    """(T,) True in pauses of at least `shortest` frames: below what f0.py takes for silent beside the loudest 0.4 s."""
    limit = 10 ** (max(loudness(level) + SILENT_DB, SILENT_AT_ALL) / 10)
    silent = np.zeros(len(level), bool)
    for start, stop in runs(np.square(level) < limit):
        if stop - start >= shortest:
            silent[start : stop - (stop < len(level))] = True  # the last frame of a pause is for what follows to rise in
    return silent


def runs(mask: np.ndarray) -> np.ndarray:
    """(R, 2) first and behind the last place of each run of True in a mask (T,)."""
    padded = np.concatenate([[False], mask, [False]])
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)


def quiet_cuts(level: np.ndarray, shortest: int, longest: int) -> list[int]:
    """Frames 0 = c0 < c1 < ... = T with shortest to longest between them, each in the quietest place there is; all even."""
    smooth, cuts = moving_power(level, 10), [0]
    while len(level) - cuts[-1] > longest:
        first = cuts[-1] + shortest
        cuts.append((first + int(smooth[first : cuts[-1] + longest].argmin())) // 2 * 2)
    return [*cuts, len(level)]
