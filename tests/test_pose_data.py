"""Pose data: COCO and CSV give the same samples, bad input is named, and keypoints stay on their pixels."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import POSE, use_task
from PIL import Image

TASK = POSE
use_task(TASK)

import data  # noqa: E402
from common.batches import EpochBatches, build_loader, seeded  # noqa: E402
from common.config import UserError  # noqa: E402
from common.samples import Faults  # noqa: E402
from common.vision.pictures import decode  # noqa: E402
from crops import PADDING, crop_matrix, extent, random_change  # noqa: E402
from data import Preprocess, build_loaders, check_samples, collate, figures_only, load_for_eval, read_tables  # noqa: E402
from figure_boxes import place_boxes  # noqa: E402
from formats import read_dataset  # noqa: E402
from keypoints import UNIFORM_SIGMA, flip_pairs_from_names  # noqa: E402

NAMES = ["nose", "left_hand", "right_hand"]
W, H = 64, 48
# Three pictures of 64 x 48 with a figure each: nose, left hand, right hand as (x, y).
SCENE = {"a": [(20, 10), (12, 24), (30, 22)], "b": [(40, 30), (33.5, 40), (50.25, 38)], "c": [(30, 8), (22, 20), (41, 21)]}


def settings(folder, **changes):
    values = {"data_dir": str(folder), "data_format": "auto", "augment": False, "cache": "auto", "seed": 0}
    return SimpleNamespace(**{**values, "batch_size": 2, "num_workers": 0, **changes})


def preprocess(height=32, width=32):
    return Preprocess(SimpleNamespace(do_normalize=False), (height, width))


def draw(path, points=(), size=(W, H), spread=1.2, **options):
    """A black picture with a soft bright dot at every point: the first blue, then red and green by turns."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.zeros((size[1], size[0], 3))
    for k, (px, py) in enumerate(points):
        pixels[:, :, (2, 0, 1)[k if k == 0 else 1 + (k + 1) % 2]] += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * spread**2))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(path, **options)
    return path


def box_of(points, margin=4):
    low, high = np.min(points, axis=0) - margin, np.max(points, axis=0) + margin
    return [float(v) for v in (*low, *(high - low))]


def coco(scene=SCENE, names=NAMES, ending="png", **category):
    images = [{"id": 10 + i, "file_name": f"{name}.{ending}", "width": W, "height": H} for i, name in enumerate(scene)]
    notes = []
    for i, points in enumerate(scene.values()):
        keypoints = [value for x, y in points for value in (x, y, 2)]
        box = box_of(points)
        notes.append({"id": 100 + i, "image_id": 10 + i, "category_id": 7, "keypoints": keypoints, "num_keypoints": len(points)})
        notes[-1].update(bbox=box, area=0.5 * box[2] * box[3], iscrowd=0)
    category = {"id": 7, "name": "figure", "keypoints": list(names), "skeleton": [[1, 2], [1, 3]], **category}
    return {"images": images, "annotations": notes, "categories": [category]}


def table(scene=SCENE, header="image,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", ending="png"):
    rows = [",".join([f"{name}.{ending}", *(str(v) for point in points for v in point)]) for name, points in scene.items()]
    return "\n".join([header, *rows] if header else rows) + "\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


LAYOUTS = {  # where the training annotations lie, where their pictures, and the same for validation where there is any
    "coco": ("annotations/person_keypoints_train2017.json", "train2017", "annotations/person_keypoints_val2017.json", "val2017"),
    "coco, images/": ("annotations/train.json", "images/train", "annotations/val.json", "images/val"),
    "coco, roboflow": ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
    "coco, flat": ("figures_train.json", "images", "figures_val.json", "images"),
    "coco, single": ("annotations.json", "images", None, None),
    "coco, cvat": (
        "annotations/person_keypoints_Train.json",
        "images/Train",
        "annotations/person_keypoints_Val.json",
        "images/Val",
    ),
    "coco, cvat subset": ("annotations/person_keypoints_default.json", "images/default", None, None),
    "coco, fiftyone": ("train/labels.json", "train/data", "val/labels.json", "val/data"),
    "coco, fiftyone single": ("labels.json", "data", None, None),
    "coco, upper case": ("Training/keypoints.coco.JSON", "Training/images", "VALID/a.json", "VALID/images"),
    "csv": ("train.csv", "train", "val.csv", "val"),
    "csv, frames": ("training_frames_keypoints.csv", "training", "validation_frames_keypoints.csv", "validation"),
    "csv, images/": ("figures_train.csv", "images/train", "figures_valid.csv", "images/valid"),
    "csv, single": ("points.csv", "images", None, None),
    "csv, flat": ("points.csv", ".", None, None),
}


def make(folder, layout="coco", content=None, val=None):
    """Writes SCENE as training data, and its picture `a` as validation data where the layout has a place for it."""
    train_file, train_place, val_file, val_place = LAYOUTS[layout]
    for file, place, scene in ((train_file, train_place, SCENE), (val_file, val_place, {"a": SCENE["a"]})):
        if file:
            write(folder / file, (coco if file.lower().endswith("json") else table)(scene))
            for name, points in scene.items():
                draw(folder / place / f"{name}.png", points)
    if layout == "coco":  # annotations for COCO's other tasks lie in the same folder
        for other in ("captions", "instances"):
            write(folder / "annotations" / f"{other}_train2017.json", {"images": [], "annotations": []})
    if content is not None:
        write(folder / train_file, content)
    if val is not None:
        write(folder / val_file, val)
    return folder


def read(folder, **changes):
    faults = Faults()
    splits, points, layout = read_dataset(folder, changes.get("data_format", "auto"), changes.get("seed", 0), faults)
    return splits, points, layout, faults.counts()


def loaded(folder, size=(32, 32), **changes):
    """(training data set, validation data set, KeypointSet, facts for the summary)."""
    config = settings(folder, **changes)
    tables = read_tables(config.data_dir, config.data_format, config.seed)
    train, val, points, facts = build_loaders(config, preprocess(*size), tables)
    return train.dataset, val.dataset, points, facts


def one_line(call, told):
    with pytest.raises(UserError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path, layout, capsys):
    train, val, points, facts = loaded(make(tmp_path, layout))
    single = LAYOUTS[layout][2] is None
    assert points.names == NAMES and points.named and points.flip_pairs == [(1, 2)] and points.sigmas == [UNIFORM_SIGMA] * 3
    assert facts["left_out"] == {} and facts["format"] == layout[: len(facts["format"])]
    samples = {s.path.stem: s for s in [*train.samples, *(val.samples if single else [])]}
    assert sorted(samples) == ["a", "b", "c"] and facts["train"] + facts["val"] == (3 if single else 4)
    for name, places in SCENE.items():
        sample = samples[name]
        np.testing.assert_allclose(sample.points, places, atol=1e-9)
        assert sample.labelled.all()
        if layout.startswith("coco"):
            assert sample.box.tolist() == box_of(places) and sample.area == 0.5 * sample.box[2] * sample.box[3]
        else:
            assert sample.box is None and math.isnan(sample.area)
    out = capsys.readouterr().out
    assert ("no validation split" in out) == single and f"OKS with sigma {UNIFORM_SIGMA} for every keypoint" in out
    assert points.skeleton == ([(0, 1), (0, 2)] if layout.startswith("coco") else [])
    if not single:
        assert [s.path.parent for s in val.samples] == [tmp_path / LAYOUTS[layout][3]]


@pytest.mark.parametrize("layout", ["coco, single", "csv, single"])
def test_a_held_out_fifth_is_the_same_each_time_and_adding_pictures_moves_no_other(tmp_path, layout, capsys):
    def split(names, seed=0):
        scene = {name: SCENE["b"] for name in names}
        write(tmp_path / LAYOUTS[layout][0], (coco if "coco" in layout else table)(scene))
        splits, *_ = read(tmp_path, seed=seed)
        return {part: {s.path.stem for s in splits[part]} for part in ("train", "val")}

    names = [f"p{i:03d}" for i in range(110)]
    for name in names:
        draw(tmp_path / "images" / f"{name}.png", size=(4, 4))
    first = split(names[:100])
    assert f"{len(first['val'])} of 100 training pictures, chosen by seed 0, become it" in capsys.readouterr().out
    assert first == split(names[:100]) and first["train"].isdisjoint(first["val"]) and 10 <= len(first["val"]) <= 30
    assert len(first["train"] | first["val"]) == 100 and first["val"] != split(names[:100], seed=1)["val"]
    more = split(names)
    assert first["val"] <= more["val"] and first["train"] <= more["train"]
    for few in ([2, 3], [5, 6, 7]):  # neither side stays empty
        small = split([names[i] for i in few])
        assert small["train"] and small["val"]
    one_line(lambda: split(names[:1]), "no validation split, and too few training pictures to hold any out: 1")


def test_the_figures_of_one_picture_stay_on_one_side(tmp_path):
    scene = {f"p{i}": SCENE["b"] for i in range(12)}
    content = coco(scene)
    content["annotations"] += [{**note, "id": 500 + i, "bbox": [1, 2, 3, 4]} for i, note in enumerate(content["annotations"])]
    write(tmp_path / "annotations.json", content)
    for name in scene:
        draw(tmp_path / "images" / f"{name}.png", size=(4, 4))
    splits, *_ = read(tmp_path)
    sides = [{s.path.name for s in splits[part]} for part in ("train", "val")]
    assert sides[0].isdisjoint(sides[1]) and len(splits["train"]) + len(splits["val"]) == 24


def test_a_picture_of_both_splits_is_said_aloud(tmp_path, capsys):
    loaded(make(tmp_path / "shared", "coco, flat"))  # one folder of pictures, and both files list a.png
    assert "trained on and validated on, so that the metrics flatter (1): a.png" in capsys.readouterr().out
    loaded(make(tmp_path / "apart", "coco"))
    assert "trained on and validated on" not in capsys.readouterr().out


def test_trainval_is_no_validation_split(tmp_path, capsys):
    scene = {f"p{i}": SCENE["b"] for i in range(8)}
    for name in scene:
        draw(tmp_path / "images" / f"{name}.png", size=(4, 4))
    write(tmp_path / "annotations" / "trainval.json", coco(scene))
    splits, *_ = read(tmp_path)
    assert {s.path for s in splits["train"]}.isdisjoint(s.path for s in splits["val"])
    assert "no validation split" in capsys.readouterr().out


def test_a_folder_of_two_layouts_or_of_none_asks_for_the_format(tmp_path):
    both = make(make(tmp_path / "both", "coco"), "csv")
    one_line(lambda: read(both), "looks like coco and csv; .*--data_format chooses one")
    for layout in ("coco", "csv"):
        assert read(both, data_format=layout)[2] == layout
    only = make(tmp_path / "only", "csv")
    one_line(lambda: read(only, data_format="coco"), "--data_format coco: .* does not have that layout")
    (tmp_path / "empty").mkdir()
    one_line(lambda: read(tmp_path / "empty"), "is none of the layouts that are known; expected COCO .*CSV")
    one_line(lambda: read(tmp_path / "nowhere"), "there is no folder")


