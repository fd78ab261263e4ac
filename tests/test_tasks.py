"""What every task promises, whatever it trains on: one contract, held by each row of tasks.py. Here its help, its training and
its copies; what a run that is there answers is in test_tasks_answers.py.

Scripts run as a user runs them, on a few samples of the demo and the small base that comes along.
"""

import json
import re
import resource
import shutil
import signal

import pytest
from conftest import ROOT, Script, free_port, run_script
from tasks import (
    EACH,
    EPOCHS,
    LR_HEAD,
    ROWS,
    SCRIPT,
    SETTINGS,
    STEPS,
    WEIGHTS,
    both,
    call,
    demo,
    digests,
    every_task,
    in_task,
    is_drawn,
    one_fast,
    one_line,
    read,
    recorded,
    same_numbers,
    scratch,
    small_data,
    start,
    trained,
    without,
)

SCRIPTS = [f"{name}{lora}.py" for name in ("train", "eval", "infer") for lora in ("", "_lora")]
TWINS = ("train.py", "eval_lora.py", "infer_lora.py")  # what is in them is in the other one of the pair, too
# Of the summary's schema: rows that say "voice: ..." of one task alone.
ONE_TASKS_OWN = {"data.most_boxes", "data.minutes", "data.val_minutes", "data.speakers", "data.organs", "data.every"}
ONE_TASKS_OWN |= {"data.coverage", *(f"data.{part}{what}" for part in ("", "val_") for what in ("patients", "cases"))}


@pytest.fixture(scope="session", params=EACH, ids=str)
def task(request):
    return request.param


# ---- help ------------------------------------------------------------------------------------------------------------


HELPFUL = [  # fast: of each task what its other scripts import and say, too
    pytest.param(task, script, marks=pytest.mark.slow if task is not ROWS[0] and script in TWINS else (), id=f"{script}-{task}")
    for task in ROWS  # the slow ones, too
    for script in SCRIPTS
]


