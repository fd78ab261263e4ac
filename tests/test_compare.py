"""scripts/compare.py: the numbers are those of the summaries, the sentence is true both ways, unlike runs are refused."""

import copy
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, Script
from tasks import scratch

from common.record import write_samples

sys.path.insert(0, str(ROOT / "scripts"))
from bootstrap import drawn_values  # noqa: E402

SCRIPT = ROOT / "scripts" / "compare.py"

FULL = {
    "schema_version": 1,
    "task": "detection",
    "method": "full",
    "run_name": "full",
    "status": "finished",
    "error": None,
    "started": "2025-01-01T10:00:00+00:00",
    "ended": "2025-01-01T10:02:00+00:00",
    "resumed_at_steps": [],
    "config": {
        "epochs": 10,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps_per_epoch": 0,
        "lr": 3e-4,
        "run_name": "",
    },
    "base": {"name": "demo", "sha256": "b" * 64},
    "data": {"name": "data/demo", "sha256": "d" * 64, "format": "coco", "train": 400, "val": 200, "left_out": {}},
    "parameters": {"total": 400_000, "trainable": 390_000},
    "metrics": {
        "name": "map_50",
        "higher_is_better": True,
        "before": {"map_50": 0.031},
        "best": {"map_50": 0.892, "map": 0.61, "epoch": 9, "step": 450, "per_class_map": {"star": 0.5}},
        "final": {"map_50": 0.88, "map": 0.6},
    },
    "epochs": 10,
    "steps": 500,
    "seconds": 130.0,
    "train_seconds": 100.0,
    "samples_per_second": 40.0,
    "peak_memory_bytes": {"cpu": 700_000_000, "gpu": None},
    "checkpoint_bytes": 1_600_000,
    "environment": {"torch": "2.9", "device": "cpu, 2 cores", "processes": 1, "threads": 1},
}
LORA = {
    "method": "lora",
    "run_name": "lora",
    "config.lr": 2e-3,
    "config.lora_r": 8,
    "parameters.total": 440_000,
    "parameters.trainable": 40_000,
    "metrics.best": {"map_50": 0.861, "map": 0.59, "epoch": 10, "step": 500},
    "metrics.final": {"map_50": 0.861, "map": 0.59},
    "train_seconds": 120.0,
    "peak_memory_bytes.cpu": 686_000_000,
    "checkpoint_bytes": 330_000,
}


def write_run(folder, changes=None, text=None, values=()):
    """A run folder with FULL as its summary; `changes` sets dotted keys. values: its metric in each sample."""
    summary = copy.deepcopy(FULL)
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        place = summary
        for part in parents:
            place = place[part]
        place[last] = copy.deepcopy(value)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary) if text is None else text)
    if values:
        rows = [{"file": f"{i}.png", "value": value} for i, value in enumerate(values)]
        write_samples(folder / "samples.json", summary["metrics"]["name"], True, rows)
    return folder


def compare(*args, fails=False, draw=False):
    """What the command printed: to stdout, or with `fails` the one line of its error. Its picture is empty without `draw`."""
    script = Script(SCRIPT.parent, SCRIPT.name, args, scratch() / f"compare-{time.monotonic_ns()}", draw=draw)
    result = script.wait(expect=2 if fails else 0)
    if not fails:
        return result.stdout
    assert result.stdout == "", result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def compare_pair(tmp_path, lora=None, full=None, *args, **kwargs):
    folders = write_run(tmp_path / "full", full), write_run(tmp_path / "lora", {**LORA, **(lora or {})})
    return compare(*folders, "--output_dir", tmp_path / "out", *args, **kwargs)


def cells(text, row):
    """The cells of a table's row, without its name."""
    line = re.search(rf"^\| {re.escape(row)} +\|(.+)\|$", text, flags=re.MULTILINE)
    return [cell.strip() for cell in line[1].split("|")]


