"""Pixel error, PCK and OKS average precision of keypoints, and plots of the errors."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from common.batches import to_device
from common.plots import draw_bars, figure, plot_text, save_figure
from common.record import write_samples
from common.runtime import gather_lists, progress_bar
from common.samples import short_names
from common.vision.pairs import COLORS
from keypoints import KeypointSet
from model import keypoint_errors

AREA_OF_BOX = 0.53  # OKS wants the area of the body's outline; where the data has none, people take this share of the box


def predict(model, loader) -> tuple[list[dict], float | None]:
    """What `detect` finds for the figures of all processes, in order, and the mean loss over visible keypoints."""
    found = gather_lists([item for items in detect(model, progress_bar(loader, "evaluating")) for item in items])
    found = {item["index"]: item for item in found}  # processes repeat a batch to have equally many
    visible = sum(item["visible"] for item in found.values())
    loss = sum(item["loss"] * item["visible"] for item in found.values()) / visible if visible else None
    return [found[index] for index in sorted(found)], loss


@torch.no_grad()
def detect(model, batches):
    """Yields for each batch [{"index", "points" (K, 2) x, y in the original picture's pixels, "scores" (K,), "loss", "visible"}].

    loss: the mean over the figure's visible keypoints, of which there are so many.
    """
    model = extract_model_from_parallel(model).eval()
    device = next(model.parameters()).device
    for batch in batches:
        coords, scores, heatmaps = model(to_device(batch["pixel_values"], device))
        errors = keypoint_errors(coords, to_device(batch["target"], device), heatmaps).float().cpu()
        coords, scores = coords.float().cpu(), scores.float().cpu()
        h, w = batch["pixel_values"].shape[2:]
        pixels = coords.double() * torch.tensor([w - 1, h - 1])
        back = batch["back"]
        points = pixels @ back[:, :, :2].transpose(1, 2) + back[:, None, :, 2]
        visible = batch["visible"].sum(dim=1)
        losses = (errors * batch["visible"]).sum(dim=1) / visible.clamp(min=1)
        columns = (batch["index"].tolist(), points.numpy(), scores.numpy(), losses.tolist(), visible.tolist())
        yield [
            dict(zip(("index", "points", "scores", "loss", "visible"), row, strict=True)) for row in zip(*columns, strict=True)
        ]


def point_errors(dataset, found: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(differences (N, K, 2) in pixels of the original pictures, NaN where a keypoint has no label; boxes (N, 4) x, y, w, h)."""
    samples = [dataset.samples[item["index"]] for item in found]
    offsets = np.stack([item["points"] - s.points for item, s in zip(found, samples, strict=True)])
    labelled = np.stack([s.labelled for s in samples])
    return np.where(labelled[:, :, None], offsets, np.nan), np.stack([dataset.box(item["index"])[0] for item in found])


def pose_metrics(dataset, found: list[dict], points: KeypointSet) -> dict:
    """Errors in pixels of the original pictures, PCK and NME as shares of the box, OKS-AP; all over labelled keypoints.

    pixel_error: mean distance, pixel_error_median: the median; mae: mean of |dx| and |dy|; pck_05, pck_10: share of keypoints
    within 0.05 and 0.1 of the box's longer side; nme: mean distance divided by the square root of the box's area.
    """
    offsets, boxes = point_errors(dataset, found)
    errors = np.linalg.norm(offsets, axis=2)
    there = ~np.isnan(errors)
    relative = errors / boxes[:, 2:].max(axis=1)[:, None]
    metrics = {
        "pixel_error": float(errors[there].mean()),
        "pck_05": float((relative[there] <= 0.05).mean()),
        "pck_10": float((relative[there] <= 0.1).mean()),
        "nme": float((errors / np.sqrt(boxes[:, 2:].prod(axis=1))[:, None])[there].mean()),
        "mae": float(np.abs(offsets[there]).mean()),
        "pixel_error_median": float(np.median(errors[there])),
        **oks_metrics(dataset, found, boxes, points),
    }
    metrics["per_keypoint_pixel_error"] = {
        name: float(errors[there[:, k], k].mean()) if there[:, k].any() else None for k, name in enumerate(points.names)
    }
    return metrics


def oks_metrics(dataset, found: list[dict], boxes: np.ndarray, points: KeypointSet) -> dict:
    """oks_ap and oks_ap_50 by pycocotools, with the data's sigmas: average precision where OKS says what a hit is."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers, truth, results = {}, [], []  # several figures may share a picture
    for item, box in zip(found, boxes.tolist(), strict=True):
        sample = dataset.samples[item["index"]]
        image = numbers.setdefault(sample.path, len(numbers) + 1)
        flags = 2 * sample.labelled[:, None]
        area = sample.area if 0 < sample.area < np.inf else AREA_OF_BOX * box[2] * box[3]
        shared = {"image_id": image, "category_id": 1, "bbox": box}
        keypoints = np.hstack([sample.points, flags]).flatten().tolist()
        count = int(sample.labelled.sum())
        truth.append(
            {**shared, "id": len(truth) + 1, "keypoints": keypoints, "num_keypoints": count, "area": float(area), "iscrowd": 0}
        )
        keypoints = np.hstack([item["points"], item["scores"][:, None]]).flatten().tolist()
        results.append({**shared, "keypoints": keypoints, "score": float(item["scores"].mean())})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks a lot
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in numbers.values()],
            "annotations": truth,
            "categories": [{"id": 1, "name": "figure", "keypoints": points.names}],
        }
        coco.createIndex()
        scored = COCOeval(coco, coco.loadRes(results), "keypoints")
        scored.params.kpt_oks_sigmas = np.array(points.sigmas)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(("oks_ap", "oks_ap_50"), scored.stats, strict=False)}


def save_samples(dataset, found: list[dict], path: Path) -> None:
    """samples.json: the mean error in each picture, and of how many keypoints it is (the weight that gives pixel_error)."""
    errors = np.linalg.norm(point_errors(dataset, found)[0], axis=2)
    by_picture = {}
    for item, row in zip(found, errors, strict=True):
        by_picture.setdefault(dataset.samples[item["index"]].path, []).extend(row[~np.isnan(row)].tolist())
    rows = [
        {"file": name, "value": float(np.mean(values)), "weight": len(values)}
        for name, values in zip(short_names(list(by_picture)), by_picture.values(), strict=True)
    ]
    write_samples(path, "pixel_error", False, rows)


def evaluate(model, loader, points: KeypointSet) -> dict:
    """The metrics of a model on a loader's data: val_loss and pose_metrics. Used in training and by eval.py."""
    found, loss = predict(model, loader)
    return {"val_loss": loss, **pose_metrics(loader.dataset, found, points)}


# ---- plots -----------------------------------------------------------------------------------------------------------


def draw_evaluation(dataset, found: list[dict], points: KeypointSet, folder: Path) -> None:
    """pck_curve.png, errors.png and per_keypoint.png in the folder."""
    offsets, boxes = point_errors(dataset, found)
    errors = np.linalg.norm(offsets, axis=2)
    draw_pck_curve(errors / boxes[:, 2:].max(axis=1)[:, None], points.names, folder / "pck_curve.png")
    draw_errors(errors[~np.isnan(errors)], folder / "errors.png")
    counts = (~np.isnan(errors)).sum(axis=0)
    means = {name: float(np.nanmean(errors[:, k])) if counts[k] else None for k, name in enumerate(points.names)}
    title, unit = "Mean error of each keypoint (how many are labelled)", "pixels of the original picture"
    draw_bars(means, title, unit, folder / "per_keypoint.png", counts=counts)


def draw_pck_curve(relative: np.ndarray, names: list[str], path: Path) -> None:
    """PCK over the threshold, 0 to 0.2 of the box's longer side; a line for each keypoint where there are few.

    relative: (N, K) errors as shares of the box's longer side, NaN where there is no label.
    """
    page, ((axis,),) = figure(1, 1, 7, 5.5)
    thresholds = np.linspace(0, 0.2, 101)

    def share(errors):
        errors = errors[~np.isnan(errors)]
        return [(errors <= t).mean() if errors.size else np.nan for t in thresholds]

    for k, name in enumerate(names if len(names) <= 20 else []):
        style = {"color": COLORS[k % len(COLORS)], "ls": "-" if k < len(COLORS) else "--"}
        axis.plot(thresholds, share(relative[:, k]), lw=1.2, label=plot_text(name), **style)
    axis.plot(thresholds, share(relative), color="black", lw=2.5, label="all keypoints")
    title = "Keypoints within a share of the box's longer side"
    axis.set(title=title, xlabel="threshold (share of the box)", ylabel="PCK", xlim=(0, 0.2), ylim=(0, 1.02))
    page.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(page, path)


def draw_errors(errors: np.ndarray, path: Path) -> None:
    """How many keypoints have which error (M,), in pixels; the far ones share the last bar."""
    page, ((axis,),) = figure(1, 1, 7, 4.5)
    last = max(float(np.percentile(errors, 99)), 1e-3)
    axis.hist(np.minimum(errors, last), bins=np.linspace(0, last, 41), color="C0")
    for value, label, style in (
        (np.median(errors), "median", "-"),
        (errors.mean(), "mean", "--"),
        (np.percentile(errors, 90), "nine of ten are within", ":"),
    ):
        axis.axvline(value, color="black", ls=style, lw=1.5, label=f"{label} {value:.1f} px")
    title = f"Errors of {errors.size} keypoints (the last bar holds all from {last:.1f} px, at most {errors.max():.1f} px)"
    axis.set(xlabel="error, pixels of the original picture", ylabel="keypoints", xlim=(0, last))
    page.suptitle(title, fontsize=10)
    axis.legend(fontsize=9, loc="upper right")
    save_figure(page, path)
