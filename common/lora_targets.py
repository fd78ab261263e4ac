"""Which layers of a model get adapters: --lora_targets and --lora_last_k, for models whose layers PEFT knows."""

import re
from collections import Counter
from contextlib import contextmanager

from torch import nn

from common.config import UserError
from common.lora import is_within
from common.runtime import counted, say, time_limit
from common.trial import freeze_unused, in_short

PATTERN_SECONDS = 5  # for a regular expression of the user's; a good one needs milliseconds, (a+)+$ can take years
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The names of attention's query and value projections differ between architectures: the first set that is there counts.
QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("qkv",))  # qkv: timm's ViT computes all three in one layer


def choose_targets(model, which: str, exclude=(), last_k: int = 0, answer=None, r: int = 1) -> list[str]:
    """Full names of the layers that get adapters, for LoraConfig(target_modules=...).

    which: qv (attention's query and value), all-linear, all (convolutions, too), or a regular expression for the end of a layer's
    name. exclude: parts that train whole (heads). last_k: the last K blocks alone. answer: as in common/trial.py; layers on
    which it shows that an adapter would do nothing are left out, and named, and tensors of the heads without use are frozen.
    r: the rank; none with 0. UserError where nothing is hit, or nothing left.
    """
    if not r:
        freeze_unused(model, answer, exclude)
        return []
    # A grouped convolution has no low-rank pair in PEFT unless the rank divides into its groups; it stays frozen.
    grouped = [name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS) and module.groups > 1]
    if which == "all-linear" and not adaptable_names(model, (nn.Linear,), exclude):
        which = "all"
        say("no linear layer outside the head, so adapters go on convolutions, as with --lora_targets all")
    if which == "qv":
        ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        fitting = next((names for names in QUERY_VALUE if set(names) <= ends), None)
        if fitting is None:
            raise UserError("--lora_targets qv: no query and value layers go by a known name here; all-linear and all need none")
        return find_targets(model, fitting, (nn.Linear,), exclude, last_k, answer)
    if which == "all-linear":
        return find_targets(model, "*", (nn.Linear,), exclude, last_k, answer)
    if which == "all" and grouped:
        say(f"{len(grouped)} grouped convolutions take no adapter and stay frozen")
    kinds, exclude = (nn.Linear, *CONVOLUTIONS), (*exclude, *grouped)
    return find_targets(model, "*" if which == "all" else [which], kinds, exclude, last_k, answer)


def adaptable_names(model, kinds, exclude=()) -> list[str]:
    """Names of the modules of exactly these kinds, in the model's order, but for those in the parts to leave alone."""
    return [name for name, module in model.named_modules() if is_adaptable(module, kinds) and not is_within(name, exclude)]


def find_targets(model, wanted, kinds, exclude=(), last_k: int = 0, answer=None) -> list[str]:
    """Full names of the modules of exactly these kinds that adapters go on.

    wanted: "*" for all of these kinds, or a list of patterns, each a regular expression for the end of a module's name
    ("q_proj", "encoder.*fc1"). exclude: names that start a part of the model to leave alone, such as a head that trains
    whole. last_k: see `in_last_blocks`. answer: see `choose_targets`. Prints how many layers each pattern hit; UserError, with
    the candidates, where one hit none.
    """
    names = adaptable_names(model, kinds, exclude)
    if wanted == "*":
        hits = {}
        for name in names:
            hits.setdefault(re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)[0], []).append(name)  # fc1, downsample.0
    else:
        with trying_pattern(wanted[0]):
            hits = {p: [name for name in names if re.search(rf"(^|\.)({p})$", name)] for p in wanted}
    for pattern, found in hits.items():
        if not found:
            ends = Counter(re.sub(r"\d+", "N", name) for name in names)
            raise UserError(f"no layer's name ends in {pattern!r}; there are: {', '.join(sorted(ends))}")
    if not names:
        raise UserError("the model has no layer that an adapter could go on; --lora_r 0 trains the head alone")
    chosen = {name for found in hits.values() for name in found}
    chosen = in_last_blocks([name for name in names if name in chosen], last_k)
    chosen = where_adapters_work(model, chosen, exclude, answer) if answer else chosen
    counts = {pattern: len(chosen & set(found)) for pattern, found in hits.items()}
    coverage = ", ".join(f"{pattern} {count}" for pattern, count in counts.items() if count)
    say(f"LoRA on {counted(len(chosen), 'layer')}: {coverage}" + (f", in the last {counted(last_k, 'block')}" if last_k else ""))
    return sorted(chosen)


def where_adapters_work(model, names: set[str], exclude, answer) -> set[str]:
    """Those of the layers on which an adapter can do something; the others are named. UserError where none is left."""
    idle = freeze_unused(model, answer, exclude, sorted(names))
    why = f"the model does not call {in_short(idle)} as plain layers, and adapters there would do nothing"
    if idle and len(idle) == len(names):
        others = set(adaptable_names(model, (nn.Linear,), exclude)) - names
        others -= set(freeze_unused(model, answer, (), others))
        instead = f"take others, such as {in_short(sorted(others))}" if others else "--lora_r 0 trains the head alone"
        raise UserError(f"--lora_targets: {why}; {instead}")
    if idle:
        say(f"left out: {why}")
    return names - set(idle)


def is_adaptable(module, kinds) -> bool:
    """Whether an adapter's W + s B A means what the module computes: exactly these kinds, or bitsandbytes' linear layer.

    Subclasses may compute something else with their weight (weight-standardised convolutions in timm and BiT) or be passed by
    (the out_proj of torch's MultiheadAttention).
    """
    quantized = nn.Linear in kinds and isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes")
    return type(module) in kinds or quantized


def in_last_blocks(names: list[str], last_k: int) -> set[str]:
    """Of layer names in the model's order: those in the last K blocks, and what comes after them. 0: all of them.

    A block is what holds layers in an outermost list: "vit.layers.11" of "vit.layers.11.mlp.fc1"; a backbone's stages come first,
    an encoder's layers before a decoder's. What comes before the first adapter is run without gradients: nothing in it trains.
    """
    if not last_k:
        return set(names)
    block_of = {name: found[0] for name in names if (found := re.match(r"(?:[^.]*[^.\d][^.]*\.)+?\d+(?=\.)", name))}
    blocks = list(dict.fromkeys(block_of.values()))
    if last_k > len(blocks):
        raise UserError(f"--lora_last_k {last_k}: adapters would go into {len(blocks)} blocks altogether; 0 means all of them")
    first = next(i for i, name in enumerate(names) if block_of.get(name) == blocks[-last_k])
    return set(names[first:])


@contextmanager
def trying_pattern(pattern: str):
    """For a search by a regular expression that --lora_targets gave: UserError where it is none, or where it takes too long."""
    slow = f"--lora_targets: no layers found by {pattern!r} within {PATTERN_SECONDS} seconds; a simpler pattern is needed"
    try:
        with time_limit(PATTERN_SECONDS, slow):
            yield
    except re.error as error:
        raise UserError(f"--lora_targets is no valid regular expression: {error}") from None
