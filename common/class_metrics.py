"""Numbers about classes, by scikit-learn: labels (N,) and logits (N, K) in, metrics out."""

import numpy as np

# needs: scikit-learn
SCORES = ("accuracy", "balanced_accuracy", "top5", "precision", "f1", "ece", "val_loss")  # recall is balanced_accuracy


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def classification_metrics(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> dict:
    """Numbers from 0 to 1 (val_loss: mean cross entropy in nats). Means over classes count each class that occurs the same.

    balanced_accuracy is the mean recall; ece the expected calibration error (`calibration`). A class that does not occur: null.
    """
    from sklearn.metrics import accuracy_score, top_k_accuracy_score

    probabilities = softmax(logits.astype(np.float64))
    guesses, every = probabilities.argmax(axis=1), np.arange(len(classes))
    precision, recall, f1, support = class_scores(labels, logits, classes)
    there = support > 0
    return {
        "val_loss": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean()),
        "accuracy": float(accuracy_score(labels, guesses)),
        "balanced_accuracy": float(recall[there].mean()),
        "precision": float(precision[there].mean()),
        "recall": float(recall[there].mean()),
        "f1": float(f1[there].mean()),
        "top5": float(top_k_accuracy_score(labels, probabilities, k=5, labels=every)) if len(classes) > 5 else None,
        "ece": calibration(labels, probabilities)[0],
        "per_class_f1": {name: float(f1[k]) if there[k] else None for k, name in enumerate(classes)},
    }


def class_scores(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> tuple[np.ndarray, ...]:
    """(precision, recall, F1, number of pictures) of each class, (K,) each; 0 where there is nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support

    return precision_recall_fscore_support(labels, logits.argmax(axis=1), labels=np.arange(len(classes)), zero_division=0)


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15):
    """(expected calibration error, rows of (pictures, mean confidence, accuracy) for each bin that is not empty).

    The pictures are sorted into `bins` equal intervals of the probability of their predicted class; the error is the mean
    over pictures of |confidence - accuracy| of their bin (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = [(int((place == b).sum()), confidence[place == b].mean(), right[place == b].mean()) for b in np.unique(place)]
    return float(sum(count * abs(sure - hit) for count, sure, hit in rows) / len(labels)), rows


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share that was seen as `right` of `count` samples (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    share, z2 = right / count, 1.959964**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return min(share, middle - half), max(share, middle + half)


def sample_rows(files: list[str], labels: np.ndarray, logits: np.ndarray) -> list[dict]:
    """What was said of each picture: label and guess are numbers of classes, probability that of the guess."""
    guesses, sure = logits.argmax(axis=1), softmax(logits.astype(np.float64)).max(axis=1)
    columns = (files, labels.tolist(), guesses.tolist(), (labels == guesses).tolist(), sure.round(6).tolist())
    keys = ("file", "label", "guess", "right", "probability")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def confusion(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> np.ndarray:
    """(K, K) numbers of pictures: rows are true classes, columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(len(classes)))


def score_table(metrics: dict, count: int, zero_shot: dict | None = None) -> str:
    """Lines of text: each number of a model, on `count` pictures, and perhaps of a base's zero-shot answers beside it."""
    columns = [metrics, zero_shot] if zero_shot else [metrics]
    rows = [("", ["tuned", "zero-shot"])] if zero_shot else []
    for key in SCORES:
        rows.append((key.removeprefix("val_"), ["absent" if m[key] is None else f"{m[key]:.4f}" for m in columns]))
        if key == "accuracy":
            ends = [wilson(round(m[key] * count), count) for m in columns]
            rows.append(("  95 % interval", [f"{low:.3f} to {high:.3f}" for low, high in ends]))
    return "\n".join(f"{name:20}" + "".join(f"{word:>16}" for word in words) for name, words in rows)


def class_table(labels: np.ndarray, logits: np.ndarray, classes: list[str], most: int = 20) -> str:
    """Lines of text: precision, recall and F1 of each class that occurs, and its number of pictures; of many the lowest F1."""
    scores = class_scores(labels, logits, classes)
    there = np.flatnonzero(scores[3])
    shown = there if len(there) <= most else there[np.argsort(scores[2][there], kind="stable")[:most]]
    head = "class" if len(shown) == len(there) else f"the {most} lowest F1 of {len(there)}"
    width = max(len(name) for name in [head, *(classes[k] for k in shown)])
    lines = [f"{head:{width}}{'precision':>12}{'recall':>10}{'F1':>10}{'pictures':>10}"]
    for k in shown:
        precision, recall, f1, support = (part[k] for part in scores)
        lines.append(f"{classes[k]:{width}}{precision:12.4f}{recall:10.4f}{f1:10.4f}{support:10}")
    return "\n".join(lines)


def class_report(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> tuple[str, dict]:
    """scikit-learn's classification report as text and as a dict."""
    from sklearn.metrics import classification_report

    options = {"labels": np.arange(len(classes)), "target_names": classes, "zero_division": 0}
    guesses = logits.argmax(axis=1)
    return (
        classification_report(labels, guesses, digits=4, **options),
        classification_report(labels, guesses, output_dict=True, **options),
    )


def worst_first(labels: np.ndarray, logits: np.ndarray) -> list[int]:
    """Indices of the wrong predictions, the most confident first."""
    sure, wrong = softmax(logits.astype(np.float64)).max(axis=1), logits.argmax(axis=1) != labels
    return sorted(np.flatnonzero(wrong).tolist(), key=lambda index: (-sure[index], index))
