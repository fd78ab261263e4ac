"""The run folder: outputs/<task>/<name>/, never overwritten by accident, locked while a run is in it."""

import dataclasses
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_type_hints

from common.checkpoint import previous_of, read_json, recover
from common.config import UserError, project_root, read_yaml
from common.runtime import say

ONCE = {"resume", "overwrite", "dry_run", "push_to_hub"}  # settings of one start, which who repeats the run may not want
# Settings that say where and with what a run works: they do not change the weights (threads may, in the last bit).
OF_THE_PLACE = ONCE | {"device", "num_workers", "threads", "save_steps", "cache", "output_dir", "run_name"}
FREE_ON_RESUME = OF_THE_PLACE | {"patience"}  # may differ when a run is taken up again; patience says when to stop, no more
# What a start writes before anything else.
OF_A_START = {".lock", "config.yaml", "summary.json"}
OF_PREDICTIONS = ("predictions.*", "[0-9][0-9][0-9][0-9]_*")  # what infer writes: tables, and pictures with numbers


def open_run_folder(config, task: str, method: str):
    """(folder, its lock) for a run: the named one, the next free name, or with --resume the one that was at work last.

    UserError where it is in use, was started with other settings (--resume), or holds files that no run has left there.
    With --overwrite the run that stood there is set aside, and comes back if the new one is refused; see `discard`.
    """
    root = (Path(config.output_dir).expanduser() if config.output_dir else project_root() / "outputs") / task
    name = config.run_name or method
    if Path(name).name != name or name == "..":
        raise UserError(f"--run_name {name!r} must be a plain folder name")
    if re.search("[\ud800-\udfff]", str(root / name)):  # what Python makes of letters that the locale has not
        raise UserError(f"the run folder {root / name} has a name that TensorBoard cannot write to: start with PYTHONUTF8=1")
    bring_back(root)
    folder = choose_folder(config, root, name)
    make_writable(folder)
    if not is_run(folder) and not is_bare(folder):
        raise UserError(f"{folder} holds files, but no run (there is no summary.json): not touched; use another --run_name")
    lock = lock_folder(folder)
    if config.resume:
        check_same_settings(config, folder)
    elif has_results(folder):
        lock = set_aside(folder, lock)
    else:  # what a start left that came to nothing
        clear(folder)
    return folder, lock


def make_writable(folder: Path, remedy: str = "choose another --output_dir") -> None:
    """Makes a folder where it is missing, before the work. UserError, which names the remedy, where it cannot be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(folder, os.W_OK) else "it is read-only"
    except OSError as error:
        fault = error.strerror
    if fault:
        raise UserError(f"nothing can be written into {folder}: {fault}; {remedy}")


def choose_folder(config, root: Path, name: str) -> Path:
    """The run folder by its flags: see open_run_folder."""
    numbered = [root / name, *(root / f"{name}_{i}" for i in range(2, 1000))]
    runs = [path for path in numbered if is_run(path)]
    if config.resume and runs:
        return max(runs, key=last_written)
    if config.resume:
        print(f"nothing to resume in {root / name}: starting at step 0")
    if config.overwrite:
        return root / name
    folder = next((path for path in numbered if not has_results(path)), None)
    if folder is None:
        raise UserError(f"{root} holds {len(numbered)} runs called {name}; use another --run_name")
    if folder != root / name:
        print(f"{root / name} holds a run already (--resume goes on, --overwrite replaces it): using {folder.name}")
    return folder


def check_same_settings(config, folder: Path) -> None:
    """UserError where a setting that the weights depend on is not what it was when the run in `folder` started."""
    if (folder / "config.yaml").exists():
        then = read_yaml(folder / "config.yaml", get_type_hints(type(config)))
        if fault := other_setting(config, then):
            raise UserError(
                f"--resume: {fault} when {folder.name} started; give the same settings (--run_name says which run goes on), "
                "or leave --resume out to start another run"
            )
    elif has_results(folder):
        raise UserError(
            f"--resume: {folder / 'config.yaml'} is gone, so nothing says whether the settings are the same; write it again "
            '(summary.json has them all, under "config"), or leave --resume out to start another run'
        )


def other_setting(config, then: dict) -> str | None:
    """The first setting that the weights depend on and that is not as it was: "lr is 0.1 now and was 0.01"; else None.

    then: settings of before, of any version. There may be more epochs than before: the run goes on for longer.
    """
    if then and config.lr_head > config.lr:
        then = {"lr_head": config.lr} | then  # before there was one, new heads learnt at lr
    for key, value in dataclasses.asdict(config).items():
        before = then.get(key, value)
        longer = key == "epochs" and isinstance(before, int) and value > before
        if key not in FREE_ON_RESUME and before != value and not longer:
            return f"{key} is {value!r} now and was {before!r}"
    return None


def is_run(folder: Path) -> bool:
    """Whether a run was started in a folder, however far it came; a folder of somebody's own files is none."""
    saved = any((folder / "checkpoints" / "last").glob("step-*"))
    return saved or (folder / "summary.json").exists() or ((folder / "config.yaml").exists() and is_bare(folder))


