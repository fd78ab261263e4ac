"""The F0 of a sound, and how far it is from the F0 that was asked for."""

import numpy as np

from audio import resample
from f0 import RATE_16K, extract_f0


def heard_f0(wave: np.ndarray, rate: int) -> np.ndarray:
    """F0 in Hz at 0, 10, 20 ms ... (0: unvoiced) of a mono wave (n,), by the best pitch tracker that is there.

    What a voice that has come apart makes, samples that are no numbers, has none.
    """
    if not np.isfinite(wave).all():
        return np.zeros(len(wave) * 100 // rate + 1, dtype=np.float32)
    return extract_f0(resample(wave, rate, RATE_16K), "auto")


def f0_sums(asked: np.ndarray, got: np.ndarray) -> dict[str, np.ndarray | float]:
    """What `f0_scores` needs of a sound, as sums over its frames, so that those of several sounds add up.

    asked, got: 100 values a second, cut to the shorter one. f0: of the frames voiced in both, how many, the squared cents, and
    the squares and products of log F0 around the sound's own means, of which a correlation is made. vuv: frames, and those
    voiced in one alone.
    """
    many = min(len(asked), len(got))
    asked, got = asked[:many], got[:many]
    both = (asked > 0) & (got > 0)
    x, y = (np.log2(f0[both]) for f0 in (asked, got))  # octaves
    cents = np.square(1200 * (x - y)).sum()
    x, y = (octaves - octaves.mean() if len(octaves) else octaves for octaves in (x, y))
    moments = [len(x), cents, (x * x).sum(), (y * y).sum(), (x * y).sum()]
    return {"f0": np.array(moments), "vuv": np.array([many, ((asked > 0) != (got > 0)).sum()], dtype=float)}


def f0_scores(f0: np.ndarray, vuv: np.ndarray) -> dict[str, float | None]:
    """f0_rmse_cents and f0_correlation over frames voiced in both, and vuv_error, the share voiced in one alone.

    The correlation is that of log F0 within sounds: that one is higher than another, as asked, is no merit of its melody.

    f0, vuv: sums of `f0_sums`. None where there is nothing to say it of: no such frame, or an F0 that does not move.
    """
    many, squares, xx, yy, xy = f0
    moves = many > 2 and min(xx, yy) > 1e-9 * many
    return {
        "f0_rmse_cents": float(np.sqrt(squares / many)) if many else None,
        "f0_correlation": float(xy / np.sqrt(xx * yy)) if moves else None,
        "vuv_error": float(vuv[1] / vuv[0]) if vuv[0] else None,
    }
