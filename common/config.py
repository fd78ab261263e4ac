"""A script's settings: a dataclass becomes flags and a strict YAML file, and errors become one readable line."""

import argparse
import ast
import dataclasses
import difflib
import errno
import inspect
import json
import os
import platform
import re
import signal
import sys
import threading
import types
import typing
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

VERSION = "0.9"
# What a disk, a folder's rights, a file in a folder's place or a name that is too long may answer: no case for a traceback.
OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP),
)
YAML_BYTES = 2**20  # settings and class names take a few kilobytes; a parser in Python would chew on more for minutes
YAML_NODES = 50_000  # names, values and lists: a second's work; the 21,841 classes of ImageNet fit
YAML_DIGITS = 1000


class UserError(Exception):
    """Something that the user can put right. `cli` prints it as one line and exits with code 2."""


def setting(real, demo):
    """A default that differs between real work and the small base that comes with the project."""
    return field(default=real, metadata={"demo": demo})


def rare(default):
    """A default that few runs change: --help lists its setting below the others."""
    return field(default=default, metadata={"rare": True})


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included: `Annotated[int, Range(1, 100)]`. --help shows it."""

    low: float
    high: float
    or_zero: bool = False  # 0 is good, too: it stands for "none" or "as it comes"

    def holds(self, value) -> bool:
        return self.low <= value <= self.high or (self.or_zero and value == 0)  # never NaN

    def __str__(self) -> str:
        low, high = (str(int(end)) if float(end).is_integer() else f"{end:.7g}" for end in (self.low, self.high))
        return f"{'0, or ' if self.or_zero else ''}{low} to {high}"


Count = Annotated[int, Range(1, 10**6)]
CountOrZero = Annotated[int, Range(0, 10**6)]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(1e-9, 10)]  # of learning; above it weights overflow within a few steps
RateOrZero = Annotated[float, Range(0, 10)]
Warmup = Annotated[float, Range(0, 10**6)]
BatchSize = Annotated[int, Range(1, 4096)]
BatchSizeOrZero = Annotated[int, Range(0, 4096)]
Workers = Annotated[int, Range(0, 128)]  # each is a process with libraries of its own in memory
Threads = Annotated[int, Range(0, 256)]  # OpenMP crashes on some ten thousand
Seed = Annotated[int, Range(0, 2**32 - 1)]
PictureSize = Annotated[int, Range(16, 4096, or_zero=True)]


@dataclass
class TrainConfig:
    """Settings that every train script has. The comment of a line is its help text.

    A script that says one of them again with another default need not repeat its range.
    """

    data_dir: str = ""  # folder with your data; empty: synthetic demo data, made once
    model: str = ""  # base model: a hub name, a local folder, or "demo" for the small base that comes along
    exclude: str = rare("")  # text file of samples to leave out, a path a line: scripts/check_data.py --quarantine writes one
    start_from: str = rare("")  # checkpoint whose weights the run starts with, on this or other data; --model is then its base
    output_dir: str = ""  # where run folders go; empty: outputs/ beside common/
    run_name: str = ""  # name of the run folder; empty: full, lora, or head (--lora_r 0)
    overwrite: bool = rare(False)  # replace an existing run folder instead of taking the next free name
    resume: bool = False  # go on where a stopped run left off: the same command with --resume added
    epochs: Count = 10  # passes over the training data
    max_steps_per_epoch: Annotated[int, Range(0, 10**9)] = 0  # cut every epoch short, for a smoke run; 0: whole epochs
    batch_size: BatchSize = 8  # samples per process and backward pass
    gradient_accumulation_steps: BatchSize = 1  # backward passes per optimizer step: a large batch on a small device
    lr: Rate = 1e-4  # peak learning rate, reached after the warm-up, then down to zero by a cosine
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4  # pulls matrices towards zero; biases and norms are left alone
    lr_head: RateOrZero = rare(1e-3)  # least peak rate of a head with new weights, which has the longest way to go; 0: lr
    warmup_steps: Warmup = 0.1  # from zero to lr: below 1 a share of all steps, else a number of them
    max_grad_norm: Annotated[float, Range(0, 10**6)] = 1.0  # gradients longer than this are scaled down to it; 0: never
    patience: CountOrZero = rare(0)  # stop after this many epochs without a new best; 0: never
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of the forward pass; what trains stays fp32
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one
    num_workers: Workers = 0  # processes that prepare batches; 0: the main one does
    threads: Threads = rare(0)  # CPU threads of this process; 0: as torch chooses
    seed: Seed = 0  # data order, augmentation and new weights are functions of it
    save_steps: Annotated[int, Range(0, 10**9)] = rare(0)  # save for resuming every N steps, too; 0: after each epoch
    ema_decay: Annotated[float, Range(0, 0.99999)] = rare(0.0)  # judge and save a mean of the weights over steps (0.999); 0: off
    compile: bool = rare(False)  # torch.compile for training: the first steps take minutes, the others less, above all on GPUs
    push_to_hub: str = rare("")  # owner/name: where on the hub the best checkpoint goes after the run; private, if it is new
    dry_run: bool = False  # train some steps, say what the whole run takes (time, memory, disk), and leave nothing

    def __post_init__(self):
        check_ranges(self)
        if self.dry_run and self.resume:
            raise UserError("--dry_run foretells a run from its start: leave --resume out")


@dataclass
class LoraTrainConfig(TrainConfig):
    """Settings that every LoRA train script has besides; a script says again what it sets otherwise or names for itself."""

    lora_r: Annotated[int, Range(0, 4096)] = 8  # rank: the width of the bottleneck; 0 trains the head alone
    lora_alpha: Annotated[int, Range(1, 65536)] = 16  # the update is scaled by lora_alpha / lora_r
    lora_dropout: Annotated[float, Range(0, 0.95)] = 0.0  # dropout in front of the adapters, against overfitting; slower
    lora_targets: str = "all-linear"  # qv, all-linear, all (convolutions, too), or a regex
    lora_last_k: CountOrZero = 0  # adapters in the last K blocks alone: no backward pass before them; 0: all
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"  # bf16: frozen weights in half the memory; with --precision bf16

    def __post_init__(self):
        super().__post_init__()
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
    threads: Threads = 0  # CPU threads of this process; 0: as torch chooses

    def __post_init__(self):
        check_ranges(self)


def project_root() -> Path:
    """The folder that holds common/; for a script that was exported as one file, the script's own folder."""
    here = Path(__file__).resolve().parent
    return here.parent if here.name == "common" else here


