"""What the classification scripts do beside the contract of test_tasks.py: tables, the linear probe, real photographs."""

import csv
import os
import shutil

import pytest
from conftest import ROOT, Script
from tasks import TASKS, call, one_line, read, small_data, trained
from test_classification_model import save_base

ROW = TASKS["classification"]
CLOTHING = ROOT.parent / "shared" / "data" / "clothing"


@pytest.fixture(scope="module")
def full():
    return trained(ROW, "full")


@pytest.fixture(scope="module")
def head(full):
    """A linear probe, otherwise like the full run."""
    call(ROW, "train_lora.py", "--config", trained(ROW, "lora").folder / "config.yaml", "--lora_r", 0)
    return full.folder.with_name("head")


def test_eval_says_the_same_in_text_table_and_metrics(full, tmp_path):
    done = call(ROW, "eval.py", "--checkpoint", full.folder, "--output_dir", tmp_path)
    metrics, table = read(tmp_path / "eval.json")["metrics"], read(tmp_path / "eval_val" / "report.json")
    assert {"val_loss", "accuracy", "top5", "ece", "per_class_f1"} <= set(metrics) and "8 pictures" in done.stdout
    assert table["accuracy"] == pytest.approx(metrics["accuracy"]) and table["checked_ring"]["support"] == 1
    assert "checked_ring" in (tmp_path / "eval_val" / "report.txt").read_text()
    said = done.stdout.splitlines()
    assert said[0].startswith(f"checkpoint: {full.best} (full, made 20")
    row = next(line.split() for line in said if line.startswith("checked_ring"))
    assert row[1:] == [f"{table['checked_ring'][key]:.4f}" for key in ("precision", "recall", "f1-score")] + ["1"]
    assert sum(line.startswith("accuracy ") for line in said) == 1, "no fact twice"


def test_what_was_said_of_each_picture_is_kept_by_training_and_eval(full, tmp_path):
    call(ROW, "eval.py", "--checkpoint", full.best, "--output_dir", tmp_path)
    kept, again = read(full.folder / "samples.json"), read(tmp_path / "eval_val" / "samples.json")
    for left, right in zip(kept["rows"], again["rows"], strict=True):
        assert left == {**right, "probability": pytest.approx(right["probability"], abs=1e-4)}
    assert kept["metric"] == "balanced_accuracy"
    assert len({row["file"] for row in kept["rows"]}) == 8
    for row in kept["rows"]:
        assert row["file"].split("/")[-2] == kept["classes"][row["label"]] and row["right"] == (row["guess"] == row["label"])
    right = sum(row["right"] for row in kept["rows"]) / 8
    assert right == pytest.approx(read(full.folder / "summary.json")["metrics"]["best"]["accuracy"])


