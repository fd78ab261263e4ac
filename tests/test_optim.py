"""What is subtly wrong in many training loops: clipping, accumulation, schedule, weight decay, non-finite gradients."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import import_all, in_child
from safetensors.torch import load_file
from torch import nn

from common.config import TrainConfig, UserError
from common.optim import build_optimizer, clip_gradients, schedule, take_step, warmup_of
from common.step import Step


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def config(**changes):
    return TrainConfig(**{"lr": 0.1, "warmup_steps": 0, "weight_decay": 0.0, **changes})


def clip_and_step(accelerator, optimizer, scheduler, limit: float) -> float:
    """As Run.step_optimizer does it; the norm before clipping."""
    step = Step(1, torch.device("cpu"))
    step.add_norm("loss", clip_gradients(accelerator, optimizer, limit))
    take_step(optimizer, scheduler, step.not_finite())
    step.read(0, with_parts=False)
    return step.means("gradient")["loss"][0]


def one_step(accelerator, model, optimizer, scheduler, scale: float, limit: float):
    """One step on a loss times `scale`: (norm that is reported, norm of the gradients that were stepped on)."""
    seen = []
    handle = optimizer.optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(math.sqrt(sum(float(p.grad.square().sum()) for g in o.param_groups for p in g["params"])))
    )
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    (scale * (model(x) - 3).square().mean()).backward()
    norm = clip_and_step(accelerator, optimizer, scheduler, limit)
    handle.remove()
    return norm, seen[0]


def test_clips_at_every_step(accelerator):
    model = net()
    optimizer, scheduler = build_optimizer(model, config(), 20)
    optimizer = accelerator.prepare_optimizer(optimizer)
    for _ in range(10):
        norm, stepped = one_step(accelerator, model, optimizer, scheduler, 1e4, limit=0.5)
        assert norm > 100
        assert stepped == pytest.approx(0.5, rel=1e-3)


def test_short_gradients_are_left_alone_and_zero_switches_clipping_off(accelerator):
    for scale, limit in ((1e-3, 0.5), (1e4, 0.0)):
        model = net()
        optimizer, scheduler = build_optimizer(model, config(), 20)
        norm, stepped = one_step(accelerator, model, accelerator.prepare_optimizer(optimizer), scheduler, scale, limit)
        assert stepped == pytest.approx(norm, rel=1e-6)


def test_clips_what_is_stepped_and_nothing_else(accelerator):
    """Two optimizers share no norm: the huge gradients of one do not shrink the other's."""
    small, large = net(), net()
    optimizer, scheduler = build_optimizer(small, config(), 20)
    x = torch.ones(2, 4)
    (1e-4 * small(x).sum() + 1e6 * large(x).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in small.parameters()]).norm()
    untouched = [p.grad.clone() for p in large.parameters()]
    norm = clip_and_step(accelerator, accelerator.prepare_optimizer(optimizer), scheduler, 1.0)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.equal(p.grad, before) for p, before in zip(large.parameters(), untouched, strict=True))


def test_gradients_are_zeroed(accelerator):
    model = net()
    optimizer, scheduler = build_optimizer(model, config(), 20)
    one_step(accelerator, model, accelerator.prepare_optimizer(optimizer), scheduler, 1.0, 1.0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [1.0, 0.0])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
