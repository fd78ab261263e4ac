"""The pictures of a classification run can be drawn."""

import numpy as np
from conftest import CLASSIFICATION, use_task
from PIL import Image
from test_class_metrics import CLASSES, make_mixed

from common.class_metrics import classification_metrics
from common.vision.pages import draw_page
from common.vision.scoring import logits_of

TASK = CLASSIFICATION
use_task(TASK)

from metrics import draw_results  # noqa: E402


def test_pictures_of_results_can_be_drawn_and_read(tmp_path):
    model, dataset = make_mixed(tmp_path)
    labels, logits = logits_of(model, dataset)
    metrics = classification_metrics(labels, logits, CLASSES)
    history = [{"epoch": 0, "step": 0, **metrics}, {"epoch": 1, "step": 3, "train_loss": 1.0, **metrics, "precision": None}]
    draw_results(model, dataset, history, tmp_path)
    draw_page(dataset, labels, logits, CLASSES, [], tmp_path / "none.png")
    for name in ("plots/loss", "plots/metrics", "plots/confusion_matrix", "plots/f1_per_class", "predictions/validation"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 150 and pixels.std() > 2, name
    page = Image.open(tmp_path / "predictions" / "validation.png")
    assert page.size[1] > Image.open(tmp_path / "none.png").size[1]  # three rows of pictures
