"""Scaling laws of measured errors: error = a + b * C^-c and the pure power law b * C^-c, with bootstrap intervals.

Residuals are of the logarithm of the error, as in Hoffmann et al. 2022 (sec. 3.3), here by least squares. Intervals are of a
residual bootstrap (Efron & Tibshirani 1993, sec. 9.4), widened for few points: grids are small, and their points are no sample
from a population.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm, t

from ebt_vision.benchmark.statistics import intervals

Law = Literal["power", "saturating"]
NUM_PARAMETERS: dict[Law, int] = {"power": 2, "saturating": 3}
_MAX_EXPONENT = 10.0
_FLOORS = (0.0, 0.3, 0.6, 0.9)
"""Start values of the search for the floor `a`, as fractions of the smallest error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """error = a + b * C^-c, with the percentile intervals of `a` and `c`; a is 0 for the pure power law."""

    law: Law
    a: float
    b: float
    c: float
    num_points: int
    rms_residual: float
    """Of the logarithm of the error."""
    a_ci95: tuple[float, float] | None
    c_ci95: tuple[float, float] | None
    """None unless there are more points than parameters."""
    resampled_c: np.ndarray
    """The exponents of the bootstrap, (num_resamples,), or an empty array."""

    def predict(self, costs: np.ndarray) -> np.ndarray:
        """Return the errors that the law predicts at `costs` (n,), float64 (n,)."""
        return self.a + self.b * np.asarray(costs, dtype=np.float64) ** -self.c


def fit_law(costs: Sequence[float], errors: Sequence[float], law: Law, *, num_resamples: int = 1000, seed: int = 0) -> Fit:
    """Fit a law to positive points (C, error). Raises ValueError for fewer points at different costs than parameters."""
    cost, error = (np.asarray(values, dtype=np.float64) for values in (costs, errors))
    needed = NUM_PARAMETERS[law]
    if cost.shape != error.shape or cost.ndim != 1 or len(np.unique(cost)) < needed:
        raise ValueError(f"{len(np.unique(cost))} different costs are too few for the {law} law; measure {needed} or more")
    if not (np.isfinite(cost).all() and np.isfinite(error).all() and (cost > 0).all() and (error > 0).all()):
        raise ValueError("costs and errors must be positive and finite; leave out runs that diverged")
    x, middle = _centred(cost)
    starts = [_start(x, error, floor) for floor in _FLOORS]
    found = _solve(x, error, law, starts)
    a, b, c = _uncentred(found, middle)
    predicted = np.log(a + b * cost**-c)
    residuals = np.log(error) - predicted
    spare = len(cost) - needed
    resampled = np.empty((0, 3))
    if spare > 0:
        # Residuals of a fit are smaller than errors, by the share of the degrees of freedom that it took; and of few points
        # their size is not well known, which is what Student's t has over the normal distribution.
        widened = np.sqrt(len(cost) / spare) * t.ppf(0.975, spare) / norm.ppf(0.975)
        scaled = (residuals - residuals.mean()) * widened
        random = np.random.default_rng(seed)
        draws = random.choice(scaled, size=(num_resamples, len(cost)))
        several = (_solve(x, np.exp(predicted + draw), law, [found]) for draw in draws)
        resampled = np.asarray([_uncentred(values, middle) for values in several])
    a_ci, c_ci = (_interval(resampled[:, column]) for column in (0, 2))
    return Fit(
        law=law,
        a=a,
        b=b,
        c=c,
        num_points=len(cost),
        rms_residual=float(np.sqrt(np.mean(residuals**2))),
        a_ci95=a_ci if law == "saturating" else None,
        c_ci95=c_ci,
        resampled_c=resampled[:, 2],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How much faster the error of one family falls than that of another: the ratio of their exponents."""

    value: float
    ci95: tuple[float, float] | None


def ratio_of_rates(numerator: Fit, denominator: Fit) -> Ratio | None:
    """Return the ratio of two exponents; None if the denominator is not positive.

    1.35 is "35 % faster". The interval pairs the two bootstraps, which are independent; it is None where one has none, or where
    the denominator's exponent is not positive in all but 2.5 % of its draws: the ratio then has no bound.
    """
    if denominator.c <= 0:
        return None
    count = min(len(numerator.resampled_c), len(denominator.resampled_c))
    above, below = numerator.resampled_c[:count], denominator.resampled_c[:count]
    known = below > 0
    interval = _interval(above[known] / below[known]) if count and known.mean() > 0.975 else None
    return Ratio(value=numerator.c / denominator.c, ci95=interval)


Values = tuple[float, float, float]
"""(a, log b, c) of an error a + b * exp(-c * x); x is the logarithm of the cost over its geometric mean."""


def _centred(cost: np.ndarray) -> tuple[np.ndarray, float]:
    """(x, geometric mean): with x around 0, b and c are nearly independent."""
    middle = float(np.exp(np.log(cost).mean()))
    return np.log(cost / middle), middle


def _uncentred(values: Values, middle: float) -> tuple[float, float, float]:
    a, log_b, c = values
    return a, float(np.exp(log_b) * middle**c), c


def _start(x: np.ndarray, error: np.ndarray, floor: float) -> Values:
    """The pure power law of the error over a floor, a share of the smallest error."""
    a = floor * float(error.min())
    values = np.log(error - a)
    return a, float(values.mean()), float(-(x @ values) / (x @ x))  # x has the mean 0


def _solve(x: np.ndarray, error: np.ndarray, law: Law, starts: Sequence[Values]) -> Values:
    """The values of least squared residuals of the logarithm, the best of the searches from `starts`."""
    if law == "power":
        return _start(x, error, 0.0)
    log_error, highest = np.log(error), float(error.min()) * (1.0 - 1e-9)

    def residuals(values: np.ndarray) -> np.ndarray:
        return np.log(values[0] + np.exp(values[1] - values[2] * x)) - log_error

    def jacobian(values: np.ndarray) -> np.ndarray:
        falling = np.exp(values[1] - values[2] * x)
        return np.stack([np.ones_like(x), falling, -x * falling], axis=1) / (values[0] + falling)[:, None]

    low, high = (0.0, -np.inf, -_MAX_EXPONENT), (highest, np.inf, _MAX_EXPONENT)
    best = None
    for start in starts:
        inside = np.clip(start, low, high)
        found = least_squares(
            residuals, inside, jacobian, bounds=(low, high), x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12
        )
        if best is None or found.cost < best.cost * (1 - 1e-9):
            best = found
    assert best is not None
    return float(best.x[0]), float(best.x[1]), float(best.x[2])


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = intervals(values[:, None])[:, 0]
    return float(low), float(high)
