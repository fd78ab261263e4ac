"""Synthetic pose data: one figure in each picture with five exact keypoints, drawn with PIL and numpy, the same for the same
seed everywhere.

Two domains that differ in look and proportions. On *source* (a thin light figure on plain dark ground) the small base model was
trained; *target* (thick limbs, a big head, short arms, muted colours on blotchy ground among loose strokes) is what the demo
fine-tunes it to. Left and right are as seen in the picture, so the mirrored picture swaps them.

    from synthetic import make_demo_data
    make_demo_data("data/demo")            # 200 + 150 + 100 pictures of the target domain in COCO layout, about three seconds
"""

import json
import math

import numpy as np
from PIL import Image, ImageDraw

from common.folders import empty_folder
from common.vision.drawing import SUPERSAMPLING, enlarge, hsv

KEYPOINTS = ("head", "left_hand", "right_hand", "left_foot", "right_foot")
SKELETON = ((1, 2), (1, 3), (1, 4), (1, 5))  # counted from 1, as COCO does: everything hangs on the head
DOMAINS = ("source", "target")
SPLITS = ("train", "val", "test")

SCENE_SIZE = 80  # pixels, both sides
HEIGHTS = (38, 62)  # of a figure that stands with straight legs, in pixels
BODY_SHARE = 0.53  # COCO's `area` is that of the body's outline, which people take as this share of the box where there is none


