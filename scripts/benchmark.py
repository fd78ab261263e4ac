"""Measures what training costs in each task, full and by LoRA, here and elsewhere, and writes the table of docs/benchmark.md.

    python scripts/benchmark.py                        # about an hour of one CPU core
    python scripts/benchmark.py --tasks pose --sizes demo --rounds 1 --steps 1 --page /tmp/table.md     # a smoke run

Real sizes are built from configurations with random weights (nothing is fetched); the demo is each task's own base. Steps are
timed in turns within one process, and compared within each turn: what else the machine does then weighs on all alike. On a CPU
the clock is the process's own time on one thread, on a GPU it is the wall's after a synchronisation.
"""

import contextlib
import copy
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from benchmark_tasks import (  # noqa: E402
    TASKS,
    Copies,
    adapt_by_peft,
    answer_picture,
    merged_copy,
    stack,
    train_one,
    write_adapter_of,
)
from common.config import BatchSizeOrZero, Count, UserError, cli, parse  # noqa: E402
from common.folders import check_place  # noqa: E402

MEASURED = "<!-- measured: begin -->"  # where the tables go
MEASURED_END = "<!-- measured: end -->"
WARM_UP = 1  # steps of every turn that are not timed: the first one makes the optimizer's state
MARK = "benchmark-result: "  # before the JSON that a process of ours prints last
# What is timed beside the full fine-tune -> its name in the table.
VARIANTS = {
    "full": "full fine-tune",
    "lora": "LoRA here",
    "peft": "LoRA, PEFT's own layers",
    "trainer": "LoRA, HF Trainer + PEFT",
    "last_k": "LoRA here, last blocks alone",
    "bf16": "LoRA here, bf16",
    "frozen_bf16": "LoRA here, bf16, frozen weights too",
    "ema": "LoRA here, weights averaged",
    "compiled": "LoRA here, compiled",
}
LAST_K = {"real": 4, "demo": 2}  # blocks
PARTS = ("steps", "memory", "start")


@dataclass
class BenchmarkConfig:
    """Settings; the comment of a line is its help text."""

    tasks: str = "classification,detection,pose,clip,voice,voice_no_gan,medical"  # with commas between
    sizes: str = "real,demo"  # real: from configurations, with random weights; demo: the bases that come along
    variants: str = "full,lora,peft,trainer,last_k,bf16,frozen_bf16,ema,compiled"  # what is timed; full and lora always are
    rounds: Count = 5  # turns
    steps: Count = 3  # timed steps of each variant in a turn
    batch_size: BatchSizeOrZero = 0  # samples in a batch; 0: as each task's row in this file says
    parts: str = "steps,memory,start"  # memory: a process for each of full, lora, peft; start: the scripts' start and their data
    device: str = "auto"  # auto: a GPU where there is one
    json: str = str(ROOT / "outputs" / "benchmark.json")  # every number, with the machine
    page: str = str(ROOT / "docs" / "benchmark.md")  # the tables go between its marks; a page that is not there is made
    job: str = ""  # what one of the script's own processes measures; for its own use

    def __post_init__(self):
        known = {"tasks": TASKS, "sizes": ("real", "demo"), "variants": VARIANTS, "parts": PARTS}
        for name, names in known.items():
            if strange := [word for word in getattr(self, name).split(",") if word not in names]:
                raise UserError(f"--{name}: there is no {strange[0]!r}; there are {', '.join(names)}")


# ---- one process's work ----------------------------------------------------------------------------------------------


