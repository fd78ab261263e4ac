"""LoRA fine-tuning of the SAM 3D Objects mesh decoder on organs of your own scans.

    python train_lora.py                                  # demo: small base, synthetic organs, two minutes on a CPU
    python train_lora.py --data_dir ~/Totalsegmentator_dataset --organs kidney_left,kidney_right --model demo
    python train_lora.py --data_dir ~/Task04_Hippocampus --model slat_decoder_mesh.ckpt --crop 400    # the official weights

Trains low-rank adapters in the layers that --lora_targets names, and the decoder's output layer; all else stays frozen, but
for the encoder of a base that has none. Leaves outputs/medical_sam3d/lora/: the adapter (checkpoints/best/), curves.png,
predictions/ (meshes of held-out organs over their true masks), metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import CountOrZero, LoraTrainConfig, Range, cli, parse, setting  # noqa: E402


@dataclass
class Config(LoraTrainConfig):
    model: str = setting(
        "facebook/sam-3d-objects/checkpoints/slat_decoder_mesh.ckpt", demo="demo"
    )  # base: a decoder's file, local folder, or demo
    organs: str = ""  # names of organs, with commas between them; empty: all that the masks hold
    modality: Literal["auto", "ct", "mr"] = "auto"  # CT: a window of HU; MR: percentiles; auto: as the data says
    every: Annotated[int, Range(1, 100, or_zero=True)] = 0  # the model sees each n-th slice of a mask; 0: as its base did; 1: all
    crop: CountOrZero = 0  # train on blocks of at most so many active cells, which bounds memory; 0: whole organs
    augment: bool = True  # turn, scale and shift the cube around the organ
    latents_dir: str = ""  # latents of the official pipeline, a .npz for each organ; empty: the encoder makes them
    mesh_loss: Annotated[float, Range(0, 100)] = 0.5  # weight of Chamfer distance and normals of the mesh; 0: faster
    gradient_checkpointing: bool = False  # compute the torso twice instead of keeping it: less memory, a third more time
    cache: Literal["auto", "off"] = "auto"  # keep organs in memory, up to a quarter of what is free
    epochs: int = setting(50, demo=15)  # passes over the training data
    batch_size: int = 2  # organs per process and backward pass
    lr: float = setting(1e-3, demo=1e-2)  # few weights move, so several times the step of train.py
    lora_r: int = setting(4, demo=3)  # rank: the width of the bottleneck; 0 trains the output layer alone
    lora_alpha: int = setting(8, demo=6)  # the update is scaled by lora_alpha / lora_r
    lora_rank_pattern: str = ""  # other ranks for some layers, such as to_qkv=8,upsample=2
    lora_targets: str = setting("default", demo="all")  # attention, default (+ MLPs), all (+ convolutions), or a regex


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.optim import build_optimizer
    from common.run import Run
    from common.saved_models import save_lora
    from data import build_loaders, find_organs
    from losses import mesh_losses
    from metrics import evaluate
    from model import card_code, load_base, load_checkpoint, origin, say_memory, set_up, setup_for_finetuning, start_from
    from pages import draw_results

    with Run(config, task="medical_sam3d", method="lora" if config.lora_r else "head") as run:
        # Before a base is fetched: the path may be wrong.
        found = find_organs(config.data_dir, config.organs, config.seed, config.exclude)
        base, processor, base_facts = load_base(config.model)
        model, processor = set_up(base, processor, config)
        train_loader, val_loader, processor, data_facts = build_loaders(config, processor, found)
        run.describe(base=base_facts, data=data_facts)

        # 1. The base, frozen: W x becomes W x + (alpha / r) B A x in the target layers. The output layer trains whole.
        about = origin(run.method, base_facts, config)
        model = setup_for_finetuning(model, config)
        start_from(config.start_from, model)
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader), new=model.new_layers)
        say_memory(model, train_loader.dataset, config)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)

        # 2. Train; keep the adapter whose meshes overlap best with the held-out organs.
        for epoch in run.epochs(val_loader, before=lambda: evaluate(run.unwrap(model), val_loader)):
            model.train()
            for batch in run.batches(train_loader, epoch):
                cubes = model(batch["coords"], batch["inputs"])
                parts = mesh_losses(cubes, batch, config.mesh_loss)
                run.backward(sum(parts.values()), **parts)
                run.step_optimizer(optimizer, scheduler)
            if run.end_epoch(evaluate(run.unwrap(model), val_loader), best="dice"):
                save_lora(run.best, run.unwrap(model), processor, about, run.card(**card_code(about)))

        # 3. Meshes by the best adapter as read back from disk; then the record to compare with train.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, base=config.model, device=run.device)
                draw_results(best, val_loader, run.folder)
        run.finish()


if __name__ == "__main__":
    cli(main)
