"""Detection metrics are pycocotools' own, whatever the batch size; the pictures of predictions can be drawn and read."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import DETECTION, ROOT, use_task
from PIL import Image, ImageDraw
from test_detection_model import CLASSES, save_base

TASK = DETECTION
use_task(TASK)
sys.path.append(str(ROOT / "scripts"))

from average_precision import average_precisions  # noqa: E402
from boxes import make_sample  # noqa: E402
from common.batches import eval_loader  # noqa: E402
from common.config import UserError  # noqa: E402
from common.samples import Faults  # noqa: E402
from common.vision.pairs import covered, write_labels  # noqa: E402
from data import DetectionData, Preprocess, check_samples, collate  # noqa: E402
from formats import read_dataset  # noqa: E402
from metrics import (  # noqa: E402
    best_f1,
    coco_eval,
    coco_metrics,
    confidence_curves,
    confident,
    draw_evaluation,
    evaluate,
    held,
    least_score,
    match_rows,
    mean_curve,
    predict,
)
from model import load_base  # noqa: E402
from pages import draw_boxes, draw_pages, draw_results, judge, most_mistaken  # noqa: E402


def random_scene(folder, count=25, size=(300, 200)):
    """A COCO folder of blank pictures with random boxes, crowds among them, and noisy random detections of them."""
    rng = np.random.default_rng(0)
    images, annotations, found = [], [], []
    (folder / "images").mkdir(parents=True)
    ids = [3, 7, 20]
    for i in range(count):
        Image.new("RGB", size).save(folder / "images" / f"{i:02d}.png")
        images.append({"id": 100 + i, "file_name": f"{i:02d}.png", "width": size[0], "height": size[1]})
        corners, labels = [], []
        for _ in range(rng.integers(0, 7)):
            w, h = rng.uniform(8, 150, 2)
            x, y = rng.uniform(0, size[0] - w), rng.uniform(0, size[1] - h)
            k = int(rng.integers(0, 3))
            box = [round(float(v), 2) for v in (x, y, w, h)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + i,
                    "category_id": ids[k],
                    "bbox": box,
                    "area": box[2] * box[3] * float(rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 3)):
                moved = np.array([x, y, x + w, y + h]) + rng.normal(0, 0.08, 4) * [w, h, w, h]
                corners.append(np.sort(moved.reshape(2, 2), axis=0).ravel())
                labels.append(k if rng.random() < 0.8 else int(rng.integers(0, 3)))
        for _ in range(4):
            corners.append(np.sort(rng.uniform(0, 200, (2, 2)), axis=0).ravel())
            labels.append(int(rng.integers(0, 3)))
        scores = rng.random(len(labels)).round(2)  # ties, too
        found.append({"index": i, "scores": scores, "labels": np.array(labels), "boxes": np.array(corners)})
    categories = [{"id": number, "name": name} for number, name in zip(ids, CLASSES, strict=True)]
    table = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(table))
    return found, ids


def test_metrics_equal_pycocotools_on_the_file_itself(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found, ids = random_scene(tmp_path)
    splits, classes, _ = read_dataset(tmp_path, "auto", 0, Faults())
    samples = sorted([*splits["train"], *splits["val"]], key=lambda s: s.path.name)
    samples, *_ = check_samples(samples, Preprocess(load_base_processor()), Faults(), 0, "test")
    assert len(samples) == len(found)
    metrics = coco_metrics(coco_eval(samples, found, classes), classes)
    rows = [
        {"image_id": 100 + f["index"], "category_id": ids[k], "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "score": s}
        for f in found
        for b, k, s in zip(f["boxes"].tolist(), f["labels"].tolist(), f["scores"].tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "annotations.json"))
        theirs = COCOeval(truth, truth.loadRes(rows), "bbox")
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
        for number, name in zip(ids, CLASSES, strict=True):  # one class at a time
            alone = COCOeval(truth, truth.loadRes(rows), "bbox")
            alone.params.catIds = [number]
            alone.evaluate(), alone.accumulate(), alone.summarize()
            assert metrics["per_class_map"][name] == pytest.approx(alone.stats[0], abs=1e-9)
            assert metrics["per_class_map_50"][name] == pytest.approx(alone.stats[1], abs=1e-9)
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    assert [metrics[name] for name in names] == pytest.approx(theirs.stats[:6].tolist(), abs=1e-9)
    assert 0.05 < metrics["map"] < 0.9 and metrics["map_small"] is not None


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """(samples, detections, COCOeval): crowds, ties, pictures without a box."""
    folder = tmp_path_factory.mktemp("scene")
    found, _ = random_scene(folder)
    splits, _, _ = read_dataset(folder, "auto", 0, Faults())
    samples = sorted([*splits["train"], *splits["val"]], key=lambda s: s.path.name)
    return samples, found, coco_eval(samples, found, CLASSES)


def average_precision(rows):
    return float(average_precisions(rows, CLASSES, np.ones((1, len(rows)), dtype=int))[0])


def test_average_precision_from_the_rows_is_pycocotools_own(scene):
    samples, found, scored = scene
    rows = json.loads(json.dumps(match_rows(scored, samples, CLASSES)))
    assert any(sample.crowd.any() for sample in samples) and any("-" in hits for row in rows for _, _, hits in row["found"])
    assert average_precision(rows) == pytest.approx(scored.stats[0], abs=1e-9)


def test_average_precision_of_drawn_pictures_is_that_of_a_data_set_of_just_these(scene):
    samples, found, _ = scene
    rng = np.random.default_rng(1)  # no ties: a picture that counts twice has its detections in another order then
    found = [{**item, "scores": item["scores"] + rng.uniform(0, 0.009, len(item["scores"]))} for item in found]
    rows = match_rows(coco_eval(samples, found, CLASSES), samples, CLASSES)
    draws = rng.multinomial(len(rows), [1 / len(rows)] * len(rows), size=5)
    values = average_precisions(rows, CLASSES, draws)
    for counts, value in zip(draws, values, strict=True):
        numbers = np.repeat(np.arange(len(rows)), counts)
        again = [{**found[number], "index": i} for i, number in enumerate(numbers)]
        theirs = coco_eval([samples[number] for number in numbers], again, CLASSES).stats[0]
        assert value == pytest.approx(theirs, abs=1e-6)
        assert average_precision([rows[number] for number in numbers]) == pytest.approx(theirs, abs=1e-6)
    assert len(set(values.round(6))) == 5
    assert np.isnan(average_precision([{"file": "a", "truth": {}, "found": [[0, 0.5, "0" * 10]]}]))
    assert average_precision([{"file": "a", "truth": {"circle": 1}, "found": []}]) == 0


def load_base_processor():
    from transformers import DetrImageProcessor

    return DetrImageProcessor(size={"height": 32, "width": 32}, do_pad=False)


def sample(*rows, size=(300, 200)):
    boxes = [(*corners, label, False, (corners[2] - corners[0]) * (corners[3] - corners[1])) for label, corners in rows]
    return make_sample(None, size, boxes)


def detection(index, *rows):
    scores, labels, boxes = ([row[i] for row in rows] for i in range(3))
    return {
        "index": index,
        "scores": np.array(scores, dtype=np.float32),
        "labels": np.array(labels, dtype=int),
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
    }


def test_nothing_found_is_zero_and_absent_sizes_and_classes_are_none():
    truth = [sample((0, (10, 10, 60, 60))), sample()]
    nothing = coco_metrics(coco_eval(truth, [detection(0), detection(1)], CLASSES), CLASSES)
    assert nothing["map"] == nothing["map_50"] == nothing["map_75"] == 0
    found = [detection(0, (0.9, 0, (10, 10, 60, 60))), detection(1, (0.1, 1, (0, 0, 9, 9)))]
    metrics = coco_metrics(coco_eval(truth, found, CLASSES), CLASSES)
    assert metrics["map"] == pytest.approx(1) and metrics["map_medium"] == pytest.approx(1)
    assert metrics["map_small"] is None and metrics["map_large"] is None
    assert metrics["per_class_map"] == {"circle": pytest.approx(1), "square": None, "triangle": None}
    json.dumps(metrics, allow_nan=False)
    background = coco_metrics(coco_eval([sample(), sample()], found, CLASSES), CLASSES)  # nothing there to be found
    assert background["map"] == 0


def test_curves_over_confidence_and_the_best_threshold_by_hand():
    box, far = (10, 10, 60, 60), (200, 100, 260, 160)
    truth = [sample((0, box), (0, far)), sample((1, box))]
    found = [
        detection(0, (0.9, 0, box), (0.6, 0, (100, 10, 150, 60)), (0.3, 0, far)),  # right, wrong, right
        detection(1, (0.5, 1, box), (0.2, 2, far)),  # right; of a class without a box, which counts in no mean
    ]
    scored = coco_eval(truth, found, CLASSES)
    curves = confidence_curves(scored)
    at = [200, 400, 550, 700, 950]  # confidence 0.2, 0.4, 0.55, 0.7, 0.95
    assert curves["recall"][0, at].tolist() == [1, 0.5, 0.5, 0.5, 0]
    assert curves["precision"][0, at[:4]] == pytest.approx([2 / 3, 1 / 2, 1 / 2, 1]) and np.isnan(curves["precision"][0, 950])
    assert curves["f1"][:2, 200] == pytest.approx([4 / 5, 1]) and curves["f1"][:2, 550] == pytest.approx([1 / 2, 0])
    assert np.isnan(curves["f1"][2]).all()
    mean = mean_curve(held(curves["precision"]))  # from 0.5 on without a detection of the second class, which was right before
    assert mean[[450, 550, 700]] == pytest.approx([(1 / 2 + 1) / 2, (1 / 2 + 1) / 2, 1]) and len(mean) in (900, 901)
    best, threshold = best_f1(curves)
    assert best == pytest.approx(0.9) and 0 <= threshold <= 0.3 and threshold == pytest.approx(0.15, abs=0.001)
    metrics = coco_metrics(scored, CLASSES)
    assert (metrics["f1"], metrics["f1_threshold"]) == (best, threshold)


def test_an_object_found_twice_counts_once_in_the_curves_and_twice_in_average_precision():
    box, far = (10, 10, 60, 60), (200, 100, 260, 160)
    twice = detection(0, (0.9, 0, box), (0.8, 0, (10, 10, 60, 61)), (0.7, 0, far))
    scored = coco_eval([sample((0, box), (0, far))], [twice], CLASSES)
    metrics = coco_metrics(scored, CLASSES)
    assert metrics["f1"] == 1 and metrics["f1_threshold"] == pytest.approx(0.35, abs=0.001) and 0 < metrics["map_50"] < 0.9
    assert confidence_curves(scored)["precision"][0, [0, 750]].tolist() == [1, 1]


def test_what_is_ignored_is_neither_right_nor_wrong_in_the_curves():
    box, far = (10, 10, 60, 60), (200, 100, 260, 160)
    hidden = sample((0, box), (0, far))
    hidden.crowd[1] = True
    curves = confidence_curves(coco_eval([hidden], [detection(0, (0.9, 0, box), (0.8, 0, far), (0.7, 0, far))], CLASSES))
    assert curves["precision"][0, 500] == curves["recall"][0, 500] == curves["f1"][0, 500] == 1


# ---- batch size ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(model, processor, samples, preprocess, cache): pictures of five shapes, and a base that keeps their ratio."""
    folder = tmp_path_factory.mktemp("mixed")
    base = save_base(folder / "base", size={"shortest_edge": 48, "longest_edge": 96})
    model, processor, _ = load_base(str(base))
    rng, samples = np.random.default_rng(0), []
    for i in range(11):
        width, height = [(90, 60), (60, 90), (70, 70), (140, 50), (91, 60)][i % 5]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows = [(5, 5, 40, 45, i % 3, False, np.nan), (20, 10, 55, 40, 1, False, np.nan)][: i % 3]
        samples.append(make_sample(folder / f"{i}.png", (width, height), rows))
    preprocess = Preprocess(processor)
    return model, processor, *check_samples(samples, preprocess, Faults(), 10**8, "test")[:2], preprocess


