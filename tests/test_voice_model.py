"""The voice's networks: names, shapes and numbers of RVC's, what a mask and a slice are, losses, adapters under weight_norm."""

import json
from collections import Counter

import pytest
import torch
from conftest import ROOT, VOICE, use_task

from common.config import UserError
from common.lora import LoRAConfig, adapted_layers, inject_lora, lora_parameters, merge_lora

TASK = VOICE
use_task(TASK)

from compiled import from_librosa  # noqa: E402
from discriminator import SMALL_PERIODS, Discriminator  # noqa: E402
from layers import sequence_mask, to_old_names  # noqa: E402
from losses import (  # noqa: E402
    adversarial_loss,
    disc_loss,
    discriminator_loss,
    feature_loss,
    gen_losses,
    kl_loss,
    mel_loss,
    real_slice,
    stft_loss,
)
from spectrum import mel_spectrogram, spectrogram  # noqa: E402
from synthesizer import Excitation, Synthesizer, TrainOutput, VoiceConfig, source_turns  # noqa: E402
from voice_toys import to_new_names  # noqa: E402

GOLDEN = ROOT.parent / "shared" / "golden"
SMALL = VoiceConfig(
    sample_rate=16000,
    n_fft=512,
    hop=160,
    win=512,
    mels=40,
    content_width=13,
    inter_channels=16,
    hidden_channels=16,
    filter_channels=32,
    n_layers=2,
    resblock_kernels=(3, 7),
    resblock_dilations=((1, 3), (1, 3)),
    upsample_rates=(10, 4, 2, 2),
    upsample_initial=32,
    upsample_kernels=(20, 8, 4, 4),
    speakers=4,
    gin_channels=8,
    segment_frames=8,
)


def small_voice(seed=0, **changes):
    """A voice of 16 channels whose flow is not the identity, as after training."""
    torch.manual_seed(seed)
    model = Synthesizer(VoiceConfig.from_json({**SMALL.to_json(), **changes}))
    for layer in model.flow.flows[::2]:
        torch.nn.init.normal_(layer.post.weight, std=0.2)
    return model.eval()


def inputs(lengths=(30, 20), config=SMALL, seed=1):
    """(phone, lengths, pitch, f0, spec, sid) of clips of these lengths, zeros on padding."""
    torch.manual_seed(seed)
    lengths, frames = torch.tensor(lengths), max(lengths)
    mask = sequence_mask(lengths, frames)
    phone = torch.randn(len(lengths), frames, config.content_width) * mask.mT
    f0 = (100 + 100 * torch.rand(len(lengths), frames)) * mask[:, 0] * (torch.rand(len(lengths), frames) > 0.3)
    pitch = (f0 / 2).long().clamp(1, 255)
    spec = torch.rand(len(lengths), config.bins, frames) * mask
    return phone, lengths, pitch, f0, spec, torch.arange(len(lengths))


@pytest.mark.parametrize(
    "rate, version, f0, parameters",
    [
        (40000, "v2", True, 36_458_818),
        (40000, "v2", False, 36_387_392),
        (32000, "v2", True, 36_880_706),
        (48000, "v2", True, 37_638_466),
    ],
)
def test_the_official_architectures_have_the_official_numbers_of_parameters(rate, version, f0, parameters):
    with torch.device("meta"):
        model = Synthesizer(VoiceConfig.of_rate(rate, version, f0))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.enc_p.emb_phone.in_features == {"v1": 256, "v2": 768}[version]
    if f0 and rate == 40000:
        assert len(model.state_dict()) == 560
        parts = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("enc_p", "enc_q", "flow", "dec")}
        assert parts == {"enc_p": 6_503_232, "enc_q": 8_921_472, "flow": 6_515_328, "dec": 14_490_882}


def test_names_and_shapes_are_those_of_the_official_files():
    file = GOLDEN / "rvc_v2_40k_keys.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with torch.device("meta"):
        model = Synthesizer(VoiceConfig())
    shapes = {name: list(tensor.shape) for name, tensor in to_old_names(model.state_dict()).items()}
    assert shapes == json.loads(file.read_text())["generator"]


