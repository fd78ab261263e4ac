"""Base models: fetching one, loading it strictly, knowing it again."""

import copy
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import fingerprint, read_json
from common.config import UserError
from common.runtime import say
from common.tensor_files import is_finite

FETCH_REMEDY = "give --model a local folder, or --model demo for the small base that comes along"
# What a base's settings may ask for before it is built, more than any model that is fine-tuned here has.
MOST_NUMBERS = 1_000_000  # beside what its weights hold, as of a tiny model that names tokens by number
MOST_PARTS = 100_000  # layers, parameters and buffers
LONGEST_SIDE = 10_000  # of a picture, in pixels
MOST_HERTZ = 192_000  # of a sound, in Hz
# Not by a private base class of torch. Frozen ones, as in DETR's backbone, are of none of these and need no care.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fetch(name: str, download: bool = True, flag: str = "--model ", remedy: str = FETCH_REMEDY) -> Path | str:
    """Downloads a hub model into the local cache, unless it is there. UserError in a few seconds where there is no network.

    Returns what it is loaded from: the name; or its folder in the cache, if it has no safetensors file but PyTorch's own.
    flag, remedy: what the error puts before the name, and what it says to do.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ["*.json", "*.txt", "*.model", "*.safetensors"]  # .txt, .model: vocabularies of tokenizers
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        folder = None
    if folder is None or not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        with fetching(name, download, flag, remedy):
            there = HfApi().model_info(name, timeout=8)  # one short question first: the download itself would retry for minutes
            if not any(file.rfilename.endswith(".safetensors") for file in there.siblings or ()):
                files.append("pytorch_model*.bin*")
            say(f"fetching {name} from the hub")
            folder = Path(snapshot_download(name, allow_patterns=files))
    return name if any(folder.glob("*.safetensors")) else folder


def fetch_file(name: str, download: bool = True, flag: str = "--model ", remedy: str = FETCH_REMEDY) -> Path:
    """One file of a hub model, owner/repo/path/to/file, in the local cache; else as `fetch`."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    owner, repo, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        with fetching(name, download, flag, remedy):
            HfApi().model_info(f"{owner}/{repo}", timeout=8)
            say(f"fetching {name} from the hub")
            return Path(hf_hub_download(f"{owner}/{repo}", file))


@contextmanager
def fetching(name: str, download: bool, flag: str, remedy: str):
    """Turns whatever goes wrong in a download into a UserError of one line; download: whether there may be one at all."""
    if not download:
        raise UserError(f"{name} is not in the local cache, and it is fetched only where {flag.split()[0]} names it")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise UserError(f"{flag}{name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; {remedy}")
    try:
        yield
    except Exception as error:  # every network library has errors of its own, and all mean the same here
        kind = type(error).__name__
        raise UserError(f"{flag}{name} is not in the local cache and cannot be fetched ({kind}); {remedy}") from None


def base_source(name: str, demo_base: Path, example: str, download: bool = True) -> Path | str:
    """Where a base is loaded from: the demo's folder for "demo", a local folder, or a hub name (fetched if it must be)."""
    source = demo_base if name == "demo" else Path(name).expanduser()
    if not source.is_dir():
        if name == "demo":  # a copy that was taken out of the project with --no_demo
            raise UserError(f"this copy came without the demo: name your own data with --data_dir; the base is then {example}")
        if source.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise UserError(f"--model: there is no folder {source}; give a folder, a hub name ({example}) or demo")
        source = fetch(name, download)
    return source


def stored_files(source: Path | str, pattern: str) -> list[Path]:
    """The files of a base that fit a pattern, wherever it lies: in a folder, or in the hub's local cache."""
    from huggingface_hub import snapshot_download

    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source), local_files_only=True))
    return sorted(folder.glob(pattern))


def weight_bytes(source: Path | str) -> int:
    return sum(path.stat().st_size for end in ("*.safetensors", "*.bin") for path in stored_files(source, end))


