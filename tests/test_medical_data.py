"""Organs as the model gets them: what thick slices show, the cube and its cells on any grid of voxels, latents of others."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import MEDICAL, use_task

from common.batches import EpochBatches
from common.config import UserError
from common.samples import BadFile, Faults

TASK = MEDICAL
use_task(TASK)

from data import OrganData, as_item, build_loaders, collate, find_organs, load_for_eval, split_items  # noqa: E402
from decoder import DecoderConfig, SLatMeshDecoder  # noqa: E402
from distance import signed_distance  # noqa: E402
from latents import OFFICIAL_MEAN, OFFICIAL_STD, LatentEncoder, Latents, find_latents, optimise_latents, read_latents  # noqa: E402
from model import OrganMesher, load_base  # noqa: E402
from observe import fill, kept_slices, observe, spacing_of  # noqa: E402
from organs import Organ  # noqa: E402
from prepared import Item, prepared_folder  # noqa: E402
from processor import Frame, OrganProcessor, augmented, look_up, surface_points  # noqa: E402
from systems import load_untrained  # noqa: E402

BALLS = (((0, 0, 0), 20), ((16, 0, 0), 11), ((0, 15, 0), 9), ((2, 0, 16), 7))  # centre and radius in mm: no two sides are alike
PLACE = np.array([12, -8.5, 30])  # of their middle, in the world


def tripod(points: np.ndarray) -> np.ndarray:
    """Distance in mm of points (..., 3) to the union of BALLS, negative inside."""
    return np.min([np.linalg.norm(points - PLACE - centre, axis=-1) - radius for centre, radius in BALLS], axis=0)


def drawn(shape=tripod, spacing=(1, 1, 1), turn=None, middle=PLACE, reach=34.0, thick_axis=2) -> Organ:
    """An organ drawn on a grid around `middle`; turn (3, 3): the axes of the grid as columns, mirrored or not."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) * spacing
    size = [int(2 * reach / edge) for edge in spacing]
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    mask = shape(grid @ affine[:3, :3].T + affine[:3, 3]) < 0
    return Organ(mask, signed_distance(mask, spacing), None, affine, thick_axis, [])


def small_decoder() -> SLatMeshDecoder:
    return SLatMeshDecoder(DecoderConfig(resolution=8, model_channels=16, num_blocks=1, num_heads=1, num_groups=2))


@pytest.fixture(scope="module")
def organ():
    return drawn()


# ---- thick slices ----------------------------------------------------------------------------------------------------


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_every_slice_shows_the_organ_as_it_is(organ):
    seen = observe(organ, every=1)
    assert (seen.filled == organ.mask).all() and seen.sdf is organ.sdf


def test_thick_slices_are_seen_through_the_kept_ones_alone(organ):
    seen = observe(organ, every=5, phase=2)
    assert np.diff(seen.kept).tolist() == [5] * (len(seen.kept) - 1)
    held = np.flatnonzero(organ.mask.any((0, 1)))
    assert 2 in seen.kept - held[0]
    changed = organ.mask.copy()
    hidden = [z for z in range(held[0] + 1, held[-1]) if z not in seen.kept]
    changed[..., hidden] = ~changed[..., hidden]  # a truth that would look quite other, with the same ends
    again = observe(organ._replace(mask=changed), every=5, phase=2)
    assert all((getattr(again, part) == getattr(seen, part)).all() for part in ("mask", "filled", "sdf", "kept"))


def test_interpolation_is_nearer_to_the_truth_than_the_slices_and_ends_half_way_to_the_next(organ):
    held = np.flatnonzero(organ.mask.any((0, 1)))
    for phase in (0, 3):
        seen = observe(organ, every=5, phase=phase)
        assert dice(seen.filled, organ.mask) > dice(seen.mask, organ.mask) + 0.01
        drawn_on = seen.kept[(seen.kept >= held[0]) & (seen.kept <= held[-1])]
        for part in (seen.mask, seen.filled):
            ends = np.flatnonzero(part.any((0, 1)))[[0, -1]]
            assert (np.abs(ends - drawn_on[[0, -1]]) <= 2.5).all()
        kept = np.zeros(organ.mask.shape[2], bool)
        kept[seen.kept] = True
        assert (seen.filled[..., kept] == organ.mask[..., kept]).all()