def test_verdict_and_table_say_what_the_summaries_hold(tmp_path):
    said = compare_pair(tmp_path)
    assert said.splitlines()[0] == (
        "LoRA reaches map_50 0.861 against 0.892 of full (0.031 worse), with 40,000 trained parameters against 390,000 "
        "(9.8x fewer), a checkpoint of 0.33 MB against 1.60 MB (4.8x smaller), 1.20x the training time and 0.98x the peak memory."
    )
    assert cells(said, "map_50 before training") == ["0.031", "0.031"]
    assert cells(said, "map_50 best") == ["0.892", "0.861"] and cells(said, "map_50 final") == ["0.880", "0.861"]
    assert cells(said, "best epoch") == ["9", "10"] and cells(said, "of all parameters") == ["97.5 %", "9.09 %"]
    assert cells(said, "checkpoint") == ["1.60 MB", "0.33 MB"] and cells(said, "training steps") == ["100 s", "120 s"]
    assert cells(said, "samples per second") == ["40.0", "40.0"] and cells(said, "peak memory (CPU)") == ["700 MB", "686 MB"]
    assert said.count("Note:") == 1 and "how much of a difference is chance is not known" in said


def test_files_hold_the_same_and_a_picture(tmp_path):
    said = compare_pair(tmp_path, draw=True)
    page = (tmp_path / "out" / "compare.md").read_text()
    assert said.split("\n\nwrote")[0].strip() in page and "(compare.png)" in page
    assert cells(page, "map") == ["0.610", "0.590"] and "per_class" not in page
    assert cells(page, "lr") == ["0.0003", "0.002"] and cells(page, "lora_r") == ["-", "8"]
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["verdict"] == [said.splitlines()[0]] and record["forced"] is False
    assert [run["checkpoint_bytes"] for run in record["runs"]] == [1_600_000, 330_000]
    assert record["runs"][1]["metric_best"] == 0.861 and record["runs"][0]["trained_percent"] == 97.5
    from PIL import Image

    with Image.open(tmp_path / "out" / "compare.png") as picture:
        picture.load()
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"compare.{kind}" for kind in ("html", "json", "md", "png")]


@pytest.mark.parametrize(
    ("lora", "full", "words"),
    [
        ({"metrics.best.map_50": 0.9}, {}, "0.900 against 0.892 of full (0.008 better)"),
        ({"checkpoint_bytes": 3_200_000}, {}, "3.20 MB against 1.60 MB (2.0x larger)"),
        ({"checkpoint_bytes": 1_600_000}, {}, "(the same)"),
        ({"checkpoint_bytes": 10_600_000}, {"checkpoint_bytes": 343_000_000}, "10.60 MB against 343 MB (32x smaller)"),
        ({"train_seconds": 67.0}, {}, "0.67x the training time"),
        ({"metrics.best.map_50": 0.0}, {"metrics.best.map_50": 0.0}, "map_50 0.000 against 0.000 of full (the same)"),
        ({"metrics.best.map_50": 0.892 + 1e-16}, {}, "0.892 against 0.892 of full (the same)"),
        ({"metrics.best.map_50": None}, {}, "map_50 unknown against 0.892 of full, with"),
    ],
)
def test_the_sentence_is_honest_in_both_directions(tmp_path, lora, full, words):
    assert words in compare_pair(tmp_path, {**LORA, **lora}, full).splitlines()[0]


@pytest.mark.parametrize(("mine", "word"), [(7.25, "worse"), (6.75, "better")])
def test_where_lower_is_better_the_gap_is_named(tmp_path, mine, word):
    error = {"name": "mcd", "higher_is_better": False, "before": {"mcd": 9.0}, "best": {"mcd": 7.0, "epoch": 1}, "final": {}}
    lora = {"metrics": {**error, "best": {"mcd": mine, "epoch": 1}}}
    changes = {key: value for key, value in LORA.items() if not key.startswith("metrics.")}
    folders = write_run(tmp_path / "full", {"metrics": error}), write_run(tmp_path / "lora", {**changes, **lora})
    said = compare(*folders, "--output_dir", tmp_path / "out")
    assert f"mcd {mine:.3f} against 7.000 of full (0.250 {word})" in said
    assert cells(said, "mcd final") == ["unknown", "unknown"]


