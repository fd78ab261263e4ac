"""A script's settings: a dataclass becomes flags and a strict YAML file, and errors become one readable line."""

import argparse
import ast
import dataclasses
import difflib
import errno
import inspect
import math
import os
import sys
import types
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class UserError(Exception):
    """Something that the user can put right. `cli` prints it as one line and exits with code 2."""


def setting(real, demo):
    """A default that differs between real work and the small base that comes with the project."""
    return field(default=real, metadata={"demo": demo})


@dataclass
class TrainConfig:
    """Settings that every train script has. The comment of a line is its help text."""

    data_dir: str = ""  # folder with your data; empty: synthetic demo data, made once
    model: str = ""  # base model: a hub name, a local folder, or "demo" for the small base that comes along
    output_dir: str = ""  # where run folders go; empty: outputs/ beside common/
    run_name: str = ""  # name of the run folder; empty: full or lora
    overwrite: bool = False  # replace an existing run folder instead of taking the next free name
    resume: bool = False  # go on where a stopped run left off, with the settings it had
    epochs: int = 10  # passes over the training data
    max_steps_per_epoch: int = 0  # cut every epoch short, for a smoke run; 0: whole epochs
    batch_size: int = 8  # samples per process and backward pass
    gradient_accumulation_steps: int = 1  # backward passes per optimizer step: a large batch on a small device
    lr: float = 1e-4  # peak learning rate, reached after the warm-up, then down to zero by a cosine
    weight_decay: float = 1e-4  # pulls matrices towards zero; biases and norms are left alone
    lr_head: float = 1e-3  # least peak rate of a head with new weights, which has the longest way to go; 0: lr
    warmup_steps: float = 0.1  # from zero to lr, since early gradients are large and noisy: below 1 a share of all steps
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it; 0: never
    patience: int = 0  # stop after this many epochs without a new best; 0: never
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of the forward pass; what trains stays fp32
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one
    num_workers: int = 0  # processes that prepare batches; 0: the main one does
    threads: int = 0  # CPU threads of this process; 0: as torch chooses
    seed: int = 0  # data order, augmentation and new weights are functions of it
    save_steps: int = 0  # save for resuming every N steps, too, not only after an epoch; for long epochs

    def __post_init__(self):
        for name in ("epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr is {self.lr}, but must be a positive number")


