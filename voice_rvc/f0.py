"""The fundamental frequency (F0) of a voice: 100 values a second, by whichever pitch tracker is there.

Measured on twelve seconds each of ten utterances of real speech, resynthesised by WORLD with a known F0 (50 to 1100 Hz):

    method    package     RMSE      gross errors  octave errors  voiced missed  unvoiced taken  one thread, s per s
    swift     swift-f0    17 cents  0.0 %         0.0 %          8 %            1 %             0.007
    harvest   pyworld     36 cents  2.6 %         0.0 %          1 %            29 %            0.21
    dio       pyworld     26 cents  1.2 %         0.5 %          12 %           3 %             0.005
    pyin      librosa     38 cents  1.3 %         0.0 %          9 %            12 %            0.5

All four find a bass at 62 Hz, a soprano at 650 Hz and a voice in white noise at 6 dB; so the order of "auto" is BEST_FIRST.
"""

# needs: pyworld, setuptools, swift-f0, onnxruntime, torchcrepe
import importlib
import warnings
from functools import cache

import numpy as np

from common.config import UserError
from common.runtime import import_fault, say
from compiled import from_librosa

RATE_16K = 16000  # Hz: what pitch trackers and content models hear
F0_HOP = 160  # samples of it: 10 ms
PYIN = {"sr": RATE_16K, "frame_length": 1024, "hop_length": F0_HOP, "fill_na": 0.0}
F0_LOW = 50.0  # Hz: RVC's range, from a bass ...
F0_HIGH = 1100.0  # ... to a soprano
PACKAGES = {"swift": "swift_f0", "harvest": "pyworld", "pyin": "librosa", "dio": "pyworld", "crepe": "torchcrepe"}
BEST_FIRST = ("swift", "harvest", "pyin")  # what "auto" takes the first of that is there
F0_METHODS = ("auto", *PACKAGES)
# Long recordings go through a tracker in parts, so that memory does not grow with them. Both are multiples of 10 ms and of
# swift-f0's 16 ms, so that a part has the frames that the whole would have; the context is longer than any tracker looks.
F0_PART = 256 * 1280  # samples: 20.5 s
F0_CONTEXT = 12 * 1280  # 0.96 s on either side
SILENT_DB = -45.0  # below the loudest: no voice, whatever a tracker makes of it (harvest finds F0 in silence)
SILENT_AT_ALL = -69.0  # dB of full scale
LOUD_DB = -25.0  # below the loudest: frames that count for a voice's range and median


