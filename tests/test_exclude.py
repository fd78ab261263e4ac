"""--exclude: what a list of samples leaves out, in the readers of every task, and lists that are none."""

import os
import unicodedata
from pathlib import Path

import pytest
from conftest import MEDICAL, VOICE
from tasks import ROWS, call, in_task, one_line, read, scratch, small_data

from common.config import UserError
from common.exclude import Exclusions, exclude_from
from common.samples import Faults

HOSTILE = {
    "nowhere.txt": None,
    "binary.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "huge.txt": b"a\n" * 2**23 + b"b",
    "folder": "folder",
    "pipe": "pipe",
}


def hostile_list(folder, name):
    content, path = HOSTILE[name], folder / name
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_list_ends_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match="^--exclude [^\n]*$"):
        Exclusions(str(hostile_list(tmp_path, name)), tmp_path)


def kept(folder, text, *names):
    """(the names that a list leaves in, what faults knows) of files in a folder."""
    (folder / "bad.txt").write_text(text, encoding="utf-8")
    faults = Faults()
    splits = {"train": [type("Sample", (), {"path": folder / name}) for name in names]}
    splits = exclude_from(splits, str(folder / "bad.txt"), folder, faults)
    return [str(sample.path.relative_to(folder)) for sample in splits["train"]], faults


def test_a_line_is_a_file_or_a_folder_and_all_else_stays(tmp_path):
    lines = f"# bad ones\n\n  a.jpg  \n{tmp_path}/b.jpg\r\nblurry\n../{tmp_path.name}/c.jpg\n./#1.jpg\n"
    names = ["a.jpg", "aa.jpg", "b.jpg", "sub/a.jpg", "blurry/x/1.jpg", "blurry.jpg", "c.jpg", "#1.jpg"]
    left, faults = kept(tmp_path, lines, *names)
    assert left == ["aa.jpg", "sub/a.jpg", "blurry.jpg"]
    assert faults.counts() == {"excluded by bad.txt": 5} and not faults.notes
    assert "blurry/x/1.jpg" in faults.found["excluded by bad.txt"]


def test_lines_that_stand_for_nothing_are_said(tmp_path):
    left, faults = kept(tmp_path, "a.jpg\nb.jpg\n/etc/passwd\n../../x\n" + "y" * 5000 + "\n", "b.jpg", "c.jpg")
    assert left == ["c.jpg"] and faults.counts() == {"excluded by bad.txt": 1}
    (strangers,) = faults.notes.values()
    assert strangers == ["a.jpg", "/etc/passwd", "../../x", "y" * 200]


def test_a_list_of_all_there_is_is_said_to_be_one(tmp_path):
    with pytest.raises(UserError, match="^--exclude: bad.txt lists 2 of the 2 files there: nothing is left to use$"):
        kept(tmp_path, "a.jpg\nb.jpg\n", "a.jpg", "b.jpg")


def test_a_figure_more_in_a_picture_is_no_picture_more(tmp_path):
    left, faults = kept(tmp_path, "a.jpg", "a.jpg", "a.jpg", "b.jpg")
    assert left == ["b.jpg"] and faults.counts() == {"excluded by bad.txt": 1}


def test_paths_are_compared_as_places(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "real" / name).write_bytes(b"")
    (tmp_path / "real" / "c.jpg").symlink_to("a.jpg")
    accent = unicodedata.normalize("NFD", "é.jpg")
    left, _ = kept(tmp_path, "real/a.jpg\né.jpg", "linked/a.jpg", "linked/b.jpg", "real/c.jpg", accent)
    assert left == ["linked/b.jpg", "real/c.jpg"]  # a link to a file is another name, which was not listed


# ---- in the readers --------------------------------------------------------------------------------------------------


def files_of(task) -> list[str]:
    """The files of samples in the training part of the small data, by their paths in it."""
    folder = small_data(task)
    place = folder / "images" / "train" if (folder / "images").is_dir() else folder / task.training
    return sorted(str(path.relative_to(folder)) for path in place.rglob(f"*{task.sample}"))


def say_samples(task, data, list_of_bad):
    """Prints the files, below the data folder, of all that the task's own reader gives for a training."""
    if task.folder == VOICE:
        from data import find_voice

        found = find_voice(str(data), "auto", 0, list_of_bad)
        paths, faults = [recording.path for recording in found.recordings], found.faults
    elif task.folder == MEDICAL:
        from data import find_organs

        found = find_organs(str(data), "", 0, list_of_bad)
        paths, faults = [mask for case in found.cases for _, mask, _ in case.masks], found.faults
    else:
        from data import read_tables

        splits, *_, faults = read_tables(
            str(data), *(["auto"] if task.name in ("detection", "pose") else []), 0, exclude=list_of_bad
        )
        paths = [sample.path for samples in splits.values() for sample in samples]
    print("samples", sorted({str(Path(path).relative_to(data)) for path in paths}))
    print("told", faults.counts().get("excluded by bad.txt"), len(faults.notes))


@pytest.mark.parametrize("task", ROWS, ids=str)
def test_every_reader_leaves_out_just_what_is_listed(task):
    bad, data, file = files_of(task)[:2], small_data(task), scratch() / task.name / "bad.txt"
    file.write_text("\n".join(bad))

    def compare():
        say_samples(task, data, "")
        say_samples(task, data, str(file))

    lines = [line for line in in_task(task, compare).splitlines() if line.startswith(("samples", "told"))]
    every, some = (set(eval(line.removeprefix("samples "))) for line in lines[::2])
    assert every - some == set(bad) and some and lines[3] == f"told {len(bad)} 0"


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS, ids=str)
def test_a_run_trains_without_them_says_so_and_goes_on_only_with_the_same_list(task, tmp_path):
    bad, data, file = files_of(task)[:1], small_data(task), tmp_path / "bad.txt"
    file.write_text(bad[0])
    flags = ["--data_dir", data, "--model", "demo", "--output_dir", tmp_path, "--epochs", 1, "--max_steps_per_epoch", 1]
    flags += ["--batch_size", 2, "--exclude", file]
    call(task, "train_lora.py", *flags)
    run = tmp_path / task.name / "lora"
    facts = read(run / "summary.json")["data"]
    assert facts["left_out"]["excluded by bad.txt"] == 1
    assert read(run / "checkpoints" / "best" / "origin.json")["exclude"] == str(file)
    said = call(task, "eval_lora.py", "--checkpoint", run / "checkpoints" / "best", "--split", "train").stdout
    assert "excluded by bad.txt (1)" in said  # it scores what was trained on
    file.write_text("")
    assert "the data is not the one" in one_line(call(task, "train_lora.py", *flags, "--resume", "--epochs", 2, expect=2))
