"""Trains what a comparison needs and what is not there yet: tasks x seeds x methods, one run after the other.

    python scripts/run_all.py --tasks detection                            # head, LoRA and full on the demo, three seeds each
    python scripts/run_all.py --tasks pose --data_dir pose=~/points --runs_dir ~/runs/points
    python scripts/run_all.py --tasks clip --seeds 0 --sweep_lr -- --epochs 5         # what follows -- goes to every train script

Each run is its task's train script, started as a user would, and then its eval script on the test split, where the data has one.
Finished runs are read, others go on where they stopped: the same command again does what is left. Leaves run folders
<runs_dir>/<task>/<method>_s<seed>, what the scripts said in <runs_dir>/<task>/logs/, and after --sweep_lr
<runs_dir>/<task>/sweep.json. A runs_dir holds one experiment: a task's demo and your own data belong in two of them.
"""

import importlib.util
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.checkpoint import write_json  # noqa: E402
from common.config import Rate, Threads, UserError, cli, one_line, parse, project_root, range_of  # noqa: E402
from common.folders import check_place, other_setting, read_record  # noqa: E402
from common.runtime import Interrupted, StopSignals, counted, in_time, progress_bar  # noqa: E402
from task_modules import FOLDERS  # noqa: E402

METHODS = {"head": ("train_lora.py", "--lora_r", "0"), "lora": ("train_lora.py",), "full": ("train.py",)}
OF_A_RUN = {"seed", "output_dir", "run_name", "data_dir", "resume", "overwrite"}  # flags that each run has of its own
WIDER = 3  # times that a sweep tries one rate more, where its best one is at an end
NO_TEST = "has no test split"  # as every task's eval script says it


@dataclass
class RunAllConfig:
    """Settings; the comment of a line is its help text."""

    tasks: str = ",".join(FOLDERS)  # names of tasks, with commas between
    seeds: str = "0,1,2"  # of each a run; with commas between
    methods: str = ",".join(METHODS)  # head (the new layers alone), lora, full
    data_dir: str = ""  # task=folder, with commas between; a task that is not named: its demo
    runs_dir: str = ""  # where the run folders go, for one experiment; empty: outputs/ beside common/
    sweep_lr: bool = False  # first find the best learning rate of each method, on the first seed's validation data
    threads: Threads = 0  # CPU threads of each run; 0: as torch chooses

    def __post_init__(self):
        self.data_dirs = {}
        for text in filter(None, self.data_dir.split(",")):
            task, mark, folder = text.partition("=")
            if not mark or not folder:
                raise UserError(f"--data_dir {text}: expected task=folder, as in detection=~/boxes")
            self.data_dirs[task.strip()] = folder
        if odd := [text for text in self.seeds.split(",") if not text.strip().isdecimal()]:
            raise UserError(f"--seeds: {odd[0]!r} is no whole number; expected some with commas between, as in 0,1,2")


# ---- what is wanted --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class PlannedRun:
    """A run that is wanted: its folder, the settings that it is to have, and the commands that train and score it."""

    task: str
    method: str
    folder: Path
    config: object
    train: list[str]
    score: list[str]

    def __str__(self):
        return f"{self.task}/{self.folder.name}"

    @property
    def record(self) -> dict:
        """summary.json; {} before the run has begun."""
        return read_record(self.folder)

    def is_finished(self) -> bool:
        """Whether all its epochs are done. UserError where its folder holds a run with other settings, which is not replaced."""
        then = self.record.get("config")
        if isinstance(then, dict) and (fault := other_setting(self.config, then)):
            raise UserError(f"{self.folder} is another run: {fault}; name another --runs_dir, or remove that folder")
        whole = isinstance(then, dict) and then.get("epochs") == self.config.epochs
        return whole and self.record.get("status") == "finished" and (self.folder / "checkpoints" / "best").is_dir()

    def is_scored(self) -> bool:
        """Whether there are scores of the test split, by the weights that are there now."""
        best, files = self.folder / "checkpoints" / "best", ("eval_test.json", "eval_test/samples.json")
        return all((path := self.folder / name).is_file() and path.stat().st_mtime >= best.stat().st_mtime for name in files)

    def best_value(self) -> float | None:
        """What its best epoch reached on the validation data; None where it did not come to its end, or has no such number."""
        metrics = self.record.get("metrics") or {}
        return (metrics.get("best") or {}).get(metrics.get("name")) if self.is_finished() else None


def planned_run(task: str, method: str, seed: int, runs_dir: Path, data_dir="", extra=(), threads=0, rate=None) -> PlannedRun:
    """The run of a task by a method with a seed. extra: flags for its train script; rate: another lr than it would have."""
    script, *flags = METHODS[method]
    name = f"{method}_s{seed}" if rate is None else f"{method}_lr{rate:g}_s{seed}"
    flags += [*extra, "--seed", str(seed), "--output_dir", str(runs_dir), "--run_name", name]
    flags += ["--lr", f"{rate:g}"] if rate is not None else []
    flags += ["--data_dir", data_dir] if data_dir else []
    config, folder = settings_of(FOLDERS[task] / script, flags), runs_dir / task / name
    of_both = ["--threads", str(threads)] if threads else []
    score = ["eval.py", "--checkpoint", str(folder / "checkpoints" / "best"), "--split", "test", *of_both]
    return PlannedRun(task, method, folder, config, [script, *flags, *of_both, "--resume"], score)


