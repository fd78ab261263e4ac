"""What checkpoints of all tasks share: which one is taken, what it may hold, and that no base runs code of its own."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from conftest import CLASSIFICATION, ROOT

from common import folders
from common.bases import check_sizes, class_tensors, train_mode
from common.checkpoint import atomic_folder
from common.config import Range, UserError
from common.folders import check_data_dir, eval_places, make_once, newest_best, predictions_folder
from common.lora import LoRAConfig, inject_lora
from common.saved_models import choose_checkpoint, make_origin, open_checkpoint, save_lora
from common.schema import check_fields

CONFIG = SimpleNamespace(data_dir="", batch_size=4, seed=0)


def leave_run(root, name, method, age):
    """A run folder as newest_best sees it, so many seconds old."""
    best = root / "outputs" / "toy" / name / "checkpoints" / "best"
    best.mkdir(parents=True)
    (root / "outputs" / "toy" / name / "summary.json").write_text(json.dumps({"method": method}))
    os.utime(best, (1e9 - age, 1e9 - age))
    return best


def test_the_newest_run_of_either_kind_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    with pytest.raises(UserError, match="no lora run in .*toy: train first"):
        newest_best("toy", "lora")
    full = leave_run(tmp_path, "mine", "full", age=0)
    leave_run(tmp_path, "lora", "lora", age=2)
    dora = leave_run(tmp_path, "dora", "dora", age=1)
    assert newest_best("toy", "lora") == dora and newest_best("toy", "full") == full
    head = leave_run(tmp_path, "head", "head", age=0)
    assert newest_best("toy", "lora") == head


def test_a_place_where_no_folder_can_be_is_found_before_anything_is_done_for_it(tmp_path):
    (tmp_path / "notes").touch()
    for place in (tmp_path, tmp_path / "new" / "folder"):
        folders.check_place("--output_dir", place)
    for place in (tmp_path / "notes", tmp_path / "notes" / "new" / "folder"):
        with pytest.raises(UserError, match="^--output_dir: .*notes is a file, and a folder is wanted there$"):
            folders.check_place("--output_dir", place)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_results_go_beside_the_checkpoint_or_where_they_are_wanted(tmp_path, monkeypatch):
    config = SimpleNamespace(checkpoint=str(tmp_path / "run" / "checkpoints" / "best"), output_dir="", split="val")
    assert eval_places(config) == (tmp_path / "run" / "eval.json", tmp_path / "run" / "eval_val")
    config = SimpleNamespace(checkpoint=str(tmp_path / "model"), output_dir="", split="test")
    assert eval_places(config) == (tmp_path / "model" / "eval_test.json", tmp_path / "model" / "eval_test")
    config.output_dir = str(tmp_path / "out")
    file, folder = eval_places(config)
    assert file.parent == tmp_path / "out" and folder.is_dir()
    for left in ("predictions.json", "0001_dog.jpg"):
        assert predictions_folder(config, {"task": "toy", "method": "lora"}) == tmp_path / "out"
        (tmp_path / "out" / left).touch()
        with pytest.raises(UserError, match="out holds predictions already"):
            predictions_folder(config, {"task": "toy", "method": "lora"})
        (tmp_path / "out" / left).unlink()
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    config.output_dir = ""
    root = tmp_path / "outputs" / "toy" / "predictions" / "lora"
    (root / "7").mkdir(parents=True)
    made = [predictions_folder(config, {"task": "toy", "method": "lora"}) for _ in range(3)]
    assert made == [root / "8", root / "9", root / "10"] and all(folder.is_dir() for folder in made)


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    config = SimpleNamespace(checkpoint=str(tmp_path / "run" / "checkpoints" / "best"), output_dir="", split="val")
    for place in ("file", "file/below"):
        config.output_dir = str(tmp_path / place)
        for ask in (lambda: eval_places(config), lambda: predictions_folder(config, {"task": "toy", "method": "lora"})):
            with pytest.raises(UserError, match=rf"written into {config.output_dir}.*; choose another --output_dir"):
                ask()
    config.output_dir = ""
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK or Path(place).name != "run")  # root may write anywhere
    with pytest.raises(UserError, match="run: it is read-only; choose another"):
        eval_places(config)
    with pytest.raises(UserError, match="run: it is read-only; name your own data with --data_dir"):
        make_once(tmp_path / "run" / "demo", lambda folder: folder.mkdir())


def test_data_that_is_not_there_is_said_before_a_model_is_loaded(tmp_path):
    check_data_dir("", {"data_dir": ""})  # the demo's
    check_data_dir(str(tmp_path), {"data_dir": "/gone"})
    with pytest.raises(UserError, match=r"--data_dir: there is no folder \(or CSV file\) .*nowhere$"):
        check_data_dir(str(tmp_path / "nowhere"), {"data_dir": str(tmp_path)})
    with pytest.raises(UserError, match="nowhere; the checkpoint was trained on it: say with --data_dir where"):
        check_data_dir("", {"data_dir": str(tmp_path / "nowhere")})


def test_demo_data_that_was_not_finished_is_made_anew(tmp_path):
    folder, made = tmp_path / "demo", []

    def make(aside):
        aside.mkdir()
        (aside / f"{len(made)}.png").touch()
        made.append(aside)
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(folder, make)
    assert not folder.exists()
    assert make_once(folder, make) == make_once(folder, make) == folder and len(made) == 2
    assert [path.name for path in folder.iterdir()] == ["1.png"]


@pytest.mark.parametrize("origin", [{}, [], {"task": "toy", "method": "dora"}, {"task": "other", "method": "full"}], ids=str)
def test_a_folder_of_another_origin_is_refused(tmp_path, origin):
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is a checkpoint of \w+ \(\w+\), not of toy"):
        open_checkpoint(tmp_path, "toy")


ODD = {
    "method": [["full"], {}, None],
    "base": [None, "b", {}, {"name": "b"}, {"name": "", "sha256": ""}, {"name": 3, "sha256": ""}, {"name": "b", "sha256": 3}],
    "classes": [None, [], 3, [1], "cat"],
    "data_dir": [None, 3, []],
    "batch_size": [None, "8", 0, True],
    "seed": [None, "0", 1.5],
    "exclude": [None, 3],
    "data_format": [None, 3, []],
    "image_size": ["64", 10**9, True],
    "scale": [math.nan, math.inf, -1.0],
    "threshold": [2, "best"],
    "modality": ["pet", []],
    "prompts": [["a {label}"]],
    "whole": ["head", [""], {}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values], ids=str)
def test_an_origin_that_these_scripts_did_not_write_is_refused(tmp_path, key, value):
    origin = make_origin("toy", "full", {"name": "b", "sha256": ""}, CONFIG)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    assert open_checkpoint(tmp_path, "toy")[1] == origin
    (tmp_path / "origin.json").write_text(json.dumps({**origin, key: value}))
    with pytest.raises(UserError, match="not of toy" if key == "method" else rf"origin\.json is damaged: its {key} is "):
        open_checkpoint(tmp_path, "toy")


KINDS = {
    "text": (str, ["a", ""], [None, 1, ["a"]]),
    "whole number": (int, [0, -1], [True, 1.0, "1", None]),
    "number": (float, [0, 0.5], [True, math.nan, math.inf, "1", 10**400]),
    "in a range": (Annotated[int, Range(1, 5)], [1, 5], [0, 6, 1.5]),
    "some, not too many": (Annotated[list[str], Range(1, 2)], [["a"], ["a", "b"]], [[], ["a"] * 3, "a", [1]]),
    "list of lists": (list[list[int]], [[], [[]], [[1, 2]]], [[1], [[1.5]], {}]),
    "by name": (dict[str, float], [{}, {"a": 1}], [{"a": "1"}, [], None]),
    "one of": (Literal["a", 1], ["a", 1], ["b", True, ["a"]]),
    "or nothing": (float | None, [None, 1], ["", []]),
    "object": ({"a": int}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"a": "1"}, [1]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_is_of_its_kind_or_named_with_its_file(kind):
    kind, good, bad = KINDS[kind]
    for value in good:
        check_fields({"field": value, "another version's": 1}, {"field": kind}, "file.json")
    for value in bad:
        for needed, others in (({"field": kind}, {}), ({}, {"field": kind})):
            with pytest.raises(UserError, match=r"file\.json is damaged: its field is "):
                check_fields({"field": value}, needed, "file.json", others)
    check_fields({}, {}, "file.json", {"field": kind})
    with pytest.raises(UserError, match="its field is missing"):
        check_fields({}, {"field": kind}, "file.json")
    with pytest.raises(UserError, match=r"it holds \[\] where"):
        check_fields([], {"field": kind}, "file.json")


def test_what_an_origin_lacks_is_said_where_it_is_asked_for(tmp_path):
    origin = make_origin("toy", "full", {"name": "b", "sha256": ""}, CONFIG)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    found = copy.deepcopy(open_checkpoint(tmp_path, "toy")[1])
    with pytest.raises(UserError, match=r"origin\.json is damaged: its classes is missing"):
        found["classes"]


def test_an_origin_nested_without_end_is_no_json(tmp_path):
    (tmp_path / "origin.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"origin\.json is not valid JSON"):
        open_checkpoint(tmp_path, "toy")


def test_the_checkpoint_of_a_run_folder_is_its_best_one_which_a_line_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    best = leave_run(tmp_path, "mine", "full", age=0)
    origin = make_origin("toy", "full", {"name": "b", "sha256": ""}, CONFIG)
    with atomic_folder(best) as aside:
        (aside / "origin.json").write_text(json.dumps(origin))
        (aside / "model.safetensors").touch()
    os.utime(best / "origin.json", (1e9, 1e9))
    run = best.parent.parent
    assert open_checkpoint(run, "toy") == (best, origin) and capsys.readouterr().out == ""
    for named in ("", str(run), str(best)):
        assert choose_checkpoint(named, "toy", "full") == (str(best), origin)
        said = capsys.readouterr().out
        assert f"checkpoint: {best} (full, made 2001-09-" in said and said.count("\n") == 1


def test_one_kind_may_be_asked_for(tmp_path):
    (tmp_path / "origin.json").write_text(json.dumps(make_origin("toy", "full", {"name": "b", "sha256": ""}, CONFIG)))
    (tmp_path / "model.safetensors").touch()
    assert open_checkpoint(str(tmp_path), "toy", "full")[1] == open_checkpoint(tmp_path, "toy")[1]
    with pytest.raises(UserError, match=r"is a checkpoint of toy \(full\), not of toy \(lora\)"):
        open_checkpoint(tmp_path, "toy", "lora")


def test_what_else_a_model_needs_lies_beside_its_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Sequential):
        def save_extra(self, folder):
            (folder / "extra.json").write_text("{}")

    model = get_peft_model(Model(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    processor = SimpleNamespace(save_pretrained=lambda folder: None)
    save_lora(tmp_path / "best", model, processor, make_origin("toy", "lora", {"name": "b", "sha256": ""}, CONFIG))
    assert (tmp_path / "best" / "extra.json").is_file() and "extra.json" in (tmp_path / "best" / "manifest.json").read_text()
    assert open_checkpoint(tmp_path / "best", "toy")[1]["method"] == "lora"


# ---- what relies on the libraries' inner workings: a failure here says that one of them has changed ------------------------


def test_the_library_builds_class_layers_from_the_number_of_labels():
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**small, image_size=32, patch_size=16, id2label={i: str(i) for i in range(16)})  # as many as channels
    build, model = ViTForImageClassification._from_config, ViTForImageClassification(config)
    assert class_tensors(build, model) == ["classifier.weight", "classifier.bias"]
    inject_lora(model, LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["classifier"]))
    assert class_tensors(build, model) == ["classifier.weight", "classifier.bias"]  # adapters hide nothing, and are none


def test_train_mode_keeps_every_kind_of_batch_norm_in_eval():
    from timm.layers import BatchNormAct2d

    kinds = [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm, BatchNormAct2d]
    model = torch.nn.Sequential(torch.nn.Dropout(), *(kind(4) for kind in kinds))
    train_mode(model)
    assert [layer.training for layer in model] == [True] + [False] * len(kinds)


def test_a_base_with_code_of_its_own_is_refused_without_a_question(tmp_path):
    """transformers would ask on the terminal, and run the code after a y."""
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    names = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    for file in ("config.json", "preprocessor_config.json"):
        maps = names if file == "config.json" else {"AutoImageProcessor": "own.Processor"}
        (tmp_path / file).write_text(json.dumps({"model_type": "of_their_own", "auto_map": maps}))
    (tmp_path / "own.py").write_text(code)
    load = f"import sys; sys.path[:0] = [{str(CLASSIFICATION)!r}, {str(ROOT)!r}]; from model import load_base; "
    load += f"load_base({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", load], input="y\ny\n", capture_output=True, text=True, timeout=120)
    assert "UserError" in done.stderr and "can be loaded safely" in done.stderr and not (tmp_path / "ran").exists()


def test_numbers_that_no_model_picture_or_sound_has_are_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 44100, "size": {"height": 640}}))
    check_sizes(tmp_path)
    for odd in ({"sampling_rate": 10**9}, {"size": {"height": 44100}}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(odd))
        with pytest.raises(UserError, match="cannot be"):
            check_sizes(tmp_path)
