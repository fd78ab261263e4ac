"""Picture files from outside: finding and decoding them."""

import io
import os
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

# needs: pillow
from common.config import UserError
from common.samples import BadFile, Faults, files_below, is_hidden
from common.scan import FileReader

# What a file may hold, whatever its name says: not EPS, for one, which starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
PICTURES = "a path, a PIL image, or a uint8 array (H, W, 3) in RGB"  # what as_pixels takes
READER = 3  # goes up when read_header or decode find another size or fault in some file: scans of before are not believed
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may say how a PNG is turned


@cache
def picture_endings() -> tuple[str, ...]:
    """The endings of picture files, in small letters: those that Pillow knows for the formats that decode reads."""
    from PIL import Image

    read = (*FORMATS, "MPO")  # two pictures in what begins as a JPEG
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in read))


def is_picture(name: str) -> bool:
    """Whether a file of this name (or path) should hold a picture."""
    return os.path.splitext(name)[1].lower() in picture_endings()


def pictures_below(folder: Path, faults: Faults | None = None) -> list[Path]:
    """The picture files in a folder at any depth, in order of their parts; links are followed, hidden parts are no data.

    What other files there are is noted in faults.
    """
    found = []
    for path in files_below(folder):
        if is_picture(path):
            found.append(Path(path))
        elif faults:
            faults.add("file that is no picture", os.path.join(folder.name, os.path.relpath(path, folder)))
    return found


@contextmanager
def picture_faults():
    """What a decoder raises in the block becomes a BadFile that names the fault."""
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadFile:
        raise
    except UnidentifiedImageError as error:
        raise BadFile("no picture that can be decoded") from error
    except Exception as error:  # on a damaged file a decoder may raise anything: struct.error, TypeError, SyntaxError ...
        reason = str(error).splitlines() or [type(error).__name__]
        raise BadFile(f"picture that cannot be decoded, {reason[0]}") from error


def annotated_size(stored: tuple[int, int], upright: tuple[int, int], claimed: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) of a picture as its annotation means it. ValueError where the annotation claims yet another size."""
    if claimed and claimed not in (stored, upright):
        raise ValueError(f"picture of another size than its annotation says, {upright} instead of {claimed}")
    return claimed or upright


def decode(source: Path | bytes, claimed: tuple[int, int] | None = None) -> np.ndarray:
    """A picture file as uint8 RGB, (height, width, 3), turned upright as its EXIF orientation says.

    claimed: the annotation's (width, height). If it is the size of the stored, unturned picture, whoever drew the boxes
    ignored the orientation, so it is ignored here, too. BadFile says what is wrong with the file.
    """
    from PIL import Image, ImageOps

    with picture_faults():
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        image.load()
        stored = image.size
        upright = ImageOps.exif_transpose(image)
    image = upright if annotated_size(stored, upright.size, claimed) == upright.size else image
    return to_rgb(image)


def to_rgb(image) -> np.ndarray:
    """A PIL image of any mode as uint8 (H, W, 3). BadFile for floating-point numbers, whose range is not known."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip everything above 255
        values = np.asarray(image).astype(np.float64)
        eight_bits = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values / (1 if eight_bits else 257)).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadFile("picture of floating-point numbers, whose range is not known")
    return np.array(image.convert("RGB"))


def as_pixels(image) -> np.ndarray:
    """A picture as a program has it, as decode would give its file: uint8 RGB (H, W, 3), a copy. UserError where it is none.

    image: a path, a PIL image of any mode, or an array of uint8 RGB (H, W, 3). Arrays of another kind do not say what their
    numbers are: grey, BGRA, shares of 1 ...; PIL's Image.fromarray(array, mode) does.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (str, os.PathLike)):
        try:
            return decode(Path(image).expanduser())
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{os.fspath(image)}: {error}") from None
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UserError(
                f"an array of {image.dtype} {image.shape} is no picture; expected uint8 (H, W, 3) in RGB "
                f"(PIL's Image.fromarray makes pictures of other kinds)"
            )
        return np.array(image, order="C")  # array[:, :, ::-1], as one comes from OpenCV's BGR, has strides that torch refuses
    if not isinstance(image, Image.Image):
        raise UserError(f"{type(image).__name__} is no picture; expected {PICTURES}")
    try:
        with picture_faults():
            if image.format not in (None, "MPO", *FORMATS):  # to load it could start another program
                raise BadFile(f"no picture that can be decoded, {image.format}")
            return to_rgb(ImageOps.exif_transpose(image))
    except ValueError as error:
        raise UserError(f"the image: {error}") from None


def as_list(images) -> list:
    """Several pictures, each for as_pixels, as a list. UserError where it is one."""
    one = isinstance(images, (str, bytes, os.PathLike)) or (hasattr(images, "ndim") and images.ndim < 4)
    if one or not hasattr(images, "__iter__"):
        raise UserError(f"predict_batch expects a list of pictures, not {type(images).__name__}; predict takes one")
    return list(images)


def read_header(path: Path) -> tuple[int, int, int]:
    """(width, height, EXIF orientation 1 to 8) of a picture file as it is stored. BadFile as in decode.

    Pixels are decoded only where the orientation is known no sooner: in formats that are rare for large data, and in a PNG
    that may carry it behind the pixels.
    """
    from PIL import ExifTags, Image

    with picture_faults():
        image = Image.open(path, formats=FORMATS)
        if image.format == "PNG" and not any(mark in path.read_bytes() for mark in PNG_ORIENTATION):
            orientation = 1
        else:
            if image.format not in ("JPEG", "MPO", "WEBP"):
                image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image.close()
    return *image.size, int(orientation) if orientation in range(1, 9) else 1


def picture_reader() -> FileReader:
    """read_header, for a scan."""
    import PIL

    return FileReader(f"pictures, reader {READER} with Pillow {PIL.__version__}", ("width", "height", "orientation"), read_header)


def header_size(header: tuple[int, int, int], claimed: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) of what decode will give for a picture of this header. ValueError where the annotation's claim differs."""
    width, height, orientation = header
    upright = (height, width) if orientation > 4 else (width, height)  # 5 to 8 are quarter turns
    return annotated_size((width, height), upright, claimed)


def find_pictures(pattern: str) -> list[Path]:
    """The picture files that a path names: a file, a folder (its pictures), or a glob in quotes."""
    import glob

    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = pictures_below(path)
    else:
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if is_picture(p) and os.path.isfile(p)]
        found = [p for p in found if not any(is_hidden(part) and part not in path.parts for part in p.parts)]
    if not found:
        there = path.is_dir() or glob.has_magic(str(path))
        what = f"no picture there ({', '.join(picture_endings())})" if there else "there is no such file or folder"
        raise UserError(f"--input {pattern}: {what}")
    return found
