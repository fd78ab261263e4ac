"""The optimizer over what trains, the learning-rate schedule, and one optimizer step, with the check that all is finite."""

import math
from typing import Any, NamedTuple

from common.config import UserError
from common.runtime import gather_lists


def build_optimizer(model, config, steps: int, groups: list[dict] | None = None):
    """AdamW over every parameter that trains, and its warm-up + cosine schedule over `steps` optimizer steps.

    groups: [{"params": [...], "lr": ...}] where parts of the model want another rate than config.lr; default: one group.
    Weight decay pulls matrices and convolutions only: biases, norm scales and other vectors have no reason to shrink.
    """
    import torch

    if groups is None:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": config.lr}]
    split = []
    for group in groups:
        for decay, vectors in ((config.weight_decay, False), (0.0, True)):
            params = [p for p in group["params"] if p.requires_grad and is_vector(p) == vectors]
            if params:
                split.append({**group, "params": params, "weight_decay": decay})
    if not split:
        raise UserError("nothing in the model trains: no parameter has requires_grad")
    optimizer = torch.optim.AdamW(split, lr=config.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, config.warmup_steps, steps))
    return optimizer, scheduler


def is_vector(p) -> bool:
    """Whether a parameter is no matrix: one number a channel, in whatever shape (IA3's factors are (C, 1) or (1, C))."""
    return p.ndim < 2 or (p.ndim == 2 and min(p.shape) == 1)


def schedule(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0): a line up to 1, then half a cosine down to 0 at `total`.

    The first step already moves (1 / warmup, not 0). A warm-up never takes more than half of a short run.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def clip_gradients(accelerator, optimizer, max_grad_norm: float):
    """Scales the gradients of what `optimizer` steps down to max_grad_norm (0: never). Their norm before, a tensor ().

    The parameters are read from the optimizer at every call, so it clips exactly what it steps. accelerator takes the
    fp16 loss scale out of the gradients first.
    """
    import torch

    accelerator.unscale_gradients(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(params, max_grad_norm if max_grad_norm > 0 else math.inf)


def take_step(accelerator, optimizer, scheduler, skip) -> None:
    """Step, schedule (where there is one), zero. skip: a tensor () on the device; where it is 1 no weight moves.

    Fused optimizers look at it on the device, as they do for a gradient scaler (found_inf), so nobody waits for the number;
    for others it is read. In fp16 accelerator's scaler skips a step by itself; it is told to update once a step by the caller.
    """
    bare = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper, which knows no found_inf
    looks_itself = getattr(bare, "_step_supports_amp_scaling", False) and skip.device.type in ("cpu", "cuda")
    if accelerator.scaler is not None:
        accelerator.scaler.step(bare)
    elif looks_itself:
        bare.found_inf = skip
        bare.step()
        del bare.found_inf
    elif not bool(skip):
        bare.step()
    if scheduler is not None:
        scheduler.step()
    bare.zero_grad(set_to_none=True)


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
        self.parts: list[tuple[str, str, Any]] = []  # (name of the loss, name of the part, tensor ())
        self.stepped: dict[int, str] = {}  # place of an optimizer in run.optimizers -> name of the loss before its step
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
        self.numbers.append(Number("loss", name, len(self.files) - 1, self.tensor(loss)))
        self.parts += [(name, part, self.tensor(value)) for part, value in parts.items()]

    def add_norm(self, name: str, norm) -> None:
        self.numbers.append(Number("gradient", name, len(self.files) - 1, self.tensor(norm)))

    def last_loss(self) -> str | None:
        return next((number.name for number in reversed(self.numbers) if number.kind == "loss"), None)

    def not_finite(self):
        """A tensor (): 1 where some number so far, in some process, is not finite, else 0. Nobody waits for it here."""
        import torch

        flag = 1 - torch.stack([number.value for number in self.numbers]).isfinite().all().float()
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
        values = torch.cat([*every, *(value.reshape(1) for _, _, value in parts)]).tolist()
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
        held = ", ".join(gather_lists(files))
        return (
            f"the {number.kind}{name} is {values} {place}{hint}; the batch held {held}; {before}, the last checkpoint is intact"
        )
