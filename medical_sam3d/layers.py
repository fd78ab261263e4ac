"""What the SLAT mesh decoder is built of: positions, attention in windows, blocks of a transformer, subdividing blocks.

N voxels are coords (N, 4) int [sample, x, y, z], samples one after another, and features (N, C).
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sparse_ops import SparseConv3d, at_least_float32, group_norm_per_sample

BUCKET = 32  # windows are padded to a multiple of so many voxels


def positions(coords, width: int) -> torch.Tensor:
    """(N, width) sines and cosines of x, y, z in a third of the width each, as in arXiv:1706.03762; zeros fill up."""
    each = width // 3 // 2
    frequencies = 10000.0 ** -(torch.arange(each, device=coords.device, dtype=torch.float32) / each)
    angles = coords[:, 1:, None] * frequencies  # (N, 3, each)
    found = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(found, (0, width - found.shape[1]))


# ---- transformer ------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Which voxels attend to each other, in batches of windows that are padded to a like length.

    rows: for each batch (W, L) rows of voxels; padding is any row. filled: (W, 1, 1, L) bool. back (N,): where each voxel is in
    the batches, laid out one after another.
    """

    rows: list[torch.Tensor]
    filled: list[torch.Tensor]
    back: torch.Tensor

    @classmethod
    def of(cls, coords, size: int, shift: int) -> "Windows":
        """Windows of size^3 cells from the grid's origin on, moved by `shift` cells, for coords (N, 4)."""
        keys = (coords[:, 1:].long() + shift) // size
        keys = coords[:, 0].long() * 2**30 + (keys * keys.new_tensor([2**20, 2**10, 1])).sum(1)
        order = keys.argsort(stable=True)
        _, counts = keys[order].unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        back, rows, filled, before = torch.empty_like(order), [], [], 0
        lengths = (counts + BUCKET - 1) // BUCKET * BUCKET
        for length in lengths.unique().tolist():
            mine, offset = lengths == length, torch.arange(length, device=coords.device)
            there = offset < counts[mine, None]  # (W, L)
            place = (starts[mine, None] + offset).where(there, 0)
            rows.append(order[place])
            filled.append(there[:, None, None])
            back[order[place[there]]] = before + there.flatten().nonzero()[:, 0]
            before += there.numel()
        return cls(rows, filled, back)


class Attention(nn.Module):
    """Attention of each voxel to all voxels in its window."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x, windows: Windows):
        qkv, found = self.to_qkv(x), []
        for rows, filled in zip(windows.rows, windows.filled, strict=True):
            parts = qkv.index_select(0, rows.flatten()).view(*rows.shape, 3, self.heads, -1)
            q, k, v = parts.permute(2, 0, 3, 1, 4)  # (W, heads, L, C / heads) each
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=filled)
            found.append(y.transpose(1, 2).reshape(-1, x.shape[1]))
        everything = torch.cat(found) if found else qkv[:, : x.shape[1]]
        return self.to_out(everything.index_select(0, windows.back))


class FeedForward(nn.Module):
    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU("tanh"), nn.Linear(ratio * width, width))

    def forward(self, x):
        return self.mlp(x)


class Block(nn.Module):
    """x + attention, then + MLP, each of x normalised without weights."""

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width, ratio)

    def forward(self, x, windows: Windows):
        x = x + self.attn(plain_norm(x), windows)
        return x + self.mlp(plain_norm(x))


def plain_norm(x):
    return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=1e-6)


# ---- upsampling -------------------------------------------------------------------------------------------------------


class GroupNorm(nn.Module):
    """weight and bias (C,) of a group normalisation per sample."""

    def __init__(self, groups: int, width: int):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x, sizes):
        return group_norm_per_sample(x, sizes, self.groups, self.weight, self.bias)


class Upsample(nn.Module):
    """Each voxel becomes 8: a residual block whose convolutions run on the children, (N, c) -> (8 N, o)."""

    def __init__(self, width: int, out_width: int, groups: int):
        super().__init__()
        first, second = SparseConv3d(width, out_width), SparseConv3d(out_width, out_width)
        nn.init.zeros_(second.conv.weight)
        nn.init.zeros_(second.conv.bias)
        self.act_layers = nn.Sequential(GroupNorm(groups, width), nn.SiLU())
        self.out_layers = nn.Sequential(first, GroupNorm(groups, out_width), nn.SiLU(), second)
        self.skip_connection = SparseConv3d(width, out_width, 1)

    def forward(self, x, table, finer, sizes):
        """table (N, 27) and sizes of the N parents, finer (8 N, 27) of the children."""
        norm, act = self.act_layers
        conv, norm_out, act_out, conv_out = self.out_layers
        h = conv(act(norm(x, sizes)), table, children=True)
        h = conv_out(act_out(norm_out(h, [8 * size for size in sizes])), finer)
        return h + self.skip_connection(x, children=True)
