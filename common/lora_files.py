"""Adapter folders in PEFT's format: adapter_model.safetensors and adapter_config.json, with all that trained whole beside.

PeftModel.from_pretrained(base, folder) loads what save_adapter writes, where PEFT has an exact layer for every type in it
(linear, embedding, convolutions without dilation and groups), and load_adapter loads PEFT's plain LoRA folders.
"""

import json
import re
from collections import Counter
from pathlib import Path

from common.checkpoint import atomic_folder, open_model_folder, read_json
from common.config import UserError
from common.lora import (
    ADAPTER_FILE,
    ADAPTER_PREFIX,
    LoRAConfig,
    adaptable_layers,
    adapted_layers,
    all_tensors,
    is_within,
    load_lora_state_dict,
    lora_state_dict,
    put_lora,
    remove_lora,
)
from common.runtime import say
from common.tensor_files import load_tensors

ADAPTER_CONFIG = "adapter_config.json"
# Keys of PEFT's adapter_config.json that are read here, or that change nothing in what an adapter computes.
KNOWN_KEYS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"),
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode"),
    *("loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"),
}
HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights as well


def config_for_file(model, base: str = "") -> dict:
    """The content of adapter_config.json: layers by full names; the commonest r and alpha, the others by layer."""
    layers = adapted_layers(model)
    if not layers:
        raise UserError("LoRA: the model has no adapters to save")
    r, alpha = (Counter(getattr(layer, key) for layer in layers.values()).most_common(1)[0][0] for key in ("r", "lora_alpha"))
    exact = {name: "^" + re.escape(name) for name in layers}  # PEFT takes the keys as patterns for a name's end
    some = next(iter(layers.values()))
    # PEFT takes a layer's full name for the end of longer ones, too: those are excluded by name.
    besides = [name for name, _ in model.named_modules() if name not in layers and ends_in(name, layers)]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": getattr(some.lora_dropout, "p", 0.0),
        "use_rslora": some.use_rslora,
        "bias": "none",
        "target_modules": list(layers),
        "exclude_modules": besides or None,
        "rank_pattern": {exact[name]: layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {exact[name]: layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != alpha},
        # PEFT would wrap these in copies, which breaks parts that layers share; it loads their tensors as they are.
        "modules_to_save": None,
    }


def write_adapter(model, folder: Path, base: str = "", half: bool = False) -> None:
    """The two files of an adapter into a folder that is there; save_adapter does it in one step.

    base: the base model's name or folder, for the reader. half: floats in fp16, half the bytes; UserError where one is too
    large for that.
    """
    from safetensors.torch import save_file

    config = config_for_file(model, base)
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in lora_state_dict(model).items()}
    if half:
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
        too_large = [name for name, t in tensors.items() if t.is_floating_point() and t.isinf().any()]
        if too_large:
            raise UserError(f"{too_large[0]} has numbers above 65,504, which half precision cannot hold: save it without")
    save_file({ADAPTER_PREFIX + name: t for name, t in tensors.items()}, folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_adapter(model, folder: Path, base: str = "", half: bool = False) -> None:
    """An adapter folder, whole or not at all (see write_adapter); one that stood there is replaced."""
    with atomic_folder(Path(folder)) as aside:
        write_adapter(model, aside, base, half)


def load_adapter(model, folder: Path, strict: bool = True) -> list[str]:
    """Puts the adapter of a folder on the base `model`, in place of the one that is on it, and sets eval mode.

    So several adapters follow each other on a base that is loaded once. UserError for a damaged folder, settings that need
    more than plain LoRA, and the first tensor that does not fit; the model is the bare base then. strict=False: what does not
    fit is skipped, printed and returned as sentences.
    """
    folder = open_model_folder(Path(folder), ADAPTER_FILE)
    config, tensors = read_adapter(folder)
    remove_lora(model)
    try:
        faults = put_adapter(model, config, tensors, strict)
    except UserError as error:
        remove_lora(model)
        raise UserError(f"the adapter in {folder}: {error}") from None
    model.eval()
    return faults


def put_adapter(model, config: dict, tensors: dict, strict: bool) -> list[str]:
    """Builds the layers that the content of an adapter folder is for, and fills them."""
    settings, faults = settings_in_file(model, config, tensors)
    if faults and strict:
        raise UserError(f"{faults[0]} ({len(faults)} in all)")
    for fault in faults:
        say(f"adapter: skipped, {fault}")
    own = all_tensors(model)
    whole = {name for name in own if name in tensors}
    parts = config.get("modules_to_save") or []
    for part in [parts] if isinstance(parts, str) else parts:  # a part of which there is anything must be there in full
        inside = {name for name in own if is_within(name, [part])}
        whole |= inside if strict or inside & whole else set()
    doubly = sorted(name for name in whole if any(name.startswith(f"{layer}.") for layer in settings))
    if doubly and strict:
        raise UserError(f"{doubly[0]} trained whole, and its layer has an adapter as well: only one can be")
    whole.difference_update(doubly)
    # A layer's own bias may be carried beside its adapter, under the name that it has there.
    whole |= {name for layer in settings if (name := f"{layer}.base_layer.bias") in tensors and f"{layer}.bias" in own}
    put_lora(model, settings, sorted(whole))
    return faults + load_lora_state_dict(model, tensors, strict)


def read_adapter(folder: Path) -> tuple[dict, dict]:
    """(adapter_config.json, tensors by their names in the model). UserError unless it is plain LoRA."""
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / ADAPTER_CONFIG} is not of a LoRA adapter")
    odd = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if config.get("init_lora_weights") not in HARMLESS_STARTS else []
    odd += [key for key in ("target_modules", "exclude_modules", "modules_to_save") if not is_names(config.get(key))]
    if odd:
        raise UserError(f"{folder / ADAPTER_CONFIG} asks for more than plain LoRA: {odd[0]} is {config[odd[0]]!r}")
    tensors = load_tensors(folder / ADAPTER_FILE)
    return config, {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in tensors.items()}


