"""The benchmark in several processes: each process measures its share of the batches and gets the results of all others."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ebt_vision.core.sharing import Share

Value = TypeVar("Value")
ADDRESS = "tcp://127.0.0.1:29500"
"""Address of the store for processes that were started with RANK and WORLD_SIZE but without MASTER_ADDR."""
_LONGEST_WAIT = timedelta(days=7)
_PAUSE = 0.02
"""Seconds between two queries for the value of another process."""


class OtherProcessFailedError(RuntimeError):
    """Another process of the benchmark stopped with an error, so this one cannot finish."""


class Processes:
    """A context for processes started by accelerate launch or torchrun, in which they exchange results on the CPU.

    The values are exchanged through the key-value store of torch.distributed. No process group is created, because the worker
    threads of gloo can outlive a process group and abort the process at its end (pytorch/pytorch#179291).
    """

    def __init__(self, share: Share, store: dist.Store | None = None):
        """`store` is the key-value store for several processes; None uses the address that the launcher has set."""
        self.share = share
        self._given_store = store
        self._round = 0

    def __enter__(self) -> Processes:
        if self.share.count > 1:
            self._store = dist.PrefixStore("benchmark", self._given_store or self._meet())
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.share.count == 1:
            return
        if kind is not None:
            if not issubclass(kind, OtherProcessFailedError):  # the one that failed first is named
                with contextlib.suppress(dist.DistError):  # the store is gone if the first process failed before
                    self._store.set("failed", str(self.share.index))
            return
        # The store may live in the first process. It stays until the others have read the last values.
        self._store.set(f"left/{self.share.index}", "")
        if self.is_main:
            for index in range(self.share.count):
                self._wait(f"left/{index}")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and messages of all processes."""
        return self.share.index == 0

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in order of their index. Every process must call it.

        Raises OtherProcessFailedError if another process has stopped with an error.
        """
        if self.share.count == 1:
            return [value]
        self._round += 1
        self._store.set(f"{self._round}/{self.share.index}", pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes too
        values = [pickle.loads(self._wait(f"{self._round}/{index}")) for index in range(self.share.count)]
        # All are in this round, so all have read the round before.
        self._store.delete_key(f"{self._round - 1}/{self.share.index}")
        return values

    def _meet(self) -> dist.Store:
        method = "env://" if "MASTER_ADDR" in os.environ else ADDRESS
        return next(dist.rendezvous(method, self.share.index, self.share.count, timeout=_LONGEST_WAIT))[0]

    def _wait(self, key: str) -> bytes:
        try:
            while not self._store.check([key]):
                if self._store.check(["failed"]):
                    failed = self._store.get("failed").decode()
                    raise OtherProcessFailedError(f"process {failed} failed; read its own message")
                time.sleep(_PAUSE)
            return self._store.get(key)
        except dist.DistError as error:
            raise OtherProcessFailedError("the first process ended; read its own message") from error

    def join(self, own: Sequence[Value]) -> list[Value]:
        """Return the values of all parts, in order. `own` are the values of the parts that share.of gives to this process."""
        shares = self.gather(list(own))
        count = sum(map(len, shares))
        return [shares[place % len(shares)][place // len(shares)] for place in range(count)]