# ---- names, pairs, sigmas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["nose", "left_eye", "right_eye"], [(1, 2)]),
        (["right_eye", "nose", "left_eye"], [(0, 2)]),
        (["LeftHand", "RightHand", "Head"], [(0, 1)]),
        (["leftHand", "head", "rightHand", "rightFoot", "leftFoot"], [(0, 2), (3, 4)]),
        (["L_eye", "R_eye"], [(0, 1)]),
        (["eye.l", "eye.r", "lip", "roof"], [(0, 1)]),
        (["LEFT-EYE", "RIGHT-EYE"], [(0, 1)]),
        (["hand left", "hand right", "tail"], [(0, 1)]),
        (["left_eye", "right_eye", "left_ear"], []),  # one without its partner: nothing can be mirrored
        (["nose", "tail"], []),
        (["nostril", "collar"], []),  # an l or r at the end of a word is no side
        (["lefteye", "nose", "righteye", "earleft", "earright"], [(0, 2), (3, 4)]),
        (["LEye", "REye", "lank", "rank", "kneel", "kneer"], [(0, 1), (2, 3), (4, 5)]),
        (["lip", "rump", "tail"], []),  # nor where no partner is there
        (["left_eye", "right_eye", "lefty"], [(0, 1)]),
        (["left_left", "right_right", "left_right"], []),
        (["0", "1"], []),
    ],
)
def test_left_and_right_are_read_from_names(names, pairs):
    assert flip_pairs_from_names(names) == pairs


def test_coco_gives_skeleton_flip_pairs_and_sigmas_counted_from_one(tmp_path, capsys):
    own = {"flip_pairs": [[3, 2]], "sigmas": [0.1, 0.2, 0.3], "skeleton": [["nose", "left_hand"], [2, 3]]}
    content = coco(names=["a", "b", "c"], **own)
    content["categories"][0]["skeleton"] = [["a", "b"], [2, 3]]
    val = copy.deepcopy(content)
    points = read(make(tmp_path, content=content, val=val))[1]
    assert points.names == ["a", "b", "c"] and points.flip_pairs == [(2, 1)]
    assert points.skeleton == [(0, 1), (1, 2)] and points.sigmas == [0.1, 0.2, 0.3]
    assert "sigma" not in capsys.readouterr().out
    json_facts = points.to_json()
    assert json_facts["skeleton"] == [[1, 2], [2, 3]] and json_facts["flip_pairs"] == [[3, 2]]
    assert type(points).from_json(json.loads(json.dumps(json_facts))) == points


@pytest.mark.parametrize(
    "skeleton, lines",
    [
        ([[0, 1], [0, 2]], [(0, 1), (0, 2)]),  # counted from 0
        ([[1, 2], [1, 3]], [(0, 1), (0, 2)]),
        ([["nose", "left_hand"]], [(0, 1)]),
        (None, []),
        ([[0, 3]], None),
        ([[1]], None),
        ([[1, 9]], None),
        ([["nose", "tail"]], None),
        ({"a": 1}, None),
        ("nose", None),
        (7, None),
    ],
)
def test_a_skeleton_may_count_from_zero_and_one_that_makes_no_sense_is_not_drawn(tmp_path, skeleton, lines, capsys):
    content = coco(skeleton=skeleton)
    splits, points, *_ = read(make(tmp_path, content=content, val=content))
    assert points.skeleton == (lines or []) and len(splits["train"]) == 3
    assert ("no skeleton is drawn: " in capsys.readouterr().out) == (lines is None)


def test_what_a_mirrored_picture_swaps_is_said_once(tmp_path, capsys):
    read(make(tmp_path))
    assert capsys.readouterr().out.count("a mirrored picture swaps, by their names: left_hand and right_hand\n") == 1
    content = coco(flip_pairs=[[1, 3]])
    read(make(tmp_path, content=content, val=content))
    assert "a mirrored picture swaps, as the data says: nose and right_hand" in capsys.readouterr().out


def test_cocos_seventeen_names_have_cocos_sigmas(tmp_path, capsys):
    from pycocotools.cocoeval import Params

    from keypoints import COCO_NAMES

    scene = {"a": [(5 + i, 6 + i) for i in range(17)]}
    content = coco(scene, names=COCO_NAMES)
    content["categories"][0]["keypoints"] = [name.replace("nose", "Nose") for name in COCO_NAMES]
    points = read(make(tmp_path, content=content, val=content))[1]
    assert points.sigmas == pytest.approx(Params("keypoints").kpt_oks_sigmas.tolist())
    assert len(points.flip_pairs) == 8 and "OKS with COCO's own sigmas" in capsys.readouterr().out


@pytest.mark.parametrize(
    "category, told",
    [
        ({"flip_pairs": [[1, 4]]}, "\\[1, 4\\] is no pair of keypoints"),
        ({"flip_pairs": [[0, 1]]}, "is no pair of keypoints"),  # they count from 1
        ({"flip_pairs": [[1, 1]]}, "is no pair of keypoints"),
        ({"flip_pairs": [[1, 2], [2, 3]]}, "flip_pairs names a keypoint twice"),
        ({"flip_pairs": [["nose", "tail"]]}, "is no pair of keypoints"),
        ({"flip_pairs": [[1, 2, 3]]}, "is no pair of keypoints"),
        ({"flip_pairs": 7}, "7 is no list of pairs of keypoints"),
        ({"sigmas": [0.1]}, "1 sigmas for 3 keypoints"),
        ({"sigmas": [0.1, 0, 0.1]}, "there must be a positive one for each"),
        ({"sigmas": [0.1, math.nan, 0.1]}, "there must be a positive one for each"),
        ({"sigmas": ["a", "b", "c"]}, "sigmas must be numbers"),
        ({"sigmas": 0.1}, "sigmas"),
        ({"keypoints": ["nose", "hand", "hand"]}, "two keypoints are called 'hand'"),
        ({"keypoints": []}, "no category has a list of keypoints; are these annotations of boxes only"),
        ({"keypoints": "nose"}, "no category has a list of keypoints"),
    ],
)
def test_what_coco_says_of_its_keypoints_is_checked(tmp_path, category, told):
    content = {**coco(), "categories": [{**coco()["categories"][0], **category}]}
    one_line(lambda: read(make(tmp_path, content=content, val=content)), told)


def test_categories_with_the_same_keypoints_are_one_and_others_are_an_error(tmp_path):
    content = coco()
    content["categories"] += [{"id": 8, "name": "ghost", "keypoints": NAMES}, {"id": 9, "name": "chair"}]
    for note, category in zip(content["annotations"], (8, 7, 9), strict=True):
        note["category_id"] = category
    splits, points, _, faults = read(make(tmp_path, content=content))
    assert [s.path.stem for s in splits["train"]] == ["a", "b"] and points.names == NAMES
    assert faults == {"annotation of a category without keypoints": 1}
    content["categories"][1]["keypoints"] = ["nose", "tail"]
    one_line(lambda: read(make(tmp_path, content=content)), "'figure' and 'ghost' have different keypoints; one model knows one")
    val = coco({"a": SCENE["a"]}, names=["nose", "left_hand", "right_foot"])
    one_line(lambda: read(make(tmp_path, content=coco(), val=val)), "person_keypoints_val2017.json has other keypoints")


def test_a_keypoints_json_beside_the_data_adds_what_the_data_lacks(tmp_path, capsys):
    make(tmp_path, "csv", content=table(header=",0,1,2,3,4,5"), val=table({"a": SCENE["a"]}, header=",0,1,2,3,4,5"))
    points = read(tmp_path)[1]
    assert points.names == ["0", "1", "2"] and not points.named and points.flip_pairs == []
    assert "no mirrored pictures in training" in capsys.readouterr().out
    facts = {"names": ["head", "l hand", "r hand"], "skeleton": [["head", "l hand"]], "sigmas": [0.1, 0.2, 0.3]}
    write(tmp_path / "keypoints.json", facts)
    points = read(tmp_path)[1]
    assert points.names == facts["names"] and points.named and points.skeleton == [(0, 1)] and points.flip_pairs == [(1, 2)]
    assert points.sigmas == [0.1, 0.2, 0.3] and "no mirrored" not in capsys.readouterr().out
    write(tmp_path / "keypoints.json", {"flip_pairs": [[1, 2]]})  # names stay as they were
    points = read(tmp_path)[1]
    assert points.flip_pairs == [(0, 1)] and points.names == ["0", "1", "2"]
    for content, told in (
        ({"names": ["a", "b"]}, "keypoints.json names 2 keypoints, the data has 3"),
        ({"names": 3}, "keypoints.json"),
        ({"flip_pairs": [[1, 9]]}, "is no pair of keypoints"),
        ([1, 2], "keypoints.json must hold an object"),
        ("{", "keypoints.json is not valid JSON"),
    ):
        write(tmp_path / "keypoints.json", content)
        one_line(lambda: read(tmp_path), told)


def test_a_keypoints_json_beside_coco_is_no_annotation_file(tmp_path):
    make(tmp_path, "coco, single")
    (tmp_path / "annotations.json").rename(tmp_path / "points.json")
    write(tmp_path / "keypoints.json", {"sigmas": [0.1, 0.1, 0.2]})
    splits, points, layout, _ = read(tmp_path)
    assert layout == "coco" and points.sigmas == [0.1, 0.1, 0.2] and len(splits["train"]) + len(splits["val"]) == 3


# ---- faults in COCO annotations --------------------------------------------------------------------------------------


def test_visibility_says_what_counts(tmp_path):
    content = coco()
    content["annotations"][0]["keypoints"] = [20, 10, 1, 12, 24, 0, 30, 22, 2]  # hidden counts, unlabelled does not
    content["annotations"][1].update(keypoints=[0] * 9, num_keypoints=0)
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert [s.path.stem for s in train.samples] == ["a", "c"]
    assert train.samples[0].labelled.tolist() == [True, False, True]
    assert train[(1, 0)]["visible"].tolist() == [True, False, True]
    assert facts["left_out"] == {"figure without a keypoint that counts": 1}


