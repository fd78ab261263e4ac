"""What RVC's two models learn from, with its weights; all in float32.

The synthesizer's loss is the sum of `gen_losses`, the discriminator's is `disc_loss`. Least-squares GAN (arXiv:1611.04076),
feature matching and mel distance as in HiFi-GAN (2010.05646), KL divergence as in VITS (2106.06103).

Real and made slices are compared by mel spectrograms that are computed of the slices, alike for both, as Applio does; RVC cuts
the real one out of the whole clip's, so that the edges differ. Losses of the two, or of other floors, do not compare.
"""

import torch
from torch.nn import functional as F

from common.runtime import process_index
from spectrum import magnitudes, mel_spectrogram

BETAS = (0.8, 0.99)  # of AdamW, for both models
MEL_WEIGHT = 45.0
KL_WEIGHT = 1.0
FEATURE_WEIGHT = 2.0
STFT_WEIGHT = 10.0  # without a discriminator
STFT_SIZES = (256, 1024, 2048)  # windows in samples: from sharp in time to sharp in pitch


def real_slice(wave, out, config) -> torch.Tensor:
    """The recordings (B, T * hop) where the decoder's slices are -> (B, 1, S * hop), as `out.wave`."""
    first = out.starts[:, None] * config.hop
    return wave.gather(1, first + torch.arange(out.wave.shape[-1], device=wave.device)).unsqueeze(1)


def discriminator_loss(real_scores, fake_scores) -> torch.Tensor:
    """Sum over the networks of the mean of (1 - real)^2 + fake^2. Lists of (B, n)."""
    pairs = zip(real_scores, fake_scores, strict=True)
    return sum((1 - real.float()).square().mean() + fake.float().square().mean() for real, fake in pairs)


def adversarial_loss(fake_scores) -> torch.Tensor:
    """Sum over the networks of the mean of (1 - fake)^2."""
    return sum((1 - fake.float()).square().mean() for fake in fake_scores)


def feature_loss(real_features, fake_features) -> torch.Tensor:
    """Sum of the mean distances of all features of all networks; what the real ones give is not taught."""
    pairs = ((r, f) for rs, fs in zip(real_features, fake_features, strict=True) for r, f in zip(rs, fs, strict=True))
    return sum((real.float().detach() - fake.float()).abs().mean() for real, fake in pairs)


def kl_loss(out) -> torch.Tensor:
    """KL(posterior || prior) per frame, summed over channels, by the sample z_p. `out`: a TrainOutput.

    With several processes each weighs by its frames, so that the mean over processes is what one would get for all their clips.
    """
    m_p, logs_p, logs_q, z_p, mask = (x.float() for x in (out.m_p, out.logs_p, out.logs_q, out.z_p, out.mask))
    divergence = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p).square() * (-2 * logs_p).exp()
    frames, world = mask.sum(), process_index()[1]
    if world > 1 and torch.is_grad_enabled():
        torch.distributed.all_reduce(frames)
        frames = frames / world
    return (divergence * mask).sum() / frames


def mel_loss(fake, real, config) -> torch.Tensor:
    """Mean distance of the log mel spectrograms of two waves (B, 1, N)."""
    return F.l1_loss(*(mel_spectrogram(wave.squeeze(1), config) for wave in (fake, real)))


def stft_loss(fake, real) -> torch.Tensor:
    """Multi-resolution STFT distance of two waves (B, 1, N), averaged over windows of STFT_SIZES (arXiv:1910.11480).

    Of each the mean |difference| of the log magnitudes, and |A - B| / |A| of the magnitudes themselves: in logarithms what is
    far too loud, an offset say, has hardly a slope.
    """
    distances = []
    for size in STFT_SIZES:
        hop = min(size // 4, real.shape[-1])
        made, true = (magnitudes(wave.squeeze(1), size, hop, size) for wave in (fake, real))
        distances.append(F.l1_loss(made.log(), true.log()) + (made - true).norm() / true.norm())
    return sum(distances) / len(distances)


def gen_losses(out, real, config, critic=None) -> dict[str, torch.Tensor]:
    """The synthesizer's weighted losses by name. real: `real_slice`; critic: the discriminator, frozen; None: without a GAN.

    Where there is no discriminator to hear the texture, distances of spectrograms at several resolutions stand in for it.
    """
    losses = {"mel": MEL_WEIGHT * mel_loss(out.wave, real, config), "kl": KL_WEIGHT * kl_loss(out)}
    if critic is None:
        return {**losses, "stft": STFT_WEIGHT * stft_loss(out.wave, real)}
    with torch.no_grad():
        _, real_features = critic(real)
    scores, features = critic(out.wave)
    return {**losses, "adversarial": adversarial_loss(scores), "features": FEATURE_WEIGHT * feature_loss(real_features, features)}


def disc_loss(disc, real, fake) -> torch.Tensor:
    """The discriminator's loss on a real and a made slice (B, 1, N), which it hears as one batch. fake: detached."""
    scores, _ = disc(torch.cat([real, fake]))
    return discriminator_loss(*zip(*(score.chunk(2) for score in scores), strict=True))
