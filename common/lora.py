"""LoRA on any model: which layers get an adapter; on, merged, and off again; an adapter's tensors and figures.

    table = inject_lora(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["head"]))
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)       # adapters and the head; all else is frozen
    merged = merge_lora(model, inplace=False)                                 # a plain model of the base's classes

common/lora_layers.py has the layers, common/lora_files.py saves and loads adapters in PEFT's format.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from common.config import UserError
from common.lora_layers import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    base_weight,
    weight_home,
)
from common.runtime import counted, say
from common.tensor_files import is_finite

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # what PEFT puts before the names of a model's layers
MAX_RANK = 4096  # wider than any layer gains from; a larger one is a mistake, or a file that wants our memory


@dataclass
class LoRAConfig:
    """Which layers get an adapter, and how wide it is. UserError for values that make no sense.

    target_modules: a list of names, each of a layer ("q_proj": all whose full name ends so) or of a part (all layers in it);
    or one regular expression for full names; or a callable (name, module) -> bool; or "all", "all-linear", "all-conv".
    exclude_modules: the same forms; these are left alone. modules_to_save: names of parts that train whole, such as a head.
    rank_pattern, alpha_pattern: other values of r and lora_alpha, by name as above or a regular expression for a name's end;
    the first that fits counts. use_rslora: scale by alpha / sqrt(r) (arXiv 2312.03732), which keeps large ranks learning.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] | Callable = "all-linear"
    exclude_modules: str | list[str] | Callable = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = ()
    use_rslora: bool = False

    def __post_init__(self):
        for where, r in {"all layers": self.r, **self.rank_pattern}.items():
            if type(r) is not int or not 1 <= r <= MAX_RANK:
                raise UserError(f"LoRA: the rank of {where} is {r!r}, but must be a whole number from 1 to {MAX_RANK}")
        for where, alpha in {"all layers": self.lora_alpha, **self.alpha_pattern}.items():
            if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
                raise UserError(f"LoRA: lora_alpha of {where} is {alpha!r}, but must be a positive number")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"LoRA: lora_dropout is {self.lora_dropout!r}, but must be at least 0 and below 1")
        for where in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save"):
            patterns = getattr(self, where)
            for pattern in () if callable(patterns) else [patterns] if isinstance(patterns, str) else patterns:
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise UserError(f"LoRA: {where} holds {pattern!r}, which is no name and no pattern: {error}") from None
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]


LORA_TYPES = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
    nn.ConvTranspose1d: LoRAConvTranspose1d,
    nn.Embedding: LoRAEmbedding,
}
TARGET_PRESETS = {  # "all": whatever there is a LoRA layer for
    "all": (nn.Module,),
    "all-linear": (nn.Linear,),
    "all-conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d),
}


def register_lora_layer(base_type: type, lora_type: type) -> type:
    """Lets inject_lora adapt layers of a task's own, such as a sparse convolution. Not those of subclasses of base_type.

    Returns lora_type: `@partial(register_lora_layer, SparseConv)` above its class registers it where it stands.
    """
    if not issubclass(lora_type, LoRALayer):
        raise TypeError(f"{lora_type.__name__} is no LoRALayer")
    LORA_TYPES[base_type] = lora_type
    return lora_type


# On and off a model ------------------------------------------------------------------------------------------------------


def is_within(name: str, parts) -> bool:
    """Whether a module or parameter name lies in a part of the model: "a.head.0.weight" does in "head"."""
    return any(f".{part}." in f".{name}." for part in parts)


def name_fits(pattern: str, name: str) -> bool:
    """Whether a pattern is a layer's name, its end, a part that it lies in, or a regular expression for its end."""
    return is_within(name, (pattern,)) or re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def match_modules(what: str, patterns, modules: dict, model) -> dict[str, str]:
    """{name: the first pattern that fits it} for the names in `modules`. UserError for a pattern that fits none of them."""
    if callable(patterns):
        tests = {getattr(patterns, "__name__", "callable"): patterns}
    elif isinstance(patterns, str):
        kinds = TARGET_PRESETS.get(patterns)
        tests = {patterns: lambda name, module: isinstance(module, kinds) if kinds else re.fullmatch(patterns, name)}
    else:
        tests = {pattern: lambda name, module, pattern=pattern: name_fits(pattern, name) for pattern in patterns}
    found = {}
    for pattern, test in tests.items():
        hits = [name for name, module in modules.items() if test(name, module)]
        if not hits:
            others = [] if callable(patterns) else [(n, m) for n, m in model.named_modules() if n not in modules and test(n, m)]
            only = f" (only {others[0][0]}, a {type(others[0][1]).__name__})" if others else ""
            there = ", ".join(sorted({re.sub(r"\d+", "N", name) for name in modules})) or "none"
            raise UserError(f"LoRA: {what} {pattern!r} fits nothing here{only}; there are: {there}")
        for name in hits:
            found.setdefault(name, pattern)
    return found


