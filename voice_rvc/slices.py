"""A recording cut into pieces to train on: at silence, a few seconds each, levelled; and what its sound is like in numbers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

# needs: scipy
from audio import Sound, Source
from common.samples import BadFile

LEVEL_STEP = 0.02  # s; the level of a recording is measured in steps of this
HIGH_PASS = 48  # Hz; below it is rumble, no voice
LEAST_PAUSE = 0.5  # s; a silence as long is cut out,
KEPT_SILENCE = 0.2  # s; but for so much of it at each side of the voice
LEAST_PIECE = 0.5  # s; pieces below, margins and all, are clicks more often than voice
LONGEST_PART = 4.0  # s; what has no silence is cut into equal parts of at most this,
PART_SHIFT = 0.45  # s; each end moved by so much at most, to the quietest place: no piece is longer than 5 s
QUIETER = 30  # dB below the loud parts of the same recording is silence,
NOISY_QUIETER = 24  # or, where its noise lies above that, up to this
ABOVE_NOISE = 6  # dB
SILENT = -80  # dB of full scale; a recording whose loud parts are below is silent,
WEAK = -50  # and one between them, too, if its spectrum is that of noise
FLAT = 0.4  # local flatness of a spectrum: noise has 0.56 whatever its colour, voices have 0.2 and less


@dataclass
class Piece:
    """start, stop: seconds in the recording; wave (n,): at its rate, high-passed, levelled; facts: measures of it as recorded."""

    start: float
    stop: float
    wave: np.ndarray
    facts: dict = field(default_factory=dict)


@dataclass
class Plan:
    """Where a recording is cut. spans: (first, behind the last) sample of each piece; seconds = kept + silence + refused."""

    rate: int
    spans: list[tuple[int, int]]
    seconds: float
    kept: float
    silence: float  # cut out as silence
    refused: float  # in pieces shorter than LEAST_PIECE
    level: float  # dB of full scale, of the loud parts


def cut(sound: Sound) -> list[Piece]:
    """The pieces of a sound in memory. BadFile where there is none: silent, too short."""
    size = max(1, round(sound.rate * LEVEL_STEP)) * 500
    blocks = [
        Sound(sound.wave[first : first + size], sound.rate, sound.channels) for first in range(0, max(1, len(sound.wave)), size)
    ]
    return list(cut_blocks(blocks, plan_cuts(blocks)))


def cut_source(source: Source) -> tuple[Plan, Iterator[Piece]]:
    """(Plan, its pieces one by one) of a file of any length, in memory that does not grow with it. BadFile as of cut."""
    seconds = max(1, round(source.rate * LEVEL_STEP)) * 500 / source.rate  # whole frames
    plan = plan_cuts(source.blocks(seconds))
    return plan, cut_blocks(source.blocks(seconds), plan)


# ---- where -------------------------------------------------------------------------------------------------------------


def plan_cuts(blocks: Iterable[Sound]) -> Plan:
    """Where to cut a sound that comes in blocks of whole frames. BadFile where it is silent, or nothing long enough is left."""
    powers, flatness, samples, rate, high_pass = [], [], 0, 0, None
    for block in blocks:
        high_pass = high_pass or HighPass(block.rate)
        rate, samples = block.rate, samples + len(block.wave)
        powers.append(frame_powers(high_pass(block.wave), rate))
        if len(block.wave) and from_db(SILENT) < powers[-1].mean() < from_db(WEAK):
            flatness.append(local_flatness(block.wave, rate))
    if samples < LEAST_PIECE * rate or not samples:
        raise BadFile(f"too short, {samples / max(rate, 1):.2g} s where {LEAST_PIECE} s are the least")
    powers = np.concatenate(powers)
    loud = loud_power(powers)
    level = to_db(loud)
    if level < SILENT:
        raise BadFile("silent recording, its loudest parts have " + (f"{level:.0f} dB" if level > -150 else "no level at all"))
    if level < WEAK and min(flatness, default=0) > FLAT:
        raise BadFile(f"silent recording, nothing but noise at {level:.0f} dB")
    frame = max(1, round(rate * LEVEL_STEP))
    spans = [(first * frame, min(last * frame, samples)) for first, last in divide(voiced_spans(powers, loud), powers)]
    kept = [span for span in spans if span[1] - span[0] >= LEAST_PIECE * rate]
    if not kept:
        raise BadFile(f"no {LEAST_PIECE} s of voice between silences")
    inside, long_enough = (sum(last - first for first, last in part) / rate for part in (spans, kept))
    seconds = samples / rate
    return Plan(rate, kept, seconds, long_enough, seconds - inside, inside - long_enough, level)


class HighPass:
    """A Butterworth high-pass of 5th order, called with one block after the other.

    Causal, and in second-order sections: so blocks of any length give what the whole would, and 48 Hz at a rate of 48,000 are no
    trouble for its precision. Its phase turns below 150 Hz only, alike for all that is computed from the sound.
    """

    def __init__(self, rate: int):
        from scipy.signal import butter, sosfilt_zi

        self.sections = butter(5, HIGH_PASS, "highpass", fs=rate, output="sos")
        self.start, self.state = sosfilt_zi(self.sections), None

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        from scipy.signal import sosfilt

        if not len(wave):
            return wave
        if self.state is None:  # as if the first sample had been there for ever: no thump at the start
            self.state = self.start * float(wave[0])
        filtered, self.state = sosfilt(self.sections, wave, zi=self.state)
        return filtered.astype(np.float32)


def frame_powers(wave: np.ndarray, rate: int) -> np.ndarray:
    """Mean squares of frames of LEVEL_STEP seconds; a last one may be shorter."""
    frame = max(1, round(rate * LEVEL_STEP))
    starts = np.arange(0, len(wave), frame)
    if not len(starts):
        return np.zeros(0)
    return np.add.reduceat(np.square(wave, dtype=np.float64), starts) / np.minimum(frame, len(wave) - starts)


def loud_power(powers: np.ndarray) -> float:
    """The power of the loud parts: half of all the energy is in frames above it, however much silence is around them.

    Medians of five frames are taken, so that a click of a moment is not the level of a recording.
    """
    from scipy.ndimage import median_filter

    order = np.sort(median_filter(powers, 5))[::-1]
    total = np.cumsum(order)
    return float(order[np.searchsorted(total, total[-1] / 2)]) if len(order) and total[-1] > 0 else 0.0


def voiced_spans(powers: np.ndarray, loud: float) -> list[tuple[int, int]]:
    """(first, behind the last) frame of what lies between silences, with their margins."""
    sounding = powers[powers > from_db(-100)]  # digital silence says nothing of the noise
    noise = np.percentile(sounding, 5) if len(sounding) else 0.0
    threshold = loud * max(from_db(-QUIETER), min(from_db(ABOVE_NOISE) * noise / loud, from_db(-NOISY_QUIETER)))
    voiced = np.flatnonzero(powers >= threshold)
    breaks = np.flatnonzero(np.diff(voiced) > LEAST_PAUSE / LEVEL_STEP)
    firsts, lasts = voiced[np.concatenate([[0], breaks + 1])], voiced[np.concatenate([breaks, [len(voiced) - 1]])]
    margin = round(KEPT_SILENCE / LEVEL_STEP)
    return [
        (max(0, int(first) - margin), min(len(powers), int(last) + 1 + margin)) for first, last in zip(firsts, lasts, strict=True)
    ]


def divide(spans: list[tuple[int, int]], powers: np.ndarray) -> list[tuple[int, int]]:
    """The spans (in frames); those longer than LONGEST_PART in parts about alike, cut at quiet places. Nothing is lost."""
    shift, parts = round(PART_SHIFT / LEVEL_STEP), []
    for first, last in spans:
        number = -int(-(last - first) * LEVEL_STEP // LONGEST_PART)
        ends = [first]
        for place in np.linspace(first, last, number + 1)[1:-1].round().astype(int):
            ends.append(int(place - shift + powers[place - shift : place + shift + 1].argmin()))
        parts += zip(ends, [*ends[1:], last], strict=True)
    return parts


# ---- the pieces --------------------------------------------------------------------------------------------------------


def cut_blocks(blocks: Iterable[Sound], plan: Plan) -> Iterator[Piece]:
    """The pieces of a plan out of the blocks that it was made of."""
    high_pass, spans = HighPass(plan.rate), iter(plan.spans)
    span, place, raw, clean = next(spans, None), 0, [], []
    for block in blocks:
        filtered = high_pass(block.wave)
        while span:
            inside = slice(max(0, span[0] - place), max(0, span[1] - place))
            raw.append(block.wave[inside])
            clean.append(filtered[inside])
            if span[1] > place + len(filtered):
                break
            start, stop = (edge / plan.rate for edge in span)
            yield Piece(start, stop, at_level(np.concatenate(clean)), measures(np.concatenate(raw), plan.rate))
            span, raw, clean = next(spans, None), [], []
        place += len(filtered)


def at_level(wave: np.ndarray) -> np.ndarray:
    """RVC's loudness: three quarters of the way to a peak of 0.9, whatever the level was; a peak of 1.0 comes to 0.925."""
    peak = float(np.abs(wave).max(initial=0))
    wave = wave / np.float32(max(1.0, peak))  # what the high-pass made of a clipped recording may be above
    return wave * np.float32(0.9 * 0.75 / max(min(peak, 1.0), 1e-9) + 0.25)


