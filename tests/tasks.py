"""The tasks, a row each, and a small run of each that many tests look at. A new task joins the contract
(test_tasks.py, test_tasks_answers.py) with its row here.

What a row says is what a user sees: folders, flags, files, numbers in them. Only `build` knows the task's modules; it is
called in a forked process in which the task's folder is on the path.
"""

import atexit
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLASSIFICATION, CLIP, DETECTION, MEDICAL, POSE, ROOT, VOICE, Child, Script, enter
from PIL import Image


def classifier(base, best):
    from model import load_base, with_classes

    return with_classes(load_base(base)[0], read(best / "origin.json")["classes"])


def keypoint_model(base, best):
    from keypoints import KeypointSet
    from model import input_size, load_base, with_head

    base = load_base(base)[0]
    return with_head(base, KeypointSet.from_json(read(best / "keypoints.json")), "heatmap", input_size(base, 0))


def clip_classifier(base, best):
    from model import load_base, with_head

    return with_head(load_base(base)[0], read(best / "origin.json")["classes"], base, "zero_shot", "{label}")


def pictures(data, folder):
    """A user's folder: three pictures of different shapes, a broken one, and a file that is none. Returns (good, broken)."""
    good = {"one.png": (96, 96), "three.png": (150, 80), "two.jpg": (60, 120)}
    for source, (name, size) in zip(sorted((data / "val").rglob("*.png")), good.items(), strict=False):
        Image.open(source).resize(size).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more than a beginning")
    (folder / "notes.txt").write_text("not a picture")
    return list(good), "broken.jpg"


def recordings(data, folder):
    """A user's folder: three recordings of different lengths and formats, a broken one, and a file that is none."""
    import soundfile

    good = {"one.wav": 1.0, "three.flac": 0.7, "two.ogg": 0.4}
    for source, (name, seconds) in zip(sorted((data / "val").rglob("*.wav")), good.items(), strict=False):
        wave, rate = soundfile.read(source)
        soundfile.write(folder / name, wave[: int(seconds * rate)], rate)
    (folder / "broken.wav").write_bytes(b"RIFF no more than a beginning")
    (folder / "notes.txt").write_text("not a recording")
    return list(good), "broken.wav"


def masks(data, folder):
    """A user's folder: three masks of one organ, packed or not, a broken one, and a file that is none."""
    import nibabel

    good = {"one.nii.gz": "kidney_left", "three.nii": "liver", "two.nii.gz": "spleen"}
    for name, organ in good.items():
        nibabel.save(nibabel.load(min(data.rglob(f"{organ}.nii.gz"))), folder / name)
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b no more than a beginning")
    (folder / "notes.txt").write_text("not a mask")
    return list(good), "broken.nii.gz"


def shares(rows, _):
    return {row["file_name"]: {a["class"]: a["probability"] for a in row["predictions"]} for row in rows}


def boxes(rows, _):
    found = {}
    for row in sorted(rows, key=lambda row: -row["score"]):
        found.setdefault(row["file_name"], []).append([row["score"], row["category_id"], *row["bbox"]])
    return found


def points(rows, _):
    return {row["file_name"]: row["keypoints"] for row in rows}


def sounds(rows, folder):
    import soundfile

    return {row["file_name"]: soundfile.read(folder / row["output"])[0][::20].tolist() for row in rows}


def meshes(rows, folder):
    """Volume and size of each mesh, in mm: what a vertex more changes little."""
    import trimesh

    found = {}
    for row in rows:
        mesh = trimesh.load(folder / row["outputs"]["ply"])
        found[Path(row["file_name"]).name] = [row["mesh_ml"], *mesh.extents.tolist()]
    return found


@dataclass(frozen=True, eq=False)
class Task:
    name: str  # outputs/<name>/
    folder: Path
    metric: str  # what chooses the best epoch
    train: int  # make_demo_data(train=, val=, test=), as few as make some batches of four
    val: int
    test: int
    build: Callable | None  # (base, checkpoint) -> the model that plain PEFT loads the adapter on; None: it has layers of our own
    answers: Callable  # (content of predictions.json, its folder) -> {file name: what infer says of it}
    inputs: Callable = pictures  # (data, folder) writes files for infer -> (names of the good ones, name of the broken one)
    higher_is_better: bool = True
    groups: int = 1  # make_demo_data makes so many samples for each one asked for: a class each
    flags: tuple = ()  # for the small runs: all that is random and the same for any number of processes
    lora_flags: tuple = ()  # these for train_lora.py alone
    exact_in_two: bool = True  # False: a process draws noise of its own (RT-DETR's denoising), so two are one only in the mean
    rounding: float = 1e-5  # by which losses of two processes may differ from those of one, as a share; metrics by ten times that
    by_batch: tuple = ()  # metrics that depend on what is in a batch together
    infer_flags: tuple = ()  # with which infer says all that it knows
    sample: str = ".png"  # how the files of samples end
    samples: str = ""  # the folder of them in what make_demo_data makes
    training: str = "train"  # the folder in it that has training samples alone
    teaches: str = ""  # name of the loss that teaches the model, where there are several
    new_head: bool = False  # the demo's data wants layers with new weights
    frozen: bool = False  # train.py, too, leaves a part of the model as it is
    processor: str = "preprocessor_config.json"  # file of a checkpoint that says how the model wants its input
    code_blocks: int = 2  # in the model card: with the libraries alone, and with this project
    left: tuple = ()  # files of a run, beside those of every task
    left_by_eval: tuple = ()  # in eval_val/
    left_by_infer: tuple = ()  # beside predictions.json
    in_full: tuple = ()  # files of a full checkpoint and of an adapter, beside those of every task
    in_adapter: tuple = ()

    def __str__(self):
        return self.name


