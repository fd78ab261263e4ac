"""What every task promises of a run that is there: scores, answers, checkpoints. (The contract goes on from test_tasks.py.)

Scripts for one kind of checkpoint load the other kind as well: origin.json says what it is. Some of the calls here do that.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Script
from PIL import Image
from safetensors.torch import load_file, save_file
from tasks import (
    EACH,
    SCRIPT,
    TASKS,
    WEIGHTS,
    both,
    call,
    in_task,
    is_drawn,
    one_line,
    read,
    recorded,
    same_numbers,
    scratch,
    small_data,
    tensors,
    trained,
    without,
)

EVAL = {"full": "eval.py", "lora": "eval_lora.py"}
INFER = {"full": "infer.py", "lora": "infer_lora.py"}


@pytest.fixture(scope="session", params=EACH, ids=str)
def task(request):
    return request.param


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


@both
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
    assert str(scratch()) not in card and str(ROOT) not in card and "train_loss" not in card

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


# ---- what the two runs of a task say together ------------------------------------------------------------------------


def test_compare_reads_both_runs(task, tmp_path):
    full, lora = (trained(task, method) for method in SCRIPT)
    args = [full.folder, lora.folder, "--output_dir", tmp_path]
    done = Script(ROOT / "scripts", "compare.py", args, tmp_path / "log", draw=False).wait()
    found = {run["method"]: run["trained_parameters"] for run in read(tmp_path / "compare.json")["runs"]}
    assert found == {run.summary["method"]: run.summary["parameters"]["trainable"] for run in (full, lora)}
    assert f"LoRA reaches {task.metric}" in done.stdout


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
    shown, samples = read(tmp_path / "disagreements.json")["samples"], [read(run / "samples.json") for run in runs]
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


def measure_behaviour_of(runs, path):
    """For a fork: behaviour.json, each model timed three times."""
    sys.path.append(str(ROOT / "scripts"))
    import behaviour
    from behaviour import BehaviourConfig, measure_behaviour

    behaviour.SECONDS = 0.0
    path.write_text(json.dumps(measure_behaviour(BehaviourConfig(*map(str, runs)))))


@pytest.mark.parametrize("task", [TASKS[name] for name in ("detection", "voice_rvc")], ids=str)
@pytest.mark.slow
def test_without_a_corruption_runs_score_as_they_did_and_both_have_left_their_base(task, tmp_path):
    """Of pictures that are padded, and of a task without a head."""
    full, lora = (trained(task, method) for method in ("full", "lora"))
    in_task(task, measure_behaviour_of, (full.folder, lora.folder), tmp_path / "behaviour.json")
    found = read(tmp_path / "behaviour.json")
    for method, run in (("full", full), ("lora", lora)):
        assert found["corrupted"]["none"][method] == pytest.approx(run.summary["metrics"]["best"][task.metric], abs=2e-3)
        assert 0 < found["drift"][method] < 10
    assert found["corrupted"]["noise"]["lora"] != found["corrupted"]["none"]["lora"]
    assert all(0 < ms < 60_000 for ms in found["milliseconds"].values()) and len(found["milliseconds"]) == 4
