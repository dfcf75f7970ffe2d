"""Generators made from (seed, and where we are), so that no draw depends on what was drawn before.

A draw that is made for a training sample or an image gets a generator of its own: the value then depends on the seed and
on the sample alone, not on its batch, its process or the step at which a run was resumed.

Draws for candidates (start, Langevin noise, step size) are made on the device of the candidates. A CPU and a GPU draw different
numbers from one seed, and so may two kinds of GPU. The noise of observations is drawn on the CPU, so that all
devices see the same images.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one for each sample of it."""


def make_generator(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose state depends on `seed` and on the integers of `stream` (say rank, epoch, index) and nothing else.

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
    """One generator for each sample index: sample i gets the same one in whatever batch it stands."""
    return [make_generator(seed, *stream, index, device=device) for index in indices]


def generators_on(generators: Sequence[torch.Generator], device: torch.device) -> list[torch.Generator]:
    """Generators on `device`: those that are there already as they are, others anew from their seeds.

    A new one starts at its beginning, whatever was drawn from the old one, and draws other numbers (see above).
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
        raise ValueError(f"got {len(generator)} generators for a batch of {tensor.shape[0]}; give one per sample")
    parts = [draw(tensor.shape[1:], generator=g, device=g.device, dtype=tensor.dtype) for g in generator]
    return torch.stack(parts).to(tensor.device)
