"""The classification scripts, run as a user runs them, on a few small pictures and a tiny random base."""

import csv
import hashlib
import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLASSIFICATION, ROOT, Script, run_script, use_task
from PIL import Image
from test_classification_model import save_base

TASK = CLASSIFICATION
use_task(TASK)

CLOTHING = ROOT.parent / "shared" / "data" / "clothing"
CONFIG = {"epochs": 2, "batch_size": 8, "warmup_steps": 2, "num_workers": 0, "device": "cpu", "threads": 1, "cache": "auto"}
CONFIG |= {"flip": True, "crop": 0.6, "randaugment": 5, "mixup": 0.4, "class_weights": "balanced"}  # all that is random
PLOTS = ("loss", "metrics", "confusion_matrix", "f1_per_class")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/ (3 + 2 + 1 pictures of each of 8 classes), base/ and config.yaml with what all runs share."""
    from synthetic import make_demo_data

    folder = tmp_path_factory.mktemp("classification")
    make_demo_data(folder / "data", train=3, val=2, test=1)
    save_base(folder / "base")
    lines = {**CONFIG, "data_dir": str(folder / "data"), "model": str(folder / "base"), "output_dir": str(folder / "runs")}
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return folder


def start(place, script, args, folder=CLASSIFICATION, draw=False):
    """A Script; without `draw` its pictures are empty files, because drawing takes longer than all the rest."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:  # the fork keeps it
        if not draw:
            patch.setattr(Figure, "savefig", lambda _, path: path.write_bytes(b""))
        return Script(folder, script, args, place / f"log-{time.monotonic_ns()}")


