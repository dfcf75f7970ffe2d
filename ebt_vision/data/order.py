"""Which samples a training step sees: a pure function of (seed, step), whatever the number of processes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_vision.core.rng import make_generator

ORDER_STREAM = 0x6F726472
"""Keeps the draws of the order apart from every other use of the seed."""


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of 0..num_samples-1 in which `epoch` (0, 1, ...) visits the samples: int64 (num_samples,)."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    return torch.randperm(num_samples, generator=make_generator(seed, ORDER_STREAM, epoch))


_cached_order = functools.lru_cache(maxsize=4)(epoch_order)  # a batch needs two epochs at most but where sets are tiny


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchIndices:
    """One process's part of the global batch of one step; every tensor is int64 (batch_size / world_size,)."""

    step: int
    """The global step, from 0."""
    epochs: Tensor
    """The epoch each sample is drawn in: more than one where an epoch's tail meets the next one's head."""
    indices: Tensor
    """The samples, as indices into the set."""
    positions: Tensor
    """The places in the endless stream of samples: step * batch_size + place in the global batch. Never repeats."""


class BatchStream:
    """The endless iterator over steps; started at step k it yields what an older one would have yielded from k on.

    `batch_size` is that of the global batch, of which process `rank` gets the contiguous slice rank out of `world_size`. An
    epoch's tail is joined with the next epoch's head, so every batch is full, even one larger than the set.
    Raises ValueError for a batch that the processes cannot share evenly.
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
        """The batch of any step, without moving the stream."""
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