@pytest.mark.parametrize("task, script", HELPFUL)
def test_help_answers_at_once_and_explains_every_setting(task, script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script(task.folder, script, "--help", env={"PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "200"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "common.config" in imported and not {"torch", "transformers", "peft", "numpy"} & imported
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert f"python {script}" in done.stdout
    settings = re.split(r"\n  (?=--)", done.stdout)[1:]
    assert len(settings) > 8
    for setting in settings:  # the flags, two spaces or a new line, the comment; a default alone explains nothing
        assert re.match(r"--.*?(\s{2,}|\n\s+)[^(\s]", setting), setting


@pytest.mark.parametrize("task", ROWS, ids=str)
def test_the_settings_for_real_work_are_good_for_both_scripts_and_name_those_of_one(task):
    def check():
        import train
        import train_lora

        from common.config import convert, field_kinds, parse

        for cls in (train.Config, train_lora.Config):
            parse(cls, ["--config", str(task.folder / "config.yaml")])
        kinds = field_kinds(train_lora.Config)
        assert named == kinds.keys() - field_kinds(train.Config).keys()
        for name, value in re.findall(r"(\w+) \(([^)]*)\)", told):
            assert convert(kinds[name], value) == getattr(train_lora.Config, name), name

    text = " ".join(re.findall(r"^# (.*)", (task.folder / "config.yaml").read_text(), re.MULTILINE))
    told = re.search(r"train_lora.py alone knows ([^;]*?)(;|\.$)", text)[1]
    named = set(re.sub(r" \(.*?\)|, | and ", " ", told).split())
    in_task(task, check)


# ---- training --------------------------------------------------------------------------------------------------------


@both
def test_a_run_leaves_what_is_promised(task, method):
    run = trained(task, method)
    names = ["config.yaml", "metrics.jsonl", "summary.json", "curves.png", "predictions/validation.png", *task.left]
    more = task.in_full if method == "full" else task.in_adapter
    best = [WEIGHTS[method], "origin.json", task.processor, "manifest.json", *more]
    for name in (*names, *(f"checkpoints/best/{name}" for name in best)):
        assert (run.folder / name).is_file(), name
        if method == "full" and name.endswith(".png"):  # the other run's pictures are not drawn
            assert is_drawn(run.folder / name), name
    assert any((run.folder / "checkpoints" / "last").glob("step-*")) and any((run.folder / "tb").iterdir())
    assert {f"plots/{path.name}" for path in run.folder.glob("plots/*")} == {n for n in task.left if n.startswith("plots/")}
    other = {"full": "adapter_model.safetensors", "lora": "model.safetensors"}[method]
    assert not (run.best / other).exists()


@both
def test_the_summary_is_what_its_schema_says(task, method):
    run = trained(task, method)
    summary, metrics, counts = run.summary, run.summary["metrics"], run.summary["parameters"]
    text = (ROOT / "docs" / "summary_schema.md").read_text().partition("# metrics.jsonl")[0]
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    keys = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)} - ONE_TASKS_OWN
    assert len(keys) > 30
    for key in keys:
        value = summary
        for part in key.split("."):
            assert part in value, key
            value = value[part]
    assert (summary["task"], summary["method"], summary["run_name"]) == (task.name, method, method)
    assert (summary["status"], summary["error"], summary["epochs"], summary["steps"]) == ("finished", None, EPOCHS, STEPS)
    assert (metrics["name"], metrics["higher_is_better"]) == (task.metric, task.higher_is_better)
    samples = {"train": task.train * task.groups, "val": task.val * task.groups}
    assert {key: summary["data"][key] for key in samples} == samples and summary["data"]["left_out"] == {}
    assert 0 < counts["trainable"] <= counts["total"]
    assert (counts["trainable"] == counts["total"]) == (method == "full" and not task.frozen)
    assert read(run.best / "origin.json")["base"] == summary["base"] and summary["base"]["name"] == "demo"
    assert summary["checkpoint_bytes"] == sum(path.stat().st_size for path in run.best.iterdir())
    history = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    values = [record[task.metric] for record in history if task.metric in record]
    assert len(values) == EPOCHS + 1 and metrics["before"][task.metric] == values[0]
    assert metrics["final"][task.metric] == values[-1]
    assert metrics["best"][task.metric] == (max if task.higher_is_better else min)(values[1:])
    assert metrics["final"]["val_loss"] != metrics["before"]["val_loss"]


@both
def test_a_new_head_learns_at_its_own_rate_and_all_else_at_lr(task, method):
    """Two steps of warm-up: after the first, rates are at their peak."""
    run = trained(task, method)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rate = f"lr_{task.teaches}" if task.teaches else "lr"
    line = next(line for line in lines if rate in line)
    assert line[rate] == pytest.approx(run.summary["config"]["lr"])
    assert line.get(f"{rate}_head") == (pytest.approx(LR_HEAD) if task.new_head else None)


def test_training_says_nothing_beside(task):
    """What libraries warn of would stand between the user and the errors that matter."""
    assert [trained(task, method).said.stderr for method in SCRIPT] == ["", ""]


def test_both_scripts_start_from_the_same_answers_and_data(task):
    """A fair comparison: the same new head (it depends on the seed), the same samples, the same base."""
    full, lora = (trained(task, method).summary for method in SCRIPT)
    same_numbers(lora["metrics"]["before"], full["metrics"]["before"], 1e-5)
    assert full["data"] == lora["data"] and full["base"] == lora["base"]
    assert lora["checkpoint_bytes"] < full["checkpoint_bytes"]


@one_fast
def test_a_killed_run_ends_with_the_same_bytes(task):
    """Killed with -9 in its second epoch; started by the first run's config.yaml, which is all that it takes to repeat that."""
    whole = trained(task, "lora")
    folder = whole.folder.with_name("killed")
    args = ["--config", whole.folder / "config.yaml", "--run_name", "killed", "--save_steps", 1]
    script = start(task, "train_lora.py", *args)
    script.wait_for((folder / "checkpoints" / "last" / f"step-{STEPS // 2 + 1:08d}").exists, seconds=120)
    script.kill(signal.SIGKILL)
    script.wait(expect=-signal.SIGKILL)
    assert read(folder / "summary.json")["status"] == "running" and not (folder / "curves.png").exists()
    assert "resumed at step" in call(task, "train_lora.py", *args, "--resume").stdout
    assert digests(folder / "checkpoints" / "best") == digests(whole.best)
    summary = read(folder / "summary.json")
    assert summary["status"] == "finished" and summary["resumed_at_steps"][0] >= STEPS // 2
    assert summary["metrics"] == whole.summary["metrics"]


@every_task("method", "lora", "full")
def test_two_processes_do_what_one_does(task, method):
    """With half of each batch, as torchrun starts them."""
    whole, port, name = trained(task, method), free_port(), f"two_{method}"
    args = ["--config", whole.folder / "config.yaml", "--run_name", name, "--batch_size", 2]
    ranks = [start(task, SCRIPT[method], *args, rank=(rank, port)) for rank in (0, 1)]
    for rank in ranks:
        rank.wait()
    folder = whole.folder.with_name(name)
    summary = read(folder / "summary.json")
    assert summary["environment"]["processes"] == 2 and summary["steps"] == STEPS
    before, expected = (without(s["metrics"]["before"], task.by_batch) for s in (summary, whole.summary))
    same_numbers(before, expected, 1e-5)
    if task.exact_in_two:
        assert train_losses(folder) == pytest.approx(train_losses(whole.folder), rel=task.rounding)
        same_numbers(summary["metrics"]["final"], whole.summary["metrics"]["final"], 10 * task.rounding)


@every_task("method", "lora", "full")
def test_a_run_starts_from_the_weights_of_another(task, method):
    """Its metrics before training are those of the checkpoint, and its base is found without --model."""
    run, name = trained(task, method), f"on_{method}"
    args = ["--start_from", run.best, "--data_dir", small_data(task), "--output_dir", run.folder.parents[1], "--run_name", name]
    flags = [*SETTINGS, *task.flags, *(task.lora_flags if method == "lora" else ())]
    said = call(task, SCRIPT[method], *args, *flags, "--epochs", 1, "--max_steps_per_epoch", 1).stdout
    summary = read(run.folder.with_name(name) / "summary.json")
    before, best = (without(metrics, task.by_batch) for metrics in (summary["metrics"]["before"], recorded(run.summary)))
    same_numbers(before, best, 1e-4)
    assert summary["config"]["start_from"] == str(run.best) and f"starts from {run.best}, head included\n" in said
    assert (summary["base"]["name"] == "demo") == (method == "lora")
    other = "train.py" if method == "lora" else "train_lora.py"
    told = one_line(call(task, other, *args, "--run_name", "other", "--model", "demo", expect=2))
    assert f"is {'an adapter' if method == 'lora' else 'a whole model'}: {SCRIPT[method]} goes on with it" in told


def train_losses(folder):
    """The mean losses of each epoch; from the second on they tell of what was learned before."""
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line]
    losses = [{name: value for name, value in record.items() if name.startswith("train_loss")} for record in epochs]
    found = [value for record in losses for value in record.values() if value is not None]
    assert found and len(found) % EPOCHS == 0
    return found