def test_a_cone_between_two_slices_is_found_again_in_millimetres():
    # Radius 20 at z = 0, 10 at z = 20: in between linear, which is what shape-based interpolation says of concentric discs.
    def cone(points):
        return np.linalg.norm(points[..., :2], axis=-1) - (20 - points[..., 2] / 2)

    whole = drawn(
        lambda p: np.where((p[..., 2] >= 0) & (p[..., 2] <= 20), cone(p), 1), (0.5, 1, 2), middle=np.array([0, 0, 10.0])
    )
    held = np.flatnonzero(whole.mask.any((0, 1)))
    filled = fill(whole.mask, 2, held[[0, -1]], spacing_of(whole.affine))
    inner = filled[..., held[0] : held[-1] + 1]
    assert dice(inner, whole.mask[..., held[0] : held[-1] + 1]) > 0.985


def test_a_small_organ_keeps_two_slices():
    small = drawn(lambda p: np.linalg.norm(p - PLACE, axis=-1) - 3, reach=10)
    for phase in range(9):
        seen = observe(small, every=9, phase=phase)
        assert small.mask[..., seen.kept].any((0, 1)).sum() >= 2 and seen.filled.any()


def test_slices_are_taken_along_the_organs_own_axis(organ):
    seen = observe(organ._replace(thick_axis=0), every=4, phase=1)
    assert seen.axis == 0 and (seen.filled[seen.kept] == organ.mask[seen.kept]).all()


def test_a_mask_drawn_on_every_fourth_slice_is_known_from_a_whole_one(organ):
    for axis in range(3):
        sparse = np.zeros_like(organ.mask)
        held = np.flatnonzero(organ.mask.any(tuple({0, 1, 2} - {axis})))[1::4]
        np.moveaxis(sparse, axis, 0)[held] = np.moveaxis(organ.mask, axis, 0)[held]
        found_axis, kept = kept_slices(sparse)
        assert found_axis == axis and kept.tolist() == held.tolist()
        assert dice(observe(organ._replace(mask=sparse), kept=(axis, kept)).filled, organ.mask) > 0.93
    whole = [organ.mask, np.zeros_like(organ.mask), np.zeros_like(organ.mask), np.zeros_like(organ.mask)]
    whole[1][..., 30] = organ.mask[..., 40]  # a single slice
    whole[2][..., 10:14] = whole[2][..., 30:34] = organ.mask[..., 40:44]  # two parts with a gap
    whole[3][10:12, 10:12, 20] = whole[3][40:42, 40:42, 30] = whole[3][70:72, 10:12, 40] = True  # specks
    assert [len(kept_slices(mask)[1]) for mask in whole] == [organ.mask.shape[2]] * 4


# ---- the cube and its cells ------------------------------------------------------------------------------------------


def tilt():
    turn = np.radians((20, 15))
    about_z = np.array([[np.cos(turn[0]), -np.sin(turn[0]), 0], [np.sin(turn[0]), np.cos(turn[0]), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(turn[1]), -np.sin(turn[1])], [0, np.sin(turn[1]), np.cos(turn[1])]])
    return about_z @ about_x


