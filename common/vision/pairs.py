"""Pages of pictures in pairs, the truth beside what a model finds; pictures scaled, and labels placed, to be read."""

from pathlib import Path

import numpy as np

# needs: pillow
from common.plots import drawn_text, figure, font_file, plot_text, save_figure

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#e377c2", "#17becf")
MISSED = "#f58231"  # beside the plots' RIGHT and WRONG
SIDE = 480  # pixels of a picture's longer side on a page, where it is drawn one to one: labels of 11 pixels can be read


def enlarged(pixels: np.ndarray, smallest: int = 320):
    """(PIL picture of uint8 (H, W, 3), factor): its shorter side has `smallest` pixels or more, unless it is very long."""
    height, width = pixels.shape[:2]
    return scaled(pixels, max(1.0, min(smallest / min(width, height), 4 * smallest / max(width, height))))


def fitted(pixels: np.ndarray, side: int = SIDE):
    """(PIL picture of uint8 (H, W, 3), factor): its longer side has `side` pixels."""
    return scaled(pixels, side / max(pixels.shape[:2]))


def scaled(pixels: np.ndarray, zoom: float):
    """(PIL picture of uint8 (H, W, 3), factor): enlarged smoothly, or reduced without aliasing."""
    from PIL import Image

    image = Image.fromarray(pixels)
    size = [max(1, round(length * zoom)) for length in image.size]
    return image.resize(size, Image.Resampling.BICUBIC if zoom > 1 else Image.Resampling.LANCZOS), zoom


def write_labels(draw, size: tuple[int, int], labels: list, height: int = 11) -> np.ndarray:
    """Writes each text at its box (x1, y1, x2, y2), inside the picture, where it covers the least of the others before it.

    labels: [(text, box, colour)]; size: (width, height) of the picture; height: of the letters, in pixels. Returns where they
    are, (N, 4).
    """
    from PIL import ImageFont

    font, taken = ImageFont.truetype(font_file(), height), np.zeros((0, 4))
    for text, box, color in labels:
        text = drawn_text(text, 28)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        w, h = right - left + 4, bottom - top + 4
        places = [limited(x, y, w, h, size) for x, y in corners_for(box, w, h)]
        place = min(places, key=lambda place: covered(place, taken))  # the first of those that are equally good
        taken = np.vstack([taken, place])
        draw.rectangle(place, fill=color)
        draw.text((place[0] + 2 - left, place[1] + 2 - top), text, fill="white", font=font)
    return taken


def corners_for(box, w: float, h: float) -> list[tuple[float, float]]:
    """Where a label of w x h pixels may begin: above its box, below it, within, beside."""
    x1, y1, x2, y2 = box
    outside = [(x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2)]
    return [*outside, (x1, y1), (x2 - w, y1), (x1, y2 - h), (x2 - w, y2 - h), (x2, y1), (x1 - w, y1), (x2, y2 - h)]


def limited(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The rectangle of w x h pixels at x, y, moved into a picture of this (width, height)."""
    x, y = max(0, min(x, size[0] - w - 1)), max(0, min(y, size[1] - h - 1))
    return x, y, x + w, y + h


def covered(place, taken: np.ndarray) -> float:
    """How many pixels of the rectangles `taken` (N, 4) lie under the one at `place`."""
    sides = np.minimum(taken[:, 2:], place[2:]) - np.maximum(taken[:, :2], place[:2])
    return float(sides.clip(0).prod(axis=1).sum())


def draw_dashed(draw, box, color, width: int, dash: int = 7) -> None:
    """The outline of a box (x1, y1, x2, y2) in dashes."""
    x1, y1, x2, y2 = box
    for start in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line([start, y, min(start + dash, x2), y], fill=color, width=width)
    for start in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line([x, start, x, min(start + dash, y2)], fill=color, width=width)


def save_pairs(pairs: list, title: str, legend: dict, path: Path) -> None:
    """A page of [((picture, title), (picture, title))], truth on the left and what was found on the right, two pairs a row.

    legend: {text: style of a line}, for matplotlib.
    """
    columns = max(1, min(2, len(pairs)))
    rows = max(1, -(-len(pairs) // columns))
    shape = max((picture.height / picture.width for pair in pairs for picture, _ in pair), default=0.1)
    page, axes = figure(rows, 2 * columns, width=SIDE / 120 + 0.15, height=SIDE / 120 * min(1, shape) + 0.55)
    page.suptitle(plot_text(title, 150), fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (picture, text) in zip(axes.flat, (half for pair in pairs for half in pair), strict=False):
        axis.imshow(picture)
        axis.set_title("\n".join(plot_text(line, 64) for line in text.splitlines()), fontsize=9)
    if pairs and legend:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], label=plot_text(text), **style) for text, style in legend.items()]
        page.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    save_figure(page, path)
