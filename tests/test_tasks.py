"""What every task promises, whatever it trains on: one contract, held by each row of tasks.py.

Scripts run as a user runs them, on a few samples of the demo and the small base that comes along.
"""

import json
import re
import resource
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Script, free_port, run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from tasks import (
    EPOCHS,
    LR_HEAD,
    ROWS,
    SCRIPT,
    SETTINGS,
    STEPS,
    TASKS,
    call,
    demo,
    digests,
    in_task,
    one_line,
    read,
    same_numbers,
    scratch,
    small_data,
    start,
    tensors,
    trained,
)

SCRIPTS = [f"{name}{lora}.py" for name in ("train", "eval", "infer") for lora in ("", "_lora")]
EVAL = {"full": "eval.py", "lora": "eval_lora.py"}
INFER = {"full": "infer.py", "lora": "infer_lora.py"}
# Of the summary's schema: rows that say "voice: ..." of one task alone.
ONE_TASKS_OWN = {"data.most_boxes", "data.minutes", "data.val_minutes", "data.speakers", "data.organs", "data.every"}
ONE_TASKS_OWN |= {"data.coverage", *(f"data.{part}{what}" for part in ("", "val_") for what in ("patients", "cases"))}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
both = pytest.mark.parametrize("method", ["full", "lora"])
also_heavy = pytest.mark.parametrize("task", ROWS, ids=str)  # without -m slow, too


@pytest.fixture(scope="session", params=[pytest.param(t, marks=pytest.mark.slow if t.heavy else ()) for t in ROWS], ids=str)
def task(request):
    return request.param


def recorded(summary):
    """The metrics of the best epoch, without what says where in the training that was."""
    best = summary["metrics"]["best"]
    return without(best, ("epoch", "step", *(name for name in best if name.startswith("train_loss"))))


def without(metrics, names):
    return {name: value for name, value in metrics.items() if name not in names}


def is_drawn(path):
    return np.ptp(np.asarray(Image.open(path).convert("L"))) > 100


# ---- help ------------------------------------------------------------------------------------------------------------


@also_heavy
@pytest.mark.parametrize("script", SCRIPTS)
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


@both
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


@both
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


# Scripts for one kind of checkpoint load the other kind as well: origin.json says what it is. Some of these calls do that.

# ---- eval ------------------------------------------------------------------------------------------------------------


@both
def test_training_ends_with_the_command_that_comes_next(task, method):
    run = trained(task, method)
    (told,) = re.findall(r"^next: (.*)$", run.said.stdout, re.M)
    python, script, *flags = shlex.split(told)
    assert (python, flags) == ("python", ["--checkpoint", str(run.best)]) and Path(script).is_absolute()
    assert Path(script).name == EVAL[method] and Path(script).is_file()


@both
def test_eval_gives_the_metrics_that_training_recorded(task, method):
    run = trained(task, method)
    flags = ["--no-merge"] if method == "lora" else []
    done = call(task, EVAL[method], "--checkpoint", run.best, *flags, draw=method == "full")
    found = read(run.folder / "eval.json")
    same_numbers(found["metrics"], recorded(run.summary))
    assert found["split"] == "val" and found["base"] == run.summary["base"] and task.metric in done.stdout.lower()
    assert sorted(path.name for path in (run.folder / "eval_val").iterdir()) == sorted(task.left_by_eval)
    if method == "full":
        assert all(is_drawn(path) for path in (run.folder / "eval_val").glob("*.png"))


def test_a_merged_adapter_scores_the_same_in_other_batches(task, tmp_path):
    run = trained(task, "lora")
    call(task, "eval.py", "--checkpoint", run.best, "--batch_size", 1, "--output_dir", tmp_path)
    found, expected = (without(m, task.by_batch) for m in (read(tmp_path / "eval.json")["metrics"], recorded(run.summary)))
    same_numbers(found, expected, 1e-4)


def test_eval_on_the_test_split_in_another_place(task, tmp_path):
    run = trained(task, "full")
    args = ["--checkpoint", run.best, "--split", "test", "--output_dir", tmp_path, "--data_dir", small_data(task)]
    call(task, "eval_lora.py", *args)
    found = read(tmp_path / "eval_test.json")
    recorded_loss = recorded(run.summary)["val_loss"]
    assert found["split"] == "test" and 0 < found["metrics"]["loss"] != recorded_loss and "val_loss" not in str(found)
    assert task.test * task.groups in found.values()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_test", "eval_test.json"]


