"""Volume files and folders of others: read right or named, never believed, and written back on the voxels that they came from."""

import gzip
import io
import json
import os
import random
import shutil
import struct
import tarfile
import tracemalloc
import unicodedata
import zipfile

import nibabel
import numpy as np
import pytest
from conftest import MEDICAL, use_task

from common.config import UserError
from common.samples import Faults, hold_out

TASK = MEDICAL
use_task(TASK)

from cases import find_cases, group_patients, patient_of  # noqa: E402
from grids import check_pair, pair_note  # noqa: E402
from layouts import FoundCase  # noqa: E402
from nifti_header import BadVolume, Geometry  # noqa: E402
from volumes import doubt, guess_modality, look, normalise, read_image, read_mask, to_ras, volume_stem, write_mask  # noqa: E402

SHAPE, SPACING = (10, 9, 8), (1.5, 1.2, 2.0)
DIM, DATATYPE, PIXDIM, OFFSET, SLOPE, QFORM_CODE, QUATERNION, SROW = 40, 70, 76, 108, 112, 252, 256, 280  # of NIfTI-1, in bytes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "cache"))


def affine_of(axes="RAS", spacing=SPACING, origin=(-20.0, 30.0, 5.0), tilt=0.0) -> np.ndarray:
    """(4, 4): the axes of the array point to `axes`, all turned by `tilt` radians about z."""
    matrix = np.eye(4)
    for column, letter in enumerate(axes):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        matrix[:3, column] = 0
        matrix[row, column] = sign * spacing[column]
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    matrix[:3, :3] = turn @ matrix[:3, :3]
    matrix[:3, 3] = origin
    return matrix


def a_mask(shape=SHAPE, label=1, dtype=np.uint8) -> np.ndarray:
    mask = np.zeros(shape, dtype)
    mask[2:7, 3:7, 2:6] = label
    mask[2, 3, 2] = 0  # no flip leaves it as it is
    return mask


def nifti(data, affine=None, codes=(1, 1), kind=nibabel.Nifti1Image, changes=()) -> bytes:
    """A file's bytes. changes: (place, format of struct, values ...), written over its header."""
    affine = affine_of() if affine is None else affine
    volume = kind(data, affine, dtype=data.dtype)
    volume.set_sform(affine if codes[0] else None, codes[0])
    volume.set_qform(affine if codes[1] else None, codes[1])
    content = bytearray(volume.to_bytes())
    for place, form, *values in changes:
        struct.pack_into(f"<{form}", content, place, *values)
    return bytes(content)


def saved(path, content: bytes, zipped=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    zipped = path.name.lower().endswith(".gz") if zipped is None else zipped
    path.write_bytes(gzip.compress(content, 1, mtime=0) if zipped else content)
    return path


def refusal(path, read=read_mask) -> str:
    """What a file is refused with, on one line."""
    with pytest.raises(BadVolume) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is read right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", "i1", "u2", "u4", "i8", "u8"])
def test_a_mask_of_any_stored_type_holds_the_same_labels(tmp_path, kind, dtype):
    labels, geometry, notes = read_mask(saved(tmp_path / "m.nii.gz", nifti(a_mask(label=2, dtype=dtype), kind=kind)))
    assert np.array_equal(labels, a_mask(label=2)) and labels.dtype == np.uint8 and not notes
    assert np.allclose(geometry.affine, affine_of(), atol=1e-6) and np.allclose(geometry.spacing, SPACING)


def test_other_byte_orders_pairs_of_files_and_wrong_endings_are_read_by_what_is_in_them(tmp_path):
    big = nibabel.Nifti1Image(a_mask().astype(">i2"), affine_of(), nibabel.Nifti1Header(endianness=">"))
    files = [saved(tmp_path / "big.nii", big.to_bytes())]
    files += [
        saved(tmp_path / "not_packed.nii.gz", nifti(a_mask()), False),
        saved(tmp_path / "packed.nii", nifti(a_mask()), True),
    ]
    nibabel.save(nibabel.Nifti1Pair(a_mask(), affine_of()), tmp_path / "pair.hdr")
    saved(tmp_path / "odd.hdr.gz", (tmp_path / "pair.hdr").read_bytes())
    shutil.copy(tmp_path / "pair.img", tmp_path / "odd.img")
    files += [tmp_path / name for name in ("pair.hdr", "pair.img", "odd.hdr.gz")]
    for file in files:
        labels, geometry, _ = read_mask(file)
        assert np.array_equal(labels, a_mask()) and np.allclose(geometry.affine, affine_of(), atol=1e-6), file.name
    (tmp_path / "pair.img").unlink()
    assert "without its image data" in refusal(tmp_path / "pair.hdr")


def test_scaled_labels_are_rounded_and_large_ones_keep_their_value(tmp_path):
    labels = a_mask(label=300, dtype=np.int16)
    labels[8, 8, 7] = 1
    scaled = nifti((labels * 100).astype(np.int16), changes=[(SLOPE, "2f", 0.99998 / 100, 0.0)])
    read, _, notes = read_mask(saved(tmp_path / "scaled.nii.gz", scaled))
    assert np.array_equal(read, labels) and read.dtype == np.uint16
    assert "rounded" in " ".join(notes)


@pytest.mark.parametrize("slope, stored", [((1.0, -1024.0), 1024), ((0.0, 0.0), 0), ((np.nan, np.nan), 0), ((2.0, 10.0), None)])
def test_image_values_are_scaled_as_the_header_says(tmp_path, slope, stored):
    values = np.random.default_rng(0).integers(-900, 900, SHAPE) // 2 * 2
    raw = (values - 10) // 2 if stored is None else values + stored
    image, _, _ = read_image(saved(tmp_path / "i.nii.gz", nifti(raw.astype(np.int16), changes=[(SLOPE, "2f", *slope)])))
    assert np.array_equal(image, values) and image.dtype == np.float32


def test_values_that_are_not_finite_are_replaced_and_counted(tmp_path):
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    odd = values.copy()
    odd[0], odd[1, 1, 1], odd[1, 1, 2] = np.nan, np.inf, -np.inf
    image, _, notes = read_image(saved(tmp_path / "i.nii.gz", nifti(odd)))
    known = odd[np.isfinite(odd)]
    assert np.isfinite(image).all() and (image[0] == known.min()).all() and image[1, 1, 1] == known.max()
    assert notes == [f"values that are not finite, {SHAPE[1] * SHAPE[2] + 2} replaced (NaN, infinity)"]
    assert "NaN throughout" in refusal(saved(tmp_path / "n.nii", nifti(np.full(SHAPE, np.nan, np.float32))), read_image)


def test_a_mask_of_one_organ_may_be_drawn_with_any_value(tmp_path):
    white = saved(tmp_path / "white.nii.gz", nifti(a_mask(label=255)))
    labels, _, notes = read_mask(white)
    assert set(np.unique(labels)) == {0, 255} and "255" in notes[0]
    labels, _, notes = read_mask(white, one_organ=True)
    assert np.array_equal(labels, a_mask()) and "255" in " ".join(notes)
    assert not read_mask(saved(tmp_path / "plain.nii.gz", nifti(a_mask())), one_organ=True)[2]


# ---- where the voxels lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.0, 0.35])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PSR", "IRP"])
def test_axes_turned_to_ras_leave_every_voxel_where_it_was(tmp_path, axes, tilt):
    affine = affine_of(axes, tilt=tilt)
    labels, geometry, _ = read_mask(saved(tmp_path / "m.nii.gz", nifti(a_mask(), affine)))
    assert geometry.axcodes == axes
    turned, moved = to_ras(labels, geometry.affine)
    assert "".join(nibabel.aff2axcodes(moved)) == "RAS"
    places = [np.argwhere(array) @ matrix[:3, :3].T + matrix[:3, 3] for array, matrix in ((a_mask(), affine), (turned, moved))]
    before, after = (points[np.lexsort(points.round(3).T)] for points in places)
    assert np.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (4, 0), (0, 2), (0, 0), (2, 3)])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR"])
