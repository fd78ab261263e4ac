"""What a run writes down of itself: metrics.jsonl, the same in TensorBoard's form, summary.json, and the console line."""

import dataclasses
import json
import math
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from common.checkpoint import Progress, folder_bytes, fsync, naming, write_json, write_text
from common.runtime import environment, peak_memory, say
from common.step import Step

# needs: tensorboard
SCHEMA_VERSION = 1


class Record:
    """The record in a run folder; on another process than the main one nothing is written.

    folder: the run folder. named: {"task": ..., "method": ...}. processes: how many take part.
    """

    def __init__(self, folder: Path, named: dict, config, device, processes: int, is_main: bool):
        self.folder, self.named, self.config, self.device, self.processes = folder, named, config, device, processes
        self.metrics = folder / "metrics.jsonl"
        self.is_main = is_main
        self.started, self.last_tick = datetime.now(UTC), time.monotonic()
        self.last_step = (0, 0.0)  # samples and seconds of training up to the last step line
        self.board = None  # TensorBoard's writer, made with the first line

    # ---- metrics.jsonl and TensorBoard -----------------------------------------------------------------------------

    def add(self, line: dict) -> None:
        """Appends a line to metrics.jsonl, and its numbers to TensorBoard's file."""
        if not self.is_main:
            return
        with naming(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        lines = [line]
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard's files lack what a kill cut off and know what a resume takes back: written anew, as metrics.jsonl is.
            shutil.rmtree(self.folder / "tb", ignore_errors=True)
            self.board = SummaryWriter(str(self.folder / "tb"))
            lines = self.lines()
        for each in lines:
            for key, value in each.items():
                if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                    self.board.add_scalar(tag_of(key, each), value, each["step"])

    def add_step(self, step: Step, progress: Progress, optimizers: list) -> None:
        """Adds the line of a step that was read, with its parts. docs/summary_schema.md says what its keys mean."""
        parts = {}
        for name, part, value in step.part_values:
            parts.setdefault(key_of(key_of("loss", name), part), []).append(value)
        losses = {key_of("loss", name): values for name, values in step.means("loss").items()}
        line = {"step": progress.step} | {key: sum(values) / len(values) for key, values in (parts | losses).items()}
        norms = step.means("gradient")
        for i, name in sorted(step.stepped.items()):
            shown = name if len(optimizers) > 1 else "loss"
            rates = rates_of(optimizers[i])
            line |= {key_of(key_of("lr", shown), part): rate for part, rate in rates.items()}
            if all(map(math.isfinite, norms[name])):  # else fp16's scaler skipped the step
                line[key_of("grad_norm", shown)] = sum(norms[name]) / len(norms[name])
        samples, seconds = progress.clock["samples"], progress.clock["train_seconds"]
        before, self.last_step = self.last_step, (samples, seconds)
        line["samples_per_second"] = round((samples - before[0]) / max(1e-9, seconds - before[1]), 2)
        peak = peak_memory(self.device)
        line["peak_memory_bytes"] = peak["gpu"] or peak["cpu"]
        self.add(line)

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl that can be read; a kill or a full disk may have torn one."""
        return [line for text in self.metrics.read_bytes().splitlines() if (line := parse_line(text))]

    def size(self) -> int:
        """Bytes of metrics.jsonl, which the disk holds from now on."""
        if not self.metrics.exists():
            return 0
        fsync(self.metrics)
        return self.metrics.stat().st_size

    def go_on(self, progress: Progress) -> None:
        """Where a run is taken up again: takes back what was written after its checkpoint."""
        if self.is_main and self.metrics.exists():
            os.truncate(self.metrics, min(progress.log_bytes, self.metrics.stat().st_size))
            texts = self.metrics.read_bytes().splitlines()
            torn = [number for number, text in enumerate(texts, start=1) if parse_line(text) is None]
            if torn:
                say(f"{self.metrics}: line {torn[0]} cannot be read ({len(torn)} in all): curves go without")
            if texts and parse_line(texts[-1]) is None:
                with open(self.metrics, "ab") as file:
                    file.write(b"\n")
        self.last_step = (progress.clock["samples"], progress.clock["train_seconds"])
        self.last_tick = time.monotonic()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    # ---- summary.json ----------------------------------------------------------------------------------------------

    def tick(self, progress: Progress) -> None:
        """Adds the seconds since the last tick to the run's clock."""
        now = time.monotonic()
        progress.clock["seconds"] += now - self.last_tick
        self.last_tick = now

    def write_summary(self, progress: Progress, described: dict, status: str, error: str | None = None) -> None:
        """docs/summary_schema.md says what each key means. described: base, data, parameters, notes."""
        self.tick(progress)
        if not self.is_main:
            return
        clock, history = progress.clock, progress.history
        best = self.folder / "checkpoints" / "best"
        summary = {
            "schema_version": SCHEMA_VERSION,
            **self.named,
            "run_name": self.folder.name,
            "status": status,
            "error": error,
            "notes": described.get("notes", []),
            "started": self.started.isoformat(timespec="seconds"),
            "ended": None if status == "running" else datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_at_steps": progress.resumed_at,
            "config": dataclasses.asdict(self.config),
            **{key: described.get(key) for key in ("base", "data", "parameters")},
            "metrics": {
                "name": progress.best_name,
                "higher_is_better": progress.higher_is_better,
                "before": without_place(history[0]) if history else None,
                "best": progress.best,
                "final": without_place(history[-1]) if len(history) > 1 else None,
            },
            "epochs": len(history) - 1 if history else 0,
            "steps": progress.step,
            "seconds": round(clock["seconds"], 2),
            "predicted": progress.predicted,
            "train_seconds": round(clock["train_seconds"], 2),
            "samples_per_second": round(clock["samples"] / clock["train_seconds"], 2) if clock["train_seconds"] else None,
            "peak_memory_bytes": peak_memory(self.device),
            "checkpoint_bytes": folder_bytes(best) if best.exists() else None,
            "environment": environment(self.device, self.processes),
        }
        write_json(self.folder / "summary.json", summary)


def parse_line(text: bytes) -> dict | None:
    """A line of metrics.jsonl; None where it is not one that `add` wrote."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def tag_of(key: str, line: dict) -> str:
    """TensorBoard's name for a key of metrics.jsonl: in the group losses/, metrics/ (of an epoch) or charts/ (of a step)."""
    return f"{'losses' if 'loss' in key else 'metrics' if 'epoch' in line else 'charts'}/{key}"


def key_of(what: str, name: str) -> str:
    """The key of a loss, a rate or a norm in metrics.jsonl: with its name, unless that is the one that goes without saying."""
    return what if name == "loss" else f"{what}_{name.removeprefix('loss_')}"


def rates_of(optimizer) -> dict[str, float]:
    """The highest rate of an optimizer's groups, under "loss"; under "head" that of new layers which have one of their own."""
    rates = {}
    for group in optimizer.param_groups:
        part = "head" if group.get("head") else "loss"
        rates[part] = max(rates.get(part, 0.0), group["lr"])
    return rates


def in_words(line: dict) -> str:
    numbers = [f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float)]
    return ", ".join(numbers[:5])  # the rest is in metrics.jsonl


def without_nan(metrics: dict) -> dict:
    """The metrics with null for NaN and infinity, which JSON does not know; they are named."""
    odd = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if odd:
        say(f"not a finite number, so recorded as null: {', '.join(odd)}")
    return {
        name: without_nan(value) if isinstance(value, dict) else None if name in odd else value for name, value in metrics.items()
    }


def without_place(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in ("epoch", "step")}


def of_split(metrics: dict, split: str) -> dict:
    """The metrics as an evaluation writes them down: what is val_loss in training is plain loss on other data."""
    return {"loss" if key == "val_loss" and split != "val" else key: value for key, value in metrics.items()}


def write_samples(path: Path, metric: str, higher_is_better: bool, rows: list[dict], **more) -> None:
    """samples.json: what an evaluation gave for each sample, from which an error of the metric can be had.

    rows: dicts with "file", and what the task says of it; each is a line of the file. more: what reading them needs.
    """
    head = json.dumps({"metric": metric, "higher_is_better": higher_is_better, **more}, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
