"""Where recordings are cut, that nothing is lost unsaid, and the numbers about their sound."""

import numpy as np
import pytest
import soundfile
from conftest import VOICE, use_task

from common.samples import BadFile

TASK = VOICE
use_task(TASK)

from audio import Sound, open_audio, resample  # noqa: E402
from slices import cut, cut_source, join_measures, measures  # noqa: E402

RATE = 16000


def vowel(seconds, pitch=150, rate=RATE, peak=0.5):
    """Harmonics of a pitch in syllables, (n,)."""
    time = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * k * pitch * time + k * k) / k for k in range(1, 200) if k * pitch < 0.45 * rate)
    wave *= 0.6 + 0.4 * np.sin(2 * np.pi * 3 * time)
    return wave * peak / np.abs(wave).max()


def silence(seconds, level=0.0):
    return np.random.default_rng(0).standard_normal(round(seconds * RATE)) * level


def pieces_of(*parts, rate=RATE):
    return cut(Sound(np.concatenate(parts).astype(np.float32), rate, 1))


def planned(tmp_path, *parts, rate=RATE):
    soundfile.write(tmp_path / "a.wav", np.concatenate(parts), rate, subtype="FLOAT")
    plan, pieces = cut_source(open_audio(tmp_path / "a.wav"))
    return plan, list(pieces)


@pytest.mark.parametrize("room", [0.0, 0.002])
def test_silence_is_cut_out_and_all_seconds_are_accounted_for(tmp_path, room):
    voice = [vowel(2, pitch) for pitch in (150, 180)]
    click = [silence(3, room), vowel(0.03), silence(2, room)]
    plan, pieces = planned(tmp_path, silence(2, room), voice[0], silence(2, room), voice[1], *click)
    assert [(round(p.start, 1), round(p.stop, 1)) for p in pieces] == [(1.8, 4.2), (5.8, 8.2)]
    assert plan.seconds == pytest.approx(13.03) and plan.kept == pytest.approx(4.8, abs=0.1)
    assert plan.kept + plan.silence + plan.refused == pytest.approx(plan.seconds) and 0.4 < plan.refused < 0.5  # the click
    assert plan.kept == pytest.approx(sum(len(p.wave) for p in pieces) / RATE)


def test_a_sound_without_a_pause_is_cut_by_length_and_loses_nothing(tmp_path):
    for seconds in (24, 4.3, 5.2, 8.1, 0.5):
        plan, pieces = planned(tmp_path, vowel(seconds))
        assert plan.kept == plan.seconds == pytest.approx(seconds) and plan.silence == plan.refused == 0
        assert pieces[0].start == 0 and pieces[-1].stop == pytest.approx(seconds)
        assert all(a.stop == b.start for a, b in zip(pieces, pieces[1:], strict=False))
        assert all(0.5 <= piece.stop - piece.start <= 5 for piece in pieces) and len(pieces) >= seconds / 4


def test_blocks_of_a_file_give_the_pieces_that_the_whole_gives(tmp_path):
    parts = [silence(9.5, 0.001), vowel(3), silence(4, 0.001), vowel(9), silence(0.7, 0.001), vowel(1), silence(30, 0.001)]
    _, pieces = planned(tmp_path, *parts)
    whole = pieces_of(*parts)
    assert [(p.start, p.stop) for p in pieces] == [(p.start, p.stop) for p in whole] and len(whole) >= 5
    for piece, other in zip(pieces, whole, strict=True):
        assert np.array_equal(piece.wave, other.wave)


def test_a_quiet_recording_is_raised_and_a_loud_one_lowered():
    for peak in (0.0005, 0.002, 0.1, 1.0):
        (piece,) = pieces_of(vowel(2, peak=peak))
        high = np.abs(piece.wave).max()
        assert high == pytest.approx(0.675 + 0.25 * peak, abs=0.08) and high <= 0.925
    clipped = np.clip(vowel(3, 100, peak=8), -1, 1)
    assert np.abs(pieces_of(clipped)[0].wave).max() <= 0.925