def no_memory(*_, **__):
    raise MemoryError("no room for 6 GB")


@pytest.fixture(scope="session")
def probe(task):
    """A step of the head alone (--lora_r 0), on data with a broken training sample: the run, and the name of that sample.

    None of its pictures can be drawn.
    """
    data = scratch() / f"{task.name}_broken"
    shutil.copytree(small_data(task), data)
    broken = max((data / task.training).rglob(f"*{task.sample}"))
    broken.write_bytes(broken.read_bytes()[:100])
    args = ["--data_dir", data, "--model", "demo", "--output_dir", data / "runs", *SETTINGS, "--lora_r", 0]
    said = call(task, "train_lora.py", *args, "--epochs", 1, "--max_steps_per_epoch", 1, draw=no_memory)
    return data / "runs" / task.name / "head", broken, said


def test_a_sample_that_cannot_be_read_is_named_counted_and_left_out(task, probe):
    folder, broken, said = probe
    data = read(folder / "summary.json")["data"]
    assert list(data["left_out"].values()) == [1] and data["train"] == task.train * task.groups - 1
    (fault,) = data["left_out"]
    (place,) = re.findall(rf"left out, {re.escape(fault)} \(1\): (\S+)", said.stdout)
    assert broken.as_posix().endswith(f"/{place}"), "its path from the folder that holds all of its split"


