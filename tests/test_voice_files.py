"""Voices in files of other programs: every form is read alike, all else is named, nothing in a file runs or is believed."""

import io
import json
import random
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import VOICE, Payload, use_task
from safetensors.torch import save_file

from common.config import UserError

TASK = VOICE
use_task(TASK)

from discriminator import Discriminator  # noqa: E402
from model import load_base, load_discriminator  # noqa: E402
from synthesizer import Synthesizer, VoiceConfig  # noqa: E402
from voice_files import read_voice  # noqa: E402
from voice_toys import applio_file, converted, narrow, old_weights, rvc_file, small_voice, to_new_names, training_state  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return small_voice()


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def loaded(path):
    found = read_voice(path)
    model = Synthesizer(found.config, found.with_enc_q).eval()
    model.load_state_dict(found.tensors)
    return model


def refusal(path) -> str:
    """What reading a file is refused with: one line, without advice to run what is in it."""
    with pytest.raises(UserError) as caught:
        read_voice(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and "weights_only" not in text
    return text


# ---- voices ----------------------------------------------------------------------------------------------------------


def test_one_voice_in_any_form_sounds_the_same(model, tmp_path):
    small = rvc_file(model)
    wanted = converted(loaded(saved(tmp_path / "rvc.pth", small)))
    assert (wanted - converted(model)).abs().max() < 0.01, "half precision is near"
    forms = {
        "applio.pth": applio_file(model),
        "new_names.pth": {**applio_file(model), "weight": to_new_names(small["weight"])},
        "processes.pth": {**small, "weight": {f"module.{name}": t for name, t in small["weight"].items()}},
        "compiled.pth": {**small, "weight": {f"_orig_mod.{name}": t for name, t in small["weight"].items()}},
    }
    for name, content in forms.items():
        assert torch.equal(converted(loaded(saved(tmp_path / name, content))), wanted), name
    old_pickle = saved(tmp_path / "old.pt", small, _use_new_zipfile_serialization=False)
    assert torch.equal(converted(loaded(old_pickle)), wanted)


def test_training_states_and_bare_weights_need_no_configuration(model, tmp_path):
    wanted = converted(model)
    forms = (training_state(model), {"model": old_weights(model)}, old_weights(model), {"state_dict": old_weights(model)})
    for i, content in enumerate(forms):
        voice = read_voice(saved(tmp_path / f"G_{i}.pth", content))
        assert voice.with_enc_q and voice.config == model.config
        assert torch.equal(converted(loaded(tmp_path / f"G_{i}.pth")), wanted)
    save_file(old_weights(model), tmp_path / "voice.safetensors")
    assert torch.equal(converted(loaded(tmp_path / "voice.safetensors")), wanted)


@pytest.mark.parametrize("f0", [True, False])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("rate", [32000, 40000, 48000])
def test_each_official_architecture_is_told_by_its_weights(rate, version, f0, tmp_path):
    config = narrow(rate, version, f0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Synthesizer(config).state_dict().items()}
    path = saved(tmp_path / "G_1.pth", {"model": {name: torch.zeros(shape) for name, shape in shapes.items()}})
    assert read_voice(path).config == config


def test_where_weights_fit_two_rates_the_name_or_the_run_says_which(tmp_path):
    model = small_voice(narrow(48000, "v1", f0=False))
    weights = old_weights(model, enc_q=False)
    assert "32k or 48k" in refusal(saved(tmp_path / "G_5.pth", weights))
    assert read_voice(saved(tmp_path / "G48k.pth", weights)).config.sample_rate == 48000
    run = {
        "data": {"sampling_rate": 48000, "filter_length": 2048, "win_length": 2048, "n_mel_channels": 128},
        "model": {"upsample_rates": [10, 6, 2, 2, 2], "resblock_dilation_sizes": [[1, 3, 5]]},
    }
    (tmp_path / "config.json").write_text(json.dumps(run))
    config = read_voice(tmp_path / "G_5.pth").config
    assert (config.sample_rate, config.hop, config.mels) == (48000, 480, 128)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "another"}))
    assert "32k or 48k" in refusal(tmp_path / "G_5.pth")


