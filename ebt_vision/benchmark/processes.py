"""The benchmark in several processes: each measures its share of the batches, and all of them hear of every result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ebt_vision.core.sharing import Share

Value = TypeVar("Value")
ADDRESS = "tcp://127.0.0.1:29500"
"""Where processes meet that were started with RANK and WORLD_SIZE alone, without MASTER_ADDR."""
_LONGEST_WAIT = timedelta(days=7)


class Processes:
    """A context in which the processes that accelerate launch or torchrun started exchange results, by gloo on the CPU."""

    def __init__(self, share: Share):
        self.share = share

    def __enter__(self) -> Processes:
        if self.share.count > 1:
            method = "env://" if "MASTER_ADDR" in os.environ else ADDRESS
            dist.init_process_group(
                "gloo", init_method=method, rank=self.share.index, world_size=self.share.count, timeout=_LONGEST_WAIT
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.share.count > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.share.index == 0

    def gather(self, value: Value) -> list[Value]:
        """What each process gave, in their order; every process must call it."""
        if self.share.count == 1:
            return [value]
        values: list[Any] = [None] * self.share.count
        dist.all_gather_object(values, value)
        return values

    def join(self, own: Sequence[Value]) -> list[Value]:
        """All values in the order of the whole, where `own` belong to the parts that share.of gave this process."""
        shares = self.gather(list(own))
        count = sum(map(len, shares))
        return [shares[place % len(shares)][place // len(shares)] for place in range(count)]
