"""Pictures with keypoints drawn on them, and pages of figures: the truth beside what a model finds, the errors as lines."""

from pathlib import Path

import numpy as np

from common.batches import whole_batches
from common.plots import WRONG
from common.samples import short_names
from common.vision.pairs import COLORS, enlarged, fitted, save_pairs
from common.vision.pictures import decode
from data import collate
from keypoints import KeypointSet
from metrics import detect, draw_evaluation, point_errors, save_samples

FEW = 20  # keypoints that have colours of their own, and names beside the page; more are small dots in one colour
BONE = "#ffe119"
DOT = "#1fc8ff"  # of many keypoints: light, for most of them lie on dark or on skin


def colors_of(points: KeypointSet, otherwise: str) -> list[str]:
    """A colour for each keypoint."""
    few = len(points.names) <= FEW
    return [COLORS[k % len(COLORS)] if few else otherwise for k in range(len(points.names))]


def on_picture(places: np.ndarray, zoom: float) -> list[tuple[float, float]]:
    """Points (K, 2), whole numbers at pixel centres, on a picture that is `zoom` times as large."""
    return [((x + 0.5) * zoom - 0.5, (y + 0.5) * zoom - 0.5) for x, y in places]


def draw_figure(draw, at: list, drawn, points: KeypointSet, unit: int, color: str = DOT) -> None:
    """The skeleton and the keypoints of a figure, those that are to be drawn (K,)."""
    for a, b in points.skeleton:
        if drawn[a] and drawn[b]:
            draw.line([at[a], at[b]], fill=BONE, width=unit)
    for k, fill in enumerate(colors_of(points, color)):
        if drawn[k]:
            draw_dot(draw, at[k], dot_radius(points, unit), fill)


def draw_dot(draw, at: tuple[float, float], radius: float, fill: str, rim: str = "white") -> None:
    """A dot; a small one has no rim, which would be all that is seen of it."""
    ends = [at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius]
    draw.ellipse(ends, fill=fill, outline=rim if radius >= 3 else fill)


def dot_radius(points: KeypointSet, unit: int) -> float:
    return (3 if len(points.names) <= FEW else 2.5) * unit


def draw_poses(pixels: np.ndarray, poses: list, points: KeypointSet):
    """A PIL picture of (H, W, 3) uint8 pixels with figures' keypoints and skeletons; small pictures are enlarged.

    poses: [(places (K, 2) x, y, which of them to draw (K,))].
    """
    from PIL import ImageDraw

    image, zoom = enlarged(pixels)
    for places, drawn in poses:
        draw_figure(ImageDraw.Draw(image), on_picture(places, zoom), drawn, points, max(1, min(image.size) // 300))
    return image


def draw_pair(pixels: np.ndarray, truth: np.ndarray, labelled: np.ndarray, found: np.ndarray, points: KeypointSet):
    """(picture with the labelled keypoints, picture with the found ones and a line to each from its truth)."""
    from PIL import ImageDraw

    (left, zoom), (right, _) = fitted(pixels), fitted(pixels)
    true, guessed = on_picture(truth, zoom), on_picture(found, zoom)
    unit = 2 if len(points.names) <= FEW else 1
    draw_figure(ImageDraw.Draw(left), true, labelled, points, unit)
    draw = ImageDraw.Draw(right)
    draw_figure(draw, guessed, np.ones(len(found), dtype=bool), points, unit)
    for k in np.flatnonzero(labelled):
        draw.line([true[k], guessed[k]], fill=WRONG, width=unit + 1)
        draw_dot(draw, true[k], dot_radius(points, unit) / 2, "white", "black")
    return left, right


def page_legend(points: KeypointSet) -> dict:
    """What the colours mean, for save_pairs."""
    dot = {"ls": "", "marker": "o", "ms": 7}
    colors = colors_of(points, DOT)
    named = dict(zip(points.names, colors, strict=True)) if len(points.names) <= FEW else {"found": DOT}
    error = {
        "its truth (white), and the error": {"color": WRONG, "lw": 3, "marker": "o", "mfc": "white", "mec": "black", "ms": 6}
    }
    return {name: {**dot, "color": color} for name, color in named.items()} | error


def draw_page(dataset, found: list[dict], points: KeypointSet, indices, title: str, path: Path) -> None:
    """A page of figures in pairs, each cut out around its box: on the left the truth, on the right what is found, and errors."""
    by_index, pairs = {item["index"]: item for item in found}, []
    names = short_names([sample.path for sample in dataset.samples])
    offsets, boxes = point_errors(dataset, found)
    rows = dict(zip(by_index, np.linalg.norm(offsets, axis=2), strict=True))
    sides = dict(zip(by_index, boxes[:, 2:].max(axis=1), strict=True))
    for index in indices:
        sample, errors = dataset.samples[index], rows[index]
        pixels, low = around(decode(sample.path, dataset.pictures[sample.path].size), dataset.box(index)[0])
        pictures = draw_pair(pixels, sample.points - low, sample.labelled, by_index[index]["points"] - low, points)
        many, farthest = int(sample.labelled.sum()), int(np.nanargmax(errors))
        above = f"{names[index]}\ntruth: {many} of {len(points.names)} keypoints"
        mean = f"mean error {np.nanmean(errors):.1f} px, {np.nanmean(errors) / sides[index]:.1%} of the box"
        beside = f"{mean}\nlargest {errors[farthest]:.1f} px: keypoint {points.names[farthest]}"
        pairs.append(tuple(zip(pictures, (above, beside), strict=True)))
    save_pairs(pairs, title, page_legend(points), path)


def around(pixels: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what lies in a box x, y, w, h and a quarter around it, its upper left corner x, y)."""
    x, y, w, h = box
    low = np.floor(np.maximum(0, [x - w / 4, y - h / 4])).astype(int)
    high = np.ceil([x + w * 1.25, y + h * 1.25]).astype(int)
    return np.ascontiguousarray(pixels[low[1] : high[1], low[0] : high[0]]), low


def farthest_first(dataset, found: list[dict]) -> list[int]:
    """Figures' indices by their mean error as a share of the box."""
    offsets, boxes = point_errors(dataset, found)
    mean = np.nanmean(np.linalg.norm(offsets, axis=2), axis=1) / boxes[:, 2:].max(axis=1)
    return [found[i]["index"] for i in np.argsort(-mean, kind="stable")]


def draw_pages(dataset, found: list[dict], points: KeypointSet, path: Path, worst: Path | None = None) -> None:
    """The first figures as a page, and those with the largest errors as another."""
    total = len(dataset)
    first = range(min(6, total))
    draw_page(dataset, found, points, first, f"the first {len(first)} of {total} figures", path)
    if worst:
        order = farthest_first(dataset, found)[:8]
        title = f"the {len(order)} of {total} figures with the largest mean error as a share of their box, the worst first"
        draw_page(dataset, found, points, order, title, worst)


def draw_results(model, dataset, points: KeypointSet, folder: Path) -> None:
    """What a run leaves of its best model on the validation data: samples.json, plots/, predictions/validation.png."""
    found = [item for items in detect(model, whole_batches(dataset, collate, 32)) for item in items]
    save_samples(dataset, found, folder / "samples.json")
    draw_evaluation(dataset, found, points, folder / "plots")
    draw_pages(dataset, found, points, folder / "predictions" / "validation.png")