def package_of(method: str):
    """A method's package, imported when it is used; whatever it raises where it does not fit this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyworld 0.3.5 imports setuptools' pkg_resources, which is going away
        return importlib.import_module(PACKAGES[method])


def is_there(method: str) -> bool:
    """Whether a method can be used."""
    return not import_fault(PACKAGES[method])


def choose_f0(name: str) -> str:
    """The method to use: name itself, or for "auto" the best that is there. UserError where its package cannot be imported.

    Of a better one that "auto" passes over because its package is broken it is said why; one that nobody installed is no news.
    """
    if name == "auto":
        for method in BEST_FIRST:
            reason = import_fault(PACKAGES[method])
            if not reason:
                return method
            if not reason.startswith(f"{PACKAGES[method].replace('_', '-')}, which is not installed"):
                say_once(f"--f0_method auto goes without {method}, which needs {reason}")
        raise UserError(f"--f0_method auto: none can be used; {method} needs {reason}")
    if name not in PACKAGES:
        raise UserError(f"--f0_method {name}: there is {', '.join(F0_METHODS)}")
    if reason := import_fault(PACKAGES[name]):
        raise UserError(f"--f0_method {name} needs {reason}, or take auto")
    return name


@cache
def say_once(text: str) -> None:
    say(text)


def extract_f0(wave: np.ndarray, method: str, low: float = F0_LOW, high: float = F0_HIGH, loudest: float | None = None):
    """F0 in Hz, float32 (n // 160 + 1,), frame t at t * 10 ms, 0 where unvoiced; wave (n,) at 16 kHz.

    method: one of F0_METHODS. low, high: where F0 is looked for, in Hz. Frames that are silent beside `loudest` (dB of full
    scale; the wave's own loudest frame, where it is not given) are unvoiced. So is what a hum of the mains alone makes:
    50 and 60 Hz are notched out, which leaves a voice of that pitch its harmonics.
    """
    method = choose_f0(method)
    frames = len(wave) // F0_HOP + 1
    f0, levels = np.zeros(frames, np.float32), np.full(frames, -np.inf, np.float32)
    for start in range(0, frames * F0_HOP, F0_PART):
        left = max(0, start - F0_CONTEXT)
        part = without_hum(wave[left : start + F0_PART + F0_CONTEXT])
        here = slice(start // F0_HOP, min(frames, (start + F0_PART) // F0_HOP))
        own = slice((start - left) // F0_HOP, (start - left) // F0_HOP + here.stop - here.start)
        f0[here] = TRACKERS[method](part, low, high)[own]
        levels[here] = frame_levels(part)[own]
    loudest = loudest_of(levels) if loudest is None else loudest
    f0[levels < max(loudest + SILENT_DB, SILENT_AT_ALL)] = 0
    f0[~np.isfinite(f0) | (f0 < low * 0.97) | (f0 > high * 1.03)] = 0
    return f0


def without_hum(wave: np.ndarray) -> np.ndarray:
    """wave (n,) float64 without the mains' 50 and 60 Hz, and without its mean; what is shorter than 2 F0 frames is padded."""
    from scipy.signal import iirnotch, sosfiltfilt, tf2sos

    wave = np.asarray(wave, np.float64)
    wave = np.pad(wave - (wave.mean() if len(wave) else 0), (0, max(0, 2048 - len(wave))))
    for hum in (50, 60):
        wave = sosfiltfilt(tf2sos(*iirnotch(hum, 30, RATE_16K)), wave)  # forwards and backwards: no delay
    return np.ascontiguousarray(wave)


def frame_levels(wave: np.ndarray) -> np.ndarray:
    """RMS in dB of full scale of the 40 ms around each frame (n // 160 + 1,)."""
    energy = np.concatenate(([0.0], np.cumsum(np.square(wave, dtype=np.float64))))
    centres = np.arange(len(wave) // F0_HOP + 1) * F0_HOP
    first, last = np.maximum(centres - 2 * F0_HOP, 0), np.minimum(centres + 2 * F0_HOP, len(wave))
    return 10 * np.log10(np.maximum((energy[last] - energy[first]) / np.maximum(last - first, 1), 1e-12))


def loudest_of(levels: np.ndarray) -> float:
    """The highest of frame_levels (n,) that lasts: a click, of which nine frames know at most, makes no voice silent."""
    from scipy.ndimage import median_filter

    return float(median_filter(levels, 19).max(initial=SILENT_AT_ALL)) if len(levels) else SILENT_AT_ALL


# ---- trackers: wave (n,) float64 at 16 kHz, low, high -> Hz (n // 160 + 1,), 0 where unvoiced ------------------------------


def by_harvest(wave, low, high):
    """WORLD's Harvest (Morise 2017)."""
    return package_of("harvest").harvest(wave, RATE_16K, f0_floor=low, f0_ceil=high, frame_period=10.0)[0]


def by_dio(wave, low, high):
    """WORLD's DIO (Morise et al. 2009), refined by StoneMask."""
    world = package_of("dio")
    f0, times = world.dio(wave, RATE_16K, f0_floor=low, f0_ceil=high, frame_period=10.0)
    return world.stonemask(wave, f0, times, RATE_16K)


def by_pyin(wave, low, high):
    """Probabilistic YIN (Mauch and Dixon 2014); 64 ms hold three periods of 50 Hz."""
    return pyin()(wave.astype(np.float32), fmin=low, fmax=high, **PYIN)[0]


@cache
def pyin():
    return from_librosa("pyin", np.zeros(4096, np.float32), fmin=50.0, fmax=1100.0, **PYIN)


def by_swift(wave, low, high):
    """SwiftF0, a small convolutional network (Nieradzik 2025): a frame each 16 ms, brought to 10 ms along log F0."""
    found = swift_detector().detect(wave.astype(np.float32), RATE_16K, fmin=low, fmax=high)
    times = np.arange(len(wave) // F0_HOP + 1) * (F0_HOP / RATE_16K)
    voiced = found.confidence >= 0.5
    if not voiced.any():
        return np.zeros(len(times))
    nearest = np.minimum(np.round(times / found.timestamps[1]).astype(int), len(voiced) - 1)
    f0 = np.exp(np.interp(times, found.timestamps[voiced], np.log(found.pitch_hz[voiced])))
    return np.where(voiced[nearest], f0, 0)


@cache
def swift_detector():
    return package_of("swift").SwiftF0(threads=1)  # several recordings are worked on at once


def by_crepe(wave, low, high):
    """CREPE (Kim et al. 2018), the full model with Viterbi decoding."""
    import torch

    crepe = package_of("crepe")
    sound = torch.from_numpy(wave.astype(np.float32))[None]
    f0, periodicity = crepe.predict(sound, RATE_16K, F0_HOP, low, high, "full", batch_size=512, return_periodicity=True)
    return torch.where(periodicity < 0.5, 0, f0)[0].numpy()


TRACKERS = {"harvest": by_harvest, "dio": by_dio, "pyin": by_pyin, "swift": by_swift, "crepe": by_crepe}


# ---- what is made of it ----------------------------------------------------------------------------------------------------


def coarse_pitch(f0: np.ndarray) -> np.ndarray:
    """F0 in Hz as the 255 steps of RVC's pitch embedding, int64: 1 + 254 * (mel - mel(50)) / (mel(1100) - mel(50)); 1 unvoiced.

    mel(f) = 1127 ln(1 + f / 700). The range is the base's, whatever range F0 was looked for in.
    """
    low, high = (1127 * np.log1p(limit / 700) for limit in (F0_LOW, F0_HIGH))
    mel = 1127 * np.log1p(np.maximum(np.asarray(f0, np.float64), 0) / 700)
    return np.clip(np.rint(1 + 254 * (mel - low) / (high - low)), 1, 255).astype(np.int64)


def loud_f0(f0: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """The F0 values (Hz) of the voiced and loud frames, by which a voice's range and median are told; wave (n,) at 16 kHz."""
    levels = frame_levels(np.asarray(wave))[: len(f0)]
    return f0[: len(levels)][(f0[: len(levels)] > 0) & (levels > loudest_of(levels) + LOUD_DB)]
