"""Adapters through PEFT: what the fast forward may and may not change, which layers are chosen, and what is relied on in PEFT.

A failure in the last section says which part of PEFT's insides has changed.
"""

import copy
import io
import pickle
import signal

import pytest
import torch
from conftest import ROOT  # noqa: F401
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from common.config import LoraTrainConfig, UserError
from common.lora_targets import choose_targets, find_targets
from common.peft_adapters import add_adapter, load_adapter_files, plain_lora, save_adapter_files


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        return self.out(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Toy(nn.Module):
    """(B, 3, 24, 24) -> (B, 5): a convolutional stem, four blocks, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.LayerNorm(16)
        self.blocks = nn.ModuleList(Attention() for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, pixels):
        x = self.norm(self.stem(pixels).flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


TARGETS = [f"blocks.{i}.{name}" for i in range(4) for name in ("q_proj", "v_proj")] + ["stem"]


def base():
    torch.manual_seed(0)
    return Toy()


def pixels(count=4):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def adapted(fast=True, **options):
    """The toy with an adapter whose B is not zero, as if it had trained, and a head that trains whole."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)
    model = add_adapter(base(), settings, ["head"])
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) / 10
    if not fast:
        for layer in lora_layers(model):
            del layer.forward
    return model


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def learn(model, steps=3, dtype=None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(pixels()).float(), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def calls(monkeypatch):
    """Names of the fast functions in the order of their calls."""
    seen = []
    for name in ("lora_linear", "lora_conv"):
        function = getattr(__import__("common.peft_adapters", fromlist=[name]), name)
        monkeypatch.setattr(
            f"common.peft_adapters.{name}", lambda *a, name=name, function=function: (seen.append(name), function(*a))[1]
        )
    return seen


# ---- the fast forward ------------------------------------------------------------------------------------------------


def test_training_gives_what_pefts_own_layers_give(calls):
    fast = learn(adapted())
    assert calls.count("lora_linear") == 3 * 8 and calls.count("lora_conv") == 3
    own = learn(adapted(fast=False))
    assert len(calls) == 27 and fast.keys() == own.keys() and len(own) == 2 * 9 + 2
    for name in own:
        torch.testing.assert_close(fast[name], own[name], rtol=1e-4, atol=1e-6)


def test_at_the_start_the_adapter_changes_nothing():
    model = add_adapter(base(), LoraConfig(r=4, target_modules=TARGETS), ["head"])
    torch.testing.assert_close(model(pixels()), base()(pixels()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fast_and_compute_with_weights_of_their_own(how, calls):
    model = adapted()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)  # of bytes that this test has just made
    before = model(pixels())
    calls.clear()
    assert torch.equal(twin(pixels()), before) and len(calls) == 9
    learn(twin)
    assert torch.equal(model(pixels()), before) and not torch.equal(twin(pixels()), before)


def test_merging_disabling_and_saving_work_as_before(tmp_path, calls):
    model = adapted().eval()
    whole = model(pixels()).detach()
    with model.disable_adapter():
        plain = base().eval()
        plain.head.load_state_dict({name: t for name, t in model.get_base_model().head.state_dict().items()})
        torch.testing.assert_close(model(pixels()), plain(pixels()))
    save_adapter_files(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(pixels()), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(load_adapter_files(base(), tmp_path / "ours", ["head"])(pixels()), whole)
    save_adapter_files(adapted(fast=False), tmp_path / "theirs")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    model.merge_adapter()
    torch.testing.assert_close(model(pixels()), whole, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(pixels()), whole, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert not lora_layers(merged) and not [m for m in merged.modules() if "forward" in vars(m)]
    torch.testing.assert_close(merged(pixels()), whole, rtol=1e-4, atol=1e-5)


def spoil(model, how):
    layer = lora_layers(model)[1]
    linear = layer.base_layer
    if how == "second adapter":
        model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    elif how == "hook":
        linear.register_forward_hook(lambda module, args, y: 2 * y)
    elif how == "base trains":
        linear.weight.requires_grad_(True)
    elif how == "parametrized":
        nn.utils.parametrizations.weight_norm(linear)
        linear.requires_grad_(False)
    elif how == "weight norm of old":
        nn.utils.weight_norm(linear)
        linear.requires_grad_(False)
    elif how == "other dtype":
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.bfloat16()
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.bfloat16()


SPOILT = ["second adapter", "hook", "base trains", "parametrized", "weight norm of old", "other dtype"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", SPOILT)
def test_what_the_fast_forward_does_not_cover_is_pefts_own_from_then_on(how):
    results = []
    for fast in (True, False):
        model = adapted(fast)
        spoil(model, how)
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(3))
        layer = lora_layers(model)[1]
        assert plain_lora(layer, x) is None
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_dora_dropout_and_adapter_biases_are_pefts_own(options, calls):
    options = dict(options, target_modules=[name for name in TARGETS if "q_proj" in name])
    model = add_adapter(base(), LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(3)
    ours = model.train()(pixels())
    assert not calls
    for layer in lora_layers(model):
        del layer.forward
    torch.manual_seed(3)
    assert torch.equal(ours, model(pixels()))


def test_dropout_is_off_in_eval_mode_and_then_the_forward_is_fast(calls):
    model = adapted(lora_dropout=0.5)
    model.eval()(pixels())
    assert len(calls) == 9
    assert not torch.equal(model.train()(pixels()), model(pixels()))


def test_convolutions_with_groups_dilation_or_other_paddings_are_pefts_own():
    for options in ({"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, **{"padding": 1, **options}))
        model = add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
        assert plain_lora(lora_layers(model)[0], torch.randn(1, 4, 64, 64)) is None


def test_rank_zero_trains_the_head_alone():
    model = add_adapter(base(), LoraConfig(r=0, target_modules=[]), ["head"])
    assert type(model) is Toy and set(learn(model)) == {"head.weight", "head.bias"}


# ---- frozen weights in bf16 ------------------------------------------------------------------------------------------


def test_frozen_weights_in_bf16_change_nothing_under_autocast():
    settings = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    results, sizes = [], []
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(4)
        model = add_adapter(base(), settings, ["head"], frozen_dtype=dtype)
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad))
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad or p.ndim == 1)
        results.append(learn(model, dtype=torch.bfloat16))
    assert results[0].keys() == results[1].keys() and all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    assert sizes[1] < 0.55 * sizes[0]


def test_settings_are_checked():
    with pytest.raises(UserError, match="--frozen_dtype bf16 goes with --precision bf16"):
        LoraTrainConfig(frozen_dtype="bf16")
    assert LoraTrainConfig(frozen_dtype="bf16", precision="bf16").frozen_dtype == "bf16"
    for name, value in {"lora_r": -1, "lora_last_k": -1, "lora_dropout": 1.0}.items():
        with pytest.raises(UserError, match=f"--{name} is {value}"):
            LoraTrainConfig(**{name: value})


# ---- which layers ----------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """As timm and BiT have it: computes with another weight than it holds."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_layers_that_compute_something_else_are_left_alone():
    model = nn.ModuleDict({
        "plain": nn.Conv2d(3, 4, 1), "other": Standardised(3, 4, 1), "grouped": nn.Conv2d(4, 4, 1, groups=2),
        "pool": nn.MultiheadAttention(8, 2), "fc": nn.Linear(4, 4), "sound": nn.Conv1d(2, 2, 3), "head": nn.Linear(4, 2),
    })  # fmt: skip
    assert choose_targets(model, "all", ["head"]) == ["fc", "plain", "sound"]
    assert choose_targets(model, "all-linear", ["head"]) == ["fc"]
    with pytest.raises(UserError, match="no layer's name ends in 'other'; there are: fc, plain, sound"):
        choose_targets(model, "other", ["head"])


def test_a_pattern_that_would_run_for_years_ends_in_one_line(monkeypatch):
    monkeypatch.setattr("common.lora_targets.PATTERN_SECONDS", 0.1)
    model, handler = nn.ModuleDict({"a" * 40 + "b": nn.Linear(2, 2)}), signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match="a simpler pattern is needed"):
        choose_targets(model, "(a+)+c")
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_query_and_value_go_by_the_names_that_are_there():
    model = nn.ModuleDict({"a": nn.ModuleDict({"query": nn.Linear(2, 2), "key": nn.Linear(2, 2), "value": nn.Linear(2, 2)})})
    assert choose_targets(model, "qv") == ["a.query", "a.value"]
    assert choose_targets(nn.ModuleDict({"qkv": nn.Linear(2, 6)}), "qv") == ["qkv"]
    with pytest.raises(UserError, match="qv: no query and value layers"):
        choose_targets(nn.ModuleDict({"fc": nn.Linear(2, 2)}), "qv")


def test_the_last_blocks_and_what_comes_after_them(capsys):
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "layer1": nn.ModuleList([Attention()]), "body": base().blocks})
    model["after"] = nn.ModuleList([nn.Linear(2, 2)])  # holds no layers, but is one: no block
    last = choose_targets(model, "all-linear", last_k=2)
    assert last == sorted([f"body.{i}.{n}" for i in (2, 3) for n in ("q_proj", "v_proj", "out")] + ["after.0"])
    assert "LoRA on 7 layers" in capsys.readouterr().out
    assert choose_targets(model, "q_proj", last_k=5) == ["body.0.q_proj", "body.1.q_proj", "body.2.q_proj", "body.3.q_proj",
                                                         "layer1.0.q_proj"]  # fmt: skip
    with pytest.raises(UserError, match="--lora_last_k 6: adapters would go into 5 blocks altogether"):
        choose_targets(model, "q_proj", last_k=6)


def test_what_comes_before_the_first_adapter_is_not_differentiated():
    model = base()
    model = add_adapter(model, LoraConfig(r=4, target_modules=choose_targets(model, "all-linear", ["head"], 2)), ["head"])
    needs = []
    for block in model.get_base_model().blocks:
        block.register_forward_hook(lambda module, args, y: needs.append((args[0].requires_grad, y.requires_grad)))
    model(pixels())
    assert needs == [(False, False), (False, False), (False, True), (True, True)]


# ---- what is relied on in PEFT ---------------------------------------------------------------------------------------


def test_pefts_names_for_parameters_and_layers():
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS))
    names = [name for name, p in model.named_parameters() if "lora_" in name]
    assert "base_model.model.blocks.0.q_proj.lora_A.default.weight" in names and len(names) == 2 * 9
    assert all(name.startswith("base_model.model.") for name, _ in model.named_parameters()), "adapter_state relies on it"
    assert set(model.peft_config) == {"default"}


