"""A small but real train script over common/, for the tests: the loop of the tasks' scripts on a problem that takes seconds.

    python toy_train.py --output_dir /tmp/x

Trains a three-layer network on 64 noisy samples. Leaves <output_dir>/toy/full/, and in it, beside what every run leaves,
final.safetensors and fingerprint.txt: the weights after the last epoch, and their sha256.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import TrainConfig, cli, parse  # noqa: E402


@dataclass
class Config(TrainConfig):
    epochs: int = 3  # passes over the training data
    batch_size: int = 4  # samples per process and backward pass
    lr: float = 1e-2  # peak learning rate
    warmup_steps: int = 4  # optimizer steps from zero to lr
    samples: int = 64  # training samples
    dropout: float = 0.2  # in front of the last layer
    batch_norm: bool = True  # a layer whose buffers move in training
    augment: bool = True  # noise on the training samples
    best: Literal["score", "val_loss"] = "score"  # the metric that chooses the best epoch
    fault: Literal["none", "nan_loss", "nan_metric", "dead", "crash", "passed_by", "passed_by_later", "bad_file"] = (
        "none"  # what goes wrong, for the tests of failure
    )
    fault_epoch: int = 2  # when it does
    find_unused: bool = False  # whether some batch gives some parameter no gradient; with the fault passed_by, some do
    pause: float = 0.0  # seconds that a batch takes longer, so that a signal finds the run at work


class Samples:
    """x (8,) and y (1,): a smooth function of x, the same in every process; training samples get fresh noise each epoch."""

    def __init__(self, config, split: str):
        import torch

        from common.batches import number_from

        generator = torch.Generator().manual_seed(number_from(config.seed, split))
        self.x = torch.randn(config.samples if split == "train" else 24, 8, generator=generator)
        self.y = torch.sin(self.x[:, :1]) + self.x[:, 1:2] * self.x[:, 2:3]
        self.config, self.split = config, split

    def __len__(self):
        return len(self.x)

    def new_faults(self):
        return [(self.name(7), "file that cannot be read, half of it")] * 2 if self.config.fault == "bad_file" else []

    def name(self, index: int) -> str:
        return f"{self.split}/{index:03d}.txt"

    def __getitem__(self, key):
        import torch

        from common.batches import seeded

        epoch, index = key
        x, y = self.x[index], self.y[index]
        if self.split == "val":
            return {"x": x, "y": y, "index": torch.tensor(index)}
        if self.config.augment:
            with seeded(self.config.seed, epoch, index):
                x = x + 0.1 * torch.randn(x.shape)
        if self.config.fault == "passed_by_later":  # than the first epoch
            x = torch.cat([x[:1].abs() * (1 if epoch == 1 else -1), x[1:]])
        if index == 7 and self.config.fault == "nan_loss" and epoch >= self.config.fault_epoch:
            x = x * float("nan")
        return {"x": x, "y": y}


def collate(samples):
    import torch

    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def build_model(config):
    """Frozen first layer, as a base would be; the rest trains. Called with x and y it gives the mean squared error."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 32).requires_grad_(False)
            self.norm = nn.BatchNorm1d(32) if config.batch_norm else nn.LayerNorm(32)
            self.second = nn.Linear(32, 32)
            self.dropout = nn.Dropout(config.dropout)
            self.last = nn.Linear(32, 1)
            if config.fault in ("dead", "passed_by", "passed_by_later"):
                self.unused = nn.Linear(32, 1)

        def forward(self, x, y=None):
            h = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))
            out = self.last(self.dropout(h))
            if config.fault.startswith("passed_by") and x[0, 0] > 0:  # as a part that learns from boxes, where there are some
                out = out + self.unused(h)
            return out if y is None else ((out - y) ** 2).mean()

    return Model()


def evaluate(model, loader, epoch: int, config) -> dict:
    import torch

    from common.runtime import gather_lists

    model.eval()
    errors = []
    with torch.no_grad():
        for batch in loader:
            error = (model(batch["x"]) - batch["y"]).flatten()
            errors += zip(batch["index"].tolist(), error.tolist(), strict=True)
    errors = dict(sorted(gather_lists(errors)))  # each sample once, in one order, whichever process had it
    loss = sum(e * e for e in errors.values()) / len(errors)
    if config.fault == "nan_metric" and epoch == config.fault_epoch:
        loss = math.nan
    return {"val_loss": loss, "score": 1 / (1 + loss), "per_class_error": {"all": loss}}


def main(argv=None):
    config = parse(Config, argv)

    import torch
    from safetensors.torch import save_file

    from common.batches import EpochBatches, EvalBatches, build_loader
    from common.checkpoint import atomic_folder, fingerprint, write_text
    from common.optim import build_optimizer
    from common.run import Run
    from common.runtime import process_index

    with Run(config, task="toy", method="full") as run:
        rank, world = process_index()
        train, val = Samples(config, "train"), Samples(config, "val")
        sampler = EpochBatches(len(train), config.batch_size, config.seed, rank, world)
        train_loader = build_loader(train, sampler, collate, config.num_workers)
        val_loader = build_loader(val, EvalBatches([0] * len(val), config.batch_size, rank, world), collate)
        model = build_model(config)
        data = {"x": train.x, "y": train.y}
        run.describe(
            base={"name": "toy", "sha256": fingerprint(model.first.state_dict())},
            data={
                "name": "noise",
                "sha256": fingerprint(data),
                "format": "toy",
                "train": len(train),
                "val": len(val),
                "left_out": {},
            },
        )
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader))
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler, find_unused=config.find_unused)

        for epoch in run.epochs(before=lambda: evaluate(model, val_loader, 0, config)):
            model.train()
            for batch in run.batches(train_loader, epoch):
                if config.pause:
                    print(f"at work on a batch of epoch {epoch}", flush=True)
                    time.sleep(config.pause)
                if config.fault == "crash" and epoch >= config.fault_epoch:
                    raise ZeroDivisionError("a fault in the script")
                loss = model(**batch)
                run.backward(loss)
                run.step_optimizer(optimizer, scheduler)
            if run.end_epoch(evaluate(model, val_loader, epoch, config), config.best, config.best == "score"):
                with atomic_folder(run.best) as folder:
                    save_file(dict(run.unwrap(model).state_dict()), folder / "model.safetensors")

        if run.is_main:
            weights = {name: tensor.detach().clone() for name, tensor in run.unwrap(model).state_dict().items()}
            save_file(weights, run.folder / "final.safetensors")
            write_text(run.folder / "fingerprint.txt", fingerprint(weights) + "\n")
        run.finish()
    return torch.get_num_threads()


if __name__ == "__main__":
    cli(main)
