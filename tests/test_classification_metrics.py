"""What a classification run leaves to look at."""

import json

import numpy as np
from conftest import CLASSIFICATION, use_task
from PIL import Image
from test_class_metrics import make_mixed

from common.vision.scoring import logits_of

TASK = CLASSIFICATION
use_task(TASK)

from metrics import draw_results  # noqa: E402


def test_results_can_be_drawn_and_read(tmp_path):
    model, dataset = make_mixed(tmp_path)
    labels, logits = logits_of(model, dataset)
    draw_results(model, dataset, tmp_path)
    for name in ("plots/confusion_matrix", "plots/f1_per_class", "predictions/validation"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 150 and pixels.std() > 2, name
    rows = json.loads((tmp_path / "samples.json").read_text())["rows"]
    assert [row["guess"] for row in rows] == logits.argmax(axis=1).tolist() and [row["label"] for row in rows] == labels.tolist()
