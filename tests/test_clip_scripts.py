"""What the CLIP scripts do beside the contract of test_tasks.py: zero-shot answers, the report, the Predictor, PEFT's methods."""

import signal
import sys

import numpy as np
import pytest
import torch
from conftest import CLIP, check_picture_inputs, use_task
from PIL import Image
from tasks import SETTINGS, TASKS, call, digests, one_line, read, same_numbers, small_data, start, trained

TASK = CLIP
use_task(TASK)

import metrics  # noqa: E402
from common.config import UserError  # noqa: E402
from predictor import Predictor  # noqa: E402
from synthetic import BREEDS  # noqa: E402

ROW = TASKS["clip"]
CLASSES = sorted(BREEDS)
EVAL = {"full": "eval.py", "lora": "eval_lora.py"}
METRICS = {"val_loss", "accuracy", "balanced_accuracy", "top5", "precision", "recall", "f1", "ece", "per_class_f1"}


@pytest.fixture(scope="module", params=["full", "lora"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def run(method):
    return trained(ROW, method)


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_starts_from_the_zero_shot_answers(run, method):
    origin = read(run.best / "origin.json")
    assert origin["classes"] == CLASSES and origin["scale"] > 1
    assert "head for 8 classes: zero-shot, from 'a photo of a {label}' with checked dunlet" in run.said.stdout
    assert 1 / 8 < run.summary["metrics"]["before"]["accuracy"] < 1  # knowing the texture halves the guess
    if method == "lora":  # 4 blocks, q and v, r 8, width 96; 8 classes of 64 numbers each
        assert run.summary["parameters"]["trainable"] == 4 * 2 * 8 * (96 + 96) + 8 * 64 + 8


# ---- eval ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(run, method, tmp_path_factory):
    """The folder with the evaluation of a run on its validation data, and what was printed."""
    folder = tmp_path_factory.mktemp("scored")
    return folder, call(ROW, EVAL[method], "--checkpoint", run.best, "--output_dir", folder).stdout


def test_eval_scores_the_base_as_it_is_beside_the_run(run, scored):
    folder, said = scored
    found = read(folder / "eval.json")
    same_numbers(found["zero_shot"], {name: run.summary["metrics"]["before"][name] for name in found["zero_shot"]})
    assert set(found["metrics"]) >= METRICS and set(found["zero_shot"]) >= METRICS and found["pictures"] == 8
    report = (folder / "eval_val" / "evaluation_report.txt").read_text()
    scores = report[: report.index("right answers")]
    assert scores in said and "95 % interval" in scores and "zero-shot" in scores
    assert len(read(folder / "eval_val" / "samples.json")["rows"]) == 8


def test_the_report_is_scikit_learns(run, scored):
    """Of what the Predictor says of the same pictures."""
    from sklearn.metrics import accuracy_score, classification_report

    paths = sorted((small_data(ROW) / "val").rglob("*.png"))
    truth = [path.parent.name for path in paths]
    guesses = [answers[0][0] for answers in Predictor(run.best, device="cpu").predict_batch(paths, top_k=1)]
    results = read(scored[0] / "eval_val" / "evaluation_results.json")
    options = {"labels": CLASSES, "zero_division": 0}
    table = classification_report(truth, guesses, output_dict=True, **options)
    assert {name: results["classes"][name] for name in table} == {
        name: pytest.approx(value, abs=1e-9) for name, value in table.items()
    }
    metrics = results["metrics"]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, guesses))
    for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert metrics[ours] == pytest.approx(table["macro avg"][theirs])
    text = (scored[0] / "eval_val" / "evaluation_report.txt").read_text()
    assert classification_report(truth, guesses, digits=4, **options) in text
    line = next(line for line in text.splitlines() if line.startswith("accuracy "))
    assert line.split()[1:] == [f"{metrics['accuracy']:.4f}", f"{results['zero_shot']['accuracy']:.4f}"]
    answers = results["answers"]
    assert sum(answers.values()) == 8 and answers["both"] + answers["only_tuned"] == round(8 * metrics["accuracy"])
    assert answers["both"] + answers["only_zero_shot"] == round(8 * results["zero_shot"]["accuracy"])


