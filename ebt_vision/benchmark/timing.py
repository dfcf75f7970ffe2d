"""Versions of one piece of work timed side by side: rounds alternate, so that what else the machine does touches all of them.

Figures are medians over the rounds. Rates of one run compare; seconds of two runs do not.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ebt_vision.benchmark.flops import count_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One way to do the work."""

    name: str
    call: Callable[[], object]
    """Does it once."""
    units: int
    """Images or tokens that a call deals with."""
    counted: Callable[[], object] | None = None
    """The same products without torch.compile, whose kernels the counter cannot see; `call` itself where it is None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How fast a version is."""

    name: str
    first_seconds: float
    """The first call, compiling included."""
    seconds: float
    """Median of the rounds."""
    spread: float
    """Half of the distance between the quartiles, in seconds."""
    rate: float
    """Units a second."""
    ratio: float
    """Its rate divided by that of the first version."""
    flops_per_unit: int
    """Of the matrix products that were counted."""
    share_of_matrix_rate: float
    """FLOPs a second as a share of those of plain matrix products, timed in the same rounds."""
    peak_bytes: int | None
    """Most memory allocated on the accelerator; None on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixProduct:
    """What the machine's matrix rate is taken from: (rows, inner) times (inner, columns), as the network has them."""

    rows: int
    inner: int
    columns: int
    dtype: torch.dtype = torch.float32


def time_side_by_side(
    versions: Sequence[Version], matrix: MatrixProduct, *, rounds: int, device: torch.device | str = "cpu"
) -> tuple[list[Timing], float]:
    """The timing of every version, and the matrix rate in FLOPs a second, of `rounds` (1 or more) after two calls of each."""
    device = torch.device(device)
    product, product_flops = _product(matrix, device)
    calls = [version.call for version in versions] + [product]
    first, peaks = [], []
    for call in calls:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first.append(_seconds(call, device))
        _seconds(call, device)
        peaks.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, seconds, strict=True):
            found.append(_seconds(call, device))
    medians = [statistics.median(found) for found in seconds]
    matrix_rate = product_flops / medians[-1]
    timings = []
    for index, version in enumerate(versions):
        flops = count_flops(version.counted or version.call)
        timings.append(
            Timing(
                name=version.name,
                first_seconds=first[index],
                seconds=medians[index],
                spread=_spread(seconds[index]),
                rate=version.units / medians[index],
                ratio=(version.units / medians[index]) / (versions[0].units / medians[0]),
                flops_per_unit=flops // version.units,
                share_of_matrix_rate=flops / medians[index] / matrix_rate,
                peak_bytes=peaks[index],
            )
        )
    return timings, matrix_rate


def _product(matrix: MatrixProduct, device: torch.device) -> tuple[Callable[[], object], int]:
    """Several products at a time, so that a round of them takes long enough to be timed, and their FLOPs."""
    left = torch.randn(matrix.rows, matrix.inner, device=device, dtype=matrix.dtype)
    right = torch.randn(matrix.inner, matrix.columns, device=device, dtype=matrix.dtype)
    flops = 2 * matrix.rows * matrix.inner * matrix.columns
    repeats = max(1, round(2e9 / flops))

    def call() -> None:
        for _ in range(repeats):
            left @ right

    return call, flops * repeats


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _spread(seconds: Sequence[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2
