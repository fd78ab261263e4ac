"""Whether a mask and an image lie on the same voxels, or in the same place at least: compared in mm, said with figures."""

import numpy as np

from nifti_header import Geometry, in_mm

GRID_TOLERANCE = 0.02  # voxels that two grids may be apart to count as one: rounding, however two programs write numbers
OVERLAP = 0.5  # of the smaller volume, least of a mask and an image that belong together
PROBES = 12  # points along each axis, by which the overlap is measured


def check_pair(image: Geometry, mask: Geometry) -> str:
    """ "" where a mask can belong to an image, or what is wrong: slices are missing, or they are of different places.

    A mask may lie on voxels of its own, finer or cropped, and be stored in another order of the axes. See pair_note.
    """
    if same_grid(mask, image):
        return ""
    ours, theirs = in_ras_order(mask), in_ras_order(image)
    if same_grid(ours, theirs):  # stored in another order of the axes
        return ""
    if same_axes(ours, theirs) and ours.shape != theirs.shape and share_a_corner(ours, theirs):
        shapes = f"{by(mask.shape)} for {by(image.shape)}, both in voxels of {in_mm(image.spacing)}"
        return f"mask and image of different shape, {shapes}: slices are missing in one of them"
    if ours.shape == theirs.shape and not same_axes(ours, theirs):
        voxels = f"{in_mm(mask.spacing)} for {in_mm(image.spacing)}, axes up to {angle_between(ours, theirs):.2g} degrees apart"
        return f"mask and image of one shape in different voxels, {voxels}: one of the two headers is wrong"
    share = overlap(ours, theirs)
    if share < OVERLAP:
        origins = np.linalg.norm(ours.affine[:3, 3] - theirs.affine[:3, 3])
        return f"mask and image of different places, {share:.0%} of the space is shared; origins {origins:.4g} mm apart"
    return ""


def pair_note(image: Geometry, mask: Geometry) -> str:
    """What is worth knowing where a mask that belongs to an image is not on its voxels; "" where it is."""
    if same_grid(mask, image):
        return ""
    ours, theirs = in_ras_order(mask), in_ras_order(image)
    if same_grid(ours, theirs):  # stored in another order of the axes
        return ""
    if ours.shape == theirs.shape and same_axes(ours, theirs):
        shift = max(ours.corners - theirs.corners, key=np.linalg.norm)
        voxels = np.abs(np.linalg.solve(ours.affine[:3, :3], shift)).max()
        off = f"{in_mm(shift)} off, {np.linalg.norm(shift):.3g} mm in all, up to {voxels:.2g} voxels along an axis"
        return f"mask that is not on the image's voxels, {off}: used in its own place"
    grids = (f"{by(one.shape)} voxels of {in_mm(one.spacing)}" for one in (mask, image))
    return "mask on voxels of its own, {} for {}: the image is resampled onto them".format(*grids)


def in_ras_order(geometry: Geometry) -> Geometry:
    """The same voxels with the axes of the array in the order R, A, S."""
    from nibabel.orientations import inv_ornt_aff, io_orientation

    orientation = io_orientation(geometry.affine)
    shape = [0, 0, 0]
    for size, (axis, _) in zip(geometry.shape, orientation, strict=True):
        shape[int(axis)] = size
    return Geometry(tuple(shape), geometry.affine @ inv_ornt_aff(orientation, geometry.shape))


def same_grid(one: Geometry, other: Geometry) -> bool:
    if one.shape != other.shape:
        return False
    apart = np.linalg.norm(one.corners - other.corners, axis=1).max()
    return bool(apart <= max(1e-3, GRID_TOLERANCE * one.spacing.min()))


def same_axes(one: Geometry, other: Geometry) -> bool:
    """Whether directions and sizes of the voxels agree, to a hundredth."""
    return bool(np.abs(one.affine[:3, :3] - other.affine[:3, :3]).max() <= 0.01 * one.spacing.min())


def angle_between(one: Geometry, other: Geometry) -> float:
    """Degrees between those axes of two grids that differ most."""
    cosines = ((one.affine[:3, :3] / one.spacing) * (other.affine[:3, :3] / other.spacing)).sum(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())


def share_a_corner(one: Geometry, other: Geometry) -> bool:
    """Whether the first or the last voxel of both is the same: what is cut off at one end, and not cropped to an organ."""
    apart = np.linalg.norm(one.corners - other.corners, axis=1)[[0, -1]]
    return bool(apart.min() <= 0.05 * one.spacing.min())


def overlap(one: Geometry, other: Geometry) -> float:
    """The part of the smaller of two volumes that lies in the other one."""
    return max(part_inside(one, other), part_inside(other, one))


def part_inside(one: Geometry, other: Geometry) -> float:
    steps = [(np.arange(PROBES) + 0.5) / PROBES * size - 0.5 for size in one.shape]
    points = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    way = np.linalg.inv(other.affine) @ one.affine  # index in one -> index in the other
    there = points @ way[:3, :3].T + way[:3, 3]
    return float(((there > -0.5) & (there < np.array(other.shape) - 0.5)).all(axis=1).mean())


def by(shape) -> str:
    return " x ".join(map(str, shape))
