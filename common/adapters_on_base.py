"""Several adapters on one base, which is loaded once: what every task's Predictor is built on.

Each adapter is a model of its own, loaded as ever, whose tensors then give way to the base's own wherever the two hold the
same numbers: it takes the memory of what trained alone, whatever that is (heads, classes of its own, any rank, DoRA ...).
The base never changes. A merged adapter is added into copies of the weights it is for, anew at every switch: nothing is
subtracted, so answers are, to the bit, those of a Predictor that loaded this adapter alone. docs/deploying.md has figures.
"""

import copy
import ctypes
import gc
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.config import UserError
from common.folders import best_of
from common.lora import adapted_layers, merge_lora, settle_lora
from common.peft_adapters import merge_layers
from common.runtime import choose_device, quiet
from common.saved_models import open_checkpoint
from common.trial import keeps_answers

ALIGNMENT = 64  # bytes


@dataclass
class Tuned:
    """A checkpoint that a Predictor knows by a name."""

    folder: Path
    origin: dict
    processor: object
    details: object = None  # what a task's Predictor works out once for it; see AdaptersOnBase.details
    model: nn.Module | None = None  # its adapter on the shared base, on the CPU; None before there is a second one
    merges: bool = False  # whether its adapter is added into the weights when it is put on


class AdaptersOnBase:
    """A checkpoint, and adapters beside it that share its base. Threads may share it; they take turns."""

    model_functions = ()  # load_base, load_checkpoint and answer of the task's model.py, which its Predictor names

    def __init__(self, checkpoint, base: str = "", device: str = "auto", merge: bool = True):
        """checkpoint: a folder that train.py or train_lora.py left: a run, or its checkpoints/best.

        base: where an adapter's base is, if not under its recorded name. device: auto, cpu, cuda, mps. merge: add the adapter
        into the weights. UserError, in one line, where checkpoint and base are damaged or do not belong together.
        """
        self.device, self.merge = torch.device(choose_device(device)), merge
        self.load_base, self.load_checkpoint, self.answer = self.model_functions
        self.base_name, self.base, self.placed = base, None, {}
        self.lock, self.current = threading.Lock(), ""
        self.model, processor, self.origin = self.load_checkpoint(checkpoint, base, merge, self.device)
        align_tensors(self.model)
        self.known = {"": self.tuned(best_of(Path(checkpoint).expanduser()), self.model, processor, self.origin)}

    def details(self, model, processor, origin: dict):
        """What predictions need of a checkpoint beside its model: its classes, how it wants its pictures."""
        return None

    def tuned(self, folder: Path, model, processor, origin: dict) -> Tuned:
        return Tuned(folder, origin, processor, self.details(model, processor, origin))

    def add(self, checkpoint, name: str) -> None:
        """Takes another adapter (or head) on the same base, to be asked by predict(..., model=name).

        Its classes, rank and layers may be others. UserError where it is of another base, or a whole model, and for a name
        that is taken; what was added before is asked as ever then.
        """
        folder, about = open_checkpoint(checkpoint, self.origin["task"])
        first = self.known[""]
        if "full" in (about["method"], self.origin["method"]):
            whole = first.folder if self.origin["method"] == "full" else folder
            raise UserError(f"{whole} is a whole model: only adapters share a base; make a Predictor of its own")
        if about["base"]["sha256"] != self.origin["base"]["sha256"]:
            raise UserError(
                f"{folder} is an adapter for another base ({about['base']['name']}, not {self.origin['base']['name']}): "
                "make a Predictor of its own for it"
            )
        if self.device.type == "cuda" and {about.get("quantize", "none"), self.origin.get("quantize", "none")} != {"none"}:
            raise UserError(f"{folder} and {first.folder}: adapters on a 4-bit base do not share it; make a Predictor for each")
        with self.lock:
            if not isinstance(name, str) or not name or name in self.known:
                raise UserError(f"the name {name!r} is taken, or none: each adapter needs one of its own")
            if self.base is None:
                self.share_base(first)
            self.known[name] = self.on_base(self.base, folder)
            return_memory()

    def share_base(self, first: Tuned) -> None:
        """Reads the base, which an adapter that is alone need not keep, and puts the first adapter on it, too."""
        with quiet():
            base = self.load_base(self.base_name or self.origin["base"]["name"], download=bool(self.base_name))
            align_tensors(base[0].requires_grad_(False))
            shared = self.on_base(base, first.folder)
        self.base, first.model, first.merges = base, shared.model, shared.merges
        self.current = self.model = None  # what answered until now has a base of its own
        gc.collect()  # and layers that refer to themselves (with_fast_layers), so that nothing else would free it
        self.put_on(first)
        self.current = ""

    def on_base(self, base: tuple, folder: Path) -> Tuned:
        """The adapter of a folder, its unchanged tensors those of the base."""
        model, processor, origin = self.load_checkpoint(folder, base, False, "cpu")
        share_tensors(model, base[0])
        tuned = self.tuned(folder, model, processor, origin)
        tuned.model, tuned.merges = model, self.merge and merge_is_exact(model, self.answer)
        return tuned

    def find(self, name: str) -> Tuned:
        """UserError for a name that was not added."""
        if not isinstance(name, str) or name not in self.known:
            raise UserError(f"there is no model {name!r}; added were: {', '.join(filter(None, list(self.known))) or 'none'}")
        return self.known[name]

    @contextmanager
    def using(self, name: str):
        """Yields the model of that name, in eval mode on the device; one thread at a time."""
        tuned = self.find(name)
        with self.lock:
            if name != self.current:
                self.put_on(tuned)
                self.current = name
            yield self.model

    def put_on(self, tuned: Tuned) -> None:
        """Makes self.model that of `tuned`."""
        self.current = self.model = None  # until it is done; the memory of what was merged is free for what comes
        self.model = self.on_device(merged_copy(tuned.model) if tuned.merges else tuned.model)

    def on_device(self, model):
        """The model on self.device, where the base's tensors stay once they are there."""
        if self.device.type == "cpu":
            return model
        base = {id(tensor) for tensor in tensors_of(self.base[0])}
        places = {}
        for tensor in tensors_of(model):
            moved = self.placed.get(id(tensor))
            if moved is None:
                moved = tensor.detach().to(self.device)
                moved = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
                if id(tensor) in base:
                    self.placed[id(tensor)] = moved
            places[id(tensor)] = moved
        return copy.deepcopy(model, places)


