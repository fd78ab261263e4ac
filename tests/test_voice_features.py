"""F0 and content features: what they find in sounds whose F0 and events are known, and that both keep one clock."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOICE, Child, use_task

TASK = VOICE
use_task(TASK)
from common.config import UserError  # noqa: E402
from common.folders import one_at_a_time  # noqa: E402
from common.samples import BadFile  # noqa: E402
from compiled import from_librosa  # noqa: E402
from content import REAL_CONTENT, align, load_content  # noqa: E402
from f0 import F0_METHODS, F0_PART, choose_f0, coarse_pitch, extract_f0, is_there, loud_f0  # noqa: E402

METHODS = [method for method in F0_METHODS if method != "auto" and is_there(method)]


def sing(f0, seconds=2.0, rate=16000):
    """Harmonics below 4 kHz at F0 (a number, or one each sample), falling by 6 dB an octave, with a formant at 600 Hz."""
    f0 = np.broadcast_to(np.asarray(f0, float), (round(seconds * rate),))
    phase, wave = 2 * np.pi * np.cumsum(f0) / rate, np.zeros(len(f0))
    for k in range(1, 80):
        gain = (1 / k + np.exp(-(((k * f0 - 600) / 200) ** 2))) * (k * f0 < 4000)
        wave += gain * np.sin(k * phase + k * k)
    return 0.5 * wave / np.abs(wave).max()


def noise(seconds, level, seed=0):
    return np.random.default_rng(seed).standard_normal(round(seconds * 16000)) * level


def hum(seconds, peak, frequency=50):
    return peak * np.sin(2 * np.pi * frequency * np.arange(round(seconds * 16000)) / 16000)


@pytest.fixture(scope="module")
def event():
    """A voice of 150 Hz that leaps to 300 Hz from 1.0 to 1.5 s, another vowel there, and pauses from 2.0 to 2.25 s."""
    time = np.arange(48000) / 16000
    leap = (time >= 1.0) & (time < 1.5)
    wave = sing(np.where(leap, 300, 150), 3.0)
    wave[leap] += 0.3 * sing(300, 3.0)[leap] * np.sin(2 * np.pi * 2400 * time[leap])
    wave[(time >= 2.0) & (time < 2.25)] = 0
    return wave.astype(np.float32)


# ---- F0 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("f0, slack", [(62, 3), pytest.param(220, 3, marks=pytest.mark.slow), (650, 15)])
def test_a_pitch_is_found_from_bass_to_soprano_without_octave_errors(method, f0, slack):
    found = extract_f0(sing(f0), method)
    assert found.shape == (201,) and found.dtype == np.float32 and (found > 0).mean() > 0.9
    assert abs(np.median(found[found > 0]) - f0) < slack
    assert np.mean(np.abs(found[found > 0] / f0 - 1) > 0.1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_neither_hum_nor_noise_nor_silence_is_taken_for_a_voice(method):
    voice = sing(110)
    for sound in (voice + hum(2, 0.17), voice + noise(2, np.std(voice) / 2)):  # 6 dB
        found = extract_f0(sound, method)
        assert (found > 0).mean() > 0.5 and abs(np.median(found[found > 0]) / 110 - 1) < 0.1
    pause = extract_f0(np.concatenate([voice, np.zeros(32000)]) + hum(4, 0.1), method)
    assert np.mean(pause[215:390] > 0) < 0.05 < np.mean(pause[:200] > 0), "a hum in the pause is no voice"
    for silence in (np.zeros(32000), np.zeros(0), noise(1, 1e-4), np.full(8000, 0.5)):
        assert not extract_f0(silence, method).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_long_sounds_in_parts_have_the_f0_of_the_whole(method, monkeypatch):
    glide = sing(np.linspace(100, 300, 40000), 2.5)
    whole = extract_f0(glide, method)
    monkeypatch.setattr("f0.F0_PART", 12 * 1280)
    parts = extract_f0(glide, method)
    assert len(parts) == len(whole) == 251 and F0_PART > len(glide)
    both = (parts > 0) & (whole > 0)
    assert np.mean(both) > 0.95 and np.mean(np.abs(parts / np.where(both, whole, 1) - 1)[both] > 0.02) < 0.01


def test_the_range_is_a_setting():
    assert not np.any(extract_f0(sing(220), "pyin", low=60, high=200) > 206)
    assert abs(np.median(extract_f0(sing(220), "auto", low=150, high=400)) - 220) < 3


def test_one_process_at_a_time_compiles_what_all_share(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    with one_at_a_time(tmp_path / "numba"):
        child = Child(lambda: print("compiled", from_librosa("sequence.dtw")), log=tmp_path / "child.log")
        child.wait_for(lambda: "waiting for another process" in child.text)
        assert "compiled" not in child.text
    assert child.wait() == 0 and "compiled <function dtw" in child.text


def test_where_no_cache_can_be_written_functions_are_compiled_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    assert from_librosa("hz_to_mel")(0.0) == 0
    kept = Path(os.environ["NUMBA_CACHE_DIR"])
    assert kept.name == "cache" and kept.parent.is_dir() and tmp_path not in kept.parents


def test_a_tracker_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("f0").PACKAGES, "crepe", "no_such_package")
    with pytest.raises(UserError, match="--f0_method crepe needs no-such-package.*pip install"):
        choose_f0("crepe")
    monkeypatch.setitem(__import__("f0").PACKAGES, "swift", "no_such_package")
    monkeypatch.setitem(__import__("f0").PACKAGES, "harvest", "no_such_package")
    assert choose_f0("auto") == "pyin"
    with pytest.raises(UserError, match="there is auto, swift"):
        choose_f0("rmvpe")


def test_a_pitch_tracker_that_is_broken_is_not_called_missing(monkeypatch, tmp_path, capsys):
    (tmp_path / "broken_tracker.py").write_text("raise OSError('libgomp.so.1: cannot open\\nshared object file')")
    (tmp_path / "half_a_tracker.py").write_text("import no_such_part")
    (tmp_path / "torn_tracker.py").write_text("import torn_tracker.core")
    (tmp_path / "shy_tracker.py").write_text("raise ModuleNotFoundError('no backend')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(__import__("f0").PACKAGES, "swift", "broken_tracker")
    monkeypatch.setitem(__import__("f0").PACKAGES, "crepe", "half_a_tracker")
    for method, name in (("harvest", "torn"), ("dio", "shy")):
        with monkeypatch.context() as patched, pytest.raises(UserError, match=f"{name}-tracker, which is broken here .ModuleNot"):
            patched.setitem(__import__("f0").PACKAGES, method, f"{name}_tracker")
            choose_f0(method)
    with pytest.raises(UserError, match=r"broken-tracker, which is broken here \(OSError: libgomp.so.1: cannot open shared"):
        choose_f0("swift")
    with pytest.raises(UserError, match="needs half-a-tracker, and that no_such_part, which is not installed: pip"):
        choose_f0("crepe")
    assert choose_f0("auto") == choose_f0("auto") != "swift"
    assert capsys.readouterr().out.count("goes without swift, which needs broken-tracker, which is broken here") == 1


def test_coarse_pitch_counts_as_the_pitch_embedding_does():
    mel = 1127 * np.log(1 + np.array([50, 220, 1100]) / 700)
    steps = np.rint(1 + 254 * (mel - mel[0]) / (mel[2] - mel[0]))
    assert coarse_pitch(np.array([0, 30, 50, 220, 1100, 4000])).tolist() == [1, 1, 1, steps[1], 255, 255]


def test_a_voices_range_is_told_by_loud_frames():
    wave = np.concatenate([sing(200), 0.02 * sing(400)])
    f0 = extract_f0(wave, "auto")
    assert f0.max() > 390 and np.percentile(loud_f0(f0, wave), 98) < 205


def test_a_click_does_not_make_the_voice_around_it_silent():
    quiet = 0.01 * sing(220)
    quiet[16000:16160] = 0.99 * np.sign(noise(0.01, 1.0))
    f0 = extract_f0(quiet, "auto")
    assert (f0[:90] > 0).mean() > 0.8 and len(loud_f0(f0, quiet)) > 150


# ---- content ---------------------------------------------------------------------------------------------------------------


def test_dsp_content_knows_no_level_and_no_length():
    wave = sing(np.linspace(100, 200, 32000)) + noise(2, 0.01)
    content = load_content("dsp")
    features = content(wave)
    assert features.shape == (100, content.width) == (100, 13) and features.dtype == np.float32
    assert np.allclose(features.mean(0), 0, atol=1e-5) and features.std() == pytest.approx(1, abs=0.01)
    assert np.abs(content(wave * 0.5) - features).max() < 0.2
    for samples in (0, 1, 319, 320, 700):
        assert content(wave[:samples]).shape == (samples // 320, 13)
    assert np.isfinite(content(np.zeros(16000))).all()


def test_parts_of_an_utterance_share_its_statistics():
    wave = sing(np.linspace(100, 200, 32000)) + noise(2, 0.01)
    content = load_content("dsp")
    statistics = content.statistics([content.describe(wave)])
    seam = np.concatenate([content(wave[:16000], statistics), content(wave[16000:], statistics)])
    assert np.abs(seam - content(wave))[[*range(48), *range(52, 100)]].max() < 1e-3
    assert np.abs(content(wave[:16000]) - content(wave)[:50]).max() > 0.1, "alone it is another utterance"


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """A random HuBERT of the usual kind, small, as ContentVec's files are: with final_proj, and the settings of its input."""
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=48,
        num_hidden_layers=9,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[16] * 7,
        classifier_proj_size=24,
    )
    model = HubertModel(config)
    model.final_proj = torch.nn.Linear(48, 24)
    folder = tmp_path_factory.mktemp("hubert")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    return folder, model.eval()


