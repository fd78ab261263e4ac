"""What a run leaves behind: the record follows its schema, faults are named, nothing is overwritten."""

import io
import json
import math
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, metrics_of, run_script, run_toy, start_toy
from PIL import Image
from safetensors.torch import load_file
from test_checkpoint import crashes

from common.checkpoint import Progress, write_json
from common.config import TrainConfig, UserError, write_yaml
from common.folders import bring_back, discard, forget_replaced, has_results, is_bare, is_run, lock_folder, open_run_folder
from common.run import Run
from common.runtime import Interrupted
from common.step import Step

TYPES = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v),
    "text": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
    "list of texts": lambda v: isinstance(v, list) and all(isinstance(i, str) for i in v),
    "list of integers": lambda v: isinstance(v, list) and all(isinstance(i, int) for i in v),
}


def schema(task: str) -> dict[str, list[str]]:
    """Key with dots -> the types it may have, as the table in the document says; "detection: ..." is of that task alone."""
    keys = {}
    for line in (ROOT / "docs" / "summary_schema.md").read_text().partition("# metrics.jsonl")[0].splitlines():
        if not line.startswith("| `"):
            continue
        names, kinds, what = (cell.strip() for cell in line.strip("|").split("|")[:3])
        only = re.match(r"(\w+): ", what)
        if only and only[1] != task:
            continue
        names, kinds = re.findall(r"`([\w.]+)`", names), kinds.split(", ")
        kinds *= len(names) if len(kinds) == 1 else 1
        assert len(names) == len(kinds), line
        keys |= {name: kind.split(" or ") for name, kind in zip(names, kinds, strict=True)}
    return keys


def follow(record: dict, name: str):
    for part in name.split("."):
        assert part in record, f"{name} is missing"
        record = record[part]
    return record


def check_schema(record: dict):
    keys = schema(record["task"])
    assert len(keys) > 30 and {"status", "metrics.best", "peak_memory_bytes.gpu"} <= set(keys)
    for name, kinds in keys.items():
        value = follow(record, name)
        assert any(TYPES[kind](value) for kind in kinds), f"{name} is {value!r}, not {' or '.join(kinds)}"
    tops = {name.split(".")[0] for name in keys}
    assert set(record) == tops, "a key that the document does not have"
    for part in ("base", "data", "parameters", "peak_memory_bytes"):
        inner = {name.split(".")[1] for name in keys if name.startswith(part + ".")}
        assert set(record[part]) == inner
    named = re.search(r"\| `environment` \|.*\|(.*)\|", (ROOT / "docs" / "summary_schema.md").read_text())[1]
    assert set(re.findall(r"`(\w+)`", named)) <= set(record["environment"])


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_toy(folder, curves=True)
    return folder / "toy" / "full"


def test_summary_of_a_finished_run(finished):
    record = summary(finished)
    check_schema(record)
    assert (record["status"], record["error"]) == ("finished", None)
    assert record["started"] <= record["ended"] and record["ended"].endswith("+00:00")
    assert (record["epochs"], record["steps"], record["resumed_at_steps"]) == (3, 48, [])
    assert record["parameters"] == {"total": 8 * 32 + 32 + 64 + 32 * 32 + 32 + 33, "trainable": 64 + 32 * 32 + 32 + 33}
    epochs = [r for r in lines(finished) if "epoch" in r]
    assert record["metrics"]["before"]["val_loss"] == epochs[0]["val_loss"]
    assert record["metrics"]["final"]["val_loss"] == epochs[-1]["val_loss"]
    best = max(epochs[1:], key=lambda r: r["score"])
    assert record["metrics"]["best"]["epoch"] == best["epoch"] and record["metrics"]["best"]["score"] == best["score"]
    assert record["checkpoint_bytes"] == sum(p.stat().st_size for p in (finished / "checkpoints/best").iterdir())
    assert record["seconds"] >= record["train_seconds"] > 0
    assert record["samples_per_second"] == pytest.approx(3 * 64 / record["train_seconds"], rel=0.1)
    assert 50e6 < record["peak_memory_bytes"]["cpu"] < 20e9
    assert record["environment"]["processes"] == 1