def test_non_finite_gradient_moves_nothing(accelerator, value, limit, kind, fused):
    """Fused optimizers are told on the device, others are not called."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    prepared = accelerator.prepare_optimizer(optimizer)
    for start in (0, 1):  # with a fresh optimizer, and with one that has a state
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model(torch.ones(2, 4)).sum().backward()
        model[0].weight.grad[0, 0] = value
        assert not math.isfinite(clip_and_step(accelerator, prepared, None, limit))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert all(state.get("step", 0) == start for state in optimizer.state.values())
        model(torch.ones(2, 4)).sum().backward()
        clip_and_step(accelerator, prepared, None, limit)
        assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name != "1.weight")


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradient_is(accelerator, fused):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    step = Step(1, torch.device("cpu"))
    step.files.append(["a.png", "b.png"])
    loss = model(torch.ones(2, 4)).sum() + math.inf
    step.add_loss("loss", loss, {})
    loss.backward()
    step.add_norm("loss", clip_gradients(accelerator, accelerator.prepare_optimizer(optimizer), 1.0))
    take_step(optimizer, None, step.not_finite())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    step.read(0, with_parts=False)
    said = step.fault("at step 3, epoch 1")
    assert said.startswith("the loss is inf at step 3, epoch 1; the batch held a.png, b.png; nothing was changed by it")


def test_fault_names_the_first_of_several_numbers_and_what_had_moved():
    step = Step(2, torch.device("cpu"))
    for files, loss in (["a"], 1.0), (["b"], 2.0):
        step.files.append(files)
        step.add_loss("gen", torch.tensor(loss), {})
    step.add_norm("gen", torch.tensor(1.0))
    step.add_norm("disc", torch.tensor(math.nan))
    step.add_loss("late", torch.tensor(math.nan), {})
    assert float(step.not_finite()) == 1.0
    step.read(15, with_parts=False)
    assert step.signum == 15 and step.means("loss")["gen"] == [1.0, 2.0]
    said = step.fault("here")
    assert said.startswith("the gradient of disc is nan here; a lower --lr") and "held a, b; gen had stepped" in said
    assert step.fault("here", norms_count=False).startswith(
        "the loss late is nan here; the batch held b; gen and disc had stepped"
    )


def test_fp16_scaler_skips_an_infinite_gradient_and_goes_on():
    """With the scaler that accelerate would use, on a CPU: of two optimizers one skips its step; the scale halves once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator = SimpleNamespace(scaler=scaler, unscale_gradients=scaler.unscale_)
    models = [net(), net()]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models]
    for model, optimizer, factor in zip(models, optimizers, (1.0, math.inf), strict=True):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scaler.scale(factor * model(torch.ones(2, 4)).sum()).backward()
        step = Step(1, torch.device("cpu"))
        step.add_norm("loss", clip_gradients(accelerator, optimizer, 1.0))
        take_step(optimizer, None, step.not_finite())
        same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert same == (factor == math.inf)
        step.read(0, with_parts=False)
        assert step.fault("here", norms_count=False) is None
    scaler.update()
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("fused", [True, False])
def test_fp16_moves_nothing_after_a_loss_that_is_not_finite(fused):
    """Neither the model of that loss, whose own gradients are finite here, nor the one that steps after it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator = SimpleNamespace(scaler=scaler, unscale_gradients=scaler.unscale_)
    step, models = Step(1, torch.device("cpu")), [net(), net()]
    step.files.append(["a"])
    for name, model, more in zip(("disc", "gen"), models, (math.inf, 0.0), strict=True):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        loss = model(torch.ones(2, 4)).sum() + more
        step.add_loss(name, loss, {})
        scaler.scale(loss).backward()
        step.add_norm(name, clip_gradients(accelerator, optimizer, 1.0))
        take_step(optimizer, None, step.not_finite(norms_count=False))
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), name
    step.read(0, with_parts=False)
    assert step.fault("here", norms_count=False).startswith("the loss disc is inf here; the batch held a; nothing was changed")


@pytest.mark.parametrize("bad", ["disc", "gen"])
def test_fp16_an_overflow_of_one_optimizer_is_no_others(bad):
    """In one step: the optimizer whose gradient overflowed skips, the other one steps, and the scale halves once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator = SimpleNamespace(scaler=scaler, unscale_gradients=scaler.unscale_)
    step, models = Step(1, torch.device("cpu")), [net(), net()]
    step.files.append(["a"])
    for name, model in zip(("disc", "gen"), models, strict=True):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        loss = model(torch.ones(2, 4)).sum()
        step.add_loss(name, loss, {})
        scaler.scale(loss).backward()
        if name == bad:
            model[0].weight.grad[0, 0] = math.inf
        step.add_norm(name, clip_gradients(accelerator, optimizer, 1.0))
        take_step(optimizer, None, step.not_finite(norms_count=False))
        same = all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert same == (name == bad), name
    scaler.update()
    assert scaler.get_scale() == 2.0


