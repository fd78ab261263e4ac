"""Synthetic classification data: one textured shape a picture, drawn with numpy, the same for the same seed everywhere.

A class is a shape and a texture, such as striped_square. Two domains that differ in look and in classes. On *source* (vivid
shapes on dark grounds, 4 shapes x 3 textures) the small base model was trained. *target* (muted shapes on blotchy grounds) has
four shapes and a texture that the base has not seen, beside textures that it knows: this is what the demo fine-tunes it to.

    from synthetic import make_demo_data
    make_demo_data("data/demo")            # train/striped_ring/000.png, ...: 60 + 40 + 60 pictures a class, ten seconds
"""

import numpy as np
from PIL import Image

from common.folders import empty_folder
from common.vision.drawing import add_shape, blotches, hsv

SOURCE_CLASSES = tuple(
    f"{texture}_{shape}" for shape in ("disc", "square", "triangle", "cross") for texture in ("plain", "striped", "dotted")
)
# Every shape comes in two textures and every texture in two shapes: neither of them alone says the class.
TARGET_CLASSES = (
    "striped_ring",
    "checked_ring",
    "plain_diamond",
    "checked_diamond",
    "striped_bar",
    "dotted_bar",
    "plain_crescent",
    "dotted_crescent",
)
DOMAINS = {"source": SOURCE_CLASSES, "target": TARGET_CLASSES}
SPLITS = ("train", "val", "test")

SCENE_SIZE = 64  # pixels, both sides
RADII = {"source": (17, 26), "target": (20, 28)}  # of a shape's surrounding circle, in pixels


def make_demo_data(folder, domain="target", seed=0, train=60, val=40, test=60):
    """Writes an ImageFolder tree: `{split}/{class}/000.png`, 001.png, ... with so many pictures of each class. Returns `folder`.

    A picture (64 x 64, RGB) depends on (seed, domain, split, class, its number) alone, so asking for more pictures leaves the
    first ones as they were. Raises FileExistsError where `folder` exists and is not empty.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}: there is {', '.join(DOMAINS)}")
    folder = empty_folder(folder)
    for split, count in zip(SPLITS, (train, val, test), strict=True):
        for name in DOMAINS[domain]:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture, _ = draw_scene(scene_rng(seed, domain, split, name, number), domain, name)
                Image.fromarray(picture).save(folder / split / name / f"{number:03d}.png")
    return folder


def scene_rng(seed, domain, split, name, number):
    """The random generator of one picture: a function of its five names, not of what was drawn before."""
    return np.random.default_rng((seed, list(DOMAINS).index(domain), SPLITS.index(split), DOMAINS[domain].index(name), number))


def draw_scene(rng, domain, name):
    """Draws one picture of class `name`.

    Returns (picture, mask): picture uint8 (64, 64, 3), mask float32 (64, 64), the share of each pixel that the shape covers.
    """
    texture, shape = name.split("_")
    picture, colour, second = source_look(rng) if domain == "source" else target_look(rng)  # (64, 64, 3), (3,), (3,)
    mask = add_shape(rng, picture, shape, texture, RADII[domain], colour, second)
    if domain == "target":  # noise over shape and ground alike, as a camera adds it
        picture += rng.normal(0, rng.uniform(2, 5), picture.shape)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask


# Looks -----------------------------------------------------------------------------------------------------------------


def source_look(rng):
    """Vivid on dark. Returns (ground float32 (64, 64, 3), the two colours of the shape)."""
    ground = hsv(rng.uniform(), rng.uniform(0.2, 0.8), rng.uniform(0.05, 0.25)) + blotches(rng, SCENE_SIZE, 6, 4)
    hue = rng.uniform()
    colour = hsv(hue, rng.uniform(0.7, 1), rng.uniform(0.8, 1))
    second = hsv(hue + rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.9), rng.uniform(0.4, 0.6))
    return ground, colour, second


def target_look(rng):
    """Muted on blotchy. Returns (ground float32 (64, 64, 3), the two colours of the shape)."""
    ground = hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.35)) + blotches(rng, SCENE_SIZE, 8, 8)
    hue = rng.uniform()
    colour = hsv(hue, rng.uniform(0.2, 0.6), rng.uniform(0.7, 0.95))
    second = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.45))
    return ground, colour, second
