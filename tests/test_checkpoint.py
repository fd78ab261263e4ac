"""Saving and loading under crashes, damage, a full disk and malice."""

import builtins
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Child, in_child
from safetensors.torch import save_file

from common import checkpoint
from common.checkpoint import (
    MANIFEST,
    atomic_file,
    atomic_folder,
    damage,
    fingerprint,
    load_state,
    open_model_folder,
    recover,
    save_state,
    write_json,
    write_text,
)
from common.config import UserError

CRASHED = 41  # exit code of a child that reached its crash


def content(version: int) -> tuple[dict, dict]:
    """A state that is recognisable in each of its parts."""
    state = {
        "models": [{"w": torch.full((300,), float(version)), "b": torch.full((3,), float(version))}],
        "optimizers": [{"state": {0: {"step": torch.tensor(float(version))}}, "param_groups": [{"lr": version / 10}]}],
    }
    return state, {"version": version, "history": [{"loss": float(version)}] * version}


def save(folder: Path, version: int, step: int | None = None) -> None:
    state, progress = content(version)
    save_state(folder, state, {"step": step or version, **progress})


def version_of(found) -> int | None:
    """Which save this is, after checking that every part is of it."""
    if found is None:
        return None
    state, progress = found
    version = progress["version"]
    expected, written = content(version)
    assert {**written, "step": progress["step"]} == progress
    assert torch.equal(state["models"][0]["w"], expected["models"][0]["w"])
    assert torch.equal(state["models"][0]["b"], expected["models"][0]["b"])
    assert state["optimizers"] == expected["optimizers"]
    return version


def crash_at(k: int, act, *args) -> None:
    """Runs act(*args) and ends the process, as a kill would, at the k-th point where it is about to touch the disk.

    A file that is being written counts twice: the crash leaves it not begun, or half written.
    """
    points = 0

    def point(half=None):
        nonlocal points
        points += 1
        if points == k:
            if half:
                half()
            os._exit(CRASHED)

    def wrap(module, name):
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            point()
            return real(*args, **kwargs)

        setattr(module, name, wrapped)

    def cut(path):
        os.truncate(path, os.path.getsize(path) // 2)

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        wrap(os, name)
    real_open, real_save, real_rmtree, real_text = io.open, torch.save, shutil.rmtree, Path.write_text

    def wrapped_open(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            point()
        return real_open(file, mode, *args, **kwargs)

    def wrapped_save(state, file, *args, **kwargs):
        point()
        real_save(state, file, *args, **kwargs)
        name = file if isinstance(file, (str, Path)) else file.name
        point(lambda: cut(name))

    def wrapped_text(path, *args, **kwargs):
        point()
        real_text(path, *args, **kwargs)
        point(lambda: cut(path))

    def wrapped_rmtree(path, *args, **kwargs):
        point()
        return real_rmtree(path, *args, **kwargs)

    builtins.open = io.open = wrapped_open
    torch.save, shutil.rmtree, Path.write_text = wrapped_save, wrapped_rmtree, wrapped_text
    act(*args)


def crashes(tmp_path, start: Path, act, check, *args) -> int:
    """act(folder, *args) on copies of `start`, crashed at every point in turn until it goes through. check(folder, done)."""
    for k in range(1, 500):
        folder = tmp_path / f"at-{k}"
        shutil.copytree(start, folder)
        code, text = in_child(crash_at, k, act, folder, *args, log=tmp_path / "log.txt")
        assert code in (0, CRASHED), text
        check(folder, code == 0)
        shutil.rmtree(folder)
        if code == 0:
            return k - 1
    raise AssertionError("never went through")


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_crash_in_the_first_save(tmp_path):
    start = tmp_path / "start"
    start.mkdir()

    def check(folder, done):
        assert version_of(load_state(folder)) in ([1] if done else [None, 1])
        save(folder, 2)
        assert version_of(load_state(folder)) == 2

    assert crashes(tmp_path, start, save, check, 1) > 10


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2])
def test_crash_in_a_later_save(tmp_path, saves):
    start = tmp_path / "start"
    for version in range(1, saves + 1):
        save(start, version)

    def check(folder, done):
        assert version_of(load_state(folder)) in ([saves + 1] if done else [saves, saves + 1])
        assert not list(folder.glob("*.corrupt"))
        save(folder, saves + 1), save(folder, saves + 2)
        assert version_of(load_state(folder)) == saves + 2
        assert sorted(p.name for p in folder.iterdir()) == [f"step-{v:08d}" for v in (saves + 1, saves + 2)]

    assert crashes(tmp_path, start, save, check, saves + 1) > 10


