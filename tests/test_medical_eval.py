"""Distances between masks and meshes, against what can be worked out by hand; what becomes of organs that are missed."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import MEDICAL, use_task
from trimesh.creation import box, icosphere

TASK = MEDICAL
use_task(MEDICAL)
from surface_scores import (  # noqa: E402
    distance_scores,
    mask_scores,
    mesh_scores,
    on_grid,
    one_grid,
    summary_of,
)

SPACING = np.array([0.5, 1.5, 4.0])
AFFINE = np.diag([*SPACING, 1.0])


def block(first, last, shape=(40, 30, 16)):
    """A mask (X, Y, Z) of the voxels from first up to last."""
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, first, last))] = True
    return mask


def ball(radius, centre, spacing=1.0, side=32.0):
    """A ball (mm) in a cube of `side` mm that is centred at 0."""
    n = round(side / spacing)
    points = (np.indices((n, n, n)) + 0.5) * spacing - side / 2
    return ((points - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2


TRUTH = block((10, 8, 4), (30, 20, 12))  # 20 x 12 x 8 voxels


def test_a_shift_is_measured_in_millimetres_along_each_axis():
    for axis, (steps, spacing) in enumerate(zip((3, 2, 1), SPACING, strict=True)):
        scores = mask_scores(np.roll(TRUTH, steps, axis), TRUTH, AFFINE)
        shared = 1 - steps / (20, 12, 8)[axis]
        assert scores["dice"] == pytest.approx(shared) and scores["iou"] == pytest.approx(shared / (2 - shared))
        assert scores["hd"] == pytest.approx(steps * spacing) == scores["hd95"]
        assert scores["volume_error"] == 0 and scores["truth_ml"] == pytest.approx(20 * 12 * 8 * 3 / 1000)


def test_two_balls_two_millimetres_apart():
    for spacing in (0.5, 1.0):
        affine = np.diag([spacing] * 3 + [1])
        assert mask_scores(ball(10, (0, 0, 0), spacing), ball(10, (2, 0, 0), spacing), affine)["hd"] == pytest.approx(2, abs=0.1)


def test_volume_error_has_a_sign_and_surfaces_are_compared_with_surfaces():
    larger, hollow = block((8, 8, 4), (32, 20, 12)), TRUTH & ~block((14, 11, 6), (26, 17, 10))
    assert mask_scores(larger, TRUTH, AFFINE)["volume_error"] == pytest.approx(0.2)
    assert mask_scores(TRUTH, larger, AFFINE)["volume_error"] == pytest.approx(-1 / 6)
    # The hole lies inside the truth, where a distance to the whole mask would be 0; its floor is one slice above the surface.
    assert mask_scores(hollow, TRUTH, AFFINE)["hd"] == pytest.approx(4.0)


def test_hd95_is_the_greater_directed_percentile_and_assd_the_mean_of_all_distances():
    to_truth, to_pred = np.array([0.0] * 9 + [10.0]), np.zeros(190)
    scores = distance_scores(to_truth, to_pred)
    assert scores["hd95"] == pytest.approx(np.percentile(to_truth, 95)) == pytest.approx(5.5)
    assert np.percentile(np.concatenate([to_truth, to_pred]), 95) == 0, "pooled, the miss would not show"
    assert scores["assd"] == pytest.approx(10 / 200) and scores["hd"] == 10 and scores["nsd"] == pytest.approx(199 / 200)


def test_nsd_counts_what_is_within_the_tolerance_of_both_surfaces():
    shifted = np.roll(TRUTH, 1, 2)  # 4 mm along z: the two faces across z, but for their rims, and nothing else
    n, rims = 20 * 12 * 8 - 18 * 10 * 6, 20 * 12 * 2
    scores = [mask_scores(shifted, TRUTH, AFFINE, tolerance)["nsd"] for tolerance in (0.4, 3.9, 4.0)]
    assert scores[2] == 1
    assert scores[0] < scores[1] < 1 and 1 - scores[1] <= rims / n


def test_an_organ_that_is_missed_is_never_left_out():
    nothing = np.zeros_like(TRUTH)
    pairs = (nothing, TRUTH), (TRUTH, nothing), (nothing, nothing)
    missed, ghost, neither = (mask_scores(*pair, AFFINE) for pair in pairs)
    assert missed["dice"] == missed["nsd"] == 0 and missed["hd95"] == missed["assd"] == np.inf and missed["volume_error"] == -1
    assert ghost["dice"] == 0 and ghost["hd"] == np.inf and not ghost["truth_ml"]
    assert neither["dice"] is neither["hd95"] is neither["volume_error"] is None
    summary = summary_of([each["hd95"] for each in (missed, neither, mask_scores(TRUTH, TRUTH, AFFINE))])
    assert summary == {"n": 2, "mean": None, "median": None, "infinite": 1, "mean_finite": 0.0}
    assert summary_of([1.0, 3.0, np.inf])["median"] == 3.0
    json.dumps(summary, allow_nan=False)


def test_masks_are_compared_where_they_lie_in_the_world():
    affine = np.array([[-0.8, 0, 0, 40], [0, 0, 2.0, -7], [0, 1.2, 0, 3], [0, 0, 0, 1]])  # L S A: turned and flipped
    truth = block((6, 4, 3), (26, 12, 9), (40, 24, 14))
    stored = np.ascontiguousarray(truth.transpose(0, 2, 1)[::-1])  # R A S
    ras = np.array([[0.8, 0, 0, 40 - 0.8 * 39], [0, 2.0, 0, -7], [0, 0, 1.2, 3], [0, 0, 0, 1]])
    scores = mask_scores(*one_grid(stored, ras, truth, affine))
    assert scores["dice"] == 1 and scores["hd"] == 0
    part, moved = stored[10:36], ras.copy()  # cropped, and the file says so
    moved[:3, 3] += ras[:3, 0] * 10
    assert mask_scores(*one_grid(part, moved, truth, affine))["dice"] == 1
    # What lies beyond the truth's own grid counts against a prediction, too.
    far = ras.copy()
    far[2, 3] += 12.0
    scores = mask_scores(*one_grid(stored, far, truth[:, :13, :], affine))
    assert scores["hd"] == pytest.approx(12.0) and scores["pred_ml"] == pytest.approx(scores["truth_ml"])


def test_on_another_grid_each_voxel_is_that_of_its_centre():
    fine = ball(10, (0, 0, 0), 0.5)
    halves, wholes = np.diag([0.5] * 3 + [1]), np.eye(4)
    wholes[:3, 3] = 0.25
    coarse = on_grid(fine, halves, (32, 32, 32), wholes)
    assert coarse.sum() == pytest.approx(4 / 3 * np.pi * 1000, rel=0.02)


def test_chamfer_is_the_plain_mean_distance_of_surfaces():
    inner, outer = icosphere(subdivisions=4, radius=10), icosphere(subdivisions=4, radius=12)
    assert mesh_scores(inner, outer)["chamfer_mm"] == pytest.approx(2.0, abs=0.02)
    assert mesh_scores(inner, inner)["chamfer_mm"] < 1e-6, "points are compared with the surface, not with other points"
    slab = box((40, 40, 2))  # twelve large triangles, whose middles are far from most of their points
    near = box((40, 40, 2))
    near.apply_translation((0, 0, 0.5))
    assert mesh_scores(near, slab)["chamfer_mm"] == pytest.approx(0.5, abs=0.05)
    empty = SimpleNamespace(vertices=np.zeros((0, 3)), faces=np.zeros((0, 3), int))
    assert mesh_scores(empty, slab)["chamfer_mm"] == np.inf and mesh_scores(empty, empty)["chamfer_mm"] is None


def test_two_hundred_thousand_surface_voxels_take_seconds():
    side = 185  # a plane's worth of boundary voxels on each of six sides: 205,000
    mask = np.zeros((side + 6,) * 3, bool)
    mask[2:-4, 2:-4, 2:-4] = True
    began = time.perf_counter()
    assert mask_scores(np.roll(mask, 1, 0), mask, np.eye(4))["hd"] == 1
    assert time.perf_counter() - began < 10
