"""What a mesh decoder learns from: that each part says what it should of shapes that are known, and teaches the right way."""

import math

import pytest
import torch
from conftest import MEDICAL, use_task
from test_medical_mesh import as_mesh, ball, shell_of

TASK = MEDICAL
use_task(TASK)

from decoder import Cubes  # noqa: E402
from flexicubes import extract  # noqa: E402
from losses import TrueDistance, mesh_losses  # noqa: E402
from meshes import Mesh, mesh_to_mask  # noqa: E402

EDGE = 80.0  # mm
OFF = torch.tensor([0.05, -0.03, 0.02])


def ellipsoid(points):
    """No exact distance, but one that tells each axis and direction from every other."""
    return (points - OFF).mul(torch.tensor([1.0, 1.3, 1.7], dtype=points.dtype)).norm(dim=-1) * 0.6 - 0.2


def banded(values, resolution=32):
    """The same, cut off three cubes from the surface, as it is taught."""
    return lambda points: values(points).clamp(-3 / resolution, 3 / resolution)


def batch_of(values, spacing=(2.0, 2.0, 2.0), turn=None, flip=(), index=3, span=1.0):
    """One sample: values(points in the cube) in mm at the voxels of a grid with this spacing, turn (3, 3) and flipped axes."""
    spacing, turn = torch.tensor(spacing), torch.eye(3) if turn is None else turn
    shape = [int(span * EDGE * 1.2 / step) for step in spacing]
    to_cube = turn * spacing / EDGE  # columns: a step of one voxel along each axis
    to_cube[:, list(flip)] *= -1
    first = -to_cube @ (torch.tensor(shape) - 1.0) / 2
    voxels = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float) for n in shape], indexing="ij"), -1)
    back = torch.linalg.inv(to_cube)
    return {
        "truth": [values(voxels @ to_cube.T + first) * EDGE],
        "to_voxel": torch.cat([back, -(back @ first)[:, None]], 1)[None],
        "edge": torch.tensor([EDGE]),
        "index": torch.tensor([index]),
    }


def joined(*batches):
    tensors = {key: torch.cat([batch[key] for batch in batches]) for key in ("to_voxel", "edge", "index")}
    return {"truth": [truth for batch in batches for truth in batch["truth"]], **tensors}


def noisy(cubes, seed=0, scale=0.2):
    rng = torch.Generator().manual_seed(seed)
    return cubes._replace(features=cubes.features + scale * torch.randn(cubes.features.shape, generator=rng))


# ---- the distance ----------------------------------------------------------------------------------------------------


def test_the_right_distances_cost_nothing_on_whatever_grid_the_truth_lies():
    """Tilted, flipped and anisotropic voxels are the same surface."""
    cubes = shell_of(banded(ellipsoid), 32)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    for batch in (batch_of(ellipsoid), batch_of(ellipsoid, (1, 3, 2), turn), batch_of(ellipsoid, (2, 1, 1.5), None, (0, 2))):
        assert mesh_losses(cubes, batch)["sdf"] < 0.01
    assert mesh_losses(cubes, batch_of(lambda points: ellipsoid(points.flip(-1))))["sdf"] > 0.1


def test_distances_count_in_bands_of_three_cubes_and_the_truth_no_farther():
    thin = shell_of(ball, 32, thick=0.5)  # up to 2 cubes from the surface at its centres
    for cubes_off, cost in ((0.3, 0.1), (-0.6, 0.2)):
        moved = thin._replace(features=thin.features + torch.tensor([cubes_off / 32] * 8 + [0.0] * 45))
        assert mesh_losses(moved, batch_of(ball))["sdf"].item() == pytest.approx(cost, rel=0.1)
    far = batch_of(lambda points: ball(points) + 10)
    assert mesh_losses(thin, far)["sdf"].item() == pytest.approx((1 - thin.sdf * 32 / 3).abs().mean().item(), rel=1e-4)


def test_corners_are_judged_where_they_are_moved():
    """All of them a quarter of a cube along x, with the values of that place: no loss; with the old values a loss."""
    there = shell_of(banded(lambda points: ball(points + torch.tensor([0.25 / 32, 0, 0]))), 32)
    here = shell_of(banded(ball), 32)
    for cubes in (here, there):
        cubes.features[:, 8:32:3] = math.atanh(0.5)
    right, wrong = (mesh_losses(cubes, batch_of(ball))["sdf"] for cubes in (there, here))
    assert right < 0.003 and wrong > 0.01


