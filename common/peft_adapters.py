"""Adapters on any model through PEFT: find the layers, count what trains, save and load strictly."""

import json
import re
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from common.checkpoint import read_json
from common.config import UserError
from common.lora import ADAPTER_FILE, is_within
from common.runtime import say

# Parts of layer names of ViT and its relatives today, and as transformers 4 had them (some kept those well into 5).
OLD_NAMES = (
    (".layers.", ".encoder.layer."),
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.q_proj", ".attention.self.query"),  # Swin
    (".attention.k_proj", ".attention.self.key"),
    (".attention.v_proj", ".attention.self.value"),
    (".attention.o_proj", ".attention.output.dense"),
    (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
)


def find_targets(model, wanted, kinds, exclude=()) -> list[str]:
    """Full names of the modules of the given kinds that adapters go on, for LoraConfig(target_modules=...).

    wanted: "*" for all of these kinds, or a list of patterns, each a regular expression for the end of a module's name
    ("q_proj", "encoder.*fc1"). exclude: names that start a part of the model to leave alone, such as a head that trains
    whole. Prints how many layers each pattern hit; UserError, with the candidates, where one hit none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and not is_within(name, exclude)]
    if wanted == "*":
        hits = {}
        for name in names:
            hits.setdefault(re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)[0], []).append(name)  # fc1, downsample.0
    else:
        try:
            hits = {p: [name for name in names if re.search(rf"(^|\.)({p})$", name)] for p in wanted}
        except re.error as error:
            raise UserError(f"--lora_targets is no valid regular expression: {error}") from None
    for pattern, found in hits.items():
        if not found:
            ends = Counter(re.sub(r"\d+", "N", name) for name in names)
            raise UserError(f"no layer's name ends in {pattern!r}; there are: {', '.join(sorted(ends))}")
    if not names:
        raise UserError("the model has no layer that an adapter could go on")
    coverage = ", ".join(f"{pattern} {len(found)}" for pattern, found in hits.items())
    chosen = sorted({name for found in hits.values() for name in found})
    say(f"LoRA on {len(chosen)} layers: {coverage}")
    return chosen


def adapter_state(model) -> dict:
    """All that trained, by PEFT's names: the adapter's tensors, and the layers (heads) that train whole beside them."""
    from peft import get_peft_model_state_dict

    whole = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and not in_adapter(model, name)}
    return {**get_peft_model_state_dict(model, save_embedding_layers=False), **whole}


def in_adapter(model, name: str) -> bool:
    """Whether a parameter of a PEFT model belongs to its adapter (lora_A, ia3_l, hada_w1_a ...), not to the model below it."""
    return model.base_model.prefix in name


def save_adapter_files(model, folder: Path) -> None:
    """Writes a PEFT adapter folder; PeftModel.from_pretrained(base, folder) gives the trained model back.

    PEFT itself saves the adapter only (or wraps a head in a second copy, `modules_to_save`, which breaks heads whose
    weights are shared between layers). Its loader takes further keys of the model as they are, so the heads go into the
    same file under their own names.
    """
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set, which PEFT would write in another order in every process
    model.save_pretrained(folder, save_embedding_layers=False)
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in adapter_state(model).items()}, folder / ADAPTER_FILE)


def train_whole(model, parts) -> None:
    """Unfreezes the parts of a PEFT model with these names (heads), to train beside the adapter."""
    for name, parameter in model.named_parameters():
        if is_within(name, parts):
            parameter.requires_grad_(True)


def freeze_adapters(model) -> None:
    """Leaves the adapter of a PEFT model at its start, where it adds zero."""
    for name, parameter in model.named_parameters():
        if in_adapter(model, name):
            parameter.requires_grad_(False)


@contextmanager
def in_names_of_today(folder: Path, model):
    """Yields the adapter folder, or a copy of it in which layers go by the names of today, if it was saved under older ones.

    transformers 5 renamed the layers of ViT and its relatives (query became q_proj); it converts checkpoints, but not adapters.
    The copy asks for all layers that the original asked for, so that loading misses what the file lacks. What cannot be
    translated is yielded as it is, and loading says what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from torch import nn

    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError):
        tensors = {}
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    today = {old: name for name in layers for old in former_names(name)}
    names = {}
    for key in tensors:
        layer, mark, matrix = key.removeprefix("base_model.model.").partition(".lora_")
        names[key] = f"base_model.model.{today.get(layer, layer)}{mark}{matrix}" if mark else key
    config = read_json(folder / "adapter_config.json") if any(key != name for key, name in names.items()) else {}
    targets = config.get("target_modules")
    by_layer = config.get("rank_pattern") or config.get("alpha_pattern")  # these name layers, too, and are not translated
    if not isinstance(targets, list) or by_layer or len(set(names.values())) < len(names):
        yield folder
        return
    wanted = sorted({name for old, name in today.items() if any(f".{old}".endswith(f".{target}") for target in targets)})
    say(f"the adapter in {folder} has layer names of an older transformers; they are translated")
    with tempfile.TemporaryDirectory() as aside:
        save_file({names[key]: tensor for key, tensor in tensors.items()}, Path(aside) / ADAPTER_FILE)
        text = json.dumps({**config, "target_modules": wanted, "modules_to_save": None})
        (Path(aside) / "adapter_config.json").write_text(text, encoding="utf-8")
        yield Path(aside)


def former_names(name: str) -> set[str]:
    """All names that a layer may have had, today's among them."""
    names = {name}
    for new, old in OLD_NAMES:
        names |= {former.replace(new, old) for former in names}
    return names


def load_adapter_files(model, folder: Path, whole=()):
    """The base `model` with the adapter of `folder` on it, in eval mode; whole: the parts that trained whole.

    UserError unless every tensor of the file finds its place and every place gets its tensor.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    expected = {f"base_model.model.{name}": tuple(p.shape) for name, p in model.named_parameters() if is_within(name, whole)}
    with in_names_of_today(folder, model) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of missing tensors; here they are an error, below
        try:
            saved = load_file(place / ADAPTER_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / ADAPTER_FILE} cannot be read: {error}") from None
        try:
            model = PeftModel.from_pretrained(model, place)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"the adapter in {folder} does not fit this base: {' '.join(str(error).split())[:300]}") from None
    expected |= {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    shapes = {name: tuple(t.shape) for name, t in saved.items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise UserError(
            f"{folder / ADAPTER_FILE} does not fit this base: {wrong[0]} is {shapes.get(wrong[0], 'missing')}, "
            f"expected {expected.get(wrong[0], 'no such tensor')} ({len(wrong)} such tensors)"
        )
    return model.eval()