def test_what_weights_say_counts_more_than_what_a_file_says(model, tmp_path, capsys):
    content = rvc_file(model)
    content["config"][15] = 109
    assert read_voice(saved(tmp_path / "voice.pth", content)).config.speakers == 3
    assert "109" in capsys.readouterr().out


# ---- files that are none ---------------------------------------------------------------------------------------------


def critic_weights():
    return {"discriminators.0.convs.0.bias": torch.zeros(4), "discriminators.0.convs.0.weight_g": torch.zeros(4, 1, 1)}


TENSOR_FILES = {
    "D_400.pth": (lambda: {"model": critic_weights(), "iteration": 1}, "discriminator.*take G_400.pth"),
    "f0D40k.pth": (critic_weights, "discriminator.*take f0G40k.pth"),
    "list.pth": (lambda: [1, 2, 3], "a list"),
    "tensor.pth": (lambda: torch.zeros(3), "a Tensor"),
    "nothing.pth": (dict, "no weights, but nothing"),
    "numbers.pth": (lambda: {"epoch": 3}, "no weights, but 'epoch'"),
    "sovits.pth": (lambda: {"model": {"emb_uv.weight": torch.zeros(2, 4), "pre.weight": torch.zeros(4, 4)}}, "so-vits"),
    "speech.pth": (lambda: {"model": {"enc_p.emb.weight": torch.zeros(4, 4)}}, "speaks text"),
    "other.pth": (lambda: {"conv.weight": torch.zeros(4)}, "no voice of RVC or Applio.*conv.weight"),
    "counts.pth": (lambda: {"weight": {"a": torch.zeros(3, dtype=torch.int64)}}, "no plain tensor"),
    "sparse.pth": (lambda: {"a": torch.sparse_coo_tensor(size=(9, 9), check_invariants=True)}, "no plain tensor"),
    "huge.pth": (lambda: {"a": torch.zeros(1).expand(10**6, 10**6)}, "more numbers than it has bytes"),
    "numbered.pth": (lambda: {3: torch.zeros(1)}, "no plain tensor"),
}
BYTE_FILES = {
    "empty.pth": (b"", "is empty"),
    "zeros.pth": (bytes(5000), "nothing but zeros"),
    "text.pth": (b"hello\nthis is not a model\n", "text file"),
    "page.pth": (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
    "index.pth": (b"IxF2" + bytes(range(60)), "faiss index"),
    "wave.pth": (b"RIFF\x24\0\0\0WAVEfmt ", "recording"),
    "packed.pth": (b"\x1f\x8b\x08\0 gzip", "packed"),
    "graph.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(40), "ONNX"),
    "noise.pth": (bytes(random.Random(0).randbytes(500)), "no file of weights"),
    "cut.safetensors": ((10**6).to_bytes(8, "little") + b'{"a": ', "cut off"),
    "deep.safetensors": ((50).to_bytes(8, "little") + b"{" * 50, "damaged"),
    "pickle.pth": (b"\x80\x04K\x01.", "damaged"),
}


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensors_that_are_no_voice_are_told_by_what_they_are(name, tmp_path):
    make, words = TENSOR_FILES[name]
    text = refusal(saved(tmp_path / name, make()))
    assert all(word in text for word in words.split(".*"))


@pytest.mark.parametrize("name", BYTE_FILES)
def test_files_that_are_no_tensors_are_told_by_their_bytes(name, tmp_path):
    content, words = BYTE_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_packed_files_and_folders_are_told(model, tmp_path):
    saved(tmp_path / "voice.pth", rvc_file(model))
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as packed:
        packed.write(tmp_path / "voice.pth", "me/voice.pth")
    with tarfile.open(tmp_path / "tar.pth", "w") as packed:
        packed.add(tmp_path / "voice.pth", "voice.pth")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/data.pkl", bytes(10**6))
    (tmp_path / "bomb.pth").write_bytes(bomb.getvalue())
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as packed:
        packed.writestr("a/data.pkl", b"")
        packed.writestr("a/constants.pkl", b"")
    words = {"zip.pth": "give voice.pth", "tar.pth": "packed", "bomb.pth": "unpack to more", "program.pt": "TorchScript"}
    for name, word in words.items():
        assert word in refusal(tmp_path / name)
    assert "is a folder" in refusal(tmp_path) and "not there" in refusal(tmp_path / "gone.pth")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("key", ["extra", "info", "weight"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(key, new_format, model, tmp_path):
    content = {**rvc_file(model), key: Payload(tmp_path / "made")}
    path = saved(tmp_path / "voice.pth", content, _use_new_zipfile_serialization=new_format)
    assert "would run code" in refusal(path) and "mkdir" in refusal(path)
    assert not (tmp_path / "made").exists()


def test_whatever_is_cut_or_changed_ends_in_a_line_or_in_the_whole_voice(model, tmp_path):
    whole = saved(tmp_path / "whole.pth", rvc_file(model)).read_bytes()
    path, rng = tmp_path / "voice.pth", random.Random(0)
    for _ in range(25):
        path.write_bytes(whole[: rng.randrange(1, len(whole))])
        refusal(path)
        changed = bytearray(whole)
        for _ in range(20):  # the directory at the end, and the pickle near the start, are where it hurts
            changed[rng.choice([rng.randrange(3000), rng.randrange(len(whole) - 3000, len(whole))])] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            assert read_voice(path).config == model.config
        except UserError as error:
            assert "\n" not in str(error)


def test_weights_that_do_not_fit_or_are_not_finite_are_named(model, tmp_path):
    def change(**tensors):
        content = rvc_file(model)
        content["weight"] |= {key.replace("__", "."): value for key, value in tensors.items()}
        content["weight"] = {key: value for key, value in content["weight"].items() if value is not None}
        return refusal(saved(tmp_path / "voice.pth", content))

    nan = rvc_file(model)["weight"]["dec.conv_pre.weight"]
    nan.view(-1)[3] = np.nan
    assert "dec.conv_pre.weight is not finite" in change(dec__conv_pre__weight=nan)
    assert "dec.conv_post.weight is missing" in change(dec__conv_post__weight=None)
    assert "(5,), expected (32,)" in change(dec__cond__bias=torch.zeros(5))
    assert "expected no such tensor" in change(dec__more__bias=torch.zeros(5))
    assert "lacks weights" in change(**{"enc_p__encoder__ffn_layers__0__conv_1__weight": None})
    assert "vocoder 'RefineGAN'" in refusal_of_vocoder(model, tmp_path)


def refusal_of_vocoder(model, tmp_path):
    content = rvc_file(model, vocoder="RefineGAN")
    content["weight"] = {name: t for name, t in content["weight"].items() if not name.startswith("dec.ups")}
    return refusal(saved(tmp_path / "voice.pth", content))


@pytest.mark.parametrize(
    "place, value",
    [(17, 10**12), (17, "40k"), (12, [10**9, 10]), (12, None), (11, [[1, 3, 10**9]]), (11, 5), (0, -1), (0, "x"), (12, [10] * 4)],
)
def test_numbers_of_a_file_are_checked_before_they_cost_anything(place, value, model, tmp_path):
    content = rvc_file(model)
    content["config"][place] = value
    assert "architecture" in refusal(saved(tmp_path / "voice.pth", content))


# ---- training folders and discriminators -----------------------------------------------------------------------------


def make_run(folder, model):
    """G_100 and D_100 whole, G_200 and D_200 damaged, G_300 alone."""
    folder.mkdir()
    for number in (100, 300):
        saved(folder / f"G_{number}.pth", {**training_state(model), "iteration": number})
    saved(folder / "D_100.pth", {"model": Discriminator((2, 3, 5), 1 / 16).state_dict()})
    (folder / "G_200.pth").write_bytes((folder / "G_100.pth").read_bytes()[:20000])
    (folder / "D_200.pth").write_bytes((folder / "D_100.pth").read_bytes()[:1000])
    return folder


def test_a_training_folder_gives_its_newest_whole_pair_and_names_the_others(model, tmp_path, capsys):
    folder = make_run(tmp_path / "run", model)
    base, _, _ = load_base(str(folder))
    assert torch.equal(converted(base), converted(model))
    told = capsys.readouterr().out
    assert "G_300.pth has no D_300.pth" in told and "D_200.pth is cut off" in told and "is G_100.pth and D_100.pth" in told
    critic = load_discriminator("", str(folder), model.config)
    assert len(critic.discriminators) == 4 and "D_100.pth" in capsys.readouterr().out


def test_a_training_folder_without_a_whole_pair_starts_nothing(model, tmp_path):
    folder = make_run(tmp_path / "run", model)
    (folder / "D_100.pth").write_bytes(b"")
    with pytest.raises(UserError, match="no whole pair.*G_300.pth has no D_300.pth.*D_100.pth is empty"):
        load_base(str(folder))


def test_the_discriminator_beside_a_base_is_taken_and_another_refused(model, tmp_path, capsys):
    base = saved(tmp_path / "f0G40k.pth", training_state(model))
    assert len(load_discriminator("", str(base), model.config).discriminators) == 4, "new, and small as the voice is"
    assert "new" in capsys.readouterr().out
    critic = Discriminator((2, 3, 5), 1 / 16)
    saved(tmp_path / "f0D40k.pth", {"model": critic.state_dict()})
    beside = load_discriminator("", str(base), model.config)
    named = load_discriminator(str(tmp_path / "f0D40k.pth"), "demo", model.config)
    for found in (beside, named):
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), critic.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="no discriminator"):
        load_discriminator(str(base), "demo", model.config)
    with pytest.raises(UserError, match="--discriminator"):
        load_discriminator(str(tmp_path / "gone.pth"), "demo", model.config)


def test_a_voice_that_is_not_there_is_no_hub_name(tmp_path):
    for name in (str(tmp_path / "gone.pth"), "gone.pth", "./a/b/c.pth"):
        with pytest.raises(UserError, match=f"--model {name}: there is no file"):
            load_base(name)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load_base("owner/repo/f0G40k.pth")


def test_official_configurations_are_whole_numbers_of_ten_milliseconds():
    assert all(VoiceConfig.of_rate(rate, version).hop * 100 == rate for rate in (32000, 40000, 48000) for version in ("v1", "v2"))


def test_weights_by_an_old_and_a_new_name_are_refused(model, tmp_path):
    content = rvc_file(model)
    content["weight"] |= to_new_names(content["weight"])
    assert "twice" in refusal(saved(tmp_path / "both.pth", content))


def test_a_training_folder_without_a_voice_is_told_so(model, tmp_path):
    saved(tmp_path / "D_100.pth", {"model": {"discriminators.0.a": torch.zeros(1)}})
    with pytest.raises(UserError, match="no whole pair"):
        load_base(str(tmp_path))


def test_a_content_model_is_not_fetched_because_a_file_names_it(model, tmp_path, monkeypatch):
    """Only those that all voices use; any other where --content names it."""
    from content import load_content
    from data import check_content

    monkeypatch.setattr("huggingface_hub.HfApi", None)  # no question is asked
    _, voice, _ = load_base(str(saved(tmp_path / "a.pth", rvc_file(model, embedder_model="nobody/of-this-name"))))
    assert not voice.content_is_known
    for load in (lambda: load_content(voice.content, download=voice.content_is_known), lambda: check_content(voice, named=False)):
        with pytest.raises(UserError, match="only where --content names it"):
            load()
    _, voice, _ = load_base(str(saved(tmp_path / "b.pth", rvc_file(model, embedder_model="contentvec"))))
    assert voice.content_is_known
