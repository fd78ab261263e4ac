"""Trains the small base of the voice demo from scratch; called by make_demo_base.py.

An RVC synthesizer of 0.8 million weights at 16 kHz on eight synthetic speakers, without a discriminator, with the losses of the
task's own scripts. Content is the dsp features, F0 the one that the sentences were made with.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from base_training import start, train, write_card
from common.config import BatchSize, Count, Rate, Seed

VOICE = Path(__file__).resolve().parents[1] / "voice_rvc"
CROP = 64  # frames of 10 ms that a step sees of a sentence
KL_WARMUP = 0.4  # share of the steps over which the KL loss grows to its full weight
NEW_ROWS = 8  # the first rows of the speakers' table are left to new voices, who start at the mean of the known ones


@dataclass
class VoiceBaseConfig:
    output_dir: str = str(VOICE / "demo_base")  # folder to write
    seed: Seed = 0  # of weights, sentences and crops
    steps: Count = 2000  # optimizer steps
    batch_size: BatchSize = 8  # crops a step
    lr: Rate = 2e-3  # constant for four tenths of the steps, then down by a cosine
    sentences: Count = 30  # that each speaker says, all different; fewer where fewer are seen


def make_voice(config):
    """Trains the base, writes it to config.output_dir, reads it back and measures it on sentences that nobody has seen."""
    import torch

    start(config)
    sys.path.insert(0, str(VOICE))
    from losses import BETAS, gen_losses, real_slice
    from model import Voice, load_base
    from synthesizer import Synthesizer
    from synthetic import speakers

    started = time.process_time()  # of this thread, however busy the machine
    architecture = small_architecture(NEW_ROWS + len(speakers()))
    model = Synthesizer(architecture).train()
    count = min(config.sentences, config.steps * config.batch_size // len(speakers()) + 1)
    clips = [
        spoken(config.seed + 1, "train", i * count + n + 1, i, architecture) for i in range(len(speakers())) for n in range(count)
    ]
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, weight_decay=1e-4)

    def loss_of(step, rows):
        batch = crops_of([clips[row] for row in rows], generator, architecture.hop)
        out = model(*(batch[key] for key in ("phone", "lengths", "pitch", "f0", "spec", "sid")))
        losses = gen_losses(out, real_slice(batch["wave"], out, architecture), architecture)
        # Before the latent has anything to say, KL would empty it, and it fills but slowly again.
        losses["kl"] = losses["kl"] * min(step / (KL_WARMUP * config.steps), 1)
        return sum(losses.values())

    train(model, optimizer, config, len(clips), generator, loss_of)
    rows = model.emb_g.weight.data
    rows[:NEW_ROWS] = rows[NEW_ROWS:].mean(0)
    seconds = time.process_time() - started

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder, half=True)  # two bytes a weight
    Voice(architecture, "dsp").save_pretrained(folder)
    reloaded, _, facts = load_base(str(folder.resolve()))
    held_out = [spoken(config.seed + 1, "test", n, (n - 1) % len(speakers()), architecture) for n in range(1, min(16, count) + 1)]
    trained, loaded = (mean_distortion(m, held_out) for m in (model, reloaded))
    assert abs(trained - loaded) < 0.1, f"trained {trained}, reloaded {loaded}"
    names = ", ".join(speaker.name for speaker in speakers())
    facts = {"count": len(clips), "held_out": len(held_out), "mcd": loaded, "names": names, "sha256": facts["sha256"]}
    write_card(folder, VOICE_CARD, model, config, seconds, new_rows=NEW_ROWS, last_new=NEW_ROWS - 1, **facts)
    print(f"{folder}: {loaded:.2f} dB distortion on {len(held_out)} fresh sentences of the known speakers, {seconds:.0f} s")


VOICE_CARD = """\
# Small RVC synthesizer, the base of the voice demo

