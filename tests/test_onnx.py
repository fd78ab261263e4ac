"""ONNX files: what is written answers as the model does, by onnxruntime alone; what does not is not kept."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
from conftest import ROOT
from PIL import Image
from tasks import TASKS, call, in_task, one_line, read, scratch, small_data, trained

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
from common.config import UserError  # noqa: E402
from export_onnx import main, needs  # noqa: E402

MEASURED = ("classification", "pose", "clip")  # by --int8
OUTPUTS = {"classification": ["logits"], "detection": ["logits", "pred_boxes"], "pose": ["keypoints", "scores", "heatmaps"]}
OUTPUTS |= {"clip": ["logits", "image_embeds"], "voice_rvc": ["audio"]}


def chosen(*names) -> list:
    """Tasks as parameters. Slow are pose and CLIP, whose graphs are made as a classifier's is, and a voice, which trains long."""
    slow = ("pose", "clip", "voice_rvc")
    return [pytest.param(TASKS[name], marks=[pytest.mark.slow] * (name in slow)) for name in names]


@pytest.fixture(params=chosen(*OUTPUTS), ids=str)
def task(request):
    return request.param


@cache
def exported(task) -> SimpleNamespace:
    """The .onnx of the task's small LoRA run, its .json, the session, what was printed; with --int8 those of MEASURED."""
    file = scratch() / task.name / "onnx" / "tuned.v1.onnx"
    flags = ["--checkpoint", trained(task, "lora").folder, "--output", file, "--threads", 1]
    done = call(task, "export_onnx.py", *flags, *["--int8"] * (task.name in MEASURED), folder=SCRIPTS)
    session = onnxruntime.InferenceSession(str(file))
    return SimpleNamespace(file=file, about=read(file.with_suffix(".json")), session=session, said=done.stdout)


