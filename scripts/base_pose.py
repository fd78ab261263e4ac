"""Trains the small base of the pose demo from scratch; called by make_demo_base.py.

A ViT of half a million weights for 64 x 64 pictures with a heatmap head for five keypoints, on thin light figures on plain dark
ground. Trained with the loss of the task's own scripts.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from base_training import start, train, write_card
from common.config import BatchSize, Count, Rate, Seed

POSE = Path(__file__).resolve().parents[1] / "image_tasks" / "pose"
INPUT_SIZE = 64  # pixels, both sides


@dataclass
class PoseConfig:
    output_dir: str = str(POSE / "demo_base")  # folder to write
    seed: Seed = 0  # of weights, pictures and augmentation
    steps: Count = 1000  # optimizer steps
    batch_size: BatchSize = 32  # pictures a step
    lr: Rate = 1e-3  # constant for four tenths of the steps, then down by a cosine
    pictures: Count = 5000  # source pictures drawn for training, fewer where fewer are seen


def make_pose(config):
    """Trains the base, writes it to config.output_dir, reads it back and measures it on pictures that nobody has seen."""
    import torch

    start(config)
    sys.path.insert(0, str(POSE))
    from keypoints import KeypointSet, flip_pairs_from_names, read_pairs
    from model import NEW_BETA, HeatmapHead, KeypointModel, load_base
    from synthetic import KEYPOINTS, SKELETON

    started = time.time()
    names = list(KEYPOINTS)
    points = KeypointSet(names, read_pairs(SKELETON, names, "synthetic.py"), flip_pairs_from_names(names), [0.05] * 5, True)
    backbone = vit_from_scratch()
    facts = {**points.to_json(), "head": "heatmap", "input_size": [INPUT_SIZE, INPUT_SIZE], "beta": NEW_BETA}
    model = KeypointModel(backbone, HeatmapHead(backbone.config.hidden_size, len(names)), facts).train()
    count = min(config.pictures, config.steps * config.batch_size)
    train_pose(model, config, points.flip_pairs, *draw_figures("train", count, config.seed))

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    pose_processor().save_pretrained(folder)
    seconds = time.time() - started
    held_out = draw_figures("test", min(300, count), config.seed + 1)
    reloaded, _, _ = load_base(str(folder.resolve()))
    trained, loaded = (crop_errors(m, *held_out) for m in (model, reloaded.eval()))
    assert torch.allclose(trained, loaded, atol=1e-3), f"trained {trained.mean()}, reloaded {loaded.mean()}"
    write_card(folder, POSE_CARD, model, config, seconds, count=count, held_out=len(loaded), error=loaded.mean())
    print(f"{folder}: {loaded.mean():.2f} pixels error on {len(loaded)} fresh source pictures, {seconds:.0f} s")


def train_pose(model, config, flip_pairs, pictures, points, boxes):
    """Trains on random crops of pictures uint8 (N, 3, 80, 80), with points (N, 5, 2) and boxes (N, 4) in pixels."""
    import torch

    from model import keypoint_loss

    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4, fused=True)

    def loss_of(_, rows):
        pixels, target = random_crops(pictures[rows], points[rows], boxes[rows], flip_pairs, generator)
        coords, _, heatmaps = model(pixels)
        inside = ((target >= 0) & (target <= 1)).all(dim=2)  # what a crop cuts off is no goal
        return keypoint_loss(coords, target, inside, heatmaps)

    train(model, optimizer, config, len(pictures), generator, loss_of)


POSE_CARD = """\
# Small ViT with a keypoint head, the base of the pose demo

`config.json` and `model.safetensors` are a `ViTModel` (64 x 64 pictures, patches of 8 pixels, four layers of width 96);
`keypoint_head.safetensors` is a heatmap head and `keypoints.json` says what its five keypoints are: {weights:,} weights in all.
It finds head, hands and feet of thin light figures on plain dark ground (domain "source" of `image_tasks/pose/synthetic.py`)
and knows nothing else. It is there to learn and to test with.

Made from scratch by `python scripts/make_demo_base.py pose`: {steps} steps in batches of {batch} from {count} pictures,
seed {seed}; {minutes:.1f} minutes on one CPU thread.

On {held_out} fresh pictures of the source domain, cropped to the figure's box: mean error {error:.2f} of the input's 64 pixels.
"""


def vit_from_scratch():
    """A small ViTModel with random weights."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=INPUT_SIZE,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
    )
    return ViTModel(config, add_pooling_layer=False)


