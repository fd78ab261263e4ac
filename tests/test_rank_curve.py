"""scripts/rank_curve.py: an update cut to a rank, and what it reaches there. (test_tasks_answers.py has it of every task.)"""

import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common.lora import LoRAConfig, adaptable_layers, inject_lora, lora_parameters, merge_lora
from common.lora_layers import base_weight

sys.path.insert(0, str(ROOT / "scripts"))
import rank_curve  # noqa: E402
from rank_curve import Update, draw_ranks, scores_at_ranks, table, take_off  # noqa: E402

LAYERS = {
    "linear": nn.Linear(12, 9),
    "grouped": nn.Conv1d(8, 4, 3, groups=2),
    "transposed": nn.ConvTranspose1d(6, 4, 3),
    "normed": weight_norm(nn.Conv1d(4, 5, 3)),
}


def pair(change=0.1):
    """(a model, its base), which differ in every layer of LAYERS."""
    torch.manual_seed(0)
    base = nn.ModuleDict(deepcopy(LAYERS)).eval().requires_grad_(False)
    tuned = deepcopy(base)
    for name, p in tuned.named_parameters():
        p.add_(change * torch.randn_like(p) * (not name.endswith("original0")))
    return tuned, base


def weights(model):
    return {name: base_weight(layer).clone() for name, layer in adaptable_layers(model).items()}


def test_at_its_own_rank_every_layer_has_its_weight_again_and_at_zero_its_bases():
    tuned, base = pair()
    before, biases = weights(tuned), {name: layer.bias.clone() for name, layer in tuned.items()}
    update = Update(tuned, base, LAYERS)
    assert update.rank == 9  # of 12 x 9
    update.set_rank(1)
    changed = {name: (weight - weights(base)[name]).flatten(1) for name, weight in weights(tuned).items()}
    assert torch.linalg.matrix_rank(changed["linear"], tol=1e-5) == 1
    assert all((weight - before[name]).abs().max() > 1e-3 for name, weight in weights(tuned).items())
    update.set_rank(0)
    for name, weight in weights(tuned).items():
        torch.testing.assert_close(weight, weights(base)[name])
    update.set_rank(9)
    for name, weight in weights(tuned).items():
        torch.testing.assert_close(weight, before[name])
    assert all(layer.bias.equal(biases[name]) for name, layer in tuned.items())  # what is no matrix stays as it was trained


def test_energy_rises_with_the_rank_to_all_of_it():
    tuned, base = pair()
    update = Update(tuned, base, LAYERS)
    shares = [update.energy(r) for r in (0, 1, 2, 4, 8, 9)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[1] > 0.05 and shares[-1] == pytest.approx(1)
    assert Update(base, deepcopy(base), ["linear"]).energy(1) == 1  # nothing changed, and all of it is there


def test_bytes_are_those_of_an_adapter_with_no_rank_above_a_layers_own():
    tuned, base = pair()
    update = Update(tuned, base, LAYERS)
    one = (12 + 9) + 2 * (4 * 3 + 2) + (6 + 4 * 3) + (4 * 3 + 5)  # r (in + out), for each group
    assert update.numbers(1) == one
    assert update.numbers(64) == 9 * (12 + 9) + 2 * 2 * (4 * 3 + 2) + 6 * (6 + 4 * 3) + 5 * (4 * 3 + 5)
    adapted = deepcopy(base)
    inject_lora(adapted, LoRAConfig(r=2, target_modules=list(LAYERS)))
    assert take_off(adapted).numbers == update.numbers(2)


def test_of_a_lora_the_rank_is_found_and_the_base_comes_back():
    _, base = pair()
    adapted = deepcopy(base)
    inject_lora(adapted, LoRAConfig(r=2, target_modules=list(LAYERS), rank_pattern={"linear": 3}))
    for p in lora_parameters(adapted):
        nn.init.normal_(p)
    merged = merge_lora(adapted, inplace=False)
    adapter = take_off(adapted)
    assert (sorted(adapter.layers), adapter.rank) == (sorted(LAYERS), 3)
    assert all(weight.equal(weights(base)[name]) for name, weight in weights(adapted).items())
    update = Update(merged, adapted, adapter.layers)
    assert update.rank == 3 and update.energy(3) == pytest.approx(1) and update.energy(2) < 0.999


def test_from_the_updates_rank_on_the_metric_is_that_of_the_run(monkeypatch):
    tuned, base = pair()
    before, asked = tuned["linear"].weight.clone(), []

    def score(task, model, processor, data):
        asked.append((model["linear"].weight - before).abs().max().item())
        return {"mse": asked[-1] if len(asked) != 3 else float("nan")}

    monkeypatch.setattr(rank_curve, "score", score)
    found = scores_at_ranks("pose", Update(tuned, base, ["linear"]), None, None, "mse")
    assert len(asked) == 6  # as it is, and at 0, 1, 2, 4, 8: from 9 on it is whole
    assert found["whole"] == found[16] == found[32] == found[64] == 0 and found[1] is None  # no number
    assert found[0] > found[2] > found[4] > found[8] > 0


CURVE = {
    "metric": "mcd",
    "higher_is_better": False,
    "split": "val",
    "layers": 3,
    "ranks": [1, 2, 4],
    "full": [3.0, None, 2.5],
    "lora": [2.9, 2.7, 2.7],
    "bytes": [1000, 2000, 4000],
    "energy": {"full": [0.5, 0.75, 0.9], "lora": [0.8, 1.0, 1.0]},
    "lora_rank": 2,
    "whole": {"full": 2.4, "lora": 2.7},
}


def test_the_curve_is_drawn_and_said(tmp_path):
    draw_ranks(CURVE, tmp_path / "curve.png")
    colors = set(map(tuple, np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).reshape(-1, 3).tolist()))
    assert {(0x55, 0x55, 0x55), (0x1F, 0x6F, 0xD6)} <= colors  # both lines
    lines = [line.split() for line in table(CURVE).splitlines()]
    assert lines[1:] == [
        ["1", "1,000", "3.0000", "50.0%", "2.9000", "80.0%"],
        ["2", "2,000", "null", "75.0%", "2.7000", "100.0%"],
        ["4", "4,000", "2.5000", "90.0%", "2.7000", "100.0%"],
        ["whole", "2.4000", "2.7000"],
    ]