def by_lines(file: Path, *args) -> list[str]:
    """What the lines beside a file print, in a process of their own that gets by without torch and without the project."""
    start = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    check = "assert not {'torch', 'transformers', 'common'} & set(sys.modules)"
    command = [sys.executable, "-c", f"{start}; {check}", str(file.with_suffix(".py")), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def made_up(session, count: int) -> dict:
    """Inputs of noise, `count` of each, for a graph with pictures of a fixed size or a voice of 30 frames."""
    random, sizes, inputs = np.random.default_rng(0), {"batch": count, "frames": 30}, {}
    for each in session.get_inputs():
        shape = [sizes.get(size, size) for size in each.shape]
        if each.name == "noise":
            shape[2] = 30 * 160
        values = random.normal(size=shape) if each.type == "tensor(float)" else random.integers(1, 9, shape)
        inputs[each.name] = values.astype(np.float32 if each.type == "tensor(float)" else np.int64)
    return inputs | {name: np.full(count, value) for name, value in {"phone_lengths": 30, "ds": 0}.items() if name in inputs}


@pytest.mark.slow
def test_a_graph_takes_any_number_at_once_and_each_gets_its_own_answer(task):
    session = exported(task).session
    assert [each.name for each in session.get_outputs()] == OUTPUTS[task.name]
    inputs = made_up(session, 5)
    together = session.run(None, inputs)
    alone = [session.run(None, {name: each[i : i + 1] for name, each in inputs.items()}) for i in (0, 4)]
    for i, place in enumerate((0, 4)):
        for whole, one in zip(together, alone[i], strict=True):
            assert len(whole) == 5 and np.abs(whole[place]).max() > 1e-3
            if task.name != "detection":  # which orders queries that score alike as rounding has it
                np.testing.assert_allclose(whole[place], one[0], atol=1e-3 * np.abs(whole).max())


def test_the_adapter_the_merged_model_and_the_graph_are_compared_before_it_is_kept(task):
    said = exported(task).said
    compared = said[: said.index("opset 18")]
    for name in set(OUTPUTS[task.name]) - {"scores"}:
        assert f"{name}, merged" in compared and f"{name}, onnx" in compared
    assert not [path for path in exported(task).file.parent.iterdir() if path.name.startswith(".")]


def test_the_file_itself_says_what_a_program_needs(task):
    found, origin = exported(task), read(trained(task, "lora").best / "origin.json")
    inside = {key: json.loads(text) for key, text in found.session.get_modelmeta().custom_metadata_map.items()}
    assert inside == found.about
    assert inside["task"] == task.name and inside["method"] == "lora" and inside["base"] == origin["base"] and inside["merged"]
    assert inside["inputs"] == {each.name: each.shape for each in found.session.get_inputs()}
    if task.name in ("classification", "detection", "clip"):
        assert inside["classes"] == origin["classes"]
    if task.name == "detection":
        assert inside["threshold"] == origin.get("threshold", 0.5)


@pytest.mark.slow
def test_an_adapter_that_stays_beside_the_weights_is_not_called_merged(tmp_path):
    task, out = TASKS["classification"], tmp_path / "beside.onnx"
    words = list(map(str, flags(task, out)))

    def run():
        sys.path.append(str(SCRIPTS))
        import export_onnx
        from common import peft_adapters

        peft_adapters.keeps_answers = lambda *_: False  # as where a layer computes with another weight than it holds
        export_onnx.main(words)

    said = in_task(task, run)
    assert "logits, onnx" in said and "logits, merged" not in said
    assert read(out.with_suffix(".json"))["merged"] is False
    names = [each.name for each in onnx.load(str(out)).graph.initializer]
    assert any("lora_A" in name for name in names)


@pytest.mark.parametrize("task", chosen(*MEASURED), ids=str)
def test_int8_is_smaller_and_says_what_it_costs(task):
    found = exported(task)
    small = found.file.with_suffix(".int8.onnx")
    cost = read(small.with_suffix(".json"))["int8"]
    assert small.stat().st_size < 0.5 * found.file.stat().st_size and 0.8 < cost["share"] < 1
    exact, rough = (cost[task.metric][kind] for kind in ("fp32", "int8"))
    assert cost["milliseconds"]["int8"] > 0 and rough == pytest.approx(exact, rel=0.3, abs=0.2)
    inputs = made_up(found.session, 2)
    whole, part = (session.run(None, inputs)[0] for session in (found.session, onnxruntime.InferenceSession(str(small))))
    assert 0 < np.abs(whole - part).max() < 0.2 * np.abs(whole).max()
    assert f"{task.metric} " in found.said and f"{OUTPUTS[task.name][0]}, int8" in found.said


@pytest.mark.slow
def test_int8_is_refused_where_it_would_gain_nothing(tmp_path):
    task = TASKS["voice_rvc"]  # a vocoder of convolutions
    done = call(task, "export_onnx.py", *flags(task, tmp_path / "voice.onnx"), "--int8", folder=SCRIPTS, expect=2)
    assert "there is nothing to gain" in one_line(done) and not list(tmp_path.iterdir())


def flags(task, out: Path) -> list:
    return [trained(task, "lora").folder, "--output", out]


def answers(task, picture) -> list[list]:
    """What the task's Predictor says of a picture: rows of a name and numbers; of a detector the surest box alone."""
    checkpoint = trained(task, "lora").best

    def ask():
        from predictor import Predictor

        found = Predictor(checkpoint, device="cpu").predict(picture, **({"threshold": 0.0} if task.name == "detection" else {}))
        if task.name == "detection":
            found = [[found[0]["class"], found[0]["score"], *found[0]["box"]]]
        print("\n" + json.dumps([[name, *point] for name, point in found.items()] if isinstance(found, dict) else found))

    return json.loads(in_task(task, ask).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("task", chosen("classification", "detection", "pose", "clip"), ids=str)
def test_the_lines_beside_a_graph_say_of_a_picture_what_the_project_says(task, tmp_path):
    photo = tmp_path / "photo.png"
    for file in exported(task).file.parent.glob("tuned.v1.*"):
        shutil.copy(file, tmp_path)
    about = tmp_path / "tuned.v1.json"
    about.write_text(json.dumps(read(about) | {"threshold": 0}))
    source = min((small_data(task) / "val").rglob("*.png"))
    Image.open(source).convert("RGB").resize((150, 110), Image.Resampling.BICUBIC).save(photo)
    said = [line.split() for line in by_lines(tmp_path / "tuned.v1.onnx", photo)]
    expected = answers(task, photo)
    if task.name == "detection":
        said = [max(said, key=lambda line: float(line[1]))]
    assert [line[0] for line in said] == [row[0] for row in expected]
    for line, row in zip(said, expected, strict=True):
        tolerance = {"pose": 1.0, "detection": 2.0}.get(task.name, 0.02)  # Pillow and torchvision round pixels differently
        np.testing.assert_allclose([float(value) for value in line[1:]], row[1:], atol=tolerance)


def save_detr(folder, data) -> None:
    """A DETR as facebook's is, small and random, which takes pictures of any size, as a full run on this data leaves it."""
    import torch
    import transformers

    import model as of_task
    from common.saved_models import save_model

    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 8, "use_timm_backbone": False}
    detr = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **small)).eval()
    classes = [each["name"] for each in read(data / "annotations" / "instances_val.json")["categories"]]
    detr = of_task.with_class_head(detr, classes)
    for parameter in detr.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # queries that differ
    config = SimpleNamespace(data_dir=str(data), batch_size=4, seed=0, image_size=0, data_format="coco")
    origin = of_task.origin("full", detr, {"name": "some/detr", "sha256": "0"}, config)
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 60, "longest_edge": 80})
    save_model(folder, detr, processor, origin)