def settings_of(script: Path, flags: list[str]):
    """The settings that a train script makes of these flags; of the script nothing else runs."""
    name = f"settings_of_{script.parent.name}_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where the comments of its dataclass are looked up
    try:
        spec.loader.exec_module(module)
        return parse(module.Config, flags)
    finally:
        del sys.modules[name]


def wanted_runs(tasks, seeds, methods, runs_dir="", data_dirs=None, extra=(), threads=0, sweep_lr=False) -> list[PlannedRun]:
    """The runs of train_missing, in their order: every task's with the first seed come first. With sweep_lr the sweeps are run.

    UserError for a task, method, folder or flag that there is not.
    """
    root = Path(runs_dir).expanduser().resolve() if runs_dir else project_root() / "outputs"
    check_place("--runs_dir", root)
    places = check_names(tasks, methods, data_dirs or {}, extra)
    for task in tasks:
        for method in methods:  # flags that a script does not know are found before any other has run for an hour
            planned_run(task, method, seeds[0], root, places.get(task, ""), extra, threads).is_finished()
    rates = {}
    for task in tasks if sweep_lr else ():
        swept = {}
        for method in methods:  # the head alone, too: a rate that is wrong for it would make LoRA look needed
            arm = partial(planned_run, task, method, seeds[0], root, places.get(task, ""), extra, threads)
            swept[method] = sweep(arm)
            rates[task, method] = swept[method]["best"] if swept[method]["best"] != swept[method]["default"] else None
            write_json(root / task / "sweep.json", swept)
    return [
        planned_run(task, method, seed, root, places.get(task, ""), extra, threads, rates.get((task, method)))
        for seed in seeds
        for task in tasks
        for method in methods
    ]


def check_names(tasks, methods, data_dirs: dict, extra) -> dict[str, str]:
    """{task: whole path of its data}. UserError for what there is not, and for flags that each run has of its own."""
    for what, names, known in (("--tasks", tasks, FOLDERS), ("--methods", methods, METHODS), ("--data_dir", data_dirs, tasks)):
        if odd := [name for name in names if name not in known]:
            raise UserError(f"{what}: there is no {odd[0]!r}; there are {', '.join(known)}")
    own = [flag for flag in extra if flag.partition("=")[0].replace("-", "_").removeprefix("__") in OF_A_RUN]
    if own:
        raise UserError(f"{own[0]} cannot be given to every train script: each run has its own")
    places = {task: Path(folder).expanduser().resolve() for task, folder in data_dirs.items()}
    for task, place in places.items():
        if not place.exists():
            raise UserError(f"--data_dir {task}={place}: there is no such folder")
    return {task: str(place) for task, place in places.items()}


# ---- doing it --------------------------------------------------------------------------------------------------------


def train_missing(
    tasks, seeds, methods=tuple(METHODS), runs_dir="", data_dirs=None, extra=(), threads=0, sweep_lr=False
) -> list[Path]:
    """The folders of all finished runs of tasks x seeds x methods; what is missing is trained, and scored on the test split.

    runs_dir: empty, outputs/ beside common/. data_dirs: {task: folder}; others: the demo. extra: flags for every train script.
    sweep_lr: at the best learning rate of each task and method (`sweep`). A run that fails is said, and is not in the list.
    """
    return [run.folder for run in carry_out(wanted_runs(tasks, seeds, methods, runs_dir, data_dirs, extra, threads, sweep_lr))[0]]


def carry_out(plans: list[PlannedRun], score: bool = True) -> tuple[list[PlannedRun], list[str]]:
    """Trains and scores what is not done yet. (the finished runs, a line about each fault); a fault of one leaves the others be.

    UserError, before anything starts, where a folder holds a run with other settings. SystemExit after Ctrl-C or SIGTERM: the
    run that is under way saves first.
    """
    left = [run for run in plans if not run.is_finished()]
    seconds = {(run.task, run.method): run.record.get("seconds") or 0.0 for run in plans if run not in left}
    faults, untested = [], set()
    print(f"{counted(len(plans), 'run')}: {len(plans) - len(left)} are there, {len(left)} to train", flush=True)
    try:
        with StopSignals(wait_always=False), progress_bar(None, "runs", total=len(plans), plain="{desc}{postfix}") as bar:
            for number, run in enumerate(plans, start=1):
                bar.set_description_str(f"{run}, {number} of {len(plans)}{time_left(left, seconds)}", refresh=False)
                if run in left:
                    began = time.monotonic()
                    faults.append(train_one(run, bar))
                    seconds[run.task, run.method] = time.monotonic() - began
                    left.remove(run)
                if score and run.task not in untested:
                    faults.append(score_one(run, bar, untested))
                bar.update()
    except Interrupted as signal:
        print(f"stopped; the same command goes on with {counted(len(left), 'run')} more", flush=True)
        raise SystemExit(128 + signal.signum) from None
    return [run for run in plans if run.is_finished()], list(filter(None, faults))


