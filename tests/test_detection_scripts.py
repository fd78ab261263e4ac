"""The detection scripts, run as a user runs them, on a few small pictures and a tiny random base."""

import hashlib
import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DETECTION, ROOT, Script, run_script, use_task
from PIL import Image
from test_detection_model import save_base

TASK = DETECTION
use_task(TASK)

SYNTHETIC = ["circle", "square", "triangle", "star"]
BCCD = ROOT.parent / "shared" / "data" / "bccd"
CONFIG = {"epochs": 2, "batch_size": 4, "warmup_steps": 2, "num_workers": 0, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/ (12 + 6 + 2 pictures), base/ and config.yaml with the settings that all runs share."""
    from synthetic import make_demo_data

    folder = tmp_path_factory.mktemp("detection")
    make_demo_data(folder / "data", train=12, val=6, test=2)
    save_base(folder / "base", classes=SYNTHETIC[:3])
    lines = {**CONFIG, "data_dir": str(folder / "data"), "model": str(folder / "base"), "output_dir": str(folder / "runs")}
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return folder


def call(place, script, *args, expect=0, config=True):
    settings = ["--config", place / "config.yaml"] if config else []
    return Script(DETECTION, script, [*settings, *args], place / f"log-{time.monotonic_ns()}").wait(expect)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(place):
    """The folders of a full and a LoRA run, two epochs each."""
    call(place, "train.py", "--lr", "1e-3")
    call(place, "train_lora.py", "--lora_r", "4")
    return SimpleNamespace(full=place / "runs" / "detection" / "full", lora=place / "runs" / "detection" / "lora")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_leaves_what_is_promised(runs, method):
    folder = getattr(runs, method)
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "predictions/validation.png", f"checkpoints/best/{weights}"):
        assert (folder / name).stat().st_size > 0, name
    summary = read(folder / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 6 and summary["epochs"] == 2
    assert summary["task"] == "detection" and summary["method"] == method and summary["data"]["left_out"] == {}
    counts = summary["parameters"]
    assert (counts["trainable"] == counts["total"]) == (method == "full") and counts["trainable"] > 0
    best = folder / "checkpoints" / "best"
    assert read(best / "origin.json")["classes"] == SYNTHETIC and (best / "preprocessor_config.json").exists()
    if method == "full":
        assert list(read(best / "config.json")["id2label"].values()) == SYNTHETIC


@pytest.mark.parametrize("method, script", [("full", "eval_lora.py"), ("lora", "eval.py")])  # the checkpoint counts, not the name
def test_eval_gives_the_metrics_that_training_recorded(runs, place, method, script):
    folder = getattr(runs, method)
    done = call(place, script, "--checkpoint", folder / "checkpoints" / "best", "--batch_size", 4, config=False)
    best = read(folder / "summary.json")["metrics"]["best"]
    found = read(folder / "eval.json")["metrics"]
    for name, value in found.items():
        if isinstance(value, dict):
            assert value == {k: pytest.approx(v, abs=1e-6) for k, v in best[name].items()}, name
        elif value is None or best[name] is None:
            assert value is best[name], name
        else:
            assert value == pytest.approx(best[name], abs=1e-6, rel=1e-6), name
    assert {"val_loss", "map", "map_50", "per_class_map"} <= set(found) and "6 pictures" in done.stdout
    for name in ("predictions.png", "worst.png", "precision_recall.png", "per_class.png"):
        assert (folder / "eval_val" / name).stat().st_size > 0


def test_eval_on_another_split_and_other_data(runs, place, tmp_path):
    best = runs.full / "checkpoints" / "best"
    call(place, "eval.py", "--checkpoint", best, "--split", "test", "--output_dir", tmp_path, config=False)
    assert read(tmp_path / "eval_test.json")["pictures"] == 2
    args = ["--checkpoint", best, "--data_dir", place / "data", "--data_format", "coco", "--output_dir", tmp_path / "again"]
    call(place, "eval.py", *args, config=False)
    assert read(tmp_path / "again" / "eval.json")["pictures"] == 6


@pytest.fixture(scope="module")
def pictures(place):
    """A user's folder: three pictures of different shapes, a broken one, and a file that is none."""
    folder = place / "pictures"
    folder.mkdir()
    for i, (name, size) in enumerate([("one.png", (96, 96)), ("two.jpg", (60, 120)), ("three.png", (150, 80))], 1):
        picture = Image.open(place / "data" / "val" / f"{i:06d}.png")
        picture.resize(size).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more than a beginning")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def check_coco_results(rows):
    """pycocotools takes the rows as results for a data set with these pictures."""
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in sorted({row["image_id"] for row in rows})],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(SYNTHETIC, 1)],
    }
    truth.createIndex()
    results = truth.loadRes([dict(row) for row in rows])
    assert len(results.anns) == len(rows)


