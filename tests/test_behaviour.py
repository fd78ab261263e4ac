"""scripts/behaviour.py: what it does to inputs, what it calls drift, who takes a turn. (test_tasks_answers.py: of every task.)"""

import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "scripts"))
import behaviour  # noqa: E402
from behaviour import ChangedBatches, corrupt, corruptions, drift, head_layer, in_lines, median_times  # noqa: E402


def pictures():
    """A batch of two pictures, the second of them padded by half."""
    mask = torch.ones(2, 24, 24, dtype=torch.long)
    mask[1, 12:] = 0
    values = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * mask[:, None]
    return {"pixel_values": values, "pixel_mask": mask, "labels": [1, 2]}


def test_each_corruption_does_what_it_says_and_what_was_padded_stays_empty():
    batch = pictures()
    changed = {name: corrupt("detection", name, batch, 0) for name in corruptions("detection")[1:]}
    noise = (changed["noise"]["pixel_values"] - batch["pixel_values"])[0]
    assert noise.std().item() == pytest.approx(0.5 * batch["pixel_values"].std().item(), rel=0.1)
    assert changed["blur"]["pixel_values"][0].std() < 0.8 * batch["pixel_values"][0].std()
    torch.testing.assert_close(changed["contrast"]["pixel_values"], 0.4 * batch["pixel_values"])
    assert all(not each["pixel_values"][1, :, 12:].any() and each["labels"] == [1, 2] for each in changed.values())
    assert batch["pixel_values"].equal(pictures()["pixel_values"])  # the batch itself is left as it was


def test_the_same_noise_goes_to_every_model_and_another_to_the_next_batch():
    first, again, second = (corrupt("pose", "noise", pictures(), number)["pixel_values"] for number in (0, 0, 1))
    assert first.equal(again) and not first.equal(second)


def test_of_voices_and_organs_noise_is_as_large_as_each_channel_has_it():
    values = torch.randn(4, 500, 2) * torch.tensor([1.0, 10.0])
    noise = corrupt("voice_rvc", "noise", {"phone": values}, 0)["phone"] - values
    assert noise.std(dim=(0, 1)).tolist() == pytest.approx([0.5, 5.0], rel=0.1)
    assert corruptions("voice_rvc") == corruptions("medical_sam3d") == ("none", "noise")


def test_a_loader_of_changed_batches_is_as_long_and_of_the_same_data():
    class Loader(list):
        dataset = "faces"

    loader = ChangedBatches(Loader([1, 2, 3]), lambda batch, number: batch * 10 + number)
    assert (list(loader), len(loader), loader.dataset) == ([10, 21, 32], 3, "faces")


def toy(scale=1.0):
    model = nn.Sequential()
    model.add_module("backbone", nn.Linear(4, 4, bias=False))
    model.add_module("head", nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
    nn.init.eye_(model.backbone.weight)
    model.backbone.weight.data *= scale
    return model.requires_grad_(False)


def test_drift_is_how_far_the_features_moved_in_their_own_length(monkeypatch):
    monkeypatch.setattr(behaviour, "outputs", lambda task, model, batch: model(batch["x"]))
    batches = [{"x": torch.randn(3, 4)}, {"x": torch.randn(2, 4)}]
    assert head_layer("pose", toy(), ("head",)) == "head.0"  # the first of the head, which the features go into
    for scale, moved in ((1.0, 0.0), (1.25, 0.25), (-1.0, 2.0)):
        assert drift("pose", toy(scale), toy(), ("head",), batches) == pytest.approx(moved)


def test_all_models_take_turns_three_times_at_least(monkeypatch):
    asked = []
    monkeypatch.setattr(behaviour, "outputs", lambda task, model, batch: asked.append(model))
    monkeypatch.setattr(behaviour, "SECONDS", 0.0)
    found = median_times("pose", {"base": "a", "full": "b"}, {}, "cpu")
    assert asked == ["a", "b"] * 4 and found.keys() == {"base", "full"} and all(0 <= ms < 1000 for ms in found.values())


def test_what_was_found_is_said_in_lines():
    found = {
        "metric": "mcd",
        "split": "test",
        "corrupted": {"none": {"full": 3.6, "lora": 3.7}, "noise": {"full": 4.0, "lora": 4.25}},
        "milliseconds": {"base": 10.0, "lora_merged": 10.04},
        "device": "cpu",
        "threads": 1,
        "drift": {"full": 0.5, "lora": 0.25},
    }
    lines = [line.split() for line in in_lines(found).splitlines()]
    assert lines[1:4] == [["as", "it", "is", "3.6000", "3.7000"], ["noise", "4.0000", "4.2500"],
                          ["drift", "from", "the", "base", "0.5000", "0.2500"]]  # fmt: skip
    assert "base 10.0, lora merged 10.0 (cpu, threads: 1)" in in_lines(found)
