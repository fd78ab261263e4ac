"""preprocess.py and what it leaves: clips that are prepared once, whatever stops it, and a report that adds up."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import VOICE, run_script, use_task

from common.checkpoint import sha256_of
from common.config import UserError
from common.samples import BadFile, Faults

TASK = VOICE
use_task(TASK)

import preprocess  # noqa: E402
from audio import write_wave  # noqa: E402
from prepared import is_prepared, open_prepared, prepare  # noqa: E402
from preparing import known_facts  # noqa: E402
from recordings import Recording, find_recordings  # noqa: E402
from report import draw_report, report_of_folder, report_text  # noqa: E402

RATE = 16000


def sing(seconds, f0, seed=0, rate=RATE):
    """A vowel at F0 in syllables of other lengths for each seed, (n,), peak 0.5."""
    time_ = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    loudness = np.interp(time_, np.linspace(0, seconds, 12), rng.uniform(0.4, 1, 12))
    wave = sum(np.sin(2 * np.pi * k * f0 * time_ + k * k) / k for k in range(1, 60) if k * f0 < 0.45 * rate)
    return 0.5 * loudness * wave / np.abs(wave).max()


def voice(rate=RATE, content="dsp", f0_method="swift"):
    return SimpleNamespace(content=content, f0_method=f0_method, config=SimpleNamespace(sample_rate=rate, content_width=13))


def recordings_of(folder, **sounds):
    """Writes sounds (name -> wave at 16 kHz) and gives them as recordings."""
    found = []
    for name, wave in sounds.items():
        write_wave(folder / f"{name}.wav", wave, RATE)
        found.append(Recording(folder / f"{name}.wav", f"{name}.wav", 0, None, f"{name}.wav"))
    return found


def contents(folder):
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, recordings, clips, faults) of two sentences with silence around, a hissing one, and a silent one."""
    folder = tmp_path_factory.mktemp("sound")
    pause, rng = np.zeros(3 * RATE), np.random.default_rng(0)
    two = np.concatenate([pause, sing(2, 200), pause, sing(1.5, 220, 1), pause])
    hiss = np.concatenate([sing(1, 150, 2), 0.1 * rng.standard_normal(RATE)])
    recordings = recordings_of(folder, two=two, hiss=hiss + 0.06 * rng.standard_normal(len(hiss)), silent=0 * pause)
    faults = Faults()
    return folder / "out", recordings, prepare(recordings, voice(), folder / "out", 1, faults), faults


# ---- clips -----------------------------------------------------------------------------------------------------------------


def test_clips_are_what_was_recorded_on_one_clock(prepared):
    folder, _, clips, faults = prepared
    assert [clip.name for clip in clips] == ["two.wav (2.8 s)", "two.wav (7.8 s)", "hiss.wav"]
    assert [clip.recording for clip in clips] == ["two.wav", "two.wav", "hiss.wav"]
    for clip, f0 in zip(clips, (200, 220, 150), strict=True):
        wave, content, found = clip.load(160)
        assert wave.shape == (clip.frames * 160,) and content.shape == (clip.frames, 13) and found.shape == (clip.frames,)
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in (wave, content, found))
        assert 0.5 < np.abs(wave).max() <= 1 and abs(np.median(found[found > 0]) - f0) < 3
        assert abs(clip.frames / 100 - (clip.stop - clip.start)) < 0.02
    assert faults.counts() == {"silent recording": 1}
    assert open_prepared(folder, voice()) == (clips, ["0"])
    with pytest.raises(BadFile, match="prepared for another rate"):
        clips[0].load(400)


def test_a_second_run_takes_all_from_the_folder_and_other_settings_take_nothing(prepared, monkeypatch):
    folder, recordings, clips, _ = prepared
    before = contents(folder)
    made = []
    monkeypatch.setattr("preparing.open_audio", lambda path: made.append(path.name) or pytest.fail("prepared again"))
    assert prepare(recordings[:2], voice(), folder, 1, Faults()) == clips and contents(folder) == before
    monkeypatch.undo()
    for other, f0_range in ((voice(rate=RATE * 2), (50, 1100)), (voice(), (60, 900))):
        others = prepare(recordings[:1], other, folder, 1, Faults(), f0_range)
        assert {clip.path for clip in others}.isdisjoint({clip.path for clip in clips})
    assert contents(folder).items() > before.items()
    copy = replace(recordings[0], path=recordings[0].path.with_name("moved.wav"))
    copy.path.write_bytes(recordings[0].path.read_bytes())
    assert prepare([copy], voice(), folder, 1, Faults())[0].path == clips[0].path, "a name is no setting"
    prepare(recordings[:2], voice(), folder, 1, Faults())


