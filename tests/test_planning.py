"""What a run says before it costs hours: dry runs, forecasts, what fits into memory, the hub; and averaged, compiled training."""

import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
import toy_train
from conftest import metrics_of, run_toy
from safetensors.torch import load_file

from common import hub, runtime
from common.averaging import WeightAverage
from common.batches import EvalBatches
from common.config import TrainConfig, UserError
from common.forecast import DRAWING, Forecast, some_batches, tensor_bytes
from common.out_of_memory import advice, is_out_of_memory, smaller_batch

CPU = torch.device("cpu")


def summary(folder) -> dict:
    return json.loads((folder / "toy" / "full" / "summary.json").read_text())


# ---- forecasts -------------------------------------------------------------------------------------------------------


def forecast(steps, epochs=1, total=0, validation=0.0, accumulate=1) -> Forecast:
    found = Forecast(SimpleNamespace(epochs=epochs, gradient_accumulation_steps=accumulate, dry_run=False))
    found.steps, found.total, found.validation = steps, total, validation
    return found


class Fetched:
    """A loader whose files are known by now: batches cost nothing. fetched: (first, last) of the batches that were asked for."""

    num_workers = 0

    def __init__(self):
        self.batch_sampler, self.fetched = self, None

    def set_range(self, _, start, stop):
        self.fetched = (start, stop)

    def __iter__(self):
        return iter(range(*self.fetched))


def test_the_first_step_is_not_counted_and_only_the_first_epoch_reads_files():
    found = forecast([(50.0, 40.0), (3.0, 2.0), (3.0, 2.0)], epochs=4, total=40, validation=5.0)
    left = 7 * 3.0 + 30 * (3.0 - 2.0)  # of the first epoch's ten; of the three others, which need not wait
    loader = Fetched()
    assert found.seconds(100.0, loader, 1) == pytest.approx(100 + left + 5 * 5.0 + DRAWING, abs=0.01)
    assert loader.fetched == (0, 3)
    in_workers = SimpleNamespace(num_workers=2)
    assert found.seconds(100.0, in_workers, 1) == pytest.approx(100 + 37 * 3.0 + 25 + DRAWING, abs=0.01)


def test_of_a_run_of_one_step_that_step_is_all_there_is():
    found = forecast([(2.0, 1.0)], total=1)
    assert found.is_due(epoch_ends=False) or found.is_due(epoch_ends=True)
    assert found.seconds(10.0, None, 1) == 10 + DRAWING


def test_ten_steps_after_the_first_are_enough_or_the_epoch():
    assert not forecast([(1.0, 0.0)], total=9).is_due(epoch_ends=True)  # one that was seen is the first
    assert forecast([(1.0, 0.0)] * 2, total=9).is_due(epoch_ends=True)
    assert not forecast([(1.0, 0.0)] * 10, total=90).is_due(epoch_ends=False)
    assert forecast([(1.0, 0.0)] * 11, total=90).is_due(epoch_ends=False)


def test_a_part_of_the_validation_is_spread_over_all_of_it():
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(batches=list(range(10))))
    with some_batches(loader, 4):
        assert loader.batch_sampler.batches == [0, 2, 5, 7]
    assert loader.batch_sampler.batches == list(range(10))


