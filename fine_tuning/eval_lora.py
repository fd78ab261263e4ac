"""Scores a LoRA-tuned CLIP, as eval.py does a fully tuned one.

python eval_lora.py                                      # the newest outputs/clip/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/dora/checkpoints/best --data_dir ../data/dogs --split test
"""

from dataclasses import dataclass
from pathlib import Path

from eval import EvalConfig, cli, main


@dataclass
class EvalLoraConfig(EvalConfig):
    merge: bool = True  # add the adapter into the base's weights before scoring


def load_lora(config, device):
    from model import load_adapter

    return load_adapter(Path(config.checkpoint).expanduser(), config.model, config.merge, device)


if __name__ == "__main__":
    cli(main, settings=EvalLoraConfig, method="lora", load=load_lora)
