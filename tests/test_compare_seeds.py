"""scripts/compare.py over seeds and tasks: what was planted is found, what is not there is not claimed, the page stands alone."""

import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from common.checkpoint import write_json
from common.config import UserError
from planted_runs import plant, plant_task

sys.path.insert(0, str(ROOT / "scripts"))
from bootstrap import agreement, interval_of_mean, interval_over_seeds, intervals, read_samples  # noqa: E402
from compare import compare_all, compared, main, rows_of  # noqa: E402
from compare_beside import look_closer  # noqa: E402
from compare_plots import draw_classes, draw_pareto, draw_ranks, draw_sweep  # noqa: E402
from compare_runs import label_of, run_ids  # noqa: E402
from compare_text import lora_of, over_seeds, without_places  # noqa: E402
from compare_words import claim, judge, overall, signed  # noqa: E402


def compare_task(folder):
    """The one comparison of the runs of a task's folder."""
    (record,), notes = compare_all([folder.parent], force=False)
    assert notes == []
    return record


# ---- what is claimed ---------------------------------------------------------------------------------------------------


def test_a_planted_difference_is_found_and_not_overstated(tmp_path):
    record = compare_task(plant_task(tmp_path, lora={"better": -0.1}))
    assert (
        record["judgement"]["kind"] == "worse" and 0.05 < record["judgement"]["by"] < 0.11 and record["judgement"]["seeds"] == 3
    )
    assert (
        record["claim"].startswith("LoRA is worse than full by at least 0.0")
        and "by 3 seeds and 80 validation" in record["claim"]
    )
    record = compare_task(plant_task(tmp_path / "up", "voice_rvc", lora={"better": 0.1}))
    assert record["judgement"]["kind"] == "better" and record["claim"].startswith("LoRA is better than full by at least 0.0")


def paired(rng, seeds=3, samples=60, of_seed=0.0, own=1.0):
    """[seed -> record] of two methods whose true difference is 0."""
    hard = rng.normal(size=samples)
    return [
        {
            seed: {
                "rows": [{"file": str(i), "value": float(x)} for i, x in enumerate(hard + own * rng.normal(size=samples) + shift)]
            }
            for seed, shift in enumerate(of_seed * rng.normal(size=seeds))
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize("of_seed", [0.0, 0.3])
def test_where_there_is_no_difference_hardly_one_in_twenty_is_claimed(monkeypatch, of_seed):
    monkeypatch.setattr("bootstrap.DRAWS", 200)
    rng = np.random.default_rng(0)
    claimed = 0
    for _ in range(150):
        low, high = intervals(paired(rng, of_seed=of_seed), 0)[1]["difference"]
        claimed += not low <= 0 <= high
    assert claimed <= 150 * 0.09  # 5 % would be 7.5, and a binomial's 97.5 % point 13


def test_seeds_that_scatter_widen_the_interval_of_their_mean():
    rng = np.random.default_rng(0)
    same, apart = (intervals(paired(rng, of_seed=spread), 0)[1]["difference"] for spread in (0.0, 2.0))
    assert apart[1] - apart[0] > 4 * (same[1] - same[0])


def test_the_interval_over_seeds_is_students():
    from scipy.stats import sem, t

    values = [0.91, 0.93, 0.90, 0.95]
    assert interval_over_seeds(values) == pytest.approx(t.interval(0.95, 3, np.mean(values), sem(values)))
    assert interval_over_seeds([0.9]) is None
    run = {"runs": [{"metric": value} for value in (1.0, 1.0, 0.958)]}
    assert over_seeds(run, higher_is_better=True) == "0.926 to 1.000", "no accuracy is above 1"
    assert over_seeds(run, higher_is_better=False) == "0.926 to 1.046"


def test_small_ends_keep_a_digit_more():
    assert (signed([-0.037, 0.04]), signed([-0.00268, -0.00049])) == ("-0.037 to +0.040", "-0.0027 to -0.0005")


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["lora_s0", "lora_s1"], "lora"),
        (["s0_lora", "s1_lora"], "lora"),
        (["a-seed1", "a-seed2"], "a"),
        (["classes0", "classes1"], "classes"),
    ],
)
def test_the_runs_of_several_seeds_are_called_by_what_their_names_share(tmp_path, names, label):
    assert label_of([(tmp_path / name, {"run_name": name, "method": "lora"}) for name in names]) == label


