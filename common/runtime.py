"""Device, precision and processes; what is printed; what the machine gives; signals that stop a run."""

import importlib
import io
import os
import platform
import signal
import sys
import threading
import warnings
from contextlib import contextmanager, redirect_stdout, suppress

from common.config import VERSION, UserError, one_line

EVERY = 30  # seconds between two lines of progress, where there is no terminal


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, raised where nothing is half done. Not an Exception, so that no handler for faults eats it."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


@contextmanager
def time_limit(seconds: float, message: str):
    """UserError(message) where the block takes longer; for pure Python and its regular expressions, which look at signals.

    Without limit where that cannot be: outside of the main thread, and on Windows.
    """

    def stop(*_):
        raise UserError(message)

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def start_accelerator(config):
    """The accelerate object that knows this process's device, precision and siblings (torchrun starts those)."""
    import torch
    from accelerate import Accelerator

    if config.threads > 0:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or install a CUDA build of torch")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device cpu")
    on_cpu = config.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if config.precision == "fp16" and on_cpu:
        raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 (bf16 works too, and is often slower)")
    if on_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "1"  # without it accelerate looks for a GPU backend between processes
    mixed = {"fp32": "no"}.get(config.precision, config.precision)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed)
    # One answer on one machine: convolution algorithms are not chosen by a race. CUDA sums may still differ in order.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return accelerator


def choose_device(name: str) -> str:
    """The device itself, or for "auto" a GPU where there is one."""
    import torch

    if str(name) != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def compile_for_training(model, device) -> None:
    """torch.compile, in place: the model's class and the names of its tensors stay as they are. It is used inside `compiled`.

    UserError where torch.compile does not work (no C++ compiler, no Triton, a Python that torch does not know yet), or the model
    has a reason against it, `no_compile`.
    """
    import torch

    if reason := getattr(model, "no_compile", ""):
        raise UserError(f"--compile is not for this task: {reason}")
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # of the compiler, of its backend, of the linker
        fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--compile: torch.compile does not work here; is there a C++ compiler? ({fault[:150]})") from None
    model.compile()
    torch.compiler.set_stance("force_eager")


def compiled():
    """Inside, models that were compiled run so. Elsewhere, as in evaluation, whose shapes differ, they would compile again."""
    import torch

    return torch.compiler.set_stance("default")


def process_index() -> tuple[int, int]:
    """(this process, number of processes)."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def say(text: str) -> None:
    """Prints on the main process only."""
    if process_index()[0] == 0:
        print(text, flush=True)


@contextmanager
def guard(what: str, notes: list[str] | None = None):
    """What comes after the work may not cost it: an error inside the block is said in one line, and whoever is outside goes on.

    what: what the block makes, "the plots". notes: takes that line, too. A Ctrl-C or SIGTERM ends the block as ever.
    """
    try:
        yield
    except Exception as error:  # running out of memory is one, too
        reason = " ".join(str(error).split())[:300]
        note = f"{what} could not be made: {reason if isinstance(error, UserError) else f'{type(error).__name__}: {reason}'}"
        say(note)
        if notes is not None:
            notes.append(note)


@contextmanager
def quiet():
    """Inside, nothing is printed: where a checkpoint is loaded, what is news at the start of a training is none."""
    with redirect_stdout(io.StringIO()):
        yield


def from_main(make):
    """What make() gives on the main process, on every process; its UserError, too, ends all of them."""
    import torch

    rank, world = process_index()
    if world == 1:
        return make()
    answer = [None, None]  # value, message of the error
    if rank == 0:
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = str(error)
    torch.distributed.broadcast_object_list(answer, src=0)
    value, message = answer
    if message:
        raise UserError(message)
    return value


def gather_lists(items: list) -> list:
    """The lists of all processes, one after the other, on every process."""
    import torch

    if process_index()[1] == 1:
        return items
    parts = [None] * process_index()[1]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def progress_bar(iterable, text: str, total: int | None = None, plain: str = "{desc}: {n_fmt} of {total_fmt}, {remaining} left"):
    """tqdm's progress bar on the main process, gone when it is done.

    Without a terminal (nohup, a batch system) a plain line every half minute instead, by tqdm's bar_format `plain`.
    """
    from tqdm import tqdm

    options = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        options = {"file": PlainLines(), "bar_format": plain, "delay": EVERY, "mininterval": EVERY, "maxinterval": EVERY}
        options["miniters"] = 1
    return tqdm(iterable, desc=text, total=total, leave=False, disable=process_index()[0] > 0, **options)


class PlainLines:
    """A file for tqdm: what it would write over its last line becomes a line of its own; blanks and returns are no text."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        pass


def in_time(seconds: float) -> str:
    """A time for people: "48 s", "12 min", "3 h 05 min"."""
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )


def counted(count: int, what: str) -> str:
    """A count with its word: "1 picture", "12 boxes"."""
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith(("s", "x", "sh", "tch")) else "s")


def cores() -> int:
    """Cores that this process may use; those of the machine are shared by the processes of a run."""
    many = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, many // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def peak_memory(device) -> dict:
    """{"cpu", "gpu"}: the most bytes that this process has held so far; gpu is None without a CUDA device."""
    import torch

    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
        cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    except ImportError:  # Windows
        import psutil

        cpu = psutil.Process().memory_info().peak_wset
    return {"cpu": cpu, "gpu": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}


def import_fault(module: str, pip: str = "") -> str:
    """Why a package that few need cannot be imported, to go on after "needs"; "" where it can. pip: what installs it.

    Tried, not looked up: one that is there may lack another, or its library may not fit this machine.
    """
    package = module.partition(".")[0]
    name = package.replace("_", "-")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises
        missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if missing in (module, package):
            return f"{name}, which is not installed: pip install {pip or name}"
        if missing and missing.partition(".")[0] != package:  # else it lacks a part of its own
            lacking = '"setuptools<81"' if missing == "pkg_resources" else missing.partition(".")[0]
            return f"{name}, and that {missing}, which is not installed: pip install {lacking}"
        fault = f"{type(error).__name__}: {one_line(error)[:150]}"
        return f"{name}, which is broken here ({fault}): pip install --force-reinstall {pip or name}"
    return ""


def versions_of(*packages: str) -> dict[str, str | None]:
    """Package -> its version; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = dict.fromkeys(packages)
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def environment(device, processes: int) -> dict:
    """What a run ran on, for its summary: versions of the project, Python and the libraries (None: not installed), the device."""
    import torch

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "lora_workshop": VERSION,
        "python": platform.python_version(),
        **versions_of("torch", "transformers", "peft"),
        "platform": platform.platform(),
        "device": name,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


class StopSignals:
    """SIGTERM and Ctrl-C, turned into a clean stop.

    In a training step (`busy`) the signal waits for the step's end; elsewhere it is raised at once as Interrupted. With
    several processes it always waits, for all must leave at the same step. A second Ctrl-C leaves without saving.
    """

    def __init__(self, wait_always: bool):
        self.busy, self.pending, self.wait_always, self.old = False, 0, wait_always, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for signum in (signal.SIGTERM, signal.SIGINT):
                self.old[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self.old.items():
            signal.signal(signum, handler)

    def handle(self, signum, _frame):
        """The handler of both signals."""
        if self.pending and signum == signal.SIGINT:
            os._exit(130)
        first, self.pending = not self.pending, self.pending or signum
        if first and (self.busy or self.wait_always):
            # Not print, which may itself be what the signal interrupted.
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again leaves at once\n")
        elif first:
            raise Interrupted(signum)
