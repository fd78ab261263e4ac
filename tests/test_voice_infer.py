"""infer and Predictor: every file of a folder answered for, voices of others as well as ours, adapters exchanged on one base."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE, use_task

from common.config import UserError
from common.samples import BadFile
from common.saved_models import save_lora, save_model

TASK = VOICE
use_task(VOICE)

from infer import main  # noqa: E402
from layers import to_old_names  # noqa: E402
from model import Voice, add_lora, load_base, origin, with_voices  # noqa: E402
from predictor import Predictor  # noqa: E402
from synthesizer import Synthesizer, VoiceConfig  # noqa: E402
from voice_index import build_index, write_index  # noqa: E402

SMALL = VoiceConfig(
    **{"sample_rate": 16000, "n_fft": 1024, "hop": 160, "win": 1024, "mels": 40, "content_width": 13},
    **{"inter_channels": 8, "hidden_channels": 8, "filter_channels": 16, "n_heads": 2, "n_layers": 1, "gin_channels": 4},
    **{"resblock_kernels": (3,), "resblock_dilations": ((1, 3),), "upsample_initial": 32, "speakers": 3},
    **{"upsample_rates": (10, 4, 4), "upsample_kernels": (20, 8, 8)},
)
LORA = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "lora_targets": "default", "lora_last_k": 0, "frozen_dtype": "fp32"}
RUN = SimpleNamespace(data_dir="", batch_size=4, seed=0, speakers="auto", lora_rank_pattern="", **LORA)


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """Folders of a whole voice, of two adapters on it, and of one that trained its speakers' rows alone."""
    root = tmp_path_factory.mktemp("voices")
    torch.manual_seed(0)
    voice = Voice(SMALL, "dsp", "auto", ["ann", "bob"], {"ann": 200.0, "bob": 100.0})
    model = Synthesizer(SMALL).eval()
    save_model(root / "whole", model, voice, origin("full", model, {"name": "nothing", "sha256": "0"}, RUN, voice))
    for name, run in {"one": RUN, "two": RUN, "rows": SimpleNamespace(**{**vars(RUN), "lora_r": 0})}.items():
        base, _, facts = load_base(str(root / "whole"))
        tuned = add_lora(with_voices(base, voice), run)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        method = "lora" if run.lora_r else "head"
        save_lora(root / name, tuned, voice, origin(method, tuned, facts, run, voice))
    return root


def sung(seconds=0.6, f0=150.0, rate=16000):
    phase = 2 * np.pi * f0 * np.arange(round(seconds * rate)) / rate
    return (0.2 * sum(np.sin(k * phase) / k for k in range(1, 8))).astype(np.float32)


@pytest.fixture
def talks(tmp_path):
    """A folder with two recordings, one of them in a sub-folder, a broken one, and a file that is none."""
    folder = tmp_path / "talks 声音"
    (folder / "more").mkdir(parents=True)
    soundfile.write(folder / "a.wav", sung(), 16000)
    soundfile.write(folder / "more" / "b.flac", sung(0.5, 220, 44100), 44100)
    (folder / "broken.mp3").write_bytes(b"no sound at all" * 9)
    (folder / "notes.txt").write_text("no recording")
    return folder


def infer(*args):
    main([str(arg) for arg in args])


