"""Picture files from outside: finding and decoding them."""

import io
import warnings
from pathlib import Path

import numpy as np

# needs: pillow
from common.config import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def decode(source: Path | bytes, claimed: tuple[int, int] | None = None) -> np.ndarray:
    """A picture file as uint8 RGB, (height, width, 3), turned upright as its EXIF orientation says.

    claimed: the annotation's (width, height). If it is the size of the stored, unturned picture, whoever drew the boxes
    ignored the orientation, so it is ignored here, too. ValueError says what is wrong with the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            image.load()
            stored = image.size
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("no picture that can be decoded") from None
    except Exception as error:  # on a damaged file a decoder may raise anything: struct.error, TypeError, SyntaxError ...
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"picture that cannot be decoded, {reason[0]}") from None
    image = image if claimed and claimed == stored and claimed != upright.size else upright
    if claimed and claimed != image.size:
        raise ValueError(f"picture of another size than its annotation says, {image.size} instead of {claimed}")
    return to_rgb(image)


def to_rgb(image) -> np.ndarray:
    """A PIL image of any mode as uint8 (H, W, 3). ValueError for floating-point numbers, whose range is not known."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip everything above 255
        values = np.asarray(image).astype(np.float64)
        eight_bits = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values / (1 if eight_bits else 257)).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("picture of floating-point numbers, whose range is not known")
    return np.array(image.convert("RGB"))


def as_pixels(image) -> np.ndarray:
    """A picture as a program has it, a path, a PIL image or an array, as decode would give it. UserError where it is none."""
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"an array of {image.dtype} {image.shape} is no picture; expected uint8 (H, W, 3)")
        return image
    try:
        return to_rgb(ImageOps.exif_transpose(image)) if isinstance(image, Image.Image) else decode(Path(image).expanduser())
    except (OSError, ValueError) as error:
        name = "the image" if isinstance(image, Image.Image) else image
        raise UserError(f"{name}: {error}") from None


def find_pictures(pattern: str) -> list[Path]:
    """The picture files that a path names: a file, a folder (its pictures), or a glob in quotes."""
    import glob

    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*")) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    found = [p for p in found if p.is_file() and p.suffix.lower() in IMAGE_ENDINGS]
    if not found:
        raise UserError(f"--input {pattern}: no picture there ({', '.join(IMAGE_ENDINGS)})")
    return found
