"""Signed distances in mm, organs cropped out of masks, what is kept of them on disk, and the script that prepares and reports."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from conftest import MEDICAL, use_task

from common.config import UserError
from common.folders import one_at_a_time
from common.samples import BadFile, Faults

TASK = MEDICAL
use_task(TASK)

import preprocess  # noqa: E402
from cases import Case  # noqa: E402
from data import find_organs, read_items  # noqa: E402
from distance import signed_distance  # noqa: E402
from meshes import read_mesh  # noqa: E402
from nifti_header import Geometry  # noqa: E402
from organs import BadOrgan, crop_organ  # noqa: E402
from prepared import is_prepared, open_prepared, prepare  # noqa: E402
from preparing import Job, Preparation, in_processes, prepare_case  # noqa: E402
from report import advice, choose_pictured, split_rows  # noqa: E402
from volumes import normalise, read_mask  # noqa: E402


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


# ---- organs ----------------------------------------------------------------------------------------------------------------


def in_storage(labels, affine, order, flips):
    """The same volume with its axes in another order, some of them backwards."""
    labels, affine = labels.transpose(order), affine[:, [*order, 3]]
    for axis in flips:
        labels, affine = np.flip(labels, axis), affine.copy()
        affine[:3, 3] += affine[:3, axis] * (labels.shape[axis] - 1)
        affine[:, axis] *= -1
    return np.ascontiguousarray(labels), affine


def blob(shape=(34, 30, 26), spacing=(1.5, 1.2, 2), label=7):
    """(labels, affine) of a lop-sided organ of some 2300 voxels, its centre near (20, -10, 30) mm."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = np.array([20, -10, 30]) - np.multiply(spacing, shape) / 2
    x, y, z = world(shape, affine)
    inside = (np.hypot(np.hypot(x - 20, y + 10), z - 30) < 12) | (np.hypot(np.hypot(x - 30, y + 10), z - 32) < 7)
    return inside.astype(np.uint8) * label, affine


def world(shape, affine):
    """(3, X, Y, Z) mm of the voxels' centres."""
    return np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3].reshape(3, 1, 1, 1)


def crop(labels, affine, **options):
    return crop_organ(labels, 7, Geometry(labels.shape, affine), **options)


@pytest.mark.parametrize("order, flips", [((0, 1, 2), ()), ((0, 1, 2), (0, 1)), ((2, 0, 1), (1,))])
def test_however_a_volume_is_stored_the_organ_and_its_image_are_at_the_same_place(order, flips):
    labels, affine = in_storage(*blob(), order, flips)
    place = world(labels.shape, affine)
    organ = crop(labels, affine, image=place[0] / 100)
    centre = place[:, labels == 7].mean(1)
    found = world(organ.mask.shape, organ.affine)
    assert found[:, organ.mask].mean(1) == pytest.approx(centre) and organ.mask.sum() == (labels == 7).sum()
    assert (organ.affine[:3, :3] == np.diag([1.5, 1.2, 2])).all() and organ.thick_axis == 2
    assert organ.image[organ.mask] == pytest.approx(found[0][organ.mask] / 100, abs=1e-6)
    assert np.array_equal(organ.sdf < 0, organ.mask) or ((organ.sdf < 0) != organ.mask).mean() < 0.002


