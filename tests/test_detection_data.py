"""Detection data: three layouts give the same samples, bad input is named, pixels and boxes stay together."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DETECTION, use_task
from PIL import Image

TASK = DETECTION
use_task(TASK)

import data  # noqa: E402
from boxes import make_sample  # noqa: E402
from common.batches import EpochBatches, build_loader  # noqa: E402
from common.config import UserError  # noqa: E402
from common.samples import Faults  # noqa: E402
from common.vision.pictures import decode, header_size, read_header  # noqa: E402
from data import DetectionData, Preprocess, build_loaders, check_samples, collate, load_for_eval, read_tables  # noqa: E402
from formats import read_dataset  # noqa: E402
from metrics import coco_eval  # noqa: E402

CLASSES = ["cat", "dog"]
# Three pictures of 64 x 48, each with its boxes (label, x, y, w, h); the last has none.
SCENE = {"a": [("cat", 8, 6, 16, 12), ("dog", 32, 24, 20, 18)], "b": [("dog", 4, 4, 40, 30)], "c": []}
W, H = 64, 48


def settings(folder, **changes):
    values = {"data_dir": str(folder), "data_format": "auto", "image_size": 0, "augment": False, "cache": "auto", "seed": 0}
    return SimpleNamespace(**{**values, "batch_size": 2, "num_workers": 0, **changes})


def processor(height=32, width=32, **changes):
    from transformers import DetrImageProcessor

    return DetrImageProcessor(**{"size": {"height": height, "width": width}, "do_pad": False, **changes})


def draw(path, boxes=(), size=(W, H)):
    """A black picture with a white filled rectangle for every box (label, x, y, w, h)."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for _, x, y, w, h in boxes:
        pixels[y : y + h, x : x + w] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def coco(scene=SCENE, ids=None, classes=CLASSES, ending="png"):
    ids = ids or {name: i for i, name in enumerate(classes, 1)}
    images = [{"id": i, "file_name": f"{name}.{ending}", "width": W, "height": H} for i, name in enumerate(scene)]
    boxes = [(i, label, box) for i, name in enumerate(scene) for label, *box in scene[name]]
    notes = [
        {"id": n, "image_id": i, "category_id": ids[label], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, label, box) in enumerate(boxes)
    ]
    return {"images": images, "annotations": notes, "categories": [{"id": ids[name], "name": name} for name in classes]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def xml(name, boxes, size=(W, H), extra=""):
    things = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
        f"</object>"
        for label, x, y, w, h in boxes
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.png</filename>{sides}{things}{extra}</annotation>"


def yolo(boxes):
    return "".join(
        f"{CLASSES.index(label)} {(x + w / 2) / W:.8f} {(y + h / 2) / H:.8f} {w / W:.8f} {h / H:.8f}\n"
        for label, x, y, w, h in boxes
    )


def make(folder, layout):
    """Writes SCENE as training data, and its picture `a` as validation data where the layout has a place for it."""
    if layout == "coco":
        for split, scene in (("train", SCENE), ("val", {"a": SCENE["a"]})):
            write(folder / "annotations" / f"instances_{split}2017.json", coco(scene))
            write(folder / "annotations" / f"captions_{split}2017.json", {"images": [], "annotations": []})
            for name, boxes in scene.items():
                draw(folder / f"{split}2017" / f"{name}.png", boxes)
    elif layout == "roboflow coco":
        for split, scene in (("train", SCENE), ("valid", {"a": SCENE["a"]})):
            table = coco(scene)
            table["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}] + [
                {**c, "supercategory": "pets"} for c in table["categories"]
            ]
            write(folder / split / "_annotations.coco.json", table)
            for name, boxes in scene.items():
                draw(folder / split / f"{name}.png", boxes)
    elif layout == "single coco":
        write(folder / "annotations.json", coco())
        for name, boxes in SCENE.items():
            draw(folder / "images" / f"{name}.png", boxes)
    elif layout.startswith("voc"):
        for name, boxes in SCENE.items():
            draw(folder / "JPEGImages" / f"{name}.png", boxes)
            write(folder / "Annotations" / f"{name}.xml", xml(name, boxes))
        if layout == "voc":
            draw(folder / "JPEGImages" / "v.png", SCENE["a"])
            write(folder / "Annotations" / "v.xml", xml("v", SCENE["a"]))
            write(folder / "ImageSets" / "Main" / "train.txt", "a\nb\nc\n")
            write(folder / "ImageSets" / "Main" / "val.txt", "v\n")
        elif layout == "voc trainval":
            write(folder / "ImageSets" / "Main" / "trainval.txt", "a\nb\nc\n")
    else:
        places = {"yolo": "images/{}", "roboflow yolo": "{}/images", "yolo polygons": "images/{}"}
        for split, scene in (("train", SCENE), ("valid" if "robo" in layout else "val", {"a": SCENE["a"]})):
            place = places[layout].format(split)
            for name, boxes in scene.items():
                draw(folder / place / f"{name}.png", boxes)
                text = yolo(boxes)
                if "polygons" in layout:
                    corners = ((x, y, x + w, y, x + w, y + h, x, y + h) for _, x, y, w, h in boxes)
                    sides = (" ".join(str(v / (W, H)[i % 2]) for i, v in enumerate(c)) for c in corners)
                    text = "".join(f"{CLASSES.index(b[0])} {c}\n" for b, c in zip(boxes, sides, strict=True))
                if boxes:  # a picture without a text file has no objects
                    write(folder / place.replace("images", "labels") / f"{name}.txt", text)
        names = "{0: cat, 1: dog}" if layout == "yolo" else "[cat, dog]"
        robo = "train: ../train/images\nval: ../valid/images\n" if "robo" in layout else ""
        write(folder / "data.yaml", f"{robo}nc: 2\nnames: {names}\n")
    return folder


def read(folder, **changes):
    faults = Faults()
    splits, classes, layout = read_dataset(folder, changes.get("data_format", "auto"), changes.get("seed", 0), faults)
    return splits, classes, layout, faults.counts()


def loaded(folder, **changes):
    """(training data set, validation data set, classes, facts for the summary)."""
    config = settings(folder, **changes)
    tables = read_tables(config.data_dir, config.data_format, config.seed)
    train, val, classes, facts = build_loaders(config, changes.get("processor") or processor(), tables)
    return train.dataset, val.dataset, classes, facts


# ---- layouts ---------------------------------------------------------------------------------------------------------

WITH_VAL = ["coco", "roboflow coco", "voc", "yolo", "roboflow yolo", "yolo polygons"]


@pytest.mark.parametrize("layout", [*WITH_VAL, "single coco", "voc trainval", "voc bare"])
def test_every_layout_gives_the_same_samples(tmp_path, layout, capsys):
    train, val, classes, facts = loaded(make(tmp_path, layout))
    assert classes == CLASSES and facts["left_out"] == {} and facts["format"] in layout
    samples = {s.path.stem: s for s in [*train.samples, *([] if layout in WITH_VAL else val.samples)]}
    assert sorted(samples) == ["a", "b", "c"]
    for name, boxes in SCENE.items():
        sample = samples[name]
        assert sample.size == (W, H) and [CLASSES[i] for i in sample.labels] == [box[0] for box in boxes]
        expected = np.array([(x, y, x + w, y + h) for _, x, y, w, h in boxes], dtype=float).reshape(-1, 4)
        np.testing.assert_allclose(sample.boxes, expected, atol=1e-4)
        np.testing.assert_allclose(sample.area, (expected[:, 2:] - expected[:, :2]).prod(axis=1), rtol=1e-4)
    assert ("no validation split" in capsys.readouterr().out) == (layout not in WITH_VAL)
    if layout in WITH_VAL:
        assert len(val) == 1 and val.samples[0].boxes.shape == (2, 4)


def test_a_held_out_fifth_is_the_same_each_time_and_adding_pictures_moves_no_other(tmp_path, capsys):
    def split(names, seed=0):
        scene = {name: SCENE["b"] for name in names}
        write(tmp_path / "annotations.json", coco(scene))
        splits, *_ = read(tmp_path, seed=seed)
        return {part: {s.path.stem for s in splits[part]} for part in ("train", "val")}

    names = [f"p{i:03d}" for i in range(120)]
    for name in names:
        draw(tmp_path / "images" / f"{name}.png")
    first = split(names[:100])
    assert "of 100 training pictures, chosen by seed 0, become it" in capsys.readouterr().out
    assert first == split(names[:100]) and first["train"].isdisjoint(first["val"]) and 10 <= len(first["val"]) <= 30
    assert first["val"] != split(names[:100], seed=1)["val"]
    for count in range(101, 121, 3):
        more = split(names[:count])
        assert first["val"] <= more["val"] and first["train"] <= more["train"]
    for few in ([2, 3], [5, 6, 7]):  # neither side stays empty
        small = split([names[i] for i in few])
        assert small["train"] and small["val"]


def test_trainval_is_no_validation_split(tmp_path, capsys):
    scene = {f"p{i}": SCENE["b"] for i in range(8)}
    for name in scene:
        draw(tmp_path / "images" / f"{name}.png")
    write(tmp_path / "annotations" / "trainval.json", coco(scene))
    splits, *_ = read(tmp_path)
    assert {s.path for s in splits["train"]}.isdisjoint(s.path for s in splits["val"])
    assert "no validation split" in capsys.readouterr().out


def test_category_ids_with_gaps_map_to_names_in_each_file_by_itself(tmp_path):
    make(tmp_path, "coco")
    write(tmp_path / "annotations" / "instances_train2017.json", coco(ids={"cat": 17, "dog": 90}))
    write(tmp_path / "annotations" / "instances_val2017.json", coco({"a": SCENE["a"]}, ids={"cat": 3, "dog": 1}))
    train, val, classes, _ = loaded(tmp_path)
    assert classes == CLASSES and train.samples[0].labels.tolist() == [0, 1] and val.samples[0].labels.tolist() == [0, 1]


def test_crowd_boxes_are_not_trained_on_and_cost_nothing_in_scoring(tmp_path):
    make(tmp_path, "coco")
    for split in ("train", "val"):
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        table = json.loads(file.read_text())
        table["annotations"][1]["iscrowd"] = 1
        write(file, table)
    train, val, _, _ = loaded(tmp_path)
    assert train[(1, 0)]["target"]["class_labels"].tolist() == [0]
    cat, crowd = val.samples[0].boxes
    found = {"index": 0, "scores": np.array([0.9, 0.8, 0.7]), "labels": np.array([0, 1, 1])}
    inside = crowd + [2, 2, -8, -8]
    scored = coco_eval(val.samples, [{**found, "boxes": np.array([cat, crowd, inside])}], CLASSES)
    assert scored.stats[0] == pytest.approx(1)  # two detections on the crowd are neither hits nor mistakes, and dog has no truth


def test_difficult_voc_objects_are_handled_as_crowd(tmp_path):
    make(tmp_path, "voc")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    hard = f"<object><name>dog</name><difficult>1</difficult>{box}</object>"
    write(tmp_path / "Annotations" / "a.xml", xml("a", SCENE["a"], extra=hard))
    train, *_ = loaded(tmp_path)
    assert train.samples[0].crowd.tolist() == [False, False, True] and len(train[(1, 0)]["target"]["boxes"]) == 2


def test_pictures_without_boxes_stay_also_with_augmentation(tmp_path):
    train, *_ = loaded(make(tmp_path, "coco"), augment=True)
    for epoch in range(5):
        target = train[(epoch, 2)]["target"]
        assert target["boxes"].shape == (0, 4) and target["class_labels"].shape == (0,)


# ---- faults in annotations -------------------------------------------------------------------------------------------


def test_boxes_outside_are_clipped_and_those_without_area_are_dropped_and_counted(tmp_path):
    boxes = [("cat", -10, -10, 30, 30), ("cat", 60, 40, 30, 30), ("dog", 1, 1, 9, 9)]
    empty = [("dog", 5, 5, 0, 9), ("dog", 100, 100, 9, 9), ("dog", 3, 3, -9, 5)]
    scene = {"a": [*boxes, *empty], "b": SCENE["b"]}
    table = coco(scene)
    table["annotations"] += [
        {"id": 90, "image_id": 0, "category_id": 1, "bbox": [1, 2, float("nan"), 4]},
        {"id": 91, "image_id": 0, "category_id": 1, "bbox": [1, 2, float("inf"), 4]},
        {"id": 92, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4]},
        {"id": 93, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3]},
        {"id": 94, "image_id": 0, "category_id": 1, "bbox": None},
        {"id": 95, "image_id": 0, "bbox": [1, 2, 3, 4]},
        {"id": 96, "image_id": [0], "category_id": 1, "bbox": [1, 2, 3, 4]},
        {"id": 97, "image_id": 55, "category_id": 1, "bbox": [1, 2, 3, 4]},
        "no box at all",
    ]
    make(tmp_path, "coco")
    write(tmp_path / "annotations" / "instances_train2017.json", table)
    train, _, _, facts = loaded(tmp_path)
    np.testing.assert_allclose(train.samples[0].boxes, [(0, 0, 20, 20), (60, 40, 64, 48), (1, 1, 10, 10)])
    np.testing.assert_allclose(train.samples[0].area, [400, 32, 81])
    assert facts["left_out"] == {
        "box of a category that is not listed": 1,
        "box that cannot be read": 5,
        "box without area inside its picture": 5,
        "boxes of an image that is not listed": 1,
        "part of a box that lay outside its picture": 2,
    }


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "x\0y.png", "n" * 5000])
def test_names_that_leave_the_folder_are_not_followed(tmp_path, name):
    folder = make(tmp_path / "set", "coco")
    draw(tmp_path / "secret.png")
    table = coco()
    table["images"][0]["file_name"] = name
    write(folder / "annotations" / "instances_train2017.json", table)
    splits, _, _, faults = read(folder)
    assert [s.path.stem for s in splits["train"]] == ["b", "c"] and faults == {"picture that is not there": 1}


