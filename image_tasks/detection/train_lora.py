"""LoRA fine-tuning of a DETR-family detector on your own boxes.

    python train_lora.py                                  # demo: small base, synthetic shapes, two minutes on a CPU
    python train_lora.py --data_dir ~/boxes               # facebook/detr-resnet-50 on your COCO, VOC or YOLO folder
    torchrun --nproc_per_node 4 train_lora.py --data_dir ~/boxes

Trains low-rank adapters in the layers that --lora_targets names, and the class and box heads; all else stays frozen.
Leaves outputs/detection/lora/: the adapter (checkpoints/best/), curves.png, plots/, predictions/, metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import LoraTrainConfig, PictureSize, cli, parse, setting  # noqa: E402


@dataclass
class Config(LoraTrainConfig):
    model: str = setting("facebook/detr-resnet-50", demo="demo")  # base: hub name, local folder, or demo
    data_format: Literal["auto", "coco", "voc", "yolo"] = "auto"  # layout of data_dir; auto looks what is there
    image_size: PictureSize = 0  # the model sees pictures of N x N pixels; 0: as the base was trained
    augment: bool = True  # random flip, crop and colour in training; never in evaluation
    cache: Literal["auto", "off"] = "auto"  # keep decoded pictures in memory, up to a quarter of what is free
    epochs: int = setting(30, demo=8)  # passes over the training data
    batch_size: int = setting(8, demo=16)  # pictures per process and backward pass
    warmup_steps: float = setting(0.2, demo=50)  # a detector needs a long rise to lr; below 1 it is a share of all steps
    max_grad_norm: float = setting(0.1, demo=1.0)  # DETR's own 0.1; the small base learns faster with 1
    lr: float = setting(2e-4, demo=8e-3)  # few weights move, so several times the step of train.py
    lora_r: int = setting(8, demo=6)  # rank: the width of the bottleneck; 0 trains the heads alone
    lora_alpha: int = 16  # the update is scaled by lora_alpha / lora_r
    lora_targets: str = setting("all-linear", demo="all")  # qv, all-linear, all (convolutions, too), or a regex


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from peft import LoraConfig

    from common.bases import train_mode
    from common.optim import build_optimizer
    from common.peft_adapters import add_adapter
    from common.run import Run
    from common.saved_models import save_lora
    from data import build_loaders, read_tables
    from metrics import evaluate
    from model import (
        HEADS,
        card_code,
        check_size,
        denoises,
        load_base,
        load_checkpoint,
        lora_targets,
        origin,
        start_from,
        with_classes,
    )
    from pages import draw_results

    with Run(config, task="detection", method="lora" if config.lora_r else "head") as run:
        # Before a base is fetched: the path may be wrong.
        tables = read_tables(config.data_dir, config.data_format, config.seed, exclude=config.exclude)
        base, processor, base_facts = load_base(config.model)
        check_size(base, processor, config.image_size)
        train_loader, val_loader, classes, data_facts = build_loaders(config, processor, tables)
        run.describe(base=base_facts, data=data_facts)

        # 1. The base, frozen: W x becomes W x + (alpha / r) B A x in the target layers. The heads train whole.
        model = with_classes(base, classes, data_facts["most_boxes"])
        about = origin(run.method, model, base_facts, config)
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(model, config.lora_targets, config.lora_last_k, config.lora_r),
        )
        model = add_adapter(model, lora, HEADS, frozen_dtype=config.frozen_dtype)
        start_from(config.start_from, model)
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader), new=model.new_layers)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler, find_unused=denoises(model))

        # 2. Train; keep the adapter with the best validation mAP.
        for epoch in run.epochs(val_loader, before=lambda: evaluate(model, processor, val_loader, classes)):
            train_mode(model)
            for batch in run.batches(train_loader, epoch):
                outputs = model(**batch)
                run.backward(outputs.loss, **outputs.loss_dict)
                run.step_optimizer(optimizer, scheduler)
            metrics = evaluate(model, processor, val_loader, classes)
            if run.end_epoch(metrics, best="map"):
                about["threshold"] = metrics["f1_threshold"]  # which infer takes with --threshold best
                save_lora(run.best, run.unwrap(model), processor, about, run.card(**card_code(about)))

        # 3. What it finds, drawn with the best adapter as read back from disk; then the record to compare with train.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, base=config.model, device=run.device)
                draw_results(best, processor, val_loader.dataset, classes, run.folder)
        run.finish()


if __name__ == "__main__":
    cli(main)
