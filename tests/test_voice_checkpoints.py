"""A voice's bases, speakers' rows, adapters and checkpoints; what RVC and Applio load of them."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, VOICE, run_script, use_task

from common.config import UserError
from common.lora import LoRAConfig, adapted_layers, coverage, inject_lora, lora_parameters
from common.lora_layers import LoRALayer
from common.optim import build_optimizer
from common.saved_models import load_trained, save_lora, save_model

TASK = VOICE
use_task(TASK)
sys.path.append(str(ROOT / "scripts"))

from layers import to_old_names  # noqa: E402
from model import (  # noqa: E402
    LORA_PRESETS,
    VOICE_ROWS,
    Voice,
    add_lora,
    answer,
    load_base,
    load_checkpoint,
    origin,
    start_from,
    with_voices,
)
from rvc_checkpoint import even_rows, export, import_voice, info  # noqa: E402
from synthesizer import Synthesizer, VoiceConfig  # noqa: E402
from voice_files import read_voice  # noqa: E402
from voice_toys import converted, listed, narrow, old_weights, rvc_file, small_voice, to_new_names, training_state  # noqa: E402

SETTINGS = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_targets": "default", "lora_last_k": 0}
SETTINGS |= {"frozen_dtype": "fp32", "lora_rank_pattern": "", "data_dir": "", "batch_size": 2, "seed": 0, "speakers": "one"}
SCRIPT = ROOT / "scripts" / "rvc_checkpoint.py"


def settings(**changes):
    return SimpleNamespace(**{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The path of a base: a training state in RVC's form."""
    path = tmp_path_factory.mktemp("base") / "G_100.pth"
    torch.save(training_state(small_voice()), path)
    return str(path)


def model_for(base, speakers=("ann",), **changes):
    """(model about to train, voice, origin) as the train scripts make them."""
    config = settings(**changes)
    model, voice, facts = load_base(base)
    voice.speakers = list(speakers)
    model = with_voices(model, voice)
    method = "lora" if config.lora_r else "head"
    return add_lora(model, config), voice, origin(method, model, facts, config, voice)


def trained(model):
    """The model as after some training: all that trains has moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """(folder, what its model converts) of an adapter's checkpoint."""
    model, voice, about = model_for(base)
    folder = tmp_path_factory.mktemp("adapter") / "best"
    save_lora(folder, trained(model), voice, about, "the card")
    return folder, converted(model)


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which, inside, outside",
    [
        ("decoder", {"dec.ups.0", "dec.resblocks.3.convs2.2"}, {"dec.conv_pre", "flow.flows.0.pre"}),
        ("default", {"dec.ups.0", "dec.conv_pre", "flow.flows.6.enc.cond_layer", "enc_p.proj"}, {"enc_q.pre", "dec.conv_post"}),
        ("attention", {"enc_p.encoder.attn_layers.0.conv_q"}, {"enc_p.proj", "enc_p.encoder.ffn_layers.0.conv_1"}),
        ("all", {"enc_q.enc.in_layers.15", "dec.noise_convs.0"}, {"dec.conv_post", "dec.m_source.l_linear", "emb_g"}),
        ("conv_[qv]", {"enc_p.encoder.attn_layers.0.conv_v"}, {"enc_p.encoder.attn_layers.0.conv_k"}),
        ("flow", {"flow.flows.2.post"}, {"enc_p.proj"}),
    ],
)
def test_presets_and_patterns_choose_layers_that_learn(base, which, inside, outside):
    model, _, _ = model_for(base, lora_targets=which)
    layers = adapted_layers(model)
    assert inside <= layers.keys() and not outside & layers.keys()
    assert model.emb_g.weight.requires_grad and not model.emb_g.weight.grad
    answer(model).square().sum().backward()
    up = [p for name, p in model.named_parameters() if "lora_B" in name]  # A learns once B is no longer zero
    assert len(up) == len(layers) and all(p.grad is not None for p in up)