def check_sizes(source: Path | str) -> None:
    """UserError for a number in a base's settings that no model with its weights, and no picture, can have.

    Before anything is built: a layer count of 10^9 would keep a library busy for hours, a picture of that side needs 10^18 bytes.
    """
    most = {"config.json": max(weight_bytes(source), MOST_NUMBERS), "preprocessor_config.json": LONGEST_SIDE}
    for file, limit in most.items():
        for path in stored_files(source, file):
            todo = [(file, read_json(path))]
            while todo:
                key, value = todo.pop()
                if isinstance(value, (dict, list)):
                    todo += value.items() if isinstance(value, dict) else [(key, item) for item in value]
                    continue
                bound = MOST_HERTZ if key == "sampling_rate" else limit
                if isinstance(value, int) and abs(value) > bound:
                    raise UserError(f"{file} says that {key} is {str(value)[:20]}, and more than {bound} cannot be")


@contextmanager
def no_larger_than(source: Path | str):
    """A model that is built inside may hold about as many numbers as its weights have bytes: else UserError, at once."""
    from torch.nn.modules import module as registry

    limit, numbers, parts = 4 * weight_bytes(source) + MOST_NUMBERS, 0, 0

    def count(owner, name, thing):
        nonlocal numbers, parts
        parts += 1
        numbers += thing.numel() if isinstance(thing, torch.Tensor) else 0
        if numbers > limit or parts > MOST_PARTS:
            raise UserError("its config.json asks for a far larger model than its weights are of")

    kinds = ("parameter", "buffer", "module")
    handles = [getattr(registry, f"register_module_{kind}_registration_hook")(count) for kind in kinds]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_pretrained(name: str, source: Path | str, kind, processor_kind):
    """(model, image processor) by the library's own classes: float32, nothing that runs code, offline, every weight in its place.

    kind, processor_kind: classes with from_pretrained. UserError where a weight is missing, left over or of another shape.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_sizes(source)
        # Not asked on the terminal, either: transformers would run a base's own code after a y.
        processor = processor_kind.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        with no_larger_than(source):
            model, info = kind.from_pretrained(
                source,
                dtype=torch.float32,
                weights_only=True,  # of a PyTorch file, which is taken where there is no safetensors file: tensors, no code
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed below, with the others that do not fit
            )
    except Exception as error:  # whatever a library makes of files that it did not write
        reason = " ".join(str(error).split())[:300]
        if reason.startswith("Unrecognized configuration class"):  # a list of all model types follows
            (config,) = stored_files(source, "config.json")
            reason = f"the libraries have none of type {read_json(config)['model_type']}"
        if isinstance(error, pickle.UnpicklingError):  # torch's own text says how to load it all the same
            reason = "its weights hold more than tensors and numbers, which could run code"
        elif not isinstance(error, (OSError, ValueError, UserError)):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"--model {name} is no model for this task that can be loaded safely: {reason}") from None
    strays = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    strays = [key for key in map(str, strays) if "num_batches_tracked" not in key]  # a counter of training, not a weight
    if strays:
        raise UserError(f"--model {name}: its weights and its config.json do not fit: {strays[0]} ({len(strays)} in all)")
    if broken := [key for key, weight in model.named_parameters() if not is_finite(weight)]:
        raise UserError(f"--model {name}: its weights have numbers that are not finite: {broken[0]} ({len(broken)} in all)")
    return model, processor


def describe_base(name: str, model) -> dict:
    """{"name", "sha256"} of a base, for the summary and for the adapters that belong to it; one printed line."""
    say(f"base: {name}, {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    return {"name": name, "sha256": fingerprint(model.state_dict())}


def class_tensors(build, model) -> list[str]:
    """Names of a transformers model's tensors whose first size is the number of classes, or depends on it.

    build: config -> a model of the same class, with any weights. The names are those that one class more would change: the
    shapes alone do not tell where the number of classes equals another size.
    """
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(map(str, range(len(config.id2label) + 1))))
    wider, own = build(config).state_dict(), model.state_dict()
    # An adapted model has tensors, and names, that its configuration does not know: no class layers.
    return [name for name, tensor in own.items() if name in wider and wider[name].shape != tensor.shape]


def train_mode(model) -> None:
    """Training mode, but BatchNorm keeps the base's statistics: small batches would spoil them, and no adapter holds them."""
    model.train()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()
