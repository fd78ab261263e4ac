"""RVC's discriminator: one network hears the wave as it is, one for each period hears it folded to rows of that many samples.

The multi-period discriminator of HiFi-GAN (arXiv:2010.05646) with one of its scale discriminators (MelGAN, 1910.06711).
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from common.config import UserError
from layers import LEAK

V1_PERIODS = (2, 3, 5, 7, 11, 17)
V2_PERIODS = (2, 3, 5, 7, 11, 17, 23, 37)
SMALL_PERIODS = (2, 3, 5)  # with a width of 1/16: 0.13 M parameters instead of 71 M, for small voices
GROUP = 4  # channels of a group in the scale discriminator


class SubDiscriminator(nn.Module):
    """Convolutions that keep what each gives: (B, 1, ...) -> (scores (B, n), features: list)."""

    def __init__(self, convs, post):
        super().__init__()
        self.convs = nn.ModuleList(weight_norm(conv) for conv in convs)
        self.conv_post = weight_norm(post)

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), LEAK)
            features.append(x)
        features.append(self.conv_post(x))
        return features[-1].flatten(1), features


class ScaleDiscriminator(SubDiscriminator):
    """Hears a wave (B, 1, N)."""

    def __init__(self, width: float):
        c1, c2, c3, c4 = (scaled(channels, width) for channels in (16, 64, 256, 1024))
        strided = [(c1, c2), (c2, c3), (c3, c4), (c4, c4)]
        convs = [nn.Conv1d(1, c1, 15, padding=7)]
        convs += [nn.Conv1d(a, b, 41, stride=4, padding=20, groups=a // GROUP) for a, b in strided]
        convs += [nn.Conv1d(c4, c4, 5, padding=2)]
        super().__init__(convs, nn.Conv1d(c4, 1, 3, padding=1))


class PeriodDiscriminator(SubDiscriminator):
    """Hears a wave (B, 1, N) as a picture (B, 1, N / period, period): each column is every period-th sample."""

    def __init__(self, period: int, width: float):
        c1, c2, c3, c4 = (scaled(channels, width) for channels in (32, 128, 512, 1024))
        strided = [(1, c1), (c1, c2), (c2, c3), (c3, c4)]
        convs = [nn.Conv2d(a, b, (5, 1), stride=(3, 1), padding=(2, 0)) for a, b in strided]
        convs += [nn.Conv2d(c4, c4, (5, 1), padding=(2, 0))]
        super().__init__(convs, nn.Conv2d(c4, 1, (3, 1), padding=(1, 0)))
        self.period = period

    def forward(self, x):
        missing = -x.shape[-1] % self.period
        x = F.pad(x, (0, missing), mode="reflect" if missing < x.shape[-1] else "constant")
        return super().forward(x.unflatten(-1, (-1, self.period)))


def scaled(channels: int, width: float) -> int:
    return max(GROUP, round(channels * width / GROUP) * GROUP)


class Discriminator(nn.Module):
    """Hears waves of any length. periods: RVC v2's eight (v1 has six); width: share of the official channels, at most 1."""

    def __init__(self, periods=V2_PERIODS, width: float = 1.0):
        super().__init__()
        if not 0 < width <= 1 or not periods or not all(1 < period < 1000 for period in periods):
            raise UserError(f"discriminator: width {width} must be in 0..1 and periods {list(periods)} from 2 to 999")
        by_period = (PeriodDiscriminator(period, width) for period in periods)
        self.discriminators = nn.ModuleList([ScaleDiscriminator(width), *by_period])

    def forward(self, wave) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """wave (B, 1, N) -> (scores: a (B, n) for each network, features: a list for each). 1 is real, 0 is not."""
        scores, features = zip(*(each(wave) for each in self.discriminators), strict=True)
        return list(scores), list(features)
