"""COCO average precision by pycocotools, and pictures of what a detector finds."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from common.batches import EvalBatches, to_device
from common.plots import figure, save_figure
from common.record import write_samples
from common.runtime import gather_lists, progress_bar
from common.samples import short_names
from common.vision.pairs import COLORS, enlarged, save_pairs
from common.vision.pictures import decode

IOU = 0.5  # a detection that overlaps a box of its class so far has found it, in curves over confidence and on pages
SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")  # COCOeval.stats[:6]


def predict(model, processor, loader) -> tuple[list[dict], float]:
    """What `detect` finds in the pictures of all processes, in order, and the mean loss over pictures."""
    found = gather_lists([item for items in detect(model, processor, progress_bar(loader, "evaluating")) for item in items])
    found = {item["index"]: item for item in found}  # processes repeat a batch to have equally many
    return [found[index] for index in sorted(found)], sum(item["loss"] for item in found.values()) / len(found)


@torch.no_grad()
def detect(model, processor, batches, with_loss: bool = True):
    """Yields for each batch [{"index", "loss", "scores" (Q,), "labels" (Q,), "boxes" (Q, 4) xyxy in original pixels}].

    All queries are there: average precision wants the unsure ones, too. The loss is the batch's; None without truth.
    """
    model = extract_model_from_parallel(model).eval()
    device = next(model.parameters()).device
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if with_loss or key != "labels"}
        outputs = model(**to_device(inputs, device))
        loss = float(outputs.loss) if with_loss else None
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]]).to(device)
        results = post_process(processor, outputs, sizes)
        indices = [int(label["image_id"]) for label in batch["labels"]]
        yield [{"index": i, "loss": loss, **to_numpy(result)} for i, result in zip(indices, results, strict=True)]


def to_numpy(tensors: dict) -> dict:
    return {key: value.cpu().float().numpy() if key != "labels" else value.cpu().numpy() for key, value in tensors.items()}


def post_process(processor, outputs, sizes, threshold: float = 0.0) -> list[dict]:
    """Scores, labels and boxes of each picture, by the base's own image processor (softmax or sigmoid, as it was trained)."""
    return processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)


def xywh(box) -> list[float]:
    """(x1, y1, x2, y2) as COCO's [x, y, width, height]."""
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]


