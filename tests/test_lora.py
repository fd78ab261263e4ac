"""Our own LoRA layers: against PEFT's, against the dense update that they stand for, merged, saved, swapped and attacked."""

import json
import math
import shutil
import warnings
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common import lora_layers
from common.config import UserError
from common.lora import (
    ADAPTER_FILE,
    LORA_TYPES,
    LoRAConfig,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRALayer,
    LoRALinear,
    adapted_layers,
    count_parameters,
    describe_lora,
    freeze_base_params,
    inject_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    register_lora_layer,
    remove_lora,
    unmerge_lora,
)
from common.lora_files import ADAPTER_CONFIG, load_adapter, save_adapter


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


NORMS = {"plain": lambda layer: layer, "old": old_weight_norm, "new": nn.utils.parametrizations.weight_norm}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


class Toy(nn.Module):
    """A small voice: an embedding, convolutions plain, dilated and grouped, an upsampler, linear layers. 90,560 parameters."""

    def __init__(self, norm=NORMS["plain"]):
        super().__init__()
        self.speaker = nn.Embedding(10, 64)
        self.conv = norm(nn.Conv1d(16, 64, 5, padding=2))
        self.blocks = nn.ModuleList(norm(nn.Conv1d(64, 64, 3, padding=d, dilation=d)) for d in (1, 3))
        self.grouped = norm(nn.Conv1d(64, 64, 5, padding=2, groups=4))
        self.up = norm(nn.ConvTranspose1d(64, 32, 8, stride=4, padding=2))
        self.fc = nn.Linear(32, 244)
        self.head = nn.Linear(244, 124)

    def forward(self, x):  # (batch, 16, time) -> (batch, 4 time, 124)
        h = self.conv(x) + self.speaker(torch.arange(len(x)))[:, :, None]
        for block in self.blocks:
            h = h + block(torch.tanh(h))
        h = self.up(self.grouped(h))
        return self.head(torch.tanh(self.fc(h.mT)))


ALL = ["speaker", "conv", "blocks", "grouped", "up", "fc"]


def toy(norm=NORMS["plain"], seed=0) -> Toy:
    torch.manual_seed(seed)
    return Toy(norm)


def shake(model, seed=1):
    """As after training: no update is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(norm=NORMS["plain"], **options) -> Toy:
    model = toy(norm)
    inject_lora(model, LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **options}))
    return shake(model)


def signal(batch=2, seed=2):
    return torch.randn(batch, 16, 12, generator=torch.Generator().manual_seed(seed))


def output(model):
    with torch.no_grad():
        return model(signal())


def bits(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def distance(one, two) -> float:
    """The largest difference, as a share of the largest value."""
    return ((one - two).abs().max() / two.abs().max()).item()


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- the layers ---------------------------------------------------------------------------------------------------------

PEFT_LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 5, stride=2, padding=1), (3, 12, 17)),
    "conv1d same": (lambda: nn.Conv1d(12, 20, 5, padding="same"), (3, 12, 17)),
    "conv2d": (lambda: nn.Conv2d(12, 20, (3, 5), stride=(1, 2), padding=(2, 1)), (3, 12, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 7)),
    "embedding": (lambda: nn.Embedding(30, 8, padding_idx=2), None),
}


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def peft_of(layer, **options):
    from peft import LoraConfig, get_peft_model

    with quiet():
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "init_lora_weights": False, **options})
        return get_peft_model(One(layer), config)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make, shape", PEFT_LAYERS.values(), ids=PEFT_LAYERS)
def test_forward_and_gradients_are_those_of_peft(make, shape, rslora):
    from peft import get_peft_model_state_dict

    torch.manual_seed(0)
    layer = make()
    x = torch.randn(shape) if shape else torch.randint(0, 30, (3, 7))
    theirs = peft_of(make(), use_rslora=rslora)
    theirs.base_model.model.layer.base_layer.load_state_dict(layer.state_dict())
    ours = One(layer)
    inject_lora(ours, LoRAConfig(r=4, lora_alpha=8, target_modules=["layer"], use_rslora=rslora))
    assert not load_lora_state_dict(ours, get_peft_model_state_dict(theirs))
    results = []
    for model in (ours, theirs):
        y = model(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        gradients = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        results.append((y, [grad for _, grad in sorted(gradients)]))
    (y, gradients), (y_peft, gradients_peft) = results
    assert distance(y, y_peft) < 1e-6
    assert len(gradients) == len(gradients_peft) == 2
    for own, theirs in zip(gradients, gradients_peft, strict=True):
        assert own.abs().max() > 0 and distance(own, theirs) < 2e-6


def test_what_peft_cannot_do_is_still_so():
    """The reasons for layers of our own, in the docstring of common/lora_layers.py: when PEFT mends one, this says so."""
    x = torch.randn(2, 8, 32)
    with pytest.raises(RuntimeError, match="must match"):
        peft_of(nn.Conv1d(8, 8, 3, padding=3, dilation=3))(x)
    with pytest.raises(ValueError, match="not supported"):
        peft_of(nn.ConvTranspose1d(8, 8, 4))
    with pytest.raises(NotImplementedError):
        peft_of(nn.Conv1d(8, 8, 3, groups=2)).merge_and_unload()
    losses = [old_weight_norm(nn.Conv1d(8, 8, 3)), NORMS["new"](nn.Conv1d(8, 8, 3))]
    for layer in [*losses, nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")]:
        model = peft_of(layer)
        with torch.no_grad():
            before = model(x)
            assert (model.merge_and_unload()(x) - before).abs().max() > 0.1


def dense_update(layer) -> torch.Tensor:
    """(alpha / r) B A, written as sums over the rank for each group."""
    A, B, r, g = layer.lora_A.weight, layer.lora_B.weight, layer.r, layer.groups
    parts = []
    for group in range(g):
        down = A[group * r : (group + 1) * r]  # (r, in / g, kernel or 1)
        if isinstance(layer, LoRAConvTranspose1d):
            parts.append(torch.einsum("pi,pok->iok", down[..., 0], B[group * r : (group + 1) * r]))
        else:
            out = B.shape[0] // g
            up = B[group * out : (group + 1) * out].flatten(1)  # (out / g, r)
            parts.append(torch.einsum("op,p...->o...", up, down))
    return layer.scaling * torch.cat(parts)


def check_against_dense(base, kind, x, **options):
    """The layer's output is the base's with W + dense_update, and so is the merged one's; gradients reach both matrices."""
    layer = shake(kind(base, 3, 5).double())
    plain = base.weight.detach().clone()
    y = layer(x, **options)
    base.weight = nn.Parameter(plain + dense_update(layer).detach())
    expected = base(x, **options)
    base.weight = nn.Parameter(plain, requires_grad=False)
    assert distance(y, expected) < 1e-12
    y.square().sum().backward()
    for matrix in (layer.lora_A.weight, layer.lora_B.weight):
        taps = matrix.grad.flatten(2).abs().amax((0, 1)) if matrix.dim() > 2 else matrix.grad.abs().amax()
        assert (taps > 0).all(), "a tap of the kernel learns nothing"
    layer.merge()
    assert distance(layer(x, **options), expected) < 1e-12
    layer.unmerge()
    assert torch.equal(base.weight, plain)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride, padding, output_padding", [(1, 0, 0), (2, 1, 1), (3, 2, 0), (4, 2, 2), (10, 3, 0)])
