"""Distances between masks and meshes, against what can be worked out by hand; what becomes of organs that are missed."""

import csv
import json
import time
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import MEDICAL, use_task
from trimesh.creation import box, icosphere

TASK = MEDICAL
use_task(MEDICAL)
import metrics as metrics_module  # noqa: E402
from common.batches import EvalBatches, build_loader  # noqa: E402
from common.plots import figure  # noqa: E402
from data import collate  # noqa: E402
from decoder import Cubes  # noqa: E402
from distance import signed_distance  # noqa: E402
from mesh_page import CaseViews, View, simplified, write_page  # noqa: E402
from meshes import Mesh, mask_to_mesh  # noqa: E402
from metrics import evaluate, measure, organ_metrics, predict, save_samples  # noqa: E402
from observe import observe  # noqa: E402
from organs import Organ  # noqa: E402
from pages import PLANES, Shown, draw_plane, worst_median_best  # noqa: E402
from processor import OrganProcessor  # noqa: E402
from reconstruct import reconstruct  # noqa: E402
from scores_report import leave_results, page_rows, view_of, write_csv, write_report  # noqa: E402
from surface_scores import (  # noqa: E402
    distance_scores,
    file_scores,
    looked_up,
    mask_scores,
    mesh_scores,
    one_grid,
    signed_distances,
    summary_of,
)
from systems import (  # noqa: E402
    FILLED,
    FLOOR,
    INPUT,
    UNTRAINED,
    Answer,
    differences,
    interval_of,
    mean_of_organs,
    score_systems,
    system_scores,
)

SPACING = np.array([0.5, 1.5, 4.0])
AFFINE = np.diag([*SPACING, 1.0])


def block(first, last, shape=(40, 30, 16)):
    """A mask (X, Y, Z) of the voxels from first up to last."""
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, first, last))] = True
    return mask


