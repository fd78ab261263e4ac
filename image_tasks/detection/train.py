"""Full fine-tuning of a DETR-family detector on your own boxes.

    python train.py                                  # demo: small base, synthetic shapes, two minutes on a CPU
    python train.py --data_dir ~/boxes               # facebook/detr-resnet-50 on your COCO, VOC or YOLO folder
    torchrun --nproc_per_node 4 train.py --data_dir ~/boxes

Trains every weight, the convolutional backbone at a lower rate than the transformer.
Leaves outputs/detection/full/: the model (checkpoints/best/), curves.png, plots/, predictions/, metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import PictureSize, Rate, TrainConfig, cli, parse, setting  # noqa: E402


@dataclass
class Config(TrainConfig):
    model: str = setting("facebook/detr-resnet-50", demo="demo")  # base: hub name, local folder, or demo
    data_format: Literal["auto", "coco", "voc", "yolo"] = "auto"  # layout of data_dir; auto looks what is there
    image_size: PictureSize = 0  # the model sees pictures of N x N pixels; 0: as the base was trained
    augment: bool = True  # random flip, crop and colour in training; never in evaluation
    cache: Literal["auto", "off"] = "auto"  # keep decoded pictures in memory, up to a quarter of what is free
    epochs: int = setting(30, demo=8)  # passes over the training data
    batch_size: int = setting(8, demo=16)  # pictures per process and backward pass
    warmup_steps: float = setting(0.2, demo=50)  # a detector needs a long rise to lr; below 1 it is a share of all steps
    max_grad_norm: float = setting(0.1, demo=1.0)  # DETR's own 0.1; the small base learns faster with 1
    lr: float = setting(5e-5, demo=2e-3)  # every weight moves, so a fraction of the step of train_lora.py
    lr_backbone: Rate = setting(5e-6, demo=2e-3)  # DETR trains its backbone at a tenth; the small base needs no care


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.bases import train_mode
    from common.optim import build_optimizer
    from common.run import Run
    from common.saved_models import save_model
    from common.trial import freeze_unused
    from data import build_loaders, read_tables
    from metrics import evaluate
    from model import (
        backbone_groups,
        card_code,
        check_size,
        denoises,
        lesson,
        load_base,
        load_checkpoint,
        origin,
        start_from,
        with_classes,
    )
    from pages import draw_results

    with Run(config, task="detection", method="full") as run:
        # Before a base is fetched: the path may be wrong.
        tables = read_tables(config.data_dir, config.data_format, config.seed, exclude=config.exclude)
        base, processor, base_facts = load_base(config.model)
        check_size(base, processor, config.image_size)
        train_loader, val_loader, classes, data_facts = build_loaders(config, processor, tables)
        run.describe(base=base_facts, data=data_facts)

        # 1. The base with a head for these classes. Every weight trains.
        model = with_classes(base, classes, data_facts["most_boxes"])
        freeze_unused(model, lesson)
        about = origin(run.method, model, base_facts, config)
        groups = backbone_groups(model, config.lr, config.lr_backbone)
        start_from(config.start_from, model)
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader), groups, new=model.new_layers)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler, find_unused=denoises(model))

        # 2. Train; keep the model with the best validation mAP.
        for epoch in run.epochs(val_loader, before=lambda: evaluate(model, processor, val_loader, classes)):
            train_mode(model)
            for batch in run.batches(train_loader, epoch):
                outputs = model(**batch)
                run.backward(outputs.loss, **outputs.loss_dict)
                run.step_optimizer(optimizer, scheduler)
            metrics = evaluate(model, processor, val_loader, classes)
            if run.end_epoch(metrics, best="map"):
                about["threshold"] = metrics["f1_threshold"]  # which infer takes with --threshold best
                save_model(run.best, run.unwrap(model), processor, about, run.card(**card_code(about)))

        # 3. What it finds, drawn with the best model as read back from disk; then the record to compare with train_lora.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, device=run.device)
                draw_results(best, processor, val_loader.dataset, classes, run.folder)
        run.finish()


if __name__ == "__main__":
    cli(main)
