"""Checkpoints as objects of one's own program and as files of the official format; the pipeline: what reaches which step."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MEDICAL, ROOT, use_task

from common.config import UserError
from common.saved_models import save_lora, save_model

TASK = MEDICAL
use_task(TASK)
sys.path.insert(0, str(ROOT / "scripts"))

from decoder import DecoderConfig, SLatMeshDecoder, read_decoder, read_tensors, write_decoder  # noqa: E402
from latents import LatentEncoder  # noqa: E402
from model import OrganMesher, load_base, load_checkpoint, origin, setup_for_finetuning  # noqa: E402
from predictor import Predictor  # noqa: E402
from processor import OrganProcessor  # noqa: E402
from sam3d_checkpoint import export, info  # noqa: E402

SMALL = DecoderConfig(resolution=8, model_channels=64, num_blocks=2, num_heads=4, window_size=4, num_groups=8)
CONFIG = SimpleNamespace(organs="", modality="auto", latents_dir="", data_dir="", batch_size=2, seed=0)
LORA = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "lora_targets": "all", "lora_rank_pattern": "", "lora_last_k": 0}


def shake(model, size=0.05):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """.full and .lora: checkpoints of a small model with noise in all that trains."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = shake(OrganMesher(LatentEncoder(1, 16), SLatMeshDecoder(SMALL)))
    processor = OrganProcessor(resolution=8, organs=["liver"])
    save_model(folder / "full", model, processor, origin("full", {"name": "demo", "sha256": "0" * 64}, CONFIG))
    model, processor, facts = load_base(str(folder / "full"))
    adapted = shake(setup_for_finetuning(model, SimpleNamespace(**LORA, frozen_dtype="fp32")))
    save_lora(folder / "lora", adapted, processor, origin("lora", facts, CONFIG))
    return SimpleNamespace(full=folder / "full", lora=folder / "lora")


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_exported_decoder_reads_as_the_official_one_and_says_what_the_tuned_one_says(tuned, tmp_path, method, ending, capsys):
    file = export(str(getattr(tuned, method)), tmp_path / "new" / f"decoder{ending}")
    assert "verified" in capsys.readouterr().out
    assert sorted(p.name for p in file.parent.iterdir()) == sorted(["decoder.json", file.name])  # nothing else is left
    config, tensors = read_decoder(file)
    stored, _ = read_tensors(file)
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert config == SMALL and not any(name.startswith("decoder.") or "lora" in name for name in kinds)
    assert kinds["blocks.0.attn.to_qkv.weight"] == kinds["upsample.0.skip_connection.conv.weight"] == torch.float16
    assert kinds["out_layer.weight"] == kinds["input_layer.weight"] == torch.float32
    own = load_checkpoint(getattr(tuned, method))[0].decoder
    copy = SLatMeshDecoder(config)
    copy.load_state_dict(tensors)
    cells, latents = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 5, 5]]), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(copy(cells, latents).features, own(cells, latents).features, rtol=0.02, atol=0.02)


def test_an_adapter_is_in_the_exported_file(tuned, tmp_path):
    _, one = read_decoder(export(str(tuned.full), tmp_path / "full.safetensors"))
    _, other = read_decoder(export(str(tuned.lora), tmp_path / "lora.safetensors"))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert {"blocks.0.attn.to_qkv.weight", "upsample.1.out_layers.3.conv.weight", "out_layer.weight"} <= changed
    assert "input_layer.weight" not in changed


