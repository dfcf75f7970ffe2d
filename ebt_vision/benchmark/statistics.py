"""Confidence of figures, and rank correlations. All functions use numpy arrays and a seed."""

import numpy as np
from scipy.stats import rankdata

_CHUNK = 2_000_000
"""Number of resampled indices held at a time."""


def bootstrap_means(values: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap means of `values` (n, k) over images, float64 (num_resamples, k) (Efron 1979).

    Every column gets the same draws, as does every array of n rows with the same seed, so differences are paired. Raises
    ValueError for an array without rows.
    """
    count = len(values)
    if count < 1:
        raise ValueError("values has no rows, so there is nothing to resample")
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, max(_CHUNK // count, 1)):
        size = min(max(_CHUNK // count, 1), num_resamples - start)
        draws = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(draws.ravel(), minlength=size * count).reshape(size, count)
        means.append(weights @ np.asarray(values, dtype=np.float64) / count)
    return np.concatenate(means)


def intervals(means: np.ndarray, *, coverage: float = 0.95) -> np.ndarray:
    """Return the percentile interval (2, k) of resampled means (num_resamples, k)."""
    tail = 50.0 * (1.0 - coverage)
    return np.percentile(means, [tail, 100.0 - tail], axis=0)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, (..., n) pairs -> (...); ties share a rank; NaN if one side is constant."""
    x, y = (rankdata(values, axis=-1) for values in (a, b))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    norm = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (x * y).sum(-1) / norm, np.nan)


def auroc(scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """How well `scores` separate the worse half by `errors` from the better half, along the last axis: (..., n) pairs -> (...).

    This is the fraction of pairs (one from each half) in which the worse one has the higher score; ties count half (Mann &
    Whitney 1947). The worse half is the n // 2 largest errors. NaN if all errors are equal, or n is 1.
    """
    count = scores.shape[-1]
    num_worse = count // 2
    order = rankdata(errors, axis=-1, method="ordinal")
    worse = order > count - num_worse
    apart = errors.max(-1) > errors.min(-1)
    return np.where(apart, auroc_of(scores, worse), np.nan)


def auroc_of(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the share of pairs in which the positive one scores higher, along the last axis: (..., n) and bool (..., n).

    Ties count half (Mann & Whitney 1947); NaN if all or none are positive.
    """
    count = positive.sum(-1)
    rank_sum = (rankdata(scores, axis=-1) * positive).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rank_sum - count * (count + 1) / 2) / np.float64(count * (positive.shape[-1] - count))


def mean_and_spread(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean of runs (n,) and their standard deviation (divisor n - 1); None for a single run."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
