"""LoRA's layers as one autograd function each: the same numbers as in separate operations, in less time and memory.

y = W x + b + s B A x as separate operations passes over the output three more times, and what a framework does between them costs
more than LoRA's few multiplications. Two forms are better; which one, the shape decides. T: tokens, s: alpha / r.

fused     forward h = x A^T, y = x W^T + b, then y += s h B^T in place; backward gx = g W, then gx += (s g B) A in place.
merged    forward W' = W + s B A, y = x W'^T + b; backward gx = g W', with W' computed again (r in out products, where x W^T
          takes T in out). It pays where there are many more tokens than channels.

In both gB = s g^T h and gA = (s g B)^T x. Low precision is always fused: a small s B A would be lost in a rounded W'. Unsloth
and LoRAFusion (arXiv:2510.00206) write such backward passes, too.
"""

from contextlib import contextmanager

import torch
from torch.nn.functional import linear

# Tokens from which the merged form pays, in units of in out / (in + out): on one core, in float32, both are equal from 1 to 4
# (ViT-B, batch 2 to 8), and at 40 (96 channels, 2,000 tokens) merged takes 0.85 of a full fine-tune's time, and fused 0.95.
MERGED_FROM = 8
# Output positions from which the merged convolution pays, in units of kernel area x channels (the fewer of in and out). Below,
# PEFT's two convolutions are cheaper than the weight gradient of the whole kernel: 0.8 against 1.05 of a full fine-tune's time
# at 3 x 3, 128 channels, 3,200 positions; above, 2.3 against 1.1 at 1 x 1, 64 channels, 12,800 positions.
CONV_FROM = 12
# Up to so many channels (the fewer of in and out) it pays at any number: 1.3 against 1.9, for r channels cost nearly as much.
CONV_NARROW = 64
ALLOWED = {"merged": True}  # forms; see `unmerged`


@contextmanager
def unmerged():
    """Inside, no form adds s B A to W, even where that pays: an adapter beside its base, to hold a merged model against."""
    ALLOWED["merged"] = False
    try:
        yield
    finally:
        ALLOWED["merged"] = True


def lora_linear(x, weight, bias, lora_A, lora_B, scaling: float) -> torch.Tensor:
    """x W^T + b + scaling (x A^T) B^T.

    x (..., in), weight W (out, in), bias b (out) or None, lora_A (r, in), lora_B (out, r) -> (..., out). All of one dtype, or
    under autocast, which casts them. Weight and bias are frozen: they get no gradient. Differentiable once.
    """
    x, weight, bias, lora_A, lora_B = under_autocast(x, weight, bias, lora_A, lora_B)
    flat = x.reshape(-1, x.shape[-1])
    out_features, in_features = weight.shape
    many = flat.shape[0] * (in_features + out_features) >= MERGED_FROM * in_features * out_features
    exact = x.dtype in (torch.float32, torch.float64)
    form = MergedLinear if many and exact and ALLOWED["merged"] else FusedLinear
    return form.apply(flat, weight, bias, lora_A, lora_B, scaling).view(*x.shape[:-1], out_features)


def conv_pays(x, conv) -> bool:
    """Whether `lora_conv` is faster than two convolutions: float32 on a CPU, with few channels or many positions for them."""
    if (
        not ALLOWED["merged"]
        or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or x.dtype not in (torch.float32, torch.float64)
    ):
        return False
    positions = x.shape[0] * x.shape[2:].numel() // torch.Size(conv.stride).numel()
    kernel, channels = torch.Size(conv.kernel_size).numel(), min(conv.in_channels, conv.out_channels)
    return channels <= CONV_NARROW or positions >= CONV_FROM * kernel * channels


