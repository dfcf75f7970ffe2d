"""Process many images: read the next and write the previous image while one is processed. Several processes share a folder.

A process claims an image by a lock file before reading it. A killed process leaves no lock. If `accelerate launch` or torchrun
started n processes, each process takes every n-th image.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

if sys.platform != "win32":
    import fcntl

Read = TypeVar("Read")
Done = TypeVar("Done")
CLAIMS = ".claims"
"""The folder of lock files inside the output; the last process removes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One image to denoise."""

    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome(Generic[Done]):
    """The outcome of a job: a value, an error, or neither if another process has the job or has finished it."""

    job: Job
    value: Done | None = None
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The index of this process among all processes, and among those on this machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @classmethod
    def of_environment(cls) -> Share:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which accelerate launch and torchrun set; without them there is one process."""
        names = {"index": "RANK", "count": "WORLD_SIZE", "local_index": "LOCAL_RANK"}
        return cls(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})

    def of(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs of this process: every count-th job."""
        return list(jobs[self.index :: self.count])

    def device(self, name: str) -> str:
        """Return the device of this process. For "cuda", each of several processes gets its own GPU."""
        return f"cuda:{self.local_index}" if name == "cuda" and self.count > 1 else name


@contextlib.contextmanager
def shared_folder(folder: Path) -> Iterator[None]:
    """Create the folder and keep it while any process is in this context. The last process to leave removes an empty folder.

    Each process holds a shared lock on the folder itself. If the system cannot lock folders, the folder stays.
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
    """Return a descriptor with a shared lock on the folder; None if the folder cannot be created or locked."""
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
        except FileNotFoundError:  # another process was the last to leave and has just removed the folder
            pass
        except OSError:
            if descriptor is not None:
                os.close(descriptor)
            return None
        if descriptor is not None:
            os.close(descriptor)


class Pipeline(Generic[Read, Done]):
    """Read in one thread, work in the thread of the caller, write in another thread. Outcomes are in the order of the jobs.

    `work(job, read)` gets the return value of `read(job)` and returns a function. This function writes the result and returns
    the value of the job. `is_done(job)` is true if another process has written the result; the job is then skipped.
    """

    def __init__(
        self,
        output: Path,
        *,
        read: Callable[[Job], Read],
        work: Callable[[Job, Read], Callable[[], Done]],
        is_done: Callable[[Job], bool],
    ):
        self._output, self._read, self._work, self._is_done = output, read, work, is_done

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome[Done]]:
        """Yield the outcome of every job. KeyboardInterrupt and similar exceptions are raised after the earlier outcomes."""
        writing: deque[tuple[Job, Future[Outcome[Done]]]] = deque()
        claims = shared_folder(self._output / CLAIMS)
        with claims, ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            ahead = deque(jobs)
            reading = reader.submit(self._claim_and_read, ahead[0]) if ahead else None
            try:
                while ahead and reading is not None:
                    job = ahead.popleft()
                    claim, read = reading.result()
                    reading = reader.submit(self._claim_and_read, ahead[0]) if ahead else None
                    writing.append((job, self._start(job, claim, read, writer)))
                    while writing and (writing[0][1].done() or len(writing) > 2):
                        yield writing.popleft()[1].result()
            finally:
                if reading is not None and not reading.cancel():
                    self._drop(reading)
                yield from self._rest(writing)

    def _rest(self, writing: deque[tuple[Job, Future[Outcome[Done]]]]) -> Iterator[Outcome[Done]]:
        while writing:
            yield writing.popleft()[1].result()

    def _start(
        self, job: Job, claim: BaseFileLock | None, read: Read | Exception | None, writer: ThreadPoolExecutor
    ) -> Future[Outcome[Done]]:
        """Work on a job and pass the writing to the writer thread. A job without work has its outcome at once."""
        if read is None or isinstance(read, Exception):
            return _finished(self._end(job, claim, error=read))
        try:
            write = self._work(job, read)
        except Exception as error:
            return _finished(self._end(job, claim, error=error))
        except BaseException:
            self._end(job, claim)
            raise
        return writer.submit(self._write, job, claim, write)

    def _write(self, job: Job, claim: BaseFileLock | None, write: Callable[[], Done]) -> Outcome[Done]:
        try:
            value = write()
        except Exception as error:
            return self._end(job, claim, error=error)
        self._end(job, claim)
        return Outcome(job=job, value=value)

    def _end(self, job: Job, claim: BaseFileLock | None, error: Exception | None = None) -> Outcome[Done]:
        """Release the claim; return the outcome without a value. Ignore the error if another process finished the job."""
        _release(claim)
        return Outcome(job=job, error=None if error is not None and self._is_done(job) else error)

    def _claim_and_read(self, job: Job) -> tuple[BaseFileLock | None, Read | Exception | None]:
        """Return a claim and the read value or error; (None, None) if another process has the job or has finished it."""
        claim: BaseFileLock | None = None
        try:
            claim = self._claim(job)
            if claim is None or self._is_done(job):
                self._end(job, claim)
                return None, None
            return claim, self._read(job)
        except Exception as error:
            return claim, error
        except BaseException:
            self._end(job, claim)
            raise

    def _claim(self, job: Job) -> BaseFileLock | None:
        name = hashlib.sha256(os.fsencode(job.target)).hexdigest()[:24]
        lock = FileLock(self._output / CLAIMS / f"{name}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _drop(self, reading: Future[tuple[BaseFileLock | None, Read | Exception | None]]) -> None:
        """Release the claim of an image that was read ahead but will not be processed."""
        with contextlib.suppress(BaseException):
            _release(reading.result()[0])


def _release(claim: BaseFileLock | None) -> None:
    if claim is not None:
        with contextlib.suppress(OSError):
            os.unlink(claim.lock_file)
        claim.release()


def _finished(outcome: Outcome[Done]) -> Future[Outcome[Done]]:
    future: Future[Outcome[Done]] = Future()
    future.set_result(outcome)
    return future