def test_eval_without_zero_shot(tmp_path):
    call(ROW, "eval.py", "--checkpoint", trained(ROW, "full").best, "--no-zero_shot", "--output_dir", tmp_path)
    assert read(tmp_path / "eval.json")["zero_shot"] is None
    assert "zero-shot" not in (tmp_path / "eval_val" / "evaluation_report.txt").read_text()


def test_a_base_that_is_gone(tmp_path):
    """A full checkpoint does without it; an adapter does not."""
    base = tmp_path / "base"
    base.symlink_to(CLIP / "demo_base")
    args = ["--data_dir", small_data(ROW), "--model", base, "--prompts", "a photo of a {label}", *SETTINGS, "--epochs", 1]
    for script in ("train.py", "train_lora.py"):
        call(ROW, script, *args, "--output_dir", tmp_path / "runs")
    full, lora = (tmp_path / "runs" / "clip" / name for name in ("full", "lora"))
    base.unlink()
    done = call(ROW, "eval.py", "--checkpoint", full / "checkpoints" / "best")
    told = one_line(call(ROW, "eval_lora.py", "--checkpoint", lora / "checkpoints" / "best", expect=2))
    assert f"no zero-shot answers beside it: --model: there is no folder {base}" in done.stdout
    found, recorded = read(full / "eval.json"), read(full / "summary.json")["metrics"]["best"]
    assert found["zero_shot"] is None
    same_numbers(found["metrics"], {name: recorded[name] for name in found["metrics"]})
    assert f"there is no folder {base}" in told


def test_classes_are_drawn_whole_and_of_many_the_extremes(monkeypatch):
    """A zero-shot F1 of 0 lies on the axis and is not cut off; 620 classes are 40 bars."""
    kept = []
    monkeypatch.setattr(metrics, "save_figure", lambda drawing, path: kept.append(drawing))
    labels, names = np.repeat(np.arange(620), 2), [f"c{i} $" for i in range(620)]
    metrics.draw_performance(labels, np.eye(620)[labels], names, "nowhere", np.eye(620)[(labels + 1) % 620])
    (axis,) = kept[0].axes
    (marks,) = (line for line in axis.lines if line.get_marker() == "D")
    assert len(marks.get_xdata()) == 40 and max(marks.get_xdata()) == 0 and not marks.get_clip_on()
    assert len(axis.patches) == 3 * 40 and max(kept[0].get_size_inches()) < 25
    assert "the 20 lowest and 20 highest of 620" in kept[0].get_suptitle()


# ---- infer and Predictor ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A user's folder: five pictures, one grey and one of another shape, a broken one, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    sources = sorted((small_data(ROW) / "test").rglob("*.png"))
    for source, name in zip(sources, ("a.png", "b.png", "c.png", "d.png", "e.png"), strict=False):
        image = Image.open(source)
        image = image.convert("L") if name == "b.png" else image.resize((150, 80)) if name == "c.png" else image
        image.save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more than a beginning")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def answered(run, pictures, method, tmp_path_factory):
    """(rows of predictions.json, predictions.txt) of the user's folder, three classes a picture."""
    folder = tmp_path_factory.mktemp("answers")
    script, flags = ("infer.py", ["--batch_size", 4]) if method == "full" else ("infer_lora.py", [])
    call(ROW, script, "--input", pictures, "--checkpoint", run.best, "--top_k", 3, "--output_dir", folder, *flags)
    return read(folder / "predictions.json"), (folder / "predictions.txt").read_text()


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor(run.best, device="cpu")