GRIDS = {
    "flipped": {"turn": np.diag([-1.0, -1.0, 1.0])},
    "permuted": {"turn": np.eye(3)[:, [1, 2, 0]]},
    "tilted, left-handed, other edges": {"turn": tilt() @ np.diag([-1.0, 1.0, 1.0]), "spacing": (0.8, 1.1, 1.5)},
}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_organ_on_another_grid_gives_the_same_cells_and_distances(organ, grid):
    processor = OrganProcessor(resolution=16, channels=("tsdf", "image"))
    samples, frames = [], []
    for each in (organ, drawn(**GRIDS[grid])):
        each = each._replace(image=each.mask.astype(np.float32))
        seen = observe(each)
        frames.append(processor.frame_of(seen, each.affine))
        samples.append(processor.sample(each, seen, frames[0]))
    assert np.abs(frames[0].centre - frames[1].centre).max() < 0.75 and abs(frames[0].edge - frames[1].edge) < 1
    cells = [set(map(tuple, sample.coords.tolist())) for sample in samples]
    assert len(cells[0] & cells[1]) > 0.97 * len(cells[0] | cells[1])
    inputs = [dict(zip(map(tuple, sample.coords.tolist()), sample.inputs, strict=True)) for sample in samples]
    apart = np.stack([inputs[0][cell] - inputs[1][cell] for cell in sorted(cells[0] & cells[1])])
    edge = frames[0].edge / 16  # of a cell, in which distances are
    assert np.abs(apart[:, 0]).max() * edge < 1.0 and np.abs(apart[:, 0]).mean() * edge < 0.15
    assert np.abs(apart[:, 1]).mean() < 0.05  # a step from 0 to 1, half a voxel off here and there


def test_distances_in_the_cells_are_those_of_the_shape(organ):
    processor = OrganProcessor(resolution=16)
    sample = processor.sample(organ, observe(organ))
    parts = np.stack(np.meshgrid(*[(np.arange(4) + 0.5) / 4] * 3, indexing="ij"), -1)
    points = sample.frame.to_world((sample.coords[:, None, None, None] + parts) / 16 - 0.5)
    edge = sample.frame.edge / 16
    wanted = tripod(points) / edge
    near = np.abs(wanted) < 0.8
    assert np.abs(sample.inputs[:, 0] - wanted)[near].mean() * edge < 0.2
    assert np.abs(sample.inputs).max() <= 1 and sample.inputs.dtype == np.float32
    assert sample.coverage == 1.0
    assert np.allclose(sample.frame.to_cube(points), (sample.coords[:, None, None, None] + parts) / 16 - 0.5)
    affine = drawn(**GRIDS["tilted, left-handed, other edges"]).affine
    matrix = sample.frame.to_voxel(affine)
    voxels = sample.frame.to_cube(points) @ matrix[:, :3].T + matrix[:, 3]
    assert np.allclose(voxels @ affine[:3, :3].T + affine[:3, 3], points)


def test_the_cube_holds_what_is_seen_with_a_margin_and_never_asks_for_the_truth(organ):
    processor = OrganProcessor(resolution=16)
    seen = observe(organ, every=5, phase=1)
    frame = processor.frame_of(seen, organ.affine)
    inside = np.abs(frame.to_cube(surface_points(seen.sdf, organ.affine)))
    assert np.isclose(inside.max(), 0.5 / 1.12)
    blind = organ._replace(mask=None, sdf=None)
    sample, same = (processor.sample(each, seen) for each in (organ, blind))
    assert (sample.coords == same.coords).all() and (sample.inputs == same.inputs).all() and same.coverage is None
    assert sample.coverage > 0.98
    assert replace(processor, dilation=0).sample(organ, observe(organ, every=9), frame).coverage < 0.95


def test_the_surface_of_a_mask_that_fills_its_volume_is_outside_of_it():
    full = np.full((6, 6, 6), -2.5, np.float32)
    points = np.array([[0.0, 0, 0], [0.5, 0, 0]])
    frame = Frame(np.full(3, 2.5), 20.0)
    assert np.allclose(look_up(full, points, np.eye(4), frame, away=True), [-2.5, 5])