def test_transposed_convolution_is_the_dense_update(stride, padding, output_padding, dilation, groups):
    torch.manual_seed(0)
    space = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation, groups=groups)
    base = nn.ConvTranspose1d(8, 6, 16 if stride == 10 else 5, **space).double()
    check_against_dense(base, LoRAConvTranspose1d, torch.randn(2, 8, 9).double())


def test_transposed_convolution_takes_an_output_size():
    torch.manual_seed(0)
    base = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1).double()
    check_against_dense(base, LoRAConvTranspose1d, torch.randn(2, 8, 9).double(), output_size=[19])


CONVOLUTIONS = {
    "dilated": dict(padding=3, dilation=3),
    "strided, grouped": dict(stride=4, groups=4, padding=1),
    "depthwise": dict(groups=8, padding=2, dilation=2),
    "same": dict(padding="same", dilation=2),
    "circular": dict(padding=1, padding_mode="circular"),
    "reflect, same": dict(padding="same", padding_mode="reflect"),
}


@pytest.mark.parametrize("space", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("dims, kind", [(1, LoRAConv1d), (2, LoRAConv2d), (3, LoRAConv3d)])
def test_convolutions_are_the_dense_update(dims, kind, space):
    torch.manual_seed(0)
    if dims == 3 and space.get("padding_mode") == "reflect":
        space = {**space, "padding_mode": "replicate"}
    base = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](8, 8, 3, **space).double()
    check_against_dense(base, kind, torch.randn(2, 8, *[9, 7, 8][:dims]).double())


@norms
def test_the_start_is_the_base_bit_for_bit(norm):
    model = toy(norm)
    before = output(model)
    inject_lora(model, LoRAConfig(r=4, target_modules=ALL, lora_dropout=0.5))
    assert torch.equal(output(model), before)
    first = model.conv.lora_A.weight  # Kaiming-uniform with a = sqrt 5: within 1 / sqrt(fan in)
    bound = 1 / math.sqrt(16 * 5)
    assert 0.9 * bound < first.abs().max() <= bound and not model.conv.lora_B.weight.any()


