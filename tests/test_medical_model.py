"""Where a model comes from and what of it trains: official files as bases, parts by their exact names, files of adapters."""

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import MEDICAL, Script, use_task
from safetensors.torch import load_file, save_file

from common.config import UserError
from common.lora import LoRAConfig, adapted_layers, inject_lora, lora_parameters, merge_lora
from common.saved_models import save_lora, save_model

TASK = MEDICAL
use_task(TASK)

from decoder import DecoderConfig, SLatMeshDecoder, write_decoder  # noqa: E402
from losses import mesh_losses  # noqa: E402
from model import (  # noqa: E402
    LORA_PRESETS,
    OrganMesher,
    freeze_encoder,
    load_base,
    load_checkpoint,
    origin,
    set_up,
    setup_for_finetuning,
)
from predictor import Predictor  # noqa: E402

SMALL = DecoderConfig(resolution=8, model_channels=64, num_blocks=2, num_heads=4, num_groups=8)
CONFIG = {"model": "", "organs": "", "modality": "mr", "latents_dir": "", "data_dir": "", "batch_size": 2, "seed": 0, "every": 0}
LORA = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "lora_targets": "default", "lora_rank_pattern": "", "lora_last_k": 0}
OWN = ("decoder.out_layer.", "encoder.")


def settings(**changes):
    return SimpleNamespace(**CONFIG | LORA | {"frozen_dtype": "fp32", "gradient_checkpointing": False} | changes)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A decoder's file as the official ones are, but small."""
    torch.manual_seed(0)
    decoder = SLatMeshDecoder(SMALL)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight += 0.05 * torch.randn_like(weight)
    file = tmp_path_factory.mktemp("official") / "slat_decoder_mesh.ckpt"
    write_decoder(file, SMALL, decoder.state_dict())
    return file