def test_annotations_that_cannot_be_used_are_named_and_counted(tmp_path, capsys):
    def note(number, **changes):
        return {**coco()["annotations"][0], "id": number, **changes}

    content = coco()
    content["images"] += [{"id": 20, "file_name": "gone.png", "width": W, "height": H}, {"id": 21, "file_name": "unsized.png"}]
    content["images"] += [{"id": 22, "file_name": "b.png", "width": W, "height": H}, "no picture at all"]
    points = coco()["annotations"][0]["keypoints"]
    content["annotations"] += [
        note(200, iscrowd=1),
        note(201, bbox=[1, 2, 0, 5]),
        note(202, bbox=[1, 2, math.nan, 5]),
        note(203, bbox=[1, 2, -3, 5]),
        note(220, bbox=[W + 1, 2, 9, 9]),
        note(221, bbox=[-20, 2, 19, 9]),
        note(222, bbox=[0, 0, 1e30, 9]),
        note(204, bbox=[1, 2, 3]),
        note(205, bbox="box"),
        note(206, keypoints=points[:-1]),
        note(207, keypoints=points + [1, 2, 2]),
        note(208, keypoints=["x"] * 9),
        note(209, keypoints=[points[i : i + 3] for i in (0, 3, 6)]),
        note(210, image_id=[10]),
        note(211, image_id=55),
        note(212, image_id=55),
        note(213, category_id=99),
        note(100),
        note(214, image_id=20),  # its picture is named already
        {"id": 215, "image_id": 10, "category_id": 7, "keypoints": points},
        {"id": 216, "category_id": 7, "keypoints": points, "bbox": [1, 2, 3, 4]},
        "no annotation at all",
        note(217, keypoints=[20, 10, 2, math.nan, 24, 2, math.inf, 22, 2]),
        note(218, keypoints=[20, 10, 2, -1, 24, 2, 30, H, 2]),
        note(219, keypoints=[20, 10, 2, 12, 24, math.nan, 30, 22, 2]),
    ]
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert facts["left_out"] == {
        "annotation of a category without keypoints": 1,
        "annotation that is given twice": 1,
        "annotation without image_id, category_id and 3 keypoints": 7,
        "annotations of an image that is not listed": 1,
        "box that does not fit its picture": 3,
        "crowd annotation": 1,
        "image entry without id and file_name": 1,
        "keypoint outside its picture": 2,
        "keypoint that is no number": 3,
        "picture that is not there": 2,
    }
    assert [s.labelled.tolist() for s in train.samples[-3:]] == [[True, False, False]] * 2 + [[True, False, True]]
    text = capsys.readouterr().out
    framed = [s for s in train.samples if s.where.split()[-1] in ("201", "202", "203", "204", "205", "215")]
    assert len(framed) == 6 and all(s.box.tolist() == box_of(SCENE["a"], margin=0) for s in framed)
    assert "note, figure without a box of its own, cut out around its keypoints (6): " in text
    for told in (
        "gone.png",
        "unsized.png",
        "annotation 200",
        "image id 55",
        "annotation 217 keypoint 2",
        "annotation 219 keypoint 2",
    ):
        assert told in text, told
    for index in range(len(train)):
        item = train[(1, index)]
        assert torch.isfinite(item["target"]).all() and torch.isfinite(item["back"]).all()
    assert not train[(1, len(train) - 2)]["visible"][1:].any()


def test_a_figure_without_a_usable_box_is_cut_out_around_its_keypoints(tmp_path, capsys):
    flat, upright = [(20, 24), (12, 24), (30, 24)], [(20, 10), (20, 24), (20, 34)]
    content = coco({"a": SCENE["a"], "b": flat, "c": upright})
    boxes = ([], [12, 24, 18, 0], None)
    for note, box in zip(content["annotations"], boxes, strict=True):
        note.update(bbox=box, area=0)
    content["annotations"][0]["keypoints"][3:6] = [W + 500, 24, 2]  # outside: it does not widen the box
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert [s.box.tolist() for s in train.samples] == [[20, 10, 10, 12], [12, 21.75, 18, 4.5], [17, 10, 6, 24]]
    assert facts["left_out"] == {"keypoint outside its picture": 1}
    for index, sample in enumerate(train.samples):
        assert train[(0, index)]["visible"].tolist() == sample.labelled.tolist()
    assert "cut out around its keypoints (3): person_keypoints_train2017.json annotation 100" in capsys.readouterr().out


def test_one_point_has_no_size_so_the_whole_picture_is_seen_or_the_figure_is_left_out(tmp_path):
    content = coco({"a": [(20, 10)], "b": [(40, 30)]}, names=["nose"])
    content["annotations"].append({**content["annotations"][0], "id": 200, "keypoints": [30, 30, 2]})
    for note in content["annotations"]:
        note["bbox"] = [*note["keypoints"][:2], 0, 0]
    val = coco({"a": [(20, 10)]}, names=["nose"])
    train, _, _, facts = loaded(make(tmp_path, content=content, val=val))
    assert [(s.path.stem, s.box) for s in train.samples] == [("b", None)] and facts["left_out"] == {"box without area": 2}


def test_ids_may_be_text_and_pictures_without_a_size(tmp_path):
    content = coco()
    for image in content["images"]:
        image.update(id=str(image["id"]), width=None, height=0)
        del image["height"]
    content["categories"][0]["id"] = "7"
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert len(train) == 3 and facts["left_out"] == {}
    np.testing.assert_allclose(train.samples[1].points, SCENE["b"])
    numbers = coco()
    for note in numbers["annotations"]:
        note.update(image_id=str(note["image_id"]), category_id=str(note["category_id"]))
    assert len(loaded(make(tmp_path, content=numbers))[0]) == 3


def test_a_picture_that_two_entries_list_has_the_figures_of_both(tmp_path):
    content = coco({"a": SCENE["a"], "b": SCENE["b"], "c": SCENE["c"]})
    content["images"][1]["file_name"] = "a.png"
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert [s.path.stem for s in train.samples] == ["a", "a", "c"] and facts["left_out"] == {}
    assert train.pictures[train.samples[0].path].figures == train.samples[:2]


def test_keypoints_without_visibility_count_unless_they_are_zero(tmp_path, capsys):
    content = coco()
    for note in content["annotations"]:
        del note["keypoints"][2::3]
    content["annotations"][2]["keypoints"][2:4] = [0, 0]
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert facts["left_out"] == {} and [s.labelled.tolist() for s in train.samples] == [[True] * 3] * 2 + [[True, False, True]]
    np.testing.assert_allclose(train.samples[1].points, SCENE["b"])
    assert "keypoints without visibility: all count but those at 0, 0 (3)" in capsys.readouterr().out


def test_coordinates_with_visibility_zero_are_unlabelled_and_said_so(tmp_path, capsys):
    content = coco()
    content["annotations"][0]["keypoints"][2] = 0
    content["annotations"][1]["keypoints"][2::3] = [0.4, 3, -1]
    train, *_ = loaded(make(tmp_path, content=content))
    assert [s.labelled.tolist() for s in train.samples[:2]] == [[False, True, True], [True, True, False]]
    assert "keypoint with coordinates but visibility 0, which counts as unlabelled (2)" in capsys.readouterr().out


def test_a_category_that_no_figure_has_may_have_other_keypoints(tmp_path):
    content = coco()
    content["categories"] = [{"id": 3, "name": "hand", "keypoints": ["thumb"]}, *content["categories"]]
    splits, points, _, faults = read(make(tmp_path, content=content))
    assert points.names == NAMES and len(splits["train"]) == 3 and faults == {}


def test_an_area_that_is_none_does_not_count_as_one(tmp_path):
    content = coco()
    content["annotations"][0]["area"] = 0
    content["annotations"][1].pop("area")
    content["annotations"][2]["area"] = "77.5"
    areas = [s.area for s in read(make(tmp_path, content=content))[0]["train"]]
    assert math.isnan(areas[0]) and math.isnan(areas[1]) and areas[2] == 77.5


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "x\0y.png", "n" * 5000, ""])
@pytest.mark.parametrize("layout", ["coco", "csv"])
def test_names_that_leave_the_folder_are_not_followed(tmp_path, name, layout):
    if layout == "csv" and ("\0" in name or not name):
        name = "sub/../../../secret.png"
    folder = make(tmp_path / "set", layout)
    draw(tmp_path / "secret.png")
    if layout == "coco":
        content = coco()
        content["images"][0]["file_name"] = name
    else:
        content = table().replace("a.png", name)
    write(folder / LAYOUTS[layout][0], content)
    splits, _, _, faults = read(folder)
    assert [s.path.stem for s in splits["train"]] == ["b", "c"] and faults == {"picture that is not there": 1}


@pytest.mark.parametrize(
    "content, told",
    [
        ("{not json", "person_keypoints_train2017.json is not valid JSON"),
        ("[]", "is no COCO file: it has no list 'images'"),
        ({"images": []}, "is no COCO file: it has no list 'annotations'"),
        ({**coco(), "categories": [5]}, "no category has a list of keypoints"),
        ({**coco(), "images": coco()["images"] * 2}, "image id 10 is given twice"),
        ({**coco(), "annotations": []}, "has no training pictures with keypoints"),
        ({**coco(), "images": []}, "has no training pictures with keypoints"),
    ],
)
def test_a_malformed_coco_file_is_named(tmp_path, content, told):
    one_line(lambda: loaded(make(tmp_path, content=content)), told)


def test_test_annotations_without_labels_are_no_error(tmp_path):
    make(tmp_path)
    write(tmp_path / "annotations" / "image_info_test2017.json", {"images": [], "categories": []})
    write(tmp_path / "annotations" / "person_keypoints_test2017.json", {"images": []})
    assert sorted(read(tmp_path)[0]) == ["train", "val"]


