"""Adapters by --lora_* for models that PEFT has no layers for: which layers get one, and the model with them on.

The layers are those of common/lora_layers.py, and what a task registers beside them (common/lora.py).
"""

from torch import nn

from common.config import UserError, shown
from common.lora import LoRAConfig, adaptable_layers, inject_lora, is_within, match_modules
from common.lora_targets import in_last_blocks, trying_pattern
from common.runtime import say
from common.trial import freeze_unused, in_short


def own_targets(model, which: str, presets: dict[str, str], whole, answer, last_k: int = 0) -> list[str]:
    """Full names of the layers that get adapters.

    which: a name of `presets` (name -> regular expression for full names), or a regular expression for full names or their
    ends. whole: parts that train whole, in which no layer gets one; nor does an embedding. last_k: in the last K blocks alone.
    Layers on which an adapter could learn nothing are left out, and named. UserError where nothing is hit, with what there is.
    """
    layers = {
        name: layer
        for name, layer in adaptable_layers(model).items()
        if not isinstance(layer, nn.Embedding) and not is_within(name, whole)
    }
    with trying_pattern(which):
        names = list(match_modules("--lora_targets", presets.get(which, [which]), layers, model))
    last = in_last_blocks(names, last_k)
    names = [name for name in names if name in last]
    idle = freeze_unused(model, answer, whole, names)
    if len(idle) == len(names):
        raise UserError(f"--lora_targets {which}: no loss depends on {in_short(idle)}, so adapters there would learn nothing")
    if idle:
        say(f"left out: no loss depends on {in_short(idle)}")
    return [name for name in names if name not in idle]


def add_own_adapter(model, config, presets: dict[str, str], whole, answer):
    """The model with adapters as config.lora_* ask for, frozen but for these and the parts `whole`; with lora_r 0 those alone.

    presets, answer: as of own_targets. UserError for settings that fit nothing here.
    """
    if config.frozen_dtype != "fp32":
        raise UserError("--frozen_dtype bf16 is not for this task, whose layers PEFT does not know: frozen weights stay fp32")
    model.whole = tuple(whole)
    if not config.lora_r:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_within(name, whole))
        return model
    names = set(own_targets(model, config.lora_targets, presets, whole, answer, config.lora_last_k))

    def chosen(name, _layer):
        return name in names

    chosen.__name__ = config.lora_targets
    lora = LoRAConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=chosen,
        rank_pattern=read_ranks(config.lora_rank_pattern),
        modules_to_save=list(whole),
    )
    inject_lora(model, lora)
    return model


def read_ranks(text: str) -> dict[str, int]:
    """--lora_rank_pattern: "to_qkv=8,upsample=2" -> {"to_qkv": 8, "upsample": 2}. UserError for anything else."""
    ranks = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, equals, rank = part.rpartition("=")
        if not (equals and name and rank.isascii() and rank.isdigit() and len(rank) < 6):
            raise UserError(f"--lora_rank_pattern: {shown(part)} is no name=rank, as in some_layers=12,others=4")
        ranks[name] = int(rank)
    return ranks
