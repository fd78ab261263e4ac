"""Layers of the RVC synthesizer, by the names of the official checkpoints: WaveNet, attention with relative positions, ResBlocks.

Sequences are (B, channels, T); a mask is (B, 1, T), 1 within a clip and 0 on its padding. Sources: VITS (arXiv:2106.06103),
whose layers RVC v2 keeps; WaveNet (1609.03499), relative attention (1803.02155), HiFi-GAN (2010.05646).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

LEAK = 0.1  # slope of the leaky ReLUs, but for the last of the decoder
WINDOW = 10  # how far relative positions reach, in frames to either side
TILE = 2**19  # numbers that a CPU's cache holds several of in float32
# weight_norm's g and v: what torch calls them now, and how every file of RVC and Applio does. Torch's modules load both.
WEIGHT_NORM_NAMES = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}


def to_old_names(state: dict) -> dict:
    """A state dict by the names on file: weight_g and weight_v. Names that are old already stay."""
    for new, old in WEIGHT_NORM_NAMES.items():
        state = {name.removesuffix(new) + old if name.endswith(new) else name: value for name, value in state.items()}
    return state


def in_tiles(layer, x: torch.Tensor, reach: int) -> torch.Tensor:
    """layer(x) for a layer that keeps (B, C, N) and sees `reach` places to either side.

    Answering on a CPU goes piece by piece, so that a piece stays in the cache: the same numbers. ResBlocks of 40k v2 take 3.4 s
    instead of 4.7 s for 3.7 s of sound on one core, and longer sounds gain more.
    """
    size = max(TILE // x[..., 0].numel(), 4 * reach)
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[-1] <= size:
        return layer(x)
    pieces = []
    for start in range(0, x.shape[-1], size):
        before = min(start, reach)
        pieces.append(layer(x[..., start - before : start + size + reach])[..., before : before + size])
    return torch.cat(pieces, dim=-1)


def sequence_mask(lengths, frames: int) -> torch.Tensor:
    """(B,) lengths -> (B, 1, frames), 1.0 where a frame is within the clip."""
    return (torch.arange(frames, device=lengths.device) < lengths[:, None]).unsqueeze(1).float()


class ChannelNorm(nn.Module):
    """Layer normalisation over channels: (B, C, T)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.layer_norm(x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta, 1e-5).transpose(1, 2)


class WaveNet(nn.Module):
    """Gated convolutions with skip connections, told the speaker by g (B, gin, 1): (B, hidden, T) -> (B, hidden, T)."""

    def __init__(self, hidden: int, kernel: int, layers: int, gin: int):
        super().__init__()
        self.hidden, self.layers = hidden, layers
        self.cond_layer = weight_norm(nn.Conv1d(gin, 2 * hidden * layers, 1))
        self.in_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(hidden, 2 * hidden, kernel, padding=kernel // 2)) for _ in range(layers)
        )
        widths = [2 * hidden] * (layers - 1) + [hidden]  # the last layer has a skip, and nothing to go on with
        self.res_skip_layers = nn.ModuleList(weight_norm(nn.Conv1d(hidden, width, 1)) for width in widths)

    def forward(self, x, mask, g):
        total = 0
        conditions = self.cond_layer(g).chunk(self.layers, dim=1)
        for convolve, mix, condition in zip(self.in_layers, self.res_skip_layers, conditions, strict=True):
            signal, gate = (convolve(x) + condition).chunk(2, dim=1)
            mixed = mix(torch.tanh(signal) * torch.sigmoid(gate))
            if mixed.shape[1] > self.hidden:
                x = (x + mixed[:, : self.hidden]) * mask
            total = total + mixed[:, -self.hidden :]
        return total * mask


