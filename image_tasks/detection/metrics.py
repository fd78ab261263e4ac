"""COCO average precision by pycocotools, and curves over recall and confidence."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from common.batches import to_device
from common.config import UserError
from common.plots import extremes, figure, plot_text, save_figure, with_counts
from common.record import write_samples
from common.runtime import gather_lists, progress_bar, say
from common.samples import short_names
from common.vision.pairs import COLORS

NMS = 0.7  # of two detections of a class that overlap by more (IoU) one is shown
MOST_LINES = 20  # of more classes a plot shows all, and names their mean alone
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
    """pycocotools' COCOeval after accumulate(); None where there is nothing to score. Category id = class index + 1.

    Its attribute `shown` is another one, of what is left after NMS, evaluated at IoU 0.50 alone: for curves over confidence,
    which are to say what a threshold shows, where average precision is of all that the model says.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {"image_id": i, "category_id": int(label) + 1, "bbox": xywh(box), "area": float(area), "iscrowd": int(crowd)}
        for i, s in enumerate(samples)
        for box, label, crowd, area in zip(s.boxes, s.labels, s.crowd, s.area, strict=True)
    ]
    if not annotations or not any(len(item["scores"]) for item in found):
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
        scored = COCOeval(truth, truth.loadRes(result_rows(found)), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        scored.shown = COCOeval(truth, truth.loadRes(result_rows([confident(item, 0) for item in found])), "bbox")
        scored.shown.params.iouThrs, scored.shown.params.areaRng = np.array([0.5]), [[0, 1e10]]
        scored.shown.evaluate()
    return scored


def result_rows(found: list[dict]) -> list[dict]:
    """What pycocotools reads, of what `detect` found."""
    return [
        {"image_id": item["index"], "category_id": int(label) + 1, "bbox": xywh(box), "score": float(score)}
        for item in found
        for score, label, box in zip(item["scores"], item["labels"], item["boxes"], strict=True)
    ]


def coco_metrics(scored, classes: list[str]) -> dict:
    """map, map_50, ... as numbers from 0 to 1, None where the data has no such box; per class: AP at 0.50:0.95 and at 0.50.

    f1, f1_threshold: the best mean over classes of F1 at IoU 0.50 after NMS, and the least score of a detection there.
    """
    if scored is None:
        return {**{name: 0.0 for name in (*SUMMARY[:3], "f1")}, "f1_threshold": None}
    values = {name: none_if_absent(value) for name, value in zip(SUMMARY, scored.stats[:6], strict=True)}
    values["f1"], values["f1_threshold"] = best_f1(confidence_curves(scored))
    parts = dict(zip(("per_class_map", "per_class_map_50"), class_precisions(scored), strict=True))
    return values | {key: dict(zip(classes, part, strict=True)) for key, part in parts.items()}


def class_precisions(scored) -> tuple[list[float | None], list[float | None]]:
    """Average precision of each class at IoU 0.50:0.95, and at 0.50; None where the data has no box of it."""
    precision = scored.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds 10, recalls 101, classes); -1: absent
    every = range(precision.shape[2])
    return [mean_precision(precision[:, :, k]) for k in every], [mean_precision(precision[:1, :, k]) for k in every]


def none_if_absent(value) -> float | None:
    return None if value < 0 else float(value)


def mean_precision(values: np.ndarray) -> float | None:
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def confident(found: dict, threshold: float, nms: float = NMS) -> dict:
    """What is shown of a picture: detections of at least this score, the surest first, one for each object.

    nms: of two of a class that overlap by more than this IoU only the surer one stays; 1: both do. RT-DETR and its like find
    many an object twice. Average precision is of all that the model says, as in papers.
    """
    from torchvision.ops import batched_nms

    boxes, scores, labels = (torch.from_numpy(np.asarray(found[key])) for key in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes.float(), scores.float(), labels, nms).numpy()
    kept = kept[found["scores"][kept] >= threshold]
    return {**found, **{key: found[key][kept] for key in ("boxes", "scores", "labels")}}