def test_a_moved_cube_shows_the_same_surface(organ):
    processor, rng = OrganProcessor(resolution=16), np.random.default_rng(1)
    seen = observe(organ)
    frame = processor.frame_of(seen, organ.affine)
    moved = [augmented(frame, rng) for _ in range(20)]
    assert (
        0.9 <= min(each.edge for each in moved) / frame.edge < 0.95
        and 1.05 < max(each.edge for each in moved) / frame.edge <= 1.1
    )
    angles = [np.degrees(np.arccos((np.trace(each.rotation) - 1) / 2)) for each in moved]
    assert 10 < max(angles) <= 15.001 and all(np.isclose(np.linalg.det(each.rotation), 1) for each in moved)
    points = np.array([[0.1, 0.2, -0.3], [0.2, 0.1, 0.0]])
    for each in moved[:3]:
        world = each.to_world(points)
        assert np.allclose(each.to_cube(world), points)
        assert np.abs(look_up(organ.sdf, points, organ.affine, each) - tripod(world)).max() < 0.5


def test_a_crop_is_a_block_of_cells_around_one_of_them(organ):
    processor = OrganProcessor(resolution=16)
    seen = observe(organ)
    whole = {tuple(cell) for cell in processor.sample(organ, seen).coords.tolist()}
    crops = [processor.sample(organ, seen, crop=150, rng=np.random.default_rng(seed)).coords for seed in (0, 0, 1)]
    assert (crops[0] == crops[1]).all() and crops[0].tolist() != crops[2].tolist()
    for coords in crops:
        low, high = coords.min(0), coords.max(0)
        box = {cell for cell in whole if all(low[i] <= cell[i] <= high[i] for i in range(3))}
        assert 40 < len(coords) <= 150 and {tuple(cell) for cell in coords.tolist()} == box
    assert len(processor.sample(organ, seen, crop=10**6, rng=np.random.default_rng(0)).coords) == len(whole)


def test_an_organ_without_an_image_is_named_where_the_model_takes_one(organ):
    with pytest.raises(ValueError, match="without an image"):
        OrganProcessor(resolution=16, channels=("tsdf", "image")).sample(organ, observe(organ))


def test_a_processor_is_what_was_saved_and_nothing_else(tmp_path):
    processor = OrganProcessor(16, ("tsdf", "image"), every=3, dilation=0, organs=["liver"])
    processor.save_pretrained(tmp_path)
    assert OrganProcessor.load(tmp_path) == processor
    saved = json.loads((tmp_path / "processor.json").read_text())
    wrong = {
        "resolution": 10**6,
        "channels": ["hu"],
        "latents": "magic",
        "every": 0,
        "margin": float("nan"),
        "dilation": -1,
        "interior": None,
        "organs": "liver",
        "extra": 1,
    }
    for key, value in wrong.items():
        (tmp_path / "processor.json").write_text(json.dumps(saved | {key: value}))
        with pytest.raises(UserError, match=key if key in saved else "must have"):
            OrganProcessor.load(tmp_path)


def test_a_processor_of_another_model_is_refused(tmp_path):
    model = OrganMesher(LatentEncoder(1), small_decoder())
    model.save_pretrained(tmp_path)
    others = {
        "cells a side: 16 where the model has 8": OrganProcessor(resolution=16),
        "channels: 2 where the model has 1": OrganProcessor(8, ("tsdf", "image")),
        "latents: precomputed where": OrganProcessor(8, latents="precomputed"),
    }
    for fault, processor in others.items():
        processor.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=fault):
            load_base(str(tmp_path))
    OrganProcessor(8).save_pretrained(tmp_path)
    assert load_base(str(tmp_path))[1] == OrganProcessor(8)


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_new_latents_for_the_official_decoder_start_where_its_own_are():
    torch.manual_seed(0)
    encoder = LatentEncoder(1, official=True)
    cells = torch.cartesian_prod(torch.arange(1), *[torch.arange(8)] * 3).int()
    latents = torch.cat([LatentEncoder(1, official=True)(cells, torch.rand(512, 1, 4, 4, 4) * 2 - 1) for _ in range(10)]).detach()
    assert (latents.mean(0) - torch.tensor(OFFICIAL_MEAN)).abs().max() < 1.5
    assert ((latents.std(0) / torch.tensor(OFFICIAL_STD)).log().abs() < 0.4).all()
    assert 50_000 < sum(weight.numel() for weight in encoder.parameters()) < 70_000
    again = LatentEncoder.from_json(encoder.to_json())
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in encoder.state_dict().items()}
    for wrong in ({}, {**encoder.to_json(), "width": 10**9}, {**encoder.to_json(), "channels": True}, [1]):
        with pytest.raises(UserError, match="encoder"):
            LatentEncoder.from_json(wrong)


