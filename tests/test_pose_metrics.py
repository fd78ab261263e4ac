"""Pose metrics are what one gets by hand and from pycocotools, whatever the batch size; the pictures can be drawn and read."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import POSE, use_task
from PIL import Image
from test_pose_model import NAMES, POINTS, keypoints, prepare, save_base

TASK = POSE
use_task(TASK)

from common.batches import eval_loader  # noqa: E402
from common.samples import Faults  # noqa: E402
from data import PoseData, Preprocess, check_samples, collate  # noqa: E402
from formats import read_dataset  # noqa: E402
from keypoints import KeypointSet, Sample  # noqa: E402
from metrics import (  # noqa: E402
    AREA_OF_BOX,
    evaluate,
    oks_metrics,
    point_errors,
    pose_metrics,
    predict,
    save_samples,
)
from model import keypoint_loss  # noqa: E402
from pages import draw_pages, draw_pair, draw_poses, draw_results, farthest_first  # noqa: E402

SIZE = (120, 90)


def blank(folder, count, size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return [folder / f"{i:02d}.png" for i in range(count)]


def figure_of(path, points, labelled=None, box=(10, 10, 80, 60), area=math.nan):
    points = np.array(points, dtype=float)
    labelled = np.ones(len(points), bool) if labelled is None else np.array(labelled, bool)
    return Sample(path, SIZE, points, labelled, None if box is None else np.array(box, dtype=float), area, path.name)


def dataset_of(samples, points, size=(32, 32)):
    class Processor:
        do_normalize = False

    preprocess = Preprocess(Processor, size)
    good, cache = check_samples(samples, preprocess, Faults(), 10**8, "test")
    assert len(good) == len(samples)
    return PoseData(good, cache, preprocess, points)


def found_at(dataset, offsets, scores=None):
    """Predictions that lie by `offsets` (N, K, 2) beside the truth."""
    return [
        {
            "index": i,
            "points": s.points + np.array(offset),
            "scores": np.full(len(s.points), 0.5 if scores is None else scores[i]),
        }
        for i, (s, offset) in enumerate(zip(dataset.samples, offsets, strict=True))
    ]


# ---- by hand ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Two figures of three keypoints, one of them unlabelled in each; the second has no box, so the picture is its box."""
    paths = blank(tmp_path / "pictures", 2)
    samples = [
        figure_of(paths[0], [(20, 20), (40, 40), (60, 50)], [True, True, False]),
        figure_of(paths[1], [(50, 30), (10, 80), (99, 9)], [False, True, True], box=None),
    ]
    return dataset_of(samples, keypoints(3))


def test_errors_by_hand(small):
    # Distances: 5 and 10 of a box 80 x 60; 2 and 12 of a picture 120 x 90. What is not labelled may lie anywhere.
    offsets = [[(3, 4), (-6, 8), (500, 500)], [(math.inf, 7), (0, 2), (12, 0)]]
    found = found_at(small, offsets)
    metrics = pose_metrics(small, found, keypoints(3))
    assert metrics["pixel_error"] == pytest.approx((5 + 10 + 2 + 12) / 4)
    assert metrics["pixel_error_median"] == pytest.approx(7.5)
    assert metrics["mae"] == pytest.approx((3 + 4 + 6 + 8 + 0 + 2 + 12 + 0) / 8)
    # 5 / 80 = .0625, 10 / 80 = .125, 2 / 120 = .017, 12 / 120 = .1
    assert metrics["pck_05"] == pytest.approx(1 / 4) and metrics["pck_10"] == pytest.approx(3 / 4)
    areas = math.sqrt(80 * 60), math.sqrt(120 * 90)
    assert metrics["nme"] == pytest.approx((5 / areas[0] + 10 / areas[0] + 2 / areas[1] + 12 / areas[1]) / 4)
    assert metrics["per_keypoint_pixel_error"] == {"p0": 5, "p1": pytest.approx(6), "p2": 12}
    differences, boxes = point_errors(small, found)
    assert boxes.tolist() == [[10, 10, 80, 60], [0, 0, 120, 90]]
    assert np.isnan(differences).all(axis=2).tolist() == [[False, False, True], [True, False, False]]


