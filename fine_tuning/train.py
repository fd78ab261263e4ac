"""Full fine-tuning of CLIP's image tower on dog breeds, or on classes of your own.

    python train.py                                  # demo: small base, synthetic breeds, a minute on a CPU
    python train.py --data_dir ../data/dogs          # openai/clip-vit-base-patch32 on what prepare_dog_dataset.py made

Trains every weight of the image tower, and the classifier.
Leaves outputs/clip/full/: the model (checkpoints/best/), curves.png, plots/, predictions/, metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Range, TrainConfig, cli, parse, setting  # noqa: E402


@dataclass
class Config(TrainConfig):
    model: str = setting("openai/clip-vit-base-patch32", demo="demo")  # base: a CLIP or SigLIP by hub name, local folder, or demo
    head: Literal["auto", "zero_shot", "random"] = "auto"  # the classifier's start; auto: zero_shot if the base can read texts
    prompts: str = setting(
        "a photo of a {label}, a type of dog|a close-up photo of a {label}, a dog|a photo of the dog breed {label}",
        demo="a photo of a {label}",
    )  # sentences for the zero-shot head, separated by |; for anything but dogs give your own
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class counts the same in the loss, however many it has
    flip: bool = True  # mirror training pictures at random; off where left and right differ, as in letters
    crop: Annotated[float, Range(0.01, 1)] = setting(0.7, demo=0.9)  # random crops hold at least this share of the area; 1: none
    randaugment: Annotated[int, Range(0, 30)] = 0  # strength of RandAugment; 0: none
    mixup: Annotated[float, Range(0, 100)] = 0.0  # blend training pictures in pairs, shares from Beta(mixup, mixup); 0: never
    cache: Literal["auto", "off"] = "auto"  # keep decoded pictures in memory, up to a quarter of what is free
    epochs: int = setting(10, demo=15)  # passes over the training data
    batch_size: int = 32  # pictures per process and backward pass
    warmup_steps: float = setting(0.1, demo=20)  # from zero to lr: below 1 a share of all steps, else a number of them
    lr_head: float = 1e-4  # least peak rate of a random head, whose input is long (scale 100); a zero-shot head learns at lr
    weight_decay: float = 0.01  # pulls matrices towards zero; biases and norms are left alone
    lr: float = setting(1e-5, demo=1e-3)  # every weight moves, so a fraction of the step of train_lora.py
    layer_decay: Annotated[float, Range(0.01, 1)] = setting(0.95, demo=1.0)  # of each block's rate to the next's; 1: all alike


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from torch.nn.functional import cross_entropy

    from common.bases import train_mode
    from common.optim import build_optimizer
    from common.run import Run
    from common.saved_models import save_model
    from common.trial import freeze_unused
    from common.vision.labelled import class_weights
    from common.vision.scoring import evaluate
    from data import build_loaders, read_tables
    from metrics import draw_results
    from model import (
        answer,
        card_code,
        layer_groups,
        load_base,
        load_checkpoint,
        origin,
        start_from,
        with_head,
    )

    with Run(config, task="clip", method="full") as run:
        # Before a base is fetched: the path may be wrong.
        tables = read_tables(config.data_dir, config.seed, config.exclude)
        tower, processor, base_facts = load_base(config.model)
        train_loader, val_loader, classes, data_facts = build_loaders(config, processor, tables)
        run.describe(base=base_facts, data=data_facts)
        weights = class_weights(config.class_weights, train_loader.dataset, run.device)

        # 1. The image tower with a classifier. Every weight trains, early layers perhaps slower than late ones.
        model = with_head(tower, classes, config.model, config.head, config.prompts)
        freeze_unused(model, answer)
        groups = layer_groups(model, config.lr, config.layer_decay)
        start_from(config.start_from, model)
        about = origin(run.method, classes, model, base_facts, config)
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader), groups, new=model.new_layers)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)

        # 2. Train; keep the model with the best validation accuracy, every class counting the same.
        for epoch in run.epochs(val_loader, before=lambda: evaluate(model, val_loader, classes)):  # zero-shot head: CLIP as it is
            train_mode(model)
            for batch in run.batches(train_loader, epoch):
                logits = model(pixel_values=batch["pixel_values"]).logits
                loss = cross_entropy(logits, batch["target"], weight=weights)
                run.backward(loss)
                run.step_optimizer(optimizer, scheduler)
            if run.end_epoch(evaluate(model, val_loader, classes), best="balanced_accuracy"):
                save_model(run.best, run.unwrap(model), processor, about, run.card(**card_code(about)))

        # 3. Plots, with the best model as read back from disk; then the record to compare with train_lora.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, device=run.device)
                draw_results(best, val_loader.dataset, run.folder)
        run.finish()


if __name__ == "__main__":
    cli(main)
