"""What every command says, and how: one line on stderr, exit statuses, errors that are the user's."""

import sys

BAD_INPUT, INTERRUPTED = 2, 130


def say(message: str) -> None:
    """One line to the user."""
    print(f"ebt-vision: {message}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error in one line; an OSError's says what happened to which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _out_of_memory(error):
        return "out of memory; use a smaller --tile"
    return " ".join(str(error).split()) or type(error).__name__


def is_users(error: Exception) -> bool:
    """Whether an error is about this input, so that the other images can go on: not a fault of the program."""
    from ebt_vision.thinking import ThinkingError

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