def least_score(threshold: float | str, origin: dict) -> float:
    """The threshold as a number; "best": that of the best mean F1 in validation, which the checkpoint's origin holds."""
    if threshold == "best":
        threshold = origin.get("threshold")
        if not isinstance(threshold, float) or not 0 <= threshold <= 1:
            raise UserError("this checkpoint holds no best threshold: give a number (eval.py says which is best: f1_threshold)")
        say(f"threshold {threshold:.3f}, that of the best F1 in validation")
    if isinstance(threshold, str) or not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} must lie between 0 and 1, or be best")
    return threshold


def shown_from(scored) -> float:
    """The least score of what pages show: that of the best F1; 0.5 where there is none."""
    return best_f1(confidence_curves(scored))[1] if scored else 0.5


def box_count(entries: list[dict]) -> int:
    """How many boxes of a class there are to be found, in these entries of its."""
    return sum(np.count_nonzero(entry["gtIgnore"] == 0) for entry in entries)


def class_entries(scored, k: int) -> list[dict]:
    """What pycocotools matched of class k in boxes of any size, picture by picture; its evalImgs run class, size, picture."""
    many = len(scored.params.imgIds)
    first = k * len(scored.params.areaRng) * many
    return [entry for entry in scored.evalImgs[first : first + many] if entry]


def confidence_curves(scored) -> dict[str, np.ndarray]:
    """{"confidence": 0, 0.001, ... 1; "precision", "recall", "f1": (K, 1001) of the detections with such a score or more}.

    Of what is shown, at IoU 0.50. NaN where a class has no box; precision also where no detection is left.
    """
    confidence, scored = np.linspace(0, 1, 1001), scored.shown
    curves = {name: np.full((len(scored.params.catIds), 1001), np.nan) for name in ("precision", "recall", "f1")}
    for k in range(len(scored.params.catIds)):
        entries = class_entries(scored, k)
        boxes = box_count(entries)
        if boxes:
            scores = np.concatenate([entry["dtScores"] for entry in entries])
            right = np.concatenate([entry["dtMatches"][0] > 0 for entry in entries])
            counts = np.concatenate([~entry["dtIgnore"][0].astype(bool) for entry in entries])
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


def held(curves: np.ndarray) -> np.ndarray:
    """Curves (K, N), each with its last value up to where the longest ends: their mean would jump where a class drops out."""
    curves = curves[:, : 1 + np.flatnonzero(~np.isnan(curves).all(axis=0)).max(initial=0)]
    last = np.maximum.accumulate(np.where(np.isnan(curves), 0, np.arange(curves.shape[1])), axis=1)
    return np.take_along_axis(curves, last, axis=1)