def test_a_sample_gets_the_same_latents_in_any_batch():
    torch.manual_seed(0)
    encoder = LatentEncoder(1)
    cells = torch.cartesian_prod(torch.arange(2), *[torch.arange(4)] * 3).int()
    inputs = torch.randn(128, 1, 4, 4, 4)
    both, alone = encoder(cells, inputs), encoder(cells[:64], inputs[:64])
    assert torch.allclose(both[:64], alone, atol=1e-6)


CELLS = np.array([[1, 2, 3], [4, 5, 6]])
FEATS = np.ones((2, 8), np.float32)
BAD_LATENTS = {
    "outside of the cube": {"coords": CELLS + 60},
    "cell twice": {"coords": CELLS[[0, 0]]},
    "no cells": {"coords": CELLS.astype(float)},
    "do not fit": {"feats": FEATS[:, :7]},
    "not finite": {"feats": FEATS * np.nan},
    "cannot be read": {"feats": np.array([None])},
    "cube is not known": {"edge": 5.0},
    "cannot be, edge": {"edge": -1.0, "centre": np.zeros(3)},
    "edge 5 mm": {"edge": 5.0, "centre": np.zeros(3), "rotation": np.diag([1.0, 1, -1])},
}


@pytest.mark.parametrize("fault", BAD_LATENTS)
def test_latents_that_cannot_be_are_named(tmp_path, fault):
    np.savez(tmp_path / "a.npz", **{"coords": CELLS, "feats": FEATS} | BAD_LATENTS[fault])
    with pytest.raises(BadFile, match=fault):
        read_latents(tmp_path / "a.npz")