def ball(radius, centre, spacing=1.0, side=32.0):
    """A ball (mm) in a cube of `side` mm that is centred at 0."""
    n = round(side / spacing)
    points = (np.indices((n, n, n)) + 0.5) * spacing - side / 2
    return ((points - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2


TRUTH = block((10, 8, 4), (30, 20, 12))  # 20 x 12 x 8 voxels


def test_a_shift_is_measured_in_millimetres_along_each_axis():
    for axis, (steps, spacing) in enumerate(zip((3, 2, 1), SPACING, strict=True)):
        scores = mask_scores(np.roll(TRUTH, steps, axis), TRUTH, AFFINE)
        shared = 1 - steps / (20, 12, 8)[axis]
        assert scores["dice"] == pytest.approx(shared) and scores["iou"] == pytest.approx(shared / (2 - shared))
        assert scores["hd"] == pytest.approx(steps * spacing) == scores["hd95"]
        assert scores["volume_error"] == 0 and scores["truth_ml"] == pytest.approx(20 * 12 * 8 * 3 / 1000)


def test_two_balls_two_millimetres_apart():
    for spacing in (0.5, 1.0):
        affine = np.diag([spacing] * 3 + [1])
        assert mask_scores(ball(10, (0, 0, 0), spacing), ball(10, (2, 0, 0), spacing), affine)["hd"] == pytest.approx(2, abs=0.1)


def test_volume_error_has_a_sign_and_surfaces_are_compared_with_surfaces():
    larger, hollow = block((8, 8, 4), (32, 20, 12)), TRUTH & ~block((14, 11, 6), (26, 17, 10))
    assert mask_scores(larger, TRUTH, AFFINE)["volume_error"] == pytest.approx(0.2)
    assert mask_scores(TRUTH, larger, AFFINE)["volume_error"] == pytest.approx(-1 / 6)
    # The hole lies inside the truth, where a distance to the whole mask would be 0; its floor is one slice above the surface.
    assert mask_scores(hollow, TRUTH, AFFINE)["hd"] == pytest.approx(4.0)


def test_hd95_is_the_greater_directed_percentile_and_assd_the_mean_of_all_distances():
    to_truth, to_pred = np.array([0.0] * 9 + [10.0]), np.zeros(190)
    scores = distance_scores(to_truth, to_pred)
    assert scores["hd95"] == pytest.approx(np.percentile(to_truth, 95)) == pytest.approx(5.5)
    assert np.percentile(np.concatenate([to_truth, to_pred]), 95) == 0, "pooled, the miss would not show"
    assert scores["assd"] == pytest.approx(10 / 200) and scores["hd"] == 10 and scores["nsd"] == pytest.approx(199 / 200)


def test_nsd_counts_what_is_within_the_tolerance_of_both_surfaces():
    shifted = np.roll(TRUTH, 1, 2)  # 4 mm along z: the two faces across z, but for their rims, and nothing else
    n, rims = 20 * 12 * 8 - 18 * 10 * 6, 20 * 12 * 2
    scores = [mask_scores(shifted, TRUTH, AFFINE, tolerance)["nsd"] for tolerance in (0.4, 3.9, 4.0)]
    assert scores[2] == 1
    assert scores[0] < scores[1] < 1 and 1 - scores[1] <= rims / n


def test_an_organ_that_is_missed_is_never_left_out():
    nothing = np.zeros_like(TRUTH)
    pairs = (nothing, TRUTH), (TRUTH, nothing), (nothing, nothing)
    missed, ghost, neither = (mask_scores(*pair, AFFINE) for pair in pairs)
    assert missed["dice"] == missed["nsd"] == 0 and missed["hd95"] == missed["assd"] == np.inf and missed["volume_error"] == -1
    assert ghost["dice"] == 0 and ghost["hd"] == np.inf and not ghost["truth_ml"]
    assert neither["dice"] is neither["hd95"] is neither["volume_error"] is None
    summary = summary_of([each["hd95"] for each in (missed, neither, mask_scores(TRUTH, TRUTH, AFFINE))])
    assert summary == {"n": 2, "mean": None, "median": None, "infinite": 1, "mean_finite": 0.0}
    assert summary_of([1.0, 3.0, np.inf])["median"] == 3.0
    json.dumps(summary, allow_nan=False)


def test_masks_are_compared_where_they_lie_in_the_world():
    affine = np.array([[-0.8, 0, 0, 40], [0, 0, 2.0, -7], [0, 1.2, 0, 3], [0, 0, 0, 1]])  # L S A: turned and flipped
    truth = block((6, 4, 3), (26, 12, 9), (40, 24, 14))
    stored = np.ascontiguousarray(truth.transpose(0, 2, 1)[::-1])  # R A S
    ras = np.array([[0.8, 0, 0, 40 - 0.8 * 39], [0, 2.0, 0, -7], [0, 0, 1.2, 3], [0, 0, 0, 1]])
    scores = mask_scores(*one_grid(stored, ras, truth, affine))
    assert scores["dice"] == 1 and scores["hd"] == 0
    part, moved = stored[10:36], ras.copy()  # cropped, and the file says so
    moved[:3, 3] += ras[:3, 0] * 10
    assert mask_scores(*one_grid(part, moved, truth, affine))["dice"] == 1
    # What lies beyond the truth's own grid counts against a prediction, too.
    far = ras.copy()
    far[2, 3] += 12.0
    scores = mask_scores(*one_grid(stored, far, truth[:, :13, :], affine))
    assert scores["hd"] == pytest.approx(12.0) and scores["pred_ml"] == pytest.approx(scores["truth_ml"])


def test_mask_files_are_compared_label_by_label_in_world_space(tmp_path):
    labels = np.zeros((40, 30, 16), np.uint8)
    labels[10:30, 8:20, 4:12], labels[2:8, 2:8, 2:8] = 1, 3
    moved = np.where(labels == 3, 0, labels)
    moved[np.roll(labels == 3, 1, axis=2)] = 3
    lps = AFFINE @ np.array([[-1, 0, 0, 39], [0, -1, 0, 29], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.Nifti1Image(labels, AFFINE).to_filename(tmp_path / "truth.nii.gz")
    nibabel.Nifti1Image(np.ascontiguousarray(moved[::-1, ::-1]), lps).to_filename(tmp_path / "pred.nii.gz")
    scores = file_scores(tmp_path / "pred.nii.gz", tmp_path / "truth.nii.gz")
    assert scores.keys() == {1, 3} and scores[1]["dice"] == 1 and scores[1]["hd"] == 0
    assert scores[3]["hd"] == pytest.approx(4.0) and scores[3]["dice"] == pytest.approx(5 / 6)


def test_on_another_grid_each_voxel_is_that_of_its_centre():
    fine = ball(10, (0, 0, 0), 0.5)
    halves, wholes = np.diag([0.5] * 3 + [1]), np.eye(4)
    wholes[:3, 3] = 0.25
    coarse = looked_up(fine, halves, (32, 32, 32), wholes)
    assert coarse.sum() == pytest.approx(4 / 3 * np.pi * 1000, rel=0.02)


def test_chamfer_is_the_plain_mean_distance_of_surfaces():
    inner, outer = icosphere(subdivisions=4, radius=10), icosphere(subdivisions=4, radius=12)
    assert mesh_scores(inner, outer)["chamfer_mm"] == pytest.approx(2.0, abs=0.02)
    assert mesh_scores(inner, inner)["chamfer_mm"] < 1e-6, "points are compared with the surface, not with other points"
    slab = box((40, 40, 2))  # twelve large triangles, whose middles are far from most of their points
    near = box((40, 40, 2))
    near.apply_translation((0, 0, 0.5))
    assert mesh_scores(near, slab)["chamfer_mm"] == pytest.approx(0.5, abs=0.05)
    empty = SimpleNamespace(vertices=np.zeros((0, 3)), faces=np.zeros((0, 3), int))
    assert mesh_scores(empty, slab)["chamfer_mm"] == np.inf and mesh_scores(empty, empty)["chamfer_mm"] is None


def test_two_hundred_thousand_surface_voxels_take_seconds():
    side = 185  # a plane's worth of boundary voxels on each of six sides: 205,000
    mask = np.zeros((side + 6,) * 3, bool)
    mask[2:-4, 2:-4, 2:-4] = True
    began = time.process_time()
    assert mask_scores(np.roll(mask, 1, 0), mask, np.eye(4))["hd"] == 1
    assert time.process_time() - began < 10


# ---- a model on organs -----------------------------------------------------------------------------------------------

TILTED = np.array([[-1.4, 0.3, 0, 30], [0.28, 1.5, 0, -8], [0, 0, 2.0, 12], [0, 0, 0, 1]])  # turned about z, x to the left


class ToyOrgans:
    """Ellipsoids on a tilted grid, as data.OrganData has organs: two of each patient, a liver and a spleen."""

    processor = OrganProcessor(resolution=8, every=4)

    def __init__(self, count=4):
        names = [(f"s<b>{i // 2}", ("spleen", "liver")[i % 2]) for i in range(count)]
        self.items = [SimpleNamespace(name=f"{c}/{o}", case=c, organ=o, patient=f"patient {c}") for c, o in names]

    def __len__(self):
        return len(self.items)

    def organ(self, index):
        half = np.random.default_rng(index).uniform(9, 15, 3)
        points = np.moveaxis(np.indices((30, 28, 24)), 0, -1) - (14.5, 13.5, 11.5)
        mask = (((points * (1.4, 1.5, 2.0)) / half) ** 2).sum(-1) <= 1
        return Organ(mask, signed_distance(mask, np.linalg.norm(TILTED[:3, :3], axis=0)), None, TILTED, 2, [])

    def observed(self, index):
        return observe(self.organ(index), 4, index % 4)

    def __getitem__(self, key):
        index, organ = key[1], self.organ(key[1])
        sample = self.processor.sample(organ, self.observed(index))
        to_voxel = torch.from_numpy(sample.frame.to_voxel(organ.affine)).float()
        tensors = {"coords": sample.coords, "inputs": sample.inputs, "truth": organ.sdf}
        tensors = {key: torch.from_numpy(value) for key, value in tensors.items()}
        return {**tensors, "to_voxel": to_voxel, "edge": sample.frame.edge, "index": index}


class ToyModel(torch.nn.Module):
    """Says of each corner of a cell's cubes what was observed at the cell's middle, plus `added` cells: a rough surface."""

    def __init__(self, added=0.0):
        super().__init__()
        self.added = torch.nn.Parameter(torch.tensor(added))
        self.new_layers = []

    def forward(self, coords, inputs):
        steps = torch.cartesian_prod(*[torch.arange(4)] * 3).int()
        cubes = torch.cat([coords[:, :1].repeat_interleave(64, 0), (4 * coords[:, None, 1:] + steps).reshape(-1, 3)], 1)
        features = torch.zeros(len(cubes), 101)
        features[:, :8] = ((inputs.view(len(coords), 64) + self.added) / 8).view(-1, 1) + 1 / 32  # a decoder's bias is -1 / 4R
        return Cubes(cubes, features, 32)


def loader_of(data, batch_size=2, rank=0, world=1):
    return build_loader(data, EvalBatches([0] * len(data), batch_size, rank, world), collate)


@pytest.fixture(scope="module")
def organs():
    return ToyOrgans()


@pytest.fixture(scope="module")
def found(organs):
    """What predict gives of a model, all organs in one batch."""
    return predict(ToyModel(), loader_of(organs, 4))


@pytest.fixture(scope="module")
def rows(organs):
    return score_systems({UNTRAINED: ToyModel(0.5), "LoRA": ToyModel()}, loader_of(organs), 2.0)


def test_what_a_model_makes_lies_where_the_organ_is(organs, found):
    metrics = organ_metrics(organs, found)
    assert metrics["dice"] > 0.8 and metrics["assd"] < 2.0 and metrics["failed"] == 0 < metrics["val_loss"] < 1
    assert metrics["dice"] == pytest.approx(np.mean(list(metrics["per_organ_dice"].values())))


def test_no_number_depends_on_batches_or_processes(organs, found, monkeypatch):
    first, second = (predict(ToyModel(), loader_of(organs, 3, rank, 2)) for rank in (0, 1))
    assert [len(first), len(second)] == [3, 1], "a batch of three in one process, of one in the other"
    monkeypatch.setattr(metrics_module, "gather_lists", lambda own: [*second, *first, *own])
    assert evaluate(ToyModel(), loader_of(organs, 3, 1, 2)) == organ_metrics(organs, found)


def test_it_is_the_mesh_that_inference_makes(organs):
    measured = next(measure(ToyModel(), loader_of(organs, 1), organs))["mesh"]
    sample = organs.processor.sample(organs.organ(0), organs.observed(0))
    (mesh,) = reconstruct(ToyModel(), organs.processor, [sample])
    assert np.array_equal(mesh.faces, measured.faces) and np.abs(mesh.vertices - measured.vertices).max() < 1e-4


def test_missing_more_organs_never_improves_a_score(organs, found):
    missed = predict(ToyModel(added=5.0), loader_of(organs))  # all of it is outside
    assert all(item["dice"] == 0 and item["hd95"] == np.inf for item in missed)
    best, some = organ_metrics(organs, found), organ_metrics(organs, [*found[:3], missed[3]])
    assert (best["failed"], some["failed"], organ_metrics(organs, missed)["failed"]) == (0, 1, 4)
    assert some["dice"] == pytest.approx(np.mean([item["dice"] for item in found[:3]] + [0]))
    assert some["nsd"] < best["nsd"] and some["hd95"] == some["assd"] == np.inf


def test_a_patient_is_one_sample_however_many_organs(organs, found, tmp_path):
    save_samples(organs, found, tmp_path / "samples.json")
    record = json.loads((tmp_path / "samples.json").read_text())
    assert (record["metric"], record["higher_is_better"]) == ("dice", True)
    assert [(row["file"], row["weight"]) for row in record["rows"]] == [("patient s<b>0", 2), ("patient s<b>1", 2)]
    assert record["rows"][1]["value"] == pytest.approx((found[2]["dice"] + found[3]["dice"]) / 2)


# ---- beside others ---------------------------------------------------------------------------------------------------


def test_all_systems_answer_for_the_same_organs(rows):
    scores = system_scores(rows)
    assert list(scores) == [FLOOR, INPUT, FILLED, UNTRAINED, "LoRA"] and {each["dice"]["n"] for each in scores.values()} == {4}
    assert scores[FLOOR]["dice"]["mean"] > 0.99 and scores[FLOOR]["chamfer_mm"]["mean"] < 0.01
    assert scores[FILLED]["dice"]["mean"] > scores[INPUT]["dice"]["mean"], "interpolation betters the slices that it is made of"
    assert scores["LoRA"]["dice"]["mean"] > scores[UNTRAINED]["dice"]["mean"]
    assert scores[UNTRAINED]["volume_error"]["mean"] < scores["LoRA"]["volume_error"]["mean"], (
        "whose surface lies half a cell inside"
    )


def test_the_report_says_all_and_names_nothing_wrong(rows, organs, tmp_path):
    about = {"data": "a <script>", "split": "val", "organs": 4, "patients": 2, "every": 4, "base": {"name": "demo"}}
    systems = {UNTRAINED: ToyModel(0.5), "LoRA": ToyModel()}
    config = SimpleNamespace(tolerance=2.0, checkpoint="best")
    leave_results(tmp_path, config, about, rows, "LoRA", loader_of(organs), systems)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "results.csv", "scores.png", "planes.png", "page.html"}
    report, page = ((tmp_path / name).read_text() for name in ("report.md", "page.html"))
    assert "too few patients to say" in report and "within 2 mm" in report and "Mean of the 2 organs' means" in report
    for text in (report, page):
        assert "<b>0" not in text and "a <script>" not in text
        assert "paired" in text and "(95 %" not in text, "of two patients there is no interval, and none is announced"
    assert "://" not in page and "default-src 'none'" in page, "nothing comes from elsewhere"
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 5 and {row["system"] for row in table} == {row["system"] for row in rows}
    assert float(table[0]["hd95_mm"]) == pytest.approx(rows[0]["hd95"], rel=1e-5)
    assert float(table[1]["volume_error_percent"]) == pytest.approx(100 * rows[1]["volume_error"], rel=1e-5)


def test_a_model_that_misses_everything_is_reported_as_such(tmp_path):
    organs = ToyOrgans(1)
    rows = score_systems({"LoRA": ToyModel(added=5.0)}, loader_of(organs), 1.0)
    write_report(tmp_path / "report.md", "toy", [], rows, "LoRA", SimpleNamespace(tolerance=1.0))
    report = (tmp_path / "report.md").read_text()
    assert "| LoRA | 1 | 1 | 0.000 |" in report and "inf (1 missed)" in report
    assert "| LoRA | missed | s&lt;b>0/spleen |" in report
    nothing = Mesh(np.zeros((0, 3)), np.zeros((0, 3), int))
    truth = mask_to_mesh(organs.organ(0).mask, TILTED)
    shown = ((FLOOR, truth, rows[0]), ("LoRA", nothing, rows[-1]))
    views = [view_of(name, Answer(None, mesh), row, organs.organ(0)) for name, mesh, row in shown]
    write_page(tmp_path / "page.html", "toy", [], [CaseViews("only", views)], {}, {})
    assert "missed: no surface" in (tmp_path / "page.html").read_text()


def test_a_table_holds_what_was_missed(rows, tmp_path):
    missed = rows[0] | {"hd95": np.inf, "dice": 0.0, "outcome": "missed", "chamfer_mm": None}
    write_csv(tmp_path / "results.csv", [missed])
    with open(tmp_path / "results.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["outcome"], row["hd95_mm"], row["chamfer_mm"]) == ("missed", "inf", "")


def made_rows(values: dict[str, list], per_patient=1):
    """Rows of systems with these Dice values and HD95 of ten times what is missing to 1; infinite where Dice is 0."""
    found = []
    for system, dices in values.items():
        for i, dice in enumerate(dices):
            place = {"index": i, "case": f"c{i}", "organ": "liver", "patient": f"p{i // per_patient}", "system": system}
            scores = dict.fromkeys(("iou", "assd", "nsd", "chamfer_mm", "volume_error"), 0.5)
            hd95 = 10 * (1 - dice) if dice else np.inf
            found.append({**place, "outcome": "found" if dice else "missed", **scores, "dice": dice, "hd95": hd95})
    return found


def test_a_difference_is_claimed_only_where_its_interval_carries_it():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.5, 0.9, 12)  # what is hard is hard for both
    made = made_rows({"other": hard, "same": hard + rng.normal(0, 0.01, 12), "worse": hard - 0.03, "own": hard + 0.02})
    says = {(each["to"], each["metric"]): each for each in differences(made, "own")}
    assert says["other", "dice"]["says"] == "better" and says["other", "dice"]["mean"] == pytest.approx(0.02)
    assert says["other", "hd95"]["says"] == "better" and says["other", "hd95"]["mean"] == pytest.approx(-0.2)
    assert says["other", "nsd"]["says"] == "no difference shown"
    assert {each["says"] for each in differences(made, "worse") if each["to"] == "own" and each["metric"] == "dice"} == {"worse"}
    few = made_rows({"other": hard[:8], "own": hard[:8] + 0.02}, per_patient=2)
    assert {each["says"] for each in differences(few, "own")} == {"too few patients to say"}
    missed = made_rows({"other": hard, "own": [0.0, *hard[1:]]})
    says = {each["metric"]: each for each in differences(missed, "own")}
    assert says["hd95"]["mean"] is None and says["hd95"]["says"].startswith("an organ is missed")
    assert says["dice"]["mean"] == pytest.approx(-hard[0] / 12), "and in Dice it counts as 0"
    assert system_scores(missed)["own"]["missed"] == ["c0/liver"]


def test_organs_of_a_patient_are_drawn_together():
    values, patients = np.repeat(np.linspace(0.5, 0.9, 6), 10), np.repeat(np.arange(6), 10)
    together, apart = interval_of(values, patients), interval_of(values, np.arange(60))
    assert together[1] - together[0] > 2.5 * (apart[1] - apart[0])
    assert interval_of(values[:40], patients[:40]) is None, "four patients are too few, however many organs"


def test_an_interval_of_few_patients_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = [rng.normal(0, 1, 6) for _ in range(400)]
    held = [low <= 0 <= high for low, high in (interval_of(values, range(6)) for values in samples)]
    assert np.mean(held) > 0.91, "the plain percentiles of so few hold it in 87 of 100"


def test_a_rare_organ_counts_as_much_as_others_in_the_mean_of_means(rows):
    organs = {"liver": system_scores(made_rows({"own": [0.9] * 9})), "rib": system_scores(made_rows({"own": [0.5]}))}
    assert mean_of_organs(organs, "own", "dice") == pytest.approx(0.7)


# ---- pictures and the page -------------------------------------------------------------------------------------------


def test_the_patients_right_is_on_the_left_of_the_picture():
    mask = block((28, 10, 4), (34, 20, 12))  # far to the right
    organ = Organ(mask, None, np.random.default_rng(0).random(mask.shape), AFFINE, 2, [])
    page, ((axis,),) = figure()
    draw_plane(axis, Shown("", organ, {"same": mask}), PLANES[0], 8)
    page.canvas.draw()
    outline = axis.transAxes.inverted().transform(axis.transData.transform(axis.collections[0].get_paths()[0].vertices))
    assert outline[:, 0].max() < 0.5
    assert [text.get_text() for text in axis.texts] == ["R", "L", "A", "P"]
    box = axis.get_window_extent()
    assert box.width / box.height == pytest.approx(40 * 0.5 / (30 * 1.5), rel=0.02), "voxels have their true shape"


def test_the_worst_the_middle_and_the_best_are_shown():
    assert list(worst_median_best([{"dice": 0.5}])) == ["median"] and worst_median_best([{"dice": None}]) == {}
    many = [{"dice": dice} for dice in np.linspace(1, 0, 41)]
    shown = [row["dice"] for row in page_rows(many)]
    assert len(shown) == 12 and shown == sorted(shown) and {0.0, 0.5, 1.0} <= set(shown)


def test_a_mesh_on_the_page_is_smaller_and_at_the_same_place():
    ball_mesh = icosphere(subdivisions=5, radius=20)
    mesh, values = simplified(Mesh(ball_mesh.vertices + 7, ball_mesh.faces), ball_mesh.vertices[:, 2], 1500)
    assert 700 < len(mesh.vertices) <= 1500 and mesh.volume == pytest.approx(ball_mesh.volume, rel=0.03)
    assert np.abs(values - (mesh.vertices[:, 2] - 7)).max() < 1e-6, "colours go with their places"


def test_distances_on_the_page_are_positive_outside(organs):
    organ = organs.organ(0)
    middle = organ.affine @ (14.5, 13.5, 11.5, 1)
    assert signed_distances(middle[None, :3], organ)[0] < -5 and signed_distances(organ.affine[None, :3, 3], organ)[0] > 5


def test_a_page_of_many_large_meshes_stays_small(tmp_path):
    large = icosphere(subdivisions=5, radius=30)
    mesh = Mesh(large.vertices, large.faces)
    views = [View(name, "", mesh, None if i == 0 else np.full(len(mesh.vertices), 1.5)) for i, name in enumerate("abcde")]
    write_page(tmp_path / "page.html", "all", [], [CaseViews(f"c{i}", views) for i in range(12)], {}, {})
    assert (tmp_path / "page.html").stat().st_size < 4_000_000
    assert "+2 mm" in (tmp_path / "page.html").read_text()