def test_rows_of_pictures_with_their_weights_give_the_metric_back(tmp_path):
    """Two figures in one picture, one in another: the rows are of pictures, for these are what is drawn anew."""
    paths = [*blank(tmp_path / "a", 1), *blank(tmp_path / "b", 1)]  # both called 00.png
    figures = [figure_of(paths[i], [(20, 20), (40, 40)], [True, labelled]) for i, labelled in ((0, True), (1, True), (0, False))]
    dataset = dataset_of(figures, keypoints(2))
    found = found_at(dataset, [[(3, 4), (6, 8)], [(0, 1), (0, 2)], [(0, 9), (0, 99)]])
    save_samples(dataset, found, tmp_path / "samples.json")
    told = json.loads((tmp_path / "samples.json").read_text())
    assert (told["metric"], told["higher_is_better"]) == ("pixel_error", False)
    assert [row["file"] for row in told["rows"]] == ["a/00.png", "b/00.png"]
    assert [(row["value"], row["weight"]) for row in told["rows"]] == [(pytest.approx((5 + 10 + 9) / 3), 3), (1.5, 2)]
    mean = np.average([row["value"] for row in told["rows"]], weights=[row["weight"] for row in told["rows"]])
    assert mean == pytest.approx(pose_metrics(dataset, found, keypoints(2))["pixel_error"])


def test_order_of_figures_and_a_keypoint_that_is_never_labelled(small, tmp_path):
    offsets = [[(3, 4), (-6, 8), (0, 0)], [(0, 0), (0, 2), (12, 0)]]
    found = found_at(small, offsets, [0.6, 0.5])
    a, b = pose_metrics(small, found, keypoints(3)), pose_metrics(small, found[::-1], keypoints(3))
    assert a == {key: value if isinstance(value, dict) or value is None else pytest.approx(value) for key, value in b.items()}
    path = small.samples[0].path
    lonely = dataset_of([figure_of(path, [(20, 20), (40, 40)], [True, False])], keypoints(2))
    metrics = pose_metrics(lonely, found_at(lonely, [[(0, 1), (0, 0)]]), keypoints(2))
    assert metrics["per_keypoint_pixel_error"] == {"p0": 1, "p1": None} and metrics["pixel_error"] == 1
    json.dumps(metrics, allow_nan=False)


def test_oks_by_hand_and_the_area_that_stands_in(tmp_path):
    (path,) = blank(tmp_path / "pictures", 1)
    sigma, box = 0.1, (10, 10, 80, 60)
    points = KeypointSet(["a", "b"], [], [], [sigma, 2 * sigma], False)
    for area, counts in ((math.nan, AREA_OF_BOX * 80 * 60), (0.0, AREA_OF_BOX * 80 * 60), (1500.0, 1500.0), (math.inf, 2544.0)):
        dataset = dataset_of([figure_of(path, [(30, 30), (70, 50)], box=box, area=area)], points)

        def similarity(d, area=counts):
            return (math.exp(-(d**2) / (2 * area * (2 * sigma) ** 2)) + math.exp(-(d**2) / (2 * area * (4 * sigma) ** 2))) / 2

        # A shift where OKS is a little above and a little below .75: AP over 0.50:0.05:0.95 is the share of thresholds below it.
        shift = next(d for d in np.linspace(0, 60, 6001) if similarity(d) < 0.75)
        for d, share in ((shift - 0.05, 0.6), (shift + 0.05, 0.5), (0, 1.0)):
            scored = oks_metrics(dataset, found_at(dataset, [[(d, 0), (0, d)]]), np.array([box], dtype=float), points)
            assert scored == {"oks_ap": pytest.approx(share), "oks_ap_50": pytest.approx(1)}, (area, d)


# ---- pycocotools -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """(COCO file, data set read from it, predictions, annotations); some pictures have two figures, some points no label."""
    folder = tmp_path_factory.mktemp("scene")
    rng, sigmas = np.random.default_rng(0), [0.03, 0.05, 0.08, 0.1, 0.12]
    paths = blank(folder / "images", 12, (300, 200))
    images = [{"id": 50 + i, "file_name": path.name, "width": 300, "height": 200} for i, path in enumerate(paths)]
    notes = []
    for image in images:
        for _ in range(rng.integers(1, 3)):
            w, h = rng.uniform(60, 140, 2)
            x, y = rng.uniform(0, 300 - w), rng.uniform(0, 200 - h)
            points = np.round(rng.uniform((x, y), (x + w, y + h), (5, 2)), 2)
            flags = rng.choice([0, 1, 2], 5, p=[0.2, 0.2, 0.6])
            flags[rng.integers(5)] = 2
            note = {"id": len(notes) + 1, "image_id": image["id"], "category_id": 3, "num_keypoints": int((flags > 0).sum())}
            note |= {"keypoints": np.column_stack([points, flags]).ravel().tolist(), "iscrowd": 0}
            notes.append({**note, "bbox": [x, y, w, h], "area": float(w * h * rng.uniform(0.3, 0.9))})
    category = {"id": 3, "name": "figure", "keypoints": NAMES, "sigmas": sigmas}
    (folder / "annotations.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": notes, "categories": [category]})
    )
    splits, points, _ = read_dataset(folder, "auto", 0, Faults())
    samples = sorted([*splits["train"], *splits["val"]], key=lambda s: int(s.where.split()[-1]))
    dataset = dataset_of(samples, points)
    offsets = rng.normal(0, 1, (len(samples), 5, 2)) * rng.uniform(0.5, 12, (len(samples), 1, 1))
    return folder / "annotations.json", dataset, found_at(dataset, offsets, rng.random(len(samples)).round(2)), notes