class Bench:
    """A task at a size: its model, settings and clock, in a process of its own, since tasks' modules have the same names."""

    def __init__(self, job: dict):
        import torch

        self.job, self.row, self.real = job, TASKS[job["task"]], job["size"] == "real"
        sys.path.insert(0, str(ROOT / self.row["folder"]))
        torch.manual_seed(0)
        self.cuda = job["device"] != "cpu" and torch.cuda.is_available()
        if not self.cuda:
            torch.set_num_threads(1)
        self.model, self.heads, self.sample, self.loss = self.row["build"](self.real)
        self.batch = job["batch_size"] or self.row["batch"][job["size"]]
        self.count = WARM_UP + job["steps"]
        self.stamps = []

    def settings(self, variant: str, folder: str):
        """The script's own settings, for so many steps."""
        from importlib import import_module

        kind = import_module("train" if variant == "full" else "train_lora").Config
        flags = ["--data_dir", folder] if self.real else []  # which is what chooses between real defaults and the demo's
        flags += ["--output_dir", folder, "--run_name", variant, "--overwrite", "--epochs", "1", "--batch_size", str(self.batch)]
        flags += ["--max_steps_per_epoch", str(self.count), "--precision", "bf16" if "bf16" in variant else "fp32"]
        flags += ["--device", "cuda" if self.cuda else "cpu"]
        if variant != "full":
            flags += ["--lora_dropout", "0", "--lora_targets", self.job["targets"]]
            flags += {
                "last_k": ["--lora_last_k", str(LAST_K[self.job["size"]])],
                "frozen_bf16": ["--frozen_dtype", "bf16"],
                "ema": ["--ema_decay", "0.999"],
                "compiled": ["--compile"],
            }.get(variant, [])
        return parse(kind, [*flags, *self.row.get("flags", ())])

    def adapted(self, variant: str, config):
        """The model of a variant."""
        model = copy.deepcopy(self.model)
        if variant == "full":
            return model.requires_grad_(True)
        model = self.row.get("adapt", adapt_by_peft)(model, config, self.heads)
        for module in model.modules():
            if variant in ("peft", "trainer") and hasattr(module, "lora_A"):
                del module.forward  # back to PEFT's own
        return model

    def tick(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter() if self.cuda else time.process_time())

    def turn(self, variant: str) -> list[float]:
        """Seconds of each timed step of a variant."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, and we change it between turns
        self.stamps = []
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = self.settings(variant, folder)
            model = self.adapted(variant, config)
            (self.by_trainer if variant == "trainer" else self.by_our_loop)(model, config, folder)
        return [after - before for before, after in zip(self.stamps[WARM_UP:], self.stamps[WARM_UP + 1 :], strict=False)]

    def by_our_loop(self, model, config, _) -> None:
        from common.batches import EpochBatches, build_loader
        from common.run import Run

        data = Copies(self.sample, self.batch * self.count)
        loader = build_loader(data, EpochBatches(len(data), self.batch, config.seed), stack)
        with Run(config, task="benchmark", method="benchmark") as run:
            self.row.get("train", train_one)(self, run, model, config, loader)

    def by_trainer(self, model, config, folder: str) -> None:
        """The same model, batches and optimizer in HF's Trainer, its settings as they are."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        tick, loss = self.tick, self.loss

        class Stamp(TrainerCallback):
            def on_step_begin(self, *_, **__):
                tick()

            def on_train_end(self, *_, **__):
                tick()

        class LossTrainer(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return loss(model, inputs)

        options = {"max_grad_norm": config.max_grad_norm, "learning_rate": config.lr, "weight_decay": config.weight_decay}
        options |= {"report_to": [], "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True}
        options |= {"per_device_train_batch_size": self.batch, "max_steps": self.count, "use_cpu": not self.cuda}
        arguments = TrainingArguments(output_dir=folder, **options)
        data = Copies(self.sample, self.batch * self.count)
        LossTrainer(model=model, args=arguments, train_dataset=data, data_collator=stack, callbacks=[Stamp()]).train()

    def steps(self) -> dict:
        """{"seconds": {variant: [one number a turn]}}, in turns; with what the adapter holds and what answering costs."""
        from torch import device

        from common.runtime import environment

        seconds = {variant: [] for variant in self.job["variants"]}
        for _ in range(self.job["rounds"]):
            for variant, found in seconds.items():
                found.append(min(self.turn(variant)))
        machine = environment(device("cuda" if self.cuda else "cpu"), 1)
        return {"seconds": seconds, "batch": self.batch, "machine": machine, **self.answering()}

    def answering(self) -> dict:
        """Parameters and bytes of both checkpoints; seconds of an answer to one sample, unmerged and merged."""
        import torch

        from common.lora import count_parameters

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = self.settings("lora", folder)
            model = self.adapted("lora", config).eval()
            write_adapter_of(model, Path(folder) / "adapter")
            size = sum(file.stat().st_size for file in (Path(folder) / "adapter").iterdir())
        total = count_parameters(self.adapted("full", config))["total"]
        facts = {"parameters": [total, count_parameters(model)["trainable"]], "bytes": [4 * total, size]}
        device = "cuda" if self.cuda else "cpu"
        batch = {key: value[None].to(device) for key, value in self.sample.items() if isinstance(value, torch.Tensor)}
        answer, found = self.row.get("answer", answer_picture), {}
        models = {"unmerged": model.to(device), "merged": merged_copy(model).to(device)}
        with torch.inference_mode():
            for _ in range(2 + 5 * self.job["rounds"]):
                for name, each in models.items():
                    self.stamps = []
                    self.tick()
                    answer(each, batch)
                    self.tick()
                    found.setdefault(name, []).append(self.stamps[1] - self.stamps[0])
            facts |= {"latency": {name: statistics.median(values[2:]) for name, values in found.items()}}
            if "convolution" in self.row and self.real:
                facts |= {"convolution": self.row["convolution"]()}
            return {**facts, **(self.real_time(lambda: answer(models["merged"], batch)) if "sound" in self.row else {})}

    def real_time(self, answer) -> dict:
        """Seconds of wall time for a second of sound on two threads, the fastest of a few; below 1 keeps up with a speaker."""
        import torch

        threads, found = torch.get_num_threads(), []
        torch.set_num_threads(2)
        for _ in range(2 + self.job["rounds"]):
            began = time.perf_counter()
            answer()
            found.append(time.perf_counter() - began)
        torch.set_num_threads(threads)
        return {"real_time": min(found) / self.row["sound"](self.model, self.sample)}

    def memory(self) -> dict:
        """Peak of the process (CPU) or of the device's allocator in bytes, over a few steps of one variant."""
        import torch

        self.turn(self.job["variants"][0])
        on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"bytes": torch.cuda.max_memory_allocated() if self.cuda else on_cpu}

    def loading(self) -> dict:
        """Seconds until the demo's data is ready, and of loading one training sample, in this process."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = self.settings("lora", folder)
            self.stamps = []
            self.tick()
            loader = self.row["loader"](config)
            self.tick()
            loader.batch_sampler.set_range(1, 0, None)
            samples = sum(len(batch.get("index", next(iter(batch.values())))) for batch in loader)
            self.tick()
        return {"ready": self.stamps[1] - self.stamps[0], "sample": (self.stamps[2] - self.stamps[1]) / samples}


def first_step(job: dict) -> dict:
    """Seconds of wall time: of train_lora.py --help, and of its demo until the first step is in metrics.jsonl."""
    place = ROOT / TASKS[job["task"]]["folder"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "train_lora.py", "--help"], cwd=place, capture_output=True, check=True)
    seconds = {"help": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_lora.py", "--epochs", "1", "--max_steps_per_epoch", "1", "--output_dir", folder]
        began = time.perf_counter()
        script = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while "first_step" not in seconds and script.poll() is None:
            time.sleep(0.01)
            lines = [line for file in Path(folder).glob("*/*/metrics.jsonl") for line in file.read_text().splitlines()]
            if any('"step": 1' in line for line in lines):
                seconds["first_step"] = time.perf_counter() - began
        script.wait()
    return seconds


def work(job: dict) -> None:
    """What one of our processes does: a measurement, printed as JSON."""
    if job["part"] == "start":
        result = {**first_step(job), **Bench(job).loading()}
    else:
        result = getattr(Bench(job), job["part"])()
    print(MARK + json.dumps(result), flush=True)


# ---- all of them -----------------------------------------------------------------------------------------------------


def measure(config, **job) -> dict:
    """The result of a process of ours, whatever it printed before."""
    job = {**job, "rounds": config.rounds, "steps": config.steps, "batch_size": config.batch_size, "device": config.device}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or MARK not in done.stdout:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{job['part']} of {job['task']} ({job['size']}) ended with {done.returncode}: {last}")
    return json.loads(done.stdout.rpartition(MARK)[2])


def measure_all(config):
    """Yields a record for each task, size and choice of layers."""
    variants = list(dict.fromkeys(["full", "lora", *config.variants.split(",")]))
    parts = config.parts.split(",")
    for size in config.sizes.split(","):
        for task in config.tasks.split(","):
            for targets in TASKS[task]["targets"]:
                row = {"task": task, "size": size, "targets": targets}
                print(f"measuring {task}, {size}, {targets}", flush=True)
                there = TASKS[task].get("variants", VARIANTS)
                row |= measure(config, part="steps", variants=[v for v in variants if v in there], **row)
                if "memory" in parts:
                    both = [v for v in ("full", "lora", "peft") if v in there]
                    row["memory"] = {v: measure(config, part="memory", variants=[v], **row)["bytes"] for v in both}
                if "start" in parts and size == "demo" and targets == TASKS[task]["targets"][0]:
                    row["start"] = measure(config, part="start", **row)
                yield row


def ratio(row: dict, over: str, under: str) -> str:
    """Median of the turns' ratios, with the lowest and the highest in brackets; nothing where one was not timed."""
    seconds = row["seconds"]
    if over not in seconds or under not in seconds:
        return ""
    found = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]"


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def tables(rows: list[dict]) -> str:
    """Markdown: steps, sizes and memory, starting."""
    named = [(f"{r['task']}, {r['size']}, {r['targets']}", r) for r in rows]
    others = [name for name in VARIANTS if name != "full" and any(name in r["seconds"] for r in rows)]
    steps = [
        [name, f"{r['batch']}", f"{statistics.median(r['seconds']['full']) * 1e3:.0f} ms"]
        + [ratio(r, other, "full") for other in others]
        + [ratio(r, "trainer", "lora")]
        for name, r in named
    ]
    sizes = []
    for name, r in named:
        (total, trained), (whole, adapter), latency = r["parameters"], r["bytes"], r["latency"]
        memory = [f"{r['memory'][v] / 1e6:.0f} MB" if v in r.get("memory", ()) else "" for v in ("full", "lora", "peft")]
        answer = [f"{latency[kind] * 1e3:.1f} ms" for kind in ("unmerged", "merged")]
        sizes.append([name, f"{trained:,} of {total:,}", f"{adapter / 1e6:.2f} of {whole / 1e6:.2f} MB", *memory, *answer])
    head = ["task, size, layers", "batch", VARIANTS["full"], *(VARIANTS[o] for o in others), "HF Trainer / LoRA here"]
    blocks = ["Time of a step, as a share of the full fine-tune's: median of the turns [lowest-highest].", table(head, steps)]
    head = [
        "task, size, layers",
        "trained parameters",
        "checkpoint",
        "peak, full",
        "peak, LoRA here",
        "peak, PEFT",
        "unmerged",
        "merged",
    ]
    blocks += ["What trains and is saved, memory of a training process, and a forward pass of one sample.", table(head, sizes)]
    return "\n\n".join(blocks + more_tables(named))