def test_latents_of_others_are_found_by_the_organs_name_with_their_cube(tmp_path):
    (tmp_path / "s1").mkdir()
    four = np.insert(CELLS, 0, 0, axis=1)  # with the sample's column, as the pipeline writes it
    np.savez(tmp_path / "s1" / "liver.npz", coords=four, feats=FEATS.astype(np.float64), centre=PLACE, edge=100.0)
    np.savez(tmp_path / "s2_liver.npz", coords=CELLS, feats=FEATS)
    first, second = (read_latents(find_latents(tmp_path, f"{case}/liver")) for case in ("s1", "s2"))
    assert (first.coords == CELLS).all() and first.feats.dtype == np.float32
    assert first.frame.edge == 100 and (first.frame.centre == PLACE).all() and second.frame is None
    with pytest.raises(BadFile, match="s3_liver.npz"):
        find_latents(tmp_path, "s3/liver")
    (tmp_path / "s2_liver.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(BadFile, match="cannot be read"):
        read_latents(tmp_path / "s2_liver.npz")


def test_a_sample_of_given_latents_has_their_cells_and_cube(organ):
    latents = Latents(CELLS.astype(np.int32), FEATS, Frame(PLACE, 120.0))
    sample = replace(OrganProcessor(resolution=16), latents="precomputed").sample(organ, observe(organ), latents=latents)
    assert (sample.coords == latents.coords).all() and (sample.inputs == latents.feats).all() and sample.frame.edge == 120


def test_latents_fitted_to_the_truth_come_closer_and_leave_the_decoder_alone(organ):
    torch.manual_seed(0)
    decoder = small_decoder()
    torch.nn.init.normal_(decoder.out_layer.weight, std=0.1)
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    sample = OrganProcessor(resolution=8).sample(organ, observe(organ, 5), crop=12, rng=np.random.default_rng(0))
    batch = collate([as_item(sample, organ, 0)])
    with torch.no_grad():  # as in an evaluation
        (_, first), (latents, last) = (optimise_latents(decoder, batch, steps) for steps in (1, 8))
    assert latents.shape == (len(sample.coords), 8) and last < 0.95 * first
    assert all(torch.equal(before[name], weight) for name, weight in decoder.state_dict().items())
    assert all(weight.requires_grad for weight in decoder.parameters())


def test_a_base_gets_the_latents_that_the_tuned_decoder_got(tmp_path):
    OrganMesher(LatentEncoder(1), small_decoder()).save_pretrained(tmp_path)
    OrganProcessor(resolution=8).save_pretrained(tmp_path)
    origin, config = {"base": {"name": str(tmp_path)}}, SimpleNamespace(model="")
    assert load_untrained(origin, config, "cpu").encoder is not None
    assert load_untrained(origin | {"latents_dir": "latents"}, config, "cpu").encoder is None


# ---- a data set ------------------------------------------------------------------------------------------------------

PATIENTS = ("p1", "p2", "p3", "p4", "p5")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Five patients with a liver and a spleen each, on a tilted grid of unlike edges, as TotalSegmentator has them."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3, :3] = tilt() * (1.5, 1.5, 2)
    grid = np.stack(np.meshgrid(*map(np.arange, (44, 30, 26)), indexing="ij"), -1)
    for patient in PATIENTS:
        (folder / patient / "segmentations").mkdir(parents=True)
        nibabel.save(
            nibabel.Nifti1Image(rng.normal(40, 20, grid.shape[:3]).astype(np.int16), affine), folder / patient / "ct.nii.gz"
        )
        for organ, middle in (("liver", (12, 15, 13)), ("spleen", (32, 14, 12))):
            radii = rng.uniform(6, 8, 3)
            mask = (((grid - middle) / radii) ** 2).sum(-1) < 1
            file = folder / patient / "segmentations" / f"{organ}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), affine), file)
    return folder


@pytest.fixture
def settings(scans, tmp_path_factory, monkeypatch):
    """Settings of a run on the scans, prepared by this process alone and once."""
    monkeypatch.setenv("LORA_WORKSHOP_CACHE", str(tmp_path_factory.getbasetemp() / "medical"))
    made = {"data_dir": str(scans), "organs": "", "modality": "auto", "every": 3, "crop": 0, "augment": True, "latents_dir": ""}
    return SimpleNamespace(**made, cache="auto", batch_size=2, seed=0, num_workers=1)


PROCESSOR = OrganProcessor(resolution=8)


def loaders(settings, processor=PROCESSOR):
    processor = replace(processor, every=settings.every)
    return build_loaders(settings, processor, find_organs(settings.data_dir, settings.organs, settings.seed))


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_scans_become_organs_split_by_patient(settings, capsys):
    train, val, processor, facts = loaders(settings)
    sides = [{item.patient for item in loader.dataset.items} for loader in (train, val)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(PATIENTS)
    assert facts["train"] == 2 * facts["patients"] and facts["val"] == 2 * facts["val_patients"]
    assert processor.organs == ["liver", "spleen"] and processor.every == 3 and facts["coverage"] > 0.98
    said = capsys.readouterr().out
    assert f"{facts['train']} training organs of {facts['patients']} patients" in said and "one slice in 3" in said
    again = loaders(settings)[3]
    assert again == facts
    settings.organs = "spleen"
    _, _, processor, less = loaders(settings)
    assert processor.organs == ["spleen"] and less["train"] == facts["train"] / 2 and less["sha256"] != facts["sha256"]


def test_all_of_a_patient_stays_on_one_side_for_any_seed(tmp_path):
    items = [Item(f"{p}_{n}/{o}", f"{p}_{n}", o, 1, p, None, tmp_path) for p in "abcdefg" for n in (1, 2) for o in ("x", "y")]
    held_out = set()
    for seed in range(10):
        splits = split_items(items, seed, tmp_path, Faults())
        sides = [{item.patient for item in splits[split]} for split in ("train", "val")]
        assert all(sides) and not sides[0] & sides[1]
        held_out |= sides[1]
    assert len(held_out) > 3
    with pytest.raises(UserError, match="too few training patients"):
        split_items([item for item in items if item.patient == "a"], 0, tmp_path, Faults())
    one = [replace(item, split="train" if item.patient == "a" else "test") for item in items]
    kept = split_items(one, 0, tmp_path, Faults(), "test")["test"]
    assert {item.patient for item in kept} == {item.patient for item in items} - {"a"}
    own = [replace(item, split="val" if item.case in ("a_1", "b_1", "b_2") else "train") for item in items]
    faults = Faults()
    assert {item.case for item in split_items(own, 0, tmp_path, faults)["val"]} == {"a_1", "b_1", "b_2"}
    assert list(faults.notes.values()) == [["a"]]


def test_an_item_is_a_function_of_seed_epoch_and_index(settings):
    data = loaders(settings)[0].dataset
    new = OrganData(data.items, data.processor, training=True, seed=0, augment=True)  # keeps nothing in memory
    keys = [(epoch, index) for epoch in (1, 2) for index in range(3)]
    first = {key: data[key] for key in keys}
    assert all(same(first[key], new[key]) for key in reversed(keys))
    assert not torch.equal(first[1, 0]["to_voxel"], first[2, 0]["to_voxel"])
    assert {len(new.views[new.places[0, phase]]) > 0 for phase in range(3)} == {True}
    whole = [key for batch in EpochBatches(len(data), 4, 0) for key in batch]
    halves = [EpochBatches(len(data), 2, 0, rank, 2) for rank in (0, 1)]
    shared = [key for parts in zip(*halves, strict=True) for part in parts for key in part]
    assert whole == shared


def test_evaluation_sees_an_organ_alike_whatever_else_is_there(settings):
    val = loaders(settings)[1].dataset
    alone = OrganData(val.items[1:2], replace(val.processor), seed=7)
    assert same(val[0, 1] | {"index": 0}, alone[0, 0])
    seen, sample = val.observed(1), val.sample(1)
    assert val.organ(1).mask[..., seen.kept].any() and len(seen.kept) < val.organ(1).mask.shape[2]
    assert (sample.coords == val[0, 1]["coords"].numpy()).all() and (sample.frame.rotation == np.eye(3)).all()


def test_truth_image_and_what_is_seen_are_of_one_place_however_the_cube_moves(settings):
    settings.every = 1  # so that what is seen is the truth
    data = loaders(settings, replace(PROCESSOR, channels=("tsdf", "image")))[0].dataset
    parts = np.stack(np.meshgrid(*[(np.arange(4) + 0.5) / 4] * 3, indexing="ij"), -1)
    for key in ((1, 0), (2, 3)):
        item, organ = data[key], data.organ(key[1])
        points = (item["coords"].numpy()[:, None, None, None] + parts) / 8 - 0.5
        matrix = item["to_voxel"].numpy()
        places = points @ matrix[:, :3].T + matrix[:, 3]
        inner = ((places >= 0) & (places <= np.array(organ.mask.shape) - 1)).all(-1)
        nearest = tuple(places[inner].round().astype(int).T)
        truth = np.clip(item["truth"].numpy()[nearest] * 8 / item["edge"], -1, 1)
        seen = item["inputs"].numpy()
        assert np.abs(seen[:, 0][inner] - truth).max() * item["edge"] / 8 < 1.5  # mm, to the nearest of voxels of 2
        assert np.corrcoef(seen[:, 1][inner], organ.image[nearest])[0, 1] > 0.6
        assert inner.mean() > 0.8


def test_a_batch_holds_organs_one_after_another(settings):
    data = loaders(settings)[0].dataset
    items = [data[1, index] for index in (2, 0)]
    batch = collate(items)
    for row, item in enumerate(items):
        own = batch["coords"][:, 0] == row
        assert torch.equal(batch["coords"][own, 1:], item["coords"]) and torch.equal(batch["inputs"][own], item["inputs"])
        assert torch.equal(batch["truth"][row], item["truth"]) and batch["edge"][row] == np.float32(item["edge"])
    assert batch["index"].tolist() == [2, 0] and batch["to_voxel"].shape == (2, 3, 4)
    settings.crop = 60
    assert max(len(loaders(settings)[0].dataset[1, index]["coords"]) for index in range(3)) <= 60


def test_a_file_that_goes_bad_in_training_costs_only_itself(settings):
    settings.cache = "off"
    data = loaders(settings)[0].dataset
    file, kept = data.items[0].path, data.items[0].path.read_bytes()
    try:
        file.write_bytes(b"gone")
        item = data[1, 0]
        assert len(item["coords"]) and item["index"] == 0
        assert [name for name, _ in data.new_faults()] == [data.items[0].name] and not data.new_faults()
        with pytest.raises(UserError, match="damaged or gone"):
            data[0, 0]
    finally:
        file.write_bytes(kept)


def test_latents_that_are_missing_are_named_and_the_rest_is_used(settings, tmp_path, capsys):
    settings.latents_dir = str(tmp_path)
    for patient in PATIENTS:
        for organ in ("liver", "spleen")[patient == "p3" :]:
            np.savez(tmp_path / f"{patient}_{organ}.npz", coords=CELLS, feats=FEATS)
    train, val, _, facts = loaders(settings, replace(PROCESSOR, latents="precomputed"))
    assert facts["left_out"] == {"organ without latents": 1} and facts["train"] + facts["val"] == 9
    said = capsys.readouterr().out
    assert "p3/liver" in said and "which is little" in said  # two cells hold next to nothing of a surface
    assert len(val.dataset.observed(0).kept) < val.dataset.organ(0).mask.shape[2]  # what it is measured by are thick slices
    first, second = train.dataset[1, 0], train.dataset[2, 0]
    settings.latents_dir = str(tmp_path / "gone")
    with pytest.raises(UserError, match="there is no folder"):
        loaders(settings, replace(PROCESSOR, latents="precomputed"))
    assert torch.equal(first["inputs"], torch.from_numpy(FEATS)) and same(first, second)


def test_eval_reads_the_split_that_was_asked_for(settings, scans, tmp_path):
    origin = {"data_dir": str(scans), "seed": 0, "batch_size": 2}
    config = SimpleNamespace(data_dir="", split="val", batch_size=0, num_workers=1)
    loader, name = load_for_eval(config, replace(PROCESSOR, every=3, organs=["liver", "spleen"]), origin)
    val = loaders(settings)[1].dataset
    assert [item.name for item in loader.dataset.items] == [item.name for item in val.items] and name == str(scans)
    assert same(loader.dataset[0, 0], val[0, 0])
    as_mr, _ = load_for_eval(config, replace(PROCESSOR, every=3), origin | {"modality": "mr"})  # as the model was trained
    assert not np.allclose(as_mr.dataset.organ(0).image, val.organ(0).image, atol=0.05)
    config.split = "test"
    with pytest.raises(UserError, match="no test split"):
        load_for_eval(config, PROCESSOR, origin)
    shutil.copytree(prepared_folder(scans), tmp_path / "prepared")  # as preprocess.py leaves it
    config = SimpleNamespace(data_dir=str(tmp_path / "prepared"), split="val", batch_size=1, num_workers=0, organs="spleen")
    found = load_for_eval(config, replace(PROCESSOR, every=3), origin)[0].dataset.items
    assert [item.name for item in found] == [item.name for item in val.items if item.organ == "spleen"]
    with pytest.raises(UserError, match="there is no kidney .*; there are liver, spleen"):
        load_for_eval(SimpleNamespace(**vars(config) | {"organs": "kidney"}), PROCESSOR, origin)