def test_dropout_acts_on_the_branch_and_in_training_only():
    model = adapted(lora_dropout=0.5)
    model.eval()
    assert torch.equal(output(model), output(model))
    assert distance(output(model), output(adapted())) < 1e-6
    model.train()
    assert not torch.equal(output(model), output(model))
    for layer in adapted_layers(model).values():
        for parameter in layer.adapter().values():
            parameter.data.zero_()
    assert torch.equal(output(model), output(model)), "the frozen layer sees its whole input"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_matrices_are_at_least_fp32_and_the_output_is_the_bases(dtype):
    model = toy().to(dtype)
    inject_lora(model, LoRAConfig(r=4, target_modules=ALL))
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in lora_parameters(model)} == {wide}
    shake(model)
    y = model(signal().to(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == wide and p.grad.abs().max() > 0 for p in lora_parameters(model))


@pytest.mark.parametrize(
    "make, kind, shape",
    [
        (lambda: nn.Linear(12, 20), LoRALinear, (2, 500, 12)),  # enough tokens for the merged form
        (lambda: nn.Linear(12, 20), LoRALinear, (12,)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 20)), LoRALinear, (3, 12)),
        (lambda: nn.Conv1d(12, 20, 3, stride=2, padding=1), LoRAConv1d, (2, 12, 3000)),
        (lambda: nn.Conv2d(12, 20, 3, padding=(1, 0), bias=False), LoRAConv2d, (2, 12, 40, 50)),
    ],
)
def test_the_fast_forms_are_used_and_change_nothing(make, kind, shape, monkeypatch):
    torch.manual_seed(0)
    layer, x = shake(kind(make(), 4, 8)), torch.randn(shape)
    used = []
    for form in ("lora_linear", "lora_conv"):
        function = getattr(lora_layers, form)
        monkeypatch.setattr(lora_layers, form, lambda *a, function=function, form=form: used.append(form) or function(*a))
    results = []
    for signal_in in (x.clone().requires_grad_(), x.clone().requires_grad_()):
        y = layer(signal_in)
        y.square().sum().backward()
        results.append([y, signal_in.grad, *(p.grad for p in layer.adapter().values())])
        layer.zero_grad()
        monkeypatch.setattr(kind, "goes_fast", lambda self, x: False)
    assert used == ["lora_linear" if kind is LoRALinear else "lora_conv"]
    assert all(distance(fast, slow) < 3e-6 for fast, slow in zip(*results, strict=True))


def test_the_fast_forms_step_aside_where_they_would_be_wrong():
    """A hook on the base is called, and a bias that someone lets train gets its gradient."""
    layer, x = shake(LoRALinear(nn.Linear(12, 20), 4, 8)), torch.randn(3, 12)
    assert layer.goes_fast(x)
    layer.base_layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((20,), 3.0))
    layer.base_layer.requires_grad_(False)
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 100)
    assert layer(x).min() > 50
    assert not layer.goes_fast(x.double())


def test_code_that_reads_the_weight_gets_the_update_and_its_gradient():
    torch.manual_seed(0)
    model = One(nn.Linear(6, 5))
    inject_lora(model, LoRAConfig(r=2))
    shake(model)
    x = torch.randn(3, 6)
    read = nn.functional.linear(x, model.layer.weight, model.layer.bias)
    assert distance(read, model(x)) < 1e-6
    read.sum().backward()
    assert model.layer.lora_A.weight.grad.abs().max() > 0


def test_only_rows_of_an_embedding_that_are_used_change():
    model = One(nn.Embedding(10, 6))
    inject_lora(model, LoRAConfig(r=2, target_modules=["layer"]))
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(torch.tensor([4, 7])).sum().backward()
        optimizer.step()
    moved = (model.layer.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [4, 7]


def test_an_embedding_that_changes_its_own_weight_is_refused():
    with pytest.raises(UserError, match="Embedding with max_norm"):
        inject_lora(One(nn.Embedding(10, 6, max_norm=1.0)), LoRAConfig(r=2, target_modules=["layer"]))


class Gather(nn.Module):
    """A convolution over listed neighbours, such as a sparse one is: x (n, in), neighbours (n, k) -> (n, out)."""

    def __init__(self, inputs, outputs, k, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, k, inputs))
        self.bias = nn.Parameter(torch.ones(outputs)) if bias else 0.0

    def forward(self, x, neighbours):
        return torch.einsum("nki,oki->no", x[neighbours], self.weight) + self.bias


class LoRAGather(LoRALayer):
    def make_pair(self, base):
        outputs, k, inputs = base.weight.shape
        return Gather(inputs, self.r, k, bias=False), nn.Linear(self.r, outputs, bias=False)

    def branch(self, x, neighbours):
        return self.lora_B(self.lora_A(self.lora_dropout(x), neighbours) * self.scaling)


class Cloud(nn.Module):
    def __init__(self):
        super().__init__()
        self.gather = Gather(6, 5, 4)

    def forward(self, x, neighbours):
        return self.gather(x, neighbours)


