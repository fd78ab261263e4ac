"""Pictures with one class each: every layout gives the same samples, bad input is named, preprocessing is the base's own,
augmentation is a function of its key."""

import csv
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.batches import EpochBatches, build_loader
from common.config import UserError
from common.samples import BadFile, Faults
from common.vision.labelled import (
    LabelledPictures,
    class_weights,
    collate,
    labelled_for_eval,
    labelled_loaders,
    load_pictures,
    make_augmentation,
    read_labelled,
)
from common.vision.labelled_files import Sample, read_dataset
from common.vision.pictures import decode
from common.vision.preprocess import ClassifierPreprocess

CLASSES = ["bird", "cat", "dog"]
COLORS = {"bird": (0, 0, 250), "cat": (250, 0, 0), "dog": (0, 250, 0)}
PLAIN = {"flip": False, "crop": 1.0, "randaugment": 0, "mixup": 0.0}
COUNTS = {"train": 3, "val": 2, "test": 1}


def settings(folder, **changes):
    values = {"data_dir": str(folder), "cache": "auto", "seed": 0, "batch_size": 2, "num_workers": 0, "class_weights": "none"}
    return SimpleNamespace(**{**values, **PLAIN, **changes})


def processor(height=16, width=16):
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": height, "width": width})


def draw(path, label="cat", size=(24, 20)):
    """A picture of the class' colour with noise, another one for every name."""
    seed = sum(map(ord, path.name)) + 31 * CLASSES.index(label)
    noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLORS[label]) + noise - 30, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def fill(folder, count, classes=CLASSES):
    for label in classes:
        for i in range(count):
            draw(folder / label / f"{i:03d}.png", label)
    return folder


def write_csv(path, rows, head=("path", "label"), encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([head, *rows])
    return path


def make(folder, layout):
    """The same pictures, 3 + 2 + 1 of each class, in one layout; what --data_dir is to be."""
    kind, _, detail = layout.partition(" ")
    if kind == "folders":
        for split, count in COUNTS.items():
            fill(folder / (detail if split == "val" else split), count)
        return folder
    rows = []
    for split, count in COUNTS.items():
        fill(folder / "pictures" / split, count)
        rows += [(f"pictures/{split}/{label}/{i:03d}.png", label, split) for label in CLASSES for i in range(count)]
    if detail == "of each split":
        for split in COUNTS:
            write_csv(folder / f"{split}.csv", [row[:2] for row in rows if row[2] == split])
        return folder
    write_csv(folder / "table.csv", rows, ("file_name", "class", "split"))
    return folder / "table.csv" if detail == "file" else folder


def read(folder, seed=0, faults=None):
    return read_dataset(folder, seed, faults if faults is not None else Faults())


def loaded(folder, **changes):
    """(training data set, validation data set, classes, facts for the summary)."""
    train, val, classes, facts = labelled_loaders(
        settings(folder, **changes), processor(), read_labelled(folder, changes.get("seed", 0))
    )
    return train.dataset, val.dataset, classes, facts


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = ["folders val", "folders valid", "folders validation", "csv file", "csv folder", "csv of each split"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path, layout, capsys):
    splits, classes, kind = read(make(tmp_path, layout))
    assert classes == CLASSES and kind == layout.split()[0]
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 9, "val": 6, "test": 3}
    for split, samples in splits.items():
        found = sorted((CLASSES[s.label], s.path.name) for s in samples)
        assert found == [(label, f"{i:03d}.png") for label in CLASSES for i in range(COUNTS[split])]
        for s in samples:
            color = decode(s.path).mean(axis=(0, 1))
            assert color.argmax() == np.argmax(COLORS[CLASSES[s.label]])  # the label is that of the picture
            assert s.name == s.path.relative_to(tmp_path).as_posix()  # wherever the folder lies
    assert "no validation split" not in capsys.readouterr().out