def coco_eval(samples, found: list[dict], classes: list[str]):
    """pycocotools' COCOeval after accumulate(); None where there is nothing to score. Category id = class index + 1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {"image_id": i, "category_id": int(label) + 1, "bbox": xywh(box), "area": float(area), "iscrowd": int(crowd)}
        for i, s in enumerate(samples)
        for box, label, crowd, area in zip(s.boxes, s.labels, s.crowd, s.area, strict=True)
    ]
    results = [
        {"image_id": item["index"], "category_id": int(label) + 1, "bbox": xywh(box), "score": float(score)}
        for item in found
        for score, label, box in zip(item["scores"], item["labels"], item["boxes"], strict=True)
    ]
    if not annotations or not results:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks a lot
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i, "width": s.size[0], "height": s.size[1]} for i, s in enumerate(samples)],
            "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
        }
        truth.createIndex()
        scored = COCOeval(truth, truth.loadRes(results), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored


def coco_metrics(scored, classes: list[str]) -> dict:
    """map, map_50, ... as numbers from 0 to 1, None where the data has no such box; per class: AP at 0.50:0.95 and at 0.50.

    f1, f1_threshold: the best mean over classes of F1 at IoU 0.50, and the least score of a detection there.
    """
    if scored is None:
        return {name: 0.0 for name in SUMMARY[:3]}
    values = {name: none_if_absent(value) for name, value in zip(SUMMARY, scored.stats[:6], strict=True)}
    values["f1"], values["f1_threshold"] = best_f1(confidence_curves(scored))
    precision = scored.eval["precision"]  # (IoU thresholds 10, recalls 101, classes, areas 4, detections 3); -1: absent
    for key, part in (("per_class_map", precision[:, :, :, 0, -1]), ("per_class_map_50", precision[:1, :, :, 0, -1])):
        values[key] = {name: mean_precision(part[:, :, k]) for k, name in enumerate(classes)}
    return values


def none_if_absent(value) -> float | None:
    return None if value < 0 else float(value)


def mean_precision(values: np.ndarray) -> float | None:
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def class_entries(scored, k: int) -> list[dict]:
    """What pycocotools matched of class k in boxes of any size, picture by picture; its evalImgs run class, size, picture."""
    many = len(scored.params.imgIds)
    first = k * len(scored.params.areaRng) * many
    return [entry for entry in scored.evalImgs[first : first + many] if entry]


def confidence_curves(scored) -> dict[str, np.ndarray]:
    """{"confidence": 0, 0.001, ... 1; "precision", "recall", "f1": (K, 1001) of the detections with such a score or more}.

    At IoU 0.50. NaN where a class has no box; precision also where no detection is left.
    """
    confidence = np.linspace(0, 1, 1001)
    curves = {name: np.full((len(scored.params.catIds), 1001), np.nan) for name in ("precision", "recall", "f1")}
    place = np.flatnonzero(np.isclose(scored.params.iouThrs, IOU))[0]
    for k in range(len(scored.params.catIds)):
        entries = class_entries(scored, k)
        boxes = sum(np.count_nonzero(entry["gtIgnore"] == 0) for entry in entries)
        if boxes:
            scores = np.concatenate([entry["dtScores"] for entry in entries])
            right = np.concatenate([entry["dtMatches"][place] > 0 for entry in entries])
            counts = np.concatenate([~entry["dtIgnore"][place].astype(bool) for entry in entries])
            hits, found = (left_above(scores[which], confidence) for which in (right & counts, counts))
            curves["precision"][k] = np.where(found, hits / np.maximum(1, found), np.nan)
            curves["recall"][k], curves["f1"][k] = hits / boxes, 2 * hits / (found + boxes)
    return {"confidence": confidence, **curves}


def left_above(scores: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """How many of the scores are as high as each confidence."""
    return scores.size - np.searchsorted(np.sort(scores), confidence, side="left")


def mean_curve(curve: np.ndarray) -> np.ndarray:
    """The mean over classes (K, N), of those for which there is a value."""
    there = ~np.isnan(curve)
    return np.where(there.any(axis=0), np.where(there, curve, 0).sum(axis=0) / np.maximum(1, there.sum(axis=0)), np.nan)


def best_f1(curves: dict[str, np.ndarray]) -> tuple[float, float]:
    """(the best mean F1, its confidence; the middle one where several are as good)."""
    mean = mean_curve(curves["f1"])
    best = np.flatnonzero(mean == mean.max())
    return float(mean.max()), float(curves["confidence"][best[len(best) // 2]])


def sample_rows(scored, samples, classes: list[str]) -> list[dict]:
    """What average_precision takes, a row for each picture: its boxes of each class, and what of the found ones matched."""
    rows = [{"file": name, "truth": {}, "found": []} for name in short_names([sample.path for sample in samples])]
    for row, sample in zip(rows, samples, strict=True):
        counts = np.bincount(sample.labels[~sample.crowd], minlength=len(classes))
        row["truth"] = {classes[k]: int(counts[k]) for k in np.flatnonzero(counts)}
    for k in range(len(classes) if scored else 0):
        for entry in class_entries(scored, k):
            marks = np.where(entry["dtIgnore"].astype(bool), "-", np.where(entry["dtMatches"] > 0, "1", "0"))  # (IoUs, found)
            scores = (float(f"{score:.9g}") for score in entry["dtScores"])  # nine digits tell every float32 from the next
            rows[entry["image_id"]]["found"] += [[k, score, "".join(m)] for score, m in zip(scores, marks.T, strict=True)]
    return rows


def save_samples(scored, samples, classes: list[str], path: Path) -> None:
    """samples.json, for errors of map by drawing pictures anew."""
    write_samples(path, "map", True, sample_rows(scored, samples, classes), classes=classes)


def evaluate(model, processor, loader, classes: list[str]) -> dict:
    """The metrics of a model on a loader's data: val_loss and COCO's AP over all queries. Used in training and by eval.py."""
    found, loss = predict(model, processor, loader)
    return {"val_loss": loss, **coco_metrics(coco_eval(loader.dataset.samples, found, classes), classes)}


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_boxes(pixels: np.ndarray, boxes, labels, classes: list[str], scores=None):
    """A PIL picture of (H, W, 3) uint8 pixels with named boxes (xyxy); small pictures are enlarged to be readable."""
    from PIL import ImageDraw, ImageFont

    image, zoom = enlarged(pixels)
    draw = ImageDraw.Draw(image)
    unit = max(1, min(image.size) // 200)
    font = ImageFont.load_default(size=max(11, 7 * unit))
    order = range(len(boxes)) if scores is None else np.argsort(scores)  # the surest on top
    for i in order:
        color = COLORS[int(labels[i]) % len(COLORS)]
        x1, y1, x2, y2 = (float(v) * zoom for v in boxes[i])
        text = classes[int(labels[i])] + ("" if scores is None else f" {scores[i]:.2f}")
        draw.rectangle([x1, y1, x2, y2], outline=color, width=2 * unit)
        left, top, right, bottom = draw.textbbox((x1, y1), text, font=font)
        corner = (min(max(0, x1), image.width - (right - left) - 3), max(0, y1 - (bottom - top) - 5))
        back = draw.textbbox(corner, text, font=font)
        draw.rectangle([back[0] - 2, back[1] - 2, back[2] + 2, back[3] + 2], fill=color)
        draw.text(corner, text, fill="white", font=font)
    return image


def draw_page(dataset, found: list[dict], classes: list[str], indices, path: Path, threshold: float = 0.5) -> None:
    """A page of pictures in pairs: ground truth on the left, predictions above the threshold on the right."""
    by_index, pairs = {item["index"]: item for item in found}, []
    for index in indices:
        sample, item = dataset.samples[index], by_index[index]
        pixels = decode(sample.path, sample.size)
        sure = item["scores"] >= threshold
        truth = draw_boxes(pixels, sample.boxes, sample.labels, classes)
        answer = draw_boxes(pixels, item["boxes"][sure], item["labels"][sure], classes, item["scores"][sure])
        pairs.append(((truth, f"{sample.path.name}: truth"), (answer, f"found, score >= {threshold}")))
    save_pairs(pairs, path)


def worst_first(samples, found: list[dict], threshold: float = 0.5) -> list[int]:
    """Picture indices by the number of mistakes: boxes missed, plus boxes found where there is none (IoU 0.5, same class)."""
    from pycocotools import mask

    def overlap(a, b):
        return mask.iou(*(np.array([[x1, y1, x2 - x1, y2 - y1]], dtype=np.float64) for x1, y1, x2, y2 in (a, b)), [0])[0, 0]

    mistakes = {}
    for item in found:
        sample, sure = samples[item["index"]], item["scores"] >= threshold
        boxes, labels, scores = item["boxes"][sure], item["labels"][sure], item["scores"][sure]
        free, hits = set(np.flatnonzero(~sample.crowd)), 0
        for i in np.argsort(-scores, kind="stable"):
            overlaps = [(overlap(boxes[i], sample.boxes[j]), j) for j in free if sample.labels[j] == labels[i]]
            if overlaps and max(overlaps)[0] >= 0.5:
                free.remove(max(overlaps)[1])
                hits += 1
        mistakes[item["index"]] = len(free) + len(boxes) - hits
    return sorted(mistakes, key=lambda index: (-mistakes[index], index))


def draw_precision_recall(scored, classes: list[str], path: Path) -> None:
    """Precision over recall at IoU 0.50, a line for each class."""
    page, ((axis,),) = figure(1, 1, 7, 5)
    recall, precision = scored.params.recThrs, scored.eval["precision"][0, :, :, 0, -1]
    for k, name in enumerate(classes):
        if (precision[:, k] > -1).any():
            label = f"{name}: AP50 {mean_precision(precision[:, k]):.3f}"
            axis.plot(recall, precision[:, k], label=label, color=COLORS[k % len(COLORS)])
    axis.set(title="Precision and recall at IoU 0.50", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8, ncols=1 + len(classes) // 20)
    save_figure(page, path)


def draw_per_class(metrics: dict, path: Path) -> None:
    """Bars of AP at 0.50 and at 0.50:0.95 for each class."""
    names = list(metrics["per_class_map"])
    page, ((axis,),) = figure(1, 1, max(5, 0.8 * len(names) + 2), 4)
    for shift, (key, label) in enumerate((("per_class_map_50", "AP at IoU 0.50"), ("per_class_map", "AP at IoU 0.50:0.95"))):
        bars = axis.bar(np.arange(len(names)) + 0.4 * shift, [metrics[key][n] or 0 for n in names], 0.4, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks(np.arange(len(names)) + 0.2, names, rotation=30 if len(names) > 6 else 0)
    axis.set(title="Average precision of each class", ylabel="average precision", ylim=(0, 1.05))
    axis.set_axisbelow(True)
    page.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)  # no corner of the bars is free
    save_figure(page, path)


def draw_results(model, processor, dataset, classes: list[str], folder: Path) -> None:
    """What a run leaves of its best model on the validation data: samples.json, plots/, predictions/validation.png."""
    from data import collate

    shapes = [dataset.shape(i) for i in range(len(dataset))]
    batches = (collate([dataset[key] for key in keys]) for keys in EvalBatches(shapes, 8))  # no loader: that has a share only
    found = [item for items in detect(model, processor, batches, with_loss=False) for item in items]
    found = sorted(found, key=lambda item: item["index"])
    scored = coco_eval(dataset.samples, found, classes)
    save_samples(scored, dataset.samples, classes, folder / "samples.json")
    if scored:
        draw_precision_recall(scored, classes, folder / "plots" / "precision_recall.png")
        draw_per_class(coco_metrics(scored, classes), folder / "plots" / "per_class.png")
    draw_page(dataset, found, classes, range(min(6, len(dataset))), folder / "predictions" / "validation.png")