def test_hubert_gives_its_last_states_or_the_ninth_projected(hubert):
    folder, model = hubert
    wave = sing(150, 1.0).astype(np.float32)
    sound = np.pad((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7), 40)
    with torch.no_grad():
        states = model(torch.from_numpy(sound)[None], output_hidden_states=True)
        projected = model.final_proj(states.hidden_states[9])[0].numpy()
    content = load_content(f"hubert:{folder}")
    assert content.width == 48 and np.allclose(content(wave), states.last_hidden_state[0].numpy(), atol=1e-4)
    assert content(wave).shape == (50, 48)
    assert np.allclose(load_content(f"hubert:{folder}", width=24)(wave), projected, atol=1e-4)
    assert content(wave[:100]).shape == (0, 48) and content(wave[:330]).shape == (1, 48)


def test_hubert_in_parts_has_no_seam(hubert, monkeypatch):
    content = load_content(f"hubert:{hubert[0]}")
    wave = (sing(np.linspace(100, 300, 96000), 6.0) + noise(6, 0.01)).astype(np.float32)
    whole = content(wave)
    monkeypatch.setattr(content, "part", 100 * 320)
    monkeypatch.setattr(content, "context", 50 * 320)
    parts = content(wave)
    assert parts.shape == whole.shape == (300, 48)
    assert np.median(np.abs(parts - whole)) < 0.1 * whole.std()


