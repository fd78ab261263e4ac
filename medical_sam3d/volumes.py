"""Volumes in NIfTI files, read without believing them: .nii, .nii.gz, .hdr with .img; masks written back as the input was.

    labels, geometry, notes = read_mask(path)
    image, geometry, notes = read_image(path)
    write_mask(path, labels, geometry)

The header is checked first (nifti_header.py), then the voxels are taken from a stream that is read to its end in pieces: never
more than the header claims, and with the checksum that nibabel leaves unread.
"""

import gzip
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.checkpoint import atomic_file, disk_fault
from common.config import UserError
from common.sample_cache import free_memory
from nifti_header import BadVolume, Geometry, Stored, in_bytes, open_header, parse_header

VOLUME_ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz")  # of the file with the header; in any case of the letters
PIECE = 2**21  # voxels that are read at a time
TRAILING = 2**28  # bytes after the voxels that are still passed over
DEEPEST = 1040  # gzip makes no file smaller than by this factor
MOST_LABELS = 1000  # different values of a mask; TotalSegmentator has 117, FreeSurfer about 190
GREATEST_LABEL = 65535
ROUNDED = 2e-3  # part of a label that it may be off a whole number, as scaled integers are
HU_WINDOW = (-1000.0, 1000.0)


# ---- reading ---------------------------------------------------------------------------------------------------------------


def volume_stem(name: str) -> str:
    """The name of a volume file without its ending: "case.v2.1" of case.v2.1.NII.GZ; all of it where there is no such ending."""
    ending = max((end for end in (*VOLUME_ENDINGS, ".img", ".img.gz") if name.lower().endswith(end)), key=len, default="")
    return name[: len(name) - len(ending)]


def look(path: Path) -> Stored:
    """What the header says: .geometry, .dtype, .bytes when unpacked, .notes. BadVolume where it is not sound.

    Of the voxels only how many bytes the file has is compared with what the header claims.
    """
    path = header_file(Path(path))
    with faults_named(), open_stream(path) as (stream, packed):
        stored = parse_header(stream.read(544))
        voxels = path if stored.single else image_file(path)
    size = os.path.getsize(voxels)
    packed = packed if voxels == path else is_packed(voxels)
    room = size * DEEPEST if packed else size
    if room < stored.offset + stored.bytes:
        what = f"{in_bytes(stored.offset + stored.bytes)} by its header, {size} bytes on disk"
        raise BadVolume(f"file that is truncated or claims too much, expected {what}")
    return stored


def read_mask(path: Path, one_organ: bool = False) -> tuple[np.ndarray, Geometry, list[str]]:
    """(labels (X, Y, Z) uint8 or uint16, geometry, notes) of a mask; the whole file is read and its checksum compared.

    one_organ: whatever is above 0 is label 1. Values within ROUNDED of whole numbers are rounded. BadVolume for what is damaged
    or no mask: fractions, negative values, as many values as an image has.
    """
    stored = look(path)
    notes = list(stored.notes)
    labels = taken(stored, np.uint8)
    counts, worst = np.zeros(GREATEST_LABEL + 1, np.int64), 0.0
    for start, values in pieces(path, stored, notes):
        whole, off = as_labels(values)
        worst = max(worst, off)
        seen = np.bincount(whole, minlength=len(counts))
        counts += seen
        if labels.dtype == np.uint8 and seen[256:].any():
            labels = labels.astype(np.uint16)
        labels[start : start + len(whole)] = whole
    labels = labels.reshape(stored.geometry.shape, order="F")
    check_is_mask(labels, counts, notes)
    if one_organ and len(other := np.flatnonzero(counts[2:])):
        np.minimum(labels, 1, out=labels)
        notes.append(f"mask of one organ with other values than 0 and 1, {', '.join(map(str, other[:5] + 2))}: read as 1")
    if worst > 1e-6:
        notes.append(f"labels rounded to whole numbers, they were up to {worst:.2g} off")
    return labels, stored.geometry, notes


def read_image(path: Path) -> tuple[np.ndarray, Geometry, list[str]]:
    """(image (X, Y, Z) float32, scaled as the header says; geometry; notes); the whole file is read and its checksum compared.

    What is not finite becomes the lowest finite value (+infinity: the highest), counted in the notes. BadVolume where the
    file is damaged or no value is finite.
    """
    stored = look(path)
    notes = list(stored.notes)
    image = taken(stored, np.float32)
    low, high, bad = np.inf, -np.inf, 0
    for start, values in pieces(path, stored, notes):
        part = image[start : start + len(values)]
        with np.errstate(over="ignore", invalid="ignore"):
            part[:] = values
        known = part[np.isfinite(part)]
        low, high = min(low, known.min(initial=np.inf)), max(high, known.max(initial=-np.inf))
        bad += len(part) - len(known)
    if bad == len(image):
        raise BadVolume("image without a finite value, NaN throughout")
    if bad:
        np.nan_to_num(image, copy=False, nan=low, neginf=low, posinf=high)
        notes.append(f"values that are not finite, {bad} replaced (NaN, infinity)")
    return image.reshape(stored.geometry.shape, order="F"), stored.geometry, notes


