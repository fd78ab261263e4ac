"""Saving that survives a kill at any moment, and loading that runs no code and believes no file unchecked.

A folder is written aside, every file is fsynced and listed with its sha256 in manifest.json, and only then is the
folder renamed into place. So a folder under its real name is whole, whenever the power went.
"""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.config import UserError
from common.runtime import say

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Asks the disk to hold a file's bytes, or a folder's list of names, before we go on."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle for a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path):
    """Yields the name under which to write a file; on leaving it is renamed to `path`: readers see the old file or the new.

    Where the block does not come to its end, by an error, Ctrl-C or SIGTERM, nothing is left beside the old one. Of two processes
    that write one file at once the last wins.
    """
    aside = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")  # a long name with more would be too long
    with naming(path):
        try:
            yield aside
            fsync(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync(path.parent)


@contextmanager
def naming(path: Path):
    """An OSError in the block, where a file is written, has the file's name; a full disk gives it none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing.

    Bytes of a file name that is not UTF-8 are written as escapes, which JSON reads back as what they were.
    """
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path):
    """The content of a JSON file. UserError where it cannot be read."""
    try:
        return json.loads(path.read_bytes())  # UTF-8 or UTF-16, with or without a byte order mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def previous_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


@contextmanager
def atomic_folder(path: Path):
    """Yields an empty folder to fill; on leaving it is sealed with a manifest and renamed to `path`.

    A folder that stood there is replaced. A crash between the two renames leaves the old one as `.<name>.previous`,
    from where `recover` brings it back. UserError where the disk does not take the files, or another process is just writing
    there; the old folder is intact then. Where a link stands there, the folder that it leads to is the one.
    """
    path = path.resolve() if path.is_symlink() else path
    try:
        with made_alone(path.with_name(f".{path.name}.tmp")) as aside:
            yield aside
            seal(aside)
            if path.exists():
                shutil.rmtree(previous_of(path), ignore_errors=True)
                os.replace(path, previous_of(path))
            os.replace(aside, path)
            fsync(path.parent)
            shutil.rmtree(previous_of(path), ignore_errors=True)
    except UserError:
        raise
    except BaseException as error:
        recover(path)
        if fault := disk_fault(error):
            raise UserError(f"could not save {path}: {fault}; what was saved before is intact") from error
        raise