def test_unknown_sizes_are_left_out_of_the_sentence(tmp_path):
    said = compare_pair(tmp_path, {"checkpoint_bytes": None, "samples_per_second": None})
    assert "a checkpoint of" not in said and cells(said, "checkpoint") == ["1.60 MB", "unknown"]
    assert cells(said, "samples per second") == ["40.0", "unknown"]


def test_gpu_memory_counts_where_every_run_has_it(tmp_path):
    gpu = {"peak_memory_bytes": {"cpu": 1, "gpu": 2_000_000_000}}
    without = {key: value for key, value in LORA.items() if not key.startswith("peak")}
    folders = write_run(tmp_path / "full", gpu), write_run(tmp_path / "lora", {**without, "peak_memory_bytes.gpu": 1_000_000_000})
    said = compare(*folders, "--output_dir", tmp_path / "out")
    assert "0.50x the peak memory" in said and cells(said, "peak memory (GPU)") == ["2,000 MB", "1,000 MB"]
    write_run(tmp_path / "cpu", {**without, "run_name": "cpu"})
    said = compare(*folders, tmp_path / "cpu", "--output_dir", tmp_path / "out")
    assert len(cells(said, "peak memory (CPU)")) == 3


def test_names_that_would_be_formulas_are_drawn(tmp_path):
    names = ("$\\frac{$", "a$_$b", "\udce9 猫" + 100 * "x")
    folders = [write_run(tmp_path / str(i), {"run_name": name}) for i, name in enumerate(names)]
    compare(*folders, "--output_dir", tmp_path / "out", draw=True)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_more_than_two_runs_and_no_full_one(tmp_path):
    folders = [write_run(tmp_path / name, {**LORA, "run_name": name, "checkpoint_bytes": size}) for name, size in
               (("r4", 100_000), ("r8", 200_000), ("r16", 400_000))]  # fmt: skip
    said = compare(*folders, "--output_dir", tmp_path / "out")
    assert "r8 reaches map_50 0.861 against 0.861 of r4" in said and "(2.0x larger)" in said
    assert "r16 reaches" in said and "(4.0x larger)" in said and cells(said, "checkpoint") == ["0.10 MB", "0.20 MB", "0.40 MB"]
    full = write_run(tmp_path / "full")
    said = compare(*folders, full, "--output_dir", tmp_path / "out")
    assert [line.split(" reaches")[0] for line in said.splitlines() if " of full (" in line] == ["r4", "r8", "r16"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    a, b = write_run(tmp_path / "a", LORA), write_run(tmp_path / "b", LORA)
    said = compare(a, b, "--output_dir", tmp_path / "out")
    assert f"{b} reaches" in said and f"of {a} (the same)" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.sha256": "e" * 64}, ["data.sha256", "dddddddd", "eeeeeeee"]),
        ({"base.sha256": "c" * 64}, ["base.sha256", "bbbbbbbb", "cccccccc"]),
        ({"task": "pose"}, ["task", "detection (full)", "pose (lora)"]),
        ({"metrics.name": "map"}, ["metrics.name", "map_50 (full)", "map (lora)"]),
        ({"config.epochs": 3}, ["config.epochs", "10 (full)", "3 (lora)"]),
        ({"config.max_steps_per_epoch": 2}, ["max_steps_per_epoch", "0 (full)", "2 (lora)"]),
        ({"config.batch_size": 4}, ["batch_size x gradient_accumulation_steps x processes", "8 (full)", "4 (lora)"]),
        ({"environment.processes": 2}, ["processes", "8 (full)", "16 (lora)"]),
        ({"status": "failed"}, ["status", "finished (full)", "failed (lora)"]),
    ],
)
def test_runs_that_are_not_alike_are_refused_and_force_says_so(tmp_path, change, words):
    said = compare_pair(tmp_path, change, fails=True)
    assert all(word in said for word in [*words, "--force"]), said
    assert not (tmp_path / "out").exists()
    forced = compare(tmp_path / "full", tmp_path / "lora", "--output_dir", tmp_path / "out", "--force")
    page, record = (tmp_path / "out" / "compare.md").read_text(), json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["forced"] is True
    for text in (forced, page, record["notes"][0]):
        assert "Not a fair comparison (--force)" in text and all(word in text for word in words)


