"""Run: the run folder, the place in the training, metrics.jsonl, best so far, and summary.json, also when a run fails.

The train script keeps its loop; Run does around it what is easily got subtly wrong: saving and resuming, stopping,
accumulation, the non-finite guard, best tracking and the record.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from common.batches import seed_everything, to_device
from common.checkpoint import folder_bytes, fsync, load_moving_state, load_state, moving_state, save_state, write_json
from common.config import UserError, write_yaml
from common.folders import open_run_folder
from common.optim import optimizer_step
from common.runtime import (
    Interrupted,
    StopSignals,
    environment,
    gather_lists,
    peak_memory,
    process_index,
    progress,
    say,
    start_accelerator,
)

# needs: tensorboard
SCHEMA_VERSION = 1
FIRST_STEPS = 10  # by then every parameter that trains must have had a gradient
LOG_EVERY = 10  # optimizer steps between two step lines in metrics.jsonl


class Run:
    """One training run. Use as a context manager; on leaving, summary.json says finished, failed or interrupted."""

    def __init__(self, config, task: str, method: str):
        self.config, self.task, self.method = config, task, method
        self.epoch, self.step, self.batches_done = 1, 0, 0  # epoch under way (from 1), optimizer steps, batches of the epoch
        # Means over all processes: of the batches of the step under way; [sum, count] over the epoch.
        self.losses, self.loss_sums = [], [0.0, 0]
        self.history: list[dict] = []  # one record an epoch, epoch 0 = before training
        self.best_record, self.best_name, self.higher_is_better, self.bad_epochs = None, None, True, 0
        self.clock = {"seconds": 0.0, "train_seconds": 0.0, "samples": 0}
        self.resumed_at: list[int] = []
        self.stop_wanted = 0  # the signal that some process got
        self.idle: set[str] | None = None  # parameters that train, but have had no gradient yet
        self.facts = {}
        self.models, self.optimizers, self.schedulers = [], [], []
        self.finished, self.ready, self.window, self.stepped, self.files_in_batch = False, False, 1, False, []

    # ---- opening and closing -------------------------------------------------------------------------------------

    def __enter__(self):
        self.accelerator = start_accelerator(self.config)
        self.rank, self.world = process_index()
        self.is_main = self.rank == 0
        self.device = self.accelerator.device
        self.started, self.last_tick = datetime.now(UTC), time.monotonic()
        self.lock = None
        self.folder = self.broadcast(self.open_folder)
        self.best = self.folder / "checkpoints" / "best"
        self.last = self.folder / "checkpoints" / "last"
        # A resume that is refused (other data, say) leaves the record of the run as it was.
        self.keeps_record = self.is_main and not (self.config.resume and (self.folder / "summary.json").exists())
        if self.is_main:
            write_yaml(dataclasses.replace(self.config, resume=False, overwrite=False), self.folder / "config.yaml")
        if self.keeps_record:
            self.write_summary("running")
        say(f"run folder {self.folder}")
        self.signals = StopSignals(wait_always=self.world > 1).__enter__()
        seed_everything(self.config.seed, "build")
        return self

    def __exit__(self, kind, error, _trace):
        self.signals.busy = True  # a second SIGTERM must not cut the last save short (a second Ctrl-C does)
        status = "finished" if self.finished else "failed"
        if kind in (Interrupted, KeyboardInterrupt):
            status = "interrupted"
        try:
            if status == "interrupted" and self.ready and not self.losses:  # between two steps: what is in memory is whole
                self.save()
        finally:
            if self.keeps_record:
                self.write_summary(status, f"{kind.__name__}: {error}" if kind else None)
            if self.is_main:
                self.lock.close()
            if hasattr(self, "board"):
                self.board.close()
            self.signals.__exit__()
        if self.world > 1:
            # A thread of gloo frees the last tensors that were sent, and needs Python's lock for it. With torch 2.11 the process
            # hangs if DDP, which waits for that thread, is freed first: 6 of 100 short runs did.
            time.sleep(0.2)
            if kind is None:
                self.accelerator.end_training()
        if status == "interrupted":
            say(f"stopped at step {self.step}; run the same command with --resume to go on")
            raise SystemExit(128 + getattr(error, "signum", 2)) from None

    def open_folder(self) -> Path:
        folder, self.lock = open_run_folder(self.config, self.task, self.method)
        return folder

    def broadcast(self, make):
        """The main process's value on every process; its UserError, too, ends all of them."""
        if self.world == 1:
            return make()
        import torch

        box = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        torch.distributed.broadcast_object_list(box, src=0)
        if box[1]:
            raise UserError(box[1])
        return box[0]

    def describe(self, **facts) -> None:
        """Puts facts into the summary: base={name, sha256}, data={...}, parameters={total, trainable}."""
        self.facts.update(facts)

    # ---- around the loop -----------------------------------------------------------------------------------------

    def prepare(self, *things):
        """Models, optimizers and schedulers for this device, precision and number of processes, in the order given.

        With --resume their state is that of the newest whole checkpoint afterwards.
        """
        import torch

        from common.lora import count_parameters

        ready = []
        for thing in things:
            if isinstance(thing, torch.nn.Module):
                thing = self.accelerator.prepare_model(thing)
                self.models.append(thing)
            elif isinstance(thing, torch.optim.Optimizer):
                thing = self.accelerator.prepare_optimizer(thing)
                self.optimizers.append(thing)
            else:
                self.schedulers.append(thing)
            ready.append(thing)
        counts = [count_parameters(model) for model in self.models]
        total, trains = (sum(c[key] for c in counts) for key in ("total", "trainable"))
        self.facts.setdefault("parameters", {"total": total, "trainable": trains})
        say(f"{trains:,} of {total:,} parameters train ({trains / total:.2%}), on {self.device}")
        if self.config.resume:
            self.restore()
            self.keeps_record = self.is_main
            if self.is_main:
                self.write_summary("running")
        self.ready = True
        return ready if len(ready) > 1 else ready[0]

    def unwrap(self, model):
        """The model itself, without what several processes wrap around it."""
        return self.accelerator.unwrap_model(model)

    def total_steps(self, loader) -> int:
        """Optimizer steps of the whole run, for the schedule."""
        steps = -(-len(loader.batch_sampler) // self.config.gradient_accumulation_steps)
        return self.config.epochs * min(steps, self.config.max_steps_per_epoch or steps)

    def epochs(self, before):
        """Yields the epochs that are left, from 1. before() gives the metrics of the untrained model, for the record.

        What the loop's body saved (the best model) is on disk when the checkpoint to resume from is written.
        """
        if not self.history:
            record = {"epoch": 0, "step": 0, **without_nan(before())}
            self.signals.busy = True
            self.history.append(record)
            self.log(record)
            say(f"before training: {self.in_words(record)}")
            self.save()
            self.signals.busy = False
            self.stop_if_asked()
        while self.epoch <= self.config.epochs and not self.out_of_patience():
            yield self.epoch
            self.epoch, self.batches_done, self.loss_sums = self.epoch + 1, 0, [0.0, 0]
            self.save()
            self.signals.busy = False
            self.stop_if_asked()
        if self.out_of_patience():
            say(f"stopped early: {self.bad_epochs} epochs without a better {self.best_name}")

    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.bad_epochs

    def batches(self, loader, epoch: int):
        """Yields the epoch's batches on the device, from where a stopped run left off; a progress bar shows loss and rate.

        gradient_accumulation_steps batches make one optimizer step (fewer at the epoch's end, and the loss is divided by
        as many as there are). max_steps_per_epoch counts optimizer steps. Saves and stops only between two steps.
        """
        config, accumulate = self.config, self.config.gradient_accumulation_steps
        plan = loader.batch_sampler.plan(epoch)
        if config.max_steps_per_epoch:
            plan = plan[: config.max_steps_per_epoch * accumulate]
        loader.batch_sampler.set_range(epoch, self.batches_done, len(plan))
        bar = progress(None, f"epoch {epoch}/{config.epochs}", total=len(plan), initial=self.batches_done)
        self.signals.busy, began = False, time.monotonic()
        batches = iter(loader)
        with bar:
            while self.batches_done < len(plan):
                number = self.batches_done  # of this batch in the epoch
                batch = to_device(next(batches), self.device)
                self.signals.busy = True
                place = number % accumulate
                self.window = min(accumulate, len(plan) - (number - place))
                self.last_of_window = place == self.window - 1
                for model in self.models:
                    model.require_backward_grad_sync = self.last_of_window  # DDP: sum gradients over processes once a step
                self.files_in_batch = [loader.dataset.name(index) for index in plan[number]]
                seed_everything(config.seed, epoch, number, self.rank)
                yield batch
                if self.last_of_window:
                    self.end_step(len(plan[number]) * self.window, began)
                    began = time.monotonic()
                    bar.set_postfix(loss=f"{self.loss_sums[0] / max(1, self.loss_sums[1]):.4f}")
                else:
                    self.batches_done += 1
                bar.update()

    def end_step(self, samples: int, began: float) -> None:
        if not self.stepped:
            raise RuntimeError("the loop's body ended without run.step(...)")
        self.batches_done += 1
        self.step += 1
        self.loss_sums = [self.loss_sums[0] + sum(self.losses), self.loss_sums[1] + len(self.losses)]
        if self.step % LOG_EVERY == 0 or self.step == 1:
            rates = [group["lr"] for group in self.optimizers[0].param_groups]
            self.log({"step": self.step, "loss": sum(self.losses) / len(self.losses), "lr": max(rates)})
        self.losses, self.stepped = [], False
        self.clock["train_seconds"] += time.monotonic() - began
        self.clock["samples"] += samples * self.world
        self.signals.busy = False
        self.stop_if_asked()
        if self.config.save_steps and self.step % self.config.save_steps == 0:
            self.save()

    def stop_if_asked(self) -> None:
        signum = self.stop_wanted or (self.world == 1 and self.signals.pending)
        if signum:
            raise Interrupted(signum)

    def backward(self, loss) -> None:
        """Backward pass of one batch's loss. UserError, before anything moved, when the loss is not finite.

        Every parameter that trains must have had a gradient within the first steps, else it would silently stay as it is.
        (Not in the very first: a batch without boxes, say, rightly gives none to what boxes teach.)
        """
        import torch

        state = torch.stack([loss.detach().float(), torch.tensor(float(self.signals.pending), device=self.device)])
        states = [state.cpu()]
        if self.world > 1:  # all processes leave together: one whose loss is fine must not wait for one that is gone
            every = [torch.empty_like(state) for _ in range(self.world)]
            torch.distributed.all_gather(every, state)
            states = [s.cpu() for s in every]
        self.stop_wanted = int(max(float(s[1]) for s in states))
        values = [float(s[0]) for s in states]
        if not all(map(math.isfinite, values)):
            files = gather_lists(self.files_in_batch)
            raise UserError(
                f"the loss is {', '.join(str(v) for v in values if not math.isfinite(v))} at step {self.step + 1}, epoch "
                f"{self.epoch}; the batch held {', '.join(files)}; nothing was changed by it, the last checkpoint is intact"
            )
        self.losses.append(sum(values) / len(values))
        self.accelerator.backward(loss / self.window)
        if self.idle is None or self.idle:
            parameters = [item for model in self.models for item in model.named_parameters()]
            idle = {name for name, p in parameters if p.requires_grad and p.grad is None}
            self.idle = idle if self.idle is None else self.idle & idle
            if self.step + 1 >= FIRST_STEPS:
                self.stop_if_idle()

    def stop_if_idle(self) -> None:
        if self.idle:
            names = ", ".join(sorted(self.idle)[:3])
            raise UserError(f"{len(self.idle)} trainable tensors got no gradient, so they would never learn: {names}")

    def step_optimizer(self, optimizer, scheduler) -> None:
        """Clip, step, schedule, zero; at the end of an accumulation window, else nothing."""
        if self.last_of_window:
            try:
                optimizer_step(self.accelerator, optimizer, scheduler, self.config.max_grad_norm)
            except UserError as error:
                raise UserError(f"step {self.step + 1}: {error}; the batch held {', '.join(self.files_in_batch)}") from None
            self.stepped = True

    def end_epoch(self, metrics: dict, best: str, higher_is_better: bool = True) -> bool:
        """Records an epoch's validation metrics. True on the process that should now save the model as the best so far."""
        loss = self.loss_sums[0] / max(1, self.loss_sums[1])
        metrics = without_nan(metrics)
        record = {"epoch": self.epoch, "step": self.step, "train_loss": loss, **metrics}
        self.stop_if_idle()
        self.signals.busy = True  # until the checkpoint that knows of this record is written
        self.history.append(record)
        self.log(record)
        self.best_name, self.higher_is_better = best, higher_is_better
        new, old = metrics[best], self.best_record and self.best_record[best]
        if new is None or old is None:  # a metric that does not exist is worse than any that does
            is_best = self.best_record is None or (new is not None and old is None)
        elif math.isclose(new, old, rel_tol=1e-9):  # on few samples accuracies often tie; the loss then says which was surer
            losses = [record.get("val_loss") for record in (metrics, self.best_record)]
            is_best = None not in losses and losses[0] < losses[1]
        else:
            is_best = new > old if higher_is_better else new < old
        if is_best:
            self.best_record, self.bad_epochs = record, 0
        else:
            self.bad_epochs += 1
        say(f"epoch {self.epoch}/{self.config.epochs}: {self.in_words(record)}{'  (best)' if is_best else ''}")
        return is_best and self.is_main

    def finish(self) -> None:
        """Draws curves.png and marks the run as finished; summary.json is written when the `with` block ends."""
        if self.is_main:
            from common.plots import draw_curves

            steps = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
            draw_curves(steps, self.best_name, self.best_record, self.resumed_at, self.folder / "curves.png")
            best = self.best_record[self.best_name]
            say(f"best {self.best_name} {'null' if best is None else f'{best:.4f}'} in epoch {self.best_record['epoch']}")
            say(f"saved {self.best} ({folder_bytes(self.best) / 1e6:.2f} MB), curves.png and summary.json beside it")
        self.finished = True

    # ---- saving and the record -----------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint to resume from: everything that moves, and the length of metrics.jsonl."""
        self.tick()
        if not self.is_main:
            return
        state = {
            "models": [moving_state(self.accelerator.unwrap_model(model)) for model in self.models],
            "optimizers": [optimizer.optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }
        log = self.folder / "metrics.jsonl"
        if log.exists():
            fsync(log)
        progress_ = {
            "step": self.step,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "loss_sums": self.loss_sums,
            "history": self.history,
            "best": self.best_record,
            "best_name": self.best_name,
            "higher_is_better": self.higher_is_better,
            "bad_epochs": self.bad_epochs,
            "clock": self.clock,
            "resumed_at": self.resumed_at,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "base": self.facts.get("base"),
            "data": self.facts.get("data"),
            "processes": self.world,
        }
        save_state(self.last, state, progress_)

    def restore(self) -> None:
        """Loads the newest whole checkpoint into what was prepared, if there is one, and cuts metrics.jsonl to its length."""
        found = self.broadcast(lambda: load_state(self.last) and True)  # the main process renames what is damaged
        found = found and load_state(self.last)
        log = self.folder / "metrics.jsonl"
        if found is None:
            if self.is_main:
                log.unlink(missing_ok=True)
            say("no checkpoint was saved yet: starting at step 0")
            return
        state, saved = found
        for what in ("base", "data"):
            then, now = (saved[what] or {}).get("sha256"), (self.facts.get(what) or {}).get("sha256")
            if then != now:
                raise UserError(f"--resume: the {what} is not the one that this run started with (sha256 {then} then, {now} now)")
        if saved["processes"] != self.world:
            raise UserError(f"--resume: the run was started with {saved['processes']} processes and has {self.world} now")
        for model, tensors in zip(self.models, state["models"], strict=True):
            load_moving_state(self.accelerator.unwrap_model(model), tensors)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.optimizer.load_state_dict(values)
        for scheduler, values in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.batches_done = saved["step"], saved["epoch"], saved["batches_done"]
        self.loss_sums, self.history, self.best_record = saved["loss_sums"], saved["history"], saved["best"]
        self.best_name, self.higher_is_better = saved["best_name"], saved["higher_is_better"]
        self.bad_epochs = saved["bad_epochs"]
        self.clock, self.resumed_at = saved["clock"], [*saved["resumed_at"], self.step]
        self.idle = set() if self.step >= FIRST_STEPS else None
        self.last_tick = time.monotonic()
        if self.is_main and log.exists():
            os.truncate(log, min(saved["log_bytes"], log.stat().st_size))
        say(f"resumed at step {self.step}, epoch {self.epoch}, {self.batches_done} batches into it")

    def log(self, record: dict) -> None:
        """Appends a line to metrics.jsonl and the same numbers to TensorBoard's file."""
        if not self.is_main:
            return
        log, records = self.folder / "metrics.jsonl", [record]
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if not hasattr(self, "board"):
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard's files lack what a kill cut off and know what a resume takes back: written anew, as metrics.jsonl is.
            shutil.rmtree(self.folder / "tb", ignore_errors=True)
            self.board = SummaryWriter(str(self.folder / "tb"))
            records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        for record in records:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, record["step"])

    def tick(self) -> None:
        now = time.monotonic()
        self.clock["seconds"] += now - self.last_tick
        self.last_tick = now

    @staticmethod
    def in_words(record: dict) -> str:
        numbers = [f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float)]
        return ", ".join(numbers[:5])  # the rest is in metrics.jsonl

    def write_summary(self, status: str, error: str | None = None) -> None:
        self.tick()
        clock, name = self.clock, self.best_name
        write_json(
            self.folder / "summary.json",
            {
                "schema_version": SCHEMA_VERSION,
                "task": self.task,
                "method": self.method,
                "run_name": self.folder.name,
                "status": status,
                "error": error,
                "started": self.started.isoformat(timespec="seconds"),
                "ended": None if status == "running" else datetime.now(UTC).isoformat(timespec="seconds"),
                "resumed_at_steps": self.resumed_at,
                "config": dataclasses.asdict(self.config),
                **{key: self.facts.get(key) for key in ("base", "data", "parameters")},
                "metrics": {
                    "name": name,
                    "higher_is_better": self.higher_is_better,
                    "before": without_place(self.history[0]) if self.history else None,
                    "best": self.best_record,
                    "final": without_place(self.history[-1]) if len(self.history) > 1 else None,
                },
                "epochs": len(self.history) - 1 if self.history else 0,
                "steps": self.step,
                "seconds": round(clock["seconds"], 2),
                "train_seconds": round(clock["train_seconds"], 2),
                "samples_per_second": round(clock["samples"] / clock["train_seconds"], 2) if clock["train_seconds"] else None,
                "peak_memory_bytes": peak_memory(self.device),
                "checkpoint_bytes": folder_bytes(self.best) if self.best.exists() else None,
                "environment": environment(self.device, self.world),
            },
        )


def without_nan(metrics: dict) -> dict:
    """The metrics with null for NaN and infinity, which JSON does not know; they are named."""
    odd = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if odd:
        say(f"not a finite number, so recorded as null: {', '.join(odd)}")
    return {
        name: without_nan(value) if isinstance(value, dict) else None if name in odd else value for name, value in metrics.items()
    }


def without_place(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("epoch", "step")}
