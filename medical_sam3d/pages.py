"""Pictures of organs: predictions over the truth in three planes, and scores as box plots; what a run leaves of them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.batches import whole_batches
from common.plots import figure, plot_text, save_figure
from meshes import mesh_to_mask
from metrics import measure, save_samples

# An axis of voxels in RAS order: (letter where it starts, letter where it ends).
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))
# Each plane: (title, axis across it, axis that runs to the left, axis that runs up): the patient's right, or front, is on the
# left of the picture, as radiologists look at it.
PLANES = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))
TRUTH_COLOR = "#1f6fd6"  # blue and orange differ for people who see red and green alike
COLORS = ("#ff7f0e", "#8c564b", "#e377c2")  # of the masks over the truth, the first in the foreground
SYSTEM_COLORS = ("0.75", "0.6", "0.45", "#9ecae1", "#1f6fd6", "#d9c27e")
MOST_BOXES = 8  # organs in the box plots, those with the most cases
FEW_POINTS = 5  # of fewer values, a box says more than there is


class Shown(NamedTuple):
    """An organ in a picture. masks: name -> (X, Y, Z) bool on its voxels, the truth not among them."""

    title: str
    organ: object
    masks: dict[str, np.ndarray]


# ---- three planes ----------------------------------------------------------------------------------------------------


def middle_slices(mask: np.ndarray) -> list[int]:
    """For each axis, the slice in which most of a mask lies, of those the one that is nearest to its middle."""
    found = []
    for axis in range(3):
        areas = mask.sum(axis=tuple({0, 1, 2} - {axis})).astype(float)
        middle = (areas * np.arange(len(areas))).sum() / max(areas.sum(), 1)
        best = np.flatnonzero(areas == areas.max())
        found.append(int(best[np.abs(best - middle).argmin()]))
    return found


def draw_planes(shown: list[Shown], path: Path, own: str = "truth") -> None:
    """A row for each organ, its three planes side by side: its own mask's outline, and those of the masks, over the image.

    Where there is no image, over its own mask. own: what that is called. Voxels have their true shape; R, L, A, P, S, I name
    the sides of the patient.
    """
    page, axes = figure(len(shown), 3, 3.6, 3.7)
    for item, line in zip(shown, axes, strict=True):
        places = middle_slices(item.organ.mask)
        for axis, plane in zip(line, PLANES, strict=True):
            draw_plane(axis, item, plane, places[plane[1]])
        line[0].set_title(f"{plot_text(item.title, 60)}", fontsize=9, loc="left", pad=22)
    names = list(dict.fromkeys(name for item in shown for name in item.masks))
    handles = [axes[0, 0].plot([], [], color=TRUTH_COLOR, lw=3, label=own)[0]]
    handles += [axes[0, 0].plot([], [], color=c, ls=ls, label=plot_text(n))[0] for n, (c, ls) in looks(names).items()]
    page.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save_figure(page, path)


def looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (colour, line style): the first is drawn through, the others dashed."""
    return {name: (COLORS[i % len(COLORS)], "-" if i == 0 else "--") for i, name in enumerate(names)}


def draw_plane(axis, item: Shown, plane: tuple[str, int, int, int], place: int) -> None:
    """One slice of an organ, `place` along the axis across the plane."""
    from matplotlib.patheffects import withStroke

    title, across, left, up = plane
    organ, spacing = item.organ, np.linalg.norm(item.organ.affine[:3, :3], axis=0)

    def cut(volume):
        part = np.take(volume, place, across)  # two axes remain, in the order of the volume: left before up in every plane
        return part.T

    picture = cut(0.35 * organ.mask if organ.image is None else organ.image)
    low, high = (0.0, 1.0) if organ.image is None else window_of(organ.image)
    w, h = picture.shape[1] * spacing[left], picture.shape[0] * spacing[up]
    look = {"cmap": "gray", "origin": "lower", "vmin": low, "vmax": max(high, low + 1e-3)}
    axis.imshow(picture, extent=(0, w, 0, h), **look)
    centres = [(np.arange(n) + 0.5) * s for n, s in ((picture.shape[1], spacing[left]), (picture.shape[0], spacing[up]))]
    lines = [(item.masks[name], color, style, 1.3) for name, (color, style) in looks(list(item.masks)).items()]
    for mask, color, style, wide in [(organ.mask, TRUTH_COLOR, "-", 3), *lines[::-1]]:  # the widest first: all are seen
        part = cut(mask)
        if part.any() and not part.all():
            axis.contour(*centres, part.astype(float), [0.5], colors=[color], linestyles=[style], linewidths=wide)
    axis.grid(False)
    axis.set(xticks=[], yticks=[], aspect="equal", xlim=(w, 0), ylim=(0, h))
    axis.set_xlabel(f"{title}, {w:.0f} x {h:.0f} mm", fontsize=8)
    dark = [withStroke(linewidth=2, foreground="black")]  # letters are seen on bone, too
    style = {"color": "#ffd60a", "fontsize": 9, "fontweight": "bold", "transform": axis.transAxes, "path_effects": dark}
    axis.text(0.02, 0.5, ENDS[left][1], ha="left", va="center", **style)
    axis.text(0.98, 0.5, ENDS[left][0], ha="right", va="center", **style)
    axis.text(0.5, 0.98, ENDS[up][1], ha="center", va="top", **style)
    axis.text(0.5, 0.02, ENDS[up][0], ha="center", va="bottom", **style)