def train_one(run: PlannedRun, bar) -> str:
    """Trains a run, or the rest of it. What went wrong in a line, or ""."""
    tell(bar, bar.desc)
    fault = call(run, run.train, bar)
    said = f"failed: {fault}" if fault else f"finished: {run.record['metrics']['name']} {run.best_value()}"
    tell(bar, f"{run} {said}")
    return fault and f"{run} {said}"


def score_one(run: PlannedRun, bar, untested: set) -> str:
    """Scores a finished run on the test split, unless it is scored, or its task joins those without one. As train_one."""
    if not run.is_finished() or run.is_scored():
        return ""
    fault = call(run, run.score, bar)
    if NO_TEST in fault:
        untested.add(run.task)
        tell(bar, f"{run.task}: its data {NO_TEST}, so the validation data alone is scored")
        return ""
    return fault and f"{run} could not be scored: {fault}"


def tell(bar, text: str) -> None:
    bar.write(text)
    sys.stdout.flush()


def time_left(left: list[PlannedRun], seconds: dict[tuple, float]) -> str:
    """How long the runs that are left take, in words: as long as those of their task and method, of their task, or as all."""
    total = 0.0
    for run in left:
        alike = [took for (task, method), took in seconds.items() if (task, method) == (run.task, run.method)]
        alike = alike or [took for (task, _), took in seconds.items() if task == run.task] or list(seconds.values())
        if not alike:
            return ""
        total += sum(alike) / len(alike)
    return f", {in_time(total)} left" if left else ""


def call(run: PlannedRun, command: list[str], bar) -> str:
    """Runs a script of the task in its folder; what it says goes to the log. "", or where it failed its last line and the log."""
    log = run.folder.parent / "logs" / f"{run.folder.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n> python {shlex.join(command)}\n")
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=FOLDERS[run.task],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            process_group=0,  # of its own, so that Ctrl-C on the terminal reaches it once: from `stop`
        )
        last = "it said nothing"
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = line.strip() or last
                bar.set_postfix_str(last[:60], refresh=sys.stderr.isatty())
        except BaseException:  # Interrupted, most of all
            stop(process, file)
            raise
    bar.set_postfix_str("", refresh=False)
    return "" if process.wait() == 0 else f"{one_line(last)[:300]} (exit code {process.returncode}; {log})"


def stop(process, file) -> None:
    """Has a script save and leave, and waits until it has; its last words go to the log."""
    process.send_signal(SIGINT)
    file.write(process.communicate()[0] or "")


# ---- learning rates --------------------------------------------------------------------------------------------------


def sweep(planned) -> dict:
    """{"rates", "metric" (of each; None: that run failed), "best", "default", "name", "higher_is_better", "seed"} of one arm.

    planned(rate) -> PlannedRun; rate None: as its script has it. Best on the validation data; of equal ones the rate that is
    nearest to the default. Where it is the lowest or the highest that was tried, one beyond is tried, too.
    """
    base, powers = planned(None), [-2, -1, 0, 1, 2]  # of two: factors of the default
    for _ in range(1 + WIDER):
        rates = {power: float(f"{base.config.lr * 2.0**power:g}") for power in powers}
        rates = {power: rate for power, rate in rates.items() if range_of(Rate).holds(rate)}
        runs = {power: planned(rate if power else None) for power, rate in rates.items()}
        carry_out(list(runs.values()), score=False)
        values = {power: run.best_value() for power, run in runs.items()}
        known = [(power, value) for power, value in values.items() if value is not None]
        if not known:
            raise UserError(f"{base.task}: no {base.method} run of the sweep came to its end: see {base.folder.parent / 'logs'}")
        name, up = (runs[known[0][0]].record["metrics"][key] for key in ("name", "higher_is_better"))
        best = max((value if up else -value, -abs(power), power) for power, value in known)[-1]
        if best not in (min(rates), max(rates)):
            break
        powers = sorted({*powers, best - 1, best + 1})
    return {
        "rates": list(rates.values()),
        "metric": list(values.values()),
        "best": rates[best],
        "default": base.config.lr,
        "name": name,
        "higher_is_better": up,
        "seed": base.config.seed,
    }


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    config = parse(RunAllConfig, own)
    seeds = [int(text) for text in config.seeds.split(",")]
    tasks, methods = (names.split(",") for names in (config.tasks, config.methods))
    plans = wanted_runs(tasks, seeds, methods, config.runs_dir, config.data_dirs, extra, config.threads, config.sweep_lr)
    finished, faults = carry_out(plans)
    print(f"finished: {len(finished)} of {counted(len(plans), 'run')}, in {plans[0].folder.parents[1]}")
    if faults:
        print("\n".join(faults), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    cli(main)
