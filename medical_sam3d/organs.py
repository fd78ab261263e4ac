"""One organ of a mask: cropped, in RAS order, with its signed distances in mm; or why it cannot be trained on."""

from typing import NamedTuple

import numpy as np

from common.samples import BadFile
from distance import signed_distance
from volumes import to_ras

MIN_VOXELS = 200  # fewer tell no shape
MIN_SLICES = 3  # along every axis
# Of the organ's greatest extent, kept around it. Distances count up to 3 fine voxels, 3 / (4 R) of the cube's edge of 1.12
# extents: 0.105 extents at R = 8. So what lies outside of the crop is farther than they count, wherever the cube is turned.
ROOM_AROUND = 0.15
LEAST_ROOM = 3  # at least
LARGE_PART = 0.1  # of the voxels, from which on a part that is dropped may be anatomy, such as the other kidney
SIDES = (("left", "right"), ("back", "front"), ("bottom", "top"))  # where the RAS axes start and end


class BadOrgan(BadFile):
    """What keeps an organ from being used, "fault, detail" on one line, without the name of the case."""


class Organ(NamedTuple):
    """One organ, its voxels in RAS order: x to the right, y to the front, z to the top of the patient."""

    mask: np.ndarray  # (X, Y, Z) bool, with a margin of False around the organ
    sdf: np.ndarray | None  # (X, Y, Z) float32, mm to the surface, negative inside
    image: np.ndarray | None  # (X, Y, Z) float32, 0 to 1; 0 where the margin reaches beyond the volume
    affine: np.ndarray  # (4, 4) float64, from indices of voxels to RAS mm
    thick_axis: int  # along which the voxels are longest; 2, from bottom to top, where all are alike
    notes: list[str]  # what is worth knowing, "note, detail"

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def crop_organ(
    labels: np.ndarray,
    label: int,
    geometry,
    image: np.ndarray | None = None,
    training: bool = True,
    min_voxels: int = MIN_VOXELS,
    box: tuple[slice, slice, slice] | None = None,
) -> Organ:
    """The organ that `label` stands for in labels (X, Y, Z), with a margin around it.

    geometry (volumes.Geometry): of the labels. image: on the same voxels, 0 to 1 (volumes.normalise). box: a part of the
    labels, in RAS order, that holds all voxels of the label, where one is known. Of several parts (voxels that share a corner
    are of one) the largest is kept, holes stay. BadOrgan where the label has no voxel, or where `training` and the organ is
    cut by the border of the volume, small or flat.
    """
    notes = []
    labels, affine = to_ras(labels, geometry.affine)
    box = box or tuple(slice(0, length) for length in labels.shape)
    part, first = trimmed(labels[box] == label, [place.start for place in box])
    part, first = trimmed(largest_part(part, abs(np.linalg.det(affine[:3, :3])), notes), first)
    if training:
        check_trainable(part, first, labels.shape, min_voxels)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    extent = max(part.shape * spacing)
    margins = np.maximum(LEAST_ROOM, np.ceil(ROOM_AROUND * extent / spacing)).astype(int)
    mask, first = np.pad(part, [(margin, margin) for margin in margins]), first - margins
    if image is not None:
        image = cut_out(to_ras(image, geometry.affine)[0], first, mask.shape).astype(np.float32)
    affine = np.array(affine, np.float64)
    affine[:3, 3] += affine[:3, :3] @ first
    thick_axis = 2 - int(np.argmax(np.round(spacing[::-1], 3)))
    return Organ(mask, signed_distance(mask, spacing), image, affine, thick_axis, notes)


def trimmed(part: np.ndarray, first) -> tuple[np.ndarray, np.ndarray]:
    """(the smallest box of the part that holds all of it, index (3,) of that box's first voxel if the part's own is `first`).

    BadOrgan where nothing is in it.
    """
    box = []
    for axis in range(3):
        places = np.flatnonzero(part.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(places):
            raise BadOrgan("mask that is empty, no voxel of the organ")
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return part[tuple(box)], np.array(first) + [place.start for place in box]


def cut_out(volume: np.ndarray, first, shape) -> np.ndarray:
    """The box of this shape whose first voxel is at index `first`, which may lie outside; 0 where there is no volume."""
    spans = [(start, start + length, end) for start, length, end in zip(first, shape, volume.shape, strict=True)]
    inner = tuple(slice(max(0, start), max(0, min(stop, end))) for start, stop, end in spans)
    return np.pad(volume[inner], [(max(0, -start), max(0, stop - end)) for start, stop, end in spans])


def largest_part(mask: np.ndarray, voxel_mm3: float, notes: list[str]) -> np.ndarray:
    """The part of the mask with most voxels; notes is told what was dropped.

    Voxels that share a corner are connected: a thin wall that runs askew through the voxels would else fall to pieces.
    """
    from scipy.ndimage import label as number_parts

    parts, count = number_parts(mask, np.ones((3, 3, 3)))
    if count == 1:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    total, dropped = sizes.sum(), sizes.sum() - sizes.max()
    what = "organ in several parts of which the largest is kept"
    if np.sort(sizes)[-2] > LARGE_PART * total:
        what = "WARNING: organ with a second part that is large and was dropped; two organs under one label?"
    parts_left = f"{count - 1} other part{'s' if count > 2 else ''}"
    notes.append(f"{what}, {parts_left} with {dropped} of {total} voxels, {dropped * voxel_mm3:.0f} mm^3")
    return parts == 1 + int(np.argmax(sizes))


def check_trainable(part: np.ndarray, first, shape, min_voxels: int) -> None:
    """BadOrgan where a shape has nothing to teach or is not all there.

    part: the box around it, in RAS order; first: the index of its first voxel in a volume of this shape.
    """
    voxels, size = int(np.count_nonzero(part)), " x ".join(map(str, part.shape))
    if voxels == np.prod(shape):
        raise BadOrgan(f"mask that is full, all {voxels} voxels are inside, up to every border")
    flat = part.shape.count(1)
    if flat:
        kind = ("one slice thick", "one line of voxels", "one voxel")[flat - 1]
        raise BadOrgan(f"organ too small, {kind} ({voxels} voxels, {size})")
    if min(part.shape) < MIN_SLICES:
        raise BadOrgan(f"organ too small, fewer than {MIN_SLICES} slices ({voxels} voxels, {size})")
    if voxels < min_voxels:
        raise BadOrgan(f"organ too small, {voxels} voxels of at least {min_voxels} ({size})")
    for axis, sides in enumerate(SIDES):
        for side, place, room in zip(sides, (0, -1), (first[axis], shape[axis] - first[axis] - part.shape[axis]), strict=True):
            if room == 0:
                touching = int(np.count_nonzero(part.take(place, axis)))
                raise BadOrgan(f"organ cut by the border of the volume, {touching} voxels in its {side} slice")
