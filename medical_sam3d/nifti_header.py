"""The header of a NIfTI file, checked before anything is believed of it: where its voxels lie, how they are stored."""

from dataclasses import dataclass

import numpy as np

from common.samples import BadFile

LARGEST = 2**29  # voxels of a volume: 512 x 512 x 2048
FARTHEST = 1e6  # mm from the scanner's centre; and the largest voxel is a thousandth of it
SHEAR = 1e-3  # cosine between two axes that is still a right angle: float32 rounds those of tilted scans to about 2e-4
UNITS_OF_LENGTH = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # the code in xyzt_units, and mm in one; any other is mm
STORED = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
NOT_READ = {
    1: "single bits",
    32: "complex numbers",
    128: "RGB colours",
    1536: "128-bit floats",
    1792: "complex numbers",
    2048: "complex numbers",
    2304: "RGBA colours",
}
# The first bytes of what is found under a NIfTI's name.
SIGNATURES = {
    b"PK\3\4": "a zip archive, unpack it",
    b"Rar!": "a RAR archive, unpack it",
    b"7z\xbc\xaf": "a 7z archive, unpack it",
    b"BZh": "one packed with bzip2, unpack it",
    b"\xfd7zXZ": "one packed with xz, unpack it",
    b"\x28\xb5\x2f\xfd": "one packed with Zstandard, unpack it",
    b"\x1f\x8b": "one packed with gzip twice, unpack it once",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"version https://git-lfs": "a Git LFS pointer, git lfs pull fetches the file",
    b"NRRD": "an NRRD file",
    b"ObjectType": "a MetaImage file",
    b"\x89HDF": "an HDF5 file",
    b"\0\0\0\1\0\0": "a FreeSurfer volume, mri_convert makes a NIfTI of it",
    b"\0\5\x16\7": "a Mac's side file (AppleDouble)",
    b"<": "a web page or XML file",
}


class BadVolume(BadFile):
    """What is wrong with a volume, "fault" or "fault, detail", on one line without the path: who catches it adds the file."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a volume lie. shape (X, Y, Z); affine (4, 4) float64: index of a voxel -> its centre in RAS mm.

    header: the file's own, 348 bytes of NIfTI-1 or 540 of NIfTI-2, from which a mask is written back with the same forms, codes
    and units; empty: a new one.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: bytes = b""

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm along each axis of the array."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_mm3(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def axcodes(self) -> str:
        """Where the axes of the array point to, as in "LPS"."""
        import nibabel

        return "".join(nibabel.aff2axcodes(self.affine))

    @property
    def corners(self) -> np.ndarray:
        """(8, 3) mm: the centres of the voxels in the volume's corners."""
        last = np.array(self.shape) - 1
        indices = np.indices((2, 2, 2)).reshape(3, 8).T * last
        return indices @ self.affine[:3, :3].T + self.affine[:3, 3]