def test_a_folder_for_another_voice_is_refused_in_one_line(prepared):
    folder, recordings, clips, _ = prepared
    prepare(recordings[:2], voice(), folder, 1, Faults())
    with pytest.raises(UserError, match="prepared with rate 16000 Hz, and this base takes 40000"):
        open_prepared(folder, voice(rate=40000))
    about = json.loads((folder / "prepared.json").read_text())
    about["settings"] |= {"content": "hubert:nobody/model", "content_version": "of its weights"}
    (folder / "prepared.json").write_text(json.dumps(about))
    assert open_prepared(folder, voice(content="hubert:nobody/model"))[0], "the model itself is not needed to train"
    with pytest.raises(UserError, match="hubert:nobody/other is not in the local cache"):
        open_prepared(folder, voice(content="hubert:nobody/other"))
    prepare(recordings[:2], voice(), folder, 1, Faults())
    clips[0].path.write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged or gone; run preprocess.py again"):
        open_prepared(folder, voice())
    assert len(prepare(recordings[:2], voice(), folder, 1, Faults())) == 3
    open_prepared(folder, voice())


def test_where_nothing_is_left_there_is_no_folder_to_train_on(tmp_path):
    recordings = recordings_of(tmp_path, one=np.zeros(RATE), two=np.zeros(2 * RATE), short=sing(0.1, 200))
    with pytest.raises(UserError, match=r"no voice found in 3 recordings: silent recording \(2\); too short \(1\)"):
        prepare(recordings, voice(), tmp_path / "out", 1, Faults())
    assert not is_prepared(tmp_path / "out")


def test_a_long_recording_is_kept_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("preparing.LONGEST_FILE", 200)
    recordings = recordings_of(tmp_path, long=sing(9, 200))
    clips = prepare(recordings, voice(), tmp_path / "out", 1, Faults())
    assert len(clips) == 3 and len({clip.path for clip in clips}) == 3
    assert sum(clip.frames for clip in clips) == pytest.approx(900, abs=10)
    assert clips == open_prepared(tmp_path / "out")[0] and len(clips[-1].load(160)[0]) > RATE


@pytest.mark.slow
def test_processes_prepare_the_same_clips_and_name_what_one_of_them_died_of(tmp_path, monkeypatch):
    recordings = recordings_of(tmp_path, a=sing(1, 200), b=sing(1, 150, 1), silent=np.zeros(RATE), c=sing(1, 250, 2))
    alone = prepare(recordings, voice(), tmp_path / "alone", 1, Faults())
    monkeypatch.setattr("preparing.BYTES_A_WORKER", 1)
    faults = Faults()
    together = prepare(recordings, voice(), tmp_path / "together", 2, faults)
    assert [clip.name for clip in together] == [clip.name for clip in alone] and faults.counts() == {"silent recording": 1}
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")
    assert os.environ["OMP_NUM_THREADS"] == "1"


# ---- the script ------------------------------------------------------------------------------------------------------------


SETTINGS = ("--model", "demo")


