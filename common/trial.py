"""One forward pass on a small input: what can learn at all, before training; whether a merge keeps the answers, after it.

answer: the task's, a model -> one tensor that its loss or its predictions are made of, for an input in the base's own size.
No backward pass is needed: autograd's graph says which tensors would get a gradient. Nothing is left behind in the model.
"""

import re
from collections import Counter
from contextlib import contextmanager

import torch
from torch import nn

from common.lora import is_within, replace_modules
from common.runtime import say

MERGE_TOLERANCE = 1e-3  # of the largest output; rounding in float32 makes about 1e-5 of it
# What a PEFT layer says of the layer inside it. A model that asks for anything else (conv.stride) would find nothing.
SEEN_THROUGH = ("weight", "bias", "in_features", "out_features")


class Probe(nn.Module):
    """Stands where an adapter would, and multiplies what its layer gives by a 1 that takes a gradient, as an adapter must."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.one, self.lacks = layer, nn.Parameter(torch.ones(())), False

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs) * self.one

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.layer, name)
            self.lacks |= name not in SEEN_THROUGH
            return value


@contextmanager
def without_trace(model):
    """The modes of the model's modules and the random numbers are afterwards what they were before."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def try_out(model, answer):
    """answer(model), or None and a printed note where the model fails on such an input: then nothing is known."""
    with without_trace(model):
        try:
            return answer(model)
        except Exception as error:  # of a library's model code, which may raise anything
            reason = " ".join(str(error).split())[:200]
            say(f"note: a trial with a small input failed ({type(error).__name__}: {reason}), so the model was not looked over")
            return None


@torch.no_grad()
def keeps_answers(model, answer, merge, unmerge) -> bool:
    """Whether the model answers as before after merge(), which puts its adapter into its weights; else unmerge() and a line."""
    before = try_out(model, answer)
    merge()
    after = None if before is None else try_out(model, answer)
    if after is not None and (after - before).abs().max() <= MERGE_TOLERANCE * before.abs().max():
        return True
    unmerge()
    say("the adapter is not merged: added into the weights it would change the answers; it goes on beside them")
    return False


def reached(output) -> set[int]:
    """Ids of the leaf tensors that would get a gradient from a backward pass from this tensor."""
    leaves, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            todo += [following for following, _ in node.next_functions]
    return leaves


def freeze_unused(model, answer, within=None, layers=()) -> list[str]:
    """Freezes the parameters that cannot learn, since no output depends on them (a mask token of pretraining), and names them.

    within: only in parts with these names. layers: names of layers that are to get adapters; those on which an adapter could
    not work are returned. timm's BEiT and EVA-02 hand qkv.weight to a function instead of calling qkv, so that an adapter's
    output goes nowhere and gets no gradient; MobileNetV2 reads the stride of a convolution, which an adapter in its place does
    not have.
    """
    plain = {name: model.get_submodule(name) for name in layers}
    probes = {layer: Probe(layer).train(layer.training) for layer in plain.values()}
    replace_modules(model, probes)
    try:
        output = try_out(model, answer)
    finally:
        replace_modules(model, {probe: layer for layer, probe in probes.items()})
    if output is None:
        return []
    leaves = reached(output)
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad and (within is None or is_within(name, within))}
    idle = {name: p.requires_grad_(False) for name, p in mine.items() if id(p) not in leaves}
    if idle:
        say(f"frozen, for this model makes no use of them: {in_short(idle)}")
    works = {layer for layer, probe in probes.items() if id(probe.one) in leaves and not probe.lacks}
    return [name for name, layer in plain.items() if layer not in works]


def in_short(names) -> str:
    """Names of layers or tensors with their numbers as N, each with how often it is there: "blocks.N.attn.qkv (12)"."""
    counts = Counter(re.sub(r"\d+", "N", name) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