def taken(stored: Stored, dtype) -> np.ndarray:
    """Memory for the voxels (flat), where there is that much. BadVolume else, before anything is taken."""
    needed, free = stored.voxels * np.dtype(dtype).itemsize, free_memory()
    if needed > free:
        # From a MemoryError: another time there may be more, so nobody is to keep it as the file's fault.
        raise BadVolume(f"volume that is too large, it takes {in_bytes(needed)} and {in_bytes(free)} are free") from MemoryError()
    return np.empty(stored.voxels, dtype)


def pieces(path: Path, stored: Stored, notes: list[str]):
    """Yields (first voxel, values): the voxels in the file's order, x fastest, scaled where the header says so.

    The stream is read to its end, so that length and checksum are known to be right when the last piece was seen.
    """
    path = header_file(Path(path))
    path = path if stored.single else image_file(path)
    size = stored.dtype.itemsize
    with faults_named(), open_stream(path) as (stream, _):
        skip(stream, stored.offset)
        for start in range(0, stored.voxels, PIECE):
            wanted = min(PIECE, stored.voxels - start) * size
            block = read_exactly(stream, wanted)
            if len(block) < wanted:
                there, claimed = start * size + len(block), in_bytes(stored.bytes)
                raise BadVolume(f"file that is truncated, {there} bytes of voxels where the header claims {claimed}")
            values = np.frombuffer(block, stored.dtype)
            if (stored.slope, stored.inter) != (1.0, 0.0):
                with np.errstate(over="ignore", invalid="ignore"):
                    values = values * stored.slope + stored.inter
            yield start, values
        trailing = skip(stream, TRAILING + 1)
        if trailing > TRAILING:
            raise BadVolume(f"file with more than its volume, over {in_bytes(TRAILING)} after {in_bytes(stored.bytes)} of voxels")
        if trailing:
            notes.append(f"bytes after the voxels, {trailing} passed over")