def test_infer_says_the_same_in_text_and_json(answered, pictures):
    rows, text = answered
    assert [row["file_name"] for row in rows] == [str(pictures / f"{name}.png") for name in "abcde"]
    for row in rows:
        shares = [answer["probability"] for answer in row["predictions"]]
        names = {answer["class"] for answer in row["predictions"]}
        assert len(shares) == len(names) == 3 and shares == sorted(shares, reverse=True) and names <= set(CLASSES)
        assert 3 / 8 < sum(shares) <= 1 + 1e-9 and row["milliseconds"] > 0
        part = text[text.index(row["file_name"]) :].splitlines()[1:4]
        assert [line.split()[:2] for line in part] == [[a["class"], f"{a['probability']:.4f}"] for a in row["predictions"]]
    assert "broken" not in text and len(text.splitlines()) == 5 * 4


def test_the_predictor_says_what_infer_says(answered, predictor, pictures):
    rows, _ = answered
    for row in rows:
        expected = [(a["class"], pytest.approx(a["probability"], abs=1e-6)) for a in row["predictions"]]
        assert predictor.predict(row["file_name"], top_k=3) == expected
    assert len({str(row["predictions"]) for row in rows}) == 5  # pictures differ


def test_a_picture_may_be_a_path_an_image_or_an_array(predictor, pictures, tmp_path):
    check_picture_inputs(predictor.predict, tmp_path)
    for name in ("a", "b", "c"):
        path = pictures / f"{name}.png"
        image = Image.open(path)
        assert image.mode == ("L" if name == "b" else "RGB")
        expected = predictor.predict(path, top_k=8)
        assert predictor.predict(str(path), top_k=8) == expected
        assert predictor.predict(image, top_k=8) == expected
        assert predictor.predict(np.array(image.convert("RGB")), top_k=8) == expected
        assert sum(share for _, share in expected) == pytest.approx(1, abs=1e-9) and len(expected) == 8


def test_a_batch_is_what_the_single_pictures_are_in_their_order(predictor, pictures):
    paths = [pictures / f"{name}.png" for name in "ebdca"]
    single = [dict(predictor.predict(path, top_k=99)) for path in paths]
    for batch_size in (2, 32):
        found = predictor.predict_batch(iter(paths), top_k=99, batch_size=batch_size)
        assert [dict(answers) for answers in found] == [
            {name: pytest.approx(share, abs=1e-6) for name, share in answers.items()} for answers in single
        ]
    assert max(abs(single[0][name] - single[1][name]) for name in CLASSES) > 1e-3
    assert predictor.predict_batch([]) == []


