"""What people bring as pictures of one class each: splits by any of their names, wrapped folders, links, exports as CSV."""

import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from common.checkpoint import read_json, write_json
from common.config import UserError
from common.samples import Faults
from common.vision.labelled import labelled_for_eval
from common.vision.labelled_files import read_dataset

CLASSES = ["cat", "dog"]


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (len(path.name), 0, 0)).save(path)
    return path


def fill(folder, count=2, classes=CLASSES):
    for label in classes:
        for i in range(count):
            draw(folder / label / f"{label}{i}.png")
    return folder


def read(source, scored=False):
    """({split: {names}}, classes, faults) of a source."""
    faults = Faults()
    splits, classes, _ = read_dataset(source, 0, faults, scored)
    return {split: {s.path.stem for s in samples} for split, samples in splits.items()}, classes, faults


def of(count):
    return {f"{label}{i}" for label in CLASSES for i in range(count)}


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["Training Testing", "Train Val", "TRAIN TEST", "training_set test_set", "seg_train seg_test"])
def test_splits_are_no_classes_however_they_are_spelled(tmp_path, names):
    first, second = names.split()
    fill(tmp_path / first, 3), fill(tmp_path / second)
    splits, classes, _ = read(tmp_path)
    assert classes == CLASSES and splits["val" if second == "Val" else "test"] == of(2)
    assert splits["train"] | (set() if second == "Val" else splits["val"]) == of(3)


@pytest.mark.parametrize("wrap", ["chest/chest", "train", "images"])
def test_folders_that_only_wrap_the_data_are_looked_into(tmp_path, wrap):
    if wrap == "train":  # Kaggle's seg_train/seg_train/<class>
        fill(tmp_path / "train" / "train", 3), fill(tmp_path / "val" / "val")
    else:
        fill(tmp_path / wrap / "train", 3), fill(tmp_path / wrap / "val")
        draw(tmp_path / "__MACOSX" / wrap / "train" / "cat" / "._cat0.png")
    assert read(tmp_path)[:2] == ({"train": of(3), "val": of(2)}, CLASSES)


def test_a_train_may_be_a_vehicle(tmp_path):
    fill(tmp_path, 3, ["bus", "train"])
    assert read(tmp_path)[1] == ["bus", "train"]
    fill(tmp_path / "b" / "train", 3, ["bus", "train"]), fill(tmp_path / "b" / "val", 2, ["bus", "train"])
    assert read(tmp_path / "b")[1] == ["bus", "train"]


def test_splits_without_class_folders_are_refused_with_what_is_there(tmp_path):
    fill(tmp_path, 3, ["Testing", "Training"])
    with pytest.raises(UserError, match="Testing and Training look like splits, not like classes; expected train/<class>/"):
        read(tmp_path)
    for label in CLASSES:
        fill(tmp_path / "b" / label, 2, ["train", "test"])
    with pytest.raises(UserError, match="cat holds test and train; expected train/<class>/.*, not <class>/test/"):
        read(tmp_path / "b")


def test_what_is_beside_the_splits_and_in_them_is_counted(tmp_path):
    fill(tmp_path / "train", 3), fill(tmp_path / "val"), fill(tmp_path / "unlabelled")
    for name in (
        "downloads/a.tar",
        "train/Thumbs.db",
        "train/cat/a.txt",
        "train/cat/deep/b.heic",
        "train/.DS_Store",
        "val/cat/.c.swp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    draw(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "cat0-checkpoint.png")
    draw(tmp_path / "train" / "cat" / "deep" / "@eaDir" / "cat1.png")
    splits, _, faults = read(tmp_path)
    assert splits == {"train": of(3), "val": of(2)}
    assert faults.counts() == {"file that is no picture": 3, "folder of pictures beside the splits": 1}


def test_links_are_the_users_own(tmp_path):
    store = fill(tmp_path / "store", 3)
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / "data" / "train").symlink_to(store)
    (tmp_path / "data" / "val" / "dog").symlink_to(store / "dog")
    for file in sorted((store / "cat").iterdir()):  # as the hub's cache has them
        (tmp_path / "data" / "val" / "cat").mkdir(exist_ok=True)
        (tmp_path / "data" / "val" / "cat" / file.name).symlink_to(os.path.relpath(file, tmp_path / "data" / "val" / "cat"))
    (store / "cat" / "loop").symlink_to(tmp_path)
    splits, classes, _ = read(tmp_path / "data")
    assert classes == CLASSES and splits == {"train": of(3), "val": of(3)}