def test_a_mask_is_written_back_on_the_voxels_and_with_the_forms_of_its_input(tmp_path, kind, codes, axes):
    source = saved(tmp_path / "in.nii.gz", nifti(np.ones(SHAPE, np.float32), affine_of(axes, tilt=0.2), codes, kind))
    _, geometry, _ = read_image(source)
    labels = a_mask(label=300, dtype=np.int64)
    write_mask(tmp_path / "out.nii.gz", labels, geometry)
    before, after = nibabel.load(source), nibabel.load(tmp_path / "out.nii.gz")
    assert after.shape == SHAPE and np.allclose(after.affine, before.affine, atol=1e-6) and type(after) is type(before)
    assert after.get_data_dtype() == np.uint16 and np.array_equal(np.asarray(after.dataobj), labels)
    for name in ("sform_code", "qform_code", "xyzt_units", "quatern_b", "qoffset_x", "srow_x"):
        assert np.array_equal(after.header[name], before.header[name]), name
    assert after.header["scl_slope"] in (1, 0) or np.isnan(after.header["scl_slope"])
    assert np.array_equal(read_mask(tmp_path / "out.nii.gz")[0], labels)


def test_a_mask_is_written_in_the_smallest_type_whole_or_not_at_all(tmp_path):
    geometry = Geometry(SHAPE, affine_of("LPS"))
    for label, dtype in ((1, np.uint8), (255, np.uint8), (256, np.uint16), (70000, np.uint32)):
        write_mask(tmp_path / "m.nii", a_mask(label=label, dtype=np.int64), geometry)
        volume = nibabel.load(tmp_path / "m.nii")
        assert volume.get_data_dtype() == dtype and np.asarray(volume.dataobj).max() == label
        assert np.allclose(volume.affine, geometry.affine)
    with pytest.raises(UserError, match="could not write"):
        write_mask(tmp_path / "no folder" / "m.nii", a_mask(), geometry)
    with pytest.raises(UserError, match="nii.gz"):
        write_mask(tmp_path / "m.png", a_mask(), geometry)
    assert [path.name for path in tmp_path.iterdir()] == ["m.nii"]


def test_the_sform_counts_and_a_qform_that_lies_elsewhere_is_said(tmp_path):
    volume = nibabel.Nifti1Image(a_mask(), affine_of())
    volume.set_sform(affine_of(), 1)
    volume.set_qform(affine_of("LAS", origin=(5.0, 30.0, 5.0)), 1)
    _, geometry, notes = read_mask(saved(tmp_path / "m.nii.gz", volume.to_bytes()))
    assert np.allclose(geometry.affine, affine_of())
    assert len(notes) == 1 and "sform and qform differ" in notes[0] and "25 mm" in notes[0] and "LAS for RAS" in notes[0]


def test_a_pixdim_that_contradicts_the_sform_is_said(tmp_path):
    other = nifti(a_mask(), codes=(1, 0), changes=[(PIXDIM + 4, "3f", 1.0, 1.0, 0.0)])
    _, geometry, notes = read_mask(saved(tmp_path / "m.nii.gz", other))
    assert np.allclose(geometry.spacing, SPACING)
    assert notes == ["sform and pixdim differ, sform used: voxels of 1.5 x 1.2 x 2 mm for 1 x 1 x 0 mm"]


