"""Meshes of a user's masks: how they are observed, in mm, in files, in the input's own space."""

import csv
import errno
import json

import nibabel
import numpy as np
import pytest
import torch
from conftest import MEDICAL, use_task

from common.config import UserError

TASK = MEDICAL
use_task(TASK)

from decoder import Cubes  # noqa: E402
from infer import main, names_for_files  # noqa: E402
from meshes import open_edges, read_mesh  # noqa: E402
from nifti_header import Geometry  # noqa: E402
from organs import crop_organ  # noqa: E402
from predictor import Predictor, organ_of, read_volume  # noqa: E402
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


def test_nothing_is_made_outside_of_the_voxels_that_were_scanned():
    frame, affine = Frame(np.array([5.0, -30, 70]), 40.0), np.diag([1.5, 1.5, 1.5, 1])
    affine[:3, 3] = -40, -60, 40
    whole = Geometry((60, 60, 60), affine)
    cut = Geometry((60, 60, 22), affine)  # up to the face of its last voxel, 40 + 21.5 * 1.5 = 72.25; the ball goes on to 82
    meshes = [reconstruct(Balls(8), OrganProcessor(resolution=8), [sample_of(frame)], volume)[0] for volume in (None, whole, cut)]
    np.testing.assert_array_equal(meshes[0].vertices, meshes[1].vertices)
    assert open_edges(meshes[2]) == 0 and meshes[2].vertices[:, 2].max() == pytest.approx(72.25, abs=0.3)
    height = 12 + 2.25
    assert meshes[2].volume == pytest.approx(np.pi * height**2 * (36 - height) / 3, rel=0.03)


def test_a_mask_that_is_drawn_in_every_fourth_slice_is_one_organ_and_observed_in_these_alone():
    mask, affine = ball((34, 34, 34), (1, 1, 1))
    drawn = np.zeros_like(mask)
    drawn[:, :, 1::4] = mask[:, :, 1::4]
    organ, kept, remark = organ_of(read_volume((drawn.astype(np.uint8) * 7, affine)), 7)
    places = np.arange(organ.mask.shape[2]) + organ.affine[2, 3] - affine[2, 3]  # in the volume
    assert remark == "" and kept[0] == 2 and (places[kept[1]] % 4 == 1).all()
    _, observed = seen(organ, kept=kept)
    assert observed.filled.sum() == pytest.approx(mask.sum(), rel=0.1)
    middle = organ.affine @ (*np.argwhere(observed.filled).mean(axis=0), 1)
    np.testing.assert_allclose(middle, (0, 0, 0, 1), atol=0.6)


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


# ---- the script ------------------------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """Says of each cube what the input says there: meshes are what is observed, to the size of a cube."""

    def __init__(self, resolution=8):
        super().__init__()
        self.weight, self.resolution = torch.nn.Parameter(torch.zeros(1)), resolution

    def forward(self, coords, inputs):
        fine = torch.cartesian_prod(*[torch.arange(4)] * 3)
        cubes = torch.cat([torch.repeat_interleave(coords[:, :1], 64, 0), (coords[:, None, 1:] * 4 + fine).reshape(-1, 3)], 1)
        features = torch.zeros(len(cubes), 101)
        features[:, :8] = inputs[:, 0].reshape(-1, 1) + 1 / (4 * self.resolution)
        return Cubes(cubes.int(), features, 4 * self.resolution)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """infer.py with a model that answers with its input: (rows, folder of results, what was printed)."""
    about = {"task": "medical_sam3d", "method": "full", "base": {"name": "demo", "sha256": "0"}}
    load_base, _, answer = Predictor.model_functions
    functions = load_base, lambda *_: (Echo(), OrganProcessor(resolution=8), about), answer
    monkeypatch.setattr(Predictor, "model_functions", functions)
    monkeypatch.setattr("common.saved_models.choose_checkpoint", lambda *_: ("a/checkpoint", about))
    monkeypatch.setattr("pages.draw_planes", lambda shown, path, own: path.write_text(", ".join(item.title for item in shown)))

    def call(source, *flags, out="out"):
        main(["--input", str(source), "--output_dir", str(tmp_path / out), "--threads", "1", *flags])
        return json.loads((tmp_path / out / "predictions.json").read_text()), tmp_path / out, capsys.readouterr().out

    return call


