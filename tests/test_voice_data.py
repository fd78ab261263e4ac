"""Voice data: batches of like lengths, experiment folders of other programs, splits by recording, what a batch holds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE, Payload, use_task

from common.batches import EpochBatches, LengthBatches
from common.config import UserError
from common.samples import Faults

TASK = VOICE
use_task(TASK)

from data import build_loaders, choose_content, find_voice, load_for_eval  # noqa: E402
from experiments import ExperimentClip, Unfit, read_experiment  # noqa: E402
from model import Voice  # noqa: E402
from spectrum import spectrogram  # noqa: E402
from splits import split_clips  # noqa: E402
from synthesizer import VoiceConfig  # noqa: E402

SMALL = VoiceConfig(
    sample_rate=16000,
    n_fft=512,
    hop=160,
    win=512,
    mels=40,
    content_width=8,
    upsample_rates=(10, 4, 2, 2),
    upsample_kernels=(20, 8, 4, 4),
    upsample_initial=32,
    inter_channels=8,
    hidden_channels=8,
    filter_channels=16,
    gin_channels=8,
    speakers=4,
    segment_frames=16,
)
VOICE_OF_8 = Voice(SMALL, "hubert:some/model", "pyin")


def flat(batches):
    return [index for batch in batches for index in batch]


# ---- batches of like lengths -----------------------------------------------------------------------------------------

VARIED = np.random.default_rng(0).integers(50, 500, 160).tolist()


def padding(batches, lengths):
    """The share of padded batches that is padding."""
    room = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for i in flat(batches)) / room


def test_batches_of_like_lengths_hold_little_padding():
    plain, sorted_ = (padding(kind.plan(1), VARIED) for kind in (EpochBatches(160, 4, 0), LengthBatches(VARIED, 4, 0)))
    assert plain > 0.3 and sorted_ < 0.05


@pytest.mark.parametrize(("length", "size"), [(160, 4), (67, 4), (5, 1), (3, 8)])
def test_every_clip_comes_at_most_once_and_at_least_one_batch_does(length, size):
    lengths, sampler = VARIED[:length], LengthBatches(VARIED[:length], size, 0)
    used = flat(sampler.plan(1))
    assert len(set(used)) == len(used) == min(length, len(sampler) * size) and set(used) <= set(range(length))
    assert len(sampler.plan(1)) == len(sampler) == max(1, length // size)
    epochs = [set(flat(LengthBatches(lengths, size, 0).plan(epoch))) for epoch in range(1, 40)]
    assert set().union(*epochs) == set(range(length)), "none is left out for good, as the longest would be"


def test_batches_come_in_another_order_and_make_up_each_epoch():
    sampler = LengthBatches(VARIED, 4, 0)
    one, other = sampler.plan(1), sampler.plan(2)
    assert one == LengthBatches(VARIED, 4, 0).plan(1) != LengthBatches(VARIED, 4, 1).plan(1)
    assert len({frozenset(batch) for batch in one} & {frozenset(batch) for batch in other}) < len(one) / 2
    means = [np.mean([VARIED[i] for i in batch]) for batch in one]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5, "short clips do not come first"


def test_two_processes_share_the_batches_of_one():
    whole = LengthBatches(VARIED, 4, 3).plan(5)
    parts = [LengthBatches(VARIED, 2, 3, rank=rank, world=2).plan(5) for rank in (0, 1)]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


def test_an_epoch_goes_on_in_its_middle():
    sampler = LengthBatches(VARIED, 4, 0)
    whole = [[(2, index) for index in batch] for batch in sampler.plan(2)]
    sampler.set_range(2, 15, 40)
    assert list(sampler) == whole[15:] and len(whole[15:]) == 25


def test_no_clips_are_refused():
    with pytest.raises(UserError, match="no training sample"):
        LengthBatches([], 4, 0)


# ---- experiment folders ----------------------------------------------------------------------------------------------

RVC = ("0_gt_wavs", "3_feature768", "2b-f0nsf")
APPLIO = ("sliced_audios", "extracted", "f0_voiced")


def write_slice(folder, name, layout=RVC, seconds=1.0, hertz=150.0, rate=16000, width=8):
    """A slice as both programs leave it: content two frames of 10 ms shorter than the sound, F0 one longer."""
    waves, content, f0 = (folder / part for part in layout)
    for part in (waves, content, f0):
        part.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    soundfile.write(waves / f"{name}.wav", 0.3 * np.sin(2 * np.pi * hertz * times), rate)
    frames = (round(seconds * 16000) - 400) // 320 + 1
    rows = np.arange(frames)[:, None] + np.zeros(width)
    np.save(content / f"{name}.npy", rows.astype(np.float32))
    np.save(f0 / f"{name}.wav.npy", np.full(round(seconds * 100) + 1, hertz))


def write_list(folder, names, sid=0, layout=RVC, root="C:\\RVC\\logs\\me"):
    """filelist.txt as Windows has it, with the lines of silence that both programs add."""
    lines = [f"{root}\\{layout[0]}\\{n}.wav|{root}\\{layout[1]}\\{n}.npy|x|{root}\\{n}.wav.npy|{sid}" for n in names]
    mute = "C:\\RVC/logs/mute/0_gt_wavs/mute16k.wav|mute.npy|mute.wav.npy|mute.wav.npy|0"
    with open(folder / "filelist.txt", "a", newline="") as file:
        file.write("\r\n".join([*lines, mute, mute, ""]))


def test_an_rvc_folder_of_another_machine_is_read_by_base_names(tmp_path):
    for number, name in enumerate(["0_0", "0_1", "1_0"]):
        write_slice(tmp_path, name, hertz=100.0 + 50 * number)
    write_list(tmp_path, ["0_0", "0_1", "1_0"])
    (tmp_path / "total_fea.npy").touch()
    (tmp_path / "weights").mkdir()
    (tmp_path / "train.log").write_text("INFO")
    faults = Faults()
    clips, speakers, facts = read_experiment(tmp_path, VOICE_OF_8, faults)
    assert [(c.name, c.recording, c.speaker, c.frames) for c in clips] == [
        ("0_0", "0", 0, 98),
        ("0_1", "0", 0, 98),
        ("1_0", "1", 0, 98),
    ]
    assert speakers == [tmp_path.name] and facts["program"] == "RVC" and not faults.found
    assert list(faults.notes.values()) == [["mute16k.wav"]]
    wave, content, f0 = clips[1].load(160)
    assert (wave.shape, content.shape, f0.shape) == ((98 * 160,), (98, 8), (98,)) and set(f0) == {150.0}
    assert content[:, 0].tolist() == [frame // 2 for frame in range(98)], "50 features a second, each for two frames"
    assert wave.dtype == content.dtype == f0.dtype == np.float32 and np.abs(wave).max() == pytest.approx(0.3, abs=0.01)


def test_an_applio_folder_has_its_speakers(tmp_path, capsys):
    for name in ("0_0_0", "0_0_1", "7_0_0"):
        write_slice(tmp_path, name, APPLIO, seconds=0.9)
    (tmp_path / "model_info.json").write_text(json.dumps({"embedder_model": "contentvec"}))
    clips, speakers, facts = read_experiment(tmp_path, VOICE_OF_8, Faults())
    assert speakers == ["0", "7"] and [(c.recording, c.speaker) for c in clips] == [("0_0", 0), ("0_0", 0), ("7_0", 1)]
    assert facts == {"program": "Applio", "content": "contentvec"}
    write_list(tmp_path, ["0_0_1"], sid=3, layout=APPLIO)
    assert read_experiment(tmp_path, VOICE_OF_8, Faults())[1] == ["0", "3", "7"]
    load(tmp_path)
    assert "has content features of contentvec, the voice takes those of hubert:some/model" in capsys.readouterr().out
    load(tmp_path, Voice(SMALL, "hubert:lengyue233/content-vec-best"))
    assert "content features" not in capsys.readouterr().out


def damaged(folder, name, kind):
    content, f0 = folder / "3_feature768" / f"{name}.npy", folder / "2b-f0nsf" / f"{name}.wav.npy"
    if kind == "pickle":
        array = np.empty(1, object)
        array[0] = Payload(folder / "PWNED")
        np.save(content, array, allow_pickle=True)
    elif kind == "plain pickle":
        import pickle

        content.write_bytes(pickle.dumps(Payload(folder / "PWNED")))
    elif kind == "claims gigabytes":
        with open(content, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 8)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(99))
    elif kind == "empty":
        content.write_bytes(b"")
    elif kind == "zip":
        np.savez(folder / "x.npz", a=np.zeros(3))
        shutil.move(folder / "x.npz", content)
    elif kind == "cut":
        content.write_bytes(content.read_bytes()[:-40])
    elif kind == "no F0":
        f0.unlink()
    elif kind == "no content":
        content.unlink()
    elif kind == "other length":
        np.save(f0, np.full(60, 150.0))
    elif kind == "other width":
        np.save(content, np.zeros((49, 5), np.float32))
    elif kind == "text in it":
        np.save(content, np.full((49, 8), "a"))
    elif kind == "no wave":
        (folder / "0_gt_wavs" / f"{name}.wav").write_bytes(b"RIFF")


KINDS = [
    "pickle",
    "plain pickle",
    "claims gigabytes",
    "empty",
    "zip",
    "cut",
    "no F0",
    "no content",
    "other length",
    "other width",
]


@pytest.mark.parametrize("kind", [*KINDS, "text in it", "no wave"])
def test_a_slice_whose_files_are_damaged_is_named_and_the_others_are_used(tmp_path, kind):
    for name in ("0_0", "0_1", "0_2"):
        write_slice(tmp_path, name)
    damaged(tmp_path, "0_1", kind)
    faults = Faults()
    clips, _, _ = read_experiment(tmp_path, VOICE_OF_8, faults)
    assert [clip.name for clip in clips] == ["0_0", "0_2"], faults.found
    assert not (tmp_path / "PWNED").exists()
    (places,) = faults.found.values()
    assert len(places) == 1 and places[0].startswith("0_1.wav"), faults.found


def test_a_folder_of_another_kind_of_voice_says_so_in_a_line(tmp_path):
    write_slice(tmp_path / "a", "0_0", rate=48000)
    with pytest.raises(Unfit, match="the data is 48k, the voice 16k"):
        read_experiment(tmp_path / "a", VOICE_OF_8, Faults())
    write_slice(tmp_path / "b", "0_0", width=12)
    with pytest.raises(Unfit, match="12 values a frame, the voice takes 8"):
        read_experiment(tmp_path / "b", VOICE_OF_8, Faults())
    write_slice(tmp_path / "c", "0_0")
    shutil.rmtree(tmp_path / "c" / "2b-f0nsf")
    with pytest.raises(Unfit, match="no F0"):
        read_experiment(tmp_path / "c", VOICE_OF_8, Faults())
    shutil.rmtree(tmp_path / "b" / "3_feature768")
    with pytest.raises(Unfit, match="no content features: that step"):
        read_experiment(tmp_path / "b", VOICE_OF_8, Faults())
    for path in (tmp_path / "a" / "0_gt_wavs").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="0_gt_wavs is empty"):
        read_experiment(tmp_path / "a", VOICE_OF_8, Faults())


def test_a_long_slice_becomes_several_clips_that_hold_all_of_it(tmp_path):
    write_slice(tmp_path, "song", APPLIO, seconds=20)
    clips, _, _ = read_experiment(tmp_path, VOICE_OF_8, Faults())
    assert [clip.recording for clip in clips] == ["song"] * 3 and max(clip.frames for clip in clips) <= 900
    parts = [np.concatenate(part) for part in zip(*(clip.load(160) for clip in clips), strict=True)]
    whole = ExperimentClip("", "", 0, sum(c.frames for c in clips), clips[0].path, clips[0].content, clips[0].f0).load(160)
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- splits ----------------------------------------------------------------------------------------------------------


def clip(recording, number=0, frames=100, speaker=0, split=None):
    name = f"{recording}_{number}"
    return ExperimentClip(name, recording, speaker, frames, Path(f"{name}.wav"), Path(name), None, split=split)


def names_of(clips):
    return [c.name for c in clips]


def test_slices_of_one_recording_stay_on_one_side(tmp_path):
    clips = [clip(f"r{r}", n) for r in range(20) for n in range(5)]
    splits = split_clips(clips, 0, tmp_path, Faults())
    train, val = ({c.recording for c in splits[name]} for name in ("train", "val"))
    assert not train & val and len(train | val) == 20 and 2 <= len(val) <= 7
    assert names_of(splits["train"] + splits["val"]) != names_of(clips) and len(splits["train"] + splits["val"]) == 100
    assert names_of(split_clips(clips, 0, tmp_path, Faults())["val"]) == names_of(splits["val"])
    assert names_of(split_clips(clips, 1, tmp_path, Faults())["val"]) != names_of(splits["val"])


def test_of_two_recordings_the_short_one_is_held_out(tmp_path):
    clips = [clip("long", n) for n in range(50)] + [clip("short", n) for n in range(5)]
    for seed in range(6):
        assert {c.recording for c in split_clips(clips, seed, tmp_path, Faults())["val"]} == {"short"}


def test_every_speaker_is_held_out_of(tmp_path, capsys):
    clips = [clip(f"{s}_{r}", n, speaker=s) for s in range(3) for r in range(4) for n in range(3)]
    splits = split_clips(clips, 0, tmp_path, Faults())
    assert {c.speaker for c in splits["train"]} == {c.speaker for c in splits["val"]} == {0, 1, 2}
    assert "of 4 recordings, chosen by seed 0 (of each of 3 voices)" in capsys.readouterr().out


def test_of_a_single_recording_the_end_is_held_out_and_a_single_clip_is_both(tmp_path, capsys):
    splits = split_clips([clip("only", n) for n in range(20)], 0, tmp_path, Faults())
    assert names_of(splits["val"]) == [f"only_{n}" for n in range(16, 20)] and len(splits["train"]) == 16
    assert "the last 4 of 20 clips of the only recording, so that the metrics flatter" in capsys.readouterr().out
    splits = split_clips([clip("only")], 0, tmp_path, Faults())
    assert names_of(splits["train"]) == names_of(splits["val"]) == ["only_0"]
    assert "is one clip: what is trained on is validated on" in capsys.readouterr().out


def test_the_splits_of_folders_count(tmp_path):
    faults = Faults()
    clips = [clip("a", split="train"), clip("b"), clip("c", split="val"), clip("d", split="test"), clip("a", 1, split="val")]
    splits = split_clips(clips, 0, tmp_path, faults)
    assert {name: names_of(members) for name, members in splits.items()} == {
        "train": ["a_0", "b_0"],
        "val": ["c_0", "a_1"],
        "test": ["d_0"],
    }
    assert list(faults.notes.values()) == [["a"]], "one sound on both sides is said"


# ---- what the model gets ---------------------------------------------------------------------------------------------


def settings(**changes):
    return SimpleNamespace(
        **{"content": "", "f0_method": "pyin", "seed": 0, "batch_size": 3, "num_workers": 0, "cache": "auto"} | changes
    )


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Two speakers' slices of 0.4 to 1.2 s, and one that is too short."""
    folder = tmp_path_factory.mktemp("duo")
    for number in range(12):
        speaker = number % 2
        write_slice(folder, f"{speaker}_{number // 4}_{number}", APPLIO, 0.4 + 0.07 * number, 110.0 + 100 * speaker)
    write_slice(folder, "0_9_0", APPLIO, 0.1)
    return folder


