"""Run: one training run, from opening its folder to its last checkpoint: stepping, stopping, saving.

The train script keeps its loop; Run does around it what is easily got subtly wrong. What it writes down is record.py's,
where the training stands is checkpoint.Progress, one optimizer step with its check for NaN is step.py's, and how a run that
was stopped goes on is resuming.py's.
"""

import dataclasses
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.averaging import WeightAverage
from common.batches import seed_everything, to_device
from common.checkpoint import Progress, folder_bytes, save_state
from common.config import UserError, write_yaml
from common.folders import ONCE, discard, forget_replaced, open_run_folder
from common.forecast import Enough, Forecast, compared, timed
from common.hub import check_hub, push
from common.optim import clip_gradients, take_step
from common.out_of_memory import advice, is_out_of_memory
from common.record import Record, in_words, key_of, without_nan
from common.resuming import go_on_from, state_of_run
from common.runtime import (
    Interrupted,
    StopSignals,
    compile_for_training,
    compiled,
    counted,
    from_main,
    gather_lists,
    guard,
    in_time,
    peak_memory,
    process_index,
    progress_bar,
    say,
    start_accelerator,
)
from common.samples import Faults
from common.step import FIRST_STEPS, Step, check_all_used, check_nothing_left, check_own_loss, check_stepped, trained_parameters

LOG_EVERY = 10  # optimizer steps between two step lines in metrics.jsonl, or fewer: a run has at least
STEP_LINES = 50  # such lines, or one for each step, so that its curves are true


