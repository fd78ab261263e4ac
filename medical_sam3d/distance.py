"""Signed distances in mm from a mask of voxels, which may be longer along one axis than along another."""

import numpy as np


def signed_distance(mask: np.ndarray, spacing, smooth: float = 0.7) -> np.ndarray:
    """(X, Y, Z) float32, mm from each voxel's centre to the mask's surface: negative inside, zero half-way between voxels.

    mask: (X, Y, Z) bool; spacing: (3,) mm. smooth: sigma in voxels of the Gaussian that takes the staircase off; 0: none.
    ValueError for a mask that has no surface: nothing or everything is inside.

    A Gaussian alone draws each surface towards its centre of curvature: by sigma^2 / R, and bone one voxel thick to a third. So
    what it took away is smoothed and given back once (Tukey's twicing, 2 G d - G G d), which has no such bias. Measured on
    balls of 4 to 20 voxels: 0.1 voxels off near the surface and 0.02 in the mean, where a Gaussian alone is 0.1 too small.
    """
    from scipy.ndimage import gaussian_filter

    mask = np.asarray(mask, bool)
    if not mask.any() or mask.all():
        raise ValueError(f"mask without a surface: {'all' if mask.any() else 'none'} of its {mask.size} voxels are inside")
    distance = distance_outside(mask, spacing) - distance_outside(~mask, spacing)
    if smooth:
        once = gaussian_filter(distance, smooth, mode="nearest")
        distance = 2 * once - gaussian_filter(once, smooth, mode="nearest")
    return distance


def distance_outside(mask: np.ndarray, spacing) -> np.ndarray:
    """(X, Y, Z) float32, mm from the surface of the mask where a voxel is outside of it, 0 inside.

    The distance transform tells how far the nearest voxel inside has its centre; the surface comes half a voxel before that.
    How long half a voxel is depends on the way there: n_x^2 s_x + n_y^2 s_y + n_z^2 s_z, halved, along the unit vector n.
    """
    from scipy.ndimage import distance_transform_edt

    whole, nearest = distance_transform_edt(~mask, sampling=spacing, return_indices=True)
    whole = whole.astype(np.float32)
    step = np.zeros_like(whole)
    for axis, size in enumerate(spacing):
        places = np.arange(mask.shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
        step += ((nearest[axis] - places) * np.float32(size)) ** 2 * np.float32(size)
    return whole - step / (2 * np.maximum(whole, 1e-6) ** 2)
