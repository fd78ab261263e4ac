"""The part of a picture that a pose model sees: around a figure's box, turned, mirrored and recoloured at random in training."""

import math

import numpy as np
import torch

PADDING = 1.25  # a box is enlarged by this before it is cut out, as pose models expect; a whole picture is taken as it is


def extent(box: np.ndarray, size: tuple[int, int], padding: float) -> tuple[float, float]:
    """(width, height) of what is cut out: the padded box, made longer on one side to have the ratio of `size` (h, w)."""
    ratio = size[1] / size[0]
    width, height = max(box[2], box[3] * ratio), max(box[3], box[2] / ratio)
    return width * padding, height * padding


def crop_matrix(box, size, padding, turn=0.0, zoom=1.0, shift=(0.0, 0.0), mirror=False) -> np.ndarray:
    """The affine map (2, 3) from pixels of the picture to pixels of the input; whole numbers are pixel centres in both.

    The cut-out's edges fall on the centres of the input's first and last pixels (UDP). turn: radians, clockwise as seen; zoom:
    above 1 enlarges; shift: of the middle, as a share of the box. One map for picture and keypoints: they cannot disagree.
    """
    (h, w), (width, height) = size, extent(box, size, padding)
    middle = np.array([box[0] + (0.5 + shift[0]) * box[2], box[1] + (0.5 + shift[1]) * box[3]])
    scale = np.diag([(w - 1) / width * zoom * (-1 if mirror else 1), (h - 1) / height * zoom])
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear = scale @ rotation
    return np.column_stack([linear, np.array([(w - 1) / 2, (h - 1) / 2]) - linear @ middle])


def inverse(matrix: np.ndarray) -> np.ndarray:
    """The map back of an affine map (2, 3)."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def move(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (N, 2) under an affine map (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks of factor x factor pixels. Pixel p of the picture lies at (p + 0.5) / factor - 0.5 of the result."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels


def shrink_factor(box: np.ndarray, size: tuple[int, int], padding: float) -> int:
    """How many pixels of the picture fall on one of the input: bilinear sampling alone would see one in so many."""
    width, height = extent(box, size, padding)
    return max(1, int(min(width / size[1], height / size[0])))


def cut_out(pixels: np.ndarray, matrix: np.ndarray, size: tuple[int, int], shrunk: int) -> np.ndarray:
    """The input (h, w, 3) uint8 that `matrix` cuts out of a picture, bilinear; black where there is no picture.

    pixels: the picture, shrunk by that factor already (matrix is that of the whole one).
    """
    from PIL import Image

    back = inverse(matrix)
    # PIL counts from a pixel's corner: its centre is at 0.5. So 0.5 goes off before `back` and on after it.
    linear, offset = back[:, :2] / shrunk, (back[:, 2] + 0.5 - 0.5 * back[:, :2].sum(axis=1)) / shrunk
    data = (*linear[0], offset[0], *linear[1], offset[1])
    image = Image.fromarray(pixels).transform(size[::-1], Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.array(image)


def random_change(mirrors: bool) -> dict:
    """Random arguments for crop_matrix: half mirrored if allowed, turned by up to 15 degrees, 0.85 to 1.18 as large, moved."""
    dice = (torch.rand(5) * 2 - 1).tolist()  # each -1..1
    shift = (0.05 * dice[3], 0.05 * dice[4])
    return {"mirror": mirrors and dice[0] > 0, "turn": math.radians(15) * dice[1], "zoom": 0.85 ** dice[2], "shift": shift}


def jitter(pixels: torch.Tensor, light: float, contrast: float, colour: float) -> torch.Tensor:
    """A picture (3, h, w), 0..1, with other brightness, contrast and saturation: 0..1 stands for 0.7 to 1.3 times as much."""
    light, contrast, colour = (0.7 + 0.6 * value for value in (light, contrast, colour))
    grey = pixels.mean(dim=0, keepdim=True)
    pixels = (grey + (pixels - grey) * colour) * light
    mean = pixels.mean()
    return (mean + (pixels - mean) * contrast).clamp(0, 1)


def has_area(box: np.ndarray) -> bool:
    return bool(np.isfinite(box).all() and (box[2:] > 0).all())


def fits(box: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a box x, y, w, h shows something of a picture of this (width, height), and is not of another order of size."""
    inside_it = np.minimum(box[:2] + box[2:], size) - np.maximum(box[:2], 0)
    return bool((inside_it > 0).all() and box[2:].max() <= 10 * max(size))


def box_fault(box: np.ndarray | None, size: tuple[int, int]) -> str | None:
    """What is wrong with a figure's box in a picture of this (width, height); None where it can be cut out."""
    if box is None or (has_area(box) and fits(box, size)):
        return None
    return "box that does not fit its picture" if has_area(box) else "box without area"