def trained(model):
    """The model after two steps by the loss of training, on a ball; in the first, B is zero, so that A stays."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-30, 30, 31)] * 3, indexing="ij"), -1)
    edge = torch.arange(2, 6)
    coords = torch.cartesian_prod(torch.zeros(1, dtype=edge.dtype), edge, edge, edge).int()
    to_voxel = torch.tensor([[[30.0, 0, 0, 15], [0, 30, 0, 15], [0, 0, 30, 15]]])
    batch = {"truth": [grid.norm(dim=-1) - 14], "to_voxel": to_voxel, "edge": torch.tensor([60.0]), "index": torch.tensor([0])}
    for _ in range(2):
        sum(mesh_losses(model(coords, torch.randn(len(coords), 1, 4, 4, 4)), batch).values()).backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight -= 0.02 * weight.grad.sign()
                    weight.grad = None
    return model.eval()


def answers(model):
    torch.manual_seed(3)
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 5, 5]])
    with torch.no_grad():
        return model(coords, torch.randn(3, 1, 4, 4, 4)).features


def test_an_official_file_is_the_base_before_anything_is_put_on_it(official):
    """What a decoder says is that of the file, all of it, in the full model and below the adapters."""
    torch.manual_seed(0)
    tensors = torch.load(official)
    for prepare in (freeze_encoder, lambda model: setup_for_finetuning(model, settings())):
        model, processor, facts = load_base(str(official))
        assert processor.resolution == SMALL.resolution and processor.every == 5 and facts["name"] == str(official)
        model = prepare(model)
        state = {name.replace("base_layer.", ""): tensor for name, tensor in model.decoder.state_dict().items()}
        assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
        assert all(p.requires_grad for p in model.encoder.parameters()), "a new encoder has everything to learn"
    assert load_base(str(official))[2] == facts, "new weights are no part of the base"


def test_an_encoder_that_is_not_new_stays_as_it_is():
    model = freeze_encoder(load_base("demo")[0])
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.decoder.parameters())


@pytest.mark.parametrize("which", LORA_PRESETS)
def test_what_trains_beside_adapters_is_named_exactly_and_is_in_their_file(official, tmp_path, which):
    """ "out_layer" is also a part of upsample.*.out_layers.*; and what trains without being saved is lost."""
    base, processor, facts = load_base(str(official))
    model = trained(setup_for_finetuning(base, settings(lora_targets=which)))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {n for n, _ in model.named_parameters() if n.startswith(OWN)}
    kinds = Counter(re.sub(r"\d+", "N", name) for name in adapted_layers(model))
    expected = {"decoder.blocks.N.attn.to_qkv": 2, "decoder.blocks.N.attn.to_out": 2}
    expected |= {"decoder.blocks.N.mlp.mlp.N": 4} if which != "attention" else {}
    expected |= (
        {"decoder.upsample.N.out_layers.N.conv": 4, "decoder.upsample.N.skip_connection.conv": 2} if which == "all" else {}
    )
    assert kinds == expected
    save_lora(tmp_path / which, model, processor, origin("lora", facts, settings()))
    saved = load_file(tmp_path / which / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for merge in (False, True):
        again, _, about = load_checkpoint(tmp_path / which, merge=merge)
        assert about["method"] == "lora" and bool(adapted_layers(again)) != merge
        torch.testing.assert_close(answers(again), answers(model), rtol=1e-4, atol=1e-5)
    assert (answers(load_base(str(official))[0]) - answers(model)).abs().max() > 0.1


def test_adapters_of_the_official_size_have_the_numbers_of_their_formula():
    for which, r, expected in (
        *(("attention", 4, 221_184), ("attention", 16, 884_736), ("default", 4, 589_824), ("default", 8, 1_179_648)),
        ("all", 4, 589_824 + 142_080),
    ):
        with torch.device("meta"):
            model = OrganMesher(None, SLatMeshDecoder(DecoderConfig()))
            inject_lora(model, LoRAConfig(r=r, target_modules=LORA_PRESETS[which], modules_to_save=["decoder.out_layer"]))
        assert sum(p.numel() for p in lora_parameters(model)) == expected
        whole = sum(p.numel() for p in model.parameters() if p.requires_grad) - expected
        assert whole == 9_797, "the output layer, and nothing of upsample.*.out_layers"


def test_layers_have_the_ranks_that_were_asked_for_and_the_last_blocks_alone_their_adapters(official):
    base = load_base(str(official))[0]
    model = setup_for_finetuning(
        base, settings(lora_targets="all", lora_rank_pattern="to_qkv=3,upsample=1", lora_last_k=3)
    )  # two of them divide cells
    ranks = {name: layer.r for name, layer in adapted_layers(model).items()}
    assert not any(name.startswith("decoder.blocks.0.") for name in ranks) and len(ranks) > 4
    for name, rank in ranks.items():
        assert rank == (3 if name.endswith("to_qkv") else 1 if ".upsample." in name else 2), name
    merged = merge_lora(trained(model), inplace=False)
    assert adapted_layers(model) and not adapted_layers(merged)
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"lora_targets": "to_q"}, "to_q"),
        ({"lora_targets": "(to_qkv"}, "no valid regular expression"),
        ({"lora_targets": "out_layer"}, "out_layer"),  # trains whole
        ({"lora_rank_pattern": "to_qkv:8"}, "no name=rank"),
        ({"lora_rank_pattern": "head=8"}, "head"),
        ({"frozen_dtype": "bf16"}, "--frozen_dtype bf16"),
    ],
)
def test_settings_of_an_adapter_that_fit_nothing_are_refused(official, changes, fault):
    with pytest.raises(UserError, match=fault.replace("(", r"\(")):
        setup_for_finetuning(load_base(str(official))[0], settings(**changes))


def test_a_checkpoint_that_lacks_a_tensor_or_has_another_is_refused(official, tmp_path):
    base, processor, facts = load_base(str(official))
    save_model(tmp_path / "full", base, processor, origin("full", facts, settings()))
    file = tmp_path / "full" / "model.safetensors"
    tensors = load_file(file)
    for wrong in ("decoder.blocks.1.attn.to_out.bias", "encoder.out.bias"):
        save_file({name: tensor for name, tensor in tensors.items() if name != wrong}, file)
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "full")
        (tmp_path / "full" / "manifest.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"{wrong} is missing"):
            load_base(str(tmp_path / "full"))


def test_a_model_of_given_latents_has_no_encoder(official):
    base, processor, _ = load_base(str(official))
    model, processor = set_up(base, processor, settings(latents_dir="latents", every=3))
    assert model.encoder is None and (processor.latents, processor.every) == ("precomputed", 3)
    with pytest.raises(UserError, match="--latents_dir says where"):
        set_up(model, processor, settings(model="mine"))


def test_an_image_is_scaled_in_inference_as_it_was_in_training(official, tmp_path):
    """A model that learnt images as MR gets them as MR, whatever their values look like."""
    base, processor, facts = load_base(str(official))
    save_model(tmp_path / "full", base, processor, origin("full", facts, settings()))
    mask, image = np.zeros((24, 24, 24), np.uint8), np.random.default_rng(0).normal(0, 300, (24, 24, 24)).astype(np.float32)
    mask[6:18, 6:18, 6:18] = 1
    for name, values in (("mask", mask), ("image", image)):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii")
    seen, predictor = [], Predictor(tmp_path / "full", device="cpu")
    predictor.mesh = lambda organ, *rest, **more: seen.append(organ.image) or [None]
    predictor.predict(tmp_path / "mask.nii", image=tmp_path / "image.nii")
    as_ct = np.clip((image + 1000) / 2000, 0, 1)[6:18, 6:18, 6:18]
    assert np.abs(seen[0][3:-3, 3:-3, 3:-3] - as_ct).mean() > 0.05


def test_eval_says_which_organs_a_model_misses_to_the_end(tmp_path, monkeypatch):
    """A model that finds no surface is scored as such: Dice 0, no distance, and a report that names what was missed."""
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "masks").mkdir()
    points = np.indices((22, 20, 18)).reshape(3, -1).T - (10.5, 9.5, 8.5)
    for name, radii in (("a", (8, 7, 6)), ("b", (7, 8, 6))):
        mask = ((points / radii) ** 2).sum(1).reshape(22, 20, 18) < 1
        nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), np.diag([1.5, 1.5, 2, 1])), tmp_path / "masks" / f"{name}.nii")
    base, processor, facts = load_base("demo")
    with torch.no_grad():
        base.decoder.out_layer.weight[:8] = 0
        base.decoder.out_layer.bias[:8] = 1  # all is outside
    about = origin("full", facts, settings(data_dir=str(tmp_path / "masks"), modality="auto"))
    save_model(tmp_path / "best", base, replace(processor, organs=["1"]), about)
    args = ["--checkpoint", tmp_path / "best", "--output_dir", tmp_path / "out"]
    said = Script(TASK, "eval.py", args, tmp_path / "log", draw=False).wait(0).stdout
    metrics = json.loads((tmp_path / "out" / "eval.json").read_text())["metrics"]
    assert (metrics["dice"], metrics["hd95"], metrics["failed"]) == (0, None, 1)
    assert "1 missed" in (tmp_path / "out" / "eval_val" / "report.md").read_text() and "could not be made" not in said
