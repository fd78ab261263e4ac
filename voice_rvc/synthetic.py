"""Synthetic voices: sentences of vowels, fricatives and pauses by speakers who differ in throat and larynx, with known F0.

What is said, when, and how F0 rises and falls belong to the sentence alone, so every speaker says the same sentence frame by
frame: a conversion can be compared with what the target speaker would have said. The small base was trained on all VOICES but
TARGET, the new one that the demo fine-tunes it to. Source-filter synthesis (Fant 1960): glottal pulses with a tilt and
breath, or noise for fricatives, through four formants that move; vowels after Peterson and Barney (1952).

    from synthetic import make_demo_data
    make_demo_data("data/demo")      # target/{train,val,test} and source/{val,test}: the same sentences by two known speakers
"""

from dataclasses import dataclass

import numpy as np

from common.folders import empty_folder

SAMPLE_RATE = 16000  # Hz
HOP = 160  # samples: a frame of 10 ms
SPLITS = ("train", "val", "test")
LEVEL = 0.1  # RMS of a sentence, full scale being 1

# F1 to F4 in Hz of a speaker of formant scale 1.
VOWELS = {
    "i": (280, 2250, 2900, 3500),
    "e": (430, 2050, 2650, 3500),
    "a": (750, 1300, 2500, 3450),
    "o": (480, 900, 2450, 3350),
    "u": (320, 850, 2300, 3300),
    "er": (480, 1350, 1750, 3300),
}
FRICATIVES = {"s": (5600, 1500), "sh": (3300, 1200), "f": (4500, 5000)}  # centre and width of the noise's band in Hz
BANDWIDTHS = (70, 90, 130, 200)  # of F1 to F4 in Hz


@dataclass(frozen=True)
class Speaker:
    """What makes one voice differ from another."""

    name: str
    f0: float  # median, Hz
    formants: float  # all formants are multiplied by it: 0.85 is a long throat, 1.25 a child's
    f4: float  # F4 is moved by so many Hz besides
    bandwidth: float  # of the formants, times BANDWIDTHS: a damped or a ringing throat
    tilt: float  # 0 to 1, pole of the low-pass after the glottis: bright to dull
    open_quotient: float  # share of a period in which the glottis is open: pressed to lax
    breath: float  # noise at the glottis, beside the pulses' own level


VOICES = {
    # name: the other fields of Speaker
    "ash": (105, 0.96, 0, 1.0, 0.45, 0.55, 0.02),
    "birch": (205, 1.15, 100, 1.0, 0.55, 0.65, 0.06),
    "cedar": (130, 1.00, -150, 1.3, 0.30, 0.50, 0.03),
    "elm": (240, 1.22, 200, 1.2, 0.65, 0.70, 0.10),
    "fir": (90, 0.98, 150, 0.8, 0.60, 0.45, 0.01),
    "hazel": (180, 1.08, -100, 1.5, 0.40, 0.60, 0.12),
    "larch": (150, 1.05, 250, 0.9, 0.20, 0.42, 0.02),
    "maple": (220, 1.12, -200, 0.8, 0.70, 0.55, 0.04),
    "rowan": (165, 0.84, 100, 1.25, 0.75, 0.78, 0.15),  # a throat longer than all others', lax and breathy
}
TARGET = "rowan"  # the others are the base's
DEMO_SOURCES = ("birch", "fir")  # a high and a low voice, who say the demo's held-out sentences


@dataclass(frozen=True)
class Sentence:
    """What all speakers share; T frames of 10 ms."""

    formants: np.ndarray  # (T, 4) Hz, at formant scale 1
    voice: np.ndarray  # (T,) level of the glottis, 0 where it is silent
    noise: np.ndarray  # (T,) level of the friction noise
    band: np.ndarray  # (T, 2) its centre and width in Hz
    contour: np.ndarray  # (T,) F0 as a factor of the speaker's median
    voiced: np.ndarray  # (T,) bool


def speakers(*names) -> list[Speaker]:
    """The speakers of these names; without names all those of the base."""
    return [Speaker(name, *VOICES[name]) for name in names or [name for name in VOICES if name != TARGET]]


