"""What every program does for the terminal that it writes to."""

import io
import sys


def escape_unprintable() -> None:
    """Have characters that stdout cannot encode, as in the names of files, written as escapes instead of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
