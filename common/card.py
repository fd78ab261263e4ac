"""The model card of a checkpoint: the README.md in its folder, in the form that the hub reads, too."""

import dataclasses
import re
import shlex
from pathlib import PurePath

from common.folders import OF_THE_PLACE
from common.runtime import environment

PATHS = ("data_dir", "model", "start_from")  # settings that may name a folder of one machine
PREDICTOR = """import sys

sys.path.insert(0, "path/to/the/task")  # its folder in LoRA Workshop, the one that holds predictor.py
from predictor import Predictor

predictor = Predictor("path/to/this/folder"{base})
{use}
"""
ON_A_PICTURE = 'print(predictor.predict("photo.jpg"))'


def model_card(task: str, method: str, described: dict, best: dict, config, device, code: str, use: str = ON_A_PICTURE) -> str:
    """Markdown: what the checkpoint is, of which base and data, how good on how many samples, how to load and to repeat it.

    described: base, data, parameters as in summary.json. best: the metrics of its epoch. code: how libraries alone load it.
    use: Python that asks the task's Predictor, by the name `predictor`.
    """
    base, data, parameters = (described.get(key) or {} for key in ("base", "data", "parameters"))
    kind = {"full": "A model with every weight fine-tuned", "head": "A new head"}.get(method, f"An adapter ({method})")
    left_out = [f"| left out | {count} with {spoken(fault)} |" for fault, count in (data.get("left_out") or {}).items()]
    ran = environment(device, 1)
    versions = ", ".join(f"{name} {ran[name]}" for name in ("python", "torch", "transformers", "peft") if ran[name])
    lines = [
        *front_matter(task, method, str(base.get("name")), code),
        f"# {task}: {spoken(data.get('name'))}, {method}",
        "",
        f"{kind} for {task}, trained with LoRA Workshop. {parameters.get('trainable', 0):,} of {parameters.get('total', 0):,} "
        "parameters trained.",
        "",
        "| | |",
        "| --- | --- |",
        *base_rows(base),
        f"| data | {spoken(data.get('name'))} ({data.get('format')}), sha256 `{data.get('sha256')}` |",
        f"| samples | {data.get('train')} for training, {data.get('val')} for validation |",
        *left_out,
        *("", "## Measured", "", f"On the {data.get('val')} validation samples, which also chose this epoch:", ""),
        *metric_table({key: value for key, value in best.items() if not key.startswith("train_")}),
        *("", "## Load it", "", *loading(method, str(base.get("name")), code, use)),
        *("", "## Repeat it", "", "```", command(method, config), "```"),
        *("", f"It was made with {versions} on {ran['device']}.", ""),
    ]
    return "\n".join(lines)


def loading(method: str, base: str, code: str, use: str) -> list[str]:
    """Python that loads it: with the libraries alone where `code` says how, and with this project, which `use` asks."""
    named = base if is_hub_name(base) else "path/to/the/base"
    needs_base = "" if method == "full" or base == "demo" else f', base="{named}"'  # the demo's is at hand where this project is
    ours = ["```python", PREDICTOR.format(base=needs_base, use=use).strip(), "```"]
    if not code:
        return ours
    code = code.replace(f'"{base}"', f'"{named}"')
    return ["With the libraries alone:", "", "```python", code.strip(), "```", "", "With this project:", "", *ours]


def base_rows(base: dict) -> list[str]:
    """Two rows of a table: which base it is of, and whose licence holds, which no checkpoint says."""
    name = str(base.get("name"))
    where = f"as https://huggingface.co/{name} says it" if is_hub_name(name) else "ask whoever published it"
    licence = "of LoRA Workshop, with which the base comes" if name == "demo" else f"of the base: {where}"
    return [f"| base | {spoken(name)}, sha256 of its weights `{base.get('sha256')}` |", f"| licence | {licence} |"]


def front_matter(task: str, method: str, base: str, code: str) -> list[str]:
    """What the hub reads: of which base it is, by which library. A base on a disk is not named, as no one else finds it there.

    code: how libraries alone load it; where it is empty none does, and none is named.
    """
    library = "transformers" if method in ("full", "head") else "peft"
    lines = ["---", f"library_name: {library}"] if code else ["---"]
    if is_hub_name(base):
        lines.append(f"base_model: {base}")
    return [*lines, f"tags: [{task}, {method}, lora-workshop]", "---", ""]


def is_hub_name(base: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", base, re.ASCII) is not None


def of_one_machine(name: str) -> bool:
    """Whether a name is the path of a folder on somebody's machine."""
    return PurePath(name).is_absolute() or name.startswith((".", "~"))


def spoken(name) -> str:
    """A name as Markdown can hold it: a path's last part alone, for the folders of a machine are nobody else's business."""
    text = PurePath(name).name if of_one_machine(str(name)) else str(name)
    return "".join(f"\\{c}" if c in "\\`*{}[]<>|#" else c if c.isprintable() else " " for c in text)


def metric_table(best: dict) -> list[str]:
    """A row for each number, and a table for what each class (or keypoint) has."""
    numbers = {key: x for key, x in best.items() if isinstance(x, float)}
    lines = ["| metric | value |", "| --- | ---: |", *(f"| {spoken(key)} | {x:.4f} |" for key, x in numbers.items())]
    parts = {key: values for key, values in best.items() if isinstance(values, dict)}
    names = list(dict.fromkeys(name for values in parts.values() for name in values))
    if names:
        lines += ["", "| | " + " | ".join(map(spoken, parts)) + " |", "| --- |" + " ---: |" * len(parts)]
    for name in names:
        cells = (values.get(name) for values in parts.values())
        lines.append(f"| {spoken(name)} | " + " | ".join("" if x is None else f"{x:.4f}" for x in cells) + " |")
    return lines


def command(method: str, config) -> str:
    """The command that repeats the training: what differs from the defaults, but for the places of one machine."""
    words = ["python", "train.py" if method == "full" else "train_lora.py"]
    on_demo = config.model == "demo"  # then some defaults are others; --model itself is given, for it decides that
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), f.metadata.get("demo", f.default) if on_demo else f.default
        if f.name in OF_THE_PLACE or (value == default and f.name != "model"):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{f.name}")
        else:
            is_path = f.name in PATHS and of_one_machine(str(value))
            words += [f"--{f.name}", shlex.quote(f"path/to/{PurePath(value).name}" if is_path else str(value))]
    return " ".join(words)
