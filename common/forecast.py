"""What a run will take, told from its first steps: seconds, memory, disk. A dry run ends there; others are held against it."""

import time
from contextlib import contextmanager

from common.batches import seeded
from common.resuming import state_of_run
from common.runtime import from_main, in_time, peak_memory, say

COUNTED = 10  # steps after the first one, which makes optimizer states and chooses algorithms; fewer of a short epoch
AT_MOST = 20.0  # seconds that a dry run counts steps, and that its validation takes, about
UNTIMED = 4  # batches of validation before the timed ones
PAPERS = 3_000  # bytes of a checkpoint beside its tensors: model card, origin, preprocessing
OVERHEAD = 130  # bytes that a file spends on a tensor's name, shape and place
DRAWING = 4.0  # seconds of plots and pictures at a run's end, beside one more validation


class Enough(BaseException):
    """A dry run has seen what it wanted. Not an Exception, so that no handler for faults eats it."""


def timed(function) -> tuple:
    """(what function() gives, its seconds)."""
    began = time.monotonic()
    value = function()
    return value, time.monotonic() - began


def tensor_bytes(things) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if hasattr(things, "element_size"):
        return things.numel() * things.element_size()
    if isinstance(things, dict):
        things = list(things.values())
    return sum(map(tensor_bytes, things)) if isinstance(things, (list, tuple)) else 0


