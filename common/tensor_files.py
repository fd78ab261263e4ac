"""Files of tensors by their names: read, and compared with what a model has in their places."""

from pathlib import Path

from common.config import UserError


def is_finite(tensor) -> bool:
    """Whether all numbers of a tensor of any type are finite (torch cannot say it of 8-bit floats)."""
    return bool((tensor.float() if tensor.is_floating_point() else tensor).isfinite().all())


def load_tensors(file: Path) -> dict:
    """Name -> tensor of a safetensors file. UserError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def shapes_of(tensors: dict) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def misfit(expected: dict[str, tuple], tensors: dict) -> str:
    """The first of a file's tensors that is missing, left over, not finite, or of another shape than expected; "" if none is."""
    found = {name: tuple(tensor.shape) if is_finite(tensor) else "not finite" for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not wrong:
        return ""
    more = f" ({len(wrong)} in all)" if len(wrong) > 1 else ""
    return f"{wrong[0]} is {found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'no such tensor')}{more}"
