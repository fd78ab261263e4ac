"""A classifier's metrics are scikit-learn's or hand-made sums, whatever the batch size; pictures of its answers can be drawn."""

import json

import matplotlib.text
import numpy as np
import pytest
import torch
from PIL import Image

from common.batches import eval_loader
from common.class_metrics import (
    calibration,
    class_report,
    class_table,
    classification_metrics,
    confusion,
    softmax,
    wilson,
    worst_first,
)
from common.plots import draw_calibration
from common.samples import Faults
from common.vision import pages
from common.vision.labelled import LabelledPictures, Sample, collate, load_pictures
from common.vision.pages import draw_answer, draw_mistakes, draw_page, draw_some, thumbnail
from common.vision.preprocess import ClassifierPreprocess
from common.vision.scoring import evaluate, logits_of, predict

CLASSES = ["cat", "dog", "fish"]
NAMES = ["ant", "bee", "cow"]


def logits_for(guesses, classes, sure=0.9):
    """Logits whose softmax gives `sure` (one number, or one for each row) to the guess and equal shares to the rest."""
    probabilities = np.repeat((1 - np.broadcast_to(sure, len(guesses)))[:, None] / (classes - 1), classes, axis=1)
    probabilities[np.arange(len(guesses)), guesses] = sure
    return np.log(probabilities).astype(np.float32)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Of 4 ants 3 are found (one is called a bee), of 2 bees 1 (the other is called an ant), of 1 cow none (called an ant)."""
    labels, guesses = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 0, 0])
    found = classification_metrics(labels, logits_for(guesses, 3), NAMES)
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["balanced_accuracy"] == found["recall"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert found["precision"] == pytest.approx((3 / 5 + 1 / 2 + 0) / 3)
    f1 = {"ant": 2 * 3 / (2 * 3 + 2 + 1), "bee": 2 * 1 / (2 * 1 + 1 + 1), "cow": 0.0}
    assert found["per_class_f1"] == pytest.approx(f1) and found["f1"] == pytest.approx(sum(f1.values()) / 3)
    assert found["val_loss"] == pytest.approx(-(4 * np.log(0.9) + 3 * np.log(0.05)) / 7, rel=1e-5)
    assert found["ece"] == pytest.approx(0.9 - 4 / 7, abs=1e-6) and found["top5"] is None
    assert confusion(labels, logits_for(guesses, 3), NAMES).tolist() == [[3, 1, 0], [1, 1, 0], [1, 0, 0]]


def test_metrics_are_those_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, precision_score, top_k_accuracy_score

    rng, names = np.random.default_rng(0), [f"c{i}" for i in range(8)]
    labels, logits = rng.integers(0, 8, 200), rng.normal(0, 2, (200, 8))
    logits[np.arange(200), labels] += 2
    found, guesses, shares = classification_metrics(labels, logits, names), logits.argmax(axis=1), softmax(logits)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, guesses))
    assert found["f1"] == pytest.approx(f1_score(labels, guesses, average="macro"))
    assert found["precision"] == pytest.approx(precision_score(labels, guesses, average="macro"))
    assert found["val_loss"] == pytest.approx(log_loss(labels, shares))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, shares, k=5))
    assert 0.2 < found["accuracy"] < found["top5"] < 1


def test_a_class_that_does_not_occur_counts_in_no_mean():
    labels, guesses = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2])  # a bee is seen where none is
    found = classification_metrics(labels, logits_for(guesses, 3), NAMES)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["per_class_f1"] == {"ant": pytest.approx(2 / 3), "bee": None, "cow": 1.0}
    assert found["f1"] == pytest.approx((2 / 3 + 1) / 2)
    json.dumps(found, allow_nan=False)
    text, table = class_report(labels, logits_for(guesses, 3), NAMES)
    assert "bee" in text and table["bee"]["support"] == 0 and table["accuracy"] == 0.75


def test_top5_needs_more_than_five_classes_and_finds_the_fifth():
    names = [f"c{i}" for i in range(6)]
    order = np.arange(6)[None].repeat(6, axis=0)  # logits rise with the class: class 0 is the last of six
    found = classification_metrics(np.arange(6), order.astype(float), names)
    assert found["top5"] == pytest.approx(5 / 6) and found["accuracy"] == pytest.approx(1 / 6)
    assert classification_metrics(np.arange(5), order[:5, :5].astype(float), names[:5])["top5"] is None


def test_a_very_wrong_answer_has_a_finite_loss():
    logits = np.array([[1e4, -1e4], [0.0, 0.0]], dtype=np.float32)
    found = classification_metrics(np.array([1, 0]), logits, NAMES[:2])
    assert np.isfinite(found["val_loss"]) and found["val_loss"] > 100
    assert softmax(logits).sum(axis=1).tolist() == [1, 1]


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    """Ten answers of 0.8 of which eight are right: calibrated. Ten of 1.0 of which five are right: off by a half."""
    guesses = np.zeros(10, dtype=int)
    right, half = np.array([0] * 8 + [1] * 2), np.array([0] * 5 + [1] * 5)
    shares = softmax(logits_for(guesses, 2, 0.8).astype(np.float64))
    certain = np.stack([np.ones(10), np.zeros(10)], axis=1)
    assert calibration(right, shares)[0] == pytest.approx(0, abs=1e-6)
    assert calibration(half, certain)[0] == pytest.approx(0.5)
    error, rows = calibration(np.concatenate([right, half]), np.concatenate([shares, certain]))
    assert error == pytest.approx(0.25, abs=1e-6)
    np.testing.assert_allclose(rows, [[10, 0.8, 0.8], [10, 1.0, 0.5]], atol=1e-6)
    unsure = calibration(right, softmax(logits_for(guesses, 2, 0.6).astype(np.float64)))  # right more often than it says
    assert unsure[0] == pytest.approx(0.2, abs=1e-6)


def test_bins_keep_errors_of_both_signs_apart():
    """Half says 0.9 and is right in 7 of 10, half says 0.6 and is right in 8 of 10: 0.2 each way, not cancelled out."""
    guesses = np.zeros(20, dtype=int)
    labels = np.array([0] * 7 + [1] * 3 + [0] * 8 + [1] * 2)
    sure = np.array([0.9] * 10 + [0.6] * 10)
    shares = softmax(logits_for(guesses, 2, sure).astype(np.float64))
    assert calibration(labels, shares)[0] == pytest.approx(0.2, abs=1e-6)
    assert calibration(labels, shares, bins=1)[0] == pytest.approx(0, abs=1e-6)


def test_bins_say_how_many_pictures_they_hold():
    shares = softmax(logits_for(np.zeros(6, dtype=int), 2, np.array([0.6] * 2 + [0.99] * 4)).astype(np.float64))
    rows = calibration(np.array([0, 1, 0, 0, 0, 0]), shares)[1]
    assert [(count, round(sure, 2), right) for count, sure, right in rows] == [(2, 0.6, 0.5), (4, 0.99, 1.0)]


def test_intervals_are_wilsons():
    """Of Brown, Cai, DasGupta 2001, Interval Estimation for a Binomial Proportion: 0 and 2 of 10, and half of 100."""
    for right, count, expected in ((0, 10, (0, 0.2775)), (2, 10, (0.0567, 0.5098)), (50, 100, (0.4038, 0.5962))):
        assert wilson(right, count) == pytest.approx(expected, abs=1e-4)
    assert wilson(7, 7)[1] == 1.0


def test_of_many_classes_the_lowest_are_listed():
    names = [f"c{i}" for i in range(30)]
    labels = np.repeat(np.arange(30), 2)
    guesses = labels.copy()
    guesses[[8, 9, 40]] = 1  # class 4 wholly, class 20 by half
    lines = class_table(labels, logits_for(guesses, 30), names).splitlines()
    assert len(lines) == 21 and "the 20 lowest F1 of 30" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["c4", "c1", "c20"] and lines[1].split()[-1] == "2"
    few = class_table(labels[:6], logits_for(guesses[:6], 30), names).splitlines()
    assert [line.split()[0] for line in few] == ["class", "c0", "c1", "c2"], "those that occur, in their order"


def test_mistakes_come_most_confident_first():
    labels, guesses = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 1, 1, 0])
    sure = np.array([0.99, 0.6, 0.9, 0.7, 0.9])
    assert worst_first(labels, logits_for(guesses, 3, sure)) == [2, 4, 3, 1]
    assert worst_first(labels, logits_for(labels, 3)) == []


# ---- predicting ------------------------------------------------------------------------------------------------------


def make_mixed(folder):
    """(model, data set): eleven pictures of five shapes and three classes, and a tiny random classifier that crops them."""
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = hf.DeiTForImageClassification(hf.DeiTConfig(**small, image_size=32, patch_size=8, num_labels=3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)  # as of a trained net: outputs that differ from picture to picture
    processor = hf.DeiTImageProcessor(size={"height": 37, "width": 37}, crop_size={"height": 32, "width": 32})
    rng, samples = np.random.default_rng(0), []
    for i in range(11):
        width, height = [(90, 60), (60, 90), (70, 70), (140, 50), (31, 30)][i % 5]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        samples.append(Sample(folder / f"{i}.png", f"{i}.png", (i * i) % 3))
    samples, cache = load_pictures(samples, ClassifierPreprocess(processor), Faults(), 0, "test")
    return model, LabelledPictures(samples, CLASSES, ClassifierPreprocess(processor), cache)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return make_mixed(tmp_path_factory.mktemp("mixed"))


def test_predictions_do_not_depend_on_the_batch_size(mixed):
    model, dataset = mixed
    (labels, one), (again, many) = (predict(model.train(), eval_loader(dataset, collate, size)) for size in (1, 7))
    assert labels.tolist() == again.tolist() == [sample.label for sample in dataset.samples]
    np.testing.assert_allclose(one, many, atol=1e-5)
    assert one.shape == (11, 3) and np.ptp(one, axis=0).min() > 1e-2 and not model.training
    index = 3  # the answers are in the order of the data set
    with torch.no_grad():
        alone = model(pixel_values=dataset[(0, index)]["pixels"][None]).logits[0].numpy()
    np.testing.assert_allclose(one[index], alone, atol=1e-5)
    left, right = (evaluate(model, eval_loader(dataset, collate, size), CLASSES) for size in (1, 7))
    assert left["accuracy"] == right["accuracy"] and left["val_loss"] == pytest.approx(right["val_loss"], abs=1e-5)
    without_loader = logits_of(model, dataset)
    assert without_loader[0].tolist() == labels.tolist()
    np.testing.assert_allclose(without_loader[1], one, atol=1e-5)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_of_answers_can_be_drawn_and_read(mixed, tmp_path):
    model, dataset = mixed
    labels, logits = predict(model, eval_loader(dataset, collate, 4))
    draw_calibration(*calibration(labels, softmax(logits.astype(float))), tmp_path / "calibration.png")
    draw_some(dataset, labels, logits, tmp_path / "page.png")
    draw_mistakes(dataset, labels, logits_for(labels, 3), tmp_path / "none.png")
    draw_answer(dataset.samples[0].path, [{"class": "cat", "probability": 0.7}], tmp_path / "answer.png")
    for name in ("calibration", "page", "none", "answer"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 150 and pixels.std() > 2, name
    page = Image.open(tmp_path / "page.png")
    assert page.size[1] > Image.open(tmp_path / "none.png").size[1]  # three rows of pictures


def texts_of_page(draw, *args):
    """Every text on the figure that draw(*args, path) would save."""
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(pages, "save_figure", lambda drawing, path: kept.append(drawing))
        draw(*args, "nowhere")
    return [text.get_text() for text in kept[0].findobj(matplotlib.text.Text) if text.get_text()]


def test_a_page_names_folder_truth_and_guess_and_counts_the_mistakes(mixed):
    _, dataset = mixed
    labels = np.array([sample.label for sample in dataset.samples])
    guesses = np.where(np.arange(11) < 4, (labels + 1) % 3, labels)
    texts = texts_of_page(draw_some, dataset, labels, logits_for(guesses, 3))
    assert "11 of 11 pictures, drawn at random; mistakes among all of them: 4" in texts and "0.png" in texts
    assert f"true: {CLASSES[labels[0]]}\nsaid: {CLASSES[guesses[0]]} 0.90" in texts
    dataset.samples[0].name, before = "val/$5 / $6/ring/0.png", dataset.samples[0].name
    texts = texts_of_page(draw_mistakes, dataset, labels, logits_for(guesses, 3))
    dataset.samples[0].name = before
    assert "4 mistakes among 11 pictures" in texts and "ring/0.png" in texts


def test_a_mistake_is_framed_in_red_and_a_right_answer_is_not(mixed, tmp_path):
    _, dataset = mixed
    labels = np.array([sample.label for sample in dataset.samples])

    def red(guesses):
        draw_page(dataset, labels, logits_for(guesses, 3), [0], tmp_path / "page.png", "a page")
        page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
        return (abs(page - (0xD6, 0x27, 0x28)).sum(axis=2) < 30).sum()

    assert red((labels + 1) % 3) > red(labels) + 500


def test_large_photographs_are_reduced_for_a_page(tmp_path):
    Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.png")
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "small.png")
    assert thumbnail(tmp_path / "large.png").size == (384, 256) and thumbnail(tmp_path / "small.png").size == (256, 384)