def make_demo_data(folder, domain="target", seed=0, train=200, val=150, test=100):
    """Writes a data set in COCO layout, `annotations/person_keypoints_{split}.json` and `{split}/000001.png`; returns `folder`.

    Coordinates are in pixels of the stored 80 x 80 picture, whole numbers at pixel centres. A picture depends on (seed, domain,
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
        (folder / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(coco))
    return folder


def draw_split(folder, domain, seed, split, count):
    """Draws the pictures of one split into `folder` and returns their COCO dictionary."""
    figure = {"id": 1, "name": "figure", "keypoints": list(KEYPOINTS), "skeleton": [list(pair) for pair in SKELETON]}
    coco = {
        "info": {"description": f"synthetic figures, {domain} domain, {split}, seed {seed}"},
        "images": [],
        "annotations": [],
        "categories": [figure],
    }
    for number in range(1, count + 1):
        picture, points, (x, y, w, h) = draw_scene(scene_rng(seed, domain, split, number), domain)
        file_name = f"{number:06d}.png"
        Image.fromarray(picture).save(folder / file_name)
        coco["images"].append({"id": number, "file_name": file_name, "width": SCENE_SIZE, "height": SCENE_SIZE})
        coco["annotations"].append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "keypoints": [value for px, py in points.tolist() for value in (round(px, 2), round(py, 2), 2)],
                "num_keypoints": len(points),
                "bbox": [round(value, 2) for value in (x, y, w, h)],
                "area": round(BODY_SHARE * w * h, 2),
                "iscrowd": 0,
            }
        )
    return coco


def scene_rng(seed, domain, split, number):
    """The random generator of one picture: a function of its four names, not of what was drawn before."""
    return np.random.default_rng((seed, DOMAINS.index(domain), SPLITS.index(split), number))


def draw_scene(rng, domain):
    """Draws one picture with one figure.

    Returns (picture, points, box): picture uint8 (80, 80, 3), points float (5, 2) x, y in KEYPOINTS' order, box x, y, w, h.
    """
    ground = plain(rng) if domain == "source" else blotchy(rng)  # float32 (80, 80, 3), 0..255
    body = thin_body(rng) if domain == "source" else thick_body(rng)
    points, strokes, head = pose(rng, body)
    radii = np.array([width / 2 for _, width in strokes] + [head])
    low = np.min([line.min(axis=0) for line, _ in strokes] + [points[0]], axis=0) - radii.max()
    high = np.max([line.max(axis=0) for line, _ in strokes] + [points[0]], axis=0) + radii.max()
    shift = rng.uniform(1 - low, np.maximum(1 - low, SCENE_SIZE - 2 - high))  # anywhere in the picture, whole
    points, strokes = points + shift, [(line + shift, width) for line, width in strokes]
    if domain == "target":
        clutter(ground, rng)
    colour = light_paint(rng) if domain == "source" else muted_paint(rng, ground)
    paint(ground, strokes, points[0], head, colour)
    if domain == "target":  # noise over figure and ground alike, as a camera adds it
        ground += rng.normal(0, rng.uniform(2, 5), ground.shape)
    return np.clip(ground + 0.5, 0, 255).astype(np.uint8), points, bounds(points, strokes, head)


# Bodies and poses ------------------------------------------------------------------------------------------------------


def thin_body(rng):
    """Source proportions, in pixels: lengths of torso, arm and leg, widths of shoulders and hips, head radius, line width."""
    tall = rng.uniform(*HEIGHTS)
    return {
        "torso": 0.34 * tall,
        "arm": rng.uniform(0.34, 0.42) * tall,
        "leg": rng.uniform(0.40, 0.48) * tall,
        "shoulders": 0.05 * tall,
        "hips": 0.04 * tall,
        "head": rng.uniform(0.07, 0.09) * tall,
        "line": rng.uniform(1.2, 2.2),
    }


def thick_body(rng):
    """Target proportions: big head, short arms, broad trunk, thick limbs."""
    tall = rng.uniform(*HEIGHTS)
    return {
        "torso": rng.uniform(0.30, 0.36) * tall,
        "arm": rng.uniform(0.24, 0.31) * tall,
        "leg": rng.uniform(0.32, 0.40) * tall,
        "shoulders": rng.uniform(0.09, 0.13) * tall,
        "hips": rng.uniform(0.07, 0.10) * tall,
        "head": rng.uniform(0.12, 0.16) * tall,
        "line": rng.uniform(3.2, 5.5),
    }


def pose(rng, body):
    """(points (5, 2), strokes, head radius) of a random pose around the origin; a stroke is (corners (n, 2), width)."""
    lean = rng.normal(0, math.radians(8))
    down = np.array([math.sin(lean), math.cos(lean)])  # along the trunk; y points down
    across = np.array([down[1], -down[0]])
    neck, hip = -down * body["torso"] / 2, down * body["torso"] / 2
    strokes = [(np.array([neck, hip]), body["line"] * 1.3)]
    ends = []
    for joint, width, length, spread in ((neck, "shoulders", "arm", (-5, 135)), (hip, "hips", "leg", (-2, 48))):
        for side in (-1, 1):  # left, then right, as seen
            start = joint + side * across * body[width]
            upper = math.radians(rng.uniform(*spread))  # from straight down, outwards
            lower = upper + math.radians(rng.uniform(-50, 50) if length == "arm" else rng.uniform(-35, 10))
            lower = min(max(lower, math.radians(-12)), math.radians(155))  # limbs cross neither each other nor the head
            middle = start + body[length] / 2 * (math.cos(upper) * down + side * math.sin(upper) * across)
            end = middle + body[length] / 2 * (math.cos(lower) * down + side * math.sin(lower) * across)
            strokes.append((np.array([joint, start, middle, end]), body["line"]))
            ends.append(end)
    head = neck - down * (body["head"] + 0.5 * body["line"])
    return np.array([head, *ends]), strokes, body["head"]


def bounds(points, strokes, head):
    """The tight box x, y, w, h of a figure."""
    low = np.min([points[0] - head, *(line.min(axis=0) - width / 2 for line, width in strokes)], axis=0)
    high = np.max([points[0] + head, *(line.max(axis=0) + width / 2 for line, width in strokes)], axis=0)
    return (*low.tolist(), *(high - low).tolist())


# Grounds and paints ----------------------------------------------------------------------------------------------------


def plain(rng):
    """Source ground: one dark colour, float32 (80, 80, 3)."""
    colour = hsv(rng.uniform(), rng.uniform(0, 0.5), rng.uniform(0.05, 0.25))
    return colour + rng.normal(0, 2, (SCENE_SIZE, SCENE_SIZE, 3)).astype(np.float32)


def blotchy(rng):
    """Target ground: blotches of light and dark around one muted colour, float32 (80, 80, 3)."""
    colour = hsv(rng.uniform(), rng.uniform(0.1, 0.4), rng.uniform(0.25, 0.5))
    return colour + enlarge(rng.normal(0, 10, (7, 7, 3)) + rng.normal(0, 16, (7, 7, 1)), SCENE_SIZE)  # hue, light


def clutter(picture, rng):
    """Three to six loose strokes in other colours, in place: not everything long and thin is a limb."""
    for _ in range(rng.integers(3, 7)):
        start, angle, length = rng.uniform(0, SCENE_SIZE, 2), rng.uniform(0, 2 * math.pi), rng.uniform(10, 40)
        line = np.array([start, start + length * np.array([math.cos(angle), math.sin(angle)])])
        colour = hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.75))
        paint(picture, [(line, rng.uniform(1, 3))], None, 0, colour)


def light_paint(rng):
    """Source: nearly white."""
    return hsv(rng.uniform(), rng.uniform(0, 0.25), rng.uniform(0.8, 1))


def muted_paint(rng, ground):
    """Target: a dull colour that differs from the ground's mean by a fair step, mostly lighter."""
    mean = ground.mean(axis=(0, 1))
    while True:
        colour = hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.9))
        if colour.mean() - mean.mean() > 35 or (colour.mean() - mean.mean() < -45 and rng.uniform() < 0.3):
            return colour


def paint(picture, strokes, centre, radius, colour):
    """Paints strokes with round ends, and a disc where `centre` is a point, into `picture` (80, 80, 3), in place."""
    mask = Image.new("L", (SCENE_SIZE * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(mask)

    def at(point):  # whole numbers are pixel centres
        return tuple((point + 0.5) * SUPERSAMPLING - 0.5)

    def disc(point, size):
        x, y = at(point)
        size *= SUPERSAMPLING
        draw.ellipse([x - size, y - size, x + size, y + size], fill=255)

    for line, width in strokes:
        draw.line([at(point) for point in line], fill=255, width=max(1, round(width * SUPERSAMPLING)))
        for point in line:
            disc(point, width / 2)
    if centre is not None:
        disc(centre, radius)
    cover = np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32)[:, :, None] / 255
    picture += cover * (colour - picture)