def test_infer_writes_boxes_and_pictures_and_names_what_is_broken(runs, place, pictures, tmp_path):
    best = runs.full / "checkpoints" / "best"
    args = ["--input", pictures, "--checkpoint", best, "--threshold", 0, "--output_dir", tmp_path]
    done = call(place, "infer.py", *args, config=False)
    assert "broken.jpg" in done.stdout and "left out" in done.stdout and "3 pictures" in done.stdout
    rows = read(tmp_path / "predictions.json")
    check_coco_results(rows)
    assert len({row["image_id"] for row in rows}) == 3 and len(rows) == 3 * 8
    sizes = {"one.png": (96, 96), "two.jpg": (60, 120), "three.png": (150, 80)}
    for row in rows:
        width, height = sizes[os.path.basename(row["file_name"])]
        x, y, w, h = row["bbox"]
        assert 0 <= row["score"] <= 1 and row["category_name"] == SYNTHETIC[row["category_id"] - 1]
        assert w >= 0 and h >= 0 and -width <= x <= width and -height <= y <= height and w <= 1.01 * width
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_merged_and_unmerged_adapters_find_the_same_boxes(runs, place, pictures, tmp_path):
    args = ["--input", pictures, "--checkpoint", runs.lora / "checkpoints" / "best", "--threshold", 0.0]
    for name, flags in (("merged", []), ("apart", ["--no-merge", "--batch_size", 2])):
        call(place, "infer_lora.py", *args, *flags, "--output_dir", tmp_path / name, config=False)
    merged, apart = (
        sorted(read(tmp_path / name / "predictions.json"), key=lambda row: (row["image_id"], -row["score"]))
        for name in ("merged", "apart")
    )
    check_coco_results(merged)
    assert len(merged) == len(apart) == 24
    for a, b in zip(merged, apart, strict=True):
        assert a["image_id"] == b["image_id"] and a["score"] == pytest.approx(b["score"], abs=1e-4)
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=0.05)


def test_a_single_picture_and_a_glob_are_inputs_too(runs, place, pictures, tmp_path):
    best = runs.full / "checkpoints" / "best"
    for number, pattern in ((1, pictures / "one.png"), (2, pictures / "t*")):
        args = ["--input", pattern, "--checkpoint", best, "--output_dir", tmp_path / str(number)]
        assert f"{number} pictures" in call(place, "infer.py", *args, config=False).stdout


# ---- stop anywhere ---------------------------------------------------------------------------------------------------


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_run_that_was_killed_ends_with_the_same_bytes(runs, place):
    args = ["--config", place / "config.yaml", "--lora_r", "4", "--run_name", "killed", "--save_steps", "1"]
    folder = place / "runs" / "detection" / "killed"
    script = Script(DETECTION, "train_lora.py", args, place / "killed")
    in_second_epoch = folder / "checkpoints" / "last" / "step-00000004"  # there are 3 steps in each
    script.wait_for(in_second_epoch.exists, seconds=120)
    script.kill(signal.SIGKILL)
    script.wait(expect=-signal.SIGKILL)
    assert read(folder / "summary.json")["status"] == "running" and not (folder / "curves.png").exists()
    done = call(place, "train_lora.py", "--lora_r", "4", "--run_name", "killed", "--save_steps", "1", "--resume")
    assert "resumed at step" in done.stdout
    best, same = digests(folder / "checkpoints" / "best"), digests(runs.lora / "checkpoints" / "best")
    assert best == same and "adapter_model.safetensors" in best
    left, right = (read(f / "summary.json") for f in (folder, runs.lora))
    assert left["status"] == "finished" and left["metrics"] == right["metrics"] and left["resumed_at_steps"]


# ---- errors that a user can put right --------------------------------------------------------------------------------