def answers(right):
    return {"rows": [{"file": str(i), "label": 0, "right": bool(r)} for i, r in enumerate(right)]}


def test_mcnemar_is_scipys_exact_test_and_a_sample_has_one_vote():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    a, b = rng.random(100) < 0.8, rng.random(100) < 0.6
    found = agreement({0: answers(a)}, {0: answers(b)})
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert (found["first"], found["second"], found["both"]) == (only_a, only_b, int((a & b).sum()))
    assert found["p"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
    thrice = agreement({s: answers(a) for s in range(3)}, {s: answers(b) for s in range(3)})
    assert thrice["p"] == found["p"] and thrice["first"] == 3 * only_a and thrice["samples"] == 100
    undecided = agreement({0: answers([1] * 8), 1: answers([0] * 8)}, {0: answers([0] * 8), 1: answers([1] * 8)})
    assert undecided == {"both": 0, "first": 8, "second": 8, "neither": 0, "seeds": 2, "samples": 8, "p": 1.0}


def test_four_answers_to_none_are_no_evidence(tmp_path):
    record = {"rows": [{"file": str(i), "label": i % 2, "right": True} for i in range(48)]}
    worse = {"rows": [row | {"right": i > 3} for i, row in enumerate(record["rows"])]}
    row = intervals([{0: record}, {0: worse}], 0)[1]
    assert row["difference"][1] < 0 or row["difference"][1] == 0
    row |= {"metric": 0.9, "agreement": agreement({0: worse}, {0: record})}
    assert row["agreement"]["p"] == 0.125 and judge(row, True)["kind"] == "none"


def test_where_all_is_right_the_interval_is_that_of_the_exact_binomial():
    from scipy.stats import binomtest

    rows = [{seed: answers([True] * 48) for seed in range(3)} for _ in range(2)]
    first, second = intervals(rows, 0)
    exact = binomtest(48, 48).proportion_ci(method="exact")
    assert first["interval"] == pytest.approx([exact.low, 1]) and first["interval"][0] < 0.93
    assert second["difference"] == pytest.approx([exact.low - 1, 1 - exact.low])


@pytest.mark.parametrize("sizes", [[40, 2], [9, 5, 6], [300, 12, 3, 3], [25]])
def test_where_all_is_right_the_smallest_classes_say_least(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = [{"file": str(i), "label": int(label), "right": True} for i, label in enumerate(labels)]
    found = intervals([{0: {"rows": rows}}], 0)[0]["interval"]
    # Shares of right answers by which all are right in 2.5 of 100 cases: none has a lower mean, and one comes near.
    parts = np.random.default_rng(0).dirichlet(np.ones(len(sizes)), size=20_000)
    means = (0.025 ** (parts / np.array(sizes))).mean(axis=1)
    assert found[1] == 1 and found[0] <= means.min() + 1e-12 and found[0] == pytest.approx(means.min(), abs=0.01)


def test_samples_of_a_group_are_drawn_together():
    rng = np.random.default_rng(0)
    patients = np.repeat(rng.normal(size=30), 10)

    def width(group):
        rows = [{"file": str(i), "value": float(x)} | ({"group": f"p{i // 10}"} if group else {}) for i, x in enumerate(patients)]
        found = intervals([{0: {"rows": rows}}], 0)[0]
        return found["interval"][1] - found["interval"][0], found["samples"]

    (apart, many), (together, few) = width(False), width(True)
    assert (many, few) == (300, 30) and together > 2.5 * apart  # sqrt(10) = 3.2 times


# ---- sentences ---------------------------------------------------------------------------------------------------------

FULL = {"method": "full", "metric": 0.9, "checkpoint_bytes": 1_000_000}


def said(up=True, **lora):
    lora = {"method": "lora", "metric": 0.8, "checkpoint_bytes": 100_000, "samples": 100} | lora
    record = {"metric": "accuracy", "higher_is_better": up, "split": "test", "runs": [FULL, lora]}
    return claim(lora, FULL, record)


@pytest.mark.parametrize(
    ("lora", "up", "words"),
    [
        ({"difference": [-0.2, -0.05], "shared": [0, 1]}, True, "LoRA is worse than full by at least 0.050 (accuracy 0.800"),
        ({"difference": [-0.2, -0.05], "shared": [0, 1]}, False, "LoRA is better than full by at least 0.050"),
        ({"difference": [0.02, 0.3], "shared": [0, 1]}, True, "LoRA is better than full by at least 0.020"),
        ({"difference": [-0.2, 0.05], "shared": [0, 1]}, True, "No difference is shown between LoRA and full; if LoRA is worse, "
         "by at most 0.200"),
        ({"difference": [-0.2, 0.05], "shared": [0, 1]}, False, "if LoRA is worse, by at most 0.050"),
        ({"difference": [-0.2, -0.05], "shared": [0], "agreement": {"p": 0.2}}, True, "No difference is shown"),
        ({"difference": [-0.2, -0.05], "shared": [0, 1, 2]}, True, "within -0.200 to -0.050, by 3 seeds and 100 test samples)"),
        ({"difference": [-0.2, -0.05], "shared": [0]}, True, "That is one seed: another training may turn out otherwise."),
        ({"difference": [-0.2, -0.05], "shared": [None]}, True, "by 100 test samples)"),
        ({"samples": 12}, True, "LoRA and full cannot be told apart by 12 test samples (accuracy 0.800 against 0.900)."),
        ({}, True, "LoRA reaches accuracy 0.800 against 0.900 of full; how much of that is chance is not known."),
        ({}, True, "Its checkpoint has 0.10 MB against 1.00 MB (10.0x smaller)."),
    ],
)  # fmt: skip
def test_a_claim_says_what_its_interval_carries(lora, up, words):
    assert words in said(up, **lora)
    assert ("one seed" in said(up, **lora)) == (lora.get("shared") == [0])


def test_two_runs_of_one_method_are_called_by_their_names(tmp_path):
    folders = [plant(tmp_path / f"r{rank}", "lora", config__lora_r=rank) for rank in (4, 8)]
    assert compared(rows_of(folders), False, [])["claim"].startswith("No difference is shown between r8 and r4; if r8 is worse,")


def judged(title, kind, by=None, seeds=3, full=1_000_000, memory=None):
    found = {"kind": kind, "by": by, "seeds": seeds}
    taken = {"checkpoint_bytes": [100_000, full], "peak_memory_bytes": [memory, 100], "train_seconds": [None, 10.0]}
    return {"title": title, "judgement": found, "metric": "acc", "taken": taken}


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (
            [judged("a", "none", 0.1, memory=60), judged("b", "none", 0.1, full=3_200_000, memory=95)],
            "Of 2 comparisons of LoRA with full fine-tuning, no difference is shown in 2; its checkpoints are 10.0x to 32x "
            "smaller; training takes 0.60x to 0.95x the memory.",
        ),
        (
            [judged("a", "none", 0.1), judged("b", "worse", 0.02), judged("c", "better", 0.3, 1), judged("d", "few")],
            "Of 4 comparisons of LoRA with full fine-tuning, no difference is shown in 1, LoRA is worse in 1 (b by at least "
            "0.020 acc), LoRA is better in 1 (c by at least 0.300 acc) and samples are too few to judge in 1 (d); its "
            "checkpoints are 10.0x smaller; one seed only of c.",
        ),
        (
            [judged("a", "unknown", seeds=0, full=None)],
            "Of 1 comparison of LoRA with full fine-tuning, there are no samples to judge by in 1 (a).",
        ),
        (
            [judged("a", "worse", 0.02, 1, full=50_000)],
            "Of 1 comparison of LoRA with full fine-tuning, LoRA is worse in 1 (a by at least 0.020 acc); its checkpoints are "
            "2.0x larger; one seed only.",
        ),
    ],
)
def test_the_sentence_over_all_counts_what_is_shown(records, sentence):
    assert overall(records) == sentence


