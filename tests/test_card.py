"""The command that a model card gives repeats the run that it is of."""

import dataclasses
import shlex
from dataclasses import dataclass

from common.card import base_rows, command, loading
from common.config import LoraTrainConfig, parse, setting


@dataclass
class CardConfig(LoraTrainConfig):
    model: str = setting("owner/base", demo="demo")  # base
    lr: float = setting(1e-4, demo=1e-2)  # rate
    flip: bool = True  # mirror


def repeated(*flags):
    """(the settings of a run with these flags, those of the command on its card)."""
    run = parse(CardConfig, flags, "")
    words = shlex.split(command("lora", run))
    assert words[:2] == ["python", "train_lora.py"]
    return run, parse(CardConfig, words[2:], "")


def test_the_command_repeats_a_run_on_the_demo_and_on_data_of_ones_own():
    for flags in ([], ["--lr", "1e-4"], ["--data_dir", "mine"], ["--data_dir", "mine", "--model", "demo", "--lr", "1e-4"]):
        run, again = repeated(*flags, "--no_flip", "--epochs", "3")
        assert again == run


def test_patterns_and_odd_words_reach_the_script_as_they_are():
    pattern = r".*\.(q|v)_proj$HOME `x` "
    run, again = repeated("--data_dir", "my data", "--lora_targets", pattern)
    assert again == run and again.lora_targets == pattern


def test_places_of_one_machine_are_not_told():
    run, again = repeated("--data_dir", "/home/me/dogs", "--output_dir", "/home/me/out", "--threads", "2", "--save_steps", "7")
    assert again == dataclasses.replace(run, data_dir="path/to/dogs", output_dir="", threads=0, save_steps=0)


def test_a_card_says_whose_licence_holds_and_where_the_base_is_taken_from():
    for name, licence, code in (
        ("owner/base", "https://huggingface.co/owner/base", 'folder", base="owner/base")'),
        ("demo", "of LoRA Workshop", 'folder")'),
        ("/home/me/base", "ask whoever published it", 'folder", base="path/to/the/base")'),
    ):
        text = "\n".join([*base_rows({"name": name, "sha256": "0"}), *loading("lora", name, f'from_pretrained("{name}")', "")])
        assert licence in text and code in text and "/home" not in text
