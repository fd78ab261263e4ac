"""Stopped anywhere and taken up again, a run ends with the bits that it would have had."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, metrics_of, run_toy, start_toy

from common.checkpoint import atomic_folder, load_state, save_state
from common.config import TrainConfig, UserError
from common.folders import check_same_settings
from common.optim import schedule

TOY = ROOT / "tests" / "toy_train.py"
# Dropout, augmentation, BatchNorm, accumulation with a short last window: all that could go astray.
LONG = ["--gradient_accumulation_steps", "3"]


def bits(run: Path) -> tuple[str, list[dict], bytes]:
    """Final weights, metrics and best model of a run."""
    best = (run / "checkpoints" / "best" / "model.safetensors").read_bytes()
    return (run / "fingerprint.txt").read_text(), metrics_of(run), best


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_toy(folder, *LONG)
    return bits(folder / "toy" / "full")


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def steps_saved(run: Path) -> list[int]:
    last = run / "checkpoints" / "last"
    return sorted(int(p.name[5:]) for p in last.glob("step-*") if p.suffix != ".corrupt")


def newest_step(run: Path) -> int:
    return max(steps_saved(run), default=-1)


def test_the_settings_that_may_differ_do_not_matter(tmp_path, undisturbed):
    run_toy(tmp_path, *LONG, "--num_workers", "2", "--save_steps", "1")
    assert bits(tmp_path / "toy" / "full") == undisturbed
    run_toy(tmp_path, *LONG, "--run_name", "other", "--seed", "1")
    assert bits(tmp_path / "toy" / "other")[0] != undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "kills"),
    [
        (["--num_workers", "0", "--save_steps", "1"], 18),  # most of the time it is saving
        (["--num_workers", "2", "--save_steps", "2", "--pause", "0.004"], 12),
    ],
)
def test_kill_lottery(tmp_path, undisturbed, flags, kills):
    """kill -9 at random moments, from before the first file is written on; --resume at once, until the run gets through."""
    dice, run, hits, places = random.Random(len(flags)), tmp_path / "toy" / "full", 0, set()
    for attempt in range(100):
        before = newest_step(run)
        child = start_toy(tmp_path, *LONG, *flags, "--resume")
        if hits < kills:
            # Mostly once it got a little further than the one before, so that kills hit all of the run, in and between saves.
            further = before + dice.choice([0, 1, 1, 2])
            while child.running() and newest_step(run) < further:
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.3) if further == before else dice.uniform(0, 0.03))
            if child.running():
                child.kill(signal.SIGKILL)
        code = child.wait()
        hits += code == -signal.SIGKILL
        places.add(newest_step(run))
        assert code in (0, -signal.SIGKILL), f"attempt {attempt}, at step {before}: {child.text}"
        assert "damaged" not in child.text
        if code == 0:
            if hits >= kills:
                break
            # Through before all kills were spent: from the start again.
            assert bits(run) == undisturbed
            shutil.rmtree(tmp_path / "toy")
    assert hits >= kills and len(places) > 6, places
    assert bits(run) == undisturbed
    record = summary(run)
    assert record["status"] == "finished" and record["steps"] == 18 and record["resumed_at_steps"]
    assert len(steps_saved(run)) == 2
    assert [p.name for p in (run / "checkpoints").rglob(".*")] == []


def real(*flags) -> subprocess.Popen:
    """toy_train.py as a process of its own, its output in pipes."""
    command = [sys.executable, "-u", TOY, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def read_until(process, words: str) -> str:
    text = ""
    while words not in text:
        line = process.stdout.readline()
        assert line, text
        text += line
    return text


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_resume(tmp_path, undisturbed):
    run = tmp_path / "toy" / "full"
    flags = ["--output_dir", tmp_path, *LONG, "--pause", "0.05"]
    process = real(*flags)
    read_until(process, "at work")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    first = summary(run)
    assert first["status"] == "interrupted" and "SIGTERM" in first["error"] and 0 < first["steps"] < 18
    assert "--resume" in said and steps_saved(run)[-1] == first["steps"], "saved where it stopped"

    process = real(*flags, "--resume")
    said = read_until(process, "at work on a batch of epoch 2")
    assert f"resumed at step {first['steps']}," in said
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, said
    second = summary(run)
    assert second["status"] == "interrupted" and first["steps"] < second["steps"] < 18
    assert second["resumed_at_steps"] == [first["steps"]]

    run_toy(tmp_path, *LONG, "--pause", "0.05", "--resume")
    assert bits(run) == undisturbed


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_second_ctrl_c_leaves_at_once(tmp_path, workers):
    child = start_toy(tmp_path, "--pause", "20", "--num_workers", workers)
    child.wait_for(lambda: "at work" in child.text)
    child.kill(signal.SIGINT)
    child.wait_for(lambda: "Ctrl-C again" in child.text)
    time.sleep(0.1)
    assert child.running(), "the first one waits for the end of the step"
    child.kill(signal.SIGINT)
    began = time.monotonic()
    assert child.wait() == 130
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group(tmp_path, undisturbed, signum):
    """As schedulers and terminals send it: the data workers get it, too, and the run must still save and leave cleanly."""
    flags = [*LONG, "--num_workers", "2", "--pause", "0.02"]

    child = start_toy(tmp_path, *flags, group=True)
    run = tmp_path / "toy" / "full"
    child.wait_for(lambda: "epoch 1/3" in child.text)
    os.killpg(child.pid, signum)
    assert child.wait() == 128 + signum, child.text
    assert summary(run)["status"] == "interrupted", child.text
    assert steps_saved(run)[-1] == summary(run)["steps"] > 0
    run_toy(tmp_path, *flags, "--resume")
    assert bits(run) == undisturbed


def test_a_second_sigterm_does_not_cut_the_save_short(tmp_path, undisturbed):
    run = tmp_path / "toy" / "full"
    child = start_toy(tmp_path, *LONG, "--pause", "0.05")
    child.wait_for(lambda: "epoch 1/3" in child.text)
    while summary(run)["status"] == "running" and child.running():
        child.kill(signal.SIGTERM)
    assert child.text.count("stopping:") == 1
    assert child.wait() == 128 + signal.SIGTERM, child.text
    assert steps_saved(run)[-1] == summary(run)["steps"]
    run_toy(tmp_path, *LONG, "--pause", "0.05", "--resume")
    assert bits(run) == undisturbed


def start_and_kill(folder: Path, *flags, after: str = "epoch 2/3") -> Path:
    child = start_toy(folder, *LONG, *flags)
    child.wait_for(lambda: after in child.text)
    child.kill(signal.SIGKILL)
    child.wait()
    return folder / "toy" / "full"


def test_other_settings_are_refused_by_name(tmp_path):
    run = start_and_kill(tmp_path, "--pause", "0.01")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    said = run_toy(tmp_path, *LONG, "--pause", "0.01", "--resume", "--lr", "0.02", expect=2)
    assert "lr is 0.02 now and was 0.01" in said
    said = run_toy(tmp_path, "--pause", "0.01", "--resume", expect=2)
    assert "gradient_accumulation_steps is 1 now and was 3" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_from_before_heads_had_a_rate_goes_on_at_lr(tmp_path):
    for lr, now, goes_on in ((1e-4, 1e-4, True), (1e-4, 0.0, True), (1e-2, 1e-3, True), (1e-4, 1e-3, False)):
        (tmp_path / "config.yaml").write_text(f"lr: {lr}\nwarmup_steps: 50\n")
        config = TrainConfig(lr=lr, lr_head=now, warmup_steps=50)
        if goes_on:
            check_same_settings(config, tmp_path)
            continue
        with pytest.raises(UserError, match=f"lr_head is {now} now and was {lr}"):
            check_same_settings(config, tmp_path)


def test_other_data_is_refused_and_the_record_stays(tmp_path):
    run_toy(tmp_path, "--epochs", "1")
    run = tmp_path / "toy" / "full"
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("samples: 64", "samples: 65"))  # as if the data had grown
    before = (run / "summary.json").read_bytes()
    said = run_toy(tmp_path, "--epochs", "1", "--samples", "65", "--resume", expect=2)
    assert "the data is not the one" in said and "give --cache as then" in said
    assert (run / "summary.json").read_bytes() == before


def test_resume_of_a_finished_run_changes_nothing(tmp_path, undisturbed):
    run_toy(tmp_path, *LONG)
    run = tmp_path / "toy" / "full"
    said = run_toy(tmp_path, *LONG, "--resume")
    assert bits(run) == undisturbed and "epoch 1/3" not in said
    assert summary(run)["status"] == "finished" and summary(run)["steps"] == 18
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["full"]


def test_a_finished_run_goes_on_for_more_epochs(tmp_path):
    run_toy(tmp_path, "--epochs", "1")
    run = tmp_path / "toy" / "full"
    said = run_toy(tmp_path, "--epochs", "1", "--resume")
    assert "nothing is left to do, epoch 1 was the last; --resume --epochs 2 goes on" in said
    said = run_toy(tmp_path, "--epochs", "3", "--resume")
    assert f"the learning rate follows the schedule of all of them, from {1e-2 * schedule(16, 4, 48):.2g} on" in said
    record = summary(run)
    assert record["predicted"] is None  # what was foretold was of one epoch
    assert record["status"] == "finished" and record["epochs"] == 3 == record["config"]["epochs"] and record["steps"] == 48
    rates = {line["step"]: line["lr"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "lr" in line}
    for step in (20, 30, 40):  # the line of a step has the rate of the next one
        assert rates[step] == pytest.approx(1e-2 * schedule(step, 4, 48))
    assert "epochs is 2 now and was 3" in run_toy(tmp_path, "--epochs", "2", "--resume", expect=2)
    assert "resumed at step 48" in run_toy(tmp_path, "--epochs", "3", "--resume")


def test_a_run_that_stopped_early_says_how_it_goes_on(tmp_path):
    flags = ["--epochs", "9", "--lr", "0.5", "--max_steps_per_epoch", "4"]
    run_toy(tmp_path, *flags, "--patience", "1")
    stopped_at = summary(tmp_path / "toy" / "full")["epochs"]
    assert stopped_at < 9
    assert "--resume --patience 2 goes on" in run_toy(tmp_path, *flags, "--patience", "1", "--resume")
    run_toy(tmp_path, *flags, "--patience", "0", "--resume")
    assert summary(tmp_path / "toy" / "full")["epochs"] == 9


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path, undisturbed):
    """One loss had its sums as a bare pair then; and a field that is no more, or was not yet, is no fault."""
    run = start_and_kill(tmp_path, "--save_steps", "1", "--pause", "0.01")
    folder = sorted((run / "checkpoints" / "last").glob("step-*"))[-1]
    saved = json.loads((folder / "progress.json").read_text())
    saved |= {"loss_sums": saved["loss_sums"].get("loss", [0.0, 0]), "of_old": 1}
    assert saved.pop("bad_epochs") in (0, 1, 2)
    with atomic_folder(folder) as aside:
        (aside / "progress.json").write_text(json.dumps(saved))
        shutil.copy(folder / "state.pt", aside)
    said = run_toy(tmp_path, *LONG, "--save_steps", "1", "--pause", "0.01", "--resume")
    assert f"resumed at step {saved['step']}," in said
    assert bits(run) == undisturbed


@pytest.mark.parametrize(("fault", "batch", "code"), [("passed_by_later", 6, 0), ("dead", 3, 2)])
def test_what_has_had_a_gradient_is_known_after_a_resume_within_the_first_steps(tmp_path, fault, batch, code):
    """Step 10 looks whether all that trains has had one; those before the stop count, as passed_by_later's five."""
    flags = ["--fault", fault, "--max_steps_per_epoch", "5", "--pause", "0.02"]
    child = start_toy(tmp_path, *flags)
    child.wait_for(lambda: child.text.count("at work") >= batch)
    child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM and batch <= summary(tmp_path / "toy" / "full")["steps"] < 10
    said = run_toy(tmp_path, *flags, "--resume", expect=code)
    assert ("2 trainable tensors got no gradient" in said) == (code == 2)