# ---- infer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inputs(task):
    """A user's folder: its path, the names of the good files in it, and that of a broken one."""
    folder = scratch() / f"{task.name}_inputs"
    folder.mkdir()
    return folder, *task.inputs(small_data(task), folder)


def infer(task, method, folder, source, *flags, script=None):
    """({file name: answers}, what was printed) of infer with the trained model, its results in `folder`."""
    args = ["--input", source, "--checkpoint", trained(task, method).best, "--output_dir", folder]
    done = call(task, script or INFER[method], *args, *task.infer_flags, *flags)
    found = task.answers(read(folder / "predictions.json"), folder)
    return {str(name).rpartition("/")[2]: answer for name, answer in found.items()}, done.stdout


def test_infer_answers_for_every_good_file_and_names_the_broken_one(task, inputs, tmp_path):
    folder, good, broken = inputs
    found, said = infer(task, "full", tmp_path, folder)
    assert sorted(found) == sorted(good) and f"{len(good)} " in said and broken in said and "left out" in said
    answers = [str(found[name]) for name in good]
    assert len(set(answers)) == len(good)  # one that says the same of everything would agree with itself, too
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("predictions.json", *task.left_by_infer))


def test_merged_and_unmerged_adapters_say_the_same(task, inputs, tmp_path):
    folder, good, _ = inputs
    merged, _ = infer(task, "lora", tmp_path / "merged", folder)
    apart, _ = infer(task, "lora", tmp_path / "apart", folder, "--no-merge", script="infer.py")
    same_numbers(merged, apart, 1e-3)
    assert str(infer(task, "full", tmp_path / "full", folder / good[0])[0][good[0]]) != str(merged[good[0]])


