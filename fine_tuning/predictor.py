"""A tuned CLIP as an object of your own program; several adapters on one base, which is loaded once.

import sys
sys.path.insert(0, "path/to/fine_tuning")
from predictor import Predictor

predictor = Predictor("outputs/clip/lora/checkpoints/best")   # full or LoRA: the folder says which
predictor.predict("dog.jpg", top_k=3)                         # [("beagle", 0.93), ("basset", 0.04), ("chihuahua", 0.01)]
predictor.predict_batch(["a.jpg", "b.jpg"], top_k=1)          # [[("beagle", 0.93)], [("chihuahua", 0.88)]]
predictor.add("outputs/clip/lora_2/checkpoints/best", "cats") # another adapter on the same base, with classes of its own
predictor.predict("cat.jpg", model="cats")
"""

import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.vision.class_predictor import ClassPredictor  # noqa: E402
from model import answer, load_base, load_checkpoint  # noqa: E402


class Predictor(ClassPredictor):
    """A checkpoint that gives class probabilities for pictures: paths, PIL images, or uint8 arrays (H, W, 3) in RGB."""

    model_functions = load_base, load_checkpoint, answer