@pytest.mark.parametrize("dry, seen", [(False, [4, 100]), (True, [4, 16, 16])])
def test_validation_is_timed_warm_and_by_a_dry_run_on_a_part(monkeypatch, dry, seen):
    """The first evaluation takes 5 s, then each batch 0.5 s, and 0.25 s more where it is read first; the very first 9 s more."""
    clock, evaluated, known = [0.0], [], set()

    class Files:
        num_workers, batch_sampler = 0, EvalBatches([0] * 100, 1)

        def __iter__(self):
            for batch in self.batch_sampler:
                clock[0] += 0.25 * (str(batch) not in known) + 9 * (not known)
                known.add(str(batch))
                yield batch

    loader = Files()

    def evaluate():
        evaluated.append(len(list(loader)))
        clock[0] += 5.0 if len(evaluated) == 1 else 0.5 * evaluated[-1]
        return {"score": len(evaluated)}

    monkeypatch.setattr("common.forecast.time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = Forecast(SimpleNamespace(dry_run=dry))
    assert found.validate(evaluate, loader) == {"score": len(seen)}
    assert evaluated == seen and len(loader.batch_sampler) == 100 and found.validation == 50
    # Of the run, but for what comes first: what it will have taken by then.
    assert clock[0] - found.extra == (50 if dry else 9 + 5 + 50 + 100 * 0.25)


def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(tmp_path):
    (tmp_path / "tmp").mkdir()
    text = run_toy(tmp_path / "dry", "--dry_run", "--epochs", 50, env={"TMPDIR": str(tmp_path / "tmp")})
    head, row = text.splitlines()[-2:]
    assert head.split("  ")[0].strip() == "method" and row.split()[:2] == ["full", "1,153"]
    assert "800 steps" in text and "run folder" not in text and "finished" not in text
    assert not list((tmp_path / "tmp").glob("dry-run-*")) and not (tmp_path / "dry" / "toy").exists()
    assert "leave --resume out" in run_toy(tmp_path / "dry", "--dry_run", "--resume", expect=2)


def test_a_run_ends_with_what_was_predicted_beside_what_it_took(tmp_path):
    text = run_toy(tmp_path, "--run_name", "full")
    record = summary(tmp_path)
    predicted = record["predicted"]
    assert re.search(r"^predicted \d+ s, .* of memory, a checkpoint of .*; took \d+ s, ", text, re.M)
    assert predicted.keys() == {"seconds", "peak_memory_bytes", "checkpoint_bytes"}
    assert abs(predicted["checkpoint_bytes"] - record["checkpoint_bytes"]) < 4_000  # the toy has no model card
    assert predicted["peak_memory_bytes"] == pytest.approx(record["peak_memory_bytes"]["cpu"], rel=0.25)
    assert DRAWING < predicted["seconds"] < record["seconds"] + 2 * DRAWING


def test_bytes_of_all_tensors_count():
    state = {"a": torch.zeros(3), "b": [{"c": torch.zeros(2, 2, dtype=torch.bfloat16)}, "text", 7], "d": (torch.zeros(1).long(),)}
    assert tensor_bytes(state) == 12 + 8 + 8


# ---- an average of the weights ---------------------------------------------------------------------------------------


def test_the_means_follow_the_formula_and_the_weights_come_back_to_the_bit():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, seen = WeightAverage(model, 0.5), []
    for _ in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        seen.append(model.weight.detach().clone())
    expected = seen[0]
    for steps, weight in enumerate(seen[1:], start=1):
        keep = min(0.5, (1 + steps) / (10 + steps))
        expected = keep * expected + (1 - keep) * weight
    bias = model.bias.clone()
    average.use(True)
    average.use(True)
    assert torch.allclose(model.weight, expected, atol=1e-6) and torch.equal(model.bias, bias)
    average.use(False)
    assert torch.equal(model.weight, seen[-1]) and len(average.state_dict()) == 2  # the mean, and how many steps


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    run_toy(folder, "--ema_decay", 0.9)
    return folder / "toy" / "full"


def test_the_averaged_weights_are_judged_and_saved_and_what_trains_is_as_without_them(averaged, tmp_path):
    run_toy(tmp_path)
    assert (averaged / "fingerprint.txt").read_text() == (tmp_path / "toy" / "full" / "fingerprint.txt").read_text()
    model = toy_train.build_model(toy_train.Config())
    best, record = load_file(averaged / "checkpoints/best/model.safetensors"), json.loads((averaged / "summary.json").read_text())
    model.load_state_dict(best)
    samples = toy_train.Samples(toy_train.Config(), "val")
    loader = [{key: torch.stack([samples[0, i][key] for i in range(24)]) for key in ("x", "y", "index")}]
    loss = toy_train.evaluate(model, loader, 0, toy_train.Config())["val_loss"]
    assert loss == pytest.approx(record["metrics"]["best"]["val_loss"], rel=1e-5)
    assert not torch.equal(best["last.weight"], load_file(averaged / "final.safetensors")["last.weight"])


@pytest.mark.parametrize("place", ["in an epoch", "in an epoch, killed", "in the evaluation"])
def test_averages_resume_to_the_same_bits(averaged, tmp_path, place):
    def stop_at_step_21():
        from common.run import Run

        whole = Run.end_step

        def end_step(run, began):
            whole(run, began)
            if run.step == 21 and place.endswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if run.step == 21:
                raise KeyboardInterrupt

        Run.end_step = end_step

    def stop_in_second_evaluation():
        whole = toy_train.evaluate

        def evaluate(model, loader, epoch, config):
            if epoch == 2:
                raise KeyboardInterrupt
            return whole(model, loader, epoch, config)

        toy_train.evaluate = evaluate

    hook = stop_in_second_evaluation if place == "in the evaluation" else stop_at_step_21
    flags = ("--ema_decay", 0.9, "--save_steps", 4)
    run_toy(tmp_path, *flags, hook=hook, expect=-signal.SIGKILL if place.endswith("killed") else 130)
    said = run_toy(tmp_path, *flags, "--resume")
    assert not place.endswith("killed") or "resumed at step 20, epoch 2, 4 batches into it" in said
    again = tmp_path / "toy" / "full"
    assert (again / "fingerprint.txt").read_text() == (averaged / "fingerprint.txt").read_text()
    assert metrics_of(again) == metrics_of(averaged)
    assert all(
        torch.equal(tensor, load_file(averaged / "checkpoints/best/model.safetensors")[name])
        for name, tensor in load_file(again / "checkpoints/best/model.safetensors").items()
    )


def test_of_two_models_the_first_is_averaged(tmp_path):
    run_toy(tmp_path, "--ema_decay", 0.9, "--no_average", "--epochs", 1, script="toy_gan")
    from common.checkpoint import load_state

    state, _ = load_state(tmp_path / "gan" / "full" / "checkpoints" / "last")
    means = state["schedulers"][-1]
    trained = [shape for shape in (tuple(tensor.shape) for tensor in state["models"][0].values())]
    assert [tuple(tensor.shape) for name, tensor in means.items() if name != "n_averaged"] == trained and means[
        "n_averaged"
    ] == 16


# ---- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "now, fitting", [((8, 1), (4, 2)), ((8, 3), (6, 4)), ((7, 1), (1, 7)), ((6, 2), (4, 3)), ((1, 4), None), ((1, 1), None)]
)
def test_the_largest_smaller_batch_with_the_same_product(now, fitting):
    assert smaller_batch(*now) == fitting
    assert fitting is None or math.prod(fitting) == math.prod(now)


