"""Conversion: as long as its source, in pieces as in one, silent where it is silent; by a small voice with random weights."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE, use_task

from common.config import UserError
from common.samples import BadFile

TASK = VOICE
use_task(VOICE)

import convert as conversion  # noqa: E402
from convert import Conversion, convert_file, convert_original, convert_wave, draw_near, reach  # noqa: E402
from original import quiet_cuts, read_original, silent_frames, track_f0  # noqa: E402
from synthesizer import Excitation, Synthesizer, VoiceConfig  # noqa: E402
from voice_index import build_index  # noqa: E402

SMALL = VoiceConfig(
    **{"sample_rate": 16000, "n_fft": 1024, "hop": 160, "win": 1024, "mels": 40, "content_width": 13},
    **{"inter_channels": 8, "hidden_channels": 8, "filter_channels": 16, "n_heads": 2, "n_layers": 1, "gin_channels": 4},
    **{"resblock_kernels": (3,), "resblock_dilations": ((1, 3),), "upsample_initial": 32, "speakers": 3},
    **{"upsample_rates": (10, 4, 4), "upsample_kernels": (20, 8, 8)},
)
HOPS = {32000: (10, 8, 4), 40000: (10, 10, 4), 48000: (12, 10, 4)}


class Voice:
    """What conversion needs to know of a voice."""

    content, f0_method, speakers, f0_medians = "dsp", "auto", ["ann", "bob"], {"ann": 200.0}


@pytest.fixture(scope="module")
def model():
    return new_model(SMALL)


def new_model(config):
    torch.manual_seed(0)
    model = Synthesizer(config, with_enc_q=False).eval()
    for flow in model.flow.flows[::2]:  # it starts as the identity
        torch.nn.init.normal_(flow.post.weight, std=0.1)
    return model


def sung(seconds, f0=150.0, rate=16000, level=0.3):
    """(n,) a tone with overtones, whose F0 sways by a tenth and whose loudness by a half."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(f0 * (1 + 0.1 * np.sin(2 * t))) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 8)) * (1 + 0.5 * np.sin(5 * t))
    return (level * tone / 3).astype(np.float32)


def decibels(wave):
    return 20 * math.log10(max(float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))), 1e-10))


def test_pieces_are_the_whole(model, monkeypatch):
    """Noise and the sine's phase are those of the place, and every piece hears as far as the network does."""
    monkeypatch.setattr(conversion, "BLOCK", (60, 100))
    wave = sung(4)
    whole, _ = convert_wave(model, Voice, wave, 16000, chunk=10**6)
    assert decibels(whole) > -40
    for chunk in (33, 100):
        pieces, _ = convert_wave(model, Voice, wave, 16000, chunk=chunk)
        assert decibels(pieces - whole) < decibels(whole) - 80
    monkeypatch.setattr(conversion, "reach", lambda config: 0)
    deaf, _ = convert_wave(model, Voice, wave, 16000, chunk=33)
    assert decibels(deaf - whole) > decibels(whole) - 60


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, resblock="2", resblock_kernels=(7,), resblock_dilations=((1, 9),))])
def test_a_frame_reaches_no_further_than_is_said(config):
    model, middle = new_model(config), 80
    latent, f0 = torch.randn(1, config.inter_channels, 160), torch.full((1, 160), 150.0)
    excitation = Excitation(None, torch.randn(1, 1, 160 * config.hop), torch.zeros(1))
    other = latent.clone()
    other[..., middle] += 10
    with torch.inference_mode():
        mask, g = torch.ones(1, 1, 160), model.speaker(torch.tensor([0]))
        one, two = (model.dec(model.flow(x, mask, g, reverse=True), f0, g, excitation)[0, 0] for x in (latent, other))
    places = torch.nonzero(one != two)[:, 0] / config.hop
    seen = max(middle - places.min(), places.max() - middle).item()
    assert 18 < seen <= reach(config) < seen + 16


def test_blocks_give_way_to_each_other_without_a_jump(model, monkeypatch):
    """Where two blocks of the text encoder meet, the latent jumps by less than a fifth of what it would without the fade."""
    original, latents = read_original([(sung(4), 16000)]), []

    def keep(model, blocks, f0, silent, *_):
        latents.append(torch.cat(list(blocks), dim=1))
        raise InterruptedError

    def steps(block, fade=conversion.FADE):
        monkeypatch.setattr(conversion, "BLOCK", block)
        monkeypatch.setattr(conversion, "FADE", fade)
        with pytest.raises(InterruptedError):
            convert_original(model, Voice, original, Conversion(noise=0))
        return latents[-1].diff(dim=1)

    monkeypatch.setattr(conversion, "decode", keep)
    cuts = np.array(quiet_cuts(original.level, 60, 100))
    assert len(cuts) > 4 and not (cuts % 2).any()
    whole, faded, hard = steps((600, 1000)), steps((60, 100)), steps((60, 100), fade=1)
    jump = {name: (each - whole)[:, cuts[1:-1] - 1].norm() for name, each in (("faded", faded), ("hard", hard))}
    assert 0 < jump["faded"] < 0.2 * jump["hard"]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