def test_pictures_that_cannot_be_drawn_do_not_cost_the_training(task, probe):
    folder, _, said = probe
    summary = read(folder / "summary.json")
    assert summary["status"] == "finished" and summary["error"] is None and said.stderr == ""
    assert summary["notes"][-1] == "curves.png could not be made: MemoryError: no room for 6 GB"
    assert all(said.stdout.count(note) == 1 for note in summary["notes"]) and "saved" in said.stdout
    assert len(summary["notes"]) == 2


def test_rank_zero_trains_the_head_alone(task, probe):
    folder, _, _ = probe
    summary, lora = read(folder / "summary.json"), trained(task, "lora").summary
    assert (summary["method"], summary["status"]) == ("head", "finished")
    assert 0 < summary["parameters"]["trainable"] < lora["parameters"]["trainable"]
    call(task, "eval_lora.py", "--checkpoint", folder / "checkpoints" / "best")
    same_numbers(read(folder / "eval.json")["metrics"], recorded(summary), 1e-4)


# ---- errors that a user can put right --------------------------------------------------------------------------------


def test_training_errors_are_one_line_and_exit_code_two(task, tmp_path):
    def fails(script, *args):
        return one_line(call(task, script, *args, "--output_dir", tmp_path / "runs", expect=2))

    data = ["--data_dir", small_data(task), "--model", "demo"]
    assert f"there is no folder {tmp_path}/nowhere" in fails("train.py", *data, "--model", tmp_path / "nowhere").replace(
        " (or CSV file)", ""
    )
    told = fails("train_lora.py", *data, "--data_dir", tmp_path / "nowhere")
    assert "there is no folder" in told and f"{tmp_path}/nowhere" in told
    assert list((tmp_path / "runs" / task.name).iterdir()) == []  # nothing for the next start to step around
    told = fails("train_lora.py", *data, "--lora_targets", "qkv_everywhere")
    assert re.search("no layer's name ends in|fits nothing here", told) and "there are: " in told
    assert "--lora_r: '-3' must be 0 to 4096" in fails("train_lora.py", *data, "--lora_r", -3)
    (tmp_path / "wrong.yaml").write_text("epochs: 1\nlora_rank: 4\n")
    told = fails("train_lora.py", "--config", tmp_path / "wrong.yaml")
    assert "unknown setting 'lora_rank'" in told and "lora_r" in told
    assert "lora_r is a setting of train_lora.py, not of train.py" in fails("train.py", "--lora_r", 4)


# ---- as a user starts them -------------------------------------------------------------------------------------------


def check_demo(summary, said):
    assert summary["status"] == "finished" and summary["steps"] == 2
    assert summary["base"]["name"] == summary["data"]["name"] == "demo"
    assert "base: demo" in said and "data: demo (" in said


@one_fast
def test_without_arguments_it_is_the_demo(task):
    run = demo(task, "full")
    check_demo(run.summary, run.said.stdout)
    assert run.said.stderr == ""


@one_fast
def test_the_demo_runs_in_a_fresh_process(task, tmp_path):
    """With nothing imported before, and with all its pictures."""
    flags = ["--output_dir", tmp_path, "--epochs", 1, "--max_steps_per_epoch", 2]
    said = run_script(task.folder, "train_lora.py", *flags).stdout
    check_demo(read(tmp_path / task.name / "lora" / "summary.json"), said)
    assert is_drawn(tmp_path / task.name / "lora" / "curves.png")


@every_task("flags", ("--single_file",), ())
def test_an_exported_copy_trains_outside_the_project_and_leaves_its_outputs_beside_it(task, tmp_path, flags):
    """Started in another folder, one from where neither common/ nor the task's modules can be seen."""
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    elsewhere.mkdir()
    args = [task.folder / "train_lora.py", copy, "--no_demo", *flags]
    Script(ROOT / "scripts", "export.py", args, tmp_path / "export").wait()
    assert (copy / "common").is_dir() == (flags == ())
    args = ["--data_dir", small_data(task), "--model", task.folder / "demo_base", *SETTINGS]
    call(task, "train_lora.py", *args, "--epochs", 1, "--max_steps_per_epoch", 1, folder=copy, cwd=elsewhere)
    assert read(copy / "outputs" / task.name / "lora" / "summary.json")["steps"] == 1
    assert list(elsewhere.iterdir()) == []