def one_line(done):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_user_errors_are_one_line_and_exit_code_two(runs, place, tmp_path):
    def fails(script, *args, **options):
        return one_line(call(place, script, *args, expect=2, **options))

    runs_to = ["--output_dir", tmp_path / "runs"]
    assert "there is no folder" in fails("train_lora.py", "--data_dir", tmp_path / "nowhere", *runs_to)
    assert "there is no folder" in fails("train.py", "--model", tmp_path / "nowhere", *runs_to)
    (tmp_path / "wrong.yaml").write_text("epochs: 1\nlora_rank: 4\n")
    told = fails("train_lora.py", "--config", tmp_path / "wrong.yaml", config=False)
    assert "unknown setting 'lora_rank'" in told and "lora_r" in told
    assert "no layer's name ends in" in fails("train_lora.py", "--lora_targets", "qkv_everywhere", *runs_to)

    other = tmp_path / "data"
    (other / "train").mkdir(parents=True)
    table = read(place / "data" / "annotations" / "instances_train.json")
    table["categories"][0]["name"] = "hexagon"
    (other / "train" / "_annotations.coco.json").write_text(json.dumps(table))
    for picture in (place / "data" / "train").glob("*.png"):
        (other / "train" / picture.name).write_bytes(picture.read_bytes())
    best = runs.lora / "checkpoints" / "best"
    told = fails("eval_lora.py", "--checkpoint", best, "--data_dir", other, config=False)
    assert "classes that the checkpoint does not know: hexagon" in told
    save_base(tmp_path / "other", classes=SYNTHETIC[:3], seed=9)
    told = fails("eval_lora.py", "--checkpoint", best, "--model", tmp_path / "other", config=False)
    assert "an adapter fits no other base" in told
    assert "--input" in fails("infer.py", config=False)
    assert "no picture there" in fails("infer.py", "--input", tmp_path / "runs", config=False)


def test_a_failed_run_leaves_its_record(place, tmp_path):
    call(place, "train_lora.py", "--data_dir", tmp_path / "nowhere", "--output_dir", tmp_path, expect=2)
    summary = read(tmp_path / "detection" / "lora" / "summary.json")
    assert summary["status"] == "failed" and "there is no folder" in summary["error"]


# ---- beside the task -------------------------------------------------------------------------------------------------


def test_compare_reads_both_runs(runs, place, tmp_path):
    args = [runs.full, runs.lora, "--output_dir", tmp_path]
    done = Script(ROOT / "scripts", "compare.py", args, place / "compare").wait()
    assert "lora" in done.stdout and "full" in done.stdout and "map" in done.stdout


@pytest.mark.parametrize("flags", [["--single_file"], []])
def test_an_exported_copy_trains_outside_the_project(place, tmp_path, flags):
    """In a folder from where neither common/ nor the task's modules can be seen; Script fails if one was imported after all."""
    args = [DETECTION / "train_lora.py", tmp_path / "copy", "--no_demo", *flags]
    Script(ROOT / "scripts", "export.py", args, place / "export").wait()
    args = ["--config", place / "config.yaml", "--epochs", 1, "--max_steps_per_epoch", 1, "--output_dir", tmp_path / "runs"]
    Script(tmp_path / "copy", "train_lora.py", args, place / "copy").wait()
    assert read(tmp_path / "runs" / "detection" / "lora" / "summary.json")["steps"] == 1
    assert ((tmp_path / "copy" / "common").is_dir()) == (flags == [])


def test_real_data_trains(place, tmp_path):
    """Blood cells in Pascal VOC layout, another domain and other classes than the base knows."""
    if not BCCD.is_dir():
        pytest.skip(f"the BCCD pictures are not in {BCCD}")
    args = ["--data_dir", BCCD, "--epochs", 1, "--max_steps_per_epoch", 2, "--output_dir", tmp_path]
    done = call(place, "train_lora.py", *args)
    summary = read(tmp_path / "detection" / "lora" / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 2 and summary["data"]["format"] == "voc"
    assert "RBC" in done.stdout and "new: " in done.stdout


def test_the_demo_runs_without_arguments_in_a_fresh_process(tmp_path):
    done = run_script(DETECTION, "train_lora.py", "--output_dir", tmp_path, "--epochs", 1, "--max_steps_per_epoch", 2)
    summary = read(tmp_path / "detection" / "lora" / "summary.json")
    assert summary["status"] == "finished" and summary["base"]["name"] == "demo" and summary["data"]["name"] == "demo"
    assert "base: demo" in done.stdout and "data: demo (coco)" in done.stdout
    assert summary["metrics"]["before"]["map_50"] > 0.2  # the base knows three of the four classes from pictures of another look