def test_pefts_layers_have_the_attributes_that_tell_plain_lora(tmp_path):
    layer = lora_layers(get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)))[1]
    assert type(layer).__module__ == "peft.tuners.lora.layer" and type(layer).__name__ == "Linear"
    assert type(layer.base_layer) is type(layer.lora_A["default"]) is type(layer.lora_B["default"]) is nn.Linear
    assert layer.active_adapters == ["default"] and layer.scaling == {"default": 2.0} and not layer.lora_variant
    assert not layer.merged and not layer.disable_adapters and type(layer.lora_dropout["default"]) is nn.Identity
    weight, bias, lora_A, lora_B, scaling = plain_lora(layer, torch.randn(2, 16))
    assert weight is layer.base_layer.weight and scaling == 2.0 and lora_A.shape == (4, 16) and lora_B.shape == (16, 4)


def test_peft_still_asks_models_for_their_word_embeddings():
    class Vision(Toy):
        def get_input_embeddings(self):
            raise NotImplementedError

    with pytest.raises(NotImplementedError):  # passes no more: without_word_embeddings has become needless
        get_peft_model(Vision(), LoraConfig(r=4, target_modules=TARGETS))
    model = add_adapter(Vision(), LoraConfig(r=4, target_modules=TARGETS))
    assert model(pixels()).shape == (4, 5) and model.merge_and_unload()(pixels()).shape == (4, 5)


def test_a_4bit_layer_goes_by_its_module():
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    model = nn.ModuleDict({"a": Linear4bit(2, 2), "b": nn.Conv2d(1, 1, 1)})
    assert find_targets(model, "*", (nn.Linear,)) == ["a"]
