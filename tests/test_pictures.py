"""Pictures that a program has in memory are taken as the files that they came from."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common.config import UserError
from common.vision.pictures import as_list, as_pixels, decode, find_pictures, is_picture

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


RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "RGBX"])
def test_an_image_of_any_mode_is_its_file_or_what_pillow_converts(tmp_path, mode):
    image = Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(RGB)
    image = (
        image if mode in ("RGB", "I;16") else image.convert("L" if mode == "I" else "P" if mode == "PA" else mode).convert(mode)
    )
    try:
        image.save(tmp_path / "a.tif")
        expected = decode(tmp_path / "a.tif")
    except (OSError, ValueError):  # no file holds this mode
        expected = np.array(image.convert("RGB"))
    found = as_pixels(image)
    assert found.shape == (6, 8, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_arrays_are_taken_as_they_are_held(tmp_path):
    np.testing.assert_array_equal(as_pixels(RGB[:, :, ::-1]), np.ascontiguousarray(RGB[:, :, ::-1]))
    np.testing.assert_array_equal(as_pixels(RGB[::-2, ::3]), RGB[::-2, ::3].copy())
    ours = as_pixels(RGB)
    ours[:] = 0
    assert RGB.any()  # a copy: what is done with it does not reach the caller's


@pytest.mark.parametrize(
    "array",
    [
        GREY,
        np.dstack([RGB, GREY]),
        RGB / 255,
        RGB[None],
        RGB.transpose(2, 0, 1),
        RGB[:, :, :2],
        RGB[:0],
        RGB.astype(int),
        RGB > 9,
    ],
)
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(UserError, match=r"is no picture; expected uint8 \(H, W, 3\) in RGB \(PIL's Image.fromarray") as caught:
        as_pixels(array)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("thing", [b"\x89PNG", [[1, 2]], torch.zeros(3, 8, 8), None, 7, io.BytesIO(b"")])
def test_what_is_no_picture_at_all_is_refused(thing):
    with pytest.raises(UserError, match="^[A-Za-z]+ is no picture; expected a path, a PIL image, or a uint8 array"):
        as_pixels(thing)


@pytest.mark.parametrize("one", ["a.jpg", Path("a.jpg"), b"", RGB, GREY, torch.zeros(3, 8, 8), Image.fromarray(RGB), 7, None])
def test_one_picture_is_no_list_of_them(one):
    with pytest.raises(UserError, match="predict_batch expects a list of pictures, not .*; predict takes one"):
        as_list(one)


def test_lists_generators_and_arrays_of_pictures_are_lists():
    assert as_list(["a", "b"]) == ["a", "b"] == as_list(name for name in "ab") and len(as_list(np.stack([RGB] * 3))) == 3


def test_what_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="broken.png: no picture that can be decoded"):
        as_pixels(tmp_path / "broken.png")
    with pytest.raises(UserError, match="nowhere.png: picture that cannot be decoded, .*No such file"):
        as_pixels(tmp_path / "nowhere.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    with pytest.raises(UserError, match="the image: picture that cannot be decoded"):
        as_pixels(Image.open(tmp_path / "cut.png"))
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
    with pytest.raises(UserError, match="the image: no picture that can be decoded, EPS"):
        as_pixels(Image.open(tmp_path / "a.jpg"))
    assert not (tmp_path / "started").exists()


def test_whoever_opens_a_picture_names_the_formats():
    parts = ("common", "fine_tuning", "image_tasks", "voice_rvc", "scripts")
    sources = [p for part in parts for p in (ROOT / part).rglob("*.py")]
    nodes = [node for p in sources for node in ast.walk(ast.parse(p.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    calls = [ast.unparse(node) for node in nodes if ast.unparse(node.func) == "Image.open"]
    assert len(calls) > 1 and all("formats=FORMATS" in call for call in calls)