def test_a_resume_reads_its_checkpoint_once(tmp_path, monkeypatch):
    from common import resuming
    from common.checkpoint import save_state
    from common.run import Run

    state = {"models": [], "optimizers": [], "schedulers": [], "scaler": {}}
    save_state(tmp_path, state, {"step": 3})
    run, reads, load = Run(TrainConfig(), "toy", "full"), [], resuming.load_state
    run.accelerator = SimpleNamespace(scaler=None)
    monkeypatch.setattr(resuming, "load_state", lambda folder: reads.append(folder) or load(folder))
    resuming.go_on_from(tmp_path, run)
    assert run.step == 3 and reads == [tmp_path]


@pytest.mark.parametrize("name", ["state.pt", "progress.json", "manifest.json"])
def test_damaged_newest_checkpoint_falls_back(tmp_path, undisturbed, name):
    run = start_and_kill(tmp_path, "--save_steps", "1", "--pause", "0.01")
    step = steps_saved(run)[-1]
    path = run / "checkpoints" / "last" / f"step-{step:08d}" / name
    path.write_bytes(path.read_bytes()[:-10])
    said = run_toy(tmp_path, *LONG, "--save_steps", "1", "--pause", "0.01", "--resume")
    assert f"step-{step:08d} is damaged" in said and f"resumed at step {step - 1}," in said
    assert bits(run) == undisturbed