@pytest.mark.slow
def test_crash_in_saving_the_same_step_again(tmp_path):
    """As when a signal stops a run at a step that has been saved already."""
    start = tmp_path / "start"
    save(start, 1, step=5), save(start, 2, step=6)

    def check(folder, done):
        assert version_of(load_state(folder)) in ([3] if done else [2, 3])
        assert damage(folder / "step-00000005") is None
        save(folder, 4, step=7)
        assert hidden(folder) == []

    assert crashes(tmp_path, start, save, check, 3, 6) > 10


@pytest.mark.slow
def test_two_crashes_in_a_row(tmp_path):
    start = tmp_path / "start"
    save(start, 1, step=5), save(start, 2, step=6)
    dice = random.Random(0)
    for _ in range(30):
        folder = tmp_path / "run"
        shutil.copytree(start, folder)
        for version in (3, 4):
            in_child(crash_at, dice.randint(1, 35), save, folder, version, 6, log=tmp_path / "log.txt")
        assert version_of(load_state(folder)) in (2, 3, 4)
        assert not list(folder.glob("*.corrupt"))
        shutil.rmtree(folder)


def save_best(folder: Path, word: str) -> None:
    with atomic_folder(folder / "best") as aside:
        (aside / "inner").mkdir()
        for name in ("a.txt", "b.txt", "inner/c.txt"):
            (aside / name).write_text(f"{word} {name}")


