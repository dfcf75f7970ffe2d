"""Time versions of one task side by side, in alternating rounds, so that other load affects all versions equally.

Figures are medians over the rounds. Compare only rates of the same run, not seconds of different runs.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ebt_vision.benchmark.flops import count_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One version of the work."""

    name: str
    call: Callable[[], object]
    """Runs the version once."""
    units: int
    """Number of images or tokens per call."""
    counted: Callable[[], object] | None = None
    """The same products without torch.compile, whose kernels the counter cannot see; None uses `call` itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The speed of a version."""

    name: str
    first_seconds: float
    """Seconds of the first call, including compiling."""
    seconds: float
    """Median seconds of the rounds."""
    spread: float
    """Half the distance between the quartiles, in seconds."""
    rate: float
    """Units per second."""
    ratio: float
    """The rate divided by the rate of the first version."""
    flops_per_unit: int
    """FLOPs of the counted matrix products."""
    share_of_matrix_rate: float
    """FLOPs per second as a fraction of the rate of plain matrix products in the same rounds."""
    peak_bytes: int | None
    """Peak memory allocated on the accelerator; None on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixProduct:
    """Sizes of the matrix products that define the machine's matrix rate: (rows, inner) times (inner, columns)."""

    rows: int
    inner: int
    columns: int
    dtype: torch.dtype = torch.float32


def time_side_by_side(
    versions: Sequence[Version], matrix: MatrixProduct, *, rounds: int, device: torch.device | str = "cpu"
) -> tuple[list[Timing], float]:
    """Time every version, and the matrix rate in FLOPs per second, over `rounds` (at least 1) after two calls of each."""
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
    """Return a call of several products, long enough to be timed, and its FLOPs."""
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