@cache
def field_comments(cls) -> dict[str, str]:
    """Field name -> the comment after its default, over the whole class hierarchy (a subclass overrides)."""
    comments = {}
    for part in reversed(cls.__mro__[:-1]):
        lines = inspect.getsource(part).splitlines()
        for node in ast.walk(ast.parse(inspect.cleandoc("\n".join(lines)))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                last = node.value or node  # a long line is wrapped around its default, comment and all
                comment = lines[last.end_lineno - 1][last.end_col_offset :].partition("#")[2].strip()
                comments[node.target.id] = comment or comments.get(node.target.id, "")
    return comments


@cache
def field_kinds(cls) -> dict[str, Any]:
    """Field name -> its type, with the range of the class that it inherits from where it says none."""
    kinds = {}
    for part in reversed(cls.__mro__[:-1]):
        for name, kind in inspect.get_annotations(part).items():
            limits = range_of(kinds.get(name))
            kinds[name] = Annotated[kind, limits] if limits and not range_of(kind) else kind
    return kinds


def range_of(kind) -> Range | None:
    return next((extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Range)), None)


def check_ranges(config) -> None:
    """UserError where a number of the settings is not in its range."""
    for name, kind in field_kinds(type(config)).items():
        limits, value = range_of(kind), getattr(config, name)
        if limits and isinstance(value, (int, float)) and not limits.holds(value):
            raise UserError(f"--{name} is {value}, but must be {limits}")


def convert(kind, value):
    """`value` (text from a flag, or a YAML value) as `kind`; ValueError says what was expected."""
    if limits := range_of(kind):
        value = convert(typing.get_args(kind)[0], value)
        if value is not None and not limits.holds(value):
            raise ValueError(str(limits))
        return value
    if typing.get_origin(kind) is Literal:
        return convert_choice(typing.get_args(kind), value)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return convert_union(typing.get_args(kind), value)
    if kind is bool:
        fits = isinstance(value, bool)
    elif kind is str:
        fits = isinstance(value, str) and "\0" not in value
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


def convert_union(kinds, value):
    """The first of the kinds that the value is good for: X | None, or float | Literal["best"]."""
    if type(None) in kinds and (value is None or value == ""):
        return None
    wanted = []
    for kind in kinds:
        try:
            if kind is not type(None):
                return convert(kind, value)
        except ValueError as error:
            wanted.append(str(error))
    raise ValueError(", or ".join(wanted))


def convert_choice(choices, value):
    if isinstance(value, bool):  # YAML reads off and on as false and true
        value = "on" if value else "off"
    if value not in choices:
        raise ValueError("one of " + ", ".join(map(str, choices)))
    return value