def words_of(folder: Path) -> set[str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    assert len(files) == 3
    return {p.read_text().split()[0] for p in files}


@pytest.mark.slow
def test_crash_in_replacing_the_best_model(tmp_path):
    start = tmp_path / "start"
    save_best(start, "old")
    seen = set()

    def check(folder, done):
        opened = open_model_folder(folder / "best", "a.txt")
        assert damage(opened) is None
        words = words_of(opened)
        assert words == {"new"} if done else words in ({"old"}, {"new"})
        seen.update(words)
        save_best(folder, "newest")
        assert words_of(folder / "best") == {"newest"} and hidden(folder) == []

    assert crashes(tmp_path, start, save_best, check, "new") > 10
    assert seen == {"old", "new"}


def test_an_exception_while_filling_leaves_the_old_folder(tmp_path):
    save_best(tmp_path, "old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "best") as aside:
        (aside / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert words_of(tmp_path / "best") == {"old"} and hidden(tmp_path) == []


def test_a_folder_that_a_link_leads_to_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk" / "best").mkdir(parents=True)
    (tmp_path / "best").symlink_to(tmp_path / "disk" / "best")
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "best") as aside:
            (aside / "a.txt").write_text(text)
    assert (tmp_path / "best").is_symlink() and (tmp_path / "disk" / "best" / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "best", "best", "disk", MANIFEST]


def test_of_two_processes_that_write_one_file_the_last_wins(tmp_path):
    def write_slowly():
        with atomic_file(tmp_path / "a.txt") as aside:
            aside.write_text("first")
            (tmp_path / "begun").touch()
            while not (tmp_path / "go on").exists():
                time.sleep(0.005)

    first = Child(write_slowly, log=tmp_path / "log.txt")
    first.wait_for((tmp_path / "begun").exists)
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    (tmp_path / "go on").touch()
    assert first.wait() == 0 and (tmp_path / "a.txt").read_text() == "first" and hidden(tmp_path) == []


def test_a_full_disk_says_for_which_file_there_was_no_room(tmp_path):
    file = tmp_path / ("狗" * 80)  # 240 bytes
    write_text(file, "old")
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(file) as aside:
        aside.write_text("a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does
    assert caught.value.filename == str(file) and file.read_text() == "old" and hidden(tmp_path) == []


def test_what_another_process_begins_once_a_folder_has_its_name_is_left_alone(tmp_path, monkeypatch):
    best, others = tmp_path / "best", tmp_path / ".best.tmp" / "a.txt"

    def fsync(path):
        if path == tmp_path and best.exists():  # just renamed
            others.parent.mkdir()
            others.write_text("another's")

    monkeypatch.setattr(checkpoint, "fsync", fsync)
    with atomic_folder(best) as aside:
        (aside / "a.txt").write_text("mine")
    assert (best / "a.txt").read_text() == "mine" and others.read_text() == "another's"


def test_of_two_processes_that_save_one_folder_the_second_is_told(tmp_path):
    """And the first ends as if it had been alone; a lock dies with its process."""
    best = tmp_path / "best"

    def save_slowly():
        with atomic_folder(best) as aside:
            (aside / "a.txt").write_text("first")
            while not (tmp_path / "go on").exists():
                time.sleep(0.005)

    first = Child(save_slowly, log=tmp_path / "log.txt")
    first.wait_for(lambda: (tmp_path / ".best.tmp" / "a.txt").exists())
    with pytest.raises(UserError, match=r"another process is just writing .*best"), atomic_folder(best):
        raise AssertionError("two at once")
    (tmp_path / "go on").touch()
    assert first.wait() == 0 and damage(best) is None and hidden(tmp_path) == []
    (tmp_path / "go on").unlink()
    killed = Child(save_slowly, log=tmp_path / "log.txt")
    killed.wait_for(lambda: (tmp_path / ".best.tmp" / "a.txt").exists())
    killed.kill(signal.SIGKILL)
    killed.wait()
    with atomic_folder(best) as aside:
        (aside / "a.txt").write_text("second")
    assert (best / "a.txt").read_text() == "second" and hidden(tmp_path) == []


def test_a_text_that_cannot_get_its_name_leaves_nothing(tmp_path):
    (tmp_path / "page.md").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "page.md", "words")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_stopped_while_it_writes_leaves_nothing_beside_the_old_file(tmp_path, signum):
    code = """
import sys, tempfile, time
from pathlib import Path
from common.checkpoint import atomic_file, atomic_folder
from common.config import cli

def main(place):
    with atomic_folder(place / "best"), tempfile.TemporaryDirectory(dir=place), atomic_file(place / "old") as aside:
        aside.write_text("new")
        print("writing", flush=True)
        time.sleep(60)

cli(main, Path(sys.argv[1]))
"""
    (tmp_path / "old").write_text("old")
    script = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "writing\n" and len(list(tmp_path.iterdir())) == 4
    script.send_signal(signum)
    script.communicate()
    assert script.returncode == 128 + signum
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"


def test_crash_in_writing_a_json_file(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    write_json(start / "summary.json", {"is": "old" * 1000})

    def act(folder):
        write_json(folder / "summary.json", {"is": "new" * 1000})

    def check(folder, done):
        text = json.loads((folder / "summary.json").read_text())["is"]
        assert text in (["new" * 1000] if done else ["old" * 1000, "new" * 1000])

    assert crashes(tmp_path, start, act, check) >= 4


# ---- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path):
    os.truncate(path, 0)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, empty, flip, Path.unlink], ids=["truncate", "empty", "flip", "delete"])
@pytest.mark.parametrize("name", ["state.pt", "progress.json", MANIFEST])
def test_damaged_newest_falls_back_by_one(tmp_path, capsys, harm, name):
    save(tmp_path, 1), save(tmp_path, 2), save(tmp_path, 3)
    newest = tmp_path / "step-00000003"
    assert {p.name for p in newest.iterdir()} == {"state.pt", "progress.json", MANIFEST}, "a file that this test leaves out"
    if (harm, name) == (truncate, MANIFEST):
        os.truncate(newest / name, (newest / name).stat().st_size - 5)  # its last byte is a line break
    else:
        harm(newest / name)
    assert version_of(load_state(tmp_path)) == 2
    said = capsys.readouterr().out
    assert "step-00000003" in said and (name in said or name == MANIFEST)
    assert not newest.exists() and (tmp_path / "step-00000003.corrupt").is_dir()
    assert version_of(load_state(tmp_path)) == 2
    save(tmp_path, 3)
    assert version_of(load_state(tmp_path)) == 3


def test_every_byte_of_the_manifest_counts(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / MANIFEST
    whole = path.read_bytes()
    for i in range(len(whole)):
        data = bytearray(whole)
        data[i] ^= 0x04
        path.write_bytes(data)
        if json.loads(whole) != loads_or_none(data):
            assert damage(path.parent), f"byte {i}"
    path.write_bytes(whole)
    assert damage(path.parent) is None


@pytest.mark.parametrize("text", ["{}", "[]", "5", "", "[" * 99_999, '{"../x": {"bytes": 0, "sha256": ""}}'])
def test_a_manifest_that_was_emptied_vouches_for_nothing(tmp_path, text):
    save(tmp_path, 1)
    with atomic_folder(tmp_path / "best") as aside:
        save_file({"w": torch.ones(3)}, aside / "model.safetensors")
    for folder in (tmp_path / "step-00000001", tmp_path / "best"):
        (folder / MANIFEST).write_text(text)
        assert MANIFEST in damage(folder)
    with pytest.raises(UserError, match="best is damaged: .*manifest.json"):
        open_model_folder(tmp_path / "best", "model.safetensors")


def test_a_folder_without_a_manifest_is_said_to_be_unchecked(tmp_path, capsys):
    with atomic_folder(tmp_path / "best") as aside:
        save_file({"w": torch.ones(3)}, aside / "model.safetensors")
    open_model_folder(tmp_path / "best", "model.safetensors")
    assert capsys.readouterr().out == ""
    (tmp_path / "best" / MANIFEST).unlink()
    open_model_folder(tmp_path / "best", "model.safetensors")
    assert "has no manifest.json: nothing says whether" in capsys.readouterr().out


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path, umask, mode):
    """Also those that safetensors writes for their owner alone."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "best") as aside:
            save_file({"w": torch.ones(3)}, aside / "model.safetensors")
            (aside / "inner").mkdir()
            save_file({"w": torch.ones(3)}, aside / "inner" / "head.safetensors")
            (aside / "README.md").write_text("a card")
        save(tmp_path / "last", 1)
        write_json(tmp_path / "summary.json", {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8 and {path.name: path.stat().st_mode & 0o777 for path in files} == {p.name: mode for p in files}


def loads_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_all_damaged_is_an_error_and_stays_one(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-{step:08d}" / "state.pt")
    for _ in range(2):  # asked again, it does not start over either
        with pytest.raises(UserError, match="damaged.*--overwrite"):
            load_state(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.corrupt", "step-00000002.corrupt"]


def test_nothing_saved_is_none(tmp_path):
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "nowhere") is None


def test_two_are_kept_and_steps_sort_as_numbers(tmp_path):
    for step in (8, 9, 10, 11, 100):
        save(tmp_path, step)
        assert version_of(load_state(tmp_path)) == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000011", "step-00000100"]


# ---- a full disk ---------------------------------------------------------------------------------------------------


def on_full_disk(limit: int, act, *args) -> None:
    """act under a limit on the size of files; exits with 2 on a UserError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        act(*args)
    except UserError as error:
        print(f"error: {error}")
        raise SystemExit(2) from None


def save_large(folder: Path, step: int) -> None:
    state, progress = content(step)
    save_state(folder, {**state, "large": torch.zeros(50_000)}, {"step": step, **progress})


def save_large_model(folder: Path) -> None:
    with atomic_folder(folder / "best") as aside:
        save_file({"w": torch.zeros(50_000)}, aside / "model.safetensors")


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_full_disk_leaves_the_last_good_checkpoint(tmp_path, limit):
    folder = tmp_path / "last"
    save(folder, 1), save(folder, 2)
    save_best(folder, "old")
    # The log is written before the limit counts; it is a file, too.
    for act, args in ((save_large, (folder, 3)), (save_large_model, (folder,))):
        pipe_read, pipe_write = os.pipe()  # no file: the limit does not hold for what the child says

        def quiet(act=act, args=args, pipe_write=pipe_write):
            os.dup2(pipe_write, 1)
            import sys

            sys.stdout = sys.stderr = os.fdopen(pipe_write, "w")
            on_full_disk(limit, act, *args)

        code, _ = in_child(quiet, log=tmp_path / "log.txt")
        os.close(pipe_write)
        said = os.fdopen(pipe_read).read()
        assert code == 2, said
        assert "could not save" in said and str(folder) in said
    assert version_of(load_state(folder)) == 2
    assert words_of(folder / "best") == {"old"}
    assert hidden(folder) == [], "what could not be completed takes no room"
    assert not list(folder.glob("*.corrupt"))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_disk_error_is_a_user_error(tmp_path, monkeypatch, name):
    save(tmp_path, 1), save(tmp_path, 2)

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, name, no_space)
        with pytest.raises(UserError, match="No space left"):
            save(tmp_path, 3)
    assert version_of(load_state(tmp_path)) == 2


