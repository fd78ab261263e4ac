"""Pictures that a program has in memory are taken as the files that they came from."""

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.vision.pictures import as_pixels, decode

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.fixture(params=["plain", "turned", "16-bit", "palette", "transparent"])
def file(request, tmp_path):
    path, exif = tmp_path / "picture.png", Image.Exif()
    if request.param == "turned":
        exif[0x0112] = 6  # a quarter turn
        Image.fromarray(GREY).save(path, exif=exif)
    elif request.param == "16-bit":
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    else:
        modes = {"plain": "RGB", "palette": "P", "transparent": "RGBA"}
        Image.fromarray(GREY).convert(modes[request.param]).save(path)
    return path


def test_a_file_an_image_and_an_array_are_one_picture(file):
    expected = decode(file)
    assert expected.shape == ((8, 6, 3) if Image.open(file).getexif() else (6, 8, 3)) and expected.max() == GREY.max()
    for given in (file, str(file), Image.open(file), expected):
        np.testing.assert_array_equal(as_pixels(given), expected)


@pytest.mark.parametrize("array", [GREY, GREY[:, :, None].repeat(4, axis=2), GREY[:, :, None].repeat(3, axis=2) / 255])
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(UserError, match="is no picture; expected uint8"):
        as_pixels(array)


def test_what_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="broken.png: no picture that can be decoded"):
        as_pixels(tmp_path / "broken.png")
    with pytest.raises(UserError, match="the image: picture of floating-point numbers"):
        as_pixels(Image.fromarray(np.zeros((4, 4), dtype=np.float32)))