def test_weight_decay_pulls_matrices_only(accelerator):
    """With gradients of zero all that moves is what decays."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, scheduler = build_optimizer(model, config(weight_decay=0.5), 20)
    (0 * model(torch.randn(2, 1, 4, 4)).sum()).backward()
    clip_and_step(accelerator, accelerator.prepare_optimizer(optimizer), scheduler, 1.0)
    ratio = {name: float((p.detach() / before[name]).mean()) for name, p in model.named_parameters() if before[name].any()}
    assert {name for name, r in ratio.items() if r != 1} == {"0.weight", "3.weight"}
    assert ratio["3.weight"] == pytest.approx(1 - 0.1 * 0.5, rel=1e-4)


def test_only_what_trains_is_stepped_and_groups_keep_their_rate():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    groups = [{"params": list(model[:2].parameters()), "lr": 1e-5}, {"params": list(model[2].parameters()), "lr": 0.1}]
    optimizer, _ = build_optimizer(model, config(weight_decay=0.3), 20, groups)
    rates = {id(p): (group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        id(model[1].weight): (1e-5, 0.0),
        id(model[1].bias): (1e-5, 0.0),
        id(model[2].weight): (0.1, 0.3),
        id(model[2].bias): (0.1, 0.0),
    }
    with pytest.raises(UserError, match="nothing in the model trains"):
        build_optimizer(model.requires_grad_(False), config(), 20)


def test_new_layers_learn_at_no_less_than_the_rate_of_heads():
    """In one group or among others, with or without an adapter around the model; where lr is more, all is as without them."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2), "header": nn.Linear(4, 2)})
    wrapped = nn.Sequential(model)  # the names begin with something else, as PEFT's do
    rest = [*model["body"].parameters(), *model["header"].parameters()]
    apart = [{"params": rest, "lr": 1e-4}, {"params": list(model["head"].parameters()), "lr": 1e-5}]
    for given, groups in ((model, None), (wrapped, None), (model, apart)):
        optimizer, scheduler = build_optimizer(given, config(lr=1e-4, lr_head=1e-2), 20, groups, new=["head"])
        rate = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rate == {id(p): 1e-4 for p in rest} | {id(p): 1e-2 for p in model["head"].parameters()}
        for _ in range(10):
            optimizer.step()
            scheduler.step()
        assert all(group["lr"] == pytest.approx(group["initial_lr"] / 2) for group in optimizer.param_groups)
    same = [
        build_optimizer(model, config(lr=0.1, **changes), 20, new=new)[0].state_dict()["param_groups"]
        for changes, new in (({"lr_head": 1e-2}, ["head"]), ({"lr_head": 0.0}, ["head"]), ({"lr_head": 1.0}, []))
    ]
    assert same[0] == same[1] == same[2] and len(same[0]) == 2


def test_the_run_says_its_steps_and_what_makes_more_of_few(capsys):
    build_optimizer(net(), config(warmup_steps=0.1, lr_head=1.0), 60, new=["2"])
    assert capsys.readouterr().out == (
        "60 optimizer steps, 6 of them warm-up, learning rates 0.1 to 1 by part of the model; so few teach little: more "
        "--epochs or a smaller --batch_size make more\n"
    )
    for steps, changes in ((400, {}), (40, {"max_steps_per_epoch": 4})):  # a smoke run is short on purpose
        build_optimizer(net(), config(warmup_steps=20, **changes), steps)
        assert capsys.readouterr().out == f"{steps} optimizer steps, 20 of them warm-up, learning rate 0.1\n"


@pytest.mark.parametrize(("share", "total", "steps"), [(0.1, 1000, 100), (0.1, 56, 6), (0.25, 8, 2), (0.9, 10, 5), (0.1, 3, 0)])
def test_a_warmup_below_one_is_a_share_of_the_steps(share, total, steps):
    assert [schedule(i, share, total) for i in range(total)] == [schedule(i, steps, total) for i in range(total)]
    assert warmup_of(share, total) == steps