def test_oks_ap_equals_pycocotools_on_the_file_itself(scene):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file, dataset, found, notes = scene
    assert len(found) == len(notes) > 14
    rows = [
        {
            "image_id": note["image_id"],
            "category_id": 3,
            "keypoints": np.column_stack([item["points"], item["scores"]]).ravel().tolist(),
            "score": float(item["scores"].mean()),
        }
        for note, item in zip(notes, found, strict=True)
    ]
    points = KeypointSet(NAMES, [], [], [0.03, 0.05, 0.08, 0.1, 0.12], True)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        theirs = COCOeval(truth, truth.loadRes(rows), "keypoints")
        theirs.params.kpt_oks_sigmas = np.array(points.sigmas)
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    metrics = pose_metrics(dataset, found, points)
    assert metrics["oks_ap"] == pytest.approx(theirs.stats[0], abs=1e-9)
    assert metrics["oks_ap_50"] == pytest.approx(theirs.stats[1], abs=1e-9)
    assert 0.1 < metrics["oks_ap"] < metrics["oks_ap_50"] < 1
    strict = KeypointSet(NAMES, [], [], [0.01] * 5, True)
    assert pose_metrics(dataset, found, strict)["oks_ap"] < metrics["oks_ap"]


def test_a_perfect_prediction_has_no_error_and_an_average_precision_of_one(scene):
    _, dataset, _, _ = scene
    metrics = pose_metrics(dataset, found_at(dataset, np.zeros((len(dataset), 5, 2))), POINTS)
    zero = {name: metrics[name] for name in ("pixel_error", "mae", "nme", "pixel_error_median")}
    assert set(zero.values()) == {0.0} and metrics["pck_05"] == metrics["pck_10"] == 1
    assert metrics["oks_ap"] == pytest.approx(1) and metrics["oks_ap_50"] == pytest.approx(1)


# ---- with a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """(model, data set): a random model and eleven figures, some without box, some with keypoints outside their cut-out."""
    folder = tmp_path_factory.mktemp("answered")
    model, _, _ = prepare(save_base(folder / "base"))
    rng, samples = np.random.default_rng(1), []
    for i, path in enumerate(blank(folder / "pictures", 11)):
        points = rng.uniform((5, 5), (115, 85), (5, 2))
        labelled = rng.random(5) < 0.7
        labelled[i % 5] = True
        samples.append(figure_of(path, points, labelled, box=None if i % 3 == 0 else (20, 15, 40 + 3 * i, 60)))
    return model.eval(), dataset_of(samples, POINTS)


def test_metrics_do_not_depend_on_the_batch_size(answered):
    model, dataset = answered
    found = {size: predict(model, eval_loader(dataset, collate, size)) for size in (1, 4)}
    one, many = found[1][0], found[4][0]
    assert [item["index"] for item in one] == [item["index"] for item in many] == list(range(11))
    for a, b in zip(one, many, strict=True):
        assert np.abs(a["points"] - b["points"]).max() < 1e-3 and np.abs(a["scores"] - b["scores"]).max() < 1e-5
    metrics = [evaluate(model, eval_loader(dataset, collate, size), POINTS) for size in (1, 4)]
    for key, value in metrics[0].items():
        if not isinstance(value, dict):
            assert value == pytest.approx(metrics[1][key], rel=1e-4), key
    assert list(metrics[0]) == list(metrics[1]) and metrics[0]["val_loss"] > 0


def test_answers_are_in_pixels_of_the_original_and_the_loss_is_that_of_training(answered):
    model, dataset = answered
    found, loss = predict(model, eval_loader(dataset, collate, 4))
    batch = [dataset[(0, i)] for i in range(11)]
    pixels, target, visible = (torch.stack([item[key] for item in batch]) for key in ("pixel_values", "target", "visible"))
    with torch.no_grad():
        coords, scores, heatmaps = model(pixels)
        assert loss == pytest.approx(float(keypoint_loss(coords, target, visible, heatmaps)), rel=1e-5)
    assert not visible[:, 0].all() and visible.any()
    for i, item in enumerate(found):
        (x, y, w, h), padding = dataset.box(i)
        wide = max(w, h) * padding  # the input is a square
        low = np.array([x + w / 2, y + h / 2]) - wide / 2
        np.testing.assert_allclose(item["points"], low + coords[i].double().numpy() * wide, atol=1e-3)
        np.testing.assert_allclose(item["scores"], scores[i], atol=1e-6)


