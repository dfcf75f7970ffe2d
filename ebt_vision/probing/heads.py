"""Heads on frozen features: the interface of all heads, logistic regression and weighted k-NN (torch heads: torch_head.py).

A head tries its hyper-parameters on held-out images (`sweep`), then is fitted again with the chosen ones (`predict`). It sees
the validation set only as features to score.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ebt_vision.probing.feature_cache import FeatureRows
from ebt_vision.probing.scores import top_k_accuracy

MAX_LOGISTIC_BYTES = 4 * 10**9
"""Maximum bytes of float32 features that logistic regression holds in memory; it needs about twice as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSet:
    """Training images as features."""

    views: tuple[FeatureRows, ...]
    """Features of the centred squares, then of random crops, if any."""
    labels: np.ndarray  # int64 (n,)
    num_classes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One setting of the hyper-parameters of a head, measured on held-out images."""

    hyper: dict[str, Any]
    top1: float
    top5: float
    seconds: float
    converged: bool = True


class Head(ABC):
    """A kind of classifier."""

    name: str
    settings: dict[str, Any]
    """Everything that a trial depends on, in addition to its hyper-parameters."""

    @abstractmethod
    def accepts(self, pool: str) -> bool:
        """Whether the head accepts features of this pool (see features.POOLS)."""

    @abstractmethod
    def check_size(self, num_images: int, num_values: int) -> None:
        """Raise ValueError if the head cannot be fitted on this number of images and values."""

    @abstractmethod
    def sweep(self, data: ProbeSet, fit: np.ndarray, held_out: np.ndarray) -> list[Trial]:
        """Return a trial for each setting, fitted on the images `fit` (n,) and measured on `held_out` (m,): indices."""

    @abstractmethod
    def predict(self, data: ProbeSet, fit: np.ndarray, hyper: dict, queries: FeatureRows, indices: np.ndarray) -> np.ndarray:
        """Return class scores float32 (len(indices), num_classes) of other features, by a head fitted on the images `fit`."""


class LogisticHead(Head):
    """scikit-learn's multinomial logistic regression (L2, L-BFGS) on standardised features; C is the hyper-parameter."""

    name = "logistic"

    def __init__(self, cs: Sequence[float], max_iter: int = 300) -> None:
        if not cs or min(cs) <= 0:
            raise ValueError(f"C={list(cs)} must be positive numbers; use 1e-4 1e-3 1e-2 1e-1")
        self._cs, self._max_iter = sorted(cs), max_iter
        self.settings = {"cs": self._cs, "max_iter": max_iter}

    def accepts(self, pool: str) -> bool:
        return pool != "tokens"

    def check_size(self, num_images: int, num_values: int) -> None:
        size = num_images * num_values * 4
        if size > MAX_LOGISTIC_BYTES:
            raise ValueError(
                f"{num_images} x {num_values} features are {size / 1e9:.1f} GB, too many for logistic regression; "
                "use --heads torch, which reads them batch by batch, fewer layers or --limit-train"
            )

    def sweep(self, data: ProbeSet, fit: np.ndarray, held_out: np.ndarray) -> list[Trial]:
        features, labels = data.views[0], data.labels
        scale = _Scale(features, fit)
        x, x_held = scale.rows(features, fit), scale.rows(features, held_out)
        model = LogisticRegression(max_iter=self._max_iter, warm_start=True)
        trials = []
        for c in self._cs:  # increasing; each fit starts from the previous result
            begin = time.perf_counter()
            converged = _fit(model.set_params(C=c), x, labels[fit])
            scores = _class_scores(model, x_held)
            trials.append(_trial({"C": c}, scores, labels[held_out], time.perf_counter() - begin, converged))
        return trials

    def predict(self, data: ProbeSet, fit: np.ndarray, hyper: dict, queries: FeatureRows, indices: np.ndarray) -> np.ndarray:
        scale = _Scale(data.views[0], fit)
        model = LogisticRegression(C=hyper["C"], max_iter=self._max_iter)
        _fit(model, scale.rows(data.views[0], fit), data.labels[fit])
        return np.concatenate([_class_scores(model, scale.rows(queries, part)) for part in _chunks(indices, 10_000)])


