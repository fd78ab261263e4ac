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
RIGHT = {"lora": range(18), "ia3": range(6, 24), "full": range(24), "dora": range(12)}  # of 24 test pictures


def falls_with_distance(method, rate):
    """(accuracy, loss) on the validation data."""
    far = abs(math.log10(rate / BEST.get(method, 5e-3)))
    return 0.9 - 0.1 * far, far


@pytest.fixture
def calls(monkeypatch):
    """The scripts that were called, in place of running them. calls.validation(method, rate) says what training reaches."""

    class Calls(list):
        validation = staticmethod(falls_with_distance)

    seen = Calls()

    def call(script, *flags):
        seen.append((script, *flags))
        given = dict(zip(flags[::2], flags[1::2], strict=False))
        if script.startswith("train"):
            method = given.get("--peft_method", "full")
            folder = peft_table.Path(given["--output_dir"]) / "clip" / given["--run_name"]
            folder.mkdir(parents=True)
            reached = dict(zip(("balanced_accuracy", "val_loss"), seen.validation(method, given["--lr"]), strict=True))
            summary = {
                "status": "finished",
                "metrics": {"best": reached},
                "parameters": {"trainable": 1234},
                "checkpoint_bytes": 56_789,
                "environment": {"torch": "2.15", "peft": "0.21"},
                "data": {"train": 320, "val": 100},
            }
            (folder / "summary.json").write_text(json.dumps(summary))
        else:
            names = sorted(path.name for path in peft_table.Path(given["--data_dir"]).glob("test/*/*.png"))
            method = peft_table.Path(given["--checkpoint"]).parents[1].name.split("_")[0]
            rows = [{"file": f"{i}_{name}", "label": i % 8, "right": i in RIGHT[method]} for i, name in enumerate(names)]
            folder = peft_table.Path(given["--output_dir"])
            record = {"metric": "balanced_accuracy", "rows": rows}
            write_text(folder / "eval_test" / "samples.json", json.dumps(record))
            found = {"metrics": {"accuracy": len(RIGHT[method]) / len(rows)}, "zero_shot": {"accuracy": 0.47}}
            write_text(folder / "eval_test.json", json.dumps(found))

    monkeypatch.setattr(peft_table, "call", call)
    return seen


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make(tmp_path, *flags):
    few = ["--test_pictures", "3", "--output_dir", str(tmp_path / "runs"), "--page", str(tmp_path / "page.md")]
    peft_table.main([*few, *flags])
    return (tmp_path / "page.md").read_text()


def cells(text):
    """Method -> its cells."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def test_every_method_gets_its_best_rate_and_is_scored_on_test_data(tmp_path, calls):
    (tmp_path / "page.md").write_text(f"before\n{peft_table.BEGIN}\nthe former\n{peft_table.END}\nafter\n")
    text = make(tmp_path, "--methods", "full;lora;ia3")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "former" not in text
    rows = cells(text)
    assert {name: rows[name][2] for name in BEST} == {
        "full": "0.001 (0.0005 to 0.01)",
        "lora": "0.01 (0.005 to 0.02)",
        "ia3": "0.05 (0.005 to 0.05)",
    }
    assert rows["lora"][:2] == ["1,234", "0.06 MB"] and rows["lora"][3] == "0.750 ± 0.000"
    assert rows["zero-shot: the base as it is"][3] == "0.470"
    trained = [flags for script, *flags in calls if script == "train_lora.py" and "lora" in flags]
    settings = [(flags[flags.index("--lr") + 1], flags[flags.index("--seed") + 1]) for flags in trained]
    assert settings == [(5e-3, 0), (1e-2, 0), (2e-2, 0), *((1e-2, seed) for seed in (1, 2, 3, 4))], "uphill, then the other seeds"


@pytest.mark.parametrize(
    ("reached", "rate", "tried", "at_end"),
    [
        ({2e-3: 0.8, 5e-3: 0.9, 1e-2: 0.9, 2e-2: 0.9, 5e-2: 0.7}, 1e-2, [2e-3, 5e-2], False),  # a tie, of which the loss decides
        ({5e-3: 0.9, 1e-2: 0.9 - 1e-16, 2e-2: 0.95, 5e-2: 0.94}, 2e-2, [5e-3, 5e-2], False),  # a tie as means have it, on the way
        ({1e-3: 0.7, 2e-3: 0.9, 5e-3: 0.9, 1e-2: 0.89}, 2e-3, [1e-3, 1e-2], False),  # a tie downwards
        ({5e-3: 0.8, 1e-2: 0.81, 2e-2: 0.82, 5e-2: 0.82}, 2e-2, [5e-3, 5e-2], True),  # a tie at the end
    ],
)
def test_the_search_goes_on_until_both_sides_are_worse(tmp_path, calls, reached, rate, tried, at_end):
    loss = dict.fromkeys(reached, 0.5) | {rate: 0.4}
    calls.validation = lambda method, lr: (reached[lr], loss[lr])
    config = peft_table.TableConfig(output_dir=str(tmp_path))
    assert peft_table.choose_rate(config, "lora") == {"rate": rate, "tried": tried, "at_end": at_end}
    assert len(calls) == len(reached)


def test_what_is_claimed_is_what_the_intervals_carry(tmp_path, calls):
    text = make(tmp_path, "--methods", "full;lora;dora;ia3")
    rows = cells(text)
    assert "Against `lora`: better `full`; worse `dora`; no difference shown `ia3`." in text
    assert "Against `full`: better none; worse `lora`, `dora`, `ia3`; no difference shown none." in text
    assert "Of 3 comparisons at 95 %, about 0.15 would" in text
    assert "Best at an end of the list of rates, so that a better one may lie beyond: `ia3`." in text
    assert rows["lora"][4] == rows["full"][5] == ""
    low, high = map(float, rows["ia3"][4].split(" to "))
    assert low == -high < -0.1, "as many are right, of others"
    low, high = map(float, rows["dora"][4].split(" to "))
    assert (low + high) / 2 == pytest.approx(-6 / 24, abs=1e-3)
    # A quarter of 24 differs, always the same way: sqrt(0.25 * 0.75 / 24) = 0.088, times 2.07, Student's t of 23. Somewhat more,
    # for the metric is a mean over classes, and draws have more of one and fewer of another.
    assert 2.07 * 0.088 < (high - low) / 2 < 1.2 * 2.07 * 0.088
    # sqrt(0.75 * 0.25 / 24) and / 100
    assert "An accuracy of 0.750 has a standard error of 0.0884 by the 24 test pictures" in text
    assert "and of 0.043 by the 100 validation pictures" in text


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
    assert (tmp_path / "page.md").read_text() == "mine\n" and not calls


def test_a_training_that_fails_is_named_with_its_error(tmp_path):
    config = peft_table.TableConfig(output_dir=str(tmp_path), epochs=0)
    with pytest.raises(UserError, match="train_lora.py .* ended with 2: error: argument --epochs: '0' must be"):
        peft_table.run(config, "lora", 5e-3, 0)