def leaves(value, path=()):
    """Every place in a nested structure."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from leaves(part, (*path, key))


def test_no_annotation_fails_otherwise_than_by_name(tmp_path):
    """Each place of a small COCO file replaced by junk, one at a time: samples, or a UserError, or a counted fault."""
    make(tmp_path)
    draw(tmp_path / "val2017" / "b.png", SCENE["b"])
    whole = coco({"a": SCENE["a"], "b": SCENE["b"]}, flip_pairs=[[2, 3]], sigmas=[0.1, 0.1, 0.1])
    tried, fine = 0, 0
    junk = [None, "x", math.inf, math.nan, [], [1], 10**30]
    for path in leaves(whole):
        if path and (path[:2] in (("images", 1), ("annotations", 1)) or path[-1] in range(3, 9)):
            continue  # as those before them
        for value in junk:
            content = copy.deepcopy(whole)
            place = content
            for key in path[:-1]:
                place = place[key]
            if path:
                place[path[-1]] = value
            else:
                content = value
            write(tmp_path / "annotations" / "person_keypoints_train2017.json", content)
            write(tmp_path / "annotations" / "person_keypoints_val2017.json", content)
            tried += 1
            try:
                splits, points, _, _ = read(tmp_path)
                samples, cache = check_samples(splits["train"], preprocess(), Faults(), 10**6, "train")
                dataset = data.PoseData(samples, cache, preprocess(), points, augment=True)
                for index in range(len(samples)):
                    item = dataset[(1, index)]
                    assert torch.isfinite(item["target"]).all() and torch.isfinite(item["back"]).all(), (path, value)
                fine += 1
            except UserError as error:
                assert "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}: {error!r}") from error
    assert tried > 250 and 0.3 < fine / tried < 0.95, (tried, fine)


# ---- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header, names, named",
    [
        ("image,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", NAMES, True),
        ("file,nose.x,nose.y,left_hand.x,left_hand.y,right_hand.x,right_hand.y", NAMES, True),
        ("file, noseX, noseY, left handX, left handY, right handX, right handY", ["nose", "left hand", "right hand"], True),
        ("name,x0,y0,x1,y1,x2,y2", ["0", "1", "2"], False),
        ("name,p1_x,p1_y,p2_x,p2_y,p3_x,p3_y", ["0", "1", "2"], False),
        (",0,1,2,3,4,5", ["0", "1", "2"], False),
        ("", ["0", "1", "2"], False),
        ("\ufeffimage,nose_x,nose_y,left_x,left_y,right_x,right_y", ["nose", "left", "right"], True),
    ],
)
def test_the_header_of_a_csv_names_the_keypoints(tmp_path, header, names, named):
    splits, points, _, faults = read(make(tmp_path, "csv, single", content=table(header=header)))
    assert points.names == names and points.named == named and faults == {}
    assert len(splits["train"]) + len(splits["val"]) == 3  # neither a row lost to the header nor a header read as a row
    assert points.flip_pairs == ([(1, 2)] if named else [])


def test_rows_that_cannot_be_used_are_named_and_counted(tmp_path, capsys):
    rows = [
        "a.png,12 px,10,12,24,30,22",
        "b.png,40,30,,40,50.25,oops",
        "c.png,30,8,22,20,41",
        "c.png,30,8,22,20,41,21,1",
        "gone.png,1,2,3,4,5,6",
        "",
        "a.png,12 px,10,12,24,30,22",
        ",1,2,3,4,5,6",
        "c.png,30,8,inf,20,1000,21",
    ]
    content = table({}) + "\n".join(rows) + "\n"
    train, _, _, facts = loaded(make(tmp_path, "csv", content=content))
    assert [s.path.stem for s in train.samples] == ["a", "b", "c"]
    assert [s.labelled.tolist() for s in train.samples] == [[False, True, True], [True, False, False], [True, False, False]]
    assert all(s.box is None for s in train.samples)
    assert train.samples[0].points[1:].tolist() == [[12, 24], [30, 22]]
    assert facts["left_out"] == {
        "keypoint outside its picture": 1,
        "keypoint that is no number": 4,
        "picture that is not there": 1,
        "row of another length": 2,
        "row that is given twice": 1,
        "row without a picture": 1,
    }
    text = capsys.readouterr().out
    for told in (
        "train.csv line 2 keypoint 1",
        "train.csv line 4: 6 columns instead of 7",
        "gone.png",
        "line 8: a.png",
        "line 9",
    ):
        assert told in text, told


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "train.csv is empty"),
        ("\n\n , \n", "train.csv is empty"),
        ("image,0,1,2\n", "4 columns; expected the picture's name, then x and y of every keypoint"),
        ("image\n", "1 columns"),
        (table({}), "has no training pictures with keypoints"),
        (table({"gone": SCENE["a"]}), "has no training pictures with keypoints"),
        (table(header="image,nose_x,nose_y,tail_x,tail_y,ear_x,ear_y"), "keypoints, others in number or name than train.csv"),
        (table({name: points[:2] for name, points in SCENE.items()}, header=""), "others in number or name than train.csv"),
        (b"\xff\xfe\x00bad", "train.csv: 1 columns"),
        (b'a.png,"' + b"9" * 200_000 + b'",2\n', "train.csv is no CSV file that can be read"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path, content, told):
    make(tmp_path, "csv")
    (tmp_path / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    one_line(lambda: loaded(tmp_path), told)


NOT_SHUFFLED = {  # headers of tables that hold SCENE, and the form of their rows
    "visibility": ("image,nose_x,nose_y,nose_v,left_hand_x,left_hand_y,left_hand_v,right_hand_x,right_hand_y,right_hand_v",
                   "xyv"),
    "likelihood": ("image,nose_x,nose_y,nose_p,left_hand_x,left_hand_y,left_hand_p,right_hand_x,right_hand_y,right_hand_p",
                   "xyp"),
    "occlusion": ("image,nose x,nose y,nose occluded,left_hand x,left_hand y,left_hand occluded,"
                  "right_hand x,right_hand y,right_hand occluded", "xyp"),
    "depth": ("image,nose x,nose y,nose z,left_hand x,left_hand y,left_hand z,right_hand x,right_hand y,right_hand z", "xyp"),
    "all x, then all y": ("image,nose_x,left_hand_x,right_hand_x,nose_y,left_hand_y,right_hand_y", "halves"),
    "y before x": ("image,nose_y,nose_x,left_hand_y,left_hand_x,right_hand_y,right_hand_x", "yx"),
    "axis first": ("image,x_nose,y_nose,x_left_hand,y_left_hand,x_right_hand,y_right_hand", "xy"),
    "axis in brackets": ("image,nose (x),nose (y),left_hand (x),left_hand (y),right_hand (x),right_hand (y)", "xy"),
    "units": ("image,nose_x_px,nose_y_px,left_hand_x_px,left_hand_y_px,right_hand_x_px,right_hand_y_px", "xy"),
    "glued": ("image,nosex,nosey,left_handx,left_handy,right_handx,right_handy", "xy"),
    "dashes": ("image,nose-x,nose-y,left_hand-x,left_hand-y,right_hand-x,right_hand-y", "xy"),
    "two lines": ("image,nose,,left_hand,,right_hand,\n,x,y,x,y,x,y", "xy"),
    "two lines, repeated": ("image,nose,nose,left_hand,left_hand,right_hand,right_hand\n,x,y,x,y,x,y", "xy"),
    "names over two columns": ("image,nose,,left_hand,,right_hand,", "xy"),
    "an index": (",image,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", "index xy"),
    "size": ("image,width,height,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", "size xy"),
    "box": ("image,x,y,w,h,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", "box xy"),
    "box in words": ("image,bbox_x,bbox_y,bbox_width,bbox_height,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y",
                     "box xy"),
    "corners": ("image,xmin,ymin,xmax,ymax,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", "corners xy"),
    "DeepLabCut": ("scorer,me,me,me,me,me,me\nbodyparts,nose,nose,left_hand,left_hand,right_hand,right_hand\n"
                   "coords,x,y,x,y,x,y", "xy"),
}  # fmt: skip


def cells_of(points, form, name):
    """The cells of a row, in one of the forms that NOT_SHUFFLED names."""
    pairs = {"xy": (0, 1), "yx": (1, 0), "xyv": (0, 1, 2), "xyp": (0, 1, 3)}.get(form.split()[-1], ())
    cells = [f"{name}.png", *((*point, 2, 0.5)[i] for point in points for i in pairs)]
    if form == "halves":
        cells += [*(x for x, _ in points), *(y for _, y in points)]
    x, y, w, h = box_of(points)
    more = {"index": [], "size": [W, H], "box": [x, y, w, h], "corners": [x, y, x + w, y + h]}.get(form.split()[0], [])
    return [*(["7"] if form.startswith("index") else []), cells[0], *more, *cells[1:]]


def csv_table(form, header, separator=",", comma=False):
    rows = [[str(cell) for cell in cells_of(points, form, name)] for name, points in SCENE.items()]
    rows = [[row[0], *(cell.replace(".", ",") for cell in row[1:])] if comma else row for row in rows]
    return "\n".join([header.replace(",", separator), *(separator.join(row) for row in rows)]) + "\n"


def figures_of(folder):
    splits, points, _, faults = read(folder)
    figures = {s.path.stem: s for s in [*splits["train"], *splits["val"]]}
    return figures, points, faults


@pytest.mark.parametrize("kind", NOT_SHUFFLED)
def test_every_point_of_a_table_has_its_own_x_and_y(tmp_path, kind):
    header, form = NOT_SHUFFLED[kind]
    figures, points, faults = figures_of(make(tmp_path, "csv, single", content=csv_table(form, header)))
    assert points.names == NAMES and points.flip_pairs == [(1, 2)] and sorted(figures) == ["a", "b", "c"] and faults == {}
    for name, figure in figures.items():
        np.testing.assert_allclose(figure.points, SCENE[name])
        assert figure.labelled.all() and figure.size == ((W, H) if form.startswith("size") else None)
        assert (figure.box is None) == (not form.startswith(("box", "corners")))
        assert figure.box is None or figure.box.tolist() == box_of(SCENE[name])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator, comma", [(";", False), ("\t", False), (";", True), ("\t", True), ("|", False)])
def test_separators_decimal_commas_and_encodings(tmp_path, separator, comma, encoding):
    header = "bild,größe_x,größe_y,left_x,left_y,right_x,right_y"
    make(tmp_path, "csv, single")
    (tmp_path / "points.csv").write_bytes(csv_table("xy", header, separator, comma).encode(encoding))
    figures, points, faults = figures_of(tmp_path)
    assert points.names == ["größe", "left", "right"] and faults == {}
    for name, figure in figures.items():
        np.testing.assert_allclose(figure.points, SCENE[name])


@pytest.mark.parametrize(
    "header, told",
    [
        ("image,nose,left,right,tail,ear,eye", "says of no column that it is x or y"),
        ("image,nose_x,nose_y,left_x,left_y,right_x,tail_x", "column 'right_x' has no partner|column 'tail_x' has no partner"),
        ("image,nose_x,nose_y,left_x,left_y,nose_x,nose_y", "two columns are 'nose_x'"),
        ("image,nose_x,nose_y,x1,y1,x2,y2", "keypoints have names, but x1, y1 ... numbers: is that a box"),
        ("image,center_x,center_y,width,height,nose_x,nose_y", "is center with width and height a box"),
        ("image,x,y,y,x,x,y", "could be paired in several ways"),
        ("image,xmin,ymin,xmax,ymax,width,height", "says of no column that it is x or y"),
    ],
)
def test_a_header_that_can_be_read_in_two_ways_is_refused(tmp_path, header, told):
    one_line(lambda: read(make(tmp_path, "csv, single", content=table(header=header))), told)


def moving_figures(order):
    """A CSV without a header of 12 pictures in which a figure of four points moves about."""
    rng, lines = np.random.default_rng(0), []
    shape = np.array([(0, 0), (8, 3), (2, 9), (9, 9)])
    for i in range(12):
        points = shape + rng.integers(2, (40, 30)) + rng.integers(0, 2, (4, 2))
        lines.append(",".join([f"p{i}.png", *(str(v) for v in order(points))]))
    return "\n".join(lines) + "\n"


def test_without_a_header_pairs_are_read_and_what_does_not_look_like_pairs_is_refused(tmp_path, capsys):
    for i in range(12):
        draw(tmp_path / "images" / f"p{i}.png", size=(4, 4))
    file = write(tmp_path / "points.csv", moving_figures(lambda points: points.flatten()))
    splits, points, *_ = read(tmp_path)
    first = min([*splits["train"], *splits["val"]], key=lambda s: len(s.path.name))
    assert points.names == ["0", "1", "2", "3"] and first.points[1, 0] > first.points[0, 0] + 4
    assert "does not say which columns are x and y: they are read as x, y, x, y" in capsys.readouterr().out
    file.write_text(moving_figures(lambda points: points.T.flatten()))
    one_line(lambda: read(tmp_path), "is it all x and then all y")
    file.write_text(moving_figures(lambda points: np.column_stack([points, [2, 1, 2, 2]]).flatten()))
    one_line(lambda: read(tmp_path), "every third column holds 0, 1, 2 alone")


def test_keypoints_in_another_order_in_another_split_are_brought_into_the_first_ones(tmp_path):
    val = "image,right_hand_x,right_hand_y,nose_x,nose_y,left_hand_x,left_hand_y\na.png,30,22,20,10,12,24\n"
    splits, points, *_ = read(make(tmp_path, "csv", val=val))
    assert points.names == NAMES
    np.testing.assert_allclose(splits["val"][0].points, SCENE["a"])


def test_what_a_table_leaves_empty_counts_as_unlabelled_and_says_so(tmp_path, capsys):
    rows = ["a.png,,,12,24,30,22", "b.png,NaN,nan,-1,-1,50.25,38", "c.png,0,0,22,20,41,21"]
    train, _, _, facts = loaded(make(tmp_path, "csv", content=table({}) + "\n".join(rows)))
    assert facts["left_out"] == {}
    assert [s.labelled.tolist() for s in train.samples] == [[False, True, True], [False, False, True], [False, True, True]]
    text = capsys.readouterr().out
    for told in ("keypoint that is empty, which counts as unlabelled (2)", "that is -1, -1", "that is 0, 0"):
        assert told in text
    numbered = "image,x1,y1,v1,x2,y2,v2\na.png,20,10,0,12,24,1\nb.png,20,10,1,12,24,0"
    samples = read(make(tmp_path / "numbered", "csv, single", content=numbered))[0]
    labels = {s.path.stem: s.labelled.tolist() for part in samples.values() for s in part}
    assert labels == {"a": [False, True], "b": [True, False]}
    header = "image,nose_x,nose_y,nose_visible,tail_x,tail_y,tail_visible"
    rows = ["a.png,20,10,0,12,24,1", "b.png,40,30,true,33.5,40,False", "c.png,30,8,1,22,20,"]
    train, *_ = loaded(make(tmp_path, "csv", content="\n".join([header, *rows]), val=f"{header}\na.png,20,10,1,12,24,1"))
    assert [s.labelled.tolist() for s in train.samples] == [[False, True], [True, False], [True, True]]
    assert "keypoint that is of visibility 0, which counts as unlabelled (2)" in capsys.readouterr().out


def test_fractions_are_brought_into_the_pictures_pixels(tmp_path, capsys):
    scene = {name: [(x / W, y / H) for x, y in points] for name, points in SCENE.items()}
    val = table({"a": [(1, 1), (0.5, 1.2), (0, 0.5)]})
    train, validation, _, facts = loaded(make(tmp_path, "csv", content=table(scene), val=val))
    for sample in train.samples:
        np.testing.assert_allclose(sample.points, SCENE[sample.path.stem])
    assert validation.samples[0].labelled.tolist() == [True, False, True]  # on the edge is in the picture, beyond it is not
    assert facts["left_out"] == {"keypoint outside its picture": 1} and "are fractions of the picture" in capsys.readouterr().out
    for index in range(3):
        assert train[(0, index)]["visible"].all()


def test_several_rows_of_a_picture_are_several_figures_cut_out_around_their_points(tmp_path, capsys):
    content = table() + "a.png,40,10,44,24,50,22\n"
    train, val, _, facts = loaded(make(tmp_path, "csv", content=content))
    boxes = [(s.path.stem, s.box.tolist()) for s in (*train.samples, *val.samples)]
    around = {name: box_of(points, margin=0) for name, points in SCENE.items()}
    assert boxes == [*around.items(), ("a", [40, 10, 10, 14]), ("a", around["a"])] and facts["left_out"] == {}
    assert "1 of 4 pictures have several figures" in capsys.readouterr().out
    one_point_a_row = "image,part,x,y\na.png,nose,20,10\na.png,tail,12,24\nb.png,nose,40,30\n"
    alone = make(tmp_path / "alone", "csv, single", content=one_point_a_row)
    one_line(lambda: read(alone), "several rows of a picture have one x and y each")


def test_a_column_may_name_the_split(tmp_path):
    rows = [f"{row},{split}" for row, split in zip(table(header="").splitlines(), ("train", "Validation", "test"), strict=True)]
    header = "image,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y,split"
    splits, points, _, faults = read(make(tmp_path, "csv, single", content="\n".join([header, *rows])))
    assert {split: [s.path.stem for s in part] for split, part in splits.items()} == {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert points.names == NAMES and faults == {}
    content = "\n".join([header.replace("split", "set"), *(row.replace("train", "red") for row in rows)])  # it says another thing
    splits, *_ = read(make(tmp_path, "csv, single", content=content))
    assert sorted(splits) == ["train", "val"]


def test_what_looks_wrong_in_all_figures_together_is_said(tmp_path, capsys):
    scene = {f"p{i}": [(20 + i, 10), (12, 20), (31, 22)] for i in range(9)}
    for name in scene:
        for split in ("train", "val"):
            draw(tmp_path / split / f"{name}.png", size=(W, H))
    loaded(make(tmp_path, "csv", content=table(scene)))
    assert "all keypoints lie in the upper left quarter" in capsys.readouterr().out
    rows = [row.replace(",31,22", ",,") for row in table(scene).splitlines()]
    loaded(make(tmp_path, "csv", content="\n".join([*rows, "a.png,60,40,12,20,,"])))
    text = capsys.readouterr().out
    assert "no training figure has keypoint right_hand: it cannot be learnt" in text and "upper left" not in text


def test_names_without_endings_are_found(tmp_path):
    figures, points, faults = figures_of(make(tmp_path, "csv, single", content=table().replace(".png", "")))
    assert sorted(figures) == ["a", "b", "c"] and points.names == NAMES and faults == {}
    np.testing.assert_allclose(figures["c"].points, SCENE["c"])


DLC_HEAD = """scorer,,,me,me,me,me,me,me
bodyparts,,,nose,nose,left_hand,left_hand,right_hand,right_hand
coords,,,x,y,x,y,x,y
"""


@pytest.mark.parametrize("place", ["", "labeled-data", "labeled-data/one"])
def test_a_deeplabcut_project_is_read_from_any_of_its_folders(tmp_path, place):
    for video, old in (("one", False), ("two", True)):
        folder = tmp_path / "labeled-data" / video
        slash = "\\" if old else ","
        rows = [f"labeled-data{slash}{video}{slash}{row}" for row in table(header="").splitlines()]
        head = DLC_HEAD.replace(",,,", ",") if old else DLC_HEAD
        write(folder / "CollectedData_me.csv", head + "\n".join(rows))
        for name, points in SCENE.items():
            draw(folder / f"{name}.png", points)
    write(tmp_path / "config.yaml", "Task: reaching\n")
    splits, points, layout, faults = read(tmp_path / place)
    samples = [*splits["train"], *splits["val"]]
    assert layout == "csv" and points.names == NAMES and faults == {} and all(s.box is None for s in samples)
    videos = ["one"] if place.endswith("one") else ["one", "two"]
    assert sorted((s.path.parent.name, s.path.stem) for s in samples) == [(v, name) for v in videos for name in "abc"]
    for sample in samples:
        np.testing.assert_allclose(sample.points, SCENE[sample.path.stem])
    if not place:
        write(tmp_path / "labeled-data" / "one" / "CollectedData_you.csv", DLC_HEAD)
        one_line(lambda: read(tmp_path), "holds the CollectedData of several scorers")


def test_deeplabcuts_individuals_are_figures_of_their_own(tmp_path, capsys):
    lines = ["scorer," + ",".join(["me"] * 10), "individuals," + ",".join(["m1"] * 4 + ["m2"] * 4 + ["single"] * 2)]
    lines += ["bodyparts," + ",".join(["nose", "nose", "tail", "tail"] * 2 + ["lamp"] * 2), "coords," + ",".join(["x", "y"] * 5)]
    lines += ["a.png,20,10,12,24,40,10,50,30,1,1", "b.png,40,30,33.5,40,,,,,1,1", "c.png,,,,,30,8,41,21,,"]
    splits, points, _, faults = read(make(tmp_path, "csv, single", content="\n".join(lines)))
    assert points.names == ["nose", "tail"] and faults == {"individual with other keypoints than the first": 1}
    samples = sorted([*splits["train"], *splits["val"]], key=lambda s: (s.path.name, s.points[0, 0]))
    assert [(s.path.stem, s.points.tolist()) for s in samples] == [
        ("a", [[20, 10], [12, 24]]),
        ("a", [[40, 10], [50, 30]]),
        ("b", [[40, 30], [33.5, 40]]),
        ("c", [[30, 8], [41, 21]]),
    ]
    assert all(np.isnan(s.box).all() for s in samples)


@pytest.mark.parametrize("columns", [20_001, 3_001])
def test_thousands_of_columns_are_refused(tmp_path, columns):
    row = ",".join(["a.png", *("7" for _ in range(columns - 1))])
    one_line(lambda: read(make(tmp_path, "csv, single", content=row)), "keypoints a figure; a model knows at most 1000")


def test_numbers_with_commas_that_may_be_thousands_are_refused(tmp_path):
    content = csv_table("xy", "image,nose_x,nose_y,left_hand_x,left_hand_y,right_hand_x,right_hand_y", ";")
    make(tmp_path, "csv, single", content=content.replace("20;10", "1,020;10"))
    one_line(lambda: read(tmp_path), "is 1,020 beside .* a thousand or a fraction")


# ---- YOLO ------------------------------------------------------------------------------------------------------------

YAML = "path: .\ntrain: images/train\nval: images/val\nkpt_shape: [3, 3]\nflip_idx: [0, 2, 1]\nnames:\n  0: figure\n"


def label_line(points, flags=(2, 2, 2), box=None):
    x, y, w, h = box or box_of(points)
    cells = [0, (x + w / 2) / W, (y + h / 2) / H, w / W, h / H]
    for (px, py), flag in zip(points, flags, strict=True):
        cells += [px / W, py / H, *([] if flag is None else [flag])]
    return " ".join(f"{cell:.8g}" for cell in cells) + "\n"


def make_yolo(folder, settings=YAML, places=("images/{}", "labels/{}"), flags=(2, 2, 2), encoding="utf-8"):
    """SCENE as YOLO pose: a and b for training, c for validation."""
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            draw(folder / places[0].format(split) / f"{name}.png", SCENE[name])
            label = write(folder / places[1].format(split) / f"{name}.txt", "")
            label.write_text(label_line(SCENE[name], flags), encoding=encoding)
    write(folder / "data.yaml", settings).write_text(settings, encoding=encoding)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"places": ("{}/images", "{}/labels"), "settings": YAML.replace("images/train", "../train/images")},
        {"settings": YAML.replace("images/", "/home/me/set/images/").replace("path: .", "path: C:/me")},
        {"settings": YAML.replace("[3, 3]", "[3, 2]"), "flags": (None,) * 3},
        {"encoding": "utf-8-sig"},
        {"settings": YAML.replace("images/train", "[images/train]")},
    ],
)
def test_yolo_pose_is_read_to_the_pixel(tmp_path, options):
    train, val, points, facts = loaded(make_yolo(tmp_path, **options))
    assert facts["format"] == "yolo" and facts["left_out"] == {} and points.flip_pairs == [(1, 2)] and not points.named
    samples = {s.path.stem: s for s in (*train.samples, *val.samples)}
    assert [s.path.stem for s in train.samples] == ["a", "b"] and sorted(samples) == ["a", "b", "c"]
    for name, sample in samples.items():
        np.testing.assert_allclose(sample.points, SCENE[name], atol=1e-5)
        np.testing.assert_allclose(sample.box, box_of(SCENE[name]), atol=1e-5)
        assert sample.labelled.all()


def test_yolo_names_flips_and_skeleton_are_the_datas(tmp_path):
    settings = YAML + f"kpt_names:\n  0: [{', '.join(NAMES)}]\nskeleton: [[0, 1], [0, 2]]\n"
    points = read(make_yolo(tmp_path, settings))[1]
    assert points.names == NAMES and points.named and points.skeleton == [(0, 1), (0, 2)] and points.flip_pairs == [(1, 2)]
    named = settings.replace("flip_idx: [0, 2, 1]\n", "")
    assert read(make_yolo(tmp_path, named))[1].flip_pairs == [(1, 2)]
    assert read(make_yolo(tmp_path, settings.replace("[0, 2, 1]", "[0, 1, 2]")))[1].flip_pairs == []


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("[3, 3]", "[3]", "must hold kpt_shape"),
        ("[3, 3]", "[1000000000, 3]", "at most 1000 keypoints"),
        ("[3, 3]", "[3, 4]", "must hold kpt_shape"),
        ("[3, 3]", "abc", "must hold kpt_shape"),
        ("[3, 3]", ".inf", "must hold kpt_shape"),
        ("[0, 2, 1]", "[1, 2, 0]", "flip_idx must pair 3 keypoints"),
        ("[0, 2, 1]", "[0, 1]", "flip_idx must pair 3 keypoints"),
        ("[0, 2, 1]", "[0, 2, 9]", "flip_idx must pair 3 keypoints"),
        ("[0, 2, 1]", "yes", "flip_idx must pair 3 keypoints"),
        ("path: .", "kpt_names: [a, b]", "kpt_names must be a list of 3 names"),
        ("path: .", "kpt_names: {0: [a, b, c], 1: [a, b, d]}", "kpt_names differ from class to class"),
        ("path: .", "a: &a [1]\nb: *a", "YAML alias"),
        ("path: .", "a: " + "[" * 3000, "not valid YAML"),
        ("path: .", "a: " + "9" * 6000, "has a number of 6000 digits"),
    ],
)
def test_a_yolo_file_that_makes_no_sense_is_named(tmp_path, old, new, told):
    one_line(lambda: read(make_yolo(tmp_path, YAML.replace(old, new))), told)


def test_yolo_lines_that_cannot_be_used_are_named_and_unlabelled_points_stay_out(tmp_path, capsys):
    make_yolo(tmp_path)
    good = label_line(SCENE["a"], flags=(2, 0, 1))
    flat = label_line(SCENE["a"], box=[12, 10, 18, 0])
    write(tmp_path / "labels/train/a.txt", good + "\n0 0.5 0.5 0.1\n0 0.5 0.5 0.1 0.1\nx y\n" + good[:-3] + "\n" + flat)
    train, _, _, facts = loaded(tmp_path)
    assert [s.labelled.tolist() for s in train.samples] == [[True, False, True], [True] * 3, [True] * 3]
    np.testing.assert_allclose(train.samples[1].box, box_of(SCENE["a"], margin=0), atol=1e-5)
    assert facts["left_out"] == {"figure without a keypoint that counts": 1, "line that is no figure of 3 keypoints": 3}
    text = capsys.readouterr().out
    assert "a.txt line 3" in text and "visibility 0, which counts as unlabelled (1): a.txt line 1" in text


def test_yolo_for_boxes_alone_is_no_pose_data(tmp_path):
    make_yolo(tmp_path, YAML.replace("kpt_shape: [3, 3]\n", ""))
    one_line(lambda: read(tmp_path), "is none of the layouts that are known; .*data.yaml with kpt_shape")


@pytest.mark.parametrize("kind", ["coco", "csv", "yolo"])
def test_eval_needs_no_training_pictures(tmp_path, kind):
    if kind == "yolo":
        shutil.rmtree(make_yolo(tmp_path) / "images" / "train")
    else:
        make(tmp_path, kind)
        (tmp_path / LAYOUTS[kind][0]).unlink()
    one_line(lambda: read(tmp_path), "has no training pictures with keypoints")
    splits, points, _, _ = read_tables(str(tmp_path), "auto", 0, to_train=False)
    assert [s.path.stem for s in splits["val"]] == ["c" if kind == "yolo" else "a"] and len(points.names) == 3


# ---- crops -----------------------------------------------------------------------------------------------------------


def by_hand(point, box, padding, size, turn=0.0, zoom=1.0, shift=(0, 0), mirror=False):
    """Where a point of the picture lies in the input (h, w), step by step, in the order of a camera: move, turn, mirror, zoom."""
    (x, y, w, h), (height, width) = box, size
    wide = max(w, h * width / height) * padding
    high = wide * height / width
    dx, dy = point[0] - (x + w / 2 + shift[0] * w), point[1] - (y + h / 2 + shift[1] * h)
    radius, angle = math.hypot(dx, dy), math.atan2(dy, dx) + turn
    dx, dy = radius * math.cos(angle), radius * math.sin(angle)
    dx = -dx if mirror else dx
    return (width - 1) / 2 + dx * zoom * (width - 1) / wide, (height - 1) / 2 + dy * zoom * (height - 1) / high


def test_a_box_is_padded_and_brought_to_the_ratio_of_the_input():
    assert extent(np.array([3, 4, 10, 20]), (40, 40), 1.25) == (25, 25)
    assert extent(np.array([3, 4, 10, 20]), (64, 48), 1.0) == (15, 20)
    assert extent(np.array([3, 4, 20, 10]), (64, 48), 1.5) == pytest.approx((30, 40))
    matrix = crop_matrix(np.array([10, 20, 30, 60]), (33, 17), 1.25)  # 75 pixels high, half as wide fits not quite
    width, height = extent(np.array([10, 20, 30, 60]), (33, 17), 1.25)
    middle = np.array([25, 50])
    corners = [data.move(middle + [sx * width / 2, sy * height / 2], matrix).tolist() for sx, sy in ((-1, -1), (1, 1), (0, 0))]
    assert np.abs(np.array(corners) - [[0, 0], [16, 32], [8, 16]]).max() < 1e-9
    assert width / height == pytest.approx(17 / 33) and min(width / 30, height / 60) == pytest.approx(1.25)


def test_a_whole_picture_is_taken_as_it_is(tmp_path):
    _, val, _, _ = loaded(make(tmp_path, "csv"))
    box, padding = val.box(0)
    assert box.tolist() == [0, 0, W, H] and padding == 1
    item = val[(0, 0)]
    expected = [by_hand(p, box, 1, (32, 32)) for p in SCENE["a"]]
    np.testing.assert_allclose(item["target"].numpy() * 31, expected, atol=1e-4)
    # 64 x 48 in a square: black above and below.
    assert item["pixel_values"][:, 0].max() == 0 and item["pixel_values"][:, -1].max() == 0


def figure_with_dots(folder, factor, size):
    """(data set of one figure of five dots in a picture, augmented; their places): `factor` times as large as 160 x 120."""
    names = ["nose", "left_eye", "right_eye", "left_foot", "right_foot"]
    points = np.array([(80, 30), (55, 45), (108, 41), (60.5, 88.25), (101, 92)]) * factor
    width, height = 160 * factor, 120 * factor
    content = coco({"a": points.tolist()}, names=names)
    content["images"][0].update(width=width, height=height)
    box = box_of(points, 8 * factor)
    content["annotations"][0]["bbox"] = box
    scale = max(extent(np.array(box), size, PADDING)) / max(size)  # pixels of the picture on one of the input
    make(folder, content=content, val=content)
    for place in ("train2017", "val2017"):
        draw(folder / place / "a.png", points, (width, height), spread=max(1.0, 1.4 * scale))
    train, val, keypoints, _ = loaded(folder, size, augment=True)
    return train, val, points, np.array(box), keypoints


@pytest.mark.parametrize("factor, size", [(1, (64, 64)), (1, (64, 48)), (4, (48, 64)), (8, (48, 48))])
def test_keypoints_move_exactly_with_their_pixels(tmp_path, factor, size):
    """Against the transformation applied by hand, and against the picture: a dot stands where its keypoint is said to be."""
    train, val, points, box, keypoints = figure_with_dots(tmp_path, factor, size)
    swap, colour, worst = [0, 2, 1, 4, 3], [2, 0, 1, 0, 1], 0.0
    mirrored, invisible, kinds = set(), 0, set()
    last = np.array([size[1] - 1, size[0] - 1])
    for dataset, epochs in ((val, (0,)), (train, range(1, 40))):
        for epoch in epochs:
            item, change = dataset[(epoch, 0)], {}
            if dataset is train:
                with seeded(0, epoch, 0):
                    change = random_change(True)
                kinds.add((round(change["turn"], 3), round(change["zoom"], 3)))
            flipped = change.get("mirror", False)
            mirrored.add(flipped)
            target, visible = item["target"].double().numpy() * last, item["visible"].numpy()
            pixels = item["pixel_values"].numpy()
            for k in range(5):
                source = swap[k] if flipped else k  # in a mirrored picture the left hand is the right one
                expected = by_hand(points[source], box, PADDING, size, **change)
                inside = bool((np.array(expected) >= 0).all() and (np.array(expected) <= last).all())
                assert visible[k] == inside, (epoch, k, expected)
                if not inside:
                    invisible += 1
                    assert (target[k] == 0).all()
                    continue
                np.testing.assert_allclose(target[k], expected, atol=1e-3)
                back = data.move(target[k][None], item["back"].numpy())[0]
                np.testing.assert_allclose(back, points[source], atol=1e-2 * factor)
                x, y = np.round(target[k]).astype(int)
                if not (5 <= x < size[1] - 5 and 5 <= y < size[0] - 5):
                    continue  # the dot is cut off
                window = pixels[:, y - 4 : y + 5, x - 4 : x + 5]
                mass = window - window.min(axis=(1, 2), keepdims=True)
                assert mass.sum(axis=(1, 2)).argmax() == colour[source] and mass.max() > 0.2, (epoch, k)
                mass = mass[colour[source]].clip(mass[colour[source]].max() * 0.1) - mass[colour[source]].max() * 0.1
                rows, columns = np.mgrid[y - 4 : y + 5, x - 4 : x + 5]
                centre = np.array([(mass * columns).sum(), (mass * rows).sum()]) / mass.sum()
                worst = max(worst, float(np.abs(centre - target[k]).max()))
    assert worst < 0.35, worst  # of the input's pixels; half a pixel too far right would show
    assert mirrored == {False, True} and len(kinds) > 30 and keypoints.flip_pairs == [(1, 2), (3, 4)]


def test_without_pairs_nothing_is_mirrored(tmp_path):
    header = ",0,1,2,3,4,5"
    train, *_ = loaded(make(tmp_path, "csv, single", content=table(header=header)), augment=True)
    with_pairs, *_ = loaded(make(tmp_path / "named", "csv, single"), augment=True)
    for dataset, expected in ((train, {False}), (with_pairs, {False, True})):
        # The linear part's determinant is negative where the picture was mirrored.
        assert {bool(np.linalg.det(dataset[(epoch, 0)]["back"][:, :2]) < 0) for epoch in range(30)} == expected


def test_keypoints_outside_the_cut_out_are_not_visible(tmp_path):
    content = coco({"a": [(20, 20), (24, 22), (60, 44)], "b": SCENE["b"], "c": SCENE["c"]})
    content["annotations"][0]["bbox"] = [16, 16, 12, 12]
    train, _, _, facts = loaded(make(tmp_path, content=content))
    assert facts["left_out"] == {} and train.samples[0].labelled.all()
    assert train[(1, 0)]["visible"].tolist() == [True, True, False]
    for augment in (False, True):
        dataset, *_ = loaded(tmp_path, augment=augment)
        for key in [(e, i) for e in range(20) for i in range(3)]:
            item = dataset[key]
            assert item["target"].dtype == torch.float32 and 0 <= item["target"].min() and item["target"].max() <= 1


# ---- a function of (seed, epoch, index) ------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_items_depend_on_seed_epoch_and_index_alone(tmp_path):
    make(tmp_path)
    first, *_ = loaded(tmp_path, augment=True)
    again, *_ = loaded(tmp_path, augment=True, cache="off")
    other, *_ = loaded(tmp_path, augment=True, seed=1)
    torch.manual_seed(5)
    want = first[(3, 0)]
    again[(1, 2)], torch.rand(7)  # another history
    state = torch.get_rng_state()
    assert same(again[(3, 0)], want)
    assert torch.equal(torch.get_rng_state(), state)  # it leaves no trace in torch's own generator
    for different in (first[(4, 0)], other[(3, 0)]):
        assert not torch.equal(different["pixel_values"], want["pixel_values"])
        assert not torch.equal(different["target"], want["target"])


def test_batches_are_the_same_with_and_without_workers_and_cache(tmp_path):
    make(tmp_path)
    train, *_ = loaded(tmp_path, augment=True)
    plain, *_ = loaded(tmp_path, augment=True, cache="off")

    def batches(dataset, workers):
        sampler = EpochBatches(len(train), 1, 0)
        sampler.set_range(2, 0, 9)
        return list(build_loader(dataset, sampler, collate, workers))

    mine = batches(train, 0)
    assert len(mine) == 3 and sorted(int(batch["index"]) for batch in mine) == [0, 1, 2]
    for theirs in (batches(train, 2), batches(plain, 0)):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))


def test_evaluation_and_augment_off_see_the_plain_picture(tmp_path):
    _, val, *_ = loaded(make(tmp_path), augment=True)
    train, *_ = loaded(tmp_path)
    for dataset in (val, train):
        assert same(dataset[(0, 0)], dataset[(7, 0)])
    assert same(val[(0, 0)], train[(0, 0)])


def test_normalisation_is_the_image_processors(tmp_path):
    make(tmp_path)
    own = SimpleNamespace(do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2])
    train, *_ = build_loaders(settings(tmp_path), Preprocess(own, (32, 32)), read_tables(str(tmp_path), "auto", 0))
    plain = loaded(tmp_path)[0][(1, 0)]["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (own.image_mean, own.image_std))
    assert torch.allclose(train.dataset[(1, 0)]["pixel_values"] * std + mean, plain, atol=1e-6)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that were decoded, in order."""
    calls = []

    def counting(path, claimed=None):
        calls.append(path.name)
        return decode(path, claimed)

    monkeypatch.setattr(data, "decode", counting)
    return calls