def more_tables(named: list[tuple[str, dict]]) -> list[str]:
    """What is measured of some tasks alone: a sentence and a table of each. named: (what was measured, its row)."""
    sounds = [[name, f"{r['real_time']:.2f}"] for name, r in named if "real_time" in r]
    convolutions = [
        [name, *(f"{r['convolution'][way] * 1e3:.1f} ms" for way in ("sparse", "table", "dense"))]
        for name, r in named
        if "convolution" in r
    ]
    starts = [
        [
            r["task"],
            *(f"{r['start'][key]:.1f} s" for key in ("help", "first_step", "ready")),
            f"{r['start']['sample'] * 1e3:.2f} ms",
        ]
        for _, r in named
        if "start" in r
    ]
    blocks = []
    if sounds:
        blocks += ["Seconds that a second of converted sound takes from content and F0 on, merged, two threads, wall time."]
        blocks += [table(["task, size, layers", "real-time factor"], sounds)]
    if convolutions:
        blocks += ["A 3^3 convolution of 32 channels on a grid of 64^3 voxels, of which 5 % are there at random places."]
        blocks += [table(["task, size, layers", "sparse", "its table of neighbours", "dense conv3d"], convolutions)]
    if starts:
        head = ["demo", "--help", "until the first step", "data ready", "loading a sample"]
        blocks += ["Starting train_lora.py, and the demo's data alone.", table(head, starts)]
    return blocks


