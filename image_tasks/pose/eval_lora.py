"""Scores a LoRA-tuned pose model, as eval.py does a fully tuned one.

python eval_lora.py                                      # the newest outputs/pose/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/lora/checkpoints/best --data_dir ~/points --split test
"""

from dataclasses import dataclass
from pathlib import Path

from eval import EvalConfig, cli, main


@dataclass
class EvalLoraConfig(EvalConfig):
    model: str = ""  # where the adapter's base is, if not under the name that the adapter was trained with
    merge: bool = True  # add the adapter into the base's weights before scoring


def load_lora(config):
    from model import load_adapter

    return load_adapter(Path(config.checkpoint).expanduser(), config.model, config.merge)


if __name__ == "__main__":
    cli(main, settings=EvalLoraConfig, method="lora", load=load_lora)