@contextmanager
def made_alone(folder: Path):
    """Yields the folder, made anew for this process alone; an error leaves nothing of it, and what a kill left goes first.

    UserError where another process is in it. Once it has another name, what stands under the old one may be another's.
    """
    if folder.exists():
        with locked(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with locked(folder):
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def locked(folder: Path):
    """Holds the lock of a folder until the block, or the process, ends. UserError where another process has it."""
    if os.name == "nt":  # no handle for a folder
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # disks of the network that lock no folders
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is just writing {folder}: let it end, or write elsewhere") from None
        yield
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Has the disk hold all files of a folder, and lists them with their sizes and sha256 in its manifest."""
    everything = sorted(folder.rglob("*"))
    files = [p for p in everything if p.is_file() and p != folder / MANIFEST]  # that of a folder saved in its place
    (folder / MANIFEST).touch()
    for file in files:  # safetensors writes 0600: readable for others, too, where the umask says so
        file.chmod((folder / MANIFEST).stat().st_mode)
    for item in everything:
        fsync(item)
    manifest = {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    write_json(folder / MANIFEST, manifest)


def disk_fault(error: BaseException | None) -> str | None:
    """What the disk said, where an error comes from a write that failed. torch and safetensors hide that in errors of theirs."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if "(os error " in str(error):
            return str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def recover(path: Path) -> None:
    """Brings back the folder that a crash in the middle of its replacement left under the name `.<name>.previous`."""
    if not path.exists() and previous_of(path).exists():
        os.replace(previous_of(path), path)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, naming the file; None where every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".pt") and file.relative_to(folder).as_posix() not in entries:
            return f"{file.name} is not in {MANIFEST}"
    if not entries:
        return f"{MANIFEST} lists nothing"
    for name, (size, digest) in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256_of(file) != digest:
            return f"{name} has changed since it was saved"
    return None


def open_model_folder(folder: Path, needs: str = "") -> Path:
    """`folder`, checked: it holds the file `needs` and, where it has a manifest, every file is intact. Else UserError.

    Adapters that plain PEFT saved have no manifest; that nothing can be checked without one is said.
    """
    recover(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: train first, or name one with --checkpoint")
    fault = damage(folder) if (folder / MANIFEST).exists() else None
    if fault:
        raise UserError(f"{folder} is damaged: {fault}")
    if not (folder / MANIFEST).exists():
        say(f"{folder} has no {MANIFEST}: nothing says whether its files are as they were saved")
    if needs:
        check_holds(folder, needs)
    return folder


def check_holds(folder: Path, needs: str) -> None:
    """UserError, which names a pickle that lies there instead, unless the folder holds the file `needs`."""
    if not (folder / needs).is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        more = f" ({pickles[0]} is a pickle, which could run code, and is not loaded)" if pickles else ""
        raise UserError(f"{folder} holds no {needs}{more}")


@dataclass
class Progress:
    """Where a training stands: the readable part of a checkpoint, progress.json. Each of its fields is written here alone."""

    step: int = 0  # optimizer steps
    epoch: int = 1  # the epoch under way, from 1
    batches_done: int = 0  # of that epoch
    loss_sums: dict[str, list] = field(default_factory=dict)  # loss -> [sum, count] over that epoch, means of all processes
    history: list[dict] = field(default_factory=list)  # one record an epoch, epoch 0 = before training
    best: dict | None = None  # the record of the best epoch
    best_name: str | None = None  # the metric that chooses it
    higher_is_better: bool = True
    bad_epochs: int = 0  # epochs since then
    clock: dict = field(default_factory=lambda: {"seconds": 0.0, "train_seconds": 0.0, "samples": 0})  # stops left out
    resumed_at: list[int] = field(default_factory=list)  # optimizer steps
    log_bytes: int = 0  # length of metrics.jsonl
    base: dict | None = None  # name and sha256 of the model that the run started from
    data: dict | None = None  # and of its data
    settings: dict = field(default_factory=dict)  # of the run's config; {}: a version that did not keep them
    processes: int = 1
    idle: list[str] | None = None  # parameters that train, but have had no gradient yet; None: no step was looked at
    predicted: dict | None = None  # what the run was to take, by its first steps; see summary_schema.md
    unreadable: dict[str, str] = field(default_factory=dict)  # file -> fault, of what turned out bad while it was trained on

    @classmethod
    def from_saved(cls, saved: dict):
        """Of what any version wrote: a field that it did not know has its default, one that is no more is passed over.

        TypeError where no version wrote that.
        """
        default = dataclasses.asdict(cls())
        known = {name: value for name, value in saved.items() if name in default}
        if isinstance(known.get("loss_sums"), list):  # as it was when a run had one loss
            known["loss_sums"] = {"loss": known["loss_sums"]}
        for name, value in known.items():
            if default[name] is not None and not isinstance(value, type(default[name])):
                raise TypeError(f"progress.json: {name} is {str(value)[:50]}")
        return cls(**known | {"clock": default["clock"] | known.get("clock", {})})

    def count_losses(self, losses: dict[str, list[float]]) -> None:
        for name, values in losses.items():
            total, count = self.loss_sums.get(name, (0.0, 0))
            self.loss_sums[name] = [total + sum(values), count + len(values)]

    def mean_losses(self) -> dict[str, float]:
        """Loss -> its mean over the epoch so far."""
        return {name: total / count for name, (total, count) in self.loss_sums.items()}

    def add_epoch(self, record: dict, best_name: str, higher_is_better: bool) -> bool:
        """Takes an epoch's record into the history; whether it is the best so far."""
        self.history.append(record)
        self.best_name, self.higher_is_better = best_name, higher_is_better
        new, old = record[best_name], self.best and self.best[best_name]
        if new is None or old is None:  # a metric that does not exist is worse than any that does
            is_best = self.best is None or (new is not None and old is None)
        elif math.isclose(new, old, rel_tol=1e-9):  # on few samples accuracies often tie; the loss then says which was surer
            losses = [r.get("val_loss") for r in (record, self.best)]
            is_best = None not in losses and losses[0] < losses[1]
        else:
            is_best = new > old if higher_is_better else new < old
        self.best, self.bad_epochs = (record, 0) if is_best else (self.best, self.bad_epochs + 1)
        return is_best

    def no_better(self) -> str:
        """Nothing, or where the best epoch is no better than the base as it was, words that say so."""
        best, before = self.best[self.best_name], self.history[0].get(self.best_name)
        if None in (best, before) or (best > before if self.higher_is_better else best < before):
            return ""
        return f", but no better than before training: {before:.4f}"

    def next_epoch(self) -> None:
        self.epoch, self.batches_done, self.loss_sums = self.epoch + 1, 0, {}


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    for previous in folder.glob(".step-*.previous"):
        recover(folder / previous.name[1 : -len(".previous")])
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".corrupt")


def save_state(folder: Path, state: dict, progress: dict, keep: int = 2) -> None:
    """Saves what resuming needs as folder/step-XXXXXXXX and drops all but the newest `keep`.

    state: tensors, numbers, text, lists and dicts only; progress: the readable part (its `step` names the folder).
    """
    import torch

    with atomic_folder(folder / f"step-{progress['step']:08d}") as aside:
        with open(aside / "state.pt", "wb") as file:  # Python's own, so that a full disk is an OSError
            torch.save(state, file)
        (aside / "progress.json").write_text(json.dumps(progress, indent=2, allow_nan=False), encoding="utf-8")
    for old in step_folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".step-*"):  # of saves that a kill cut short
        shutil.rmtree(leftover, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict, dict] | None:
    """(state, progress) of the newest checkpoint that is whole; None where none was ever saved.

    A damaged one is renamed to *.corrupt and named. UserError where all are damaged: starting over is the user's choice.
    """
    candidates = step_folders(folder)
    for path in reversed(candidates):
        fault = damage(path)
        if fault is None:
            try:
                return read_state(path)
            except (OSError, EOFError, ValueError, RuntimeError, LookupError) as error:  # sealed, and yet no state
                fault = " ".join(str(error).split())[:200]
        corrupt = path.with_name(path.name + ".corrupt")
        shutil.rmtree(corrupt, ignore_errors=True)
        os.replace(path, corrupt)
        say(f"checkpoint {path.name} is damaged ({fault}); kept as {corrupt.name}, trying the one before it")
    if candidates or list(folder.glob("step-*.corrupt")):
        raise UserError(f"every checkpoint in {folder} is damaged; to start over, run again with --overwrite")
    return None


