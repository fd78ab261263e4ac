"""A tuned classifier as an object of a program: the most probable classes of a picture."""

import numpy as np
import torch

from common.class_metrics import softmax
from common.config import UserError
from common.vision.pictures import as_pixels
from common.vision.preprocess import ClassifierPreprocess


class ClassPredictor:
    """Class probabilities for pictures. A picture is a path, a PIL image, or a uint8 array (H, W, 3) in RGB."""

    def __init__(self, model, processor, origin: dict, device):
        self.model, self.origin, self.device = model, origin, device
        self.classes, self.preprocess = origin["classes"], ClassifierPreprocess(processor)

    def predict(self, image, top_k: int = 5) -> list[tuple[str, float]]:
        """[(class name, probability), ...] of one picture, the most probable first."""
        return self.predict_batch([image], top_k)[0]

    def predict_batch(self, images, top_k: int = 5, batch_size: int = 32) -> list[list[tuple[str, float]]]:
        """The same for several pictures, in their order; batch_size of them go through the model at a time."""
        images, answers = list(images), []
        if top_k < 1 or batch_size < 1:
            raise UserError("top_k and batch_size must be at least 1")
        for first in range(0, len(images), batch_size):
            pixels = torch.stack([self.prepare(image) for image in images[first : first + batch_size]])
            answers += [self.best(row, top_k) for row in self.probabilities(pixels)]
        return answers

    def prepare(self, image) -> torch.Tensor:
        """A picture as the model wants it: float32 (3, h, w). UserError where it is none."""
        return self.preprocess.normalize(self.preprocess.center(self.preprocess.resize(as_pixels(image))))

    def probabilities(self, pixels: torch.Tensor) -> np.ndarray:
        """pixels (B, 3, h, w) -> probabilities of all classes, float64 (B, K)."""
        with torch.inference_mode():
            logits = self.model(pixel_values=pixels.to(self.device)).logits
        return softmax(logits.double().cpu().numpy())

    def best(self, probabilities: np.ndarray, top_k: int) -> list[tuple[str, float]]:
        order = probabilities.argsort()[::-1][:top_k]
        return [(self.classes[k], float(probabilities[k])) for k in order]