def test_a_task_registers_a_layer_of_its_own(monkeypatch):
    monkeypatch.setattr("common.lora.LORA_TYPES", dict(LORA_TYPES))
    with pytest.raises(UserError, match="gather, a Gather"):
        inject_lora(Cloud(), LoRAConfig(target_modules=["gather"]))
    register_lora_layer(Gather, LoRAGather)
    with pytest.raises(TypeError):
        register_lora_layer(Gather, nn.Linear)
    model = Cloud()
    (row,) = inject_lora(model, LoRAConfig(r=2, target_modules=["gather"]))
    assert row["type"] == "Gather" and row["shape"] == (5, 4, 6)
    shake(model)
    x, neighbours = torch.randn(7, 6), torch.randint(0, 7, (7, 4))
    y = model(x, neighbours)
    assert distance(merge_lora(model, inplace=False)(x, neighbours), y) < 1e-5


# ---- on and off a model -------------------------------------------------------------------------------------------------


def test_the_number_of_parameters_is_the_formulas():
    model = toy()
    assert count_parameters(model) == {"total": 90_560, "trainable": 90_560}
    table = inject_lora(model, LoRAConfig(r=8, target_modules=ALL))
    formula = {
        "speaker": 8 * (10 + 64),
        "conv": 8 * (16 * 5 + 64),
        "blocks.0": 8 * (64 * 3 + 64),
        "blocks.1": 8 * (64 * 3 + 64),
        "grouped": 8 * (64 * 5 + 64),
        "up": 8 * (64 + 32 * 8),
        "fc": 8 * (32 + 244),
    }
    assert {row["name"]: row["parameters"] for row in table} == formula
    assert count_parameters(model) == {"total": 90_560 + sum(formula.values()), "trainable": sum(formula.values())}
    assert sum(p.numel() for p in lora_parameters(model)) == sum(formula.values())
    assert {row["name"]: row["pattern"] for row in table}["blocks.1"] == "blocks"
    text = describe_lora(model)
    assert "LoRA on 7 layers" in text and f"{sum(formula.values()):,} of" in text and "up: ConvTranspose1d (64, 32, 8)" in text


@norms
def test_only_adapters_and_what_is_to_be_saved_get_gradients_and_move(norm):
    model = toy(norm)
    inject_lora(model, LoRAConfig(r=4, target_modules=ALL, modules_to_save=["head"]))
    before = bits(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == {
        "head.weight",
        "head.bias",
    }
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):
        model(signal()).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        trains = "lora_" in name or name.startswith("head.")
        assert (p.grad is not None) == trains == (not torch.equal(p, before[name])), name


