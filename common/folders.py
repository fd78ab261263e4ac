"""The run folder: outputs/<task>/<name>/, never overwritten by accident, locked while a run is in it."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import get_type_hints

from common.checkpoint import read_json, recover
from common.config import UserError, project_root, read_yaml
from common.runtime import say

# Settings that may differ when a run is taken up again: they do not change the weights (threads may, in the last bit).
FREE_ON_RESUME = {"resume", "overwrite", "device", "num_workers", "threads", "save_steps", "cache", "output_dir", "run_name"}


def open_run_folder(config, task: str, method: str):
    """(folder, its lock) for a run: the named one, the next free name, or with --resume the newest of them.

    UserError where it is in use, was started with other settings (--resume), or holds files that no run has left there.
    """
    root = (Path(config.output_dir).expanduser() if config.output_dir else project_root() / "outputs") / task
    name = config.run_name or method
    if Path(name).name != name or name == "..":
        raise UserError(f"--run_name {name!r} must be a plain folder name")
    numbered = [root / name, *(root / f"{name}_{i}" for i in range(2, 1000))]
    taken = [path for path in numbered if has_results(path)]
    folder = next(path for path in numbered if path not in taken)
    if config.resume and taken:
        folder = taken[-1]
    elif config.resume:
        print(f"nothing to resume in {root / name}: starting at step 0")
    elif config.overwrite:
        folder = root / name
    elif folder != root / name:
        print(f"{root / name} holds a run already (--resume goes on, --overwrite replaces it): using {folder.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}; choose another --output_dir") from None
    contents = {path.name for path in folder.iterdir()}
    if "summary.json" not in contents and contents - {".lock", "config.yaml", ".config.yaml.tmp", ".summary.json.tmp"}:
        raise UserError(f"{folder} holds files, but no run (there is no summary.json): not touched; use another --run_name")
    lock = lock_folder(folder)
    if config.resume and (folder / "config.yaml").exists():
        check_same_settings(config, folder)
    elif not config.resume:
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder, lock


def check_same_settings(config, folder: Path) -> None:
    """UserError where a setting that the weights depend on is not what it was when the run in `folder` started."""
    then = read_yaml(folder / "config.yaml", get_type_hints(type(config)))
    if config.lr_head > config.lr:
        then.setdefault("lr_head", config.lr)  # before there was one, new heads learnt at lr
    for key, value in dataclasses.asdict(config).items():
        if key not in FREE_ON_RESUME and then.get(key, value) != value:
            raise UserError(
                f"--resume: {key} is {value!r} now and was {then[key]!r} when {folder.name} started; give the same settings, "
                f"or leave --resume out to start another run"
            )


def has_results(folder: Path) -> bool:
    """Whether a run folder holds anything worth keeping: a checkpoint, or a run that ended well."""
    if not folder.exists():
        return False
    saved = any((folder / "checkpoints").glob("*/*")) if (folder / "checkpoints").exists() else False
    summary = folder / "summary.json"
    return saved or (summary.exists() and read_json(summary).get("status") == "finished")


def lock_folder(folder: Path):
    """An open file that holds the folder's lock until it is closed or the process ends, however it ends."""
    file = open(folder / ".lock", "w")
    try:
        import fcntl

        # lockf, not flock: data workers would inherit that one and hold it for seconds after the run was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock
        pass
    except OSError:
        raise UserError(f"another process is training in {folder}; give this run a --run_name of its own") from None
    return file


def make_once(folder: Path, make) -> Path:
    """The folder, made by make(folder) if it is not there yet; of several processes that need it at once, one makes it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
            try:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX)  # waits for whoever is at it
            except ImportError:  # Windows: no lock
                pass
            if not folder.exists():
                print(f"drawing the demo data into {folder}", flush=True)
                aside = folder.with_name(f".{folder.name}.tmp")
                shutil.rmtree(aside, ignore_errors=True)  # what an interrupted call left
                make(aside)
                os.replace(aside, folder)
    return folder


def newest_best(task: str, method: str) -> Path:
    """checkpoints/best of the newest run in outputs/ that trained a task's whole model ("full"), or a part of it ("lora").

    A part is an adapter by any PEFT method, or a head alone: eval_lora.py finds what train_lora.py left last. UserError
    where there is none.
    """
    root = project_root() / "outputs" / task
    for summary in root.glob("*/summary.json"):
        recover(summary.parent / "checkpoints" / "best")
    folders = [path.parent for path in root.glob("*/summary.json") if (path.parent / "checkpoints" / "best").is_dir()]
    whole = {folder: read_json(folder / "summary.json").get("method") == "full" for folder in folders}
    folders = [folder for folder in folders if whole[folder] == (method == "full")]
    if not folders:
        raise UserError(f"no {method} run in {root}: train first, or name a checkpoint with --checkpoint")
    newest = max(folders, key=lambda folder: (folder / "checkpoints" / "best").stat().st_mtime)
    say(f"checkpoint: {newest / 'checkpoints' / 'best'}")
    return newest / "checkpoints" / "best"


def eval_places(config) -> tuple[Path, Path]:
    """(file of the numbers, folder of reports and pictures) for an evaluation: below --output_dir, or in the run's folder."""
    checkpoint = Path(config.checkpoint).expanduser()
    run_folder = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    root = Path(config.output_dir).expanduser() if config.output_dir else run_folder
    folder = root / f"eval_{config.split}"
    folder.mkdir(parents=True, exist_ok=True)
    return root / ("eval.json" if config.split == "val" else f"eval_{config.split}.json"), folder


def predictions_folder(config, origin: dict) -> Path:
    """Where predictions go: --output_dir, or outputs/<task>/predictions/<method> of the checkpoint with this origin."""
    own = project_root() / "outputs" / origin["task"] / "predictions" / origin["method"]
    folder = Path(config.output_dir).expanduser() if config.output_dir else own
    folder.mkdir(parents=True, exist_ok=True)
    return folder