def lora_conv(x, weight, bias, lora_A, lora_B, scaling: float, stride, padding) -> torch.Tensor:
    """A convolution with W + scaling B A: x (N, in, ...), W (out, in, k, ...), A (r, in, k, ...), B (out, r, 1, ...).

    Ungrouped and undilated, zeros around; stride and padding: one number a dimension. Float32 or float64. The gradients of A
    and B are read off W's, at the cost of a full fine-tune: convolutions to r channels make poor use of the hardware and take
    longer where there are many positions (`conv_pays`). Weight and bias are frozen. Differentiable once.
    """
    return MergedConv.apply(x, weight, bias, lora_A, lora_B, scaling, tuple(stride), tuple(padding))


def under_autocast(*tensors):
    """The tensors as autocast would give them to a matrix product, once and for all of a layer's products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def merged_weight(weight, lora_A, lora_B, scaling):
    return torch.addmm(weight.flatten(1), lora_B.flatten(1), lora_A.flatten(1), alpha=scaling).view_as(weight)


def low_rank_gradients(ctx, g, x, down, lora_B):
    """(s B^T g^T (r, T), gA, gB); down: A x^T (r, T). The long side comes last: (r, T) products take half the time of (T, r)."""
    need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
    up = scaled_product(ctx.scaling, lora_B.t(), g.t()) if need_x or need_A else None
    grad_A = up @ x if need_A else None
    grad_B = scaled_product(ctx.scaling, down, g).t() if need_B else None
    return up, grad_A, grad_B


def scaled_product(scaling, a, b):
    """scaling a b, scaled before it is rounded: with beta=0 the first argument is not read."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


class FusedLinear(torch.autograd.Function):
    """x (T, in) -> (T, out), adding the low-rank part to the output in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        down = lora_A @ x.t()
        y = linear(x, weight, bias).addmm_(down.t(), lora_B.t(), alpha=scaling)
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        ctx.scaling = scaling
        ctx.save_for_backward(x if need_A else None, weight if need_x else None, lora_A, lora_B, down if need_B else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, lora_A, lora_B, down = ctx.saved_tensors
        up, grad_A, grad_B = low_rank_gradients(ctx, g, x, down, lora_B)
        grad_x = (g @ weight).addmm_(up.t(), lora_A) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_A, grad_B, None


class MergedLinear(torch.autograd.Function):
    """x (T, in) -> (T, out), by one product with W + s B A each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        ctx.scaling = scaling
        ctx.save_for_backward(x if need_A or need_B else None, weight if need_x else None, lora_A, lora_B)
        return linear(x, merged_weight(weight, lora_A, lora_B, scaling), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        down = lora_A @ x.t() if ctx.needs_input_grad[4] else None
        _, grad_A, grad_B = low_rank_gradients(ctx, g, x, down, lora_B)
        grad_x = g @ merged_weight(weight, lora_A, lora_B, ctx.scaling) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_A, grad_B, None


class MergedConv(torch.autograd.Function):
    """x (N, in, ...) -> (N, out, ...), by one convolution with W + s B A each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, stride, padding):
        ctx.scaling, ctx.stride, ctx.padding = scaling, stride, padding
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        merged, ones = merged_weight(weight, lora_A, lora_B, scaling), (1,) * len(stride)
        return torch.convolution(x, merged, bias, stride, padding, ones, False, (0,) * len(stride), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        merged = merged_weight(weight, lora_A, lora_B, ctx.scaling) if need_x else weight
        ones, zeros = (1,) * len(ctx.stride), (0,) * len(ctx.stride)
        grad_x, grad_W, _ = torch.ops.aten.convolution_backward(
            g, x, merged, None, ctx.stride, ctx.padding, ones, False, zeros, 1, (need_x, need_A or need_B, False)
        )
        A, B = lora_A.flatten(1), lora_B.flatten(1)
        grad_A = (B.t() @ grad_W.flatten(1)).mul_(ctx.scaling).view_as(lora_A) if need_A else None
        grad_B = (grad_W.flatten(1) @ A.t()).mul_(ctx.scaling).view_as(lora_B) if need_B else None
        return grad_x, None, None, grad_A, grad_B, None, None, None