def test_what_the_header_does_not_know_of_the_place_is_said(tmp_path):
    _, geometry, notes = read_mask(saved(tmp_path / "m.nii.gz", nifti(a_mask(), codes=(0, 0))))
    assert "left and right are not known" in notes[0] and np.allclose(geometry.spacing, SPACING)
    negative = nifti(a_mask(), codes=(0, 1), changes=[(PIXDIM + 4, "3f", -1.5, 1.2, 2.0)])
    _, geometry, notes = read_mask(saved(tmp_path / "n.nii.gz", negative))
    assert "negative voxel spacing" in notes[0] and np.allclose(geometry.affine, affine_of(), atol=1e-5)


def test_metres_and_micrometres_become_mm_where_that_can_be(tmp_path):
    for code, scale, believed in ((1, 0.001, True), (3, 1000.0, True), (1, 1.0, False), (0, 1.0, None), (2, 1.0, None)):
        affine = affine_of()
        affine[:3] *= scale
        path = saved(tmp_path / "m.nii.gz", nifti(a_mask(), affine, changes=[(123, "b", code)]))
        _, geometry, notes = read_mask(path)
        assert np.allclose(geometry.affine, affine_of(), rtol=1e-5)
        assert bool(notes) is (believed is not None)
        write_mask(tmp_path / "out.nii", a_mask(), geometry)
        assert np.allclose(read_mask(tmp_path / "out.nii")[1].affine, geometry.affine)


def test_axes_rounded_by_float32_are_right_angles_and_those_of_a_sheared_scan_are_not(tmp_path):
    near, sheared = affine_of(tilt=0.2), affine_of()
    near[0, 1] += 3e-4
    sheared[0, 1] = 0.3
    assert not read_mask(saved(tmp_path / "near.nii", nifti(a_mask(), near, (1, 0))))[2]
    assert "sheared" in refusal(saved(tmp_path / "sheared.nii", nifti(a_mask(), sheared, (1, 0))))


# ---- what is refused -------------------------------------------------------------------------------------------------------

HEADERS = {
    "spacing": ((0, 1), [(PIXDIM + 4, "3f", 1.5, 1.5, 0.0)]),
    "singular affine": ((1, 0), [(SROW + 8, "f", 0.0), (SROW + 24, "f", 0.0), (SROW + 40, "f", 0.0)]),
    "not finite": ((1, 0), [(SROW, "f", np.nan)]),
    "cannot be meant": ((1, 0), [(SROW + 12, "f", 1e30)]),
    "no rotation": ((0, 1), [(QUATERNION, "3f", 0.9, 0.9, 0.9)]),
    "kinds 300": ((1, 0), [(QFORM_CODE + 2, "h", 300)]),
    "impossible dimension": ((1, 1), [(DIM + 2, "3h", -5, 9, 8)]),
    "196": ((1, 1), [(DIM + 2, "3h", 30000, 30000, 30000), (DATATYPE, "2h", 64, 64)]),
    "4-D": ((1, 1), [(DIM, "5h", 4, 10, 9, 4, 2)]),
    "2 dimensions": ((1, 1), [(DIM, "h", 2)]),
    "truncated or claims too much": ((1, 1), [(DIM + 2, "h", 300)]),
    "RGB": ((1, 1), [(DATATYPE, "2h", 128, 24)]),
    "complex": ((1, 1), [(DATATYPE, "2h", 32, 64)]),
    "unknown type": ((1, 1), [(DATATYPE, "2h", 77, 8)]),
    "16 bits": ((1, 1), [(DATATYPE, "2h", 2, 16)]),
    "offset": ((1, 1), [(OFFSET, "f", 1e9)]),
    "intercept": ((1, 1), [(SLOPE, "2f", 1.0, np.nan)]),
    "Analyze": ((1, 1), [(344, "i", 0)]),
}


@pytest.mark.parametrize("said", HEADERS)
def test_a_header_that_cannot_be_believed_is_named(tmp_path, said):
    codes, changes = HEADERS[said]
    path = saved(tmp_path / "m.nii", nifti(a_mask(), codes=codes, changes=changes))
    for read in (look, read_mask, read_image):
        assert said in refusal(path, read)


def test_a_fourth_dimension_of_one_is_none(tmp_path):
    labels, geometry, _ = read_mask(saved(tmp_path / "m.nii.gz", nifti(a_mask()[..., None])))
    assert np.array_equal(labels, a_mask()) and geometry.shape == SHAPE
    write_mask(tmp_path / "out.nii", labels, geometry)
    assert nibabel.load(tmp_path / "out.nii").shape == SHAPE


@pytest.mark.parametrize(
    "said, values",
    [
        ("negative", lambda draw: draw.integers(-1000, 1000, SHAPE).astype(np.int16)),
        ("such as", lambda draw: draw.random(SHAPE).astype(np.float32)),
        ("up to", lambda draw: draw.integers(0, 10**6, SHAPE).astype(np.int32)),
        ("different ones", lambda draw: draw.permutation(4000).reshape(20, 20, 10).astype(np.int16)),
        ("from voxel to voxel", lambda draw: draw.integers(0, 200, SHAPE).astype(np.uint8)),
        ("NaN", lambda draw: np.where(draw.random(SHAPE) < 0.1, np.nan, 1).astype(np.float32)),
    ],
)
def test_an_image_is_no_mask(tmp_path, said, values):
    assert said in refusal(saved(tmp_path / "m.nii.gz", nifti(values(np.random.default_rng(0)))))


