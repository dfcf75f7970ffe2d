"""Common code of the parts of eval/speed.py: one update, rows timed in rounds, their peak memory in separate processes."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ebt_vision.benchmark.memory import peak_bytes
from ebt_vision.benchmark.time_profile import time_by_kind
from ebt_vision.benchmark.timing import MatrixProduct, Version, time_side_by_side


def update_of(
    settings: argparse.Namespace, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, network: nn.Module
) -> Callable[[], None]:
    kind = torch.device(settings.device).type
    precision = torch.autocast(kind, torch.bfloat16) if settings.precision == "bf16" else nullcontext()

    def update() -> None:
        optimizer.zero_grad()
        with precision:
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return update


def timed(settings: argparse.Namespace, versions: Sequence[Version], product: tuple[int, int, int], unit: str) -> dict:
    rows, inner, columns = product
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    matrix = MatrixProduct(rows=rows, inner=inner, columns=columns, dtype=dtype)
    if settings.peak_of is not None:
        (version,) = [version for version in versions if version.name == settings.peak_of]
        raise PeakFound(peak_bytes(version.call, settings.device))
    timings, rate = time_side_by_side(versions, matrix, rounds=settings.rounds, device=settings.device)
    measured = [asdict(timing) for timing in timings]
    if settings.peak_memory:
        for row in measured:
            row["peak_bytes"] = _peak_alone(settings, row["name"])
    found = {"unit": unit, "matrix_rate": rate, "rows": measured}
    if settings.profile:
        found["profile"] = {version.name: time_by_kind(version.call, settings.device) for version in versions}
    return found


class PeakFound(Exception):
    """Ends a program that was asked only for the peak memory of one row; carries the bytes."""


def _peak_alone(settings: argparse.Namespace, name: str) -> int:
    """Measure the peak memory of one row by this program in a new process. Raises ValueError if that fails."""
    program = Path(__file__).with_name("speed.py")
    command = [sys.executable, str(program), *settings.command, "--parts", settings.part, "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the peak memory of {name!r} was not found: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])
