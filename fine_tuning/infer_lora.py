"""Classifies your pictures with a LoRA-tuned CLIP, as infer.py does with a fully tuned one.

python infer_lora.py --input photo.jpg                   # or a folder, or a glob in quotes: "shots/*.png"
python infer_lora.py --input shots/ --no-merge           # adapter beside the weights: the same answers, slower
"""

from dataclasses import dataclass
from pathlib import Path

from infer import InferConfig, cli, main


@dataclass
class InferLoraConfig(InferConfig):
    model: str = ""  # where the adapter's base is, if not under the name that the adapter was trained with
    merge: bool = True  # add the adapter into the base's weights: the same outputs, without the detour


def load_lora(config, device):
    from common.bases import open_checkpoint
    from predictor import Predictor

    folder, _ = open_checkpoint(Path(config.checkpoint).expanduser(), "clip", "lora")
    return Predictor(folder, config.model, device, config.merge)


if __name__ == "__main__":
    cli(main, settings=InferLoraConfig, method="lora", load=load_lora)
