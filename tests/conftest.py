"""What several test files share: the path to the code, and scripts run as a user runs them.

from conftest import ROOT, run_script
"""

import faulthandler
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tqdm import tqdm

# needs: pytest-xdist

ROOT = Path(__file__).resolve().parents[1]
CLASSIFICATION = ROOT / "image_tasks" / "classification"
DETECTION = ROOT / "image_tasks" / "detection"
POSE = ROOT / "image_tasks" / "pose"
CLIP = ROOT / "fine_tuning"
VOICE = ROOT / "voice_rvc"
MEDICAL = ROOT / "medical_sam3d"
FOLDERS = (CLASSIFICATION, DETECTION, POSE, CLIP, VOICE, MEDICAL)

sys.path.insert(0, str(ROOT))
# For this process and the ones it starts, before torch is imported: one thread, no network.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def use_task(folder: Path) -> None:
    """Makes `from data import ...` mean this task's data.py, for the imports of a test file and for those that its code makes.

    Tasks name their modules alike, and pytest runs all test files in one process. A test file says `TASK = CLASSIFICATION`
    and calls this before it imports from the task; the fixture below calls it again before the file's tests run.
    """
    for name, module in list(sys.modules.items()):
        place = Path(getattr(module, "__file__", None) or "").parent
        if place in FOLDERS:
            SHELVED[place][name] = sys.modules.pop(name)
    sys.modules.update(SHELVED[folder])
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path) not in FOLDERS)]


SHELVED = {folder: {} for folder in FOLDERS}  # the imported modules of the tasks that are not in use, by their names