def test_outputs_are_those_of_the_reference(monkeypatch):
    from safetensors import safe_open

    file = GOLDEN / "rvc_synthesizer_a.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    with safe_open(file, "pt") as opened:
        t = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        given = json.loads(opened.metadata()["config"])
    names = {"upsample_initial": "upsample_initial_channel", "speakers": "spk_embed_dim"}
    keys = ("inter_channels", "hidden_channels", "filter_channels", "n_layers", "gin_channels", *names)
    model = Synthesizer(VoiceConfig(**{key: given[names.get(key, key)] for key in keys})).eval()
    model.load_state_dict({name[6:]: value.float() for name, value in t.items() if name.startswith("state.")})
    mask, g = sequence_mask(t["lengths"], t["f0"].shape[1]), model.speaker(t["sid"])
    with torch.no_grad():
        m, logs = model.enc_p(t["phone"], t["pitch"], mask)
        z, m_q, logs_q = model.posterior(t["spec"], mask, g)
        found = {
            "enc_p.m": m,
            "enc_p.logs": logs,
            "enc_q.m": m_q,
            "enc_q.logs": logs_q,
            "flow": model.flow(z, mask, g),
            "flow_reverse": (back := model.flow(m, mask, g, reverse=True)),
            "dec": model.dec(back * mask, t["f0"], g),
            "infer": model.infer(t["phone"], t["lengths"], t["pitch"], t["f0"], t["sid"]),
        }
    for name, value in found.items():
        torch.testing.assert_close(value, t[f"out.{name}"], atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_both_names_of_weight_norm_load_and_files_have_the_old_ones():
    model = small_voice()
    old = to_old_names(model.state_dict())
    assert "dec.ups.0.weight_g" in old and not any("parametrizations" in name for name in old)
    assert to_new_names(old).keys() == model.state_dict().keys() == to_new_names(model.state_dict()).keys()
    assert to_old_names(old).keys() == old.keys()
    for state in (old, model.state_dict()):
        other = small_voice(seed=5)
        other.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_padding_changes_nothing_of_a_conversion(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model = small_voice()
    phone, lengths, pitch, f0, _, sid = inputs()
    with torch.no_grad():
        both = model.infer(phone, lengths, pitch, f0, sid)
        alone = model.infer(phone[1:, :20], lengths[1:], pitch[1:, :20], f0[1:, :20], sid[1:])
    reach = 4 * SMALL.hop  # of the decoder: there the padding is zeros in both, but passed through its biases
    torch.testing.assert_close(both[1:, :, : 20 * SMALL.hop - reach], alone[:, :, :-reach], atol=1e-5, rtol=0)


def test_flow_is_undone_by_its_reverse():
    model = small_voice()
    _, lengths, _, _, _, sid = inputs()
    mask, g = sequence_mask(lengths, 30), model.speaker(sid)
    z = torch.randn(2, SMALL.inter_channels, 30) * mask
    with torch.no_grad():
        there = model.flow(z, mask, g)
        torch.testing.assert_close(model.flow(there, mask, g, reverse=True), z, atol=1e-5, rtol=0)
        assert (there - z).abs().max() > 0.1


@pytest.mark.parametrize("f0", [True, False])
def test_training_slices_what_the_clips_have(f0):
    model = small_voice(f0=f0)
    phone, lengths, pitch, hertz, spec, sid = inputs((30, 5))
    pitch, hertz = (pitch, hertz) if f0 else (None, None)
    out = model(phone, lengths, pitch, hertz, spec, sid)
    assert out.wave.shape == (2, 1, 8 * SMALL.hop) and out.z_p.shape == (2, 16, 30)
    assert 0 <= out.starts[0] <= 22 and out.starts[1] == 0
    assert out.wave[1, 0, : 5 * SMALL.hop].abs().max() > 0 and out.wave[1, 0, 5 * SMALL.hop :].abs().max() == 0
    starts = {model(phone, lengths, pitch, hertz, spec, sid).starts[0].item() for _ in range(20)}
    assert len(starts) > 5
    out = model(
        *(None if x is None else x[1:, :5] if x.dim() > 1 else x[1:] for x in (phone, lengths, pitch, hertz)),
        spec[1:, :, :5],
        sid[1:],
    )
    assert out.wave.shape == (1, 1, 5 * SMALL.hop)


def test_slices_are_where_starts_says():
    model = small_voice(f0=False, segment_frames=24)
    phone, lengths, _, _, spec, sid = inputs((60,))
    with torch.no_grad():
        torch.manual_seed(3)
        out = model(phone, lengths, None, None, spec, sid)
        torch.manual_seed(3)
        whole = model.resynthesize(spec, lengths, None, sid)
    start, reach = out.starts.item(), 8  # frames that the decoder sees to either side, at the most
    inner = whole[..., (start + reach) * SMALL.hop : (start + 24 - reach) * SMALL.hop]
    torch.testing.assert_close(out.wave[..., reach * SMALL.hop : -reach * SMALL.hop], inner, atol=1e-5, rtol=0)


def test_the_source_follows_f0_and_keeps_its_phase_for_minutes():
    f0 = torch.full((1, 30_000), 123.4)  # five minutes
    turns = source_turns(f0, 400, 40000)
    exact = torch.arange(30_001, dtype=torch.float64) * 123.4 * 0.01 % 1
    gap = (turns[0].double() - exact + 0.5) % 1 - 0.5
    assert gap.abs().max() < 1e-3
    wave = small_voice().dec.m_source(torch.full((1, 100), 200.0)).detach()[0, 0]
    assert torch.fft.rfft(wave).abs().argmax() == 200  # cycles in the second that it lasts
    assert wave.abs().max() > 0.3  # the untrained weight lets the sine through


def test_chunks_with_their_share_of_the_noise_are_parts_of_the_whole():
    model = small_voice()
    f0 = 100 + 100 * torch.rand(1, 40)
    given = Excitation(torch.empty(0), torch.randn(1, 1, 40 * SMALL.hop), torch.zeros(1))
    with torch.no_grad():
        whole = model.dec.m_source(f0, given)
        turns = source_turns(f0, SMALL.hop, SMALL.sample_rate)[:, 25]
        part = model.dec.m_source(f0[:, 25:], Excitation(given.latent, given.source[..., 25 * SMALL.hop :], turns))
    torch.testing.assert_close(part, whole[..., 25 * SMALL.hop :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_outputs_and_gradients_near_those_of_float32(dtype):
    model = small_voice()
    phone, lengths, pitch, f0, spec, sid = inputs()
    torch.manual_seed(0)
    whole = model(phone, lengths, pitch, f0, spec, sid)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        half = model(phone, lengths, pitch, f0, spec, sid)
    assert half.wave.dtype == half.logs_q.dtype == half.z_p.dtype == torch.float32
    torch.testing.assert_close(half.wave, whole.wave, atol=0.05, rtol=0)
    half.wave.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"hop": 161},
        {"hidden_channels": 10**9},
        {"n_heads": 3},
        {"upsample_kernels": [20, 8, 4]},
        {"upsample_kernels": [20, 8, 4, 5]},
        {"upsample_initial": 20},
        {"resblock": "3"},
        {"resblock_kernels": [4, 7]},
        {"resblock_dilations": [[1, 3], 5]},
        {"p_dropout": float("nan")},
        {"f0": "yes"},
        {"inter_channels": 15},
        {"upsample_rates": None},
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(change):
    with pytest.raises(UserError, match="^voice: "):
        VoiceConfig.from_json({**SMALL.to_json(), **change})


def test_a_configuration_survives_json():
    assert VoiceConfig.from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL
    with pytest.raises(UserError, match="missing or unknown: .*hop"):
        VoiceConfig.from_json({name: value for name, value in SMALL.to_json().items() if name != "hop"})
    with pytest.raises(UserError, match="no v2 at 44100 Hz"):
        VoiceConfig.of_rate(44100)


def test_a_spectrogram_has_a_frame_for_each_hop_and_its_peak_at_the_tone():
    seconds = torch.arange(16000) / 16000
    wave = torch.sin(2 * torch.pi * 1000 * seconds)[None]
    spec = spectrogram(wave, SMALL)
    assert spec.shape == (1, 257, 100) and (spec[0, :, 50].argmax() == 32)  # 1000 Hz / (16000 / 512)
    assert spectrogram(wave[:, :-1], SMALL).shape[-1] == 99
    mel = from_librosa("feature.melspectrogram")(S=spec[0].numpy(), sr=16000, n_mels=SMALL.mels)
    torch.testing.assert_close(mel_spectrogram(wave, SMALL)[0], torch.from_numpy(mel).log(), atol=1e-4, rtol=0)
    assert mel_spectrogram(torch.zeros(1, 1600), SMALL).max() < -10  # silence
    for samples in (160, 200, 320):  # shorter than the reflection
        assert spectrogram(wave[:, :samples], SMALL).shape == (1, 257, samples // 160)


@pytest.mark.parametrize("resblock", ["1", "2"])
def test_answering_in_tiles_gives_the_numbers_of_the_whole(resblock, monkeypatch):
    model = small_voice(resblock=resblock)
    given = inputs((60, 50))[:4] + (torch.tensor([0, 1]),)
    torch.manual_seed(0)
    whole = model.infer(*given).detach()  # with gradients: no tiles
    monkeypatch.setattr("layers.TILE", 2 * 16 * 100)  # 100 places of 16 channels
    with torch.inference_mode():
        torch.manual_seed(0)
        torch.testing.assert_close(model.infer(*given), whole, atol=1e-6, rtol=0)
        monkeypatch.setattr("layers.ResBlock1.reach", 0, raising=False)
        monkeypatch.setattr("layers.ResBlock2.reach", 0, raising=False)
        for block in model.dec.resblocks:
            del block.reach
        torch.manual_seed(0)
        assert (model.infer(*given) - whole).abs().max() > 1e-4  # so tiles there were


# ---- discriminator and losses ----------------------------------------------------------------------------------------


def test_the_official_discriminator_has_the_official_names_and_shapes():
    with torch.device("meta"):
        model = Discriminator()
    assert len(model.state_dict()) == 165 and sum(p.numel() for p in model.parameters()) == 71_410_594
    file = GOLDEN / "rvc_v2_40k_keys.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    shapes = {name: list(tensor.shape) for name, tensor in to_old_names(model.state_dict()).items()}
    assert shapes == json.loads(file.read_text())["discriminator"]


@pytest.mark.parametrize("samples", [1, 7, 160, 1281])
def test_a_discriminator_hears_waves_of_any_length(samples):
    model = Discriminator(SMALL_PERIODS, width=1 / 16)
    assert sum(p.numel() for p in model.parameters()) < 400_000
    wave = torch.randn(2, 1, samples, requires_grad=True)
    scores, features = model(wave)
    assert len(scores) == len(features) == 4 and all(len(each) == 6 + (i == 0) for i, each in enumerate(features))
    assert all(score.shape[0] == 2 and score.shape[1] >= 1 for score in scores)
    sum(score.sum() for score in scores).backward()
    assert (wave.grad != 0).any(dim=0).all()


def test_a_discriminator_of_no_width_is_refused():
    for bad in ({"width": 0}, {"width": 2}, {"periods": ()}, {"periods": (0,)}):
        with pytest.raises(UserError, match="^discriminator: "):
            Discriminator(**bad)


def a_step(model, lengths=(30, 20)):
    phone, lengths, pitch, f0, spec, sid = inputs(lengths)
    out = model(phone, lengths, pitch, f0, spec, sid)
    wave = (
        0.3
        * torch.randn(len(lengths), max(lengths) * SMALL.hop)
        * sequence_mask(lengths * SMALL.hop, f0.shape[1] * SMALL.hop)[:, 0]
    )
    return out, real_slice(wave, out, SMALL), wave


def test_the_real_slice_is_where_the_made_one_is():
    out, real, wave = a_step(small_voice())
    assert real.shape == out.wave.shape
    for row, start in enumerate(out.starts.tolist()):
        assert torch.equal(real[row, 0], wave[row, start * SMALL.hop : (start + 8) * SMALL.hop])


def test_losses_are_zero_where_they_should_be_and_grow_with_what_is_wrong():
    out, real, _ = a_step(small_voice())
    perfect = out._replace(wave=real)
    assert mel_loss(real, real, SMALL) == 0 and stft_loss(real, real) == 0 and mel_loss(0.5 * real, real, SMALL) > 0.5
    critic = Discriminator(SMALL_PERIODS, width=1 / 16)
    assert gen_losses(perfect, real, SMALL, critic)["features"] < 1e-6
    ones, zeros = [torch.ones(2, 5), torch.ones(2, 3)], [torch.zeros(2, 5), torch.zeros(2, 3)]
    assert discriminator_loss(ones, zeros) == 0 and discriminator_loss(zeros, ones) == 4
    assert adversarial_loss(ones) == 0 and adversarial_loss(zeros) == 2
    assert feature_loss([[ones[0]], [zeros[1]]], [[zeros[0]], [zeros[1]]]) == 1


def test_kl_is_that_of_the_two_normal_distributions():
    torch.manual_seed(0)
    m_p, logs_p, m_q, logs_q = (0.3 * torch.randn(1, 4, 1).expand(-1, -1, 20_000) for _ in range(4))
    z = m_q + torch.randn_like(m_q) * logs_q.exp()
    out = TrainOutput(None, None, torch.ones(1, 1, 20_000), z, m_p, logs_p, m_q, logs_q)
    prior, posterior = (torch.distributions.Normal(m[0, :, 0], logs[0, :, 0].exp()) for m, logs in ((m_p, logs_p), (m_q, logs_q)))
    expected = torch.distributions.kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(kl_loss(out), expected, rtol=0.02, atol=0.02)
    half = out._replace(mask=(torch.arange(20_000) < 10_000).float().view(1, 1, -1))
    torch.testing.assert_close(kl_loss(half), expected, rtol=0.03, atol=0.03)  # per frame, whatever the padding


def test_processes_weigh_the_divergence_by_their_frames(monkeypatch):
    torch.manual_seed(0)
    tensors, mask = torch.randn(5, 3, 4, 50), (torch.arange(50) < torch.tensor([[50], [30], [7]])).float().unsqueeze(1)
    parts = [TrainOutput(None, None, mask[rows], *tensors[:, rows]) for rows in (slice(3), slice(1), slice(1, 3))]
    whole = kl_loss(parts[0])
    monkeypatch.setattr("losses.process_index", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda frames: frames.copy_(mask.sum()))
    torch.testing.assert_close(sum(map(kl_loss, parts[1:])) / 2, whole)


def test_padding_adds_nothing_to_the_losses():
    torch.manual_seed(0)
    out, real, _ = a_step(small_voice(), (30, 4))
    assert torch.equal(real[1, 0, 4 * SMALL.hop :], torch.zeros(4 * SMALL.hop)) and not real[1, 0, : 4 * SMALL.hop].eq(0).any()
    assert out.wave[1, 0, 4 * SMALL.hop :].abs().max() == 0


def test_a_loud_offset_costs_more_than_half_of_it():
    """In logarithms alone the one bin of an offset has hardly a slope, and a voice keeps the one that it starts with."""
    real = 0.1 * torch.randn(1, 1, 3200)
    offsets = [stft_loss(real + offset, real) for offset in (0.0, 0.2, 0.4)]
    assert offsets[1] - offsets[0] > 0.5 and offsets[2] - offsets[1] > 0.5


def test_the_discriminators_loss_hears_both_as_one_batch():
    critic = Discriminator(SMALL_PERIODS, width=1 / 16)
    real, fake = torch.randn(2, 1, 1280), torch.randn(2, 1, 1280)
    apart = discriminator_loss(critic(real)[0], critic(fake)[0])
    torch.testing.assert_close(disc_loss(critic, real, fake), apart)


@pytest.mark.parametrize("gan", [True, False])
def test_both_recipes_teach_every_part_of_the_voice(gan):
    model = small_voice().train()
    critic = Discriminator(SMALL_PERIODS, width=1 / 16).requires_grad_(False) if gan else None
    out, real, _ = a_step(model)
    with torch.autocast("cpu", torch.bfloat16):
        parts = gen_losses(out, real, SMALL, critic)
    assert parts.keys() == {"mel", "kl", *({"adversarial", "features"} if gan else {"stft"})}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in parts.values())
    sum(parts.values()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in idle if "weight" in name and "emb_" not in name], idle


def test_a_frozen_posterior_encoder_is_not_differentiated():
    model = small_voice().train()
    whole, real, _ = a_step(model)
    model.enc_q.requires_grad_(False)
    out, real, _ = a_step(model)
    assert whole.m_q.requires_grad and not out.m_q.requires_grad and torch.equal(out.m_q, whole.m_q)
    sum(gen_losses(out, real, SMALL).values()).backward()
    assert model.emb_g.weight.grad.any() and model.dec.conv_pre.weight.grad.any()


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapted_voice(parts, rank=2, **changes):
    """A small voice with adapters that do something, as after training."""
    model = small_voice(**changes)
    rows = inject_lora(model, LoRAConfig(r=rank, target_modules=parts, exclude_modules=["l_linear", "emb_pitch"]))
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model, rows


@pytest.mark.parametrize(
    "parts", [["dec"], ["flow"], ["enc_p"], ["attn_layers"], ["dec", "flow", "enc_p", "enc_q"]], ids="-".join
)
@pytest.mark.parametrize("resblock", ["1", "2"])
def test_adapted_merged_and_reloaded_voices_are_one_function(parts, resblock):
    model, rows = adapted_voice(parts, resblock=resblock)
    base = small_voice(resblock=resblock)
    phone, lengths, pitch, f0, spec, sid = inputs()
    merged = merge_lora(model, inplace=False)
    reloaded = small_voice(seed=5, resblock=resblock)
    reloaded.load_state_dict(to_old_names(merged.state_dict()))  # strict
    answers = []
    for each in (base, model, merged, reloaded):
        torch.manual_seed(0)
        with torch.no_grad():
            answers.append(torch.cat([each.infer(phone, lengths, pitch, f0, sid), each.resynthesize(spec, lengths, f0, sid)]))
    for answer in answers[2:]:
        torch.testing.assert_close(answer, answers[1], atol=1e-5, rtol=0)
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_every_adapter_of_a_voice_learns_from_both_recipes():
    model, rows = adapted_voice(["dec", "flow", "enc_p", "enc_q"])
    assert {row["type"] for row in rows} == {"Conv1d", "ConvTranspose1d", "Linear"}
    out, real, _ = a_step(model.train())
    sum(gen_losses(out, real, SMALL).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(model))
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and "lora_" not in name]
    assert not frozen


def test_adapters_of_the_official_voice_have_as_many_parameters_as_the_formulas_say():
    with torch.device("meta"):
        model = Synthesizer(VoiceConfig())
        rows = inject_lora(
            model, LoRAConfig(r=8, target_modules=["dec", "flow", "enc_p"], exclude_modules=["l_linear", "emb_pitch"])
        )
    sizes = Counter()
    for row in rows:
        part, kind = row["name"].split(".")[:2]
        sizes[kind if kind in ("ups", "resblocks") else part] += row["parameters"]
    assert sizes == {"ups": 59_904, "resblocks": 552_960, "dec": 27_376, "flow": 241_664, "enc_p": 270_336}
    assert sum(sizes.values()) == 1_152_240