def test_class_names_in_two_forms_of_unicode_are_one_class(tmp_path):
    apart, together = (unicodedata.normalize(form, "Müll") for form in ("NFD", "NFC"))
    fill(tmp_path / "train", 2, ["cat", apart]), fill(tmp_path / "val", 2, ["cat", together])
    splits, classes, _ = read(tmp_path)
    assert len(splits["val"]) == 4 and classes == [apart, "cat"]
    assert len(for_eval(tmp_path, ["cat", together], "val").dataset) == 4


# ---- eval ------------------------------------------------------------------------------------------------------------


def for_eval(source, classes=CLASSES, split="test", subset=False):
    from transformers import ViTImageProcessor

    config = SimpleNamespace(data_dir=str(source), split=split, subset=subset, batch_size=2, num_workers=0)
    origin = {"classes": classes, "seed": 0, "data_dir": "", "batch_size": 2}
    return labelled_for_eval(config, ViTImageProcessor(size={"height": 8, "width": 8}), origin, source)[0]


def test_eval_needs_no_training_split_and_no_every_class(tmp_path, capsys):
    fill(tmp_path / "test")
    rows = "".join(f"test/{name[:3]}/{name}.png,{name[:3]},{{}}\n" for name in sorted(of(2)))
    (tmp_path / "all.csv").write_text("path,label,split\n" + rows.replace("{}", "Testing"))
    (tmp_path / "test.csv").write_text("path,label\n" + rows.replace(",{}", ""))
    for source in (tmp_path, tmp_path / "all.csv", tmp_path / "test.csv"):
        dataset = for_eval(source, ["ant", "cat", "dog", "emu"]).dataset
        assert sorted(dataset.samples[i].label for i in range(len(dataset))) == [1, 1, 2, 2]
    assert "note, class of which this data has no picture (1): ant, emu" in capsys.readouterr().out
    with pytest.raises(UserError, match="only the data has dog"):
        for_eval(tmp_path, ["cat"])
    with pytest.raises(UserError, match="has no val split; it has test"):
        for_eval(tmp_path, split="val")
    with pytest.raises(UserError, match="holds test/, but no train/"):
        read(tmp_path)


def test_eval_takes_one_picture_of_a_class(tmp_path):
    fill(tmp_path, 1)
    assert len(for_eval(tmp_path, split="val").dataset) == 2
    with pytest.raises(UserError, match="has one picture: too few"):
        read(tmp_path)


# ---- CSV files -------------------------------------------------------------------------------------------------------