@pytest.mark.parametrize(("warmup", "total"), [(50, 1000), (0, 100), (10, 11), (50, 20), (1, 2), (50, 3)])
def test_schedule_rises_peaks_and_falls_to_nothing(warmup, total):
    factors = [schedule(step, warmup, total) for step in range(total)]
    top = factors.index(max(factors))
    assert factors[0] > 0 and max(factors) == 1.0
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert top <= max(total // 2, 0) and top <= warmup
    assert all(schedule(step, warmup, total) == pytest.approx(0, abs=1e-9) for step in range(total, total + 20))
    if total >= 100:
        assert factors[-1] < 1e-2
    if warmup > 1 and total >= 100:
        rises = [b - a for a, b in zip(factors, factors[1:warmup], strict=False)]
        assert rises == pytest.approx([1 / warmup] * (warmup - 1))


def test_schedule_reaches_the_optimizer(accelerator):
    model = net()
    optimizer, scheduler = build_optimizer(model, config(warmup_steps=5), 40)
    prepared, rates = accelerator.prepare_optimizer(optimizer), []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        one_step(accelerator, model, prepared, scheduler, 1.0, 1.0)
    assert rates == pytest.approx([0.1 * schedule(step, 5, 40) for step in range(40)])
    assert rates[0] == pytest.approx(0.02) and optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


# ---- accumulation, through Run -------------------------------------------------------------------------------------


@dataclass
class RunConfig(TrainConfig):
    samples: int = 44  # how many


class Rows:
    """Sample i is fixed; a batch's loss is the mean over its samples."""

    def __init__(self, samples: int):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(samples, 4, generator=generator), torch.randn(samples, 1, generator=generator)

    def __len__(self):
        return len(self.x)

    def name(self, index):
        return str(index)

    def __getitem__(self, key):
        return self.x[key[1]], self.y[key[1]]


def train(folder, path, batch_size: int, accumulate: int, order=None):
    """Two epochs of plain training through Run; writes the weights and the learning rates of all steps."""
    from safetensors.torch import save_file

    from common.batches import EpochBatches, build_loader
    from common.run import Run

    settings = RunConfig(
        output_dir=str(folder),
        epochs=2,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        lr=0.05,
        warmup_steps=2,
        device="cpu",
    )
    with Run(settings, task="toy", method="full") as run:
        data = Rows(settings.samples)
        sampler = EpochBatches(len(data), batch_size, seed=0)
        loader = build_loader(data, sampler, torch.utils.data.default_collate)
        if order is not None:  # large batches of unlike sizes, which EpochBatches would not cut
            sampler.plan = order
        model = net()
        optimizer, scheduler = build_optimizer(model, settings, 2 * (len(sampler) if order is None else len(order(1))))
        if order is None:
            assert run.total_steps(loader) == 2 * math.ceil(len(sampler) / accumulate)
            optimizer, scheduler = build_optimizer(model, settings, run.total_steps(loader))
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)
        rates = []
        for epoch in run.epochs(before=lambda: {"m": 0.0}):
            for batch in run.batches(loader, epoch):
                rates.append(optimizer.param_groups[0]["lr"])
                run.backward((model(batch[0]) - batch[1]).square().mean())
                run.step_optimizer(optimizer, scheduler)
            run.end_epoch({"m": float(epoch)}, best="m")
        save_file(dict(model.state_dict()), path)
        path.with_suffix(".json").write_text(json.dumps({"rates": rates, "steps": run.step}))


@pytest.mark.parametrize(
    ("small", "k"),
    [(4, 2), (4, 4), (4, 11)],  # 11 small batches an epoch: the last window has 1, 3 and all 11 of them
)
def test_accumulation_equals_one_large_batch(tmp_path, small, k):
    import_all()
    from common.batches import EpochBatches

    plan = EpochBatches(44, small, seed=0)

    def joined(epoch):
        parts = plan.plan(epoch)
        return [sum(parts[i : i + k], []) for i in range(0, len(parts), k)]

    few, many = tmp_path / "few.safetensors", tmp_path / "many.safetensors"
    for args in ((tmp_path / "a", many, small, k), (tmp_path / "b", few, small * k, 1, joined)):
        code, text = in_child(train, *args, log=tmp_path / "log.txt")
        assert code == 0, text
    steps = [json.loads(path.with_suffix(".json").read_text()) for path in (few, many)]
    assert steps[0]["steps"] == steps[1]["steps"] == 2 * math.ceil(11 / k)
    assert steps[1]["rates"][:1] == steps[0]["rates"][:1]
    one, other, start = load_file(few), load_file(many), net().state_dict()
    for name in one:
        assert not torch.allclose(one[name], start[name], atol=1e-3), "nothing was learnt, so nothing was compared"
        assert torch.allclose(one[name], other[name], atol=2e-6), name


def test_weight_decay_leaves_vectors_alone_in_whatever_shape():
    model = nn.Module()
    shapes = {"matrix": (4, 3), "row": (1, 3), "convolution": (2, 1, 3, 3), "bias": (4,), "column": (4, 1), "scale": ()}
    shapes["gain of weight_norm"] = (4, 1, 1)
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    optimizer, _ = build_optimizer(model, config(weight_decay=0.5), 20)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    pulled = {name for name, p in model.named_parameters() if decay[id(p)]}
    assert pulled == {"matrix", "convolution"} and len(decay) == len(shapes)


def test_rows_of_a_table_that_are_never_used_stay_bit_for_bit():
    """Weight decay would pull them to zero, although no gradient ever asks for it."""
    table = torch.nn.Embedding(5, 3)
    model, before = torch.nn.Sequential(table, torch.nn.Linear(3, 2)), table.weight.detach().clone()
    config = SimpleNamespace(lr=0.1, lr_head=0.0, weight_decay=0.5, warmup_steps=0, max_steps_per_epoch=1)
    optimizer, _ = build_optimizer(model, config, 10, no_decay=("0",), betas=(0.8, 0.99))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.99)}
    for _ in range(3):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    same = (table.weight == before).all(dim=1).tolist()
    assert same == [True, False, True, True, True]
