"""How a run that was stopped goes on: the state of everything that moves, and whether a checkpoint is of this very run."""

import dataclasses
from pathlib import Path

from common.checkpoint import Progress, load_moving_state, load_state, moving_state
from common.config import UserError
from common.folders import other_setting
from common.optim import follow_schedule
from common.runtime import counted, from_main, say
from common.step import FIRST_STEPS

# Said where --resume finds other data.
MAYBE_DAMAGED = "; if no file has changed, damaged ones were left out then and are not now, or the reverse: give --cache as then"


def state_of_run(run) -> dict:
    """Everything that moves."""
    return {
        "models": [moving_state(model) for model in run.bare_models],
        "optimizers": [optimizer.optimizer.state_dict() for optimizer in run.optimizers],
        "schedulers": [companion.state_dict() for companion in run.companions],
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else {},
    }


def go_on_from(folder: Path, run) -> None:
    """Loads the newest whole checkpoint of a run's folder of them into what was prepared, if there is one. run: Run.

    UserError where it is of another run: other base, data or settings, another number of processes.
    """
    found = None

    def look() -> bool:  # the main process first, as it renames what is damaged
        nonlocal found
        found = load_state(folder)
        return found is not None

    if not from_main(look):
        say("no checkpoint was saved yet: starting at step 0")
        return
    state, saved = found or load_state(folder)
    try:
        then = Progress.from_saved(saved)
        check_same_run(run, folder, then)
        fill_run(run, state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of another kind of run, or version
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--resume: what {folder} holds does not fit this run: {type(error).__name__}: {reason}") from None
    then.resumed_at.append(then.step)
    run.progress, unreadable = dataclasses.replace(then, unreadable={}), then.unreadable
    run.leave_out(unreadable.items())
    if run.progress.idle is None and then.step >= FIRST_STEPS:  # as checkpoints were that did not keep it
        run.progress.idle = []
    say(f"resumed at step {then.step}, epoch {then.epoch}, {counted(then.batches_done, 'batch')} into it")
    lengthen(run, then.settings.get("epochs", run.config.epochs))


def check_same_run(run, folder: Path, then: Progress) -> None:
    """UserError unless a checkpoint is of this run: of this base and data, these settings, so many processes."""
    for what in ("base", "data"):
        before, now = ((part or {}).get("sha256") for part in (getattr(then, what), run.described.get(what)))
        if before != now:
            raise UserError(
                f"--resume: the {what} is not the one that this run started with (sha256 {before} then, {now} now)"
                + (MAYBE_DAMAGED if what == "data" else "")
            )
    if fault := other_setting(run.config, then.settings):
        raise UserError(f"--resume: {folder} is of another run: {fault} there")
    if then.processes != run.world:
        raise UserError(f"--resume: the run was started with {then.processes} processes and has {run.world} now")


def fill_run(run, state: dict) -> None:
    """Loads what `state_of_run` gave into what was prepared."""
    for model, tensors in zip(run.bare_models, state["models"], strict=True):
        load_moving_state(model, tensors)
    for optimizer, values in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.optimizer.load_state_dict(values)
    for companion, values in zip(run.companions, state["schedulers"], strict=True):
        companion.load_state_dict(values)
    if run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(state["scaler"])


def lengthen(run, before: int) -> None:
    """Where the run has more epochs now: the rates go on by the longer schedule, as if it had been asked for at the start."""
    if before < run.config.epochs:
        run.progress.predicted = None  # that was of fewer epochs
        rates = [follow_schedule(each) for each in run.companions if hasattr(each, "lr_lambdas")]
        rate = f", from {max(rates):.2g} on" if rates else ""
        say(f"{run.config.epochs} epochs instead of {before}: the learning rate follows the schedule of all of them{rate}")
