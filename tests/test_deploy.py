"""What leaves the project: adapters out of full fine-tunes, merged models, and the check that both answer alike."""

import copy
import json
import re
import sys

import pytest
import torch
from conftest import ROOT
from tasks import EACH, TASKS, call, every_task, in_task, one_fast, read, small_data, tensors, trained

from common.config import UserError
from common.lora import put_lora
from common.lora_layers import base_weight

sys.path.insert(0, str(ROOT / "scripts"))
import low_rank  # noqa: E402
import parity  # noqa: E402
import task_modules  # noqa: E402

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", params=EACH, ids=str)
def task(request):
    return request.param


def found_in(task, function, *args):
    """What function(*args) gives in a process of the task's; JSON in between."""

    def run():
        sys.path.append(str(ROOT / "scripts"))
        print("\n" + json.dumps(function(*args)))

    return json.loads(in_task(task, run).splitlines()[-1])


# ---- what a script learns of a task ----------------------------------------------------------------------------------


def look(checkpoint, other):
    import torch

    from common import config
    from task_modules import METRICS, enter_task, evaluate, load, outputs, real_batches, task_of

    folder, origin = task_of(checkpoint)
    model, processor, _ = load(folder)
    batches = real_batches(folder, processor, origin, most=3)
    said, again = outputs(origin["task"], model, batches[0]), outputs(origin["task"], model, batches[0])
    assert said.keys() == again.keys() and all(torch.equal(said[name], again[name]) for name in said)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    moved = outputs(origin["task"], model, batches[0])
    assert not any(torch.equal(said[name], moved[name]) for name in said)
    with pytest.raises(config.UserError, match="one task a process"):
        enter_task(other)
    model, _, _ = load(folder)
    metric = METRICS[origin["task"]]
    return {"task": origin["task"], "metric": metric, "value": evaluate(folder, model, processor, origin)[metric[0]]}


@pytest.mark.slow
def test_a_script_gets_real_samples_answers_and_the_metrics_of_any_task(task):
    run = trained(task, "lora")
    other = "pose" if task.name != "pose" else "clip"
    found = found_in(task, look, run.folder, other)
    metrics = run.summary["metrics"]
    assert found["task"] == task.name and task_modules.FOLDERS[task.name] == task.folder
    assert found["metric"] == [metrics["name"], metrics["higher_is_better"]] == [task.metric, task.higher_is_better]
    assert found["value"] == pytest.approx(metrics["best"][task.metric], abs=1e-4)


def test_what_is_no_checkpoint_of_a_task_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        task_modules.task_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no origin.json"):
        task_modules.task_of(tmp_path)
    (tmp_path / "origin.json").write_text('{"task": ["pose"], "method": "full"}')
    with pytest.raises(UserError, match="not of one of classification, detection"):
        task_modules.task_of(tmp_path)
    with pytest.raises(UserError, match="there is no task 'speech'; there are classification"):
        task_modules.enter_task("speech")


# ---- low rank --------------------------------------------------------------------------------------------------------


def layers():
    from torch import nn
    from torch.nn.utils import parametrizations, weight_norm

    return {
        "linear": nn.Linear(12, 9),
        "conv": nn.Conv2d(4, 6, 3, stride=2),
        "dilated": nn.Conv1d(5, 7, 3, dilation=2),
        "grouped": nn.Conv1d(6, 8, 3, groups=2),
        "transposed": nn.ConvTranspose1d(6, 5, 4, stride=2),
        "transposed, grouped": nn.ConvTranspose1d(6, 4, 3, groups=2),
        "normed": parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
        "normed over another side": parametrizations.weight_norm(nn.ConvTranspose1d(6, 5, 4)),
        "normed, the old way": weight_norm(nn.Conv1d(4, 6, 3)),
        "embedding": nn.Embedding(11, 4),
    }


