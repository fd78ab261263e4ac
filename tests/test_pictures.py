"""Pictures that a program has in memory are taken as the files that they came from."""

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.vision.pictures import as_pixels, decode, find_pictures, is_picture

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


# ---- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["avif", "jfif", "JPE", "ppm", "pgm", "pbm", "jp2", "tif", "webp", "gif", "BMP"])
def test_every_ending_that_the_decoder_reads_is_one_of_a_picture(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(GREY).convert("1" if ending == "pbm" else "RGB").save(path, format="JPEG" if ending == "JPE" else None)
    assert is_picture(path.name) and decode(path).shape == (6, 8, 3) and find_pictures(str(tmp_path)) == [path]


@pytest.mark.parametrize("name", ["a.txt", "a.eps", "a.ps", "a.pdf", "Thumbs.db", "jpg", ".jpg", "a.wmf", "a.mpg"])
def test_what_the_decoder_does_not_read_is_no_picture(name):
    assert not is_picture(name)


def test_hidden_copies_are_no_input(tmp_path):
    for name in ("a.png", ".ipynb_checkpoints/a.png", "__MACOSX/._a.png", "._a.png", "deep/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / name)
    expected = [tmp_path / "a.png", tmp_path / "deep" / "b.png"]
    assert find_pictures(str(tmp_path)) == expected == find_pictures(f"{tmp_path}/**/*")
    assert find_pictures(f"{tmp_path}/.ipynb_checkpoints/*.png")  # asked for by name
    with pytest.raises(UserError, match="no picture there"):
        find_pictures(f"{tmp_path}/*.jpg")


def test_a_file_that_would_start_a_program_is_no_picture(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="a.jpg: no picture that can be decoded"):
        as_pixels(tmp_path / "a.jpg")
    assert not (tmp_path / "started").exists()