def check_picture_inputs(predict, folder: Path) -> None:
    """That predict(picture) answers alike for a file, its PIL image and its array, and refuses in one line what is no picture."""
    import numpy as np
    import torch
    from PIL import Image

    from common.config import UserError
    from common.vision.pictures import decode

    noise, exif = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(noise).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(noise).convert("P").save(folder / "palette.png")
    Image.fromarray(noise).convert("CMYK").save(folder / "cmyk.tif")
    for path in (folder / name for name in ("turned.jpg", "deep.png", "palette.png", "cmyk.tif")):
        expected = predict(path)
        assert predict(Image.open(path)) == expected == predict(decode(path)[:, :, ::-1].copy()[:, :, ::-1])
    assert predict(folder / "turned.jpg") != predict(Image.fromarray(decode(folder / "turned.jpg")).rotate(90, expand=True))
    for thing in (b"", [[1]], torch.zeros(3, 9, 9), noise / 255, noise[:, :, 0], noise[:0], np.full((9, 9, 3), np.nan), None):
        with pytest.raises(UserError, match="is no picture; expected") as caught:
            predict(thing)
        assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """Scans go to a folder of the session's own, also those of the scripts that tests start; what numba compiled is kept."""
    os.environ["LORA_WORKSHOP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".pytest_cache" / "numba"))


@pytest.fixture(autouse=True, scope="module")
def task_of_this_file(request):
    if hasattr(request.module, "TASK"):
        use_task(request.module.TASK)


class Payload:
    """Pickled, it makes a folder when it is loaded: a file that runs code."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def show(text) -> str:
    """The last part of a process's output; a process that was killed for its time leaves bytes, or nothing."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return text[-6000:]


def run_script(folder, script, *args, expect: int | None = 0, env: dict | None = None, timeout: float = 240):
    """Runs a script as a user does, from its own folder; the completed process, with its output as text.

    expect: the exit code it must end with (None: any); anything else fails the test and shows the output.
    """
    command = [sys.executable, str(script), *map(str, args)]
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as slow:
        raise AssertionError(f"{command} took over {timeout} s\n{show(slow.stdout)}\n{show(slow.stderr)}") from None
    if expect is not None and done.returncode != expect:
        raise AssertionError(
            f"{command} ended with {done.returncode}, not {expect}\n--- stdout\n{show(done.stdout)}\n--- stderr\n"
            f"{show(done.stderr)}"
        )
    return done


def metrics_of(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what the clock and the machine say."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "peak_memory_bytes")} for line in lines]


class Child:
    """A forked copy of this process that calls function(*args), with its output in a file (errors in err, if given).

    A fork has all imports of this process, so it starts in milliseconds; it may patch, exhaust and crash what it likes.
    """

    def __init__(self, function, *args, log: Path, err: Path | None = None, limit: int = 120):
        self.log, self.err = Path(log), Path(err or log)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            gc.freeze()  # a collection would touch a million objects of the parent's, and copy the pages that they lie on
            code = 99
            try:
                sys.stdout = sys.stderr = open(self.log, "w", buffering=1)
                if err:
                    sys.stderr = open(self.err, "w", buffering=1)
                os.dup2(sys.stdout.fileno(), 1)
                os.dup2(sys.stderr.fileno(), 2)
                # tqdm's lock is a semaphore that all forks share: one killed while it holds it would stop every later one.
                tqdm.set_lock(threading.RLock())
                faulthandler.dump_traceback_later(limit, exit=True)  # one that hangs says where, and dies of it
                function(*args)
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def kill(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def wait(self) -> int:
        """What it exits with; 99 after an exception, -N after signal N."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_for(self, condition, seconds: float = 60) -> None:
        """Returns as soon as condition() holds; fails when the child ends before, or takes too long."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.running(), f"ended before it was expected to: {self.text}"
            assert time.monotonic() < until, f"not within {seconds} s: {self.text}"
            time.sleep(0.005)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def in_child(function, *args, log: Path) -> tuple[int, str]:
    """(exit code, output) of function(*args) in a forked copy of this process."""
    child = Child(function, *args, log=log)
    return child.wait(), child.text


def of_project() -> list[str]:
    """Names of the imported modules whose files are the project's."""
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    return [name for name, file in files.items() if file.startswith(f"{ROOT}{os.sep}")]


class Script(Child):
    """A script in a forked copy of this process: as `python script.py ...` in its folder, without the seconds of imports.

    cwd: another folder to start it in. draw: False leaves a pixel where each of matplotlib's pictures would be, because drawing
    takes longer than all else that a small run does; a function is called instead of matplotlib's savefig.
    rank: (its number, port) as one of two processes.
    """

    def __init__(self, folder: Path, script: str, args, log: Path, cwd: Path | None = None, draw=True, rank=None):
        import_for_scripts()

        def run():
            from accelerate.state import AcceleratorState
            from matplotlib.figure import Figure

            AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have made one
            if rank:
                os.environ.update(rank_environment(*rank))
            if draw is not True:
                Figure.savefig = draw or (lambda _, path, **options: Image.new("L", (1, 1)).save(path))
            enter(folder)
            os.chdir(cwd or folder)
            sys.argv = [script, *map(str, args)]
            runpy.run_path(str(folder / script), run_name="__main__")
            if not folder.is_relative_to(ROOT):
                assert not of_project(), of_project()

        super().__init__(run, log=log.with_suffix(".out"), err=log.with_suffix(".err"), limit=200)

    def wait(self, expect=0):
        code, out, err = super().wait(), self.log.read_text(), self.err.read_text()
        assert code == expect, f"ended with {code}, not {expect}\n{out[-3000:]}\n{err[-3000:]}"
        return SimpleNamespace(stdout=out, stderr=err, code=code)


def enter(folder: Path) -> None:
    """For a forked process: modules are imported anew, from this folder as if it held the script that runs."""
    for name in [*of_project(), "common"]:
        sys.modules.pop(name, None)
    sys.path[:] = [str(folder), *(p for p in sys.path if not p.startswith(str(ROOT)))]


def rank_environment(rank: int, port: int) -> dict:
    """What torchrun tells its workers, for one of two."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return {name: str(value) for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def import_for_scripts() -> None:
    """What the tasks' scripts import on their way, so that forks need not (that takes many seconds in a fresh process)."""
    import_all()
    names = ["peft", "pycocotools.cocoeval", "scipy.optimize", "sklearn.metrics", "torchvision.transforms.v2"]
    for name in [*names, "transformers.loss.loss_for_object_detection"]:
        importlib.import_module(name)
    from transformers import (  # noqa: F401
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForObjectDetection,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPModel,
        CLIPVisionModelWithProjection,
        DetrForObjectDetection,
        DetrImageProcessor,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        ViTForImageClassification,
        ViTImageProcessor,
        ViTModel,
    )


def import_all() -> None:
    """Imports what a training run imports on its way, so that forked children need not."""
    for name in ("accelerate", "safetensors.torch", "torch.utils.data", "torch.utils.tensorboard", "torch._dynamo"):
        importlib.import_module(name)  # torch imports the last one when it makes an optimizer
    for name in ("matplotlib.pyplot", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)


def start_toy(folder: Path, *flags, script="toy_train", env: dict | None = None, group=False, curves=False, hook=None) -> Child:
    """toy_train.py (or toy_gan.py) with these flags and its run folder in folder/toy, in a forked process.

    group: in a process group of its own. curves: with curves.png, which takes longer than the training. hook: is called there
    before, and may patch what it likes.
    """
    import_all()
    from accelerate.state import AcceleratorState

    main = importlib.import_module(script).main

    from common import plots
    from common.config import cli

    def call():
        os.environ.update(env or {})
        if group:
            os.setpgid(0, 0)
        AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have made one
        if not curves:
            plots.draw_curves = lambda *_: None
        if hook:
            hook()
        cli(main, ["--output_dir", str(folder), *map(str, flags)])

    folder.mkdir(parents=True, exist_ok=True)
    return Child(call, log=folder / f"log-{time.monotonic_ns()}.txt")


def run_toy(folder: Path, *flags, expect: int = 0, **options) -> str:
    """start_toy, waited for; its output. Any other exit code than the expected one fails the test."""
    child = start_toy(folder, *flags, **options)
    code = child.wait()
    assert code == expect, f"{flags} ended with {code}, not {expect}\n{child.text}"
    return child.text
