"""The optimizer over what trains, the learning-rate schedule, and the parts of one optimizer step."""

import math

from common.config import UserError


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