def inject_lora(model: nn.Module, config: LoRAConfig) -> list[dict]:
    """Puts adapters on a model's layers, in place, and freezes all but them and config.modules_to_save.

    Returns the coverage table: name, type, shape, r, alpha, parameters and pattern of each adapted layer. Layers are adapted
    by their exact type: a subclass may compute something else. UserError, before anything is changed, for a pattern that
    fits nothing, with the candidates. A layer that the model uses in several places gets one adapter.
    """
    if adapted_layers(model):
        raise UserError("LoRA: the model has adapters already; call remove_lora first")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])  # a shared one under its first name only
    tensors = {name: tensors[name] for name in all_tensors(model).keys() & tensors.keys()}  # not buffers that nobody saves
    whole = match_modules("modules_to_save", config.modules_to_save, dict(sorted(tensors.items())), model)
    excluded = match_modules("exclude_modules", config.exclude_modules, dict(model.named_modules()), model)
    layers = {
        name: module
        for name, module in adaptable_layers(model).items()
        if name not in excluded and not any(tensor.startswith(f"{name}.") for tensor in whole)
    }
    chosen = match_modules("target_modules", config.target_modules, layers, model)
    if not chosen:
        raise UserError("LoRA: target_modules is empty: name the layers that get an adapter")
    match_modules("rank_pattern", list(config.rank_pattern), chosen, model)
    match_modules("alpha_pattern", list(config.alpha_pattern), chosen, model)
    settings = {}
    for name in chosen:
        r = next((r for pattern, r in config.rank_pattern.items() if name_fits(pattern, name)), config.r)
        alpha = next((a for pattern, a in config.alpha_pattern.items() if name_fits(pattern, name)), config.lora_alpha)
        settings[name] = (r, alpha, config.lora_dropout, config.use_rslora)
    put_lora(model, settings, whole)
    hits = Counter(chosen.values())
    say(f"LoRA on {counted(len(chosen), 'layer')}: " + ", ".join(f"{pattern} {n}" for pattern, n in hits.items()))
    return [{**row, "pattern": chosen[row["name"]]} for row in coverage(model)]


def adaptable_layers(model) -> dict[str, nn.Module]:
    """The layers that there is a LoRA layer for, each under its first name."""
    return {name: m for name, m in model.named_modules() if name and type_before_parametrizations(m) in LORA_TYPES}


def put_lora(model, settings: dict[str, tuple], whole) -> None:
    """Adapters with (r, alpha, dropout, use_rslora) on the layers of these names; `whole`: names of tensors to train whole.

    The base's values of those are kept in model.lora_whole, so that another adapter can follow on the same base.
    """
    modules = dict(model.named_modules())
    layers = {name: LORA_TYPES[type_before_parametrizations(modules[name])](modules[name], *s) for name, s in settings.items()}
    replace_modules(model, {modules[name]: layer.train(modules[name].training) for name, layer in layers.items()})
    tensors = all_tensors(model)
    model.lora_whole = {name: tensors[name].detach().clone() for name in whole}
    freeze_base_params(model)


def replace_modules(model, new: dict[nn.Module, nn.Module]) -> None:
    """Each module that is a key gives way to its value, in every place where the model has it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() names a child that stands here twice only once
            if child in new:
                setattr(parent, name, new[child])


def remove_lora(model) -> None:
    """Takes the adapters off: the model is the base again, bit for bit, with its parameters still frozen."""
    unmerge_lora(model)
    tensors = all_tensors(model)
    for name, tensor in getattr(model, "lora_whole", {}).items():
        tensors[name].data.copy_(tensor)
    replace_modules(model, {layer: layer.base_layer for layer in adapted_layers(model).values()})
    model.lora_whole = {}


def adapted_layers(model) -> dict[str, LoRALayer]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def lora_parameters(model) -> list[nn.Parameter]:
    """The adapters' parameters, without what trains whole beside them."""
    return [p for layer in adapted_layers(model).values() for p in layer.adapter().values()]


def freeze_base_params(model) -> None:
    """Leaves the adapters to train, and the tensors that train whole (modules_to_save)."""
    model.requires_grad_(False)
    tensors = all_tensors(model)
    for tensor in [*lora_parameters(model), *(tensors[name] for name in getattr(model, "lora_whole", {}))]:
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))  # a buffer is saved, and does not train


def merge_lora(model, inplace: bool = True):
    """The model with every update in its layer's weight: no slower than the base.

    inplace: the same model, which unmerge_lora restores bit for bit; its adapters get no gradient meanwhile. Else a copy
    without adapters, with the base's classes and names of tensors, to save or export. UserError, with nothing changed, where
    a weight is computed by something other than weight_norm.
    """
    if not inplace:
        # Tensors with a history cannot be copied, and the old weight_norm leaves such a one after every forward pass.
        computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor) and not t.is_leaf]
        model = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    layers = [layer for layer in adapted_layers(model).values() if not layer.kept]
    for layer in layers:
        weight_home(layer.base_layer)
    for layer in layers:
        layer.merge()
    return model if inplace else settle_lora(model)


