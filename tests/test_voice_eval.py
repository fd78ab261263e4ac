"""A voice beside what it is measured by: which sources say what the target said, how they are scored, the page to listen to."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE, use_task

TASK = VOICE
use_task(VOICE)

from common.config import UserError  # noqa: E402
from common.samples import Faults  # noqa: E402
from distances import loudness_by_band  # noqa: E402
from listening import card, leave_page, system_table, write_page  # noqa: E402
from metrics import sound_sums  # noqa: E402
from recordings import Recording  # noqa: E402
from speaker_encoder import likeness_to, load_encoder  # noqa: E402
from synthesizer import VoiceConfig  # noqa: E402
from trials import RESYNTHESIS, find_trials, is_end_of, nearest_voices, run_trials, scores_of, system_scores  # noqa: E402

RATE = 16000
CONFIG = VoiceConfig(
    sample_rate=RATE,
    n_fft=1024,
    hop=160,
    win=1024,
    mels=80,
    content_width=13,
    upsample_rates=(10, 4, 2, 2),
    upsample_kernels=(20, 8, 4, 4),
    upsample_initial=32,
)
SPOKEN = {"ann": (0.8, 200), "ben": (1.2, 110)}  # where formants lie, and the F0
WORDS = ((700, 1200), (400, 2000), (300, 800), (500, 1500))


def utterance(speaker, word, seconds=0.8):
    """Two vowels by a speaker, (n,) float32; `word` says which."""
    scale, f0 = SPOKEN[speaker]
    f0 = f0 * (1 + word / 100)  # no two recordings are copies of one sound
    time = np.arange(round(seconds * RATE)) / RATE
    phase, wave = 2 * np.pi * np.cumsum(f0 * (1 + 0.1 * np.sin(6 * time))) / RATE, np.zeros(len(time))
    late = time > seconds / 2
    for k in range(1, int(6000 / f0)):
        gains = [sum(1 / (1 + ((k * f0 - scale * f) / 150) ** 2) for f in WORDS[w % 4]) + 0.01 for w in (word, word + 1)]
        wave += np.where(late, gains[1], gains[0]) * np.cos(k * phase + k * k)
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def save(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)
    return path


# ---- which recordings are converted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end, name, same",
    [("001", "ben_001", True), ("1", "11", False), ("hello", "hello", True), ("-2", "ben-2", True), ("lo", "hello", False)],
)
def test_a_name_ends_another_as_a_word(end, name, same):
    assert is_end_of(end, name) is same


def test_a_source_finds_the_recording_that_says_the_same(tmp_path):
    for word, name in enumerate(("ben_001.wav", "ben_long_001.wav", "other.wav")):
        save(tmp_path / "sources" / "val" / name, utterance("ben", word))
    save(tmp_path / "sources" / "test" / "ben_009.wav", utterance("ben", 3))
    truths = [Recording(tmp_path / f"{name}.wav", name, 0) for name in ("001", "long_001")]
    trials = find_trials(str(tmp_path / "sources"), truths, "val", 9, Faults())
    found = {trial.path.name: (trial.truth and trial.truth.stem, trial.speaker) for trial in trials}
    assert found == {"ben_001.wav": ("001", "ben"), "ben_long_001.wav": ("long_001", "ben"), "other.wav": (None, "sources")}
    with pytest.raises(UserError, match="--source_dir .* has no recording in a folder named train"):
        find_trials(str(tmp_path / "sources"), truths, "train", 9, Faults())
    with pytest.raises(UserError, match="--source_dir: there is no folder"):
        find_trials(str(tmp_path / "nowhere"), truths, "val", 9, Faults())


def test_of_many_sources_each_voice_has_its_turn(tmp_path):
    for voice in ("1", "2"):
        for number in range(4):
            save(tmp_path / voice / f"{number}.wav", utterance("ben", number + 4 * (voice == "2")))
    trials = find_trials(str(tmp_path), [], "val", 4, Faults())
    assert sorted(trial.speaker for trial in trials) == ["1", "1", "2", "2"]


# ---- how systems are scored ------------------------------------------------------------------------------------------


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Six sentences by ben, tried by a system that does nothing and by one that says what ann said; one of them slowly.

    The last source has no counterpart, and another cannot be read.
    """
    truths, faults = [], Faults()
    for word in range(6):
        truths.append(Recording(save(tmp_path / f"{word}.wav", utterance("ann", word)), f"{word}.wav", 0))
        name = f"ben_{word}.wav" if word < 5 else "ben alone.wav"
        save(tmp_path / "others" / name, utterance("ben", word, 1.0 if word == 4 else 0.8))
    (tmp_path / "others" / "broken.wav").write_bytes(b"RIFF")
    said = iter(range(6))

    def conversion(model, voice, wave, rate, options, content):
        assert (rate, options.speaker) == (RATE, 0)
        return (wave, RATE) if model is idle else (utterance("ann", next(said), len(wave) / RATE), RATE)

    idle, perfect = SimpleNamespace(enc_q=None), SimpleNamespace(enc_q=None)
    monkeypatch.setattr("trials.convert_wave", conversion)
    voice = SimpleNamespace(config=CONFIG, f0_method="auto", speakers=["ann"], f0_medians={"ann": 200.0})
    trials = find_trials(str(tmp_path / "others"), truths, "val", 9, faults)
    trials.sort(key=lambda trial: trial.truth.name if trial.truth else "~")
    done = run_trials(trials, {"idle": idle, "LoRA": perfect}, voice, 0, "auto", None, None, faults)
    target = np.sum([loudness_by_band(utterance("ann", word), RATE) for word in range(6)], axis=0)
    return SimpleNamespace(trials=done, target=target, faults=faults)


