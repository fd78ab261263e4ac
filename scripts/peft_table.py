"""Compares PEFT methods on the CLIP demo, five seeds each, and writes the table of docs/peft_methods.md.

    python scripts/peft_table.py                       # about an hour and a half of one CPU core; --jobs 2 halves the wait
    python scripts/peft_table.py --seeds 0 --epochs 1 --methods "lora;ia3" --page /tmp/table.md      # a smoke run

Every method gets the learning rate that is best for it on seed 0's validation data, out of --rates. The numbers are of test
pictures, by which nothing was chosen, and many more of them than the demo has: to score costs little beside training. Runs that
are there already (outputs/peft_table/) are not made again.
"""

import json
import math
import os
import runpy
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Count, Range, Rate, UserError, cli, parse  # noqa: E402
from common.folders import make_once  # noqa: E402

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
AGAINST = ("lora", "full")  # what every method is compared with
BEGIN = "<!-- table: begin -->"  # where the table goes
END = "<!-- table: end -->"


@dataclass
class TableConfig:
    """Settings; the comment of a line is its help text."""

    methods: str = ";".join(METHODS)  # names of methods, with semicolons between
    seeds: str = "0,1,2,3,4"  # seeds, with commas between; the first one chooses the learning rate
    rates: str = "2e-4,5e-4,1e-3,2e-3,5e-3,1e-2,2e-2,5e-2"  # learning rates to choose from, in rising order
    start: Rate = 5e-3  # the first rate that is tried; then its neighbours, until those on both sides are worse than the best
    epochs: Count = 15  # passes over the training data
    test_pictures: Annotated[int, Range(3, 10**5)] = 500  # of each of the eight breeds; the demo's own 40 are the first of them
    jobs: Annotated[int, Range(1, 256)] = 1  # methods side by side, one thread each
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


def choose_rate(config, method: str) -> dict:
    """{"rate", "tried": [lowest, highest], "at_end"}: the learning rate that is best on the first seed's validation data.

    From config.start the search goes on upwards, then downwards, while the outermost rate is as good as the best: a tie does not
    stop it, a worse one does. Of rates with the same accuracy that with the lowest loss is taken: a mean over the same pictures
    that still differs where equally many are right. at_end: the list ended before a worse one was found.
    """
    rates, seed = config.rate_list, config.seed_list[0]

    def score(place):  # rounded, for a mean of recalls depends on their order in its last bits
        best = run(config, method, rates[place], seed)["metrics"]["best"]
        return round(best["balanced_accuracy"], 9), -best["val_loss"]

    at = rates.index(config.start)
    scores = {at: score(at)}
    while True:
        top = max(scores.values())[0]
        edges = ((max(scores), 1), (min(scores), -1))
        beyond = [edge + step for edge, step in edges if scores[edge][0] == top]
        inside = [place for place in beyond if 0 <= place < len(rates)]
        if not inside:
            break
        scores[inside[0]] = score(inside[0])
    return {
        "rate": rates[max(scores, key=scores.get)],
        "tried": [rates[min(scores)], rates[max(scores)]],
        "at_end": bool(beyond),
    }


def tested(config, method: str, summary: dict) -> tuple[dict, dict]:
    """(the numbers, samples.json) of a run on the test pictures, on which it is scored unless it is already."""
    from bootstrap import read_samples

    pictures, script = test_folder(config), METHODS[method][0].replace("train", "eval")
    place = summary["folder"] / pictures.name
    if not (place / "eval_test" / "samples.json").is_file():
        best = summary["folder"] / "checkpoints" / "best"
        call(script, "--checkpoint", best, "--data_dir", pictures, "--split", "test", "--output_dir", place, "--threads", 1)
    return json.loads((place / "eval_test.json").read_text()), read_samples(place / "eval_test", "balanced_accuracy")


def test_folder(config) -> Path:
    """The folder of the test pictures, drawn at the first call: 4,000 take some twenty seconds."""

    def draw(folder: Path) -> None:
        synthetic = runpy.run_path(str(CLIP / "synthetic.py"))  # by its path: other tasks have a synthetic.py as well
        synthetic["make_demo_data"](folder, train=0, val=0, test=config.test_pictures)

    return make_once(Path(config.output_dir).expanduser().resolve() / f"test_{config.test_pictures}", draw)


def row(config, method: str) -> dict:
    """The numbers of a method: means over seeds on the test pictures, and the spread."""
    chosen = choose_rate(config, method)
    runs = [run(config, method, chosen["rate"], seed) for seed in config.seed_list]
    found, samples = zip(*(tested(config, method, summary) for summary in runs), strict=True)
    accuracies = [each["metrics"]["accuracy"] for each in found]
    print(f"{method}: lr {chosen['rate']:g}, accuracy {statistics.mean(accuracies):.3f}", flush=True)
    return chosen | {
        "method": method,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "zero_shot": found[0]["zero_shot"]["accuracy"],
        "trainable": runs[0]["parameters"]["trainable"],
        "bytes": runs[0]["checkpoint_bytes"],
        "environment": runs[0]["environment"],
        "data": runs[0]["data"],
        "samples": dict(zip(config.seed_list, samples, strict=True)),  # seed -> samples.json
    }


