"""scripts/disagreements.py: which samples two runs differ on most, by what each gave. (test_tasks_answers.py shows them.)"""

import sys

import pytest
from conftest import ROOT

from common.config import UserError
from common.record import write_samples

sys.path.insert(0, str(ROOT / "scripts"))
from disagreements import DisagreementsConfig, in_process, most_different, same_samples, show_disagreements  # noqa: E402


def label_row(file, guess, probability):
    return {"file": file, "label": 0, "guess": guess, "right": guess == 0, "probability": probability}


def test_of_classes_those_that_one_run_has_right_come_surest_first():
    full = [label_row("a", 0, 0.6), label_row("b", 0, 0.9), label_row("c", 0, 0.9), label_row("d", 1, 0.99)]
    lora = [label_row("d", 1, 0.2), label_row("c", 1, 0.8), label_row("b", 0, 0.5), label_row("a", 1, 0.5)]
    records = {name: {"classes": ["cat", "dog"], "rows": rows} for name, rows in (("full", full), ("lora", lora))}
    assert most_different(records, 9) == [
        {"file": "c", "what": "true: cat", "full": "cat 0.90 (right)", "lora": "dog 0.80 (wrong)"},
        {"file": "a", "what": "true: cat", "full": "cat 0.60 (right)", "lora": "dog 0.50 (wrong)"},
    ]
    assert len(most_different(records, 1)) == 1


def test_of_values_the_largest_difference_comes_first_and_says_who_is_better():
    full = [{"file": "a", "value": 1.0}, {"file": "b", "value": 5.0}, {"file": "c", "value": 2.0}]
    lora = [{"file": "a", "value": 1.5}, {"file": "b", "value": 3.0}, {"file": "c", "value": 2.0}]
    about = {"metric": "pixel_error", "higher_is_better": False}
    found = most_different({"full": about | {"rows": full}, "lora": about | {"rows": lora}}, 9)
    assert [one["file"] for one in found] == ["b", "a"]  # on c there is no difference
    assert found[0] == {"file": "b", "what": "LoRA is better", "full": "pixel_error 5.000", "lora": "pixel_error 3.000"}
    assert found[1]["what"] == "full is better"


def test_of_boxes_each_picture_counts_by_its_own_average_precision():
    def rows(first, second):
        return [
            {"file": "a", "truth": {"dog": 1}, "found": [[1, 0.9, first * 10]]},
            {"file": "b", "truth": {"cat": 2, "dog": 1}, "found": [[0, 0.9, second * 10]]},
            {"file": "empty", "truth": {}, "found": [[0, 0.9, "0" * 10]]},
        ]

    records = {"full": {"classes": ["cat", "dog"], "rows": rows("1", "0")}, "lora": {"rows": rows("0", "1")}}
    found = most_different(records, 9)
    assert [one["file"] for one in found] == ["a", "b"]
    assert (found[0]["what"], found[0]["full"], found[0]["lora"]) == ("1 dog", "AP 1.000", "AP 0.000")
    # Of two cats one was found: precision 1 up to recall 0.5, 51 of 101 places; the dog was not found.
    assert (found[1]["what"], found[1]["lora"]) == ("2 cat, 1 dog", f"AP {51 / 101 / 2:.3f}")


def test_samples_are_those_of_the_test_split_where_both_runs_have_it(tmp_path):
    runs = {name: tmp_path / name for name in ("full", "lora")}
    for run in runs.values():
        write_samples(run / "samples.json", "dice", True, [{"file": "val", "value": 0.5}])
    write_samples(runs["full"] / "eval_test" / "samples.json", "dice", True, [{"file": "test", "value": 0.5}])
    assert same_samples(runs, "", "dice")[0] == "val"
    with pytest.raises(UserError, match="have no samples.json of the test split both"):
        same_samples(runs, "test", "dice")
    write_samples(runs["lora"] / "eval_test" / "samples.json", "dice", True, [{"file": "test", "value": 0.25}])
    split, records = same_samples(runs, "", "dice")
    assert split == "test" and records["lora"]["rows"][0]["value"] == 0.25
    write_samples(runs["lora"] / "eval_test" / "samples.json", "dice", True, [{"file": "other", "value": 0.25}])
    with pytest.raises(UserError, match="were not scored on the same samples of the test split"):
        same_samples(runs, "", "dice")


def test_damaged_rows_and_folders_that_are_no_runs_are_one_line(tmp_path):
    with pytest.raises(UserError, match="a samples.json is damaged"):
        most_different({name: {"classes": ["a"], "rows": [{"file": "x", "label": 0}]} for name in ("full", "lora")}, 3)
    with pytest.raises(UserError, match="only checkpoints that these scripts saved"):
        show_disagreements(DisagreementsConfig(str(tmp_path), str(tmp_path)))
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:], file=sys.stderr); sys.exit('error: no such run')")
    with pytest.raises(UserError, match="^script.py ended with 1: no such run$"):
        in_process(script, {"most": 3})