def shown(value) -> str:
    """A value as an error quotes it: whatever it is, a few words of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_yaml(path: Path):
    """What a YAML file from anybody holds, as plain Python values. UserError where it cannot be read, or would eat the machine.

    Doubled keys and aliases are refused: an alias of an alias of an alias grows to gigabytes.
    """
    import yaml

    class Strict(yaml.SafeLoader):  # safe: no objects are built
        nodes = 0

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise UserError(f"{path} has a YAML alias (*{self.peek_event().anchor}); write out what it stands for")
            self.nodes += 1
            if self.nodes > YAML_NODES:
                raise UserError(f"{path} has more than {YAML_NODES} entries, so it is no file of settings")
            node = super().compose_node(parent, index)
            if node.tag.endswith((":int", ":float")) and len(node.value) > YAML_DIGITS:  # 1:1:1: ... takes minutes
                raise UserError(f"{path} has a number of {len(node.value)} digits")
            return node

        def construct_mapping(self, node, deep=False):
            keys = [str(key.value).replace("-", "_") for key, _ in node.value]
            if doubled := next((key for key, many in Counter(keys).items() if many > 1), None):
                raise UserError(f"{path}: {shown(doubled)} is given twice; keep one")
            return super().construct_mapping(node, deep)

    try:
        if path.is_fifo():
            raise UserError(f"{path} is a pipe, which would be waited for; give a file")
        with open(path, "rb") as file:
            content = file.read(YAML_BYTES + 1)
        if len(content) > YAML_BYTES:
            raise UserError(f"{path} is larger than {YAML_BYTES // 1000} kB, so it is no file of settings")
        return yaml.load(content.decode("utf-8-sig"), Loader=Strict)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:  # no UTF-8, a date or a number that cannot be
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path, kinds: dict, twin: Path | None = None) -> dict:
    """The settings in a YAML file. UserError for an unknown or doubled key, or a value of the wrong type or out of range.

    kinds: name -> type. twin: the script that has the settings of the pair which this one lacks, to say so.
    """
    values = load_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings as `name: value` lines")
    known = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            raise UserError(f"{path}: {unknown_setting(name, kinds, twin)}")
        try:
            known[name] = convert(kinds[name], value)
        except ValueError as error:
            raise UserError(f"{path}: {key} is {shown(value)}, but must be {error}") from None
    return known


def unknown_setting(name: str, kinds: dict, twin: Path | None) -> str:
    """Says what a name that is no setting may have meant: one of the other script of the pair, or one that is spelt alike."""
    if twin and name.isidentifier() and (name in lora_names() or re.search(rf"^    {name}:", twin.read_text("utf-8"), re.M)):
        return f"{name} is a setting of {twin.name}, not of {twin_of(twin).name}"
    near = difflib.get_close_matches(name, kinds, n=1)
    return f"unknown setting {shown(name)}" + (f"; did you mean {near[0]!r}?" if near else "")


def lora_names() -> set[str]:
    return {f.name for f in dataclasses.fields(LoraTrainConfig)} - {f.name for f in dataclasses.fields(TrainConfig)}


def twin_of(script: Path) -> Path:
    """train.py for train_lora.py, and the other way round."""
    stem = script.stem
    return script.with_stem(stem.removesuffix("_lora") if stem.endswith("_lora") else f"{stem}_lora")


def parse(cls, argv=None, doc: str | None = None):
    """Settings from flags and an optional --config file: default < YAML < flag.

    Each dataclass field becomes `--name_with_underscores` (dashes work too; booleans also as `--no_name`). A default
    made by `setting(real, demo)` takes its demo value when the base is the demo: with `--model demo`, or with neither
    --data_dir nor --model. With --start_from and no --model the base is that of the checkpoint. A field without a default must
    be given, and not be empty.
    doc: the help's text, if not the docstring of the module that has the dataclass.
    """
    module = sys.modules[cls.__module__]
    kinds, fields, twin = field_kinds(cls), dataclasses.fields(cls), twin_of(Path(getattr(module, "__file__", None) or "none"))
    parser = make_parser(cls, doc or module.__doc__, twin if twin.is_file() else None)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    given = {**(read_yaml(Path(path), kinds, parser.twin) if path else {}), **given}
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and given.get(f.name, "") == ""]
    if missing:
        parser.error(f"--{missing[0]} is needed: {field_comments(cls)[missing[0]]}")
    if given.get("start_from") and not given.get("model"):
        given["model"] = base_of(Path(given["start_from"]).expanduser())
    demo = given["model"] == "demo" if given.get("model") else not given.get("data_dir")
    defaults = {f.name: f.metadata["demo"] for f in fields if demo and "demo" in f.metadata}
    if given.get("model") == "":
        del given["model"]
    return cls(**{**defaults, **given})


def base_of(checkpoint: Path) -> str:
    """The base that a checkpoint is loaded with: a whole model with itself, an adapter with the one that it was trained on."""
    try:
        origin = json.loads((checkpoint / "origin.json").read_text(encoding="utf-8"))
        return str(checkpoint) if origin["method"] == "full" else str(origin["base"]["name"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"--start_from {checkpoint} is no checkpoint: name the folder checkpoints/best of a run") from None


class Parser(argparse.ArgumentParser):
    """argparse, but a flag may have dashes for underscores, and an error is one line that knows what was meant."""

    twin: Path | None = None
    kinds: dict = {}

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([re.sub("^--[^=]+", with_underscores, str(text)) for text in args], namespace)

    def error(self, message: str):
        """Prints the fault and leaves with code 2, as `cli` does."""
        what, _, flags = message.partition(": ")
        if what == "unrecognized arguments":
            name = flags.split()[0].partition("=")[0]
            message = unknown_setting(name[2:], self.kinds, self.twin) if name.startswith("--") else f"what is {shown(name)} for?"
        self.exit(2, f"error: {one_line(message)[:400]}; --help lists the settings\n")


def with_underscores(flag: re.Match) -> str:
    return "--" + flag[0][2:].replace("-", "_")


class Switch(argparse.Action):
    """--flip and --no_flip."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


