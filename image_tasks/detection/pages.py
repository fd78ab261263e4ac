"""Pictures with boxes drawn on them, and pages of them: the truth beside what a detector finds, its mistakes marked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.batches import whole_batches
from common.plots import RIGHT, WRONG
from common.samples import short_names
from common.vision.pairs import COLORS, MISSED, draw_dashed, enlarged, fitted, save_pairs, write_labels
from common.vision.pictures import decode
from data import collate
from metrics import class_entries, coco_eval, confident, detect, draw_evaluation, save_samples, shown_from

TRUTH = "#1a7f37"
LEGEND = {
    "truth": {"color": TRUTH, "lw": 3},
    "found": {"color": RIGHT, "lw": 3},
    "false alarm": {"color": WRONG, "lw": 3},
    "missed": {"color": MISSED, "lw": 3, "ls": (0, (2, 1))},
}


@dataclass
class Verdict:
    """Of a picture: the detections that are shown, whether each is `right` (N,), and whether each true box is `missed` (M,)."""

    found: dict
    right: np.ndarray
    missed: np.ndarray

    def mistakes(self) -> int:
        return int(self.missed.sum() + (~self.right).sum())

    def in_words(self) -> str:
        wrong, missed = int((~self.right).sum()), int(self.missed.sum())
        alarms = f"{wrong} false alarm{'s' if wrong > 1 else ''}"
        return ", ".join([f"{missed} missed"] * (missed > 0) + [alarms] * (wrong > 0)) or "no mistakes"


def judge(samples, found: list[dict], classes: list[str], threshold: float) -> dict[int, Verdict]:
    """Picture index -> Verdict by pycocotools at IoU 0.50, of detections of at least this score, without duplicates.

    What lies on a crowd box is neither right nor wrong, and counts as right here.
    """
    shown = [confident(item, threshold) for item in found]
    verdicts, box_ids, found_ids = {}, {}, {}  # ids as coco_eval gives them: from 1, in the order of pictures
    starts = np.cumsum([1] + [len(sample.boxes) for sample in samples])
    next_id = 1
    for item in shown:
        sample, count = samples[item["index"]], len(item["boxes"])
        verdicts[item["index"]] = Verdict(item, np.zeros(count, dtype=bool), ~sample.crowd)
        box_ids[item["index"]], found_ids[item["index"]], next_id = starts[item["index"]], next_id, next_id + count
    scored = coco_eval(samples, shown, classes)
    for entry in [entry for k in range(len(classes) if scored else 0) for entry in class_entries(scored, k)]:
        index = entry["image_id"]
        if index in verdicts:
            good = (entry["dtMatches"][0] > 0) | entry["dtIgnore"][0].astype(bool)
            verdicts[index].right[np.array(entry["dtIds"], dtype=int)[good] - found_ids[index]] = True
            hit = entry["gtMatches"][0] > 0
            verdicts[index].missed[np.array(entry["gtIds"], dtype=int)[hit] - box_ids[index]] = False
    return verdicts


def most_mistaken(verdicts: dict[int, Verdict]) -> list[int]:
    """Indices of the pictures with mistakes, those with the most first: boxes missed, and found where there is none."""
    wrong = [index for index, verdict in verdicts.items() if verdict.mistakes()]
    return sorted(wrong, key=lambda index: (-verdicts[index].mistakes(), index))


def draw_marks(image, zoom: float, marks: list, unit: int = 1):
    """Draws [(box xyxy in pixels of the original, text, colour, dashed)] on a PIL picture that is `zoom` times the original."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    placed = [(text, [float(v) * zoom for v in box], color, dashed) for box, text, color, dashed in marks]
    for _, box, color, dashed in placed:
        if dashed:
            draw_dashed(draw, box, color, 2 * unit, 7 * unit)
        else:
            draw.rectangle(box, outline=color, width=2 * unit)
    write_labels(draw, image.size, [(text, box, color) for text, box, color, _ in placed], 11 * unit)
    return image