def test_it_is_as_long_as_its_source_at_every_rate(model, rate):
    made, new_rate = convert_wave(model, Voice, sung(0.5337, rate=rate), rate)
    assert new_rate == 16000 and abs(len(made) / new_rate - 0.5337) < 0.001 and np.isfinite(made).all()


@pytest.mark.parametrize("rate", HOPS)
def test_a_voice_speaks_at_its_own_rate(rate):
    rates = HOPS[rate]
    sizes = {"upsample_rates": rates, "upsample_kernels": tuple(2 * up for up in rates), "hop": math.prod(rates)}
    made, new_rate = convert_wave(new_model(replace(SMALL, sample_rate=rate, **sizes)), Voice, sung(0.7, rate=44100), 44100)
    assert new_rate == rate and abs(len(made) / rate - 0.7) < 0.001 and decibels(made) > -60


@pytest.mark.parametrize("samples", [1, 7, 480, 1600])
def test_a_sound_shorter_than_any_window_is_padded_and_cut(model, samples):
    made, _ = convert_wave(model, Voice, sung(1)[:samples], 16000)
    assert len(made) == samples and np.isfinite(made).all()


def test_silence_stays_silent_and_takes_no_time(model, monkeypatch):
    wave = np.concatenate([sung(1), np.zeros(16000, np.float32), sung(1)])
    wave[16000:32000] += 1e-5 * np.random.default_rng(0).standard_normal(16000)  # as a converter's last bit
    made, _ = convert_wave(model, Voice, wave, 16000)
    frames = made.reshape(-1, 160)
    loud = np.array([decibels(frame) > -50 for frame in frames])
    assert loud[5:95].all() and not loud[107:198].any() and loud[203:295].all()
    monkeypatch.setattr(conversion, "decode_chunk", None)
    silence, _ = convert_wave(model, Voice, np.zeros(20000, np.float32), 16000)
    assert len(silence) == 20000 and not silence.any()


def test_a_quiet_recording_is_no_silence(model):
    made, _ = convert_wave(model, Voice, sung(1, level=0.004), 16000)
    assert decibels(made) > -40


def test_events_stay_where_they_are():
    """F0 jumps at 1.0 s for half a second; a pause from 2.0 to 2.25 s."""
    parts = [sung(1), sung(0.5, f0=300), sung(0.5), np.zeros(4000, np.float32), sung(0.75)]
    original = read_original([(part, 16000) for part in parts])
    silent = silent_frames(original.level)
    assert np.abs(np.flatnonzero(np.diff(silent.astype(int))) - [199, 224]).max() <= 2
    f0 = track_f0(original, "auto", silent)
    high = np.flatnonzero(f0[:190] > 220)
    assert abs(high[0] - 100) <= 2 and abs(high[-1] - 149) <= 2 and not f0[silent].any()


def test_pitch_is_asked_for_or_taken_from_the_voice(model):
    def shift(voice=Voice, **options):
        return convert_original(model, voice, read_original([(sung(1), 16000)]), Conversion(**options))[0]

    assert shift(pitch=-3).shift == -3
    median = np.median(150 * (1 + 0.1 * np.sin(2 * np.arange(0, 1, 0.01))))
    assert shift().shift == pytest.approx(12 * math.log2(200 / median), abs=0.5) and shift().notes == []
    assert shift(speaker=1).shift == 0 and "does not say" in shift(speaker=1).notes[0]
    low, high = (convert_wave(model, Voice, sung(1), 16000, Conversion(pitch=pitch))[0] for pitch in (0, 12))
    assert decibels(low - high) > decibels(low) - 20


def test_a_voice_without_f0_says_that_pitch_has_no_effect():
    model = new_model(replace(SMALL, f0=False))
    result, pieces = convert_original(model, Voice, read_original([(sung(1), 16000)]), Conversion(pitch=12))
    assert "--pitch has no effect" in result.notes[0] and decibels(np.concatenate(list(pieces))) > -60
    result, _ = convert_original(model, Voice, read_original([(sung(1), 16000)]), Conversion())
    assert result.notes == []


def test_the_envelope_of_the_source_is_mixed_in(model):
    """Half as loud in its second half; and a peak that comes out above full scale is scaled down, and said."""
    wave = np.concatenate([sung(2), 0.1 * sung(2)])
    fall = {}
    for own in (0.0, 0.5, 1.0):
        made, _ = convert_wave(model, Voice, wave, 16000, Conversion(volume_envelope=own, pitch=0))
        fall[own] = decibels(made[8000:24000]) - decibels(made[40000:56000])
    assert abs(fall[0.0] - 20) < 3 and abs(fall[1.0]) < 5 and fall[1.0] < fall[0.5] - 4 < fall[0.0] - 8
    loud = np.clip(20 * sung(1), -1, 1)
    result, pieces = convert_original(model, Voice, read_original([(loud, 16000)]), Conversion(volume_envelope=0))
    peak = max(np.abs(piece).max() for piece in pieces)
    assert result.scale > 1 and 0.8 < peak <= 1 and "made quieter" in result.notes[-1]


