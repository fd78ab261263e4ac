"""Full fine-tuning of the SAM 3D Objects mesh decoder on organs of your own scans.

    python train.py                                       # demo: small base, synthetic organs, two minutes on a CPU
    python train.py --data_dir ~/Totalsegmentator_dataset --organs kidney_left,kidney_right --model demo
    python train.py --data_dir ~/Task04_Hippocampus --model slat_decoder_mesh.ckpt --crop 400    # the official weights

Trains every weight of the decoder; the encoder stays frozen, but for that of a base that has none. Leaves
outputs/medical_sam3d/full/: the model (checkpoints/best/), curves.png, predictions/ (meshes of held-out organs over their true
masks), metrics.jsonl, summary.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import CountOrZero, Range, TrainConfig, cli, parse, setting  # noqa: E402


@dataclass
class Config(TrainConfig):
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
    lr: float = setting(1e-4, demo=4e-3)  # every weight moves, so a fraction of the step of train_lora.py


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.optim import build_optimizer
    from common.run import Run
    from common.saved_models import save_model
    from data import build_loaders, find_organs
    from losses import mesh_losses
    from metrics import evaluate
    from model import card_code, freeze_encoder, load_base, load_checkpoint, origin, say_memory, set_up, start_from
    from pages import draw_results

    with Run(config, task="medical_sam3d", method="full") as run:
        # Before a base is fetched: the path may be wrong.
        found = find_organs(config.data_dir, config.organs, config.seed, config.exclude)
        base, processor, base_facts = load_base(config.model)
        model, processor = set_up(base, processor, config)
        train_loader, val_loader, processor, data_facts = build_loaders(config, processor, found)
        run.describe(base=base_facts, data=data_facts)

        # 1. The base. Every weight of the decoder trains.
        about = origin(run.method, base_facts, config)
        model = freeze_encoder(model)
        start_from(config.start_from, model)
        optimizer, scheduler = build_optimizer(model, config, run.total_steps(train_loader), new=model.new_layers)
        say_memory(model, train_loader.dataset, config)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)

        # 2. Train; keep the model whose meshes overlap best with the held-out organs.
        for epoch in run.epochs(val_loader, before=lambda: evaluate(run.unwrap(model), val_loader)):
            model.train()
            for batch in run.batches(train_loader, epoch):
                cubes = model(batch["coords"], batch["inputs"])
                parts = mesh_losses(cubes, batch, config.mesh_loss)
                run.backward(sum(parts.values()), **parts)
                run.step_optimizer(optimizer, scheduler)
            if run.end_epoch(evaluate(run.unwrap(model), val_loader), best="dice"):
                save_model(run.best, run.unwrap(model), processor, about, run.card(**card_code(about)))

        # 3. Meshes by the best model as read back from disk; then the record to compare with train_lora.py's.
        if run.is_main:
            with run.guard("the pictures"):
                best, _, _ = load_checkpoint(run.best, device=run.device)
                draw_results(best, val_loader, run.folder)
        run.finish()


if __name__ == "__main__":
    cli(main)