def is_names(value) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def settings_in_file(model, config: dict, tensors: dict) -> tuple[dict[str, tuple], list[str]]:
    """({layer: (r, alpha, dropout, use_rslora)}, what is wrong) of a base and the content of an adapter folder.

    A rank counts only where the file has a matrix A of that many rows: a config alone cannot ask for memory. No regular
    expression of a file is run, since one can be made to take for ever: without a list of names in target_modules the
    layers are those that the file has tensors for, and ranks and alphas by anything but names are refused.
    """
    plain = LoRAConfig(
        r=config.get("r"),
        lora_alpha=config.get("lora_alpha"),
        lora_dropout=config.get("lora_dropout", 0.0),
        rank_pattern=plain_names(config.get("rank_pattern")),
        alpha_pattern=plain_names(config.get("alpha_pattern")),
    )
    found, layers, faults, settings = set(map(layer_of, tensors)) - {""}, adaptable_layers(model), [], {}
    targets = config.get("target_modules")
    excluded = config.get("exclude_modules") or []
    by_list = isinstance(targets, list) and isinstance(excluded, list) and config.get("layers_to_transform") is None
    if by_list and set(targets) != found:  # the ends of names, as PEFT takes them
        left_out = [*excluded, *(config.get("modules_to_save") or [])]
        wanted = {name for name in layers if ends_in(name, targets) and not is_within(name, left_out)}
        faults += [f"the config names {name}, and the file has no tensor of it" for name in sorted(wanted - found)]
    for name in sorted(found & layers.keys()):
        r, alpha = by_name(plain.rank_pattern, name, plain.r), by_name(plain.alpha_pattern, name, plain.lora_alpha)
        key = next((f"{name}.{a}" for a in ("lora_A.weight", "lora_embedding_A") if f"{name}.{a}" in tensors), None)
        shape = tuple(tensors[key].shape) if key else ()
        if not shape or 0 in shape or shape[0] != r * getattr(layers[name], "groups", 1):
            faults.append(f"{key or name + '.lora_A.weight'} is {shape or 'missing'}, and the config says r = {r}")
        else:
            settings[name] = (r, alpha, plain.lora_dropout, bool(config.get("use_rslora")))
    return settings, faults


def layer_of(name: str) -> str:
    """The layer that an adapter's tensor belongs to; "" for a tensor of the model itself."""
    layer, mark, _ = name.partition(".lora_")
    return layer if mark else ""


def plain_names(patterns) -> dict:
    """rank_pattern or alpha_pattern of a file with its keys unescaped: ends of names, or full names after a "^"."""
    names = {}
    for key, value in (patterns or {}).items() if isinstance(patterns or {}, dict) else [(str(patterns), None)]:
        if not re.fullmatch(r"\^?(?:[\w.-]|\\\W)+\$?", key):
            raise UserError(f"the config has {key!r} as a pattern: only names of layers are taken from a file")
        names[re.sub(r"\\(.)", r"\1", key.removesuffix("$"))] = value
    return names


def by_name(patterns: dict, name: str, default):
    """The value of the first pattern of plain_names that names this layer."""
    return next((value for key, value in patterns.items() if key == f"^{name}" or ends_in(name, [key])), default)


def ends_in(name: str, ends) -> bool:
    """Whether a layer's name is one of these or ends in one: "a.b.fc" ends in "b.fc"."""
    return any(f".{name}".endswith(f".{end}") for end in ends)