def load(folder, voice=VOICE_OF_8, **changes):
    return build_loaders(settings(**changes), voice, find_voice(str(folder), "auto", 0))


def test_a_batch_holds_whole_clips_padded_with_zeros(experiment):
    train, val, voice, facts = load(experiment)
    train.batch_sampler.set_range(1, 0, 9)
    batches = list(train)
    assert len(batches) == len(train.batch_sampler) == facts["train"] // 3
    for batch in batches:
        lengths, frames = batch["lengths"].tolist(), int(batch["lengths"].max())
        shapes = {
            "phone": (3, frames, 8),
            "f0": (3, frames),
            "pitch": (3, frames),
            "spec": (3, 257, frames),
            "wave": (3, frames * 160),
        }
        assert {key: tuple(batch[key].shape) for key in shapes} == shapes
        for row, (index, length) in enumerate(zip(batch["index"].tolist(), lengths, strict=True)):
            c = train.dataset.clips[index]
            wave, content, f0 = c.load(160)
            assert length == c.frames and batch["sid"][row] == c.speaker and set(f0) == {110.0 + 100 * c.speaker}
            for key, expected, end in (("wave", wave, length * 160), ("phone", content, length), ("f0", f0, length)):
                np.testing.assert_array_equal(batch[key][row][:end], expected)
                assert not batch[key][row][end:].any()
            expected = spectrogram(torch.from_numpy(wave)[None], SMALL)[0]
            assert torch.equal(batch["spec"][row][:, :length], expected) and not batch["spec"][row][:, length:].any()
            assert batch["pitch"][row][:length].min() > 1
    assert voice.speakers == ["0", "1"] and voice.f0_medians == {"0": 110.0, "1": 210.0}
    assert facts["left_out"] == {"clip shorter than a training segment of 0.16 s": 1}
    assert (facts["format"], facts["speakers"]) == ("Applio", 2) and facts["train"] + facts["val"] == 12
    assert facts["minutes"] == pytest.approx(sum(c.frames for c in train.dataset.clips) / 6000, abs=1e-3)
    assert sorted(i for batch in val for i in batch["index"].tolist()) == list(range(facts["val"]))


