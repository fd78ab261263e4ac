"""Batches whose order and augmentation are functions of (seed, epoch, index) alone: seeds, samplers, loaders."""

import hashlib
import random
import signal
from contextlib import contextmanager

from common.config import UserError
from common.runtime import process_index


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
    # The bits of torch.manual_seed(number), which for every kind of device that is absent puts a stack trace by, each time.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


@contextmanager
def seeded(*key):
    """torch's CPU generator as a function of the key inside the block, as it was after it. For augmentation."""
    import torch

    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(number_from(*key))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


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

    def order(self, epoch: int) -> list[int]:
        """The sample indices of an epoch, one global batch after the other."""
        import numpy as np

        return np.random.default_rng(number_from(self.seed, epoch, "order")).permutation(self.length).tolist()

    def plan(self, epoch: int) -> list[list[int]]:
        """The sample indices of every batch of this process in an epoch."""
        order, size = self.order(epoch), self.batch_size
        firsts = [step * size * self.world + self.rank * size for step in range(len(self))]
        return [order[first : first + size] for first in firsts]

    def __iter__(self):
        for batch in self.plan(self.epoch)[self.start : self.stop]:
            yield [(self.epoch, index) for index in batch]


class LengthBatches(EpochBatches):
    """EpochBatches whose samples are about equally long in each batch, so that little of it is padding.

    lengths: of the samples, in any unit. The epoch's permutation is sorted by length in pools of POOL global batches, and the
    batches are shuffled: which samples share one differs from epoch to epoch, and short ones come no sooner than long ones.
    """

    POOL = 16

    def __init__(self, lengths: list[int], batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(len(lengths), batch_size, seed, rank, world)
        self.lengths = lengths

    def order(self, epoch: int) -> list[int]:
        """As EpochBatches has it, but for what fills no whole batch, and with like lengths side by side."""
        size = self.batch_size * self.world
        order = super().order(epoch)[: len(self) * size]  # what fills no batch stays out, long or short
        pools = [order[first : first + self.POOL * size] for first in range(0, len(order), self.POOL * size)]
        order = [index for pool in pools for index in sorted(pool, key=self.lengths.__getitem__)]
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        random.Random(number_from(self.seed, epoch, "batches")).shuffle(batches)
        return [index for batch in batches for index in batch]


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
    """A DataLoader whose workers leave Ctrl-C and SIGTERM to the main process and stay alive between epochs.

    No more workers than batches: each takes a second to start, and memory.
    """
    import torch

    num_workers = min(num_workers, len(batch_sampler))
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=quiet_worker,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def eval_loader(dataset, collate, batch_size: int, num_workers: int = 0, shapes: list | None = None):
    """A loader of evaluation, this process's share of it. shapes: keys for EvalBatches; None: any samples may share a batch."""
    return build_loader(dataset, EvalBatches(shapes or [0] * len(dataset), batch_size, *process_index()), collate, num_workers)


def whole_batches(dataset, collate, batch_size: int, shapes: list | None = None):
    """Yields all of a data set on this process alone, in batches: a loader has its share only. shapes: keys for EvalBatches."""
    for keys in EvalBatches(shapes or [0] * len(dataset), batch_size):
        yield collate([dataset[key] for key in keys])


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