def test_the_advice_names_what_the_script_has():
    config = SimpleNamespace(batch_size=8, gradient_accumulation_steps=2, precision="fp32", frozen_dtype="fp32")
    told = advice(config, CPU)
    assert "--batch_size 4 --gradient_accumulation_steps 4" in told and "--frozen_dtype bf16" in told
    assert "--gradient_checkpointing" not in told
    config = SimpleNamespace(batch_size=1, gradient_accumulation_steps=2, precision="bf16", gradient_checkpointing=False)
    told = advice(config, CPU)
    assert "--gradient_checkpointing" in told and "is the same run" not in told and "--precision" not in told


def test_errors_that_mean_no_memory():
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error code 12")
    assert all(map(is_out_of_memory, (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), allocator)))
    assert not any(map(is_out_of_memory, (None, RuntimeError("shapes"), ValueError("out of memory"))))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")])
def test_out_of_memory_in_training_is_one_line_and_the_last_checkpoint_stays(tmp_path, error):
    def full_in_the_second_epoch():
        from common.run import Run

        whole = Run.backward

        def backward(run, loss, /, **parts):
            if run.step == 20:
                raise error
            whole(run, loss, **parts)

        Run.backward = backward

    text = run_toy(tmp_path, hook=full_in_the_second_epoch, expect=2)
    line = text.strip().splitlines()[-1]
    assert line.startswith("error: ") and "--batch_size 2 --gradient_accumulation_steps 2" in line and "Traceback" not in text
    record = summary(tmp_path)
    assert record["status"] == "failed" and "--batch_size 2" in record["error"] and record["steps"] == 20
    assert (tmp_path / "toy/full/checkpoints/last/step-00000016/state.pt").exists()
    run_toy(tmp_path, "--resume")


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """A stand-in for huggingface_hub.HfApi. role: of the token; fault: what uploading raises."""

    role, fault, calls = "write", None, []

    def whoami(self, token):
        return {"auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, name, **options):
        self.calls.append((name, options))

    def upload_folder(self, repo_id, folder_path, **_):
        if self.fault:
            raise self.fault
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture
def on_line(monkeypatch):
    import huggingface_hub

    Hub.role, Hub.fault, Hub.calls = "write", None, []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return huggingface_hub


def test_the_hub_is_asked_before_the_training(on_line, monkeypatch):
    hub.check_hub("me/detector-1.0")
    for name in ("detector", "me/my/detector", "me/", "-me/x", "me/two words", "me/x..y"):
        with pytest.raises(UserError, match="is no name on the hub: it has the form owner/name"):
            hub.check_hub(name)
    Hub.role = "read"
    with pytest.raises(UserError, match="may only read"):
        hub.check_hub("me/x")
    monkeypatch.setattr(Hub, "whoami", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"does not answer to this token \(ZeroDivisionError\)"):
        hub.check_hub("me/x")
    monkeypatch.setattr(on_line, "get_token", lambda: None)
    with pytest.raises(UserError, match="nobody is logged in"):
        hub.check_hub("me/x")
    monkeypatch.setattr(on_line.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        hub.check_hub("me/x")


def test_off_line_nothing_is_trained(tmp_path):
    assert "HF_HUB_OFFLINE forbids" in run_toy(tmp_path, "--push_to_hub", "me/x", expect=2)
    assert not (tmp_path / "toy").exists()


def test_the_best_checkpoint_is_uploaded_private_when_the_run_is_done(tmp_path, on_line):
    text = run_toy(tmp_path, "--push_to_hub", "me/x", "--epochs", 1, hook=check_uploads)
    assert "uploaded to https://hub/me/x" in text
    assert "push_to_hub: ''" in (tmp_path / "toy/full/config.yaml").read_text()  # who repeats the run may not want that


def check_uploads():
    """In the fork, where they are made."""
    whole = Hub.upload_folder

    def upload_folder(self, **options):
        assert self.calls == [("me/x", {"private": True, "exist_ok": True})]
        said = whole(self, **options)
        assert {"model.safetensors", "manifest.json"} <= set(self.calls[-1][1])
        return said

    Hub.upload_folder = upload_folder


def test_an_upload_that_fails_costs_nothing(tmp_path, on_line):
    Hub.fault = ConnectionError("the line is dead")
    text = run_toy(tmp_path, "--push_to_hub", "me/x", "--epochs", 1)
    record = summary(tmp_path)
    assert record["status"] == "finished" and "ConnectionError: the line is dead" in record["notes"][0]
    assert "hf upload me/x" in text


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # and rarely breaks
def test_a_compiled_model_keeps_its_names_learns_the_same_and_is_judged_uncompiled(tmp_path):
    """By the compiler's front end alone: what is behind it takes a minute."""

    def front_end():
        whole, seen = torch.compile, []

        def backend(graph, _):
            return lambda *args: (seen.append(torch.is_grad_enabled()), graph(*args))[1]

        def compile_model(module):
            module._compiled_call_impl = whole(module._call_impl, backend=backend)

        torch.compile, torch.nn.Module.compile = lambda function: function, compile_model
        judged = toy_train.evaluate

        def evaluate(*args):
            before = len(seen)
            metrics = judged(*args)
            assert len(seen) == before, "an evaluation went by the compiled model"
            assert bool(seen) == (args[2] > 0), "no training did"
            return metrics

        toy_train.evaluate = evaluate

    flags = ("--epochs", 2, "--max_steps_per_epoch", 3)
    run_toy(tmp_path / "compiled", "--compile", *flags, hook=front_end)
    run_toy(tmp_path / "plain", *flags)
    found, expected = (load_file(tmp_path / name / "toy/full/final.safetensors") for name in ("compiled", "plain"))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_without_a_compiler_or_with_a_reason_against_it_one_line_says_so(monkeypatch):
    def no_compiler(_):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"^--compile: .*\(No working C\+\+ compiler found\)$"):
        runtime.compile_for_training(model, CPU)
    model.no_compile = "it changes its shape"
    with pytest.raises(UserError, match="^--compile is not for this task: it changes its shape$"):
        runtime.compile_for_training(model, CPU)


def test_ranges():
    assert TrainConfig().ema_decay == 0 and not TrainConfig().compile
    with pytest.raises(UserError, match="--ema_decay is 1"):
        TrainConfig(ema_decay=1.0)