def test_all_damaged_stops_and_overwrite_starts_over(tmp_path, undisturbed):
    run = start_and_kill(tmp_path)
    for path in run.glob("checkpoints/last/step-*/state.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        assert "every checkpoint" in run_toy(tmp_path, *LONG, "--resume", expect=2)
    run_toy(tmp_path, *LONG, "--overwrite")
    assert bits(run) == undisturbed


# ---- records that somebody damaged, or that are of another run ---------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The parent of toy/full, a run that was killed in its second epoch. Tests damage copies of it."""
    folder = tmp_path_factory.mktemp("stopped")
    start_and_kill(folder, "--pause", "0.01")
    return folder


def resumed(folder: Path, *flags, expect: int = 0) -> str:
    said = run_toy(folder, *LONG, "--pause", "0.01", "--resume", *flags, expect=expect)
    assert "Traceback" not in said and (expect == 0 or said.count("error: ") == 1)
    return said


def test_without_config_yaml_nobody_knows_the_settings(tmp_path, stopped):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "toy" / "full" / "config.yaml").unlink()
    said = resumed(tmp_path, expect=2)
    assert "config.yaml is gone" in said and "summary.json has them all" in said


def test_the_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path, stopped):
    """Its tensors would fit; a run that took it up would be neither the one nor the other."""
    run_toy(tmp_path, *LONG, "--pause", "0.01", "--lr", "0.5", "--epochs", "1", "--max_steps_per_epoch", "1")
    last, run = tmp_path / "toy" / "full" / "checkpoints" / "last", tmp_path / "mine" / "toy" / "full"
    shutil.copytree(stopped, tmp_path / "mine")
    shutil.rmtree(run / "checkpoints" / "last")
    shutil.copytree(last, run / "checkpoints" / "last")
    before = (run / "summary.json").read_bytes()
    assert "is of another run: max_steps_per_epoch is 0 now and was 1 there" in resumed(tmp_path / "mine", expect=2)
    assert (run / "summary.json").read_bytes() == before