def test_what_is_no_picture_is_refused(predictor, pictures):
    wrong = [np.zeros((8, 8)), np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)]
    for array in wrong:
        with pytest.raises(UserError, match=r"an array of .* is no picture; expected uint8 \(H, W, 3\)"):
            predictor.predict(array)
    for name, told in (("broken.jpg", "picture that can"), ("nowhere.png", "nowhere.png")):
        with pytest.raises(UserError, match=told) as caught:
            predictor.predict_batch([pictures / "a.png", pictures / name])
        assert str(pictures / name) in str(caught.value) and "\n" not in str(caught.value)
    for options in ({"top_k": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            predictor.predict_batch([pictures / "a.png"], **options)


def test_an_unmerged_predictor_says_what_the_merged_one_says(pictures):
    merged, apart = (Predictor(trained(ROW, "lora").best, device="cpu", merge=merge) for merge in (True, False))
    assert any("lora_" in name for name, _ in apart.model.named_parameters())
    answers = dict(merged.predict(pictures / "d.png", top_k=8))
    assert dict(apart.predict(pictures / "d.png", top_k=8)) == {k: pytest.approx(v, abs=1e-5) for k, v in answers.items()}


# ---- stop anywhere ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_pissa_run_ends_with_the_same_bytes(tmp_path):
    """PiSSA changes the base's weights when it starts: a resumed run must come by the very same ones."""
    args = ["--data_dir", small_data(ROW), "--model", "demo", *SETTINGS, "--output_dir", tmp_path]
    args, runs = [*args, "--peft_method", "pissa", "--lr", "1e-2"], tmp_path / "clip"
    call(ROW, "train_lora.py", *args, "--run_name", "whole")
    script = start(ROW, "train_lora.py", *args, "--run_name", "killed")
    first_epoch = runs / "killed" / "checkpoints" / "last" / "step-00000003"  # there are 3 steps in each
    script.wait_for(first_epoch.exists, seconds=120)
    script.kill(signal.SIGKILL)
    script.wait(expect=-signal.SIGKILL)
    assert read(runs / "killed" / "summary.json")["status"] == "running"
    assert not (first_epoch.parent / "step-00000006").exists()
    done = call(ROW, "train_lora.py", *args, "--run_name", "killed", "--resume")
    assert "resumed at step 3, epoch 2" in done.stdout
    whole, killed = runs / "whole", runs / "killed"
    best, same = digests(killed / "checkpoints" / "best"), digests(whole / "checkpoints" / "best")
    assert best == same and "adapter_model.safetensors" in best
    left, right = (read(folder / "summary.json") for folder in (killed, whole))
    assert left["status"] == "finished" and left["metrics"] == right["metrics"] and left["resumed_at_steps"] == [3]
    ends = [  # the best may be that of the first epoch; these are of the last
        torch.load(folder / "checkpoints" / "last" / "step-00000006" / "state.pt", weights_only=True)["models"][0]
        for folder in (killed, whole)
    ]
    assert ends[0].keys() == ends[1].keys() and any("lora_A" in name for name in ends[0])
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert right["method"] == "pissa" and right["metrics"]["final"]["val_loss"] != right["metrics"]["before"]["val_loss"]


# ---- errors that a user can put right --------------------------------------------------------------------------------


def test_training_errors_are_one_line_and_exit_code_two(tmp_path):
    data = ["--data_dir", small_data(ROW), "--model", "demo", "--output_dir", tmp_path / "runs"]

    def fails(script, *args):
        with pytest.MonkeyPatch.context() as patch:  # the fork keeps it
            for name in ("bitsandbytes", "bitsandbytes.nn"):
                patch.setitem(sys.modules, name, None)  # not installed, wherever the tests run
            return one_line(call(ROW, script, *data, *args, expect=2))

    told = fails("train_lora.py", "--quantize", "4bit")
    assert "--quantize 4bit needs bitsandbytes, which is not installed: pip install bitsandbytes" in told
    assert "--prompts: every sentence needs {label}" in fails("train.py", "--prompts", "a photo of a dog")
    odd = tmp_path / "odd"
    odd.mkdir()
    for split in ("train", "val"):
        (odd / split).symlink_to(small_data(ROW) / split)
    (odd / "classes.txt").write_text("\n".join([*CLASSES[1:], "beagle"]))
    told = fails("train.py", "--data_dir", odd)
    assert f"{odd}/classes.txt does not fit the class folders (no pictures of beagle; checked_dunlet not in the list)" in told


def test_an_unknown_method_is_answered_with_those_there_are():
    done = call(ROW, "train_lora.py", "--peft_method", "nonsense", expect=2)
    last = done.stderr.strip().splitlines()[-1]
    assert "'nonsense'" in last and "peft_method" in last and "lora, dora, rslora, pissa, olora, ia3, loha, lokr" in last
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_data_with_other_classes_than_the_checkpoint_is_named(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name, source in (("bar", BREEDS[0]), ("ring", BREEDS[1])):
        (tmp_path / "data" / "train" / name).symlink_to(small_data(ROW) / "train" / source)
    told = one_line(call(ROW, "eval.py", "--checkpoint", trained(ROW, "full").best, "--data_dir", tmp_path / "data", expect=2))
    assert "other classes than the checkpoint: only the data has bar, ring and only the checkpoint has checked_dunlet" in told