# ---- which runs are one row, which are alike ---------------------------------------------------------------------------


def test_seeds_are_one_row_with_their_mean_and_the_newest_of_one_seed_counts(tmp_path, capsys):
    folder = plant_task(tmp_path, methods=("full", "lora", "head"))
    plant(folder / "lora_again", "lora", 1, ended="2025-06-01T00:00:00+00:00", metrics__best={"pixel_error": 0.5, "epoch": 1})
    record = compare_task(folder)
    assert [(run["label"], run["seeds"]) for run in record["runs"]] == [
        ("full", [0, 1, 2]),
        ("lora", [0, 1, 2]),
        ("head", [0, 1, 2]),
    ]
    lora = lora_of(record)
    assert lora["metric"] == pytest.approx(np.mean([each["metric"] for each in lora["runs"]])) and lora["train_seconds"] == 51
    assert lora["runs"][1]["metric"] == 0.5 and record["left_out"] == ["lora_s1 (a newer run has this seed)"]
    assert "lora_s1 (a newer run has this seed)" in capsys.readouterr().err


def test_of_a_sweep_the_rate_with_the_most_seeds_is_shown_and_further_ranks_have_rows(tmp_path):
    folder = plant_task(tmp_path)
    for rate in (1e-3, 1e-2):
        plant(folder / f"lora_lr{rate:g}_s0", "lora", 0, config__lr=rate, ended="2025-06-01T00:00:00+00:00")
    plant(folder / "lora_r32_s0", "lora", 0, config__lora_r=32)
    record = compare_task(folder)
    assert [run["label"] for run in record["runs"]] == ["full", "lora", "lora_r32_s0"] and len(record["left_out"]) == 2
    assert lora_of(record)["seeds"] == [0, 1, 2]


