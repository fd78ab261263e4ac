"""How far one sound is from another: mel-cepstral distortion, STFT distances, long-term spectrum. Waves are mono float arrays."""

from functools import cache, lru_cache

import numpy as np
import torch

from compiled import from_librosa

HIGHEST_BAND = 8000  # Hz: bands end here whatever the rate, so that voices of 16 and of 48 kHz are measured on one scale
CEPSTRAL_BANDS = 80
CEPSTRAL_ORDER = 24  # cepstral coefficients that count, from the first; c0 is the level
MEASURED_A_SECOND = 100  # per second, as F0 has
MCD_WINDOW = 0.025  # seconds: short enough that most harmonics melt into the envelope, which is what is compared
INAUDIBLE = 1e-4  # of a sound's loudest band (-80 dB): below it is nothing that one hears
STFT_RESOLUTIONS = ((0.010, 0.002), (0.025, 0.005), (0.050, 0.010))  # seconds of window and hop: Parallel WaveGAN's at 24 kHz
LONGEST_ALIGNED = 60  # seconds that are aligned in time: the table of an alignment grows with the square


@lru_cache(maxsize=4)
def band_filters(rate: int, size: int) -> torch.Tensor:
    """(CEPSTRAL_BANDS, size // 2 + 1) triangles from 0 Hz to HIGHEST_BAND."""
    mel = from_librosa("filters.mel")
    return torch.from_numpy(mel(sr=rate, n_fft=size, n_mels=CEPSTRAL_BANDS, fmax=min(HIGHEST_BAND, rate / 2)))


def stft_magnitudes(wave: np.ndarray, rate: int, window: float, hop: float) -> tuple[torch.Tensor, int]:
    """(|STFT| (size // 2 + 1, frames), FFT size): a Hann window of so many seconds, frame t around t * hop seconds."""
    wave = torch.as_tensor(np.ascontiguousarray(wave), dtype=torch.float32)
    length = round(window * rate)
    size = 2 ** int(np.ceil(np.log2(2 * length)))
    # Zeros, not a reflection, at the ends: a sound may be shorter than the half of a window.
    spectrum = torch.stft(
        wave, size, round(hop * rate), length, torch.hann_window(length), pad_mode="constant", return_complex=True
    )
    return spectrum.abs(), size


def mel_amplitudes(wave: np.ndarray, rate: int) -> np.ndarray:
    """(frames, CEPSTRAL_BANDS) amplitudes, frame t around t / MEASURED_A_SECOND seconds; none below INAUDIBLE of the loudest."""
    spectrum, size = stft_magnitudes(wave, rate, MCD_WINDOW, 1 / MEASURED_A_SECOND)
    bands = (band_filters(rate, size) @ spectrum).T.numpy().astype(np.float64)
    return np.maximum(bands, max(INAUDIBLE * bands.max(), 1e-10))


def cepstra(wave: np.ndarray, rate: int) -> np.ndarray:
    """(frames, 25) mel cepstra of the log AMPLITUDE of K bands: log A_k = c_0 + 2 sum_n c_n cos(pi n (k + 1/2) / K)."""
    from scipy.fft import dct

    return dct(np.log(mel_amplitudes(wave, rate)), norm="ortho")[:, : CEPSTRAL_ORDER + 1] / np.sqrt(2 * CEPSTRAL_BANDS)


def distortions(truth: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Mel-cepstral distortion (Kubichek 1993) of each pair of rows c0..c24, in dB: 10 / ln 10 sqrt(2 sum_1..24 (dc_n)^2).

    c0 is left out, so loudness does not count. With `cepstra` it is half the RMS difference of the spectra's shapes in dB;
    programs whose c_n hold the factor 2 of the series (SPTK's) give twice as much.
    """
    return 10 / np.log(10) * np.sqrt(2 * np.square(truth[:, 1:] - given[:, 1:]).sum(axis=1))


def aligned_rows(truth: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Pairs (n, 2) of rows of two cepstra, in time: dynamic time warping by the distance of c_1..c_24."""
    _, path = dtw()(truth[:, 1:].T, given[:, 1:].T)
    return path[::-1]


@cache
def dtw():
    return from_librosa("sequence.dtw", np.zeros((CEPSTRAL_ORDER, 2)), np.zeros((CEPSTRAL_ORDER, 3)))


def frame_distortions(truth: np.ndarray, given: np.ndarray, rate: int, counts: np.ndarray, align: bool = False) -> np.ndarray:
    """The mel-cepstral distortion, in dB, of the truth's frames that count (`counts`, bool, MEASURED_A_SECOND a second).

    truth, given: waves of one rate, cut to the shorter one; with `align` the frames are paired by time warping instead.
    """
    a, b = cepstra(truth, rate), cepstra(given, rate)
    if align:
        pairs = aligned_rows(a, b)
        pairs = pairs[pairs[:, 0] < len(counts)]
        pairs = pairs[counts[pairs[:, 0]]]
        return distortions(a[pairs[:, 0]], b[pairs[:, 1]])
    many = min(len(a), len(b), len(counts))
    return distortions(a[:many], b[:many])[counts[:many]]


def frames_that_count(f0: np.ndarray, wave: np.ndarray, rate: int) -> np.ndarray:
    """Which frames (len(f0),) are measured: the voiced ones; where none is (a whisper), those within 40 dB of the loudest."""
    if (f0 > 0).any():
        return f0 > 0
    level = mel_amplitudes(wave, rate).sum(axis=1)
    loud = np.zeros(len(f0), dtype=bool)
    loud[: len(level)] = (level > 0.01 * level.max())[: len(f0)]
    return loud


def stft_distances(truth: np.ndarray, given: np.ndarray, rate: int) -> tuple[float, float]:
    """(mean |difference| of the log magnitudes, spectral convergence |A - B| / |A|) over three resolutions; Yamamoto 2020."""
    many = min(len(truth), len(given))
    logs, convergences = [], []
    for window, hop in STFT_RESOLUTIONS:
        (a, _), (b, _) = (stft_magnitudes(wave[:many], rate, window, hop) for wave in (truth, given))
        floor = max(INAUDIBLE * float(a.max()), 1e-10)
        logs.append((a.clamp(min=floor).log() - b.clamp(min=floor).log()).abs().mean().item())
        convergences.append(((a - b).norm() / a.norm().clamp(min=1e-10)).item())
    return float(np.mean(logs)), float(np.mean(convergences))


def loudness_by_band(wave: np.ndarray, rate: int) -> np.ndarray:
    """The energy in each of the bands over all frames of a sound and, last, how many those are. Such rows add up."""
    amplitudes = mel_amplitudes(wave, rate)
    return np.append(np.square(amplitudes).sum(axis=0), len(amplitudes))


def long_term_distance(truth: np.ndarray, given: np.ndarray) -> float:
    """RMS difference, in dB, of two long-term average spectra of equal loudness; rows of `loudness_by_band`, or sums of some.

    A speaker's timbre, whatever is said; steady over ten seconds or more of speech.
    """
    decibels = [10 * np.log10(row[:-1] / row[-1]) for row in (truth, given)]
    shapes = [values - values.mean() for values in decibels]
    return float(np.sqrt(np.mean(np.square(shapes[0] - shapes[1]))))
