"""check_data.py: planted faults are found by name, clean data is clean, and its quarantine is what --exclude takes."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, import_all
from PIL import Image
from tasks import ROWS, TASKS, call, in_task, one_line, read, small_data

SCRIPTS = ROOT / "scripts"


def checked(task, folder, quarantine=None) -> dict:
    """What the checks of a task find in a folder, as its JSON report."""

    def check_folder():
        sys.path.append(str(SCRIPTS))
        from types import SimpleNamespace

        from check_data import check

        findings = check(task.name, folder, SimpleNamespace(data_format="auto", seed=0))
        if quarantine:
            quarantine.write_text(findings.quarantine_text()[0], encoding="utf-8")
        print("report", json.dumps(findings.to_json()))

    import_all()
    lines = in_task(task, check_folder).splitlines()
    return json.loads(next(line for line in lines if line.startswith("report ")).removeprefix("report "))


def places(report, severity, what) -> str:
    """Where a finding of that severity, whose name begins so, was; "" where there is none."""
    return " | ".join(
        ", ".join(finding["where"])
        for finding in report["findings"]
        if finding["severity"] == severity and finding["what"].startswith(what)
    )


def left_out(report) -> set[str]:
    return {entry["file"] for entry in report["quarantine"]}


def picture(seed, size=(90, 70)):
    """A picture that is unlike those of other seeds."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def copied(task, folder):
    """The small data in a folder of its own, to plant faults in."""
    return shutil.copytree(small_data(task), folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS, ids=str)
def test_the_demo_is_clean_and_recognised(task):
    folder = small_data(task)
    report = checked(task, folder)
    expected = {"clip": "classification (", "pose": "detection and for pose"}.get(task.name, f": {task.name} (")
    said = call(task, "check_data.py", folder, folder=SCRIPTS, expect=2 if task.name == "pose" else 0)
    assert expected in said.stdout + said.stderr
    assert report["counts"]["error"] == 0 and not report["copies"] and not report["quarantine"]
    assert sum(report["splits"].values()) > 5


# ---- pictures --------------------------------------------------------------------------------------------------------


def class_folders(root):
    """Two classes of four training and two validation pictures."""
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for seed in numbers:
                picture(10 * seed + number).save(root / split / name / f"{seed}.jpg", quality=95)
    return root