def test_runs_of_before_a_setting_was_there_are_of_the_same_row(tmp_path):
    folder = plant_task(tmp_path, seeds=(0, 1))
    plant(folder / "full_s2", seed=2, config__ema_decay=0.0)
    plant(folder / "full_s3", seed=3, config__ema_decay=0.9)
    assert [run["seeds"] for run in compare_task(folder)["runs"] if run["method"] == "full"] == [[0, 1, 2], [3]]


def test_splits_that_depend_on_the_seed_are_paired_within_a_seed(tmp_path):
    folder = plant_task(tmp_path, lora={"better": -0.1})
    for seed in range(3):
        for method in ("full", "lora"):
            run = folder / f"{method}_s{seed}"
            summary, samples = (json.loads((run / name).read_text()) for name in ("summary.json", "samples.json"))
            summary["data"]["sha256"] = str(seed) * 64
            for row in samples["rows"]:
                row["file"] = f"{seed}-{row['file']}"  # no two seeds share a sample
            (run / "summary.json").write_text(json.dumps(summary))
            (run / "samples.json").write_text(json.dumps(samples))
    record = compare_task(folder)
    assert record["judgement"] | {"by": 0} == {"kind": "worse", "by": 0, "seeds": 3} and lora_of(record)["samples"] == 240
    assert record["provenance"]["splits"] == 3
    rows = rows_of([folder / "full_s0", folder / "lora_s1"])
    with pytest.raises(UserError, match="data.sha256"):
        compared(rows, False, [])
    plant(folder / "lora_s2", "lora", 2, data__sha256="e" * 64)
    with pytest.raises(UserError, match="data.sha256"):
        compared(rows_of([folder / f"{method}_s{seed}" for method in ("full", "lora") for seed in (1, 2)]), False, [])


def test_the_test_split_counts_where_every_run_has_it(tmp_path):
    folder = plant_task(tmp_path, split=("val", "test"))
    record = compare_task(folder)
    assert record["split"] == "test" and record["runs"][0]["metric"] != record["runs"][0]["metric_best"]
    assert record["before_split"] == "val" and "test samples" in record["claim"]
    (folder / "lora_s2" / "eval_test.json").unlink()
    record = compare_task(folder)
    assert record["split"] == "val" and "Not every run was scored on the test split" in " ".join(record["notes"])


def test_what_the_base_reaches_is_taken_from_the_test_split_where_it_was_scored(tmp_path):
    folder = plant_task(tmp_path, "voice_rvc", split=("val", "test"))
    path = folder / "full_s0" / "eval_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out": {"base as it is": {"dice": {"value": 0.111}}}}))
    assert (compare_task(folder)["before"], compare_task(folder)["before_split"]) == (0.111, "test")