def test_the_same_batch_by_other_means_is_alike(tmp_path):
    compare_pair(tmp_path, {"config.batch_size": 2, "config.gradient_accumulation_steps": 2, "environment.processes": 2})


def test_what_several_runs_note_is_said_once(tmp_path):
    left_out = {"data.left_out": {"corrupt picture": 3}}
    assert compare_pair(tmp_path, left_out, left_out).count("left out") == 1
    assert "Note: full, lora left out: 3 with corrupt picture." in (tmp_path / "out" / "compare.md").read_text()


def test_notes_say_what_makes_numbers_doubtful(tmp_path):
    lora = {"metrics.best.map_50": 0.02, "environment.device": "NVIDIA X", "data.left_out": {"corrupt picture": 3}}
    lora["notes"] = ["curves.png could not be made: MemoryError: no room for 6 GB"]
    said = compare_pair(tmp_path, {**LORA, **lora})
    assert "Note: lora did not get better than before training (0.031, best 0.020)." in said
    assert "Note: lora left out: 3 with corrupt picture." in said
    assert "Note: lora: curves.png could not be made: MemoryError: no room for 6 GB.\n" in said
    assert "Note: device differs (cpu, 2 cores, NVIDIA X)" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 1, "task"', "not valid JSON"),
        ("[]", "schema_version None"),
        (json.dumps({**FULL, "schema_version": 2}), "schema_version 2"),
        (b"\xff\xfe".decode("latin-1"), "not valid JSON"),
    ],
)
def test_a_summary_that_it_does_not_know_is_refused(tmp_path, text, words):
    folders = write_run(tmp_path / "full"), write_run(tmp_path / "lora", text=text)
    assert words in compare(*folders, "--output_dir", tmp_path / "out", fails=True)


def test_wrong_calls_end_in_one_line(tmp_path):
    run = write_run(tmp_path / "full")
    assert "two or more" in compare(run, fails=True)
    assert "two or more" in compare(run, tmp_path / "full" / ".." / "full", fails=True)
    assert "not both" in compare(run, run, "--task", "detection", fails=True)
    assert "no run folder" in compare(run, tmp_path / "nowhere", fails=True)
    assert "no task has both" in compare("--runs_dir", tmp_path, fails=True)


def test_the_newest_finished_pair_of_a_task_is_found(tmp_path):
    runs = tmp_path / "outputs"
    write_run(runs / "detection" / "full")
    assert "no finished lora run of detection" in compare("--runs_dir", runs, "--task", "detection", fails=True)
    done = "finished"
    for name, minute, status in (("lora", 3, done), ("lora_2", 5, done), ("lora_3", 4, done), ("lora_4", 6, "failed")):
        changes = {"run_name": name, "ended": f"2025-01-02T10:0{minute}:00+00:00", "status": status}
        write_run(runs / "detection" / name, {**LORA, **changes})
    said = compare("--runs_dir", runs)
    assert cells(said, "") == ["full", "lora_2"] and said.startswith("LoRA reaches")
    assert (runs / "detection" / "compare" / "compare.png").exists()
    compare("--runs_dir", runs)  # what it left there is no run

    for method, changes in (("full", {}), ("lora", LORA)):
        write_run(runs / "pose" / method, {**changes, "task": "pose"})
    assert "detection, pose have both" in compare("--runs_dir", runs, fails=True)
    assert compare("--runs-dir", runs, "--task", "pose").endswith(f"to {runs / 'pose' / 'compare'}\n")


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import runpy, sys\nsys.path[0] = sys.argv[1].rpartition('/')[0]\n"
    code += "try:\n    runpy.run_path(sys.argv.pop(1), run_name='__main__')\nfinally:\n"
    code += "    assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    result = subprocess.run([sys.executable, "-c", code, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--runs_dir" in result.stdout, result.stderr


# ---- how much is chance ------------------------------------------------------------------------------------------------


def pair_with_values(tmp_path, full, lora):
    folders = write_run(tmp_path / "full", values=full), write_run(tmp_path / "lora", LORA, values=lora)
    return compare(*folders, "--output_dir", tmp_path / "out")