def settle_lora(model):
    """The model without its adapters' layers, its weights as they are now: what was merged stays in them."""
    replace_modules(model, {layer: layer.base_layer for layer in adapted_layers(model).values()})
    model.lora_whole = {}
    return model


def unmerge_lora(model) -> None:
    """Undoes merge_lora(inplace=True): every weight is the base's again, bit for bit."""
    for layer in adapted_layers(model).values():
        if layer.kept:
            layer.unmerge()


# Tensors and figures ---------------------------------------------------------------------------------------------------


def all_tensors(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers themselves, by all their names in the state dict."""
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


def trained_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors of the adapters, and all that trains whole: modules_to_save, and whatever else was left to train."""
    adapters = {f"{name}.{key}": p for name, layer in adapted_layers(model).items() for key, p in layer.adapter().items()}
    tensors, whole = all_tensors(model), getattr(model, "lora_whole", {})
    named = {**adapters, **{name: tensors[name] for name in whole}}
    known = {id(tensor) for tensor in named.values()}
    return {**named, **{name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in known}}


def lora_state_dict(model) -> dict[str, torch.Tensor]:
    """What an adapter is made of: <layer>.lora_A.weight, <layer>.lora_B.weight, and all that trained whole by its own name."""
    return {name: tensor.detach() for name, tensor in trained_tensors(model).items()}


@torch.no_grad()
def load_lora_state_dict(model, state: dict, strict: bool = True) -> list[str]:
    """Puts tensors of lora_state_dict, or of a PEFT file, into a model with the same adapters; any float precision.

    UserError, with nothing changed, for the first tensor that is missing, unexpected or of another shape. strict=False: such
    tensors are skipped, printed, and returned as sentences.
    """
    if any(layer.kept for layer in adapted_layers(model).values()):
        raise UserError("LoRA: the model is merged; call unmerge_lora before loading other tensors")
    given = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in state.items()}
    own = trained_tensors(model)
    faults = []
    for name in sorted(given.keys() | own.keys()):
        found, wanted = ("missing" if n is None else tuple(n.shape) for n in (given.get(name), own.get(name)))
        if name in given and name in own and given[name].is_floating_point() != own[name].is_floating_point():
            faults.append(f"{name} is {given[name].dtype}, expected {own[name].dtype}")
        elif found != wanted:
            faults.append(f"{name} is {found}, expected {wanted if name in own else 'no such tensor'}")
        elif not is_finite(given[name]):
            faults.append(f"{name} holds numbers that are not finite")
        else:
            continue
        given.pop(name, None)
    if faults and strict:
        raise UserError(f"the adapter does not fit the model: {faults[0]} ({len(faults)} in all)")
    for name, tensor in given.items():
        own[name].copy_(tensor)
    for fault in faults:
        say(f"adapter: skipped, {fault}")
    return faults


def coverage(model) -> list[dict]:
    """A row for each adapted layer: name, type, shape of its weight, r, alpha, parameters of its adapter."""
    return [
        {
            "name": name,
            "type": type_before_parametrizations(layer.base_layer).__name__,
            "shape": tuple(base_weight(layer.base_layer).shape),
            "r": layer.r,
            "alpha": layer.lora_alpha,
            "parameters": sum(p.numel() for p in layer.adapter().values()),
        }
        for name, layer in adapted_layers(model).items()
    ]


def describe_lora(model) -> str:
    """A line that sums up, then one for each adapted layer."""
    rows, total = coverage(model), count_parameters(model)["total"]
    own = sum(row["parameters"] for row in rows)
    kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(row["type"] for row in rows).items())
    whole = sum(tensor.numel() for name, tensor in trained_tensors(model).items()) - own
    lines = [f"LoRA on {counted(len(rows), 'layer')} ({kinds}): {own:,} of {total:,} parameters ({own / max(total, 1):.2%})"]
    lines[0] += f", {whole:,} more train whole" if whole else ""
    for row in rows:
        lines.append("  {name}: {type} {shape}, r {r}, alpha {alpha:g}, {parameters:,} parameters".format(**row))
    return "\n".join(lines)


def count_parameters(model) -> dict[str, int]:
    """{"total", "trainable"}: numbers of parameters, shared ones counted once."""

    def size(p):  # a 4-bit weight of bitsandbytes packs two numbers into each byte
        return 2 * p.numel() * p.element_size() if type(p).__name__ == "Params4bit" else p.numel()

    sizes = [(size(p), p.requires_grad) for p in model.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, trains in sizes if trains)}