def test_a_perfect_conversion_scores_better_than_none(tried):
    assert list(tried.faults.counts().values()) == [1] and len(tried.trials) == 6
    assert [trial.aligned for trial in tried.trials] == [False] * 4 + [True, False]
    medians = [110 * 1.04 * (1 + word / 100) for word in range(6)]  # 1.04: that of the melody
    assert [trial.shift for trial in tried.trials] == pytest.approx([12 * np.log2(200 / median) for median in medians], abs=0.5)
    found = system_scores(tried.trials, tried.target)
    none, idle, perfect = (found[name] for name in ("no conversion", "idle", "LoRA"))
    assert RESYNTHESIS not in found and none["n"] == perfect["n"] == 6
    assert none["mcd"] == idle["mcd"] and perfect["mcd"]["value"] < 0.5 < 2 < none["mcd"]["value"]
    assert perfect["ltas_distance"]["value"] < 1 < none["ltas_distance"]["value"]
    assert perfect["f0_rmse_cents"]["value"] < 150 and none["f0_rmse_cents"]["value"] == pytest.approx(1000, abs=120)
    low, high = none["mcd"]["interval"]
    assert low < none["mcd"]["value"] < high and none["stft_distance"]["value"] > perfect["stft_distance"]["value"]
    assert perfect["real_time_factor"]["value"] > 0 and "real_time_factor" not in none


def test_a_source_without_a_counterpart_is_scored_in_f0_and_likeness_alone(tried):
    alone = tried.trials[-1]
    assert alone.truth is None and "mcd" not in alone.sums["LoRA"]
    found = system_scores([alone], tried.target)["LoRA"]
    assert found.keys() == {"n", "f0_rmse_cents", "f0_correlation", "vuv_error", "ltas_distance", "real_time_factor"}
    assert found["ltas_distance"]["interval"] is None


def test_the_nearest_voice_is_the_one_that_was_converted_to(tried):
    assert {found["nearest"] for found in nearest_voices(tried.trials, "LoRA", tried.target).values()} == {"target"}
    found = nearest_voices(tried.trials, "idle", tried.target)
    assert {speaker: voice["nearest"] for speaker, voice in found.items()} == {"ben": "ben", "others": "others"}
    assert found["ben"]["seconds"] == pytest.approx(4.2, abs=0.1)


