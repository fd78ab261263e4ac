"""A model beside what it is measured by, organ by organ: the thick slices, interpolation, its base, what a mesh itself costs."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from common.batches import to_device
from common.config import UserError
from common.runtime import gather_lists, progress_bar, quiet, say
from latents import optimise_latents
from meshes import Mesh, mask_to_mesh, mesh_to_mask
from metrics import decode, one_of
from model import load_base
from surface_scores import chamfer, mask_scores, sampled_surface, summary_of

FLOOR = "truth as a mesh"
INPUT = "thick slices"
FILLED = "interpolation"
UNTRAINED = "base as it is"
LABELS = {"full": "fully tuned", "lora": "LoRA", "head": "output layer alone"}  # of what was trained, by its method
OPTIMISED = "optimised latents"
ABOUT = {
    FLOOR: "the true mask, made a mesh and a mask again: what no mesh can better",
    INPUT: "each kept slice repeated as far as half-way to the next: what the model is given",
    FILLED: "shape-based interpolation between the kept slices: what the model refines",
    UNTRAINED: "the model before it was trained on these organs",
    OPTIMISED: "latents fitted to the truth itself through the trained decoder: an upper bound, which no input reaches",
}
SCORED = {  # key -> (title, what a table multiplies it by)
    "dice": ("Dice", 1),
    "iou": ("IoU", 1),
    "hd95": ("HD95 (mm)", 1),
    "assd": ("ASSD (mm)", 1),
    "nsd": ("NSD", 1),
    "chamfer_mm": ("Chamfer (mm)", 1),
    "volume_error": ("volume error (%)", 100),
}
COMPARED = {"dice": 1, "hd95": -1, "assd": -1, "nsd": 1}  # metrics of which differences are told; -1: lower is better
DRAWS = 4000
FEWEST = 5  # patients; of fewer, an interval says less than it seems to


class Answer(NamedTuple):
    """What a system makes of an organ: a mask (X, Y, Z) bool on its voxels, a mesh in mm; of a model, its validation loss."""

    mask: np.ndarray
    mesh: Mesh
    loss: float | None = None


# ---- answers ---------------------------------------------------------------------------------------------------------


def load_untrained(origin: dict, config, device):
    """The base of a checkpoint as it was before training; None, and a line, where it is missing or made no meshes yet."""
    try:
        with quiet():
            base, _, _ = load_base(config.model or origin["base"]["name"], download=False)
    except UserError as error:
        say(f"{UNTRAINED}: left out, for {error}")
        return None
    if origin.get("latents_dir"):  # both get the latents of others, which is why one was trained
        base.encoder, base.new_layers = None, []
    if base.new_layers:
        say(f"{UNTRAINED}: left out, for its encoder is new: nothing has taught it yet")
        return None
    return base.to(device)


@torch.no_grad()
def answers_to(batch: dict, dataset, systems: dict, optimised=None) -> dict[str, Answer]:
    """System -> what it makes of the one organ in a batch on the models' device. systems: name -> OrganMesher in eval mode.

    optimised: a decoder whose latents are fitted to the truth, too.
    """
    index = int(batch["index"][0])
    organ, observed = dataset.organ(index), dataset.observed(index)
    true = mask_to_mesh(organ.mask, organ.affine)
    answers = {FLOOR: Answer(mesh_to_mask(true, organ.mask.shape, organ.affine), true)}
    for name, mask in ((INPUT, observed.mask), (FILLED, observed.filled)):
        mesh = mask_to_mesh(mask, organ.affine) if mask.any() else Mesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
        answers[name] = Answer(mask, mesh)
    for name, model in systems.items():
        mesh, loss = decode(model, batch, organ.affine, dataset.processor.interior)
        answers[name] = Answer(mesh_to_mask(mesh, organ.mask.shape, organ.affine), mesh, loss)
    if optimised is not None:
        with torch.enable_grad():
            latents, _ = optimise_latents(optimised, batch)
        mesh, loss = decode(optimised, batch | {"inputs": latents}, organ.affine, dataset.processor.interior)
        answers[OPTIMISED] = Answer(mesh_to_mask(mesh, organ.mask.shape, organ.affine), mesh, loss)
    return answers


def rows_of(answers: dict[str, Answer], dataset, index: int, tolerance: float) -> list[dict]:
    """A row for each system: case, organ, patient, system, outcome, loss, and all scores of its mask and its mesh."""
    item, organ = dataset.items[index], dataset.organ(index)
    true, rows = sampled_surface(answers[FLOOR].mesh), []
    for name, answer in answers.items():
        scores = mask_scores(answer.mask, organ.mask, organ.affine, tolerance)
        scores["chamfer_mm"] = chamfer(sampled_surface(answer.mesh), true)
        named = {"index": index, "case": item.case, "organ": item.organ, "patient": item.patient, "system": name}
        rows.append({**named, "outcome": outcome_of(scores), "loss": answer.loss, **scores})
    return rows


def outcome_of(scores: dict) -> str:
    """found; missed: there is an organ and no prediction; ghost: the other way round; absent: neither."""
    pred, truth = scores["pred_ml"] > 0, scores["truth_ml"] > 0
    return ("found" if pred else "missed") if truth else ("ghost" if pred else "absent")


def score_systems(systems: dict, loader, tolerance: float, optimised=None) -> list[dict]:
    """rows_of all organs of a loader, those of all processes, by organ and system; systems, optimised: see answers_to."""
    device = next(next(iter(systems.values())).parameters()).device
    rows = []
    for batch in progress_bar(loader, "evaluating"):
        batch = to_device(batch, device)
        for place, index in enumerate(batch["index"].tolist()):
            answers = answers_to(one_of(batch, place), loader.dataset, systems, optimised)
            rows += rows_of(answers, loader.dataset, index, tolerance)
    rows = {(row["index"], row["system"]): row for row in gather_lists(rows)}  # processes repeat a batch to have equally many
    order = [FLOOR, INPUT, FILLED, *systems, OPTIMISED]
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], order.index(key[1])))]


# ---- what they say together ------------------------------------------------------------------------------------------


def of_system(rows: list[dict], system: str) -> list[dict]:
    return [row for row in rows if row["system"] == system]


def system_scores(rows: list[dict]) -> dict[str, dict]:
    """System -> {metric: summary_of its values, and "interval"; "missed", "ghosts": names of organs}."""
    found = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = of_system(rows, system)
        patients = [row["patient"] for row in own]
        scores = {key: score_of([row[key] for row in own], patients) for key in SCORED}
        outcomes = {many: [place_of(row) for row in own if row["outcome"] == one] for one, many in OUTCOMES.items()}
        found[system] = scores | outcomes
    return found


OUTCOMES = {"missed": "missed", "ghost": "ghosts"}


def place_of(row: dict) -> str:
    return f"{row['case']}/{row['organ']}"


def score_of(values: list[float | None], patients: list[str]) -> dict:
    """summary_of the values, and "interval", the mean's 95 % by interval_of."""
    known = [(value, patient) for value, patient in zip(values, patients, strict=True) if value is not None]
    return {**summary_of(values), "interval": interval_of(*zip(*known, strict=True)) if known else None}