def test_a_mask_of_a_hundred_organs_is_one(tmp_path):
    labels = np.repeat(np.repeat(np.arange(1, 126).reshape(5, 5, 5), 5, 0), 5, 1).astype(np.uint8)
    read, _, notes = read_mask(saved(tmp_path / "m.nii.gz", nifti(labels)))
    assert np.array_equal(read, labels) and not notes


def test_what_is_no_nifti_is_called_what_it_is(tmp_path):
    inner = nifti(a_mask())
    archive, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("x.nii")
        entry.size = len(inner)
        tar.addfile(entry, io.BytesIO(inner))
    with zipfile.ZipFile(packed, "w") as zip_file:
        zip_file.writestr("x.nii", inner)
    kinds = {
        "tar archive": gzip.compress(archive.getvalue()),
        "zip archive": packed.getvalue(),
        "web page": b"\n<!DOCTYPE html><html></html>",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "empty": b"",
        "gzip twice": gzip.compress(gzip.compress(inner)),
        "DICOM": bytes(128) + b"DICM" + bytes(100),
        "does not begin with a header": random.Random(0).randbytes(2000),
    }
    for said, content in kinds.items():
        assert said in refusal(saved(tmp_path / "m.nii.gz", content, False))
    assert "not there" in refusal(tmp_path / "nothing.nii")
    assert "not there" in refusal(tmp_path)