def test_the_margin_is_wide_on_every_side_also_beyond_the_volume():
    labels, affine = blob()
    held = [np.flatnonzero((labels > 0).any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
    tight = labels[held[0][0] - 1 : held[0][-1] + 2]  # one voxel of room along x
    affine[:3, 3] += affine[:3, 0] * (held[0][0] - 1)
    organ = crop(tight, affine)
    extent = max(len(places) * size for places, size in zip(held, organ.spacing, strict=True))
    for axis in range(3):
        places = np.flatnonzero(organ.mask.any(axis=tuple(a for a in range(3) if a != axis)))
        room = min(places[0], organ.mask.shape[axis] - 1 - places[-1]) * organ.spacing[axis]
        assert room >= 0.15 * extent
    shell = np.ones(organ.mask.shape, bool)
    shell[1:-1, 1:-1, 1:-1] = False
    assert organ.sdf[shell].min() > 0.1 * extent  # farther than distances count


def test_the_largest_part_is_kept_and_what_was_dropped_is_said():
    labels, affine = blob()
    alone = crop(labels, affine)
    labels[1:3, 1:3, 1:3] = 7
    organ = crop(labels, affine)
    assert np.array_equal(organ.mask, alone.mask)
    assert len(organ.notes) == 1
    assert organ.notes[0].endswith(f"largest is kept, 1 other part with 8 of {alone.mask.sum() + 8} voxels, 29 mm^3")
    labels[1:9, 1:9, 1:9] = 7
    assert crop(labels, affine).notes[0].startswith("WARNING: organ with a second part that is large")


def test_voxels_that_share_a_corner_are_of_one_part():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[3:10, 3:10, 3:10] = labels[10:16, 10:16, 10:16] = 7
    organ = crop(labels, np.eye(4))
    assert organ.mask.sum() == 7**3 + 6**3 and not organ.notes


def test_a_hole_stays():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[3:15, 3:15, 3:15] = 7
    labels[7:10, 7:10, :] = 0
    assert crop(labels, np.eye(4)).mask.sum() == 12**3 - 9 * 12


ALL = slice(None)


@pytest.mark.parametrize(
    "place, fault",
    [
        ((ALL, ALL, ALL), "full, all 8000 voxels"),
        ((slice(3, 4), slice(3, 4), slice(3, 4)), "too small, one voxel"),
        ((slice(3, 4), slice(3, 9), slice(3, 4)), "too small, one line of voxels"),
        ((slice(3, 9), slice(3, 9), slice(3, 4)), "too small, one slice thick"),
        ((slice(3, 17), slice(3, 17), slice(3, 5)), "too small, fewer than 3 slices"),
        ((slice(3, 8), slice(3, 8), slice(3, 8)), "too small, 125 voxels of at least 200"),
        ((slice(3, 17), slice(3, 17), slice(9, 20)), "border of the volume, 196 voxels in its top slice"),
        ((slice(0, 14), slice(3, 17), slice(3, 14)), "border of the volume, 154 voxels in its right slice"),
    ],
)
def test_what_cannot_be_trained_on_is_named_and_can_be_inferred(place, fault):
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[place] = 7
    affine = np.diag([-1.0, 1, 1, 1])  # the first slice is the rightmost
    with pytest.raises(BadOrgan, match=fault):
        crop(labels, affine)
    organ = crop(labels, affine, training=False)
    assert organ.mask.sum() == (labels == 7).sum() and np.isfinite(organ.sdf).all()


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_mask_is_named_always(training):
    with pytest.raises(BadOrgan, match="mask that is empty"):
        crop(np.zeros((9, 9, 9), np.uint8), np.eye(4), training=training)


# ---- organs on disk --------------------------------------------------------------------------------------------------------


def write_volume(path, array, affine):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return path


def scan(labels):
    """HU that rise along x, and by 140 in an organ 7."""
    return labels * np.int16(20) + np.arange(len(labels), dtype=np.int16)[:, None, None]


def case_of(folder, name, labels=None, image=True, masks=((7, "liver"),), patient=None):
    """A Case with files of its own."""
    own, affine = blob()
    labels = own if labels is None else labels
    path = write_volume(folder / "labels" / f"{name}.nii.gz", labels, affine)
    picture = write_volume(folder / "images" / f"{name}.nii.gz", scan(labels), affine) if image else None
    return Case(name, patient or name, picture, tuple((organ, path, label) for label, organ in masks), None, "ct")


def made_by(cases, folder, workers=1, **options):
    """(items, faults) of prepare."""
    faults = Faults()
    return prepare(cases, folder, workers, faults, Preparation(**options))[0], faults


def test_what_is_on_disk_is_what_was_cropped(tmp_path):
    case = case_of(tmp_path, "a")
    items, faults = made_by([case], tmp_path / "kept")
    labels, affine = blob()
    expected = crop(labels, affine, image=normalise(scan(labels), "ct"))
    organ = items[0].load()
    assert (items[0].name, items[0].organ, items[0].label, items[0].patient) == ("a/liver", "liver", 7, "a")
    assert np.array_equal(organ.mask, expected.mask) and organ.affine == pytest.approx(expected.affine, abs=1e-5)
    assert organ.sdf == pytest.approx(expected.sdf, rel=1e-3, abs=1e-3) and organ.image == pytest.approx(expected.image, abs=1e-3)
    assert not faults.found
    again, about = open_prepared(tmp_path / "kept")
    assert again == items and about["left_out"] == []


def test_only_the_case_whose_bytes_changed_is_made_again(tmp_path):
    cases = [case_of(tmp_path, name) for name in "abc"]
    for case, shift in zip(cases, range(3), strict=True):
        write_volume(case.masks[0][1], np.roll(blob()[0], shift, 0), blob()[1])
    before, _ = made_by(cases, tmp_path / "kept")
    times = [item.path.stat().st_mtime_ns for item in before]
    write_volume(cases[1].masks[0][1], np.roll(blob()[0], -1, 0), blob()[1])
    after, _ = made_by(cases, tmp_path / "kept")
    assert [one.path == other.path for one, other in zip(before, after, strict=True)] == [True, False, True]
    assert [after[0].path.stat().st_mtime_ns, after[2].path.stat().st_mtime_ns] == [times[0], times[2]]


def test_a_second_start_reads_no_volume_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    cases = [case_of(tmp_path, "a"), case_of(tmp_path, "b", np.roll(blob()[0], 1, 0)), case_of(tmp_path, "small", blob()[0] * 0)]
    items, faults = made_by(cases, tmp_path / "kept")
    assert faults.counts() == {"mask that is empty": 1}
    read = []
    monkeypatch.setattr("preparing.read_mask", lambda path, *how: read.append(path.name) or read_mask(path, *how))
    assert made_by(cases, tmp_path / "kept")[0] == items and not read
    for damage in (lambda content: content[: len(content) // 2], lambda content: b"\xff" * 8 + content[8:]):
        items[1].path.write_bytes(damage(items[1].path.read_bytes()))
        with pytest.raises(BadFile, match="damaged or gone"):
            items[1].load()
        with pytest.raises(UserError, match="b/liver is damaged"):
            open_prepared(tmp_path / "kept")
        read.clear()
        assert made_by(cases, tmp_path / "kept")[0] == items and read == ["b.nii.gz"]
        items[1].load()


def test_other_settings_make_other_organs(tmp_path):
    case = case_of(tmp_path, "a")
    ct, _ = made_by([case], tmp_path / "kept")
    mr, _ = made_by([case], tmp_path / "kept", modality="mr")
    assert ct[0].path != mr[0].path and ct[0].load().image.max() < 0.6 < mr[0].load().image.max()
    with pytest.raises(UserError, match="a: organ too small, .* of at least 9999"):
        made_by([case], tmp_path / "kept", min_voxels=9999)
    assert not is_prepared(tmp_path / "kept")


def test_bad_cases_are_named_and_cost_no_good_one(tmp_path):
    good, broken, absent = case_of(tmp_path, "good"), case_of(tmp_path, "broken"), case_of(tmp_path, "absent", blob()[0] * 0)
    two = case_of(tmp_path, "two", masks=((7, "liver"), (8, "spleen")))
    broken.masks[0][1].write_bytes(broken.masks[0][1].read_bytes()[:200])
    gone = replace(case_of(tmp_path, "gone"), image=tmp_path / "nowhere.nii.gz")
    items, faults = made_by([broken, good, absent, two, gone], tmp_path / "kept")
    assert [item.name for item in items] == ["good/liver", "two/liver"]
    assert sum(faults.counts().values()) == 3
    named = {where.partition(" ")[0] for places in faults.found.values() for where in places}
    assert named == {"broken", "absent", "gone"}
    assert faults.notes["organs of which the masks are empty"] == ["two (1)"]
    with pytest.raises(UserError, match="no organ to train on in 2 cases; the first, broken: file that is truncated"):
        made_by([broken, absent], tmp_path / "kept")


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("preparing.atomic_file", full)
    with pytest.raises(UserError, match="could not write to .*kept: No space left on device; what is done is kept"):
        made_by([case_of(tmp_path, "a")], tmp_path / "kept")
    with pytest.raises(UserError, match="cannot make the folder"):
        made_by([case_of(tmp_path, "a")], tmp_path / "labels" / "a.nii.gz" / "kept")


def test_a_run_that_prepares_other_organs_in_the_same_folder_changes_nothing(tmp_path, monkeypatch):
    one, other = case_of(tmp_path, "a"), case_of(tmp_path, "b", np.roll(blob()[0], 2, 0))

    @contextmanager
    def then_another(folder):  # which takes its turn at the first moment that it can
        with one_at_a_time(folder):
            yield
        monkeypatch.undo()
        made_by([other], tmp_path / "kept")

    monkeypatch.setattr("prepared.one_at_a_time", then_another)
    items, _ = made_by([one], tmp_path / "kept")
    assert [item.name for item in items] == ["a/liver"] and items[0].load().mask.any()
    assert [item.name for item in open_prepared(tmp_path / "kept")[0]] == ["b/liver"]


def test_copies_of_a_scan_are_of_one_patient(tmp_path):
    cases = [case_of(tmp_path, "a", patient="p1"), case_of(tmp_path, "other", np.roll(blob()[0], 2, 0), patient="p3")]
    cases += [case_of(tmp_path, "copy", patient="p2"), case_of(tmp_path, "later", np.roll(blob()[0], 3, 0), patient="p2")]
    items, faults = made_by(cases, tmp_path / "kept")
    assert [item.patient for item in items] == ["p1", "p3", "p1", "p1"]
    assert faults.notes["scan that is there twice, counted to one patient"] == ["copy is a"]


@pytest.mark.parametrize("image", [True, False])
def test_a_copy_is_known_however_it_is_stored(tmp_path, image):
    one, other = (case_of(tmp_path, name, image=image, patient=name) for name in ("a", "b"))
    for path in filter(None, (other.image, other.masks[0][1])):
        values, affine = (scan(blob()[0]), blob()[1]) if path is other.image else blob()
        write_volume(path, *in_storage(values.astype(np.float32), affine, (2, 0, 1), (1,)))
    items, _ = made_by([one, other], tmp_path / "kept")
    assert [item.patient for item in items] == ["a", "a"] and items[0].path != items[1].path


def test_an_image_on_other_voxels_is_brought_to_those_of_the_mask(tmp_path):
    case = case_of(tmp_path, "a")
    affine = blob()[1] @ np.diag([2.0, 2, 2, 1])
    affine[:3, 3] += (-3, 4, -5)
    x = world((20, 20, 20), affine)[0]
    write_volume(case.image, (x * 10).astype(np.float32), affine)
    organ = made_by([case], tmp_path / "kept")[0][0].load()
    found = world(organ.mask.shape, organ.affine)[0]
    assert organ.image[organ.mask] == pytest.approx((found[organ.mask] * 10 + 1000) / 2000, abs=2e-3)


class Deadly:
    """Whoever unpickles it dies."""

    def __reduce__(self):
        return os._exit, (1,)


def test_processes_make_the_same_and_one_that_dies_names_its_case(tmp_path, monkeypatch):
    monkeypatch.setattr("preparing.BYTES_A_WORKER", 1)
    cases = [case_of(tmp_path, name, np.roll(blob()[0], shift, 0)) for shift, name in enumerate("abc")]
    alone, _ = made_by(cases, tmp_path / "alone", workers=1)
    together, _ = made_by(cases, tmp_path / "together", workers=2)
    assert [one.path.read_bytes() for one in alone] == [one.path.read_bytes() for one in together]
    job = Job(tmp_path / "kept", Preparation())
    tasks = [(replace(cases[0], image=Deadly()), {"liver": "0"}, job)]
    with pytest.raises(UserError, match="a process that worked on deadly died"):
        in_processes(prepare_case, tasks, ["deadly"], 2, "preparing")


# ---- the script ------------------------------------------------------------------------------------------------------------


def patients_of(folder, organs=("liver", "spleen"), count=3):
    """A folder as TotalSegmentator has it: every patient has the first organ, the first of them no other."""
    for number in range(count):
        labels, affine = blob(label=1)
        labels = np.roll(labels, number % 3, 1)
        write_volume(folder / f"s{number:04}" / "ct.nii.gz", scan(labels) + np.int16(number), affine)
        for organ in organs:
            mask = labels * (organ == organs[0] or number > 0)
            write_volume(folder / f"s{number:04}" / "segmentations" / f"{organ}.nii.gz", mask, affine)
    return folder


def test_the_script_says_what_it_takes_and_leaves_organs_meshes_and_a_report(tmp_path, capsys):
    data, out = patients_of(tmp_path / "data"), tmp_path / "out"
    write_volume(data / "s0002/segmentations/spleen.nii.gz", np.ones((34, 30, 26), np.uint8), blob()[1])
    preprocess.main(["--data_dir", str(data), "--output_dir", str(out), "--meshes"])
    said = capsys.readouterr().out
    assert is_prepared(out) and [item.name for item in open_prepared(out)[0]] == [
        "s0000/liver",
        "s0001/liver",
        "s0001/spleen",
        "s0002/liver",
    ]
    for words in ("2 organs: liver, spleen", "of memory a process", "mask that is full (1): s0002/spleen", "| spleen | 1 |"):
        assert words in said
    assert said.endswith(f"4 organs ready: python train_lora.py --data_dir {out}\n"), "as run_medical_pipeline.sh reads it"
    report = (out / "report.md").read_text()
    assert "4 organs in 3 scans of 3 patients" in report and "mask that is full (1): s0002/spleen" in report
    assert "organs of which the masks are empty (1): s0000 (1)" in report
    assert (out / "slices.png").stat().st_size > 10_000 < 3 * (out / "volumes.png").stat().st_size
    mesh = read_mesh(out / "meshes" / "s0001" / "liver.ply")
    voxels, affine = blob()
    assert mesh.volume == pytest.approx((voxels > 0).sum() * 3.6, rel=0.05)
    assert mesh.vertices.mean(0) == pytest.approx(world(voxels.shape, affine)[:, voxels > 0].mean(1) + (0, 1.2, 0), abs=1)
    assert len(list(data.rglob("*"))) == 3 * 5  # nothing was written beside the data
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.ply")}
    write_volume(data / "s0001/segmentations/liver.nii.gz", np.roll(voxels, -1, 1), affine)
    preprocess.main(["--data_dir", str(data), "--output_dir", str(out), "--meshes"])
    new = [path.relative_to(out).as_posix() for path, time in made.items() if path.stat().st_mtime_ns != time]
    assert new == ["meshes/s0001/liver.ply"]  # only what is of other voxels now


def test_patients_by_a_rule_stay_whoever_trains_on_the_volumes_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "cache"))
    data = patients_of(tmp_path / "data", ("liver",), 3)
    preprocess.main(["--data_dir", str(data), "--group", "s000"])
    folder = capsys.readouterr().out.split()[-1]
    assert {item.patient for item in read_items(find_organs(str(data)))} == {"s0000", "s0001", "s0002"}
    assert {item.patient for item in open_prepared(folder)[0]} == {"s000"}


def test_the_script_ends_with_2_and_a_reason_where_nothing_can_be_used(tmp_path):
    data, out = patients_of(tmp_path / "data", ("liver",), 1), tmp_path / "out"
    for flags, words in (
        (("--data_dir", tmp_path / "none", "--output_dir", out), "there is no folder"),
        (("--data_dir", data, "--output_dir", data), "the data's own folder"),
        (("--data_dir", data, "--output_dir", data / "s0000" / "ct.nii.gz"), "is no folder"),
        (("--data_dir", data, "--output_dir", out, "--organs", "heart"), "there is no heart; there are liver"),
        (("--data_dir", data, "--output_dir", out, "--min_voxels", "9000"), "s0000: organ too small, 2.* of at least 9000"),
    ):
        with pytest.raises(UserError, match=words):
            preprocess.main([*map(str, flags)])
    assert not is_prepared(out)
    preprocess.main(["--data_dir", str(data), "--output_dir", str(out)])
    with pytest.raises(UserError, match="is what this script leaves"):
        preprocess.main(["--data_dir", str(out)])


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    data, out = patients_of(tmp_path / "data", ("liver",), 20), tmp_path / "out"
    command = [sys.executable, MEDICAL / "preprocess.py", "--data_dir", data, "--output_dir", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 3 <= len(there) < 20
    with pytest.raises(UserError, match="not prepared to the end"):
        open_prepared(out)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert len(open_prepared(out)[0]) == 20
    assert {path: path.stat().st_mtime_ns for path in there} == there


# ---- the report ------------------------------------------------------------------------------------------------------------


def test_the_report_counts_patients_scans_and_organs_of_each_split(tmp_path):
    cases = [
        replace(case_of(tmp_path, name, np.roll(blob()[0], shift, 1)), split=split, patient=name[:2])
        for shift, (name, split) in enumerate((("p1_a", "train"), ("p1_b", "train"), ("p2_a", "test"), ("p3_a", "train")))
    ]
    items, _ = made_by(cases, tmp_path / "kept")
    assert split_rows(items) == [["train", 2, 3, 3], ["test", 1, 1, 1]]
    spoken = " ".join(advice(items))
    assert "No validation split" in spoken and "3 patients: metrics" in spoken and "WARNING" not in spoken
    moved = [replace(item, split="test") if item.case == "p1_b" else item for item in items]
    assert "WARNING: patients in several splits: p1" in " ".join(advice(moved))
    assert "One patient: nobody can be held out" in " ".join(advice(items[:2]))


def test_pictures_show_all_organs_before_a_second_case_of_one(tmp_path):
    cases = [case_of(tmp_path, name, np.roll(blob()[0], shift, 1)) for shift, name in enumerate("abc")]
    spleen = blob(label=8)[0]
    cases.append(case_of(tmp_path, "d", spleen, masks=((8, "spleen"),)))
    items, _ = made_by(cases, tmp_path / "kept")
    assert [item.name for item in choose_pictured(items)] == ["a/liver", "d/spleen", "b/liver", "c/liver"]
