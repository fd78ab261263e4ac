"""The script behind docs/peft_methods.md, with trainings that take no time: rates chosen by validation, scores of test data."""

import json
import math
import sys

import pytest
from conftest import ROOT

from common.config import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import peft_table  # noqa: E402

BEST = {"lora": 1e-2, "ia3": 5e-2, "full": 1e-3}  # where validation accuracy peaks


@pytest.fixture
def calls(monkeypatch):
    """The scripts that were called, in place of running them: a method's accuracy falls with the distance from its best rate."""
    seen = []

    def call(script, *flags):
        seen.append((script, *flags))
        given = dict(zip(flags[::2], flags[1::2], strict=False))
        if script.startswith("train"):
            method = given.get("--peft_method", "full")
            far = abs(math.log10(given["--lr"] / BEST[method]))
            folder = peft_table.Path(given["--output_dir"]) / "clip" / given["--run_name"]
            folder.mkdir(parents=True)
            summary = {
                "status": "finished",
                "metrics": {"best": {"balanced_accuracy": 0.9 - 0.1 * far}},
                "parameters": {"trainable": 1234},
                "checkpoint_bytes": 56_789,
                "train_seconds": 10.0 + given["--seed"],
                "environment": {"device": "cpu", "torch": "2.15", "peft": "0.21"},
                "data": {"train": 320},
            }
            (folder / "summary.json").write_text(json.dumps(summary))
        else:
            folder = peft_table.Path(given["--checkpoint"]).parents[1]
            seed = int(folder.name.rsplit("_", 2)[1])
            found = {"metrics": {"accuracy": 0.7 + 0.1 * seed}, "zero_shot": {"accuracy": 0.47}}
            (folder / "eval_test.json").write_text(json.dumps(found))

    monkeypatch.setattr(peft_table, "call", call)
    return seen


def make(tmp_path, *flags):
    peft_table.main(["--output_dir", str(tmp_path / "runs"), "--page", str(tmp_path / "page.md"), *flags])
    return (tmp_path / "page.md").read_text()


def test_every_method_gets_its_best_rate_and_is_scored_on_test_data(tmp_path, calls):
    (tmp_path / "page.md").write_text(f"before\n{peft_table.BEGIN}\nold\n{peft_table.END}\nafter\n")
    text = make(tmp_path, "--methods", "full;lora;ia3")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")
    }
    assert {name: rows[name][3] for name in BEST} == {name: f"{rate:g}" for name, rate in BEST.items()}
    assert rows["lora"][1:] == ["1,234", "0.06 MB", "0.01", "10 s", "0.800 ± 0.100"]
    assert "| zero-shot: the base as it is | 0 | | | | 0.470 |" in text
    trained = [flags for script, *flags in calls if script == "train_lora.py" and "lora" in flags]
    assert [flags[flags.index("--lr") + 1] for flags in trained] == [5e-3, 1e-2, 2e-2, 1e-2, 1e-2], "uphill, then the other seeds"
    assert {flags[flags.index("--seed") + 1] for flags in trained} == {0, 1, 2}


def test_runs_that_are_there_are_not_made_again(tmp_path, calls):
    first = make(tmp_path, "--methods", "lora")
    before = list(calls)
    assert make(tmp_path, "--methods", "lora") == first and calls == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "lora;adalora"], "no 'adalora'"),
        (["--seeds", "0,one"], "numbers"),
        (["--start", "0.3"], "none of --rates"),
    ],
)
def test_wrong_settings_are_errors(tmp_path, calls, flags, words):
    with pytest.raises(UserError, match=words):
        make(tmp_path, *flags)
    assert not calls


def test_a_page_without_a_place_for_the_table_stays_as_it_is(tmp_path, calls):
    (tmp_path / "page.md").write_text("mine\n")
    with pytest.raises(UserError, match="no place for the table"):
        make(tmp_path, "--methods", "lora")
    assert (tmp_path / "page.md").read_text() == "mine\n"


def test_a_training_that_fails_is_named_with_its_error(tmp_path):
    config = peft_table.TableConfig(output_dir=str(tmp_path), epochs=0)
    with pytest.raises(UserError, match="train_lora.py .* ended with 2: error: argument --epochs: '0' must be"):
        peft_table.run(config, "lora", 5e-3, 0)
