"""Samples: faults, finding files, splits, the scan of files and what is kept of it, the cache in memory, free memory."""

import json
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Child

from common import sample_cache
from common.batches import build_loader
from common.config import UserError
from common.file_finder import FileFinder
from common.runtime import cores
from common.sample_cache import SampleCache, cache_limit, first_readable, free_memory
from common.samples import (
    BadFile,
    Faults,
    choose_layout,
    files_below,
    hold_out,
    read_text,
    short_names,
    split_folders,
    split_of,
    split_off,
)
from common.scan import FileReader, check_files

# A kind of file for these tests: "<count> <value>", e.g. "3 7" for three bytes of value 7. "bad" in it: fine until it is read.


@pytest.fixture
def looked(monkeypatch, tmp_path):
    """Names of the files whose header was looked at, and that were read to the end; scans go to a folder of the test's own."""
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(headers=[], whole=[])


def header(looked, path):
    looked.headers.append(path.name)
    cells = path.read_text().split()
    if not cells:
        raise BadFile("empty file, nothing in it")
    return (int(cells[0]),)


def load(looked, item):
    looked.whole.append(item.path.name)
    cells = item.path.read_text().split()
    if "bad" in cells:
        raise BadFile("file that cannot be read, half of it")
    return np.full(int(cells[0]), int(cells[1]), dtype=np.uint8)