def test_a_new_adapter_changes_nothing(base):
    plain, _, _ = load_base(base)
    model, _, _ = model_for(base, lora_targets="all")
    assert torch.equal(converted(model), converted(plain))


def test_ranks_by_name_and_patterns_that_make_no_sense(base):
    model, _, _ = model_for(base, lora_rank_pattern="ups=6, resblocks=2")
    ranks = {row["name"]: row["r"] for row in coverage(model)}
    assert ranks["dec.ups.1"] == 6 and ranks["dec.resblocks.0.convs1.1"] == 2 and ranks["enc_p.proj"] == 4
    for text, words in (("ups", "name=rank"), ("ups=x", "name=rank"), ("ups=0", "whole number"), ("nothing=3", "fits nothing")):
        with pytest.raises(UserError, match=words):
            model_for(base, lora_rank_pattern=text)
    for targets, words in (("q_proj", "fits nothing here; there are: dec.cond"), ("dec.*(", "regular expression")):
        with pytest.raises(UserError, match=words):
            model_for(base, lora_targets=targets)
    with pytest.raises(UserError, match="not for voices"):
        model_for(base, lora_last_k=2)


def test_the_default_adapter_at_real_size_is_small():
    with torch.device("meta"):
        model = Synthesizer(VoiceConfig.of_rate(40000))
        inject_lora(model, LoRAConfig(r=8, target_modules=LORA_PRESETS["default"], exclude_modules=["emb_pitch"]))
    numbers = sum(p.numel() for p in lora_parameters(model)) + model.emb_g.weight.numel()
    assert numbers == 1_145_856 + 109 * 256 and 2 * numbers < 2.5e6, "bytes in half precision"


def test_rows_that_no_speaker_has_stay_bit_for_bit(base):
    model, _, _ = model_for(base)
    before = model.emb_g.weight.detach().clone()
    config = settings(lr=1e-2, lr_head=1e-2, weight_decay=0.1, warmup_steps=0, epochs=1, max_steps_per_epoch=0)
    optimizer, _ = build_optimizer(model, config, 5, new=model.new_layers, no_decay=(VOICE_ROWS,))
    for _ in range(3):
        answer(model).square().mean().backward()  # of speaker 0
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.emb_g.weight[0], before[0]) and torch.equal(model.emb_g.weight[1:], before[1:])


# ---- speakers' rows --------------------------------------------------------------------------------------------------


def test_new_speakers_start_between_those_that_the_base_knows():
    model = small_voice(narrow(speakers=4))
    rows = model.emb_g.weight.detach().clone()
    model.facts = {"speakers": ["a", "b", "c"]}
    with_voices(model, Voice(model.config, "dsp", speakers=["new", "b"]))
    assert torch.allclose(model.emb_g.weight[0], rows[:3].mean(0)) and torch.equal(model.emb_g.weight[1:], rows[[1, 2, 3]])
    assert model.new_layers == [VOICE_ROWS] and model.facts == {"speakers": ["new", "b"]}


def test_the_optimizer_of_another_program_is_not_taken_and_that_is_said(base, capsys):
    model_for(base)
    assert "the optimizer's state in it is not taken" in capsys.readouterr().out


def test_rows_of_a_base_that_names_none_are_taken_as_they_are(base):
    model, voice, _ = load_base(base)
    rows = model.emb_g.weight.detach().clone()
    voice.speakers = ["x", "y"]
    assert torch.equal(with_voices(model, voice).emb_g.weight, rows)
    voice.speakers = list("abcd")
    with pytest.raises(UserError, match="4 speakers.*rows for 3"):
        with_voices(model, voice)


def test_a_voice_for_conversion_alone_is_no_base_and_says_what_is(tmp_path):
    torch.save(rvc_file(small_voice()), tmp_path / "voice.pth")
    model, voice, _ = load_base(str(tmp_path / "voice.pth"))
    assert converted(model).isfinite().all() and voice.content == "hubert:lengyue233/content-vec-best"
    with pytest.raises(UserError, match=r"lacks the posterior encoder \(enc_q\).*take the G_"):
        with_voices(model, voice)


