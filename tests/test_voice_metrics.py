"""Distances between sounds, against what can be worked out by hand; F0 scores; what an evaluation of a voice says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE, use_task

TASK = VOICE
use_task(VOICE)

from common.batches import EvalBatches  # noqa: E402
from distances import (  # noqa: E402
    CEPSTRAL_BANDS,
    cepstra,
    distortions,
    frame_distortions,
    frames_that_count,
    long_term_distance,
    loudness_by_band,
    stft_distances,
)
from f0_scores import f0_scores, f0_sums, heard_f0  # noqa: E402
from losses import MEL_WEIGHT, mel_loss  # noqa: E402
from metrics import evaluate, predict, save_samples, voice_metrics  # noqa: E402

RATE = 16000


def tone(f0, seconds=1.0, rate=RATE, formants=(700, 1200, 2600), seed=0):
    """A vowel: harmonics of an F0 (Hz, or one value a sample) up to the half rate, louder near the formants."""
    time = np.arange(round(seconds * rate)) / rate
    f0 = np.broadcast_to(np.asarray(f0, dtype=float), time.shape)
    phase, wave = 2 * np.pi * np.cumsum(f0) / rate, np.zeros(len(time))
    for k in range(1, int(0.45 * rate / f0.max())):
        gain = sum(1 / (1 + ((k * f0 - formant) / 120) ** 2) for formant in formants) + 0.01
        wave += gain * np.cos(k * phase + k * k)
    noise = np.random.default_rng(seed).normal(0, 1e-3, len(time))
    return (0.2 * wave / np.abs(wave).max() + noise).astype(np.float32)


# ---- mel-cepstral distortion -----------------------------------------------------------------------------------------


def test_the_distortion_of_two_rows_is_the_formula():
    a, b = np.zeros((1, 25)), np.zeros((1, 25))
    a[0, :4], b[0, :4] = (9.0, 0.3, -0.1, 0.0), (1.0, 0.1, 0.1, 0.4)
    expected = 10 / np.log(10) * np.sqrt(2 * (0.2**2 + 0.2**2 + 0.4**2))  # c0 is the level, and does not count
    assert distortions(a, b) == pytest.approx([expected])


@pytest.mark.parametrize("n", [1, 7, 24])
def test_a_ripple_over_the_bands_is_one_coefficient_of_half_its_height(n, monkeypatch):
    """ln A_k = 0.8 cos(pi n (k + 1/2) / K) is c_n = 0.4, and against a flat spectrum 10 / ln 10 sqrt(2) 0.4 = 2.457 dB."""
    ripple = np.exp(0.8 * np.cos(np.pi * n * (np.arange(CEPSTRAL_BANDS) + 0.5) / CEPSTRAL_BANDS))
    spectra = {"flat": np.ones((3, CEPSTRAL_BANDS)), "ripple": np.tile(ripple, (3, 1))}
    monkeypatch.setattr("distances.mel_amplitudes", lambda wave, _: spectra[wave])
    rows = cepstra("ripple", RATE)
    assert rows[0, n] == pytest.approx(0.4) and np.abs(np.delete(rows[0], n)).max() < 1e-12
    assert distortions(rows, cepstra("flat", RATE)) == pytest.approx([2.45667] * 3, abs=1e-4)


def test_loudness_is_no_distortion_and_another_vowel_is():
    a, e = tone(120), tone(120, formants=(400, 2000, 2600))
    counts = np.ones(100, dtype=bool)
    assert frame_distortions(a, a, RATE, counts).max() == 0
    assert frame_distortions(a, a / 50, RATE, counts).mean() < 0.01
    assert frame_distortions(a, e, RATE, counts).mean() > 2


def test_only_the_frames_that_count_are_measured():
    a = np.concatenate([tone(120), tone(120, formants=(400, 2000, 2600))])
    b = np.concatenate([tone(120), tone(120)])
    first = np.arange(200) < 95
    assert frame_distortions(a, b, RATE, first).mean() < 0.01 < frame_distortions(a, b, RATE, ~first).mean()
    assert len(frame_distortions(a, b, RATE, first)) == 95


def test_the_rate_does_not_matter():
    """One scale to 8 kHz: the same two vowels at 40 kHz."""
    counts = np.ones(100, dtype=bool)
    found = [
        frame_distortions(tone(120, rate=rate), tone(120, rate=rate, formants=(400, 2000, 2600)), rate, counts).mean()
        for rate in (RATE, 40000)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_time_warping_pairs_what_is_said_at_another_speed():
    def said(*seconds):
        vowels = ((700, 1200, 2600), (400, 2000, 2600), (300, 800, 2400))
        return np.concatenate([tone(120, s, formants=f) for s, f in zip(seconds, vowels, strict=True)])

    truth, slow = said(0.3, 0.4, 0.3), said(0.6, 0.5, 0.7)
    counts = np.ones(100, dtype=bool)
    by_frame, aligned = (frame_distortions(truth, slow, RATE, counts, align).mean() for align in (False, True))
    assert aligned < 0.5 < 2 < by_frame


def test_a_whisper_is_measured_where_it_is_loud():
    wave = np.concatenate([np.zeros(RATE // 2), np.random.default_rng(0).normal(0, 0.1, RATE // 2)]).astype(np.float32)
    counts = frames_that_count(np.zeros(100), wave, RATE)
    assert not counts[:45].any() and counts[55:].all()
    f0 = np.where(np.arange(100) < 10, 100.0, 0.0)
    assert (frames_that_count(f0, wave, RATE) == (f0 > 0)).all()


# ---- spectra ---------------------------------------------------------------------------------------------------------


def test_half_of_a_sound_has_known_spectral_distances():
    """|A - A / 2| / |A| = 1/2 at any resolution, and ln A - ln A / 2 = ln 2 wherever A is above the floor."""
    wave = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    logs, convergence = stft_distances(wave, wave / 2, RATE)
    assert convergence == pytest.approx(0.5, abs=1e-5) and logs == pytest.approx(np.log(2), rel=0.01)
    assert stft_distances(wave, wave, RATE) == (0, 0)
    assert stft_distances(wave, np.zeros_like(wave), RATE)[1] == pytest.approx(1)


def test_the_long_term_spectrum_knows_the_timbre_and_not_what_is_said_when():
    a, e = tone(120), tone(120, formants=(400, 2000, 2600))
    rows = [loudness_by_band(np.concatenate(parts), RATE) for parts in ((a, e), (e, a), (a, a))]
    assert long_term_distance(rows[0], rows[1]) < 0.2 < 2 < long_term_distance(rows[0], rows[2])
    joined = loudness_by_band(a, RATE) + loudness_by_band(e, RATE)
    assert long_term_distance(rows[0], joined) < 0.2
    assert long_term_distance(rows[0], loudness_by_band(np.concatenate([a, e]) / 9, RATE)) < 0.2


# ---- F0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16000, 40000])
def test_the_f0_of_a_vowel_is_heard_at_any_rate(rate):
    found = heard_f0(tone(180, rate=rate), rate)
    assert len(found) == 101
    assert 1200 * np.log2(found[5:-5] / 180) == pytest.approx(np.zeros(91), abs=20)


def test_f0_scores_are_those_of_the_textbook_however_the_frames_are_parted():
    random = np.random.default_rng(0)
    asked = 150 * 2 ** random.normal(0, 0.2, 300)
    got = asked * 2 ** random.normal(0.01, 0.05, 300)
    asked[:40], got[30:60] = 0, 0
    sums = [f0_sums(asked[part], got[part]) for part in (slice(0, 100), slice(100, None))]
    scores = f0_scores(*(sums[0][key] + sums[1][key] for key in ("f0", "vuv")))
    both = (asked > 0) & (got > 0)
    cents = 1200 * np.log2(got[both] / asked[both])
    assert scores["f0_rmse_cents"] == pytest.approx(np.sqrt((cents**2).mean()))
    rows = [
        np.concatenate([x[:100][both[:100]] - x[:100][both[:100]].mean(), x[100:][both[100:]] - x[100:][both[100:]].mean()])
        for x in (np.log(np.maximum(asked, 1)), np.log(np.maximum(got, 1)))
    ]
    assert scores["f0_correlation"] == pytest.approx(np.corrcoef(*rows)[0, 1])
    assert scores["vuv_error"] == pytest.approx((30 + 20) / 300)


def test_where_nothing_is_voiced_there_is_no_f0_to_score():
    scores = f0_scores(**f0_sums(np.zeros(50), np.full(50, 100.0)))
    assert scores == {"f0_rmse_cents": None, "f0_correlation": None, "vuv_error": 1.0}
    assert f0_scores(**f0_sums(np.full(50, 100.0), np.full(50, 100.0)))["f0_correlation"] is None  # it does not move


# ---- an evaluation ---------------------------------------------------------------------------------------------------


def rising(f0, many):
    """An F0 that rises by a quarter of an octave, in so many values."""
    return f0 * 2 ** np.linspace(0, 0.25, many)


class Echo(torch.nn.Module):
    """Stands for a voice: says the clip that its content names, a little too high or with noise of its own."""

    def __init__(self, clips, octaves=0.0, noise=0.0):
        super().__init__()
        self.config = SimpleNamespace(
            sample_rate=RATE, n_fft=1024, hop=160, win=1024, mels=80, f0=True, inter_channels=4, content_width=1
        )
        self.clips, self.noise, self.octaves = clips, noise, octaves
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def infer(self, phone, lengths, pitch, f0, sid, excitation):
        assert phone.shape[1] == f0.shape[1] == pitch.shape[1] == int(lengths) and len(phone) == 1
        frames, f0, _ = self.clips[int(phone[0, 0, 0])]
        wave = tone(rising(f0 * 2**self.octaves, frames * 160), frames / 100)
        return torch.from_numpy(wave)[None, None] + self.noise * excitation.source


class Held(torch.utils.data.Dataset):
    """Held-out clips (frames, F0 in Hz, speaker), each a vowel; two of a recording."""

    def __init__(self, clips, speakers=("anna",)):
        self.rows, self.voice = clips, SimpleNamespace(speakers=list(speakers))
        self.clips = [SimpleNamespace(recording=f"take{i // 2}.wav", speaker=clip[2]) for i, clip in enumerate(clips)]

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        return f"anna/take {index // 2}.wav, {index % 2}"

    def __getitem__(self, key):
        return key[1]

    def collate(self, indices):
        """Padded with what would spoil the numbers where it was looked at."""
        longest = max(self.rows[index][0] for index in indices) + 3
        batch = {"phone": torch.full((len(indices), longest, 1), torch.nan), "f0": torch.full((len(indices), longest), 900.0)}
        batch |= {"pitch": torch.full(batch["f0"].shape, 99), "wave": torch.full((len(indices), longest * 160), 0.9)}
        batch |= {key: torch.zeros(len(indices), dtype=torch.long) for key in ("lengths", "sid", "index")}
        for row, index in enumerate(indices):
            frames, f0, speaker = self.rows[index]
            batch["phone"][row, :frames], batch["f0"][row, :frames] = index, torch.from_numpy(rising(f0, frames))
            batch["wave"][row, : frames * 160] = torch.from_numpy(tone(rising(f0, frames * 160), frames / 100))
            batch["lengths"][row], batch["sid"][row], batch["index"][row] = frames, speaker, index
        return batch


def loader_of(dataset, batch_size):
    batches = EvalBatches([0] * len(dataset), batch_size)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate)


CLIPS = [(60, 110, 0), (90, 140, 1), (40, 180, 1), (75, 200, 1)]


def test_a_voice_that_says_what_was_recorded_has_no_error():
    dataset = Held(CLIPS)
    found = evaluate(Echo(CLIPS), loader_of(dataset, 2))
    assert {found[key] for key in ("val_loss", "mcd", "stft_distance", "spectral_convergence", "ltas_distance")} == {0}
    assert found["f0_rmse_cents"] < 15 and found["f0_correlation"] > 0.999 and found["vuv_error"] < 0.1
    assert list(found)[:2] == ["val_loss", "mcd"] and "per_speaker_mcd" not in found


def test_the_validation_loss_is_the_mel_part_of_the_training_loss():
    voice, dataset = Echo(CLIPS[:1], noise=0.01), Held(CLIPS[:1])
    (said,) = predict(voice, loader_of(dataset, 1))
    real = dataset.collate([0])["wave"][None, :, : len(said["wave"])]
    expected = MEL_WEIGHT * mel_loss(torch.from_numpy(said["wave"])[None, None], real, voice.config)
    assert evaluate(voice, loader_of(dataset, 1))["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_voice_that_has_come_apart_has_no_score_and_ends_nothing():
    """Weights may be finite and what they say not."""
    found = evaluate(Echo(CLIPS, noise=np.nan), loader_of(Held(CLIPS), 2))
    assert np.isnan([found["val_loss"], found["mcd"]]).all() and found["f0_rmse_cents"] is None


def test_a_voice_that_speaks_too_high_is_told_so():
    found = evaluate(Echo(CLIPS, octaves=0.25), loader_of(Held(CLIPS), 2))
    assert found["f0_rmse_cents"] == pytest.approx(300, abs=15) and found["f0_correlation"] > 0.99


def test_no_number_depends_on_the_batch_or_on_what_was_random_before():
    dataset, found = Held(CLIPS, ["anna", "ben"]), []
    for batch_size in (1, 3):
        torch.randn(batch_size)
        found.append(evaluate(Echo(CLIPS, noise=0.01), loader_of(dataset, batch_size)))
    assert found[0] == found[1] and found[0]["mcd"] > 0.1
    assert found[0]["per_speaker_mcd"].keys() == {"anna", "ben"}
    assert found[0]["per_speaker_mcd"]["anna"] != found[0]["per_speaker_mcd"]["ben"]


def test_the_samples_of_a_run_are_its_recordings_and_give_its_distortion(tmp_path):
    dataset = Held(CLIPS)
    found = predict(Echo(CLIPS, noise=0.01), loader_of(dataset, 2))
    save_samples(dataset, found, tmp_path / "samples.json")
    record = json.loads((tmp_path / "samples.json").read_text())
    rows = record["rows"]
    assert (record["metric"], record["higher_is_better"]) == ("mcd", False) and [r["weight"] for r in rows] == [150, 115]
    assert [r["file"] for r in rows] == ["take0.wav", "take1.wav"]
    mean = sum(r["value"] * r["weight"] for r in rows) / 265
    assert mean == pytest.approx(voice_metrics(dataset, found)["mcd"])


def test_the_sound_of_a_clip_of_each_voice_is_kept(tmp_path):
    evaluate(Echo(CLIPS), loader_of(Held(CLIPS, ["anna", "ben"]), 2), tmp_path / "before")
    files = sorted((tmp_path / "before").iterdir())
    assert [path.name for path in files] == ["1_take_0.wav", "2_take_0.wav", "3_take_1.wav"]
    for path, (frames, f0, _) in zip(files, CLIPS, strict=False):
        wave, rate = soundfile.read(path)
        assert rate == RATE and np.abs(wave - tone(rising(f0, frames * 160), frames / 100)).max() < 1e-4