# ---- malice, identity ------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    bomb = Bomb()
    bomb.path = tmp_path / "exploded"
    save(tmp_path / "last", 1)
    with atomic_folder(tmp_path / "last" / "step-00000002") as aside:  # sealed as an honest one would be
        torch.save({"models": [bomb]}, aside / "state.pt")
        (aside / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="state.pt"):
        load_state(tmp_path / "last")
    assert not bomb.path.exists()
    torch.load(tmp_path / "last" / "step-00000002" / "state.pt", weights_only=False)
    assert bomb.path.exists(), "the bomb is a dud, so nothing was tested"


def test_open_model_folder_names_what_is_wrong(tmp_path):
    best = tmp_path / "best"
    with pytest.raises(UserError, match="no folder"):
        open_model_folder(best, "model.safetensors")
    with atomic_folder(best) as aside:
        save_file({"w": torch.ones(3)}, aside / "model.safetensors")
        (aside / "labels.json").write_text('["cat"]')
    assert open_model_folder(best, "model.safetensors") == best
    with pytest.raises(UserError, match="holds no adapter.safetensors"):
        open_model_folder(best, "adapter.safetensors")
    (best / "labels.json").write_text('["dog"]')
    with pytest.raises(UserError, match="labels.json has changed"):
        open_model_folder(best, "model.safetensors")
    (best / "labels.json").unlink()
    with pytest.raises(UserError, match="labels.json is missing"):
        open_model_folder(best, "model.safetensors")


