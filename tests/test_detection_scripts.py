"""What the detection scripts do beside the contract of test_tasks.py: COCO results, other layouts, real blood cells."""

import csv
import os
import shutil
from collections import Counter

import pytest
from conftest import ROOT
from PIL import Image
from tasks import TASKS, call, demo, one_line, read, small_data, trained
from test_detection_model import save_base

ROW = TASKS["detection"]
SYNTHETIC = ["circle", "square", "triangle", "star"]
BCCD = ROOT.parent / "shared" / "data" / "bccd"


@pytest.fixture(scope="module")
def best():
    return trained(ROW, "full").best


def test_classes_are_the_datas_in_its_order(best):
    assert read(best / "origin.json")["classes"] == SYNTHETIC
    assert list(read(best / "config.json")["id2label"].values()) == SYNTHETIC


@pytest.mark.slow
def test_the_demos_base_knows_three_of_the_four_classes_from_pictures_of_another_look():
    assert 0.2 < demo(ROW, "lora").summary["metrics"]["before"]["map_50"] < 0.9


def test_eval_on_other_data_in_another_layout(best, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):  # Roboflow's: the annotations lie beside the pictures
        shutil.copytree(small_data(ROW) / split, tmp_path / "data" / split)
        table = small_data(ROW) / "annotations" / f"instances_{split}.json"
        shutil.copy(table, tmp_path / "data" / split / "_annotations.coco.json")
    args = ["--checkpoint", best, "--data_dir", tmp_path / "data", "--data_format", "coco", "--output_dir", tmp_path]
    done = call(ROW, "eval.py", *args)
    found = read(tmp_path / "eval.json")
    assert found["pictures"] == 6 and {"map", "map_50", "per_class_map"} <= set(found["metrics"]) and "6 pictures" in done.stdout
    assert found["metrics"]["map"] == pytest.approx(trained(ROW, "full").summary["metrics"]["best"]["map"], abs=1e-6)


def test_infer_writes_coco_results(best, tmp_path):
    """pycocotools takes the rows as results for a data set with these pictures; boxes lie in theirs."""
    from pycocotools.coco import COCO

    sizes = {"one.png": (96, 96), "two.jpg": (60, 120)}
    (tmp_path / "pictures").mkdir()
    for source, (name, size) in zip(sorted((small_data(ROW) / "val").glob("*.png")), sizes.items(), strict=False):
        Image.open(source).resize(size).save(tmp_path / "pictures" / name)
    args = ["--input", tmp_path / "pictures", "--checkpoint", best, "--threshold", 0, "--output_dir", tmp_path]
    done = call(ROW, "infer.py", *args)
    rows = read(tmp_path / "predictions.json")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("one.png"))
    counts = Counter(row["category_name"] for row in rows if os.path.basename(row["file_name"]) == "one.png")
    assert line.split("  ")[-1] == ", ".join(f"{number} {name}" for name, number in counts.most_common())
    for row in rows:
        width, height = sizes[os.path.basename(row["file_name"])]
        x, y, w, h = row["bbox"]
        assert 0 <= row["score"] <= 1 and row["category_name"] == SYNTHETIC[row["category_id"] - 1]
        assert w >= 0 and h >= 0 and -width <= x <= width and -height <= y <= height and w <= 1.01 * width
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in sorted({row["image_id"] for row in rows})],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(SYNTHETIC, 1)],
    }
    assert len(truth.dataset["images"]) == 2
    truth.createIndex()
    assert len(truth.loadRes([dict(row) for row in rows]).anns) == len(rows) > 0


def test_the_table_holds_the_objects_above_the_best_threshold_which_the_checkpoint_knows(best, tmp_path):
    metrics = trained(ROW, "full").summary["metrics"]["best"]
    assert read(best / "origin.json")["threshold"] == metrics["f1_threshold"] and 0 <= metrics["f1"] <= 1
    source = tmp_path / "two"
    shutil.copytree(small_data(ROW) / "val", source / "val")
    shutil.copytree(small_data(ROW) / "val", source / "again")  # the same names in another folder
    args = ["--input", source, "--checkpoint", best, "--threshold", "best", "--no_pictures", "--output_dir", tmp_path / "out"]
    done = call(ROW, "infer.py", *args)
    assert f"threshold {metrics['f1_threshold']:.3f}, that of the best F1" in done.stdout
    assert "val/000001.png" in done.stdout and "again/000001.png" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.json"]
    rows = read(tmp_path / "out" / "predictions.json")
    with open(tmp_path / "out" / "predictions.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["file_name"], row["class"]) for row in table] == [(row["file_name"], row["category_name"]) for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert [float(line[key]) for key in ("left", "top", "width", "height")] == pytest.approx(row["bbox"], abs=0.06)
        assert float(line["score"]) == pytest.approx(row["score"], abs=1e-4) and row["score"] >= metrics["f1_threshold"]


def test_classes_that_the_checkpoint_does_not_know_are_named(best, tmp_path):
    shutil.copytree(small_data(ROW), tmp_path / "data")
    for file in (tmp_path / "data" / "annotations").glob("*.json"):
        file.write_text(file.read_text().replace('"circle"', '"hexagon"'))
    told = one_line(call(ROW, "eval.py", "--checkpoint", best, "--data_dir", tmp_path / "data", expect=2))
    assert "classes that the checkpoint does not know: hexagon" in told


def test_real_data_trains(tmp_path):
    """Blood cells in Pascal VOC layout, another domain and other classes than the base knows."""
    if not BCCD.is_dir():
        pytest.skip(f"the BCCD pictures are not in {BCCD}")
    save_base(tmp_path / "base", classes=SYNTHETIC[:3])
    args = ["--data_dir", BCCD, "--model", tmp_path / "base", "--epochs", 1, "--max_steps_per_epoch", 2, "--batch_size", 4]
    done = call(ROW, "train_lora.py", *args, "--output_dir", tmp_path)
    summary = read(tmp_path / "detection" / "lora" / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 2 and summary["data"]["format"] == "voc"
    assert "RBC" in done.stdout and "new: " in done.stdout