def test_an_index_draws_content_near_and_protects_unvoiced_frames():
    known, phone = np.ones((1, 13), np.float32), np.zeros((4, 13), np.float32)
    voiced = np.array([True, True, False, False])
    options = Conversion(index=build_index(known), index_rate=0.5, protect=0.2)
    np.testing.assert_allclose(draw_near(phone, options, voiced)[:, 0], [0.5, 0.5, 0.1, 0.1], atol=1e-6)
    np.testing.assert_allclose(draw_near(phone, replace(options, protect=0.5), voiced)[:, 0], [0.5] * 4, atol=1e-6)
    np.testing.assert_allclose(draw_near(phone, options, None)[:, 0], [0.5] * 4, atol=1e-6)
    for none in (replace(options, index=None), replace(options, index_rate=0.0)):
        assert not draw_near(phone, none, voiced).any()


def test_a_speaker_beyond_the_rows_is_refused_with_the_range(model):
    with pytest.raises(UserError, match="--speaker_id 2 is none of this voice's, which are 0 to 1: ann, bob"):
        convert_wave(model, Voice, sung(1), 16000, Conversion(speaker=2))
    one, two = (convert_wave(model, Voice, sung(1), 16000, Conversion(speaker=speaker, pitch=0))[0] for speaker in (0, 1))
    assert decibels(one - two) > decibels(one) - 40


@pytest.mark.parametrize("options", [{"pitch": 100}, {"pitch": "up"}, {"index_rate": 2}, {"protect": -1}, {"pitch": math.nan}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=f"{list(options)[0]} is .*, but must be"):
        Conversion(**options)


@pytest.mark.parametrize("wave", [np.zeros((2, 9)), np.array([0, np.nan])])
def test_what_is_no_wave_is_refused(model, wave):
    with pytest.raises(UserError, match="a wave to convert is finite numbers"):
        convert_wave(model, Voice, wave, 16000)
    with pytest.raises(BadFile, match="no samples"):
        convert_wave(model, Voice, np.zeros(0), 16000)


def test_a_file_becomes_a_file_of_16_bits(model, tmp_path):
    soundfile.write(tmp_path / "in.flac", sung(0.6, rate=44100), 44100)
    for name in ("out.wav", "out.flac"):
        result = convert_file(model, Voice, tmp_path / "in.flac", tmp_path / name, Conversion())
        made = soundfile.info(tmp_path / name)
        assert (made.subtype, made.samplerate, made.frames) == ("PCM_16", 16000, 9600) and result.seconds == pytest.approx(0.6)
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(BadFile):
        convert_file(model, Voice, tmp_path / "broken.wav", tmp_path / "no.wav", Conversion())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.wav", "in.flac", "out.flac", "out.wav"]


class Nothing(torch.nn.Module):
    """A voice that costs no time: silence of the right shape."""

    def __init__(self):
        super().__init__()
        self.config, self.emb_g = replace(SMALL, f0=False), torch.nn.Embedding(2, 4)

    def enc_p(self, phone, pitch, mask):
        return torch.zeros(2, 1, 8, mask.shape[-1]).unbind()

    def flow(self, z, *_, **__):
        return z

    def dec(self, z, *_):
        return torch.zeros(1, 1, z.shape[-1] * SMALL.hop)

    def speaker(self, sid):
        return self.emb_g(sid)


def test_memory_does_not_grow_with_length():
    part, peaks = sung(20), []
    for parts in (1, 2, 20):  # the first finds what is imported on the way
        tracemalloc.start()
        original = read_original((part, 16000) for _ in range(parts))
        _, pieces = convert_original(Nothing(), Voice, original, Conversion())
        assert sum(map(len, pieces)) == parts * len(part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 2e6  # six minutes more are 23 MB of samples


@pytest.mark.parametrize(
    ("wave", "rate"),
    [
        (sung(0.1), 0),
        (sung(0.1), "16000"),
        (sung(0.1), 16000.5),
        (sung(0.1), 10**12),
        ((sung(0.1) * 9000).astype("int16"), 16000),
    ],
)
def test_a_wave_of_another_kind_is_told_so_before_it_is_resampled(wave, rate):
    with pytest.raises(UserError, match="to convert is"):
        conversion.cut_up(wave, rate)


def test_one_sample_of_a_high_rate_is_one_sample_of_a_low_one(model):
    wave, _ = convert_wave(model, Voice, np.full(1, 0.1, np.float32), 192000)
    assert len(wave) == 1