def test_a_base_is_the_same_in_any_form(base, tmp_path):
    model, voice, facts = load_base(base)
    save_model(tmp_path / "ours", model, voice, {})
    torch.save({"weight": to_new_names(old_weights(model, enc_q=False)), "config": listed(model.config)}, tmp_path / "small.pth")
    for other in ("ours", "small.pth"):
        again, _, its_facts = load_base(str(tmp_path / other))
        assert its_facts["sha256"] == facts["sha256"] and torch.equal(converted(again), converted(model))
    model.emb_g.weight.data[0, 0] += 1
    save_model(tmp_path / "other", model, voice, {})
    assert load_base(str(tmp_path / "other"))[2]["sha256"] != facts["sha256"]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_whole_voice_comes_back_by_the_official_names(base, tmp_path):
    model, voice, facts = load_base(base)
    voice.speakers, voice.f0_medians = ["ann"], {"ann": 210.5}
    model = trained(with_voices(model, voice))
    save_model(tmp_path / "best", model, voice, origin("full", model, facts, settings(), voice), "the card")
    names = {"model.safetensors", "config.json", "voice.json", "origin.json", "README.md", "manifest.json"}
    assert {path.name for path in (tmp_path / "best").iterdir()} == names
    again, its_voice, about = load_checkpoint(tmp_path / "best")
    assert torch.equal(converted(again), converted(model)) and its_voice == voice and about["method"] == "full"
    assert {"dec.ups.0.weight_g", "enc_q.pre.weight"} <= read_voice(tmp_path / "best" / "model.safetensors").tensors.keys()


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_comes_back_merged_or_beside(adapter, merge):
    folder, wanted = adapter
    model, voice, about = load_checkpoint(folder, merge=merge)
    assert bool(adapted_layers(model)) != merge and voice.speakers == ["ann"] and about["method"] == "lora"
    assert (converted(model) - wanted).abs().max() < 1e-5
    names = {name for name in to_old_names(model.state_dict()) if ".lora_" not in name}
    assert not merge or names == old_weights(model).keys()


def test_rows_alone_come_back(base, tmp_path):
    model, voice, about = model_for(base, lora_r=0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["emb_g.weight"]
    save_lora(tmp_path / "best", trained(model), voice, about)
    assert (tmp_path / "best" / "head.safetensors").is_file()
    again, _, about = load_checkpoint(tmp_path / "best")
    assert torch.equal(converted(again), converted(model)) and about["method"] == "head"


def test_an_adapter_fits_its_base_alone(adapter, tmp_path):
    folder, wanted = adapter
    torch.save(training_state(small_voice(seed=3)), tmp_path / "G_1.pth")
    with pytest.raises(UserError, match="an adapter fits no other base"):
        load_checkpoint(folder, base=str(tmp_path / "G_1.pth"))
    with pytest.raises(UserError, match="is no base: --start_from"):
        load_base(str(folder))


def test_an_adapter_without_its_rows_is_damaged(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter[0], tmp_path / "best")
    (tmp_path / "best" / "manifest.json").unlink()
    file = tmp_path / "best" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "emb_g" not in name}, file)
    with pytest.raises(UserError, match="lacks emb_g.weight"):
        load_checkpoint(tmp_path / "best")


def test_a_merge_that_would_change_the_answers_is_not_kept(adapter, monkeypatch, capsys):
    right = LoRALayer.product
    monkeypatch.setattr(LoRALayer, "product", lambda layer: 1.5 * right(layer))
    model, _, _ = load_checkpoint(adapter[0])
    assert adapted_layers(model) and "not merged" in capsys.readouterr().out
    assert (converted(model) - adapter[1]).abs().max() < 1e-5


