"""How sure a metric of a run is, and the difference of two runs, from what each sample gave (samples.json).

A bootstrap draws as many samples as there are, with replacement, a thousand times, and looks how much the metric moves
(Efron and Tibshirani 1993). Two runs get the same draws, so what is hard in a sample is hard for both: a paired comparison.
"""

from pathlib import Path

import numpy as np

from average_precision import average_precisions
from common.checkpoint import read_json
from common.config import UserError

DRAWS = 1000
FEWEST = 20  # samples; of fewer, a bootstrap says less than it seems to
SEEN = 95  # per cent of the draws lie in the interval


def read_samples(folder: Path, metric: str) -> dict | None:
    """samples.json of a run folder, checked; None where there is none, or one of another metric. UserError: it is damaged."""
    path = folder / "samples.json"
    if not path.is_file():
        return None
    record = read_json(path)
    rows = record.get("rows") if isinstance(record, dict) else None
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows)):
        raise UserError(f"{path} is damaged: it holds no rows of samples; evaluate the run again")
    return record if record.get("metric") == metric else None


def drawn_values(record: dict, draws: np.ndarray) -> np.ndarray:
    """The metric (D,) of each draw. draws: (D, N), how often each of the record's N samples is in it. UserError: damaged rows."""
    rows = record["rows"]
    try:
        if "found" in rows[0]:
            return average_precisions(rows, record["classes"], draws)
        if "label" in rows[0]:
            return mean_recalls(*(np.array([row[key] for row in rows]) for key in ("label", "right")), draws)
        values, weights = (np.array([row.get(key, 1.0) for row in rows], dtype=float) for key in ("value", "weight"))
        return draws @ (values * weights) / (draws @ weights)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"a samples.json is damaged ({type(error).__name__}: {error}); evaluate the run again") from None


def mean_recalls(labels: np.ndarray, right: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Balanced accuracy (D,): the mean over classes, of those in the draw, of the share of their samples (N,) that are right."""
    classes = labels == np.unique(labels)[:, None]  # (K, N)
    there, hits = draws @ classes.T, draws @ (classes & right.astype(bool)).T  # (D, K)
    return np.where(there, hits / np.maximum(1, there), 0).sum(axis=1) / (there > 0).sum(axis=1)


def intervals(records: list[dict], base: int) -> list[dict]:
    """For each record {"samples", "interval": [low, high], "difference": [low, high] to records[base]}; {} where it has no pair.

    A record whose files are not those of the base's cannot be paired, and gets its own interval alone.
    """
    order = {row["file"]: i for i, row in enumerate(records[base]["rows"])}
    many = len(order)
    draws = np.random.default_rng(0).multinomial(many, np.full(many, 1 / many), size=DRAWS)
    values = []
    for record in records:
        places = [order.get(row["file"]) for row in record["rows"]]
        paired = None not in places and len(set(places)) == len(places) == many
        values.append(drawn_values(record, draws[:, places]) if paired else None)
    found = []
    for i, own in enumerate(values):
        if own is None or many < FEWEST or np.isnan(own).all():
            found.append({"samples": len(records[i]["rows"])})
            continue
        found.append({"samples": many, "interval": middle_of(own)})
        if i != base:
            found[-1]["difference"] = middle_of(own - values[base])
    return found


def middle_of(values: np.ndarray) -> list[float]:
    """[low, high] between which the middle SEEN per cent of the values lie."""
    return np.nanpercentile(values, [50 - SEEN / 2, 50 + SEEN / 2]).tolist()
