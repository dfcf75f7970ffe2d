"""Generators from a seed and a position, so that no draw depends on earlier draws.

Each training sample or image has its own generator. Its draws depend only on the seed and the sample, not on the batch, the
process or the step at which a run resumed.

Draws for candidates (start, Langevin noise, step size) are made on the device of the candidates. With one seed, a CPU and a GPU
draw different numbers; two kinds of GPU may also differ. The noise of observations is drawn on the CPU, so that all devices
see the same images.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one for each sample of it."""


def make_generator(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose state depends only on `seed` and the integers of `stream` (for example rank, epoch, index).

    numpy's SeedSequence mixes the integers (O'Neill 2014, sec. 4.2), so neighbouring seeds give independent streams.
    Raises ValueError for a negative integer.
    """
    if min((seed, *stream)) < 0:
        raise ValueError(f"seed and stream must not be negative, got {(seed, *stream)}")
    mixed = int(np.random.SeedSequence((seed, *stream)).generate_state(1, np.uint64)[0])
    return _seeded(mixed >> 1, device)  # manual_seed takes 63 bits


def sample_generators(
    seed: int, indices: Sequence[int], *stream: int, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Return one generator for each sample index; sample i gets the same generator in any batch."""
    return [make_generator(seed, *stream, index, device=device) for index in indices]


def generators_on(generators: Sequence[torch.Generator], device: torch.device) -> list[torch.Generator]:
    """Return generators on `device`: those already there unchanged, the others created again from their seeds.

    A new generator starts at its beginning, regardless of earlier draws, and draws other numbers (see above).
    """
    return [g if g.device == device else _seeded(g.initial_seed(), device) for g in generators]


def randn_like(tensor: Tensor, generator: Generators | None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `tensor` (B, ...), drawn per sample if given a list."""
    return _draw(torch.randn, tensor, generator)


def rand_like(tensor: Tensor, generator: Generators | None) -> Tensor:
    """Uniform [0, 1) noise of the shape, dtype and device of `tensor` (B, ...), drawn per sample if given a list."""
    return _draw(torch.rand, tensor, generator)


def _seeded(seed: int, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _draw(draw: Callable[..., Tensor], tensor: Tensor, generator: Generators | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        device = generator.device if generator is not None else tensor.device
        return draw(tensor.shape, generator=generator, device=device, dtype=tensor.dtype).to(tensor.device)
    if len(generator) != tensor.shape[0]:
        raise ValueError(f"got {len(generator)} generators for a batch of {tensor.shape[0]}; use one per sample")
    parts = [draw(tensor.shape[1:], generator=g, device=g.device, dtype=tensor.dtype) for g in generator]
    return torch.stack(parts).to(tensor.device)
