"""What to say where a run does not fit into memory: settings that give the same run in less."""

import math

FAULTS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of Apple's GPUs, of CPUs, of CUDA's libraries


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(fault in str(error) for fault in FAULTS)


def smaller_batch(batch_size: int, accumulate: int) -> tuple[int, int] | None:
    """(batch size, accumulation) with the same product and the largest batch below batch_size; None where there is none."""
    product = batch_size * accumulate
    size = next((size for size in range(batch_size - 1, 0, -1) if product % size == 0), None)
    return size and (size, product // size)


def advice(config, device) -> str:
    """One line: what takes less memory, first of all the smaller batch whose steps teach the same."""
    now = f"--batch_size {config.batch_size}"
    remedies = []
    if fitting := smaller_batch(config.batch_size, config.gradient_accumulation_steps):
        product = math.prod(fitting)
        remedies.append(
            f"--batch_size {fitting[0]} --gradient_accumulation_steps {fitting[1]} is the same run ({product} a step)"
        )
    if config.precision == "fp32":
        remedies.append("--precision bf16 halves what a step keeps")
    if getattr(config, "frozen_dtype", "") == "fp32":
        remedies.append("--frozen_dtype bf16 --precision bf16 halves the frozen weights")
    if getattr(config, "gradient_checkpointing", None) is False:
        remedies.append("--gradient_checkpointing computes twice instead of keeping")
    place = "the GPU" if device.type in ("cuda", "mps") else "the machine"
    told = "; ".join(remedies) or "a smaller base (--model) takes less"
    return f"{place} is out of memory with {now}: {told}; the last checkpoint is intact"