def test_config_yaml_repeats_the_run(finished, tmp_path):
    run_toy(tmp_path, "--config", finished / "config.yaml")
    again = tmp_path / "toy" / "full"
    assert (again / "fingerprint.txt").read_text() == (finished / "fingerprint.txt").read_text()
    assert metrics_of(again) == metrics_of(finished)


def test_best_model_is_the_one_of_the_best_epoch(tmp_path):
    """The lowest loss is it here; loaded again, the model that was saved has that loss."""
    run_toy(tmp_path, "--epochs", "4", "--lr", "0.3", "--best", "val_loss", "--run_name", "low")
    run = tmp_path / "toy" / "low"
    epochs = [r for r in lines(run) if r.get("epoch")]
    record = summary(run)["metrics"]
    assert record["higher_is_better"] is False and record["name"] == "val_loss"
    assert record["best"]["val_loss"] == min(r["val_loss"] for r in epochs)
    assert len({r["val_loss"] for r in epochs}) == 4
    from toy_train import Config, Samples, build_model, evaluate

    model = build_model(Config())
    model.load_state_dict(load_file(run / "checkpoints" / "best" / "model.safetensors"))
    loader = [{k: torch.stack([Samples(Config(), "val")[0, i][k] for i in range(24)]) for k in ("x", "y", "index")}]
    assert evaluate(model, loader, 0, Config())["val_loss"] == pytest.approx(record["best"]["val_loss"], rel=1e-5)