def draw_boxes(pixels: np.ndarray, boxes, labels, classes: list[str], scores=None):
    """A PIL picture of (H, W, 3) uint8 pixels with named boxes (xyxy); small pictures are enlarged to be readable."""
    image, zoom = enlarged(pixels)
    order = range(len(boxes)) if scores is None else np.argsort(scores)  # the surest on top
    said = [classes[int(k)] + ("" if scores is None else f" {scores[i]:.2f}") for i, k in enumerate(labels)]
    marks = [(boxes[i], said[i], COLORS[int(labels[i]) % len(COLORS)], False) for i in order]
    return draw_marks(image, zoom, marks, max(1, min(image.size) // 400))


def draw_pair(pixels: np.ndarray, sample, verdict: Verdict, classes: list[str]):
    """(picture with the true boxes, picture with what was found and missed)."""
    truth = [
        (box, classes[k] + (" (crowd)" if crowd else ""), TRUTH, bool(crowd))
        for box, k, crowd in zip(sample.boxes, sample.labels, sample.crowd, strict=True)
    ]
    found = verdict.found
    answer = [
        (box, f"{classes[k]} {score:.2f}", RIGHT if right else WRONG, False)
        for box, k, score, right in zip(found["boxes"], found["labels"], found["scores"], verdict.right, strict=True)
    ]
    answer += [(sample.boxes[i], classes[sample.labels[i]], MISSED, True) for i in np.flatnonzero(verdict.missed)]
    return tuple(draw_marks(*fitted(pixels), marks) for marks in (truth, answer))


def draw_page(dataset, verdicts: dict, classes: list[str], indices, threshold: float, title: str, path: Path) -> None:
    """A page of pictures in pairs: the truth on the left, on the right what is found above the threshold, mistakes marked."""
    names, pairs = short_names([sample.path for sample in dataset.samples]), []
    for index in indices:
        sample, verdict = dataset.samples[index], verdicts[index]
        truth, answer = draw_pair(decode(sample.path, sample.size), sample, verdict, classes)
        boxes, count = len(sample.boxes), len(verdict.found["boxes"])
        above = f"{names[index]}\ntruth: {boxes} box{'es' if boxes != 1 else ''}"
        pairs.append(((truth, above), (answer, f"found: {count} above {threshold:.2f}\n{verdict.in_words()}")))
    save_pairs(pairs, title, LEGEND, path)


def draw_pages(dataset, found: list[dict], classes: list[str], threshold: float, path: Path, worst: Path | None = None) -> None:
    """The first pictures as a page, and those with the most mistakes as another. threshold: scores below are not shown."""
    verdicts = judge(dataset.samples, found, classes, threshold)
    total = len(dataset.samples)
    first = range(min(6, total))
    title = f"the first {len(first)} of {total} pictures; a box is found where one of its class overlaps it by IoU 0.5"
    draw_page(dataset, verdicts, classes, first, threshold, title, path)
    if worst:
        order = most_mistaken(verdicts)
        title = f"mistakes in {len(order)} of {total} pictures; those with the most boxes missed and false alarms come first"
        draw_page(dataset, verdicts, classes, order[:8], threshold, title, worst)


def draw_results(model, processor, dataset, classes: list[str], folder: Path) -> None:
    """What a run leaves of its best model on the validation data: samples.json, plots/, predictions/validation.png."""
    batches = whole_batches(dataset, collate, 8, dataset.shapes)
    found = [item for items in detect(model, processor, batches, with_loss=False) for item in items]
    found = sorted(found, key=lambda item: item["index"])
    scored = coco_eval(dataset.samples, found, classes)
    save_samples(scored, dataset.samples, classes, folder / "samples.json")
    if scored:
        draw_evaluation(scored, classes, folder / "plots")
    draw_pages(dataset, found, classes, shown_from(scored), folder / "predictions" / "validation.png")