def make_demo_data(folder, seed=0, train=12, val=4, test=20, sources=6):
    """Writes `target/{split}/{split}_001.wav` and `source/{val,test}/{speaker}_{split}_001.wav`; returns `folder`.

    16 kHz, 16 bit, about two seconds each. Files whose names end alike are the same sentence; the sources say the first `sources`
    of a split. A file depends on (seed, split, its number, its speaker) alone. FileExistsError where `folder` exists and is not
    empty.
    """
    import soundfile

    folder = empty_folder(folder)
    for split, count in zip(SPLITS, (train, val, test), strict=True):
        for number in range(1, count + 1):
            sentence, name = compose(sentence_rng(seed, split, number)), f"{split}_{number:03d}.wav"
            files = {folder / "target" / split / name: speakers(TARGET)[0]}
            if split != "train" and number <= sources:
                files |= {folder / "source" / split / f"{who.name}_{name}": who for who in speakers(*DEMO_SOURCES)}
            for path, speaker in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                wave, _ = say_sentence(sentence, speaker, sentence_rng(seed, split, number, speaker))
                soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
    return folder


def sentence_rng(seed, split, number, speaker=None):
    """The random generator of a sentence, or of one speaker's breath in it: a function of these names alone."""
    who = 0 if speaker is None else 1 + list(VOICES).index(speaker.name)
    return np.random.default_rng((seed, SPLITS.index(split), number, who))


# ---- what is said ----------------------------------------------------------------------------------------------------------