def test_freezing_again_undoes_what_was_unfrozen():
    model = adapted(modules_to_save=["head"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    freeze_base_params(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize(
    "targets, names",
    [
        (["blocks", "fc"], {"blocks.0", "blocks.1", "fc"}),
        (["blocks.1"], {"blocks.1"}),
        (["1"], {"blocks.1"}),
        (r"(blocks\.\d|up)", {"blocks.0", "blocks.1", "up"}),
        (lambda name, module: getattr(module, "groups", 1) > 1, {"grouped"}),
        ("all-linear", {"fc"}),
        ("all-conv", {"conv", "blocks.0", "blocks.1", "grouped", "up"}),
        ("all", {"speaker", "conv", "blocks.0", "blocks.1", "grouped", "up", "fc"}),
    ],
)
def test_targets_by_name_part_pattern_function_and_kind(targets, names):
    model = toy()
    table = inject_lora(model, LoRAConfig(target_modules=targets, modules_to_save=["head"]))
    assert {row["name"] for row in table} == set(adapted_layers(model)) == names


@pytest.mark.parametrize("exclude", [["blocks"], r"blocks\.\d", lambda name, module: name.startswith("blocks")])
def test_excluded_layers_stay_as_they_are(exclude):
    model = toy()
    inject_lora(model, LoRAConfig(target_modules="all-conv", exclude_modules=exclude))
    assert set(adapted_layers(model)) == {"conv", "grouped", "up"}


def test_ranks_and_alphas_by_pattern():
    config = LoRAConfig(
        r=8,
        lora_alpha=16,
        target_modules=ALL,
        rank_pattern={"blocks.1": 2, "blocks": 3, r"u.": 5},
        alpha_pattern={"up": 7.5, r"blocks\.\d+": 1},
    )
    model = toy()
    table = {row["name"]: (row["r"], row["alpha"]) for row in inject_lora(model, config)}
    assert table["blocks.1"] == (2, 1) and table["blocks.0"] == (3, 1) and table["up"] == (5, 7.5) and table["fc"] == (8, 16)
    assert model.up.lora_B.weight.shape == (5, 32, 8) and model.up.scaling == 1.5


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(target_modules=["fc", "q_proj"]), ["target_modules 'q_proj'", "blocks.N", "fc"]),
        (dict(target_modules=r"block\.\d"), ["block", "blocks.N"]),
        (dict(target_modules=lambda name, module: False), ["lambda"]),
        (dict(target_modules=[]), ["empty"]),
        (dict(target_modules=["head"], modules_to_save=["head"]), ["'head'"]),
        (dict(exclude_modules=["heads"]), ["exclude_modules 'heads'"]),
        (dict(modules_to_save=["classifier"]), ["modules_to_save 'classifier'", "head.weight"]),
        (dict(target_modules=["fc"], rank_pattern={"up": 3}), ["rank_pattern 'up'", "fc"]),
        (dict(target_modules=["fc"], alpha_pattern={"up": 3}), ["alpha_pattern 'up'", "fc"]),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error_with_the_candidates(options, words):
    model = toy()
    before = bits(model)
    with pytest.raises(UserError) as error:
        inject_lora(model, LoRAConfig(**options))
    assert all(word in str(error.value) for word in words), error.value
    assert same(bits(model), before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(r=0), "rank of all layers is 0"),
        (dict(r=3_000_000), "4096"),
        (dict(r=2.0), "2.0"),
        (dict(r=True), "True"),
        (dict(rank_pattern={"fc": -1}), "fc is -1"),
        (dict(lora_alpha=0), "lora_alpha"),
        (dict(lora_alpha=math.nan), "nan"),
        (dict(alpha_pattern={"fc": "much"}), "much"),
        (dict(lora_dropout=1.0), "lora_dropout"),
        (dict(target_modules="(fc"), "(fc"),
        (dict(target_modules=["fc", 3]), "3"),
        (dict(rank_pattern={"*": 3}), "'*'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, word):
    with pytest.raises(UserError) as error:
        LoRAConfig(**options)
    assert word in str(error.value)


def test_adapters_go_on_exact_types_only_and_once():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.MultiheadAttention(4, 2))
    inject_lora(model, LoRAConfig(target_modules="all-linear"))
    assert set(adapted_layers(model)) == {"0"}
    with pytest.raises(UserError, match="adapters already"):
        inject_lora(model, LoRAConfig())


def test_a_layer_in_several_places_gets_one_adapter_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    inject_lora(model, LoRAConfig(r=2))
    assert isinstance(model[0], LoRALinear) and model[0] is model[2]
    assert set(lora_state_dict(model)) == {"0.lora_A.weight", "0.lora_B.weight"}
    remove_lora(model)
    assert model[0] is model[2] is shared


@norms
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(norm):
    model = adapted(norm).eval()
    before, y = bits(model), output(model)
    base = output(toy(norm))
    assert distance(y, base) > 0.01, "the update is large enough to be missed"
    assert merge_lora(model) is model and merge_lora(model) is model
    assert distance(output(model), y) < 1e-5
    unmerge_lora(model)
    unmerge_lora(model)
    assert same(bits(model), before) and torch.equal(output(model), y)


@norms
def test_a_merged_copy_is_a_plain_model_that_loads_into_the_base_class(norm):
    model = adapted(norm, target_modules=["conv", "blocks", "up", "fc"], modules_to_save=["head", "grouped"])
    y = model(signal())  # with a history, which the old weight_norm keeps on modules that train
    before = bits(model)
    merged = merge_lora(model, inplace=False)
    assert same(bits(model), before) and adapted_layers(model)
    plain = toy(norm, seed=5)
    plain.load_state_dict(merged.state_dict(), strict=True)
    assert distance(output(plain), y) < 1e-5 and distance(output(merged), y) < 1e-5
    assert {type(m) for m in merged.modules()} == {type(m) for m in plain.modules()} or norm is NORMS["new"]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
@pytest.mark.parametrize("norm", ["old", "new"])
def test_merging_is_exact_whatever_the_norm_is_over(norm, dim):
    for layer in (nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3, stride=2)):
        with quiet():
            function = nn.utils.weight_norm if norm == "old" else nn.utils.parametrizations.weight_norm
            model = One(function(layer, dim=dim))
        inject_lora(model, LoRAConfig(r=2, lora_alpha=4, target_modules="all"))
        shake(model)
        x, before = torch.randn(2, 4, 9), bits(model)
        y = model(x)
        merge_lora(model)
        assert distance(model(x), y) < 1e-5
        unmerge_lora(model)
        assert same(bits(model), before) and torch.equal(model(x), y)


@pytest.mark.parametrize("norm", [NORMS["old"], NORMS["new"]], ids=["old", "new"])
def test_a_channel_that_weight_norm_has_switched_off_stays_so_when_merged(norm):
    model = One(norm(nn.Conv1d(4, 6, 3)))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(("weight_g", "original0")))[2] = 0
    inject_lora(model, LoRAConfig(r=2, target_modules="all"))
    with torch.no_grad():
        model.layer.lora_B.weight += torch.tensor([1, 1, 0, 1, 1, 1])[:, None, None]
    x = torch.randn(1, 4, 9)
    y = model(x)
    assert distance(merge_lora(model, inplace=False)(x), y) < 1e-5