class _Scale:
    """Standardisation by mean and deviation of the images that a head is fitted on."""

    def __init__(self, features: FeatureRows, fit: np.ndarray) -> None:
        self.mean, self.std = mean_and_std(features, fit)

    def rows(self, features: FeatureRows, indices: np.ndarray) -> np.ndarray:
        x = features.rows(indices)
        x -= self.mean
        x /= self.std
        return x


def mean_and_std(features: FeatureRows, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 (D,) each, in two passes over chunks of rows; the deviation of a constant feature is 1."""
    total = sum(features.rows(part).sum(0, dtype=np.float64) for part in _chunks(indices, 10_000))
    mean = total / len(indices)
    squares = sum(((features.rows(part) - mean) ** 2).sum(0) for part in _chunks(indices, 10_000))
    std = np.sqrt(squares / len(indices))
    return mean.astype(np.float32), np.where(std > 1e-12, std, 1.0).astype(np.float32)


def _fit(model: LogisticRegression, x: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the fit converged; False is reported but is not an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels)
    return bool(model.n_iter_.max() < model.max_iter)


def _class_scores(model: LogisticRegression, x: np.ndarray) -> np.ndarray:
    scores = model.decision_function(x).astype(np.float32)
    return np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores


class KnnHead(Head):
    """Weighted k-NN on the cosine; a neighbour votes with exp(cosine / temperature) (Wu et al. 2018, sec. 3.4; k = 20 and
    T = 0.07 as in DINO). The hyper-parameter is whether features are standardised first; DINO does not standardise.
    """

    name = "knn"

    def __init__(self, k: int = 20, temperature: float = 0.07, device: str = "cpu") -> None:
        self._k, self._temperature, self._device = k, temperature, device
        self.settings = {"k": k, "temperature": temperature}

    def accepts(self, pool: str) -> bool:
        return pool != "tokens"

    def check_size(self, num_images: int, num_values: int) -> None:
        pass  # reads chunk by chunk

    def sweep(self, data: ProbeSet, fit: np.ndarray, held_out: np.ndarray) -> list[Trial]:
        trials = []
        for standardised in (False, True):
            begin, hyper = time.perf_counter(), {"standardised": standardised}
            scores = self.predict(data, fit, hyper, data.views[0], held_out)
            trials.append(_trial(hyper, scores, data.labels[held_out], time.perf_counter() - begin))
        return trials

    def predict(self, data: ProbeSet, fit: np.ndarray, hyper: dict, queries: FeatureRows, indices: np.ndarray) -> np.ndarray:
        bank = data.views[0]
        scale = mean_and_std(bank, fit) if hyper["standardised"] else (np.float32(0), np.float32(1))

        def unit_rows(features: FeatureRows, chosen: np.ndarray) -> torch.Tensor:
            x = torch.from_numpy((features.rows(chosen) - scale[0]) / scale[1]).to(self._device)
            return torch.nn.functional.normalize(x, dim=1)

        scores = []
        for part in _chunks(indices, 2_000):
            query = unit_rows(queries, part)
            best = torch.empty(len(part), 0, device=self._device)
            best_labels = torch.empty(len(part), 0, dtype=torch.int64, device=self._device)
            for chunk in _chunks(fit, 20_000):
                similarity, place = (query @ unit_rows(bank, chunk).T).topk(min(self._k, len(chunk)), dim=1)
                labels = torch.from_numpy(data.labels[chunk]).to(self._device)[place]
                best, order = torch.cat([best, similarity], 1).topk(min(self._k, best.shape[1] + similarity.shape[1]), dim=1)
                best_labels = torch.cat([best_labels, labels], 1).gather(1, order)
            votes = torch.zeros(len(part), data.num_classes, device=self._device)
            scores.append(votes.scatter_add_(1, best_labels, (best / self._temperature).exp()).cpu().numpy())
        return np.concatenate(scores)


def _trial(hyper: dict, scores: np.ndarray, labels: np.ndarray, seconds: float, converged: bool = True) -> Trial:
    top1, top5 = (top_k_accuracy(scores, labels, k) for k in (1, 5))
    return Trial(hyper=hyper, top1=top1, top5=top5, seconds=seconds, converged=converged)


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