def test_beyond_the_volume_the_border_goes_on():
    batch = batch_of(lambda points: points[..., 0] - 0.1, span=0.5)  # 24 voxels, from -0.2875 to 0.2875
    true = TrueDistance(batch["truth"][0], batch["to_voxel"][0], batch["edge"][0], like=torch.zeros(1))
    points = torch.tensor([[0.123, 0.0, 0.1], [0.28, 0.0, 0.9], [0.45, 0.0, 0.0], [-7.0, 0.0, 0.0]])
    assert torch.allclose(true(points), torch.tensor([0.023, 0.18, 0.1875, -0.3875]), atol=1e-5)


# ---- the mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [1.0, -1.0])
def test_a_ball_too_large_or_small_by_a_cube_is_so_far_from_the_truth_both_ways(by):
    parts = mesh_losses(shell_of(lambda points: ball(points, 0.3 + by / 32), 32), batch_of(lambda points: ball(points, 0.3)), 1.0)
    assert parts["chamfer"] == pytest.approx(2 / 3, rel=0.06) and parts["normals"] < 0.01
    exact = mesh_losses(shell_of(lambda points: ball(points, 0.3), 32), batch_of(lambda points: ball(points, 0.3)), 1.0)
    assert exact["chamfer"] < 0.05 and exact["dev"] < 0.01


def test_a_part_that_is_missing_is_missed():
    def two(points):
        return torch.minimum(ball(points, 0.15, 0.2), ball(points, 0.15, -0.2))

    whole = shell_of(two, 32)
    half = whole._replace(features=torch.where(whole.coords[:, 1:2] < 16, whole.features, whole.features.abs() + 1))
    full, missing = (mesh_losses(cubes, batch_of(two), 1.0)["chamfer"] for cubes in (whole, half))
    assert missing > 1 > 20 * full
    cropped = Cubes(whole.coords[whole.coords[:, 1] < 16], whole.features[whole.coords[:, 1] < 16], 32)
    assert mesh_losses(cropped, batch_of(two), 1.0)["chamfer"] < 2 * full  # a block of cells answers for itself alone
    slab = (whole.coords[:, 3] >= 4) & (whole.coords[:, 3] < 12)  # and where the block cuts the organ there is no wall
    assert mesh_losses(Cubes(whole.coords[slab], whole.features[slab], 32), batch_of(two), 1.0)["chamfer"] < 2 * full