def interval_of(values, patients) -> list[float] | None:
    """The 95 % interval of a mean, if patients are drawn anew with all their organs (a cluster bootstrap, DRAWS times).

    None of fewer than FEWEST patients, and where an organ was missed. The middle 95 % of the means would be too narrow for few
    patients; it is widened as Student's t widens an interval (Hesterberg, What teachers should know about the bootstrap, 2015):
    of five patients it reaches from about the lowest to the highest.
    """
    from scipy import stats

    values, names = np.asarray(values, float), list(dict.fromkeys(patients))
    many = len(names)
    if many < FEWEST or not np.isfinite(values).all():
        return None
    member = np.array([names.index(patient) for patient in patients])
    draws = draws_of(many)
    means = (draws @ np.bincount(member, values)) / (draws @ np.bincount(member))
    tail = stats.norm.cdf(np.sqrt(many / (many - 1)) * stats.t.ppf(0.025, many - 1))
    return np.percentile(means, [100 * tail, 100 * (1 - tail)]).tolist()


@lru_cache(maxsize=4)
def draws_of(many: int) -> np.ndarray:
    """(DRAWS, many): how often each of so many patients is in a draw of as many, with replacement."""
    return np.random.default_rng(0).multinomial(many, np.full(many, 1 / many), size=DRAWS).astype(np.float32)


def by_organ(rows: list[dict]) -> dict[str, dict]:
    """Organ -> system_scores of its rows."""
    return {organ: system_scores([row for row in rows if row["organ"] == organ]) for organ in sorted({r["organ"] for r in rows})}


def mean_of_organs(organs: dict[str, dict], system: str, key: str) -> float | None:
    """The mean of the organs' means, where each organ counts once, however many cases have it; None where one is infinite."""
    means = [scores[system][key]["mean"] for scores in organs.values() if scores[system][key]["n"]]
    return None if None in means or not means else float(np.mean(means))


def differences(rows: list[dict], own: str) -> list[dict]:
    """How a system differs from each other one on the same organs: {"to", "metric", "n", "patients", "mean", "interval", "says"}.

    says: better, worse, or no difference shown: what the 95 % interval of the paired difference carries.
    """
    found, mine = [], of_system(rows, own)
    for other in dict.fromkeys(row["system"] for row in rows if row["system"] not in (own, FLOOR)):
        for key, better in COMPARED.items():
            pairs = [(a[key], b[key], a["patient"]) for a, b in zip(mine, of_system(rows, other), strict=True)]
            pairs = [pair for pair in pairs if None not in pair[:2]]
            if not pairs:
                continue
            change = [a - b if np.isfinite(a) and np.isfinite(b) else np.nan for a, b, _ in pairs]
            patients = [patient for *_, patient in pairs]
            interval, mean = interval_of(change, patients), float(np.mean(change))
            found.append({"to": other, "metric": key, "n": len(pairs), "patients": len(set(patients))})
            found[-1] |= {"mean": mean if np.isfinite(mean) else None, "interval": interval}
            found[-1]["says"] = verdict(found[-1], better)
    return found


def verdict(difference: dict, better: int) -> str:
    """What a paired difference lets one say. better: 1 where more is better, -1 where less is."""
    if difference["mean"] is None:
        return "an organ is missed, so there is no mean"
    if difference["interval"] is None:
        return "too few patients to say"
    low, high = sorted(better * end for end in difference["interval"])
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"
