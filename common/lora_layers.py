"""LoRA's layers: a frozen layer beside a trained update of low rank, y = W x + (alpha / r) B A x (arXiv 2106.09685).

PEFT 0.21 trains what it covers well. These are for what it has no exact answer to (tests/test_lora.py shows each):
- a dilated Conv1d crashes in its first forward pass, for A is built without the dilation; other padding modes than zeros are
  lost in the same way, without a crash;
- grouped convolutions get an A across all groups, which no grouped weight can take: they cannot be merged;
- ConvTranspose1d has no LoRA layer;
- merging into a layer under weight_norm loses the update in silence: the weight is computed anew from g and v.
"""

import math

import torch
from torch import nn
from torch.nn.functional import embedding
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from common.config import UserError
from common.fast_lora import conv_pays, lora_conv, lora_linear


class LoRALayer(nn.Module):
    """base_layer(x) + (alpha / r) B(A(dropout(x))), with A and B alone to train.

    A starts Kaiming-uniform (a = sqrt 5, as layers of torch do), B at zero: the start is the base, bit for bit. Both are fp32,
    also on a base in half precision. A layer type of your own says how to build the pair and what its product is in the
    shape of the base's weight (`make_pair`, `product`); lora_A.weight has r * groups rows. r is not capped by the layer's
    own rank, so that the number of parameters is the formula's.
    """

    def __init__(self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.groups = getattr(base_layer, "groups", 1)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.kept = {}  # the base's own parameters while the update is merged, else nothing
        self.add_pair()
        weight = base_weight(base_layer)
        for parameter in self.adapter().values():
            parameter.data = parameter.data.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def add_pair(self) -> None:
        self.lora_A, self.lora_B = self.make_pair(self.base_layer)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def make_pair(self, base) -> tuple[nn.Module, nn.Module]:
        """(A, B): modules without a bias, each with a `weight`."""
        raise NotImplementedError

    def product(self) -> torch.Tensor:
        """B A in the shape of the base's weight: (out, in / groups, kernel...). A (groups * r, ...), B (out, r, 1...)."""
        down = self.lora_A.weight.reshape(self.groups, self.r, -1)
        up = self.lora_B.weight.reshape(self.groups, -1, self.r)
        return (up @ down).reshape(base_weight(self.base_layer).shape)

    @staticmethod
    def matrix(layer, weight: torch.Tensor) -> torch.Tensor:
        """A view of such a layer's weight as (groups, out, in * kernel): what a product of B and A is."""
        groups = getattr(layer, "groups", 1)
        return weight.view(groups, weight.shape[0] // groups, -1)

    @torch.no_grad()
    def take(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Sets the pair: A from `down` (groups, r, in), B from `up` (groups, out, r), as a product of `matrix` has them."""
        self.lora_A.weight.copy_(down.reshape(self.lora_A.weight.shape))
        self.lora_B.weight.copy_(up.reshape(self.lora_B.weight.shape))

    def branch(self, x, *args, **kwargs):
        """The update's share of the output."""
        hidden = self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype)))
        return self.lora_B(hidden * self.scaling, *args, **kwargs)

    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        return y if self.kept else (y + self.branch(x, *args, **kwargs)).to(y.dtype)

    def goes_fast(self, x) -> bool:
        """Whether a form of common/fast_lora.py may stand in: no dropout, nothing of the base to train, no hook, one dtype."""
        base, dropout = self.base_layer, self.training and isinstance(self.lora_dropout, nn.Dropout)
        hooks = base._forward_pre_hooks or base._forward_hooks or base._backward_hooks or base._backward_pre_hooks
        one_dtype = x.dtype == self.lora_A.weight.dtype or torch.is_autocast_enabled(x.device.type)
        return one_dtype and not (self.kept or dropout or hooks or any(p.requires_grad for p in base.parameters()))

    def parts(self) -> tuple:
        """(W, bias, A, B, alpha / r), as common/fast_lora.py takes them."""
        return self.base_layer.weight, self.base_layer.bias, self.lora_A.weight, self.lora_B.weight, self.scaling

    def adapter(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters by name: lora_A.weight, lora_B.weight."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the update in it: code that reads it instead of calling the layer is adapted, too."""
        weight = base_weight(self.base_layer)
        return weight if self.kept else (weight + self.scaling * self.product()).to(weight.dtype)

    @property
    def bias(self):
        return self.base_layer.bias

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W + (alpha / r) B A in the base's place; under weight_norm v becomes that sum and g its norm, which is exact.

        New parameters stand in for the base's, which are kept: a weight that another layer shares stays as it is.
        """
        owner, names, dim = weight_home(self.base_layer)
        weight = self.weight
        values = (weight,)
        if dim is not None:
            norm = torch.norm_except_dim(weight, 2, dim)
            values = norm, torch.where(norm > 0, weight, getattr(owner, names[1]))  # g = 0: any direction but 0, else 0 / 0
        self.kept = {name: getattr(owner, name) for name in names}
        self.place(
            owner, dim, {name: nn.Parameter(value, requires_grad=False) for name, value in zip(names, values, strict=True)}
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base's own parameters back."""
        owner, _, dim = weight_home(self.base_layer)
        for name, parameter in self.kept.items():
            parameter.data = parameter.data.to(getattr(owner, name))  # the model may have moved meanwhile, in device or dtype
        self.place(owner, dim, self.kept)
        self.kept = {}

    def place(self, owner, dim, parameters: dict) -> None:
        for name, parameter in parameters.items():
            setattr(owner, name, parameter)
        if dim is not None and owner is self.base_layer:  # the old weight_norm keeps the last product as an attribute
            owner.weight = base_weight(owner)


class LoRALinear(LoRALayer):
    """A (r, in), B (out, r): r (in + out) parameters."""

    def make_pair(self, base):
        return nn.Linear(base.in_features, self.r, bias=False), nn.Linear(self.r, base.out_features, bias=False)

    def forward(self, x):
        return lora_linear(x, *self.parts()) if self.goes_fast(x) else super().forward(x)


class LoRAConv(LoRALayer):
    """A: the base's own convolution to r channels for each group; B: 1 x 1 to the outputs. r (in * kernel + out) parameters.

    A has the base's stride, padding (its mode, too), dilation and groups, so that B A is a convolution like the base.
    """

    def make_pair(self, base):
        kind, width = type_before_parametrizations(base), self.groups * self.r
        space = (base.kernel_size, base.stride, base.padding, base.dilation, base.groups)
        down = kind(base.in_channels, width, *space, bias=False, padding_mode=base.padding_mode)
        return down, kind(width, base.out_channels, 1, groups=base.groups, bias=False)

    def forward(self, x):
        base = self.base_layer
        numbers = isinstance(base.padding, tuple)  # not "same" or "valid"
        plain = numbers and base.padding_mode == "zeros" and base.groups == 1 and set(base.dilation) == {1}
        if plain and self.goes_fast(x) and x.dim() == base.weight.dim() and conv_pays(x, base):
            return lora_conv(x, *self.parts(), base.stride, base.padding)
        return super().forward(x)


class LoRAConv1d(LoRAConv):
    """LoRAConv of an nn.Conv1d."""


class LoRAConv2d(LoRAConv):
    """LoRAConv of an nn.Conv2d."""


class LoRAConv3d(LoRAConv):
    """LoRAConv of an nn.Conv3d."""


class LoRAConvTranspose1d(LoRALayer):
    """A: 1 x 1 to r channels for each group; B: the base's own transposed convolution. r (in + out * kernel) parameters.

    The other order, first in space, takes r (in * kernel + stride * out) multiplications for an input frame instead of
    r (in + out * kernel): 1.8 times as many in RVC's upsamplers, and as many more parameters.
    """

    def make_pair(self, base):
        width = self.groups * self.r
        space = (base.kernel_size, base.stride, base.padding, base.output_padding)
        up = nn.ConvTranspose1d(width, base.out_channels, *space, base.groups, bias=False, dilation=base.dilation)
        return nn.Conv1d(base.in_channels, width, 1, groups=base.groups, bias=False), up

    def product(self):
        """(in, out / groups, kernel), as transposed convolutions have it. A (groups * r, in / groups, 1), B (groups * r, ...)."""
        down = self.lora_A.weight.reshape(self.groups, self.r, -1).mT
        up = self.lora_B.weight.reshape(self.groups, self.r, -1)
        return (down @ up).reshape(base_weight(self.base_layer).shape)

    @staticmethod
    def matrix(layer, weight):
        """(groups, out * kernel, in) of (in, out / groups, kernel)."""
        return weight.view(layer.groups, weight.shape[0] // layer.groups, -1).mT

    def take(self, down, up):
        super().take(down, up.mT)


class LoRAEmbedding(LoRALayer):
    """A (r, rows) starts at zero and B (width, r) at random, as in PEFT: only rows that are looked up ever change."""

    def add_pair(self):
        if self.base_layer.max_norm is not None:  # it shortens the rows of W that are used, not those of W + s B A
            raise UserError("LoRA: an Embedding with max_norm changes its own weight, so it takes no adapter")
        rows, width = self.base_layer.weight.shape
        self.lora_embedding_A = nn.Parameter(torch.zeros(self.r, rows))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, self.r))

    def product(self):
        return (self.lora_embedding_B @ self.lora_embedding_A).T

    @staticmethod
    def matrix(layer, weight):
        """(1, width, rows) of (rows, width)."""
        return weight.mT[None]

    @torch.no_grad()
    def take(self, down, up):
        self.lora_embedding_A.copy_(down.view_as(self.lora_embedding_A))
        self.lora_embedding_B.copy_(up.view_as(self.lora_embedding_B))

    def branch(self, x):
        rows = embedding(x, self.lora_embedding_A.T, self.base_layer.padding_idx)  # (..., r)
        return rows * self.scaling @ self.lora_embedding_B.T


def weight_home(layer) -> tuple[nn.Module, tuple[str, ...], int | None]:
    """(module, names, dim): which parameters make a layer's weight: the weight alone, or g and v of weight_norm over dim.

    Both of torch's forms of weight_norm. UserError where the weight is computed in another way.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return layer, ("weight_g", "weight_v"), hook.dim
    if is_parametrized(layer, "weight"):
        steps = layer.parametrizations.weight
        if len(steps) == 1 and isinstance(steps[0], _WeightNorm):
            return steps, ("original0", "original1"), steps[0].dim
    elif layer._parameters.get("weight") is not None:
        return layer, ("weight",), None
    kind = type_before_parametrizations(layer).__name__
    raise UserError(f"LoRA: the weight of a {kind} is computed by something other than weight_norm, so it cannot be merged")


def base_weight(layer) -> torch.Tensor:
    """The weight that a layer computes with. The old weight_norm keeps it as an attribute that loading leaves behind."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(layer)
    return layer.weight