def test_with_cache_nothing_is_decoded_again_and_without_it_each_time(tmp_path, decoded):
    train, val, *_ = loaded(make(tmp_path))
    assert sorted(decoded) == ["a.png", "a.png", "b.png", "c.png"]
    for epoch in (1, 2):
        [train[(epoch, i)] for i in range(3)], val[(0, 0)]
    assert len(decoded) == 4
    train, *_ = loaded(tmp_path, cache="off")
    decoded.clear()
    [train[(1, i)] for i in range(3)]
    assert decoded == ["a.png", "b.png", "c.png"]
    (tmp_path / "train2017" / "a.png").write_bytes(b"")
    one_line(lambda: train[(0, 0)], "a.png .*: no picture that can be decoded")


def test_a_second_start_decodes_at_first_use_and_gives_the_same(tmp_path, decoded):
    first, _, _, facts = loaded(make(tmp_path), augment=True)
    decoded.clear()
    train, _, _, again = loaded(tmp_path, augment=True)
    assert not decoded and again == facts
    for mine, theirs in zip([first[(1, i)] for i in range(3)], train.__getitems__([(1, i) for i in range(3)]), strict=True):
        assert same(mine, theirs)
    assert sorted(decoded) == ["a.png", "b.png", "c.png"]


def test_what_turns_out_bad_in_training_stops_nothing(tmp_path):
    make(tmp_path)
    train, *_ = loaded(tmp_path, augment=True, cache="off")
    (tmp_path / "train2017" / "a.png").write_bytes(b"")
    items = {epoch: train[(epoch, 0)] for epoch in (1, 2, 3, 4, 5, 6)}
    for epoch in reversed(items):
        assert same(train[(epoch, 0)], items[epoch])
    assert all(item["visible"].any() and item["pixel_values"].std() > 0 for item in items.values())
    assert train.new_faults() == [(str(tmp_path / "train2017" / "a.png"), "no picture that can be decoded")]