class Run:
    """One training run. Use as a context manager; on leaving, summary.json says finished, failed or interrupted.

    Two models that train against each other (the same with one optimizer, or with three):

        for batch in run.batches(loader, epoch):
            fake = gen(batch["z"])
            run.backward(disc_loss(disc(batch["x"]), disc(fake.detach())), name="disc")
            run.step_optimizer(opt_d, sched_d, max_grad_norm=1.0)
            with run.frozen(disc) as critic:  # the loss of gen leaves no gradient in disc
                parts = gen_losses(critic(fake), fake, batch)
            run.backward(sum(parts.values()), name="gen", **parts)
            run.step_optimizer(opt_g, sched_g, max_grad_norm=1000.0)

    With accumulation, disc steps in the last batch of a window, so what gen learns from that batch comes from the new disc,
    and from the others of the window from the old one.

    A schedule by epoch: give step_optimizer no scheduler, and call scheduler.step() after run.end_epoch, from where on until
    the checkpoint is written nothing interrupts. With --ema_decay the first model has its averaged weights from the last batch
    of an epoch until the checkpoint to resume from is written: they are what is evaluated, and saved as the best.
    """

    def __init__(self, config, task: str, method: str):
        self.config, self.task, self.method = config, task, method
        self.progress = Progress()
        self.described: dict = {}  # for the summary: base, data, parameters
        self.notes: list[str] = []  # for the summary: what went wrong after the training, and did not cost it
        # Known once the run is open.
        self.accelerator = self.device = self.signals = self.record = self.lock = None
        self.rank, self.world, self.is_main = 0, 1, True
        self.folder = self.best = self.last = Path()
        # What was prepared; companions have a state to save, and are neither model nor optimizer.
        self.models, self.optimizers, self.companions = [], [], []
        self.bare_models: list = []  # without what several processes wrap around them; to unwrap one walks all its modules
        self.find_unused = False
        self.under_way: Step | None = None  # the optimizer step, between its first batch and its end
        self.log_every = LOG_EVERY
        self.stop_wanted = 0  # the signal that some process got
        self.forecast = Forecast(config)
        self.average: WeightAverage | None = None  # with --ema_decay: of the first model
        self.scratch = None  # the folder that a dry run takes away again
        self.ready = self.finished = False
        self.is_new = True  # False: goes on with a run that was stopped

    @property
    def history(self) -> list[dict]:
        """One record an epoch, the first of them of before the training."""
        return self.progress.history

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.progress.step

    # ---- opening and closing -------------------------------------------------------------------------------------

    def __enter__(self):
        self.accelerator = start_accelerator(self.config)
        self.rank, self.world = process_index()
        self.is_main = self.rank == 0
        self.device = self.accelerator.device
        if self.config.push_to_hub:
            from_main(lambda: check_hub(self.config.push_to_hub))
        self.folder = from_main(self.open_folder)
        self.best = self.folder / "checkpoints" / "best"
        self.last = self.folder / "checkpoints" / "last"
        # A resume that is refused (other data, say) leaves the record of the run as it was, and another start no folder.
        self.is_new = not (self.config.resume and (self.folder / "config.yaml").exists())
        named = {"task": self.task, "method": self.method}
        self.record = Record(self.folder, named, self.config, self.device, self.world, self.is_main)
        if self.is_new:
            self.write_start()
        self.signals = StopSignals(wait_always=False).__enter__()
        seed_everything(self.config.seed, "build")
        return self

    def __exit__(self, kind, error, _trace):
        self.signals.busy = True  # a second SIGTERM must not cut the last save short (a second Ctrl-C does)
        status = "finished" if self.finished or kind is Enough else "failed"
        if kind in (Interrupted, KeyboardInterrupt):
            status = "interrupted"
        fault = None
        if self.ready and is_out_of_memory(error):
            kind, fault = UserError, UserError(advice(self.config, self.device))
        try:
            if status == "interrupted" and self.ready and self.under_way is None:  # what is in memory is whole
                self.save()
        finally:
            said = f"{kind.__name__}: {fault or error}" if kind and status != "finished" else None
            if self.ready or self.is_new:
                self.record.write_summary(self.progress, {**self.described, "notes": self.notes}, status, said)
            self.record.close()
            if self.is_main and self.is_new and not self.ready and status == "failed":
                discard(self.folder, self.lock)
            elif self.is_main:
                self.lock.close()
            self.signals.__exit__()
            if self.scratch:
                self.scratch.cleanup()
            if self.config.compile:
                compiled()  # from here on, for whoever goes on in this process
        if self.world > 1:
            # A thread of gloo frees the last tensors that were sent, and needs Python's lock for it. With torch 2.11 the process
            # hangs if DDP, which waits for that thread, is freed first: 6 of 100 short runs did.
            time.sleep(0.2)
            if kind in (None, Enough):
                self.accelerator.end_training()
        if status == "interrupted":
            if not self.config.dry_run:
                say(f"stopped at step {self.step}; run the same command with --resume to go on")
            raise SystemExit(128 + getattr(error, "signum", 2)) from None
        if fault:
            raise fault from error
        return kind is Enough

    def open_folder(self) -> Path:
        """The run folder, locked; of a dry run one that goes with it."""
        config = self.config
        if config.dry_run:
            self.scratch = TemporaryDirectory(prefix="dry-run-")
            config = dataclasses.replace(config, output_dir=self.scratch.name)
        folder, self.lock = open_run_folder(config, self.task, self.method)
        return folder

    def write_start(self) -> None:
        """config.yaml, and a summary.json that says that the run is under way."""
        if self.is_main:
            once = {f.name: f.default for f in dataclasses.fields(self.config) if f.name in ONCE}
            write_yaml(dataclasses.replace(self.config, **once), self.folder / "config.yaml")
        self.record.write_summary(self.progress, self.described, "running")

    def describe(self, **parts) -> None:
        """For the summary: base={name, sha256}, data={...}, parameters={total, trainable}."""
        self.described.update(parts)

    # ---- around the loop -----------------------------------------------------------------------------------------

    def prepare(self, *things, find_unused: bool = False):
        """Models, optimizers and schedulers for this device, precision and number of processes, in the order given.

        With --resume their state is that of the newest whole checkpoint afterwards. Anything else with state_dict and
        load_state_dict may come along, to be saved and resumed (an AveragedModel moves to the device, and stays one's own).
        find_unused: whether some batch may give some parameter that trains no gradient, as one without boxes to denoise does.
        Several processes then look, after every forward pass, which ones those are; without it such a batch is an error.
        """
        import torch
        from accelerate import DistributedDataParallelKwargs

        self.find_unused = find_unused
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
        ready = []
        for thing in things:
            if isinstance(thing, torch.optim.swa_utils.AveragedModel):
                self.companions.append(thing.to(self.device))
            elif isinstance(thing, torch.nn.Module):
                if self.config.compile:
                    compile_for_training(thing, self.device)
                thing = self.accelerator.prepare_model(thing)
                self.models.append(thing)
                self.bare_models.append(self.unwrap(thing))
            elif isinstance(thing, torch.optim.Optimizer):
                thing = self.accelerator.prepare_optimizer(thing)
                self.optimizers.append(thing)
            else:
                self.companions.append(thing)
            ready.append(thing)
        if self.config.ema_decay:
            self.average = WeightAverage(self.bare_models[0], self.config.ema_decay)
            self.companions.append(self.average)
        self.say_start()
        if self.config.resume:
            go_on_from(self.last, self)
            self.record.go_on(self.progress)
            self.write_start()
        if self.is_main:
            forget_replaced(self.folder)
        self.ready = True
        self.signals.wait_always = self.world > 1  # until now there was nothing to save together
        return ready if len(ready) > 1 else ready[0]

    def say_start(self) -> None:
        """How much trains, where, and which folder the run leaves; not earlier, since a start that is refused leaves none."""
        from common.lora import count_parameters

        counts = [count_parameters(model) for model in self.models]
        total, trains = (sum(c[key] for c in counts) for key in ("total", "trainable"))
        parameters = self.described.setdefault("parameters", {"total": total, "trainable": trains})
        share = parameters["trainable"] / parameters["total"]
        say(f"{parameters['trainable']:,} of {parameters['total']:,} parameters train ({share:.2%}), on {self.device}")
        if not self.config.dry_run:
            say(f"run folder {self.folder}")

    def unwrap(self, model):
        """The model itself, without what several processes wrap around it."""
        return self.accelerator.unwrap_model(model)

    @contextmanager
    def frozen(self, model):
        """Yields the model, unwrapped, as one that passes gradients through and takes none: a critic.

        Not by way of DistributedDataParallel, which would wait for gradients of this forward pass that never come.
        Afterwards what trained before trains again; the backward pass may come later, its graph does not hold the model.
        """
        bare = self.unwrap(model)
        trains = [p for p in bare.parameters() if p.requires_grad]
        try:
            for p in trains:
                p.requires_grad_(False)
            yield bare
        finally:
            for p in trains:
                p.requires_grad_(True)

    def total_steps(self, loader) -> int:
        """Optimizer steps of the whole run, for the schedule."""
        steps = -(-len(loader.batch_sampler) // self.config.gradient_accumulation_steps)
        total = self.forecast.total = self.config.epochs * min(steps, self.config.max_steps_per_epoch or steps)
        self.log_every = max(1, min(LOG_EVERY, total // STEP_LINES))
        return total

    def epochs(self, val_loader=None, *, before):
        """Yields the epochs that are left, from 1. before() gives the metrics of the untrained model, for the record.

        val_loader: what before() goes over, of which a dry run may take a part.
        What the loop's body saved (the best model) is on disk when the checkpoint to resume from is written.
        """
        progress = self.progress
        if not progress.history:
            record = {"epoch": 0, "step": 0, **without_nan(self.forecast.validate(before, val_loader))}
            self.signals.busy = True
            progress.history.append(record)
            self.record.add(record)
            say(f"before training: {in_words(record)}")
            _, self.forecast.saving = timed(self.save_and_stop_if_asked)
        first = progress.epoch
        while progress.epoch <= self.config.epochs and not self.out_of_patience():
            yield progress.epoch
            progress.next_epoch()
            self.save_and_stop_if_asked()
        more = ""
        if progress.epoch == first and self.out_of_patience():
            more = f"; --resume --patience {2 * progress.bad_epochs} goes on (0: never stop early)"
        elif progress.epoch == first:
            say(f"nothing is left to do, epoch {self.config.epochs} was the last; --resume --epochs {2 * first - 2} goes on")
        if self.out_of_patience():
            say(f"stopped early: {counted(progress.bad_epochs, 'epoch')} without a better {progress.best_name}{more}")

    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.bad_epochs

    def batches(self, loader, epoch: int):
        """Yields the epoch's batches on the device, from where a stopped run left off; a progress bar shows the losses.

        gradient_accumulation_steps batches make one optimizer step (fewer at the epoch's end, and the loss is divided by
        as many as there are). max_steps_per_epoch counts optimizer steps. Saves and stops only between two steps.

        loader: a DataLoader, or anything that is iterated likewise and offers (batches.build_loader and EpochBatches do)
        - len(batch_sampler), batch_sampler.plan(epoch): the epoch's batches of this process, each a list of sample indices;
        - batch_sampler.set_range(epoch, start, stop): the next iteration yields the plan's batches start..stop alone;
        - dataset.name(index): what to call a sample where its batch fails, such as its file;
        - dataset.new_faults(), if there is one: [(path, fault)] of what turned out bad since the last call; asked each epoch.
        """
        config, accumulate, progress = self.config, self.config.gradient_accumulation_steps, self.progress
        plan = loader.batch_sampler.plan(epoch)
        if config.max_steps_per_epoch:
            plan = plan[: config.max_steps_per_epoch * accumulate]
        loader.batch_sampler.set_range(epoch, progress.batches_done, len(plan))
        bar = progress_bar(None, f"epoch {epoch}/{config.epochs}", total=len(plan), plain="{desc}{postfix}")
        bar.update(progress.batches_done)
        self.signals.busy, began = False, time.monotonic()
        batches = iter(loader)
        with bar, compiled():
            while progress.batches_done < len(plan):
                number = progress.batches_done  # of this batch in the epoch
                with self.forecast.waiting():
                    batch = to_device(next(batches), self.device)
                self.signals.busy = True
                if number % accumulate == 0:
                    self.under_way = Step(min(accumulate, len(plan) - number), self.device, self.world)
                self.under_way.files.append([loader.dataset.name(index) for index in plan[number]])
                for model in self.models:  # DDP: sum gradients over processes once a step
                    model.require_backward_grad_sync = self.under_way.is_last_batch()
                seed_everything(config.seed, epoch, number, self.rank)
                yield batch
                progress.batches_done += 1
                if self.under_way.is_last_batch():
                    self.end_step(began)
                    self.foretell(loader, epoch, progress.batches_done == len(plan))
                    began = time.monotonic()
                    bar.set_postfix_str(self.where(len(plan)), refresh=False)
                bar.update()
        if hasattr(loader.dataset, "new_faults"):
            self.leave_out(gather_lists(loader.dataset.new_faults()))
        if self.average:
            self.average.use(True)

    def foretell(self, loader, epoch: int, epoch_ends: bool) -> None:
        """After enough steps, once: what the whole run will take. There a dry run ends."""
        if self.progress.predicted is None and self.forecast.is_due(epoch_ends):
            self.progress.predicted = self.forecast.foretell(self, loader, epoch)
            if self.config.dry_run:
                raise Enough

    def where(self, batches: int) -> str:
        """Where the training stands, in words; batches: of an epoch. The time left is that of the training steps alone."""
        progress = self.progress
        total = self.config.epochs * -(-batches // self.config.gradient_accumulation_steps)
        parts = [f"step {progress.step} of {total}"]
        parts += [f"{key_of('loss', name)} {mean:.4f}" for name, mean in progress.mean_losses().items()]
        parts += [f"lr {max(group['lr'] for o in self.optimizers for group in o.param_groups):.2g}"]
        left = progress.clock["train_seconds"] / progress.step * max(0, total - progress.step)
        return ", ".join([*parts, f"{in_time(left)} left"])

    def leave_out(self, faults: list[tuple[str, str]]) -> None:
        """[(path, fault)] of files that turned out bad in training, on any process: each is named and counted once."""
        new = Faults()
        for path, fault in faults:
            if path not in self.progress.unreadable:
                self.progress.unreadable[path] = fault
                new.add_error(fault, path)
        new.report()
        for fault, count in new.counts().items():
            left_out = self.described.setdefault("data", {}).setdefault("left_out", {})
            left_out[fault] = left_out.get(fault, 0) + count

    def backward(self, loss, /, name: str = "loss", **parts) -> None:
        """Backward pass of one batch's loss, divided by the batches of the step. parts: numbers to record beside it.

        A loss that is not finite moves no weight, and stops the run with the file names when the step ends. With several
        optimizers each loss has a name of its own, and the optimizer that steps after it goes by that name in the record.
        """
        self.under_way.add_loss(name, loss, parts)
        self.accelerator.backward(loss / self.under_way.size)
        progress = self.progress
        if len(self.optimizers) > 1 and progress.step < FIRST_STEPS and len(self.under_way.files) == 1:
            self.under_way.note_first_taught(self.optimizers)
        if progress.idle is None or progress.idle:
            idle = [name for name, p in trained_parameters(self.bare_models) if p.grad is None]
            progress.idle = idle if progress.idle is None else sorted(set(progress.idle) & set(idle))

    def step_optimizer(self, optimizer, scheduler=None, max_grad_norm: float | None = None, name: str | None = None) -> bool:
        """Clip, step, schedule, zero; at the end of an accumulation window, else nothing. Whether it was one.

        max_grad_norm: where it is not the config's; 0: never clip. A gradient that is not finite moves no weight.
        name: what the rate and the norm go by in the record, instead of the loss before; where one loss is for two optimizers
        (Muon for the matrices, AdamW for the rest), they need names that differ. Call it after every batch, as above:
        RuntimeError where an optimizer would step on what a loss before another optimizer's turn has left in it.
        """
        step, known = self.under_way, [id(own.optimizer) for own in self.optimizers]
        bare, name = id(getattr(optimizer, "optimizer", optimizer)), name or step.last_loss()
        if bare not in known:
            raise RuntimeError("run.step_optimizer got an optimizer that run.prepare did not: its state would not be saved")
        if not step.turn:
            raise RuntimeError("run.step_optimizer was called before run.backward: there is no gradient to step on")
        if len(step.files) == 1:
            check_own_loss(step, known.index(bare), self.optimizers, self.bare_models)
        step.turn_is_over = True
        if not step.is_last_batch():
            return False
        if self.world > 1 and not self.find_unused:
            check_all_used(optimizer, self.bare_models)
        limit = self.config.max_grad_norm if max_grad_norm is None else max_grad_norm
        step.add_norm(name, clip_gradients(self.accelerator, optimizer, limit))
        take_step(optimizer, scheduler, step.not_finite(norms_count=self.accelerator.scaler is None))
        step.stepped[known.index(bare)] = name
        return True

    def end_epoch(self, metrics: dict, best: str, higher_is_better: bool = True) -> bool:
        """Records an epoch's validation metrics. True on the process that should now save the model as the best so far."""
        if self.under_way is not None:  # its gradients would be added to those of the next epoch's first step
            raise RuntimeError("the loop left run.batches before its end; --max_steps_per_epoch cuts epochs short")
        self.stop_if_idle()
        losses = {f"train_{key_of('loss', name)}": mean for name, mean in self.progress.mean_losses().items()}
        record = {"epoch": self.progress.epoch, "step": self.step, **losses, **without_nan(metrics)}
        self.signals.busy = True  # until the checkpoint that knows of this record is written
        self.record.add(record)
        is_best = self.progress.add_epoch(record, best, higher_is_better)
        mark = f"  (best{self.progress.no_better()})" if is_best else ""
        say(f"epoch {self.progress.epoch}/{self.config.epochs}: {in_words(record)}{mark}")
        return is_best and self.is_main

    def card(self, code: str = "", **how) -> str:
        """The model card of the best epoch, for its checkpoint folder. code: how it is loaded with the libraries alone.

        how: `use`, where a picture is not what the task's Predictor takes; see common/card.py.
        """
        with self.guard("the model card"):
            from common.card import model_card

            return model_card(self.task, self.method, self.described, self.progress.best, self.config, self.device, code, **how)
        return ""

    def guard(self, what: str):
        """For what comes after the training and may not cost it, such as pictures: `with run.guard("the plots"):`.

        An error inside is said and noted in summary.json, and the run goes on to its end.
        """
        return guard(what, self.notes)

    def finish(self) -> None:
        """Draws curves.png and marks the run as finished; summary.json is written when the `with` block ends."""
        self.finished = True
        if self.is_main:
            from common.plots import draw_curves

            name, best, resumed_at = self.progress.best_name, self.progress.best, self.progress.resumed_at
            with self.guard("curves.png"):
                draw_curves(self.record.lines(), name, best, resumed_at, self.folder / "curves.png")
            value = "null" if best[name] is None else f"{best[name]:.4f}"
            self.record.tick(self.progress)
            took = in_time(self.progress.clock["seconds"])
            say(f"finished after {took}: best {name} {value} in epoch {best['epoch']}{self.progress.no_better()}")
            if predicted := self.progress.predicted:
                peak = peak_memory(self.device)
                say(compared(predicted, self.progress.clock["seconds"], peak["gpu"] or peak["cpu"], folder_bytes(self.best)))
            say(f"saved {self.best} ({folder_bytes(self.best) / 1e6:.2f} MB); curves.png and summary.json in {self.folder}")
            if self.config.push_to_hub:
                with self.guard("the upload"):
                    push(self.best, self.config.push_to_hub)
            self.say_next()

    def say_next(self) -> None:
        """The command that scores what was trained, to be pasted in any folder; the script lies beside the one that runs."""
        script = Path(sys.argv[0]).absolute().with_name("eval.py" if self.method == "full" else "eval_lora.py")
        if script.is_file():
            say(f"next: python {shlex.quote(str(script))} --checkpoint {shlex.quote(str(self.best.absolute()))}")

    # ---- the end of a step ---------------------------------------------------------------------------------------

    def end_step(self, began: float) -> None:
        """Reads what the step gave, stops the run where that is not finite or not asked for, and counts it."""
        step, progress, clock = self.under_way, self.progress, self.progress.clock
        check_stepped(step.stepped, self.optimizers, self.bare_models)
        logs = (progress.step + 1) % self.log_every == 0 or progress.step == 0
        step.read(self.signals.pending, with_parts=logs)
        self.stop_wanted = step.signum
        scaler = self.accelerator.scaler
        fault = step.fault(f"at step {progress.step + 1}, epoch {progress.epoch}", norms_count=scaler is None)
        if fault:
            raise UserError(fault)
        if scaler is not None:
            scaler.update()
        if progress.step < FIRST_STEPS:
            check_nothing_left(self.bare_models)
        if progress.step + 1 >= FIRST_STEPS:
            self.stop_if_idle()
        progress.step += 1
        if self.average:
            self.average.update()
        progress.count_losses(step.means("loss"))
        seconds = time.monotonic() - began
        clock["train_seconds"] += seconds
        self.forecast.count(seconds)
        clock["samples"] += sum(map(len, step.files)) * self.world
        self.under_way = None
        if logs:
            self.record.add_step(step, progress, self.optimizers)
        self.signals.busy = False
        self.stop_if_asked()
        if self.config.save_steps and progress.step % self.config.save_steps == 0:
            self.save()

    def stop_if_idle(self) -> None:
        """Every parameter that trains must have had a gradient within the first steps, else it would silently stay as it is.

        (Not in the very first: a batch without boxes, say, rightly gives none to what boxes teach. With find_unused that is
        said to go on: a thousand pictures of background may come first.)
        """
        idle = self.progress.idle
        if idle and not self.find_unused:
            names = ", ".join(sorted(idle)[:3])
            raise UserError(f"{len(idle)} trainable tensors got no gradient, so they would never learn: {names}")

    def stop_if_asked(self) -> None:
        signum = self.stop_wanted or (self.world == 1 and self.signals.pending)
        if signum:
            raise Interrupted(signum)

    # ---- saving --------------------------------------------------------------------------------------------------

    def save_and_stop_if_asked(self) -> None:
        self.save()
        self.signals.busy = False
        self.stop_if_asked()

    def save(self) -> None:
        """Writes a checkpoint to resume from: everything that moves, and where the training stands."""
        self.record.tick(self.progress)
        if self.average:
            self.average.use(False)
        if not self.is_main:
            return
        now = {"log_bytes": self.record.size(), "processes": self.world}
        now |= {what: self.described.get(what) for what in ("base", "data")}
        now["settings"] = dataclasses.asdict(self.config)
        save_state(self.last, state_of_run(self), dataclasses.asdict(dataclasses.replace(self.progress, **now)))