def test_one_folder_of_classes_is_split_class_by_class_and_adding_pictures_moves_no_other(tmp_path, capsys):
    def split(seed=0):
        splits, classes, kind = read(tmp_path, seed)
        assert classes == CLASSES and kind == "one folder" and set(splits) == {"train", "val"}
        return {part: {s.name for s in splits[part]} for part in splits}

    fill(tmp_path, 40)
    first = split()
    assert f"{len(first['val'])} of 120 pictures, of every class a fifth by seed 0, become it" in capsys.readouterr().out
    assert first == split() and first["train"].isdisjoint(first["val"]) and len(first["train"] | first["val"]) == 120
    counts = Counter(name.split("/")[0] for name in first["val"])
    assert all(2 <= counts[label] <= 16 for label in CLASSES), counts
    assert first["val"] != split(seed=1)["val"]
    for i in range(40, 50):
        draw(tmp_path / "cat" / f"{i:03d}.png")
    more = split()
    assert first["val"] <= more["val"] and first["train"] <= more["train"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_class_is_on_both_sides_of_a_split_however_small(tmp_path, count):
    splits, _, _ = read(fill(tmp_path, count))
    for part in ("train", "val"):
        assert {s.label for s in splits[part]} == {0, 1, 2}


def test_a_class_with_one_picture_cannot_be_split(tmp_path):
    fill(tmp_path, 4, ["cat", "dog"])
    draw(tmp_path / "bird" / "only.png", "bird")
    with pytest.raises(UserError, match="the class 'bird' has one picture: too few to train and to validate on"):
        read(tmp_path)


def test_pictures_of_one_name_in_several_folders_of_a_csv_are_different_pictures(tmp_path):
    rows = [(f"{day}/{label}.png", label) for day in ("monday", "tuesday", "friday") for label in ("cat", "dog")]
    for name, label in rows:
        draw(tmp_path / name, label)
    file = write_csv(tmp_path / "table.csv", rows)
    (by_file, _, _), (by_folder, _, _) = read(file), read(tmp_path)
    for part in ("train", "val"):
        assert {s.label for s in by_file[part]} == {0, 1}
        assert by_file[part] == by_folder[part]


def test_a_class_that_only_the_validation_data_has_is_an_error(tmp_path):
    make(tmp_path, "folders val")
    draw(tmp_path / "val" / "emu" / "0.png")
    with pytest.raises(UserError, match="the val split has the class 'emu', which the training data has not"):
        read(tmp_path)


def test_what_belongs_to_no_class_is_named_and_hidden_folders_are_no_classes(tmp_path):
    make(tmp_path, "folders val")
    (tmp_path / "train" / "emu").mkdir()
    (tmp_path / "train" / "emu" / "notes.txt").write_text("later")
    draw(tmp_path / "train" / ".thumbnails" / "0.png")
    draw(tmp_path / "train" / "cat" / "more" / "deep.PNG")  # at any depth, ending in any case
    draw(tmp_path / "train" / "loose.png")
    faults = Faults()
    splits, classes, _ = read(tmp_path, faults=faults)
    named = {"class folder without pictures": ["train/emu"], "picture outside the class folders": ["train/loose.png"]}
    named["file that is no picture"] = ["emu/notes.txt"]
    assert classes == CLASSES and faults.found == named
    assert Counter(s.label for s in splits["train"]) == {0: 3, 1: 4, 2: 3}


def test_data_without_two_classes_or_without_training_pictures_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no folder \\(or CSV file\\) .*nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no training pictures; expected train/<class>.* columns path and label"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="only the class cat"):
        read(fill(tmp_path / "one", 3, ["cat"]))
    draw(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="no training pictures"):
        read(tmp_path / "flat")


def test_splits_without_training_data_are_not_taken_for_classes(tmp_path):
    fill(tmp_path / "val", 2), fill(tmp_path / "test", 2)
    with pytest.raises(UserError, match="holds val/ and test/, but no train/"):
        read(tmp_path)


# ---- CSV files -------------------------------------------------------------------------------------------------------


def test_csv_cells_are_read_as_spreadsheets_write_them(tmp_path):
    """A byte-order mark, names with commas and quotes, spaces, empty lines, absolute paths, further columns."""
    names = ["a, b.png", 'the "best".png', "plain.png"]
    for name in names:
        draw(tmp_path / "pictures" / name)
    elsewhere = draw(tmp_path / "elsewhere" / "d.png", "dog")
    rows = [(f"pictures/{names[0]}", "cat, black", "x"), ("", "", ""), (f" pictures/{names[1]}", " cat, black ", "y")]
    rows += [(), (str(elsewhere), "dog", "z"), ("pictures/plain.png", "dog", "w")]
    file = write_csv(tmp_path / "t.csv", rows, ("FILE", " Label ", "note"), encoding="utf-8-sig")
    faults = Faults()
    splits, classes, _ = read(file, faults=faults)
    assert classes == ["cat, black", "dog"] and faults.counts() == {}
    found = {s.path.name: classes[s.label] for part in splits.values() for s in part}
    assert found == {names[0]: "cat, black", names[1]: "cat, black", "plain.png": "dog", "d.png": "dog"}


def test_csv_lines_that_cannot_be_used_are_named_and_counted(tmp_path):
    fill(tmp_path / "p", 2)
    rows = [(f"p/{label}/{i:03d}.png", label, "train") for label in CLASSES for i in range(2)]
    rows += [("p/cat/gone.png", "cat", "train"), ("", "cat", "train"), ("p/cat/000.png", "", "train"), ("p/cat/000.png",)]
    rows += [("p/cat/001.png", "cat", "holdout"), ("p/cat", "cat", "train"), ("x" * 5000, "cat", "val"), ("a\0b", "cat", "val")]
    rows += [("p/dog/001.png", "dog", "Validation")]
    faults = Faults()
    splits, _, _ = read(write_csv(tmp_path / "t.csv", rows, ("path", "label", "split")), faults=faults)
    assert {part: len(samples) for part, samples in splits.items()} == {"train": 6, "val": 1}
    assert faults.counts() == {
        "CSV line of a split that is none of train, val, test": 1,
        "CSV line without a path or a label": 3,
        "picture that is not there": 4,
    }
    assert faults.found["CSV line without a path or a label"] == ["t.csv line 9", "t.csv line 10", "t.csv line 11"]


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "must name the columns path and label .* it is ''"),
        (b"picture;kind\na.png;cat\n", "it is 'picture,kind'"),
        (b"path,colour\na.png,red\n", "must name the columns path and label"),
        (b"a.png,cat\nb.png,dog\n", "it is 'a.png,cat', a picture and not the names of columns"),
        (b"path,width,height\na.png,9,1\n", "must name the columns path and label"),
        (b"path,label\n\xff\xfe\xfa,cat\n", "1 of 1 pictures are not there, the first 'ÿþú'"),
        (b"path,label\n" + b"x" * 200_000, "is no CSV file that can be read"),
        (b",".join(b"%d" % i for i in range(20_000)) + b"\n", "must name the columns path and label"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_an_error(tmp_path, content, told):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read(tmp_path / "t.csv")
    assert "t.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_several_csv_files_asks_which(tmp_path):
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv", [])
    with pytest.raises(UserError, match="holds 2 CSV files; name the one to read"):
        read(tmp_path)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_broken_pictures_are_left_out_named_and_counted(tmp_path, capsys):
    make(tmp_path, "folders val")
    cats = tmp_path / "train" / "cat"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cats / "half.jpg", quality=95)
    whole = (cats / "half.jpg").read_bytes()
    (cats / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (cats / "nothing.jpg").write_bytes(b"")
    (cats / "page.jpg").write_text("<html><body>404</body></html>")
    Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(cats / "floats.tif")
    train, _, _, facts = loaded(tmp_path)
    assert sorted(s.path.name for s in train.samples if s.label == 1) == ["000.png", "001.png", "002.png"]
    assert facts["left_out"] == {
        "no picture that can be decoded": 2,
        "picture of floating-point numbers": 1,
        "picture that cannot be decoded": 1,
    }
    text = capsys.readouterr().out
    assert all(name in text for name in ("half.jpg", "nothing.jpg", "page.jpg", "floats.tif"))
    assert facts["train"] == 9 and "training pictures of each class: bird 3, cat 3, dog 3" in text
    for i in range(3):
        (cats / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no training picture of the class 'cat' can be used"):
        loaded(tmp_path)
    for file in (tmp_path / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="the validation data has no picture that can be used"):
        loaded(tmp_path)


def test_unusual_pictures_are_read_right(tmp_path):
    """Animations, CMYK, palettes with transparency, 16-bit grey, EXIF orientation: as a viewer shows them."""
    make(tmp_path, "folders val")
    dogs = tmp_path / "train" / "dog"
    color = np.zeros((20, 30, 3), dtype=np.uint8)
    color[:, :15], color[:, 15:] = (250, 10, 20), (10, 200, 30)
    picture, turned = Image.fromarray(color), Image.Exif()
    picture.convert("CMYK").save(dogs / "cmyk.jpg", quality=100, subsampling=0)
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    palette.save(dogs / "moving.gif", save_all=True, append_images=[Image.new("P", (30, 20), 3)] * 2)
    palette.save(dogs / "palette.png", transparency=3)
    ramp = np.linspace(0, 65535, 30).astype(np.uint16)[None].repeat(20, axis=0)
    Image.fromarray(ramp).save(dogs / "deep.png")
    turned[0x0112] = 6  # shown a quarter turn clockwise
    picture.save(dogs / "turned.jpg", exif=turned, quality=100, subsampling=0)
    train, _, _, facts = loaded(tmp_path)
    assert facts["left_out"] == {} and facts["train"] == 14
    seen = {s.path.name: ((train[(0, i)]["pixels"] + 1) * 127.5).numpy() for i, s in enumerate(train.samples)}
    for name in ("cmyk.jpg", "moving.gif", "palette.png"):
        assert np.abs(seen[name][:, :, 3] - color[0, 0][:, None]).max() < 9, name
        assert np.abs(seen[name][:, :, 12] - color[0, 20][:, None]).max() < 9, name
    assert np.ptp(seen["deep.png"], axis=0).max() < 1 and np.all(np.diff(seen["deep.png"][0, 5]) > 5)
    assert 10 < seen["deep.png"].min() + 10 and seen["deep.png"].max() < 256  # stretched over all of the range, not clipped
    assert np.abs(seen["turned.jpg"][:, 3, :] - color[0, 0][:, None]).max() < 9  # its left half is above now
    assert np.abs(seen["turned.jpg"][:, 12, :] - color[0, 20][:, None]).max() < 9


# ---- pictures as the base's own image processor prepares them --------------------------------------------------------

PICTURES = [(48, 80), (90, 41), (20, 25), (101, 67), (37, 37), (32, 33), (12, 150)]  # height, width


def random_picture(height, width, kind):
    rng = np.random.default_rng((height, width))
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def more_processors():
    import transformers as hf

    return {
        "convnext at 384 and above": hf.ConvNextImageProcessor(size={"shortest_edge": 384}),
        "clip": hf.CLIPImageProcessor(size={"shortest_edge": 33}, crop_size={"height": 33, "width": 30}),
        "crop larger than the picture": hf.BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 33, "width": 30}),
        "no normalization": hf.ViTImageProcessor(size={"height": 30, "width": 44}, do_normalize=False, resample=3),
        "crop switched off": hf.DeiTImageProcessor(size={"height": 33, "width": 33}, do_center_crop=False),
    }