@pytest.mark.parametrize("kind", layers())
def test_a_layer_takes_the_pair_of_its_change_whatever_it_is(kind):
    with torch.no_grad():  # the old weight_norm keeps its weight, which no copy can be made of where it has a history
        base, tuned = torch.nn.ModuleList([layers()[kind]]), torch.nn.ModuleList([layers()[kind]])
    for parameter in (*base.parameters(), *tuned.parameters()):
        torch.nn.init.normal_(parameter)
    delta = low_rank.deltas(tuned, base, ["0"])["0"]
    shares = low_rank.energies(delta)
    assert (shares.diff() > 0).all() and shares[-1] == pytest.approx(1) and 0 < shares[0] < 1
    for r in (1, 2, len(shares)):
        down, up = low_rank.split(delta, r)
        assert down.shape[-2] == up.shape[-1] == r
        left = float((delta - up @ down).square().sum() / delta.square().sum())
        assert left == pytest.approx(1 - float(shares[r - 1]), abs=1e-5)
    part, adapted, exact = copy.deepcopy(tuned), copy.deepcopy(base), copy.deepcopy(tuned)
    put_lora(adapted, {"0": (2, 2, 0.0, False)}, [])
    adapted[0].take(*low_rank.split(delta, 2))
    low_rank.truncate(part, base, {"0": 2})
    torch.testing.assert_close(adapted[0].weight, base_weight(part[0]), rtol=1e-4, atol=1e-5)
    low_rank.truncate(exact, base, {"0": len(shares)})
    torch.testing.assert_close(base_weight(exact[0]), base_weight(tuned[0]), rtol=1e-4, atol=1e-5)
    low_rank.truncate(exact, base, {"0": 0})
    torch.testing.assert_close(base_weight(exact[0]), base_weight(base[0]), rtol=1e-4, atol=1e-5)


def test_the_rank_grows_with_the_energy():
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squares 9, 4, 1, 0
    shares = low_rank.energies(delta)
    ranks = {energy: low_rank.rank_at(shares, energy) for energy in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)}
    assert ranks == {0.1: 1, 9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.95: 3, 1.0: 3}


# ---- the gate --------------------------------------------------------------------------------------------------------


def test_the_gate_names_the_output_that_differs(capsys):
    right = {"logits": torch.tensor([[1.0, -4.0]]), "boxes": torch.ones(1, 2, 4)}
    faults = {
        "merged answers otherwise than adapter: boxes differs by 0.02 of 1, a share of 0.02": right
        | {"boxes": right["boxes"] + 0.02},
        "merged answers otherwise than adapter: boxes is missing, not": {"logits": right["logits"]},
        "merged answers otherwise than adapter: logits is \\(1, 3\\), not \\(1, 2\\)": right | {"logits": torch.ones(1, 3)},
        "merged gives numbers that are not finite in logits": right | {"logits": right["logits"] / 0},
        "merged gives nothing": {},
    }
    for message, wrong in faults.items():
        with pytest.raises(UserError, match=message + ".*nothing was saved"):
            parity.check(
                {"adapter": lambda _: right, "merged": lambda batch, wrong=wrong: wrong if batch == 2 else right}, [1, 2]
            )
    near = right | {"logits": right["logits"] + 4e-5}
    rows = parity.check({"adapter": lambda _: right, "merged": lambda _: right, "onnx": lambda _: near}, [1, 2])
    found = {(row["output"], row["form"]): row["share"] for row in rows}
    assert len(found) == 4 and found["logits", "onnx"] == pytest.approx(1e-5, rel=1e-2) and found["boxes", "onnx"] == 0
    said = capsys.readouterr().out
    assert re.search(r"logits, onnx +4\.0\de-05  of 4 ", said)


def test_rows_may_come_in_another_order_but_stay_rows():
    noise = torch.Generator().manual_seed(0)
    right = {"logits": torch.randn(2, 5, 3, generator=noise), "pred_boxes": torch.rand(2, 5, 4, generator=noise)}
    moved = {name: torch.stack([t[0, [3, 0, 4, 1, 2]], t[1, [1, 2, 0, 4, 3]]]) for name, t in right.items()}
    torn = moved | {"pred_boxes": moved["pred_boxes"][:, [1, 0, 2, 3, 4]]}  # two queries have each other's box
    rows = parity.check({"model": lambda _: right, "onnx": lambda _: moved}, [1], unordered=True)
    assert len(rows) == 2 and not any(row["difference"] for row in rows)
    for wrong, unordered in ((torn, True), (moved, False)):
        with pytest.raises(UserError, match="onnx answers otherwise than model"):
            parity.check({"model": lambda _: right, "onnx": lambda _, wrong=wrong: wrong}, [1], unordered=unordered)


# ---- adapters out of full fine-tunes, models out of adapters ---------------------------------------------------------

SCRIPTS = ROOT / "scripts"