def compose(rng) -> Sentence:
    """A sentence of about 1.8 to 2.5 seconds: two or three vowels run together, then a fricative or a pause, and so on."""
    seconds, vowels, fricatives = rng.uniform(1.4, 1.8), list(VOWELS), list(FRICATIVES)
    sounds = [("pause", 0.08)]
    while sum(length for _, length in sounds) < seconds:
        run = [vowels[i] for i in rng.permutation(len(vowels))[: rng.integers(2, 4)]]
        sounds += [(vowel, rng.uniform(0.09, 0.19)) for vowel in run]
        sounds.append(
            ("pause", rng.uniform(0.05, 0.13)) if rng.uniform() < 0.3 else (rng.choice(fricatives), rng.uniform(0.07, 0.13))
        )
    sounds += [(str(rng.choice(vowels)), rng.uniform(0.15, 0.22)), ("pause", 0.08)]
    names = [name for name, length in sounds for _ in range(round(length * SAMPLE_RATE / HOP))]
    frames = len(names)
    vowel = [names[i] for i in nearest_vowel(names)]
    stress = np.repeat(rng.uniform(0.6, 1.0, frames // 20 + 1), 20)[:frames]
    time = np.arange(frames) * HOP / SAMPLE_RATE
    waves = sum(rng.uniform(0.02, 0.05) * np.sin(2 * np.pi * (rng.uniform(0.5, 2.0) * time + rng.uniform())) for _ in range(3))
    voiced = np.array([name in VOWELS for name in names])
    return Sentence(
        formants=np.exp(smooth(np.log([VOWELS[name] for name in vowel]), 9)),
        voice=smooth(voiced * smooth(stress, 15), 3) * voiced,
        noise=smooth([0.35 * (name in FRICATIVES) for name in names], 3),
        band=np.array([FRICATIVES.get(name, (4500, 5000)) for name in names], dtype=float),
        contour=(1 + waves) * np.linspace(1.08, 0.92, frames),
        voiced=voiced,
    )


def nearest_vowel(names):
    """For each frame the index of the vowel nearest in time: mouths move towards the next vowel while they hiss or rest."""
    places = np.array([i for i, name in enumerate(names) if name in VOWELS])
    return places[np.abs(np.arange(len(names))[:, None] - places).argmin(1)]


def smooth(values, frames):
    """Running mean, Hann-weighted, along the first axis; `frames` is odd, the edges go on as they are."""
    weights = np.hanning(frames + 2)[1:-1]
    values = np.asarray(values, dtype=float)
    padded = np.pad(values, [(frames // 2,) * 2] + [(0, 0)] * (values.ndim - 1), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, frames, axis=0) @ (weights / weights.sum())


# ---- how a speaker says it -------------------------------------------------------------------------------------------------


def say_sentence(sentence, speaker, rng):
    """(wave float32 (T * 160,) at 16 kHz, its F0 (T,) in Hz at the frames' middles, 0 where unvoiced)."""
    frames = len(sentence.voice)
    f0 = speaker.f0 * sentence.contour
    pulses, opening = glottis(samples_of(f0), speaker.open_quotient)
    breath = speaker.breath * rng.standard_normal(frames * HOP) * (0.3 + opening)
    throat = (pulses + breath) * samples_of(sentence.voice)
    hiss = rng.standard_normal(frames * HOP) * samples_of(sentence.noise)
    wave = filtered(throat, throat_response(sentence, speaker)) + filtered(hiss, hiss_response(sentence, speaker))
    wave *= LEVEL / np.sqrt(np.mean(wave**2))
    wave += 1e-4 * rng.standard_normal(len(wave))  # a room is never quite silent
    return np.clip(wave, -0.99, 0.99).astype(np.float32), np.where(sentence.voiced, f0, 0)


def samples_of(values):
    """(T,) at the frames' middles to (T * 160,), straight lines between."""
    return np.interp(np.arange(len(values) * HOP), (np.arange(len(values)) + 0.5) * HOP, values)


def glottis(f0, open_quotient):
    """F0 (N,) Hz -> the derivative of the air flow (N,) of deviation 1, and the opening (N,) from 0 to 1 (Rosenberg 1971).

    The flow rises as half a cosine over two thirds of the open time and falls as a quarter. Computed at four times the rate,
    for the closing is sudden.
    """
    from scipy.signal import resample_poly

    fine = 4
    phase = np.cumsum(np.repeat(f0, fine)) / (SAMPLE_RATE * fine) % 1 / open_quotient  # 1: the glottis closes
    rise = 2 / 3
    rising, falling = 0.5 * (1 - np.cos(np.pi * phase / rise)), np.cos(np.pi / 2 * (phase - rise) / (1 - rise))
    flow = np.where(phase < rise, rising, np.where(phase < 1, falling, 0))
    derivative = resample_poly(np.diff(flow, prepend=flow[:1]), 1, fine)
    return derivative / derivative.std(), flow[::fine]


FFT = 1024  # bins of the filters, of which a window of 320 samples leaves the rest for the ringing


def filtered(source, response):
    """source (T * 160,) through a filter that moves: response complex (T, 513) at the frames; by overlap-add."""
    frames, window = len(response), np.hanning(2 * HOP + 1)[:-1]  # Hann windows at half overlap add up to 1
    padded = np.pad(source, HOP // 2 + HOP)
    parts = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP][: frames + 2] * window
    parts = np.fft.irfft(np.fft.rfft(parts, FFT) * np.pad(response, ((1, 1), (0, 0)), mode="edge"), FFT)
    out = np.zeros((frames + 2) * HOP + FFT)
    for number, part in enumerate(parts):
        out[number * HOP : number * HOP + FFT] += part
    return out[HOP + HOP // 2 :][: frames * HOP]


def throat_response(sentence, speaker):
    """(T, 513): the tilt's pole and four resonators in a row (Klatt 1980)."""
    z = np.exp(-2j * np.pi * np.arange(FFT // 2 + 1) / FFT)  # a delay of one sample
    response = (1 - speaker.tilt) / (1 - speaker.tilt * z) * np.ones((len(sentence.formants), 1))
    centres = np.minimum(sentence.formants * speaker.formants + [0, 0, 0, speaker.f4], 0.47 * SAMPLE_RATE)
    for centre, width in zip(centres.T[..., None], BANDWIDTHS, strict=True):
        radius, angle = np.exp(-np.pi * width * speaker.bandwidth / SAMPLE_RATE), 2 * np.pi * centre / SAMPLE_RATE
        first, second = 2 * radius * np.cos(angle), radius**2
        response = response * (1 - first + second) / (1 - first * z + second * z**2)
    return response


def hiss_response(sentence, speaker):
    """(T, 513): one bump of noise, a little higher in a shorter mouth."""
    frequencies = np.arange(FFT // 2 + 1) * SAMPLE_RATE / FFT
    centre, width = sentence.band.T[..., None] * [[[np.sqrt(speaker.formants)]], [[1]]]
    return np.exp(-(((frequencies - centre) / width) ** 2)) + 0.05
