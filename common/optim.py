"""The optimizer over what trains, the learning-rate schedule, and the parts of one optimizer step."""

import math

from common.config import UserError
from common.lora import is_within
from common.runtime import counted, say

FEW_STEPS = 100  # in so few a head with new weights is seldom done learning


def build_optimizer(model, config, steps: int, groups: list[dict] | None = None, new=(), no_decay=(), betas=(0.9, 0.999)):
    """AdamW over every parameter that trains, and its warm-up + cosine schedule over `steps` optimizer steps.

    groups: [{"params": [...], "lr": ...}] where parts of the model want another rate than config.lr; default: one group.
    new: names of layers with new weights (heads), which learn at no less than config.lr_head.
    no_decay: names of layers that weight decay leaves alone, as a table whose unused rows are to stay as they are.
    Weight decay pulls matrices and convolutions only: biases, norm scales and other vectors have no reason to shrink.
    """
    import torch

    if groups is None:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": config.lr}]
    groups = with_head_rate(groups, model, new, config.lr_head)
    split, kept = [], {id(p) for name, p in model.named_parameters() if is_vector(p) or is_within(name, no_decay)}
    for group in groups:
        for decay, stays in ((config.weight_decay, False), (0.0, True)):
            params = [p for p in group["params"] if p.requires_grad and (id(p) in kept) == stays]
            if params:
                split.append({**group, "params": params, "weight_decay": decay})
    if not split:
        raise UserError("nothing in the model trains: no parameter has requires_grad")
    describe_steps(config, steps, {group["lr"] for group in split})
    optimizer = torch.optim.AdamW(split, lr=config.lr, betas=betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, config.warmup_steps, steps))
    return optimizer, scheduler


def with_head_rate(groups: list[dict], model, new, rate: float) -> list[dict]:
    """The groups, but what of the layers named in `new` is in a slower one than `rate` in a group of its own, marked "head"."""
    ids = {id(p) for name, p in model.named_parameters() if is_within(name, new)}
    slow = [p for group in groups for p in group["params"] if id(p) in ids and group["lr"] < rate]
    if not slow:
        return groups
    moved = {id(p) for p in slow}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in moved]} for group in groups]
    rest = [group for group in rest if group["params"]]
    return [*rest, {"params": slow, "lr": rate, "head": bool(rest)}]


def describe_steps(config, steps: int, rates: set[float]) -> None:
    """Prints the run's optimizer steps and learning rates, and what gives more steps where they are few."""
    low, high = (f"{rate:.3g}" for rate in (min(rates), max(rates)))
    told = f"learning rate {low}" if low == high else f"learning rates {low} to {high} by part of the model"
    few = steps < FEW_STEPS and not config.max_steps_per_epoch
    hint = "; so few teach little: more --epochs or a smaller --batch_size make more" if few else ""
    say(f"{counted(steps, 'optimizer step')}, {warmup_of(config.warmup_steps, steps)} of them warm-up, {told}{hint}")


def warmup_of(warmup: float, total: int) -> int:
    """Steps of warm-up among `total`: a share of them if below 1, else a number; never more than half of a short run."""
    return min(round(warmup * total) if warmup < 1 else int(warmup), total // 2)


def is_vector(p) -> bool:
    """Whether a parameter is one number a channel, in whatever shape: IA3's factors (C, 1), weight_norm's gains (C, 1, 1)."""
    return p.numel() == max(p.shape, default=1)


def schedule(step: int, warmup: float, total: int) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0): a line up to 1, then half a cosine down to 0 at `total`.

    The first step already moves (1 / warmup, not 0). warmup: see warmup_of.
    """
    warmup = warmup_of(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def follow_schedule(scheduler) -> float:
    """Sets the rates to where the schedule is at its step, after it has become another one (of more epochs). The highest one."""
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    return max(group["lr"] for group in groups)


def clip_gradients(accelerator, optimizer, max_grad_norm: float):
    """Scales the gradients of what `optimizer` steps down to max_grad_norm (0: never). Their norm before, a tensor ().

    The parameters are read from the optimizer at every call, so it clips exactly what it steps. accelerator takes the
    fp16 loss scale out of the gradients first.
    """
    import torch

    accelerator.unscale_gradients(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(params, max_grad_norm if max_grad_norm > 0 else math.inf)


def take_step(optimizer, scheduler, skip) -> None:
    """Step, schedule (where there is one), zero. skip: a tensor () on the device; where it is 1 no weight moves.

    Fused optimizers look at it on the device, as they do for a gradient scaler (found_inf), so nobody waits for the number;
    for others it is read. In fp16, too: clip_gradients has unscaled the gradients, so one that overflowed has a norm that is not
    finite, which skip must say; the caller tells accelerator's scaler to update, once a step.
    """
    bare = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper, which knows no found_inf
    looks_itself = getattr(bare, "_step_supports_amp_scaling", False) and skip.device.type in ("cpu", "cuda")
    if looks_itself:
        bare.found_inf = skip
        bare.step()
        del bare.found_inf
    elif not bool(skip):
        bare.step()
    if scheduler is not None:
        scheduler.step()
    bare.zero_grad(set_to_none=True)