def test_names_that_leave_the_folder_are_not_followed_by_voc_and_yolo(tmp_path):
    draw(tmp_path / "secret.png")
    voc = make(tmp_path / "voc", "voc")
    write(tmp_path / "secret.xml", xml("secret", SCENE["a"]))
    write(voc / "ImageSets" / "Main" / "train.txt", "a\n../../secret\n")
    splits, _, _, faults = read(voc)
    assert [s.path.stem for s in splits["train"]] == ["a"] and faults == {"annotation that is not there": 1}
    lists = make(tmp_path / "yolo", "yolo")
    here = (lists / "images" / "train" / "b.png").resolve()
    write(lists / "train.txt", f"images/train/a.png\n{here}\n{tmp_path}/secret.png\n../secret.png\nimages/train/gone.png\n")
    write(lists / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    splits, _, _, faults = read(lists)
    assert [s.path.stem for s in splits["train"]] == ["a", "b"] and faults == {"picture that is not there": 3}
    assert [len(s.boxes) for s in splits["train"]] == [2, 1]


def test_yolo_rows_with_keypoints_are_boxes_where_the_yaml_says_so(tmp_path):
    make(tmp_path, "yolo")
    write(tmp_path / "labels" / "train" / "b.txt", "1 0.5 0.5 0.25 0.5 0.1 0.9 0.2 0.8 0.9 0.1\n")
    splits, *_ = read(tmp_path)
    assert splits["train"][1].boxes[0].tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9])  # a polygon
    write(tmp_path / "data.yaml", "kpt_shape: [3, 2]\nnames: [cat, dog]\n")
    splits, *_ = read(tmp_path)
    assert splits["train"][1].boxes[0].tolist() == pytest.approx([0.375, 0.25, 0.625, 0.75])


def test_yolo_rows_that_cannot_be_read_are_named(tmp_path, capsys):
    make(tmp_path, "yolo")
    rows = "0 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1\n0 a b c d\n-1 0.5 0.5 0.1 0.1\n0.5 0.5 0.5 0.1 0.1\n"
    write(tmp_path / "labels" / "train" / "a.txt", rows + "0 nan 0.5 0.1 0.1\n")
    train, _, _, facts = loaded(tmp_path)
    assert len(train.samples[0].boxes) == 1
    assert facts["left_out"] == {
        "box of a class number without a name": 2,
        "box that cannot be read": 3,
        "box without area inside its picture": 1,
    }
    text = capsys.readouterr().out
    assert "left out, box of a class number without a name (2): a.txt line 2: 2, a.txt line 5: -1" in text
    assert "left out, box that cannot be read (3): a.txt line 3, a.txt line 4, a.txt line 6" in text


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_a_picture_whose_only_box_cannot_be_read_is_told_from_one_without_boxes(tmp_path, layout):
    make(tmp_path, layout)
    if layout == "coco":
        write(tmp_path / "annotations" / "instances_train2017.json", coco({**SCENE, "a": [("cat", "left", 8, 8, 8)]}))
    elif layout == "voc":
        write(tmp_path / "Annotations" / "a.xml", xml("a", SCENE["a"][:1]).replace("<xmin>", "<xmin>left"))
    else:
        write(tmp_path / "labels" / "train" / "a.txt", "7 0.5 0.5 0.1 0.1\n")
    samples = {s.path.stem: (s.annotated, len(s.boxes)) for s in read(tmp_path)[0]["train"]}
    assert samples == {name: (bool(boxes), 0 if name == "a" else len(boxes)) for name, boxes in SCENE.items()}