def test_streams_are_read_to_their_end_so_that_their_checksum_counts(tmp_path):
    content = gzip.compress(nifti(a_mask()), 0, mtime=0)  # level 0: bytes can be changed without breaking the stream
    assert not read_mask(saved(tmp_path / "m.nii.gz", content, False))[2]
    damaged = bytearray(content)
    damaged[500:540] = b"\1" * 40
    assert not np.array_equal(nibabel.load(saved(tmp_path / "d.nii.gz", damaged, False)).get_fdata(), a_mask())
    for read in (read_mask, read_image):
        assert "CRC" in refusal(tmp_path / "d.nii.gz", read)
    for cut in (len(content) - 4, len(content) // 2, 300):
        assert "truncated" in refusal(saved(tmp_path / "t.nii.gz", content[:cut], False))
    assert "truncated" in refusal(saved(tmp_path / "t.nii", nifti(a_mask())[:-1]))


def test_what_a_stream_unpacks_to_is_bounded_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("volumes.TRAILING", 2**20)
    zeros = gzip.compress(bytes(2**23), 9)
    start = gzip.compress(nifti(a_mask()))
    some = saved(tmp_path / "some.nii.gz", start + gzip.compress(bytes(1000)), False)
    assert "1000" in read_mask(some)[2][0]
    bomb = saved(tmp_path / "bomb.nii.gz", start + zeros * 16, False)
    huge = nifti(np.zeros((4, 4, 4), np.float32), changes=[(DIM + 2, "3h", 1024, 1024, 1024)])
    claims = saved(tmp_path / "huge.nii.gz", gzip.compress(huge) + zeros * 16, False)
    tracemalloc.start()
    assert "more than its volume" in refusal(bomb)
    assert "1024 x 1024 x 1024" in refusal(claims) and "4 GiB" in refusal(claims)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_memory_is_asked_for_before_it_is_taken(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.nii.gz", nifti(a_mask()))
    monkeypatch.setattr("volumes.free_memory", lambda: 1000)
    assert np.array_equal(read_mask(path)[0], a_mask())  # 720 bytes
    assert "2.81 KiB" in refusal(path, read_image)


def test_whatever_is_wrong_with_the_bytes_of_a_file_it_is_named_or_does_no_harm(tmp_path):
    draw = random.Random(0)
    sources = [nifti(a_mask()), nifti(a_mask().astype(np.float32), kind=nibabel.Nifti2Image)]
    outcomes = {"read": 0, "named": 0}
    for number in range(250):
        content = bytearray(draw.choice(sources))
        if number % 2:
            content = bytearray(gzip.compress(content, 1)) if number % 4 == 1 else content
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(min(len(content), 552))] = draw.randrange(256)
        if number % 5 == 0:
            del content[draw.randrange(len(content)) :]
        path = saved(tmp_path / "m.nii.gz", bytes(content), False)
        for read in (read_mask, read_image):
            try:
                values, geometry, _ = read(path)
            except BadVolume as error:
                assert "\n" not in str(error)
                outcomes["named"] += 1
                continue
            assert np.isfinite(values).all() and np.isfinite(geometry.affine).all() and values.shape == geometry.shape
            outcomes["read"] += 1
            if outcomes["read"] % 8 == 0:
                write_mask(tmp_path / "out.nii", np.zeros(geometry.shape, np.uint8), geometry)
                assert np.allclose(read_mask(tmp_path / "out.nii")[1].affine, geometry.affine, rtol=1e-4, atol=1e-3)
    assert min(outcomes.values()) > 80


# ---- intensities -----------------------------------------------------------------------------------------------------------


def test_ct_is_cut_to_a_window_and_mr_to_the_percentiles_of_the_body():
    hu = np.array([-3024.0, -1000, 0, 500, 30000], np.float32)
    assert normalise(hu, "ct").tolist() == [0, 0, 0.5, 0.75, 1]
    assert np.allclose(normalise(hu, "ct", (-160, 240)), [0, 0, 0.4, 1, 1])
    draw = np.random.default_rng(0)
    air, body = draw.normal(5, 2, 40000), draw.normal(400, 50, 10000)
    scan = np.concatenate([air, body, [1e5]]).astype(np.float32)
    scaled = normalise(scan, "mr")
    assert scaled.min() == 0 and scaled.max() == 1 and scaled.dtype == np.float32
    assert 0.4 < np.median(scaled[40000:]) < 0.6 and scaled[:40000].max() == 0, "one bright voxel does not decide"
    assert np.allclose(normalise(3 * scan, "mr"), scaled, atol=1e-5)
    assert np.isfinite(normalise(np.zeros((4, 4, 4), np.float32), "mr")).all()


def test_values_that_are_no_hounsfield_units_are_doubted():
    draw = np.random.default_rng(0)
    hu = draw.integers(-1000, 1500, 1000).astype(np.float32)
    assert guess_modality(hu) == "ct" and not doubt(hu, "ct")
    assert guess_modality(draw.random(1000) * 800) == "mr" and guess_modality(draw.normal(size=1000)) == "mr"
    for scaled in ((hu + 1000) / 2500, (hu + 1000) / 2500 * 255):
        assert "Hounsfield" in doubt(scaled, "ct") and not doubt(scaled, "mr")
    assert "throughout" in doubt(np.ones(10), "mr")


# ---- image and mask --------------------------------------------------------------------------------------------------------


def grid(shape=(36, 34, 32), **facts) -> Geometry:
    return Geometry(shape, affine_of(**facts))


def test_grids_that_rounding_parts_or_that_are_stored_in_another_order_are_the_same():
    image = grid()
    rounded = grid(origin=(-20.0 + 1e-4, 30.0, 5.0))
    rounded.affine[:3, :3] += np.random.default_rng(0).normal(0, 1e-6, (3, 3))
    flipped = grid(axes="LAS", origin=(-20.0 + 35 * 1.5, 30.0, 5.0))
    turned = grid((32, 36, 34), axes="SRA", spacing=(2.0, 1.5, 1.2))
    for mask in (image, rounded, flipped, turned):
        assert check_pair(image, mask) == "" and pair_note(image, mask) == ""


def test_a_mask_beside_its_image_is_said_with_figures_and_used_in_its_own_place():
    image = grid(spacing=(1.5, 1.5, 1.5))
    half = grid(spacing=(1.5, 1.5, 1.5), origin=(-19.25, 30.75, 5.75))
    assert check_pair(image, half) == ""
    assert "0.75 x 0.75 x 0.75 mm off, 1.3 mm in all, up to 0.5 voxels" in pair_note(image, half)
    finer = grid((40, 38, 36), spacing=(1, 1, 1), origin=(-15.0, 35.0, 8.0))
    assert check_pair(image, finer) == ""
    assert "40 x 38 x 36 voxels of 1 x 1 x 1 mm for 36 x 34 x 32 voxels of 1.5 x 1.5 x 1.5 mm" in pair_note(image, finer)


def test_missing_slices_and_other_places_part_a_mask_from_its_image():
    image = grid()
    top = grid((36, 34, 31))
    bottom = grid((36, 34, 31), origin=(-20.0, 30.0, 7.0))
    stored = grid((31, 36, 34), axes="SRA", spacing=(2.0, 1.5, 1.2))
    for mask in (top, bottom, stored):
        assert "slices are missing" in check_pair(image, mask) and "36 x 34 x 32" in check_pair(image, mask)
    lost = check_pair(image, grid(spacing=(1.0, 1.0, 1.0)))
    assert "one shape in different voxels" in lost and "1 x 1 x 1 mm for 1.5 x 1.2 x 2 mm" in lost
    assert "axes up to 20 degrees apart" in check_pair(image, grid(tilt=np.radians(20)))
    far = check_pair(image, grid(origin=(280.0, 330.0, 305.0)))
    assert "different places" in far and "519.6 mm" in far and "0%" in far


# ---- folders ---------------------------------------------------------------------------------------------------------------

IMAGE = nifti(a_mask(dtype=np.int16) * np.int16(100) - np.int16(50))
MASK = nifti(a_mask())


def tree(root, files: str, tables=None):
    """Volumes under these paths, masks where the path says so; tables: path -> JSON or text."""
    for name in files.split():
        is_mask = any(word in name.lower() for word in ("label", "seg", "mask", "gt", "organ"))
        saved(root / name, MASK if is_mask else IMAGE)
    for name, content in (tables or {}).items():
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def found(root, organs=""):
    """(name -> (image, masks, split, modality, patient), faults)"""
    faults = Faults()
    cases, _ = find_cases(root, faults, organs)

    def below(path):
        return path and path.relative_to(root).as_posix()

    return {
        case.name: (
            *(below(case.image), [(organ, below(path), label) for organ, path, label in case.masks]),
            *(case.split, case.modality, case.patient),
        )
        for case in cases
    }, faults


def pairs(root) -> dict[str, tuple[str, str]]:
    cases, faults = found(root)
    assert not faults.found
    return {name: (facts[0], facts[1][0][1]) for name, facts in cases.items()}


@pytest.mark.parametrize(
    "files, expected",
    [
        ("images/a.nii.gz labels/a.nii.gz", {"a": ("images/a.nii.gz", "labels/a.nii.gz")}),
        ("s1-image.nii.gz s1-label.nii.gz", {"s1": ("s1-image.nii.gz", "s1-label.nii.gz")}),
        ("volume-0.nii segmentation-0.nii", {"0": ("volume-0.nii", "segmentation-0.nii")}),
        ("c/imaging.nii.gz c/segmentation.nii.gz", {"c": ("c/imaging.nii.gz", "c/segmentation.nii.gz")}),
        ("p/p_frame01.nii.gz p/p_frame01_gt.nii.gz", {"p_frame01": ("p/p_frame01.nii.gz", "p/p_frame01_gt.nii.gz")}),
        ("img/img0001.nii.gz label/label0001.nii.gz", {"0001": ("img/img0001.nii.gz", "label/label0001.nii.gz")}),
        ("CT_2020/a.nii.gz labels/a.nii.gz", {"a": ("CT_2020/a.nii.gz", "labels/a.nii.gz")}),
        ("imagesTr/i_0001.nii.gz labelsTr/i_0001.nii.gz", {"i_0001": ("imagesTr/i_0001.nii.gz", "labelsTr/i_0001.nii.gz")}),
    ],
)
def test_image_and_mask_are_found_by_the_names_that_people_give_them(tmp_path, files, expected):
    assert pairs(tree(tmp_path, files)) == expected


def test_channels_of_nnunet_are_told_from_names_that_end_in_digits(tmp_path):
    names = ("case_1", "case_10", "case_0001", "P", "P_0000", "v2.1_x")
    files = [f"imagesTr/{name}_{channel:04d}.nii.gz" for name in names for channel in (0, 1)]
    files += [f"labelsTr/{name}.nii.gz" for name in names] + ["imagesTr/lonely_0000.nii.gz", "labelsTr/orphan.nii.gz"]
    table = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "organ": 1}}
    cases, faults = found(tree(tmp_path, " ".join(files), {"dataset.json": table}))
    for name in names:
        image, masks, split, modality, _ = cases[name]
        assert (image, masks) == (f"imagesTr/{name}_0000.nii.gz", [("organ", f"labelsTr/{name}.nii.gz", 1)])
        assert (split, modality) == ("train", "mr")
    assert set(cases) == set(names)
    assert faults.found == {
        "image without a mask": ["imagesTr/lonely_0000.nii.gz"],
        "mask without an image": ["labelsTr/orphan.nii.gz"],
    }


