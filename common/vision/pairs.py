"""Pages of pictures in pairs, the truth beside what a model finds; pictures enlarged and coloured to be drawn on."""

from pathlib import Path

import numpy as np

# needs: pillow
from common.plots import figure, save_figure

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#e377c2", "#17becf")


def enlarged(pixels: np.ndarray, smallest: int = 320):
    """(PIL picture of uint8 (H, W, 3), factor): its shorter side has `smallest` pixels or more, unless it is very long."""
    from PIL import Image

    image = Image.fromarray(pixels)
    zoom = max(1.0, min(smallest / min(image.size), 4 * smallest / max(image.size)))
    return image.resize((round(image.width * zoom), round(image.height * zoom)), Image.Resampling.BICUBIC), zoom


def save_pairs(pairs: list, path: Path) -> None:
    """A page of [((picture, title), (picture, title))], truth on the left and what was found on the right, three pairs a row."""
    columns = min(3, len(pairs))
    page, axes = figure(-(-len(pairs) // columns), 2 * columns, width=2.6, height=2.6)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (picture, title) in zip(axes.flat, (half for pair in pairs for half in pair), strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
    save_figure(page, path)
