"""Masks as meshes in mm and back, whatever the affine, and mesh files that say what they hold."""

import numpy as np
import pytest
from conftest import MEDICAL, use_task

TASK = MEDICAL
use_task(TASK)

from meshes import Mesh, mask_to_mesh, mesh_to_mask, open_edges, read_mesh, write_mesh  # noqa: E402

SHAPE = (40, 36, 30)


def turned(axes, spacing=(1.2, 1.5, 2.0), origin=(5, -30, 70), x=15, z=20):
    """An affine of these axes (0, 1, 2 with a sign), turned by x and z degrees."""
    affine = np.eye(4)
    cx, sx, cz, sz = (f(np.radians(angle)) for angle in (x, z) for f in (np.cos, np.sin))
    turn = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    for column, (axis, length) in enumerate(zip(axes, spacing, strict=True)):
        affine[:3, column] = turn[:, abs(axis) - 1] * np.sign(axis) * length
    affine[:3, 3] = origin
    return affine


def places(affine, shape=SHAPE):
    """(X, Y, Z, 3) mm of the voxels' centres."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def drawn(affine, shape=SHAPE, radius=12.0):
    """A ball in the middle of the volume with a smaller one to its right: (mask, volume in mm3, centre in mm)."""
    at = places(affine, shape)
    middle = at[tuple(n // 2 for n in shape)]
    ball = np.linalg.norm(at - middle, axis=-1) < radius
    return ball | (np.linalg.norm(at - middle - (radius, 0, 0), axis=-1) < radius / 2), middle


def parts_and_genus(mesh):
    import trimesh

    solid = trimesh.Trimesh(*mesh, process=False)
    parts = len(solid.split(only_watertight=False))
    return parts, parts - solid.euler_number / 2


@pytest.mark.parametrize("axes", [(1, 2, 3), (-1, -2, 3), (-1, 2, 3), (-2, -3, 1), (3, 1, -2)])
def test_a_mask_becomes_the_same_surface_in_mm_however_it_is_stored_and_comes_back(axes):
    affine = turned(axes)
    mask, middle = drawn(affine)
    mesh = mask_to_mesh(mask, affine)
    voxel = abs(np.linalg.det(affine[:3, :3]))
    assert open_edges(mesh) == 0
    assert mesh.volume == pytest.approx(mask.sum() * voxel, rel=0.02)  # positive: outward in every orientation
    low, high = mesh.vertices.min(axis=0) - middle, mesh.vertices.max(axis=0) - middle
    np.testing.assert_allclose(low, (-12, -12, -12), atol=0.5)
    np.testing.assert_allclose(high, (18, 12, 12), atol=0.5)  # the bulge is on the right of the patient
    back = mesh_to_mask(mesh, mask.shape, affine)
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) >= 0.999


def test_a_mesh_goes_to_another_grid_through_both_affines():
    affine, other = turned((1, 2, 3)), turned((-2, 3, 1), (1.0, 0.9, 1.1), x=0, z=0)
    mask, middle = drawn(affine)
    shape = (50, 50, 60)
    other[:3, 3] = middle - other[:3, :3] @ (25, 25, 25)
    back = mesh_to_mask(mask_to_mesh(mask, affine), shape, other)
    at = places(other, shape)
    true = (np.linalg.norm(at - middle, axis=-1) < 12) | (np.linalg.norm(at - middle - (12, 0, 0), axis=-1) < 6)
    assert 2 * (back & true).sum() / (back.sum() + true.sum()) > 0.96


def test_noise_whose_voxels_touch_at_edges_and_corners_gives_closed_manifolds():
    random = np.random.default_rng(0)
    for share in (0.1, 0.3, 0.5, 0.7):
        mask = random.random((14, 15, 16)) < share
        mesh = mask_to_mesh(mask, np.diag([1.0, 1.2, 3.0, 1]))
        assert open_edges(mesh) == 0 and mesh.volume > 0
        np.testing.assert_array_equal(mesh_to_mask(mesh, mask.shape, np.diag([1.0, 1.2, 3.0, 1])), mask)
    chess = np.indices((5, 5, 5)).sum(axis=0) % 2 == 0
    mesh = mask_to_mesh(chess, np.eye(4))
    assert open_edges(mesh) == 0
    np.testing.assert_array_equal(mesh_to_mask(mesh, chess.shape, np.eye(4)), chess)


def test_holes_stay_holes_and_thin_things_stay():
    x, y, z = np.indices((40, 40, 16)) - np.array([20, 20, 8]).reshape(3, 1, 1, 1)
    ring = np.hypot(np.hypot(x, y) - 12.2, z + 0.3) < 4.3
    mesh = mask_to_mesh(ring, np.eye(4))
    assert parts_and_genus(mesh) == (1, 1) and mesh.volume == pytest.approx(2 * np.pi**2 * 12.2 * 4.3**2, rel=0.02)
    sheet = np.zeros((9, 9, 9), bool)
    sheet[2:7, 2:7, 4] = True
    np.testing.assert_array_equal(mesh_to_mask(mask_to_mesh(sheet, np.eye(4)), sheet.shape, np.eye(4)), sheet)
    hollow = np.linalg.norm(np.indices((30, 30, 30)) - 14.5, axis=0)
    hollow = (hollow < 12) & (hollow > 6)
    mesh = mask_to_mesh(hollow, np.eye(4))
    assert parts_and_genus(mesh)[0] == 2 and mesh.volume == pytest.approx(hollow.sum(), rel=0.02)
    np.testing.assert_array_equal(mesh_to_mask(mesh, hollow.shape, np.eye(4)), hollow)


def test_an_organ_that_the_border_cuts_ends_flat_at_the_faces_of_its_voxels():
    affine = np.diag([1.5, 1.5, 1.5, 1])
    mask = np.linalg.norm(np.indices((24, 24, 13)) - np.array([12, 12, 12]).reshape(3, 1, 1, 1), axis=0) < 9
    mesh = mask_to_mesh(mask, affine)
    assert open_edges(mesh) == 0 and mesh.volume == pytest.approx(mask.sum() * 1.5**3, rel=0.02)
    assert mesh.vertices[:, 2].max() == pytest.approx(12.5 * 1.5, abs=0.2)
    full = mask_to_mesh(np.ones((6, 5, 4), bool), affine)
    assert open_edges(full) == 0 and full.volume == pytest.approx(120 * 1.5**3, rel=0.1)


def test_a_mask_of_nothing_has_no_surface_and_a_mesh_of_nothing_no_voxel():
    with pytest.raises(ValueError, match="empty mask"):
        mask_to_mesh(np.zeros((4, 4, 4), bool), np.eye(4))
    nothing = Mesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    assert nothing.volume == 0 and open_edges(nothing) == 0 and not mesh_to_mask(nothing, (4, 4, 4), np.eye(4)).any()


def test_lines_of_voxels_through_vertices_and_along_faces_enter_as_often_as_they_leave():
    import trimesh

    box = trimesh.creation.box(bounds=[[2, 3, 4], [10, 9, 8]])
    octahedron = Mesh(np.array([[9, 5, 5], [1, 5, 5], [5, 9, 5], [5, 1, 5], [5, 5, 9], [5, 5, 1.0]]), np.zeros((8, 3), np.int64))
    for number, signs in enumerate(np.ndindex(2, 2, 2)):
        corners = [0 + signs[0], 2 + signs[1], 4 + signs[2]]
        octahedron.faces[number] = corners if sum(signs) % 2 == 0 else corners[::-1]
    for mesh in (Mesh(np.array(box.vertices), np.array(box.faces)), octahedron):
        for factor in (1, 3):  # on the grid's own points, and with many vertices on lines
            inside = mesh_to_mask(Mesh(mesh.vertices * factor, mesh.faces), (40, 40, 40), np.eye(4))
            assert inside.sum() == pytest.approx(mesh.volume * factor**3, rel=0.25)
            assert not inside[-1].any()
    grid = np.indices((40, 40, 40)) - 15
    inside = mesh_to_mask(Mesh(octahedron.vertices * 3, octahedron.faces), (40, 40, 40), np.eye(4))
    far = np.abs(grid).sum(axis=0)
    assert inside[far < 12].all() and not inside[far > 12].any()


def test_an_inner_surface_that_points_inward_is_a_cavity_and_parts_that_overlap_are_one():
    import trimesh

    def ball(radius, x=0.0):
        return trimesh.creation.icosphere(3, radius).apply_translation((15 + x, 15, 15))

    def joined(*parts):
        whole = trimesh.util.concatenate(parts)
        return mesh_to_mask(Mesh(np.array(whole.vertices), np.array(whole.faces)), (36, 31, 31), np.eye(4))

    hole = ball(5)
    hole.invert()
    assert joined(ball(10), hole).sum() == pytest.approx(ball(10).volume - ball(5).volume, rel=0.02)
    np.testing.assert_array_equal(joined(ball(10), ball(10, 4)), joined(ball(10)) | joined(ball(10, 4)))


@pytest.mark.parametrize("ending", [".ply", ".stl", ".glb"])
def test_files_say_their_space_and_unit_and_hold_mm(tmp_path, ending):
    import trimesh

    affine = turned((-1, 2, 3))
    mask, middle = drawn(affine)
    mesh = mask_to_mesh(mask, affine)
    for space, signs in (("RAS", (1, 1, 1)), ("LPS", (-1, -1, 1))):
        path = tmp_path / f"organ{ending}"
        write_mesh(path, mesh, "s0001, liver", space)
        plain = trimesh.load(path, force="mesh")
        assert plain.is_watertight and plain.volume == pytest.approx(mesh.volume, rel=1e-5)
        np.testing.assert_allclose(plain.bounds.mean(axis=0), np.multiply(mesh_middle(mesh), signs), atol=1e-4)
        head = path.read_bytes()[:2000]
        assert (f"SPACE={space}" if ending != ".glb" else f'"space":"{space}","unit":"mm"').encode() in head and b"mm" in head
        assert b"s0001, liver" in head
        back = read_mesh(path)
        np.testing.assert_allclose(back.vertices[back.faces], mesh.vertices[mesh.faces], atol=1e-4)
        assert back.volume == pytest.approx(mesh.volume, rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing of the writing is left


def mesh_middle(mesh):
    return (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0)) / 2


def test_files_that_are_no_meshes_are_refused_in_a_line(tmp_path):
    for ending in (".ply", ".stl", ".glb"):
        (tmp_path / f"a{ending}").write_bytes(b"no mesh at all")
        with pytest.raises(ValueError, match="no mesh"):
            read_mesh(tmp_path / f"a{ending}")
    nothing = Mesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    with pytest.raises(ValueError, match="empty mesh"):
        write_mesh(tmp_path / "b.ply", nothing)
    mesh = mask_to_mesh(np.ones((2, 2, 2), bool), np.eye(4))
    with pytest.raises(ValueError, match="no format"):
        write_mesh(tmp_path / "b.obj", mesh)
    assert not list(tmp_path.glob("*b.*"))