def add_differences(rows: list[dict]) -> list[str]:
    """Gives each row its 95 % intervals of the difference to the rows of AGAINST: row["to lora"] is [low, high].

    By pictures and seeds (bootstrap.intervals). Returns the names of AGAINST that there are.
    """
    from bootstrap import intervals

    names = [row["method"] for row in rows]
    there = [name for name in AGAINST if name in names]
    for other in there:
        for row, found in zip(rows, intervals([row["samples"] for row in rows], names.index(other)), strict=True):
            row[f"to {other}"] = found.get("difference")
    return there


def table(rows: list[dict], against: list[str]) -> str:
    """Markdown."""
    titles = ["method", "trained parameters", "file", "learning rate (tried)", "test accuracy"]
    titles += [f"difference to {name}, 95 %" for name in against]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [["zero-shot: the base as it is", "0", "", "", f"{rows[0]['zero_shot']:.3f}", *[""] * len(against)]]
    for r in rows:
        lines.append(
            [
                r["method"],
                f"{r['trainable']:,}",
                f"{r['bytes'] / 1e6:.2f} MB",
                f"{r['rate']:g} ({r['tried'][0]:g} to {r['tried'][1]:g})",
                f"{r['accuracy']:.3f}" + (f" ± {r['spread']:.3f}" if r["spread"] is not None else ""),
                *("{:+.3f} to {:+.3f}".format(*ends) if (ends := r[f"to {name}"]) else "" for name in against),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claims(rows: list[dict], other: str) -> str:
    """What the intervals of the differences to a method carry, in words."""
    found = {r["method"]: ends for r in rows if (ends := r[f"to {other}"])}
    if not found:
        return f"There are no intervals of differences to `{other}`."
    better, worse = [m for m, (low, _) in found.items() if low > 0], [m for m, (_, high) in found.items() if high < 0]
    same = [m for m in found if m not in better + worse]
    half = statistics.median((high - low) / 2 for low, high in found.values())
    return (
        f"Against `{other}`: better {listed(better)}; worse {listed(worse)}; no difference shown {listed(same)}. The median "
        f"interval is ± {half:.3f}: smaller differences are not told apart. Of {len(found)} comparisons at 95 %, about "
        f"{0.05 * len(found):.2g} would show a difference by chance if there were none."
    )


def listed(names) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def report(config, rows: list[dict]) -> str:
    """The table, and below it what its numbers are and what they carry. Markdown."""
    against, env, data, seeds = add_differences(rows), rows[0]["environment"], rows[0]["data"], config.seed_list
    tests, middle = len(rows[0]["samples"][seeds[0]]["rows"]), statistics.median(r["accuracy"] for r in rows)
    many = f"mean and standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed, so nothing is known of others"
    ends = listed(r["method"] for r in rows if r["at_end"])
    lines = [
        table(rows, against),
        f"Accuracies: {many}; {config.epochs} epochs of {data['train']} pictures, torch {env['torch']}, peft {env['peft']}. "
        f"An accuracy of {middle:.3f} has a standard error of {standard_error(middle, tests):.4f} by the {tests:,} test pictures "
        f"(binomial), and of {standard_error(middle, data['val']):.3f} by the {data['val']} validation pictures that chose the "
        "rate. Differences are paired by picture and seed; their intervals are for other pictures and other seeds.",
        *(claims(rows, name) for name in against),
        f"Best at an end of the list of rates, so that a better one may lie beyond: {ends}.",
    ]
    return "\n\n".join(lines)


def standard_error(share: float, count: int) -> float:
    """Of a share of so many independent answers: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)


def around_the_table(page: Path) -> tuple[str, str]:
    """What stands on the page before and after the table. UserError where it has no place for one."""
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page} has no place for the table: it needs the lines {BEGIN} and {END}")
    return text.split(BEGIN)[0], text.split(END)[1]


def main(argv=None):
    config = parse(TableConfig, argv)
    page = Path(config.page).expanduser()
    around_the_table(page)  # before hours of training
    test_folder(config)
    with ThreadPoolExecutor(config.jobs) as pool:
        rows = list(pool.map(partial(row, config), config.methods.split(";")))
    made = report(config, rows)
    before, after = around_the_table(page)  # which may have been written on since
    page.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
    print(f"{made}\nsaved in {page}")


if __name__ == "__main__":
    cli(main)
