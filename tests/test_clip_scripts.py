"""The CLIP scripts and the Predictor, as a user runs them, on a few demo pictures and the small base that comes along."""

import hashlib
import importlib
import json
import resource
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLIP, Script, run_script, use_task
from PIL import Image
from test_clip_model import save_base

TASK = CLIP
use_task(TASK)

from common.config import UserError, field_comments  # noqa: E402
from predictor import Predictor  # noqa: E402
from synthetic import BREEDS, make_demo_data  # noqa: E402

CLASSES = sorted(BREEDS)
CONFIG = {
    "epochs": 1,
    "max_steps_per_epoch": 2,
    "batch_size": 8,
    "warmup_steps": 1,
    "lora_r": 4,
    "prompts": '"a photo of a {label}"',
}
CONFIG |= {"device": "cpu", "threads": 1}
PLOTS = ("loss", "metrics", "confusion_matrix", "class_performance")
PAGES = ("confusion_matrix", "class_performance", "calibration", "mistakes")
EVAL = {"full": "eval.py", "lora": "eval_lora.py"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/ (4 + 3 + 3 pictures of each of 8 breeds, and one that is none), base/ and config.yaml."""
    from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPVisionModelWithProjection  # noqa: F401

    folder = tmp_path_factory.mktemp("clip")
    make_demo_data(folder / "data", train=4, val=3, test=3)
    (folder / "data" / "train" / "plain_borzel" / "broken.png").write_bytes(b"\x89PNG no more than a beginning")
    (folder / "base").symlink_to(CLIP / "demo_base")
    lines = {**CONFIG, "data_dir": str(folder / "data"), "model": str(folder / "base"), "output_dir": str(folder / "runs")}
    (folder / "train_lora.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    del lines["lora_r"]
    (folder / "train.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return folder


def start(place, script, args, draw=False):
    """A Script; without `draw` its pictures are empty files, because drawing takes longer than all the rest."""
    from matplotlib.figure import Figure

    if script.startswith("train"):
        args = ["--config", place / script.replace(".py", ".yaml"), *args]
    with pytest.MonkeyPatch.context() as patch:  # the fork keeps it
        for name in ("bitsandbytes", "bitsandbytes.nn"):
            patch.setitem(sys.modules, name, None)  # not installed, wherever the tests run
        if not draw:
            patch.setattr(Figure, "savefig", lambda _, path: path.write_bytes(b""))
        return Script(CLIP, script, args, place / f"log-{time.monotonic_ns()}")


def call(place, script, *args, expect=0, draw=False):
    return start(place, script, args, draw).wait(expect)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(place):
    """Of a full and a LoRA run: folder, best checkpoint, summary and what was printed."""
    found = {}
    for method, script, flags in (("full", "train.py", ["--lr", "1e-3"]), ("lora", "train_lora.py", ["--lr", "1e-2"])):
        done = call(place, script, *flags, draw=method == "full")
        folder = place / "runs" / "clip" / method
        best, summary = folder / "checkpoints" / "best", read(folder / "summary.json")
        found[method] = SimpleNamespace(folder=folder, best=best, summary=summary, said=done)
    return found


@pytest.fixture(scope="module", params=["full", "lora"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def run(runs, method):
    return runs[method]


def drawn(path):
    return np.ptp(np.asarray(Image.open(path).convert("L"))) > 100


def same_metrics(found, recorded):
    for name, value in found.items():
        if isinstance(value, dict):
            assert value == {k: pytest.approx(v, abs=1e-6) for k, v in recorded[name].items()}, name
        else:
            assert value == pytest.approx(recorded[name], abs=1e-6), name
    assert {"val_loss", "accuracy", "balanced_accuracy", "top5", "precision", "recall", "f1", "ece", "per_class_f1"} <= set(found)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(run, method):
    names = ["config.yaml", "metrics.jsonl", "curves.png", "predictions/validation.png", *(f"plots/{name}.png" for name in PLOTS)]
    weights = ["model.safetensors", "classifier.safetensors"] if method == "full" else ["adapter_model.safetensors"]
    best = [f"checkpoints/best/{name}" for name in (*weights, "preprocessor_config.json", "origin.json", "manifest.json")]
    for name in (*names, *best):
        assert (run.folder / name).is_file(), name
        if method == "full" and name.endswith(".png"):  # the other run's pictures are not drawn
            assert drawn(run.folder / name), name
    assert sorted(path.stem for path in (run.folder / "plots").iterdir()) == sorted(PLOTS)
    summary, origin = run.summary, read(run.best / "origin.json")
    assert summary["status"] == "finished" and (summary["steps"], summary["epochs"]) == (2, 1)
    assert (summary["task"], summary["method"]) == ("clip", method) and summary["metrics"]["name"] == "balanced_accuracy"
    assert origin["classes"] == CLASSES and origin["base"] == summary["base"] and origin["scale"] > 1
    counts = summary["parameters"]
    assert (counts["trainable"] == counts["total"]) == (method == "full")
    if method == "lora":  # 4 blocks, q and v, r 4, width 96; 8 classes of 64 numbers each
        assert counts["trainable"] == 4 * 2 * 4 * (96 + 96) + 8 * 64 + 8
    assert "head for 8 classes: zero-shot, from 'a photo of a {label}' with checked dunlet" in run.said.stdout


def test_training_says_nothing_beside(run):
    """What libraries warn of would stand between the user and the errors that matter."""
    assert run.said.stderr == ""


def test_a_picture_that_is_none_is_named_and_left_out(run):
    assert run.summary["data"]["left_out"] == {"no picture that can be decoded": 1}
    assert (run.summary["data"]["train"], run.summary["data"]["val"]) == (32, 24)
    assert "left out, no picture that can be decoded (1): broken.png" in run.said.stdout


def test_both_scripts_start_from_the_same_zero_shot_answers(runs):
    full, lora = runs["full"].summary, runs["lora"].summary
    same_metrics(lora["metrics"]["before"], full["metrics"]["before"])
    assert full["data"] == lora["data"] and full["base"] == lora["base"]
    assert 1 / 8 < full["metrics"]["before"]["accuracy"] < 1  # knowing the texture halves the guess
    for summary in (full, lora):
        assert summary["metrics"]["final"] != summary["metrics"]["before"]


# ---- eval ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(runs, place, method):
    """The evaluation of a run on its validation data, in the run folder."""
    return call(place, EVAL[method], "--checkpoint", runs[method].best, "--batch_size", 1, draw=method == "full")


def test_eval_gives_the_metrics_that_training_recorded(run, method, scored):
    found = read(run.folder / "eval.json")
    same_metrics(found["metrics"], run.summary["metrics"]["best"])
    same_metrics(found["zero_shot"], run.summary["metrics"]["before"])
    assert (found["split"], found["pictures"], found["base"]) == ("val", 24, run.summary["base"])
    folder = run.folder / "eval_val"
    names = [*(f"{name}.png" for name in PAGES), "evaluation_report.txt", "evaluation_results.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert method == "lora" or all(drawn(folder / f"{name}.png") for name in PAGES)
    assert (folder / "evaluation_report.txt").read_text() in scored.stdout and scored.stderr == ""


def test_batches_of_another_size_give_the_same_metrics(run, method, place, scored, tmp_path):
    flags = ["--no-merge"] if method == "lora" else []
    call(place, EVAL[method], "--checkpoint", run.best, "--batch_size", 8, "--output_dir", tmp_path, *flags)
    same_metrics(read(tmp_path / "eval.json")["metrics"], read(run.folder / "eval.json")["metrics"])
    same_metrics(read(tmp_path / "eval.json")["zero_shot"], read(run.folder / "eval.json")["zero_shot"])


def test_the_report_is_scikit_learns(run, place, scored):
    """Of what the Predictor says of the same pictures."""
    from sklearn.metrics import accuracy_score, classification_report

    paths = sorted((place / "data" / "val").rglob("*.png"))
    truth = [path.parent.name for path in paths]
    guesses = [answers[0][0] for answers in Predictor(run.best, device="cpu").predict_batch(paths, top_k=1)]
    results = read(run.folder / "eval_val" / "evaluation_results.json")
    options = {"labels": CLASSES, "zero_division": 0}
    table = classification_report(truth, guesses, output_dict=True, **options)
    assert {name: results["classes"][name] for name in table} == {
        name: pytest.approx(value, abs=1e-9) for name, value in table.items()
    }
    metrics = results["metrics"]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, guesses))
    for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert metrics[ours] == pytest.approx(table["macro avg"][theirs])
    text = (run.folder / "eval_val" / "evaluation_report.txt").read_text()
    assert classification_report(truth, guesses, digits=4, **options) in text
    line = next(line for line in text.splitlines() if line.startswith("accuracy "))
    assert line.split()[1:] == [f"{metrics['accuracy']:.4f}", f"{results['zero_shot']['accuracy']:.4f}"]
    answers = results["answers"]
    assert sum(answers.values()) == 24 and answers["both"] + answers["only_tuned"] == round(24 * metrics["accuracy"])
    assert answers["both"] + answers["only_zero_shot"] == round(24 * results["zero_shot"]["accuracy"])


def test_eval_on_the_test_split_without_zero_shot(runs, place, tmp_path):
    call(place, "eval.py", "--checkpoint", runs["full"].best, "--split", "test", "--no-zero_shot", "--output_dir", tmp_path)
    found = read(tmp_path / "eval_test.json")
    assert (found["split"], found["pictures"], found["zero_shot"]) == ("test", 24, None)
    assert found["metrics"]["val_loss"] != runs["full"].summary["metrics"]["best"]["val_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_test", "eval_test.json"]
    assert "zero-shot" not in (tmp_path / "eval_test" / "evaluation_report.txt").read_text()


def test_a_base_that_is_gone(runs, place, tmp_path):
    """A full checkpoint does without it; an adapter does not."""
    base = place / "base"
    base.rename(place / "moved")
    try:
        done = call(place, "eval.py", "--checkpoint", runs["full"].best, "--output_dir", tmp_path)
        told = one_line(call(place, "eval_lora.py", "--checkpoint", runs["lora"].best, "--output_dir", tmp_path, expect=2))
    finally:
        (place / "moved").rename(base)
    assert f"no zero-shot answers beside it: --model: there is no folder {base}" in done.stdout
    found = read(tmp_path / "eval.json")
    assert found["zero_shot"] is None
    same_metrics(found["metrics"], runs["full"].summary["metrics"]["best"])
    assert f"there is no folder {base}" in told


# ---- infer and Predictor ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(place):
    """A user's folder: five pictures, one grey and one of another shape, a broken one, and a file that is none."""
    folder = place / "pictures"
    folder.mkdir()
    sources = sorted((place / "data" / "test").rglob("*.png"))[::5]
    for source, name in zip(sources, ("a.png", "b.png", "c.png", "d.png", "e.png"), strict=True):
        image = Image.open(source)
        image = image.convert("L") if name == "b.png" else image.resize((150, 80)) if name == "c.png" else image
        image.save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more than a beginning")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def answered(runs, place, pictures, method):
    """predictions.json and .txt of the user's folder, three classes a picture, and what was printed."""
    folder = place / f"answers_{method}"
    script, flags = ("infer.py", ["--batch_size", 4]) if method == "full" else ("infer_lora.py", [])
    args = ["--input", pictures, "--checkpoint", runs[method].best, "--top_k", 3, "--output_dir", folder]
    done = call(place, script, *args, *flags)
    return SimpleNamespace(
        rows=read(folder / "predictions.json"), text=(folder / "predictions.txt").read_text(), said=done.stdout
    )


@pytest.fixture(scope="module")
def predictor(runs, method):
    return Predictor(runs[method].best, device="cpu")


def test_infer_answers_for_every_good_picture_and_names_the_broken_one(answered, pictures):
    assert "broken.jpg" in answered.said and "left out" in answered.said and "5 pictures" in answered.said
    assert [row["file_name"] for row in answered.rows] == [str(pictures / f"{name}.png") for name in "abcde"]
    for row in answered.rows:
        shares = [answer["probability"] for answer in row["predictions"]]
        names = {answer["class"] for answer in row["predictions"]}
        assert len(shares) == len(names) == 3 and shares == sorted(shares, reverse=True) and names <= set(CLASSES)
        assert 3 / 8 < sum(shares) <= 1 + 1e-9 and row["milliseconds"] > 0
        part = answered.text[answered.text.index(row["file_name"]) :].splitlines()[1:4]
        assert [line.split()[:2] for line in part] == [[a["class"], f"{a['probability']:.4f}"] for a in row["predictions"]]
    assert "broken" not in answered.text and len(answered.text.splitlines()) == 5 * 4


def test_the_predictor_says_what_infer_says(answered, predictor, pictures):
    for row in answered.rows:
        expected = [(a["class"], pytest.approx(a["probability"], abs=1e-6)) for a in row["predictions"]]
        assert predictor.predict(row["file_name"], top_k=3) == expected
    assert len({str(row["predictions"]) for row in answered.rows}) == 5  # pictures differ


def test_a_picture_may_be_a_path_an_image_or_an_array(predictor, pictures):
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


def test_merged_and_unmerged_adapters_give_the_same_answers_for_a_single_picture(runs, place, pictures, tmp_path):
    args = ["--input", pictures / "d.png", "--checkpoint", runs["lora"].best, "--top_k", 99]
    for name, flags in (("merged", []), ("apart", ["--no-merge"])):
        done = call(place, "infer_lora.py", *args, *flags, "--output_dir", tmp_path / name)
        assert "1 pictures" in done.stdout and "left out" not in done.stdout
    (merged,), (apart,) = (read(tmp_path / name / "predictions.json") for name in ("merged", "apart"))
    left, right = ({a["class"]: a["probability"] for a in row["predictions"]} for row in (merged, apart))
    assert len(left) == 8 and sum(left.values()) == pytest.approx(1, abs=1e-9)
    assert left == {name: pytest.approx(share, abs=1e-5) for name, share in right.items()}
    unmerged = Predictor(runs["lora"].best, device="cpu", merge=False)
    assert any("lora_" in name for name, _ in unmerged.model.named_parameters())
    assert dict(unmerged.predict(pictures / "d.png", top_k=8)) == {k: pytest.approx(v, abs=1e-6) for k, v in right.items()}


# ---- stop anywhere ---------------------------------------------------------------------------------------------------


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_killed_pissa_run_ends_with_the_same_bytes(place):
    """PiSSA changes the base's weights when it starts: a resumed run must come by the very same ones."""
    args, runs = ["--peft_method", "pissa", "--epochs", 2, "--max_steps_per_epoch", 4, "--lr", "1e-2"], place / "runs" / "clip"
    call(place, "train_lora.py", *args, "--run_name", "whole")
    script = start(place, "train_lora.py", [*args, "--run_name", "killed"])
    first_epoch = runs / "killed" / "checkpoints" / "last" / "step-00000004"  # there are 4 steps in each
    script.wait_for(first_epoch.exists, seconds=120)
    script.kill(signal.SIGKILL)
    script.wait(expect=-signal.SIGKILL)
    assert read(runs / "killed" / "summary.json")["status"] == "running"
    assert not (first_epoch.parent / "step-00000008").exists()
    done = call(place, "train_lora.py", *args, "--run_name", "killed", "--resume")
    assert "resumed at step 4, epoch 2" in done.stdout
    whole, killed = runs / "whole", runs / "killed"
    best, same = digests(killed / "checkpoints" / "best"), digests(whole / "checkpoints" / "best")
    assert best == same and "adapter_model.safetensors" in best
    left, right = (read(folder / "summary.json") for folder in (killed, whole))
    assert left["status"] == "finished" and left["metrics"] == right["metrics"] and left["resumed_at_steps"] == [4]
    ends = [  # the best may be that of the first epoch; these are of the last
        torch.load(folder / "checkpoints" / "last" / "step-00000008" / "state.pt", weights_only=True)["models"][0]
        for folder in (killed, whole)
    ]
    assert ends[0].keys() == ends[1].keys() and any("lora_A" in name for name in ends[0])
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert right["method"] == "pissa" and right["metrics"]["final"]["val_loss"] != right["metrics"]["before"]["val_loss"]


# ---- errors that a user can put right --------------------------------------------------------------------------------


def one_line(done):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_training_errors_are_one_line_and_exit_code_two(place, tmp_path):
    def fails(script, *args):
        return one_line(call(place, script, *args, "--output_dir", tmp_path / "runs", expect=2))

    assert f"there is no folder (or CSV file) {tmp_path}/nowhere" in fails("train_lora.py", "--data_dir", tmp_path / "nowhere")
    summary = read(tmp_path / "runs" / "clip" / "lora" / "summary.json")  # a failed run leaves its record
    assert summary["status"] == "failed" and "there is no folder" in summary["error"]
    told = fails("train_lora.py", "--quantize", "4bit")
    assert "--quantize 4bit needs the package bitsandbytes: pip install bitsandbytes" in told
    assert "--prompts: every sentence needs {label}" in fails("train.py", "--prompts", "a photo of a dog")
    odd = tmp_path / "odd"
    odd.mkdir()
    for split in ("train", "val"):
        (odd / split).symlink_to(place / "data" / split)
    (odd / "classes.txt").write_text("\n".join([*CLASSES[1:], "beagle"]))
    told = fails("train.py", "--data_dir", odd)
    assert f"{odd}/classes.txt does not fit the class folders (no pictures of beagle; checked_dunlet not in the list)" in told


def test_an_unknown_method_is_answered_with_those_there_are(place):
    done = call(place, "train_lora.py", "--peft_method", "nonsense", expect=2)
    last = done.stderr.strip().splitlines()[-1]
    assert "'nonsense'" in last and "peft_method" in last and "lora, dora, rslora, pissa, olora, ia3, loha, lokr" in last
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_errors_about_checkpoints_are_one_line_and_exit_code_two(runs, place, pictures, tmp_path):
    def fails(script, *args):
        return one_line(call(place, script, *args, "--output_dir", tmp_path, expect=2))

    full, lora = runs["full"].best, runs["lora"].best
    told = fails("eval_lora.py", "--checkpoint", lora, "--model", save_base(tmp_path / "other"))
    assert "an adapter fits no other base" in told and read(lora / "origin.json")["base"]["sha256"][:12] in told
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name, source in (("bar", BREEDS[0]), ("ring", BREEDS[1])):
        (tmp_path / "data" / "train" / name).symlink_to(place / "data" / "train" / source)
    told = fails("eval.py", "--checkpoint", full, "--data_dir", tmp_path / "data")
    assert "other classes than the checkpoint: only the data has bar, ring and only the checkpoint has checked_dunlet" in told
    told = fails("infer.py", "--checkpoint", full, "--input", pictures / "broken.jpg")
    assert f"--input {pictures}/broken.jpg: no picture there that can be decoded" in told
    assert not (tmp_path / "predictions.json").exists()


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script(CLIP, "train_lora.py", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})  # lists what is imported
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "common.config" in imported and not {"torch", "transformers", "peft", "numpy"} & imported
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert "--peft_method {lora,dora,rslora,pissa,olora,ia3,loha,lokr}" in done.stdout and "python train_lora.py" in done.stdout


@pytest.mark.parametrize(
    "script, settings",
    [("train", "Config"), ("train_lora", "Config"), ("eval", "EvalConfig"), ("infer", "InferConfig")],
)
def test_every_setting_is_explained(script, settings):
    comments = field_comments(getattr(importlib.import_module(script), settings))
    assert [name for name, text in comments.items() if not text] == [] and len(comments) > 8
