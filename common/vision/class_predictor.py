"""A tuned classifier as an object of a program: the most probable classes of a picture."""

import time
from pathlib import Path

import numpy as np
import torch

from common.adapters_on_base import AdaptersOnBase
from common.class_metrics import softmax
from common.config import UserError
from common.runtime import progress_bar
from common.samples import Faults
from common.vision.pictures import as_list, as_pixels
from common.vision.preprocess import ClassifierPreprocess


class ClassPredictor(AdaptersOnBase):
    """Class probabilities for pictures. A picture is a path, a PIL image, or a uint8 array (H, W, 3) in RGB: see as_pixels."""

    def details(self, model, processor, origin):
        """(class names, preprocessing) of a checkpoint."""
        return origin["classes"], ClassifierPreprocess(processor)

    @property
    def classes(self) -> list[str]:
        """The class names of the first checkpoint."""
        return self.origin["classes"]

    def predict(self, image, top_k: int = 5, model: str = "") -> list[tuple[str, float]]:
        """[(class name, probability), ...] of one picture, the most probable first.

        model: a name given to `add`; "": the first checkpoint.
        """
        return self.predict_batch([image], top_k, model=model)[0]

    def predict_batch(self, images, top_k: int = 5, batch_size: int = 32, model: str = "") -> list[list[tuple[str, float]]]:
        """The same for several pictures, in their order; batch_size of them go through the model at a time."""
        images, answers = as_list(images), []
        if top_k < 1 or batch_size < 1:
            raise UserError("top_k and batch_size must be at least 1")
        for first in range(0, len(images), batch_size):
            pixels = torch.stack([self.prepare(image, model) for image in images[first : first + batch_size]])
            answers += [self.best(row, top_k, model) for row in self.probabilities(pixels, model)]
        return answers

    def prepare(self, image, model: str = "") -> torch.Tensor:
        """A picture as the model wants it: float32 (3, h, w). UserError where it is none."""
        pixels, (_, preprocess) = as_pixels(image), self.find(model).details
        try:
            return preprocess.normalize(preprocess.center(preprocess.resize(pixels)))
        except ValueError as error:
            raise UserError(f"{image if isinstance(image, (str, Path)) else 'the image'}: {error}") from None

    def probabilities(self, pixels: torch.Tensor, model: str = "") -> np.ndarray:
        """pixels (B, 3, h, w) -> probabilities of all classes, float64 (B, K)."""
        with self.using(model) as classifier, torch.inference_mode():
            logits = classifier(pixel_values=pixels.to(self.device)).logits
        return softmax(logits.double().cpu().numpy())

    def best(self, probabilities: np.ndarray, top_k: int, model: str = "") -> list[tuple[str, float]]:
        order, (classes, _) = probabilities.argsort()[::-1][:top_k], self.find(model).details
        return [(classes[k], float(probabilities[k])) for k in order]

    def classify_files(self, paths: list[Path], top_k: int, batch_size: int, faults: Faults):
        """Yields (path, [{"class", "probability"}, ...], milliseconds of the model) of every picture file that can be decoded.

        The others are noted in faults.
        """
        for first in progress_bar(range(0, len(paths), batch_size), "classifying"):
            ready = []
            for path in paths[first : first + batch_size]:
                try:
                    ready.append((path, self.prepare(path)))
                except UserError as error:
                    faults.add(str(error).removeprefix(f"{path}: ").partition(", ")[0], path)
            if not ready:
                continue
            began = time.perf_counter()
            rows = self.probabilities(torch.stack([pixels for _, pixels in ready]))
            took = 1000 * (time.perf_counter() - began) / len(ready)
            for (path, _), row in zip(ready, rows, strict=True):
                yield path, [{"class": name, "probability": value} for name, value in self.best(row, top_k)], took
