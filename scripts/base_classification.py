"""Trains the small base of the classification demo from scratch; called by make_demo_base.py.

A ViT of half a million weights for 64 x 64 pictures of textured discs, squares, triangles and crosses. A ViT of this size that is
told no more than the picture's class learns next to nothing in minutes. So for the time of training every patch is also asked
which of its pixels the shape covers and, where it lies on the shape, of which class that is: 64 small answers a picture beside
the large one. The layer that gives these answers is thrown away afterwards.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from base_training import reload, start, train, write_card
from common.config import BatchSize, Count, Rate, Seed

CLASSIFICATION = Path(__file__).resolve().parents[1] / "image_tasks" / "classification"


@dataclass
class ClassificationConfig:
    output_dir: str = str(CLASSIFICATION / "demo_base")  # folder to write
    seed: Seed = 0  # of weights, pictures and augmentation
    steps: Count = 1900  # optimizer steps
    batch_size: BatchSize = 32  # pictures a step
    lr: Rate = 1.5e-3  # constant for four tenths of the steps, then down by a cosine
    pictures: Count = 400  # source pictures of each class drawn for training, fewer where fewer are seen


def make_classification(config):
    """Trains the base, writes it to config.output_dir, reads it back and measures it on pictures that nobody has seen."""
    from transformers import AutoModelForImageClassification

    start(config)
    sys.path.insert(0, str(CLASSIFICATION))
    from synthetic import SOURCE_CLASSES

    started = time.process_time()
    model = classifier_from_scratch(SOURCE_CLASSES).train()
    each = min(config.pictures, -(-config.steps * config.batch_size // len(SOURCE_CLASSES)))
    train_classifier(model, config, *draw_classes("train", each, config.seed))

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    classification_processor().save_pretrained(folder)
    seconds = time.process_time() - started
    pictures, _, classes = draw_classes("test", min(50, each), config.seed + 1)
    reloaded = reload(AutoModelForImageClassification, folder)
    trained, loaded = (source_accuracy(m, pictures, classes) for m in (model, reloaded))
    assert trained == loaded, f"accuracy {trained} trained, {loaded} reloaded"
    facts = {"count": each * len(SOURCE_CLASSES), "held_out": len(pictures), "accuracy": loaded}
    write_card(folder, CLASSIFICATION_CARD, model, config, seconds, **facts)
    print(f"{folder}: accuracy {loaded:.3f} on {len(pictures)} fresh source pictures, {seconds:.0f} CPU seconds")


def train_classifier(model, config, pictures, masks, classes):
    """Trains on pictures uint8 (N, 3, 64, 64), masks (N, 64, 64) and classes (N,), with a head for patches that is not kept."""
    import torch
    from torch.nn.functional import cross_entropy

    generator = torch.Generator().manual_seed(config.seed)
    patch_head = torch.nn.Linear(model.config.hidden_size, model.config.patch_size**2 + model.config.num_labels)
    optimizer = torch.optim.AdamW([*model.parameters(), *patch_head.parameters()], lr=config.lr, weight_decay=0.05, fused=True)

    def loss_of(_, rows):
        pixels, masks_b = augment_look(pictures[rows], masks[rows], generator)
        states = model.vit(pixel_values=pixels).last_hidden_state  # (B, 1 + 64, 96)
        loss = cross_entropy(model.classifier(states[:, 0]), classes[rows])
        return loss + patch_loss(patch_head(states[:, 1:]), masks_b, classes[rows], model.config.patch_size)

    train(model, optimizer, config, len(pictures), generator, loss_of)


CLASSIFICATION_CARD = """\
# Small ViT, the base of the classification demo

A `ViTForImageClassification` with {weights:,} weights for 64 x 64 pictures: patches of 8 x 8, four layers of width 96 with three
heads. It knows discs, squares, triangles and crosses, each plain, striped and dotted, on synthetic pictures (vivid shapes
on dark grounds: domain "source" of `image_tasks/classification/synthetic.py`), and nothing else. It is there to learn and to
test with.

Made from scratch by `python scripts/make_demo_base.py classification`: {steps} steps in batches of {batch} from {count} pictures,
seed {seed}; {minutes:.0f} minutes on one CPU thread.