@pytest.mark.slow
def test_a_detector_that_takes_any_size_has_a_mask_and_finds_by_the_lines_what_it_finds_here(tmp_path):
    task, data, out = TASKS["detection"], small_data(TASKS["detection"]), tmp_path / "any.onnx"
    photos = [tmp_path / f"{width}.png" for width in (151, 70)]
    source = Image.open(min((data / "val").rglob("*.png"))).convert("RGB")
    for photo, size in zip(photos, ((151, 110), (70, 107)), strict=True):  # lying and standing, longer than it may be or not
        source.resize(size).save(photo)

    def run():
        sys.path.append(str(SCRIPTS))
        import export_onnx

        save_detr(tmp_path / "best", data)
        export_onnx.main([str(tmp_path / "best"), "--output", str(out)])
        from predictor import Predictor

        print("\n" + json.dumps(Predictor(tmp_path / "best", device="cpu").predict_batch(photos, threshold=0.0, nms=1)))

    expected = json.loads(in_task(task, run).splitlines()[-1])
    about = read(out.with_suffix(".json"))
    assert about["inputs"]["pixel_values"] == ["batch", 3, "height", "width"] and "pixel_mask" in about["inputs"]
    out.with_suffix(".json").write_text(json.dumps(about | {"threshold": 0}))
    for photo, found in zip(photos, expected, strict=True):
        said = max((line.split() for line in by_lines(out, photo)), key=lambda line: float(line[1]))
        assert said[0] == found[0]["class"]
        np.testing.assert_allclose([float(value) for value in said[1:]], [found[0]["score"], *found[0]["box"]], atol=1.0)