def test_a_folder_of_pickles_is_refused(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        open_model_folder(tmp_path, "model.safetensors")


def test_recover_prefers_what_is_in_place(tmp_path):
    save_best(tmp_path, "old")
    shutil.copytree(tmp_path / "best", tmp_path / ".best.previous")
    save_best(tmp_path, "new")
    shutil.copytree(tmp_path / "best", tmp_path / ".best.previous")
    recover(tmp_path / "best")
    assert words_of(tmp_path / "best") == {"new"}


def test_fingerprint():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    reference = fingerprint(weights)
    assert fingerprint(dict(reversed(weights.items()))) == reference
    assert fingerprint({name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in weights.items()})
    assert fingerprint({**weights, "a": weights["a"].t().contiguous().t()}) == reference, "strides are not content"
    renamed = {**{k: v for k, v in weights.items() if k != "b"}, "bb": weights["b"]}
    assert fingerprint(renamed) == reference, "libraries rename layers; the weights stay the same"
    one_value = weights["a"].clone()
    one_value[1, 2] = torch.nextafter(one_value[1, 2], torch.tensor(99.0))
    changed = {
        "value": {**weights, "a": one_value},
        "scalar": {**weights, "c": torch.tensor(4)},
        "shape": {**weights, "a": weights["a"].reshape(3, 2)},
        "dtype": {**weights, "b": weights["b"].half()},
        "more": {**weights, "d": torch.ones(1)},
        "fewer": {"a": weights["a"], "b": weights["b"]},
    }
    prints = {what: fingerprint(tensors) for what, tensors in changed.items()}
    assert len({reference, *prints.values()}) == len(prints) + 1
