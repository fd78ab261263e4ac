"""Two models, two optimizers, two backward passes a batch: all that holds for one model holds for them."""

import json
import math
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy_gan
from conftest import metrics_of, run_toy, start_toy
from safetensors.torch import load_file
from test_processes import start_two, wait

from common.batches import EpochBatches, seed_everything
from common.checkpoint import load_state
from common.optim import build_optimizer
from common.run import Run
from common.step import Step, check_own_loss

GAN = {"script": "toy_gan"}


def run_dir(folder: Path) -> Path:
    return folder / "gan" / "full"


def bits(run: Path):
    return (run / "fingerprint.txt").read_text(), metrics_of(run), (run / "checkpoints/best/model.safetensors").read_bytes()


# ---- what is learnt ----------------------------------------------------------------------------------------------------


def by_hand(config) -> list[list[torch.Tensor]]:
    """The gradients that each optimizer steps on, in order, of a loop that was written with torch alone."""
    seed_everything(config.seed, "build")
    gen, disc = toy_gan.build_models(config)
    data, k = toy_gan.Ring(config), config.gradient_accumulation_steps
    sampler = EpochBatches(len(data), config.batch_size, config.seed)
    opt_g, sched_g = build_optimizer(gen, config, config.epochs * -(-len(sampler) // k))
    opt_d = torch.optim.AdamW(disc.parameters(), lr=config.lr_disc, betas=(0.8, 0.99))
    steps = []
    for epoch in range(1, config.epochs + 1):
        plan = sampler.plan(epoch)
        for first in range(0, len(plan), k):
            window = plan[first : first + k]
            sums = {model: [torch.zeros_like(p) for p in model.parameters()] for model in (gen, disc)}
            for number, indices in enumerate(window, first):
                batch = torch.utils.data.default_collate([data[epoch, index] for index in indices])
                seed_everything(config.seed, epoch, number, 0)
                fake = gen(batch["z"])
                for model, optimizer, limit in ((disc, opt_d, 0.5), (gen, opt_g, 1000.0)):
                    if model is disc:
                        loss = toy_gan.disc_loss(disc(batch["x"]), disc(fake.detach()))
                    else:
                        loss = sum(toy_gan.gen_losses(disc(fake), fake, batch["weight"]).values())
                    params = list(model.parameters())
                    for total, grad in zip(sums[model], torch.autograd.grad(loss, params), strict=True):
                        total += grad / len(window)
                    if number == first + len(window) - 1:
                        norm = torch.cat([total.flatten() for total in sums[model]]).norm()
                        for p, total in zip(params, sums[model], strict=True):
                            p.grad = total * min(1.0, limit / (float(norm) + 1e-6))
                        optimizer.step()
                        steps.append([p.grad.clone() for p in params])
            sched_g.step()
        for group in opt_d.param_groups:
            group["lr"] *= config.decay
    return steps


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_those_of_a_hand_written_loop(tmp_path, accumulate):
    """In double precision, where 48 steps do not drift apart by rounding."""

    def keep_gradients():
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        seen = []

        def hook(optimizer, *_):
            seen.append([p.grad.clone() for p in parameters_of(optimizer)])
            torch.save(seen, tmp_path / "seen.pt")

        register_optimizer_step_pre_hook(hook)
        torch.set_default_dtype(torch.float64)

    run_toy(tmp_path, "--gradient_accumulation_steps", accumulate, hook=keep_gradients, **GAN)
    seen = torch.load(tmp_path / "seen.pt")
    torch.set_default_dtype(torch.float64)
    try:
        expected = by_hand(toy_gan.Config(gradient_accumulation_steps=accumulate))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(seen) == len(expected) == 2 * 3 * math.ceil(16 / accumulate)
    for step, (got, right) in enumerate(zip(seen, expected, strict=True)):
        assert sorted(map(len, (got, right))) == [4, 4]
        by_shape = {tuple(grad.shape): grad for grad in right}
        for grad in got:
            assert grad.abs().max() > 1e-4 and (grad - by_shape[tuple(grad.shape)]).abs().max() <= 1e-7, step


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_frozen_gives_back_what_trained_and_lets_gradients_through():
    run = Run(toy_gan.Config(), "gan", "full")
    run.unwrap = lambda model: model
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(ZeroDivisionError), run.frozen(model) as critic:
        out = critic(x)
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == trained == [True, False, True, True]
    out.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


# ---- resuming, processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_toy(folder, "--gradient_accumulation_steps", "3", curves=True, **GAN)
    return run_dir(folder)


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path, undisturbed):
    dice, run, hits = random.Random(5), run_dir(tmp_path), 0
    flags = ["--gradient_accumulation_steps", "3", "--save_steps", "1", "--pause", "0.004", "--resume"]
    for _ in range(30):
        child = start_toy(tmp_path, *flags, **GAN)
        before = len(list(run.glob("checkpoints/last/step-*")))
        if hits < 8:
            newest = max((p.name for p in run.glob("checkpoints/last/step-*")), default="")
            while child.running() and max((p.name for p in run.glob("checkpoints/last/step-*")), default="") == newest:
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.05))
            child.kill(signal.SIGKILL)
        code = child.wait()
        hits += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL) and "damaged" not in child.text, (before, child.text)
        if code == 0 and hits >= 8:
            break
        if code == 0:
            shutil.rmtree(tmp_path / "gan")
    assert bits(run) == bits(undisturbed)
    assert len(json.loads((run / "summary.json").read_text())["resumed_at_steps"]) > 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_learn_what_one_does(tmp_path, accumulate):
    flags = ["--dropout", "0", "--gradient_accumulation_steps", accumulate]
    run_toy(tmp_path / "one", *flags, "--batch_size", "8", **GAN)
    wait(start_two(tmp_path / "two", *flags, "--batch_size", "4", **GAN))
    one, two = (run_dir(tmp_path / name) for name in ("one", "two"))
    first, second = (load_file(run / "final.safetensors") for run in (one, two))
    assert {name.split(".")[0] for name in first} == {"gen", "disc", "average"}
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5, rtol=0), name
    lines = [[list(line.items()) for line in metrics_of(run)] for run in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert [key for key, _ in a] == [key for key, _ in b]
        assert [value for _, value in a] == pytest.approx([value for _, value in b], abs=1e-4)


# ---- the record ----------------------------------------------------------------------------------------------------------


def test_losses_rates_and_norms_are_recorded_by_name(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = metrics_of(undisturbed)
    steps = [line for line in lines if "epoch" not in line]
    names = {"step", "loss_disc", "loss_gen", "loss_gen_adversarial", "loss_gen_radius"}
    names |= {"lr_disc", "lr_gen", "grad_norm_disc", "grad_norm_gen"}
    for line in steps:
        assert set(line) == names
        assert line["loss_gen"] == pytest.approx(line["loss_gen_adversarial"] + line["loss_gen_radius"], rel=1e-6)
    assert [line["lr_disc"] for line in steps][:10:9] == [2e-3, 1e-3]  # of steps 1 and 10: the second is in epoch 2
    assert [line["lr_gen"] for line in steps][0] == pytest.approx(2.5e-3)
    assert {"train_loss_disc", "train_loss_gen"} <= set(lines[-1]) and "train_loss" not in lines[-1]
    assert lines[-1]["train_loss_disc"] != lines[-1]["train_loss_gen"]
    events = EventAccumulator(str(undisturbed / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "losses/loss_gen_radius",
        "losses/train_loss_disc",
        "charts/lr_gen",
        "charts/grad_norm_disc",
        "metrics/off_ring",
    } <= tags
    assert (undisturbed / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_waits_for_the_device_once(tmp_path, accumulate):
    """Counted where a number leaves a tensor: that is where a GPU is waited for. (torch's AveragedModel reads its counter.)"""

    def count_reads():
        from common import run

        reads, opened = [], []
        enter = run.Run.__enter__
        run.Run.__enter__ = lambda self: opened.append(self) or enter(self)

        def counting(name, original):
            def method(*args, **kwargs):
                if opened and opened[0].under_way is not None:
                    reads.append((opened[0].step, name))
                    (tmp_path / "reads.json").write_text(json.dumps(reads))
                return original(*args, **kwargs)

            return method

        names = ["item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__"]
        for name in names:
            setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))

    run_toy(tmp_path, "--gradient_accumulation_steps", accumulate, "--no_average", hook=count_reads, **GAN)
    reads = json.loads((tmp_path / "reads.json").read_text())
    assert reads == [[step, "tolist"] for step in range(3 * math.ceil(16 / accumulate))]


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device, which alone says who waits for it")
def test_nothing_in_a_step_waits_for_a_cuda_device_but_the_one_read(tmp_path):
    """torch raises where the host waits, from a step's first batch on; the read at its end may, and is counted."""

    def forbid_waiting():
        create, read, reads = Step.__init__, Step.read, []

        def watched(self, *args):
            torch.cuda.set_sync_debug_mode("error")
            create(self, *args)

        def allowed(self, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")
            reads.append(len(reads))
            (tmp_path / "reads.json").write_text(json.dumps(reads))
            read(self, *args, **kwargs)

        Step.__init__, Step.read = watched, allowed

    # The first steps look for what a loop forgot, on the host alone; so all 48 are held to it.
    run_toy(tmp_path, "--device", "cuda", "--no_average", hook=forbid_waiting, **GAN)
    assert len(json.loads((tmp_path / "reads.json").read_text())) == 48


# ---- faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("forget_disc", "without run.step_optimizer(...) for optimizer 2 of 2 (over Discriminator)"),
        ("forget_gen", "without run.step_optimizer(...) for optimizer 1 of 2 (over Generator)"),
        ("unfrozen", "4 trainable tensors hold a gradient after all optimizers stepped: Discriminator.0.weight"),
        (
            "unfrozen_gen_first",
            "optimizer 2 of 2 (over Discriminator) steps after the loss disc, but holds gradients of the loss gen",
        ),
        ("one_name", "2 optimizers stepped on losses of one name (gen)"),
        (
            "late_step",
            "2 optimizers stepped on losses of one name (gen): give each its own, run.backward(loss, name=...), and let",
        ),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loop_that_would_train_wrong_stops_at_its_first_step(tmp_path, fault, words, accumulate):
    said = run_toy(tmp_path, "--fault", fault, "--gradient_accumulation_steps", accumulate, expect=99, **GAN)
    assert f"RuntimeError: {words}" in said.replace("the step ended ", "")
    record = json.loads((run_dir(tmp_path) / "summary.json").read_text())
    assert record["status"] == "failed" and record["steps"] == 0


def test_a_loop_that_is_left_within_an_epoch_is_an_error(tmp_path):
    """The gradient of a window that was not finished would be added to that of the next epoch's first."""
    said = run_toy(tmp_path, "--fault", "leave", "--gradient_accumulation_steps", "3", expect=99, **GAN)
    assert "RuntimeError: the loop left run.batches before its end" in said
    assert json.loads((run_dir(tmp_path) / "summary.json").read_text())["status"] == "failed"


def turns_of(*events):
    """A step of three models, each with an optimizer: "gen:GD" is a loss gen that leaves gradients in G and D; "G": it steps."""
    models = {name: torch.nn.Linear(1, 1) for name in "DGT"}
    optimizers = [torch.optim.SGD(model.parameters()) for model in models.values()]
    step = Step(1, torch.device("cpu"))
    step.files.append(["a"])
    for event in events:
        name, is_loss, reached = event.partition(":")
        if is_loss:
            step.add_loss(name, 1.0, {})
            for model in reached:
                models[model].weight.grad = torch.ones(1, 1)
            step.note_first_taught(optimizers)
        else:
            check_own_loss(step, "DGT".index(name), optimizers, list(models.values()))
            step.turn_is_over = True
            models[name].zero_grad()


@pytest.mark.parametrize(
    "events",
    [
        ["disc:D", "D", "gen:G", "G"],
        ["gen:G", "G", "disc:D", "D"],
        ["gen:GT", "G", "T", "disc:D", "D"],  # two optimizers on one loss
        ["rough:G", "fine:G", "G", "disc:D", "D"],  # two losses for one optimizer
        ["rough:GT", "fine:DT", "G", "D", "T"],  # a trunk that both losses teach
    ],
)
def test_what_is_taught_by_design_steps(events):
    turns_of(*events)


@pytest.mark.parametrize(
    ("events", "first"),
    [
        (["gen:GD", "G", "disc:D", "D"], "gen"),  # not frozen
        (["disc:DG", "D", "gen:G", "G"], "disc"),  # not detached
        (["rough:GT", "G", "fine:DT", "D", "T"], "rough"),  # a trunk whose gradients are of models of two moments
    ],
)
def test_an_optimizer_does_not_step_on_what_an_earlier_turn_left(events, first):
    with pytest.raises(RuntimeError, match=f"but holds gradients of the loss {first}"):
        turns_of(*events)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_generator_may_go_first(tmp_path, accumulate):
    run_toy(tmp_path, "--gen_first", "--gradient_accumulation_steps", accumulate, **GAN)
    assert json.loads((run_dir(tmp_path) / "summary.json").read_text())["status"] == "finished"


def test_two_optimizers_on_one_loss_are_recorded_each_by_its_name(tmp_path, undisturbed):
    run_toy(tmp_path, "--two_for_gen", "--gradient_accumulation_steps", "3", **GAN)
    whole, parted = (next(line for line in metrics_of(run) if "epoch" not in line) for run in (undisturbed, run_dir(tmp_path)))
    assert set(parted) == set(whole) | {"lr_gen_matrices", "grad_norm_gen_matrices"}
    assert parted["lr_gen_matrices"] == 5e-3 and parted["lr_gen"] == whole["lr_gen"] < 5e-3  # the first has no schedule
    norms = parted["grad_norm_gen"], parted["grad_norm_gen_matrices"]
    assert min(norms) > 0 and math.hypot(*norms) == pytest.approx(whole["grad_norm_gen"], rel=1e-5)


def test_an_optimizer_that_was_not_prepared_and_a_step_without_a_loss_are_refused():
    run, model = Run(toy_gan.Config(), "gan", "full"), torch.nn.Linear(2, 1)
    known, other = torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters())
    run.optimizers, run.under_way = [SimpleNamespace(optimizer=known)], Step(1, torch.device("cpu"))
    run.under_way.files.append(["a"])
    with pytest.raises(RuntimeError, match="got an optimizer that run.prepare did not"):
        run.step_optimizer(other)
    with pytest.raises(RuntimeError, match="before run.backward"):
        run.step_optimizer(known)


@pytest.mark.parametrize("fault", ["nan_disc", "nan_gen"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_in_either_loss_moves_no_weight_after_it(tmp_path, fault, accumulate):
    """Only the discriminator that had stepped on the same batch, before the generator's loss was known, has moved."""

    def keep_weights():
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        weights = []

        def hook(optimizer, *_):
            weights.append([p.detach().clone() for p in parameters_of(optimizer)])
            torch.save(weights[-4:], tmp_path / "weights.pt")  # before and after, of both optimizers

        register_optimizer_step_pre_hook(hook)
        register_optimizer_step_post_hook(hook)

    flags = ["--fault", fault, "--gradient_accumulation_steps", accumulate]
    said = run_toy(tmp_path, *flags, hook=keep_weights, expect=2, **GAN)
    name, step = fault.removeprefix("nan_"), re.search(r"at step (\d+), epoch 2", said)[1]
    files = re.search(rf"error: the loss {name} is nan at step {step}, epoch 2; the batch held (.*?);", said)[1].split(", ")
    assert "ring/007.txt" in files and len(files) == 4
    disc_before, disc_after, gen_before, gen_after = torch.load(tmp_path / "weights.pt")
    disc_moved = not all(map(torch.equal, disc_before, disc_after))
    assert all(map(torch.equal, gen_before, gen_after))
    assert all(bool(tensor.isfinite().all()) for tensor in disc_after + gen_after)
    assert disc_moved == ("disc had stepped before it, nothing else moved" in said)
    assert disc_moved or "nothing was changed by it" in said
    assert disc_moved == (fault == "nan_gen" and accumulate == 1)  # with 2, the NaN is in the first batch of its window here

    run = run_dir(tmp_path)
    state, progress = load_state(run / "checkpoints" / "last")
    assert progress["step"] == 16 // accumulate and progress["epoch"] == 2
    assert all(bool(t.isfinite().all()) for model in state["models"] for t in model.values())
    again = run_toy(tmp_path, *flags, "--resume", expect=2, **GAN)
    assert f"the loss {name} is nan at step {step}, epoch 2" in again


def test_nan_on_one_rank_ends_both(tmp_path):
    texts = wait(start_two(tmp_path, "--fault", "nan_gen", **GAN), expect=2)
    for text in texts:
        assert "the loss gen is nan" in text and "ring/007.txt" in text and "Traceback" not in text