def write_files(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    return [SimpleNamespace(path=folder / name) for name in contents]


def check(items, looked, limit=10**6, whole=True, kind="counts 1"):
    """(names that are good, cache, counts of faults); what was looked at and read is in `looked`, and only of this time."""
    looked.headers.clear(), looked.whole.clear()
    faults, reader = Faults(), FileReader(kind, ("count",), partial(header, looked))
    good, cache = check_files(items, reader, lambda _, facts: facts, partial(load, looked), faults, limit, "files", whole)
    return [items[number].path.name for number in good], cache, faults.counts()


def scan_file(tmp_path):
    (file,) = (tmp_path / "cache" / "scans").iterdir()
    return file


# ---- faults ------------------------------------------------------------------------------------------------------------


def test_faults_are_told_before_the_error_that_they_explain(capsys):
    with pytest.raises(UserError):
        with Faults() as faults:
            for number in range(5):
                faults.add("file that is not there", f"{number}.wav")
            raise UserError("no training data")
    assert capsys.readouterr().out == "left out, file that is not there (5): 0.wav, 1.wav, 2.wav and 2 more\n"
    with pytest.raises(KeyError):  # another error is none of the data's
        with faults:
            raise KeyError
    with faults:
        pass
    assert capsys.readouterr().out == ""


# ---- finding files -----------------------------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_name_on_the_screen_is_one_line_and_commands_no_terminal(capsys):
    assert short_names([Path("a\x1b[2J.png"), Path("b\n.png"), Path("ä.png")]) == ["a\\x1b[2J.png", "b\\n.png", "ä.png"]
    alike = [Path("x\x07/1.png"), Path("y/1.png")]
    assert short_names(alike) == ["x\\x07/1.png", "y/1.png"]
    faults = Faults()
    faults.add("bad file", "c\x1b[2J.png")
    faults.report()
    assert "left out, bad file (1): c\\x1b[2J.png\n" in capsys.readouterr().out
    for pair in (["é", "\udce9"], ["a\nb", "a\\nb"]):
        assert len(set(short_names([Path(name) for name in pair]))) == 2, "two files never have one name"


def test_files_are_found_in_the_first_folder_that_has_them_and_never_outside(tmp_path):
    touch(tmp_path, "a/x.wav", "b/x.wav", "b/y.wav", "b/deep/z.wav", "secret")
    first, second = tmp_path / "a", tmp_path / "b"
    (second / "x").mkdir()
    finder = FileFinder([tmp_path / "gone", first, second, first])
    found = {"x.wav": first / "x.wav", "deep/z.wav": second / "deep/z.wav", "y.wav": second / "y.wav", "./x.wav": first / "x.wav"}
    found["deep/../y.wav"] = second / "y.wav"
    assert {name: finder.find(name) for name in found} == found
    for name in ("../secret", str(tmp_path / "secret"), "deep/../../secret", "x", "", "..", "deep/", "a\0b", "n" * 5000):
        assert finder.find(name) is None, name


def test_a_link_in_the_folder_is_the_users_own_and_may_lead_anywhere(tmp_path):
    touch(tmp_path, "hub/blobs/1f", "disk/deep/b.wav")
    folder = touch(tmp_path / "set", "c.wav")
    (folder / "a.wav").symlink_to("../hub/blobs/1f")
    (folder / "deep").symlink_to(tmp_path / "disk" / "deep")
    (folder / "broken.wav").symlink_to("nowhere")
    finder = FileFinder([folder])
    assert [finder.find(name) for name in ("a.wav", "deep/b.wav")] == [folder / "a.wav", folder / "deep" / "b.wav"]
    assert finder.find("broken.wav") is None and finder.find("deep/../../hub/blobs/1f") is None


@pytest.mark.parametrize(
    "there, name",
    [
        ("images/Gro\u0308\u00dfe.jpg", "Gr\u00f6\u00dfe.jpg"),  # decomposed on a Mac's disk, composed in the file
        ("images/Gr\u00f6\u00dfe.jpg", "images/Gro\u0308\u00dfe.jpg"),
        ("images/a.JPG", "IMAGES/A.jpg"),
        ("images/my dog.jpg", "my%20dog.jpg"),
        ("images/my%20dog.jpg", "my dog.jpg"),
        ("images/a.jpg", "images\\a.jpg"),
        ("images\\a.jpg", "images/a.jpg"),  # an archive of Windows, unpacked elsewhere
        ("images/a.jpg", "C:\\Users\\me\\set\\a.jpg"),
        ("images/a.jpg", "/home/me/set/images/a.jpg"),
        ("images/a.jpg", "../../label-studio/data/media/upload/7/0a1b2c3d-a.jpg"),
        ("images/0a1b2c3d-a.jpg", "/data/upload/7/0a1b2c3d-a.jpg"),
        ("images/a.jpg", "/data/local-files/?d=set/images/a.jpg"),
        ("images/2020/batch/a.jpg", "batch/a.jpg"),
        ("val/a.jpg", "/home/me/set/val/a.jpg"),
    ],
)
def test_a_name_of_another_machine_is_found_by_its_last_parts(tmp_path, there, name, capsys):
    touch(tmp_path, there, "images/other.jpg", "images/a.txt", "images/._a.jpg", "__MACOSX/images/a.jpg", ".trash/a.jpg")
    faults = Faults()
    finder = FileFinder([tmp_path / "train", tmp_path / "images", tmp_path], (".jpg",))
    assert finder.find(name, faults) == tmp_path / there and not faults.counts()
    assert finder.find(name, faults) == tmp_path / there and capsys.readouterr().out.count("is taken for it") == 1


def test_what_fits_several_files_or_lies_in_another_split_is_named_and_not_guessed(tmp_path):
    touch(tmp_path, "images/x/a.jpg", "images/y/a.jpg", "images/z.jpg", "val/b.jpg", "images/val2017/c.jpg")
    faults, finder = Faults(), FileFinder([tmp_path / "train", tmp_path / "images", tmp_path])
    assert finder.find("D:\\y\\a.jpg", faults) == tmp_path / "images/y/a.jpg"
    assert [finder.find(name, faults) for name in ("a.jpg", "b.jpg", "/old/c.jpg", "z")] == [None] * 4
    assert faults.found["picture whose name fits several files"] == [
        f"a.jpg ({tmp_path / 'images/x/a.jpg'}, {tmp_path / 'images/y/a.jpg'})"
    ]
    assert faults.found["picture that is not there"] == ["b.jpg", "/old/c.jpg", "z"]
    anywhere = FileFinder([tmp_path], (".jpg",), any_split=True)
    assert [anywhere.find(name) for name in ("b", "c.jpg")] == [tmp_path / "val/b.jpg", tmp_path / "images/val2017/c.jpg"]


def test_a_name_may_lack_its_ending_where_one_file_has_it(tmp_path):
    touch(tmp_path, "a.jpg", "a.txt", "b.c.png", "d.png", "d.jpg")
    finder, faults = FileFinder([tmp_path], (".jpg", ".png")), Faults()
    assert [finder.find(name, faults) for name in ("a", "b.c", "d.png")] == [tmp_path / n for n in ("a.jpg", "b.c.png", "d.png")]
    assert finder.find("d", faults) is None and list(faults.counts()) == ["picture whose name fits several files"]


def test_a_listed_file_costs_no_further_look_at_the_disk(tmp_path, monkeypatch):
    names = [f"{number}.wav" for number in range(50)]
    write_files(tmp_path / "set", **dict.fromkeys(names, ""))
    finder, asked = FileFinder([tmp_path / "gone", tmp_path / "set"]), []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or exists(path))
    assert all(finder.find(name) for name in names) and len(asked) <= 2