def test_a_folder_is_converted_and_what_is_broken_is_named(voices, talks, tmp_path, capsys):
    infer("--input", talks, "--checkpoint", voices / "whole", "--output_dir", tmp_path / "out", "--pitch", 2)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["file_name"] for row in rows] == [str(talks / "a.wav"), str(talks / "more" / "b.flac")]
    for row, seconds in zip(rows, (0.6, 0.5), strict=True):
        made, rate = soundfile.read(tmp_path / "out" / row["output"])
        assert rate == row["rate"] == 16000 and len(made) == round(seconds * rate) and row["seconds"] == pytest.approx(seconds)
        assert row["pitch_shift"] == row["settings"]["pitch"] == 2 and row["real_time_factor"] > 0
        assert row["loudness_db"] == pytest.approx(10 * np.log10(np.mean(made**2)), abs=0.3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001_a.wav", "0003_b.wav", "predictions.json"]
    said = capsys.readouterr().out
    assert "left out" in said and "broken.mp3" in said and "2 recordings converted" in said
    with pytest.raises(UserError, match="holds predictions already"):
        infer("--input", talks, "--checkpoint", voices / "whole", "--output_dir", tmp_path / "out")


def test_a_file_and_a_glob_are_inputs_and_flac_is_a_format(voices, talks, tmp_path):
    flags = ["--checkpoint", voices / "one", "--format", "flac"]
    infer("--input", talks / "a.wav", *flags, "--output_dir", tmp_path / "1")
    infer("--input", talks / "**" / "*.flac", *flags, "--output_dir", tmp_path / "2")
    assert [path.name for path in sorted((tmp_path / "1").iterdir())] == ["0001_a.flac", "predictions.json"]
    assert [path.name for path in sorted((tmp_path / "2").iterdir())] == ["0001_b.flac", "predictions.json"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "--input is needed"),
        (["--input", "nowhere"], "nowhere: there is no such file or folder"),
        (["--input", "*.xyz"], "no recording there"),
        (["--input", "broken.mp3"], "nothing in it could be converted"),
        (["--input", "a.wav", "--speaker_id", "5"], "--speaker_id 5 is none of this voice's, which are 0 to 1"),
        (["--input", "a.wav", "--pitch", "high"], "--pitch"),
        (["--input", "a.wav", "--index", "notes.txt"], "notes.txt is no faiss index"),
        (["--input", "a.wav", "--content", "other"], "--content other"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(args, told, voices, talks, tmp_path, monkeypatch):
    monkeypatch.chdir(talks)
    with pytest.raises((UserError, SystemExit)) as caught:
        infer("--checkpoint", voices / "whole", *args, "--output_dir", tmp_path / "out")
    if isinstance(caught.value, UserError):
        assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_settings_without_effect_are_said(voices, talks, tmp_path, capsys):
    infer(
        "--input",
        talks / "a.wav",
        "--checkpoint",
        voices / "whole",
        "--output_dir",
        tmp_path,
        "--index_rate",
        0.5,
        "--protect",
        0,
    )
    said = capsys.readouterr().out
    assert "--index_rate has no effect" in said and "--protect has no effect" in said


@pytest.mark.slow
def test_several_adapters_answer_one_after_the_other(voices, talks, tmp_path):
    named = f"{voices / 'one'},{voices / 'two'}"
    infer("--input", talks / "a.wav", "--checkpoint", named, "--output_dir", tmp_path / "both")
    infer("--input", talks / "a.wav", "--checkpoint", voices / "two", "--output_dir", tmp_path / "two")
    both = [soundfile.read(tmp_path / "both" / name)[0] for name in ("0001_a.wav", "0001_a_2.wav")]
    np.testing.assert_array_equal(both[1], soundfile.read(tmp_path / "two" / "0001_a.wav")[0])
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_voice_of_rvc_is_a_checkpoint(voices, talks, tmp_path):
    """Its small file, half precision; the content model is named by a flag, as its file does not say dsp."""
    model, _, _ = load_base(str(voices / "whole"))
    weight = {name: t.half() for name, t in to_old_names(model.state_dict()).items() if not name.startswith("enc_q.")}
    c = SMALL
    sizes = [c.inter_channels, c.hidden_channels, c.filter_channels, c.n_heads, c.n_layers, c.kernel_size, 0, c.resblock]
    decoder = [list(c.resblock_kernels), [list(d) for d in c.resblock_dilations], list(c.upsample_rates), c.upsample_initial]
    facts = [513, 32, *sizes, *decoder, list(c.upsample_kernels), 3, c.gin_channels, 16000]
    torch.save(
        {"weight": weight, "config": facts, "info": "1epoch", "sr": 16000, "f0": 1, "version": "v2"}, tmp_path / "voice.pth"
    )
    infer(
        "--input", talks / "a.wav", "--checkpoint", tmp_path / "voice.pth", "--content", "dsp", "--output_dir", tmp_path / "out"
    )
    made, _ = soundfile.read(tmp_path / "out" / "0001_a.wav")
    wave, _ = Predictor(voices / "whole").predict(talks / "a.wav", pitch=0)
    assert np.abs(made - wave).max() < 0.02 < np.abs(wave).max()


def test_a_file_and_its_wave_sound_the_same_and_no_wave_is_told_so(voices, talks):
    predictor = Predictor(voices / "whole", device="cpu")
    heard, rate = soundfile.read(talks / "a.wav", dtype="float32")
    expected, new_rate = predictor.predict(talks / "a.wav")
    np.testing.assert_allclose(predictor.predict((heard, rate))[0], expected, atol=1e-4)
    assert new_rate == 16000 and len(expected) == len(heard)
    assert np.abs(predictor.predict((heard, rate), speaker=1, pitch=0)[0] - expected).max() > 1e-3
    for wrong in ((heard[:, None], rate), (heard, 0), (np.full(9, np.nan), rate)):
        with pytest.raises(UserError, match="a wave to convert is"):
            predictor.predict(wrong)
    with pytest.raises(BadFile):
        predictor.predict(talks / "broken.mp3")


def test_the_index_beside_a_checkpoint_is_asked(voices, talks):
    predictor = Predictor(voices / "whole")
    without = predictor.predict(talks / "a.wav")[0]
    write_index(voices / "whole" / "voice.index", build_index(np.random.default_rng(0).standard_normal((60, 13))))
    try:
        drawn, none = predictor.predict(talks / "a.wav")[0], predictor.predict(talks / "a.wav", index_rate=0)[0]
        named = predictor.predict(talks / "a.wav", index=voices / "whole" / "voice.index", index_rate=0.5)[0]
    finally:
        (voices / "whole" / "voice.index").unlink()
    np.testing.assert_array_equal(none, without)
    np.testing.assert_array_equal(drawn, named)
    assert np.abs(drawn - without).max() > 1e-4
