"""How sure a figure is, and how well one quantity ranks another. All on numpy arrays, all from a seed."""

import numpy as np
from scipy.stats import rankdata

_CHUNK = 2_000_000
"""Resampled indices held at a time."""


def bootstrap_means(values: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of `values` (n, k) over images drawn with replacement, float64 (num_resamples, k) (Efron 1979).

    Every column gets the same draws, and so does every array of n rows under one seed: differences are paired.
    Raises ValueError without a row.
    """
    count = len(values)
    if count < 1:
        raise ValueError("there is nothing to resample: values has no row")
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, max(_CHUNK // count, 1)):
        size = min(max(_CHUNK // count, 1), num_resamples - start)
        draws = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(draws.ravel(), minlength=size * count).reshape(size, count)
        means.append(weights @ np.asarray(values, dtype=np.float64) / count)
    return np.concatenate(means)


def intervals(means: np.ndarray, *, coverage: float = 0.95) -> np.ndarray:
    """(2, k): the percentile interval of resampled means (num_resamples, k)."""
    tail = 50.0 * (1.0 - coverage)
    return np.percentile(means, [tail, 100.0 - tail], axis=0)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, (..., n) pairs -> (...); ties share a rank; NaN where one side is constant."""
    x, y = (rankdata(values, axis=-1) for values in (a, b))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    norm = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (x * y).sum(-1) / norm, np.nan)


def auroc(scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """How well `scores` tell the worse half by `errors` from the better one, along the last axis: (..., n) pairs -> (...).

    It is the share of pairs (one of each half) in which the worse one has the higher score, ties counting half (Mann &
    Whitney 1947). The worse half are the n // 2 largest errors. NaN where all errors are equal, or n is 1.
    """
    count = scores.shape[-1]
    num_worse = count // 2
    order = rankdata(errors, axis=-1, method="ordinal")
    worse = order > count - num_worse
    rank_sum = (rankdata(scores, axis=-1) * worse).sum(-1)
    pairs = num_worse * (count - num_worse)
    apart = errors.max(-1) > errors.min(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(apart, (rank_sum - num_worse * (num_worse + 1) / 2) / np.float64(pairs), np.nan)


def mean_and_spread(values: np.ndarray) -> tuple[float, float | None]:
    """The mean of runs (n,) and their standard deviation (n - 1 in the divisor), None for a single one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
