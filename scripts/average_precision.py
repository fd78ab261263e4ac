"""COCO's mean average precision from what matched in each picture, so that it can be had for other sets of these pictures.

pycocotools does the matching, once; a paired bootstrap then asks for a thousand sets of pictures, each drawn anew.
"""

import numpy as np

MOST = 100  # detections of a class in a picture that count, the surest first


def average_precisions(rows: list[dict], classes: list[str], draws: np.ndarray) -> np.ndarray:
    """map (D,) of D sets of pictures, as COCOeval.stats[0] has it (all areas).

    draws: (D, N) whole numbers, how often each of the N pictures is in each set.

    rows: one a picture, {"truth": {class: number of boxes that are not ignored}, "found": [[class index, score, hits]]}. hits
    has a character for each IoU threshold: 1 where the detection matched a box, 0 where it did not, - where it is ignored.
    NaN for a set without a box.
    """
    values = [class_precisions(rows, k, name, np.asarray(draws)) for k, name in enumerate(classes)]
    there = ~np.isnan(values)
    return np.where(there.any(axis=0), np.where(there, values, 0).sum(axis=0) / np.maximum(1, there.sum(axis=0)), np.nan)


def class_precisions(rows: list[dict], index: int, name: str, draws: np.ndarray) -> np.ndarray:
    """Average precision (D,) of one class over all IoU thresholds; NaN where none of its boxes is in the set."""
    boxes = draws @ np.array([row["truth"].get(name, 0) for row in rows])
    pictures, scores, hits = [], [], []
    for number, row in enumerate(rows):
        own = sorted((found for found in row["found"] if found[0] == index), key=lambda found: -found[1])[:MOST]
        pictures += [number] * len(own)
        scores += [score for _, score, _ in own]
        hits += [marks for _, _, marks in own]
    if not pictures:
        return np.where(boxes > 0, 0.0, np.nan)
    order = np.argsort(-np.array(scores), kind="stable")  # as pycocotools sorts: ties stay in the pictures' order
    marks = np.array([list(text) for text in hits])[order].T  # (T, N)
    times = draws[:, np.array(pictures)[order]]
    return np.array([mean_precision_of(marks, *pair) if pair[1] else np.nan for pair in zip(times, boxes, strict=True)])


def mean_precision_of(marks: np.ndarray, times: np.ndarray, boxes: int) -> float:
    """Mean precision over recalls and IoU thresholds. marks: (T, N), the surest first; times: (N,) each counts so often."""
    right, wrong = (np.cumsum(times * (marks == mark), axis=1) for mark in "10")
    precision = right / np.maximum(1, right + wrong)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best at this recall or a higher one
    precision = np.pad(precision, ((0, 0), (0, 1)))  # and 0 at a recall that is never reached
    wanted = np.linspace(0, 1, 101)  # COCO's recalls
    places = [np.searchsorted(recall, wanted, side="left") for recall in right / boxes]
    return float(np.take_along_axis(precision, np.array(places), axis=1).mean())