def test_a_seed_that_one_method_lacks_is_named(tmp_path):
    folder = plant_task(tmp_path)
    plant(folder / "full_s7", "full", 7)
    record = compare_task(folder)
    assert lora_of(record)["shared"] == [0, 1, 2]
    means = [np.mean([each["metric"] for each in row["runs"][:3]]) for row in (lora_of(record), record["runs"][0])]
    assert "(pixel_error {:.3f} against {:.3f};".format(*means) in record["claim"] and means[1] != record["runs"][0]["metric"]
    assert "lora and full do not share seed 7" in " ".join(record["notes"])


# ---- the whole report --------------------------------------------------------------------------------------------------


def test_one_seeds_interval_of_few_samples_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = np.concatenate([np.ones((1, 20)), rng.multinomial(20, np.full(20, 1 / 20), size=1000)]) / 20
    means = rng.normal(0, 1, (2000, 20)) @ draws.T  # of 2000 experiments of 20 samples, whose true mean is 0
    held = [low <= 0 <= high for low, high in (interval_of_mean(own[None], 20) for own in means)]
    low, high = np.percentile(means[:, 1:], [2.5, 97.5], axis=1)
    plain = np.mean((low <= 0) & (high >= 0))
    assert plain < 0.925 < 0.94 < np.mean(held) < 0.96, (plain, np.mean(held))


BEHAVIOUR = {
    "metric": "balanced_accuracy",
    "split": "val",
    "corrupted": {
        "none": {"full": 0.9, "lora": 0.91, "difference": [-0.02, 0.03]},
        "noise": {"full": 0.8, "lora": 0.7, "difference": [-0.14, -0.06]},
    },
    "milliseconds": {"base": 3.0, "full": 3.04, "lora": 4.5, "lora_merged": 3.0},
    "device": "cpu",
    "threads": 1,
    "drift": {"full": 0.51, "lora": 0.32},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder with the files of --all, what it printed) over four tasks, one of them without LoRA, and what may lie beside."""
    runs, out = tmp_path_factory.mktemp("outputs"), tmp_path_factory.mktemp("report")
    folder = plant_task(runs, "classification", methods=("full", "lora", "head"), split=("val", "test"), samples=120)
    plant_task(runs, "pose", lora={"better": -0.1}, seeds=(0,), data__name="/home/somebody/data/faces")
    plant_task(runs, "medical_sam3d", samples=8)
    plant(runs / "clip" / "full", task="clip")
    plant(runs / "clip" / "broken", task="clip", schema_version=9)
    (folder / "compare").mkdir()
    arm = {"rates": [1e-4, 1e-3, 1e-2], "metric": [0.7, 0.9, None], "best": 1e-3, "default": 1e-4}
    (folder / "sweep.json").write_text(json.dumps({"full": arm, "lora": arm}))
    ids = run_ids([folder / "full_s0", folder / "lora_s0"])
    curve = {"metric": "balanced_accuracy", "split": "val", "ranks": [1, 2, 4], "full": [0.5, 0.8, 0.9], "lora": [0.6, 0.9, None]}
    (folder / "compare" / "rank_curve.json").write_text(json.dumps(curve | {"runs": ids}))
    (folder / "compare" / "behaviour.json").write_text(json.dumps(BEHAVIOUR | {"runs": ids}))
    Image.new("RGB", (20, 10)).save(folder / "compare" / "a.png")
    (folder / "compare" / "b.wav").write_bytes(b"RIFF")
    found = [{"file": "<script>", "what": "cat", "full": "cat 0.9", "lora": "dog 0.6", "picture": "a.png"}]
    found += [{"file": "b", "what": "x", "full": "1", "lora": "2", "audio": "b.wav"}]
    found += [{"file": "c", "what": "x", "full": "1", "lora": "2", "picture": "../full_s0/summary.json"}]
    (folder / "compare" / "disagreements.json").write_text(json.dumps({"runs": ids, "samples": found}))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **options: Image.new("L", (1, 1)).save(path))
        main(["--all", "--runs_dir", str(runs), "--output_dir", str(out), "--results", str(out / "results.md")])
    return out, printed.getvalue()


def test_the_report_over_all_tasks_opens_with_one_sentence(report):
    out, printed = report
    sentence = printed.splitlines()[0]
    assert sentence.startswith(
        "Of 3 comparisons of LoRA with full fine-tuning, no difference is shown in 1, LoRA is worse in 1 (pose by at least"
    )
    assert "too few to judge in 1 (medical_sam3d)" in sentence and sentence.endswith("one seed only of pose.")
    assert "clip on demo is not compared: no finished lora run of clip" in printed
    record = json.loads((out / "compare.json").read_text())
    assert record["sentence"] == sentence and [r["task"] for r in record["comparisons"]] == [
        "classification",
        "pose",
        "medical_sam3d",
    ]
    for name in ("compare.md", "compare.html", "results.md"):
        assert sentence in (out / name).read_text()


def test_the_page_needs_nothing_else(report):
    page = (report[0] / "compare.html").read_text()
    assert "<script" not in page and "@import" not in page and "<link" not in page and "&lt;script&gt;" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']{0,40})""", page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 7 and all(re.search(r'alt="[^"]{10,}"', image) for image in images)
    assert page.count("<audio") == 1 and page.count("data:audio/wav") == 1
    assert page.count("<table") == page.count('<div class="scroll"') and "prefers-color-scheme: dark" in page
    assert "summary.json" not in page  # what lies outside its folder is not shown