def is_bare(folder: Path) -> bool:
    """Whether a folder holds nothing but what a start writes first, or had begun to write when it was killed."""
    names = {path.name for path in folder.iterdir()}
    return all(name in OF_A_START or (name.startswith(".") and name.endswith(".tmp")) for name in names)


def last_written(folder: Path) -> float:
    """When a run wrote its record last: as it started, or as it ended."""
    return max((folder / name).stat().st_mtime for name in (*OF_A_START, "checkpoints") if (folder / name).exists())


def has_results(folder: Path) -> bool:
    """Whether a run folder holds anything worth keeping: a checkpoint, or a run that ended well (or nobody knows how)."""
    saved = any((folder / "checkpoints").glob("*/*")) if (folder / "checkpoints").exists() else False
    summary = folder / "summary.json"
    return saved or (summary.exists() and read_record(folder).get("status") in (None, "finished"))


def read_record(folder: Path) -> dict:
    """summary.json of a run folder; {} where there is none, or nothing that a run has written."""
    try:
        record = read_json(folder / "summary.json")
    except UserError:
        return {}
    return record if isinstance(record, dict) else {}


# ---- replacing a run -------------------------------------------------------------------------------------------------


def set_aside(folder: Path, lock):
    """Renames the run in `folder` to .<name>.previous and makes the folder anew; its lock, for the old one's.

    A rename is whole or not at all: whenever a kill comes, there is a run under the one name or the other.
    """
    forget_replaced(folder)
    os.replace(folder, previous_of(folder))
    folder.mkdir()
    new = lock_folder(folder)
    lock.close()
    return new


def forget_replaced(folder: Path) -> None:
    """Once the run in `folder` has begun: the one that it replaces goes."""
    shutil.rmtree(previous_of(folder), ignore_errors=True)


def bring_back(root: Path) -> None:
    """Gives runs that were set aside in `root` their names back, where no run has taken their place yet."""
    for previous in root.glob(".*.previous"):
        folder = root / previous.name[1 : -len(".previous")]
        if folder.exists() and (is_run(folder) or not is_bare(folder)):
            continue
        try:
            discard(folder, lock_folder(folder) if folder.exists() else None)
        except UserError:  # a start is just taking its place
            continue


def discard(folder: Path, lock) -> None:
    """Of a start that came to nothing: its folder goes, and the run that it was to replace comes back."""
    if lock:
        clear(folder)
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)
    recover(folder)


def clear(folder: Path) -> None:
    """Empties a run folder, but for its lock. What makes it a run goes last, so that a kill leaves one or none."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name in OF_A_START):
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_folder(folder: Path):
    """An open file that holds the folder's lock until it is closed or the process ends, however it ends."""
    file = open(folder / ".lock", "w")
    try:
        import fcntl

        # lockf, not flock: data workers would inherit that one and hold it for seconds after the run was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock, and a folder with an open file could not be renamed
        file.close()
    except OSError:
        raise UserError(f"another process is training in {folder}; give this run a --run_name of its own") from None
    return file


