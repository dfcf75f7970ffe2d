"""Several processes share one job: the rank of this process, and lock files that claim parts of the job."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import BaseFileLock, FileLock, Timeout

if sys.platform != "win32":
    import fcntl

Part = TypeVar("Part")
CLAIMS = ".claims"
"""Folder of lock files inside an output folder; it is removed at the end."""


_LAUNCHERS = "start several processes with accelerate launch or torchrun, or unset these variables"


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The rank of this process among all processes, and on this machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @classmethod
    def of_environment(cls) -> Share:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which accelerate launch and torchrun set; without them there is one process.

        Raises ValueError for values that do not fit together.
        """
        names = {"index": "RANK", "count": "WORLD_SIZE", "local_index": "LOCAL_RANK"}
        given = {field: os.environ[name] for field, name in names.items() if name in os.environ}
        for field, text in given.items():
            if not text.isdecimal():
                raise ValueError(f"the environment has {names[field]}={text}, which is no rank; {_LAUNCHERS}")
        share = cls(**{field: int(text) for field, text in given.items()})
        if share.index >= share.count or (share.count > 1 and "index" not in given):
            rank = given.get("index", "not set")
            raise ValueError(f"the environment has RANK {rank} and WORLD_SIZE {share.count}; {_LAUNCHERS}")
        return share

    def of(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts of this process: every count-th part."""
        return list(parts[self.index :: self.count])

    def device(self, name: str) -> str:
        """Return the device of this process; with "cuda", each of several processes gets its own GPU."""
        return f"cuda:{self.local_index}" if name == "cuda" and self.count > 1 else name


@contextlib.contextmanager
def shared_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep it while any process is in this context; the last one to leave removes it if it is empty.

    Each process holds a shared lock on the folder itself. Where the system cannot lock a folder, the folder stays.
    """
    entered = _enter(folder)
    try:
        yield
    finally:
        if entered is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(entered, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder.rmdir()
            os.close(entered)


def _enter(folder: Path) -> int | None:
    """Open the folder with a shared lock and return its descriptor; None if it cannot be created or locked."""
    if sys.platform == "win32":
        return None
    while True:
        descriptor = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except FileNotFoundError:  # another process has left it meanwhile, as the last one
            pass
        except OSError:
            if descriptor is not None:
                os.close(descriptor)
            return None
        if descriptor is not None:
            os.close(descriptor)


def claim_part(folder: Path, name: str) -> BaseFileLock | None:
    """Claim a part until `release`; None while another process holds it. A killed process holds no claims."""
    lock = FileLock(folder / f"{name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def release(claim: BaseFileLock | None) -> None:
    """Release a claim and remove its file."""
    if claim is not None:
        with contextlib.suppress(OSError):
            os.unlink(claim.lock_file)
        claim.release()