class Attention(nn.Module):
    """Multi-head self-attention. Keys and values have a learnt share for each distance up to WINDOW, the same for all heads."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, width = heads, channels // heads
        self.conv_q, self.conv_k, self.conv_v, self.conv_o = (nn.Conv1d(channels, channels, 1) for _ in range(4))
        self.emb_rel_k, self.emb_rel_v = (nn.Parameter(torch.randn(1, 2 * WINDOW + 1, width) * width**-0.5) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        for layer in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x, mask):
        frames = x.shape[-1]
        q, k, v = (
            layer(x).unflatten(1, (self.heads, -1)).transpose(2, 3) for layer in (self.conv_q, self.conv_k, self.conv_v)
        )  # (B, H, T, D)
        q = q / math.sqrt(q.shape[-1])
        # Row t of `near`: the frames within WINDOW of t. Those beyond the ends stand at an end, with a share of 0.
        near = torch.arange(frames, device=x.device)[:, None] + torch.arange(-WINDOW, WINDOW + 1, device=x.device)
        inside = (near >= 0) & (near < frames)
        near = near.clamp(0, frames - 1).expand(x.shape[0], self.heads, frames, -1)
        scores = q @ k.transpose(2, 3)
        scores = scores.scatter_add(-1, near, (q @ self.emb_rel_k.transpose(1, 2) * inside).to(scores.dtype))
        weights = scores.masked_fill(mask.unsqueeze(2) * mask.unsqueeze(-1) == 0, -1e4).softmax(-1)  # -1e4: half precision has it
        weights = self.drop(weights)
        values = weights @ v + (weights.gather(-1, near) * inside) @ self.emb_rel_v
        return self.conv_o(values.transpose(2, 3).flatten(1, 2))


class FeedForward(nn.Module):
    """Two convolutions over time with a ReLU between."""

    def __init__(self, channels: int, filters: int, kernel: int, dropout: float):
        super().__init__()
        self.conv_1 = nn.Conv1d(channels, filters, kernel, padding=kernel // 2)
        self.conv_2 = nn.Conv1d(filters, channels, kernel, padding=kernel // 2)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask):
        x = self.drop(self.conv_1(x * mask).relu())
        return self.conv_2(x * mask) * mask


class Transformer(nn.Module):
    """Layers of attention and feed-forward, each followed by its normalisation."""

    def __init__(self, channels: int, filters: int, heads: int, layers: int, kernel: int, dropout: float):
        super().__init__()
        self.attn_layers = nn.ModuleList(Attention(channels, heads, dropout) for _ in range(layers))
        self.norm_layers_1 = nn.ModuleList(ChannelNorm(channels) for _ in range(layers))
        self.ffn_layers = nn.ModuleList(FeedForward(channels, filters, kernel, dropout) for _ in range(layers))
        self.norm_layers_2 = nn.ModuleList(ChannelNorm(channels) for _ in range(layers))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask):
        x = x * mask
        layers = zip(self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2, strict=True)
        for attend, norm_1, feed, norm_2 in layers:
            x = norm_1(x + self.drop(attend(x, mask)))
            x = norm_2(x + self.drop(feed(x, mask)))
        return x * mask


def dilated_conv(channels: int, kernel: int, dilation: int) -> nn.Module:
    """A convolution under weight_norm that keeps the length."""
    return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel // 2)))


class ResBlock1(nn.Module):
    """HiFi-GAN's first kind: x + conv(conv_dilated(x)) for each dilation."""

    def __init__(self, channels: int, kernel: int, dilations):
        super().__init__()
        self.reach = sum(dilation + 1 for dilation in dilations) * (kernel // 2)  # places that it sees to either side
        self.convs1 = nn.ModuleList(dilated_conv(channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(dilated_conv(channels, kernel, 1) for _ in dilations)

    def forward(self, x):
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, LEAK)), LEAK))
        return x


class ResBlock2(nn.Module):
    """HiFi-GAN's second kind: x + conv_dilated(x) for each dilation."""

    def __init__(self, channels: int, kernel: int, dilations):
        super().__init__()
        self.reach = sum(dilations) * (kernel // 2)
        self.convs = nn.ModuleList(dilated_conv(channels, kernel, dilation) for dilation in dilations)

    def forward(self, x):
        for dilated in self.convs:
            x = x + dilated(F.leaky_relu(x, LEAK))
        return x


class Coupling(nn.Module):
    """An invertible layer: the second half of the channels is moved by what a WaveNet makes of the first half."""

    def __init__(self, channels: int, hidden: int, gin: int):
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, hidden, 1)
        self.enc = WaveNet(hidden, kernel=5, layers=3, gin=gin)
        self.post = nn.Conv1d(hidden, channels // 2, 1)
        nn.init.zeros_(self.post.weight)  # the flow starts as the identity
        nn.init.zeros_(self.post.bias)

    def forward(self, x, mask, g, reverse: bool = False):
        first, second = x.chunk(2, dim=1)
        shift = self.post(self.enc(self.pre(first) * mask, mask, g)) * mask
        second = (second - shift) * mask if reverse else shift + second * mask
        return torch.cat([first, second], dim=1)


class Flip(nn.Module):
    """Turns the order of the channels, so that the next coupling moves the other half."""

    def forward(self, x, *_, **__):
        return x.flip(1)