def read_state(path: Path) -> tuple[dict, dict]:
    """(state, progress) of one checkpoint. UserError for a state that could run code; others where it cannot be read."""
    import torch

    if not zipfile.is_zipfile(path / "state.pt"):
        raise ValueError("state.pt is no file of tensors")
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path / 'state.pt'} holds more than tensors and numbers, which could run code: refused") from None
    try:
        return state, read_json(path / "progress.json")
    except UserError as error:
        raise ValueError(str(error)) from None


def fingerprint(tensors: dict) -> str:
    """sha256 of a model's tensors: the same for the same weights, whatever file they came from.

    Names do not count: libraries rename layers from version to version, and the weights stay the same.
    """
    import torch

    digests = []
    for tensor in tensors.values():
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def moving_state(model) -> dict:
    """What training can change in a model: parameters that train, and buffers. Frozen weights come from the base."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_moving_state(model, tensors: dict) -> None:
    """UserError, before anything is loaded, unless the tensors are those that move in this model."""
    mine = moving_state(model)
    if not mine.keys() & tensors.keys():  # --lora_r 0 once left an idle adapter on the model, which goes before the names
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    expected, found = ({name: tuple(t.shape) for name, t in each.items()} for each in (mine, tensors))
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise UserError(
            f"--resume: the checkpoint is of another model: {odd[0]} is {found.get(odd[0], 'missing')} there and "
            f"{expected.get(odd[0], 'no such tensor')} here ({len(odd)} in all)"
        )
    model.load_state_dict(tensors, strict=False)