@dataclass(frozen=True, eq=False)
class Stored:
    """How a volume is stored: dtype with its byte order, slope and intercept, where the voxels begin in their file.

    single: the voxels follow in the header's own file, not in an .img beside it.
    """

    geometry: Geometry
    dtype: np.dtype
    slope: float
    inter: float
    offset: int
    single: bool
    notes: tuple[str, ...]

    @property
    def voxels(self) -> int:
        return int(np.prod(self.geometry.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Of the voxels when unpacked."""
        return self.voxels * self.dtype.itemsize


def parse_header(block: bytes) -> Stored:
    """What the first bytes of a file (up to 544) say of a volume. BadVolume where they are no sound NIfTI header.

    Fields are read with nibabel and checked here: what it repairs in silence (a pixdim of 0 becomes 1 mm) is named.
    """
    header, single = open_header(block)
    shape = shape_of(header)
    dtype = stored_type(header)
    notes = []
    with np.errstate(all="ignore"):  # what overflows is no number then, and is named
        affine = affine_of(header, shape, notes)
    slope, inter = (float(header[name]) for name in ("scl_slope", "scl_inter"))
    if slope == 0 or not np.isfinite(slope):  # by the standard: stored as they are
        slope, inter = 1.0, 0.0
    if not np.isfinite(inter):
        raise BadVolume(f"header that contradicts itself, intercept {inter:g}")
    geometry = Geometry(shape, affine, bytes(header.binaryblock))
    return Stored(geometry, dtype, slope, inter, data_offset(header, single), single, tuple(notes))


def open_header(block: bytes):
    """(nibabel's header, unchecked; whether the voxels are in the same file). BadVolume where there is none."""
    from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
    from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader

    kinds = {348: (Nifti1Header, Nifti1PairHeader), 540: (Nifti2Header, Nifti2PairHeader)}
    for order in ("little", "big"):
        size = int.from_bytes(block[:4], order)
        if size not in kinds or len(block) < size:
            continue
        magic = block[344:348] if size == 348 else block[4:8]
        if magic not in (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0"):
            raise BadVolume("not a NIfTI file, Analyze 7.5 or a damaged header: it has no orientation; convert it to NIfTI")
        if size == 540 and block[8:12] not in (b"\r\n\x1a\n", bytes(4)):  # put there to show this
            raise BadVolume("file that is damaged, it was transferred as text")
        single = magic[1:2] == b"+"
        return kinds[size][0 if single else 1](block[:size], "<" if order == "little" else ">", check=False), single
    raise BadVolume(kind_of(block))


def kind_of(block: bytes) -> str:
    """The fault of a file that is no NIfTI, by its first bytes."""
    if not block:
        return "empty file, 0 bytes"
    if block[257:262] == b"ustar":
        return "not a NIfTI file but a tar archive, unpack it"
    if block[128:132] == b"DICM":
        return "not a NIfTI file but DICOM, dcm2niix makes a NIfTI of its series"
    text = block.lstrip()
    known = (what for start, what in SIGNATURES.items() if block.startswith(start) or (start == b"<" and text.startswith(start)))
    what = next(known, "")
    return f"not a NIfTI file but {what}" if what else "not a NIfTI file, it does not begin with a header"


def shape_of(header) -> tuple[int, int, int]:
    """(X, Y, Z). BadVolume where that is no single volume, or more than anybody can take."""
    dims = [int(size) for size in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise BadVolume(f"header that contradicts itself, {dims[0]} dimensions")
    sizes = dims[1 : 1 + dims[0]]
    text = " x ".join(map(str, sizes))
    if any(size < 1 for size in sizes):
        raise BadVolume(f"header with an impossible dimension, {text}")
    if len(sizes) < 3:
        raise BadVolume(f"picture of {len(sizes)} dimensions where a volume is wanted, {text}")
    if any(size > 1 for size in sizes[3:]):
        raise BadVolume(f"several volumes in one file (4-D), {text}: take one of them, or of its channels, apart")
    if np.prod(sizes[:3], dtype=float) > LARGEST:
        needed = np.prod(sizes[:3], dtype=float) * max(1, int(header["bitpix"]) // 8)
        raise BadVolume(f"volume that is too large, shape {text}: {in_bytes(needed)} of memory; crop or resample it")
    return tuple(sizes[:3])


def stored_type(header) -> np.dtype:
    """The type of a voxel, in the file's byte order. BadVolume for what is no number."""
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code in NOT_READ:
        raise BadVolume(f"voxels that are no numbers, {NOT_READ[code]} (NIfTI type {code})")
    if code not in STORED:
        raise BadVolume(f"voxels of an unknown type, code {code}")
    dtype = np.dtype(STORED[code]).newbyteorder(header.endianness)
    if bits not in (0, 8 * dtype.itemsize):
        raise BadVolume(f"header that contradicts itself, type {dtype.name} but {bits} bits a voxel")
    return dtype


def data_offset(header, single: bool) -> int:
    """Bytes before the first voxel."""
    offset, least = float(header["vox_offset"]), (len(header.binaryblock) + 4 if single else 0)
    if not (offset == 0 or least <= offset < 2**27) or offset != int(offset):
        raise BadVolume(f"header with an impossible offset of its data, {offset:g} bytes")
    return int(offset) or least


# ---- place and size in the world -------------------------------------------------------------------------------------------


def affine_of(header, shape: tuple, notes: list[str]) -> np.ndarray:
    """(4, 4) voxel -> RAS mm by the sform, else the qform, else pixdim alone. BadVolume where none can be used."""
    codes = [int(header[name]) for name in ("sform_code", "qform_code")]
    if not set(codes) <= set(range(6)):
        raise BadVolume(f"header that contradicts itself, sform and qform of kinds {codes[0]} and {codes[1]} (0 to 5 exist)")
    sform, qform = (code > 0 for code in codes)
    if sform:
        affine = header.get_sform().astype(float)
        check_affine(affine, "sform")
        if qform:
            compare_forms(header, affine, shape, notes)
        else:
            compare_spacing(header, affine, notes)
    else:
        affine = affine_of_pixdim(header, shape, qform, notes)
        check_affine(affine, "qform" if qform else "pixdim")
        if not qform:
            notes.append("no orientation in the header, neither sform nor qform: left and right are not known")
    scale = scale_of_units(header, affine, notes)
    affine[:3] *= scale
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(affine).max() > FARTHEST or spacing.max() > FARTHEST / 1000 or spacing.min() < 1e-5:
        raise BadVolume(f"affine that cannot be meant, voxels of {in_mm(spacing)}, {np.linalg.norm(affine[:3, 3]):.4g} mm away")
    return affine


def affine_of_pixdim(header, shape: tuple, qform: bool, notes: list[str]) -> np.ndarray:
    """The affine of the qform, or of the spacing alone, with the sign of a negative spacing dropped and said."""
    spacing = np.array(header["pixdim"][1:4], float)
    if not (np.isfinite(spacing).all() and spacing.all()):
        raise BadVolume(f"voxel spacing that is zero or no number, pixdim {in_mm(spacing)}")
    header = header.copy()
    if (spacing < 0).any():
        notes.append(f"negative voxel spacing, pixdim {in_mm(spacing)}: read without the sign")
        header["pixdim"][1:4] = np.abs(spacing)
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # the side of the third axis; 0 means 1
    header["dim"][:4] = 3, *shape
    return quaternion_affine(header) if qform else header.get_base_affine().astype(float)


def quaternion_affine(header) -> np.ndarray:
    try:
        return header.get_qform().astype(float)
    except ValueError as error:  # nibabel's HeaderDataError is one, too: no unit quaternion
        raise BadVolume(f"qform that is no rotation, {error}") from None


def compare_forms(header, affine: np.ndarray, shape: tuple, notes: list[str]) -> None:
    """A note where the qform puts the volume elsewhere than the sform, which counts (as nibabel and ITK have it)."""
    try:
        other = Geometry(shape, affine_of_pixdim(header, shape, True, []))
        check_affine(other.affine, "qform")
    except BadVolume as error:
        notes.append(f"sform and qform differ, sform used: {error}")
        return
    geometry = Geometry(shape, affine)
    apart = np.linalg.norm(geometry.corners - other.corners, axis=1).max()
    if apart > 0.05 * geometry.spacing.min():
        turned = f", axes {other.axcodes} for {geometry.axcodes}" if other.axcodes != geometry.axcodes else ""
        origins = np.linalg.norm(affine[:3, 3] - other.affine[:3, 3])
        notes.append(f"sform and qform differ, sform used: origins {origins:.4g} mm apart, corners up to {apart:.4g} mm{turned}")


def compare_spacing(header, affine: np.ndarray, notes: list[str]) -> None:
    """A note where pixdim, which only programs that pass over the sform go by, has other sizes."""
    spacing, other = np.linalg.norm(affine[:3, :3], axis=0), np.abs(np.array(header["pixdim"][1:4], float))
    if not (np.abs(other - spacing) <= 0.01 * spacing).all():
        notes.append(f"sform and pixdim differ, sform used: voxels of {in_mm(spacing)} for {in_mm(other)}")


def check_affine(affine: np.ndarray, form: str) -> None:
    """BadVolume where an affine is not finite, is singular, or has axes that are not at right angles."""
    if not np.isfinite(affine).all():
        raise BadVolume(f"affine that is not finite, NaN or infinity in the {form}")
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not lengths.all() or abs(np.linalg.det(axes / lengths)) < 1e-6:
        raise BadVolume(f"singular affine, the {form} has axes of {in_mm(lengths)} that span no volume")
    cosines = (axes / lengths).T @ (axes / lengths) - np.eye(3)
    worst = np.abs(cosines).max()
    if worst > SHEAR:
        angle = np.degrees(np.arccos(min(1, worst)))
        raise BadVolume(f"sheared affine, the {form} has two axes at {angle:.1f} degrees: resample it to right angles")


def scale_of_units(header, affine: np.ndarray, notes: list[str]) -> float:
    """mm in the unit that the header names; metres and micrometres are believed where voxels are then of a size that exists."""
    name, scale = UNITS_OF_LENGTH.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if scale == 1:
        return 1.0
    believed = bool(spacing.max() * scale < 50 and spacing.min() * scale > 1e-4)
    meaning = "turned into mm" if believed else f"but mm by its voxels ({in_mm(spacing)})"
    notes.append(f"units other than mm, {name} by the header, {meaning}")
    return scale if believed else 1.0


def in_mm(lengths) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths) + " mm"


def in_bytes(count: float) -> str:
    """A number of bytes as people read it: 196 TiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