def test_medical_decathlon_is_read_as_it_unpacks(tmp_path):
    files = "imagesTr/h_001.nii.gz labelsTr/h_001.nii.gz imagesTr/h_003.nii.gz labelsTr/h_003.nii.gz imagesTs/h_002.nii.gz"
    listed = [{"image": f"./imagesTr/h_{i:03d}.nii.gz", "label": f"./labelsTr/h_{i:03d}.nii.gz"} for i in (1, 3)]
    table = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "training": listed}
    tree(tmp_path, files, {"dataset.json": table | {"test": ["./imagesTs/h_002.nii.gz"]}})
    for path in list(tmp_path.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(60))
    (tmp_path / ".DS_Store").write_bytes(bytes(20))
    cases, faults = found(tmp_path)
    assert set(cases) == {"h_001", "h_003"} and cases["h_001"][1] == [("Anterior", "labelsTr/h_001.nii.gz", 1)]
    assert cases["h_001"][2:4] == ("train", "mr") and not faults.found
    assert faults.notes == {"organ of dataset.json that is in no case": ["Posterior (label 2)"]}


def test_totalsegmentator_folders_have_an_organ_in_each_file(tmp_path):
    files = [
        f"s{i:04d}/{name}.nii.gz" for i in (0, 3, 11) for name in ("ct", "segmentations/liver", "segmentations/vertebrae_T1")
    ]
    tree(
        tmp_path,
        " ".join(files) + " s0864/segmentations/liver.nii.gz",
        {"meta.csv": "image_id;age;split\ns0000;1;train\ns0011;2;val\n"},
    )
    saved(tmp_path / "s0003/segmentations/liver.nii.gz", nifti(a_mask(label=5)))
    cases, faults = found(tmp_path)
    organs = [(organ, f"s0003/segmentations/{organ}.nii.gz", 0) for organ in ("liver", "vertebrae_T1")]
    assert cases["s0003"] == ("s0003/ct.nii.gz", organs, None, "ct", "s0003")
    assert [cases[name][2] for name in ("s0000", "s0011")] == ["train", "val"]
    assert list(faults.found.values()) == [["s0864"]] and "without an image" in next(iter(faults.found))