# ---- numbers -----------------------------------------------------------------------------------------------------------


def measures(wave: np.ndarray, rate: int) -> dict[str, float]:
    """What a recording (n,) is like. Levels in dB of full scale.

    seconds; rms, peak, dc: of the samples; clipped: share of samples on a flat top; level: of the loud parts; noise: what lies
    between the partials of the voice and in its pauses, over all frequencies; snr: level of the rest above it, at most 100 dB;
    bandwidth: Hz, below which all lies that is less than 75 dB under the strongest part of the spectrum.
    """
    wave = np.asarray(wave, np.float64)
    power = float(np.square(wave).mean()) if len(wave) else 0.0
    spectra, width = spectra_of(wave, rate)
    noise, total = noise_power(spectra), float(spectra.sum(axis=1).max(initial=0))
    mean = spectra.mean(axis=0)
    above = np.flatnonzero(mean > mean.max(initial=0) * from_db(-75))
    loud = loud_power(frame_powers(wave, rate))
    return {
        "seconds": len(wave) / rate,
        "rms": power**0.5,
        "peak": float(np.abs(wave).max(initial=0)),
        "dc": float(wave.mean()) if len(wave) else 0.0,
        "clipped": clipped_share(wave),
        "level": to_db(loud),
        "noise": to_db(noise),
        "snr": min(100.0, to_db(max(0.0, loud - noise)) - to_db(noise)) if total else 0.0,
        "bandwidth": float(above[-1] * width) if len(above) else 0.0,
    }


