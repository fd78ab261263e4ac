"""Which recordings a folder has, of whose voice, in which split."""

import os

import numpy as np
import pytest
from conftest import VOICE, use_task

from common.config import UserError
from common.samples import Faults

TASK = VOICE
use_task(TASK)

from audio import write_wave  # noqa: E402
from recordings import find_recordings  # noqa: E402


def fill(folder, *names):
    """Files of half a second of noise, each another."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wave(path, np.random.default_rng(number).standard_normal(8000) * 0.1, 16000)


def test_numbered_folders_are_voices_and_what_lies_beside_them_is_the_first(tmp_path, capsys):
    fill(tmp_path, "0/a.wav", "0/b.wav", "10/a.wav", "2/deep/a.wav", "top.wav")
    found, voices = find_recordings(tmp_path, Faults())
    assert voices == ["0", "2", "10"]
    assert {r.name: r.speaker for r in found} == {"0/a.wav": 0, "0/b.wav": 0, "10/a.wav": 2, "2/deep/a.wav": 1, "top.wav": 0}
    assert "5 recordings of 3 voices: 0, 2, 10" in capsys.readouterr().out
    assert {r.speaker for r in find_recordings(tmp_path, Faults(), "one")[0]} == {0}
    os.rename(tmp_path / "0", tmp_path / "5")
    found, voices = find_recordings(tmp_path, Faults())
    assert voices == ["0", "2", "5", "10"] and {r.speaker for r in found if r.name.startswith("5/")} == {2}


def test_other_folders_are_one_voice_unless_asked(tmp_path):
    fill(tmp_path, "Disc 1/Chapter 1/part.wav", "Disc 1/Chapter 2/part.wav", "Disc 2/Chapter 1/part.wav")
    found, voices = find_recordings(tmp_path, Faults())
    assert len({r.name for r in found}) == 3 and voices == [tmp_path.name]
    assert find_recordings(tmp_path, Faults(), "folders")[1] == ["Disc 1", "Disc 2"]


def test_folders_named_like_splits_give_them(tmp_path):
    fill(tmp_path, "wrapped/train/1/a.wav", "wrapped/Validation/1/a.wav", "wrapped/train/2/b.wav")
    found, voices = find_recordings(tmp_path, Faults())
    assert [(r.name, r.split, voices[r.speaker]) for r in found] == [
        ("Validation/1/a.wav", "val", "1"),
        ("train/1/a.wav", "train", "1"),
        ("train/2/b.wav", "train", "2"),
    ]


def test_one_file_is_one_recording(tmp_path):
    fill(tmp_path, "voice.wav", "other.wav")
    found, voices = find_recordings(tmp_path / "voice.wav", Faults())
    assert [r.path for r in found] == [tmp_path / "voice.wav"] and voices == ["voice"]


def test_a_folder_without_sound_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no sound")
    with pytest.raises(UserError, match=r"no recording in it \(looked for \.wav.*\.flac.*\.m4a"):
        find_recordings(tmp_path, Faults())
    with pytest.raises(UserError, match="no folder or file"):
        find_recordings(tmp_path / "nowhere", Faults())


def test_pipes_links_and_loops_are_named_and_not_waited_for(tmp_path):
    fill(tmp_path, "good.wav")
    os.mkfifo(tmp_path / "mic.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "loop").symlink_to(tmp_path)
    faults = Faults()
    found, _ = find_recordings(tmp_path, faults)
    assert [r.name for r in found] == ["good.wav"]
    assert faults.counts() == {"link to a file that is not there": 1, "pipe or device, no file": 1}