def test_a_difference_is_shown_where_samples_agree_on_it_and_else_not(tmp_path):
    full = np.random.default_rng(0).normal(0.9, 0.3, 200).tolist()  # samples differ far more than the runs do
    said = pair_with_values(tmp_path / "shown", full, [value - 0.03 for value in full])
    assert "(0.031 worse; a difference by 200 samples: 95 % interval -0.030 to -0.030)" in said and "Note:" not in said
    said = pair_with_values(tmp_path / "not", full, full[::-1])
    low, high = map(float, re.search(r"no difference shown by 200 samples: 95 % interval (\S+) to (\S+)\)", said).groups())
    assert -0.15 < low < 0 < high < 0.15  # about 2 x 0.3 x sqrt(2 / 200) to each side
    runs = json.loads((tmp_path / "not" / "out" / "compare.json").read_text())["runs"]
    assert cells(said, "95 % interval")[0] == " to ".join(f"{end:.3f}" for end in runs[0]["interval"])
    assert runs[1]["difference"] == pytest.approx([low, high], abs=1e-3)


def test_four_samples_show_nothing(tmp_path):
    said = pair_with_values(tmp_path, [1.0] * 4, [0.0] * 4)
    assert "(0.031 worse, no difference shown)" in said and "Note: 4 samples are too few to tell any difference." in said


def test_samples_that_are_others_or_damaged_are_named(tmp_path):
    full = write_run(tmp_path / "full", values=[0.5] * 30)
    less = write_run(tmp_path / "less", {**LORA, "run_name": "less"}, values=[0.5] * 29)
    said = compare(full, less, "--output_dir", tmp_path / "out")
    assert "Of less there is no interval" in said
    lora = write_run(tmp_path / "lora", LORA)
    for text in ("[]", '{"rows": [5]}', '{"metric": "map_50", "rows": [{"file": "0.png", "value": "much"}]}', "{"):
        (full / "samples.json").write_text(text)
        (lora / "samples.json").write_text(text)
        assert "samples.json" in compare(full, lora, "--output_dir", tmp_path / "out", fails=True)


def test_balanced_accuracy_of_a_draw_is_what_its_samples_give():
    rng = np.random.default_rng(0)
    labels, right = rng.integers(0, 4, 60), rng.random(60) < 0.7
    rows = [{"file": "", "label": int(label), "right": bool(hit)} for label, hit in zip(labels, right, strict=True)]
    draws = rng.multinomial(60, np.full(60, 1 / 60), size=5)
    for draw, value in zip(draws, drawn_values({"rows": rows}, draws), strict=True):
        y, hits = np.repeat(labels, draw), np.repeat(right, draw)
        assert value == pytest.approx(np.mean([hits[y == k].mean() for k in np.unique(y)]))


def test_a_weighted_mean_is_drawn_with_its_weights():
    rows = [{"file": "a", "value": 1.0, "weight": 3}, {"file": "b", "value": 5.0, "weight": 1}]
    assert drawn_values({"rows": rows}, np.array([[1, 1], [0, 2], [2, 1]])).tolist() == [2.0, 5.0, 11 / 7]


@pytest.mark.parametrize(
    "changes",
    [
        *({"metrics": []}, {"config": 3}, {"ended": 5}, {"environment": "x"}),
        *({"parameters.trainable": "many"}, {"metrics.best": {"map_50": "high"}}),
    ],
)
def test_a_summary_of_another_shape_is_refused_by_name(tmp_path, changes):
    told = compare_pair(tmp_path, full=changes, fails=True)
    assert f"{tmp_path}/full/summary.json is damaged: its {next(iter(changes)).split('.best')[0]}" in told


def test_the_newest_pair_that_is_alike_is_taken(tmp_path):
    for name, changes in {
        "full": {},
        "lora": LORA,
        "lora_other": {**LORA, "run_name": "lora_other", "data.sha256": "e" * 64, "ended": "2025-01-02T10:00:00+00:00"},
    }.items():
        write_run(tmp_path / "detection" / name, changes)
    said = compare("--runs_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert said.startswith("LoRA reaches map_50 0.861 against 0.892 of full") and "lora_other" not in said