def test_sounds_of_one_sentence_are_drawn_together():
    """Six sentences that all have one value have an interval of no width, however the sounds within a sentence differ."""
    a, b = utterance("ann", 0), utterance("ben", 0)
    f0 = np.full(80, 200.0)
    rows = [sound_sums(a, sound, f0, RATE) for sound in (a, b)] * 6
    same = scores_of(rows, [str(i // 2) for i in range(12)])["mcd"]
    apart = scores_of(rows, [str(i) for i in range(12)])["mcd"]
    assert same["interval"] == pytest.approx([same["value"]] * 2) and apart["value"] == pytest.approx(same["value"])
    assert apart["interval"][1] - apart["interval"][0] > 0.5
    assert scores_of(rows[:4], list("aabb"))["mcd"]["interval"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_a_speaker_encoder_of_transformers_says_how_alike_voices_are(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector, WavLMModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"conv_dim": (16,) * 7, "tdnn_dim": (16,) * 5, "xvector_output_dim": 16, "num_conv_pos_embeddings": 16}
    WavLMForXVector(WavLMConfig(**sizes)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    encode = load_encoder(str(tmp_path))
    likeness = likeness_to(encode, [utterance("ann", 0)], RATE)
    count, cosine = likeness(utterance("ann", 0), RATE)
    assert count == 1 and cosine == pytest.approx(1, abs=1e-5) and likeness(utterance("ben", 2), RATE)[1] < 0.9999
    assert len(encode(utterance("ann", 0)[:100], RATE)) == 16
    WavLMModel(WavLMConfig(**sizes)).save_pretrained(tmp_path)  # without the layers that make x-vectors
    with pytest.raises(UserError, match="--speaker_encoder .* was not trained to tell speakers apart"):
        load_encoder(str(tmp_path))
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 1', '"num_hidden_layers": 1000000000'))
    with pytest.raises(UserError, match="--speaker_encoder .*num_hidden_layers"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="--speaker_encoder .* is no x-vector model"):
        load_encoder(str(tmp_path))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_escapes_names_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    wave = utterance("ann", 0)
    systems = {"<b>": {"mcd": {"value": 2.654, "interval": [2.5, 2.8]}, "n": 7}, "none": {"mcd": {"value": None}, "n": 7}}
    cards = [lambda: card("<script>1</script>.wav", "", {"source & co": (wave, RATE)})] * 3
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    page = tmp_path / "page.html"
    tables = [system_table(systems, {"mcd": "MCD", "x": "X"})]
    assert write_page(page, "A <voice>", ["a & b"], tables, cards, {"it": picture}) == (3, 3)
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;1" in text and "source &amp; co" in text and "A &lt;voice&gt;" in text
    assert "2.65<small>2.50 to 2.80" in text and "<td>-</td>" in text and ">X<" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and text.count("<audio") == 3 and "3 recordings" in text
    sound = re.search(r"data:audio/flac;base64,([^\"]+)", text).group(1)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)))
    assert rate == RATE and np.abs(heard - wave).max() < 1e-4
    monkeypatch.setattr("listening.PAGE_BYTES", 60_000)
    made, _ = write_page(page, "A <voice>", [], [], cards, {})
    assert made < 3 and f"the first {made} of 3 recordings" in page.read_text()


def test_an_evaluation_leaves_a_page_sounds_and_pictures(tried, tmp_path):
    waves = [utterance("ann", word) for word in range(3)]
    clips = [SimpleNamespace(speaker=0, recording=f"{i}.wav") for i in range(3)]
    items = {
        (0, i): {"wave": torch.from_numpy(wave).view(-1, 160), "f0": torch.full((80,), 200.0)} for i, wave in enumerate(waves)
    }

    class Clips(dict):
        voice = SimpleNamespace(config=CONFIG, speakers=["ann"])

        def name(self, index):
            return f"ann/{index}.wav"

    dataset = Clips(items)
    dataset.clips = clips
    rows = [sound_sums(wave, wave, np.full(80, 200.0), RATE) for wave in waves]
    held_out = SimpleNamespace(scores={"LoRA": scores_of(rows, list("abc"))}, sounds={"LoRA": dict(enumerate(waves))})
    systems = system_scores(tried.trials, tried.target)
    conversion = {
        "recordings": 6,
        "voices": ["others"],
        "frame_by_frame": 4,
        "time_warped": 1,
        "without_truth": 1,
        "systems": systems,
    }
    conversion["nearest"] = nearest_voices(tried.trials, "LoRA", tried.target)
    about = {"data": "mine", "split": "val", "clips": 3, "base": {"name": "demo"}}
    for name, (trials, said) in {"with": (tried.trials, conversion), "without": ([], None)}.items():
        folder = tmp_path / name
        folder.mkdir()
        leave_page(folder, SimpleNamespace(checkpoint="best"), about, dataset, held_out, trials, said)
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["f0.png", "page.html", "scores.png", "sounds", "spectrograms.png"]
    text = (tmp_path / "with" / "page.html").read_text()
    assert "4 frame by frame, 1 after time warping" in text and text.count('class="card"') == 9 and "nearest to target" in text
    pair = tmp_path / "with" / "sounds" / "1_ben_0"
    assert sorted(path.stem for path in pair.iterdir()) == ["LoRA", "idle", "source", "target"]
    assert soundfile.read(pair / "target.wav")[0] == pytest.approx(waves[0], abs=1e-4)