`config.json` and `model.safetensors` are a synthesizer with RVC v2's layers and names for 16 kHz, in half precision:
{weights:,} weights. `voice.json` says that its content features are mel cepstra (dsp). It knows eight synthetic speakers of
`voice_rvc/synthetic.py`, in rows {new_rows} to 15 of `emb_g`: {names}.
Rows 0 to {last_new} hold the mean of these, where new voices start. It says vowels and hisses, and no language. It is there to
learn and to test with.

Made from scratch by `python scripts/make_demo_base.py voice`: {steps} steps in batches of {batch} from {count} sentences,
seed {seed}; {minutes:.1f} minutes on one CPU thread. sha256 of the weights that convert:
{sha256}.

On {held_out} fresh sentences, by the speaker's own content, F0 and row: mel-cepstral distortion {mcd:.2f} dB.
"""


def small_architecture(speakers):
    """RVC v2 with few channels and short mel cepstra for content: 815,882 weights with 16 speakers."""
    from synthesizer import VoiceConfig

    return VoiceConfig(
        sample_rate=16000,
        n_fft=1024,
        hop=160,
        win=1024,
        mels=80,
        content_width=13,
        inter_channels=32,
        hidden_channels=32,
        filter_channels=128,
        n_layers=2,
        resblock_kernels=(3, 7),
        resblock_dilations=((1, 3, 5),) * 2,
        upsample_rates=(10, 4, 2, 2),
        upsample_initial=96,
        upsample_kernels=(20, 8, 4, 4),
        speakers=speakers,
        gin_channels=32,
    )


def spoken(seed, split, number, speaker, architecture):
    """A sentence by speakers()[speaker] as the model gets a prepared clip, T frames: tensors by the names of a batch."""
    import torch

    from content import align, load_content
    from f0 import coarse_pitch
    from slices import HighPass, at_level
    from spectrum import spectrogram
    from synthetic import SAMPLE_RATE, compose, say_sentence, sentence_rng, speakers

    names = (seed, split, number)
    who = speakers()[speaker]
    wave, f0 = say_sentence(compose(sentence_rng(*names)), who, sentence_rng(*names, who))
    wave = at_level(HighPass(SAMPLE_RATE)(wave))
    phone, f0 = align(load_content("dsp")(wave), f0.astype("float32"), len(f0))
    sound = torch.from_numpy(wave)
    return {
        "phone": torch.from_numpy(phone),
        "pitch": torch.from_numpy(coarse_pitch(f0)),
        "f0": torch.from_numpy(f0),
        "spec": spectrogram(sound[None], architecture)[0].T,
        "wave": sound,
        "sid": torch.tensor(NEW_ROWS + speaker),
    }


def crops_of(clips, generator, hop):
    """A batch of CROP frames of each clip, at random places: phone (B, 64, 13), spec (B, 513, 64), wave (B, 64 * 160) ..."""
    import torch

    parts = []
    for clip in clips:
        first = int(torch.randint(len(clip["f0"]) - CROP + 1, (), generator=generator))
        frames, samples = slice(first, first + CROP), slice(first * hop, (first + CROP) * hop)
        parts.append({key: value[samples if key == "wave" else frames] if value.ndim else value for key, value in clip.items()})
    batch = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    return {**batch, "spec": batch["spec"].mT, "lengths": torch.full((len(clips),), CROP)}


def mean_distortion(model, clips):
    """Mel-cepstral distortion in dB over the voiced frames of clips that the model says by their content, F0 and speaker."""
    import torch

    from distances import frame_distortions

    found = []
    for clip in clips:
        torch.manual_seed(0)
        inputs = (clip["phone"][None], torch.tensor([len(clip["f0"])]), clip["pitch"][None], clip["f0"][None], clip["sid"][None])
        with torch.no_grad():
            wave = model.eval().infer(*inputs)[0, 0]
        voiced = clip["f0"].numpy() > 0
        found.append(frame_distortions(clip["wave"].numpy(), wave.numpy(), model.config.sample_rate, voiced))
    return float(sum(each.sum() for each in found) / sum(len(each) for each in found))