def look_at_extracted(best, out):
    """That an adapter of full rank is the tuned model in its layers, heads, norms and biases, and the base in all else."""
    import torch

    from common.lora import adaptable_layers, is_within
    from common.lora_layers import base_weight
    from task_modules import base_below, load, task_of

    folder, origin = task_of(best)
    tuned, _, _ = load(folder)
    base, whole = base_below(folder, origin, tuned)
    plain, beside = load(out)[0], load(out, merge=False)[0]
    layers = [name for name, m in beside.named_modules() if hasattr(m, "base_layer")]
    found, target, start = (adaptable_layers(each) for each in (plain, tuned, base))
    for name in layers:
        torch.testing.assert_close(base_weight(found[name]), base_weight(target[name]), rtol=1e-4, atol=1e-5)
        assert not torch.equal(base_weight(found[name]), base_weight(start[name]))
    old, new, now = (each.state_dict() for each in (base, tuned, plain))
    others = [name for name in now if not any(name.startswith(f"{layer}.") for layer in layers)]
    others += [f"{layer}.bias" for layer in layers if f"{layer}.bias" in now]
    for name in others:
        brought = is_within(name, whole) or now[name].ndim < 2
        assert torch.equal(now[name], new[name] if brought else old[name]), name
    assert any(now[name].ndim < 2 and not torch.equal(now[name], old[name]) for name in others)
    return len(layers)


@one_fast
def test_a_full_fine_tune_gives_an_adapter(task, tmp_path):
    run, out = trained(task, "full"), tmp_path / "adapter"
    flags = ("--output_dir", out, "--energy", 1, "--norms")
    said = call(task, "extract_lora.py", run.folder, *flags, folder=SCRIPTS).stdout
    assert found_in(task, look_at_extracted, run.best, out) > 3
    assert "keeps 100.0% of their change" in said and said.splitlines()[-1] == str(out)
    scores = dict(re.findall(r"^  (full fine-tune|extracted|base, with its heads) +([\d.]+)$", said, re.M))
    assert float(scores["full fine-tune"]) == pytest.approx(run.summary["metrics"]["best"][task.metric], abs=1e-4)
    assert len(scores) == 3 and "adapter from disk" in said and "merged from disk" in said
    origin, card = read(out / "origin.json"), (out / "README.md").read_text()
    assert origin["method"] == "lora" and origin["base"] == read(run.best / "origin.json")["base"]
    assert "was not trained as an adapter" in card and "predictor = Predictor(" in card
    if task.build:
        in_task(task, answers_like_plain_peft, task, out)