def test_the_cache_respects_its_limit_and_holds_no_more_than_crops_need(tmp_path):
    splits, *_ = read(make(tmp_path))
    picture = 3 * W * H
    for limit, kept in ((0, 0), (picture - 1, 0), (2 * picture, 2), (9 * picture, 3)):
        _, cache = check_samples(splits["train"], preprocess(), Faults(), limit, "test")
        assert cache.kept == kept and cache.bytes <= limit
    _, cache = check_samples(splits["train"], preprocess(4, 4), Faults(), 10**6, "test")
    assert all(p.shrunk > 1 for p in cache.items) and cache.bytes < picture
    figures, cache = check_samples([*splits["train"], *splits["train"]], preprocess(), Faults(), 10**6, "test")
    assert len(figures) == 6 and len(cache) == 3 and cache.bytes == 3 * picture  # a picture with two figures is kept once


# ---- pictures --------------------------------------------------------------------------------------------------------


def brightness_at(dataset, index):
    """Of each keypoint's pixel in the input, as a share of the brightest; all keypoints must be visible."""
    item = dataset[(0, index)]
    assert item["visible"].all()
    pixels = item["pixel_values"].amax(dim=0)
    h, w = pixels.shape
    places = (item["target"] * torch.tensor([w - 1, h - 1])).round().long()
    return [float(pixels[y, x] / pixels.max()) for x, y in places]


