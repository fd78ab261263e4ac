"""Trains the small base of the medical demo from scratch; called by make_demo_base.py.

A SLAT mesh decoder and the encoder before it, 0.3 million weights together, learn to see primitives through thick slices with
the losses of the task's own scripts. They see no organ.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base_training import start, train, write_card
from common.config import BatchSize, Count, Rate, Seed

MEDICAL = Path(__file__).resolve().parents[1] / "medical_sam3d"
SEEN_SLICE = 5  # each fifth is seen: slices of about 2 mm as those of 10 mm
HELD_OUT = 20  # primitives that nobody trains on


@dataclass
class MedicalBaseConfig:
    output_dir: str = str(MEDICAL / "demo_base")  # folder to write
    seed: Seed = 0  # of weights, primitives, phases and cubes
    steps: Count = 1800  # optimizer steps
    batch_size: BatchSize = 2  # primitives a step
    lr: Rate = 3e-3  # constant for four tenths of the steps, then down by a cosine
    primitives: Count = 250  # all different, each seen at one phase; fewer where fewer are seen


def make_medical(config):
    """Trains the base, writes it to config.output_dir, reads it back and measures it on primitives that nobody has seen."""
    import torch

    start(config)
    sys.path.insert(0, str(MEDICAL))
    from decoder import DecoderConfig, SLatMeshDecoder
    from latents import LatentEncoder
    from losses import mesh_losses
    from model import OrganMesher, load_base
    from processor import OrganProcessor

    started = time.process_time()  # of this thread, however busy the machine
    # Cells of a ninth of an organ, cubes of a thirty-sixth: as true distances at their corners, organs get a Dice of 0.99.
    small = DecoderConfig(resolution=8, model_channels=64, num_blocks=4, num_heads=4, num_groups=8, use_color=False)
    processor = OrganProcessor(resolution=small.resolution, every=SEEN_SLICE)
    model = OrganMesher(LatentEncoder(len(processor.channels)), SLatMeshDecoder(small)).train()
    count = min(config.primitives, config.steps * config.batch_size)
    views = [thick_view(config.seed, number) for number in range(count)]
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)

    def loss_of(step, rows):
        batch = batch_of(processor, [views[row] for row in rows], np.random.default_rng((config.seed, step)))
        return sum(mesh_losses(model(batch["coords"], batch["inputs"]), batch).values())

    train(model, optimizer, config, count, generator, loss_of)
    seconds = time.process_time() - started

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    reloaded, processor, facts = load_base(str(folder.resolve()))
    held_out = [thick_view(config.seed + 1, number) for number in range(HELD_OUT)]
    trained, loaded = (mean_dice(each, processor, held_out) for each in (model, reloaded))
    assert trained == loaded, f"trained {trained}, reloaded {loaded}"
    filled = float(np.mean([dice(observed.filled, organ.mask) for organ, observed in held_out]))
    facts = {"count": count, "held_out": HELD_OUT, "dice": loaded, "filled": filled, "sha256": facts["sha256"]}
    write_card(folder, MEDICAL_CARD, model, config, seconds, every=SEEN_SLICE, **facts)
    print(f"{folder}: Dice {loaded:.4f} on {HELD_OUT} fresh primitives (interpolation {filled:.4f}), {seconds:.0f} s")


MEDICAL_CARD = """\
# Small SLAT mesh decoder, the base of the medical demo

`config.json` and `model.safetensors` are a decoder with the layers and names of SAM 3D Objects' mesh decoder for a grid of 8
cells a side, with an encoder before it: {weights:,} weights. `processor.json` says how an organ is put before it: as every
{every}th slice shows it, signed distances of the shape in between by interpolation. It knows rounded boxes, tori, capsules,
ellipsoids and two of them blended (`medical_sam3d/synthetic.py`), and no organ. It is there to learn and to test with.

Made from scratch by `python scripts/make_demo_base.py medical`: {steps} steps in batches of {batch} from {count} primitives,
seed {seed}; {minutes:.1f} minutes on one CPU thread. sha256 of its weights:
{sha256}.

On {held_out} fresh primitives: Dice {dice:.4f}; interpolation between the slices alone {filled:.4f}.
"""


def thick_view(seed, number):
    """(organs.Organ, observe.Observed) of a primitive as its thick slices show it: a function of seed and number alone."""
    from observe import observe
    from organs import crop_organ
    from synthetic import draw_masks, primitive_shape
    from volumes import Geometry

    rng = np.random.default_rng((seed, number))
    (mask,), _, affine = draw_masks([primitive_shape(rng)], rng)
    organ = crop_organ(mask, True, Geometry(mask.shape, affine))
    return organ, observe(organ, SEEN_SLICE, int(rng.integers(SEEN_SLICE)))


def batch_of(processor, views, rng):
    """Primitives as a batch (data.collate), each in a cube that rng turns, scales and shifts."""
    from data import as_item, collate
    from processor import augmented

    items = []
    for organ, observed in views:
        frame = augmented(processor.frame_of(observed, organ.affine), rng)
        items.append(as_item(processor.sample(organ, observed, frame), organ, len(items)))
    return collate(items)


def mean_dice(model, processor, views):
    """The model's meshes, back on the voxels, against the true masks."""
    from meshes import mesh_to_mask
    from reconstruct import reconstruct

    meshes = reconstruct(model.eval(), processor, [processor.sample(*view) for view in views])
    return float(
        np.mean(
            [
                dice(mesh_to_mask(m, organ.mask.shape, organ.affine), organ.mask)
                for m, (organ, _) in zip(meshes, views, strict=True)
            ]
        )
    )


def dice(found, mask):
    return 2 * (found & mask).sum() / (found.sum() + mask.sum())