def test_farthest_first_is_relative_to_the_box(tmp_path):
    paths = blank(tmp_path / "pictures", 3)
    samples = [
        figure_of(paths[0], [(20, 20), (40, 40)], box=(10, 10, 80, 60)),  # 8 px of 80
        figure_of(paths[1], [(20, 20), (40, 40)], box=(10, 10, 30, 40)),  # 6 px of 40
        figure_of(paths[2], [(20, 20), (40, 40)], [True, False], box=(10, 10, 40, 20)),  # 4 px of 40
    ]
    dataset = dataset_of(samples, keypoints(2))
    found = found_at(dataset, [[(8, 0), (0, 8)], [(6, 0), (6, 0)], [(0, 4), (90, 90)]])
    assert farthest_first(dataset, found) == [1, 0, 2] or farthest_first(dataset, found) == [1, 2, 0]
    assert farthest_first(dataset, found[::-1])[0] == 1


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 12), (400, 300), (1, 900)])
def test_keypoints_at_and_beyond_the_border_are_drawn_inside_the_picture(size):
    width, height = size
    places = np.array([(0, 0), (width - 1, height - 1), (-50, -50), (width / 2, 5), (width + 90, 3)])
    black = np.zeros((height, width, 3), np.uint8)
    picture = draw_poses(black, [(places, np.ones(5, bool))], POINTS)
    assert np.asarray(picture).max() > 100 and picture.width == pytest.approx(width * picture.height / height, abs=1)
    assert min(picture.size) >= 320 or max(picture.size) == max(1280, *size)  # a strip is not blown up without end
    assert np.asarray(draw_poses(black, [(places, np.zeros(5, bool))], POINTS)).max() == 0
    assert np.asarray(draw_poses(black, [], POINTS)).max() == 0


def test_a_keypoint_is_drawn_where_it_lies():
    one = KeypointSet(["a"], [], [], [0.05], True)
    for x, y in ((10, 20), (33, 7.5)):
        picture = np.asarray(draw_poses(np.zeros((40, 50, 3), np.uint8), [(np.array([(x, y)]), np.array([True]))], one))
        zoom = picture.shape[0] / 40
        rows, columns = np.nonzero(picture.max(axis=2))
        centre = (columns.mean() + 0.5) / zoom - 0.5, (rows.mean() + 0.5) / zoom - 0.5
        assert centre == pytest.approx((x, y), abs=0.2)


def test_errors_are_lines_from_the_truth_and_unlabelled_keypoints_have_none():
    """68 keypoints, too: they are dots without names, so small that most of the picture is left to be seen."""
    for count in (2, 68):
        points = KeypointSet([f"p{k}" for k in range(count)], [], [], [0.05] * count, True)
        truth = np.column_stack([np.linspace(10, 90, count), np.full(count, 20.0)])
        labelled = np.arange(count) > 0
        pair = draw_pair(np.zeros((100, 100, 3), np.uint8), truth, labelled, truth + [0, 60], points)
        (left, right), zoom = (np.asarray(picture).astype(int) for picture in pair), 480 / 100
        middle = (right[round(50 * zoom)] > 100).any(axis=1)  # half way down, where only lines pass
        assert middle[: round(9 * zoom)].sum() == 0 and middle[round(88 * zoom) :].sum() > 0
        assert not middle[round(9 * zoom) : round(11 * zoom)].any()  # the first keypoint has no label
        assert (left[round(50 * zoom) :] == 0).all() and (left[: round(30 * zoom), round(88 * zoom) :] > 0).any()
        assert (left.max(axis=2) > 0).mean() < 0.03


@pytest.mark.slow
def test_pages_and_plots_are_readable_pngs(answered, tmp_path):
    model, dataset = answered
    names = ["$left$ _hand", "\u732b", "x" * 200, "d", "e"]  # a formula, a letter that the font lacks, no room
    points = KeypointSet(names, [(0, 1)], [], [0.05] * 5, True)
    found, _ = predict(model, eval_loader(dataset, collate, 4))
    draw_pages(dataset, found, points, tmp_path / "page.png", tmp_path / "worst.png")
    draw_results(model, dataset, points, tmp_path)
    drawn = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    plots = [f"plots/{name}.png" for name in ("errors", "pck_curve", "per_keypoint")]
    assert drawn == ["page.png", *plots, "predictions/validation.png", "worst.png"]
    for name in drawn:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert 200 < min(picture.size) and max(picture.size) <= 4000 and np.ptp(np.asarray(picture)) > 100, name
