"""Files that are there whole or as they were before, whenever the process ends. The one writer of the project."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a file beside `path`, bring it to the disk and rename it to `path`.

    A file that was there before keeps its permissions. Where writing fails nothing is left, and the error is raised.
    """
    temporary = path.with_name(f".{os.getpid()}.writing")  # short: the name itself may be as long as a name can be
    try:
        if path.exists():
            temporary.touch(0o600)  # not even for a moment readable by more people than the old file
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
    """Write UTF-8 text in one go; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))
