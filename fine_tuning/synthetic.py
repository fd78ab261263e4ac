"""Synthetic pictures with words: one textured shape a picture, drawn with numpy, the same for the same seed everywhere.

On *source* (vivid shapes on dark grounds) the small base model learnt what captions such as "a photo of a large red striped
disc" mean: 2 sizes, 6 colours, 4 textures, 6 shapes. *target* (muted shapes on blotchy grounds) holds eight "breeds", such as
dotted_borzel: the base knows what dotted is, but has never seen a borzel nor read the word. Every texture and every kind
comes in two breeds, so the base's guess from the known word alone is right about every second time.

    from synthetic import make_demo_data
    make_demo_data("data/demo")            # train/dotted_borzel/000.png, ...: 40 + 40 + 40 pictures a breed, ten seconds
"""

import numpy as np
from PIL import Image

from common.folders import empty_folder
from common.vision.drawing import add_shape, blotches, hsv

SIZES = {"small": (13, 17), "large": (22, 28)}  # radius of a shape's surrounding circle, in pixels
COLOURS = {"red": 0.0, "orange": 0.08, "yellow": 0.16, "green": 0.35, "blue": 0.6, "purple": 0.8}  # hue, in turns
TEXTURES = ("plain", "striped", "dotted", "checked")
SHAPES = ("disc", "square", "triangle", "cross", "bar", "diamond")
ATTRIBUTES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "texture": TEXTURES, "shape": SHAPES}
# All that can be said of a source picture: (size, colour, texture, shape).
COMBINATIONS = tuple((s, c, t, f) for s in SIZES for c in COLOURS for t in TEXTURES for f in SHAPES)
# A fifth of them, in which every word occurs about as often as any other, was never shown in training.
UNSEEN = tuple(
    (s, c, t, f)
    for i, s in enumerate(SIZES)
    for j, c in enumerate(COLOURS)
    for k, t in enumerate(TEXTURES)
    for m, f in enumerate(SHAPES)
    if (i + j + k + m) % 5 == 0
)

KINDS = {"borzel": "ring", "corvin": "crescent", "dunlet": "star", "marfic": "arrow"}  # new words for new shapes
BREEDS = (
    "plain_borzel",
    "dotted_borzel",
    "plain_corvin",
    "striped_corvin",
    "striped_dunlet",
    "checked_dunlet",
    "dotted_marfic",
    "checked_marfic",
)
SPLITS = ("train", "val", "test")
SCENE_SIZE = 64  # pixels, both sides


def make_demo_data(folder, seed=0, train=40, val=40, test=40):
    """Writes an ImageFolder tree: `{split}/{breed}/000.png`, 001.png, ... with so many pictures of each breed. Returns `folder`.

    A picture (64 x 64, RGB) depends on (seed, split, breed, its number) alone, so asking for more pictures leaves the first
    ones as they were. Raises FileExistsError where `folder` exists and is not empty.
    """
    folder = empty_folder(folder)
    for split, count in zip(SPLITS, (train, val, test), strict=True):
        for name in BREEDS:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng((seed, 1, SPLITS.index(split), BREEDS.index(name), number))
                Image.fromarray(draw_breed(rng, name)).save(folder / split / name / f"{number:03d}.png")
    return folder


def draw_breed(rng, name):
    """A target picture of a breed, uint8 (64, 64, 3): muted, on blotchy ground, with the noise of a camera."""
    texture, kind = name.split("_")
    picture = hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.35)) + blotches(rng, SCENE_SIZE, 8, 8)
    hue = rng.uniform()
    colour = hsv(hue, rng.uniform(0.2, 0.6), rng.uniform(0.7, 0.95))
    second = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.45))
    add_shape(rng, picture, KINDS[kind], texture, (18, 28), colour, second)
    picture += rng.normal(0, rng.uniform(2, 5), picture.shape)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def draw_source(rng, combination):
    """A source picture of (size, colour, texture, shape): (uint8 (64, 64, 3), mask of its shape float32 (64, 64))."""
    size, colour, texture, shape = combination
    picture = hsv(rng.uniform(), rng.uniform(0.2, 0.8), rng.uniform(0.05, 0.25)) + blotches(rng, SCENE_SIZE, 6, 4)
    hue = COLOURS[colour] + rng.uniform(-0.025, 0.025)
    bright = hsv(hue, rng.uniform(0.75, 1), rng.uniform(0.85, 1))
    dark = hsv(hue, rng.uniform(0.5, 0.9), rng.uniform(0.3, 0.5))  # the second colour is the first one's shadow: one colour word
    mask = add_shape(rng, picture, shape, texture, SIZES[size], bright, dark)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask


def caption(combination):
    """What a source picture shows, in words: "a photo of a large red striped disc". An attribute that is "" is not mentioned."""
    size, colour, texture, shape = combination
    return " ".join(word for word in ("a photo of a", size, colour, texture, shape or "thing") if word)
