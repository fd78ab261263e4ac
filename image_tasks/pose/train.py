"""Full fine-tuning of a ViT-family backbone with a keypoint head on your own keypoints.

    python train.py                                  # demo: small base, synthetic figures, a minute on a CPU
    python train.py --data_dir ~/points              # google/vit-base-patch16-224 on your COCO keypoints, CSV or YOLO
    torchrun --nproc_per_node 4 train.py --data_dir ~/points --model usyd-community/vitpose-base-simple

Trains every weight, backbone and head.
Leaves outputs/pose/full/: the model (checkpoints/best/), curves.png, plots/, predictions/, metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import PictureSize, TrainConfig, cli, parse, setting  # noqa: E402


@dataclass
class Config(TrainConfig):
    model: str = setting("google/vit-base-patch16-224", demo="demo")  # base: hub name, local folder, or demo
    head: Literal["heatmap", "regression"] = "heatmap"  # heatmaps are more exact; regression is smaller and faster
    data_format: Literal["auto", "coco", "csv", "yolo"] = "auto"  # layout of data_dir; auto looks what is there
    image_size: PictureSize = 0  # the model sees pictures of N x N pixels; 0: as the base was trained
    augment: bool = True  # random turn, size, place, mirroring and colour in training; never in evaluation
    cache: Literal["auto", "off"] = "auto"  # keep decoded pictures in memory, up to a quarter of what is free
    epochs: int = setting(30, demo=25)  # passes over the training data
    batch_size: int = setting(32, demo=16)  # figures per process and backward pass
    warmup_steps: float = setting(0.1, demo=20)  # from zero to lr: below 1 a share of all steps, else a number of them
    lr: float = setting(5e-5, demo=2e-3)  # every weight moves, so a fraction of the step of train_lora.py


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.optim import build_optimizer
    from common.run import Run
    from common.saved_models import save_model
    from common.trial import freeze_unused
    from data import Preprocess, build_loaders, read_tables
    from metrics import evaluate
    from model import (
        answer,
        card_code,
        input_size,
        keypoint_loss,
        load_base,
        load_checkpoint,
        origin,
        start_from,
        with_head,
    )
    from pages import draw_results

    with Run(config, task="pose", method="full") as run:
        # Before a base is fetched: the path may be wrong.
        tables = read_tables(config.data_dir, config.data_format, config.seed, exclude=config.exclude)
        base, processor, base_facts = load_base(config.model)
        size = input_size(base, config.image_size)
        train_loader, val_loader, points, data_facts = build_loaders(config, Preprocess(processor, size), tables)
        run.describe(base=base_facts, data=data_facts)

        # 1. The base with a head for these keypoints. Every weight trains.
        model = with_head(base, points, config.head, size)
        freeze_unused(model, answer)
        about = origin(run.method, model, base_facts, config)
        start_from(config.start_from, model)
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader), new=model.new_layers)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)

        # 2. Train; keep the model with the smallest error on the validation data.
        for epoch in run.epochs(val_loader, before=lambda: evaluate(model, val_loader, points)):
            model.train()
            for batch in run.batches(train_loader, epoch):
                coords, _, heatmaps = model(batch["pixel_values"])
                loss = keypoint_loss(coords, batch["target"], batch["visible"], heatmaps)
                run.backward(loss)
                run.step_optimizer(optimizer, scheduler)
            if run.end_epoch(evaluate(model, val_loader, points), best="pixel_error", higher_is_better=False):
                save_model(run.best, run.unwrap(model), processor, about, run.card(**card_code(about)))

        # 3. What it finds, drawn with the best model as read back from disk; then the record to compare with train_lora.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, device=run.device)
                draw_results(best, val_loader.dataset, points, run.folder)
        run.finish()


if __name__ == "__main__":
    cli(main)
