"""What every command says, and how: one line on stderr, exit statuses, errors that are the user's."""

import contextlib
import os
import sys

BAD_INPUT, INTERRUPTED = 2, 130
READER_LEFT = 141
"""As of a program that SIGPIPE ends."""


def say(message: str) -> None:
    """One line to the user."""
    print(f"ebt-vision: {message}", file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """One line on stdout; where its reader has left, as in `| head -1`, the work goes on without."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        drop_stdout()


def drop_stdout() -> None:
    """From now on what is written to stdout goes nowhere: its reader has left."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file has nothing to flush at the end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def one_line(error: BaseException) -> str:
    """The message of an error in one line; an OSError's says what happened to which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _out_of_memory(error):
        return "out of memory; use a smaller --tile"
    return " ".join(str(error).split()) or type(error).__name__


def is_users(error: Exception) -> bool:
    """Whether an error is about this input, so that the other images can go on: not a fault of the program."""
    from ebt_vision.core.thinking import ThinkingError

    return isinstance(error, ValueError | OSError | ThinkingError) or _out_of_memory(error)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
