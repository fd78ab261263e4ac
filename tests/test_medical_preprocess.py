"""Signed distances in mm, organs cropped out of masks, what is kept of them on disk, and the script that prepares and reports."""

import numpy as np
import pytest
from conftest import MEDICAL, use_task

TASK = MEDICAL
use_task(TASK)

from distance import signed_distance  # noqa: E402


def ball(radius, spacing, offset=(0, 0, 0), margin=6):
    """((X, Y, Z) mask of a ball, distance of each voxel's centre from its surface), its centre `offset` mm off a voxel's."""
    counts = [2 * int(np.ceil((radius + margin) / size)) + 1 for size in spacing]
    axes = [(np.arange(n) - n // 2) * size + o for n, size, o in zip(counts, spacing, offset, strict=True)]
    distance = np.linalg.norm(np.stack(np.meshgrid(*axes, indexing="ij")), axis=0) - radius
    return distance < 0, distance


def volume_within(distance, spacing):
    """mm^3 inside of the zero level, each voxel counted by the share of it that is inside."""
    slopes = np.abs(np.stack(np.gradient(distance, *spacing)))
    width = np.tensordot(spacing, slopes, 1)  # of the voxel, along the way to the surface
    return float(np.clip(0.5 - distance / np.maximum(width, 1e-6), 0, 1).sum() * np.prod(spacing))


# ---- distances -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius, spacing", [(10, (1, 1, 1)), (4, (1, 1, 1)), (10, (1.2, 1.5, 2)), (15, (1, 1, 3))])
def test_distances_to_a_ball_are_right_in_mm_and_draw_no_surface_inwards(radius, spacing):
    voxel = np.prod(spacing) ** (1 / 3)
    errors, volumes = [], []
    for offset in ((0, 0, 0), (0.3, 0.4, -0.2), (-0.45, 0.1, 0.5)):
        mask, true = ball(radius, spacing, np.multiply(offset, spacing))
        found = signed_distance(mask, spacing)
        errors.append((found - true)[np.abs(true) < voxel])
        volumes.append(volume_within(found, spacing) / (4 / 3 * np.pi * radius**3))
    errors = np.concatenate(errors)
    assert np.abs(errors).mean() < 0.15 * voxel
    assert abs(errors.mean()) < 0.05 * voxel
    assert np.mean(volumes) == pytest.approx(1, abs=0.03)


def test_distances_through_thick_slices_are_in_mm():
    mask, true = ball(12, (0.7, 0.7, 5))
    found = signed_distance(mask, (0.7, 0.7, 5))
    assert np.abs(found - true)[np.abs(true) < 3].mean() < 0.6
    assert np.array_equal(found[:, :, mask.shape[2] // 2] < 0, mask[:, :, mask.shape[2] // 2])


def test_a_flat_surface_lies_half_way_between_the_centres_of_its_voxels():
    mask = np.zeros((20, 20, 20), bool)
    mask[:8] = True
    found = signed_distance(mask, (0.5, 1, 2))
    assert found[4:-4, 10, 10] == pytest.approx((np.arange(4, 16) - 7.5) * 0.5, abs=1e-4)


def test_bone_one_voxel_thick_keeps_most_of_its_volume():
    mask = np.zeros((24, 24, 12), bool)
    mask[4:20, 4:20, 6] = True
    assert volume_within(signed_distance(mask, (1, 1, 1)), (1, 1, 1)) > 0.7 * mask.sum()


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_without_a_surface_is_named(value):
    with pytest.raises(ValueError, match="without a surface"):
        signed_distance(np.full((5, 5, 5), value), (1, 1, 1))
