"""Conversion: a recording of any length -> the same words in the voice, piece by piece, without a seam.

What depends on more than its surroundings is a function of the place in the recording, never of the piece: F0, content and
the text encoder work on blocks whose bounds lie in the quietest places, with context on either side, and are cross-faded; noise
is drawn by the frame's number; the sine's phase is carried over. The rest, flow and decoder, sees a fixed number of frames to
either side (`reach`) and gets them. So a piece equals that part of the whole.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from audio import read_blocks
from common.checkpoint import atomic_file
from common.config import Range, Share, UserError, convert, field_kinds, shown
from common.runtime import progress_bar
from content import load_content
from f0 import choose_f0, coarse_pitch
from original import Original, SampleFile, moving_power, quiet_cuts, read_original, runs, silent_frames, track_f0
from synthesizer import NOISE, Excitation, source_turns
from voice_index import retrieve

BLOCK = (600, 1000)  # frames that content and text encoder take at a time: as long as the longest clips of training
HEARD = 100  # frames more that they hear on either side
FADE = 20  # frames over which one block's encoding gives way to the next's
CHUNK = 1000  # frames that the decoder makes at a time: memory and speed alone depend on it
NOISE_FRAMES = 100  # are drawn at once, by a generator of their own
LONG = 6000  # frames; above, progress is shown
READ_SECONDS = 30
SILENCE_KEPT = 50  # frames of silence that the clips of training have
ENVELOPE = 100  # frames that a volume envelope is an RMS over (RVC)
SEMITONES = Annotated[float, Range(-48, 48)]


@dataclass(frozen=True)
class Conversion:
    """How to convert. pitch: semitones up, or "auto": by what it takes to get the median F0 of the voice.

    speaker: row of the voice's speakers. f0_method: see f0.py; "": the voice's own. index: of voice_index.read_index, None
    without; index_rate: share of its content, 0.5 where that is None; protect: of that, what unvoiced frames take (RVC), 0.5
    and more: all. volume_envelope: 1 the voice's own loudness, 0 the source's (RVC's mix). noise: randomness of the latent in
    standard deviations. UserError for a number out of range.
    """

    pitch: SEMITONES | Literal["auto"] = "auto"
    speaker: Annotated[int, Range(0, 10**6)] = 0
    f0_method: str = ""
    index: object | None = None
    index_rate: Share | None = None
    protect: Annotated[float, Range(0, 0.5)] = 0.33
    volume_envelope: Share = 1.0
    noise: Annotated[float, Range(0, 2)] = NOISE
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0

    def __post_init__(self):
        for name, kind in field_kinds(type(self)).items():
            try:
                _ = name == "index" or convert(kind, getattr(self, name))
            except ValueError as error:
                raise UserError(f"{name} is {shown(getattr(self, name))}, but must be {error}") from None


@dataclass
class Converted:
    """What became of a recording. seconds: its length; rate: Hz of the result; shift: semitones up.

    scale: what the result was divided by for its peak, 1.0 where that was within full scale; loudness: dB of full scale of all
    but silence; notes: what the user should know, as of audio.Sound.
    """

    seconds: float
    rate: int
    shift: float
    scale: float
    loudness: float
    notes: list[str] = field(default_factory=list)


def convert_wave(model, voice, wave, rate: int, options: Conversion | None = None, content=None, chunk: int = CHUNK):
    """wave (n,) float32 mono at `rate` Hz -> (wave (m,) float32 within -1..1, the voice's rate), as long to 10 ms.

    model: a Synthesizer in eval mode; voice: its Voice; content: of load_content, loaded where None, never fetched. BadFile for
    a wave of no samples or with numbers that are not finite; UserError as in Conversion and where speaker is none of the voice's.
    """
    wave = np.asarray(wave, dtype=np.float32)
    original = read_original(cut_up(wave, rate))
    result, pieces = convert_original(model, voice, original, options or Conversion(), content, chunk)
    return np.concatenate(list(pieces)), result.rate


def cut_up(wave: np.ndarray, rate: int) -> Iterator[tuple[np.ndarray, int]]:
    if not (isinstance(rate, Integral) and 1000 < rate <= 10**6):
        raise UserError(f"the rate of a wave to convert is a whole number of Hz, above 1000, not {shown(rate)}")
    if wave.ndim != 1 or wave.dtype.kind != "f" or not np.isfinite(wave).all():
        raise UserError(f"a wave to convert is finite numbers of shape (n,), as floats, not {wave.dtype} of shape {wave.shape}")
    wave = wave.astype(np.float32)
    return ((wave[first : first + READ_SECONDS * rate], rate) for first in range(0, len(wave), READ_SECONDS * rate))


def convert_file(model, voice, path: Path, to: Path, options: Conversion, content=None) -> Converted:
    """Converts an audio file into another (16 bit; wav or flac by its ending), with memory that no length changes.

    The file gets its name when it is whole. BadFile where the recording cannot be read, UserError as in convert_wave.
    """
    notes = []

    def blocks():
        for sound in read_blocks(path, READ_SECONDS):
            notes[:] = sound.notes
            yield sound.wave, sound.rate

    result, pieces = convert_original(model, voice, read_original(blocks()), options, content)
    result.notes[:0] = notes
    write_pieces(to, pieces, result.rate)
    return result


def write_pieces(path: Path, pieces: Iterable[np.ndarray], rate: int) -> None:
    """Writes pieces (n,) within -1..1 as one file of 16 bits, wav or flac by the ending: whole or not at all."""
    import soundfile

    form = path.suffix[1:].upper()
    with atomic_file(path) as aside, soundfile.SoundFile(aside, "w", rate, 1, "PCM_16", format=form) as file:
        for piece in pieces:
            file.write(np.round(piece * 32767).astype(np.int16))  # ours: what is above full scale, libsndfile may wrap


@torch.inference_mode()
def convert_original(model, voice, original: Original, options: Conversion, content=None, chunk: int = CHUNK):
    """(Converted, iterator over the wave in pieces (n,) float32). The work is done before the first piece is given."""
    config, notes = model.config, []
    check_speaker(options.speaker, model, voice)
    silent = silent_frames(original.level)
    f0, shift = None, 0.0
    if config.f0:
        f0 = track_f0(original, choose_f0(options.f0_method or voice.f0_method), silent)
        shift = choose_shift(options.pitch, f0, voice, options.speaker, notes)
        f0 = f0 * 2 ** (shift / 12)
    elif options.pitch not in ("auto", 0):
        notes.append("--pitch has no effect: this voice has no F0 and speaks at a pitch of its own")
    content = content or load_content(voice.content, model.emb_g.weight.device, config.content_width, download=False)
    listen = listener(content, original)
    latents = encode(model, original, f0, silent, listen, options)
    samples, level, peaks = decode(model, latents, f0, silent, options, chunk)
    gains = envelope(original.level, level * ~silent, options.volume_envelope) * ~silent
    scale = max(1.0, float((peaks * loudest_near(gains)).max()))
    if scale > 1:
        notes.append(f"made quieter to stay within full scale, by {20 * math.log10(scale):.1f} dB")
    length = max(1, round(original.length / original.rate * config.sample_rate))
    pieces = finish(samples, gains / scale, length, config.hop)
    power = np.square(level[~silent] * gains[~silent] / scale)
    loudness_db = 10 * math.log10(max(float(power.mean()), 1e-12)) if len(power) else -120.0
    return Converted(original.seconds, config.sample_rate, shift, scale, loudness_db, notes), pieces


def check_speaker(speaker: int, model, voice) -> None:
    rows = min(model.emb_g.num_embeddings, len(voice.speakers) or model.emb_g.num_embeddings)
    if not 0 <= speaker < rows:
        names = f": {', '.join(voice.speakers[:8])}" if voice.speakers else ""
        raise UserError(f"--speaker_id {speaker} is none of this voice's, which are 0 to {rows - 1}{names}")


def choose_shift(pitch, f0: np.ndarray, voice, speaker: int, notes: list[str]) -> float:
    """Semitones up; for "auto" from the source's median F0 to the voice's, none where either is not known."""
    if pitch != "auto":
        return float(pitch)
    voiced = f0[f0 > 0]
    name = voice.speakers[speaker] if speaker < len(voice.speakers) else ""
    target = voice.f0_medians.get(name)
    if not target or not len(voiced):
        why = "the source has no voiced sound" if target else "the voice does not say at what F0 it speaks"
        notes.append(f"pitch left as it is: {why}")
        return 0.0
    return float(np.clip(12 * math.log2(target / float(np.median(voiced))), -48, 48))


# ---- content, pitch -> latent ----------------------------------------------------------------------------------------


def listener(content, original: Original):
    """A function of (first, last) frame -> content (n, C) of what lies between, at 50 Hz.

    What is normalised over an utterance is so over the whole recording, without silences longer than a clip of training has.
    """
    sounding = runs(~silent_frames(original.level, SILENCE_KEPT))
    parts = [(at, min(at + CHUNK, stop)) for start, stop in sounding for at in range(start, stop, CHUNK)]
    statistics = content.statistics(content.describe(original.wave(*part)) for part in parts)
    return lambda first, last: content(original.wave(first, last), statistics)


def encode(model, original: Original, f0, silent, listen, options: Conversion) -> Iterator[torch.Tensor]:
    """The latent (inter, frames) of the recording, block after block: noise around the text encoder's mean."""
    cuts = quiet_cuts(original.level, *BLOCK)
    ahead = None  # what the block before says of the first frames of the next, and how much it counts there
    for start, stop in zip(cuts, cuts[1:], strict=False):
        first, last = max(0, start - HEARD), min(stop + HEARD, original.frames)
        coded = encode_block(model, f0, silent, listen, options, first, last)
        mine = coded[..., start - first : stop - first].clone()
        if ahead is not None:
            fade = min(FADE, ahead.shape[-1], mine.shape[-1])
            share = (torch.arange(fade, device=mine.device) + 0.5) / fade
            mine[..., :fade] = mine[..., :fade] * share + ahead[..., :fade] * (1 - share)
        ahead = coded[..., stop - first :]
        mean, logs = mine
        latent = noise_frames(options.seed, 0, start, stop, len(mean)).to(mean)
        yield mean + logs.exp() * latent * options.noise


def encode_block(model, f0, silent, listen, options, first: int, last: int) -> torch.Tensor:
    """(2, inter, frames): mean and logarithm of the standard deviation of frames first to last; zeros where all is silent."""
    device, count = model.emb_g.weight.device, last - first
    if silent[first:last].all():
        return torch.zeros(2, model.config.inter_channels, count, device=device)
    phone = listen(first, last)
    pitch = None if f0 is None else coarse_pitch(f0[first:last])
    phone = np.repeat(draw_near(phone, options, None if f0 is None else f0[first:last:2] > 0), 2, axis=0)[:count]
    phone = torch.from_numpy(phone).to(device)[None]
    pitch = None if pitch is None else torch.from_numpy(pitch).to(device)[None]
    mask = torch.ones(1, 1, count, device=device)
    return torch.cat(model.enc_p(phone, pitch, mask))


def draw_near(phone: np.ndarray, options: Conversion, voiced) -> np.ndarray:
    """Content (n, C) with the index's share of it; of unvoiced frames, such as breath and consonants, `protect` of that."""
    rate = 0.5 if options.index_rate is None else options.index_rate
    if options.index is None or rate == 0:
        return phone
    near = retrieve(options.index, phone, rate)
    if voiced is None or options.protect >= 0.5:
        return near
    share = np.where(voiced, 1, options.protect)[:, None].astype(np.float32)
    return near * share + phone * (1 - share)


def noise_frames(seed: int, kind: int, start: int, stop: int, width: int) -> torch.Tensor:
    """Standard normal (width, frames) that is a function of seed and frame. kind: 0 for the latent, 1 for the source."""
    blocks = []
    for block in range(start // NOISE_FRAMES, -(-stop // NOISE_FRAMES)):
        words = np.random.SeedSequence((seed, kind, block)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        blocks.append(torch.randn(NOISE_FRAMES, width, generator=generator).T)
    offset = start // NOISE_FRAMES * NOISE_FRAMES
    return torch.cat(blocks, dim=1)[:, start - offset : stop - offset]


# ---- latent, F0 -> wave ----------------------------------------------------------------------------------------------


def reach(config) -> int:
    """Frames to either side that a frame of the wave depends on, through flow and decoder.

    Layers of kernel k and dilation d see d (k - 1) / 2 places to either side, at the rate of their stage.
    """
    flow = 4 * 3 * 2  # couplings, layers in each, places that a kernel of 5 sees
    places, rate = 3.0, 1  # of conv_pre; places in a frame. The source joins later and sees no further
    for up, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
        places += math.ceil(kernel / up) / rate
        rate *= up
        inner = 1 if config.resblock == "1" else 0  # ResBlock1 has a second convolution without dilation after each
        pairs = zip(config.resblock_kernels, config.resblock_dilations, strict=True)
        places += max(sum(d + inner for d in dilations) * (size - 1) // 2 for size, dilations in pairs) / rate
    return flow + math.ceil(places + 3 / rate) + 1


def decode(model, latents: Iterable[torch.Tensor], f0, silent, options: Conversion, chunk: int):
    """(samples in a SampleFile, RMS (T,) and peak (T,) of each frame); silent chunks are not computed."""
    config, frames, margin = model.config, len(silent), reach(model.config)
    turns = None if f0 is None else source_turns(torch.from_numpy(f0)[None], config.hop, config.sample_rate)[0]
    samples, level, peaks = SampleFile(), np.zeros(frames, np.float32), np.zeros(frames, np.float32)
    latents, held, held_from, held_to = iter(latents), [], 0, 0
    starts = range(0, frames, chunk)
    for start in progress_bar(starts, "converting") if frames > LONG else starts:
        stop = min(start + chunk, frames)
        first, last = max(0, start - margin), min(stop + margin, frames)
        while held_to < last:
            held.append(next(latents))
            held_to += held[-1].shape[-1]
        while held_from + held[0].shape[-1] <= first:
            held_from += held.pop(0).shape[-1]
        if silent[start:stop].all():
            samples.append(np.zeros((stop - start) * config.hop, np.float32))
            continue
        latent = torch.cat(held, dim=1)[:, first - held_from : last - held_from]
        wave = decode_chunk(model, latent, None if f0 is None else f0[first:last], turns, first, options)
        wave = wave[(start - first) * config.hop :][: (stop - start) * config.hop]
        by_frame = np.abs(wave.reshape(stop - start, config.hop))
        level[start:stop], peaks[start:stop] = np.sqrt(np.square(by_frame).mean(axis=1)), by_frame.max(axis=1)
        samples.append(wave)
    return samples, level, peaks


def decode_chunk(model, latent, f0, turns, first: int, options: Conversion) -> np.ndarray:
    """The wave (frames * hop,) of a latent (inter, frames) that begins at frame `first`."""
    device, frames, hop = latent.device, latent.shape[-1], model.config.hop
    excitation = None
    if f0 is not None:
        noise = noise_frames(options.seed, 1, first, first + frames, hop)  # (hop, frames)
        excitation = Excitation(None, noise.T.reshape(1, 1, -1).to(device), turns[first : first + 1].to(device))
        f0 = torch.from_numpy(f0).to(device)[None]
    g = model.speaker(torch.tensor([options.speaker], device=device))
    z = model.flow(latent[None], torch.ones(1, 1, frames, device=device), g, reverse=True)
    wave = model.dec(z, f0, g, excitation)[0, 0].float().cpu().numpy()
    if not np.isfinite(wave).all():
        raise UserError("the voice gives numbers that are not finite: its weights are damaged, or --precision is too low for it")
    return wave


# ---- loudness --------------------------------------------------------------------------------------------------------


def envelope(source: np.ndarray, made: np.ndarray, own: float) -> np.ndarray:
    """Gain of each frame (T,) that mixes the envelopes of the source and of what was made of it: own 1, the latter's alone."""
    if own == 1:
        return np.ones(len(made))
    source, made = (np.sqrt(moving_power(level, ENVELOPE)) for level in (source, made))
    return (np.maximum(source, 1e-6) / np.maximum(made, 1e-6)) ** (1 - own)


def loudest_near(gains: np.ndarray) -> np.ndarray:
    """Of each frame and its neighbours the largest gain, for between frames gains are interpolated."""
    padded = np.pad(gains, 1, mode="edge")
    return np.max([padded[:-2], padded[1:-1], padded[2:]], axis=0)


def finish(samples: SampleFile, gains: np.ndarray, length: int, hop: int) -> Iterator[np.ndarray]:
    """The samples times the frames' gains, in pieces, `length` of them in all."""
    centres = (np.arange(len(gains)) + 0.5) * hop
    for start in range(0, length, 1000 * hop):
        stop = min(start + 1000 * hop, length)
        near = slice(max(0, start // hop - 1), stop // hop + 2)
        gain = np.interp(np.arange(start, stop) + 0.5, centres[near], gains[near])
        yield (samples.read(start, stop) * gain).astype(np.float32)