def test_infer_says_the_same_in_csv_and_json_and_draws_the_pictures(full, tmp_path):
    pictures = small_data(ROW) / "val"
    args = ["--input", pictures / "*" / "*.png", "--checkpoint", full.best, "--output_dir", tmp_path]
    call(ROW, "infer.py", *args, "--top_k", 3, "--pictures")
    rows = read(tmp_path / "predictions.json")
    with open(tmp_path / "predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(rows) == len(list(tmp_path.glob("*.png"))) == 8 and len(table) == 24
    classes = read(full.best / "origin.json")["classes"]
    for number, row in enumerate(rows):
        answers = row["predictions"]
        shares = [answer["probability"] for answer in answers]
        assert len(answers) == 3 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-6
        assert {answer["class"] for answer in answers} <= set(classes) and row["milliseconds"] > 0
        for rank, (answer, line) in enumerate(zip(answers, table[3 * number : 3 * number + 3], strict=True), 1):
            assert (line["file_name"], line["rank"], line["class"]) == (row["file_name"], str(rank), answer["class"])
            assert float(line["probability"]) == pytest.approx(answer["probability"], abs=1e-6)


def test_names_that_are_not_utf8_and_equal_names_are_told_apart(full, tmp_path):
    source = next((small_data(ROW) / "val").rglob("*.png"))
    for place in (b"a/1.png", b"b/1.png", b"b/caf\xe9 $x$.png"):
        path = tmp_path / "in" / os.fsdecode(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
    args = ["--input", tmp_path / "in", "--checkpoint", full.folder, "--output_dir", tmp_path / "out", "--pictures"]
    said = call(ROW, "infer.py", *args).stdout
    assert all(f"\n{name} " in said for name in ("a/1.png", "b/1.png", "b/café $x$.png"))
    assert [row["file_name"] for row in read(tmp_path / "out" / "predictions.json")][2].endswith("caf\udce9 $x$.png")
    assert "caf\\udce9" in (tmp_path / "out" / "predictions.csv").read_text()
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_more_classes_than_there_are_is_all_of_them(full, tmp_path):
    picture = next((small_data(ROW) / "val").rglob("*.png"))
    call(ROW, "infer.py", "--input", picture, "--checkpoint", full.best, "--output_dir", tmp_path, "--top_k", 99)
    ((row),) = read(tmp_path / "predictions.json")
    assert len(row["predictions"]) == 8 and sum(a["probability"] for a in row["predictions"]) == pytest.approx(1)


def test_compare_shows_the_three_arms(full, head, tmp_path):
    """Which start from the same answers."""
    lora = trained(ROW, "lora").folder
    before = [read(folder / "summary.json")["metrics"]["before"]["val_loss"] for folder in (full.folder, lora, head)]
    assert before == [pytest.approx(before[0], abs=1e-5)] * 3
    args = [full.folder, lora, head, "--output_dir", tmp_path]
    done = Script(ROOT / "scripts", "compare.py", args, tmp_path / "log", draw=False).wait()
    assert "The head alone reaches" in done.stdout and "LoRA reaches" in done.stdout
    found = {run["method"]: run["trained_parameters"] for run in read(tmp_path / "compare.json")["runs"]}
    assert found["head"] == 8 * 96 + 8 and found["head"] < found["lora"] < found["full"]


def test_user_errors_are_one_line_and_exit_code_two(full, tmp_path):
    def fails(script, *args):
        return one_line(call(ROW, script, *args, "--output_dir", tmp_path / "runs", expect=2))

    data = small_data(ROW)
    assert "--crop: '0' must be" in fails("train.py", "--data_dir", data, "--model", "demo", "--crop", "0")
    one = tmp_path / "one"
    (one / "train").mkdir(parents=True)
    (one / "train" / "bar").symlink_to(data / "train" / "dotted_bar")
    assert "only the class bar; expected train/<class>" in fails("train.py", "--data_dir", one, "--model", "demo")
    (one / "train" / "ring").symlink_to(data / "train" / "checked_ring")
    told = fails("eval.py", "--checkpoint", full.best, "--data_dir", one)
    assert "other classes than the checkpoint: only the data has bar, ring and only the checkpoint has checked_diamond" in told
    assert "--top_k" in fails("infer.py", "--input", one, "--top_k", 0)


def test_real_data_trains(tmp_path):
    """Photographs of clothes, with the small base that comes along; of each class and split the first three."""
    if not CLOTHING.is_dir():
        pytest.skip(f"the clothing pictures are not in {CLOTHING}")
    for file in CLOTHING.rglob("*.jpg"):
        inside = tmp_path / "clothes" / file.relative_to(CLOTHING)
        inside.parent.mkdir(parents=True, exist_ok=True)
        if len(list(inside.parent.iterdir())) < 3:
            inside.symlink_to(file)
    save_base(tmp_path / "base")
    args = ["--data_dir", tmp_path / "clothes", "--model", tmp_path / "base", "--epochs", 1, "--batch_size", 6]
    done = call(ROW, "train_lora.py", *args, "--output_dir", tmp_path)
    summary = read(tmp_path / "classification" / "lora" / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 2 and summary["data"]["format"] == "folders"
    assert summary["data"]["left_out"] == {} and (summary["data"]["train"], summary["data"]["val"]) == (12, 12)
    assert "dress 3, hat 3, shoes 3, shorts 3" in done.stdout and "for 4 classes: new weights" in done.stdout