def as_labels(values: np.ndarray) -> tuple[np.ndarray, float]:
    """(whole numbers from 0 to GREATEST_LABEL, how far the values were off them). BadVolume where they are no labels."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise BadVolume("values that are no labels, NaN or infinity in a mask")
        whole = np.rint(values)
        off = np.abs(values - whole)
        allowed = np.minimum(ROUNDED * np.maximum(1, np.abs(whole)), 0.05)
        if (off > allowed).any():
            value = values[np.argmax(off - allowed)]
            raise BadVolume(f"values that are no labels, such as {value:.4g}: an image, or probabilities that want a threshold")
    else:
        whole, off = values, np.zeros(1)
    low, high = whole.min(), whole.max()
    if low < 0:
        raise BadVolume(f"values that are no labels, negative ones to {low:g}: an image where a mask is wanted?")
    if high > GREATEST_LABEL:
        raise BadVolume(f"values that are no labels, up to {high:g}: an image where a mask is wanted?")
    return whole.astype(np.uint8 if whole.dtype == np.uint8 else np.uint16, copy=False), float(off.max())


def check_is_mask(labels: np.ndarray, counts: np.ndarray, notes: list[str]) -> None:
    """BadVolume where the values vary as an image's do. counts: of each value."""
    values = np.flatnonzero(counts)
    if len(values) > MOST_LABELS:
        raise BadVolume(f"values that are no labels, {len(values)} different ones: an image where a mask is wanted?")
    if len(values) > 64:  # an image of 8 bits; in a mask most neighbours are of one organ
        middle = labels[:, :, labels.shape[2] // 2]
        inside = (middle[1:] > 0) & (middle[:-1] > 0)
        if (middle[1:] != middle[:-1])[inside].mean() > 0.5 if inside.any() else False:
            raise BadVolume(f"values that are no labels, {len(values)} that change from voxel to voxel: an image, not a mask?")
    if values[-1] == 255 and len(values) == 2:
        notes.append("mask of 0 and 255, one organ of label 255")


# ---- files and streams -----------------------------------------------------------------------------------------------------


@contextmanager
def faults_named():
    """What zlib, gzip and the system say of a file becomes a BadVolume."""
    try:
        yield
    except EOFError:
        raise BadVolume("file that is truncated, the gzip stream ended early") from None
    except gzip.BadGzipFile as error:
        raise BadVolume(f"file that is damaged, gzip: {error}") from None
    except zlib.error as error:
        raise BadVolume(f"file that is damaged, its gzip stream is corrupt ({error})") from None
    except OSError as error:
        raise BadVolume(f"file that cannot be read, {error.strerror or error}") from error


@contextmanager
def open_stream(path: Path):
    """(its bytes as a stream, unpacked where the first two are gzip's, whether they are), whatever the name says."""
    if not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise BadVolume("file that is not there")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file, False
            return
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream, True


def is_packed(path: Path) -> bool:
    with faults_named(), open_stream(path) as (_, packed):
        return packed


def header_file(path: Path) -> Path:
    """The file that holds the header: of an .img the .hdr beside it."""
    name = path.name
    if not name.lower().endswith((".img", ".img.gz")):
        return path
    return partner(path, (".hdr", ".hdr.gz"), "image data without its header file")


def image_file(path: Path) -> Path:
    """The file that holds the voxels of a .hdr."""
    return partner(path, (".img", ".img.gz"), "header file without its image data")


def partner(path: Path, endings: tuple[str, ...], fault: str) -> Path:
    wanted = [volume_stem(path.name) + ending for ending in endings]
    for name in (*wanted, *(name.upper() for name in wanted)):
        if path.with_name(name).is_file():
            return path.with_name(name)
    raise BadVolume(f"{fault}, there is no {wanted[0]}")


def read_exactly(stream, count: int) -> bytes:
    """count bytes, fewer only at the stream's end: gzip's read gives what it has."""
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def skip(stream, count: int) -> int:
    """Reads up to count bytes and forgets them; how many there were."""
    passed = 0
    while passed < count and (part := stream.read(min(2**20, count - passed))):
        passed += len(part)
    return passed


# ---- writing ---------------------------------------------------------------------------------------------------------------


def write_mask(path: Path, labels: np.ndarray, geometry: Geometry) -> None:
    """Writes labels (X, Y, Z) as a NIfTI that lies on the input's voxels: its shape, forms, codes and units; whole or not at all.

    Stored in the smallest unsigned integers that hold the greatest label, slope 1. UserError where it cannot be written.
    """
    import nibabel

    path = Path(path)
    if labels.shape != tuple(geometry.shape):
        raise ValueError(f"labels of shape {labels.shape} on a grid of {geometry.shape}")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"a mask is written as .nii or .nii.gz, not as {path.name}")
    header = header_for(geometry)
    dtype = np.min_scalar_type(int(labels.max(initial=0)))
    kind = nibabel.Nifti2Image if len(header.binaryblock) == 540 else nibabel.Nifti1Image
    header.set_data_dtype(dtype)
    content = kind(labels.astype(dtype), None, header).to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, 6, mtime=0)
    try:
        with atomic_file(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        raise UserError(f"could not write {path}: {disk_fault(error) or error.strerror}") from error


def header_for(geometry: Geometry):
    """The header of a mask on a grid: the file's own without what belongs to its values, or a new one with both forms."""
    import nibabel

    if not geometry.header:
        header = nibabel.Nifti1Header()
        header.set_data_shape(geometry.shape)
        header.set_sform(geometry.affine, 1)
        header.set_qform(geometry.affine, 1)
        header.set_xyzt_units("mm")
        return header
    header, _ = open_header(geometry.header)
    header.set_data_shape(geometry.shape)
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    for name in ("scl_inter", "cal_min", "cal_max", "intent_code", "vox_offset"):
        header[name] = 0
    header["scl_slope"] = 1
    return header


# ---- values and axes -------------------------------------------------------------------------------------------------------


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(array with its axes in the order R, A, S; its affine): turned and flipped, never resampled."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    orientation = io_orientation(affine)
    return apply_orientation(array, orientation), affine @ inv_ornt_aff(orientation, array.shape)


def guess_modality(image: np.ndarray) -> str:
    """ "ct" where values go below zero as Hounsfield units do, else "mr"; for an image of which nothing says it."""
    low, high = float(image.min()), float(image.max())
    return "ct" if low <= -50 and high - low >= 100 else "mr"


def doubt(image: np.ndarray, modality: str) -> str:
    """What makes an image unlikely to be what it is said to be; "" where nothing does."""
    low, high = float(image.min()), float(image.max())
    if low == high:
        return f"image that is {low:g} throughout"
    if modality == "ct" and low >= 0 and high <= 255:
        return f"CT whose values do not look like Hounsfield units ({low:.4g} to {high:.4g})"
    return ""


def normalise(image: np.ndarray, modality: str, window: tuple[float, float] = HU_WINDOW) -> np.ndarray:
    """An image in 0..1, float32. CT: `window` in HU; MR: from the 0.5th to the 99.5th percentile of the body, clipped."""
    low, high = window if modality == "ct" else body_range(image)
    return ((image.astype(np.float32) - low) / max(high - low, 1e-6)).clip(0, 1)


def body_range(image: np.ndarray) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of the values above the background: a tenth of the way up from the first percentile."""
    values = image.ravel(order="K")[:: max(1, image.size // 10**6)]
    low, high = np.percentile(values, (1, 99))
    body = values[values > low + 0.1 * (high - low)]
    if not len(body):
        return float(values.min()), float(values.max())
    return tuple(np.percentile(body, (0.5, 99.5)).tolist())