class Versions(argparse.Action):
    """--version: of the project, of Python, and of the libraries that decide what comes out."""

    def __call__(self, parser, namespace, values, option_string=None):
        from common.runtime import versions_of

        there = versions_of("torch", "torchvision", "transformers", "peft", "timm")
        told = ", ".join(f"{name} {version}" for name, version in there.items() if version)
        print(f"LoRA Workshop {VERSION}; Python {platform.python_version()}, {told}")
        parser.exit()


def make_parser(cls, doc: str | None, twin: Path | None = None) -> Parser:
    """An argparse parser with --config and a flag for each field of the dataclass; it returns what was given, no defaults."""
    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--setting value ...]",
    )
    parser.kinds, parser.twin = field_kinds(cls), twin
    parser.add_argument("--version", nargs=0, action=Versions, default=argparse.SUPPRESS, help="of project and libraries")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags win over it")
    comments, seldom = field_comments(cls), parser.add_argument_group("seldom needed")
    for f in dataclasses.fields(cls):
        add_flag(seldom if "rare" in f.metadata else parser, f, parser.kinds[f.name], comments[f.name])
    return parser


def add_flag(parser, f: dataclasses.Field, kind, comment: str) -> None:
    """Adds the flag of a field; a boolean has two."""
    notes = [] if f.default in ("", None, dataclasses.MISSING) else [f"default: {f.default}"]
    if "demo" in f.metadata:
        notes.append(f"demo: {f.metadata['demo']}")
    if limits := range_of(kind):
        notes.append(str(limits))
    text = (comment + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")
    options = dict(dest=f.name, default=argparse.SUPPRESS, help=text)
    if kind is bool:
        parser.add_argument(f"--{f.name}", f"--no_{f.name}", action=Switch, nargs=0, **options)
    else:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else f.name.upper()
        parser.add_argument(f"--{f.name}", type=reader(kind), metavar=metavar, **options)


def reader(kind):
    """convert, for argparse: its errors name the text."""

    def read(text):
        try:
            return convert(kind, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {error}") from None

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
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)  # a kill leaves the old file or the new one, not half of one


def cli(main, *args, **kwargs):
    """Runs a script's main: a UserError ends in one line and exit code 2, Ctrl-C in 130, SIGTERM in 143."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handler
    if in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries telling each other about their next versions
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal has no letters for is printed with \\x.. in it
            stream.reconfigure(errors="backslashreplace")
    try:
        main(*args, **kwargs)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output went away, as in `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except RuntimeError as error:
        if "home directory" not in str(error):  # of ~somebody/pictures, on a machine that knows no somebody
            raise
        print("error: a path starts with ~ and a name, and there is no such user here", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        place = error.filename2 or error.filename or "while writing"  # of a rename, where to
        print(f"error: {error.strerror}: {one_line(place)}", file=sys.stderr)
        raise SystemExit(2) from None


def leave(signum, _frame):
    """SIGTERM ends a script as Ctrl-C does: what it has begun under another name is cleared away. A second ends it at once."""
    signal.signal(signum, signal.SIG_DFL)
    raise SystemExit(128 + signum)


def one_line(text) -> str:
    """What a file told may hold anything: one line of it, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:2000])
