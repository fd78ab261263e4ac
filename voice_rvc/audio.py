"""Sound as the rest of the task wants it: mono, float32, finite, within 1.0; from any file, of any length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# needs: soundfile, soxr
from audio_files import DECODERS, check_file
from common.checkpoint import atomic_file
from common.samples import BadFile

OFFSET = 0.01  # a mean beyond it is a fault of the recorder and taken out; what is below, a high-pass takes
LOUDEST = 2.0**32  # beyond any scale of samples (32-bit integers kept as floats reach 2^31): such a number is a fault
KEPT_NUMBERS = 2**24  # decoded numbers that are kept between the two passes over a file; of a longer one the second decodes again


@dataclass
class Sound:
    """A file's sound. wave: (n,) float32, mono, finite, within -1..1; rate: Hz; channels: how many the file has.

    notes: what was understood but is not plain, "note" or "note, detail" as for Faults. facts: "decoder"; "scale", what the
    recording was divided by to stay within 1.0; "offset" (DC), taken out; "mended", how many samples were no numbers.
    """

    wave: np.ndarray
    rate: int
    channels: int
    notes: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)


def read_audio(path) -> Sound:
    """The whole sound of a file. BadFile says what is wrong with it; UserError where the decoding library is to blame."""
    source = open_audio(path)
    return source.sound(np.concatenate(list(source.mono_blocks())))


def read_blocks(path, seconds: float) -> Iterator[Sound]:
    """What read_audio gives, in pieces of `seconds` each (the last is shorter), in memory that does not grow with the file."""
    return open_audio(path).blocks(seconds)


# ---- what a file is, before its first sample is used -------------------------------------------------------------------


@dataclass
class Source:
    """A file after its first pass: how its blocks (n, channels) become mono. kept: the blocks themselves, if they are few."""

    path: Path
    opener: Callable  # of DECODERS
    rate: int
    channels: int
    samples: int
    mix: np.ndarray  # (channels,) float32: the share of each channel in the sound
    offset: float
    scale: float
    kept: list[np.ndarray] | None
    told: int | None  # samples that the header promises
    damage: str
    notes: list[str]
    facts: dict

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def blocks(self, seconds: float) -> Iterator[Sound]:
        """The sound in pieces of `seconds` each; may be asked for several times."""
        size = max(1, round(seconds * self.rate))
        parts, held = [], 0
        for block in self.mono_blocks():
            parts, held = [*parts, block], held + len(block)
            if held >= size:
                wave = np.concatenate(parts)
                for first in range(0, held // size * size, size):
                    yield self.sound(wave[first : first + size])
                parts, held = [wave[held // size * size :]], held % size
        if held:
            yield self.sound(np.concatenate(parts))

    def mono_blocks(self) -> Iterator[np.ndarray]:
        for block in self.kept if self.kept is not None else self.decode_again():
            yield ((block @ self.mix - np.float32(self.offset)) * np.float32(1 / self.scale)).clip(-1, 1)

    def decode_again(self) -> Iterator[np.ndarray]:
        last, left = np.zeros(self.channels, np.float32), self.samples
        with self.opener(self.path) as stream:
            for block in stream.blocks:
                block, _ = mend(block, last)
                last, left = block[-1], left - len(block)
                yield block
                if left <= 0:  # where the first pass ended, at damage
                    return

    def sound(self, wave: np.ndarray) -> Sound:
        return Sound(wave, self.rate, self.channels, self.notes, self.facts)

    def is_short(self) -> bool:
        """Whether the file promises more than was decoded; 3000 samples are what encoders of mp3 put around a sound."""
        return bool(self.damage) or (self.told or 0) - self.samples > 3000


def open_audio(path) -> Source:
    """First pass over a file, with the first decoder that gives all the sound that it promises, or else most of it.

    Errors as of read_audio.
    """
    path = Path(path)
    check_file(path)
    best, fault, missing = None, None, []
    for name, opener in DECODERS.items():
        try:
            source = survey(path, name, opener)
        except ImportError:
            missing.append(name)
            continue
        except BadFile as error:
            if str(error).startswith("impossible header"):
                raise
            fault = error if fault is None or str(error).startswith("no sound in it") else fault  # it knows what the file is
            continue
        if source.told == 0:
            raise BadFile("file without a single sample")
        if best and best.told:
            source.told = round(best.told / best.rate * source.rate)
        best = source if best is None or source.seconds > best.seconds else best
        if source.samples and not source.is_short():
            break
    if best is None:
        advice = "; PyAV (pip install av) or an ffmpeg on the path reads more formats" if "PyAV" in missing else ""
        raise BadFile(f"{fault}{advice}") from fault
    if not best.samples:
        raise BadFile(best.damage or "file without a single sample")
    if best.is_short():
        promised = f" of {best.told / best.rate:.1f}" if best.told else ""
        best.notes.append(f"file with a part missing, {best.seconds:.1f}{promised} s")
    return best


def survey(path: Path, name: str, opener) -> Source:
    """The first pass by one decoder, which may end at damage, or before the first sample. ImportError: it is not installed."""
    with opener(path) as stream:
        tally, kept, damage = Tally(stream.rate, stream.channels), [], "end missing" if stream.cut else ""
        try:
            for block in stream.blocks:
                block = tally.add(block)
                if kept is not None:
                    kept.append(block)
                    kept = kept if tally.samples * stream.channels <= KEPT_NUMBERS else None
        except BadFile as error:
            damage = str(error)
    if tally.faulty > tally.samples * stream.channels / 2:
        raise BadFile("samples that are no numbers (NaN or infinity), more than half of them")
    mix, offset, scale, notes = tally.judge()
    facts = {"decoder": name, "scale": scale, "offset": offset, "mended": tally.faulty}
    return Source(
        path, opener, stream.rate, stream.channels, tally.samples, mix, offset, scale, kept, stream.told, damage, notes, facts
    )


def mend(block: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, int]:
    """(block without NaN, infinity and numbers that are no sound, how many there were); (n, channels), last: (channels,).

    A line from the sample before (last, of the block before) to the one after takes their place.
    """
    if block.min() > -LOUDEST and block.max() < LOUDEST:  # False for NaN, too
        return block, 0
    good = np.abs(block) < LOUDEST
    block = block.copy()
    for channel in range(block.shape[1]):
        places = np.flatnonzero(good[:, channel])
        values = np.concatenate([last[channel : channel + 1], block[places, channel]])
        block[:, channel] = np.interp(np.arange(len(block)), np.concatenate([[-1], places]), values)
    return block, int(good.size - good.sum())


class Tally:
    """What blocks (n, channels) of a file have in sum. Its columns: the channels, and behind several of them their mean."""

    def __init__(self, rate: int, channels: int):
        self.rate, self.channels = rate, channels
        columns = channels + (channels > 1)
        self.samples, self.faulty, self.last = 0, 0, np.zeros(channels, np.float32)
        self.sum, self.low, self.high = np.zeros(columns), np.full(columns, np.inf), np.full(columns, -np.inf)
        self.energies = []  # a row for each second or less: the mean square of each column, of what may be voice

    def add(self, block: np.ndarray) -> np.ndarray:
        """Counts the next block and gives it mended."""
        from scipy.ndimage import uniform_filter1d

        block, faulty = mend(block, self.last)
        self.last, self.samples, self.faulty = block[-1], self.samples + len(block), self.faulty + faulty
        columns = np.ascontiguousarray(block.T)  # (columns, n)
        if self.channels > 1:
            columns = np.concatenate([columns, columns.mean(axis=0, keepdims=True)])
        self.sum += columns.sum(axis=1)
        self.low, self.high = np.minimum(self.low, columns.min(axis=1)), np.maximum(self.high, columns.max(axis=1))
        if self.channels > 1:
            # Without what is slower than a voice (a film's LFE channel, rumble, an offset): the mean of 5 ms is taken out.
            heard = columns - uniform_filter1d(columns, max(2, self.rate // 200), axis=1)
            self.energies += [np.square(heard[:, at : at + self.rate]).mean(axis=1) for at in range(0, len(block), self.rate)]
        return block

    def judge(self) -> tuple[np.ndarray, float, float, list[str]]:
        """(mix, offset, scale, notes) as of a Source."""
        alone, mean_of_all = np.eye(self.channels, dtype=np.float32), np.full(self.channels, 1 / self.channels, np.float32)
        if not self.samples:
            return mean_of_all, 0.0, 1.0, []
        column, notes = self.choose_column()
        mean = float(self.sum[column] / self.samples)
        low, high = float(self.low[column]), float(self.high[column])
        offset = mean if abs(mean) > OFFSET * max(1.0, high, -low) else 0.0
        peak = max(high - offset, offset - low)
        scale = max(1.0, peak)
        if self.faulty:
            notes.append(f"samples that are no numbers (NaN or infinity), mended, {self.faulty}")
        if offset:
            notes.append(f"offset (DC), taken out, {offset:.3g}")
        if max(high, -low) > 1.25:  # decoders of lossy formats overshoot by less
            notes.append(f"peak above full scale, scaled down, {max(high, -low):.3g}")
        return [*alone, mean_of_all][column], offset, scale, notes

    def choose_column(self) -> tuple[int, list[str]]:
        """(the column that loses least loudness, moment by moment, notes): the mean, unless a channel alone keeps 4 dB more,
        or keeps all of it, and the mean does not.

        So neither do channels of opposite phase cancel out, or a delayed one take partials from the other, nor is a voice that
        only the centre has divided by six; and two people on a channel each are both kept.
        """
        if self.channels == 1:
            return 0, []
        energies = np.array(self.energies)
        loudest = energies[:, :-1].max(axis=1)
        kept = 10 * np.log10(np.clip(energies / np.maximum(loudest, 1e-30)[:, None], 1e-4, 1))  # dB, not below -40
        score = np.average(kept, axis=0, weights=loudest + 1e-30)
        best = int((score[:-1] > score[:-1].max() - 0.1).argmax())  # of channels alike the first
        if score[best] <= score[-1] + (1 if score[best] > -0.5 else 4):
            return self.channels, []
        opposite = self.channels == 2 and score[-1] < -9  # the mean of a voice and of silence has -6
        alone = "channels that weaken each other, one of them used" if score[-1] > -4 else "sound in some channels only, one used"
        what = "channels of opposite phase, one of them used" if opposite else alone
        return best, [f"{what}, number {best + 1} of {self.channels}"]


# ---- rates and writing -------------------------------------------------------------------------------------------------


def resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """A wave (n,) at another rate, (round(n * new_rate / rate),) float32, by soxr's HQ filter: level up to 0.45 of the rate."""
    if rate == new_rate or not len(wave):
        return np.asarray(wave, np.float32)
    import soxr

    size = round(len(wave) * new_rate / rate)
    made = soxr.resample(np.asarray(wave, np.float32), rate, new_rate, quality="HQ")
    return np.pad(made[:size], (0, max(0, size - len(made))))


def write_wave(path: Path, wave: np.ndarray, rate: int) -> float:
    """Writes a wave (n,) as 16-bit wav, whole or not at all; gives the scale (1.0, or less) that kept its peak within 16 bits.

    ValueError where it is not finite.
    """
    import soundfile

    wave = np.asarray(wave, np.float64)
    if not np.isfinite(wave).all():
        raise ValueError(f"{path}: the sound holds NaN or infinity and is not written")
    scale = min(1.0, 1 / max(np.abs(wave).max(initial=0), 1e-9))
    numbers = np.round(wave * scale * 32767).astype(np.int16)  # ours, for some decoders wrap what is above
    path = Path(path)
    with atomic_file(path) as aside:
        soundfile.write(aside, numbers, rate, format="WAV", subtype="PCM_16")
    return scale