def test_keypoints_follow_the_exif_orientation_that_the_annotation_claims(tmp_path):
    stored = [(8, 10), (30, 20), (50, 40)]
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turn clockwise: a stored (x, y) is seen at (H - 1 - y, x)
    upright = [(H - 1 - y, x) for x, y in stored]
    content = coco({"a": upright, "b": stored, "c": stored})
    content["images"][0].update(width=H, height=W)
    content["images"][2].update(width=H + 1, height=W)
    make(tmp_path, content=content)
    for name in "abc":
        draw(tmp_path / "train2017" / f"{name}.png", stored, exif=turned)
    train, _, _, facts = loaded(tmp_path, (48, 48))
    assert facts["left_out"] == {"picture of another size than its annotation says": 1}
    assert [s.path.stem for s in train.samples] == ["a", "b"]
    for index in (0, 1):
        assert min(brightness_at(train, index)) > 0.6
    rows = make(tmp_path / "rows", "csv, single", content=table({"a": upright, "b": upright}))  # CSV claims no size: as seen
    for name in "ab":
        draw(rows / "images" / f"{name}.png", stored, exif=turned)
    assert min(brightness_at(loaded(rows, (48, 48))[0], 0)) > 0.6


def test_unusual_pictures_have_their_keypoints_in_place(tmp_path):
    points = [(20, 10), (12, 24), (30, 22)]
    files = ["cmyk.jpg", "deep.png", "moving.gif", "palette.png", "grey.png", "clear.png"]
    content = coco({file: points for file in files})
    for image, file in zip(content["images"], files, strict=True):
        image["file_name"] = file
    make(tmp_path, content=content)
    place = tmp_path / "train2017"
    grey = Image.open(draw(tmp_path / "dots.png", points)).convert("RGB")
    light = np.asarray(grey).max(axis=2)
    grey = Image.fromarray(light)
    grey.convert("CMYK").save(place / "cmyk.jpg", quality=95)
    Image.fromarray(light.astype(np.uint16) * 257).save(place / "deep.png")
    grey.save(place / "moving.gif", save_all=True, append_images=[Image.new("L", (W, H), c) for c in (255, 90)])
    grey.convert("P").save(place / "palette.png")
    grey.save(place / "grey.png")
    Image.merge("RGBA", [grey] * 3 + [Image.new("L", (W, H), 255)]).save(place / "clear.png")
    train, _, _, facts = loaded(tmp_path, (48, 48))
    assert facts["left_out"] == {} and len(train) == 6
    usual = train[(0, 4)]["pixel_values"]
    for index, file in enumerate(files):
        assert min(brightness_at(train, index)) > 0.6, file
        assert (train[(0, index)]["pixel_values"] - usual).abs().max() < 0.1, file


def test_broken_pictures_are_left_out_named_and_counted(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    broken = ["half.jpg", "nothing.jpg", "page.jpg", "floats.tif", "narrow.png"]
    content = coco({name: SCENE["a"] for name in ["good", *broken]})
    for image, name in zip(content["images"], ["good.png", *broken], strict=True):
        image["file_name"] = name
    make(tmp_path, content=content)
    place = tmp_path / "train2017"
    draw(place / "good.png", SCENE["a"])
    Image.fromarray(noise).save(place / "half.jpg", quality=95)
    whole = (place / "half.jpg").read_bytes()
    (place / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (place / "nothing.jpg").write_bytes(b"")
    (place / "page.jpg").write_text("<html><body>404</body></html>")
    Image.fromarray(np.zeros((H, W), dtype=np.float32)).save(place / "floats.tif")
    Image.fromarray(noise[:, : W // 2]).save(place / "narrow.png")
    train, _, _, facts = loaded(tmp_path)
    assert [s.path.stem for s in train.samples] == ["good"]
    assert facts["left_out"] == {
        "no picture that can be decoded": 2,
        "picture of another size than its annotation says": 1,
        "picture of floating-point numbers": 1,
        "picture that cannot be decoded": 1,
    }
    text = capsys.readouterr().out
    assert all(name in text for name in broken) and "good.png" not in text
    (place / "good.png").unlink()
    one_line(lambda: loaded(tmp_path), "has no training pictures|the train split has no figure that can be used")


def test_a_split_without_a_usable_figure_is_an_error(tmp_path):
    make(tmp_path)
    (tmp_path / "val2017" / "a.png").write_bytes(b"")
    one_line(lambda: loaded(tmp_path), "the val split has no figure that can be used")
    shutil.rmtree(tmp_path / "train2017")
    one_line(lambda: loaded(tmp_path), "has no training pictures with keypoints")


# ---- data for eval and infer -----------------------------------------------------------------------------------------


def test_eval_refuses_other_keypoints_and_takes_numbers_for_names(tmp_path):
    make(tmp_path)
    origin = {"data_dir": str(tmp_path), "data_format": "auto", "seed": 0, "batch_size": 2}
    known = read(tmp_path)[1].to_json()
    config = settings("", split="val", batch_size=0)
    loader, points, name = load_for_eval(config, preprocess(), known, origin)
    assert len(loader.dataset) == 1 and points.names == NAMES and name == str(tmp_path) and not loader.dataset.augment
    one_line(
        lambda: load_for_eval(settings("", split="test"), preprocess(), known, origin), "has no test split; it has train, val"
    )
    for names, named, told in (
        (["a", "b", "c"], True, "other keypoints, 3 \\(nose"),
        (["0", "1"], False, "than the checkpoint, 2"),
    ):
        other = {**known, "names": names, "named": named}
        one_line(lambda other=other: load_for_eval(config, preprocess(), other, origin), told)
    assert load_for_eval(config, preprocess(), {**known, "names": ["0", "1", "2"], "named": False}, origin)[1].names == NAMES


def test_boxes_for_infer_come_from_results_or_annotations(tmp_path):
    pictures = [draw(tmp_path / f"{name}.png", points) for name, points in SCENE.items()]
    results = [
        {"file_name": "/elsewhere/a.png", "bbox": [1, 2, 30, 40], "score": 0.9},
        {"file_name": "a.png", "bbox": [2, 3, 30, 40], "score": 0.6},
        {"file_name": "a.png", "bbox": [9, 9, 9, 9], "score": 0.4},
        {"file_name": "b.png", "bbox": [9, 9, 9, 9], "score": 0.1},
    ]
    faults = Faults()
    framed = place_boxes(pictures, str(write(tmp_path / "r.json", results)), 0.5, faults)
    assert framed == [(pictures[0], [1, 2, 30, 40], 0.9), (pictures[0], [2, 3, 30, 40], 0.6)]
    (fault,) = faults.counts()
    assert faults.counts()[fault] == 2 and "without a box of score 0.5" in fault
    notes = write(tmp_path / "n.json", coco())
    framed = place_boxes(pictures, str(notes), 0.5, Faults())
    assert [(path.stem, box, score) for path, box, score in framed] == [(n, box_of(p), 1.0) for n, p in SCENE.items()]
    dataset = figures_only(framed, preprocess(), read(make(tmp_path / "set"))[1], Faults())
    assert len(dataset) == 3 and dataset.box(1)[0].tolist() == box_of(SCENE["b"]) and dataset.box(1)[1] == PADDING
    assert place_boxes(pictures, "", 0.5, Faults()) == [(path, None, 1.0) for path in pictures]


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "is not valid JSON"),
        ("5", "expected COCO results"),
        ([{"bbox": [1, 2, 3, 4]}], "expected COCO results"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3]}], "expected COCO results"),
        ([{"file_name": "a.png", "bbox": [1, 2, 0, 4]}], "has no box of score 0.5 or more"),
        ([{"file_name": "a.png", "bbox": [1, 2, math.nan, 4]}], "has no box of score 0.5 or more"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3, 10**400]}], "expected COCO results"),
        ([{"file_name": "", "bbox": [1, 2, 3, 4]}], "expected COCO results"),
        (json.dumps([]).replace("[]", "[" * 100_000), "is not valid JSON"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3, 4], "score": "sure"}], "expected COCO results"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3, 4], "score": None}], "expected COCO results"),
        ([{"file_name": 5, "bbox": [1, 2, 3, 4]}], "expected COCO results"),
        ({"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}, "expected COCO results"),
        ({"images": [{"id": [1], "file_name": "a.png"}], "annotations": []}, "expected COCO results"),
        ([{"file_name": "elsewhere.png", "bbox": [1, 2, 3, 4]}], "has no box of score 0.5 or more for any of the 1 pictures"),
        ([], "has no box of score 0.5"),
    ],
)
def test_a_file_of_boxes_that_is_none_is_refused(tmp_path, content, told):
    picture = draw(tmp_path / "a.png")
    one_line(lambda: place_boxes([picture], str(write(tmp_path / "boxes.json", content)), 0.5, Faults()), told)


