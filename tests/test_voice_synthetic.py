"""The demo's voices: the same sentence by every speaker, at the F0 that was asked for, and the same files for the same seed."""

import hashlib

import numpy as np
import pytest
import soundfile
from conftest import VOICE, use_task

TASK = VOICE
use_task(VOICE)
import synthetic  # noqa: E402
from synthetic import DEMO_SOURCES, HOP, SAMPLE_RATE, compose, make_demo_data, say_sentence, sentence_rng, speakers  # noqa: E402

SOURCES, (TARGET,) = speakers(), speakers(synthetic.TARGET)


def spoken(speaker, number=1):
    """(sentence, wave, F0) of a sentence."""
    sentence = compose(sentence_rng(0, "test", number))
    return sentence, *say_sentence(sentence, speaker, sentence_rng(0, "test", number, speaker))


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.wav"))
    }


def test_files_depend_on_the_seed_and_their_own_names_alone(tmp_path):
    few, more, other = (
        hashes(make_demo_data(tmp_path / name, seed, train, 1, 1))
        for name, seed, train in (("few", 0, 1), ("more", 0, 2), ("other", 1, 1))
    )
    sources = {f"source/{split}/{who.name}_{split}_001.wav" for split in ("val", "test") for who in speakers(*DEMO_SOURCES)}
    assert set(few) == {f"target/{split}/{split}_001.wav" for split in ("train", "val", "test")} | sources
    assert few.items() < more.items(), "asking for more leaves the first ones as they were"
    assert not set(few.values()) & set(other.values())
    assert len(set(few.values())) == len(few), "no two files are the same sound"
    with pytest.raises(FileExistsError):
        make_demo_data(tmp_path / "few")


def test_the_files_are_what_the_layout_says_and_not_clipped(tmp_path):
    folder = make_demo_data(tmp_path / "demo", train=1, val=1, test=2, sources=1)
    assert sorted(path.name for path in (folder / "source" / "test").iterdir()) == ["birch_test_001.wav", "fir_test_001.wav"]
    for path in folder.rglob("*.wav"):
        info, (wave, _) = soundfile.info(path), soundfile.read(path)
        assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE, 1, "PCM_16")
        assert 1.5 < info.duration < 3 and 0.2 < abs(wave).max() < 0.9 and 0.09 < np.sqrt(np.mean(wave**2)) < 0.11


@pytest.mark.parametrize("speaker", [SOURCES[0], SOURCES[3], TARGET], ids=lambda who: who.name)
def test_the_f0_is_the_one_that_was_asked_for(speaker):
    """The period of the wave itself, by its autocorrelation, at every fifth voiced frame."""
    _, wave, f0 = spoken(speaker)
    cents = []
    for frame in np.flatnonzero(f0)[::5]:
        middle = frame * HOP + HOP // 2
        part = wave[middle - 400 : middle + 400]
        period = SAMPLE_RATE / f0[frame]
        lags = np.arange(int(period * 0.8), int(period * 1.2) + 2)
        later = [wave[middle - 400 + lag : middle + 400 + lag] for lag in lags]
        if len(later[-1]) < 800 or f0[max(frame - 4, 0) : frame + 5].min() == 0:
            continue
        alike = [np.corrcoef(part, piece)[0, 1] for piece in later]
        cents.append(1200 * np.log2(SAMPLE_RATE / lags[np.argmax(alike)] / f0[frame]))
    assert len(cents) > 10 and abs(np.median(cents)) < 25 and np.mean(np.abs(cents) < 60) > 0.9
    assert abs(np.log2(np.median(f0[f0 > 0]) / speaker.f0)) < 0.1


def envelope(wave, frame):
    """Smoothed log spectrum around a frame, (257,)."""
    middle = frame * HOP + HOP // 2
    return np.log(abs(np.fft.rfft(wave[middle - 256 : middle + 256] * np.hanning(512))) + 1e-6)


def test_every_speaker_says_the_same_at_the_same_time():
    sentence, low, low_f0 = spoken(SOURCES[0])
    _, high, high_f0 = spoken(TARGET)
    assert len(low) == len(high) == len(sentence.voice) * HOP
    both = sentence.voiced
    assert np.array_equal(low_f0 > 0, both) and np.array_equal(high_f0 > 0, both)
    np.testing.assert_allclose(high_f0[both] / low_f0[both], TARGET.f0 / SOURCES[0].f0)
    levels = [10 * np.log10((wave.reshape(-1, HOP) ** 2).mean(1) + 1e-7) for wave in (low, high)]
    assert np.corrcoef(*levels)[0, 1] > 0.95, "syllables, hissing and pauses fall on the same frames"
    assert np.median(levels[0][both]) > np.median(levels[0][~both]) + 10


def test_a_longer_throat_has_lower_formants():
    """Compared by noise through the throat alone, which has no harmonics in the way."""
    from synthetic import throat_response

    sentence = compose(sentence_rng(0, "test", 1))
    bins = np.arange(513) * SAMPLE_RATE / 1024
    first = {}
    for speaker in (*SOURCES, TARGET):
        peak = abs(throat_response(sentence, speaker))[:, bins < 1100].argmax(1) * SAMPLE_RATE / 1024
        first[speaker.formants] = np.median(peak)
    scales = sorted(first)
    assert [first[scale] for scale in scales] == sorted(first.values()) and first[scales[-1]] > 1.3 * first[scales[0]]
    assert TARGET.formants == scales[0] and TARGET not in SOURCES


def test_voices_can_be_told_apart_by_their_mean_spectra():
    sentence_frames = [np.flatnonzero(spoken(SOURCES[0], number)[2]) for number in (1, 2)]

    def mean_spectrum(speaker, number):
        _, wave, _ = spoken(speaker, number)
        inside = [f for f in sentence_frames[number - 1] if 2 <= f < len(wave) // HOP - 2]
        return np.mean([envelope(wave, frame) for frame in inside], axis=0)

    known = {speaker.name: mean_spectrum(speaker, 1) for speaker in (*SOURCES, TARGET)}
    for speaker in (*SOURCES, TARGET):
        other = mean_spectrum(speaker, 2)
        nearest = min(known, key=lambda name: np.std(known[name] - other))
        assert nearest == speaker.name