CLASS_PLOTS = ("samples.json", "plots/confusion_matrix.png")
ROWS = (
    Task(
        "classification",
        CLASSIFICATION,
        "balanced_accuracy",
        train=2,
        val=1,
        test=1,
        groups=8,
        build=classifier,
        answers=shares,
        new_head=True,
        flags=("--crop", 0.6, "--randaugment", 5, "--mixup", 0.4, "--class_weights", "balanced"),
        infer_flags=("--top_k", 99),
        left=(*CLASS_PLOTS, "plots/f1_per_class.png"),
        left_by_eval=("confusion_matrix.png", "f1_per_class.png", "calibration.png", "mistakes.png")
        + ("report.txt", "report.json", "samples.json"),
        left_by_infer=("predictions.csv",),
    ),
    Task(
        "detection",
        DETECTION,
        "map",
        train=12,
        val=6,
        test=2,
        build=classifier,
        answers=boxes,
        new_head=True,
        exact_in_two=False,
        by_batch=("val_loss",),
        infer_flags=("--threshold", 0),
        left=("samples.json", *(f"plots/{name}.png" for name in ("precision_recall", "confidence", "per_class"))),
        left_by_eval=("samples.json", "predictions.png", "worst.png", "precision_recall.png", "confidence.png", "per_class.png"),
        left_by_infer=("predictions.csv", "0001_one.jpg", "0002_three.jpg", "0003_two.jpg"),
    ),
    Task(
        "pose",
        POSE,
        "pixel_error",
        train=12,
        val=6,
        test=2,
        higher_is_better=False,
        build=keypoint_model,
        answers=points,
        code_blocks=1,
        left=("samples.json", *(f"plots/{name}.png" for name in ("pck_curve", "errors", "per_keypoint"))),
        left_by_eval=("samples.json", "predictions.png", "worst.png", "pck_curve.png", "errors.png", "per_keypoint.png"),
        left_by_infer=("predictions.csv", "0002_one.jpg", "0003_three.jpg", "0004_two.jpg"),
        in_full=("keypoint_head.safetensors", "keypoints.json"),
        in_adapter=("keypoints.json",),
    ),
    Task(
        "clip",
        CLIP,
        "balanced_accuracy",
        train=2,
        val=1,
        test=1,
        groups=8,
        build=clip_classifier,
        answers=shares,
        flags=("--randaugment", 5, "--mixup", 0.4),
        lora_flags=("--lora_dropout", 0),
        infer_flags=("--top_k", 99),
        left=(*CLASS_PLOTS, "plots/class_performance.png"),
        left_by_eval=("confusion_matrix.png", "class_performance.png", "calibration.png", "mistakes.png")
        + ("evaluation_report.txt", "evaluation_results.json", "samples.json"),
        left_by_infer=("predictions.txt",),
        in_full=("classifier.safetensors",),
    ),
    Task(
        "voice_rvc",
        VOICE,
        "mcd",
        train=12,
        val=3,
        test=2,
        higher_is_better=False,
        build=None,
        answers=sounds,
        inputs=recordings,
        flags=("--gan",),
        rounding=1e-3,  # after six of Adam's first steps, which are as long where a gradient is hardly more than rounding
        sample=".wav",
        samples="target",
        teaches="gen",
        new_head=True,
        processor="voice.json",
        code_blocks=1,
        left=("samples.json", "voice.index", "plots/f0.png"),
        left_by_eval=("samples.json", "page.html", "sounds", "f0.png", "scores.png", "spectrograms.png"),
        left_by_infer=("0002_one.wav", "0003_three.wav", "0004_two.wav"),
        in_full=("config.json",),
    ),
    Task(
        "medical_sam3d",
        MEDICAL,
        "dice",
        train=12,
        val=3,
        test=2,
        build=None,
        answers=meshes,
        inputs=masks,
        flags=("--crop", 100),
        rounding=1e-4,
        sample="left.nii.gz",
        samples="target",
        training="s0001",
        frozen=True,
        processor="processor.json",
        code_blocks=1,
        left=("samples.json",),
        left_by_eval=("samples.json", "report.md", "results.csv", "scores.png", "planes.png", "page.html"),
        left_by_infer=("one", "three", "two", "one.nii.gz", "three.nii.gz", "two.nii.gz")
        + ("one.png", "three.png", "two.png", "volumes.csv"),
        in_full=("config.json",),
    ),
)
TASKS = {task.name: task for task in ROWS}
# What tests are run with: all tasks, a classifier and a detector of them not slow; of what is the same code in all, one fast.
EACH = [pytest.param(task, marks=pytest.mark.slow if task not in ROWS[:2] else ()) for task in ROWS]
one_fast = pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow if task is not ROWS[0] else ()) for task in ROWS], ids=str
)


