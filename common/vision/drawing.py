"""Drawing synthetic pictures with numpy: textured shapes, soft grounds, colours. The same for the same generator everywhere."""

import colorsys
import math

import numpy as np

# needs: pillow
SUPERSAMPLING = 4  # shapes are computed this much larger and averaged: smooth edges
# Shapes stand upright, more or less: a net of half a million weights learns shapes in any turn very slowly.
MAX_TILT = math.radians(15)
PERIODS = (6.5, 9.5)  # pixels from stripe to stripe, dot to dot, and over two checks


def add_shape(rng, picture, shape, texture, radii, colour, second):
    """Draws a shape into `picture`, float32 (S, S, 3), wholly inside it; returns its mask, float32 (S, S) in 0..1.

    radii: bounds of the surrounding circle's radius in pixels. colour, second: RGB of the texture's two parts.
    """
    size = len(picture)
    radius, tilt = rng.uniform(*radii), rng.uniform(-MAX_TILT, MAX_TILT)
    centre = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - radius - 1)  # the whole circle lies inside
    (left, top), side = np.floor(centre - radius).astype(int), math.ceil(2 * radius) + 1  # the window that holds the shape
    fine = (np.arange(side * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = turn(fine[None, :] + left - centre[0], fine[:, None] + top - centre[1], tilt)
    inside = outline(shape, x / radius, y / radius)
    cover, ink = pixel_shares(inside), pixel_shares(inside & pattern(rng, texture, x, y))
    window = picture[top : top + side, left : left + side]
    window *= 1 - cover[:, :, None]
    window += ink[:, :, None] * colour + (cover - ink)[:, :, None] * second
    mask = np.zeros((size, size), dtype=np.float32)
    mask[top : top + side, left : left + side] = cover
    return mask


def turn(x, y, angle):
    """Coordinates that broadcast to (n, n), turned by `angle` around 0, 0."""
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def pixel_shares(mask):
    """(4 n, 4 n) booleans to float32 (n, n): the share of each pixel."""
    side = len(mask) // SUPERSAMPLING
    cells = mask.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
    return cells.mean(axis=(1, 3), dtype=np.float32)


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
    if shape == "star":  # five points; the radius falls and rises with the angle
        angle = np.arctan2(u, -v) * 5 / (2 * math.pi)
        return u * u + v * v < (0.45 + 0.5 * abs((angle % 1) * 2 - 1)) ** 2
    if shape == "arrow":  # upwards: a head and a shaft
        return ((v < 0) & (abs(u) * 1.2 < v + 0.92)) | ((v >= 0) & (v < 0.85) & (abs(u) < 0.28))
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


def blotches(rng, size, cells, strength):
    """Soft blotches of colour and light around 0, float32 (size, size, 3), about `cells` a side."""
    return enlarge(rng.normal(0, strength, (cells, cells, 3)) + rng.normal(0, strength, (cells, cells, 1)), size)


def enlarge(coarse, size):
    """(h, w, 3) floats to float32 (size, size, 3), bicubic."""
    from PIL import Image

    channels = [Image.fromarray(coarse[:, :, c].astype(np.float32)) for c in range(3)]
    channels = [channel.resize((size, size), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


def hsv(hue, saturation, value):
    """Hue (turns), saturation and value (0..1) to RGB in 0..255, float32 (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32) * 255