def test_unmerging_follows_a_model_that_changed_its_precision_meanwhile():
    model = merge_lora(adapted(NORMS["new"])).double()
    y = model(signal().double())
    unmerge_lora(model)
    assert {t.dtype for t in model.parameters()} == {torch.float64} and distance(model(signal().double()), y) < 1e-5


def test_merging_leaves_a_layer_alone_that_shares_the_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    inject_lora(model, LoRAConfig(r=2, target_modules=["0"]))
    shake(model)
    kept = model[1].weight.clone()
    merge_lora(model)
    assert torch.equal(model[1].weight, kept) and not torch.equal(model[0].base_layer.weight, kept)
    unmerge_lora(model)
    assert model[1].weight is model[0].base_layer.weight


def test_a_weight_that_is_computed_otherwise_trains_and_is_not_merged():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    inject_lora(model, LoRAConfig(r=2))
    shake(model).eval()
    before = bits(model)
    for inplace in (True, False):
        with pytest.raises(UserError, match="^LoRA: the weight of a Linear is computed by something other than weight_norm.*$"):
            merge_lora(model, inplace=inplace)
    assert same(bits(model), before)


def test_removing_gives_the_base_back():
    model = toy()
    before = bits(model)
    inject_lora(model, LoRAConfig(target_modules=ALL, modules_to_save=["head"]))
    merge_lora(shake(model))
    remove_lora(model)
    assert same(bits(model), before)


# ---- tensors and files --------------------------------------------------------------------------------------------------


def test_state_round_trip_with_all_that_trained():
    model = adapted(modules_to_save=["head"])
    model.conv.base_layer.bias.requires_grad_(True)  # someone lets another tensor train: it is saved as well
    shake(model)
    state = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    assert {"head.weight", "head.bias", "conv.base_layer.bias"} == {name for name in state if "lora_" not in name}
    other = toy()
    inject_lora(other, LoRAConfig(r=4, lora_alpha=8, target_modules=ALL, modules_to_save=["head"]))
    other.conv.base_layer.bias.requires_grad_(True)
    assert load_lora_state_dict(other, state) == []
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state.pop("fc.lora_B.weight"), ["fc.lora_B.weight is missing, expected (244, 4)"]),
        (lambda state: state.update(odd=torch.zeros(2)), ["odd is (2,), expected no such tensor"]),
        (lambda state: state.update({"head.bias": torch.zeros(3)}), ["head.bias is (3,), expected (124,)"]),
        (lambda state: state.update({"head.bias": torch.zeros(124, dtype=torch.int64)}), ["head.bias is torch.int64"]),
        (lambda state: state["fc.lora_B.weight"].view(-1)[7].fill_(torch.nan), ["fc.lora_B.weight holds numbers that are not"]),
    ],
)
def test_loading_is_strict_unless_told_otherwise(change, words, capsys):
    model = adapted(modules_to_save=["head"])
    state = {name: tensor + 1 for name, tensor in lora_state_dict(model).items()}
    change(state)
    before = bits(model)
    with pytest.raises(UserError) as error:
        load_lora_state_dict(model, state)
    assert all(word in str(error.value) for word in words), error.value
    assert same(bits(model), before)
    (skipped,) = load_lora_state_dict(model, state, strict=False)
    assert all(word in skipped for word in words) and skipped in capsys.readouterr().out
    assert torch.equal(model.fc.lora_A.weight, before["fc.lora_A.weight"] + 1), "the rest is loaded"


def test_nothing_is_loaded_into_a_merged_model():
    model = merge_lora(adapted())
    with pytest.raises(UserError, match="unmerge_lora"):
        load_lora_state_dict(model, lora_state_dict(model))


@norms
@pytest.mark.parametrize("half", [False, True])
def test_folder_round_trip(norm, half, tmp_path):
    options = dict(modules_to_save=["head"], rank_pattern={"blocks.1": 2}, alpha_pattern={"up": 3}, use_rslora=True)
    model = adapted(norm, **options).eval()
    save_adapter(model, tmp_path / "a", base="the toy", half=half)
    other = toy(norm)
    assert load_adapter(other, tmp_path / "a") == [] and not other.training
    assert distance(output(other), output(model)) < (2e-3 if half else 1e-7)
    assert {name: (m.r, m.scaling) for name, m in adapted_layers(other).items()} == {
        name: (m.r, m.scaling) for name, m in adapted_layers(model).items()
    }
    numbers = sum(tensor.numel() for tensor in lora_state_dict(model).values())
    assert 0 <= (tmp_path / "a" / ADAPTER_FILE).stat().st_size - (2 if half else 4) * numbers < 4000
    assert all(t.dtype == (torch.half if half else torch.float32) for t in load_file(tmp_path / "a" / ADAPTER_FILE).values())
    assert all(p.dtype == torch.float32 for p in other.parameters())


