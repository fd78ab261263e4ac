"""One optimizer step: what it gave, whether all of it is finite, and whether the loop did all that a step needs."""

import math
from typing import Any, NamedTuple

from common.config import UserError
from common.runtime import gather_lists

FIRST_STEPS = 10  # by then every parameter that trains must have had a gradient, and no gradient may be left over
MOST_FILES = 32  # that an error lists


class Number(NamedTuple):
    """A loss, or the norm of a gradient: something that must be finite."""

    kind: str  # "loss" or "gradient"
    name: str  # of the loss; a gradient goes by the loss before it
    batch: int  # of the step, from 0
    value: Any  # tensor (), float32, on the device


class Step:
    """One optimizer step under way: its batches, and the losses and gradient norms that they gave.

    The numbers stay on the device until `read`, at the step's end: to read one from a GPU is to wait for all that it has
    to do, so a step does it once. Until then `not_finite` says on the device whether weights may still move.
    """

    def __init__(self, size: int, device, world: int = 1):
        self.size, self.device, self.world = size, device, world  # size: batches in this accumulation window
        self.files: list[list[str]] = []  # of this process, for each batch so far
        self.numbers: list[Number] = []
        self.parts: list[tuple[str, str, Any]] = []  # (name of the loss, name of the part, number or detached tensor)
        self.stepped: dict[int, str] = {}  # place of an optimizer in run.optimizers -> the name that its step goes by
        self.first_taught: dict[int, str] = {}  # such a place -> name of the loss that gave it its first gradient
        self.turn: list[str] = []  # names of the losses since an optimizer had its turn before
        self.turn_is_over = False
        self.rows: list[list[float]] = []  # after `read`: the numbers, for each process
        self.signum = 0  # after `read`: the signal that some process got
        self.part_values: list[tuple[str, str, float]] = []  # after `read`, if asked for: of all processes

    def is_last_batch(self) -> bool:
        return len(self.files) == self.size

    def tensor(self, value):
        """value as a float32 () on the device, outside the graph."""
        import torch

        if not torch.is_tensor(value):
            return torch.full((), float(value), device=self.device)  # filled there: a copy from the host would wait
        return value.detach().to(self.device, torch.float32).reshape(())

    def add_loss(self, name: str, loss, parts: dict) -> None:
        """Of one batch. parts are kept as they are: most steps are not recorded, and never make numbers of them."""
        if self.turn_is_over:
            self.turn, self.turn_is_over = [], False
        self.turn.append(name)
        self.numbers.append(Number("loss", name, len(self.files) - 1, self.tensor(loss)))
        detached = {part: value.detach() if hasattr(value, "detach") else value for part, value in parts.items()}
        self.parts += [(name, part, value) for part, value in detached.items()]

    def add_norm(self, name: str, norm) -> None:
        self.numbers.append(Number("gradient", name, len(self.files) - 1, self.tensor(norm)))

    def last_loss(self) -> str | None:
        return next((number.name for number in reversed(self.numbers) if number.kind == "loss"), None)

    def note_first_taught(self, optimizers: list) -> None:
        """Right after a backward pass: which optimizers got their first gradient of the step from it."""
        for i, optimizer in enumerate(optimizers):
            if i not in self.first_taught and any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
                self.first_taught[i] = self.turn[-1]

    def not_finite(self, norms_count: bool = True):
        """A tensor (): 1 where some number so far, in some process, is not finite, else 0. Nobody waits for it here.

        norms_count: whether the norms of optimizers before the last one count; in fp16 each skips its own infinite gradients.
        """
        import torch

        last = self.numbers[-1]
        values = [number.value for number in self.numbers if norms_count or number.kind == "loss" or number is last]
        flag = 1 - torch.stack(values).isfinite().all().float()
        if self.world > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return flag

    def read(self, signum: int, with_parts: bool) -> None:
        """Waits for the device, once, and exchanges the numbers and signals of all processes."""
        import torch

        own = torch.stack([*(number.value for number in self.numbers), self.tensor(signum)])
        every = [own]
        if self.world > 1:
            every = [torch.empty_like(own) for _ in range(self.world)]
            torch.distributed.all_gather(every, own)
        parts = self.parts if with_parts else []
        values = torch.cat([*every, *(self.tensor(value).reshape(1) for _, _, value in parts)]).tolist()
        ends, length = len(own) * self.world, len(own)
        self.rows = [values[i : i + length - 1] for i in range(0, ends, length)]
        self.signum = int(max(values[length - 1 : ends : length]))
        # By name: processes may differ in their parts, as in whether there was a box to denoise.
        own_parts = [(loss, part, value) for (loss, part, _), value in zip(parts, values[ends:], strict=True)]
        self.part_values = gather_lists(own_parts) if with_parts else []

    def means(self, kind: str) -> dict[str, list[float]]:
        """Name -> the mean over all processes of each of its losses (or gradient norms), in order."""
        means = {}
        for i, number in enumerate(self.numbers):
            if number.kind == kind:
                means.setdefault(number.name, []).append(sum(row[i] for row in self.rows) / self.world)
        return means

    def fault(self, place: str, norms_count: bool = True) -> str | None:
        """What was not finite first, in which files, and what had moved before; None where all is well.

        place: where the training is, in words. norms_count: whether an infinite gradient is a fault; in fp16 it is none, the
        scaler skips that step.
        """
        for i, number in enumerate(self.numbers):
            odd = [row[i] for row in self.rows if not math.isfinite(row[i])]
            if odd and (number.kind == "loss" or norms_count):
                break
        else:
            return None
        is_loss = number.kind == "loss"
        files = self.files[number.batch] if is_loss else [file for batch in self.files for file in batch]
        moved = [earlier.name for earlier in self.numbers[:i] if earlier.kind == "gradient"]
        before = f"{' and '.join(moved)} had stepped before it, nothing else moved" if moved else "nothing was changed by it"
        name = "" if number.name == "loss" else f" {number.name}" if is_loss else f" of {number.name}"
        hint = "" if is_loss else "; a lower --lr or --precision fp32 may help"
        values = ", ".join(map(str, odd if is_loss else odd[:1]))
        files = gather_lists(files)
        held = ", ".join(files[:MOST_FILES]) + (f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else "")
        return (
            f"the {number.kind}{name} is {values} {place}{hint}; the batch held {held}; {before}, the last checkpoint is intact"
        )


