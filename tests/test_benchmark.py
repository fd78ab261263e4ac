"""The benchmark: a small run from start to page, what its numbers say, and its refusals."""

import json
import sys

import pytest
from conftest import FOLDERS, ROOT, run_script, use_task

from common.config import UserError
from common.lora import is_within

sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402

from benchmark_tasks import TASKS, stack  # noqa: E402


def row(**seconds):
    facts = {"parameters": [100, 10], "bytes": [400, 50], "latency": {"unmerged": 0.002, "merged": 0.001}}
    return {"task": "pose", "size": "demo", "targets": "qv", "batch": 2, "seconds": seconds, **facts}


@pytest.mark.slow
def test_a_small_run_measures_and_writes_its_tables_between_the_marks(tmp_path):
    page, file = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(f"# Before\n{benchmark.MEASURED}\nold numbers\n{benchmark.MEASURED_END}\nAfter\n")
    flags = [
        "--tasks",
        "pose",
        "--sizes",
        "demo",
        "--variants",
        "trainer",
        "--parts",
        "steps",
        "--batch_size",
        2,
        "--device",
        "cpu",
    ]
    run_script(ROOT / "scripts", "benchmark.py", *flags, "--rounds", 1, "--steps", 1, "--page", page, "--json", file)
    text, (found,) = page.read_text(), json.loads(file.read_text())["rows"]
    assert text.startswith("# Before\n") and text.endswith("\nAfter\n") and "old numbers" not in text
    assert "| pose, demo, all-linear | 2 | " in text and "HF Trainer" in text and "Measured on cpu" in text
    assert found["seconds"].keys() == {"full", "lora", "trainer"}
    assert all(len(times) == 1 and times[0] > 0 for times in found["seconds"].values())
    (total, trained), (whole, adapter) = found["parameters"], found["bytes"]
    assert 0 < trained < total / 2 and whole == 4 * total and 4 * trained < adapter < whole / 2
    assert found["latency"]["unmerged"] > 0 and found["latency"]["merged"] > 0


def test_ratios_are_taken_within_each_turn():
    found = row(full=[1.0, 10.0, 4.0], lora=[0.5, 6.0, 3.0])  # the second turn found the machine busy
    assert benchmark.ratio(found, "lora", "full") == "0.60 [0.50-0.75]"
    assert benchmark.ratio(found, "peft", "full") == ""
    assert "| pose, demo, qv | 2 | 4000 ms | 0.60 [0.50-0.75] |  |" in benchmark.tables([found])


def test_every_task_of_the_project_has_a_row():
    assert {ROOT / task["folder"] for task in TASKS.values()} == set(FOLDERS)


@pytest.mark.parametrize("name", ["tasks", "sizes", "variants", "parts"])
def test_unknown_names_are_refused_with_what_there_is(name):
    with pytest.raises(UserError, match=f"--{name}: there is no 'nonsense'; there are "):
        benchmark.BenchmarkConfig(**{name: "nonsense"})


def test_a_page_without_a_place_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("no marks\n")
    with pytest.raises(UserError, match="has no place for the tables"):
        benchmark.write_page(tmp_path / "page.md", "numbers")
    assert (tmp_path / "page.md").read_text() == "no marks\n"


@pytest.mark.parametrize("task", TASKS)
def test_each_row_builds_a_model_that_learns_from_its_sample(task):
    row = TASKS[task]
    use_task(ROOT / row["folder"])
    model, heads, sample, loss = row["build"](False)
    loss(model, stack([sample, sample])).backward()
    parts = [p for name, p in model.named_parameters() if is_within(name, heads)]
    assert parts and any(p.grad is not None and p.grad.abs().max() > 0 for p in parts)
