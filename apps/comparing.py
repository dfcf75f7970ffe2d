"""Compare several methods on one image."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from apps.background import in_thread
from apps.sources import Request, Source, open_source, to_bytes
from ebt_vision.denoising.base import Denoiser, adapt_to_noise
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled, tile_grid

COMPARED = 512
"""Longest side in pixels of the compared image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """The result of one method."""

    name: str
    image: np.ndarray | None = None
    """uint8 (h, w, 3)."""
    psnrs: list[float] = field(default_factory=list)
    num_forward: int | None = None
    """Forward passes for each tile; None for a method without a network."""
    seconds: float | None = None
    problem: str = ""


def compare(request: Request, methods: dict[str, Callable[[], Denoiser]], stop: threading.Event) -> Iterator[list[Column]]:
    """Run each method {name: loader} on the middle of the image, and yield the columns so far; the noisy image is the first.

    Every method uses the number of steps of the request, but the regressor uses one. If a method cannot be loaded or run, its
    column holds the error message.
    """
    options = request.options()
    source = open_source(request).middle(COMPARED)
    columns = [Column(name="Noisy", image=to_bytes(source.noisy), psnrs=source.psnr(source.noisy))]
    yield columns
    for name, load in methods.items():
        if stop.is_set():
            return
        yield [*columns, Column(name=name, problem="working …")]
        work = functools.partial(_column, name, load, source, options, request, stop)
        (column,) = in_thread(work, stop, own=False)
        columns = [*columns, column]
        yield columns


def _column(
    name: str,
    load: Callable[[], Denoiser],
    source: Source,
    options: DenoiseOptions,
    request: Request,
    stop: threading.Event,
    post: Callable[[Column], None],
) -> Column:
    try:
        denoiser = adapt_to_noise(load(), request.noise)
        if "regressor" in name.lower():
            options = replace(options, num_steps=1)
        start = time.perf_counter()
        result = denoise_tiled(denoiser, source.noisy, options, tile_size=request.tile_size, on_step=lambda step: stop.is_set())
    except (ValueError, OSError, RuntimeError) as error:
        return Column(name=name, problem=str(error))
    tiles = tile_grid(denoiser, source.noisy.shape[-2:], request.tile_size).count
    return Column(
        name=name,
        image=to_bytes(result.image),
        psnrs=source.psnr(result.image),
        num_forward=round(int(result.num_forward[0]) / tiles) if denoiser.num_parameters else None,
        seconds=time.perf_counter() - start,
        problem="stopped" if stop.is_set() else "",
    )
