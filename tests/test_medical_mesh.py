"""A surface from values at corners of cubes: by which rules, how exact, closed or not, and what a decoder learns from it."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from conftest import MEDICAL, ROOT, use_task
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

TASK = MEDICAL
use_task(TASK)

from cube_tables import CUBE_CORNERS, CUBE_EDGES, CUBE_FACES, crossings, cube_tables  # noqa: E402
from decoder import Cubes  # noqa: E402
from flexicubes import cases_of_cubes, extract  # noqa: E402

GOLDEN = ROOT.parent / "shared" / "golden" / "slat_mesh_decoder_a.safetensors"


def grid(n):
    """(n^3, 3) whole numbers, x slowest."""
    return torch.stack(torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"), -1).view(-1, 3)


def cubes_of(coords, values, resolution, channels=53, sample=0):
    """Cubes at coords (M, 3) with values(points (M, 8, 3) in the object's cube) at their corners; all else is 0."""
    corners = coords[:, None] + torch.tensor(CUBE_CORNERS)
    features = torch.zeros(len(coords), channels)
    features[:, :8] = values(corners / resolution - 0.5) + 1 / resolution
    return Cubes(torch.nn.functional.pad(coords, (1, 0), value=sample).int(), features, resolution)


def shell_of(values, resolution, channels=53, sample=0, thick=1.5):
    """The cubes of all cells of 4^3 that are nearer to the surface than `thick` edges of theirs."""
    cells = grid(resolution // 4)
    near = values((cells + 0.5) / (resolution // 4) - 0.5).abs() < thick * 4 / resolution
    return cubes_of((cells[near][:, None] * 4 + grid(4)).view(-1, 3), values, resolution, channels, sample)


def ball(points, radius=0.35, centre=0.0):
    return (points - centre).norm(dim=-1) - radius


def torus(points, ring=0.28, tube=0.12):
    return torch.hypot(points[..., :2].norm(dim=-1) - ring, points[..., 2]) - tube


def as_mesh(surface):
    return trimesh.Trimesh(surface.vertices.detach().numpy(), surface.faces.numpy(), process=False)


def random_cubes(seed, n=7):
    """A grid whose inner corners are inside or outside at random; offsets and weights are random, too."""
    rng = torch.Generator().manual_seed(seed)
    field = torch.ones((n + 1,) * 3)
    share = 0.1 + 0.8 * torch.rand(1, generator=rng)
    inner = torch.rand((2, *(n - 1,) * 3), generator=rng)
    field[1:-1, 1:-1, 1:-1] = inner[0] * (1 - 2 * (inner[1] < share).float())
    deform = torch.randn((n + 1,) * 3 + (3,), generator=rng)
    at = (grid(n)[:, None] + torch.tensor(CUBE_CORNERS)).unbind(-1)
    cubes = cubes_of(grid(n), lambda _: field[at], n)
    cubes.features[:, 8:32] = deform[at].flatten(1)
    cubes.features[:, 32:] = torch.randn(len(at[0]), 21, generator=rng)
    return cubes


# ---- the rules -------------------------------------------------------------------------------------------------------


def test_each_crossing_of_each_case_is_on_one_sheet():
    tables = cube_tables()
    for case in range(256):
        group = tables.group[case].tolist()
        assert [edge for edge in range(12) if group[edge] >= 0] == crossings(case)
        assert set(group) - {-1} == set(range(tables.groups[case]))
        # A sheet is a polygon with one crossing an edge: at least three.
        assert all(group.count(number) >= 3 for number in range(tables.groups[case]))
    assert tables.groups.max() == 4 and tables.groups[0b01101001] == 4  # corners 0, 3, 5, 6: each by itself
    assert (tables.doubtful >= 0).sum() == 36


def pairs_on_face(case, group, face):
    """Which of a face's crossings are on one sheet, as edges between corners counted within the face."""
    edges = crossings(case, CUBE_FACES[face])
    within = {edge: frozenset(CUBE_FACES[face].index(corner) for corner in CUBE_EDGES[edge]) for edge in edges}
    return {frozenset((within[a], within[b])) for a in edges for b in edges if a < b and group[a] == group[b]}


def test_cubes_cut_the_face_between_them_alike():
    """All that a face can be, from both sides, in all cases: its corners alone say which crossings a sheet joins.

    Sheets that meet elsewhere in the cube may join more of an ambiguous face's crossings, but never fewer.
    """
    tables = cube_tables()
    for axis in range(3):
        least = {}
        for case in range(256):
            for face in (2 * axis, 2 * axis + 1):
                signs = tuple(case >> corner & 1 for corner in CUBE_FACES[face])
                pairs = pairs_on_face(case, tables.group[case].tolist(), face)
                least[signs] = least.get(signs, pairs) & pairs
        assert {signs: len(pairs) for signs, pairs in least.items()} == {
            signs: 0 if len(set(signs)) == 1 else 2 if signs in ((0, 1, 1, 0), (1, 0, 0, 1)) else 1 for signs in least
        }
        # On an ambiguous face each inside corner is cut off by itself.
        assert least[1, 0, 0, 1] == {frozenset(map(frozenset, pair)) for pair in (((0, 1), (0, 2)), ((3, 1), (3, 2)))}


def fans(faces):
    """How many fans of triangles around a vertex a closed mesh has; as many as vertices where each of these has one."""
    corner, n = np.arange(faces.size), faces.max() + 1
    start, end, following = faces.ravel(), np.roll(faces, -1, 1).ravel(), np.roll(corner.reshape(-1, 3), -1, 1).ravel()
    order = np.argsort(start * n + end)
    across = order[np.searchsorted((start * n + end)[order], end * n + start)]  # the same edge, from the other triangle
    # A corner at the start of an edge is in one fan with the corner that follows the edge's twin.
    links = coo_array((np.ones(len(corner)), (corner, following[across])), shape=(len(corner),) * 2)
    return connected_components(links)[0]


def test_random_fields_give_closed_meshes_that_face_outwards():
    for seed in range(60):
        (surface,) = extract(random_cubes(seed), 1, ("official", "flood")[seed % 2], training=seed % 4 > 1)
        mesh = as_mesh(surface)
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0  # watertight: two triangles an edge
        assert fans(surface.faces.numpy()) == len(surface.vertices)


def test_an_ambiguous_face_between_two_doubtful_cubes_is_cut_alike_by_both():
    """Without that rule some of these meshes have edges with four triangles."""
    tables, changed, broken = cube_tables(), 0, 0
    for seed in range(40):
        cubes = random_cubes(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flexicubes.cases_of_cubes", lambda *args: cases_of_cubes(*args[:2], torch.full((256,), -1), args[3]))
            broken += not as_mesh(extract(cubes, 1, "official")[0]).is_watertight
        case = ((cubes.sdf < 0).long() << torch.arange(8)).sum(1)
        changed += int((tables.doubtful[case] >= 0).any())
    assert changed and broken


# ---- shapes that are known -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("resolution", [32, 64])
def test_a_ball_has_its_volume_and_every_vertex_lies_on_it(resolution, training):
    (surface,) = extract(shell_of(ball, resolution), 1, "flood", training)
    mesh = as_mesh(surface)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.35**3, rel=16 / resolution**2)
    assert ball(surface.vertices).abs().max() < 0.6 / resolution**2 / 0.35
    assert (mesh.face_normals * mesh.triangles_center).sum(1).min() > 0


def test_a_torus_keeps_its_hole():
    (surface,) = extract(shell_of(torus, 64, thick=1), 1, "flood")
    mesh = as_mesh(surface)
    assert mesh.is_watertight and mesh.euler_number == 0
    assert mesh.volume == pytest.approx(2 * math.pi**2 * 0.28 * 0.12**2, rel=0.02)
    assert torus(surface.vertices).abs().max() < 0.2 / 64


def test_a_shell_alone_has_a_second_skin_unless_it_is_filled():
    cubes = shell_of(ball, 64)
    filled, official = (as_mesh(extract(cubes, 1, interior)[0]) for interior in ("flood", "official"))
    assert filled.body_count == 1 and official.body_count == 2
    skins = sorted(official.split(), key=lambda mesh: mesh.volume)
    assert official.is_watertight and skins[0].volume < 0 < skins[1].volume == pytest.approx(filled.volume)


@pytest.mark.parametrize("thick", [1.2, 2.5])
def test_what_a_hollow_shape_encloses_stays_hollow(thick):
    """Between two spheres, with active cells in all of the cavity or around it alone; what lies between the spheres is filled."""
    cubes = shell_of(lambda points: (points.norm(dim=-1) - 0.28).abs() - 0.14, 64, thick=thick)
    mesh = as_mesh(extract(cubes, 1, "flood")[0])
    assert mesh.body_count == 2 and mesh.volume == pytest.approx(4 / 3 * math.pi * (0.42**3 - 0.14**3), rel=0.02)


def test_what_leaves_the_grid_is_closed_at_its_border():
    cubes = shell_of(lambda points: ball(points, 0.4, torch.tensor([0.3, 0, 0])), 32)
    flood, official = (as_mesh(extract(cubes, 1, interior)[0]) for interior in ("flood", "official"))
    assert flood.is_watertight and flood.volume > 0 and not official.is_watertight
    assert np.abs(flood.vertices).max() <= 0.5 + 1 / 32


def test_a_shape_moved_by_whole_cubes_gives_the_same_mesh_moved():
    start = torch.tensor([0.01, -0.02, 0.03])
    here = extract(shell_of(lambda points: ball(points, 0.2, start), 32), 1)[0]
    there = extract(shell_of(lambda points: ball(points, 0.2, start + 4 / 32), 32), 1)[0]
    assert torch.equal(here.faces, there.faces)
    assert torch.allclose(here.vertices + 4 / 32, there.vertices, atol=1e-6)


def test_a_turned_shape_gives_the_same_mesh_turned():
    """A quarter turn maps cubes to cubes; dual vertices only depend on values, not on which corner of a cube is the first."""

    def bean(points):
        return ball(points * torch.tensor([1.0, 1.3, 1.6]), 0.4, 0.05)

    here = extract(shell_of(bean, 32), 1)[0]
    there = extract(shell_of(lambda points: bean(torch.stack([points[..., 1], -points[..., 0], points[..., 2]], -1)), 32), 1)[0]
    turned = torch.stack([-here.vertices[:, 1], here.vertices[:, 0], here.vertices[:, 2]], -1)
    assert cKDTree(there.vertices.numpy()).query(turned.numpy())[0].max() < 1e-6
    assert len(here.vertices) == len(there.vertices) and as_mesh(there).volume == pytest.approx(as_mesh(here).volume, rel=1e-3)


# ---- the decoder's own outputs ---------------------------------------------------------------------------------------


def triangles(faces, names):
    """The triangles as a set, each begun at its least vertex."""
    faces = names[faces]
    return {tuple(np.roll(face, -first)) for face, first in zip(faces, faces.argmin(1), strict=True)}


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference outputs are not there")
def test_meshes_are_those_of_the_reference():
    from safetensors.torch import load_file

    golden = load_file(GOLDEN)
    cubes = Cubes(golden["out_coords"], golden["out_feats"], 32)
    for sample, surface in enumerate(extract(cubes, 2, "official")):
        vertices, faces = golden[f"mesh{sample}.vertices"].numpy(), golden[f"mesh{sample}.faces"].numpy()
        distance, same = cKDTree(vertices).query(surface.vertices.numpy())
        assert distance.max() < 1e-6 and sorted(same) == list(range(len(vertices)))
        assert triangles(surface.faces.numpy(), same) == triangles(faces, np.arange(len(vertices)))
        assert surface.color.shape == (len(vertices), 6) and 0 < surface.color.min() < surface.color.max() < 1


def test_a_mesh_is_the_same_whatever_else_is_in_the_batch_and_in_whichever_order():
    one, two = shell_of(ball, 32, 101), shell_of(torus, 32, 101, sample=1)
    rng = torch.Generator().manual_seed(0)
    for cubes in (one, two):
        cubes.features[:, 8:] = torch.randn(cubes.features[:, 8:].shape, generator=rng)
    order = torch.randperm(len(one.coords) + len(two.coords), generator=rng)
    both = Cubes(torch.cat([one.coords, two.coords])[order], torch.cat([one.features, two.features])[order], 32)
    empty = extract(both, 3)[2]
    assert empty.vertices.shape == (0, 3) and empty.faces.shape == (0, 3) and empty.l_dev == 0
    alone, beside = extract(one, 1)[0], extract(both, 2)[0]
    assert len(alone.faces) == len(beside.faces)
    assert cKDTree(alone.vertices).query(beside.vertices)[0].max() < 1e-6
    ordered = Cubes(torch.cat([two.coords, one.coords]), torch.cat([two.features, one.features]), 32)
    assert all(torch.equal(a, b) for a, b in zip(alone, extract(ordered, 2)[0], strict=True))


LARGE = """
import resource, sys, time
sys.path[:0] = sys.argv[1:]
import torch
from test_medical_mesh import ball, extract, shell_of
cubes = shell_of(ball, 256, 101, thick=0.9)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before, start = kilobytes("VmRSS"), time.process_time()
(surface,) = extract(cubes, 1)
print(len(cubes.coords), len(surface.faces), time.process_time() - start, (kilobytes("VmHWM") - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
def test_a_full_size_grid_takes_seconds_and_no_dense_one():
    command = [sys.executable, "-c", LARGE, str(MEDICAL), str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cubes, faces, seconds, gigabytes = (float(word) for word in done.stdout.split())
    assert 600_000 < cubes < 900_000 and faces > 300_000
    assert seconds < 5 and gigabytes < 0.5
