"""The gate before a model leaves: each form of it (adapter, merged, read back from disk, ONNX) answers alike on real samples.

    check({"adapter": answer, "merged": merged_answer, "onnx": session_answer}, batches)

prints how far each is from the first, output by output, and raises UserError where one is farther than rounding explains.
"""

from collections.abc import Callable

from common.config import UserError
from common.runtime import progress_bar, say

TOLERANCE = 1e-4  # of an output's largest number; rounding in float32 makes 1e-6 of it, more where layers are many and wide


def check(answers: dict[str, Callable], batches: list, tolerance: float = TOLERANCE, unordered: bool = False) -> list[dict]:
    """[{"output", "form", "difference", "largest", "share"}]: how far each form is from the first, printed as a table.

    answers: form -> function batch -> {output: tensor}. difference: the largest one, over all batches; largest: the largest
    number of that output by the first form; share: their ratio. unordered: the rows of a sample, outputs (B, rows, ...), may come
    in any order, but a row stays one over all outputs. UserError where a share is above `tolerance`, where an output is missing,
    of another shape or not finite: in one line, with the output and by how much.
    """
    from common.fast_lora import unmerged

    first, *others = answers
    found = {}
    with unmerged():  # an adapter that itself adds B A to W, as fast layers may, would answer as the merged model by its making
        for batch in progress_bar(batches, "comparing"):
            truth = finite(answers[first](batch), first)
            for form in others:
                other = finite(answers[form](batch), form)
                check_shapes(truth, other, first, form)
                compare(truth, in_order_of(truth, other) if unordered else other, form, found)
    rows = [
        {"output": output, "form": form, "difference": gap, "largest": largest, "share": gap / largest if largest else gap}
        for (output, form), (gap, largest) in found.items()
    ]
    say_table(first, rows)
    worst = max(rows, key=lambda row: row["share"])
    if not worst["share"] <= tolerance:
        raise UserError(
            f"{worst['form']} answers otherwise than {first}: {worst['output']} differs by {worst['difference']:.3g} of "
            f"{worst['largest']:.3g}, a share of {worst['share']:.2g}, and {tolerance:g} is allowed; nothing was saved"
        )
    return rows


def finite(outputs: dict, form: str) -> dict:
    """The outputs as float64 on the CPU. UserError where there is none, or one has numbers that are not finite."""
    import torch

    outputs = {name: torch.as_tensor(value).detach().double().cpu() for name, value in outputs.items()}
    broken = [name for name, value in outputs.items() if not value.isfinite().all()]
    if broken or not outputs:
        raise UserError(
            f"{form} gives {f'numbers that are not finite in {broken[0]}' if broken else 'nothing'}; nothing was saved"
        )
    return outputs


def check_shapes(truth: dict, other: dict, first: str, form: str) -> None:
    """UserError unless both have the same outputs, of the same shapes."""
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (truth, other)]
    odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    if odd:
        said = [each.get(odd[0], "missing") for each in shapes]
        raise UserError(f"{form} answers otherwise than {first}: {odd[0]} is {said[1]}, not {said[0]}; nothing was saved")


def in_order_of(truth: dict, other: dict) -> dict:
    """The rows of `other`, outputs (B, rows, k), in the order of the truth's: the pairs that are nearest to each other in sum.

    How near: by the largest difference in any of the outputs, each as a share of its largest number.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    scales = {name: value.abs().max().clamp(min=1e-12) for name, value in truth.items()}
    rows, others = (torch.cat([each[name] / scale for name, scale in scales.items()], dim=-1) for each in (truth, other))
    distances = torch.cdist(rows, others, p=float("inf"))  # (B, rows, rows)
    order = [torch.as_tensor(linear_sum_assignment(matrix)[1]) for matrix in distances]
    return {name: torch.stack([value[i][places] for i, places in enumerate(order)]) for name, value in other.items()}


def compare(truth: dict, other: dict, form: str, found: dict) -> None:
    """Widens found[output, form] = (largest difference, largest number) by one batch."""
    for name, value in truth.items():
        gap, largest = found.get((name, form), (0.0, 0.0))
        if value.numel():
            gap, largest = max(gap, float((other[name] - value).abs().max())), max(largest, float(value.abs().max()))
        found[name, form] = gap, largest


def say_table(first: str, rows: list[dict]) -> None:
    """A line for each output and form."""
    say(f"largest differences from {first}:")
    width = max(len(f"{row['output']}, {row['form']}") for row in rows)
    for row in rows:
        name = f"{row['output']}, {row['form']}"
        say(f"  {name:{width}}  {row['difference']:9.2e}  of {row['largest']:.4g}  ({row['share']:.1e})")