def answers_like_plain_peft(task, out):
    from peft import PeftModel

    from model import load_checkpoint

    plain, ours = PeftModel.from_pretrained(task.build("demo", out), out).eval(), load_checkpoint(out, merge=False)[0]
    with torch.no_grad():
        for found, expected in zip(*(tensors(model(pixel_values=PIXELS)) for model in (plain, ours)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def look_at_merged(best, out):
    """That a merged folder is a base and a checkpoint, and answers as the adapter."""
    from parity import check
    from task_modules import answers_of, first_batches, is_adapter_beside, load, open_data, orders_queries

    adapter, processor, origin = load(best, merge=False)
    merged, _, about = load(out)
    from model import load_base

    assert about["method"] == "full" and not is_adapter_beside(merged)
    assert origin["method"] != "lora" or is_adapter_beside(adapter)
    task, forms = origin["task"], {"adapter": adapter, "merged": merged}
    batches = first_batches(task, open_data(best, processor, origin), 1)
    check(answers_of(task, forms), batches, unordered=orders_queries(task, merged))
    assert load_base(str(out))[2]["sha256"] != origin["base"]["sha256"]


@one_fast
def test_an_adapter_gives_a_plain_model(task, tmp_path):
    run, out = trained(task, "lora"), tmp_path / "merged"
    said = call(task, "merge_lora.py", run.folder, "--output_dir", out, folder=SCRIPTS).stdout
    found_in(task, look_at_merged, run.best, out)
    assert "merged from disk" in said and said.splitlines()[-1] == str(out)
    gaps = re.findall(r", merged +(\S+)  of", said)
    assert max(map(float, gaps)) > 0, "an adapter beside its base rounds otherwise than the sum: the two were compared"
    assert (out / "voice.index").is_file() == (run.folder / "voice.index").is_file()
    assert {path.name for path in out.iterdir()} >= {
        "model.safetensors",
        "origin.json",
        "manifest.json",
        "README.md",
        *task.in_full,
    }


@pytest.mark.slow
@every_task("script", "extract_lora.py", "merge_lora.py")
def test_what_comes_out_is_a_checkpoint_for_eval_and_infer(task, script, tmp_path):
    method = "full" if script == "extract_lora.py" else "lora"
    out, files = tmp_path / "out", tmp_path / "files"
    files.mkdir()
    call(task, script, trained(task, method).folder, "--output_dir", out, folder=SCRIPTS)
    task.inputs(small_data(task), files)
    call(task, "eval.py", "--checkpoint", out, "--output_dir", tmp_path / "scores", "--device", "cpu")
    assert task.metric in read(tmp_path / "scores" / "eval.json")["metrics"]
    call(task, "infer.py", "--checkpoint", out, "--input", files, "--output_dir", tmp_path / "answers", *task.infer_flags)
    assert task.answers(read(tmp_path / "answers" / "predictions.json"), tmp_path / "answers")


def test_only_a_checkpoint_is_replaced(tmp_path):
    run, photos, old = tmp_path / "run", tmp_path / "photos", tmp_path / "old"
    (photos / "2019").mkdir(parents=True)
    old.mkdir()
    (old / "origin.json").touch()
    assert task_modules.place_for("", run / "checkpoints" / "best", "r8", False) == tmp_path / "run_r8"
    assert task_modules.place_for(str(old), run, "r8", overwrite=True) == old
    for place, overwrite, message in ((old, False, "--overwrite replaces it"), (photos, True, "is no checkpoint")):
        with pytest.raises(UserError, match=message):
            task_modules.place_for(str(place), run, "r8", overwrite)


def refusals(full, lora, head, folder):
    """What is refused, each in one line, and what a planted fault leaves: nothing."""
    import shutil

    from safetensors.torch import load_file, save_file

    import extract_lora
    import merge_lora
    from common import saved_models
    from common.config import UserError
    from task_modules import enter_task

    enter_task("classification")
    said = {}

    def attempt(name, script, *words):
        try:
            script.main([*map(str, words), *([] if "--output_dir" in words else ["--output_dir", str(folder / "out")])])
            said[name] = ""
        except UserError as error:
            said[name] = str(error)
        assert (folder / "out").exists() == (said[name] == ""), name
        shutil.rmtree(folder / "out", ignore_errors=True)
        assert not list(folder.glob(".out*"))

    attempt("full to merge", merge_lora, full)
    attempt("lora to extract", extract_lora, lora)
    attempt("no base", merge_lora, lora, "--model", folder / "nowhere")
    attempt("other base", extract_lora, full, "--model", full / "checkpoints" / "best")
    attempt("rank", extract_lora, full, "--rank", 5000)
    attempt("targets", extract_lora, full, "--lora_targets", "nothing_like_it")
    shutil.copytree(lora / "checkpoints" / "best", folder / "damaged")
    (folder / "damaged" / "adapter_config.json").write_text("{}")
    attempt("damaged", merge_lora, folder / "damaged")
    attempt("inside", merge_lora, lora, "--output_dir", lora / "checkpoints" / "best" / "out")
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.txt").touch()
    attempt("files", merge_lora, lora, "--overwrite", "--output_dir", folder / "papers")
    shutil.copytree(full / "checkpoints" / "best", folder / "broken")
    (folder / "broken" / "manifest.json").unlink()
    tensors = load_file(folder / "broken" / "model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / "broken" / "model.safetensors", metadata={"format": "pt"})
    attempt("not finite", extract_lora, folder / "broken")
    attempt("head", merge_lora, head)
    save_whole = saved_models.save_model

    def save_wrong(aside, model, *rest):
        save_whole(aside, model, *rest)
        tensors = load_file(aside / "model.safetensors")
        name = min(name for name, tensor in tensors.items() if "layer" in name and tensor.ndim == 2)
        tensors[name][0] += 0.5
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "manifest.json").unlink()

    saved_models.save_model = save_wrong
    attempt("planted", merge_lora, lora)
    return said


def test_what_cannot_be_is_said_and_leaves_nothing(tmp_path):
    task = TASKS["classification"]
    flags = ("--data_dir", small_data(task), "--model", "demo", "--epochs", 1, "--max_steps_per_epoch", 1, "--lora_r", 0)
    head = call(task, "train_lora.py", "--output_dir", tmp_path, *flags, "--run_name", "head") and tmp_path / task.name / "head"
    (folder := tmp_path / "work").mkdir()
    said = found_in(task, refusals, trained(task, "full").folder, trained(task, "lora").folder, head, folder)
    expected = {
        "full to merge": "is a full fine-tune: it is a plain model already",
        "lora to extract": "is no full fine-tune but of the method lora",
        "no base": "there is no folder",
        "other base": "an adapter fits no other base",
        "rank": "--rank 5000: no layer here has more than",
        "targets": "no layer's name ends in 'nothing_like_it'",
        "damaged": "is damaged: adapter_config.json has",
        "inside": "lies in the checkpoint itself",
        "files": "is there already and is no checkpoint",
        "not finite": "its weights have numbers that are not finite",
        "head": "",
        "planted": "merged from disk answers otherwise than adapter: logits differs by",
    }
    for name, message in expected.items():
        assert message in said[name] and "\n" not in said[name] and bool(message) == bool(said[name]), (name, said[name])