def test_a_single_file_and_a_glob_are_inputs_too(task, inputs, tmp_path):
    folder, good, _ = inputs
    assert list(infer(task, "full", tmp_path / "1", folder / good[0], script="infer_lora.py")[0]) == [good[0]]
    assert sorted(infer(task, "full", tmp_path / "2", folder / "t*")[0]) == sorted(n for n in good if n[0] == "t")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_card_says_what_the_checkpoint_is_and_its_code_loads_it_as_written(task, method):
    run = trained(task, method)
    card, summary = (run.best / "README.md").read_text(), run.summary
    for wanted in (
        f"`{summary['base']['sha256']}`",
        f"`{summary['data']['sha256']}`",
        f"{summary['data']['train']} for training, {summary['data']['val']} for validation",
        f"{summary['parameters']['trainable']:,} of {summary['parameters']['total']:,} parameters",
        f"| {summary['metrics']['best'][summary['metrics']['name']]:.4f} |",
        f"{SCRIPT[method]} --data_dir path/to/{small_data(task).name} --model demo",
    ):
        assert wanted in card, card
    assert str(scratch()) not in card and str(ROOT) not in card

    def load():
        sample = next(path for path in sorted(small_data(task).rglob(f"*{task.sample}")))
        places = {"this/folder": run.best, "the/base": task.folder / "demo_base", "the/task": task.folder}
        blocks = re.findall("```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == task.code_blocks
        found = []
        for block in blocks:
            for place, path in places.items():
                block = block.replace(f'"path/to/{place}"', repr(str(path)))
            scope = {}
            exec(
                re.sub('"(photo.jpg|speech.wav|mask.nii.gz)"', repr(str(sample)), block).replace("threshold=0.5", "threshold=0"),
                scope,
            )
            found.append(scope)
        predictor = found[-1]["predictor"]
        if "probabilities" in found[0]:
            ours = dict(predictor.predict(sample, top_k=99))
            theirs = dict(zip(predictor.classes, found[0]["probabilities"].tolist(), strict=True))
            assert {name: pytest.approx(p, abs=0.02) for name, p in ours.items()} == theirs
        elif "found" in found[0]:
            ours = predictor.predict(sample, threshold=0, nms=1)
            scores = sorted(found[0]["found"]["scores"].tolist(), reverse=True)
            assert scores == pytest.approx([item["score"] for item in ours], abs=0.02)

    in_task(task, load)


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.build], ids=str)
def test_plain_peft_loads_the_adapter(task):
    """On the base with a head of the right size, whatever is in it; the answers are those of our own loading."""
    best = trained(task, "lora").best

    def compare():
        from peft import PeftModel

        from model import load_checkpoint

        torch.manual_seed(7)  # another new head, which the file's replaces
        plain = PeftModel.from_pretrained(task.build("demo", best), best).eval()
        ours = load_checkpoint(best, merge=False)[0].eval()
        bare = task.build("demo", best).eval()
        x = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            outputs = [tensors(model(pixel_values=x)) for model in (plain, ours, bare)]
        assert outputs[0] and not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*outputs[1:], strict=True))
        for found, expected in zip(*outputs[:2], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    in_task(task, compare)


def test_a_checkpoint_that_changed_is_named(task, tmp_path):
    for method in SCRIPT:
        folder = tmp_path / method
        shutil.copytree(trained(task, method).best, folder)
        file = folder / WEIGHTS[method]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        told = one_line(call(task, EVAL[method], "--checkpoint", folder, expect=2))
        assert f"{folder} is damaged: {file.name} has changed" in told
        file.write_bytes(content[:-9])
        told = one_line(call(task, INFER[method], "--checkpoint", folder, "--input", tmp_path, expect=2))
        assert str(tmp_path) in told


def test_an_adapter_for_another_base_is_refused(task, tmp_path):
    best = trained(task, "lora").best
    shutil.copytree(task.folder / "demo_base", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({name: 1.01 * t if t.is_floating_point() else t for name, t in load_file(file).items()}, file, {"format": "pt"})
    told = one_line(call(task, "eval_lora.py", "--checkpoint", best, "--model", tmp_path / "other", expect=2))
    assert "an adapter fits no other base" in told and read(best / "origin.json")["base"]["sha256"][:12] in told


def test_a_checkpoint_of_another_task_is_refused(task, tmp_path):
    shutil.copytree(trained(task, "full").best, tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink()
    (tmp_path / "other" / "origin.json").write_text(json.dumps({"task": "weather", "method": "full"}))
    told = one_line(call(task, "eval.py", "--checkpoint", tmp_path / "other", expect=2))
    assert "weather" in told and task.name in told


# ---- errors that a user can put right --------------------------------------------------------------------------------


@also_heavy
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


def test_errors_of_eval_and_infer_are_one_line_and_exit_code_two(task, inputs, tmp_path):
    def fails(script, *args):
        return one_line(call(task, script, *args, "--output_dir", tmp_path / "out", expect=2))

    folder, _, broken = inputs
    best = ["--checkpoint", trained(task, "full").best]
    nowhere = tmp_path / "nowhere"
    assert f"there is no folder {nowhere}" in fails("eval.py", "--checkpoint", nowhere)
    assert f"there is no folder {nowhere}" in fails("infer_lora.py", "--checkpoint", nowhere, "--input", folder)
    assert str(nowhere) in fails("eval.py", *best, "--data_dir", nowhere)
    assert "--input is needed" in fails("infer.py", *best)
    assert str(nowhere) in fails("infer.py", *best, "--input", nowhere)
    done = call(task, "infer.py", *best, "--input", folder / broken, "--output_dir", tmp_path / "out", expect=2)
    one_line(done)
    assert broken in done.stdout + done.stderr
    assert not (tmp_path / "out" / "predictions.json").exists()


# ---- as a user starts them -------------------------------------------------------------------------------------------


@both
def test_without_arguments_it_is_the_demo(task, method):
    run = demo(task, method)
    assert run.summary["status"] == "finished" and run.summary["steps"] == 2
    assert run.summary["base"]["name"] == run.summary["data"]["name"] == "demo" and run.said.stderr == ""
    assert "base: demo" in run.said.stdout and "data: demo (" in run.said.stdout


@pytest.mark.slow
def test_the_demo_runs_in_a_fresh_process(task, tmp_path):
    """With nothing imported before, and with all its pictures."""
    run_script(task.folder, "train_lora.py", "--output_dir", tmp_path, "--epochs", 1, "--max_steps_per_epoch", 2)
    found = read(tmp_path / task.name / "lora" / "summary.json")
    same_numbers(found["metrics"], demo(task, "lora").summary["metrics"], 1e-5)
    assert is_drawn(tmp_path / task.name / "lora" / "curves.png")


@pytest.mark.parametrize("flags", [(), ("--single_file",)], ids=["files", "one file"])
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


def test_compare_reads_both_runs(task, tmp_path):
    full, lora = (trained(task, method) for method in SCRIPT)
    args = [full.folder, lora.folder, "--output_dir", tmp_path]
    done = Script(ROOT / "scripts", "compare.py", args, tmp_path / "log", draw=False).wait()
    found = {run["method"]: run["trained_parameters"] for run in read(tmp_path / "compare.json")["runs"]}
    assert found == {run.summary["method"]: run.summary["parameters"]["trainable"] for run in (full, lora)}
    assert f"LoRA reaches {task.metric}" in done.stdout


# ---- what the two runs of a task say together ------------------------------------------------------------------------


def show_disagreements_of(runs, folder):
    """For a fork: the two samples that differ most, and before them one that the data has no more."""
    sys.path.append(str(ROOT / "scripts"))
    import disagreements
    from disagreements import DisagreementsConfig, most_different, show_disagreements

    gone = {"file": "gone", "what": "", "full": "", "lora": ""}
    disagreements.most_different = lambda records, most: [gone, *most_different(records, most)]
    show_disagreements(DisagreementsConfig(*map(str, runs), most=2, output_dir=str(folder)))


@pytest.mark.slow
def test_the_samples_on_which_two_runs_differ_most_are_shown(task, tmp_path):
    runs = [trained(task, method).folder for method in ("full", "lora")]
    said = in_task(task, show_disagreements_of, runs, tmp_path)
    assert "left out: gone, which the data has no more" in said and "could not be made" not in said, said
    shown, samples = read(tmp_path / "disagreements.json"), [read(run / "samples.json") for run in runs]
    rows = [{row["file"]: row for row in record["rows"]} for record in samples]
    assert 1 <= len(shown) <= 2 and all(one["full"] != one["lora"] for one in shown)
    kind = {"voice_rvc": "audio", "medical_sam3d": "mesh"}.get(task.name, "picture")
    for one in shown:
        path, pair = tmp_path / one[kind], [row[one["file"]] for row in rows]
        if "right" in pair[0]:
            assert pair[0]["right"] != pair[1]["right"]
        if kind == "audio":
            import soundfile

            wave, rate = soundfile.read(path)
            assert 1 < len(wave) / rate < 20 and np.abs(wave).max() > 0.01
        else:
            assert np.asarray(Image.open(path).convert("L")).std() > 10  # something is drawn
    if "value" in samples[0]["rows"][0]:
        gaps = {file: abs(rows[0][file]["value"] - rows[1][file]["value"]) for file in rows[0]}
        assert [one["file"] for one in shown] == sorted(gaps, key=lambda file: -gaps[file])[: len(shown)]


def measure_curve_of(runs, ranks, path):
    """For a fork: the rank curve; each update is set at all of its rank before it is scored as a whole."""
    sys.path.append(str(ROOT / "scripts"))
    import rank_curve
    from rank_curve import RankCurveConfig, Update, measure_rank_curve

    class SetAtItsRank(Update):
        def __init__(self, model, base, names):
            super().__init__(model, base, names, most=10**6)
            self.set_rank(self.rank)

    rank_curve.Update, rank_curve.RANKS = SetAtItsRank, ranks
    path.write_text(json.dumps(measure_rank_curve(RankCurveConfig(*map(str, runs)))))


@pytest.mark.parametrize("task", [TASKS[name] for name in ("classification", "voice_rvc", "medical_sam3d")], ids=str)
@pytest.mark.slow
def test_an_update_at_its_whole_rank_scores_as_the_run_did(task, tmp_path):
    """Of layers that PEFT adapts, of layers under weight_norm, and of a task's own."""
    full, lora = (trained(task, method) for method in ("full", "lora"))
    rank = lora.summary["config"]["lora_r"]
    in_task(task, measure_curve_of, (full.folder, lora.folder), (1, rank), tmp_path / "curve.json")
    curve = read(tmp_path / "curve.json")
    for method, run in (("full", full), ("lora", lora)):
        assert curve["whole"][method] == pytest.approx(run.summary["metrics"]["best"][task.metric], abs=2e-3)
        assert 0 < curve["energy"][method][0] < curve["energy"][method][1] <= 1 + 1e-9
    assert curve["lora_rank"] == rank and curve["energy"]["lora"][1] == pytest.approx(1)
    assert curve["lora"][1] == pytest.approx(curve["whole"]["lora"], abs=1e-6)  # flat from its rank on
    assert curve["bytes"][0] < curve["bytes"][1] == pytest.approx(lora.summary["checkpoint_bytes"], rel=0.01)