def shown_bytes(size: float) -> str:
    """Bytes for people: "0.24 MB", "12.60 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


@contextmanager
def some_batches(loader, many: int):
    """Inside, a loader of batches.EvalBatches yields so many of its batches, evenly spaced."""
    sampler, batches = loader.batch_sampler, loader.batch_sampler.batches
    sampler.batches = [batches[i * len(batches) // many] for i in range(many)]
    try:
        yield
    finally:
        sampler.batches = batches


class Forecast:
    """Times of a run's first parts, and what they say of the whole run."""

    def __init__(self, config):
        self.config = config
        self.steps: list[tuple[float, float]] = []  # (seconds of a step, of these waiting for its batches)
        self.waited = 0.0  # for batches of the step under way
        self.total = 0  # optimizer steps of the whole run
        self.validation = None  # seconds of one; None: not seen, as in a run that goes on, of which nothing is foretold
        self.saving = 0.0  # seconds of one save
        self.extra = 0.0  # seconds that only a dry run takes

    # ---- measuring -------------------------------------------------------------------------------------------------

    def validate(self, evaluate, loader) -> dict:
        """evaluate(), timed, after a few batches that are not: they pay for what libraries do once.

        What reading files for the first time adds is told by fetching those few twice, and taken off: later validations find
        them in memory. A dry run times no more than fits into AT_MOST seconds, when its files have been read.
        """
        if not hasattr(loader, "batch_sampler"):
            metrics, self.validation = timed(evaluate)
            return metrics
        began, batches, part = time.monotonic(), len(loader.batch_sampler), len(loader.batch_sampler)
        few, reading = min(UNTIMED, batches), 0.0
        with some_batches(loader, few):
            if loader.num_workers == 0:
                next(iter(loader))  # what is paid for once
                (_, first), (_, again) = timed(lambda: [None for _ in loader]), timed(lambda: [None for _ in loader])
                reading = max(0.0, first - again) / max(1, few - 1) * (batches - few)
            _, seconds = timed(evaluate)
        if self.config.dry_run:
            part = from_main(lambda: max(1, min(batches, int(few * AT_MOST / seconds))))
        with some_batches(loader, part):
            if self.config.dry_run:
                evaluate()
                reading = 0.0
            metrics, seconds = timed(evaluate)
        self.validation = max(seconds - reading, 0.0) * batches / part
        if self.config.dry_run:
            self.extra = time.monotonic() - began - self.validation
        return metrics

    @contextmanager
    def waiting(self):
        """Around what fetches a batch."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def count(self, seconds: float) -> None:
        """A step has ended, and took so long."""
        self.steps.append((seconds, self.waited))
        self.waited = 0.0

    def is_due(self, epoch_ends: bool) -> bool:
        """Whether enough steps have been seen; the same in all processes."""
        counted = len(self.steps) - 1
        if self.validation is None or counted < min(1, self.total - 1):
            return False
        long = self.config.dry_run and sum(seconds for seconds, _ in self.steps[1:]) > AT_MOST
        return from_main(lambda: epoch_ends or counted >= COUNTED or long)

    # ---- foretelling -----------------------------------------------------------------------------------------------

    def foretell(self, run, loader, epoch: int) -> dict:
        """What the run, of which enough steps of this epoch were seen, will take: `predicted` of summary.json.

        A dry run prints it, as a table of one row: those of two scripts can stand one below the other.
        """
        run.record.tick(run.progress)
        peak, sizes = peak_memory(run.device), checkpoint_bytes(run)
        predicted = {
            "seconds": round(self.seconds(run.progress.clock["seconds"] - self.extra, loader, epoch), 2),
            "peak_memory_bytes": peak["gpu"] or peak["cpu"],
            "checkpoint_bytes": sizes["best"],
        }
        if self.config.dry_run:
            self.report(run, predicted, sizes["last"])
        return predicted

    def seconds(self, clock: float, loader, epoch: int) -> float:
        """Of the whole run. clock: until now.

        A first epoch reads files. How long later ones wait for their batches is found out by fetching the same ones again.
        """
        config, counted = self.config, self.steps[1:] or self.steps
        step, wait = (sum(times) / len(counted) for times in zip(*counted, strict=True))
        again = wait
        if epoch == 1 < config.epochs and getattr(loader, "num_workers", 1) == 0:
            loader.batch_sampler.set_range(epoch, 0, len(self.steps) * config.gradient_accumulation_steps)
            with seeded("forecast"):
                again = timed(lambda: [None for _ in loader])[1] / len(self.steps)
        first = self.total // config.epochs if epoch == 1 else len(self.steps)  # steps at the present speed
        left = (first - len(self.steps)) * step + (self.total - first) * (step - wait + again)
        ends = config.epochs + 1 - epoch
        return clock + left + ends * (self.validation + self.saving) + self.validation + DRAWING

    def report(self, run, predicted: dict, last: int) -> None:
        """The table of a dry run, below what it is made of."""
        counted = self.steps[1:] or self.steps
        step = sum(seconds for seconds, _ in counted) / len(counted)
        place = "GPU" if run.device.type == "cuda" else "process"
        say(
            f"dry run: {self.total} steps of {step:.3f} s (by {len(counted)} after the first), {self.config.epochs + 2} "
            f"validations of {self.validation:.1f} s. Nothing was kept; time is of all epochs, memory of this {place}"
        )
        cells = {
            "method": run.method,
            "trains": f"{run.described['parameters']['trainable']:,}",
            "time": in_time(predicted["seconds"]),
            "peak memory": shown_bytes(predicted["peak_memory_bytes"]),
            "checkpoint": shown_bytes(predicted["checkpoint_bytes"]),
            "to resume": f"2 x {shown_bytes(last)}",
        }
        widths = [max(map(len, pair)) for pair in cells.items()]
        for row in (cells.keys(), cells.values()):
            say("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def checkpoint_bytes(run) -> dict[str, int]:
    """{"best": of the checkpoint that a user loads, "last": of one to resume from, of which two are kept}."""
    kept = run.bare_models[0]  # others, such as a discriminator, are in the checkpoint to resume from alone
    trains = [p for p in kept.parameters() if p.requires_grad]
    tensors = kept.state_dict() if run.method == "full" else trains
    return {"best": tensor_bytes(tensors) + len(tensors) * OVERHEAD + PAPERS, "last": tensor_bytes(state_of_run(run)) + PAPERS}


def compared(predicted: dict, seconds: float, peak: int, checkpoint: int) -> str:
    """What was predicted beside what it took, in words. predicted: as in summary.json."""

    def told(seconds, peak, checkpoint):
        return f"{in_time(seconds)}, {shown_bytes(peak)} of memory, a checkpoint of {shown_bytes(checkpoint)}"

    return f"predicted {told(*predicted.values())}; took {told(seconds, peak, checkpoint)}"