On {held_out} fresh pictures of the source domain: accuracy {accuracy:.3f}.
"""


def classifier_from_scratch(names):
    """A small ViTForImageClassification with random weights for these classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def classification_processor():
    """What turns a picture into `pixel_values`: 64 x 64, values from -1 to 1."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def draw_classes(split, each, seed):
    """Draws `each` source pictures of every class.

    Returns pictures uint8 (N, 3, 64, 64), masks float (N, 64, 64) with 1 where the shape is, classes int64 (N,). A picture
    depends on (seed, split, its class, its number) alone.
    """
    import torch
    from tqdm import tqdm

    from synthetic import SCENE_SIZE, SOURCE_CLASSES, draw_scene, scene_rng

    count = each * len(SOURCE_CLASSES)
    pictures = torch.empty(count, 3, SCENE_SIZE, SCENE_SIZE, dtype=torch.uint8)
    masks = torch.empty(count, SCENE_SIZE, SCENE_SIZE)
    classes = torch.arange(count) % len(SOURCE_CLASSES)
    for row in tqdm(range(count), desc=f"drawing ({split})", mininterval=5):
        name = SOURCE_CLASSES[row % len(SOURCE_CLASSES)]
        picture, mask = draw_scene(scene_rng(seed, "source", split, name, row // len(SOURCE_CLASSES)), "source", name)
        pictures[row], masks[row] = torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(mask)
    return pictures, masks, classes


def augment_look(pictures, masks, generator, mix_colours=True):
    """Random flips, shifts, colours, light and noise of a batch: features that see shape and texture, not one domain's look.

    pictures uint8 (B, 3, H, W), masks (B, H, W). mix_colours: exchange red, green and blue at random. Returns (pixel_values
    float (B, 3, H, W) in -1..1, masks of the same places).
    """
    import torch
    from torch.nn.functional import pad

    def uniform(low, high):
        return torch.rand(len(pictures), 1, 1, 1, generator=generator) * (high - low) + low

    both = torch.cat([pictures / 255, masks[:, None]], dim=1)  # what moves the picture moves the mask
    both = torch.where(uniform(0, 1) < 0.5, both.flip(3), both)
    across, down = torch.randint(0, 9, (2,), generator=generator).tolist()
    height, width = both.shape[2:]
    both = pad(both, (4, 4, 4, 4), mode="replicate")[:, :, down : down + height, across : across + width]
    pixels, masks = both[:, :3], both[:, 3]
    if mix_colours:
        channels = torch.rand(len(pixels), 3, generator=generator).argsort(dim=1)
        pixels = pixels.gather(1, channels[:, :, None, None].expand_as(pixels))
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * uniform(0.5, 1)
    average = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = (pixels - average) * uniform(0.7, 1.2) + average + uniform(-0.05, 0.2)
    pixels = pixels + uniform(0, 0.03) * torch.randn(pixels.shape, generator=generator)
    return pixels.clamp(0, 1) * 2 - 1, masks


def patch_loss(answers, masks, classes, patch_size):
    """The loss of what every patch is asked: the mask of its pixels, and the class where half of it lies on the shape.

    answers (B, patches, patch_size ** 2 + classes), masks (B, H, W) in 0..1, classes (B,). Returns the sum of two means.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, unfold

    pixels = patch_size**2
    wanted = unfold(masks[:, None], patch_size, stride=patch_size).transpose(1, 2)  # (B, patches, pixels), patches row by row
    shape, names = answers[..., :pixels], answers[..., pixels:]
    on_shape = wanted.mean(dim=2) > 0.5
    labels = classes[:, None].expand_as(on_shape)[on_shape]
    which = cross_entropy(names[on_shape], labels, reduction="sum") / max(len(labels), 1)  # a small batch may have no such patch
    return binary_cross_entropy_with_logits(shape, wanted) + which


def source_accuracy(model, pictures, classes):
    """The share of pictures uint8 (N, 3, H, W) that a classifier assigns to their classes (N,)."""
    import torch

    processor = classification_processor()
    with torch.no_grad():
        batches = [processor(batch, return_tensors="pt")["pixel_values"] for batch in pictures.split(50)]
        found = torch.cat([model(pixel_values=batch).logits.argmax(dim=1) for batch in batches])
    return (found == classes).float().mean().item()