def boxes_for(folder, names, pictures):
    """{picture: x of the boxes that it gets} from a file in which the box of names[i] begins at x = i."""
    rows = [{"file_name": str(name), "bbox": [i, 5, 30, 30], "score": 0.9} for i, name in enumerate(names)]
    framed = place_boxes(pictures, str(write(folder / "boxes.json", rows)), 0.5, Faults())
    return {str(path.relative_to(folder)): [box[0] for p, box, _ in framed if p == path] for path in pictures}


def test_pictures_of_one_name_get_the_boxes_of_their_own_folder(tmp_path):
    one, two, other = (draw(tmp_path / name) for name in ("cam1/frame.png", "cam2/frame.png", "cam1/x.png"))
    both = {"cam1/frame.png": [0], "cam2/frame.png": [1]}
    for names in ((one, two), ("cam1/frame.png", "cam2/frame.png"), ("D:\\x\\cam1\\frame.png", "/old/cam2/frame.png")):
        assert boxes_for(tmp_path, names, [one, two]) == both
    assert boxes_for(tmp_path, [two, one], [one]) == {"cam1/frame.png": [1]}  # the other's picture is not asked for
    assert boxes_for(tmp_path, ["elsewhere/x.png", "x.png"], [other, one]) == {"cam1/x.png": [0, 1], "cam1/frame.png": []}
    assert boxes_for(tmp_path, ["x.png", "elsewhere/x.png"], [other]) == {"cam1/x.png": [0, 1]}
    one_line(lambda: boxes_for(tmp_path, ["frame.png"], [one, two]), "frame.png may be .*cam1/frame.png or .*cam2/frame.png")
    one_line(
        lambda: boxes_for(tmp_path, ["a/frame.png", "b/frame.png"], [one]), "cam1/frame.png may be a/frame.png or b/frame.png"
    )


def test_boxes_that_show_nothing_are_named(tmp_path):
    picture, faults = draw(tmp_path / "a.png"), Faults()
    rows = [[1, 2, 30, 40], [1, 2, 0, 4], [1, math.nan, 3, 4], [1, 2, -3, 4], [W + 5, 2, 9, 9]]
    rows = [{"file_name": "a.png", "bbox": box} for box in rows]
    framed = place_boxes([picture], str(write(tmp_path / "b.json", rows)), 0.5, faults)
    points = read(make(tmp_path / "set"))[1]
    assert figures_only(framed, preprocess(), points, faults).box(0)[0].tolist() == [1, 2, 30, 40]
    assert faults.counts() == {"box that does not fit its picture": 1, "box without an area or a score": 3}
    assert faults.found["box without an area or a score"][0] == "b.json row 2: a.png"


@pytest.mark.parametrize(
    "header, row",
    [
        ("file_name,x,y,w,h,score", "a.png,1,2,30,40,0.9"),
        ("image;class;score;xmin;ymin;xmax;ymax", "a.png;cat;0.9;1;2;31;42"),
        ("picture,label,score,x,y,width,height", "a.png,cat,0.9,1,2,30,40"),
        ("image,x1,y1,x2,y2,confidence", "a.png,1,2,31,42,0.9"),
        ("image,bbox_x,bbox_y,bbox_w,bbox_h,score", "a.png,1,2,30,40,0.9"),
    ],
)
def test_boxes_may_come_in_a_table(tmp_path, header, row):
    picture = draw(tmp_path / "a.png")
    framed = place_boxes([picture], str(write(tmp_path / "boxes.csv", f"{header}\n{row}\n")), 0.5, Faults())
    assert framed == [(picture, [1, 2, 30, 40], 0.9)]
    one_line(lambda: place_boxes([picture], str(write(tmp_path / "boxes.csv", "image,a\na.png,1\n")), 0.5, Faults()), "or a CSV")


# ---- what looks wrong in all files together ----------------------------------------------------------------------------


def many(count=12, size=(W, H)):
    """Scene of figures that lie all over pictures of this size, given in the pixels of W x H."""
    return {f"p{i}": [(8 + 4 * i, 6 + 3 * i), (4 + 4 * i, 9 + 3 * i), (12 + 4 * i, 8.5 + 3 * i)] for i in range(count)}


def scaled(scene, x, y):
    return {name: [(px * x, py * y) for px, py in points] for name, points in scene.items()}


def test_percent_or_pixels_of_other_pictures_are_no_pixels(tmp_path, capsys):
    scene = many()
    write(tmp_path / "train.csv", table(scaled(scene, 100 / W, 100 / H)))
    for name in scene:
        draw(tmp_path / "images" / f"{name}.png")
    with pytest.raises(UserError, match=r"\d+ of 3\d train keypoints lie outside their pictures; expected pixels"):
        loaded(tmp_path)
    for name in scene:
        draw(tmp_path / "images" / f"{name}.png", size=(150, 120))  # here percent lie inside, and are said
    train, *_ = loaded(tmp_path)
    assert len(train) + 1 >= 10 and "every picture is larger: are the coordinates percent?" in capsys.readouterr().out
    write(tmp_path / "train.csv", table(scaled(scene, 150 / W, 120 / H)))
    loaded(tmp_path)
    assert "are the coordinates percent?" not in capsys.readouterr().out


def test_fractions_in_coco_are_brought_into_pixels(tmp_path):
    content = coco()
    for note in content["annotations"]:
        note["keypoints"] = [value / (W, H, 1)[i % 3] for i, value in enumerate(note["keypoints"])]
        note["bbox"] = [value / (W, H)[i % 2] for i, value in enumerate(note["bbox"])]
    train, *_ = loaded(make(tmp_path, content=content))
    for sample in train.samples:
        assert np.allclose(sample.points, SCENE[sample.path.stem]) and np.allclose(sample.box, box_of(SCENE[sample.path.stem]))
        assert math.isnan(sample.area)


def test_boxes_that_are_corners_are_said(tmp_path, capsys):
    scene = many()
    content = coco(scene)
    for name in scene:
        draw(tmp_path / "images" / f"{name}.png")
    write(tmp_path / "annotations.json", content)
    loaded(tmp_path)
    assert "reach far beyond" not in capsys.readouterr().out
    for note in content["annotations"]:
        x, y, w, h = note["bbox"]
        note["bbox"] = [x, y, x + w, y + h]
    write(tmp_path / "annotations.json", content)
    loaded(tmp_path)
    assert "boxes reach far beyond their pictures: are they x, y, width, height?" in capsys.readouterr().out


def test_annotations_in_several_files_are_not_half_read(tmp_path):
    make(tmp_path, "coco")
    first = tmp_path / "annotations" / "person_keypoints_train2017.json"
    write(tmp_path / "annotations" / "figures_train.json", coco())  # another name: COCO's own counts
    assert len(read(tmp_path)[0]["train"]) == 3
    shutil.copy(first, first.with_name("person_keypoints_train_b.json"))
    with pytest.raises(UserError, match="may both be the train annotations; merge them, or move one away"):
        read(tmp_path)


def test_one_file_for_all_splits_keeps_what_was_held_out(tmp_path):
    scene = {f"{split}/{name}": points for split in ("train", "val") for name, points in SCENE.items()}
    for name, points in scene.items():
        draw(tmp_path / f"{name}.png", points)
    write(tmp_path / "labels.csv", table(scene))
    splits, *_ = read(tmp_path)
    assert {split: {s.path.parent.name for s in mine} for split, mine in splits.items()} == {"train": {"train"}, "val": {"val"}}


def test_figures_that_are_given_twice_count_once_whatever_their_ids(tmp_path):
    make(tmp_path, "coco")
    content = coco()
    content["annotations"] += [{**note, "id": 500 + i} for i, note in enumerate(content["annotations"])]
    content["annotations"] += [{**content["annotations"][0], "keypoints": [9, 9, 2] * 3}]  # another figure of the same id
    write(tmp_path / "annotations" / "person_keypoints_train2017.json", content)
    train, *_, facts = loaded(tmp_path)
    assert len(train) == 4 and facts["left_out"] == {"annotation that is given twice": 3}


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.json", '{"version": "5.0", "shapes": [], "imagePath": "a.png"}', "a.json looks like LabelMe's JSON"),
        ("annotations.xml", "<annotations><version>1.1</version></annotations>", "annotations.xml looks like CVAT's own XML"),
    ],
)
def test_formats_of_other_programs_are_called_by_their_name(tmp_path, name, content, told):
    write(tmp_path / name, content)
    one_line(lambda: read(tmp_path), told)


def test_a_folder_around_the_data_is_looked_into_and_an_archive_is_called_one(tmp_path):
    make(tmp_path / "export" / "points", "coco")
    assert len(read(tmp_path / "export")[0]["train"]) == 3
    write(tmp_path / "data.zip", "PK")
    one_line(lambda: read(tmp_path / "data.zip"), "there is no folder .*data.zip: it is a file; unpack archives")
