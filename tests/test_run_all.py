"""scripts/run_all.py: what is missing is trained, what is there is read, and a run that fails leaves the others be.

The train scripts are stand-ins that take no time; their settings, and the records that they leave, are the real ones.
"""

import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Child

sys.path.insert(0, str(ROOT / "scripts"))
from tasks import read  # noqa: E402

import run_all  # noqa: E402
from common.config import UserError  # noqa: E402
from run_all import carry_out, planned_run, sweep, train_missing, wanted_runs  # noqa: E402

TRAIN = """
import dataclasses, json, os, sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
from common.config import TrainConfig, cli, parse
from dataclasses import dataclass

@dataclass
class Config(TrainConfig):
    lr: float = 0.01  # rate
    lora_r: int = 8  # rank
    lora_dropout: float = 0.0  # fails above 0

def main():
    config = parse(Config)
    folder = Path(config.output_dir) / "toy" / config.run_name
    (folder / "checkpoints" / "best").mkdir(parents=True, exist_ok=True)
    (folder.parent / "calls").open("a").write(f"{config.run_name} {config.resume} {os.getcwd()}\\n")

    def write(status):
        best = {"epoch": 1, "score": -abs(config.lr - 0.05)}
        metrics = {"name": "score", "higher_is_better": True, "best": best}
        record = {"config": dataclasses.asdict(config), "status": status, "seconds": 7.0, "metrics": metrics}
        (folder / "summary.json").write_text(json.dumps(record))

    if config.lora_dropout and config.seed == 1 or config.lr > 10:
        write("failed")
        print("loss is not finite at step 3", file=sys.stderr)
        raise SystemExit(2)
    write("running")
    if config.patience and not (folder / "stopped").exists():
        (folder / "stopped").write_text("")
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            write("interrupted")
            print("saved")
            raise SystemExit(130)
    write("finished")

if __name__ == "__main__":
    cli(main)
"""
EVAL = """
import sys
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--checkpoint") + 1]).parents[1]
(run.parent / "calls").open("a").write(f"eval {run.name}\\n")
if (Path.cwd() / "no_test").exists():
    sys.exit("error: the demo data has no test split; it has train, val")
(run / "eval_test").mkdir(exist_ok=True)
(run / "eval_test.json").write_text("{}")
(run / "eval_test" / "samples.json").write_text("{}")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A task of stand-ins: its folder. Runs go to tmp_path / "runs"."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name in ("train.py", "train_lora.py"):
        (folder / name).write_text(TRAIN.replace("ROOT", repr(str(ROOT))))
    (folder / "eval.py").write_text(EVAL)
    monkeypatch.setitem(run_all.FOLDERS, "toy", folder)
    return folder


def calls(tmp_path):
    return [line.split()[:2] for line in (tmp_path / "runs" / "toy" / "calls").read_text().splitlines()]


def test_what_is_missing_is_trained_and_scored_and_then_read(toy, tmp_path, capsys):
    folders = train_missing(["toy"], [7], ("head", "full"), tmp_path / "runs")
    assert [folder.name for folder in folders] == ["head_s7", "full_s7"]
    assert [name for name, _ in calls(tmp_path)] == ["head_s7", "eval", "full_s7", "eval"]
    configs = [read(folder / "summary.json")["config"] for folder in folders]
    assert [(config["seed"], config["lora_r"]) for config in configs] == [(7, 0), (7, 8)]
    done = calls(tmp_path)
    assert train_missing(["toy"], [7], ("head", "full"), tmp_path / "runs") == folders
    assert calls(tmp_path) == done  # nothing ran again
    assert "2 runs: 2 are there, 0 to train" in capsys.readouterr().out
    (folders[0] / "eval_test.json").unlink()
    train_missing(["toy"], [7], ("head",), tmp_path / "runs", extra=["--epochs", "20"])  # goes on for longer, and is scored anew
    assert [name for name, _ in calls(tmp_path)[len(done) :]] == ["head_s7", "eval"]
    assert read(folders[0] / "summary.json")["config"]["epochs"] == 20


def test_scripts_run_in_the_folder_of_their_task_with_resume(toy, tmp_path):
    train_missing(["toy"], [0], ("lora",), tmp_path / "runs", threads=1)
    name, resumes, place = (tmp_path / "runs" / "toy" / "calls").read_text().splitlines()[0].split(maxsplit=2)
    assert (name, resumes, place) == ("lora_s0", "True", str(toy))
    assert "> python train_lora.py" in (tmp_path / "runs" / "toy" / "logs" / "lora_s0.txt").read_text()


def test_a_run_with_other_settings_is_refused_before_anything_starts(toy, tmp_path):
    train_missing(["toy"], [1], ("full",), tmp_path / "runs")
    before = calls(tmp_path)
    with pytest.raises(UserError, match="full_s1 is another run: lr is 0.5 now and was 0.01"):
        train_missing(["toy"], [0, 1], ("full",), tmp_path / "runs", extra=["--lr", "0.5"])
    assert calls(tmp_path) == before


def test_one_that_fails_is_named_and_the_others_go_on(toy, tmp_path, capsys):
    flags = ["--tasks", "toy", "--seeds", "1,2", "--methods", "lora", "--runs_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as left:
        run_all.main([*flags, "--", "--lora_dropout", "0.1"])
    assert left.value.code == 1
    said, log = capsys.readouterr(), tmp_path / "runs" / "toy" / "logs" / "lora_s1.txt"
    assert said.err == f"toy/lora_s1 failed: loss is not finite at step 3 (exit code 2; {log})\n"
    assert "toy/lora_s2 finished: score -0.04" in said.out and "finished: 1 of 2 runs" in said.out
    assert "loss is not finite" in log.read_text()


def test_data_without_a_test_split_is_no_fault(toy, tmp_path):
    (toy / "no_test").write_text("")
    finished, faults = carry_out(wanted_runs(["toy"], [0, 1], ["full"], tmp_path / "runs"))
    assert len(finished) == 2 and faults == []
    assert [name for name, _ in calls(tmp_path)] == ["full_s0", "eval", "full_s1"]  # one answer is enough


def test_ctrl_c_has_the_run_save_and_the_same_call_goes_on_with_it(toy, tmp_path):
    def train():
        train_missing(["toy"], [0, 1], ("full",), tmp_path / "runs", extra=["--patience", "3"])

    child = Child(train, log=tmp_path / "log")
    run = tmp_path / "runs" / "toy" / "full_s0"
    child.wait_for((run / "stopped").exists)
    time.sleep(0.1)
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    assert "stopped; the same command goes on with 2 runs more" in child.text
    assert read(run / "summary.json")["status"] == "interrupted"
    assert (tmp_path / "runs" / "toy" / "logs" / "full_s0.txt").read_text().endswith("saved\n")
    again = planned_run("toy", "full", 0, tmp_path / "runs", extra=["--patience", "3"])
    assert carry_out([again]) == ([again], [])


def test_a_sweep_goes_on_where_its_best_rate_is_at_an_end_and_seeds_run_at_it(toy, tmp_path):
    folders = train_missing(["toy"], [0], ("head", "full"), tmp_path / "runs", sweep_lr=True)
    found = read(tmp_path / "runs" / "toy" / "sweep.json")["full"]
    assert found["rates"] == [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]  # the best, 0.04, was at an end
    assert found["best"] == 0.04 and found["default"] == 0.01 and found["metric"][4] == max(found["metric"])
    assert [folder.name for folder in folders] == ["head_lr0.04_s0", "full_lr0.04_s0"]  # the head alone is swept, too
    swept = [path.name for path in (tmp_path / "runs" / "toy").glob("full*_s0")]
    assert len(swept) == 6 and "full_s0" in swept  # the default is a run like any other
    scored = {path.parent.name for path in (tmp_path / "runs" / "toy").glob("*/eval_test.json")}
    assert scored == {folder.name for folder in folders}  # nobody has looked at the test split while choosing


class Answer:
    """A run of a sweep that reached a value at its rate; None: it failed."""

    task, method, folder = "toy", "lora", Path("runs/toy/lora")

    def __init__(self, rate, reached):
        self.config = SimpleNamespace(lr=rate or 1e-3, seed=0)
        self.record = {"metrics": {"name": "mcd", "higher_is_better": False}}
        self.best_value = lambda: reached(self.config.lr)


def test_a_sweep_tries_three_rates_beyond_and_a_run_that_failed_counts_as_none(monkeypatch):
    monkeypatch.setattr(run_all, "carry_out", lambda plans, score: None)
    found = sweep(lambda rate: Answer(rate, lambda lr: lr if lr < 3e-3 else None))  # the lower the better, for ever
    assert found["rates"] == [3.125e-05, 6.25e-05, 0.000125, 0.00025, 0.0005, 0.001, 0.002, 0.004]
    assert found["best"] == 3.125e-05 and found["metric"][-1] is None
    assert sweep(lambda rate: Answer(rate, lambda lr: 1.0))["best"] == 1e-3  # of equal ones the default
    with pytest.raises(UserError, match="toy: no lora run of the sweep came to its end: see runs/toy/logs"):
        sweep(lambda rate: Answer(rate, lambda lr: None))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "poses"], "there is no 'poses'"),
        (["--methods", "dora"], "there is no 'dora'"),
        (["--seeds", "0,x"], "'x' is no whole number"),
        (["--data_dir", "~/boxes"], "expected task=folder"),
        (["--data_dir", "toy=/nowhere"], "there is no such folder"),
        (["--tasks", "toy", "--data_dir", "pose=/tmp"], "there is no 'pose'; there are toy"),
        (["--", "--run_name", "x"], "--run_name cannot be given to every train script"),
    ],
)
def test_mistakes_are_one_line_each(toy, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run_all.main([*(["--tasks", "toy"] if "--tasks" not in flags else []), "--runs_dir", str(tmp_path), *flags])


def test_settings_are_those_of_the_real_scripts(tmp_path):
    run = planned_run("pose", "head", 3, tmp_path, extra=["--epochs", "2"])
    assert (run.config.lora_r, run.config.seed, run.config.epochs, run.config.model) == (0, 3, 2, "demo")
    assert run.folder == tmp_path / "pose" / "head_s3"
    assert not [name for name, module in sys.modules.items() if "image_tasks/pose" in str(getattr(module, "__file__", ""))]