def voice_of(checkpoint, folder):
    """The wave that the model itself makes of the files and the numbers that the lines beside its graph use."""
    import torch

    from f0 import coarse_pitch
    from synthesizer import Excitation
    from task_modules import load

    model = load(checkpoint)[0]
    content, f0 = np.load(f"{folder}/content.npy"), np.load(f"{folder}/f0.npy")
    random, frames = np.random.default_rng(0), len(content)
    latent = random.standard_normal((1, model.config.inter_channels, frames))
    source = random.standard_normal((1, 1, frames * model.config.hop))
    drawn = [torch.tensor(each, dtype=torch.float32) for each in (latent, source, [0])]
    pitch = torch.from_numpy(coarse_pitch(f0))[None]
    given = torch.tensor(content)[None], torch.tensor([frames]), pitch, torch.tensor(f0)[None], torch.tensor([0])
    with torch.no_grad():
        np.save(f"{folder}/wave.npy", model.infer(*given, excitation=Excitation(*drawn))[0, 0].numpy())


@pytest.mark.slow
def test_the_lines_beside_a_voice_make_the_sound_that_the_model_makes(tmp_path):
    task, random = TASKS["voice_rvc"], np.random.default_rng(1)
    about = exported(task).about
    np.save(tmp_path / "content.npy", random.normal(size=(50, about["content_width"])).astype(np.float32))
    np.save(tmp_path / "f0.npy", (random.uniform(100, 300, 50) * (random.random(50) > 0.3)).astype(np.float32))
    by_lines(exported(task).file, tmp_path / "content.npy", tmp_path / "f0.npy", tmp_path / "out.wav")
    best = trained(task, "lora").best

    def run():
        sys.path.append(str(SCRIPTS))
        voice_of(best, tmp_path)

    in_task(task, run)
    wave, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == about["sample_rate"] and len(wave) == 50 * about["hop"]
    np.testing.assert_allclose(wave, np.load(tmp_path / "wave.npy").clip(-1, 1), atol=1e-3)


# ---- what is not kept ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_graph_that_answers_otherwise_leaves_no_file(tmp_path):
    task = TASKS["classification"]
    out = tmp_path / "new" / "model.onnx"
    words = list(map(str, flags(task, out)))

    def run():
        sys.path.append(str(SCRIPTS))
        import onnx

        import export_onnx

        recorded = export_onnx.record

        def record(form, model, inputs, path):
            recorded(form, model, inputs, path)
            graph = onnx.load(str(path))
            (bias,) = [each for each in graph.graph.initializer if each.name.endswith("classifier.bias")]
            bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
            onnx.save(graph, str(path))

        export_onnx.record = record
        with pytest.raises(export_onnx.UserError, match="onnx answers otherwise than .*logits"):
            export_onnx.main(words)

    in_task(task, run)
    assert not list(out.parent.iterdir())


def test_a_mesh_decoder_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("export_onnx.task_of", lambda folder: (folder, {"task": "medical_sam3d"}))
    with pytest.raises(UserError, match="sparse convolutions and FlexiCubes"):
        main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "a.onnx")])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_or_read_is_said_first(tmp_path):
    (tmp_path / "there.json").write_text("{}")
    for args, reason in (
        (["--output", tmp_path / "a.onnx"], "name a run and a file"),
        (["--checkpoint", tmp_path, "--output", tmp_path / "a.pt"], "must end in .onnx"),
        (["--checkpoint", tmp_path, "--output", tmp_path / "there.onnx"], "there.json is there already"),
        (["--checkpoint", tmp_path / "no", "--output", tmp_path / "a.onnx"], "there is no folder"),
        (["--checkpoint", tmp_path, "--output", tmp_path / "there.json" / "x" / "a.onnx"], "--output: .*there.json is a file"),
    ):
        with pytest.raises(UserError, match=reason):
            main(list(map(str, args)))
    with pytest.raises(UserError, match="needs the package onnx_of_mine: pip install onnx_of_mine"):
        needs("onnx", "onnx_of_mine")
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    best = shutil.copytree(trained(TASKS["classification"], "lora").best, tmp_path / "best")
    weights = best / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = call(
        TASKS["classification"], "export_onnx.py", "--checkpoint", best, "--output", tmp_path / "a.onnx", folder=SCRIPTS, expect=2
    )
    assert "adapter_model.safetensors" in one_line(done) and not list(tmp_path.glob("*.onnx*"))
