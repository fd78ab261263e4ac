"""Batches whose order and augmentation are functions of (seed, epoch, index), whatever the processes and workers."""

import itertools
import random
import signal
import time

import numpy as np
import pytest
import torch
from conftest import Child

from common import runtime
from common.batches import EpochBatches, EvalBatches, build_loader, number_from, seed_everything, seeded, to_device
from common.config import UserError
from common.folders import make_once, one_at_a_time
from common.runtime import Interrupted, StopSignals, quiet, say


def flat(batches):
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize(("length", "size"), [(64, 4), (65, 4), (67, 4), (8, 8), (5, 1), (3, 8)])
def test_every_sample_at_most_once_an_epoch(length, size):
    sampler = EpochBatches(length, size, seed=0)
    plan = sampler.plan(1)
    used = flat(plan)
    assert len(used) == len(set(used)) and set(used) <= set(range(length))
    assert len(plan) == len(sampler) == max(1, length // size)
    if length >= size:
        assert {len(batch) for batch in plan} == {size}
        assert length - len(used) < size
    else:  # too few for one batch: they are that batch
        assert sorted(used) == list(range(length))


def test_left_out_samples_differ_by_epoch():
    sampler = EpochBatches(9, 4, seed=0)
    left_out = {(set(range(9)) - set(flat(sampler.plan(epoch)))).pop() for epoch in range(1, 30)}
    assert len(left_out) > 5


def test_order_is_a_function_of_seed_and_epoch():
    plans = {(seed, epoch): EpochBatches(40, 4, seed).plan(epoch) for seed in (0, 1) for epoch in (1, 2, 3)}
    for one, other in itertools.combinations(plans, 2):
        assert plans[one] != plans[other]
    used = EpochBatches(40, 4, 0)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    used.plan(7), list(used)
    assert used.plan(2) == plans[0, 2]
    assert flat(plans[0, 1]) != sorted(flat(plans[0, 1]))


@pytest.mark.parametrize(("length", "size", "world"), [(64, 4, 2), (67, 4, 2), (50, 3, 4)])
def test_the_parts_of_processes_join_to_the_batches_of_one(length, size, world):
    whole = EpochBatches(length, size * world, seed=3).plan(5)
    parts = [EpochBatches(length, size, seed=3, rank=rank, world=world).plan(5) for rank in range(world)]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


def test_too_few_samples_are_refused():
    with pytest.raises(UserError):
        EpochBatches(0, 4, seed=0)
    with pytest.raises(UserError, match="7 training samples"):
        EpochBatches(7, 4, seed=0, world=2)


def test_set_range_goes_on_where_it_stopped():
    sampler = EpochBatches(40, 4, seed=0)
    whole = [[(2, index) for index in batch] for batch in sampler.plan(2)]
    sampler.set_range(2, 0, 3)
    first = list(sampler)
    sampler.set_range(2, 3, 10)
    assert first + list(sampler) == whole
    sampler.set_range(2, 10, 10)
    assert list(sampler) == []


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_evaluation_sees_every_sample_and_mixes_no_keys(world, size):
    keys = [(3, 4), (4, 3), (3, 4), (3, 4), (5, 5), (4, 3), (3, 4), (3, 4), (3, 4)]
    parts = [list(EvalBatches(keys, size, rank, world)) for rank in range(world)]
    batches = [batch for part in parts for batch in part]
    for batch in batches:
        assert len({keys[index] for _, index in batch}) == 1
        assert 1 <= len(batch) <= size
    seen = [index for batch in batches for _, index in batch]
    assert set(seen) == set(range(len(keys)))
    # Equally many batches for all, so that none waits for a sibling that is done; what that adds comes twice, no more.
    assert len({len(part) for part in parts}) == 1
    assert [len(EvalBatches(keys, size, rank, world)) for rank in range(world)] == [len(part) for part in parts]
    assert len(seen) - len(keys) <= (world - 1) * size
    if world == 1:
        assert len(seen) == len(keys)


def test_seeded_is_a_function_of_its_key_and_leaves_no_trace():
    torch.manual_seed(1)
    expected = [torch.rand(3) for _ in range(3)]
    torch.manual_seed(1)
    got, inside = [], []
    for key in (("a", 1), ("a", 2), ("a", 1)):
        got.append(torch.rand(3))
        with seeded(*key):
            inside.append(torch.rand(4))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(inside[0], inside[2]) and not torch.equal(inside[0], inside[1])
    with pytest.raises(ZeroDivisionError), seeded("a", 1):
        torch.rand(1000)
        raise ZeroDivisionError
    with_fault = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(with_fault, [torch.rand(3) for _ in range(4)][3])


def test_number_from_differs_by_each_part_of_its_key():
    keys = [(s, e, i) for s in range(20) for e in range(20) for i in range(20)]
    keys += [(1, 23), (12, 3), ("1", 23), (1, "23"), (1, 2, 3, 4), (), ("order",), (-1, 0, 0)]
    numbers = [number_from(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert all(0 <= number < 2**63 for number in numbers)
    assert number_from(0, 1, 2) == number_from(0, 1, 2)
    # The same in every process: Python's own hash() of text is not.
    assert number_from(0, 1, "order") == 5477332743485824662


def test_seed_everything_sets_all_generators():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(0, 1, 2, 0)
    first = draw()
    seed_everything(0, 1, 2, 1)
    other = draw()
    seed_everything(0, 1, 2, 0)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_seeding_gives_the_bits_of_torch_and_reaches_the_devices_that_there_are(monkeypatch):
    seed_everything(3, 1)
    ours = torch.rand(5)
    torch.manual_seed(number_from(3, 1))
    assert torch.equal(torch.rand(5), ours)
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeds.append(("cuda", seed)))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: seeds.append(("mps", seed)))
    seed_everything(3, 1)
    assert seeds == [("cuda", number_from(3, 1)), ("mps", number_from(3, 1))] and torch.equal(torch.rand(5), ours)


class Augmented:
    """What a worker sees of a sample: a random number by key, and one of the stream that workers must not use."""

    def __len__(self):
        return 23

    def name(self, index):
        return str(index)

    def __getitem__(self, key):
        with seeded(0, *key):
            return torch.tensor([*key, float(torch.rand(()))], dtype=torch.float64)


def test_samples_do_not_depend_on_workers_or_where_one_begins():
    def samples(workers, ranges):
        sampler = EpochBatches(23, 4, seed=1)
        loader, got = build_loader(Augmented(), sampler, torch.stack, workers), []
        for epoch, start, stop in ranges:
            sampler.set_range(epoch, start, stop)
            got += list(loader)
        return torch.cat(got)

    whole = samples(0, [(1, 0, 5), (2, 0, 5)])
    assert torch.equal(whole, samples(2, [(1, 0, 2), (1, 2, 5), (2, 0, 1), (2, 1, 5)]))
    values = whole[:, 2].tolist()
    assert len(set(values)) == len(values) == 40


def test_to_device_keeps_the_structure():
    batch = {"a": torch.ones(2), "b": [torch.ones(1), "name", (3, torch.zeros(1))]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0].device.type == moved["b"][2][1].device.type == "meta"
    assert moved["b"][1] == "name" and moved["b"][2][0] == 3 and isinstance(moved["b"][2], tuple)


def test_signals_wait_for_the_end_of_a_step():
    old = signal.getsignal(signal.SIGTERM)
    with StopSignals(wait_always=False) as signals:
        signals.busy = True
        signal.raise_signal(signal.SIGTERM)
        assert signals.pending == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is old
    with pytest.raises(Interrupted) as stop, StopSignals(wait_always=False):
        signal.raise_signal(signal.SIGINT)
    assert stop.value.signum == signal.SIGINT and not isinstance(stop.value, Exception)
    with StopSignals(wait_always=True) as signals:  # several processes: all leave at the same step, never at once
        signal.raise_signal(signal.SIGTERM)
        assert signals.pending == signal.SIGTERM


def test_of_two_processes_that_need_the_demo_data_one_makes_it(tmp_path):
    def make(folder):
        with open(tmp_path / "calls", "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        folder.mkdir()

    def ask():
        assert make_once(tmp_path / "data" / "demo", make).is_dir()

    both = [Child(ask, log=tmp_path / f"{i}.txt") for i in range(2)]
    assert [child.wait() for child in both] == [0, 0], [child.text for child in both]
    assert (tmp_path / "calls").read_text() == "made\n"


def test_who_waits_for_another_process_says_so(tmp_path):
    def hold():
        with one_at_a_time(tmp_path / "data"):
            (tmp_path / "held").touch()
            until(lambda: (tmp_path / "go").exists())

    def enter():
        with one_at_a_time(tmp_path / "data"):
            assert (tmp_path / "go").exists()

    def until(true):
        end = time.monotonic() + 60
        while not true() and time.monotonic() < end:
            time.sleep(0.01)

    first = Child(hold, log=tmp_path / "first.txt")
    until((tmp_path / "held").exists)
    second = Child(enter, log=tmp_path / "second.txt")
    until(lambda: "waiting for another process" in second.text)
    (tmp_path / "go").touch()
    assert (first.wait(), second.wait()) == (0, 0), second.text
    assert "waiting for another process" in second.text and "waiting" not in first.text


def test_progress_without_a_terminal_is_in_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "EVERY", 1e-9)
    assert list(runtime.progress_bar(range(3), "evaluating")) == [0, 1, 2]
    said = capsys.readouterr()
    assert [line.split(",")[0] for line in said.out.splitlines()] == [f"evaluating: {n} of 3" for n in (1, 2, 3)]
    assert said.err == "" and "\r" not in said.out
    monkeypatch.setattr(runtime, "EVERY", 30)
    assert list(runtime.progress_bar(range(3), "evaluating")) == [0, 1, 2] and capsys.readouterr().out == ""


def test_times_are_said_for_people():
    told = [runtime.in_time(seconds) for seconds in (0.4, 89, 90, 719, 3600, 11_100)]
    assert told == ["0 s", "89 s", "2 min", "12 min", "1 h 00 min", "3 h 05 min"]


def test_what_is_said_quietly_is_not_printed(capsys):
    with quiet():
        say("news")
    say("after")
    assert capsys.readouterr().out == "after\n"


def test_one_of_a_thing_is_not_many():
    told = [
        runtime.counted(count, what)
        for count, what in ((1, "box"), (2, "box"), (0, "clip"), (3, "mesh"), (2, "epoch"), (1, "such line"))
    ]
    assert told == ["1 box", "2 boxes", "0 clips", "3 meshes", "2 epochs", "1 such line"]