def test_normals_of_a_mesh_inside_out_point_the_other_way():
    inverted = shell_of(lambda points: -ball(points), 32)
    assert mesh_losses(inverted, batch_of(ball), 0.5)["normals"] == pytest.approx(0.5 * 2, rel=0.02)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_mesh_at_all_is_a_finite_loss_that_teaches_the_distance_alone(sign):
    cubes = shell_of(ball, 16)
    features = (cubes.features.abs() + 1).mul(sign).requires_grad_()
    parts = mesh_losses(cubes._replace(features=features), batch_of(ball), 1.0)
    assert parts["chamfer"].item() == pytest.approx(0.5 * 16 / 3) and parts["normals"] == parts["dev"] == 0
    (gradient,) = torch.autograd.grad(parts["chamfer"] + parts["normals"] + parts["dev"], features, retain_graph=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    sum(parts.values()).backward()
    assert features.grad.isfinite().all() and features.grad[:, :8].abs().min() > 0


def test_values_that_are_not_finite_make_a_loss_that_is_not():
    """And no error: the step says which loss it was."""
    cubes = noisy(shell_of(ball, 16))
    cubes.features[::7, 8:32] = math.nan
    assert not sum(mesh_losses(cubes, batch_of(ball), 1.0).values()).isfinite()


# ---- what holds for all of them --------------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_the_batch_nor_on_what_is_random_elsewhere():
    one, two = noisy(shell_of(ball, 16, 101)), noisy(shell_of(ellipsoid, 16, 101), 1)
    batches = batch_of(ball), batch_of(ellipsoid, (3, 2, 1), index=9)
    alone = mesh_losses(one, batches[0], 0.1), mesh_losses(two, batches[1], 0.1)
    torch.manual_seed(5)
    both = Cubes(torch.cat([one.coords, two.coords + torch.tensor([1, 0, 0, 0])]), torch.cat([one.features, two.features]), 16)
    together = mesh_losses(both, joined(*batches), 0.1)
    assert together.keys() == {"sdf", "weights", "consistency", "dev", "chamfer", "normals"}
    assert all(together[name] == (alone[0][name] + alone[1][name]) / 2 > 0 for name in together)
    other = mesh_losses(one, {**batches[0], "index": torch.tensor([4])}, 0.1)
    assert other["sdf"] == alone[0]["sdf"] and other["chamfer"] != alone[0]["chamfer"]  # other points of the surface
    assert other["chamfer"] == pytest.approx(alone[0]["chamfer"].item(), rel=0.2)
    assert mesh_losses(one, batches[0]).keys() == {"sdf", "weights", "consistency"}


def test_cubes_that_disagree_about_a_corner_are_inconsistent_by_the_variance_there():
    cubes = shell_of(ball, 16, 101)
    assert mesh_losses(cubes, batch_of(ball))["consistency"] < 1e-12
    cubes.features[:, 8:32:3] += torch.where(cubes.coords[:, 1:2] % 2 == 0, 1.0, -1.0)  # x of all corners' offsets
    shared = torch.tensor([1, 3, 5, 7])  # a cube with an even x shares the corners above with the next, which disagrees
    assert mesh_losses(cubes, batch_of(ball))["consistency"] == pytest.approx(1 / 10, rel=0.15) and len(shared) == 4
    assert mesh_losses(cubes, batch_of(ball))["weights"] == 0
    cubes.features[:, 32:52] = -0.5
    assert mesh_losses(cubes, batch_of(ball))["weights"] == pytest.approx(0.01)


def test_half_precision_is_left_before_anything_is_counted():
    cubes, batch = noisy(shell_of(ball, 16)), batch_of(ball)
    half = cubes._replace(features=cubes.features.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        parts, exact = mesh_losses(half, batch, 0.1), mesh_losses(half._replace(features=half.features.float()), batch, 0.1)
    assert all(value.dtype == torch.float32 and value == exact[name] for name, value in parts.items())


@pytest.mark.parametrize("name", ["sdf", "weights", "consistency", "dev", "chamfer", "normals"])
def test_gradients_are_those_of_finite_differences(name):
    """Against a plane, whose normals do not change where a mesh moves."""

    def plane(points):
        return (points - 0.03) @ torch.tensor([0.8, 0.48, 0.36], dtype=points.dtype)

    cubes, batch = noisy(shell_of(plane, 8, 101), scale=0.05), batch_of(plane, (5.0, 6.0, 7.0))
    features = cubes.features.double().requires_grad_()

    def part(values):
        return mesh_losses(cubes._replace(features=values), batch, 1.0)[name]

    assert part(features) > 0
    assert torch.autograd.gradcheck(part, features, eps=1e-7, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_every_weight_is_taught_by_the_mesh():
    cubes = noisy(shell_of(ball, 16))
    features = cubes.features.clone().requires_grad_()
    parts = mesh_losses(cubes._replace(features=features), batch_of(ball), 1.0)
    (parts["chamfer"] + parts["normals"]).backward()
    for what, channels in (("sdf", (0, 8)), ("deform", (8, 32)), ("beta", (32, 44)), ("alpha", (44, 52)), ("gamma", (52, 53))):
        assert (features.grad[:, slice(*channels)].abs().amax(0) > 0).all(), what


@pytest.mark.parametrize("mesh_weight", [0.0, 0.5])
def test_free_cubes_become_the_shape_that_they_are_taught(mesh_weight):
    cubes, batch = shell_of(ellipsoid, 24, thick=1), batch_of(ellipsoid)
    features = torch.zeros_like(cubes.features).requires_grad_()
    optimizer = torch.optim.Adam([features])
    for step in range(15):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 15)
        optimizer.zero_grad()
        sum(mesh_losses(cubes._replace(features=features), batch, mesh_weight).values()).backward()
        optimizer.step()
    (surface,) = extract(cubes._replace(features=features.detach()), 1)
    affine = torch.linalg.inv(torch.cat([batch["to_voxel"][0], torch.tensor([[0, 0, 0, 1.0]])])).double().numpy()
    truth = batch["truth"][0].numpy() < 0
    found = mesh_to_mask(Mesh(surface.vertices.double().numpy(), surface.faces.numpy()), truth.shape, affine)
    assert as_mesh(surface).is_watertight
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.98
