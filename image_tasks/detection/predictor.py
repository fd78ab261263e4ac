"""A tuned detector as an object of your own program; several adapters on one base, which is loaded once.

import sys
sys.path.insert(0, "path/to/image_tasks/detection")
from predictor import Predictor

predictor = Predictor("outputs/detection/lora/checkpoints/best")   # full or LoRA: the folder says which
predictor.predict("photo.jpg")                                     # [{"class": "star", "score": 0.93, "box": [x1, y1, x2, y2]}]
predictor.predict_batch(["a.jpg", "b.jpg"], threshold="best")      # such a list for each picture
predictor.add("outputs/detection/lora_2/checkpoints/best", "cars") # another adapter on the same base, with classes of its own
predictor.predict("photo.jpg", model="cars")
"""

import sys
from pathlib import Path

import torch

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.adapters_on_base import AdaptersOnBase  # noqa: E402
from common.batches import EvalBatches  # noqa: E402
from common.config import UserError  # noqa: E402
from common.vision.pictures import as_list, as_pixels  # noqa: E402
from data import Preprocess, collate  # noqa: E402
from metrics import NMS, confident, detect, least_score  # noqa: E402
from model import answer, load_base, load_checkpoint  # noqa: E402


class Predictor(AdaptersOnBase):
    """A checkpoint that finds objects in pictures: paths, PIL images, or uint8 arrays (H, W, 3) in RGB."""

    model_functions = load_base, load_checkpoint, answer

    def details(self, model, processor, origin):
        """The preprocessing of a checkpoint."""
        return Preprocess(processor, origin["image_size"])

    def predict(self, image, threshold: float | str = 0.5, nms: float = NMS, model: str = "") -> list[dict]:
        """[{"class", "score", "box": [x1, y1, x2, y2] in pixels}, ...] of one picture, the surest first; [] where there is none.

        threshold: the least score; "best": where F1 was best in validation. nms: of two boxes of a class that overlap by a
        larger IoU the surer one stays; 1: both. model: a name given to `add`; "": the first.
        """
        return self.predict_batch([image], threshold, nms, model=model)[0]

    def predict_batch(
        self, images, threshold: float | str = 0.5, nms: float = NMS, batch_size: int = 8, model: str = ""
    ) -> list[list[dict]]:
        """The same for several pictures, in their order. Those that the model sees in one shape share batches of batch_size."""
        tuned = self.find(model)
        threshold = least_score(threshold, tuned.origin)
        if not 0 <= nms <= 1 or batch_size < 1:
            raise UserError("nms must lie between 0 and 1, and batch_size must be at least 1")
        pictures = [prepare(tuned.details, number, image) for number, image in enumerate(as_list(images))]
        answers = [[] for _ in pictures]
        for keys in EvalBatches([picture["pixels"].shape for picture in pictures], batch_size):
            items = [{**pictures[index], "pixels": tuned.details.normalize(pictures[index]["pixels"])} for _, index in keys]
            with self.using(model) as detector:
                (batch,) = detect(detector, tuned.processor, [collate(items)], with_loss=False)
            for found in batch:
                answers[found["index"]] = objects(confident(found, threshold, nms), tuned.origin["classes"])
        return answers


def prepare(preprocess: Preprocess, number: int, image) -> dict:
    """A picture as collate takes it, but for its scaling: uint8 (3, h, w) in the model's size, a tenth of a photograph's."""
    pixels = as_pixels(image)
    target = {"orig_size": torch.tensor(pixels.shape[:2]), "image_id": torch.tensor([number])}
    return {"pixels": preprocess.resize(pixels), "target": target}


def objects(found: dict, classes: list[str]) -> list[dict]:
    """What is shown of what `detect` found in a picture."""
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    return [{"class": classes[k], "score": score, "box": box} for k, score, box in rows]