def join_measures(parts: list[dict]) -> dict[str, float]:
    """The measures of several waves as of one: peaks and bandwidth are the largest, the rest is weighted by seconds."""
    if not parts:
        return {}
    seconds = np.array([part["seconds"] for part in parts])
    weights = seconds / max(seconds.sum(), 1e-9)
    joined = {name: float(weights @ [part[name] for part in parts]) for name in ("dc", "clipped")}
    joined |= {name: to_db(float(weights @ [from_db(part[name]) for part in parts])) for name in ("level", "noise")}
    joined["rms"] = float(weights @ [part["rms"] ** 2 for part in parts]) ** 0.5
    joined |= {name: max(part[name] for part in parts) for name in ("peak", "bandwidth")}
    joined["snr"] = float(np.average([part["snr"] for part in parts], weights=weights))
    return {"seconds": float(seconds.sum())} | joined


def clipped_share(wave: np.ndarray) -> float:
    """Share of the samples that stand at the top or bottom with both their neighbours, as only a limit makes them.

    Relative to the wave's own extremes: what was clipped may have been turned down since.
    """
    if not len(wave) or wave.min() == wave.max():
        return 0.0
    near = (wave.max() - wave.min()) * 1e-4
    stuck = [wave >= wave.max() - near, wave <= wave.min() + near]
    return float(sum((at[1:-1] & at[:-2] & at[2:]).sum() for at in stuck)) / len(wave)


def spectra_of(wave: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """(power spectra (frames, bins), Hz from bin to bin) of about 0.1 s each, at most 600; a row sums to its mean square."""
    size = 2 ** round(np.log2(rate / 10))
    wave = np.pad(wave, (0, max(0, size - len(wave))))
    hop = max(size // 2, len(wave) // 600)
    window = np.hanning(size)
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[::hop] * window
    return 2 * np.abs(np.fft.rfft(frames)) ** 2 / (size * np.square(window).sum()), rate / size


def in_bands(spectra: np.ndarray) -> np.ndarray:
    """Spectra (frames, bins) as (frames, bands, 16 bins); what is left over above is dropped."""
    return spectra[:, : spectra.shape[1] // 16 * 16].reshape(len(spectra), -1, 16)


def noise_power(spectra: np.ndarray) -> float:
    """The power of steady noise in spectra (frames, bins), however loud a voice is above it.

    In each band the bins between partials, and of these the quieter frames: of noise a fifth of all bins lies below 0.22 of its
    mean, by which it is known from them. Frames of digital silence say nothing.
    """
    sounding = spectra[spectra.sum(axis=1) > from_db(-100)]
    if not len(sounding):
        return 0.0
    between = np.percentile(in_bands(sounding), 20, axis=2) / -np.log(0.8)
    return float(16 * np.percentile(between, 30, axis=0).sum())


def local_flatness(wave: np.ndarray, rate: int) -> float:
    """How much like noise a sound below 4 kHz is where it is least so: a tenth of its frames are less.

    Of a frame: geometric mean of the bins of a band by their arithmetic mean, over all bands by their power.
    """
    spectra, width = spectra_of(wave, rate)
    parts = in_bands(spectra[:, int(100 / width) : int(4000 / width)]) + 1e-30
    flat = np.exp(np.log(parts).mean(axis=2)) / parts.mean(axis=2)
    return float(np.percentile(np.average(flat, axis=1, weights=parts.sum(axis=2)), 10))


def to_db(power: float) -> float:
    return 10 * float(np.log10(max(power, 1e-20)))


def from_db(level: float) -> float:
    return 10 ** (level / 10)
