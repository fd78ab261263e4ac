"""Synthetic detection data: simple shapes with exact boxes, drawn with PIL and numpy, the same for the same seed everywhere.

Two domains that differ in look. On *source* (saturated solid shapes on blotchy colour) the small base model was trained;
*target* (muted shapes, some only outlines, on grey stripes with noise, and a class more) is what the demo fine-tunes it to.

    from synthetic import make_demo_data
    make_demo_data("data/demo")            # 400 + 200 + 200 pictures of the target domain in COCO layout, about five seconds
"""

import json
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from common.folders import empty_folder
from common.vision.drawing import SUPERSAMPLING, blotches, enlarge, hsv

SOURCE_CLASSES = ("circle", "square", "triangle")
TARGET_CLASSES = SOURCE_CLASSES + ("star",)
DOMAINS = {"source": SOURCE_CLASSES, "target": TARGET_CLASSES}
SPLITS = ("train", "val", "test")

SCENE_SIZE = 96  # pixels, both sides
SHAPE_SIZES = (15, 39)  # diameter of a shape's surrounding circle, in pixels
SHAPE_TILT = math.radians(12)  # at most: a net of this size learns shapes in any turn very slowly
MAX_OVERLAP = 0.05  # highest IoU of two boxes in a picture


def make_demo_data(folder, domain="target", seed=0, train=400, val=200, test=200):
    """Writes a data set in COCO layout: `annotations/instances_{split}.json` and `{split}/000001.png`, ... Returns `folder`.

    Boxes are x, y, w, h in pixels of the stored 96 x 96 picture; category ids count from 1. A picture depends on (seed, domain,
    split, its number) alone, so asking for more pictures leaves the first ones as they were. Raises FileExistsError where
    `folder` exists and is not empty.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}: there is {', '.join(DOMAINS)}")
    folder = empty_folder(folder)
    (folder / "annotations").mkdir(parents=True)
    for split, count in zip(SPLITS, (train, val, test), strict=True):
        (folder / split).mkdir()
        coco = draw_split(folder / split, domain, seed, split, count)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return folder


def draw_split(folder, domain, seed, split, count):
    """Draws the pictures of one split into `folder` and returns their COCO dictionary."""
    names = DOMAINS[domain]
    coco = {
        "info": {"description": f"synthetic shapes, {domain} domain, {split}, seed {seed}"},
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(names, 1)],
    }
    for number in range(1, count + 1):
        picture, boxes = draw_scene(scene_rng(seed, domain, split, number), domain)
        file_name = f"{number:06d}.png"
        Image.fromarray(picture).save(folder / file_name)
        height, width = picture.shape[:2]
        coco["images"].append({"id": number, "file_name": file_name, "width": width, "height": height})
        for name, x, y, w, h in boxes:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": names.index(name) + 1,
                    "bbox": [round(value, 2) for value in (x, y, w, h)],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                }
            )
    return coco


def scene_rng(seed, domain, split, number):
    """The random generator of one picture: a function of its four names, not of what was drawn before."""
    return np.random.default_rng((seed, list(DOMAINS).index(domain), SPLITS.index(split), number))


def draw_scene(rng, domain):
    """Draws one picture with 1 to 4 shapes.

    Returns (picture, boxes): picture uint8 (96, 96, 3), boxes a list of (class name, x, y, w, h) as floats in pixels.
    """
    picture = blotchy(rng) if domain == "source" else stripes(rng)  # float32 (96, 96, 3), 0..255
    boxes = []
    for _ in range(rng.integers(1, 5)):
        name = str(rng.choice(DOMAINS[domain]))
        for _attempt in range(30):  # a shape that finds no free place in 30 throws is left out
            corners = throw(rng, name)
            box = bounds(corners)
            if all(overlap(box, other[1:]) <= MAX_OVERLAP for other in boxes):
                colour, outline = solid_paint(rng) if domain == "source" else muted_paint(rng)
                paint(picture, corners, colour, outline)
                boxes.append((name, *box))
                break
    if domain == "target":  # noise over shapes and ground alike, as a camera adds it
        picture += rng.normal(0, rng.uniform(2, 6), picture.shape)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), boxes


# Grounds ---------------------------------------------------------------------------------------------------------------


def blotchy(rng):
    """Source ground: soft blotches around one muted colour, float32 (96, 96, 3)."""
    base = hsv(rng.uniform(), rng.uniform(0.1, 0.45), rng.uniform(0.25, 0.8))
    return base + blotches(rng, SCENE_SIZE, 6, 12) + rng.normal(0, 4, (SCENE_SIZE, SCENE_SIZE, 3)).astype(np.float32)


def stripes(rng):
    """Target ground: grey stripes in any direction with faint blotches of colour, float32 (96, 96, 3)."""
    angle, period, phase = rng.uniform(0, math.pi), rng.uniform(7, 18), rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:SCENE_SIZE, :SCENE_SIZE].astype(np.float32)
    wave = np.sin(2 * math.pi / period * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    grey = rng.uniform(105, 150) + rng.uniform(10, 24) * np.tanh(3 * wave)  # tanh: nearly square stripes with soft edges
    return grey[:, :, None].astype(np.float32) + enlarge(rng.normal(0, 9, (12, 12, 3)), SCENE_SIZE)


# Shapes ----------------------------------------------------------------------------------------------------------------


def throw(rng, name):
    """Corner points (n, 2) in pixels of a shape of random size, tilt and place that lies inside the picture."""
    radius = rng.uniform(*SHAPE_SIZES) / 2
    tilt = rng.uniform(-SHAPE_TILT, SHAPE_TILT)
    if name == "circle":
        angles, radii = np.arange(72) / 72, 0.88
    elif name == "square":
        angles, radii = np.arange(4) / 4 + 1 / 8, 1.15
    elif name == "triangle":
        angles, radii = np.arange(3) / 3 - 1 / 4, 1.1  # minus a quarter: y points down, so the first corner is on top
    else:  # star: five tips, and between them five notches nearer to the centre
        angles, radii = np.arange(10) / 10 - 1 / 4, np.where(np.arange(10) % 2 == 0, 1.08, 0.47)
    angles = 2 * math.pi * angles + tilt
    corners = radius * np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    low, high = 1 - corners.min(axis=0), SCENE_SIZE - 1 - corners.max(axis=0)  # one pixel of ground stays at the rim
    return corners + rng.uniform(low, high)


def bounds(corners):
    """The tight box x, y, w, h of points (n, 2)."""
    (x, y), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return x, y, right - x, bottom - y


def overlap(a, b):
    """IoU of two boxes x, y, w, h."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def paint(picture, corners, colour, outline):
    """Paints a shape into `picture` (96, 96, 3), in place. outline: width in pixels of a line inside the shape, 0 fills it."""
    left, top = np.floor(corners.min(axis=0)).astype(int)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int)
    size = (int(right - left) * SUPERSAMPLING, int(bottom - top) * SUPERSAMPLING)
    points = (corners - (left, top)) * SUPERSAMPLING - 0.5  # PIL counts from the first pixel's centre, boxes from its corner
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon([tuple(p) for p in points], fill=255)
    if outline:
        line = Image.new("L", size)
        closed = [tuple(p) for p in np.concatenate([points, points[:2]])]
        ImageDraw.Draw(line).line(closed, fill=255, width=round(2 * outline * SUPERSAMPLING), joint="curve")
        mask = ImageChops.darker(mask, line)  # cuts off the outer half of the line, so that the box stays tight
    cover = np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32)[:, :, None] / 255
    window = picture[top:bottom, left:right]
    window += cover * (colour - window)


# Paints ----------------------------------------------------------------------------------------------------------------


def solid_paint(rng):
    """Source: a saturated colour, always filled. Returns (colour, outline width)."""
    return hsv(rng.uniform(), rng.uniform(0.75, 1), rng.uniform(0.75, 1)), 0


def muted_paint(rng):
    """Target: a duller or darker colour; every fourth shape is an outline. Returns (colour, outline width)."""
    colour = hsv(rng.uniform(), rng.uniform(0.5, 0.9), rng.uniform(0.45, 1))
    return colour, rng.uniform(2.2, 3.6) if rng.uniform() < 0.25 else 0
