"""Full fine-tuning of an RVC v2 voice on a folder of recordings.

    python train.py                                       # demo: small base, synthetic voices, two minutes on a CPU
    python train.py --data_dir ~/voice --model pretrained_v2/f0G40k.pth      # ten minutes of a voice, any audio format
    torchrun --nproc_per_node 4 train.py --data_dir ~/voice --model pretrained_v2/f0G40k.pth

Trains every weight of the synthesizer, and the discriminator, which no conversion needs. Leaves outputs/voice_rvc/full/: the
model (checkpoints/best/), voice.index, curves.png, plots/, predictions/ (what the held-out recordings sound like before, at
best and at the end), metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Rate, TrainConfig, cli, parse, setting  # noqa: E402


@dataclass
class Config(TrainConfig):
    model: str = setting("lj1995/VoiceConversionWebUI/pretrained_v2/f0G40k.pth", demo="demo")  # base: .pth, local folder, or demo
    discriminator: str = ""  # its weights; empty: those beside the base (f0D40k.pth), else new ones
    content: str = ""  # features of what is said: hubert:<name or folder>, or dsp; empty: those that the base was trained on
    f0_method: Literal["auto", "harvest", "dio", "pyin", "swift", "crepe"] = "auto"  # pitch tracker; auto: the best that is there
    speakers: Literal["auto", "one", "folders"] = "auto"  # whose voices: all files are one, or each folder; auto: by its number
    gan: bool = setting(True, demo=False)  # train against a discriminator; --no_gan suits less than a minute of a voice
    index: bool = True  # leave voice.index, by which infer draws content towards what the voice said in training
    cache: Literal["auto", "off"] = "auto"  # keep decoded clips in memory, up to a quarter of what is free
    epochs: int = setting(100, demo=40)  # passes over the training data
    batch_size: int = 4  # clips per process and backward pass
    lr_disc: Rate = 1e-4  # of the discriminator, whose every weight moves
    max_grad_norm: float = 1000.0  # the mel loss counts 45 times, so norms of hundreds are common; only explosions are cut
    patience: int = setting(25, demo=0)  # a voice that trains too long sounds robotic: stop after so many epochs without gain
    lr: float = setting(1e-4, demo=2e-3)  # every weight moves, so a fraction of the step of train_lora.py


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.lora import count_parameters
    from common.optim import build_optimizer
    from common.run import Run
    from common.saved_models import save_model
    from data import MODEL_INPUTS, build_loaders, find_voice
    from losses import BETAS, disc_loss, gen_losses, real_slice
    from metrics import evaluate
    from model import (
        VOICE_ROWS,
        card_code,
        load_base,
        load_checkpoint,
        load_discriminator,
        origin,
        start_from,
        with_voices,
    )
    from pages import draw_results
    from voice_index import save_index

    with Run(config, task="voice_rvc", method="full") as run:
        # Before a base is fetched: the path may be wrong.
        found = find_voice(config.data_dir, config.speakers, config.seed, config.exclude)
        base, voice, base_facts = load_base(config.model)
        train_loader, val_loader, voice, data_facts = build_loaders(config, voice, found)
        run.describe(base=base_facts, data=data_facts)

        # 1. The base, with rows for these speakers. Every weight trains.
        model = with_voices(base, voice)
        about = origin(run.method, model, base_facts, config, voice)
        start_from(config.start_from, model)
        run.describe(parameters=count_parameters(model))  # of what is kept, without the discriminator's
        steps = run.total_steps(train_loader)
        optimizer, scheduler = build_optimizer(model, config, steps, new=model.new_layers, no_decay=(VOICE_ROWS,), betas=BETAS)
        gan = ()
        if config.gan:
            disc = load_discriminator(config.discriminator, config.model, voice.config)
            groups = [{"params": list(disc.parameters()), "lr": config.lr_disc}]
            gan = (disc, *build_optimizer(disc, config, steps, groups, betas=BETAS))
        model, optimizer, scheduler, *gan = run.prepare(model, optimizer, scheduler, *gan)

        # 2. Train; keep the model whose conversions come closest to the held-out recordings.
        sounds = run.folder / "predictions"  # what a few held-out clips sound like before, and after the epoch that was last
        for epoch in run.epochs(val_loader, before=lambda: evaluate(run.unwrap(model), val_loader, sounds / "before")):
            model.train()
            for batch in run.batches(train_loader, epoch):
                out = model(*(batch[key] for key in MODEL_INPUTS))
                real = real_slice(batch["wave"], out, voice.config)
                if gan:  # first the discriminator learns to tell made from real, then the model to deceive it
                    disc, disc_optimizer, disc_scheduler = gan
                    run.backward(disc_loss(disc, real, out.wave.detach()), name="disc")
                    run.step_optimizer(disc_optimizer, disc_scheduler)
                    with run.frozen(disc) as critic:
                        parts = gen_losses(out, real, voice.config, critic)
                else:
                    parts = gen_losses(out, real, voice.config)
                run.backward(sum(parts.values()), name="gen", **parts)
                run.step_optimizer(optimizer, scheduler)
            if run.end_epoch(evaluate(run.unwrap(model), val_loader, sounds / "last"), best="mcd", higher_is_better=False):
                save_model(run.best, run.unwrap(model), voice, about, run.card(**card_code(about)))

        # 3. What it sounds like with the best model as read back from disk; then the record to compare with train_lora.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, device=run.device)
                draw_results(best, val_loader.dataset, run.folder)
            with run.guard("voice.index"):
                if config.index:
                    save_index(run.folder / "voice.index", train_loader.dataset)
        run.finish()


if __name__ == "__main__":
    cli(main)
