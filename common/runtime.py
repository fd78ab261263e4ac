"""Seed, device, precision and processes; batches whose order and augmentation depend on (seed, epoch, index) alone."""

import hashlib
import os
import platform
import random
import signal
import sys
import threading
from contextlib import contextmanager

from common.config import UserError


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, raised where nothing is half done. Not an Exception, so that no handler for faults eats it."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


def start_accelerator(config):
    """The accelerate object that knows this process's device, precision and siblings (torchrun starts those)."""
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

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
    # A part of a model may have nothing to do in one process's batch (no box to denoise): the others must not wait for it.
    idle_parts = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[idle_parts])
    # One answer on one machine: convolution algorithms are not chosen by a race. CUDA sums may still differ in order.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return accelerator


def number_from(*key) -> int:
    """A 63-bit number that is a function of the key, such as (seed, epoch, index), and looks random."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def seed_everything(*key) -> None:
    """Sets Python's, numpy's and torch's generators (all devices) from the key.

    Called before every step with (seed, epoch, batch, process), so that dropout and the like are a function of the place
    in the training and not of its history: a resumed run needs no saved generator state to go on with the same bits.
    """
    import numpy as np
    import torch

    number = number_from(*key)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


@contextmanager
def seeded(*key):
    """torch's CPU generator as a function of the key inside the block, as it was after it. For augmentation."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number_from(*key))
        yield


class EpochBatches:
    """Batch sampler of training: yields lists of (epoch, index) for this process.

    An epoch is a permutation of the samples that depends on (seed, epoch), cut into global batches of batch_size x world;
    process r takes the r-th part of each, so that n processes with a batch of b see what one sees with n * b. The last,
    short global batch is left out, unless it is the only one.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if length == 0:
            raise UserError("there is no training sample left to train on")
        if length < world * batch_size and world > 1:
            raise UserError(f"{length} training samples do not fill one batch of {batch_size} in each of {world} processes")
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch, self.start, self.stop = 1, 0, None

    def set_range(self, epoch: int, start: int, stop: int) -> None:
        """What the next iteration yields: batches start..stop of this epoch."""
        self.epoch, self.start, self.stop = epoch, start, stop

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world))

    def plan(self, epoch: int) -> list[list[int]]:
        """The sample indices of every batch of this process in an epoch."""
        import numpy as np

        order = np.random.default_rng(number_from(self.seed, epoch, "order")).permutation(self.length).tolist()
        size = self.batch_size
        firsts = [step * size * self.world + self.rank * size for step in range(len(self))]
        return [order[first : first + size] for first in firsts]

    def __iter__(self):
        for batch in self.plan(self.epoch)[self.start : self.stop]:
            yield [(self.epoch, index) for index in batch]


class EvalBatches:
    """Batch sampler of evaluation: every sample, divided among processes; only samples of equal `keys` share a batch.

    The key is the shape of the sample as the model sees it: then nothing is padded, and no metric depends on batch size.
    All processes get equally many batches (a model may talk to its siblings in a forward pass), so a few come twice.
    """

    def __init__(self, keys: list, batch_size: int, rank: int = 0, world: int = 1):
        groups = {}
        for index, key in enumerate(keys):
            groups.setdefault(key, []).append(index)
        batches = [g[i : i + batch_size] for g in groups.values() for i in range(0, len(g), batch_size)]
        self.batches = [batches[i % len(batches)] for i in range(rank, -(-len(batches) // world) * world, world)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            yield [(0, index) for index in batch]


def build_loader(dataset, batch_sampler, collate, num_workers: int = 0):
    """A DataLoader whose workers leave Ctrl-C and SIGTERM to the main process and stay alive between epochs."""
    import torch

    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=quiet_worker,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def quiet_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the whole group (torchrun, batch systems) is answered by the run, which saves; a second one ends the worker.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def to_device(batch, device):
    """Tensors of a nested dict / list / tuple on the device; other values as they are."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


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


def gather_lists(items: list) -> list:
    """The lists of all processes, one after the other, on every process."""
    import torch

    if process_index()[1] == 1:
        return items
    parts = [None] * process_index()[1]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def progress(iterable, text: str, total: int | None = None, **options):
    """A progress bar on the main process, gone when it is done; where nobody watches (no terminal) none at all."""
    from tqdm import tqdm

    quiet = process_index()[0] > 0 or not sys.stderr.isatty()
    return tqdm(iterable, desc=text, total=total, leave=False, disable=quiet, dynamic_ncols=True, **options)


def peak_memory(device) -> dict:
    import torch

    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
        cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    except ImportError:  # Windows
        import psutil

        cpu = psutil.Process().memory_info().peak_wset
    return {"cpu": cpu, "gpu": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}


def environment(device, processes: int) -> dict:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for package in ("torch", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "python": platform.python_version(),
        **versions,
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
        if self.pending and signum == signal.SIGINT:
            os._exit(130)
        first, self.pending = not self.pending, self.pending or signum
        if first and (self.busy or self.wait_always):
            # Not print, which may itself be what the signal interrupted.
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again leaves at once\n")
        elif first:
            raise Interrupted(signum)
