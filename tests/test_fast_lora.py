"""The fast forms of LoRA's layers against the same in separate operations: outputs, gradients, precision, and what they keep."""

import copy

import pytest
import torch
from conftest import ROOT  # noqa: F401
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common.fast_lora import (
    CONV_FROM,
    CONV_NARROW,
    MERGED_FROM,
    FusedLinear,
    MergedLinear,
    conv_pays,
    lora_conv,
    lora_linear,
    unmerged,
)

SCALING = 1.7
FORMS = (FusedLinear, MergedLinear)
SHAPES = [(7, 24), (3, 5, 24), (2, 3, 5, 24), (24,), (0, 24), (190, 24)]  # the last one has tokens enough for the merged form


def parts(out=16, width=24, r=4, dtype=torch.float64, bias=True):
    """x's generator seeded: weight, bias, A, B; A and B train."""
    torch.manual_seed(0)
    weight = torch.randn(out, width, dtype=dtype)
    offset = torch.randn(out, dtype=dtype) if bias else None
    lora_A, lora_B = torch.randn(r, width, dtype=dtype), torch.randn(out, r, dtype=dtype)
    return weight, offset, lora_A.requires_grad_(), lora_B.requires_grad_()


def separate(x, weight, bias, lora_A, lora_B, scaling=SCALING):
    """As PEFT computes it."""
    return functional.linear(x, weight, bias) + functional.linear(functional.linear(x, lora_A), lora_B) * scaling


def gradients(function, x, *tensors):
    x = x.detach().requires_grad_()
    y = function(x, *tensors)
    torch.manual_seed(1)
    found = torch.autograd.grad(y, [x, tensors[2], tensors[3]], torch.randn(y.shape).to(y))
    return [y.detach(), *found]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_separate_operations(shape, bias):
    tensors, x = parts(bias=bias), torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(
        gradients(lambda *a: lora_linear(*a, SCALING), x, *tensors), gradients(separate, x, *tensors), strict=True
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    weight, bias, lora_A, lora_B = parts(5, 6, 2)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: form.apply(x, weight, bias, a, b, SCALING), (x, lora_A, lora_B))


def test_the_form_follows_the_shape_and_low_precision_is_always_fused():
    def form_of(tokens, width, out, dtype=torch.float32):
        tensors = parts(out, width, dtype=dtype)
        return type(lora_linear(torch.randn(tokens, width, dtype=dtype), *tensors, SCALING).grad_fn.next_functions[0][0]).__name__

    limit = MERGED_FROM * 96 // 2
    assert form_of(limit, 96, 96) == "MergedLinearBackward" and form_of(limit - 1, 96, 96) == "FusedLinearBackward"
    assert form_of(10 * limit, 96, 96, torch.bfloat16) == "FusedLinearBackward"
    with unmerged():
        assert form_of(limit, 96, 96) == "FusedLinearBackward"


@pytest.mark.parametrize("tokens", [10, 200])
@pytest.mark.parametrize("trains", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1)])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_right(trains, tokens):
    weight, bias, lora_A, lora_B = parts()
    leaves = [torch.randn(tokens, 24, dtype=torch.float64), lora_A.detach(), lora_B.detach()]
    grads = []
    for function in (lambda *a: lora_linear(*a, SCALING), separate):
        x, a, b = (leaf.clone().requires_grad_(bool(on)) for leaf, on in zip(leaves, trains, strict=True))
        y = function(x, weight, bias, a, b)
        assert y.requires_grad == any(trains)
        if any(trains):
            y.square().sum().backward()
        grads.append([x.grad, a.grad, b.grad])
    for ours, theirs, on in zip(*grads, trains, strict=True):
        assert (ours is not None) == bool(on)
        if on:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [10, 200])
def test_odd_memory_layouts_two_uses_and_accumulation(tokens):
    weight, bias, lora_A, lora_B = parts(24)
    x = torch.randn(24, tokens, dtype=torch.float64).t()  # not contiguous
    grads = []
    for function in (lambda *a: lora_linear(*a, SCALING), separate):
        for _ in range(2):  # the second backward adds to the first one's gradients
            y = function(function(x, weight, bias, lora_A, lora_B), weight.t(), bias, lora_A, lora_B)  # the layer twice in a row
            y[:, ::2].sum().backward()  # an expanded gradient
        grads.append([lora_A.grad, lora_B.grad])
        lora_A.grad = lora_B.grad = None
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [10, 200])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(tokens, reentrant):
    tensors, x = parts(), torch.randn(tokens, 24, dtype=torch.float64)
    plain = gradients(lambda *a: lora_linear(*a, SCALING), x, *tensors)
    again = gradients(lambda x, *a: checkpoint(lora_linear, x, *a, SCALING, use_reentrant=False), x, *tensors)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    if reentrant:  # torch.autograd.grad does not go through the reentrant kind, .backward does
        x = x.requires_grad_()
        checkpoint(lora_linear, x, *tensors, SCALING, use_reentrant=True).sum().backward()
        theirs = torch.autograd.grad(separate(x, *tensors).sum(), tensors[2:])
        torch.testing.assert_close([t.grad for t in tensors[2:]], list(theirs))