def test_a_data_yaml_outside_the_working_folder_is_read_with_its_absolute_paths(tmp_path, monkeypatch):
    make(tmp_path / "set", "yolo")
    write(tmp_path / "set" / "data.yaml", f"train: {tmp_path}/set/images/train\nval: images/val\nnames: [cat, dog]\n")
    monkeypatch.chdir(tmp_path)
    _, _, _, facts = loaded("set")
    assert facts["train"] == 3 and facts["val"] == 1


@pytest.mark.parametrize(
    "layout, file, text, told",
    [
        ("coco", "annotations/instances_train2017.json", "{not json", "instances_train2017.json is not valid JSON"),
        ("coco", "annotations/instances_train2017.json", "[]", "is no COCO file: it has no list 'images'"),
        ("coco", "annotations/instances_val2017.json", '{"images": []}', "no COCO file: it has no list 'annotations'"),
        ("coco", "annotations/instances_train2017.json", coco(ids={"cat": 1, "dog": "x"}), "instances_train2017.json: .*id"),
        ("coco", "annotations/instances_train2017.json", {**coco(), "categories": []}, "names no classes"),
        (
            "coco",
            "annotations/instances_train2017.json",
            {**coco(), "images": [*coco()["images"], {"id": 0, "file_name": "b"}]},
            "id 0 is given twice, to a.png and to b",
        ),
        ("yolo", "data.yaml", "names: [a, b", "data.yaml is not valid YAML"),
        ("yolo", "data.yaml", "nc: 2", "data.yaml must hold `names:`"),
        ("yolo", "data.yaml", "names: cat", "data.yaml must hold `names:`"),
        ("yolo", "data.yaml", "", "data.yaml must hold `names:`"),
        ("voc", "Annotations/a.xml", "<annotation><object>", {"annotation that cannot be read": 1}),
        ("voc", "Annotations/a.xml", xml("a", [("cat", 1, 1, 5, 5), ("", "x", "y", "", "")]), {"box that cannot be read": 1}),
        ("voc", "Annotations/a.xml", "", {"annotation that cannot be read": 1}),
    ],
)
def test_malformed_annotations_are_named(tmp_path, layout, file, text, told, capsys):
    make(tmp_path, layout)
    write(tmp_path / file, text)
    if isinstance(told, dict):
        *_, facts = loaded(tmp_path)
        assert facts["left_out"] == told and "a.xml" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=told) as caught:
            loaded(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_folder_of_two_layouts_or_of_none_asks_for_the_format(tmp_path):
    both = make(make(tmp_path / "both", "coco"), "yolo")
    with pytest.raises(UserError, match="looks like yolo and coco.*--data_format chooses one"):
        read(both)
    for layout in ("coco", "yolo"):
        assert read(both, data_format=layout)[2] == layout
    with pytest.raises(UserError, match="--data_format voc: .* does not have that layout"):
        read(both, data_format="voc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is none of the layouts that are known.*COCO .*VOC .*YOLO"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        read(tmp_path / "nowhere")


# ---- as tools, hubs and people lay it out ----------------------------------------------------------------------------


def pictures(folder, scene=SCENE, name="{}.png"):
    for picture, boxes in scene.items():
        draw(folder / name.format(picture), boxes)


def renamed(table, name="{}"):
    for image in table["images"]:
        image["file_name"] = name.format(image["file_name"])
    return table


def labels(folder, scene=SCENE, head="", end="\n"):
    for name, boxes in scene.items():
        write(folder / f"{name}.txt", head + yolo(boxes).replace("\n", end))


def annotated(folder, scene=SCENE, head="", **places):
    """VOC files; pictures: their folder, xml: that of the annotations."""
    pictures(folder / places.get("pictures", ""), scene)
    for name, boxes in scene.items():
        write(folder / places.get("xml", "") / f"{name}.xml", head + xml(name, boxes))


def coco_export(folder, kind):
    places = {
        "cvat": ("annotations/instances_default.json", "images/default", "{}"),
        "cvat subset": ("annotations/instances_Train.json", "images/Train", "{}"),
        "fiftyone": ("labels.json", "data", "{}"),
        "fiftyone split": ("train/labels.json", "train/data", "{}"),
        "label studio on windows": ("result.json", "images", "images\\{}"),
        "label studio upload": ("result.json", "images", "../../label-studio/data/media/upload/1/0a1b2c3d-{}"),
        "absolute": ("annotations.json", "pictures", "/home/somebody/set/{}"),
        "deep": ("annotations/instances_train.json", "train/2020/may", "{}"),
        "keypoints of people": ("annotations/person_keypoints_train2017.json", "train2017", "{}"),
    }
    file, place, name = places[kind]
    pictures(folder / place)
    write(folder / file, renamed(coco(), name))


def yolo_export(folder, kind):
    names, lists = "names: [cat, dog]\n", "".join(f"data/obj_train_data/{name}.png\n" for name in SCENE)
    if kind == "cvat 1.1":
        pictures(folder / "obj_train_data"), labels(folder / "obj_train_data")
        write(folder / "obj.names", "cat\ndog\n")
        write(folder / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
        write(folder / "train.txt", lists)
        return
    place = {"several folders": "images/one", "bare list": "images/train"}.get(kind, "images")
    pictures(folder / place)
    head, end = ("\ufeff", "\r\n") if kind == "windows" else ("", "\n")
    labels(folder / place.replace("images", "labels"), head=head, end=end)
    if kind == "label studio":
        write(folder / "classes.txt", "cat\ndog\n")
        write(folder / "notes.json", {"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2024}})
    elif kind == "several folders":
        draw(folder / "images" / "three" / "v.png")
        (folder / "images" / "two").mkdir()
        write(folder / "data.yaml", f"path: /home/me/set\ntrain: [images/one, images/two]\nval:\n- images/three\n{names}")
    elif kind == "bare list":
        write(folder / "train.txt", "".join(f"./images/train/{name}.png\n" for name in SCENE) + "images/train/a.png\n")
        write(folder / "data.yaml", f"train: D:\\old\\train.txt\n{names}")
    elif kind == "numbers from one":
        for file in (folder / "labels").glob("*.txt"):
            rows = [line.split(" ", 1) for line in file.read_text().splitlines()]
            write(file, "".join(f"{int(number) + 1} {box}\n" for number, box in rows))
        write(folder / "data.yaml", "names:\n  1: cat\n  2: dog\n")
    else:
        write(folder / "data.yaml", head + names)


def voc_export(folder, kind):
    scene = {f"WhatsApp Image {name} (1)": boxes for name, boxes in SCENE.items()} if kind == "spaces" else SCENE
    if kind == "roboflow":
        annotated(folder / "train", scene), annotated(folder / "valid", {"v": SCENE["a"]})
    elif kind == "one folder":
        annotated(folder, scene)
    elif kind == "kaggle":
        annotated(folder, scene, pictures="images", xml="annotations")
    elif kind == "split folders":
        annotated(folder, scene, pictures="images/train", xml="annotations/train")
        annotated(folder, {"v": SCENE["a"]}, pictures="images/val", xml="annotations/val")
    elif kind == "folders in folders":
        annotated(folder, scene, pictures="JPEGImages/one/x", xml="Annotations/one/x")
        draw(folder / "JPEGImages" / "two" / "a.png")
    elif kind == "devkit":
        annotated(folder / "VOC2012", scene, pictures="JPEGImages", xml="Annotations")
        write(folder / "VOC2012" / "ImageSets" / "Main" / "train.txt", "a 1\nb -1\nc\n")
    elif kind == "spaces":
        annotated(folder, scene, pictures="JPEGImages", xml="Annotations")
        write(folder / "ImageSets" / "Main" / "train.txt", "\n".join(scene))
    else:  # of another day: <filename> without ending, or of another file
        annotated(folder, scene, pictures="JPEGImages", xml="Annotations")
        for number, name in enumerate(SCENE):
            text = xml(name, SCENE[name]).replace(f"{name}.png", ["a", "C:\\old\\other.jpg", ""][number])
            write(folder / "Annotations" / f"{name}.xml", text)


EXPORTS = {
    coco_export: ["cvat", "cvat subset", "fiftyone", "fiftyone split", "label studio on windows", "label studio upload",
                  "absolute", "deep", "keypoints of people"],
    yolo_export: ["cvat 1.1", "label studio", "several folders", "bare list", "windows", "numbers from one"],
    voc_export: ["roboflow", "one folder", "kaggle", "split folders", "folders in folders", "devkit", "spaces", "filename"],
}  # fmt: skip


@pytest.mark.parametrize("write_export, kind", [(export, kind) for export, kinds in EXPORTS.items() for kind in kinds])
def test_exports_of_other_programs_give_the_same_samples(tmp_path, write_export, kind):
    write_export(tmp_path, kind)
    train, val, classes, facts = loaded(tmp_path)
    assert classes == CLASSES and facts["left_out"] == {}
    samples = {s.path.stem.removeprefix("WhatsApp Image ")[:1]: s for s in [*train.samples, *val.samples]}
    assert {"v"} >= set(samples) - set(SCENE) and set(SCENE) <= set(samples) and len(train) + len(val) == len(samples)
    assert "v" not in samples or [s.path.stem for s in val.samples] == ["v"]  # what somebody held out stays so
    for name, boxes in SCENE.items():
        expected = np.array([(x, y, x + w, y + h) for _, x, y, w, h in boxes], dtype=float).reshape(-1, 4)
        np.testing.assert_allclose(samples[name].boxes, expected, atol=1e-4)
        assert [CLASSES[i] for i in samples[name].labels] == [box[0] for box in boxes]


def test_files_that_are_links_into_a_hubs_cache_are_read(tmp_path):
    make(tmp_path / "cache", "coco")
    for file in sorted((tmp_path / "cache").rglob("*.*")):
        link = tmp_path / "set" / file.relative_to(tmp_path / "cache")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    train, val, _, facts = loaded(tmp_path / "set")
    assert (len(train), len(val), facts["left_out"]) == (3, 1, {})


def test_what_a_coco_file_says_in_its_own_way_is_understood(tmp_path, capsys):
    """Ids as text or with a point, no size, polygons and run lengths without a bbox, a byte order mark."""
    table = coco({"a": SCENE["a"], "b": SCENE["b"], "d": [("dog", 5, 6, 7, 8)], "e": [("cat", 1, 40, 30, 5)]})
    notes, sizes = table["annotations"], [image.pop("width") for image in table["images"]]
    notes[0].update(image_id="0", category_id="1")
    notes[1].update(image_id=0.0, category_id=2.0)
    x, y, w, h = notes[2].pop("bbox")
    notes[2]["segmentation"] = [[x, y, x + w, y, x + w, y + 3], [x, y + h, x + w, y + 3, x, y]]
    before, after = 5 * H + 6, H - 6 - 8
    runs = [before, *([8, H - 8] * 6), 8, (W - 12) * H + after]
    notes[3].update(bbox=[0, 0, 0, 0], segmentation={"size": [H, W], "counts": runs})
    mask = np.zeros((H, W), dtype=np.uint8, order="F")
    mask[40:45, 1:31] = 1
    packed = pytest.importorskip("pycocotools.mask").encode(mask)
    notes[4].pop("bbox")
    notes[4]["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
    pictures(tmp_path, {image["file_name"][:1]: [] for image in table["images"]})
    write(tmp_path / "annotations.json", "\ufeff" + json.dumps(table))
    train, val, _, facts = loaded(tmp_path)
    samples = {s.path.stem: s for s in [*train.samples, *val.samples]}
    assert facts["left_out"] == {} and len(sizes) == 4 and all(s.size == (W, H) for s in samples.values())
    boxes = {name: sorted([*map(round, box)] for box in s.boxes.tolist()) for name, s in samples.items()}
    assert boxes == {
        "a": [[8, 6, 24, 18], [32, 24, 52, 42]],
        "b": [[4, 4, 44, 34]],
        "d": [[5, 6, 12, 14]],
        "e": [[1, 40, 31, 45]],
    }
    assert sorted(samples["a"].labels.tolist()) == [0, 1] and "outline without a bbox" in capsys.readouterr().out


@pytest.mark.parametrize("counts", ["o" * 10**6, "~~~", "", [5], [0, 10**30], [-1, 49 * 64], ["x"], {"a": 1}, None])
def test_run_lengths_of_no_picture_are_named_at_once(tmp_path, counts):
    make(tmp_path, "coco")
    table = coco()
    table["annotations"].append({"id": 9, "image_id": 0, "category_id": 1, "segmentation": {"size": [H, W], "counts": counts}})
    write(tmp_path / "annotations" / "instances_train2017.json", table)
    splits, _, _, faults = read(tmp_path)
    assert faults == {"box that cannot be read": 1} and len(splits["train"][0].boxes) == 2


def test_a_picture_that_is_listed_twice_is_one_with_all_its_boxes(tmp_path, capsys):
    make(tmp_path, "coco")
    table = coco()
    table["images"] += [{**table["images"][0], "id": 7}, {**table["images"][1], "id": 8, "width": 9}, table["images"][2]]
    table["annotations"] += [{**table["annotations"][0], "id": 70, "image_id": 7}]
    table["annotations"] += [{"id": 71, "image_id": 7, "category_id": 2, "bbox": [1, 1, 5, 5]}]
    write(tmp_path / "annotations" / "instances_train2017.json", table)
    train, _, _, facts = loaded(tmp_path)
    assert [s.path.stem for s in train.samples] == ["a", "b", "c"]
    assert train.samples[0].boxes.tolist() == [[8, 6, 24, 18], [32, 24, 52, 42], [1, 1, 6, 6]]
    assert facts["left_out"] == {"picture that is listed twice, with two sizes": 1}
    assert "note, picture that is listed twice, and taken once with all its boxes (2): a.png, c.png" in capsys.readouterr().out


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_a_class_is_dropped_only_as_a_group_without_boxes(tmp_path, first, used, capsys):
    scene = {"a": [("cat", 8, 6, 16, 12)], "b": [("dog", 4, 4, 40, 30)], "c": [("pet", 1, 1, 5, 5)] if used else []}
    classes = ["pet", "cat", "dog"]
    table = coco(scene, ids={name: first + i for i, name in enumerate(classes)}, classes=classes)
    for category in table["categories"]:
        category["supercategory"] = "pet"
    pictures(tmp_path, scene)
    write(tmp_path / "annotations.json", table)
    _, names, _, faults = read(tmp_path)
    dropped = first == 0 and not used
    assert names == (classes[1:] if dropped else classes) and faults == {}


def test_of_several_annotation_files_none_is_taken_by_chance(tmp_path):
    pictures(tmp_path)
    for name in ("one", "two"):
        write(tmp_path / f"{name}.json", coco())
    with pytest.raises(UserError, match="one.json and two.json may both be the train annotations"):
        read(tmp_path)
    (tmp_path / "two.json").write_text('{"info": {"images": 3}}')  # no list of boxes: it is about something else
    assert read(tmp_path)[2] == "coco"


def test_eval_needs_no_training_pictures(tmp_path):
    make(tmp_path, "coco")
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(UserError, match="has no training pictures"):
        read(tmp_path)
    origin = {"classes": CLASSES, "data_dir": str(tmp_path), "data_format": "auto", "seed": 0, "image_size": 0}
    loader, *_ = load_for_eval(settings("", split="val"), processor(), origin)
    assert [s.path.stem for s in loader.dataset.samples] == ["a"]


@pytest.mark.parametrize(
    "settings_text, told",
    [
        ("names: [cat, cat]\n", "data.yaml: the class name 'cat' stands for two classes"),
        ("a: &a [x]\nnames: [*a, *a]\n", "data.yaml has a YAML alias"),
        ("names: " + "[" * 5000, "data.yaml is not valid YAML: it is nested too deeply"),
        ("names: [cat, dog]\nnc: " + "9" * 6000, "data.yaml has a number of 6000 digits"),
        ("names: [cat]\n", "count classes from 1 to 1, and data.yaml from 0"),
    ],
)
def test_yolo_settings_that_cannot_be_meant_end_in_one_line(tmp_path, settings_text, told):
    make(tmp_path, "yolo")
    for file in (tmp_path / "labels").rglob("*.txt"):
        write(file, "1 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "data.yaml", settings_text)
    with pytest.raises(UserError, match=told) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_pictures_that_somebody_held_out_are_never_trained_on(tmp_path, capsys):
    pictures(tmp_path / "images"), pictures(tmp_path / "images" / "val", {"v": SCENE["a"]})
    labels(tmp_path / "labels"), labels(tmp_path / "labels" / "val", {"v": SCENE["a"]})
    write(tmp_path / "data.yaml", "train: images\nval: images/val\ntest: ../test/images\nnames: [cat, dog]\n")
    train, val, _, facts = loaded(tmp_path)
    assert [s.path.stem for s in train.samples] == ["a", "b", "c"] and [s.path.stem for s in val.samples] == ["v"]
    assert facts["left_out"] == {} and "picture of two splits, which is not trained on (1): v.png" in capsys.readouterr().out
    write(tmp_path / "data.yaml", "train: [../train/images, images]\nval: images/val\nnames: [cat, dog]\n")
    *_, facts = loaded(tmp_path)
    assert facts["train"] == 3 and facts["left_out"] == {"folder or list of the train split that is not there": 1}


def test_pictures_in_both_splits_are_said_aloud(tmp_path, capsys):
    make(tmp_path, "coco")
    table = coco({"a": SCENE["a"]})
    table["images"][0]["file_name"] = "train2017/a.png"
    write(tmp_path / "annotations" / "instances_val2017.json", table)
    _, _, _, facts = loaded(tmp_path)
    assert (
        facts["left_out"] == {}
        and "trained on and validated on, so that the metrics flatter (1): a.png" in capsys.readouterr().out
    )


def test_a_yolo_row_may_end_in_a_confidence_and_may_not_be_ambiguous(tmp_path):
    make(tmp_path, "yolo")
    write(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.5 0.5 0.93\n1 0.5 0.5 0.5 0.5 0.1 0.2 0.3\n\n")
    splits, _, _, faults = read(tmp_path)
    assert splits["train"][0].boxes.tolist() == [[0.25, 0.25, 0.75, 0.75]] and faults == {"box that cannot be read": 1}


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]>'


@pytest.mark.parametrize(
    "content, fault",
    [
        ('<?xml version="1.0" encoding="iso-8859-1"?>{}'.encode("latin-1"), None),
        (b'<?xml version="1.0" encoding="foo-bar"?>{}', None),
        (b'<?xml version="1.0" encoding="windows-1251"?>{}', None),
        (b"\xef\xbb\xbf{}", None),
        (b"{}<!-- gr\xfcn -->", None),
        (BOMB.encode() + b"{}", "annotation with XML entities"),
        (BOMB.encode("utf-16"), "annotation with XML entities"),
        (b"<annotations>{}</annotations>", "XML that is no annotation in VOC's format"),
        (b"{}<unclosed>", "annotation that cannot be read"),
    ],
)
def test_voc_files_of_any_encoding_are_read_and_bombs_are_not(tmp_path, content, fault):
    make(tmp_path, "voc bare")
    text = xml("a", SCENE["a"]).replace("cat", "k\u00fche" if b"8859" in content else "cat")
    encoded = text.encode("latin-1" if b"8859" in content else "utf-8")
    (tmp_path / "Annotations" / "a.xml").write_bytes(content.replace(b"{}", encoded))
    splits, classes, _, faults = read(tmp_path)
    assert faults == ({fault: 1} if fault else {}) and len(splits["train"] + splits["val"]) == (2 if fault else 3)
    assert ("k\u00fche" in classes) == (b"8859" in content)


@pytest.mark.parametrize("size", ["inf", "nan", "-5", "9" * 6000, "wide", ""])
def test_a_size_that_cannot_be_is_none_and_a_box_that_cannot_be_is_named(tmp_path, size):
    make(tmp_path, "voc bare")
    text = xml("a", [("cat", 8, 6, 16, 12), ("dog", 1, 1, 5, 5)]).replace("<xmin>1<", f"<xmin>{size}<")
    write(tmp_path / "Annotations" / "a.xml", text.replace(f"<width>{W}<", f"<width>{size}<"))
    train, val, _, facts = loaded(tmp_path)
    sample = next(s for s in [*train.samples, *val.samples] if s.path.stem == "a")
    assert sample.size == (W, H) and sample.boxes[0].tolist() == [8, 6, 24, 18]
    assert len(sample.boxes) == (2 if size == "-5" else 1) and sum(facts["left_out"].values()) == 1


# ---- objects that are hardly there -----------------------------------------------------------------------------------


def test_tiny_objects_are_trained_on_and_said_aloud(tmp_path, capsys):
    scene = {f"p{i}": [("cat", 40 * i, 100, 15, 15), ("dog", 300, 20, 100, 100)] for i in range(6)}
    table = coco(scene)
    for image in table["images"]:
        image.update(width=600, height=400)
    for name, boxes in scene.items():
        draw(tmp_path / f"{name}.png", boxes, size=(600, 400))
    write(tmp_path / "annotations.json", table)
    train, val, _, facts = loaded(tmp_path, augment=True)
    text = capsys.readouterr().out
    assert f"{len(train)} of {2 * len(train)} train objects are less than 3 pixels wide or high" in text and "(32 x 32)" in text
    kept = [train[(epoch, i)]["target"]["class_labels"].tolist() for epoch in range(20) for i in range(len(train))]
    assert sum(0 in labels for labels in kept) > 0.5 * len(kept) and facts["left_out"] == {}
    assert all((train[(e, i)]["target"]["boxes"][:, 2:] > 0).all() for e in range(20) for i in range(len(train)))


def test_training_data_without_a_box_is_one_line(tmp_path, capsys):
    make(tmp_path, "coco")
    file = tmp_path / "annotations" / "instances_train2017.json"
    write(file, {**coco(), "annotations": []})
    with pytest.raises(UserError, match="none of the 3 training pictures has a box"):
        loaded(tmp_path)
    notes = [{**note, "category_id": 5} for note in coco()["annotations"]]
    write(file, {**coco(), "annotations": notes})
    with pytest.raises(UserError, match="none of the 3 training pictures has a box"):
        loaded(tmp_path)
    assert "left out, box of a category that is not listed (3)" in capsys.readouterr().out  # the cause comes first


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_exif_orientation_follows_the_size_that_the_annotation_claims(tmp_path):
    stored = np.zeros((20, 40, 3), dtype=np.uint8)
    stored[:10, :10] = 255  # white corner, at the top left of what is stored
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turn clockwise
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=turned)
    upright = decode(tmp_path / "turned.png", (20, 40))
    assert upright.shape == (40, 20, 3) and upright[0, -1, 0] == 255 and upright[0, 0, 0] == 0
    assert np.array_equal(decode(tmp_path / "turned.png"), upright)  # YOLO claims no size
    assert np.array_equal(decode(tmp_path / "turned.png", (40, 20)), stored)  # whoever drew the boxes ignored the turn
    with pytest.raises(ValueError, match="another size than its annotation says, \\(20, 40\\) instead of \\(30, 30\\)"):
        decode(tmp_path / "turned.png", (30, 30))


def test_unusual_pictures_have_the_right_pixels(tmp_path):
    color = np.zeros((16, 24, 3), dtype=np.uint8)
    color[:, :12], color[:, 12:] = (250, 10, 20), (10, 200, 30)
    picture = Image.fromarray(color)

    def back(name, image, **options):
        image.save(tmp_path / name, **options)
        return decode(tmp_path / name).astype(int)

    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [Image.new("RGB", (24, 16), c) for c in ("black", "white")]
    assert np.abs(back("a.jpg", picture.convert("CMYK"), quality=100, subsampling=0) - color).max() <= 6
    assert np.abs(back("a.png", palette) - color).max() <= 4
    assert np.abs(back("b.png", picture.convert("RGBA")) - color).max() == 0
    gif = back("a.gif", palette, save_all=True, append_images=frames)
    assert gif.shape == color.shape and np.abs(gif - color).max() <= 4  # the first frame counts
    grey = back("c.png", picture.convert("L"))
    assert grey.shape == color.shape and np.ptp(grey, axis=2).max() == 0
    assert set(np.unique(back("d.png", Image.fromarray(color[:, :, 0] > 100)))) == {0, 255}
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    deep = back("e.png", Image.fromarray(ramp))
    assert deep.shape == (4, 256, 3) and np.abs(deep[0, :, 0] - np.arange(256)).max() <= 1
    assert back("e.tif", Image.fromarray(np.arange(200, dtype=np.int32)[None]))[0, :, 0].tolist() == list(range(200))


def damaged(folder):
    """Files that are no pictures, or only half of one; what each is."""
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "half.jpg", quality=95)
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html><body>404</body></html>")
    Image.fromarray(np.zeros((H, W), dtype=np.float32)).save(folder / "floats.tif")
    Image.fromarray(noise[:, : W // 2]).save(folder / "narrow.png")
    wrong = Image.Exif()
    wrong[0x0112] = 6
    Image.fromarray(noise).save(folder / "exif.jpg", exif=wrong)
    header = (folder / "exif.jpg").read_bytes()
    (folder / "exif.jpg").write_bytes(header.replace(b"\x01\x12\x00\x03\x00\x00\x00\x01", b"\x01\x12\x00\x02\xff\xff\xff\xff"))
    return ["half.jpg", "nothing.jpg", "page.jpg", "floats.tif", "narrow.png"]


def test_broken_pictures_are_left_out_named_and_counted(tmp_path, capsys):
    make(tmp_path, "coco")
    broken = damaged(tmp_path / "train2017")
    table = coco()
    table["images"] += [{"id": 100 + i, "file_name": name, "width": W, "height": H} for i, name in enumerate(broken)]
    table["images"] += [{"id": 200, "file_name": "gone.png", "width": W, "height": H}, {"id": 201, "file_name": "unsized.png"}]
    write(tmp_path / "annotations" / "instances_train2017.json", table)
    train, _, _, facts = loaded(tmp_path)
    assert [s.path.stem for s in train.samples] == ["a", "b", "c"]
    assert facts["left_out"] == {
        "no picture that can be decoded": 2,
        "picture of another size than its annotation says": 1,
        "picture of floating-point numbers": 1,
        "picture that cannot be decoded": 1,
        "picture that is not there": 2,
    }
    text = capsys.readouterr().out
    assert all(name in text for name in [*broken, "gone.png", "unsized.png"])


def test_no_bytes_make_the_decoder_fail_otherwise_than_by_name(tmp_path):
    """A few thousand damaged files: each gives a picture or a ValueError."""
    damaged(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("exif.jpg", "narrow.png"):
        whole = np.frombuffer((tmp_path / name).read_bytes(), dtype=np.uint8)
        for trial in range(400):
            bytes_ = whole.copy()
            bytes_[rng.integers(0, 200 if trial % 2 else len(whole), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode(bytes_[: len(whole) if trial % 5 else rng.integers(1, len(whole))].tobytes()).ndim == 3
            except ValueError:
                pass


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that were decoded, in order."""
    calls = []

    def counting(path, claimed=None):
        calls.append(path.name)
        return decode(path, claimed)

    monkeypatch.setattr(data, "decode", counting)
    return calls


def test_after_the_first_pass_nothing_is_decoded_again(tmp_path, decoded):
    train, val, *_ = loaded(make(tmp_path, "coco"))
    assert sorted(decoded) == ["a.png", "a.png", "b.png", "c.png"]
    for epoch in (1, 2):
        [train[(epoch, i)] for i in range(3)], val[(0, 0)]
    assert len(decoded) == 4


def test_without_cache_each_access_decodes_and_gives_the_same(tmp_path, decoded):
    cached, *_ = loaded(make(tmp_path, "coco"), augment=True)
    train, *_ = loaded(tmp_path, augment=True, cache="off")
    decoded.clear()
    for i in range(3):
        assert torch.equal(train[(4, i)]["pixels"], cached[(4, i)]["pixels"])
    assert decoded == ["a.png", "b.png", "c.png"]
    (tmp_path / "train2017" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="a.png: no picture that can be decoded"):
        train[(0, 0)]


def test_a_second_start_decodes_at_first_use_and_gives_the_same(tmp_path, decoded):
    first, _, _, facts = loaded(make(tmp_path, "coco"), augment=True)
    decoded.clear()
    train, val, _, again = loaded(tmp_path, augment=True)
    assert not decoded and again == facts
    items = train.__getitems__([(1, 0), (1, 2)])
    assert sorted(decoded) == ["a.png", "c.png"]
    for item, index in zip(items, (0, 2), strict=True):
        assert torch.equal(item["pixels"], first[(1, index)]["pixels"])
    [train[(epoch, i)] for epoch in (1, 2) for i in range(3)], val[(0, 0)]
    assert sorted(decoded) == ["a.png", "a.png", "b.png", "c.png"]


def test_what_turns_out_bad_in_training_stops_nothing(tmp_path, decoded):
    make(tmp_path, "coco")
    broken = damaged(tmp_path / "train2017")
    table = coco()
    table["images"] += [{"id": 100 + i, "file_name": name, "width": W, "height": H} for i, name in enumerate(broken)]
    write(tmp_path / "annotations" / "instances_train2017.json", table)
    train, val, _, facts = loaded(tmp_path, augment=True, cache="off")
    assert [s.path.name for s in train.samples] == ["a.png", "b.png", "c.png", "half.jpg", "floats.tif"]
    assert facts["left_out"] == {"no picture that can be decoded": 2, "picture of another size than its annotation says": 1}
    assert decoded == ["a.png"]  # the validation picture
    items = {epoch: train[(epoch, 3)] for epoch in (1, 2, 3, 4)}
    for epoch, item in items.items():
        assert torch.equal(item["pixels"], train[(epoch, 3)]["pixels"]) and int(item["target"]["image_id"]) == 3
    assert {len(item["target"]["class_labels"]) for item in items.values()} <= {0, 1, 2}
    faults = train.new_faults()
    assert (str(tmp_path / "train2017" / "half.jpg"), "picture that cannot be decoded") in [
        (path, fault.partition(",")[0]) for path, fault in faults
    ]
    with pytest.raises(UserError, match="half.jpg: picture that cannot be decoded"):
        train[(0, 3)]


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


def test_the_header_of_every_kind_of_picture_says_the_size_that_decoding_gives(tmp_path):
    picture, number = Image.fromarray(np.zeros((6, 9, 3), dtype=np.uint8)), 0
    for ending in ("jpg", "png", "webp", "tif", "bmp", "gif"):
        for orientation in (None, 1, 3, 5, 6, 8, 99):
            exif = Image.Exif()
            exif[0x0112] = orientation or 1
            options = {"exif": exif} if orientation and ending not in ("bmp", "gif") else {}
            path = tmp_path / f"{number}.{ending}"
            picture.save(path, **options)
            for claimed in (None, (9, 6), (6, 9), (5, 5)):
                by_header = outcome(lambda path, claim: header_size(read_header(path), claim), path, claimed)
                by_pixels = outcome(lambda path, claim: decode(path, claim).shape[1::-1], path, claimed)
                assert by_header == by_pixels, (ending, orientation, claimed)
            number += 1
    # A PNG may carry its orientation behind the pixels.
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=turned)
    whole = (tmp_path / "turned.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    length = int.from_bytes(whole[start : start + 4], "big") + 12
    chunk, end = whole[start : start + length], whole.index(b"IEND") - 4
    (tmp_path / "turned.png").write_bytes(whole[:start] + whole[start + length : end] + chunk + whole[end:])
    assert decode(tmp_path / "turned.png").shape == (9, 6, 3) and read_header(tmp_path / "turned.png") == (9, 6, 6)


def test_a_picture_is_what_its_bytes_say_and_no_other_program_is_started(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *command, **_: started.append(command))
    monkeypatch.setattr("subprocess.run", lambda *command, **_: started.append(command))
    for name in ("a.jpg", "b.eps"):
        path = tmp_path / name
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
        for look in (decode, read_header):
            with pytest.raises(ValueError, match="no picture that can be decoded"):
                look(path)
    Image.new("RGB", (4, 3)).save(tmp_path / "png.jpg", format="PNG")
    assert decode(tmp_path / "png.jpg").shape == (3, 4, 3) and not started


def test_the_cache_respects_its_limit(tmp_path, decoded):
    splits, *_ = read(make(tmp_path, "coco"))
    picture = 3 * 32 * 32
    for limit, kept in ((0, 0), (picture - 1, 0), (2 * picture, 2), (9 * picture, 3)):
        _, cache, _ = check_samples(splits["train"], Preprocess(processor()), Faults(), limit, "test")
        assert cache.kept == kept and cache.bytes <= limit


# ---- augmentation ----------------------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    make(tmp_path, "coco")
    first, *_ = loaded(tmp_path, augment=True)
    again, *_ = loaded(tmp_path, augment=True)
    other, *_ = loaded(tmp_path, augment=True, seed=1)
    torch.manual_seed(5)
    want = first[(3, 0)]
    again[(1, 2)], torch.rand(7)  # another history
    state = torch.get_rng_state()
    got = again[(3, 0)]
    assert torch.equal(got["pixels"], want["pixels"]) and torch.equal(got["target"]["boxes"], want["target"]["boxes"])
    assert torch.equal(torch.get_rng_state(), state)  # it leaves no trace in torch's own generator
    assert not torch.equal(first[(4, 0)]["pixels"], want["pixels"]) and not torch.equal(other[(3, 0)]["pixels"], want["pixels"])


def test_batches_are_the_same_with_and_without_workers(tmp_path):
    train, *_ = loaded(make(tmp_path, "coco"), augment=True)

    def batches(workers):
        sampler = EpochBatches(len(train), 2, 0)
        sampler.set_range(2, 0, 9)
        return list(build_loader(train, sampler, collate, workers))

    for mine, theirs in zip(batches(0), batches(2), strict=True):
        assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
        for a, b in zip(mine["labels"], theirs["labels"], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_no_more_workers_than_batches(tmp_path):
    train, *_ = loaded(make(tmp_path, "coco"))
    sampler = EpochBatches(len(train), len(train), 0)
    assert build_loader(train, sampler, collate, 128).num_workers == len(sampler) == 1


@pytest.mark.parametrize("size", [{"height": 96, "width": 96}, {"shortest_edge": 80, "longest_edge": 200}])
def test_boxes_follow_their_pixels_through_augmentation(tmp_path, size):
    """A black picture with a white rectangle: wherever flips and crops take it, the box fits the bright pixels."""
    path = draw(tmp_path / "a.png", [("cat", 37, 21, 50, 31)], size=(160, 100))
    sample = make_sample(path, (160, 100), [(37, 21, 87, 52, 0, False, 0)])
    preprocess = Preprocess(processor(size=size, do_normalize=False))
    samples, cache, _ = check_samples([sample], preprocess, Faults(), 10**6, "test")
    moved = DetectionData(samples, preprocess, cache, augment=True)
    seen, plain = set(), DetectionData(samples, preprocess, cache)
    for epoch in range(200):
        item = moved[(epoch, 0)]
        h, w = item["pixels"].shape[1:]
        bright = item["pixels"].amax(dim=0) > 0.5 * item["pixels"].amax()
        if not item["target"]["boxes"].numel():
            assert bright.any(dim=0).sum() <= 5 or bright.any(dim=1).sum() <= 5  # a sliver at the rim
            continue
        x, y, bw, bh = (item["target"]["boxes"][0] * torch.tensor([w, h, w, h])).tolist()
        columns, rows = (torch.nonzero(bright.any(dim=d)).flatten() for d in (0, 1))
        fits = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        for have, want in zip((x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2), fits, strict=True):
            assert abs(have - want) < 1.5, (epoch, have, want)
        seen.add((round(x), round(bw)))
    assert len(seen) > 20
    assert all(torch.equal(plain[(e, 0)]["pixels"], plain[(0, 0)]["pixels"]) for e in range(5))


def test_evaluation_and_augment_off_see_the_plain_picture(tmp_path):
    _, val, *_ = loaded(make(tmp_path, "coco"), augment=True)
    train, *_ = loaded(tmp_path)
    for dataset in (val, train):
        assert torch.equal(dataset[(0, 0)]["pixels"], dataset[(7, 0)]["pixels"])
    assert torch.equal(val[(0, 0)]["pixels"], train[(0, 0)]["pixels"])


# ---- what the model is given -----------------------------------------------------------------------------------------


def random_picture(rng, height, width):
    coarse = rng.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "kind, size",
    [
        ("DetrImageProcessor", {"height": 64, "width": 80}),
        ("DetrImageProcessor", {"shortest_edge": 60, "longest_edge": 100}),
        ("DeformableDetrImageProcessor", {"shortest_edge": 64, "longest_edge": 90}),
        ("RTDetrImageProcessor", {"height": 64, "width": 64}),
    ],
)
def test_preprocessing_is_that_of_the_bases_own_image_processor(kind, size):
    import transformers

    own = getattr(transformers, kind)(size=size, do_pad=False)
    mine, rng = Preprocess(own), np.random.default_rng(0)
    for height, width in ((50, 90), (90, 50), (64, 64), (200, 40), (121, 77), (60, 60), (60, 70), (33, 301), (75, 124)):
        pixels = random_picture(rng, height, width)
        theirs = own(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        ours = mine.normalize(mine.resize(pixels))
        assert ours.shape == theirs.shape, (height, width)
        step = 1 / 255 / min(own.image_std) if own.do_normalize else 1 / 255
        assert (ours - theirs).abs().max() <= 1.01 * step


def test_a_very_long_picture_still_has_a_size():
    preprocess = Preprocess(processor(size={"shortest_edge": 60, "longest_edge": 100}))
    height, width = preprocess.target_size(1, 5000)
    assert height >= 1 and width >= 1 and preprocess.resize(np.zeros((1, 5000, 3), np.uint8)).shape == (3, height, width)


def test_labels_are_what_the_bases_own_processor_makes(tmp_path):
    train, *_ = loaded(make(tmp_path, "coco"))
    notes = [n for n in coco()["annotations"] if n["image_id"] == 0]
    picture = Image.open(tmp_path / "train2017" / "a.png")
    theirs = processor()(picture, annotations={"image_id": 0, "annotations": notes}, return_tensors="pt")["labels"][0]
    ours = train[(0, 0)]["target"]
    torch.testing.assert_close(ours["boxes"], theirs["boxes"])
    assert ours["orig_size"].tolist() == theirs["orig_size"].tolist() == [H, W]
    assert ours["class_labels"].tolist() == [0, 1]  # theirs keeps the file's category ids, which count from 1


def test_collate_pads_at_the_right_and_below_and_says_where():
    items = [{"pixels": torch.full((3, h, w), 1.0), "target": {"n": i}} for i, (h, w) in enumerate([(4, 6), (5, 3)])]
    batch = collate(items)
    assert batch["pixel_values"].shape == (2, 3, 5, 6) and batch["pixel_mask"].dtype == torch.long
    for i, (h, w) in enumerate([(4, 6), (5, 3)]):
        expected = torch.zeros(5, 6)
        expected[:h, :w] = 1
        assert torch.equal(batch["pixel_mask"][i].float(), expected) and torch.equal(batch["pixel_values"][i, 0], expected)
    assert [label["n"] for label in batch["labels"]] == [0, 1]


def test_boxes_given_to_the_model_lie_in_the_unit_square(tmp_path):
    scene = {"a": [("cat", -5, -5, 200, 200), ("dog", 63, 47, 1, 1)], "b": [("dog", 0, 0, W, H)], "c": []}
    make(tmp_path, "coco")
    write(tmp_path / "annotations" / "instances_train2017.json", coco(scene))
    for augment in (False, True):
        train, *_ = loaded(tmp_path, augment=augment)
        for key in [(e, i) for e in range(10) for i in range(3)]:
            boxes = train[key]["target"]["boxes"]
            corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2])
            assert boxes.dtype == torch.float32 and torch.all((corners > -1e-6) & (corners < 1 + 1e-6))
            assert torch.all(boxes[:, 2:] > 0)


# ---- data for eval ---------------------------------------------------------------------------------------------------


def test_eval_matches_classes_by_name_and_refuses_others(tmp_path):
    make(tmp_path, "coco")
    origin = {"classes": ["dog", "bird", "cat"], "data_dir": str(tmp_path), "data_format": "auto", "seed": 0, "image_size": 0}
    config = settings("", split="val")
    loader, classes, _ = load_for_eval(config, processor(), origin)
    assert classes == ["dog", "bird", "cat"] and loader.dataset.samples[0].labels.tolist() == [2, 0]
    with pytest.raises(UserError, match="has no test split; it has train, val"):
        load_for_eval(settings("", split="test"), processor(), origin)
    with pytest.raises(UserError, match="classes that the checkpoint does not know: dog; it knows cat"):
        load_for_eval(settings(tmp_path, split="val"), processor(), {**origin, "classes": ["cat"]})


def test_a_split_without_a_usable_picture_is_an_error(tmp_path):
    make(tmp_path, "coco")
    (tmp_path / "val2017" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="the val split has no picture that can be used"):
        loaded(tmp_path)
    shutil.rmtree(tmp_path / "train2017")
    with pytest.raises(UserError, match="has no training pictures"):
        loaded(tmp_path)


# ---- what looks wrong in all files together --------------------------------------------------------------------------


def many(count=12):
    """Scene of two boxes a picture, all over it: as x, y, w, h."""
    return {f"p{i}": [("cat", 2 + i, 2 + i, 12 + i, 10), ("dog", 20 + i, 8 + i, 20, 14)] for i in range(count)}


def changed_coco(folder, change, scene=None):
    """The folder with COCO annotations whose bboxes change(x, y, w, h) gives."""
    content = coco(scene or many())
    for note in content["annotations"]:
        note["bbox"] = change(*note["bbox"])
    pictures(folder, scene or many())
    write(folder / "annotations.json", content)
    return folder


def test_fractions_are_brought_into_pixels_in_any_format(tmp_path, capsys):
    plain, *_ = loaded(changed_coco(tmp_path / "pixels", lambda *box: box))
    assert "are fractions" not in capsys.readouterr().out
    train, *_, facts = loaded(changed_coco(tmp_path / "shares", lambda x, y, w, h: (x / W, y / H, w / W, h / H)))
    assert "shares, train: boxes from 0 to 1 are fractions" in capsys.readouterr().out and facts["left_out"] == {}
    for one, other in zip(plain.samples, train.samples, strict=True):
        assert np.allclose(one.boxes, other.boxes) and np.allclose(other.area, (other.boxes[:, 2:] - other.boxes[:, :2]).prod(1))


def test_pixels_in_yolo_are_refused(tmp_path):
    pictures(tmp_path / "images" / "train", many())
    for name, boxes in many().items():
        lines = [f"{'cat dog'.split().index(n)} {x + w / 2} {y + h / 2} {w} {h}" for n, x, y, w, h in boxes]
        write(tmp_path / "labels" / "train" / f"{name}.txt", "\n".join(lines))
    write(tmp_path / "data.yaml", "names: [cat, dog]\n")
    with pytest.raises(UserError, match="of .. train boxes have no area inside their pictures; expected .* fractions"):
        loaded(tmp_path)


def test_corners_in_place_of_sides_are_said(tmp_path, capsys):
    loaded(changed_coco(tmp_path / "right", lambda *box: box))
    assert "reach beyond" not in capsys.readouterr().out
    loaded(changed_coco(tmp_path / "corners", lambda x, y, w, h: (x, y, x + w, y + h)))
    assert "train boxes reach beyond their pictures: are they x, y, width, height" in capsys.readouterr().out


def test_a_box_that_is_given_twice_counts_once(tmp_path):
    make(tmp_path, "coco")
    content = coco()
    content["annotations"] += [{**note, "id": 1} for note in content["annotations"]]
    write(tmp_path / "annotations" / "instances_train2017.json", content)
    train, *_, facts = loaded(tmp_path)
    single = len(coco()["annotations"])
    assert sum(len(s.boxes) for s in train.samples) == single and facts["left_out"] == {"box that is given twice": single}


def test_classes_that_training_lacks_or_names_twice_are_said(tmp_path, capsys):
    make(tmp_path, "coco")
    content = coco({"a": SCENE["a"]})
    content["categories"].append({"id": 77, "name": "cow"})
    content["annotations"][0]["category_id"] = 77
    write(tmp_path / "annotations" / "instances_val2017.json", content)
    *_, facts = loaded(tmp_path)
    assert facts["left_out"] == {"box of a class that the training data has not": 1}
    content = coco()
    content["categories"] += [{"id": 77, "name": "cow"}, {"id": 78, "name": "Cat"}]
    write(tmp_path / "annotations" / "instances_train2017.json", content)
    loaded(tmp_path)
    out = capsys.readouterr().out
    assert "no training picture has a box of cow, Cat (2 of 4 classes)" in out
    assert "classes whose names are nearly the same (1): cat and Cat" in out


def test_yolo_pictures_and_labels_without_each_other_are_counted(tmp_path, capsys):
    make(tmp_path, "yolo")
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    write(tmp_path / "labels" / "train" / "gone.txt", "0 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "labels" / "train" / "classes.txt", "cat\ndog\n")
    shutil.copy(tmp_path / "images" / "train" / "b.png", tmp_path / "images" / "train" / "b.bmp")
    *_, facts = loaded(tmp_path)
    out = capsys.readouterr().out
    assert facts["left_out"] == {"label file without a picture": 1}
    assert "picture without a label file, which counts as one without objects (2): a.png, c.png" in out
    assert "label file of several pictures (1): b.txt (b.bmp, b.png)" in out


@pytest.mark.parametrize("place", ["images", "obj_{}_data"])
def test_lists_and_folders_named_after_splits_need_no_yaml(tmp_path, place):
    for split, scene in (("train", SCENE), ("valid", {"v": SCENE["a"]})):
        folder = tmp_path / place.format(split)
        pictures(folder, scene), labels(folder if "obj" in place else tmp_path / "labels", scene)
        write(tmp_path / f"{split}.txt", "".join(f"data/{folder.name}/{name}.png\n" for name in scene))
    write(tmp_path / "obj.names", "cat\ndog\n")
    splits, *_ = read(tmp_path)
    assert {split: [s.path.stem for s in mine] for split, mine in splits.items()} == {"train": ["a", "b", "c"], "val": ["v"]}
    assert len(splits["val"][0].boxes) == len(SCENE["a"])


def test_one_file_for_all_splits_keeps_what_was_held_out(tmp_path):
    scene = {f"{split}/{name}": boxes for split in ("train", "val") for name, boxes in SCENE.items()}
    pictures(tmp_path, scene)
    write(tmp_path / "labels.json", coco(scene))
    splits, *_ = read(tmp_path)
    assert {split: {s.path.parent.name for s in mine} for split, mine in splits.items()} == {"train": {"train"}, "val": {"val"}}


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.json", '{"shapes": [], "imagePath": "a.png"}', "LabelMe's JSON"),
        ("via.json", '{"a": {"regions": [{"shape_attributes": {}}]}}', "VGG Image Annotator's own JSON"),
        ("ds/ann/a.png.json", '{"objects": [{"classTitle": "cat"}]}', "Supervisely's JSON"),
        ("project.json", '[{"annotations": [{"result": []}], "data": {}}]', "Label Studio's own JSON"),
        ("annotations/default.json", '{"categories": {}, "items": []}', "Datumaro's JSON"),
        ("train/_annotations.createml.json", '[{"annotations": [{"coordinates": {}}]}]', "CreateML's JSON"),
        ("labels.json", '{"classes": ["cat"], "labels": {}}', "FiftyOne's own JSON"),
        ("annotations.xml", "<annotations><version>1.1</version></annotations>", "CVAT's own XML"),
        ("train.csv", 'image_id,width,height,bbox\na,9,9,"[1, 2, 3, 4]"\n', "a table of boxes"),
        ("train/_annotations.csv", "filename,class,xmin,ymin,xmax,ymax\n", "a table of boxes"),
    ],
)
def test_formats_of_other_programs_are_called_by_their_name(tmp_path, name, content, told):
    pictures(tmp_path / "images")
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{Path(name).name} looks like {told}|it looks like {told}") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_around_the_data_is_looked_into_and_an_archive_is_called_one(tmp_path):
    for layout in ("coco", "yolo"):
        make(tmp_path / layout / "export", layout)
        assert len(read(tmp_path / layout)[0]["train"]) == 3
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="there is no folder .*data.zip: it is a file; unpack archives"):
        read(tmp_path / "data.zip")