@dataclass
class LoraTrainConfig(TrainConfig):
    """Settings that every LoRA train script has besides; a script says again what it sets otherwise or names for itself."""

    lora_r: int = 8  # rank: the width of the bottleneck; 0 trains the head alone
    lora_alpha: int = 16  # the update is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.0  # dropout in front of the adapters, against overfitting on little data; slower
    lora_targets: str = "all-linear"  # qv, all-linear, all (convolutions, too), or a regular expression of layer names
    lora_last_k: int = 0  # adapters in the last K blocks alone, which saves the backward pass of all before; 0: in all
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"  # bf16: frozen weights in half the memory; with --precision bf16

    def __post_init__(self):
        super().__post_init__()
        for name in ("lora_r", "lora_last_k"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be at least 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout is {self.lora_dropout}, but must be at least 0 and below 1")
        if self.frozen_dtype == "bf16" and self.precision != "bf16":
            raise UserError("--frozen_dtype bf16 goes with --precision bf16: in other arithmetic its rounding would show")


@dataclass
class LoadConfig:
    """Settings that every eval and infer script has."""

    checkpoint: str = ""  # folder of a trained model, full or LoRA; empty: checkpoints/best of the newest run in outputs/
    model: str = ""  # where the base is, if not under the name that it had in training
    merge: bool = True  # add an adapter into its base's weights: the same outputs, without the detour
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of the forward pass
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one
    threads: int = 0  # CPU threads of this process; 0: as torch chooses


def project_root() -> Path:
    """The folder that holds common/; for a script that was exported as one file, the script's own folder."""
    here = Path(__file__).resolve().parent
    return here.parent if here.name == "common" else here


def field_comments(cls) -> dict[str, str]:
    """Field name -> the comment that ends its line, over the whole class hierarchy (a subclass overrides)."""
    comments = {}
    for part in reversed(cls.__mro__[:-1]):
        lines = inspect.getsource(part).splitlines()
        for node in ast.walk(ast.parse(inspect.cleandoc("\n".join(lines)))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
                comments[node.target.id] = comment or comments.get(node.target.id, "")
    return comments


def convert(kind, value):
    """`value` (text from a flag, or a YAML value) as `kind`; ValueError says what was expected."""
    if typing.get_origin(kind) is Literal:
        return convert_choice(typing.get_args(kind), value)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # X | None
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None or value == "" else convert(kinds[0], value)
    if kind is bool:
        fits = isinstance(value, bool)
    elif kind is str:
        fits = isinstance(value, str)
    elif kind is int and isinstance(value, float):
        fits = value.is_integer()
    else:  # YAML reads 1e-4 as text: a string is good for a number when it parses as one
        fits = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    try:
        if fits:
            return kind(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError({int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind])


def convert_choice(choices, value):
    if isinstance(value, bool):  # YAML reads off and on as false and true
        value = "on" if value else "off"
    if value not in choices:
        raise ValueError("one of " + ", ".join(map(str, choices)))
    return value


def read_yaml(path: Path, kinds: dict) -> dict:
    """The settings in a YAML file. UserError for an unknown or doubled key, or a value of the wrong type."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [str(key.value).replace("-", "_") for key, _ in node.value]
            doubled = {key for key in keys if keys.count(key) > 1}
            if doubled:
                raise UserError(f"{path}: {', '.join(sorted(doubled))} is given twice; keep one")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)  # a SafeLoader: no objects are built
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings as `name: value` lines")
    known = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            raise UserError(f"{path}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            known[name] = convert(kinds[name], value)
        except ValueError as error:
            raise UserError(f"{path}: {key} is {value!r}, but must be {error}") from None
    return known


def parse(cls, argv=None, doc: str | None = None):
    """Settings from flags and an optional --config file: default < YAML < flag.

    Each dataclass field becomes `--name_with_underscores` (dashes work too; booleans also as `--no_name`). A default
    made by `setting(real, demo)` takes its demo value when the base is the demo: with `--model demo`, or with neither
    --data_dir nor --model. doc: the help's text, if not the docstring of the module that has the dataclass.
    """
    kinds, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    parser = make_parser(cls, doc or sys.modules[cls.__module__].__doc__)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    given = {**(read_yaml(Path(path), kinds) if path else {}), **given}
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in given]
    if missing:
        parser.error(f"--{missing[0]} is needed")
    demo = given["model"] == "demo" if given.get("model") else not given.get("data_dir")
    defaults = {f.name: f.metadata["demo"] for f in fields if demo and "demo" in f.metadata}
    if given.get("model") == "":
        del given["model"]
    return cls(**{**defaults, **given})


def make_parser(cls, doc: str | None):
    """An argparse parser with --config and a flag for each field of the dataclass; it returns what was given, no defaults."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--setting value ...]",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags win over it")
    kinds, comments = typing.get_type_hints(cls), field_comments(cls)
    for f in dataclasses.fields(cls):
        add_flag(parser, f, kinds[f.name], comments[f.name])
    return parser


def add_flag(parser, f: dataclasses.Field, kind, comment: str) -> None:
    """Adds the flag of a field, under its name with underscores and with dashes; a boolean's --no_name is not listed."""
    names = list(dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"]))
    default = "" if f.default in ("", None, dataclasses.MISSING) else f"default: {f.default}"
    if "demo" in f.metadata:
        default += f"; demo: {f.metadata['demo']}"
    text = (comment + (f" ({default})" if default else "")).replace("%", "%%")
    options = dict(dest=f.name, default=argparse.SUPPRESS)
    if kind is bool:
        parser.add_argument(*names, action="store_true", help=text, **options)
        negative = sorted({name.replace("--", f"--no{mark}", 1) for name in names for mark in "_-"})
        parser.add_argument(*negative, action="store_false", help=argparse.SUPPRESS, **options)
    else:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else f.name.upper()
        parser.add_argument(*names, type=reader(kind), metavar=metavar, help=text, **options)


def reader(kind):
    """convert, for argparse: its errors name the text."""

    def read(text):
        try:
            return convert(kind, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be {error}") from None

    return read


def write_yaml(config, path: Path) -> None:
    """All settings, each with its comment, in a form that --config reads back."""
    import yaml

    comments = field_comments(type(config))
    lines = []
    for name, value in dataclasses.asdict(config).items():
        text = yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=10_000).strip()
        lines.append(f"{text}  # {comments[name]}")
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(aside, path)  # a kill leaves the old file or the new one, not half of one


def cli(main, *args, **kwargs):
    """Runs a script's main: a UserError ends in one line and exit code 2, Ctrl-C in 130."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries telling each other about their next versions
    try:
        main(*args, **kwargs)
    except UserError as error:
        # What a file told may hold anything: one line, and nothing that a terminal would obey.
        print("error: " + "".join(c if c.isprintable() else " " for c in str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output went away, as in `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        raise SystemExit(2) from None
