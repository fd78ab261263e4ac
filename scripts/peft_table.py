"""Compares PEFT methods on the CLIP demo, three seeds each, and writes the table of docs/peft_methods.md.

    python scripts/peft_table.py                       # about an hour and a half of one CPU core; --jobs 2 halves the wait
    python scripts/peft_table.py --seeds 0 --epochs 1 --methods "lora;ia3" --page /tmp/table.md      # a smoke run

Every method gets the learning rate that is best for it on seed 0's validation data, out of --rates. The numbers are of the
test data, which nobody has chosen by. Runs that are there already (outputs/peft_table/) are not made again.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Count, Range, Rate, UserError, cli, parse  # noqa: E402

CLIP = ROOT / "fine_tuning"
# Name in the table -> the script and its flags.
METHODS = {
    "full": ("train.py",),
    "linear probe": ("train_lora.py", "--lora_r", "0"),
    "lora": ("train_lora.py", "--peft_method", "lora"),
    "lora, all-linear": ("train_lora.py", "--peft_method", "lora", "--lora_targets", "all-linear"),
    "dora": ("train_lora.py", "--peft_method", "dora"),
    "rslora": ("train_lora.py", "--peft_method", "rslora"),
    "pissa": ("train_lora.py", "--peft_method", "pissa"),
    "olora": ("train_lora.py", "--peft_method", "olora"),
    "ia3": ("train_lora.py", "--peft_method", "ia3", "--lora_targets", "k_proj|v_proj|fc2"),  # where its authors put it
    "loha": ("train_lora.py", "--peft_method", "loha"),
    "lokr": ("train_lora.py", "--peft_method", "lokr"),
}
BEGIN = "<!-- table: begin -->"  # where the table goes
END = "<!-- table: end -->"


@dataclass
class TableConfig:
    """Settings; the comment of a line is its help text."""

    methods: str = ";".join(METHODS)  # names of methods, with semicolons between
    seeds: str = "0,1,2"  # seeds, with commas between; the first one chooses the learning rate
    rates: str = "2e-4,5e-4,1e-3,2e-3,5e-3,1e-2,2e-2,5e-2"  # learning rates to choose from, in rising order
    start: Rate = 5e-3  # the first rate that is tried; then its neighbours, as long as they are better
    epochs: Count = 15  # passes over the training data
    jobs: Annotated[int, Range(1, 256)] = 1  # methods side by side, one thread each; times are then those of a busy machine
    output_dir: str = str(ROOT / "outputs" / "peft_table")  # where the runs go
    page: str = str(ROOT / "docs" / "peft_methods.md")  # the table goes between its marks; a page that is not there is made

    def __post_init__(self):
        if strange := [name for name in self.methods.split(";") if name not in METHODS]:
            raise UserError(f"--methods: there is no {strange[0]!r}; there are {'; '.join(METHODS)}")
        try:
            self.seed_list, self.rate_list = [int(s) for s in self.seeds.split(",")], [float(r) for r in self.rates.split(",")]
        except ValueError as error:
            raise UserError(f"--seeds and --rates are numbers with commas between: {error}") from None
        if self.start not in self.rate_list:
            raise UserError(f"--start {self.start} is none of --rates")


def run(config, method: str, rate: float, seed: int) -> dict:
    """summary.json of a training run, which is made unless it is there."""
    script, *flags = METHODS[method]
    name = f"{method}_{rate:g}_{seed}_{config.epochs}".replace(", ", "_").replace(" ", "_")
    root = Path(config.output_dir).expanduser().resolve()
    summary = root / "clip" / name / "summary.json"
    if not (summary.is_file() and json.loads(summary.read_text())["status"] == "finished"):
        flags += ["--lr", rate, "--seed", seed, "--epochs", config.epochs, "--run_name", name, "--output_dir", root]
        call(script, *flags, "--overwrite", "--threads", 1)
    return {**json.loads(summary.read_text()), "folder": summary.parent}


def call(script: str, *flags) -> None:
    command = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(command, cwd=CLIP, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{' '.join(command[1:])} ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
        )


def accuracy(summary: dict) -> float:
    return summary["metrics"]["best"]["balanced_accuracy"]


def best_rate(config, method: str) -> float:
    """The learning rate with the best validation accuracy on the first seed, by going uphill from config.start."""
    rates, seed = config.rate_list, config.seed_list[0]
    at = rates.index(config.start)
    for step in (1, -1):
        while 0 <= at + step < len(rates):
            here, there = (accuracy(run(config, method, rates[i], seed)) for i in (at, at + step))
            if there <= here:
                break
            at += step
    run(config, method, rates[at], seed)
    return rates[at]


def row(config, method: str) -> dict:
    """The numbers of a method: means over seeds on the test data, and the spread."""
    rate = best_rate(config, method)
    accuracies, before, runs = [], [], [run(config, method, rate, seed) for seed in config.seed_list]
    for summary in runs:
        folder = summary["folder"]
        if not (folder / "eval_test.json").is_file():
            script = METHODS[method][0].replace("train", "eval")
            call(script, "--checkpoint", folder / "checkpoints" / "best", "--split", "test", "--threads", 1)
        found = json.loads((folder / "eval_test.json").read_text())
        accuracies.append(found["metrics"]["accuracy"])
        before.append(found["zero_shot"]["accuracy"])
    print(f"{method}: lr {rate:g}, accuracy {statistics.mean(accuracies):.3f}", flush=True)
    return {
        "method": method,
        "rate": rate,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "zero_shot": statistics.mean(before),
        "trainable": runs[0]["parameters"]["trainable"],
        "bytes": runs[0]["checkpoint_bytes"],
        "seconds": min(summary["train_seconds"] for summary in runs),  # what else the machine did only adds to it
        "environment": runs[0]["environment"],
        "pictures": runs[0]["data"]["train"],
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| method | trained parameters | file | learning rate | training time | test accuracy |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| zero-shot: the base as it is | 0 | | | | {rows[0]['zero_shot']:.3f} |"]
    for r in rows:
        score = f"{r['accuracy']:.3f}" + (f" ± {r['spread']:.3f}" if r["spread"] is not None else "")
        cells = [
            r["method"],
            f"{r['trainable']:,}",
            f"{r['bytes'] / 1e6:.2f} MB",
            f"{r['rate']:g}",
            f"{r['seconds']:.0f} s",
            score,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    config = parse(TableConfig, argv)
    names = config.methods.split(";")
    with ThreadPoolExecutor(config.jobs) as pool:
        rows = list(pool.map(lambda name: row(config, name), names))
    env, seeds = rows[0]["environment"], len(config.seed_list)
    many = f"{seeds} seeds" if seeds > 1 else "one seed"
    spread = " and standard deviation" if seeds > 1 else ""
    made = (
        f"{table(rows)}\n\nAccuracies: mean{spread} over {many}, {config.epochs} epochs of {rows[0]['pictures']} pictures. "
        f"Times: the fastest seed's, {config.jobs} runs side by side, one thread each, on {env['device']}; torch {env['torch']}, "
        f"peft {env['peft']}."
    )
    page = Path(config.page).expanduser()
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page} has no place for the table: it needs the lines {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"{made}\nsaved in {page}")


if __name__ == "__main__":
    cli(main)