@pytest.mark.parametrize("harm", ["shape", "names", "optimizers", "parts", "progress"])
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, stopped, harm):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "toy" / "full" / "checkpoints" / "last"
    state, progress = load_state(last)
    tensors = state["models"][0]
    if harm == "shape":
        tensors["last.weight"] = tensors["last.weight"][:, :5]
    elif harm == "names":
        tensors["lora_A"] = tensors.pop("last.weight")
    elif harm == "optimizers":
        state["optimizers"].append(state["optimizers"][0])
    elif harm == "parts":
        state = [state]
    else:
        progress["history"], progress["clock"] = 5, []
    shutil.rmtree(last)
    save_state(last, state, progress)
    said = resumed(tmp_path, expect=2)
    told = {"shape": "last.weight is (1, 5) there and (1, 32) here", "names": "last.weight is missing there and (1, 32) here"}
    assert told.get(harm, f"{last} holds") in said


@pytest.mark.parametrize(("name", "text"), [("state.pt", b"no archive"), ("progress.json", b"[" * 99_999)])
def test_a_sealed_checkpoint_that_cannot_be_read_falls_back(tmp_path, name, text):
    for step in (1, 2):
        save_state(tmp_path, {"models": []}, {"step": step})
    newest = tmp_path / "step-00000002"
    shutil.copytree(newest, tmp_path / "copy")
    with atomic_folder(newest) as aside:
        for file in ("state.pt", "progress.json"):
            aside.joinpath(file).write_bytes(text if file == name else (tmp_path / "copy" / file).read_bytes())
    assert load_state(tmp_path)[1] == {"step": 1} and (tmp_path / "step-00000002.corrupt").is_dir()


