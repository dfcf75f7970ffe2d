"""The samples of a training step: a pure function of (seed, step), independent of the number of processes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_vision.core.rng import make_generator

ORDER_STREAM = 0x6F726472
"""Separates the draws of the order from other uses of the seed."""


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which `epoch` (0, 1, ...) visits the samples: a permutation of 0..num_samples-1, int64
    (num_samples,)."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    return torch.randperm(num_samples, generator=make_generator(seed, ORDER_STREAM, epoch))


_cached_order = functools.lru_cache(maxsize=4)(epoch_order)  # a batch needs at most two epochs, except for tiny sets


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchIndices:
    """The part of one process in the global batch of one step; every tensor is int64 (batch_size / world_size,)."""

    step: int
    """The global step, counted from 0."""
    epochs: Tensor
    """The epoch of each sample; a batch contains several epochs if the end of one epoch meets the start of the next."""
    indices: Tensor
    """The samples, as indices into the set."""
    positions: Tensor
    """Positions in the endless stream of samples: step * batch_size + position in the global batch. They never repeat."""


class BatchStream:
    """An endless iterator over steps. Started at step k, it yields the same as an iterator started earlier yields from step k
    on.

    `batch_size` is the size of the global batch; process `rank` gets contiguous slice `rank` out of `world_size`. The end of an
    epoch is joined with the start of the next, so every batch is full, even one larger than the set. Raises ValueError for a
    batch that is not divisible by the number of processes.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start_step: int = 0
    ) -> None:
        if num_samples < 1 or batch_size < 1 or world_size < 1 or start_step < 0:
            raise ValueError(
                f"num_samples={num_samples}, batch_size={batch_size} and world_size={world_size} must be at least 1, "
                f"start_step={start_step} at least 0"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0..{world_size - 1}")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is the global batch and is not divisible by the {world_size} processes; "
                f"use {(batch_size // world_size + 1) * world_size}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.step = start_step

    def batch_at(self, step: int) -> BatchIndices:
        """Return the batch of any step, without moving the stream."""
        size = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * size
        positions = torch.arange(start, start + size)
        epochs, places = positions // self.num_samples, positions % self.num_samples
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            indices[chosen] = _cached_order(self.num_samples, self.seed, epoch)[places[chosen]]
        return BatchIndices(step=step, epochs=epochs, indices=indices, positions=positions)

    def __iter__(self) -> Iterator[BatchIndices]:
        return self

    def __next__(self) -> BatchIndices:
        batch = self.batch_at(self.step)
        self.step += 1
        return batch
