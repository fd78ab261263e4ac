"""Which recordings a folder has, of whose voice, in which split."""

import os

import numpy as np
import pytest
import soundfile
from conftest import VOICE, use_task

from common.config import UserError
from common.samples import Faults

TASK = VOICE
use_task(TASK)

from audio import open_audio, resample, write_wave  # noqa: E402
from recordings import find_recordings  # noqa: E402


def fill(folder, *names):
    """Files of half a second of noise, each another."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wave(path, np.random.default_rng(number).standard_normal(8000) * 0.1, 16000)


def speech_like(seed):
    """Two seconds of noise in syllables, (32000,), another for each seed."""
    rng = np.random.default_rng(seed)
    syllables = np.interp(np.arange(32000), np.arange(0, 32001, 1600), rng.uniform(0, 1, 21) ** 3)
    coloured = np.convolve(rng.standard_normal(32000), np.hanning(20), "same")
    return coloured * syllables / np.abs(coloured).max()


def test_numbered_folders_are_voices_and_what_lies_beside_them_is_the_first(tmp_path, capsys):
    fill(tmp_path, "0/a.wav", "0/b.wav", "10/a.wav", "2/deep/a.wav", "top.wav")
    found, voices = find_recordings(tmp_path, Faults())
    assert voices == ["0", "2", "10"]
    assert {r.name: r.speaker for r in found} == {"0/a.wav": 0, "0/b.wav": 0, "10/a.wav": 2, "2/deep/a.wav": 1, "top.wav": 0}
    assert "recordings: 5, 0.0 minutes, of 3 voices: 0, 2, 10" in capsys.readouterr().out
    assert {r.speaker for r in find_recordings(tmp_path, Faults(), "one")[0]} == {0}
    os.rename(tmp_path / "0", tmp_path / "5")
    found, voices = find_recordings(tmp_path, Faults())
    assert voices == ["0", "2", "5", "10"] and {r.speaker for r in found if r.name.startswith("5/")} == {2}


def test_other_folders_are_one_voice_unless_asked(tmp_path):
    fill(tmp_path, "Disc 1/Chapter 1/part.wav", "Disc 1/Chapter 2/part.wav", "Disc 2/Chapter 1/part.wav")
    found, voices = find_recordings(tmp_path, Faults())
    assert len({r.name for r in found}) == 3 and voices == [tmp_path.name]
    assert find_recordings(tmp_path, Faults(), "folders")[1] == ["Disc 1", "Disc 2"]
    write_wave(tmp_path / "beside.wav", speech_like(9), 16000)
    found, voices = find_recordings(tmp_path, Faults(), "folders")
    assert voices == ["Disc 1", "Disc 2", tmp_path.name] and [r.speaker for r in found] == [0, 0, 1, 2]


def test_folders_named_like_splits_give_them(tmp_path):
    fill(tmp_path, "wrapped/train/1/a.wav", "wrapped/Validation/1/a.wav", "wrapped/train/2/b.wav")
    found, voices = find_recordings(tmp_path, Faults())
    assert [(r.name, r.split, voices[r.speaker]) for r in found] == [
        ("Validation/1/a.wav", "val", "1"),
        ("train/1/a.wav", "train", "1"),
        ("train/2/b.wav", "train", "2"),
    ]


def test_what_a_run_left_among_the_recordings_is_none(tmp_path):
    fill(tmp_path, "mine/voice.wav", "mine/runs/full/predictions/best/1_voice.wav", "mine/runs/other.wav")
    for name in ("config.yaml", "summary.json"):
        (tmp_path / "mine" / "runs" / "full" / name).write_text("{}")
    faults = Faults()
    found, _ = find_recordings(tmp_path / "mine", faults)
    assert [r.name for r in found] == ["other.wav", "voice.wav"] and not faults.found


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


def test_copies_of_a_sound_count_once_and_takes_of_it_stay_together(tmp_path):
    take, other = speech_like(0), speech_like(1)
    write_wave(tmp_path / "take.wav", take, 16000)
    write_wave(tmp_path / "take again.wav", take, 16000)
    write_wave(tmp_path / "other.wav", other, 16000)
    write_wave(tmp_path / "quiet.wav", take / 2, 16000)
    write_wave(tmp_path / "upside down.wav", -take, 16000)
    soundfile.write(tmp_path / "export.flac", soundfile.read(tmp_path / "take.wav")[0], 16000)
    soundfile.write(tmp_path / "small.mp3", take, 16000)
    write_wave(tmp_path / "silence before.wav", np.pad(take, (9000, 100)), 16000)
    soundfile.write(tmp_path / "other rate.flac", resample(take, 16000, 22050), 22050)
    faults = Faults()
    found, _ = find_recordings(tmp_path, faults)
    assert faults.counts() == {"copy of another recording": 1}
    assert len({r.group for r in found}) == 2 and len(found) == 8
    assert [r.name for r in found if r.group == "other.wav"] == ["other.wav"]
    assert sum(map(len, faults.notes.values())) == 6


def test_no_sound_is_trained_on_and_held_out(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    take, other = speech_like(0), speech_like(1)
    for path in ("train/same.wav", "val/take.wav"):
        write_wave(tmp_path / path, take, 16000)
    write_wave(tmp_path / "train/other.wav", other, 16000)
    write_wave(tmp_path / "train/quiet.wav", take / 3, 16000)
    faults = Faults()
    found, _ = find_recordings(tmp_path, faults)
    assert [(r.name, r.split) for r in found] == [("other.wav", "train"), ("take.wav", "val")]
    assert faults.counts() == {"copy of another recording": 1, "same sound as a recording of another split": 1}


def test_a_second_start_opens_no_file_that_has_not_changed(tmp_path, monkeypatch):
    fill(tmp_path, "a.wav", "b.wav")
    (tmp_path / "page.wav").write_text("<html>")
    first = find_recordings(tmp_path, Faults())[0]
    opened = []
    monkeypatch.setattr("copies.open_audio", lambda path: opened.append(path.name) or open_audio(path))
    faults = Faults()
    assert find_recordings(tmp_path, faults)[0] == first and not opened and faults.counts() == {"not sound": 1}
    write_wave(tmp_path / "b.wav", speech_like(0), 16000)
    write_wave(tmp_path / "c.wav", speech_like(1), 16000)
    assert len(find_recordings(tmp_path, Faults())[0]) == 3 and sorted(opened) == ["b.wav", "c.wav"]


def test_names_of_every_kind_are_told_apart_on_one_line(tmp_path):
    names = [
        "take.wav",
        "take.flac",
        "TAKE.wav",
        "a|b.wav",
        "-dash.WAV",
        "new\nline.wav",
        "é.wav",
        "e\u0301.wav",
        "声 🎤.wav",
        "x" * 200 + ".wav",
    ]
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).standard_normal(8000) * 0.1
        soundfile.write(tmp_path / name, noise, 16000, format="FLAC" if name.endswith("flac") else "WAV")
    (tmp_path / os.fsdecode(b"caf\xe9.wav")).symlink_to(tmp_path / "take.wav")
    faults = Faults()
    found, _ = find_recordings(tmp_path, faults)
    assert len({r.name for r in found}) == len(names) and all(r.name.isprintable() for r in found)
    assert faults.counts() == {"copy of another recording": 1}


def test_a_fault_that_all_files_have_is_said_once(tmp_path):
    for name in ("a.wav", "b.mp3", "c.flac"):
        (tmp_path / name).write_text("<html>")
    with pytest.raises(UserError, match="of its 3 recordings none can be used, all for one reason: not sound$"):
        find_recordings(tmp_path, Faults())