@contextmanager
def one_at_a_time(folder: Path):
    """Of several processes that work on what a folder holds, or is to hold, one is inside at a time; the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # as systems differ
                say(f"waiting for another process, which is at work on {folder}")
                fcntl.lockf(file, fcntl.LOCK_EX)
        except ImportError:  # Windows: no lock
            pass
        yield


def make_once(folder: Path, make) -> Path:
    """The folder, made by make(folder) if it is not there yet; of several processes that need it at once, one makes it."""
    if not folder.exists():
        make_writable(folder.parent, "name your own data with --data_dir, or copy the project to where its demo can be drawn")
        with one_at_a_time(folder):
            if not folder.exists():
                print(f"drawing the demo data into {folder}", flush=True)
                aside = folder.with_name(f".{folder.name}.tmp")
                shutil.rmtree(aside, ignore_errors=True)  # what an interrupted call left
                make(aside)
                os.replace(aside, folder)
    return folder


def empty_folder(folder) -> Path:
    """The folder to write a data set into, made where it is missing. FileExistsError where it holds anything."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: remove it to have the demo data made again")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def best_of(folder: Path) -> Path:
    """The checkpoint that a folder means: checkpoints/best where it is a run folder, else the folder itself."""
    best = folder / "checkpoints" / "best"
    recover(best)
    return best if best.is_dir() else folder


def newest_best(task: str, method: str) -> Path:
    """checkpoints/best of the newest run in outputs/ that trained a task's whole model ("full"), or a part of it ("lora").

    A part is an adapter by any PEFT method, or a head alone: eval_lora.py finds what train_lora.py left last. UserError
    where there is none.
    """
    root = project_root() / "outputs" / task
    bring_back(root)
    folders = [folder for folder in root.glob("[!.]*") if is_run(folder)]
    for folder in folders:
        recover(folder / "checkpoints" / "best")
    folders = [folder for folder in folders if (folder / "checkpoints" / "best").is_dir()]
    methods = {folder: read_record(folder).get("method") for folder in folders}
    for folder in folders:
        if methods[folder] is None:
            say(f"left out {folder}: its summary.json is missing, or nothing that a run has written")
    folders = [folder for folder in folders if methods[folder] and (methods[folder] == "full") == (method == "full")]
    if not folders:
        raise UserError(f"no {method} run in {root}: train first, or name a checkpoint with --checkpoint")
    return max((folder / "checkpoints" / "best" for folder in folders), key=lambda best: best.stat().st_mtime)


def check_data_dir(named: str, origin: dict) -> None:
    """UserError, before a model is loaded for it, where there is no such data. named: --data_dir; empty: that of the training."""
    place = Path(named or origin["data_dir"]).expanduser()  # the current folder, which is there, for the demo's data
    if not place.exists():
        why = "" if named else "; the checkpoint was trained on it: say with --data_dir where the data is now"
        raise UserError(f"--data_dir: there is no folder (or CSV file) {place}{why}")


def check_place(flag: str, folder: Path) -> None:
    """UserError, before any work is done for it, where a folder is not there and cannot be made, or cannot be written to."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{flag}: {there} is a file, and a folder is wanted there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: nothing may be written to the folder {there}; choose another")


def eval_places(config) -> tuple[Path, Path]:
    """(file of the numbers, folder of reports and pictures) for an evaluation: below --output_dir, or in the run's folder.

    UserError where nothing can be written there: called before the scoring, which may take hours.
    """
    checkpoint = Path(config.checkpoint).expanduser()
    run_folder = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    root = Path(config.output_dir).expanduser() if config.output_dir else run_folder
    folder = root / f"eval_{config.split}"
    make_writable(root)
    make_writable(folder)
    return root / ("eval.json" if config.split == "val" else f"eval_{config.split}.json"), folder


def predictions_folder(config, origin: dict) -> Path:
    """Where predictions go: --output_dir, or a new outputs/<task>/predictions/<method>/<number> for each call.

    origin: of the checkpoint, whose task and method they are. UserError where --output_dir holds those of another call, which
    would be overwritten, or stand among these.
    """
    if config.output_dir:
        folder = Path(config.output_dir).expanduser()
        make_writable(folder)
        if any(path for pattern in OF_PREDICTIONS for path in folder.glob(pattern)):
            raise UserError(f"--output_dir {folder} holds predictions already: name another, or leave it out for a new one")
        return folder
    root = project_root() / "outputs" / origin["task"] / "predictions" / origin["method"]
    make_writable(root)
    number = max((int(path.name) for path in root.iterdir() if path.name.isdecimal()), default=0) + 1
    while True:  # another call may have taken the number in this moment
        with suppress(FileExistsError):
            (root / str(number)).mkdir()
            return root / str(number)
        number += 1