def test_half_precision_refuses_what_it_cannot_hold(tmp_path):
    model = adapted()
    model.fc.lora_B.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match="fc.lora_B.weight"):
        save_adapter(model, tmp_path / "a", half=True)
    assert not (tmp_path / "a").exists()


def test_several_adapters_follow_each_other_on_one_base(tmp_path):
    variants = {
        "a": dict(modules_to_save=["head"]),
        "b": dict(r=2, target_modules=["fc", "up"]),
        "c": dict(target_modules=["conv"], modules_to_save=["speaker"]),
    }
    expected = {}
    for name, options in variants.items():
        model = adapted(**options)
        save_adapter(model, tmp_path / name)
        expected[name] = output(model)
    model = toy()
    before = bits(model)
    for name in "abcab":
        load_adapter(model, tmp_path / name)
        assert torch.equal(output(model), expected[name]), name
        merge_lora(model)
    remove_lora(model)
    assert same(bits(model), before)


class Small(nn.Module):
    """Layers that PEFT knows, too; `fc` is a name and the end of another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "emb": nn.Embedding(5, 8)})
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.conv(x).mT + self.block["emb"](torch.arange(4))
        return self.head(torch.tanh(self.fc(torch.tanh(self.block["fc"](h)))))


def small():
    torch.manual_seed(3)
    return Small()


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["conv", "fc", "emb"]),
        dict(target_modules=[r"^fc", "conv"], rank_pattern={"^fc": 2}, alpha_pattern={"conv": 3}, modules_to_save=["head"]),
        dict(target_modules=["block.fc"], use_rslora=True, lora_dropout=0.1),
        dict(target_modules=["conv", "fc"], rank_pattern={"^fc": 2}),
        dict(target_modules=["conv", "fc"], rank_pattern={"block.fc": 3, "^fc": 2}),
    ],
)
def test_peft_loads_ours(options, tmp_path):
    from peft import PeftModel

    model = small()
    inject_lora(model, LoRAConfig(r=4, **options))
    shake(model).eval()
    save_adapter(model, tmp_path / "a", base="small")
    x = torch.randn(2, 6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(small(), tmp_path / "a").eval()
    assert distance(theirs(x), model(x)) < 1e-6
    assert distance(theirs.merge_and_unload()(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["conv", "fc", "emb"]),
        dict(target_modules=r".*fc", modules_to_save=["head"]),
        dict(target_modules=["fc"], exclude_modules=["block.fc"], use_rslora=True),
        dict(target_modules=["conv", "fc"], rank_pattern={"block.fc": 3, "conv": 2}, alpha_pattern={r"^block\.fc": 5}),
    ],
)
def test_we_load_pefts(options, tmp_path):
    from peft import LoraConfig, get_peft_model

    with quiet():
        theirs = shake(get_peft_model(small(), LoraConfig(r=4, **options))).eval()
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    model = small()
    assert load_adapter(model, tmp_path / "a") == []
    x = torch.randn(2, 6, 4)
    assert distance(model(x), theirs(x)) < 1e-6
    assert distance(model(x), small()(x)) > 0.01


def tamper(folder, change):
    """Changes adapter_config.json, or the tensors, of an adapter folder that is not sealed."""
    (folder / "manifest.json").unlink(missing_ok=True)
    config, tensors = json.loads((folder / ADAPTER_CONFIG).read_text()), load_file(folder / ADAPTER_FILE)
    change(config, tensors)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / ADAPTER_FILE)


KEY = "base_model.model.fc.lora_A.weight"
HOSTILE = {
    "a huge rank": (lambda c, t: c.update(r=3_000_000), ["3000000", "4096"]),
    "a larger rank than the file has": (lambda c, t: c.update(r=4000), ["lora_A.weight is (4, ", "r = 4000"]),
    "rows without columns": (
        lambda c, t: (c["rank_pattern"].update(fc=4000), t.update({KEY: torch.zeros(4000, 0)})),
        ["fc.lora_A.weight is (4000, 0), and the config says"],
    ),
    "a rank by layer": (lambda c, t: c["rank_pattern"].update({"fc": 9}), ["fc.lora_A.weight is (4, 32)", "r = 9"]),
    "a rank that is text": (lambda c, t: c.update(r="4"), ["'4'"]),
    "no rank": (lambda c, t: c.pop("r"), ["None"]),
    "ranks in a list": (lambda c, t: c.update(rank_pattern=["fc"]), ["fc"]),
    "a pattern that backtracks": (lambda c, t: c["alpha_pattern"].update({"(c*)*(o*)*$": 9}), ["(c*)*", "only names"]),
    "alpha not a number": (lambda c, t: c.update(lora_alpha=math.inf), ["inf"]),
    "another method": (lambda c, t: c.update(peft_type="LOHA"), ["not of a LoRA adapter"]),
    "more than LoRA": (lambda c, t: c.update(use_dora=True), ["use_dora"]),
    "a changed base": (lambda c, t: c.update(init_lora_weights="pissa"), ["init_lora_weights", "pissa"]),
    "biases": (lambda c, t: c.update(bias="all"), ["bias"]),
    "targets that are numbers": (lambda c, t: c.update(target_modules=[1, 2]), ["target_modules"]),
    "a layer lost": (lambda c, t: [t.pop(KEY.replace("A", m)) for m in "AB"], ["fc, and the file has no tensor of it"]),
    "a matrix lost": (lambda c, t: t.pop(KEY.replace("A", "B")), ["fc.lora_B.weight is missing, expected (244, 4)"]),
    "the other matrix lost": (lambda c, t: t.pop(KEY), ["fc.lora_A.weight is missing"]),
    "another base": (lambda c, t: t.update({KEY: torch.zeros(4, 31)}), ["fc.lora_A.weight is (4, 31), expected (4, 32)"]),
    "a layer that is not there": (lambda c, t: t.update({"x.lora_A.weight": torch.zeros(4, 3)}), ["x.lora_A.weight is (4, 3)"]),
    "a head of other classes": (lambda c, t: t.update({"head.bias": torch.zeros(7)}), ["head.bias is (7,), expected (124,)"]),
    "a bias beside an adapter": (lambda c, t: t.update({"fc.bias": torch.zeros(244)}), ["fc.bias trained whole", "adapter"]),
    "a layer twice": (lambda c, t: c.update(modules_to_save=["fc"]), ["fc.bias trained whole", "adapter as well"]),
    "a head lost": (lambda c, t: c.update(modules_to_save=["speaker"]), ["speaker.weight is missing, expected (10, 64)"]),
}


@pytest.mark.parametrize("change, words", HOSTILE.values(), ids=HOSTILE)
def test_a_folder_that_is_wrong_or_hostile_is_refused(change, words, tmp_path):
    save_adapter(adapted(modules_to_save=["head"], target_modules=ALL[1:]), tmp_path / "a")
    tamper(tmp_path / "a", change)
    model = toy()
    before = bits(model)
    with pytest.raises(UserError) as error:
        load_adapter(model, tmp_path / "a")
    assert all(word in str(error.value) for word in words), error.value
    assert same(bits(model), before), "the model is the bare base"


def test_a_layer_may_train_whole_whose_name_ends_as_that_of_an_adapted_one(tmp_path):
    def build():
        return nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), part=nn.Sequential(OrderedDict(fc=nn.Linear(4, 3)))))

    model, other, x = build(), build(), torch.randn(2, 4)
    inject_lora(model, LoRAConfig(r=2, target_modules=lambda name, module: name == "fc", modules_to_save=["part"]))
    other.load_state_dict(merge_lora(model, inplace=False).state_dict())
    shake(model)
    save_adapter(model, tmp_path / "a")
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, "manifest.json"])
def test_json_that_is_nested_without_end_is_refused(tmp_path, name):
    save_adapter(adapted(), tmp_path / "a")
    tamper(tmp_path / "a", lambda config, tensors: None)
    (tmp_path / "a" / name).write_text("[" * 200_000)
    with pytest.raises(UserError, match=name):
        load_adapter(toy(), tmp_path / "a")


def test_a_regular_expression_in_a_file_is_never_run(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    tamper(tmp_path / "a", lambda config, tensors: config.update(target_modules="(([a-z]+)+)+!", exclude_modules="((.*)*)*!"))
    model = toy()
    assert load_adapter(model, tmp_path / "a") == []
    assert torch.equal(output(model), output(adapted()))


def test_what_does_not_fit_is_skipped_when_told_so(tmp_path, capsys):
    save_adapter(adapted(modules_to_save=["head"]), tmp_path / "a")
    base = "base_model.model."
    tamper(tmp_path / "a", lambda c, t: (t.pop(f"{base}fc.lora_B.weight"), t.update({f"{base}up.lora_A.weight": torch.zeros(9)})))
    model = toy()
    skipped = load_adapter(model, tmp_path / "a", strict=False)
    assert len(skipped) == 4, skipped  # fc's B; up has another rank, so neither of its matrices has a place
    assert all(text in capsys.readouterr().out for text in ["fc.lora_B.weight"]) and "up" not in adapted_layers(model)
    assert torch.equal(model.conv.weight, adapted(modules_to_save=["head"]).conv.weight)


def test_damage_and_pickles_are_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "a" / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        load_adapter(toy(), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(toy(), tmp_path / "a")
    (tmp_path / "b" / ADAPTER_FILE).rename(tmp_path / "b" / "adapter_model.bin")
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(UserError, match="pickle"):
        load_adapter(toy(), tmp_path / "b")
    with pytest.raises(UserError, match="no adapters to save"):
        save_adapter(toy(), tmp_path / "c")
