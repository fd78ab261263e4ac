"""A small GAN over common/, for the tests: two models, two optimizers and two backward passes a batch.

    python toy_gan.py --output_dir /tmp/x

Generator and discriminator of two layers each, on 64 points of a ring. One has a schedule by step, the other one by epoch; an
average of the generator's weights comes along. Leaves <output_dir>/gan/full/, and in it final.safetensors and
fingerprint.txt: the weights of all three after the last epoch.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import TrainConfig, cli, parse  # noqa: E402


@dataclass
class Config(TrainConfig):
    epochs: int = 3  # passes over the training data
    batch_size: int = 4  # samples per process and backward pass
    lr: float = 5e-3  # peak learning rate of the generator
    lr_disc: float = 2e-3  # of the discriminator, which decays by epoch
    warmup_steps: int = 4  # optimizer steps from zero to lr
    samples: int = 64  # training samples
    dropout: float = 0.2  # in both models
    average: bool = True  # keep an average of the generator's weights
    decay: float = 0.5  # of the discriminator's rate, each epoch
    gen_first: bool = False  # the generator learns before the discriminator
    two_for_gen: bool = False  # one optimizer for the generator's matrices and one for the rest, on the same loss
    fault: Literal[
        "none",
        "nan_disc",
        "nan_gen",
        "forget_disc",
        "forget_gen",
        "unfrozen",
        "unfrozen_gen_first",
        "one_name",
        "late_step",
        "leave",
    ] = "none"
    fault_epoch: int = 2  # when a NaN comes
    pause: float = 0.0  # seconds that a batch takes longer, so that a signal finds the run at work


class Ring:
    """x (2,): a point of the unit circle; z (4,): noise, fresh each epoch; weight (): of the sample in the generator's loss."""

    def __init__(self, config):
        import torch

        angles = torch.arange(config.samples) * (2 * math.pi / config.samples)
        self.x, self.config = torch.stack([angles.cos(), angles.sin()], dim=1), config

    def __len__(self):
        return len(self.x)

    def name(self, index: int) -> str:
        return f"ring/{index:03d}.txt"

    def __getitem__(self, key):
        import torch

        from common.batches import seeded

        epoch, index = key
        with seeded(self.config.seed, epoch, index):
            z = torch.randn(4)
        bad = math.nan if index == 7 and epoch >= self.config.fault_epoch else 1.0
        x = self.x[index] * (bad if self.config.fault == "nan_disc" else 1)
        return {"x": x, "z": z, "weight": torch.tensor(bad if self.config.fault == "nan_gen" else 1.0)}


def build_models(config):
    """(generator: z (B, 4) -> (B, 2), discriminator: (B, 2) -> (B, 1))."""
    from torch import nn

    class Generator(nn.Sequential):
        pass

    class Discriminator(nn.Sequential):
        pass

    def layers(inputs, outputs):
        return nn.Linear(inputs, 16), nn.LeakyReLU(0.1), nn.Dropout(config.dropout), nn.Linear(16, outputs)

    return Generator(*layers(4, 2)), Discriminator(*layers(2, 1))


def disc_loss(real, fake):
    """Least squares: real ones to 1, generated ones to 0."""
    return ((real - 1) ** 2).mean() + (fake**2).mean()


def gen_losses(judged, fake, weight) -> dict:
    """What the discriminator says of them, and how far they are from the circle."""
    radius = fake.square().sum(dim=1, keepdim=True)
    return {"adversarial": (weight[:, None] * (judged - 1) ** 2).mean(), "radius": ((radius - 1) ** 2).mean()}


def evaluate(gen) -> dict:
    import torch

    gen.eval()
    with torch.no_grad():
        z = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        points = gen(z.to(next(gen.parameters()).device))
    return {"off_ring": float((points.norm(dim=1) - 1).abs().mean()), "off_center": float(points.mean(dim=0).norm())}


def main(argv=None):
    config = parse(Config, argv)

    import torch
    from safetensors.torch import save_file

    from common.batches import EpochBatches, build_loader
    from common.checkpoint import atomic_folder, fingerprint, write_text
    from common.optim import build_optimizer
    from common.run import Run
    from common.runtime import process_index

    with Run(config, task="gan", method="full") as run:
        data = Ring(config)
        sampler = EpochBatches(len(data), config.batch_size, config.seed, *process_index())
        loader = build_loader(data, sampler, torch.utils.data.default_collate, config.num_workers)
        run.describe(base={"name": "none", "sha256": "0"}, data={"name": "ring", "sha256": fingerprint({"x": data.x})})

        gen, disc = build_models(config)
        matrices = [p for p in gen.parameters() if p.ndim == 2] if config.two_for_gen else []
        more = [torch.optim.Muon(matrices, lr=config.lr)] if matrices else []
        rest = [p for p in gen.parameters() if all(p is not matrix for matrix in matrices)]
        opt_g, sched_g = build_optimizer(gen, config, run.total_steps(loader), [{"params": rest, "lr": config.lr}])
        opt_d = torch.optim.AdamW(disc.parameters(), lr=config.lr_disc, betas=(0.8, 0.99), fused=True)
        decay_d = torch.optim.lr_scheduler.ExponentialLR(opt_d, config.decay)
        average = torch.optim.swa_utils.AveragedModel(gen, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        gen, disc, opt_g, opt_d, sched_g, decay_d, average, *more = run.prepare(
            gen, disc, opt_g, opt_d, sched_g, decay_d, average, *more
        )

        def teach_disc(batch, fake):
            loss = disc_loss(disc(batch["x"]), disc(fake.detach()))
            run.backward(loss, name="gen" if config.fault == "one_name" else "disc")
            if config.fault not in ("forget_disc", "late_step"):
                run.step_optimizer(opt_d, max_grad_norm=0.5)

        def teach_gen(batch, fake):
            with nullcontext(disc) if config.fault.startswith("unfrozen") else run.frozen(disc) as critic:
                parts = gen_losses(critic(fake), fake, batch["weight"])
            run.backward(sum(parts.values()), name="gen", **parts)
            if config.fault == "late_step":
                run.step_optimizer(opt_d)
            for optimizer in more:
                run.step_optimizer(optimizer, max_grad_norm=1000.0, name="gen_matrices")
            stepped = config.fault != "forget_gen" and run.step_optimizer(opt_g, sched_g, max_grad_norm=1000.0)
            if stepped and config.average:
                average.update_parameters(run.unwrap(gen))

        turns = [teach_disc, teach_gen]
        if config.gen_first or config.fault == "unfrozen_gen_first":
            turns.reverse()
        for epoch in run.epochs(before=lambda: evaluate(run.unwrap(gen))):
            gen.train(), disc.train()
            for batch in run.batches(loader, epoch):
                time.sleep(config.pause)
                if config.fault == "leave" and run.step == 2:
                    break
                fake = gen(batch["z"])
                for turn in turns:
                    turn(batch, fake)
            if run.end_epoch(evaluate(run.unwrap(gen)), "off_ring", higher_is_better=False):
                with atomic_folder(run.best) as folder:
                    save_file(dict(run.unwrap(gen).state_dict()), folder / "model.safetensors")
            decay_d.step()

        if run.is_main:
            models = {"gen": run.unwrap(gen), "disc": run.unwrap(disc), "average": average.module}
            weights = {f"{name}.{k}": v.detach().clone() for name, model in models.items() for k, v in model.state_dict().items()}
            save_file(weights, run.folder / "final.safetensors")
            write_text(run.folder / "fingerprint.txt", fingerprint(weights) + "\n")
        run.finish()


if __name__ == "__main__":
    cli(main)