def call(place, script, *args, expect=0, config=True, draw=False):
    settings = ["--config", place / "config.yaml"] if config else []
    return start(place, script, [*settings, *args], draw=draw).wait(expect)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(place):
    """The folders of a full and a LoRA run and of a linear probe, two epochs each."""
    call(place, "train.py", "--lr", "1e-3", draw=True)
    call(place, "train_lora.py", "--lora_r", "4")
    call(place, "train_lora.py", "--lora_r", "0")
    return SimpleNamespace(**{method: place / "runs" / "classification" / method for method in ("full", "lora", "head")})


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_a_run_leaves_what_is_promised(runs, method):
    from synthetic import TARGET_CLASSES

    folder = getattr(runs, method)
    best, classes = folder / "checkpoints" / "best", sorted(TARGET_CLASSES)
    names = ["config.yaml", "metrics.jsonl", "curves.png", "predictions/validation.png", *(f"plots/{name}.png" for name in PLOTS)]
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    for name in (*names, f"checkpoints/best/{weights}"):
        assert (folder / name).is_file(), name
        if method == "full" and name.endswith(".png"):  # the others' pictures are not drawn
            assert np.asarray(Image.open(folder / name).convert("L")).std() > 2, name
    summary = read(folder / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 6 and summary["epochs"] == 2
    assert summary["task"] == "classification" and summary["method"] == method
    assert summary["data"]["left_out"] == {} and (summary["data"]["train"], summary["data"]["val"]) == (24, 16)
    metrics = summary["metrics"]
    assert metrics["name"] == "balanced_accuracy" and set(metrics["best"]["per_class_f1"]) == set(classes)
    assert {"accuracy", "precision", "recall", "f1", "top5", "ece", "val_loss"} <= set(metrics["best"])
    counts, head = summary["parameters"], 8 * 16 + 8
    assert (counts["trainable"] == counts["total"]) == (method == "full")
    assert (counts["trainable"] == head) == (method == "head") and counts["trainable"] >= head
    assert read(best / "origin.json")["classes"] == classes and (best / "preprocessor_config.json").exists()
    if method == "full":
        assert list(read(best / "config.json")["id2label"].values()) == classes


def test_the_two_scripts_and_the_linear_probe_start_from_the_same_answers_and_data(runs):
    """A fair comparison: the same new head (it depends on the seed), the same pixels, the same order."""
    left, *others = (read(folder / "summary.json") for folder in (runs.full, runs.lora, runs.head))
    for other in others:
        assert other["metrics"]["before"]["val_loss"] == pytest.approx(left["metrics"]["before"]["val_loss"], abs=1e-5)
        assert other["data"] == left["data"] and other["base"] == left["base"]


@pytest.mark.parametrize("method, script", [("full", "eval.py"), ("lora", "eval_lora.py")])
def test_eval_gives_the_metrics_that_training_recorded(runs, place, method, script):
    folder = getattr(runs, method)
    done = call(
        place, script, "--checkpoint", folder / "checkpoints" / "best", "--batch_size", 5, config=False, draw=method == "full"
    )
    best = read(folder / "summary.json")["metrics"]["best"]
    found = read(folder / "eval.json")["metrics"]
    for name, value in found.items():
        if isinstance(value, dict):
            assert value == {k: pytest.approx(v, abs=1e-6) for k, v in best[name].items()}, name
        else:
            assert value == pytest.approx(best[name], abs=1e-6, rel=1e-6), name
    assert {"val_loss", "accuracy", "top5", "ece", "per_class_f1"} <= set(found) and "16 pictures" in done.stdout
    for name in ("confusion_matrix", "f1_per_class", "calibration", "mistakes"):
        assert (folder / "eval_val" / f"{name}.png").is_file()
    table = read(folder / "eval_val" / "report.json")
    assert table["accuracy"] == pytest.approx(found["accuracy"]) and table["checked_ring"]["support"] == 2
    assert (folder / "eval_val" / "report.txt").read_text() in done.stdout


def test_eval_on_the_test_split_in_another_place(runs, place, tmp_path):
    args = ["--checkpoint", runs.head / "checkpoints" / "best", "--split", "test", "--output_dir", tmp_path]
    call(place, "eval_lora.py", *args, config=False)
    assert read(tmp_path / "eval_test.json")["pictures"] == 8 and (tmp_path / "eval_test" / "mistakes.png").exists()


# ---- infer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(place):
    """A user's folder: three pictures of different shapes, a broken one, and a file that is none."""
    folder = place / "pictures"
    folder.mkdir()
    sources = sorted((place / "data" / "val").rglob("*.png"))
    for source, name, size in zip(
        sources[::3], ("one.png", "two.jpg", "three.png"), ((96, 96), (60, 120), (150, 80)), strict=False
    ):
        Image.open(source).resize(size).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more than a beginning")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_infer_says_the_same_in_csv_and_json_and_names_what_is_broken(runs, place, pictures, tmp_path):
    args = ["--input", pictures, "--checkpoint", runs.full / "checkpoints" / "best", "--output_dir", tmp_path]
    done = call(place, "infer.py", *args, "--top_k", 3, "--pictures", config=False)
    assert "broken.jpg" in done.stdout and "left out" in done.stdout and "3 pictures" in done.stdout
    rows = read(tmp_path / "predictions.json")
    assert [os.path.basename(row["file_name"]) for row in rows] == ["one.png", "three.png", "two.jpg"]
    with open(tmp_path / "predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 9 and len(list(tmp_path.glob("*.png"))) == 3
    classes = read(runs.full / "checkpoints" / "best" / "origin.json")["classes"]
    for number, row in enumerate(rows):
        answers = row["predictions"]
        shares = [answer["probability"] for answer in answers]
        assert len(answers) == 3 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-6
        assert {answer["class"] for answer in answers} <= set(classes) and row["milliseconds"] > 0
        for rank, (answer, line) in enumerate(zip(answers, table[3 * number : 3 * number + 3], strict=True), 1):
            assert (line["file_name"], line["rank"], line["class"]) == (row["file_name"], str(rank), answer["class"])
            assert float(line["probability"]) == pytest.approx(answer["probability"], abs=1e-6)


def test_merged_and_unmerged_adapters_give_the_same_answers_to_more_classes_than_there_are(runs, place, pictures, tmp_path):
    args = ["--input", pictures, "--checkpoint", runs.lora / "checkpoints" / "best", "--top_k", 99]
    for name, flags in (("merged", []), ("apart", ["--no-merge", "--batch_size", 2])):
        call(place, "infer_lora.py", *args, *flags, "--output_dir", tmp_path / name, config=False)
    merged, apart = (read(tmp_path / name / "predictions.json") for name in ("merged", "apart"))
    assert len(merged) == len(apart) == 3
    for a, b in zip(merged, apart, strict=True):
        left, right = ({x["class"]: x["probability"] for x in row["predictions"]} for row in (a, b))
        assert a["file_name"] == b["file_name"] and len(left) == 8 and sum(left.values()) == pytest.approx(1)
        assert left == {name: pytest.approx(share, abs=1e-4) for name, share in right.items()}


def test_a_glob_is_an_input_too(runs, place, pictures, tmp_path):
    args = ["--input", pictures / "t*", "--checkpoint", runs.full / "checkpoints" / "best", "--output_dir", tmp_path]
    assert "2 pictures" in call(place, "infer.py", *args, config=False).stdout


# ---- stop anywhere ---------------------------------------------------------------------------------------------------


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_run_that_was_killed_ends_with_the_same_bytes(runs, place):
    """With crops, flips, RandAugment and mixup on."""
    args = ["--config", place / "config.yaml", "--lora_r", "4", "--run_name", "killed", "--save_steps", "1"]
    folder = place / "runs" / "classification" / "killed"
    script = start(place, "train_lora.py", args)
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
    summary = read(tmp_path / "runs" / "classification" / "lora" / "summary.json")  # a failed run leaves its record
    assert summary["status"] == "failed" and "there is no folder" in summary["error"]
    assert "there is no folder" in fails("train.py", "--model", tmp_path / "nowhere", *runs_to)
    assert "no layer's name ends in" in fails("train_lora.py", "--lora_targets", "qkv_everywhere", *runs_to)
    assert "lora_r" in fails("train_lora.py", "--lora_r", "-3", *runs_to)
    assert "--crop must lie" in fails("train.py", "--crop", "0", *runs_to)

    one = tmp_path / "one"
    (one / "train").mkdir(parents=True)
    (one / "train" / "bar").symlink_to(place / "data" / "train" / "dotted_bar")
    assert "only the class bar; expected train/<class>" in fails("train.py", "--data_dir", one, *runs_to)
    (one / "train" / "ring").symlink_to(place / "data" / "train" / "checked_ring")
    best = runs.lora / "checkpoints" / "best"
    told = fails("eval_lora.py", "--checkpoint", best, "--data_dir", one, config=False)
    assert "other classes than the checkpoint: only the data has bar, ring and only the checkpoint has checked_diamond" in told
    save_base(tmp_path / "other", seed=9)
    told = fails("eval_lora.py", "--checkpoint", best, "--model", tmp_path / "other", config=False)
    assert "an adapter fits no other base" in told
    assert "--input" in fails("infer.py", config=False)
    assert "--top_k" in fails("infer.py", "--input", one, "--top_k", 0, config=False)


# ---- beside the task -------------------------------------------------------------------------------------------------


def test_compare_shows_the_three_arms(runs, place, tmp_path):
    args = [runs.full, runs.lora, runs.head, "--output_dir", tmp_path]
    done = start(place, "compare.py", args, folder=ROOT / "scripts").wait()
    assert "balanced_accuracy" in done.stdout and "the head alone reaches" in done.stdout and "LoRA reaches" in done.stdout
    found = {run["method"]: run["trained_parameters"] for run in read(tmp_path / "compare.json")["runs"]}
    assert found["head"] < found["lora"] < found["full"]


def test_an_exported_copy_trains_outside_the_project(place, tmp_path):
    """One file, in a folder from where neither common/ nor the task's modules can be seen; Script fails if one was imported."""
    args = [CLASSIFICATION / "train_lora.py", tmp_path / "copy", "--no_demo", "--single_file"]
    Script(ROOT / "scripts", "export.py", args, place / "export").wait()
    args = ["--config", place / "config.yaml", "--epochs", 1, "--max_steps_per_epoch", 1, "--output_dir", tmp_path / "runs"]
    start(place, "train_lora.py", args, folder=tmp_path / "copy").wait()
    assert read(tmp_path / "runs" / "classification" / "lora" / "summary.json")["steps"] == 1
    assert not (tmp_path / "copy" / "common").exists()


def test_real_data_trains(place, tmp_path):
    """Photographs of clothes, with the small base that comes along; of each class and split the first three."""
    if not CLOTHING.is_dir():
        pytest.skip(f"the clothing pictures are not in {CLOTHING}")
    for file in CLOTHING.rglob("*.jpg"):
        inside = tmp_path / "clothes" / file.relative_to(CLOTHING)
        inside.parent.mkdir(parents=True, exist_ok=True)
        if len(list(inside.parent.iterdir())) < 3:
            inside.symlink_to(file)
    args = ["--data_dir", tmp_path / "clothes", "--model", "demo", "--epochs", 1, "--batch_size", 6]
    done = call(place, "train_lora.py", *args, "--output_dir", tmp_path)
    summary = read(tmp_path / "classification" / "lora" / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 2 and summary["data"]["format"] == "folders"
    assert summary["data"]["left_out"] == {} and (summary["data"]["train"], summary["data"]["val"]) == (12, 12)
    assert "dress 3, hat 3, shoes 3, shorts 3" in done.stdout and "for 4 classes: new weights" in done.stdout


def test_the_demo_runs_without_arguments_in_a_fresh_process(tmp_path):
    done = run_script(CLASSIFICATION, "train_lora.py", "--output_dir", tmp_path, "--epochs", 1, "--max_steps_per_epoch", 2)
    summary = read(tmp_path / "classification" / "lora" / "summary.json")
    assert summary["status"] == "finished" and summary["base"]["name"] == "demo" and summary["data"]["name"] == "demo"
    assert "base: demo" in done.stdout and "data: demo (folders), 480 training and 320 validation pictures" in done.stdout
    assert np.isfinite(summary["metrics"]["best"]["val_loss"]) and summary["config"]["lora_targets"] == "all-linear"