def test_a_hubert_that_does_not_fit_is_named_in_one_line(hubert, tmp_path, capsys, monkeypatch):
    folder, _ = hubert
    for name, width, message in (
        (f"hubert:{folder}", 768, "48 wide, and the base expects 768"),
        (f"hubert:{tmp_path}", 0, "no HuBERT that can be loaded"),
        ("hubert:/no/such/folder", 0, "there is no folder"),
        ("mfcc", 0, "give dsp, or hubert:"),
        (f"hubert:{REAL_CONTENT}", 0, "is not in the local cache"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_content(name, width=width)
        assert "\n" not in str(caught.value)
    other = tmp_path / "hubert-base-ls960"
    other.symlink_to(folder)
    load_content(f"hubert:{other}")
    assert "is not ContentVec" in capsys.readouterr().out


# ---- one clock -------------------------------------------------------------------------------------------------------------


def changes(steps: np.ndarray) -> np.ndarray:
    """How far each 10 ms frame is from the one 20 ms before it."""
    return np.concatenate([np.zeros(2), np.linalg.norm(steps[2:] - steps[:-2], axis=-1)])


def test_an_event_is_at_one_time_in_content_f0_and_spectrogram(event):
    frames = len(event) // 160
    content, f0 = align(load_content("dsp")(event), extract_f0(event, "auto"), frames)
    hops = np.pad(event, 432, mode="reflect")  # frames of 1024 samples, each centred in its 10 ms
    spectrum = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(hops, 1024)[::160][:frames] * np.hanning(1024)))
    assert len(content) == len(f0) == len(spectrum) == 300
    pitch = np.where(f0 > 0, f0, 0)[:, None]
    assert 295 < np.median(f0[105:145]) < 305 and 148 < np.median(f0[20:95]) < 152
    for what, track in (("content", content), ("F0", pitch), ("spectrogram", spectrum)):
        for time in (1.0, 1.5, 2.0, 2.25):
            first = round(time * 100) - 12
            near = changes(track)[first : first + 24]
            centre = first + np.average(np.arange(24), weights=near**4) - 0.5  # of a change between two frames
            assert abs(centre / 100 - time) <= 0.02, (what, time, centre)


def test_lengths_that_differ_by_a_frame_are_mended_and_others_are_named():
    content, f0 = np.arange(98.0).reshape(49, 2), np.arange(101.0)
    aligned, pitch = align(content, f0, 100)
    assert aligned.shape == (100, 2) and pitch.shape == (100,) and aligned[[0, 1, 97, 99], 0].tolist() == [0, 0, 96, 96]
    with pytest.raises(BadFile, match="content of another length than the sound, 98 frames for 184"):
        align(content, f0, 184)
    with pytest.raises(BadFile, match="F0 of another length"):
        align(content, f0[:90], 98)
