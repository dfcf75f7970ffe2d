"""Atomic writing: a file is complete or unchanged, even if the process is killed. Everything in the project uses this
writer."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a file next to `path`, flush it to the disk and rename it to `path`.

    An existing file keeps its permissions. If writing fails, nothing is left and the error is raised.
    """
    temporary = path.with_name(f".{os.getpid()}.writing")  # short: `path` may have the maximum length
    try:
        if path.exists():
            temporary.touch(0o600)  # never readable by more users than the old file
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; create the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))
