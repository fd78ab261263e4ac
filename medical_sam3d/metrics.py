"""What a model makes of held-out organs, through the path of inference, and how far that is from the truth, in numbers."""

from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from common.batches import to_device
from common.record import write_samples
from common.runtime import gather_lists, progress_bar
from losses import mesh_losses
from meshes import Mesh, mesh_to_mask
from reconstruct import mesh_of
from surface_scores import TOLERANCE, mask_scores

EPOCH_SCORES = ("dice", "hd95", "assd", "nsd")  # of those of mask_scores, what an epoch's line has


def one_of(batch: dict, row: int) -> dict:
    """The batch that holds one sample of a batch alone. No organ sees another, so no number depends on what is in a batch."""
    own = batch["coords"][:, 0] == row
    coords = batch["coords"][own].clone()
    coords[:, 0] = 0
    one = {key: value[row : row + 1] for key, value in batch.items() if key not in ("coords", "inputs")}
    return {"coords": coords, "inputs": batch["inputs"][own], **one}


def decode(model, batch: dict, affine: np.ndarray, interior: str) -> tuple[Mesh, float]:
    """(mesh in RAS mm, validation loss) of a batch of one organ. affine: (4, 4) voxel -> mm of the organ that it was made of."""
    cubes = model(batch["coords"], batch["inputs"])
    loss = float(sum(mesh_losses(cubes, batch).values()))
    matrix = affine @ np.vstack([batch["to_voxel"][0].double().cpu().numpy(), [0, 0, 0, 1]])
    return mesh_of(cubes, matrix, interior), loss


@torch.no_grad()
def measure(model, batches, dataset, tolerance: float = TOLERANCE):
    """Yields {"index", "loss", "mesh", **mask_scores} for each organ: its mesh in mm, back on the voxels of the true mask."""
    model = extract_model_from_parallel(model).eval()
    device = next(model.parameters()).device
    for batch in batches:
        batch = to_device(batch, device)
        for row, index in enumerate(batch["index"].tolist()):
            organ = dataset.organ(index)
            mesh, loss = decode(model, one_of(batch, row), organ.affine, dataset.processor.interior)
            mask = mesh_to_mask(mesh, organ.mask.shape, organ.affine)
            yield {"index": index, "loss": loss, "mesh": mesh, **mask_scores(mask, organ.mask, organ.affine, tolerance)}


def predict(model, loader, tolerance: float = TOLERANCE) -> list[dict]:
    """What `measure` gives of the organs of all processes, in order, without the meshes."""
    found = [item | {"mesh": None} for item in measure(model, progress_bar(loader, "evaluating"), loader.dataset, tolerance)]
    found = {item["index"]: item for item in gather_lists(found)}  # processes repeat a batch to have equally many
    return [found[index] for index in sorted(found)]


def evaluate(model, loader) -> dict:
    """The metrics of a model on a loader's organs: val_loss, dice, hd95 and assd (mm), nsd, failed. Used in training.

    Means over organs (see organ_metrics); a batch's other organs, the batch size and the number of processes change nothing.
    """
    return organ_metrics(loader.dataset, predict(model, loader))


def organ_metrics(dataset, found: list[dict]) -> dict:
    """The metrics of what `predict` gave. failed: organs of which there is no mesh; with one, hd95 and assd are infinite.

    Several organs: per_organ_dice has the mean of each by its name.
    """
    metrics = {"val_loss": float(np.mean([item["loss"] for item in found]))}
    metrics |= {key: mean_of([item[key] for item in found]) for key in EPOCH_SCORES}
    metrics["failed"] = sum(not item["pred_ml"] for item in found)
    by_organ = {}
    for item in found:
        by_organ.setdefault(dataset.items[item["index"]].organ, []).append(item["dice"])
    if len(by_organ) > 1:
        metrics["per_organ_dice"] = {name: mean_of(by_organ[name]) for name in sorted(by_organ)}
    return metrics


def mean_of(values: list[float | None]) -> float | None:
    """The mean of those that are samples: infinite where one of them is. None: there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def save_samples(dataset, found: list[dict], path: Path) -> None:
    """samples.json: the mean Dice of each patient's organs, and of how many it is (the weight that gives dice).

    A patient is one sample, however many organs and scans: they are alike.
    """
    patients = {}
    for item in found:
        if item["dice"] is not None:
            patients.setdefault(dataset.items[item["index"]].patient, []).append(item["dice"])
    rows = [{"file": name, "value": float(np.mean(dices)), "weight": len(dices)} for name, dices in patients.items()]
    write_samples(path, "dice", True, rows)