def test_workers_and_no_cache_give_the_same_batches(experiment):
    def first_epoch(**changes):
        loader, _, _, facts = load(experiment, **changes)
        loader.batch_sampler.set_range(1, 0, 9)
        return list(loader), facts

    plain, facts = first_epoch()
    for changes in ({"num_workers": 2}, {"cache": "off"}):
        others, same = first_epoch(**changes)
        assert same == facts
        for one, other in zip(plain, others, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_hash_tells_other_data(experiment, tmp_path):
    def hash_of(folder):
        return load(folder)[3]["sha256"]

    copy = tmp_path / "duo"
    shutil.copytree(experiment, copy)
    assert hash_of(copy) == hash_of(experiment), "wherever it lies"
    f0 = copy / "f0_voiced" / "0_0_0.wav.npy"
    np.save(f0, np.load(f0) + 1)
    assert hash_of(copy) != hash_of(experiment)


def test_a_batch_larger_than_the_data_shrinks(experiment, capsys):
    train, _, _, facts = load(experiment, batch_size=64)
    assert [len(batch) for batch in train.batch_sampler.plan(1)] == [facts["train"]]
    assert f"batches of {facts['train']}, not 64" in capsys.readouterr().out


def test_a_clip_with_a_value_that_is_no_number_is_left_out(experiment, tmp_path, capsys):
    copy = tmp_path / "duo"
    shutil.copytree(experiment, copy)
    file = copy / "extracted" / "0_0_0.npy"
    values = np.load(file)
    values[3, 2] = np.nan
    np.save(file, values)
    facts = load(copy)[3]
    assert facts["left_out"]["content features with values that are no numbers"] == 1
    assert "values that are no numbers (1): 0_0_0" in capsys.readouterr().out


def test_a_clip_that_breaks_in_training_is_told_and_another_takes_its_place(experiment, tmp_path):
    copy = tmp_path / "duo"
    shutil.copytree(experiment, copy)
    train, _, _, _ = load(copy, cache="off")
    victim = train.dataset.clips[2]
    victim.content.write_bytes(b"")
    item = train.dataset[1, 2]
    assert item["index"] == 2 and len(item["f0"]) == len(item["wave"]) > 0
    ((path, fault),) = train.dataset.new_faults()
    assert path == str(victim.path) and fault.startswith("array that cannot be read") and train.dataset.name(2) == victim.name


def test_eval_finds_the_split_and_the_rows_of_the_training(experiment):
    _, val, voice, _ = load(experiment)
    about = {"data_dir": str(experiment), "seed": 0, "batch_size": 3, "speakers": "auto"}
    config = SimpleNamespace(data_dir="", split="val", batch_size=0, num_workers=0)
    loader, name = load_for_eval(config, voice, about)
    assert names_of(loader.dataset.clips) == names_of(val.dataset.clips) and name == str(experiment)
    for one, other in zip(val, loader, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    turned = Voice(SMALL, voice.content, "pyin", ["x", "1", "0"])
    loader, _ = load_for_eval(config, turned, about)
    assert [c.speaker for c in loader.dataset.clips] == [2 - c.speaker for c in val.dataset.clips]
    with pytest.raises(UserError, match="speakers whom the voice does not know, 1; it knows 0"):
        load_for_eval(config, Voice(SMALL, voice.content, "pyin", ["0", "z"]), about)
    config.split = "test"
    with pytest.raises(UserError, match="has no test split; it has train, val"):
        load_for_eval(config, voice, about)


def test_all_speakers_are_one_voice_if_asked(experiment):
    _, _, voice, _ = build_loaders(settings(), VOICE_OF_8, find_voice(str(experiment), "one", 0))
    assert len(voice.speakers) == 1 and 110 <= voice.f0_medians[voice.speakers[0]] <= 210


# ---- recordings ------------------------------------------------------------------------------------------------------

DSP = Voice(replace(SMALL, content_width=13), "dsp", "swift")


def write_recording(path, hertz=150.0, seconds=1.2, rate=16000):
    """Twelve harmonics that swell and fade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * hertz * k * times) / k for k in range(1, 13))
    soundfile.write(path, 0.2 * tones * np.sin(np.pi * times / seconds), rate)


@pytest.fixture
def kept_here(tmp_path, monkeypatch):
    """What is prepared on the way goes to this folder."""
    monkeypatch.setattr("data.prepared_folder", lambda folder: tmp_path / "prepared" / folder.name)
    return tmp_path


def load_sound(folder, **changes):
    return build_loaders(settings(f0_method="swift", **changes), DSP, find_voice(str(folder), "auto", 0))


def test_recordings_are_prepared_on_the_way_and_a_broken_one_is_named_and_counted(kept_here, capsys):
    folder = kept_here / "voice"
    for split, number in (("train", 0), ("train", 1), ("train", 2), ("val", 3)):
        write_recording(folder / split / f"{split}_{number}.wav", 120.0 + 20 * number)
    broken = folder / "train" / "train_1.wav"
    broken.write_bytes(broken.read_bytes()[:100])
    train, val, voice, facts = load_sound(folder)
    assert (facts["train"], facts["val"], facts["format"]) == (2, 1, "audio") and list(facts["left_out"].values()) == [1]
    (fault,) = facts["left_out"]
    assert f"left out, {fault} (1): train_1.wav" in capsys.readouterr().out
    assert voice.f0_method == "swift" and voice.f0_medians["voice"] == pytest.approx(140, abs=5)
    assert [c.recording for c in val.dataset.clips] == ["val_3.wav"]
    batch = next(iter(val))
    assert batch["phone"].shape[2] == 13 and batch["wave"].shape[1] == 160 * batch["phone"].shape[1]
    prepared = kept_here / "prepared" / "voice"
    again, ready = load_sound(folder)[3], load_sound(prepared)[3]
    assert again == facts
    assert ready["format"] == "prepared" and all(ready[key] == facts[key] for key in ("sha256", "train", "val", "minutes"))
    write_recording(folder / "train" / "train_2.wav", 170.0)
    assert load_sound(folder)[3]["sha256"] != facts["sha256"]


def test_the_slices_of_an_experiment_for_another_voice_are_prepared_anew(kept_here, capsys):
    folder = kept_here / "other"
    for number, name in enumerate(("0_0", "0_1", "1_0", "1_1")):
        write_slice(folder, name, rate=32000)
        write_recording(folder / "0_gt_wavs" / f"{name}.wav", 120.0 + 20 * number, rate=32000)
    train, val, _, facts = load_sound(folder)
    assert "other: the data is 32k, the voice 16k; its slices are prepared anew" in capsys.readouterr().out
    assert facts["format"] == "audio" and facts["train"] == facts["val"] == 2
    assert len({c.recording for c in train.dataset.clips}) == len({c.recording for c in val.dataset.clips}) == 1


def test_a_base_keeps_to_the_content_that_it_was_trained_on(capsys):
    assert choose_content("", DSP) == choose_content("dsp", DSP) == "dsp" and capsys.readouterr().out == ""
    assert choose_content("hubert:some/name", DSP) == "dsp" and "instead of hubert:some/name" in capsys.readouterr().out
    assert choose_content("dsp", VOICE_OF_8) == "hubert:some/model"
    capsys.readouterr()
    assert choose_content("hubert:my/folder", VOICE_OF_8) == "hubert:my/folder"
    assert "the base was trained on hubert:some/model, and knows no other" in capsys.readouterr().out
