"""LoRA on any model."""


def count_parameters(model) -> dict[str, int]:
    """{"total", "trainable"}: numbers of parameters, shared ones counted once."""

    def size(p):  # a 4-bit weight of bitsandbytes packs two numbers into each byte
        return 2 * p.numel() * p.element_size() if type(p).__name__ == "Params4bit" else p.numel()

    sizes = [(size(p), p.requires_grad) for p in model.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, trains in sizes if trains)}