def test_lines_of_metrics_that_cannot_be_read_are_left_out(tmp_path, stopped, undisturbed):
    """Also where bytes were lost, so that the place to go on from is beyond the end, or in the middle of a line."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "toy" / "full" / "metrics.jsonl"
    whole = metrics.read_bytes().splitlines()
    metrics.write_bytes(b"\n".join([whole[0], b"\xff\x00", b"[1, 2]", b"[" * 99_999, b'{"loss": 1}', *whole[1:]]))
    said = resumed(tmp_path)
    assert "metrics.jsonl: line 2 cannot be read" in said and bits_of_training(tmp_path / "toy" / "full") == undisturbed[::2]
    last = metrics.read_bytes().splitlines()[-1]
    assert json.loads(last)["epoch"] == 3, "what is added begins a line of its own"
    shutil.rmtree(tmp_path / "toy")
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    metrics.write_bytes(b"")
    resumed(tmp_path)
    assert bits_of_training(tmp_path / "toy" / "full") == undisturbed[::2]


def bits_of_training(run: Path) -> tuple:
    return ((run / "fingerprint.txt").read_text(), (run / "checkpoints" / "best" / "model.safetensors").read_bytes())


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", "[" * 99_999, '{"status": ["finished"], "started": 7}'])
def test_a_summary_of_another_shape_costs_nothing(tmp_path, stopped, undisturbed, text):
    """It is written anew; and a start without --resume steps around the run as ever."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "toy" / "full" / "summary.json").write_text(text)
    if text in ("", "{}"):
        assert "using full_2" in run_toy(tmp_path, "--epochs", "1", "--max_steps_per_epoch", "1")
        shutil.rmtree(tmp_path / "toy" / "full_2")
    resumed(tmp_path)
    assert bits(tmp_path / "toy" / "full") == undisturbed and summary(tmp_path / "toy" / "full")["status"] == "finished"


# ---- which run it goes on with -----------------------------------------------------------------------------------------


def test_a_second_run_that_was_killed_before_its_first_save_is_the_one_to_go_on_with(tmp_path):
    run_toy(tmp_path, *LONG, "--epochs", "1")
    first = bits(tmp_path / "toy" / "full")
    child = start_toy(tmp_path, *LONG, "--epochs", "1")
    child.wait_for(lambda: (tmp_path / "toy" / "full_2" / "config.yaml").exists())
    child.kill(signal.SIGKILL)
    child.wait()
    shutil.rmtree(tmp_path / "toy" / "full_2" / "checkpoints", ignore_errors=True)  # if it came so far after all
    said = run_toy(tmp_path, *LONG, "--epochs", "1", "--resume")
    assert "toy/full_2" in said and "no checkpoint was saved yet: starting at step 0" in said
    assert bits(tmp_path / "toy" / "full_2") == first == bits(tmp_path / "toy" / "full")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_second_process_in_the_same_folder_is_refused(tmp_path, workers):
    flags = ["--pause", "0.05", "--num_workers", workers]
    child = start_toy(tmp_path, *flags)
    child.wait_for(lambda: "epoch 1/3" in child.text)
    for flag in ("--resume", "--overwrite"):
        assert "another process" in run_toy(tmp_path, *flags, flag, expect=2)
    child.kill(signal.SIGKILL)
    child.wait()
    # The lock dies with the process, though its data workers live on for some seconds.
    assert "resumed at" in run_toy(tmp_path, *flags, "--resume")