def loader_of(mixed, batch_size):
    _, _, samples, cache, preprocess = mixed
    dataset = DetectionData(samples, preprocess, cache)
    return eval_loader(dataset, collate, batch_size, shapes=dataset.shapes)


def test_metrics_do_not_depend_on_the_batch_size(mixed):
    model, processor, *_ = mixed
    found = {size: predict(model, processor, loader_of(mixed, size)) for size in (1, 7)}
    assert len(loader_of(mixed, 7)) < len(loader_of(mixed, 1)) == 11
    one, many = found[1][0], found[7][0]
    assert [item["index"] for item in one] == [item["index"] for item in many] == list(range(11))
    for a, b in zip(one, many, strict=True):
        assert a["boxes"].shape == (8, 4) and np.abs(a["boxes"] - b["boxes"]).max() < 1e-4
        assert np.abs(a["scores"] - b["scores"]).max() < 1e-6
    metrics = [evaluate(model, processor, loader_of(mixed, size), CLASSES) for size in (1, 7)]
    for key in ("map", "map_50", "map_75"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], abs=1e-6)
    assert set(metrics[0]) == set(metrics[1])


def test_boxes_come_back_in_pixels_of_the_original(mixed):
    model, processor, samples, cache, preprocess = mixed
    dataset = DetectionData(samples, preprocess, cache)
    found, _ = predict(model, processor, loader_of(mixed, 4))
    index = 3  # 140 x 50, seen smaller
    pixels = dataset[(0, index)]["pixels"][None]
    with torch.no_grad():
        x, y, w, h = model.eval()(pixel_values=pixels).pred_boxes[0].numpy().T
    width, height = samples[index].size
    expected = np.stack([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], axis=1)
    np.testing.assert_allclose(found[index]["boxes"], expected, atol=1e-3)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_mistakes_are_missed_and_invented_boxes_and_the_worst_picture_comes_first():
    box, far = (10, 10, 60, 60), (200, 100, 260, 160)
    truth = [sample((0, box)), sample((0, box), (1, far)), sample(), sample((0, box)), sample((0, box))]
    found = [
        detection(0, (0.9, 0, (12, 10, 60, 61))),  # right
        detection(1, (0.2, 0, box), (0.7, 1, far)),  # one missed: too unsure
        detection(2, (0.7, 2, far), (0.9, 0, box), (0.8, 1, far)),  # three inventions
        detection(3, (0.9, 1, box)),  # wrong class: one missed, one invented
        detection(4, (0.9, 0, box), (0.8, 0, (10, 10, 60, 58))),  # found twice, which is shown once
    ]
    verdicts = judge(truth, found, CLASSES, 0.5)
    assert most_mistaken(verdicts) == [2, 3, 1]
    assert [verdicts[i].in_words() for i in range(5)] == [
        "no mistakes", "1 missed", "3 false alarms", "1 missed, 1 false alarm", "no mistakes"
    ]  # fmt: skip
    assert verdicts[1].missed.tolist() == [True, False] and verdicts[1].right.tolist() == [True]
    assert verdicts[2].found["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_what_lies_on_a_crowd_is_no_mistake():
    box, far = (10, 10, 60, 60), (200, 100, 260, 160)
    hidden = sample((0, box), (0, far))
    hidden.crowd[0] = True
    verdict = judge([sample(), hidden], [detection(1, (0.9, 0, far), (0.8, 0, box))], CLASSES, 0.5)[1]
    assert verdict.in_words() == "no mistakes" and verdict.right.all() and not verdict.missed.any()
    nothing = judge([hidden], [detection(0)], CLASSES, 0.5)[0]
    assert nothing.in_words() == "1 missed" and nothing.missed.tolist() == [False, True]


def test_an_object_that_was_found_twice_is_shown_once():
    box, shifted, other = (10, 10, 60, 60), (12, 10, 60, 60), (10, 10, 60, 90)
    found = detection(0, (0.6, 0, box), (0.9, 0, shifted), (0.5, 1, box), (0.7, 0, other), (0.1, 2, box))
    once = confident(found, 0.3)
    assert once["scores"].tolist() == pytest.approx([0.9, 0.7, 0.5])  # the surest first; another class and IoU 0.6 stay
    assert once["labels"].tolist() == [0, 0, 1] and once["boxes"][0].tolist() == list(shifted)
    assert confident(found, 0.3, nms=1.0)["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6, 0.5])
    assert confident(found, 0.95)["boxes"].shape == (0, 4)


def test_the_best_threshold_comes_from_the_checkpoint_and_none_is_an_error(capsys):
    assert least_score("best", {"threshold": 0.25}) == 0.25 and "threshold 0.250" in capsys.readouterr().out
    assert least_score(0.4, {}) == 0.4 and capsys.readouterr().out == ""
    for origin in ({}, {"threshold": None}, {"threshold": "0.3"}, {"threshold": 7.0}):
        with pytest.raises(UserError, match="no best threshold: give a number"):
            least_score("best", origin)
    for wrong in (1.5, -0.1, float("nan"), "worst"):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            least_score(wrong, {"threshold": 0.25})


def test_twenty_labels_lie_inside_the_picture_and_clear_of_each_other():
    rng, size = np.random.default_rng(0), (480, 360)
    corners = rng.uniform(-5, [400, 300], (20, 2))
    labels = [(f"platelet {k / 20:.2f}", (*xy, *(xy + rng.uniform(20, 70, 2))), "red") for k, xy in enumerate(corners)]
    places = write_labels(ImageDraw.Draw(Image.new("RGB", size)), size, labels)
    assert (places[:, :2] >= 0).all() and (places[:, 2:] < size).all()
    assert sum(covered(place, places[:i]) for i, place in enumerate(places)) == 0


@pytest.mark.parametrize("size", [(20, 12), (400, 300), (1, 900), (64, 2000)])
def test_boxes_and_labels_at_the_border_are_drawn_inside_the_picture(tmp_path, size):
    width, height = size
    boxes = [(0, 0, width, height), (width - 1, height - 1, width, height), (-50, -50, 5, 5), (width - 3, 0, width + 90, 4)]
    labels = [0, 1, 2, 14]
    classes = [f"a rather long name of a class {i}" for i in range(15)]
    picture = draw_boxes(np.zeros((height, width, 3), np.uint8), np.array(boxes), labels, classes, np.array([0.9, 0.1, 1, 0.5]))
    picture.save(tmp_path / "a.png")
    back = Image.open(tmp_path / "a.png")
    back.load()
    assert np.asarray(back).max() > 100 and back.width == pytest.approx(width * back.height / height, abs=1)
    assert min(back.size) >= 320 or max(back.size) == max(1280, *size)  # a strip is not blown up without end
    plain = draw_boxes(np.zeros((height, width, 3), np.uint8), np.zeros((0, 4)), [], classes)
    assert np.asarray(plain).max() == 0


@pytest.mark.slow
def test_pages_and_plots_are_readable_pngs(mixed, tmp_path):
    model, processor, samples, cache, preprocess = mixed
    dataset = DetectionData(samples, preprocess, cache)
    names = ["$cost$", "\u732b \u72ac", "x" * 200]  # a formula, letters that the font lacks, no room
    found, _ = predict(model, processor, loader_of(mixed, 4))
    draw_pages(dataset, found, names, 0.1, tmp_path / "page.png", tmp_path / "worst.png")
    draw_pages(dataset, [detection(i) for i in range(11)], names, 0.5, tmp_path / "empty.png")
    draw_results(model, processor, dataset, names, tmp_path / "run")
    draw_evaluation(coco_eval(samples, found, names), names, tmp_path / "plots")
    plots = ("precision_recall.png", "confidence.png", "per_class.png")
    files = ["page.png", "worst.png", "empty.png", "run/predictions/validation.png"]
    for name in [*files, *(f"{folder}/{plot}" for folder in ("plots", "run/plots") for plot in plots)]:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert 200 < min(picture.size) and max(picture.size) <= 4000 and np.ptp(np.asarray(picture)) > 100


def test_a_page_of_no_mistakes_says_so(mixed, tmp_path):
    _, _, samples, cache, preprocess = mixed
    dataset = DetectionData(samples, preprocess, cache)
    found = [detection(i, *((0.9, k, box) for k, box in zip(s.labels, s.boxes, strict=True))) for i, s in enumerate(samples)]
    draw_pages(dataset, found, CLASSES, 0.5, tmp_path / "page.png", tmp_path / "worst.png")
    with Image.open(tmp_path / "worst.png") as worst, Image.open(tmp_path / "page.png") as page:
        assert worst.size[1] < page.size[1] / 3  # a title alone
