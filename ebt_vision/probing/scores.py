"""Scores of a classifier from its class scores (n, num_classes): counts, intervals, per class."""

import math
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


def top_k_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k highest classes of each row, best first, int64 (n, min(k, num_classes)); ties go to the lower class."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the fraction in [0, 1] of the rows of `scores` (N, num_classes) whose label (N,) is among the k highest.

    Rows with nan count as wrong.
    """
    hits = (top_k_classes(scores, k) == labels[:, None]).any(1) & np.isfinite(scores).all(1)
    return float(hits.mean())


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction in [0, 1] (Wilson 1927); valid at 0 and 1 and for few images."""
    if total < 1:
        return 0.0, 1.0
    share, z2 = hits / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (num_classes, num_classes): rows are the true classes, columns the predicted ones."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierScores:
    """Figures of one classifier on the validation set."""

    num_images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    confusion: np.ndarray  # int64 (num_classes, num_classes)
    top5_classes: np.ndarray  # int64 (num_images, 5 or less)

    @property
    def per_class(self) -> np.ndarray:
        """Top-1 accuracy of each class, (num_classes,); nan for a class without images."""
        totals = self.confusion.sum(1)
        return np.where(totals > 0, self.confusion.diagonal() / np.maximum(totals, 1), np.nan)


def measure(scores: np.ndarray, labels: np.ndarray) -> ClassifierScores:
    """Top-1 and top-5 (top-n of n < 5 classes) of scores (n, num_classes) with Wilson intervals over images."""
    best = top_k_classes(scores, 5)
    hits1, hits5 = int((best[:, 0] == labels).sum()), int((best == labels[:, None]).any(1).sum())
    return ClassifierScores(
        num_images=len(labels),
        top1=hits1 / len(labels),
        top1_interval=wilson_interval(hits1, len(labels)),
        top5=hits5 / len(labels),
        top5_interval=wilson_interval(hits5, len(labels)),
        confusion=confusion_matrix(labels, best[:, 0], scores.shape[1]),
        top5_classes=best,
    )