@pytest.mark.slow
def test_every_picture_is_drawn_and_shows_something(report, tmp_path):
    record = json.loads((report[0] / "compare.json").read_text())["comparisons"][0]
    for draw in (draw_sweep, draw_ranks, draw_classes, lambda record, path: draw_pareto([record] * 4, path)):
        draw(record, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as picture:
            assert min(picture.size) > 250 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_the_results_page_names_machine_and_versions_and_no_path_of_the_machine(report):
    page = (report[0] / "results.md").read_text()
    assert "torch 2.9" in page and "cpu, 2 cores" in page and "data faces (sha256 dddddddddddd)" in page
    assert "/home/" not in page and str(report[0].parent) not in page
    assert "\nNot in it: clip on demo is not compared: no finished lora run of clip below outputs" in page
    assert page.count("\n## ") == 4  # three tasks, and how to read it
    assert (report[0] / "results.png").is_file() and "(results.png)" in page


def test_the_results_page_says_each_verdict_in_a_row_and_how_to_repeat_it(report):
    page = (report[0] / "results.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "| worse by at least 0.0" in rows["pose"] and "(one seed)" in rows["pose"] and " faces " in rows["pose"]
    assert "| too few samples to tell " in rows["medical_sam3d"] and "| 0.24 MB for 1.90 MB (7.9x smaller) |" in rows["pose"]
    assert "| 3 seeds and 120 test samples" in rows["classification"] and "no difference shown" in rows["classification"]
    pose = page.split("## pose on faces")[1].split("\n## ")[0]
    assert "python train_lora.py --model demo --epochs 5 --batch_size 8\n" in pose  # its rate is the default
    assert "cd image_tasks/pose  # each with --seed 0, then eval.py --split val\n" in pose
    assert "python train.py --model demo --epochs 5 --batch_size 8 --lr 0.001\n" in pose


def test_a_note_keeps_the_last_part_of_a_path_alone():
    assert without_places("left out: /home/me/runs/a b; ~/x/y.json, 3/4 of 12 MB/s") == "left out: a b; y.json, 3/4 of 12 MB/s"


# ---- files that are not believed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics__best": {"pixel_error": float("nan")}},
        {"metrics__best": {"per_class_x": {"a": float("inf")}}},
        {"train_seconds": 1e300},
        {"checkpoint_bytes": 10**30},
        {"config__seed": "one"},
        {"environment__threads": {"many": 1}},
        {"data__name": 5},
    ],
)
def test_numbers_that_can_be_none_are_named_and_the_run_left_out(tmp_path, capsys, changes):
    folder = plant_task(tmp_path, seeds=(0,))
    plant(folder / "lora_bad", "lora", 1, **changes)
    record = compare_task(folder)
    assert [run["label"] for run in record["runs"]] == ["full_s0", "lora_s0"]
    key = next(iter(changes)).replace("__", ".")
    assert re.search(rf"left out: \S+/lora_bad/summary.json is damaged: its {key}", capsys.readouterr().err)


