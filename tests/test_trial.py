"""What a trial before training finds out: adapters that would do nothing, tensors without use, merges that change the model."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from common.config import UserError
from common.lora_targets import choose_targets
from common.peft_adapters import add_adapter, merged
from common.saved_models import save_lora, with_saved_adapter
from common.trial import freeze_unused


class Block(nn.Module):
    """Hands the weight of qkv to a function, as timm's BEiT and EVA-02 do, and calls proj."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.proj(self.drop(nn.functional.linear(x.to(self.proj.weight.dtype), self.qkv.weight)))


class Net(nn.Module):
    """(B, 4) -> (B, 2): two blocks, and parts that a base may have and not use."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mask_token, self.spare = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Processor:
    def save_pretrained(self, folder):
        """Has nothing to save."""


def answer(model):
    return model.eval()(torch.linspace(-1, 1, 12).view(3, 4))


def fails(model):
    raise IndexError("no such size")


def net():
    torch.manual_seed(0)
    return Net()


def test_layers_that_an_adapter_would_not_move_are_left_out_and_named(capsys):
    model = net()
    assert choose_targets(model, "all-linear", ["head"], answer=answer) == ["blocks.0.proj", "blocks.1.proj"]
    said = capsys.readouterr().out
    assert "left out: the model does not call blocks.N.qkv (2), spare" in said and "LoRA on 2 layers: proj 2" in said
    model = add_adapter(model, LoraConfig(r=2, target_modules=["blocks.0.proj", "blocks.1.proj"]), ["head"])
    answer(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_targets_of_which_none_would_do_anything_are_refused_with_others_to_take():
    with pytest.raises(UserError, match=r"does not call blocks\.N\.qkv \(2\).*take others, such as blocks\.N\.proj \(2\)$"):
        choose_targets(net(), "qkv", ["head"], answer=answer)


def test_a_layer_whose_settings_the_model_reads_takes_no_adapter():
    """MobileNetV2 pads by the stride of a convolution; an adapter in its place has none."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.plain = nn.Conv1d(1, 2, 3, stride=2), nn.Conv1d(2, 2, 1)

        def forward(self, x):
            return self.plain(self.conv(nn.functional.pad(x, (self.conv.stride[0] - 1, 0))))

    assert choose_targets(Padded(), "all", answer=lambda model: model(torch.ones(1, 1, 8))) == ["plain"]


@pytest.mark.parametrize("r", [0, 2])
def test_what_is_not_used_of_a_head_is_frozen_in_one_pass_and_saved_all_the_same(r, tmp_path, capsys):
    """As the class layers of a two-stage detector's decoder, which would stop the run, for they get no gradient."""
    passes = []

    def counted(model):
        passes.append(model)
        return answer(model)

    model, parts = net(), ("head", "spare")
    targets = choose_targets(model, "all-linear", parts, answer=counted, r=r)
    assert len(passes) == 1 and "no use of them: spare.weight, spare.bias\n" in capsys.readouterr().out
    model = add_adapter(model, LoraConfig(r=r, target_modules=targets), parts)
    answer(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_lora(tmp_path / "c", model, Processor(), {"base": {"name": "net"}})
    loaded = with_saved_adapter(net(), tmp_path / "c", parts, False, answer)
    assert torch.equal(answer(loaded), answer(model))


def test_a_trial_leaves_nothing_behind(capsys):
    model = net().train()
    model.blocks[1].eval()
    before, modules, noise = copy.deepcopy(model.state_dict()), list(model.named_modules()), torch.random.get_rng_state()

    def drops(model):
        return model.train()(torch.ones(2, 4))

    for trial in (drops, answer, fails):
        freeze_unused(model, trial, (), ["blocks.0.qkv", "blocks.0.proj"])
        freeze_unused(copy.deepcopy(model), trial)
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert [(name, id(m)) for name, m in model.named_modules()] == [(name, id(m)) for name, m in modules]
    assert [m.training for m in model.modules()] == [True] * 6 + [False] * 4 + [True] * 2
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_trial_that_fails_is_said_and_stops_nothing(capsys):
    assert choose_targets(net(), "qkv", answer=fails) == ["blocks.0.qkv", "blocks.1.qkv"]
    assert "a trial with a small input failed (IndexError: no such size)" in capsys.readouterr().out


def test_what_no_output_depends_on_is_frozen_and_named_once(capsys):
    model = net()
    freeze_unused(model, answer)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"mask_token", "spare.weight", "spare.bias", "blocks.0.qkv.bias", "blocks.1.qkv.bias"}
    said = capsys.readouterr().out
    assert "makes no use of them: mask_token, blocks.N.qkv.bias (2), spare.weight, spare.bias" in said
    freeze_unused(model, answer)
    assert capsys.readouterr().out == ""


class Standardised(nn.Conv1d):
    """As timm and BiT have it: computes with another weight than it holds."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(("kind", "merges"), [(nn.Conv1d, True), (Standardised, False)])
def test_an_adapter_is_merged_only_where_that_changes_no_answer(kind, merges, capsys):
    torch.manual_seed(1)
    model = nn.Sequential(kind(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 1, 1))
    model = add_adapter(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(4, 2, 8)
    before = model.eval()(x).detach()
    after = merged(model, lambda model: model(x))
    torch.testing.assert_close(after(x), before, rtol=1e-5, atol=1e-5)
    assert (type(after[0]) is kind) == merges == ("not merged" not in capsys.readouterr().out)
    assert merges == (not [name for name, _ in after.named_parameters() if "lora_" in name])