def window_of(image: np.ndarray) -> tuple[float, float]:
    """Which values of an image (X, Y, Z) are black and white: those between which nearly all lie, but for 0 around a volume."""
    there = image[image > 0]
    return tuple(np.percentile(there, [1, 99])) if there.size else (0.0, 1.0)


# ---- box plots -------------------------------------------------------------------------------------------------------


def draw_scores(rows: list[dict], metrics: dict[str, str], path: Path) -> None:
    """scores.png: for each organ a box for each system; a panel for each of metrics (key -> title with its unit).

    rows: of systems.score_systems. A box is from the first to the third quartile with the median, whiskers reach 1.5 of that;
    points are organs. Those that were missed have no distance: how many is written at the top.
    """
    organs = sorted({row["organ"] for row in rows}, key=lambda name: (-sum(row["organ"] == name for row in rows), name))
    shown, systems = sorted(organs[:MOST_BOXES]), list(dict.fromkeys(row["system"] for row in rows))
    groups = [*(["all organs"] if len(organs) > 1 else []), *shown]
    page, panels = figure(len(metrics), 1, max(6.0, 1.1 + 1.5 * len(groups)), 3.4)
    for (axis,), (key, title) in zip(panels, metrics.items(), strict=True):
        for place, name in enumerate(groups):
            own = [row for row in rows if name in (row["organ"], "all organs")]
            draw_group(axis, place, own, systems, key)
        counts = [sum(name in (row["organ"], "all organs") for row in rows) // len(systems) for name in groups]
        labels = [f"{plot_text(name, 22)}\nn = {count}" for name, count in zip(groups, counts, strict=True)]
        axis.set_xticks(range(len(groups)), labels, fontsize=8)
        axis.set(ylabel=title, xlim=(-0.6, len(groups) - 0.4))
        axis.grid(axis="x", visible=False)
    rest = f" (the {MOST_BOXES} of {len(organs)} organs with the most cases)" if len(organs) > MOST_BOXES else ""
    page.suptitle(f"Scores by organ{rest}", fontsize=11)
    handles = [panels[0, 0].fill_between([], [], color=color_of(i), label=plot_text(name)) for i, name in enumerate(systems)]
    page.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(page, path)


def color_of(place: int) -> str:
    return SYSTEM_COLORS[place % len(SYSTEM_COLORS)]


def draw_group(axis, place: int, rows: list[dict], systems: list[str], key: str) -> None:
    """The boxes of one organ's systems, side by side around x = place."""
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        values = np.array([row[key] for row in rows if row["system"] == system and row[key] is not None], float)
        finite, x = values[np.isfinite(values)], place - 0.4 + width * (i + 0.5)
        if len(finite) >= FEW_POINTS:
            look = {"facecolor": color_of(i), "edgecolor": "0.2", "linewidth": 0.8}
            how = {"patch_artist": True, "showfliers": False, "manage_ticks": False, "medianprops": {"color": "black"}}
            axis.boxplot(finite, positions=[x], widths=0.85 * width, boxprops=look, **how)
        shift = np.linspace(-0.25, 0.25, len(finite)) * width if len(finite) > 1 else [0.0] * len(finite)
        edge = {"edgecolors": "0.2", "linewidths": 0.5, "zorder": 3}
        axis.scatter(x + np.asarray(shift), finite, s=12, color=color_of(i), **edge)
        if missed := len(values) - len(finite):
            transform = axis.get_xaxis_transform()
            axis.text(x, 0.99, f"{missed}\nmissed", transform=transform, ha="center", va="top", fontsize=7, color="#d62728")


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def draw_results(model, loader, folder: Path) -> None:
    """What a run leaves of its best model on the validation data: samples.json, predictions/validation.png of a few organs."""
    dataset = loader.dataset
    found = list(measure(model, whole_batches(dataset, loader.collate_fn, 1), dataset))
    save_samples(dataset, found, folder / "samples.json")
    shown = []
    for word, row in worst_median_best(found).items():
        organ, name = dataset.organ(row["index"]), dataset.items[row["index"]].name
        mask = mesh_to_mask(row["mesh"], organ.mask.shape, organ.affine)
        masks = {"prediction": mask, "interpolation": dataset.observed(row["index"]).filled}
        shown.append(Shown(f"{word}: {name}, Dice {row['dice']:.3f}", organ, masks))
    draw_planes(shown, folder / "predictions" / "validation.png")


def worst_median_best(rows: list[dict]) -> dict[str, dict]:
    """Word -> the row that has the lowest, the middle and the highest Dice; of fewer than three rows, fewer words."""
    rows = sorted((row for row in rows if row["dice"] is not None), key=lambda row: row["dice"])
    places = {0: "worst", len(rows) - 1: "best", len(rows) // 2: "median"} if rows else {}
    return {places[place]: rows[place] for place in sorted(places)}