def test_of_epochs_with_the_same_metric_the_surer_one_is_best():
    more = 0.7 + 2**-52  # a mean of the same numbers in another order
    epochs = [(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (more, 0.8), (0.6, 0.1), (0.7, None), (more, 0.85), (0.8, 2.0)]
    progress = Progress()
    best = [progress.add_epoch({"accuracy": a, "val_loss": loss}, "accuracy", higher_is_better=True) for a, loss in epochs]
    assert best == [True, True, True, False, False, False, False, True]
    assert progress.best["val_loss"] == 2.0 and progress.bad_epochs == 0 and len(progress.history) == len(epochs)


def test_the_best_so_far_is_called_so_also_below_the_base():
    progress = Progress(history=[{"accuracy": 0.8}])
    progress.add_epoch({"accuracy": 0.5, "epoch": 1}, "accuracy", higher_is_better=True)
    assert progress.no_better() == ", but no better than before training: 0.8000"
    progress.add_epoch({"accuracy": 0.9, "epoch": 2}, "accuracy", higher_is_better=True)
    assert progress.no_better() == ""
    errors = Progress(history=[{"error": 3.0}])
    errors.add_epoch({"error": 3.0, "epoch": 1}, "error", higher_is_better=False)
    assert errors.no_better() == ", but no better than before training: 3.0000"
    unknown = Progress(history=[{}])
    unknown.add_epoch({"error": None, "epoch": 1}, "error", higher_is_better=False)
    assert unknown.no_better() == ""


def test_without_a_terminal_a_line_now_and_then_says_where_the_training_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("common.runtime.EVERY", 0.1)
    said = run_toy(tmp_path, "--pause", "0.03", "--epochs", "2")
    lines = re.findall(r"^epoch (\d)/2, step (\d+) of 32, loss \d\.\d{4}, lr [\de.-]+, \d+ s left$", said, re.M)
    assert {epoch for epoch, _ in lines} == {"1", "2"} and len(lines) < 32
    assert [int(step) for _, step in lines] == sorted({int(step) for _, step in lines}), "each step once, in order"
    assert re.search(r"^finished after \d+ s: best score 0\.\d{4} in epoch \d", said, re.M)


def test_curves_are_a_picture(finished):
    with Image.open(finished / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 300
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colors) > 100, "an empty picture"


def test_tensorboard_holds_what_metrics_jsonl_holds(finished, tmp_path):
    assert tensorboard(finished) == expected_scalars(finished)
    # Also after a kill, which cuts off what TensorBoard had not written yet, and a resume, which takes steps back.
    child = start_toy(tmp_path, "--save_steps", "7", "--pause", "0.01")
    child.wait_for(lambda: "epoch 2/3" in child.text)
    child.kill(9)
    child.wait()
    run_toy(tmp_path, "--save_steps", "7", "--pause", "0.01", "--resume")
    again = tmp_path / "toy" / "full"
    assert tensorboard(again) == expected_scalars(again) and metrics_of(again) == metrics_of(finished)


def test_step_lines_say_how_fast_and_how_large(finished):
    steps = [line for line in lines(finished) if "epoch" not in line]
    record = summary(finished)
    assert [line["step"] for line in steps] == list(range(1, 49)), "so short a run has a line for each"
    for line in steps:
        assert 0 < line["grad_norm"] < 100 and 0 < line["samples_per_second"] < 1e5
        assert 50e6 < line["peak_memory_bytes"] <= record["peak_memory_bytes"]["cpu"]


def tensorboard(run: Path) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected_scalars(run: Path) -> dict:
    """By TensorBoard's groups: losses of any kind, what an epoch measured, and what a step took."""
    expected = {}
    for record in lines(run):
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                group = "losses" if "loss" in name else "metrics" if "epoch" in record else "charts"
                expected.setdefault(f"{group}/{name}", []).append((record["step"], value))
    assert {"losses/loss", "charts/lr", "charts/grad_norm", "losses/train_loss", "losses/val_loss", "metrics/score"} <= set(
        expected
    )
    return expected


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_file_that_turns_out_bad_in_training_is_named_and_counted_once_in_a_run(tmp_path):
    """Said in every epoch and by every process, it counts once; a run that is taken up again still knows."""
    said = run_toy(tmp_path, "--fault", "bad_file", "--epochs", "2")
    told = "left out, file that cannot be read (1): train/007.txt (half of it)"
    assert said.count(told) == 1
    left_out = {"file that cannot be read": 1}
    assert summary(tmp_path / "toy" / "full")["data"]["left_out"] == left_out
    said = run_toy(tmp_path, "--fault", "bad_file", "--epochs", "2", "--resume")
    assert said.count(told) == 1 and summary(tmp_path / "toy" / "full")["data"]["left_out"] == left_out


def test_a_file_that_turns_out_bad_is_counted_also_where_the_data_was_not_described():
    run = Run(SimpleNamespace(), "toy", "full")
    run.leave_out([("a.wav", "file that cannot be read, half of it")])
    run.leave_out([("a.wav", "file that cannot be read, half of it"), ("b.wav", "silence")])
    assert run.described["data"]["left_out"] == {"file that cannot be read": 1, "silence": 1}


def test_parts_are_turned_into_numbers_only_for_a_line(monkeypatch):
    """A step that is not recorded keeps forty of them without work on the device, and without the graph behind them."""
    turned, original = [], Step.tensor
    monkeypatch.setattr(Step, "tensor", lambda self, value: turned.append(value) or original(self, value))
    for is_logged in (False, True):
        step, weight = Step(1, torch.device("cpu")), torch.ones((), requires_grad=True)
        step.files.append(["a"])
        step.add_loss("loss", weight * 2, {"plain": 0.5} | {f"part_{i}": weight * i for i in range(40)})
        assert not any(torch.is_tensor(value) and value.requires_grad for _, _, value in step.parts)
        turned.clear()
        step.read(0, with_parts=is_logged)
        assert len(turned) == (42 if is_logged else 1)  # the signal is one
    assert step.part_values[0] == ("loss", "plain", 0.5) and step.part_values[-1] == ("loss", "part_39", 39.0)


def test_what_goes_wrong_under_the_guard_is_said_noted_and_over():
    run, said = Run(SimpleNamespace(), "toy", "full"), io.StringIO()
    with redirect_stdout(said), run.guard("the plots"):
        raise ValueError("a class name\nthat is $\\frac{$")
    with redirect_stdout(said), run.guard("the pages"):
        raise UserError("a.jpg is gone")
    assert run.notes == [
        "the plots could not be made: ValueError: a class name that is $\\frac{$",
        "the pages could not be made: a.jpg is gone",
    ]
    assert said.getvalue().splitlines() == run.notes
    for stop in (Interrupted(15), KeyboardInterrupt()):
        with pytest.raises(type(stop)), run.guard("the plots"):
            raise stop
    assert len(run.notes) == 2


def test_summary_of_a_failed_run(tmp_path):
    said = run_toy(tmp_path, "--fault", "crash", expect=99)
    assert "ZeroDivisionError: a fault in the script" in said
    record = summary(tmp_path / "toy" / "full")
    check_schema(record)
    assert record["status"] == "failed" and "a fault in the script" in record["error"]
    assert record["epochs"] == 1 and record["steps"] == 16


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    """No folder that the next start has to step around; and the run that it was to replace stands as it was."""
    said = run_toy(tmp_path, "--samples", "0", expect=2)
    assert "no training sample" in said and "Traceback" not in said
    assert list((tmp_path / "toy").iterdir()) == []
    run_toy(tmp_path, "--epochs", "1")
    first = contents(tmp_path / "toy" / "full")
    for flags in ([], ["--overwrite"]):
        run_toy(tmp_path, "--samples", "0", *flags, expect=2)
        assert [p.name for p in (tmp_path / "toy").iterdir()] == ["full"]
        assert contents(tmp_path / "toy" / "full") == first


def test_summary_of_an_interrupted_run(tmp_path):
    child = start_toy(tmp_path, "--pause", "0.02")
    child.wait_for(lambda: "epoch 1/3" in child.text)
    run = tmp_path / "toy" / "full"
    running = summary(run)
    assert running["status"] == "running" and running["ended"] is None
    child.kill(15)
    assert child.wait() == 143
    record = summary(run)
    check_schema(record)
    assert record["status"] == "interrupted" and "SIGTERM" in record["error"]
    assert record["epochs"] == 1 and 16 <= record["steps"] < 48


def test_nan_loss_stops_before_the_weights_move(tmp_path):
    said = run_toy(tmp_path, "--fault", "nan_loss", "--fault_epoch", "2", expect=2)
    assert "Traceback" not in said
    run = tmp_path / "toy" / "full"
    error = re.search(r"error: the loss is nan at step (\d+), epoch 2; the batch held (.*?);", said)
    assert error and "train/007.txt" in error[2] and len(error[2].split(", ")) == 4
    step = int(error[1])
    assert 17 <= step <= 32
    record = summary(run)
    check_schema(record)
    assert record["status"] == "failed" and "nan" in record["error"] and record["steps"] == step - 1
    # The last checkpoint is intact: resumed, the run stops at the same step, not earlier, and not with other numbers.
    again = run_toy(tmp_path, "--fault", "nan_loss", "--fault_epoch", "2", "--resume", expect=2)
    assert "resumed at step 16," in again and f"nan at step {step}," in again
    from common.checkpoint import load_state

    state, progress = load_state(run / "checkpoints" / "last")
    assert progress["step"] == 16 and all(bool(t.isfinite().all()) for t in state["models"][0].values())


def test_nan_metric_is_null_and_not_the_best(tmp_path):
    for best in ("score", "val_loss"):
        for epoch in (1, 2):
            name = f"{best}{epoch}"
            flags = ["--fault", "nan_metric", "--fault_epoch", epoch, "--best", best, "--run_name", name]
            said = run_toy(tmp_path, *flags, curves=epoch == 1)
            run = tmp_path / "toy" / name
            epochs = [r for r in lines(run) if "epoch" in r]
            assert epochs[epoch]["val_loss"] is None and epochs[epoch]["per_class_error"] == {"all": None}
            assert "recorded as null: val_loss" in said
            record = summary(run)
            assert record["status"] == "finished"
            assert record["metrics"]["best"]["epoch"] != epoch and record["metrics"]["best"][best] is not None
            check_schema(record)


def test_a_tensor_that_cannot_learn_is_named(tmp_path):
    said = run_toy(tmp_path, "--fault", "dead", expect=2)
    assert "2 trainable tensors got no gradient" in said and "unused.weight" in said
    assert summary(tmp_path / "toy" / "full")["steps"] < 10  # within the first steps, before an epoch counts
    assert summary(tmp_path / "toy" / "full")["epochs"] == 0


def test_a_tensor_that_batches_may_pass_by_stops_no_run_however_long_they_do(tmp_path):
    """As what learns from boxes, where pictures of background come first."""
    said = run_toy(tmp_path, "--fault", "dead", "--find_unused", "--epochs", "1", curves=False)
    assert "no gradient" not in said and summary(tmp_path / "toy" / "full")["status"] == "finished"


def test_patience_stops(tmp_path):
    said = run_toy(tmp_path, "--epochs", "30", "--patience", "2", "--lr", "0.5")
    record, run = summary(tmp_path / "toy" / "full"), tmp_path / "toy" / "full"
    assert record["status"] == "finished" and "stopped early: 2 epochs" in said
    assert record["epochs"] == record["metrics"]["best"]["epoch"] + 2 < 30
    scores = [r["score"] for r in lines(run) if r.get("epoch")]
    assert max(scores[-2:]) <= max(scores[:-2])


# ---- run folders -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_finished_run_is_kept(tmp_path):
    run_toy(tmp_path, "--epochs", "1")
    first = contents(tmp_path / "toy" / "full")
    said = run_toy(tmp_path, "--epochs", "1", "--seed", "1")
    assert "using full_2" in said
    run_toy(tmp_path, "--epochs", "1", "--seed", "2")
    assert {p.name for p in (tmp_path / "toy").iterdir()} == {"full", "full_2", "full_3"}
    assert contents(tmp_path / "toy" / "full") == first
    assert summary(tmp_path / "toy" / "full_2")["run_name"] == "full_2"
    assert len({(p / "fingerprint.txt").read_text() for p in (tmp_path / "toy").iterdir()}) == 3

    run_toy(tmp_path, "--epochs", "1", "--seed", "3", "--overwrite")
    assert {p.name for p in (tmp_path / "toy").iterdir()} == {"full", "full_2", "full_3"}
    assert summary(tmp_path / "toy" / "full")["config"]["seed"] == 3
    assert len([r for r in lines(tmp_path / "toy" / "full") if "epoch" in r]) == 2
    assert len(list((tmp_path / "toy" / "full" / "tb").iterdir())) == 1


@pytest.mark.slow
def test_a_kill_while_a_run_is_replaced_leaves_the_old_run_or_the_new_one(tmp_path):
    """At every point where the disk is touched; whatever is left, the same command goes through, and --resume finds a run."""
    start, whole = tmp_path / "start", tmp_path / "start" / "toy" / "full"
    for name in ("summary.json", "config.yaml", "curves.png", "checkpoints/last/step-00000004/state.pt", "tb/events"):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text('{"status": "finished"}' if name == "summary.json" else "")
    old = contents(whole)

    def replace(folder):
        """The disk's part of a start with --overwrite, up to its first save."""
        run, lock = open_run_folder(TrainConfig(output_dir=str(folder), overwrite=True), "toy", "full")
        write_yaml(TrainConfig(), run / "config.yaml")
        write_json(run / "summary.json", {"status": "running"})
        forget_replaced(run)

    def check(folder, done):
        bring_back(folder / "toy")
        run = folder / "toy" / "full"
        assert is_run(run) and [p.name for p in (folder / "toy").glob("[!.]*")] == ["full"]
        is_old = contents(run) == old
        assert is_old or (is_bare(run) and not has_results(run))
        states.append(is_old)
        replace(folder)
        assert set(contents(folder / "toy" / "full")) == {Path("config.yaml"), Path("summary.json")}
        assert [p.name for p in (folder / "toy").iterdir()] == ["full"]

    states = []
    assert crashes(tmp_path, start, replace, check) > 12
    assert states == sorted(states, reverse=True) and 3 < sum(states) < len(states) - 3


def test_a_kill_while_a_refused_start_is_taken_away(tmp_path):
    """The folder goes, what marks it as a start at last, and the run that stood there comes back."""
    start = tmp_path / "start"
    for name in ("full", ".full.previous"):
        (start / "toy" / name).mkdir(parents=True)
        (start / "toy" / name / "summary.json").write_text(json.dumps({"status": "failed" if name == "full" else "finished"}))
        (start / "toy" / name / "config.yaml").write_text("")
    (start / "toy" / "full" / "tb").mkdir()

    def check(folder, done):
        bring_back(folder / "toy")
        run = folder / "toy" / "full"
        assert is_run(run) and (not done or has_results(run))
        if not has_results(run):  # the next start is refused, too
            act(folder)
        assert has_results(run) and [p.name for p in (folder / "toy").iterdir()] == ["full"]

    def act(folder):
        discard(folder / "toy" / "full", lock_folder(folder / "toy" / "full"))

    assert crashes(tmp_path, start, act, check) > 4


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_of_other_files_is_not_touched(tmp_path, flags):
    folder = tmp_path / "toy" / "full"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter.txt").write_text("years of work")
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text("of another program")
    before = contents(folder)
    said = run_toy(tmp_path, "--epochs", "1", *flags, expect=2)
    assert "holds files, but no run" in said
    assert contents(folder) == before


def test_newest_best_finds_a_model_whose_replacement_was_cut_short(tmp_path, monkeypatch):
    from common import folders

    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    run_toy(tmp_path / "outputs", "--epochs", "1", "--run_name", "mine")
    best = tmp_path / "outputs" / "toy" / "mine" / "checkpoints" / "best"
    best.rename(best.with_name(".best.previous"))  # as between the two renames of atomic_folder
    assert folders.newest_best("toy", "full") == best
    assert (best / "model.safetensors").is_file()


@pytest.mark.parametrize("text", ["[]", '{"status": "finished"}', "[" * 99_999])
def test_newest_best_names_the_run_whose_record_is_damaged_and_takes_another(tmp_path, monkeypatch, capsys, text):
    """And passes over a run that was set aside for another to take its place."""
    from common import folders

    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    for name, record in (("mine", '{"method": "full"}'), (".mine.previous", '{"method": "full"}'), ("damaged", text)):
        best = tmp_path / "outputs" / "toy" / name / "checkpoints" / "best"
        best.mkdir(parents=True)
        best.parents[1].joinpath("summary.json").write_text(record)
    assert folders.newest_best("toy", "full").parents[1].name == "mine"
    assert "damaged: its summary.json is missing, or nothing that a run has written" in capsys.readouterr().out
    (tmp_path / "outputs" / "toy" / "mine" / "summary.json").write_text(text)
    with pytest.raises(UserError, match="no full run in .*: train first"):
        folders.newest_best("toy", "full")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", ".", "/tmp/x"])
def test_a_run_name_is_no_path(tmp_path, name):
    assert "--run_name" in run_toy(tmp_path, "--run_name", name, expect=2)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_an_output_dir_that_cannot_be(tmp_path):
    (tmp_path / "toy").write_text("a file in the way")
    said = run_toy(tmp_path, expect=2)
    assert str(tmp_path / "toy") in said and "Traceback" not in said


def test_the_script_as_a_user_runs_it(tmp_path):
    done = run_script(ROOT / "tests", "toy_train.py", "--output_dir", tmp_path, "--epochs", "1", "--max_steps_per_epoch", "2")
    run = tmp_path / "toy" / "full"
    assert f"run folder {run}" in done.stdout and done.stdout.rstrip().endswith(f"summary.json in {run}")
    record = summary(run)
    check_schema(record)
    assert record["steps"] == 2 and record["status"] == "finished"


def test_a_run_folder_whose_name_is_no_utf_8_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="start with PYTHONUTF8=1"):
        open_run_folder(TrainConfig(output_dir=str(tmp_path), run_name="caf\udce9"), "toy", "full")
    assert not list(tmp_path.iterdir())