def check_preprocess(processor):
    preprocess = ClassifierPreprocess(processor)
    for height, width in PICTURES:
        for kind in ("noise", "smooth"):
            pixels = random_picture(height, width, kind)
            theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
            ours = preprocess.normalize(preprocess.center(preprocess.resize(pixels)))
            assert tuple(ours.shape[1:]) == preprocess.shape == tuple(theirs.shape[1:])
            # timm lets PIL resize, which clips to 0 .. 255 in between: that shows where neighbours differ wildly.
            limit = 1.01 if processor.__class__.__name__ != "TimmWrapperImageProcessor" else 2.5 if kind == "smooth" else 40
            levels = ((ours - theirs).abs() * preprocess.std * 255).numpy()
            assert levels.max() <= limit and levels.mean() < 0.5, f"{height} x {width} {kind}: {levels.max()}, {levels.mean()}"


@pytest.mark.parametrize("which", more_processors())
def test_pictures_are_prepared_as_by_other_image_processors(which):
    check_preprocess(more_processors()[which])


@pytest.mark.parametrize("oddity", ["pads", "another mean", "upside down", "no resize", "no rescale", "any width"])
def test_an_image_processor_that_does_something_unknown_is_refused(oddity):
    import transformers as hf

    class Odd(hf.ViTImageProcessor):
        def __call__(self, images, **options):
            found = super().__call__(images, **options)
            pixels = found["pixel_values"]
            if oddity == "pads":
                pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
            elif oddity == "another mean":
                pixels = pixels - 0.1
            elif oddity == "upside down":
                pixels = pixels.flip(2)
            return {**found, "pixel_values": pixels}

    processor = Odd(size={"height": 32, "width": 32}, do_resize=oddity != "no resize", do_rescale=oddity != "no rescale")
    if oddity == "any width":  # then pictures of different shapes would not make a batch
        processor = hf.BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(UserError, match="image processor .* prepares pictures in a way that is not known here"):
        ClassifierPreprocess(processor)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("size", {"height": -5, "width": 5}),
        ("size", {"height": "a", "width": "b"}),
        ("size", {"shortest_edge": 0}),
        ("image_mean", ["a"]),
        ("image_mean", [1]),
        ("image_std", [0, 0, 0]),
        ("image_std", [float("nan")] * 3),
        ("resample", 99),
    ],
)
def test_an_image_processor_with_settings_that_nobody_can_use_ends_in_one_line(setting, value):
    odd = processor()
    setattr(odd, setting, value)
    with pytest.raises(UserError, match="image processor"):
        ClassifierPreprocess(odd)


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that were decoded, in order."""
    calls = []

    def counting(path):
        calls.append(f"{path.parent.name}/{path.name}")
        return decode(path)

    monkeypatch.setattr("common.vision.labelled.decode", counting)
    return calls


def test_after_the_first_pass_nothing_is_decoded_again(tmp_path, decoded):
    train, val, *_ = loaded(make(tmp_path, "folders val"), mixup=0.4)
    assert len(decoded) == 15
    [train[(epoch, i)] for epoch in (1, 2) for i in range(9)], val[(0, 0)]
    assert len(decoded) == 15


def test_without_cache_each_access_decodes_and_gives_the_same(tmp_path, decoded):
    changes = {"flip": True, "crop": 0.5, "randaugment": 5, "mixup": 0.4}
    cached, *_ = loaded(make(tmp_path, "folders val"), **changes)
    decoded.clear()
    train, *_ = loaded(tmp_path, cache="off", **changes)
    assert decoded == ["bird/000.png", "cat/000.png", "dog/000.png"]  # one of each class
    decoded.clear()
    for i in range(9):
        assert torch.equal(train[(4, i)]["pixels"], cached[(4, i)]["pixels"])
    assert len(decoded) == 18  # mixup needs two for each
    for i in range(3):
        (tmp_path / "train" / "bird" / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(UserError, match="000.png: no picture that can be decoded"):
        train[(0, 0)]


def test_a_second_start_decodes_at_first_use_and_gives_the_same(tmp_path, decoded):
    first, _, _, facts = loaded(make(tmp_path, "folders val"), mixup=0.4)
    decoded.clear()
    train, _, _, again = loaded(tmp_path, mixup=0.4)
    assert not decoded and again == facts
    items = [[data[(epoch, i)] for epoch in (1, 2) for i in range(9)] for data in (first, train)]
    for mine, theirs in zip(*items, strict=True):
        assert torch.equal(mine["pixels"], theirs["pixels"]) and torch.equal(mine["target"], theirs["target"])
    assert len(decoded) == 9  # once each, by the second


def test_a_mended_reader_does_not_believe_the_faults_of_before(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "scans"))
    folder = make(tmp_path / "set", "folders val")

    def faulty(path):
        raise BadFile("picture that this reader cannot take")

    with monkeypatch.context() as before:
        before.setattr("common.vision.pictures.READER", 1)
        before.setattr("common.vision.labelled.decode", faulty)
        with pytest.raises(UserError, match="no picture that can be used"):
            loaded(folder)
        before.setattr("common.vision.labelled.decode", decode)
        with pytest.raises(UserError, match="no picture that can be used"):
            loaded(folder)
    assert loaded(folder)[3]["train"] == 9


def test_what_is_left_out_does_not_depend_on_who_has_read_the_files_before(tmp_path, monkeypatch):
    """So that a run with --cache off goes on, though a scan has found out about damaged files since it started."""
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path / "scans"))
    folder = make(tmp_path / "set", "folders val")
    file = folder / "train" / "cat" / "000.png"
    file.write_bytes(file.read_bytes()[:-40])
    headers_alone = loaded(folder, cache="off")[3]
    whole = loaded(folder, cache="auto")[3]
    assert headers_alone["train"] == 9 and whole["train"] == 8 and headers_alone["sha256"] != whole["sha256"]
    assert loaded(folder, cache="off")[3] == headers_alone and loaded(folder, cache="auto")[3] == whole


def test_what_turns_out_bad_in_training_stops_nothing(tmp_path, capsys):
    """Another picture, with its own class, takes the place: the same one in whatever order items are drawn."""
    make(tmp_path, "folders val")
    for name in ("000.png", "001.png", "002.png"):
        file = tmp_path / "train" / "cat" / name
        file.write_bytes(file.read_bytes()[:-40])
    train, _, _, facts = loaded(tmp_path, cache="off", mixup=0.4, flip=True)
    assert facts["train"] == 9 and facts["left_out"] == {}
    assert (
        "note, class of which no training picture can be decoded, so that it will not be learnt (1): cat"
        in capsys.readouterr().out
    )
    items = {key: train[key] for key in [(epoch, i) for epoch in (1, 2) for i in range(9)]}
    for key in reversed(items):
        assert torch.equal(train[key]["pixels"], items[key]["pixels"]) and torch.equal(train[key]["target"], items[key]["target"])
    assert all(item["target"][1] == 0 and item["target"].sum() == pytest.approx(1) for item in items.values())
    assert len({tuple(items[key]["target"].tolist()) for key in items if train.samples[key[1]].label == 1}) > 2
    assert sorted(Path(name).name for name, _ in train.new_faults()) == ["000.png", "001.png", "002.png"]


@pytest.mark.parametrize("base", [{"shortest_edge": 17}, {"height": 9, "width": 12}])
def test_the_shape_of_a_resized_picture_is_known_without_it(base):
    import transformers as hf

    size = {"crop_size": {"height": 8, "width": 8}, "size": base}
    preprocess = ClassifierPreprocess(hf.CLIPImageProcessor(**size) if "shortest_edge" in base else processor(9, 12))
    for height, width in PICTURES:
        assert preprocess.resize(np.zeros((height, width, 3), dtype=np.uint8)).shape[1:] == preprocess.resized_shape(
            height, width
        )


def test_a_picture_that_would_become_far_too_long_is_named(tmp_path):
    """1 x 3000 pixels would become 17 x 51,000 where the shortest edge is 17."""
    import transformers as hf

    make(tmp_path, "folders val")
    draw(tmp_path / "train" / "cat" / "line.png", size=(3000, 1))
    base = hf.CLIPImageProcessor(size={"shortest_edge": 17}, crop_size={"height": 8, "width": 8})
    facts = labelled_loaders(settings(tmp_path), base, read_labelled(tmp_path, 0))[3]
    assert facts["left_out"] == {"picture that is more than 100 times as long as it is narrow": 1} and facts["train"] == 9
    with pytest.raises(ValueError, match="100 times as long as it is narrow, 3000 x 1 pixels"):
        ClassifierPreprocess(base).resize(decode(tmp_path / "train" / "cat" / "line.png"))
    assert loaded(tmp_path)[3]["left_out"] == {}  # where both sides are given it is only squeezed


def test_the_cache_respects_its_limit(tmp_path):
    splits, *_ = read(make(tmp_path, "folders val"))
    picture = 3 * 16 * 16
    for limit, kept in ((0, 0), (picture - 1, 0), (2 * picture, 2), (99 * picture, 9)):
        _, cache = load_pictures(splits["train"], ClassifierPreprocess(processor()), Faults(), limit, "test")
        assert cache.kept == kept and cache.bytes <= limit


# ---- augmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A data set of six pictures in two classes whose pixels are all different, for any augmentation."""
    folder, samples = tmp_path_factory.mktemp("photo"), []
    for i in range(6):
        rows, columns = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
        pixels = np.stack([rows * 6, columns * 6, np.full((40, 40), 20 * i)], axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        samples.append(Sample(folder / f"{i}.png", f"{i}.png", i % 2))
    return samples


def augmented(samples, seed=0, **changes):
    preprocess, config = ClassifierPreprocess(processor(32, 32)), settings("", **changes)
    augmentation = make_augmentation(config, preprocess)
    samples, cache = load_pictures(samples, preprocess, Faults(), 0, "test")
    return LabelledPictures(samples, ["a", "b"], preprocess, cache, augmentation, config.mixup, seed)


def grey_levels(item):
    """(rows, columns) of the photo that each pixel shows, (32, 32) each, and its number; in units of the photo's pixels."""
    red, green, blue = (item["pixels"] + 1) * 127.5
    return red / 6, green / 6, blue / 20


EVERYTHING = {"flip": True, "crop": 0.4, "randaugment": 9, "mixup": 0.8}


def test_an_item_depends_on_seed_epoch_and_index_alone(photo):
    first, again, other = augmented(photo, **EVERYTHING), augmented(photo, **EVERYTHING), augmented(photo, 1, **EVERYTHING)
    torch.manual_seed(5)
    want = first[(3, 0)]
    again[(1, 2)], torch.rand(7)  # another history
    state = torch.get_rng_state()
    got = again[(3, 0)]
    assert torch.equal(got["pixels"], want["pixels"]) and torch.equal(got["target"], want["target"])
    assert torch.equal(torch.get_rng_state(), state)  # it leaves no trace in torch's own generator
    twins = augmented([photo[0]] * 3, **{**EVERYTHING, "mixup": 0.0})  # the index counts, not the picture alone
    for left, right in (((3, 0), (4, 0)), ((3, 0), (3, 1)), ((3, 1), (4, 1))):
        assert not torch.equal(twins[left]["pixels"], twins[right]["pixels"])
    assert not torch.equal(other[(3, 0)]["pixels"], want["pixels"])


def test_batches_are_the_same_with_and_without_workers(photo):
    train = augmented(photo, **EVERYTHING)

    def batches(workers):
        sampler = EpochBatches(len(train), 2, 0)
        sampler.set_range(2, 0, 9)
        return list(build_loader(train, sampler, collate, workers))

    pairs = list(zip(batches(0), batches(2), strict=True))
    assert len(pairs) == 3
    for mine, theirs in pairs:
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_without_augmentation_every_epoch_shows_the_same_picture(photo):
    train = augmented(photo, **PLAIN)
    rows, columns, number = grey_levels(train[(1, 3)])
    assert torch.equal(train[(1, 3)]["pixels"], train[(9, 3)]["pixels"])
    assert rows[:, 0].diff().min() > 0 and columns[0].diff().min() > 0 and abs(number.mean() - 3) < 0.1


def test_flip_flips_every_second_time(photo):
    train = augmented(photo, **{**PLAIN, "flip": True})
    plain, turned = train[(0, 0)]["pixels"], 0
    for epoch in range(60):
        pixels = train[(epoch, 0)]["pixels"]
        columns = grey_levels({"pixels": pixels})[1]
        forward = bool(columns[0, -1] > columns[0, 0])
        turned += not forward
        reference = plain if grey_levels({"pixels": plain})[1][0, -1] > grey_levels({"pixels": plain})[1][0, 0] else plain.flip(2)
        assert torch.equal(pixels, reference if forward else reference.flip(2))
    assert 15 < turned < 45


def test_crops_hold_at_least_the_share_of_the_area_that_was_asked_for(photo):
    train, shares, places = augmented(photo, **{**PLAIN, "crop": 0.3}), [], set()
    for epoch in range(60):
        rows, columns, _ = grey_levels(train[(epoch, 0)])
        height, width = (float(values.max() - values.min()) for values in (rows, columns))
        shares.append((height + 1) * (width + 1) / 40**2)
        places.add((round(float(rows.min())), round(float(columns.min()))))
    assert 0.25 < min(shares) < 0.45 and max(shares) > 0.7 and len(places) > 15


def test_randaugment_changes_pixels_more_the_stronger_it_is(photo):
    plain = augmented(photo, **PLAIN)[(0, 0)]["pixels"]

    def change(strength):
        train = augmented(photo, **{**PLAIN, "randaugment": strength})
        return np.mean([float((train[(epoch, 0)]["pixels"] - plain).abs().mean()) for epoch in range(30)])

    assert 0 < change(2) < 0.8 * change(15)


def test_mixup_blends_two_pictures_and_their_classes_in_the_same_shares(photo):
    train, plain = augmented(photo, **{**PLAIN, "mixup": 1.0}), augmented(photo, **PLAIN)
    shares = []
    for epoch in range(40):
        item = train[(epoch, 0)]
        assert float(item["target"].sum()) == pytest.approx(1) and float(item["target"].min()) >= 0
        # Blue says which picture: 0 for the first one, 20 more for each later; odd ones are of class b.
        blue = float(grey_levels(item)[2].mean()) * 20
        fits = [
            other
            for other in range(6)
            for share in [float(item["target"][1]) if other % 2 else None]
            if (share is None and item["target"][1] == 0) or (share is not None and abs(blue - share * 20 * other) < 0.7)
        ]
        assert fits, (blue, item["target"])
        if item["target"][1] > 0:
            other, share = fits[0], float(item["target"][1])
            blend = (1 - share) * plain[(0, 0)]["pixels"] + share * plain[(0, other)]["pixels"]
            torch.testing.assert_close(item["pixels"], blend, atol=1e-5, rtol=0)
            shares.append(share)
    assert len(shares) > 10 and min(shares) < 0.2 and max(shares) > 0.8


def test_validation_pictures_are_never_augmented(tmp_path):
    train, val, *_ = loaded(make(tmp_path, "folders val"), **EVERYTHING)
    for i in range(len(val)):
        sample = val.samples[i]
        expected = val.preprocess.normalize(val.preprocess.center(val.preprocess.resize(decode(sample.path))))
        for epoch in (0, 3):
            item = val[(epoch, i)]
            assert torch.equal(item["pixels"], expected) and item["target"].tolist() == torch.eye(3)[sample.label].tolist()
    assert not torch.equal(train[(1, 0)]["pixels"], train[(2, 0)]["pixels"])


def test_augmented_pictures_have_the_shape_that_the_model_sees(photo):
    from transformers import DeiTImageProcessor

    base = DeiTImageProcessor(size={"shortest_edge": 37}, crop_size={"height": 24, "width": 32})
    preprocess, config = ClassifierPreprocess(base), settings("", **EVERYTHING)
    for changes in (EVERYTHING, PLAIN):
        augmentation = make_augmentation(SimpleNamespace(**{**vars(config), **changes}), preprocess)
        pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
        assert augmentation(preprocess.resize(pixels)).shape == (3, 24, 32)


# ---- classes of different size ---------------------------------------------------------------------------------------


def test_balanced_weights_make_every_class_count_the_same(tmp_path, capsys):
    for label, count in zip(CLASSES, (1, 3, 8), strict=True):
        fill(tmp_path / "train", count, [label])
        fill(tmp_path / "val", 1, [label])
    train, *_ = loaded(tmp_path)
    text = capsys.readouterr().out
    assert "bird 1, cat 3, dog 8" in text and "--class_weights balanced" in text
    weights = class_weights("balanced", train, "cpu")
    each = weights[[s.label for s in train.samples]]
    assert float(each.mean()) == pytest.approx(1)
    totals = [float(each[[s.label == k for s in train.samples]].sum()) for k in range(3)]
    assert totals == pytest.approx([4, 4, 4])
    assert class_weights("none", train, "cpu") is None
    loaded(tmp_path, class_weights="balanced")
    assert "--class_weights" not in capsys.readouterr().out


# ---- data for eval ---------------------------------------------------------------------------------------------------


def for_eval(folder, classes, split="val", subset=False, **facts):
    config = SimpleNamespace(data_dir=str(folder), split=split, subset=subset, batch_size=0, num_workers=0)
    origin = {"classes": classes, "seed": 0, "batch_size": 2, "data_dir": "", **facts}
    return labelled_for_eval(config, processor(), origin, Path(folder or origin["data_dir"]))


def test_eval_matches_classes_by_name(tmp_path):
    make(tmp_path, "folders val")
    for classes in (CLASSES, ["dog", "bird", "cat"]):
        loader, found, name = for_eval(tmp_path, classes, split="test")
        assert found == classes and name == str(tmp_path)
        assert {(s.path.parent.name, classes[s.label]) for s in loader.dataset.samples} == {(c, c) for c in CLASSES}
    loader, _, name = for_eval("", CLASSES, data_dir=str(tmp_path))  # no --data_dir: what the checkpoint was trained on
    assert len(loader.dataset) == 6 and loader.batch_sampler.batches[0] == [0, 1] and name == str(tmp_path)


def test_other_classes_than_the_checkpoints_are_an_error_that_shows_the_difference(tmp_path):
    make(tmp_path, "folders val")
    with pytest.raises(UserError, match="other classes .* only the data has bird and only the checkpoint has emu$"):
        for_eval(tmp_path, ["cat", "dog", "emu"])
    with pytest.raises(UserError, match="only the data has bird$"):
        for_eval(tmp_path, ["cat", "dog"], subset=True)
    with pytest.raises(UserError, match="only the checkpoint has ant, emu; --subset scores data that lacks some classes"):
        for_eval(tmp_path, ["ant", *CLASSES, "emu"])
    loader, classes, _ = for_eval(tmp_path, ["ant", *CLASSES, "emu"], subset=True)
    assert {s.label for s in loader.dataset.samples} == {1, 2, 3} and loader.dataset[(0, 0)]["target"].shape == (5,)
    with pytest.raises(UserError, match="only the checkpoint has n0, n1, n2, n3, n4, n5, n6, n7 \\.\\.\\."):
        for_eval(tmp_path, [*CLASSES, *(f"n{i}" for i in range(20))])


def test_a_split_that_is_not_there_is_an_error(tmp_path):
    make(tmp_path, "folders val")
    for file in (tmp_path / "test").rglob("*.png"):
        os.unlink(file)
    with pytest.raises(UserError, match="has no test split; it has train, val"):
        for_eval(tmp_path, CLASSES, split="test")


# ---- what identifies data --------------------------------------------------------------------------------------------


def test_the_hash_of_the_data_changes_with_the_data_and_not_with_its_place(tmp_path):
    first = loaded(make(tmp_path / "a", "folders val"))[3]["sha256"]
    assert first == loaded(make(tmp_path / "b", "folders val"))[3]["sha256"]
    table = loaded(make(tmp_path / "c", "csv file"))[3]["sha256"]
    assert table == loaded(tmp_path / "c")[3]["sha256"]  # by its file or by its folder
    draw(tmp_path / "b" / "train" / "cat" / "more.png")
    assert first != loaded(tmp_path / "b")[3]["sha256"]
    (tmp_path / "a" / "val" / "cat" / "001.png").rename(tmp_path / "a" / "val" / "dog" / "moved.png")
    assert first != loaded(tmp_path / "a")[3]["sha256"]