def best_f1(curves: dict[str, np.ndarray]) -> tuple[float, float]:
    """(the best mean F1, its confidence; the middle one where several are as good)."""
    mean = mean_curve(curves["f1"])
    best = np.flatnonzero(mean == mean.max())
    return float(mean.max()), float(curves["confidence"][best[len(best) // 2]])


def match_rows(scored, samples, classes: list[str]) -> list[dict]:
    """A row for each picture: how many boxes of each class it has, and which of the found ones matched at which IoU."""
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
    write_samples(path, "map", True, match_rows(scored, samples, classes), classes=classes)


def evaluate(model, processor, loader, classes: list[str]) -> dict:
    """The metrics of a model on a loader's data: val_loss and COCO's AP over all queries. Used in training and by eval.py."""
    found, loss = predict(model, processor, loader)
    return {"val_loss": loss, **coco_metrics(coco_eval(loader.dataset.samples, found, classes), classes)}


# ---- plots -----------------------------------------------------------------------------------------------------------


def draw_evaluation(scored, classes: list[str], folder: Path) -> None:
    """precision_recall.png, confidence.png and per_class.png in the folder."""
    draw_precision_recall(scored, classes, folder / "precision_recall.png")
    draw_confidence(scored, classes, folder / "confidence.png")
    draw_per_class(scored, classes, folder / "per_class.png")


def class_lines(axis, x, curves: np.ndarray, labels: list[str], mean: str) -> None:
    """A line for each class (K, N) that has values, and a thick one of their mean; of many classes only that has a name."""
    few = len(labels) <= MOST_LINES
    for k in np.flatnonzero(~np.isnan(curves).all(axis=1)):
        style = {"color": COLORS[k % len(COLORS)], "ls": "-" if k < len(COLORS) else "--"} if few else {"color": "0.8"}
        axis.plot(x, curves[k], lw=1.2, label=labels[k] if few else None, **style)
    line = mean_curve(held(curves))
    axis.plot(x[: len(line)], line, color="black", lw=2.5, label=mean)


def draw_precision_recall(scored, classes: list[str], path: Path) -> None:
    """Precision over recall at IoU 0.50, a line for each class and one of their mean."""
    page, ((axis,),) = figure(1, 1, 7, 5.5)
    precision = scored.eval["precision"][0, :, :, 0, -1].T  # (classes, recalls)
    precision = np.where(precision > -1, precision, np.nan)
    labels = [f"{plot_text(name)}: AP50 {row.mean():.3f}" for name, row in zip(classes, precision, strict=True)]
    class_lines(axis, scored.params.recThrs, precision, labels, f"all classes: AP50 {np.nanmean(precision):.3f}")
    axis.set(title="Precision and recall at IoU 0.50", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    legend_below(page, axis)
    save_figure(page, path)


def draw_confidence(scored, classes: list[str], path: Path) -> None:
    """Precision, recall and F1 at IoU 0.50, after NMS, over the least score of what is shown; the best mean F1 is marked."""
    page, axes = figure(1, 3, 5, 4.6)
    curves = confidence_curves(scored)
    best, threshold = best_f1(curves)
    titles = {"precision": "Precision: how much of the found is right", "recall": "Recall: how much is found"}
    titles["f1"] = f"F1 of both: best mean {best:.3f} at {threshold:.3f}"
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        class_lines(axis, curves["confidence"], curves[name], [plot_text(c) for c in classes], "all classes")
        axis.axvline(threshold, color="0.4", ls=":", lw=1.5, label="best mean F1")
        axis.set(
            title=title, xlabel="confidence (least score)", ylabel="F1" if name == "f1" else name, xlim=(0, 1), ylim=(0, 1.02)
        )
    axes.flat[2].plot(threshold, best, marker="*", ms=11, color="black")
    legend_below(page, axes.flat[1])  # recall: precision has no line for a class that is never found
    save_figure(page, path)


def legend_below(page, axis) -> None:
    """The axis' legend under the figure, clear of the lines."""
    handles, labels = axis.get_legend_handles_labels()
    page.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)


def draw_per_class(scored, classes: list[str], path: Path) -> None:
    """Bars of AP at 0.50 and at 0.50:0.95 for each class, with its number of boxes; of many classes the lowest and highest."""
    whole, at_half = class_precisions(scored)
    chosen, note = extremes(at_half)
    labels = with_counts(classes, [box_count(class_entries(scored, k)) for k in range(len(classes))])
    page, ((axis,),) = figure(1, 1, 7, max(2.8, 0.45 * len(chosen) + 1.4))
    for shift, values, label in zip((-0.2, 0.2), (at_half, whole), ("AP at IoU 0.50", "AP at IoU 0.50:0.95"), strict=True):
        bars = axis.barh(np.arange(len(chosen)) + shift, [values[k] or 0 for k in chosen], 0.38, label=label)
        axis.bar_label(bars, ["no boxes" if values[k] is None else f"{values[k]:.2f}" for k in chosen], fontsize=7, padding=3)
    axis.set_yticks(range(len(chosen)), [labels[k] for k in chosen], fontsize=8)
    title = f"Average precision of each class (number of boxes){note}"
    axis.set(title=title, xlabel="average precision", xlim=(0, 1.08), ylim=(len(chosen) - 0.4, -0.6))
    page.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)  # no corner of the bars is free
    save_figure(page, path)