# ---- what a loop may forget ----------------------------------------------------------------------------------------
# models: without what several processes wrap around them.


def trained_parameters(models: list) -> list:
    """(name, parameter) of all that trains; with several models, the name begins with the model's."""
    starts = [f"{type(model).__name__}." if len(models) > 1 else "" for model in models]
    named = [(start + name, p) for start, model in zip(starts, models, strict=True) for name, p in model.named_parameters()]
    return [(name, p) for name, p in named if p.requires_grad]


def optimizer_in_words(i: int, optimizers: list, models: list) -> str:
    """An optimizer, in words: its number, and the models whose parameters it holds."""
    ids = {id(p) for group in optimizers[i].param_groups for p in group["params"]}
    names = [type(model).__name__ for model in models if any(id(p) in ids for p in model.parameters())]
    return f"optimizer {i + 1} of {len(optimizers)} (over {', '.join(names) or 'no prepared model'})"


def check_own_loss(step: Step, i: int, optimizers: list, models: list) -> None:
    """At the turn of optimizer i in the first batch of a step: what taught it first is a loss since the turn before.

    (Two optimizers whose turns follow each other share the losses before them.) Else it would step on what is left of
    another's loss, and clear it, so that nothing is left to see.
    """
    first = step.first_taught.get(i)
    if first is not None and first not in step.turn:
        who, last = optimizer_in_words(i, optimizers, models), " and ".join(step.turn)
        raise RuntimeError(
            f"{who} steps after the loss {last}, but holds gradients of the loss {first}. A loss that is not to teach a model "
            "needs `with run.frozen(model)` or a detached input; what two losses are to teach together steps after the "
            "backward passes of both"
        )


def check_stepped(stepped: dict[int, str], optimizers: list, models: list) -> None:
    """Every optimizer has stepped, each under a name of its own. stepped: place in optimizers -> that name."""
    forgotten = [optimizer_in_words(i, optimizers, models) for i in range(len(optimizers)) if i not in stepped]
    if forgotten or not stepped:
        raise RuntimeError(f"the step ended without run.step_optimizer(...) for {' and '.join(forgotten) or 'any optimizer'}")
    if len(set(stepped.values())) < len(stepped):
        raise RuntimeError(
            f"{len(stepped)} optimizers stepped on losses of one name ({next(iter(stepped.values()))}): "
            "give each its own, run.backward(loss, name=...), and let run.step_optimizer follow the backward pass of its loss; "
            "where one loss is for several optimizers, run.step_optimizer(optimizer, name=...)"
        )


def check_nothing_left(models: list) -> None:
    """After all optimizers stepped no gradient is left: it would be added to the next step's."""
    names = [name for name, p in trained_parameters(models) if p.grad is not None]
    if names:
        raise RuntimeError(
            f"{len(names)} trainable tensors hold a gradient after all optimizers stepped: {', '.join(names[:3])}. What trains "
            "must be in an optimizer, and a loss that is not to teach a model needs `with run.frozen(model)`"
        )


def check_all_used(optimizer, models: list) -> None:
    """Every parameter has a gradient: several processes would wait for each other for ever if one has it and another lacks it."""
    ids = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is None}
    names = [name for name, p in trained_parameters(models) if id(p) in ids] if ids else []
    if names:
        raise UserError(
            f"{len(names)} trainable tensors got no gradient in this batch: {', '.join(names[:3])}. If other batches teach "
            "them, run.prepare(..., find_unused=True) lets processes agree on who has one"
        )