@pytest.mark.parametrize("wave, fault", [
    (silence(3), "no level at all"), (silence(3, 3e-4), "nothing but noise at -7[01] dB"),
    (silence(0.3) + 0.1, "too short, 0.3 s"), (np.zeros(0), "too short"),
    (silence(3) + 0.2, "no level at all"), (np.cumsum(silence(3, 1e-5)) * 0.1, "silent"),
    (np.concatenate([silence(2), vowel(0.05), silence(2)]), "no 0.5 s of voice"),
])  # fmt: skip
def test_what_has_no_voice_is_named(wave, fault):
    with pytest.raises(BadFile, match=fault):
        pieces_of(wave)


def test_a_click_is_neither_the_level_nor_a_piece():
    quiet = np.concatenate([vowel(3, peak=0.003), silence(3), vowel(3, peak=0.003)])
    quiet[4000 + 3 * RATE] = 0.9
    assert sum(piece.stop - piece.start for piece in pieces_of(quiet)) == pytest.approx(6.4, abs=0.5)


def test_rumble_and_offset_are_taken_out_and_voices_stay():
    time = np.arange(3 * RATE) / RATE
    (piece,) = pieces_of(vowel(3, 62) + 0.3 * np.sin(2 * np.pi * 10 * time) + 0.2)
    spectrum = np.abs(np.fft.rfft(piece.wave)) / len(piece.wave)
    assert spectrum[30] < 0.001 and abs(piece.wave.mean()) < 1e-3 and spectrum[186] > 0.05


def test_the_noise_of_a_recording_is_measured_under_its_voice():
    voice = vowel(3, peak=0.3)
    power = np.mean(voice**2)
    for decibels in (6, 20, 35):
        noise = silence(3, np.sqrt(power / 10 ** (decibels / 10)))
        found = measures(voice + noise, RATE)
        assert found["snr"] == pytest.approx(decibels, abs=3)
        assert found["noise"] == pytest.approx(10 * np.log10(np.mean(noise**2)), abs=2)
        paused = measures(np.concatenate([noise[:RATE], voice + noise]), RATE)
        assert paused["snr"] == pytest.approx(decibels, abs=3)
    assert measures(voice, RATE)["snr"] > 35 and measures(vowel(3, 62), RATE)["snr"] > 20


def test_clipping_bandwidth_and_level_are_measured():
    clean, time = vowel(3, 100), np.arange(3 * 48000) / 48000
    assert measures(clean, RATE)["clipped"] == 0 and measures(np.sin(2 * np.pi * 60 * time), 48000)["clipped"] < 0.01
    for gain in (1.0, 0.3):  # turned down since
        hot = np.clip(clean * 8, -1, 1) * gain
        share = np.mean(np.abs(hot) > 0.999 * gain)
        assert 0.4 * share < measures(np.round(hot * 32767) / 32767, RATE)["clipped"] <= share
    for rate in (8000, 16000, 44100):
        found = measures(vowel(2, 150, rate), rate)
        assert found["bandwidth"] == pytest.approx(0.45 * rate, rel=0.05) and found["seconds"] == 2
    narrow = resample(vowel(2, 150, 8000), 8000, 40000)
    assert measures(narrow, 40000)["bandwidth"] < 4200
    found = measures(clean + 0.1, RATE)
    assert found["dc"] == pytest.approx(0.1, abs=1e-3) and found["peak"] == np.abs(clean + 0.1).max()


def test_measures_of_pieces_join_to_those_of_the_whole():
    parts = [vowel(2, peak=0.5), vowel(1, 200, peak=0.1)]
    joined = join_measures([measures(part, RATE) for part in parts])
    whole = measures(np.concatenate(parts), RATE)
    assert joined["seconds"] == 3 and joined["peak"] == whole["peak"] and joined["rms"] == pytest.approx(whole["rms"])
    assert joined["clipped"] == 0 and join_measures([]) == {}
