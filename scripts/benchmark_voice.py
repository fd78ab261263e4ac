"""What the benchmark does otherwise for a voice: two models and two optimizers, adapters of our own, answers that are sound.

The imports of voice_rvc's modules wait until scripts/benchmark.py has put the task's folder on the path.
"""

REAL_FRAMES = 370  # 3.7 s, the longest clip that RVC cuts
DEMO_FRAMES = 200


def build_voice(real: bool):
    """(synthesizer, what trains whole, one clip, the loss without a discriminator), as the other tasks' builders give them."""
    import torch

    from losses import gen_losses, real_slice
    from model import VOICE_ROWS, load_base
    from synthesizer import Synthesizer, VoiceConfig

    model = Synthesizer(VoiceConfig()) if real else load_base("demo")[0]
    config, frames = model.config, REAL_FRAMES if real else DEMO_FRAMES
    f0 = 100 + 100 * torch.rand(frames)
    sample = {"phone": torch.randn(frames, config.content_width), "lengths": torch.tensor(frames), "pitch": (f0 / 2).long()}
    sample |= {"f0": f0, "spec": torch.rand(config.bins, frames), "sid": torch.tensor(0)}
    sample["wave"] = 0.1 * torch.randn(frames * config.hop)

    def loss(model, batch):
        out = speak(model, batch)
        return sum(gen_losses(out, real_slice(batch["wave"], out, config), config).values())

    return model, [VOICE_ROWS], sample, loss


def speak(model, batch):
    return model(*(batch[key] for key in ("phone", "lengths", "pitch", "f0", "spec", "sid")))


def adapt_voice(model, config, _):
    from model import add_lora

    return add_lora(model, config)


def train_voice(bench, run, model, config, loader) -> None:
    """The loop of the voice's train scripts, with a tick before each step and after the last."""
    from common.optim import build_optimizer
    from discriminator import SMALL_PERIODS, Discriminator
    from losses import BETAS, disc_loss, gen_losses, real_slice

    steps, voice = run.total_steps(loader), model.config
    optimizer, scheduler = build_optimizer(model, config, steps, betas=BETAS)
    gan = ()
    if config.gan:
        disc = Discriminator() if bench.real else Discriminator(SMALL_PERIODS, width=1 / 16)
        groups = [{"params": list(disc.parameters()), "lr": config.lr_disc}]
        gan = (disc, *build_optimizer(disc, config, steps, groups, betas=BETAS))
    model, optimizer, scheduler, *gan = run.prepare(model, optimizer, scheduler, *gan)
    model.train()
    for batch in run.batches(loader, 1):
        bench.tick()
        out = speak(model, batch)
        real = real_slice(batch["wave"], out, voice)
        if gan:
            disc, disc_optimizer, disc_scheduler = gan
            run.backward(disc_loss(disc, real, out.wave.detach()), name="disc")
            run.step_optimizer(disc_optimizer, disc_scheduler)
            with run.frozen(disc) as critic:
                parts = gen_losses(out, real, voice, critic)
        else:
            parts = gen_losses(out, real, voice)
        run.backward(sum(parts.values()), name="gen", **parts)
        run.step_optimizer(optimizer, scheduler)
    bench.tick()


def convert_clip(model, batch):
    """A conversion from content features and F0 on, which take their time besides."""
    return model.infer(*(batch[key] for key in ("phone", "lengths", "pitch", "f0", "sid")))


def seconds_of_sound(model, sample) -> float:
    return int(sample["lengths"]) * model.config.hop / model.config.sample_rate


def voice_loader(config):
    from data import build_loaders, find_voice
    from model import load_base

    return build_loaders(config, load_base("demo")[1], find_voice(config.data_dir, config.speakers, config.seed))[0]
