"""Meshes of a user's masks: how they are observed, in mm, in files, in the input's own space."""

import numpy as np
import pytest
import torch
from conftest import MEDICAL, use_task

TASK = MEDICAL
use_task(TASK)

from decoder import Cubes  # noqa: E402
from meshes import open_edges  # noqa: E402
from nifti_header import Geometry  # noqa: E402
from organs import crop_organ  # noqa: E402
from processor import Frame, OrganProcessor, Sample  # noqa: E402
from reconstruct import reconstruct, seen  # noqa: E402


def ball(shape, spacing, radius=12.0, off=(0, 0, 0)):
    """(mask of a ball in the middle of the volume, its affine with the ball's middle at 0)."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.multiply(spacing, np.subtract(shape, 1)) / 2 + off
    places = np.moveaxis(np.indices(shape), 0, -1) * spacing + affine[:3, 3]
    return np.linalg.norm(places, axis=-1) < radius, affine


def organ_of_mask(mask, affine):
    return crop_organ(mask.astype(np.uint8), 1, Geometry(mask.shape, affine), training=False)


class Balls(torch.nn.Module):
    """Says of every cube that the surface is a ball's around the middle of the cube, of 0.3 edges; of no cells: nothing."""

    def __init__(self, resolution):
        super().__init__()
        self.weight, self.resolution = torch.nn.Parameter(torch.zeros(1)), resolution

    def forward(self, coords, inputs):
        fine = torch.cartesian_prod(*[torch.arange(4)] * 3)
        cubes = torch.cat([torch.repeat_interleave(coords[:, :1], 64, 0), (coords[:, None, 1:] * 4 + fine).reshape(-1, 3)], 1)
        corners = torch.tensor([[k & 1, k >> 1 & 1, k >> 2 & 1] for k in range(8)])
        places = (cubes[:, None, 1:] + corners) / (4 * self.resolution) - 0.5
        features = torch.zeros(len(cubes), 101)
        features[:, :8] = places.norm(dim=-1) - 0.3 + 1 / (4 * self.resolution)  # less the bias
        return Cubes(cubes.int(), features, 4 * self.resolution)


def sample_of(frame, resolution=8):
    grid = (np.indices((resolution,) * 3).reshape(3, -1).T + 0.5) / resolution - 0.5
    near = np.abs(np.linalg.norm(grid, axis=1) - 0.3) < 0.2
    coords = np.floor((grid[near] + 0.5) * resolution).astype(np.int32)
    return Sample(coords, np.zeros((len(coords), 1, 4, 4, 4), np.float32), frame, None)


def test_a_mesh_lies_in_mm_where_its_own_cube_lies_turned_or_not():
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    frames = [Frame(np.array([5.0, -30, 70]), 40.0), Frame(np.array([-80.0, 2, 3]), 60.0, turn)]
    meshes = reconstruct(Balls(8), OrganProcessor(resolution=8), [sample_of(frame) for frame in frames])
    for mesh, frame in zip(meshes, frames, strict=True):
        assert open_edges(mesh) == 0
        assert mesh.volume == pytest.approx(4 / 3 * np.pi * (0.3 * frame.edge) ** 3, rel=0.03)  # positive: outward
        np.testing.assert_allclose(mesh.vertices.mean(axis=0), frame.centre, atol=0.3)
    again = reconstruct(Balls(8), OrganProcessor(resolution=8), [sample_of(frames[1])])[0]
    np.testing.assert_array_equal(again.vertices, meshes[1].vertices)  # whatever is beside it


def test_between_thick_slices_the_shape_is_interpolated_on_a_finer_grid_at_the_same_place():
    mask, affine = ball((48, 48, 11), (0.7, 0.7, 3.5), off=(0, 0, 0.6))
    organ, observed = seen(organ_of_mask(mask, affine))
    np.testing.assert_allclose(organ.spacing, 0.7)
    voxels = np.argwhere(observed.filled)
    assert len(voxels) * 0.7**3 == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.05)
    np.testing.assert_allclose(organ.affine @ (*voxels.mean(axis=0), 1), (0, 0, 0, 1), atol=0.5)
    areas = observed.filled.sum(axis=(0, 1))[np.flatnonzero(observed.filled.any(axis=(0, 1)))]
    assert len(set(areas.tolist())) > 7  # no steps


def test_a_mask_of_all_slices_is_observed_as_it_is_and_its_truth_is_not_handed_on():
    mask, affine = ball((34, 34, 34), (1, 1, 1.2))
    organ, observed = seen(organ_of_mask(mask, affine))
    np.testing.assert_array_equal(observed.filled, organ.mask)
    assert organ.sdf is None
    organ, observed = seen(organ_of_mask(mask, affine), every=5)
    assert set(np.diff(observed.kept)) == {5}