def test_of_several_scans_of_a_case_the_first_is_the_image(tmp_path):
    files = ["s1/t1.nii.gz s1/t2.nii.gz s1/segmentations/liver.nii.gz s1/segmentations/spleen.nii.gz"]
    files += [f"B_1/B_1_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "seg")]
    cases, faults = found(tree(tmp_path, " ".join(files)))
    assert {name: facts[0] for name, facts in cases.items()} == {"s1": "s1/t1.nii.gz", "B_1": "B_1/B_1_flair.nii.gz"}
    assert not faults.found and len(faults.notes["several images of a case, the first is taken"]) == 2


def test_a_mask_that_says_ct_or_mr_is_of_no_scan_that_says_the_other(tmp_path):
    cases, faults = found(tree(tmp_path / "both", "a_ct.nii.gz a_mr.nii.gz a_seg_ct.nii.gz a_seg_mr.nii.gz"))
    assert {(facts[0], facts[1][0][1]) for facts in cases.values()} == {
        (f"a_{k}.nii.gz", f"a_seg_{k}.nii.gz") for k in ("ct", "mr")
    }
    cases, faults = found(tree(tmp_path / "mr", "a_ct.nii.gz a_mr.nii.gz a_seg_mr.nii.gz b_ct.nii.gz b_seg.nii.gz"))
    assert {facts[0] for facts in cases.values()} == {"a_mr.nii.gz", "b_ct.nii.gz"}
    assert faults.found == {"image without a mask": ["a_ct.nii.gz"]}
    with pytest.raises(UserError, match="no case in it; expected TotalSegmentator"):
        found(tree(tmp_path / "other", "a_ct.nii.gz a_seg_mr.nii.gz"))


@pytest.mark.parametrize("place", ["labels/{case}/{organ}", "masks/{organ}/{case}"])
def test_organs_in_folders_beside_the_images_belong_to_their_cases(tmp_path, place):
    files = [
        f"{place}.nii.gz".format(case=case, organ=organ) for case, organ in (("a", "liver"), ("a", "spleen"), ("b", "liver"))
    ]
    cases, faults = found(tree(tmp_path, "images/a.nii.gz images/b.nii.gz " + " ".join(files)))
    assert [organ for organ, _, _ in cases["a"][1]] == ["liver", "spleen"] and cases["b"][0] == "images/b.nii.gz"
    assert not faults.found


def test_masks_alone_are_cases_without_an_image(tmp_path):
    cases, faults = found(tree(tmp_path / "flat", "a_organ.nii.gz b_organ.nii.gz"))
    assert {name: facts[0] for name, facts in cases.items()} == {"a_organ": None, "b_organ": None} and not faults.found
    cases, _ = found(tree(tmp_path / "folders", "s1/segmentations/liver.nii.gz s1/segmentations/spleen.nii.gz"))
    assert [organ for organ, _, _ in cases["s1"][1]] == ["liver", "spleen"]


def test_labels_have_the_names_that_dataset_json_gives_them_whatever_their_numbers(tmp_path):
    labels = np.zeros(SHAPE, np.int16)
    for place, label in enumerate((2, 7, 200, 300)):
        labels[2 * place, 3:6, 3:6] = label
    table = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "spleen": 2, "left kidney": 200, "bladder": 300, "thymus": 9},
    }
    tree(tmp_path, "imagesTr/g_0000.nii.gz", {"dataset.json": table})
    saved(tmp_path / "labelsTr/g.nii.gz", nifti(labels))
    cases, faults = found(tmp_path)
    organs = [(organ, label) for organ, _, label in cases["g"][1]]
    assert organs == [("spleen", 2), ("7", 7), ("left_kidney", 200), ("bladder", 300)] and cases["g"][3] == "ct"
    assert faults.notes["organ of dataset.json that is in no case"] == ["thymus (label 9)"]
    assert faults.notes["labels that dataset.json does not name"] == ["labelsTr/g.nii.gz (7)"]
    chosen, _ = found(tmp_path, "Left Kidney, 300")
    assert [organ for organ, _, _ in chosen["g"][1]] == ["left_kidney", "bladder"]
    with pytest.raises(UserError, match="no thymus; there are spleen, 7, left_kidney, bladder"):
        found(tmp_path, "thymus")


