"""Spectrograms as RVC takes them: linear magnitude for the posterior encoder, log mel for the loss. All in float32."""

from functools import lru_cache

import torch
from torch.nn import functional as F

from compiled import from_librosa

MAGNITUDE_FLOOR = 1e-6  # under the root of the magnitude, whose slope is infinite at 0; newest RVC: 2e-7
QUIETEST_MEL = 1e-5  # below it a mel band is silent; newest RVC: 2e-6. Losses are comparable where both are the same


def magnitudes(wave, n_fft: int, hop: int, win: int) -> torch.Tensor:
    """wave (B, N) -> sqrt(re^2 + im^2 + 1e-6), (B, n_fft // 2 + 1, N // hop).

    Frame t is centred on sample (t + 1/2) hop: n_fft - hop samples of reflection around, and nothing more. A wave too short to
    be reflected goes on in silence first.
    """
    with torch.autocast(wave.device.type, enabled=False):
        wave, frames = wave.float(), wave.shape[-1] // hop
        before = (n_fft - hop) // 2
        after = n_fft - hop - before
        wave = F.pad(wave, (0, max(0, after + 1 - wave.shape[-1])))
        wave = F.pad(wave.unsqueeze(1), (before, after), mode="reflect").squeeze(1)
        window = torch.hann_window(win, device=wave.device)
        spec = torch.stft(wave, n_fft, hop, win, window, center=False, return_complex=True)
        return (torch.view_as_real(spec).square().sum(-1) + MAGNITUDE_FLOOR).sqrt()[..., :frames]


def spectrogram(wave, config) -> torch.Tensor:
    """wave (B, N) at config.sample_rate -> (B, n_fft // 2 + 1, N // hop)."""
    return magnitudes(wave, config.n_fft, config.hop, config.win)


@lru_cache(maxsize=8)
def mel_filters(rate: int, n_fft: int, mels: int, device) -> torch.Tensor:
    """(mels, n_fft // 2 + 1): Slaney's triangles of equal area from 0 to half the rate."""
    mel = from_librosa("filters.mel")
    return torch.from_numpy(mel(sr=rate, n_fft=n_fft, n_mels=mels, fmin=0, fmax=None)).to(device)


def spec_to_mel(spec, config) -> torch.Tensor:
    """A linear spectrogram (B, F, T) -> its log mel (B, mels, T), natural logarithm."""
    with torch.autocast(spec.device.type, enabled=False):
        filters = mel_filters(config.sample_rate, config.n_fft, config.mels, spec.device)
        return (filters @ spec.float()).clamp(min=QUIETEST_MEL).log()


def mel_spectrogram(wave, config) -> torch.Tensor:
    """wave (B, N) -> log mel (B, mels, N // hop)."""
    return spec_to_mel(spectrogram(wave, config), config)