@pytest.mark.slow
def test_the_script_reports_what_it_did_and_what_it_left_out(tmp_path):
    data, out = tmp_path / "my voice", tmp_path / "out"
    data.mkdir()
    rng = np.random.default_rng(0)
    write_wave(data / "good.wav", np.concatenate([sing(2, 200), np.zeros(4 * RATE)]), RATE)
    write_wave(data / "noisy.wav", sing(3, 210, 1) + 0.08 * rng.standard_normal(3 * RATE), RATE)
    write_wave(data / "hot.wav", np.clip(6 * sing(3, 220, 2), -0.99, 0.99), RATE)
    soundfile.write(data / "narrow.flac", sing(2, 230, 3, 8000), 8000)
    write_wave(data / "silent.wav", np.zeros(RATE), RATE)
    (data / "page.mp3").write_text("<html><body>404</body></html>")
    done = run_script(VOICE, "preprocess.py", "--data_dir", data, "--output_dir", out, *SETTINGS)
    report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["recordings"]}
    assert rows.keys() == {"good.wav", "noisy.wav", "hot.wav", "narrow.flac"}
    for row in rows.values():
        assert row["seconds"] == pytest.approx(row["kept"] + row["silence"] + row["refused"], abs=0.01)
    assert rows["good.wav"]["silence"] == pytest.approx(3.7, abs=0.3)
    assert {entry["name"].split(" ")[0] for entry in report["left_out"]} == {"silent.wav", "page.mp3"}
    said = done.stdout
    for words in ("noisy (1)", "noisy.wav (", "clipped (1)", "hot.wav (", "narrow (1)", "narrow.flac (nothing above 3"):
        assert words in said
    assert "s of speech are not enough for a good voice" in said and "voice my voice: 4 recordings" in said
    median = report["voices"][0]["f0_median"]
    assert 195 < median < 235 and said.splitlines()[-1].startswith("5 clips") is (report["totals"]["clips"] == 5)
    assert (out / "report.png").stat().st_size > 10_000 and "left out: silent.wav" in (out / "report.txt").read_text()
    assert is_prepared(out)


def test_the_script_ends_with_2_and_a_reason_where_nothing_can_be_used(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    done = run_script(VOICE, "preprocess.py", "--data_dir", data, "--output_dir", out, *SETTINGS, expect=2)
    assert "no recording in it" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    write_wave(data / "a.wav", np.zeros(RATE), RATE)
    for flags, words in (
        (("--data_dir", tmp_path / "none", "--output_dir", out), "there is no folder"),
        (("--data_dir", data, "--output_dir", out, "--f0_min", 100, "--f0_max", 150), "less than an octave"),
        (("--data_dir", data, "--output_dir", data), "the data's own folder"),
        (("--data_dir", data, "--output_dir", data / "a.wav"), "is no folder"),
        (("--data_dir", data, "--output_dir", out), "no voice found in 1 recording: silent recording"),
    ):
        with pytest.raises(UserError, match=words):
            preprocess.main([*map(str, flags), *SETTINGS])
    assert not is_prepared(out) and [path.name for path in data.iterdir()] == ["a.wav"]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(9):
        write_wave(data / f"{number:02}.wav", sing(6, 120 + 10 * number, number), RATE)
    command = [sys.executable, VOICE / "preprocess.py", "--data_dir", data, "--output_dir", out, *SETTINGS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = contents(out)
    assert 2 <= len(there) < 9
    with pytest.raises(UserError, match="not prepared to the end"):
        open_prepared(out)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(out).items() >= there.items() and len(open_prepared(out)[0]) == 18


# ---- the report ------------------------------------------------------------------------------------------------------------


def test_the_report_knows_voices_copies_and_pitch(tmp_path):
    for place, f0 in (("0/a", 110), ("0/b", 120), ("1/a", 220)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_wave(tmp_path / f"{place}.wav", sing(2, f0, f0), RATE)
    soundfile.write(tmp_path / "1" / "export.flac", soundfile.read(tmp_path / "1" / "a.wav")[0], RATE)
    write_wave(tmp_path / "1" / "breath.wav", np.random.default_rng(0).standard_normal(RATE) * 0.1, RATE)
    faults = Faults()
    recordings, speakers = find_recordings(tmp_path, faults)
    prepare(recordings, voice(), tmp_path / "out", 1, faults, speakers=speakers)
    report = report_of_folder(tmp_path / "out", faults)
    first, second = report["voices"]
    assert (first["recordings"], second["recordings"]) == (2, 3)
    assert first["f0_low"] == pytest.approx(110, abs=3) and first["f0_high"] == pytest.approx(120, abs=3)
    assert second["f0_median"] == pytest.approx(220, abs=3), "what is not voiced does not count"
    assert second["minutes"] == pytest.approx(3 / 60, abs=0.01), "a sound counts once"
    assert any("copies of other recordings" in line for line in report["advice"])
    assert any("no voiced frame" in line and "breath.wav" in line for line in report["advice"])
    assert "recording without a voiced frame, which no F0 statistics count" in faults.notes
    text = report_text(report)
    assert "voice 1: 3 recordings" in text and all(row["name"] in text for row in report["recordings"])
    draw_report(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").is_file() and known_facts(tmp_path / "out", "no such key") is None