def test_awkward_names_are_taken_as_they_are_and_system_files_passed_over(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    names = (
        ("Patient 1 (CT)",) * 2,
        ("case.v2.1",) * 2,
        (apart, composed),
        ("LOUD", "LOUD"),
        ("mixed", "mixed"),
        ("linked", "linked"),
    )
    for image, mask in names:
        ending = ".NII.GZ" if mask == "LOUD" else ".nii.gz"
        saved(tmp_path / f"images/{image}{ending}", IMAGE)
        saved(tmp_path / f"labels/{mask}{'.nii' if mask == 'mixed' else ending}", MASK)
    shutil.move(tmp_path / "images/linked.nii.gz", tmp_path / "store.bin")
    os.symlink("../store.bin", tmp_path / "images/linked.nii.gz")
    for name in ("images/Thumbs.db", "images/.DS_Store", "labels/desktop.ini", "labels/._LOUD.NII.GZ"):
        (tmp_path / name).write_bytes(bytes(40))
    for kind in ("images", "labels"):
        saved(tmp_path / kind / "two\nlines.nii", IMAGE if kind == "images" else MASK)
    cases, faults = found(tmp_path)
    assert set(cases) == {mask for _, mask in names} | {"two\\nlines"} and not faults.found and not faults.notes
    assert volume_stem("case.v2.1.NII.GZ") == "case.v2.1" and volume_stem("no.volume.txt") == "no.volume.txt"


def test_cases_of_one_name_in_several_folders_stay_apart(tmp_path):
    sites = [f"{site}/{kind}/{i:03d}.nii.gz" for site in ("site_a", "site_b") for i in (1, 2) for kind in ("images", "labels")]
    cases, _ = found(tree(tmp_path / "sites", " ".join(sites)))
    assert {name: facts[0] for name, facts in cases.items()} == {
        f"{site}/{i:03d}": f"{site}/images/{i:03d}.nii.gz" for site in ("site_a", "site_b") for i in (1, 2)
    }
    parts = [f"{part}/{kind}/001.nii.gz" for part in ("train", "val", "test") for kind in ("images", "masks")]
    cases, _ = found(tree(tmp_path / "parts", " ".join(parts)))
    assert {name: facts[2] for name, facts in cases.items()} == {f"{part}/001": part for part in ("train", "val", "test")}
    tasks = [f"Task{i}/{kind}Tr/x.nii.gz" for i in (1, 2) for kind in ("images", "labels")]
    tree(tmp_path / "tasks", " ".join(tasks))
    for i in (1, 2):
        tree(tmp_path / "tasks" / f"Task{i}", "", {"dataset.json": {"labels": {"0": "background", "1": f"organ{i}"}}})
    cases, _ = found(tmp_path / "tasks")
    assert {name: facts[1][0][0] for name, facts in cases.items()} == {"Task1/x": "organ1", "Task2/x": "organ2"}


def test_scans_of_one_patient_are_never_on_both_sides_of_a_split(tmp_path):
    scans = [f"sub-{p:02d}_ses-{s}" for p in range(1, 7) for s in (1, 2)]
    cases, _ = found(tree(tmp_path, " ".join(f"{kind}/{scan}.nii.gz" for kind in ("images", "labels") for scan in scans)))
    patients = [facts[4] for facts in cases.values()]
    assert sorted(set(patients)) == [f"sub-{p:02d}" for p in range(1, 7)]
    for seed in range(10):
        train, val = hold_out(list(cases), patients, seed, tmp_path)
        assert not {name[:6] for name in train} & {name[:6] for name in val} and len(train) + len(val) == 12


@pytest.mark.parametrize(
    "name, place, patient",
    [
        ("P07_visit2", (), "P07"),
        ("012-baseline", (), "012"),
        ("patient001_frame12", ("training",), "patient001"),
        ("case_10", (), "case_10"),
        ("site_a/001", ("site_a",), "site_a/001"),
        ("anat", ("sub-03", "ses-1"), "sub-03"),
        ("studies", (), "studies"),
        ("ses-1", (), "ses-1"),
    ],
)
def test_whose_scan_it_is_by_its_name(name, place, patient):
    assert patient_of(FoundCase(name, place, None, (), None, None, {})) == patient


def test_a_rule_of_the_users_finds_the_patient_where_names_are_of_another_kind(tmp_path):
    cases, _ = find_cases(tree(tmp_path, "images/A1x.nii.gz labels/A1x.nii.gz images/A2x.nii.gz labels/A2x.nii.gz"), Faults())
    assert [case.patient for case in cases] == ["A1x", "A2x"]
    assert [case.patient for case in group_patients(cases, "[A-Z]")] == ["A", "A"]
    assert [case.patient for case in group_patients(cases, r"A(\d)")] == ["1", "2"]
    for rule, fault in (("[", "no regular expression"), ("B", "finds no patient in A1x"), ("(B)?", "finds no patient in A1x")):
        with pytest.raises(UserError, match=fault):
            group_patients(cases, rule)


def test_one_bad_file_costs_its_own_case_alone_and_is_named(tmp_path):
    names = ("good", "cut", "crc", "swapped", "less")
    tree(tmp_path, " ".join(f"{kind}/{name}.nii.gz" for kind in ("images", "labels") for name in names))
    saved(tmp_path / "images/cut.nii.gz", gzip.compress(IMAGE)[:60], False)
    damaged = bytearray(gzip.compress(MASK, 0))
    damaged[500:540] = b"\1" * 40
    saved(tmp_path / "labels/crc.nii.gz", bytes(damaged), False)
    saved(tmp_path / "labels/swapped.nii.gz", nifti(np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)))
    saved(tmp_path / "labels/less.nii.gz", nifti(a_mask()[:, :, :-1]))
    for name in ("n.nrrd", "m.mha"):
        (tmp_path / "labels" / name).write_bytes(b"NRRD0004\n")
    (tmp_path / "series").mkdir()
    for number in range(3):
        (tmp_path / "series" / f"{number}.dcm").write_bytes(bytes(200))
    cases, faults = found(tmp_path)
    assert set(cases) == {"good"}
    said = {place.partition(" ")[0]: fault for fault, places in faults.found.items() for place in places}
    assert {"images/cut.nii.gz", "labels/crc.nii.gz", "labels/swapped.nii.gz", "labels/less.nii.gz"} < set(said)
    assert "SimpleITK" in said["labels/n.nrrd"] and "SimpleITK" in said["labels/m.mha"] and "dcm2niix" in said["series"]
    assert sum(faults.counts().values()) == 7


def test_what_is_known_of_files_is_not_looked_at_again(tmp_path, monkeypatch):
    tree(tmp_path / "data", "images/a.nii.gz labels/a.nii.gz s1/ct.nii.gz s1/segmentations/liver.nii.gz")
    read = []
    for name in ("look_at_volume", "look_at_mask"):
        work = getattr(__import__("cases"), name)
        monkeypatch.setattr(f"cases.{name}", lambda path, work=work: read.append(path.name) or work(path))
    first, _ = found(tmp_path / "data")
    assert sorted(read) == ["a.nii.gz", "a.nii.gz", "ct.nii.gz", "liver.nii.gz"]
    saved(tmp_path / "data/labels/a.nii.gz", nifti(a_mask(label=3)))
    second, _ = found(tmp_path / "data")
    assert len(read) == 5 and first["a"][1][0][2] == 1 and second["a"][1][0][2] == 3


def test_folders_without_a_case_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        find_cases(tmp_path / "gone", Faults())
    with pytest.raises(UserError, match="is a file"):
        find_cases(saved(tmp_path / "file" / "a.nii", MASK), Faults())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no case in it; expected TotalSegmentator"):
        find_cases(tmp_path / "empty", Faults())
    tree(tmp_path / "mixed", "x_ct.nii.gz x_ct_low.nii.gz x_seg.nii.gz x_seg_full.nii.gz")  # x_seg is x_ct_low's
    saved(tmp_path / "mixed/x_ct.nii.gz", nifti(np.zeros((*SHAPE[:2], 20), np.float32)))
    with pytest.raises(UserError, match="do not say which mask is of which image: expected TotalSegmentator"):
        find_cases(tmp_path / "mixed", Faults())
    saved(tmp_path / "bad/images/a.nii.gz", b"no volume")
    saved(tmp_path / "bad/labels/a.nii.gz", MASK)
    with pytest.raises(UserError, match="of its 1 case none can be used, all for one reason: not a NIfTI"):
        find_cases(tmp_path / "bad", Faults())
