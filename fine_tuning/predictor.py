"""A tuned CLIP as an object of your own program.

import sys
sys.path.insert(0, "path/to/fine_tuning")
from predictor import Predictor

predictor = Predictor("outputs/clip/lora/checkpoints/best")   # full or LoRA: the folder says which
predictor.predict("dog.jpg", top_k=3)                         # [("beagle", 0.93), ("basset", 0.04), ("chihuahua", 0.01)]
predictor.predict_batch(["a.jpg", "b.jpg"], top_k=1)          # [[("beagle", 0.93)], [("chihuahua", 0.88)]]
"""

import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError  # noqa: E402
from model import load_checkpoint  # noqa: E402


class Predictor:
    """Class probabilities for pictures. A picture is a path, a PIL image, or a uint8 array (H, W, 3) in RGB."""

    def __init__(self, checkpoint, base: str = "", device: str = "auto", merge: bool = True):
        """checkpoint: a folder that train.py or train_lora.py left (checkpoints/best).

        base: where an adapter's base is, if not under its recorded name. device: auto, cpu, cuda, mps. merge: add the adapter
        into the weights. UserError, in one line, where checkpoint and base are damaged or do not belong together.
        """
        import torch

        from common.vision.preprocess import ClassifierPreprocess

        if str(device) == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.model, processor, self.origin = load_checkpoint(checkpoint, base, merge, device)
        self.device, self.classes, self.preprocess = device, self.origin["classes"], ClassifierPreprocess(processor)

    def predict(self, image, top_k: int = 5) -> list[tuple[str, float]]:
        """[(class name, probability), ...] of one picture, the most probable first."""
        return self.predict_batch([image], top_k)[0]

    def predict_batch(self, images, top_k: int = 5, batch_size: int = 32) -> list[list[tuple[str, float]]]:
        """The same for several pictures, in their order; batch_size of them go through the model at a time."""
        import torch

        images, answers = list(images), []
        if top_k < 1 or batch_size < 1:
            raise UserError("top_k and batch_size must be at least 1")
        for first in range(0, len(images), batch_size):
            pixels = torch.stack([self.prepare(image) for image in images[first : first + batch_size]])
            answers += [self.best(row, top_k) for row in self.probabilities(pixels)]
        return answers

    def prepare(self, image):
        """A picture as the model wants it: float32 (3, h, w). UserError where it is none."""
        import numpy as np
        from PIL import Image

        from common.vision.pictures import decode

        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise UserError(f"an array of {image.dtype} {image.shape} is no picture; expected uint8 (H, W, 3)")
        else:
            try:
                image = decode(Path(image).expanduser())
            except (OSError, ValueError) as error:
                raise UserError(f"{image}: {error}") from None
        return self.preprocess.normalize(self.preprocess.center(self.preprocess.resize(image)))

    def probabilities(self, pixels):
        """pixels (B, 3, h, w) -> probabilities of all classes, float64 (B, K)."""
        import torch

        with torch.inference_mode():
            logits = self.model(pixel_values=pixels.to(self.device)).logits
        return logits.double().softmax(dim=1).cpu().numpy()

    def best(self, probabilities, top_k: int) -> list[tuple[str, float]]:
        order = probabilities.argsort()[::-1][:top_k]
        return [(self.classes[k], float(probabilities[k])) for k in order]
