"""A tuned pose model as an object of your own program.

import sys
sys.path.insert(0, "path/to/image_tasks/pose")
from predictor import Predictor

predictor = Predictor("outputs/pose/lora/checkpoints/best")   # full or LoRA: the folder says which
predictor.predict("photo.jpg")                                # {"head": (x, y, score), "left_hand": ..., ...}, the whole picture
predictor.predict("photo.jpg", box=(40, 20, 90, 180))         # of the figure in a box x, y, w, h
"""

import sys
from pathlib import Path

import numpy as np
import torch

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError  # noqa: E402
from common.runtime import choose_device  # noqa: E402
from common.vision.pictures import as_list, as_pixels  # noqa: E402
from data import PADDING, Preprocess, crop_matrix, cut_out, fits, inverse, move, shrink, shrink_factor  # noqa: E402
from model import load_checkpoint  # noqa: E402


class Predictor:
    """A checkpoint that finds keypoints in pictures: paths, PIL images, or uint8 arrays (H, W, 3) in RGB."""

    def __init__(self, checkpoint, base: str = "", device: str = "auto", merge: bool = True):
        """checkpoint: a folder that train.py or train_lora.py left (checkpoints/best).

        base: where an adapter's base is, if not under its recorded name. device: auto, cpu, cuda, mps. merge: add the adapter
        into the weights. UserError, in one line, where checkpoint and base are damaged or do not belong together.
        """
        device = choose_device(device)
        self.model, processor, self.origin = load_checkpoint(checkpoint, base, merge, device)
        self.device, self.names = device, self.model.facts["names"]
        self.preprocess = Preprocess(processor, self.model.facts["input_size"])

    def predict(self, image, box=None) -> dict[str, tuple[float, float, float]]:
        """{name: (x, y, score)} of one figure, in pixels of the picture: the one in the box x, y, w, h, or in all of it."""
        return self.predict_batch([image], [box])[0]

    def predict_batch(self, images, boxes=None, batch_size: int = 32) -> list[dict[str, tuple[float, float, float]]]:
        """The same for several pictures, in their order, batch_size at a time. boxes: one for each picture, or None."""
        images, answers = as_list(images), []
        boxes = [None] * len(images) if boxes is None else list(boxes)
        if len(boxes) != len(images) or batch_size < 1:
            raise UserError(f"{len(images)} pictures need as many boxes, not {len(boxes)}; and batch_size must be at least 1")
        for first in range(0, len(images), batch_size):
            part = [self.prepare(*pair) for pair in list(zip(images, boxes, strict=True))[first : first + batch_size]]
            with torch.inference_mode():
                coords, scores, _ = self.model(torch.stack([pixels for pixels, _ in part]).to(self.device))
            for places, sure, (_, back) in zip(coords.double().cpu().numpy(), scores.tolist(), part, strict=True):
                points = move(places * [side - 1 for side in self.preprocess.size[::-1]], back)
                answers.append({name: (*xy, s) for name, xy, s in zip(self.names, points.tolist(), sure, strict=True)})
        return answers

    def prepare(self, image, box):
        """(cut-out as the model wants it, float32 (3, h, w); the map (2, 3) from its pixels to the picture's)."""
        pixels, size = as_pixels(image), self.preprocess.size
        height, width = pixels.shape[:2]
        frame = np.array([0, 0, width, height] if box is None else box, dtype=np.float64)
        if not (frame.shape == (4,) and np.isfinite(frame).all() and (frame[2:] > 0).all() and fits(frame, (width, height))):
            raise UserError(f"the box {box} does not fit a picture of {width} x {height} pixels; expected x, y, w, h")
        padding = 1.0 if box is None else PADDING
        matrix, shrunk = crop_matrix(frame, size, padding), shrink_factor(frame, size, padding)
        part = torch.from_numpy(cut_out(shrink(pixels, shrunk), matrix, size, shrunk)).permute(2, 0, 1)
        return self.preprocess.normalize(part.float() / 255), inverse(matrix)