def pose_processor():
    """What says how pictures become `pixel_values`: 64 x 64, values from -1 to 1."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": INPUT_SIZE, "width": INPUT_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def draw_figures(split, count, seed):
    """Draws source pictures. Returns pictures uint8 (N, 3, 80, 80), points (N, 5, 2) in pixels, boxes (N, 4) x, y, w, h.

    A picture depends on (seed, split, its number) alone.
    """
    import torch
    from tqdm import tqdm

    from synthetic import KEYPOINTS, SCENE_SIZE, draw_scene, scene_rng

    pictures = torch.empty(count, 3, SCENE_SIZE, SCENE_SIZE, dtype=torch.uint8)
    points, boxes = torch.zeros(count, len(KEYPOINTS), 2), torch.zeros(count, 4)
    for number in tqdm(range(count), desc=f"drawing ({split})", mininterval=5):
        picture, where, box = draw_scene(scene_rng(seed, "source", split, number), "source")
        pictures[number] = torch.from_numpy(picture).permute(2, 0, 1)
        points[number], boxes[number] = torch.from_numpy(where), torch.tensor(box)
    return pictures, points, boxes


def crop_matrices(boxes, turn, zoom, mirror):
    """Matrices (B, 2, 3) from picture to crop coordinates, -1 .. 1 from the first pixel's centre to the last's.

    boxes (B, 4) x, y, w, h; turn in radians, zoom, mirror (-1 or 1): each (B,). The crop is square, 1.25 times the longer side.
    """
    import torch

    scale = 2 * zoom / (1.25 * boxes[:, 2:].max(dim=1).values)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    linear = torch.stack([mirror * cos, -mirror * sin, sin, cos], dim=1).unflatten(1, (2, 2))
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    return torch.cat([linear, -linear @ centre[:, :, None]], dim=2)


def take_crops(pictures, points, matrices):
    """Pictures uint8 (B, 3, H, W) and points (B, K, 2) in pixels -> (pixel_values (B, 3, 64, 64), targets (B, K, 2) in 0..1)."""
    import torch

    moved = points @ matrices[:, :, :2].transpose(1, 2) + matrices[:, None, :, 2]
    back = torch.linalg.inv(matrices[:, :, :2])
    line = torch.linspace(-1, 1, INPUT_SIZE)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=2).reshape(1, -1, 2)
    places = (grid - matrices[:, None, :, 2]) @ back.transpose(1, 2)  # in pixels of the picture
    places = (2 * places / (pictures.shape[-1] - 1) - 1).unflatten(1, (INPUT_SIZE, INPUT_SIZE))
    pixels = torch.nn.functional.grid_sample(pictures / 127.5, places, align_corners=True) - 1
    return pixels, (moved + 1) / 2


def random_crops(pictures, points, boxes, flip_pairs, generator):
    """Crops with random turn, size, place and mirroring (left and right swapped), and random colours, light and noise."""
    import torch

    count = len(pictures)

    def uniform(low, high, *shape):
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    boxes = torch.cat([boxes[:, :2] + uniform(-0.08, 0.08, 2) * boxes[:, 2:], boxes[:, 2:]], dim=1)
    pixels, target = take_crops(pictures, points, crop_matrices(boxes, uniform(-0.5, 0.5), uniform(0.65, 1.25), mirror))
    swap = list(range(points.shape[1]))
    for a, b in flip_pairs:
        swap[a], swap[b] = b, a
    target = torch.where(mirror[:, None, None] < 0, target[:, swap], target)
    channels = uniform(0, 1, 3).argsort(dim=1)
    pixels = pixels.gather(1, channels[:, :, None, None].expand_as(pixels))
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * uniform(0.3, 2, 1, 1, 1)
    pixels = pixels * uniform(0.6, 1.1, 1, 1, 1) + uniform(-0.2, 0.3, 1, 1, 1)
    pixels = pixels + uniform(0, 0.08, 1, 1, 1) * torch.randn(pixels.shape, generator=generator)
    return pixels.clamp(-1, 1), target


def crop_errors(model, pictures, points, boxes):
    """Mean error of each picture (N,), in pixels of the 64 x 64 crop."""
    import torch

    ones = torch.ones(len(boxes))
    pixels, target = take_crops(pictures, points, crop_matrices(boxes, 0 * ones, ones, ones))
    with torch.no_grad():
        coords = torch.cat([model(part)[0] for part in pixels.split(50)])
    return ((coords - target) * (INPUT_SIZE - 1)).norm(dim=2).mean(dim=1)
