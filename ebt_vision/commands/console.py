"""Output of all commands: one-line messages on stderr, exit statuses, and which errors are user errors."""

import contextlib
import os
import sys

BAD_INPUT, INTERRUPTED = 2, 130
READER_LEFT = 141
"""The status of a program that SIGPIPE stops."""


def say(message: str) -> None:
    """Print one line on stderr."""
    print(f"ebt-vision: {message}", file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """Print one line on stdout. If the reader closed the pipe, as in `| head -1`, continue without output."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        drop_stdout()


def drop_stdout() -> None:
    """Send all later output on stdout to the null device, because the reader closed the pipe."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is not a file needs no flush at exit
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line; for an OSError, the file and the problem."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _out_of_memory(error):
        return "out of memory; use a smaller --tile"
    return " ".join(str(error).split()) or type(error).__name__


def is_users(error: Exception) -> bool:
    """Whether an error concerns only this input and is not a bug, so that the command can continue with other images."""
    from ebt_vision.core.thinking_results import ThinkingError

    return isinstance(error, ValueError | OSError | ThinkingError) or _out_of_memory(error)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