@pytest.mark.parametrize(
    "row", [{"value": float("nan")}, {"value": 1.0, "weight": -1}, {"value": "x"}, {"value": 1e300}, {"label": []}]
)
def test_samples_that_can_be_none_are_named(tmp_path, row):
    plant(tmp_path)
    samples = json.loads((tmp_path / "samples.json").read_text())
    samples["rows"][3] = {"file": "bad" * 1000, **row}
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match="samples.json is damaged") as fault:
        read_samples(tmp_path, "pixel_error")
    assert len(str(fault.value)) < 400


def test_one_task_with_a_damaged_file_does_not_cost_the_others(tmp_path):
    (plant_task(tmp_path, "pose") / "lora_s1" / "samples.json").write_text("{")
    plant_task(tmp_path, "clip")
    records, notes = compare_all([tmp_path], force=False)
    assert [r["task"] for r in records] == ["clip"] and "pose on demo is not compared" in notes[0] and "samples.json" in notes[0]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"full": {"rates": [0], "metric": [1]}}', '{"full": {"rates": [1, 2], "metric": [1]}}']
)
def test_what_other_scripts_left_damaged_is_left_out_by_name(tmp_path, capsys, text):
    folder = plant_task(tmp_path, seeds=(0,))
    (folder / "sweep.json").write_text(text)
    assert compare_task(folder)["sweep"] is None and "sweep.json" in capsys.readouterr().err


def test_two_data_sets_of_a_task_are_two_comparisons(tmp_path):
    plant_task(tmp_path / "a")
    plant_task(tmp_path / "b", data__name="/somewhere/faces", data__sha256="e" * 64)
    records, _ = compare_all([tmp_path / "a", tmp_path / "b"], force=False)
    assert [r["title"] for r in records] == ["pose on demo", "pose on faces"]


