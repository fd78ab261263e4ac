"""Numbers about classes, by scikit-learn: labels (N,) and logits (N, K) in, metrics out."""

import numpy as np

# needs: scikit-learn


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def classification_metrics(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> dict:
    """Numbers from 0 to 1 (val_loss: mean cross entropy in nats). Means over classes count each class that occurs the same.

    balanced_accuracy is the mean recall; ece the expected calibration error (`calibration`). A class that does not occur: null.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score

    probabilities = softmax(logits.astype(np.float64))
    guesses, every = probabilities.argmax(axis=1), np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(labels, guesses, labels=every, zero_division=0)
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


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15):
    """(expected calibration error, rows of (share of the pictures, mean confidence, accuracy) for each bin that is not empty).

    The pictures are sorted into `bins` equal intervals of the probability of their predicted class; the error is the mean
    over pictures of |confidence - accuracy| of their bin (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = [((place == b).mean(), confidence[place == b].mean(), right[place == b].mean()) for b in np.unique(place)]
    return float(sum(share * abs(sure - hit) for share, sure, hit in rows)), rows


def confusion(labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> np.ndarray:
    """(K, K) numbers of pictures: rows are true classes, columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(len(classes)))


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
