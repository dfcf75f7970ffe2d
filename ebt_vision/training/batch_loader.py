"""Prepare batches in threads while the model works. A batch is a function of its step, so threads do not change it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ebt_vision.core.rng import generators_on
from ebt_vision.data.order import BatchIndices, BatchStream


class BatchLoader:
    """Return the parts of each step's batch on the device, with generators of the device. Threads prepare the next steps.

    `make(indices, epochs)` makes a part on the CPU. Without threads a part is made when it is requested. Reading and decoding
    release Python's lock, so threads are as useful as worker processes, with one copy of the decoded images.
    """

    def __init__(self, make: Callable[[list[int], list[int]], Any], device: torch.device, *, num_threads: int, num_parts: int):
        self._make, self._device, self._num_parts = make, device, num_parts
        self._num_ahead = num_threads  # in steps; each thread prepares one
        self._pool = ThreadPoolExecutor(num_threads, "batch") if num_threads else None
        self._parts: dict[tuple[int, int], Future[Any]] = {}

    def prepare(self, stream: BatchStream, step: int, last_step: int) -> None:
        """Start the missing parts of `step` and of the steps ahead of it, up to but not including `last_step`."""
        if self._pool is None:
            return
        for ahead in range(step, min(step + self._num_ahead + 1, last_step)):
            if (ahead, 0) not in self._parts:
                indices = stream.batch_at(ahead)
                for part in range(self._num_parts):
                    self._parts[ahead, part] = self._pool.submit(self._part, indices, part)

    def take(self, indices: BatchIndices, part: int) -> Any:
        """Return part `part` of a step on the device. Raises the errors of making it."""
        ready = self._parts.pop((indices.step, part), None)
        return self._moved(self._part(indices, part) if ready is None else ready.result())

    def close(self) -> None:
        """Cancel the parts that are not started, and wait for the others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _part(self, indices: BatchIndices, part: int) -> Any:
        picks = torch.arange(len(indices.indices)).chunk(self._num_parts)[part]
        batch = self._make(indices.indices[picks].tolist(), indices.epochs[picks].tolist())
        return _each_tensor(batch, Tensor.pin_memory) if self._device.type == "cuda" else batch

    def _moved(self, batch: Any) -> Any:
        if self._device.type == "cpu":
            return batch
        moved = _each_tensor(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
        return replace(moved, generators=generators_on(moved.generators, self._device))


def _each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy a batch (a dataclass) with its tensors changed."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})