def test_train_asks_for_what_is_missing_before_it_compares(tmp_path, monkeypatch, capsys):
    asked = []

    def train_missing(tasks, seeds, runs_dir, **options):
        asked.append((tasks, seeds, options))
        plant_task(tmp_path, *tasks, seeds=seeds)

    monkeypatch.setattr("run_all.train_missing", train_missing)
    flags = ["--task", "pose", "--runs_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    main([*flags, "--train", "--seeds", "3,4", "--data_dir", f"pose={tmp_path}", "--sweep_lr"])
    assert asked == [(["pose"], [3, 4], {"data_dirs": {"pose": str(tmp_path)}, "sweep_lr": True})]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["runs"][0]["seeds"] == [3, 4]
    for wrong in ([*flags, "--sweep_lr"], ["--train"], [*flags, "--train", "--seeds", "x"], [*flags, "--results", "a.md"]):
        with pytest.raises(UserError):
            main(wrong)
    assert len(asked) == 1


def test_look_makes_what_is_missing_of_one_seed_that_both_have(tmp_path, monkeypatch):
    folder = plant_task(tmp_path, seeds=(1, 2))
    plant(folder / "full_s0", seed=0)
    made, curve = [], {"metric": "pixel_error", "split": "val", "ranks": [1, 2], "full": [2, 1], "lora": [2, 1]}

    def disagreements(full, lora, place):
        made.append((full.name, lora.name, place))
        if len(made) == 1:
            place.mkdir()
            raise UserError("no data")
        found = [{"file": "a", "what": "b", "full": "1", "lora": "2"}] if len(made) == 2 else []
        write_json(place / "disagreements.json", {"runs": run_ids([full, lora]), "samples": found})

    def leave(name, content):
        return lambda full, lora, place: write_json(place / f"{name}.json", content | {"runs": run_ids([full, lora])})

    monkeypatch.setattr("disagreements.disagreements", disagreements)
    monkeypatch.setattr("rank_curve.rank_curve", leave("rank_curve", curve))
    monkeypatch.setattr("behaviour.behaviour", leave("behaviour", BEHAVIOUR))
    flags = ["--task", "pose", "--runs_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--look"]
    records = []
    for _ in range(3):
        main(flags)
        records.append(json.loads((tmp_path / "out" / "compare.json").read_text()))
    assert made == [("full_s1", "lora_s1", folder / "compare")] * 2  # the third time it is there
    assert "Not made, disagreements: no data." in records[0]["notes"]
    assert records[1]["disagreements"] == records[2]["disagreements"] != []
    assert all(record["rank_curve"] == curve for record in records) and records[0]["behaviour"]["drift"] == BEHAVIOUR["drift"]
    write_json(folder / "compare" / "rank_curve.json", curve | {"runs": {"full_s1": "", "lora_r32": ""}})
    main(flags)
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["rank_curve"] is None and any("rank_curve.json is of other runs" in note for note in record["notes"])


def test_what_was_made_of_weights_that_are_there_no_more_is_left_out_and_made_anew(tmp_path, monkeypatch, capsys):
    folder = plant_task(tmp_path, seeds=(0,))
    best, place = folder / "lora_s0" / "checkpoints" / "best", folder / "compare" / "behaviour.json"
    best.mkdir(parents=True), place.parent.mkdir()
    write_json(best / "manifest.json", {"adapter_model.safetensors": {"bytes": 1, "sha256": "a"}, "README.md": {"sha256": "b"}})
    write_json(place, BEHAVIOUR | {"runs": run_ids([folder / "full_s0", folder / "lora_s0"])})
    assert compare_task(folder)["behaviour"]["drift"] == BEHAVIOUR["drift"]
    write_json(best / "manifest.json", {"adapter_model.safetensors": {"bytes": 1, "sha256": "a"}, "README.md": {"sha256": "c"}})
    assert compare_task(folder)["behaviour"]  # the model card is no weight
    write_json(best / "manifest.json", {"adapter_model.safetensors": {"bytes": 1, "sha256": "d"}})
    record = compare_task(folder)
    assert record["behaviour"] is None and "behaviour.json; --look makes it anew" in record["notes"][-1]
    write_json(place.with_name("disagreements.json"), {"runs": dict.fromkeys(("full_s0", "lora_s0"), "of before"), "samples": []})
    record = compare_task(folder)
    assert "disagreements.json, behaviour.json; --look makes it anew" in record["notes"][-1]

    def behaviour(full, lora, place):
        write_json(place / "behaviour.json", BEHAVIOUR | {"drift": {"full": 1.5, "lora": 2.5}, "runs": run_ids([full, lora])})

    monkeypatch.setattr("behaviour.behaviour", behaviour)
    for name in ("disagreements", "rank_curve"):
        monkeypatch.setattr(f"{name}.{name}", lambda *_: None)
    record = look_closer(record)
    assert record["behaviour"]["drift"] == {"full": 1.5, "lora": 2.5} and not any("anew" in note for note in record["notes"])
    assert "behaviour.json is of weights that are there no more: it is made anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        {"milliseconds": {**BEHAVIOUR["milliseconds"], "base": None}},
        {"corrupted": {"none": {"full": 0.9, "lora": 0.91, "difference": [0.1]}}},
        {"corrupted": {"none": {"full": 0.9, "lora": 0.91, "difference": [None, 0.1]}}},
        {"corrupted": {"none": {"full": 0.9, "lora": 0.91, "difference": "ab"}}},
        {"drift": {"full": 0.5}},
    ],
)
def test_a_behaviour_that_nobody_measured_is_left_out_by_name(tmp_path, capsys, damage):
    folder = plant_task(tmp_path, seeds=(0,))
    (folder / "compare").mkdir()
    ids = run_ids([folder / "full_s0", folder / "lora_s0"])
    (folder / "compare" / "behaviour.json").write_text(json.dumps(BEHAVIOUR | damage | {"runs": ids}))
    assert compare_task(folder)["behaviour"] is None and "behaviour.json is damaged" in capsys.readouterr().err


def test_the_pages_say_how_the_two_behave(report):
    text, page = ((report[0] / name).read_text() for name in ("results.md", "compare.html"))
    lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|"))
    rows = {name: cells for name, *cells in lines}
    assert rows["noise"] == ["0.800", "0.700", "-0.140 to -0.060"] and rows["LoRA beside its base"] == ["4.5", "0.320"]
    assert (
        "Under corrupted inputs" in page
        and "Under corrupted inputs:" in text
        and "-0.140 to -0.060" in page
        and "1: 0.500, 2: 0.800, 4: 0.900" in text
    )