def save(path, labels, affine, codes=(1, 1)):
    image = nibabel.Nifti1Image(labels, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def tilted(axes="LPS", spacing=(1.0, 1.2, 1.5)):
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff

    cos, sin = np.cos(0.3), np.sin(0.3)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ inv_ornt_aff(axcodes2ornt(tuple(axes)), (30, 28, 26))[:3, :3] * spacing
    affine[:3, 3] = (12, -40, 7) - affine[:3, :3] @ (14.5, 13.5, 12.5)
    return affine


def two_balls(affine, labels=(2, 300)):
    """A ball of 7 mm about (12, -40, 7) and one of 4 mm to its right, as labels (30, 28, 26) int16."""
    at = np.moveaxis(np.indices((30, 28, 26)), 0, -1) @ affine[:3, :3].T + affine[:3, 3] - (12, -40, 7)
    found = np.where(np.linalg.norm(at, axis=-1) < 7, labels[0], 0)
    return np.where(np.linalg.norm(at - (9, 0, 0), axis=-1) < 4, labels[1], found).astype(np.int16)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
def test_meshes_lie_in_mm_and_the_mask_lies_on_the_inputs_own_voxels(tmp_path, run, axes):
    affine = tilted(axes)
    labels = two_balls(affine)
    rows, out, _ = run(save(tmp_path / "in" / "case.v2.1.nii.gz", labels, affine, (2, 1)), "--formats", "ply,glb,nii")
    assert [(row["case"], row["organ"], row["mask_label"]) for row in rows] == [("case.v2.1", "2", 2), ("case.v2.1", "300", 300)]
    for row, centre, radius in zip(rows, [(12, -40, 7), (21, -40, 7)], (7, 4), strict=True):
        for ending in ("ply", "glb"):
            mesh = read_mesh(out / row["outputs"][ending])
            low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
            assert open_edges(mesh) == 0 and mesh.volume / 1000 == pytest.approx(row["mesh_ml"], rel=1e-4)
            np.testing.assert_allclose(high[1:], np.add(centre, radius)[1:], atol=0.8)
            np.testing.assert_allclose(low[1:], np.subtract(centre, radius)[1:], atol=0.8)
        assert row["mesh_ml"] == pytest.approx(row["input_ml"], rel=0.1)
        assert row["input_ml"] == pytest.approx((labels == row["label"]).sum() * 1.8 / 1000)
    made, source = nibabel.load(out / "case.v2.1.nii.gz"), nibabel.load(tmp_path / "in" / "case.v2.1.nii.gz")
    assert made.shape == source.shape and made.get_data_dtype() == np.uint16
    assert (made.header["sform_code"], made.header["qform_code"]) == (2, 1)
    np.testing.assert_array_equal(made.affine, source.affine)
    found = np.asarray(made.dataobj)
    for label in (2, 300):
        both = ((found == label) & (labels == label)).sum()
        assert 2 * both / ((found == label).sum() + (labels == label).sum()) > 0.93
    table = list(csv.DictReader((out / "volumes.csv").open()))
    assert [float(row["mesh_ml"]) for row in table] == pytest.approx([row["mesh_ml"] for row in rows], abs=1e-3)
    assert "2: " in (out / "case.v2.1.png").read_text()


def test_space_and_formats_are_as_asked(tmp_path, run):
    affine = tilted()
    source = save(tmp_path / "a.nii.gz", two_balls(affine), affine)
    rows, out, _ = run(source, "--formats", "stl", "--space", "lps", "--organs", "2")
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == sorted(
        ["a.png", "a/2.stl", "predictions.json", "volumes.csv"]
    )
    assert b"SPACE=LPS" in (out / "a" / "2.stl").read_bytes()[:80]
    np.testing.assert_allclose(read_mesh(out / "a" / "2.stl").vertices.mean(axis=0), (12, -40, 7), atol=1)  # read back as RAS
    with pytest.raises(UserError, match="obj is none of ply, stl, glb, nii"):
        run(source, "--formats", "ply,obj", out="other")
    with pytest.raises(UserError, match="--organs: there is no 3; there are 2, 300"):
        run(source, "--organs", "3", out="other")


def test_what_goes_in_comes_out_or_is_named(tmp_path, run):
    good, affine = ball((24, 24, 24), (1, 1, 1), 8)
    for name, labels in (
        ("good", good),
        ("empty", np.zeros_like(good)),
        ("cut", np.roll(good, 10, 2) * (np.arange(24) > 10)),
        ("voxel", np.pad(np.ones((1, 1, 1)), 11)),
        ("full", np.ones_like(good)),
    ):
        save(tmp_path / "masks" / f"{name}.nii.gz", labels.astype(np.uint8), affine)
    (tmp_path / "masks" / "broken.nii.gz").write_bytes(b"\x1f\x8b no more")
    rows, out, said = run(tmp_path / "masks")
    assert {row["case"] for row in rows} >= {"good", "cut", "full"}
    named = [line for line in said.splitlines() if line.startswith("left out")]
    for name in ("good", "empty", "cut", "voxel", "full", "broken"):
        assert any(row["case"] == name for row in rows) != any(name in line for line in named), name
    for row in rows:
        mesh = read_mesh(out / row["outputs"]["ply"])
        assert open_edges(mesh) == 0 and mesh.volume > 0
        assert bool(row["remarks"]) == (row["case"] != "good")
    cut = next(row for row in rows if row["case"] == "cut")
    assert "cut by the border" in said and "cut by the border" in cut["remarks"][0]
    assert read_mesh(out / cut["outputs"]["ply"]).vertices[:, 2].max() == pytest.approx(
        12, abs=0.6
    )  # the face of its last voxels


@pytest.mark.parametrize("content", ["empty", "broken", "nothing", "words"])
def test_where_nothing_is_left_there_is_one_line_and_no_folder(tmp_path, run, content):
    (tmp_path / "in").mkdir()
    if content == "empty":
        save(tmp_path / "in" / "a.nii.gz", np.zeros((9, 9, 9), np.uint8), np.eye(4))
    elif content != "nothing":
        (tmp_path / "in" / ("a.nii.gz" if content == "broken" else "a.txt")).write_text("no volume")
    for source in (tmp_path / "in", tmp_path / "in" / "a.nii.gz"):
        with pytest.raises(UserError, match="--input") as caught:
            run(source)
        assert "\n" not in str(caught.value) and "data_dir" not in str(caught.value)
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_equal_names_of_two_folders_overwrite_nothing(tmp_path, run):
    for site, radius in (("site_a", 7), ("site_b", 9)):
        mask, affine = ball((24, 24, 24), (1, 1, 1), radius)
        save(tmp_path / "in" / site / "001.nii.gz", mask.astype(np.uint8), affine)
    rows, out, _ = run(str(tmp_path / "in" / "*" / "*.nii.gz"))
    volumes = {row["case"]: read_mesh(out / row["outputs"]["ply"]).volume for row in rows}
    assert volumes["site_a/001"] == pytest.approx(1437, rel=0.1) and volumes["site_b/001"] == pytest.approx(3054, rel=0.1)
    assert len({path for row in rows for path in row["outputs"].values()}) == 4
    assert names_for_files(["a/1", "A/1", "x:y", "x_y", "..", "z."]) == ["a/1", "A/1_2", "x_y", "x_y_2", "_", "z"]


def test_a_case_of_many_files_is_one_mask_in_which_the_smaller_of_two_organs_keeps_its_voxels(tmp_path, run):
    outer, affine = ball((28, 28, 28), (1, 1, 1), 10)
    inner, _ = ball((28, 28, 28), (1, 1, 1), 5)
    for organ, mask in (("liver", outer), ("lung_vessels", inner), ("spleen", np.zeros_like(inner))):
        save(tmp_path / "s0001" / "segmentations" / f"{organ}.nii.gz", mask.astype(np.uint8), affine)
    save(tmp_path / "s0001" / "ct.nii.gz", np.where(outer, 60, -80).astype(np.int16), affine)
    rows, out, said = run(tmp_path)
    assert [(row["case"], row["organ"], row["mask_label"]) for row in rows] == [
        ("s0001", "liver", 1),
        ("s0001", "lung_vessels", 2),
    ]
    made = np.asarray(nibabel.load(out / rows[0]["outputs"]["nii"]).dataobj)
    assert (made == 2).sum() == pytest.approx(inner.sum(), rel=0.1) and (made > 0).sum() == pytest.approx(outer.sum(), rel=0.1)
    assert "voxels in two organs" in said and "spleen" in said


def test_what_was_done_before_ctrl_c_is_kept_and_listed(tmp_path, run, monkeypatch):
    mask, affine = ball((24, 24, 24), (1, 1, 1), 8)
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
    from predictor import Predictor

    real, calls = Predictor.mesh, []

    def mesh(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(Predictor, "mesh", mesh)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["case"] for row in rows] == ["a"] and (tmp_path / "out" / rows[0]["outputs"]["nii"]).is_file()


def test_a_disk_that_fills_up_in_the_first_case_is_named(tmp_path, run, monkeypatch):
    def full(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.folders.project_root", lambda: tmp_path)
    monkeypatch.setattr("meshes.write_mesh", full)
    mask, affine = ball((24, 24, 24), (1, 1, 1), 8)
    save(tmp_path / "a.nii.gz", mask.astype(np.uint8), affine)
    with pytest.raises(OSError, match="No space left"):
        main(["--input", str(tmp_path / "a.nii.gz"), "--threads", "1"])


def test_an_array_without_a_place_in_the_world_is_refused():
    labels = ball((8, 8, 8), (1, 1, 1), 3)[0].astype(np.uint8)
    for affine in (np.full((4, 4), np.nan), np.zeros((4, 4)), np.eye(3)):
        with pytest.raises(ValueError, match="no mask, expected"):
            read_volume((labels, affine))
