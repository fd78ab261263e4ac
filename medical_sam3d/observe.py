"""What thick slices show of an organ: some of its slices, and the shape between them by interpolation.

    observed = observe(organ, every=5, phase=2)     # as a scan with slices five times as thick would have it
    observed = observe(organ, kept=kept_slices(organ.mask))     # a file in which somebody has annotated every n-th slice

The model sees the interpolation alone and is to find what it misses. So nothing here looks at a slice that is not kept, but for
where the organ begins and ends, on which the phase is counted.
"""

from typing import NamedTuple

import numpy as np

from distance import signed_distance


class Observed(NamedTuple):
    """What is seen of an organ, on the organ's own voxel grid.

    mask (X, Y, Z) bool: each voxel as the kept slice nearest to it has it. filled (X, Y, Z) bool: shape-based interpolation.
    sdf (X, Y, Z) float32: signed distance to the surface of filled in mm, negative inside. axis: the slices' own; kept: their
    indices along it.
    """

    mask: np.ndarray
    filled: np.ndarray
    sdf: np.ndarray
    axis: int
    kept: np.ndarray


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Edges of a voxel in mm (3,), whatever way the volume is turned."""
    return np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)


def slices_of(mask: np.ndarray, axis: int) -> np.ndarray:
    """Which slices along an axis hold something, bool."""
    return mask.any(axis=tuple(other for other in range(3) if other != axis))


def thin(mask: np.ndarray, every: int, phase: int, axis: int) -> np.ndarray:
    """The indices of every n-th slice along the axis, of those `phase` slices away from the first that holds the organ.

    An organ of fewer than 2 * every slices keeps more of them, so that at least two hold it: one slice has no shape along its
    axis. Of one slice all are kept.
    """
    held = np.flatnonzero(slices_of(mask, axis))
    step = max(1, min(every, (held[-1] - held[0] + 1) // 2))
    return np.arange((held[0] + phase % step) % step, mask.shape[axis], step)


def kept_slices(mask: np.ndarray, axis: int | None = None) -> tuple[int, np.ndarray]:
    """(axis, indices) of the slices in which somebody has drawn the organ, and between which nobody has.

    These are at least three slices, no two of which are neighbours, each overlapping the next. Else all slices count: an organ
    in two parts has neighbouring slices, a flat one has a single slice. axis: the only one to look along.
    """
    for along in range(3) if axis is None else (axis,):
        held = np.flatnonzero(slices_of(mask, along))
        if len(held) >= 3 and np.diff(held).min() > 1:
            drawn = np.take(mask, held, along)
            drawn = np.moveaxis(drawn, along, 0)
            if (drawn[1:] & drawn[:-1]).any((1, 2)).all():
                return along, held
    along = 2 if axis is None else axis
    return along, np.arange(mask.shape[along])


def observe(organ, every: int = 1, phase: int = 0, kept: tuple[int, np.ndarray] | None = None) -> Observed:
    """An organ (organs.Organ) as every n-th slice along its thick_axis shows it; every 1 shows it as it is.

    kept: instead of every and phase, the (axis, indices) of the slices that are known. Only these are looked at. ValueError
    where none of them holds the organ.
    """
    axis, kept = kept or (organ.thick_axis, thin(organ.mask, every, phase, organ.thick_axis))
    spacing = spacing_of(organ.affine)
    if len(kept) == organ.mask.shape[axis]:
        sdf = signed_distance(organ.mask, spacing) if organ.sdf is None else organ.sdf
        return Observed(organ.mask, organ.mask, sdf, axis, kept)
    if not np.take(organ.mask, kept, axis).any():
        raise ValueError("organ that no kept slice shows")
    filled = fill(organ.mask, axis, kept, spacing)
    return Observed(repeat_nearest(organ.mask, axis, kept), filled, signed_distance(filled, spacing), axis, kept)


def with_ends(kept: np.ndarray) -> np.ndarray:
    """The kept slices and one more before and behind them, as far away as the next: it would have been empty."""
    first, last = (kept[1] - kept[0], kept[-1] - kept[-2]) if len(kept) > 1 else (1, 1)
    return np.array([kept[0] - first, *kept, kept[-1] + last])


def at_kept(slices: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """The slices (P, Q) at these places of (S, P, Q), the first and the last of which are empty ones of with_ends."""
    empty = np.zeros(slices.shape[1:], bool)
    return [empty, *slices[places[1:-1]], empty]


def repeat_nearest(mask: np.ndarray, axis: int, kept: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool: thick slices, each as far as half-way to the next kept one, the last ones, too."""
    slices, places = np.moveaxis(mask, axis, 0), with_ends(kept)
    nearest = np.abs(np.arange(len(slices))[:, None] - places).argmin(1)
    return np.moveaxis(np.stack(at_kept(slices, places))[nearest], 0, axis)


def fill(mask: np.ndarray, axis: int, kept: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool: what the kept slices of a mask leave open, by shape-based interpolation; spacing (3,) mm.

    Signed distances to the outlines, in the plane, are interpolated linearly from slice to slice, and are negative inside (Raya
    and Udupa, Shape-based interpolation of multidimensional objects, 1990; Herman, Zheng and Bucholtz 1992). A slice without the
    organ has no outline: it counts as far from one everywhere as its neighbour's innermost point is, so that the organ ends in
    a cap that closes half-way to it.
    """
    slices, places = np.moveaxis(mask, axis, 0), with_ends(kept)
    drawn, filled = at_kept(slices, places), np.zeros(slices.shape, bool)
    fields = [outline_distance(each, np.delete(spacing, axis)) if each.any() else None for each in drawn]
    for low, high, below, above in zip(places, places[1:], fields, fields[1:], strict=False):
        if below is None and above is None:
            continue
        below = -above.min() if below is None else below
        above = -below.min() if above is None else above
        for place in range(max(low, 0), min(high + 1, len(slices))):
            share = (place - low) / (high - low)
            filled[place] |= (1 - share) * below + share * above < 0
    return np.moveaxis(filled, 0, axis)


def outline_distance(drawn: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Signed distance (P, Q) in mm to the outline of a 2-D mask; outside and inside neighbours are as far from it."""
    from scipy.ndimage import distance_transform_edt

    around = np.pad(drawn, 1)  # an organ that fills its slice has an outline, too
    return (distance_transform_edt(~around, spacing) - distance_transform_edt(around, spacing))[1:-1, 1:-1]