def every_task(name: str, all_by, first_by):
    """Parametrizes "task" and `name`: all tasks with the value all_by, the first, which alone is not slow, with first_by, too."""
    pairs = [pytest.param(task, all_by, marks=pytest.mark.slow if task is not ROWS[0] else ()) for task in ROWS]
    return pytest.mark.parametrize(f"task, {name}", [*pairs, pytest.param(ROWS[0], first_by)], ids=str)


# ---- small runs ------------------------------------------------------------------------------------------------------

LR_HEAD = 0.02  # more than any demo's lr
SETTINGS = ("--epochs", 2, "--max_steps_per_epoch", 3, "--batch_size", 4, "--warmup_steps", 2, "--lr_head", LR_HEAD)
SETTINGS += ("--device", "cpu", "--threads", 1)
STEPS, EPOCHS = 6, 2
SCRIPT = {"full": "train.py", "lora": "train_lora.py"}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
both = pytest.mark.parametrize("method", ["full", "lora"])


@cache
def scratch() -> Path:
    """A folder for what several test files share, gone when the tests end. (Forks leave without asking atexit.)"""
    folder = Path(tempfile.mkdtemp(prefix="tasks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def start(task, script, *args, folder=None, **options) -> Script:
    """A script of the task in a fork. args: flags as a user types them; options: as of Script."""
    return Script(folder or task.folder, script, args, scratch() / f"log-{time.monotonic_ns()}", **{"draw": False} | options)


def call(task, script, *args, expect=0, **options):
    """The script, waited for: .stdout, .stderr. Any other exit code than the expected one fails the test."""
    return start(task, script, *args, **options).wait(expect)


def in_task(task, function, *args) -> str:
    """function(*args) in a fork in which the modules of the task can be imported; what it printed.

    The function starts no fork of its own (no trained(), no call()): the watchdog of a fork's fork can hang.
    """

    def run():
        enter(task.folder)
        sys.path.append(str(ROOT))
        function(*args)

    child = Child(run, log=scratch() / f"log-{time.monotonic_ns()}.out")
    code, text = child.wait(), child.text
    assert code == 0, text
    return text


@cache
def small_data(task) -> Path:
    """A few samples in the task's real format, and beside them base/, the small base under a path of its own."""
    folder = scratch() / task.name

    def make():
        from synthetic import make_demo_data

        make_demo_data(folder / "data", train=task.train, val=task.val, test=task.test)

    in_task(task, make)
    return folder / "data" / task.samples


@cache
def trained(task, method):
    """A run of two epochs and six steps: .folder, .best (the checkpoint), .summary, .said (.stdout and .stderr)."""
    data = small_data(task)
    flags = [*SETTINGS, *task.flags, *(task.lora_flags if method == "lora" else ())]
    return run_of(
        task, method, scratch() / task.name / "runs", "--data_dir", data, "--model", "demo", *flags, draw=method == "full"
    )


@cache
def demo(task, method):
    """The demo as without arguments, cut short: .folder, .best, .summary, .said."""
    return run_of(task, method, scratch() / "demo", "--epochs", 1, "--max_steps_per_epoch", 2)


def run_of(task, method, output_dir, *flags, draw=False):
    said = call(task, SCRIPT[method], "--output_dir", output_dir, *flags, draw=draw)
    folder = output_dir / task.name / method
    return SimpleNamespace(folder=folder, best=folder / "checkpoints" / "best", summary=read(folder / "summary.json"), said=said)


def read(path):
    return json.loads(path.read_text())


def recorded(summary) -> dict:
    """The metrics of the best epoch, without what says where in the training that was."""
    best = summary["metrics"]["best"]
    return without(best, ("epoch", "step", *(name for name in best if name.startswith("train_loss"))))


def without(metrics, names) -> dict:
    return {name: value for name, value in metrics.items() if name not in names}


def is_drawn(path) -> bool:
    return np.ptp(np.asarray(Image.open(path).convert("L"))) > 100


def digests(folder) -> dict:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def one_line(done) -> str:
    """The one line that a user error is."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def tensors(output):
    """All tensors in what a model returns."""
    from torch import Tensor

    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def same_numbers(found, expected, tolerance=1e-6, where="") -> None:
    """Fails where two trees of dicts, lists and numbers differ by more than rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same_numbers(found[key], expected[key], tolerance, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            same_numbers(*pair, tolerance, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance), where
    else:
        assert found == expected, where