def test_damaged_descriptions_are_named(adapter, base, tmp_path):
    for i, (key, value) in enumerate({"content": "", "speakers": ["a"] * 4, "f0_medians": {"a": -1}, "f0_method": 3}.items()):
        folder = tmp_path / str(i)
        shutil.copytree(adapter[0], folder)
        (folder / "manifest.json").unlink()
        described = json.loads((folder / "voice.json").read_text())
        (folder / "voice.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(UserError, match=f"{folder}.*(its {key} is|names 4 speakers)"):
            load_checkpoint(folder)


def test_a_run_starts_where_another_ended(adapter, base, tmp_path, capsys):
    folder, wanted = adapter
    model, _, _ = model_for(base)
    start_from(str(folder), model)
    assert torch.equal(converted(model), wanted)
    other, _, _ = model_for(base, speakers=("bob", "eve"))
    rows = other.emb_g.weight.detach().clone()
    start_from(str(folder), other)
    assert torch.equal(other.emb_g.weight, rows) and "emb_g" in capsys.readouterr().out
    narrower, _, _ = model_for(base, lora_r=2)
    with pytest.raises(UserError, match="does not fit this run"):
        start_from(str(folder), narrower)


# ---- RVC and Applio --------------------------------------------------------------------------------------------------


def as_rvc_builds_it(file) -> tuple:
    """(model, strays) by the rules of RVC's loader, which takes names as they are, and of Applio's, which renames first."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    content["config"][-3] = content["weight"]["emb_g.weight"].shape[0]
    spec, segment, *sizes = content["config"]
    names = ("inter_channels", "hidden_channels", "filter_channels", "n_heads", "n_layers", "kernel_size", "p_dropout")
    names += ("resblock", "resblock_kernels", "resblock_dilations", "upsample_rates", "upsample_initial", "upsample_kernels")
    built = dict(zip((*names, "speakers", "gin_channels", "sample_rate"), sizes, strict=True))
    spectrum = {"n_fft": 2 * (spec - 1), "win": 2 * (spec - 1), "hop": built["sample_rate"] // 100}
    width = {"v1": 256, "v2": 768}[content["version"]]
    config = VoiceConfig(**built, **spectrum, content_width=width, f0=content["f0"] == 1)
    model = Synthesizer(config).eval()
    del model.enc_q
    model.enc_q = None
    # torch's hook for old names stands in for RVC's modules; to_new_names for what Applio does itself.
    strays = [model.load_state_dict(state, strict=False) for state in (content["weight"], to_new_names(content["weight"]))]
    return model, [name for each in strays for name in (*each.missing_keys, *each.unexpected_keys)], content


def test_an_exported_adapter_is_a_whole_voice_for_rvc_and_applio(adapter, tmp_path):
    folder, wanted = adapter
    path = export(str(folder), tmp_path / "out" / "ann.pth")
    model, strays, content = as_rvc_builds_it(path)
    assert not strays and (converted(model) - wanted).abs().max() < 0.01
    assert all(t.dtype == torch.float16 and "parametrizations" not in name for name, t in content["weight"].items())
    assert not any(name.startswith("enc_q") for name in content["weight"])
    assert (content["sr"], content["f0"], content["version"], content["embedder_model"]) == ("40k", 1, "v2", "contentvec")
    assert [p.name for p in path.parent.iterdir()] == ["ann.pth"], "nothing is left beside"
    again, voice, _ = load_checkpoint(path)
    assert voice.speakers == ["ann"] and torch.equal(converted(again), converted(model))


def test_a_whole_export_is_a_base_and_a_small_one_says_that_it_is_none(base, adapter, tmp_path):
    whole = export(str(adapter[0]), tmp_path / "whole.pth", full=True)
    model, voice, _ = load_base(str(whole))
    assert with_voices(model, voice).enc_q is not None
    small = export(base, tmp_path / "small.pth")
    with pytest.raises(UserError, match="no posterior encoder, so --full"):
        export(str(small), tmp_path / "again.pth", full=True)


def test_rows_keep_their_digits_in_half_precision(tmp_path):
    model = small_voice()
    ups = model.dec.ups[1].parametrizations.weight
    ups.original1.data *= 3e-6  # the same weight: v counts by its direction
    wanted = converted(model)
    assert model.dec.ups[1].parametrizations.weight.original1.abs().max() < 6e-5, "where half precision has few digits"
    v = even_rows(model)["dec.ups.1.weight_v"]
    assert torch.allclose(v.square().mean((1, 2)).sqrt(), torch.ones(len(v)))
    torch.save(training_state(model), tmp_path / "G_1.pth")
    exported, _, _ = as_rvc_builds_it(export(str(tmp_path / "G_1.pth"), tmp_path / "a.pth"))
    naive = Synthesizer(model.config, with_enc_q=False).eval()
    naive.load_state_dict({name: t.float() for name, t in old_weights(model, enc_q=False, half=True).items()})
    errors = [(converted(each) - wanted).abs().max() for each in (exported, naive)]
    assert errors[0] < 0.01 and errors[0] < errors[1] / 3


def test_what_half_precision_cannot_hold_is_written_in_full(tmp_path, capsys):
    model = small_voice()
    model.enc_p.emb_phone.bias.data[0] = 1e6
    torch.save(training_state(model), tmp_path / "G_1.pth")
    content = torch.load(export(str(tmp_path / "G_1.pth"), tmp_path / "a.pth"), weights_only=True)
    assert content["weight"]["emb_g.weight"].dtype == torch.float32 and "full precision" in capsys.readouterr().out


def test_an_export_that_fails_leaves_what_was_there(base, tmp_path, monkeypatch):
    out = tmp_path / "voice.pth"
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="--overwrite"):
        export(base, out)
    monkeypatch.setattr("rvc_checkpoint.difference", lambda *_: 3.0)
    with pytest.raises(UserError, match="does not sound like"):
        export(base, out, overwrite=True)
    assert out.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == ["voice.pth"]


@pytest.mark.slow
def test_the_script_exports_imports_and_tells(adapter, tmp_path):
    done = run_script(ROOT, SCRIPT, "export", adapter[0], tmp_path / "ann.pth")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "ann.pth") and "verified: 2" in done.stdout
    assert import_voice(str(tmp_path / "ann.pth"), tmp_path / "ann") == tmp_path / "ann"
    model, voice, about = load_checkpoint(tmp_path / "ann")
    assert voice.speakers == ["ann"] and about["method"] == "full" and model.enc_q is None
    with pytest.raises(UserError, match="not empty"):
        import_voice(str(tmp_path / "ann.pth"), tmp_path / "ann")
    told = "\n".join(info(str(tmp_path / "ann.pth")))
    assert "sample rate: 40000 Hz" in told and "3 rows, the first of ann" in told and "trains: no" in told
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="is a text file, not a voice"):
        info(str(tmp_path / "text.pth"))


def test_a_voice_of_the_demo_content_says_where_it_converts(tmp_path, capsys):
    config = narrow(content_width=13)
    model = small_voice(config)
    facts = {"name": "demo", "sha256": "0"}
    about = origin("full", model, facts, settings(), Voice(config, "dsp"))
    save_model(tmp_path / "full", model, Voice(config, "dsp", speakers=["a", "b"]), about)
    export(str(tmp_path / "full"), tmp_path / "a.pth")
    told = capsys.readouterr().out
    assert "only infer.py converts with it" in told and "0 a, 1 b" in told
    assert load_checkpoint(tmp_path / "a.pth")[1].content == "dsp"


def test_rows_of_another_number_do_not_load(base, tmp_path):
    from safetensors.torch import save_file

    model, _, _ = load_base(base)
    save_file({"emb_g.weight": torch.zeros(5, 4)}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=r"emb_g.weight is \(5, 4\), expected \(3, 4\)"):
        load_trained(model, tmp_path / "head.safetensors", (VOICE_ROWS,))


def test_what_a_file_says_of_itself_forges_no_line_and_a_folder_is_no_file_to_write(tmp_path):
    path = tmp_path / "voice.pth"
    torch.save(rvc_file(small_voice(), author="a\nsha256: \x1b[31m"), path)
    assert all("\n" not in line and "\x1b" not in line for line in info(str(path)))
    (tmp_path / "out.pth").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export(str(path), tmp_path / "out.pth", overwrite=True)
