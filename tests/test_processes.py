"""Two processes do what one does at the same global batch; faults and signals end both of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Child, run_toy, start_toy
from safetensors.torch import load_file

# What differs by process (dropout, the statistics of a batch) is off; augmentation, which does not, is on.
SAME = ["--dropout", "0", "--no_batch_norm"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_two(folder: Path, *flags, rank_flags=([], []), **options) -> list[Child]:
    """Both ranks, forked, with the environment that torchrun gives its workers."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [start_toy(folder, *flags, *more, env=env, **options) for more, env in zip(rank_flags, envs, strict=True)]


def wait(ranks: list[Child], expect: int = 0) -> list[str]:
    codes = [rank.wait() for rank in ranks]
    texts = [rank.text for rank in ranks]
    assert codes == [expect] * 2, "\n".join(texts)
    return texts


def summary(folder: Path) -> dict:
    return json.loads((folder / "toy" / "full" / "summary.json").read_text())


def weights(folder: Path) -> dict:
    return load_file(folder / "toy" / "full" / "final.safetensors")


def check_same(one: Path, two: Path):
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5, rtol=0), name
    records = [summary(one), summary(two)]
    assert [r["environment"]["processes"] for r in records] == [1, 2]
    assert records[0]["steps"] == records[1]["steps"]
    for which in ("before", "best", "final"):
        values = [r["metrics"][which]["val_loss"] for r in records]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    logs = [(folder / "toy" / "full" / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    losses = [[json.loads(line).get(key) for line in log for key in ("loss", "train_loss")] for log in logs]
    assert len(losses[0]) == len(losses[1])
    assert [x for x in losses[0] if x] == pytest.approx([x for x in losses[1] if x], abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_learn_what_one_does(tmp_path, accumulate):
    flags = [*SAME, "--gradient_accumulation_steps", accumulate, "--samples", "67"]
    run_toy(tmp_path / "one", *flags, "--batch_size", "8")
    wait(start_two(tmp_path / "two", *flags, "--batch_size", "4"))
    check_same(tmp_path / "one", tmp_path / "two")
    moved = weights(tmp_path / "one")["second.weight"]
    run_toy(tmp_path / "half", *flags, "--batch_size", "4")  # one process of two is not enough for that
    assert not torch.allclose(moved, weights(tmp_path / "half")["second.weight"], atol=1e-3)


def test_a_part_that_one_process_has_no_use_for(tmp_path):
    """Asked to, processes agree on who has a gradient, and learn the same; else the one that lacks it says so and none hangs."""
    flags = [*SAME, "--fault", "passed_by", "--epochs", "1", "--no_augment"]
    wait(start_two(tmp_path / "agreed", *flags, "--find_unused"))
    trained = weights(tmp_path / "agreed")
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
    began = time.monotonic()
    ranks = start_two(tmp_path / "not", *flags)
    codes, text = [rank.wait() for rank in ranks], "".join(rank.text for rank in ranks)
    assert 2 in codes and 0 not in codes and time.monotonic() - began < 60
    assert "error: 2 trainable tensors got no gradient in this batch: unused.weight, unused.bias" in text
    assert "find_unused=True" in text


def test_nan_on_one_rank_ends_both(tmp_path):
    began = time.monotonic()
    texts = wait(start_two(tmp_path, *SAME, "--fault", "nan_loss"), expect=2)
    assert time.monotonic() - began < 60
    for text in texts:
        assert "the loss is nan" in text and "train/007.txt" in text and "Traceback" not in text
    record = summary(tmp_path)
    assert record["status"] == "failed" and 8 <= record["steps"] < 16 and record["environment"]["processes"] == 2


def test_a_refusal_of_the_main_process_ends_both(tmp_path):
    folder = tmp_path / "toy" / "full"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    texts = wait(start_two(tmp_path), expect=2)
    assert all("holds files, but no run" in text for text in texts)


def test_another_number_of_processes_is_refused(tmp_path):
    run_toy(tmp_path, *SAME, "--epochs", "1")
    texts = wait(start_two(tmp_path, *SAME, "--epochs", "1", "--resume"), expect=2)
    assert all("1 processes and has 2 now" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("to", [(0, 1), (1,)])
def test_sigterm_to_the_ranks_saves_and_resumes(tmp_path, to):
    """Both ranks get it, or only the one that does not save; both leave at the same step."""
    flags = ["--pause", "0.02", "--num_workers", "1"]
    wait(start_two(tmp_path / "whole", *flags))
    folder = tmp_path / "stopped"
    ranks = start_two(folder, *flags)
    ranks[0].wait_for(lambda: "epoch 1/3" in ranks[0].text)
    for rank in to:
        ranks[rank].kill(signal.SIGTERM)
    texts = wait(ranks, expect=128 + signal.SIGTERM)
    stopped = summary(folder)
    assert stopped["status"] == "interrupted" and 8 <= stopped["steps"] < 24
    assert f"stopped at step {stopped['steps']};" in texts[0] and "stopped at" not in texts[1]
    texts = wait(start_two(folder, *flags, "--resume"))
    assert f"resumed at step {stopped['steps']}," in texts[0]
    prints = [(f / "toy" / "full" / "fingerprint.txt").read_text() for f in (folder, tmp_path / "whole")]
    assert prints[0] == prints[1]


def torchrun(folder: Path, *flags) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "tests" / "toy_train.py", "--output_dir", folder, *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )


@pytest.mark.slow
def test_torchrun(tmp_path):
    """Started as the README says, told to stop by a signal to torchrun alone, gone on: the weights of one process."""
    flags = [*SAME, "--num_workers", "1", "--pause", "0.1"]
    process = torchrun(tmp_path / "two", *flags, "--batch_size", "4")
    said = ""
    while "at work" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=120)[0]
    stopped = summary(tmp_path / "two")
    assert process.returncode != 0 and stopped["status"] == "interrupted", said
    assert 0 < stopped["steps"] < 24 and stopped["environment"]["processes"] == 2

    process = torchrun(tmp_path / "two", *flags, "--batch_size", "4", "--resume")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and f"resumed at step {stopped['steps']}," in said, said
    run_toy(tmp_path / "one", *flags, "--batch_size", "8")
    check_same(tmp_path / "one", tmp_path / "two")