def test_files_are_found_at_any_depth_through_links_and_none_that_is_hidden(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    names = ["b/c/1", "b/2", "a.x", ".git/3", "b/.ipynb_checkpoints/4", "b/__MACOSX/._5", "b/._6", "b/c/@eaDir/7"]
    for path in [data / name for name in names] + [elsewhere / "8", elsewhere / ".9"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (data / "linked").symlink_to(elsewhere)
    (data / "one").symlink_to(elsewhere / "8")
    (data / "gone").symlink_to(tmp_path / "nowhere")  # whoever opens it says so
    (data / "b" / "again").symlink_to(data / "b" / "c")  # not twice
    (elsewhere / "back").symlink_to(data)  # loops
    (data / "b" / "up").symlink_to("..")
    (data / "b" / "parent").symlink_to(tmp_path)
    os.mkfifo(data / "pipe")
    found = [os.path.relpath(path, data) for path in files_below(data)]
    assert found == ["a.x", "b/2", "b/c/1", "gone", "linked/8", "one"]
    assert files_below(tmp_path / "nowhere") == []
    (tmp_path / ".hidden").symlink_to(data)
    assert len(files_below(tmp_path / ".hidden")) == 6  # what the user names is data, whatever it is called


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_is_read_as_the_program_wrote_it(tmp_path, encoding):
    (tmp_path / "t.csv").write_bytes("päth,žluť\r\n".encode(encoding))
    faults = Faults()
    assert read_text(tmp_path / "t.csv", faults) == "päth,žluť\r\n" and not faults.notes


def test_text_of_a_windows_code_page_is_read_and_said(tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes("Café,Müll\x81".encode("latin-1"))
    faults = Faults()
    assert read_text(tmp_path / "t.csv", faults) == "Café,Müll\ufffd" and faults.counts() == {}
    faults.report()
    assert capsys.readouterr().out == "note, text that is not UTF-8, read as Windows-1252 (1): t.csv\n"


def test_a_layout_is_chosen_by_the_only_sign_or_by_name():
    there = {"rows": True, "trees": [], "heaps": None}
    assert choose_layout(Path("d"), "auto", there, "") == "rows" == choose_layout(Path("d"), "rows", there, "")
    for data_format, signs, told in (
        ("auto", {**there, "trees": [1]}, "--data_dir d looks like rows and trees; expected X; --data_format chooses one"),
        ("auto", {"rows": False}, "--data_dir d is none of the layouts that are known; expected X; --data_format"),
        ("trees", there, "--data_format trees: d does not have that layout"),
        ("elsewhere", there, "--data_format elsewhere: d does not have that layout"),  # as a stranger's origin.json may say
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            choose_layout(Path("d"), data_format, signs, "X")


# ---- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split, names",
    [
        (
            "train",
            ["train", "Training", "TRAIN", "training_set", "trainset", "TrainSet", "train2017", "seg_train", "Train Images"],
        ),
        ("val", ["Val", "valid", "VALIDATION", "validation-set", "dev", "eval", "val_data"]),
        ("test", ["Test", "testing", "test_set", "01_test", "TestImages"]),
        (
            None,
            [
                "cat",
                "steam_train",
                "freight",
                "contest",
                "devil",
                "validated",
                "trainval",
                "train_test",
                "",
                "2017",
                "set",
                "試驗",
            ],
        ),
    ],
)
def test_splits_are_known_by_their_usual_names(split, names):
    assert {split_of(name) for name in names} == {split}


def test_a_split_is_found_among_other_words_where_that_is_asked_for():
    assert split_of("instances_Train2017", alone=False) == "train" and split_of("instances_Train2017") is None
    assert split_of("testing_frames_keypoints", alone=False) == "test"
    assert split_of("train_and_val", alone=False) is None is split_of("photos_of_cats", alone=False)


def test_two_folders_of_one_split_are_an_error(tmp_path):
    for name in ("Testing", "Training", ".train", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "val").touch()
    assert split_folders(tmp_path) == {"train": tmp_path / "Training", "test": tmp_path / "Testing"}
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="Testing/ and test/, both of the test split; keep one"):
        split_folders(tmp_path)


def test_a_fifth_is_split_off_and_adding_samples_moves_no_other():
    names = [f"{number}.wav" for number in range(1000)]
    chosen = split_off(names, 0)
    assert 150 < sum(chosen) < 250 and split_off(names, 1) != chosen
    assert split_off(names[::2], 0) == chosen[::2]
    # What the splits of earlier runs rest on.
    assert [n for n, mine in zip(names[:40], chosen, strict=False) if mine] == ["6.wav", "15.wav", "37.wav"]


@pytest.mark.parametrize("groups", [2, 3, 20])
def test_no_group_is_on_both_sides_and_none_is_empty(groups):
    names = [f"speaker {number % groups}" for number in range(10 * groups)]
    for seed in range(30):
        sides = dict(zip(names, split_off(names, seed), strict=True))
        assert [sides[name] for name in names] == split_off(names, seed) and set(sides.values()) == {True, False}
        order = np.random.default_rng(seed).permutation(len(names))
        assert split_off([names[i] for i in order], seed) == [sides[names[i]] for i in order]  # of (seed, group) alone


def test_one_group_cannot_be_held_out(capsys):
    with pytest.raises(UserError, match="2 samples of one group, anna: none can be held out"):
        split_off(["anna", "anna"], 0)
    with pytest.raises(UserError, match="d has no validation split, and too few training speakers to hold any out: 1"):
        hold_out([1, 2], ["anna", "anna"], 0, "d", "speakers")
    train, val = hold_out([1, 2, 3, 4], ["anna", "ben", "anna", "ben"], 0, "d", "speakers")
    assert sorted([train, val]) == [[1, 3], [2, 4]]
    assert "no validation split in d: 1 of 2 training speakers, chosen by seed 0, become it" in capsys.readouterr().out


# ---- the scan ----------------------------------------------------------------------------------------------------------

CONTENTS = {"a": "3 1", "b": "2 2", "c": "", "d": "4 bad", "e": "1 5"}
LEFT_OUT = {"empty file": 1, "file that cannot be read": 1}


def test_a_second_start_looks_at_nothing_that_it_knows(tmp_path, looked):
    items = write_files(tmp_path / "set", **CONTENTS)
    first = check(items, looked)
    assert first[0] == ["a", "b", "e"] and first[2] == LEFT_OUT
    assert sorted(looked.headers) == list("abcde") and sorted(looked.whole) == list("abde")
    again = check(items, looked)
    assert (again[0], again[2]) == (first[0], first[2]) and not looked.headers and not looked.whole
    assert [again[1][i].tolist() for i in range(3)] == [[1, 1, 1], [2, 2], [5]] == [first[1][i].tolist() for i in range(3)]
    assert sorted(looked.whole) == ["a", "b", "e"]  # the second start's, at their first use; the first start had kept its own


def test_a_file_that_changed_is_looked_at_again(tmp_path, looked):
    items = write_files(tmp_path / "set", **CONTENTS)
    check(items, looked)
    (tmp_path / "set" / "c").write_text("2 9")
    os.utime(tmp_path / "set" / "e", ns=(0, 1))  # the same bytes, another time
    good, cache, faults = check(items, looked)
    assert good == ["a", "b", "c", "e"] and faults == {"file that cannot be read": 1} and cache[2].tolist() == [9, 9]
    assert sorted(looked.headers) == ["c", "e"] and sorted(looked.whole) == ["c", "e"]


def test_with_headers_alone_a_bad_file_shows_when_it_is_used(tmp_path, looked):
    items = write_files(tmp_path / "set", **CONTENTS)
    good, cache, faults = check(items, looked, limit=0, whole=False)
    assert good == ["a", "b", "d", "e"] and faults == {"empty file": 1} and not looked.whole
    with pytest.raises(ValueError, match="half of it"):
        cache[2]
    assert cache.new_faults() == [(str(tmp_path / "set" / "d"), "file that cannot be read, half of it")]
    assert cache.new_faults() == []
    # Also once a scan knows better: what is left out is a function of the files and the settings.
    assert check(items, looked)[0] == ["a", "b", "e"]
    headers = check(items, looked, whole=False)
    assert headers[0] == good and headers[2] == faults and not looked.headers and not looked.whole


def test_what_one_task_cannot_use_another_may(tmp_path, looked):
    """A scan is shared: a fault of the file itself is kept in it, one of a task's own is not."""
    items = write_files(tmp_path / "set", a="1 1", b="2 2", c="3 bad")
    reader = FileReader("counts 1", ("count",), partial(header, looked))

    def picky(item):
        array = load(looked, item)
        if len(array) == 2:
            raise ValueError("file that this task cannot take")
        return array

    for _ in range(2):
        faults = Faults()
        good, _ = check_files(items, reader, lambda _, facts: facts, picky, faults, 10**6, "files")
        assert good == [0] and faults.counts() == {"file that cannot be read": 1, "file that this task cannot take": 1}
    good, cache, faults = check(items, looked)
    assert good == ["a", "b"] and faults == {"file that cannot be read": 1} and looked.whole == ["b"]
    assert cache[1].tolist() == [2, 2]


def test_a_file_that_changes_in_training_is_named_as_such(tmp_path, looked):
    cache = cache_of(tmp_path, looked, a="3 1", b="2 2")
    (tmp_path / "set" / "b").write_text("4 2")
    with pytest.raises(ValueError, match="changed"):
        cache[1]
    told = "file that has changed since it was looked at, (4,) instead of (2,)"
    assert cache.new_faults() == [(str(tmp_path / "set" / "b"), told)] and cache.new_faults() == []


def test_a_file_that_could_not_be_read_is_not_remembered(tmp_path, looked, monkeypatch):
    items = write_files(tmp_path / "set", a="1 1", b="1 2")
    busy = []

    def troubled(path, *arguments, **options):
        if path.name == "b" and busy:
            raise OSError(24, "Too many open files")
        return read_text(path, *arguments, **options)

    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", troubled)
    busy.append(1)
    assert check(items, looked)[0] == ["a"]
    busy.clear()
    assert check(items, looked)[0] == ["a", "b"] and looked.headers == ["b"]


def spoil_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def spoil_entries(value):
    return lambda file: spoil_json(file, lambda content: content["files"].update(dict.fromkeys(CONTENTS, value(content))))


DAMAGE = {
    "empty": lambda file: file.write_text(""),
    "half": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "bytes": lambda file: file.write_bytes(b"\x80\x04\x95" * 99),
    "deep": lambda file: file.write_text("[" * 100_000),
    "number": lambda file: file.write_text("1" * 10_000),
    "another kind": lambda file: spoil_json(file, lambda content: content["head"].__setitem__(1, "pictures")),
    "another folder": lambda file: spoil_json(file, lambda content: content["head"].__setitem__(2, "/elsewhere/")),
    "list": lambda file: file.write_text("[1, 2]"),
    "files are a list": lambda file: spoil_json(file, lambda content: content.update(files=[])),
    "null": spoil_entries(lambda content: None),
    "short": spoil_entries(lambda content: content["files"]["a"][:2]),
    "texts": spoil_entries(lambda content: [*content["files"]["a"][:2], ["3"], "", True]),
    "two facts": spoil_entries(lambda content: [*content["files"]["a"][:2], [3, 3], "", True]),
    "below zero": spoil_entries(lambda content: [*content["files"]["a"][:2], [-3], "", True]),
    "terminal codes": spoil_entries(lambda content: [*content["files"]["a"][:2], None, "\x1b[2J", True]),
    "nothing known": spoil_entries(lambda content: [*content["files"]["a"][:2], None, "", True]),
    "huge": lambda file: os.truncate(file, 2**40),  # a hole: it takes no room
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),  # opened, it would wait for a writer
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),  # without an end, and of 0 bytes
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_scan_file_that_is_damaged_or_foreign_is_ignored(tmp_path, looked, damage):
    items = write_files(tmp_path / "set", **CONTENTS)
    for item in items:
        os.utime(item.path, ns=(0, 0))
    check(items, looked)
    DAMAGE[damage](scan_file(tmp_path))
    began = time.monotonic()
    good, cache, faults = check(items, looked)
    assert good == ["a", "b", "e"] and faults == LEFT_OUT and cache[0].tolist() == [1, 1, 1]
    assert looked.headers and time.monotonic() - began < 5
    if damage != "a folder":
        check(items, looked)
        assert not looked.headers, "it was not written anew"


def test_a_scan_that_lies_about_a_file_does_no_harm(tmp_path, looked):
    items = write_files(tmp_path / "set", **CONTENTS)
    check(items, looked)
    spoil_json(scan_file(tmp_path), lambda content: content["files"]["a"].__setitem__(2, [2**40]))
    good, cache, _ = check(items, looked)
    assert good == ["a", "b", "e"] and cache.bytes == 0
    with pytest.raises(ValueError, match="file that has changed since it was looked at"):
        cache[0]
    assert cache[1].tolist() == [2, 2]


def test_no_place_for_the_scan_is_no_hindrance(tmp_path, looked, monkeypatch):
    items = write_files(tmp_path / "set", **CONTENTS)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert check(items, looked)[0] == ["a", "b", "e"] and looked.headers
    monkeypatch.delenv("LORA_WORKSHOP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert check(items, looked)[0] == ["a", "b", "e"] and looked.headers
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert check(items, looked)[0] == ["a", "b", "e"]
    assert list((tmp_path / "cache" / "scans").iterdir()) == []


def test_a_scan_of_another_reader_is_not_believed(tmp_path, looked):
    items = write_files(tmp_path / "set", **CONTENTS)
    check(items, looked)
    check(items, looked, kind="counts 2")
    assert sorted(looked.headers) == list("abcde")


def test_two_splits_of_one_folder_share_their_scan_and_processes_at_once_leave_a_whole_one(tmp_path, looked):
    items = write_files(tmp_path / "set", **{f"{number:02d}": f"1 {number}" for number in range(40)})
    check(items[::2], looked)
    check(items[1::2], looked)
    check(items, looked)
    assert not looked.headers
    scan_file(tmp_path).unlink()
    children = [Child(check, items[part::2], looked, log=tmp_path / f"log{part}") for part in (0, 1, 0, 1)]
    assert [child.wait() for child in children] == [0] * 4
    assert len(list((tmp_path / "cache" / "scans").iterdir())) == 1  # and nothing half done beside it
    files = json.loads(scan_file(tmp_path).read_text())["files"]
    assert len(files) >= 20 and all(entry[4] for entry in files.values())
    assert check(items, looked)[0] == [item.path.name for item in items]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_scan_stops_at_once_and_goes_on_where_it_stopped(tmp_path, looked, signum):
    items = write_files(tmp_path / "set", **{f"{number:03d}": "1 1" for number in range(400)})

    def slow(item):
        time.sleep(0.02)
        return load(looked, item)

    def scan():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        reader = FileReader("counts 1", ("count",), partial(header, looked))
        print("begun", flush=True)
        check_files(items, reader, lambda _, facts: facts, slow, Faults(), 0, "files")

    child = Child(scan, log=tmp_path / "log")
    child.wait_for(lambda: "begun" in child.text)
    time.sleep(0.7)
    began = time.monotonic()
    child.kill(signum)
    assert child.wait() in (99, 143) and time.monotonic() - began < 3
    check(items, looked)
    assert not looked.headers and 200 < len(looked.whole) < 400  # what was read before the stop is not read again


def test_a_scan_uses_the_cores_there_are(tmp_path, looked, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    items = write_files(tmp_path / "set", **{str(number): "1 1" for number in range(12)})
    meeting = threading.Barrier(6, timeout=20)

    def wait(path):
        meeting.wait()  # broken unless six look at once
        return (1,)

    good, _ = check_files(items, FileReader("x", ("count",), wait), lambda _, f: f, None, Faults(), 0, "files", whole=False)
    assert len(good) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 1


def one_of_two(rank, items, looked, store, said):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    good, cache, faults = check(items, looked)
    assert [cache[index].tolist() for index in range(len(good))] == [[index, index] for index in range(20)]
    said.write_text(f"{len(looked.headers)} {len(good)} {faults}")
    torch.distributed.barrier()


def test_processes_share_the_work_and_know_the_same(tmp_path, looked):
    items = write_files(tmp_path / "set", **{f"{number:02d}": f"2 {number}" for number in range(20)}, x="", y="2 bad")
    for want in (11, 0):
        said = [tmp_path / f"said {want} {rank}" for rank in range(2)]
        children = [
            Child(one_of_two, rank, items, looked, tmp_path / f"store{want}", said[rank], log=tmp_path / f"log{rank}")
            for rank in range(2)
        ]
        assert [child.wait() for child in children] == [0, 0], [child.text for child in children]
        assert [file.read_text() for file in said] == [f"{want} 20 {LEFT_OUT}"] * 2


# ---- the cache in memory -----------------------------------------------------------------------------------------------


def cache_of(tmp_path, looked, limit=10**6, **contents):
    return check(write_files(tmp_path / "set", **contents), looked, limit, whole=False)[1]


def test_the_first_that_fit_are_kept_and_the_others_loaded_each_time(tmp_path, looked):
    cache = cache_of(tmp_path, looked, 5, a="3 1", b="2 2", c="1 3")
    assert cache.kept == 2 and cache.bytes == 5
    for _ in range(3):
        assert [cache[i].tolist() for i in range(3)] == [[1, 1, 1], [2, 2], [3]]
    assert sorted(looked.whole) == ["a", "b", "c", "c", "c"]


class CachedData(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, index):
        return torch.tensor(int(first_readable(self, self.cache.__getitem__, index, 0, 1)[1][0]))

    def name(self, index):
        return self.cache.items[index].path.name


def test_what_is_kept_of_floats_is_their_very_bits(tmp_path, looked):
    items = write_files(tmp_path / "set", a="3", b="2", c="4")
    reader = FileReader("floats 1", ("count",), partial(header, looked))

    def load_floats(item, dtype="float32"):
        return np.linspace(-1, 1, int(item.path.read_text()), dtype=dtype)

    for limit, kept in ((20, 2), (19, 1), (0, 0)):
        options = (reader, lambda _, facts: facts, load_floats, Faults(), limit, "files")
        _, cache = check_files(items, *options, dtype="float32")
        assert cache.kept == kept
        for _ in range(2):
            for item, array in zip(items, map(cache.__getitem__, range(3)), strict=True):
                assert array.dtype == np.float32 and np.array_equal(array, load_floats(item))
    for limit in (0, 100):  # told nothing, a cache holds bytes: -1 to 1 would become 255, 0 and 1
        with pytest.raises(TypeError, match="a was loaded as float32; the cache was told uint8"):
            SampleCache(items, load_floats, [(3,), (2,), (4,)], limit)[0]


def test_facts_may_be_numpys_and_must_be_whole_numbers(tmp_path, looked):
    items = write_files(tmp_path / "set", a="3 7")
    for number in (np.int16, np.uint64):
        reader = FileReader("numpy", ("count",), lambda path, number=number: tuple(number(n) for n in header(looked, path)))
        check_files(items, reader, lambda _, facts: facts, partial(load, looked), Faults(), 0, "files")
    assert looked.headers == ["a"], "the second start knew it"
    reader = FileReader("floats", ("count",), lambda path: (3.5,))
    with pytest.raises(TypeError):  # kept, it would be looked at again at every start
        check_files(items, reader, lambda _, facts: facts, partial(load, looked), Faults(), 0, "files")


def test_a_fault_names_its_file_where_every_folder_has_one_of_that_name(tmp_path, looked):
    items = [
        write_files(tmp_path / "set" / patient, ct=text)[0] for patient, text in (("p1", ""), ("p2", "3 bad"), ("p3", "1 1"))
    ]
    faults, reader = Faults(), FileReader("counts 1", ("count",), partial(header, looked))
    check_files(items, reader, lambda _, facts: facts, partial(load, looked), faults, 0, "files")
    places = [place.replace(os.sep, "/") for place in sum(faults.found.values(), [])]
    assert places == ["p1/ct (nothing in it)", "p2/ct (half of it)"]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked here, and keep nothing")
def test_what_a_worker_loads_all_have_and_what_fails_there_is_known(tmp_path, looked):
    cache = cache_of(tmp_path, looked, **{str(number): f"5000 {number}" for number in range(9)}, x="1 bad")
    data = CachedData(cache)
    first = torch.cat(list(build_loader(data, [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]], torch.stack, 2)))
    assert first[:9].tolist() == list(range(9)) and not looked.whole  # in this process
    assert [cache[i][0] for i in range(9)] == list(range(9)) and not looked.whole
    assert cache.new_faults() == [(str(tmp_path / "set" / "x"), "file that cannot be read, half of it")]


def test_a_batch_is_loaded_on_all_cores(tmp_path, looked, monkeypatch):
    monkeypatch.setattr(sample_cache, "cores", lambda: 3)
    meeting = threading.Barrier(3, timeout=20)

    def wait(item):
        meeting.wait()
        return np.zeros(4, dtype=np.uint8)

    cache = SampleCache([SimpleNamespace(path=Path(str(i))) for i in range(7)], wait, [(4,)] * 7, 24)
    cache.fill([0, 1, 2, 1, 6])  # the last does not fit, so it is not loaded for nothing
    assert [int(state) for state in cache.state] == [1, 1, 1, 0, 0, 0, 0]


class ThreadData(torch.utils.data.Dataset):
    """Whether each sample was loaded by the process's main thread."""

    def __init__(self, samples):
        shapes, items = [(1,)] * samples, [SimpleNamespace(path=Path(str(i))) for i in range(samples)]
        self.cache = SampleCache(
            items, lambda _: np.array([threading.current_thread() is threading.main_thread()], np.uint8), shapes, 99
        )

    def __getitems__(self, indices):
        self.cache.fill(indices)
        return [torch.from_numpy(self.cache[i].copy()) for i in indices]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked here")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_worker_starts_no_threads(monkeypatch, workers):
    monkeypatch.setattr(sample_cache, "cores", lambda: 3)
    loader = build_loader(ThreadData(4), [[0, 1], [2, 3]], torch.stack, workers)
    assert torch.cat(list(loader)).flatten().tolist() == [int(workers > 0)] * 4


def test_what_takes_the_place_of_a_bad_file_is_a_function_of_seed_epoch_and_index(tmp_path, looked):
    contents = {f"{number:02d}": f"1 {'bad' if number % 2 else number}" for number in range(40)}
    data = CachedData(cache_of(tmp_path, looked, 0, **contents))

    def draw(index, *key):
        return first_readable(data, data.cache.__getitem__, index, *key)[0]

    chosen = {(seed, epoch, i): draw(i, seed, epoch) for seed in (0, 1) for epoch in (1, 2) for i in range(40)}
    assert all(chosen[key] % 2 == 0 for key in chosen) and all(chosen[0, 1, i] == i for i in range(0, 40, 2))
    assert chosen == {key: draw(key[2], *key[:2]) for key in reversed(chosen)}  # whatever was drawn before
    odd = [[chosen[seed, epoch, i] for i in range(1, 40, 2)] for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(row) for row in odd}) == 4 and all(len(set(row)) > 7 for row in odd)
    assert draw(1, 0, 1, "mixup") != chosen[0, 1, 1] or draw(3, 0, 1, "mixup") != chosen[0, 1, 3]
    with pytest.raises(UserError, match="^01: file that cannot be read, half of it$"):  # evaluation takes no other
        draw(1, 0, 0)
    data = CachedData(cache_of(tmp_path / "all", looked, 0, a="1 bad", b="1 bad"))
    with pytest.raises(UserError, match="a: file that cannot be read, half of it .nor can 20 others that were tried"):
        first_readable(data, data.cache.__getitem__, 0, 0, 1)


# ---- free memory -------------------------------------------------------------------------------------------------------


def groups(root, lines, **files):
    """A fake root: proc/self/cgroup with these lines, and files of sys/fs/cgroup by their paths."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    for path, text in files.items():
        (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / path).write_text(f"{text}\n")
    return root


GIB = 2**30
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"


@pytest.mark.parametrize(
    "lines, files, want",
    [
        (["0::/"], {"memory.max": 3 * GIB, "memory.current": GIB}, 2 * GIB),
        (["0::/a/b"], {"a/b/memory.max": "max", "a/b/memory.current": 5, "a/memory.max": GIB, "a/memory.current": 7}, GIB - 7),
        (["0::/a"], {"a/memory.max": GIB, "a/memory.current": GIB, "a/memory.stat": "anon 1\ninactive_file 500"}, 500),
        (["0::/host/path"], {"memory.max": GIB, "memory.current": 0}, GIB),  # a container sees its own group as the root
        (["0::/"], {"memory.max": 64 * GIB, "memory.current": 0}, 8 * GIB),  # more than the machine has
        (["0::/"], {"memory.max": GIB, "memory.current": 2 * GIB}, 0),
        (["0::/"], {"memory.max": "what", "memory.current": "ever"}, 8 * GIB),
        (["4:memory:/docker/x"], {f"memory/{V1[0]}": 2 * GIB, f"memory/{V1[1]}": GIB}, GIB),
        (
            ["9:cpu,memory:/x"],
            {f"memory/x/{V1[0]}": 9, f"memory/x/{V1[1]}": 4, "memory/x/memory.stat": "total_inactive_file 1"},
            6,
        ),
        (["4:memory:/"], {f"memory/{V1[0]}": 2**63 - 4096, f"memory/{V1[1]}": GIB}, 8 * GIB),
        (["3:cpuset:/x", "0::/"], {}, 8 * GIB),
        ([], {}, 8 * GIB),
    ],
)
def test_free_memory_is_what_the_container_allows(tmp_path, monkeypatch, lines, files, want):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert free_memory(groups(tmp_path / "root", lines, **files)) == want
    assert free_memory(tmp_path / "no Linux") == 8 * GIB


def test_the_cache_takes_a_quarter_shared_by_the_processes(monkeypatch):
    monkeypatch.setattr(sample_cache, "free_memory", lambda: 80)
    assert (cache_limit("auto"), cache_limit("off")) == (20, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cache_limit("auto") == 5
