"""A tuned pose model as an object of your own program; several adapters on one base, which is loaded once.

import sys
sys.path.insert(0, "path/to/image_tasks/pose")
from predictor import Predictor

predictor = Predictor("outputs/pose/lora/checkpoints/best")   # full or LoRA: the folder says which
predictor.predict("photo.jpg")                                # {"head": (x, y, score), "left_hand": ..., ...}, the whole picture
predictor.predict("photo.jpg", box=(40, 20, 90, 180))         # of the figure in a box x, y, w, h
predictor.add("outputs/pose/lora_2/checkpoints/best", "hands") # another adapter on the same base, with keypoints of its own
predictor.predict("photo.jpg", model="hands")
"""

import sys
from pathlib import Path

import numpy as np
import torch

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.adapters_on_base import AdaptersOnBase  # noqa: E402
from common.config import UserError  # noqa: E402
from common.vision.pictures import as_list, as_pixels  # noqa: E402
from crops import PADDING, crop_matrix, cut_out, fits, inverse, move, shrink, shrink_factor  # noqa: E402
from data import Preprocess  # noqa: E402
from model import answer, load_base, load_checkpoint  # noqa: E402


class Predictor(AdaptersOnBase):
    """A checkpoint that finds keypoints in pictures: paths, PIL images, or uint8 arrays (H, W, 3) in RGB."""

    model_functions = load_base, load_checkpoint, answer

    def details(self, model, processor, origin):
        """(names of the keypoints, preprocessing) of a checkpoint."""
        return model.facts["names"], Preprocess(processor, model.facts["input_size"])

    def predict(self, image, box=None, model: str = "") -> dict[str, tuple[float, float, float]]:
        """{name: (x, y, score)} of one figure, in pixels of the picture: the one in the box x, y, w, h, or in all of it.

        model: a name given to `add`; "": the first.
        """
        return self.predict_batch([image], [box], model=model)[0]

    def predict_batch(
        self, images, boxes=None, batch_size: int = 32, model: str = ""
    ) -> list[dict[str, tuple[float, float, float]]]:
        """The same for several pictures, in their order, batch_size at a time. boxes: one for each picture, or None."""
        images, answers = as_list(images), []
        names, preprocess = self.find(model).details
        boxes = [None] * len(images) if boxes is None else list(boxes)
        if len(boxes) != len(images) or batch_size < 1:
            raise UserError(f"{len(images)} pictures need as many boxes, not {len(boxes)}; and batch_size must be at least 1")
        for first in range(0, len(images), batch_size):
            part = [prepare(preprocess, *pair) for pair in list(zip(images, boxes, strict=True))[first : first + batch_size]]
            with self.using(model) as pose, torch.inference_mode():
                coords, scores, _ = pose(torch.stack([pixels for pixels, _ in part]).to(self.device))
            for places, sure, (_, back) in zip(coords.double().cpu().numpy(), scores.tolist(), part, strict=True):
                points = move(places * [side - 1 for side in preprocess.size[::-1]], back)
                answers.append({name: (*xy, s) for name, xy, s in zip(names, points.tolist(), sure, strict=True)})
        return answers


def prepare(preprocess: Preprocess, image, box):
    """(cut-out as the model wants it, float32 (3, h, w); the map (2, 3) from its pixels to the picture's)."""
    pixels, size = as_pixels(image), preprocess.size
    height, width = pixels.shape[:2]
    frame = np.array([0, 0, width, height] if box is None else box, dtype=np.float64)
    if not (frame.shape == (4,) and np.isfinite(frame).all() and (frame[2:] > 0).all() and fits(frame, (width, height))):
        raise UserError(f"the box {box} does not fit a picture of {width} x {height} pixels; expected x, y, w, h")
    padding = 1.0 if box is None else PADDING
    matrix, shrunk = crop_matrix(frame, size, padding), shrink_factor(frame, size, padding)
    part = torch.from_numpy(cut_out(shrink(pixels, shrunk), matrix, size, shrunk)).permute(2, 0, 1)
    return preprocess.normalize(part.float() / 255), inverse(matrix)
