"""Synthetic classification data: one textured shape a picture, drawn with numpy, the same for the same seed everywhere.

A class is a shape and a texture, such as striped_square. Two domains that differ in look and in classes. On *source* (vivid
shapes on dark grounds, 4 shapes x 3 textures) the small base model was trained. *target* (muted shapes on blotchy grounds) has
four shapes and a texture that the base has not seen, beside textures that it knows: this is what the demo fine-tunes it to.

    from synthetic import make_demo_data
    make_demo_data("data/demo")            # train/striped_ring/000.png, ...: 60 + 40 + 60 pictures a class, ten seconds
"""

import colorsys
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

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
SUPERSAMPLING = 4  # shapes are computed this much larger and averaged: smooth edges
RADII = {"source": (17, 26), "target": (20, 28)}  # of a shape's surrounding circle, in pixels
MAX_TILT = math.radians(15)  # shapes stand upright, more or less: a net of this size learns shapes in any turn very slowly
PERIODS = (6.5, 9.5)  # pixels from stripe to stripe, dot to dot, and over two checks


def make_demo_data(folder, domain="target", seed=0, train=60, val=40, test=60):
    """Writes an ImageFolder tree: `{split}/{class}/000.png`, 001.png, ... with so many pictures of each class. Returns `folder`.

    A picture (64 x 64, RGB) depends on (seed, domain, split, class, its number) alone, so asking for more pictures leaves the
    first ones as they were. All is written to `folder` + ".tmp" and then renamed: if `folder` is there, it is complete. Raises
    FileExistsError where `folder` exists and is not empty.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}: there is {', '.join(DOMAINS)}")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: remove it to have the demo data made again")
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what an interrupted call left
    for split, count in zip(SPLITS, (train, val, test), strict=True):
        for name in DOMAINS[domain]:
            (aside / split / name).mkdir(parents=True)
            for number in range(count):
                picture, _ = draw_scene(scene_rng(seed, domain, split, name, number), domain, name)
                Image.fromarray(picture).save(aside / split / name / f"{number:03d}.png")
    os.replace(aside, folder)
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
    radius, tilt = rng.uniform(*RADII[domain]), rng.uniform(-MAX_TILT, MAX_TILT)
    centre = SCENE_SIZE / 2 + rng.uniform(-1, 1, 2) * (SCENE_SIZE / 2 - radius - 1)  # the whole circle lies inside
    (left, top), side = np.floor(centre - radius).astype(int), math.ceil(2 * radius) + 1  # the window that holds the shape
    fine = (np.arange(side * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = turn(fine[None, :] + left - centre[0], fine[:, None] + top - centre[1], tilt)
    inside = outline(shape, x / radius, y / radius)
    cover, ink = shrink(inside), shrink(inside & pattern(rng, texture, x, y))
    window = picture[top : top + side, left : left + side]
    window *= 1 - cover[:, :, None]
    window += ink[:, :, None] * colour + (cover - ink)[:, :, None] * second
    mask = np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=np.float32)
    mask[top : top + side, left : left + side] = cover
    if domain == "target":  # noise over shape and ground alike, as a camera adds it
        picture += rng.normal(0, rng.uniform(2, 5), picture.shape)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask


def turn(x, y, angle):
    """Coordinates that broadcast to (n, n), turned by `angle` around 0, 0."""
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def shrink(mask):
    """(4 n, 4 n) booleans to float32 (n, n): the share of each pixel."""
    side = len(mask) // SUPERSAMPLING
    cells = mask.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
    return cells.mean(axis=(1, 3), dtype=np.float32)


# Shapes and textures ---------------------------------------------------------------------------------------------------


def outline(shape, u, v):
    """Where the shape is: booleans like u and v, coordinates in units of the surrounding circle's radius, v downwards."""
    if shape == "disc":
        return u * u + v * v < 0.85**2
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.71
    if shape == "triangle":
        return (v < 0.6) & (abs(u) * 1.9 < v + 0.9)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.92)
    if shape == "ring":
        return (u * u + v * v < 0.92**2) & (u * u + v * v > 0.42**2)
    if shape == "diamond":
        return abs(u) / 0.72 + abs(v) < 1
    if shape == "bar":
        return (abs(u) < 0.92) & (abs(v) < 0.44)
    if shape == "crescent":
        return (u * u + v * v < 0.95**2) & ((u - 0.55) ** 2 + v * v > 0.66**2)
    raise ValueError(f"no shape {shape!r}")


def pattern(rng, texture, x, y):
    """Where a shape has its first colour, the rest having its second: booleans like x and y, coordinates in pixels."""
    period, (shift_x, shift_y) = rng.uniform(*PERIODS), rng.uniform(0, 1, 2)
    x, y = turn(x, y, rng.uniform(0, math.pi))  # a texture lies in any direction
    x, y = (x / period + shift_x) % 1, (y / period + shift_y) % 1  # the place within one period, 0..1
    if texture == "plain":
        return np.ones_like(x, dtype=bool)
    if texture == "striped":
        return x < 0.5
    if texture == "dotted":
        return (x - 0.5) ** 2 + (y - 0.5) ** 2 > 0.32**2
    if texture == "checked":
        return (x < 0.5) == (y < 0.5)
    raise ValueError(f"no texture {texture!r}")


# Looks -----------------------------------------------------------------------------------------------------------------


def source_look(rng):
    """Vivid on dark. Returns (ground float32 (64, 64, 3), the two colours of the shape)."""
    ground = hsv(rng.uniform(), rng.uniform(0.2, 0.8), rng.uniform(0.05, 0.25)) + blotches(rng, 6, 4)
    hue = rng.uniform()
    colour = hsv(hue, rng.uniform(0.7, 1), rng.uniform(0.8, 1))
    second = hsv(hue + rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.9), rng.uniform(0.4, 0.6))
    return ground, colour, second


def target_look(rng):
    """Muted on blotchy. Returns (ground float32 (64, 64, 3), the two colours of the shape)."""
    ground = hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.35)) + blotches(rng, 8, 8)
    hue = rng.uniform()
    colour = hsv(hue, rng.uniform(0.2, 0.6), rng.uniform(0.7, 0.95))
    second = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.45))
    return ground, colour, second


def blotches(rng, cells, strength):
    """Soft blotches of colour and light around 0, float32 (64, 64, 3), about `cells` a side."""
    coarse = rng.normal(0, strength, (cells, cells, 3)) + rng.normal(0, strength, (cells, cells, 1))
    channels = [
        Image.fromarray(coarse[:, :, c].astype(np.float32)).resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


def hsv(hue, saturation, value):
    """Hue (turns), saturation and value (0..1) to RGB in 0..255, float32 (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32) * 255