def test_a_file_that_does_not_say_the_same_gets_no_name(tuned, tmp_path, monkeypatch):
    def spoiled(path, config, tensors):
        write_decoder(path, config, tensors | {"out_layer.bias": tensors["out_layer.bias"] + 1})

    monkeypatch.setattr("decoder.write_decoder", spoiled)
    with pytest.raises(UserError, match="out_layer.bias .* nothing was saved"):
        export(str(tuned.full), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr("sam3d_checkpoint.MOST_OFF", 1e-9)
    with pytest.raises(UserError, match="half precision .* nothing was saved"):
        export(str(tuned.full), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays_and_wrong_names_are_refused(tuned, tmp_path):
    (tmp_path / "a.ckpt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(str(tuned.full), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="must end in"):
        export(str(tuned.full), tmp_path / "a.onnx")
    with pytest.raises(UserError):
        export(str(tmp_path / "nothing"), tmp_path / "b.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"] and (tmp_path / "a.ckpt").read_text() == "mine"
    export(str(tuned.full), tmp_path / "a.ckpt", overwrite=True)
    assert read_decoder(tmp_path / "a.ckpt")[0] == SMALL


def test_info_tells_files_and_checkpoints_apart(tuned, tmp_path):
    file = export(str(tuned.lora), tmp_path / "a.safetensors")
    text = "\n".join(info(str(file)))
    assert "resolution 8" in text and "float16" in text and "float32" in text and "sha256" in text
    assert "method: lora" in "\n".join(info(str(tuned.lora))) and "organs: liver" in "\n".join(info(str(tuned.lora)))
    (tmp_path / "b.ckpt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="b.ckpt"):
        info(str(tmp_path / "b.ckpt"))


# ---- an object of one's own program --------------------------------------------------------------------------------------


def ball_of(radius):
    return (np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0) < radius).astype(np.uint8), np.diag([1.5, 1.5, 2.0, 1])


def test_a_whole_model_shares_its_base_with_no_adapter(tuned):
    with pytest.raises(UserError, match=f"{tuned.full} is a whole model"):
        Predictor(tuned.full).add(tuned.lora, "b")


def test_a_file_and_its_array_give_the_same_mesh_and_what_is_no_mask_is_refused(tuned, tmp_path):
    import nibabel

    labels, affine = ball_of(8)
    nibabel.save(nibabel.Nifti1Image(labels * 5, affine), tmp_path / "a.nii.gz")
    predictor = Predictor(tuned.full)
    of_file, of_array = predictor.predict(tmp_path / "a.nii.gz"), predictor.predict((labels * 5.0, affine), {"liver": 5})
    assert list(of_file) == ["5"] and list(of_array) == ["liver"]
    np.testing.assert_allclose(of_file["5"].vertices, of_array["liver"].vertices, atol=1e-4)
    for bad in ((labels / 2, affine), (labels[0], affine), (labels, affine[:3]), (labels, np.zeros((4, 4)))):
        with pytest.raises(ValueError, match="no mask"):
            predictor.predict(bad)
    with pytest.raises(ValueError, match="empty"):
        predictor.predict((labels, affine), {"spleen": 7})


# ---- the pipeline ----------------------------------------------------------------------------------------------------

STEP = """
import json, sys
FLAGS = {flags}
if "--help" in sys.argv:
    print("options:\\n  -h, --help            show this help message and exit")
    for flag in FLAGS:
        print(f"  --{{flag[:-1]}}, --no_{{flag[:-1]}}" if flag.endswith("!") else f"  --{{flag}} {{flag.upper()}}   some text")
else:
    print("STEP", json.dumps([{name!r}, sys.argv[1:]]))
    print("run folder /runs of mine/" + {name!r})
    print("3 organs ready: python train_lora.py --data_dir /my cache/scans")
    sys.exit({name!r} in sys.argv)
"""
STEPS = {
    "preprocess": ["data_dir", "group", "num_workers", "output_dir"],
    "train": ["data_dir", "model", "epochs", "output_dir", "resume!"],
    "train_lora": ["data_dir", "model", "epochs", "output_dir", "resume!", "lora_r"],
    "eval": ["checkpoint", "data_dir", "model", "split", "output_dir", "merge!"],
    "eval_lora": ["checkpoint", "data_dir", "model", "split", "output_dir", "merge!"],
}


@pytest.fixture
def pipeline(tmp_path):
    """Runs a copy of the script over steps that print what they are given: (exit code, {step: arguments}, what was printed)."""
    for name, flags in STEPS.items():
        (tmp_path / "medical_sam3d").mkdir(exist_ok=True)
        (tmp_path / "medical_sam3d" / f"{name}.py").write_text(STEP.format(flags=flags, name=name))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "compare.py").write_text(STEP.format(flags=[], name="compare"))
    script = shutil.copy(ROOT / "scripts" / "run_medical_pipeline.sh", tmp_path / "scripts")

    def run(*args):
        env = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(["bash", script, *args], cwd="/", env=env, capture_output=True, text=True, timeout=60)
        steps = [json.loads(line.removeprefix("STEP ")) for line in done.stdout.splitlines() if line.startswith("STEP ")]
        return done.returncode, dict(steps), done.stdout + done.stderr

    return run


def test_each_setting_of_the_pipeline_reaches_the_steps_that_have_it(pipeline):
    code, steps, _ = pipeline(
        *("--data-dir", "my scans", "--group", "P[0-9]+", "--epochs=3", "--lora_r", "2"),
        *("--no_merge", "--split", "test", "--resume"),
    )
    best = ["--checkpoint", "/runs of mine/train/checkpoints/best"]
    merge, data = ["--no_merge", "--split", "test"], ["--data_dir", "/my cache/scans"]  # as it was prepared, by --group
    assert code == 0 and list(steps) == ["preprocess", "train", "eval", "train_lora", "eval_lora", "compare"]
    assert steps["preprocess"] == ["--data_dir", "my scans", "--group", "P[0-9]+"]
    assert steps["train"] == ["--epochs", "3", "--resume", *data]
    assert steps["train_lora"] == ["--epochs", "3", "--lora_r", "2", "--resume", *data]
    assert steps["eval"] == [*merge, *best]
    assert steps["compare"] == ["/runs of mine/train", "/runs of mine/train_lora"]


def test_the_pipeline_without_arguments_is_the_demo_and_one_method_may_be_named(pipeline):
    steps = pipeline()[1]
    assert list(steps) == ["preprocess", "train", "eval", "train_lora", "eval_lora", "compare"] and steps["train"] == []
    steps = pipeline("--method", "lora", "--output_dir", "o")[1]
    assert list(steps) == ["preprocess", "train_lora", "eval_lora"]
    assert (
        steps["train_lora"] == ["--output_dir", "o"] and steps["eval_lora"][0] == "--checkpoint"
    )  # reports: in the run's folder


def test_the_pipeline_refuses_unknown_settings_first_and_stops_where_a_step_fails(pipeline):
    unknown = (["--lora_rank", "3"], ["--method", "dora"], ["--method", "full", "--lora_r", "3"], ["words"], ["--.*", "3"])
    for arguments in (*unknown, ["--epochs"], ["--epochs", "--resume"], ["--resume", "yes"], ["--method"]):
        code, steps, said = pipeline(*arguments)
        assert code == 2 and not steps and said.count("\n") == 1 and said.startswith("error: ")
    code, steps, _ = pipeline("--model", "train")
    assert code != 0 and list(steps) == ["preprocess", "train"]
    assert "run_medical_pipeline.sh" in pipeline("--help")[2] and not pipeline("--help")[1]