def around_tables(page: Path) -> tuple[str, str]:
    """(what stands above the tables of a page, what below). UserError where it has no place for them, or cannot be written."""
    check_place("--page", page.parent)
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{MEASURED}\n{MEASURED_END}\n"
    if text.count(MEASURED) != 1 or text.count(MEASURED_END) != 1:
        raise UserError(f"{page} has no place for the tables: it needs the lines {MEASURED} and {MEASURED_END}")
    return text.split(MEASURED)[0], text.split(MEASURED_END)[1]


def write_page(page: Path, made: str) -> None:
    above, below = around_tables(page)
    page.write_text(f"{above}{MEASURED}\n{made}\n{MEASURED_END}{below}", encoding="utf-8")


def main(argv=None):
    config = parse(BenchmarkConfig, argv)
    if config.job:
        return work(json.loads(config.job))
    file, page, rows = Path(config.json).expanduser(), Path(config.page).expanduser(), []
    around_tables(page)
    file.parent.mkdir(parents=True, exist_ok=True)
    for row in measure_all(config):
        rows.append(row)
        file.write_text(json.dumps({"processor": processor_name(), "rows": rows}, indent=1), encoding="utf-8")
    machine, on_gpu = rows[0]["machine"], not rows[0]["machine"]["device"].startswith("cpu")
    clock = "wall time, synchronised" if on_gpu else "the process's own time on one thread"
    where = f"{machine['device']} ({processor_name()}), {clock}"
    made = (
        f"{tables(rows)}\n\nMeasured on {where}; {config.rounds} turns of {config.steps} steps, the fastest of each turn. Rank "
        f"and alpha are the scripts' own, dropout is 0; last blocks: {LAST_K['real']} (demo: {LAST_K['demo']}). torch "
        f"{machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}."
    )
    write_page(page, made)
    print(f"{made}\nsaved in {config.page} and {file}")


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    cli(main)
