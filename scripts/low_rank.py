"""What a fine-tune changed in each layer, as matrices of low rank: by singular values (Eckart and Young 1936).

    changed = deltas(tuned, base)                         # {layer: its weight's change as the matrix that its LoRA sees}
    A, B = split(changed["encoder.fc1"], 8)               # the best product of rank 8
    truncate(tuned, base, {name: 8 for name in changed})  # the model, its layers no farther from the base than rank 8 allows

Works on any layer that there is a LoRA for, layers under weight_norm and a task's own among them.
"""

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from common.lora import LORA_TYPES, adaptable_layers
from common.lora_layers import base_weight, weight_home

ROUNDING = 1e-12  # of a share; what an energy of 1 leaves out is no more than that


def matrix_of(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A view of a layer's weight as the product B A: (out, in), convolutions (out, in * kernel), grouped ones (groups, ...)."""
    matrix = LORA_TYPES[type_before_parametrizations(layer)].matrix(layer, weight)
    return matrix[0] if len(matrix) == 1 else matrix


@torch.no_grad()
def deltas(tuned: nn.Module, base: nn.Module, names=None) -> dict[str, torch.Tensor]:
    """{layer: fp32 matrix tuned - base, of the shape that `matrix_of` gives}, of the layers in `names`, or of all but embeddings.

    tuned, base: plain models with the same layers, whatever the dtype; the difference is taken in float64.
    """
    old, changed = adaptable_layers(base), {}
    for name, layer in adaptable_layers(tuned).items():
        if name in names if names is not None else not isinstance(layer, nn.Embedding):
            change = base_weight(layer).double() - base_weight(old[name]).double()
            changed[name] = matrix_of(layer, change.contiguous()).float()
    return changed


def split(delta: torch.Tensor, r: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(A (r, in), B (out, r)) whose product is the nearest of rank r to a matrix (out, in); of (groups, ...) each for itself.

    r: None for all of it. Both have the square roots of the singular values, the largest first, so that neither is long and the
    other short; the first rows and columns of a pair are the pair of a lower rank.
    """
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    root = s[..., :r].sqrt()
    return (root[..., None] * vh[..., :r, :]).float(), (u[..., :r] * root[..., None, :]).float()


def energies(delta: torch.Tensor) -> torch.Tensor:
    """(k,) share of the squared length of a matrix that its best product of rank 1, 2, ... k holds; all 1 where it is zero."""
    return shares_of(torch.linalg.svdvals(delta.double()))


def shares_of(singular: torch.Tensor) -> torch.Tensor:
    """The same of singular values (k,) or (groups, k), the largest first."""
    squares = singular.double().square().reshape(-1, singular.shape[-1]).sum(0)
    return squares.cumsum(0) / squares.sum() if squares.any() else torch.ones_like(squares)


def rank_at(shares: torch.Tensor, energy: float) -> int:
    """The least rank that keeps this share (0 to 1) of a matrix's squared length. shares: of `energies`."""
    return min(int((shares < energy - ROUNDING).sum()) + 1, len(shares))


@torch.no_grad()
def truncate(model: nn.Module, base: nn.Module, ranks: dict[str, int]) -> None:
    """Sets the layers in `ranks` of a tuned model to the base's weight + their change at that rank, in place; 0: none of it."""
    set_pairs(model, base, {name: split(delta, ranks[name]) for name, delta in deltas(model, base, ranks).items()})


@torch.no_grad()
def set_pairs(model: nn.Module, base: nn.Module, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Sets layers of a model to the base's weight + B A, in place. pairs: layer -> (A, B) as of `split`."""
    layers, old = adaptable_layers(model), adaptable_layers(base)
    for name, (down, up) in pairs.items():
        weight = base_weight(old[name]).double().clone(memory_format=torch.contiguous_format)
        matrix_of(layers[name], weight).add_(up.double() @ down.double())
        set_weight(layers[name], weight)


@torch.no_grad()
def set_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Gives a layer this weight; under weight_norm g becomes its norm and v the weight itself, which is exact."""
    owner, names, dim = weight_home(layer)
    values = (weight,) if dim is None else (torch.norm_except_dim(weight, 2, dim), weight)
    for name, value in zip(names, values, strict=True):
        getattr(owner, name).copy_(value)