def table(folder, names, head="path,label", encoding="utf-8", labels=lambda name: name[:3]):
    """A CSV file whose paths are `names`, a pattern of {label} and {name}, for the pictures of of(3)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{names.format(label=name[:3], name=name)},{labels(name)}" for name in sorted(of(3))]
    (folder / "labels.csv").write_bytes("\n".join([head, *rows, ""]).encode(encoding))
    return folder / "labels.csv"


@pytest.mark.parametrize(
    "names",
    [
        "my all/{label}/{name}.png",
        "my all/{label}/{name}",  # no ending
        "my all\\{label}\\{name}.png",
        "C:\\Users\\me\\my all\\{label}\\{name}.png",
        "/home/me/my all/{label}/{name}.png",
        "{label}/{name}.PNG",
        "my%20all/{label}/{name}.png",
        "{name}",  # in the folder of its class
    ],
)
def test_pictures_are_found_by_what_their_paths_share_with_those_that_are_there(tmp_path, names):
    fill(tmp_path / "my all", 3)
    splits, classes, faults = read(table(tmp_path, names))
    assert classes == CLASSES and splits["train"] | splits["val"] == of(3) and not faults.found
    assert bool(faults.notes) == (names != "my all/{label}/{name}.png")


@pytest.mark.parametrize("place", [".", "..", "images", "../images", "labels", "train"])
def test_names_alone_are_looked_for_in_the_usual_folders(tmp_path, place):
    for name in of(3):
        draw(tmp_path / "data" / place / f"{name}.png")
    splits, _, faults = read(table(tmp_path / "data", "{name}.png"))
    assert splits["train"] | splits["val"] == of(3) and not faults.found and not faults.notes


def test_paths_that_lead_nowhere_are_the_error(tmp_path):
    for name in of(3):
        draw(tmp_path / "other" / f"{name}.png")
    with pytest.raises(
        UserError, match=r"6 of 6 pictures are not there, the first 'cat0.png'; paths start at .*; there is a .*cat0.png"
    ):
        read(table(tmp_path, "{name}.png"))
    with pytest.raises(UserError, match="6 of 6 pictures are not there, the first 'x/cat0.gif'; paths start at [^;]*$"):
        read(table(tmp_path, "x/{name}.gif"))


def test_a_split_is_not_searched_for_the_pictures_of_another(tmp_path):
    for split in ("train", "val"):
        for name in of(3):
            draw(tmp_path / split / f"{name}.png")
        table(tmp_path, "{name}.png").rename(tmp_path / f"{split}.csv")
    faults = Faults()
    splits, _, _ = read_dataset(tmp_path, 0, faults)
    assert {s.path.parent.name for s in splits["val"]} == {"val"} and {s.path.parent.name for s in splits["train"]} == {"train"}


@pytest.mark.parametrize(
    "head", ["image_id,breed", "Image Path,Class Name", "FILENAME,target", "id,category", "File,labels", "image,dx"]
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_columns_are_known_by_their_usual_names(tmp_path, head, encoding):
    fill(tmp_path / "all", 3)
    splits, classes, faults = read(table(tmp_path, "all/{label}/{name}.png", head, encoding))
    assert classes == CLASSES and splits["train"] | splits["val"] == of(3) and not faults.found


def test_numbers_are_classes_and_the_same_as_whole_ones(tmp_path):
    fill(tmp_path / "all", 3)
    file = table(
        tmp_path,
        "all/{label}/{name}.png",
        labels=lambda name: CLASSES.index(name[:3]) if "0" in name else f"{CLASSES.index(name[:3])}.0",
    )
    assert read(file)[1] == ["0", "1"]


def test_columns_of_zeros_and_a_one_are_classes(tmp_path):
    """As Roboflow writes _classes.csv beside the pictures of each split."""
    for split in ("train", "valid"):
        for name in of(2):
            draw(tmp_path / split / f"{name}.png")
        rows = [f"{name}.png, {int('cat' in name)}, {int('dog' in name)}" for name in sorted(of(2))]
        (tmp_path / split / "_classes.csv").write_text("\n".join(["filename, cat, dog", *rows, "cat0.png, 1, 1", ""]))
    splits, classes, faults = read(tmp_path)
    assert classes == CLASSES and splits == {"train": of(2), "val": of(2)}
    assert faults.found == {"CSV line of several classes": ["_classes.csv line 6"] * 2}


def test_rows_that_contradict_each_other_and_copies_of_programs_are_named(tmp_path):
    fill(tmp_path / "all", 3)
    file = table(tmp_path, "all/{label}/{name}.png")
    draw(tmp_path / "all" / ".ipynb_checkpoints" / "cat0-checkpoint.png")
    more = "all/cat/cat0.png,dog\nall/cat/cat0.png,cat\nall/.ipynb_checkpoints/cat0-checkpoint.png,cat\n"
    file.write_text(file.read_text() + more)
    splits, _, faults = read(file)
    assert splits["train"] | splits["val"] == of(3)
    assert faults.counts() == {"hidden copy of a picture": 1, "picture that is listed with two classes": 1}


def test_splits_in_a_column_have_their_usual_names(tmp_path):
    fill(tmp_path / "all", 3)
    lines = [f"all/{n[:3]}/{n}.png;{n[:3]};{['Training', 'VALID', 'test_set'][int(n[3])]}" for n in sorted(of(3))]
    (tmp_path / "t.csv").write_text("\n".join(["path;label;Subset", *lines]))
    assert read(tmp_path)[0] == {"train": {"cat0", "dog0"}, "val": {"cat1", "dog1"}, "test": {"cat2", "dog2"}}


def test_a_picture_whose_name_is_not_utf8_is_a_sample(tmp_path):
    fill(tmp_path, 3)
    os.rename(tmp_path / "cat" / "cat0.png", os.fsencode(tmp_path / "cat") + b"/\xe9.png")
    os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/caf\xe9")
    splits, classes, _ = read(tmp_path)
    assert classes == ["café", "dog"], "the name of a class is text"
    assert Path(os.fsdecode(b"\xe9.png")).stem in splits["train"] | splits["val"]
    loader = for_eval(tmp_path, ["café", "dog"], split="train")
    names = [sample.name for sample in loader.dataset.samples]
    write_json(tmp_path / "names.json", names)
    assert read_json(tmp_path / "names.json") == names


def test_a_picture_of_both_splits_is_said_aloud_where_one_trains_on_it(tmp_path):
    fill(tmp_path, 3)
    rows = [f"{label}/{label}{i}.png,{label},{split}" for label in CLASSES for i, split in enumerate(("train", "train", "val"))]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows, "cat/cat2.png,cat,train", ""]))
    *_, faults = read(tmp_path / "all.csv")
    assert [places for note, places in faults.notes.items() if "trained on and validated on" in note] == [["cat2.png"]]
    *_, faults = read(tmp_path / "all.csv", scored=True)
    assert not faults.notes


def test_a_competitions_tables_without_labels_are_passed_over(tmp_path):
    for name in ("a0", "a1", "b0", "b1"):
        draw(tmp_path / "train" / f"{name}.jpg")
    draw(tmp_path / "test" / "t.jpg")
    (tmp_path / "labels.csv").write_text("id,breed\na0,a\na1,a\nb0,b\nb1,b\n")
    (tmp_path / "sample_submission.csv").write_text("id,a,b\nt,0.5,0.5\n")
    splits, classes, faults = read(tmp_path)
    assert splits["train"] | splits["val"] == {"a0", "a1", "b0", "b1"} and classes == ["a", "b"]
    assert faults.counts() == {"CSV file without labels": 1}
    (tmp_path / "labels.csv").rename(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("id\nt\n")
    splits, _, faults = read(tmp_path)
    assert splits["train"] | splits["val"] == {"a0", "a1", "b0", "b1"} and faults.counts() == {"CSV file without labels": 2}


def test_a_table_over_several_splits_keeps_what_was_held_out(tmp_path):
    rows = [f"{split}/{split}_{name}.jpg,{name}" for split in ("train", "val") for name in "ab"]
    for row in rows:
        draw(tmp_path / row.split(",")[0])
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert read(tmp_path)[0] == {"train": {"train_a", "train_b"}, "val": {"val_a", "val_b"}}


def test_several_classes_of_one_picture_and_classes_that_are_nearly_one_are_said(tmp_path):
    for name in "abcd":
        draw(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "data.csv").write_text("image,cat,Cat\na.jpg,1,0\nb.jpg,0,1\nc.jpg,1,1\nd.jpg,0,1\na.jpg,1,0\n")
    with pytest.raises(UserError, match="has one picture"):
        read(tmp_path)
    faults = read(tmp_path, scored=True)[2]
    assert faults.counts() == {"CSV line of several classes": 1}
    assert faults.notes["classes whose names are nearly the same"] == ["Cat and cat"]