def test_without_gradients_nothing_is_kept():
    tensors, kept = parts(), []
    x = torch.randn(9, 24, dtype=torch.float64)
    theirs = separate(x, *tensors).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = lora_linear(x, *tensors, SCALING)
            assert not y.requires_grad and not kept
            torch.testing.assert_close(y.clone(), theirs)
        lora_linear(x, *tensors, SCALING)
    assert any(t.shape == (9, 24) for t in kept) and sum(t.shape == (16, 24) for t in kept) == 0  # no W: x needs no gradient


def test_gradients_of_gradients_are_refused_not_wrong():
    tensors = parts()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(lora_linear(x, *tensors, SCALING).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_in_low_precision_no_worse_than_separate_operations(dtype, autocast):
    """Errors against float64, outputs and gradients, over some layers; LoRA's part is small, as it is early in training."""
    errors = torch.zeros(2, 4)
    for seed in range(8):
        torch.manual_seed(seed)
        weight, bias, x = torch.randn(96, 64) / 8, torch.randn(96), torch.randn(120, 64)
        lora_A, lora_B = torch.randn(8, 64) / 8, torch.randn(96, 8) / 80
        exact = gradients(separate, x.double(), *(t.double().requires_grad_() for t in (weight, bias, lora_A, lora_B)))
        for i, function in enumerate((lambda *a: lora_linear(*a, SCALING), separate)):
            kind = torch.float32 if autocast else dtype
            tensors = [t.to(kind) for t in (weight, bias)] + [t.to(kind).requires_grad_() for t in (lora_A, lora_B)]
            with torch.autocast("cpu", dtype, enabled=autocast):
                found = gradients(function, x.to(kind), *tensors)
            assert found[0].dtype == dtype and all(g.dtype == kind for g in found[1:])
            errors[i] += torch.tensor([(f.double() - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)])
    assert (errors[0] <= 1.02 * errors[1]).all(), errors / 8


def test_a_copy_on_each_side_of_ddp_sees_the_gradients_of_both(tmp_path):
    """DDP hears of a parameter's gradient where it arrives, however it was computed; one process alone shows that it does."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            weight, bias, lora_A, lora_B = parts(dtype=torch.float32)
            self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
            self.lora_A, self.lora_B = nn.Parameter(lora_A.detach()), nn.Parameter(lora_B.detach())

        def forward(self, x):
            return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, SCALING)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/sync", rank=0, world_size=1)
    try:
        alone = Layer()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        seen = []
        wrapped.register_comm_hook(None, lambda _, bucket: seen.append(bucket.parameters()) or bucket_as_it_is(bucket))
        x = torch.randn(8, 24)
        for model in (alone, wrapped):
            model(x).square().sum().backward()
        assert len([p for bucket in seen for p in bucket]) == 2
        for mine, theirs in zip(alone.parameters(), wrapped.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def bucket_as_it_is(bucket):
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


# ---- convolutions ----------------------------------------------------------------------------------------------------


CONVOLUTIONS = [
    nn.Conv1d(5, 6, 3, padding=1),
    nn.Conv2d(5, 6, 1, bias=False),
    nn.Conv2d(5, 6, 3, stride=2, padding=1),
    nn.Conv2d(5, 6, (3, 1), padding=(1, 0)),
    nn.Conv3d(3, 4, 2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=lambda c: f"{type(c).__name__}-{c.kernel_size}")
def test_convolutions_equal_two_of_them(conv):
    torch.manual_seed(0)
    conv = copy.deepcopy(conv).double().requires_grad_(False)
    dims = conv.weight.ndim - 2
    lora_A = torch.randn(2, *conv.weight.shape[1:], dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(conv.out_channels, 2, *[1] * dims, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, conv.in_channels, *[5] * dims, dtype=torch.float64, requires_grad=True)
    op = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

    def two(x, a, b):
        return conv(x) + op(op(x, a, None, conv.stride, conv.padding), b) * SCALING

    def one(x, a, b):
        return lora_conv(x, conv.weight, conv.bias, a, b, SCALING, conv.stride, conv.padding)

    torch.testing.assert_close(one(x, lora_A, lora_B), two(x, lora_A, lora_B))
    assert torch.autograd.gradcheck(one, (x, lora_A, lora_B))
    for alone in range(3):  # one of the three needs a gradient
        leaves = [t.detach().requires_grad_(i == alone) for i, t in enumerate((x, lora_A, lora_B))]
        ours, theirs = (torch.autograd.grad(f(*leaves).sum(), leaves[alone])[0] for f in (one, two))
        torch.testing.assert_close(ours, theirs)


def test_convolutions_are_merged_where_they_are_narrow_or_have_many_positions_in_float32():
    conv = nn.Conv2d(2 * CONV_NARROW, 3 * CONV_NARROW, 3, stride=2, padding=1)
    side = 2 * int((CONV_FROM * 9 * 2 * CONV_NARROW) ** 0.5 + 1)

    def pays(side, conv=conv, dtype=torch.float32):
        return conv_pays(torch.empty(1, conv.in_channels, side, side, dtype=dtype), conv)

    assert pays(side) and not pays(side // 2) and not pays(side, dtype=torch.bfloat16)
    assert pays(4, nn.Conv2d(CONV_NARROW, 512, 3)) and not pays(4, nn.Conv2d(CONV_NARROW + 1, 512, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(side)
    with unmerged():
        assert not pays(side)
    assert pays(side)