def return_memory() -> None:
    """Gives freed memory back to the system: glibc keeps what lies below a newer tensor, as of a base that was there twice."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def tensors_of(model) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def align_tensors(model) -> None:
    """Moves tensors to where copies of them would lie: products of matrices end in other bits where a tensor starts elsewhere.

    Weights that are read from a safetensors file start at any multiple of 8 bytes; torch allocates multiples of 64.
    """
    for tensor in tensors_of(model):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def share_tensors(model, base) -> None:
    """Puts the base's tensors in the place of the model's, by their names, wherever both hold the same numbers.

    The model may have the base as a part (tower.), and adapters around its layers (.base_layer).
    """
    pairs = [*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False)]
    own = dict(pairs)
    for place, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                name = f"{place}.{key}".replace(".base_layer.", ".")
                twin = own.get(name, own.get(name.partition(".")[2]))
                if tensor is not None and twin is not None and type(tensor) is type(twin) and same_numbers(tensor, twin):
                    tensors[key] = twin


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def merged_copy(model):
    """The model with its adapter in its weights; the one that is given stays as it is, and shares all that did not change."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    changing = {id(tensor) for name, tensor in named if ".base_layer." in f".{name}"}
    copied = copy.deepcopy(model, {id(tensor): tensor for _, tensor in named if id(tensor) not in changing})
    return settle_lora(merge_lora(copied)) if adapted_layers(copied) else merge_layers(copied)


def merge_is_exact(model, answer) -> bool:
    """Whether merging leaves the model's answers as they are; a line where not. answer: as in common/trial.py."""
    holder = nn.Module()
    holder.model = model

    def merge():
        holder.model = merged_copy(model)

    def unmerge():
        holder.model = model

    return keeps_answers(holder, lambda held: answer(held.model), merge, unmerge)