def plant_in_pictures(root):
    train, val = root / "train", root / "val"
    whole = (train / "cat" / "0.jpg").read_bytes()
    (train / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "cat" / "text.jpg").write_text("no picture")
    shutil.copy(train / "cat" / "1.jpg", val / "cat" / "leak.jpg")
    Image.open(train / "dog" / "1.jpg").resize((60, 45)).save(val / "dog" / "smaller.jpg", quality=50)
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    for seed, place in ((910, val / "dog"), (911, train / "cat"), (912, val / "cat")):  # of another label; in the split; a leak
        picture(seed).save(train / "cat" / f"{seed}.jpg")
        picture(seed).transpose(flip).save(place / f"mirrored_{seed}.jpg", quality=60)
    shutil.copy(train / "dog" / "2.jpg", train / "dog" / "twice.jpg")
    shutil.copy(train / "cat" / "3.jpg", train / "dog" / "is_a_cat.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(900).save(train / "cat" / "turned.jpg", exif=turned)
    picture(901).convert("CMYK").save(train / "cat" / "cmyk.jpg")
    Image.new("RGB", (80, 80), "white").save(train / "dog" / "blank.png")
    picture(902, (400, 40)).save(train / "dog" / "long.png")
    (train / "bird").mkdir()
    picture(903).save(train / "bird" / "only.jpg")


def test_planted_faults_of_pictures_are_found_by_name(tmp_path):
    root = class_folders(tmp_path / "pets")
    clean = checked(TASKS["classification"], root)
    assert clean["counts"] == {"error": 0, "warning": 0, "note": 0} and clean["quarantine"] == []
    plant_in_pictures(root)
    quarantine = tmp_path / "bad.txt"
    report = checked(TASKS["classification"], root, quarantine)
    assert "cut.jpg" in places(report, "error", "picture that cannot be decoded")
    assert "text.jpg" in places(report, "error", "no picture that can be decoded")
    leaks = places(report, "error", "the same sample in two splits")
    assert "train/cat/1.jpg (train) = val/cat/leak.jpg (val)" in leaks
    assert "train/dog/1.jpg (train) = val/dog/smaller.jpg (val)" in leaks and leaks.count("=") == 2
    assert places(report, "error", "the mirror image") == "train/cat/912.jpg (train) = val/cat/mirrored_912.jpg (val)"
    assert places(report, "warning", "the same sample twice") == "train/dog/twice.jpg (train) = train/dog/2.jpg (train)"
    assert places(report, "error", "the same sample with different labels").startswith("train/dog/is_a_cat.jpg")
    assert places(report, "note", "picture that viewers turn") == "train/cat/turned.jpg"
    assert places(report, "note", "picture of an unusual kind") == "train/cat/cmyk.jpg (CMYK)"
    assert places(report, "warning", "picture of one colour") == "train/dog/blank.png"
    assert places(report, "warning", "picture more than 5 times") == "train/dog/long.png"
    assert places(report, "warning", "class without validation pictures") == "bird"
    wanted = {"train/cat/cut.jpg", "train/cat/text.jpg", "train/cat/1.jpg", "train/dog/1.jpg", "train/dog/twice.jpg"}
    wanted |= {"train/cat/3.jpg", "train/dog/is_a_cat.jpg", "train/cat/912.jpg"}
    assert left_out(report) == wanted
    lines = [line for line in quarantine.read_text().splitlines() if not line.startswith("#")]
    assert set(lines) == wanted


def test_a_picture_saved_again_is_the_same_and_one_that_is_alike_is_not(tmp_path):
    sys.path.append(str(SCRIPTS))
    from alike_pictures import first_of_each, look_at_picture, thumbs_of

    original = picture(1, (300, 200))
    versions = {
        "again.jpg": original,
        "half.jpg": original.resize((150, 100)),
        "lighter.jpg": original.point(lambda value: value * 0.85 + 20),
    }
    others = {"other.jpg": picture(2, (300, 200)), "mirrored.jpg": original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
    red, blue = (Image.new("RGB", (300, 200), colour) for colour in ("#c04040", "#4060c0"))
    red.paste(original.convert("L").convert("RGB").resize((100, 100)), (20, 20))
    blue.paste(original.convert("L").convert("RGB").resize((100, 100)), (20, 20))
    original.save(tmp_path / "original.png")
    every = {**versions, **others, "red.jpg": red, "blue.jpg": blue}
    for name, image in every.items():
        image.save(tmp_path / name, quality=60)
    facts = [look_at_picture(tmp_path / name) for name in ("original.png", *every)]
    found = first_of_each(facts, thumbs_of(facts))
    assert [first for first, _ in found] == [0, 0, 0, 0, 4, 5, 6, 7]


def test_near_hashes_are_those_of_a_comparison_of_all_with_all():
    sys.path.append(str(SCRIPTS))
    from alike_pictures import HASH_BITS, near_hashes

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    for place in range(0, 200, 2):  # neighbours that are 1 to 12 bits away
        flips = rng.choice(64, 1 + place % 12, replace=False)
        hashes[place + 1] = hashes[place] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    hashes = np.unique(hashes)
    close = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= HASH_BITS
    assert near_hashes(hashes) == [np.flatnonzero(row).tolist() for row in close] and close.sum() > len(hashes)


def test_a_second_look_and_the_training_after_it_decode_nothing(tmp_path):
    root = class_folders(tmp_path / "pets")

    def look_twice():
        sys.path.append(str(SCRIPTS))
        import alike_pictures
        from check_pictures import AsItIs, check_pictures
        from common.samples import Faults
        from common.vision import labelled
        from data import read_tables

        check_pictures("classification", root, "auto", 0)
        alike_pictures.decode = labelled.decode = None  # whoever decodes now fails
        assert not check_pictures("classification", root, "auto", 0).count("error")
        samples, faults = read_tables(str(root), 0)[0]["train"], Faults()
        assert len(labelled.load_pictures(samples, AsItIs(), faults, 0, "train")[0]) == 8 and not faults.found

    import_all()
    in_task(TASKS["classification"], look_twice)


# ---- boxes and keypoints ---------------------------------------------------------------------------------------------


def annotations(root, split="train"):
    file = next((root / "annotations").glob(f"*{split}*.json"))
    return file, json.loads(file.read_text())


def test_planted_faults_of_boxes_are_found_by_name(tmp_path):
    root = copied(TASKS["detection"], tmp_path / "boxes")
    file, table = annotations(root)
    boxes = Counter(box["image_id"] for box in table["annotations"])
    crowded = {box["image_id"]: box for box in table["annotations"] if boxes[box["image_id"]] > 1}  # the last box of each picture
    first, second, third, fourth = list(crowded.values())[:4]
    width = table["images"][0]["width"]
    first["bbox"] = [width + 50, 5, 20, 20]
    second["bbox"] = [5, 5, 0, 10]
    third["bbox"][2:] = [1, 1]
    fourth["category_id"] = 99
    alone, other = [box for box in table["annotations"] if boxes[box["image_id"]] == 1][:2]
    alone["bbox"] = [width + 50, 5, 20, 20]
    other["category_id"] = 99
    names = {image["id"]: Path(image["file_name"]).name for image in table["images"]}
    lost = [names[box["image_id"]] for box in (alone, other)]
    table["annotations"].append({**table["annotations"][5], "id": 9999})
    table["categories"].append({"id": 50, "name": "unicorn"})
    file.write_text(json.dumps(table))
    pictures = sorted((root / "train").rglob("*.png")) or sorted((root / "images").rglob("*.png"))
    pictures[-1].write_bytes(pictures[-1].read_bytes()[:200])
    report = checked(TASKS["detection"], root)
    assert places(report, "error", "box without area inside its picture").count("box") == 3
    assert all(name in places(report, "error", "picture that loses all its boxes") for name in lost)
    assert str(fourth["id"]) in places(report, "error", "box of a category that is not listed")
    assert places(report, "warning", "box that is given twice") and places(report, "warning", "box less than 3 pixels")
    assert places(report, "warning", "class without training boxes") == "unicorn"
    assert {Path(name).name for name in left_out(report)} == {pictures[-1].name, *lost}


def test_planted_faults_of_keypoints_are_found_by_name(tmp_path):
    root = copied(TASKS["pose"], tmp_path / "points")
    file, table = annotations(root)
    first, second = table["annotations"][:2]
    width = table["images"][0]["width"]
    first["keypoints"][:3] = [width + 100, 5, 2]
    x, y, w, h = second["bbox"]
    second["bbox"] = [x, y, w / 4, h / 4]
    file.write_text(json.dumps(table))
    report = checked(TASKS["pose"], root)
    assert "keypoint 1" in places(report, "error", "keypoint outside its picture")
    assert places(report, "warning", "figure with a keypoint far outside its own box").count("(") == 1
    assert not report["quarantine"]  # the other keypoints of the figures are good


# ---- sound and volumes -----------------------------------------------------------------------------------------------


def plant_in_recordings(root):
    import soundfile

    one, two = sorted((root / "train").rglob("*.wav"))[:2]
    wave, rate = soundfile.read(one)
    (root / "train" / "cut.wav").write_bytes(b"RIFF no more than a beginning")
    soundfile.write(root / "train" / "silent.wav", np.zeros(2 * rate), rate)
    soundfile.write(root / "val" / "quieter.flac", wave * 0.5, rate)
    shutil.copy(two, root / "train" / "zz_twice.wav")
    soundfile.write(
        root / "train" / "clipped.wav", (soundfile.read(sorted((root / "train").rglob("*.wav"))[4])[0] * 30).clip(-1, 1), rate
    )
    return one, two


def test_planted_faults_of_recordings_are_found_by_name(tmp_path):
    root = copied(TASKS["voice_rvc"], tmp_path / "voice")
    one, _ = plant_in_recordings(root)
    report = checked(TASKS["voice_rvc"], root)
    assert "cut.wav" in places(report, "error", "not sound")
    assert "silent.wav" in places(report, "error", "silent recording")
    assert f"train/{one.name} (train) = val/quieter.flac (val)" in places(report, "error", "the same sample in two splits")
    assert "zz_twice.wav" in places(report, "warning", "the same sample twice")
    assert "clipped.wav" in places(report, "warning", "clipped recording")
    expected = {"train/cut.wav", "train/silent.wav", f"train/{one.name}", "train/zz_twice.wav"}
    assert expected <= left_out(report)


def plant_in_volumes(root):
    import nibabel

    cases = sorted(path for path in root.iterdir() if path.is_dir())
    shutil.copytree(cases[0], root / "s0998")
    masks = sorted((cases[1] / "segmentations").glob("*.nii.gz"))
    masks[0].write_bytes(masks[0].read_bytes()[:100])
    full = nibabel.load(masks[1])
    nibabel.save(nibabel.Nifti1Image(np.ones(full.shape, np.uint8), full.affine), masks[1])
    return cases, masks


def test_planted_faults_of_volumes_are_found_by_name(tmp_path):
    root = copied(TASKS["medical_sam3d"], tmp_path / "organs")
    cases, masks = plant_in_volumes(root)
    report = checked(TASKS["medical_sam3d"], root)
    names = [str(mask.relative_to(root)) for mask in masks]
    assert names[0] in places(report, "error", "damaged") + places(report, "error", "")
    assert cases[1].name in places(report, "error", "mask that is full")
    assert any(
        "s0998" in where for finding in report["findings"] for where in finding["where"] if "same sample" in finding["what"]
    )
    assert {names[0], names[1]} < left_out(report) and any(name.startswith("s0998/") for name in left_out(report))


# ---- as a user runs it -----------------------------------------------------------------------------------------------


def run(*arguments, expect=0):
    return call(TASKS["classification"], "check_data.py", *arguments, expect=expect, folder=SCRIPTS, draw=True)


def test_the_script_writes_what_it_was_asked_for_and_exits_by_what_it_found(tmp_path):
    root = class_folders(tmp_path / "pets")
    assert "0 errors, 0 warnings, 0 notes" in run(root, "--task", "clip").stdout
    plant_in_pictures(root)
    files = [tmp_path / name for name in ("report.json", "bad.txt", "copies.png")]
    flags = ["--report", files[0], "--quarantine", files[1], "--pictures", files[2]]
    said = run(root, "--task", "classification", *flags, expect=1).stdout
    assert "classification (folders)" in said and "cut.jpg" in said and "(bad.txt" not in said
    assert read(files[0])["task"] == "classification" and len(read(files[0])["quarantine"]) == 8
    assert Image.open(files[2]).width > 400
    assert "8 files to leave out" in said


def test_what_cannot_be_checked_ends_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert "there is no folder" in one_line(run(tmp_path / "nowhere", expect=2))
    assert "name the folder" in one_line(run(expect=2))
    (tmp_path / "bare").mkdir()
    assert "bare is empty" in one_line(run(tmp_path / "bare", expect=2))
    assert "no training pictures" in one_line(run(tmp_path, "--task", "classification", expect=2))
    assert "to write" in one_line(run(tmp_path, "--report", tmp_path / "no" / "r.json", expect=2))


PLANT = {
    "classification": plant_in_pictures,
    "clip": plant_in_pictures,
    "voice_rvc": plant_in_recordings,
    "medical_sam3d": plant_in_volumes,
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS, ids=str)
def test_a_run_takes_the_quarantine_and_leaves_out_just_that(task, tmp_path):
    root = tmp_path / "data"
    if task.name in ("classification", "clip"):
        class_folders(root)
    else:
        copied(task, root)
    if task.name in PLANT:
        PLANT[task.name](root)
    else:
        damaged = sorted(path for path in root.rglob("*.png") if "train" in str(path.relative_to(root)))[0]
        damaged.write_bytes(damaged.read_bytes()[:200])
    quarantine = tmp_path / "bad.txt"
    listed = left_out(checked(task, root, quarantine))
    assert listed
    flags = ["--data_dir", root, "--model", "demo", "--output_dir", tmp_path, "--epochs", 1, "--max_steps_per_epoch", 1]
    said = call(task, "train.py", *flags, "--batch_size", 2, "--exclude", quarantine)
    facts = read(tmp_path / task.name / "full" / "summary.json")["data"]["left_out"]
    assert facts["excluded by bad.txt"] == len(listed) and "is no sample of this data" not in said.stdout
    assert not [
        fault for fault in facts if fault.startswith(("picture that cannot", "no picture that can", "not sound", "silent"))
    ]
