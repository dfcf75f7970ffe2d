"""Names in file systems and on terminals."""

import io
import sys


def escape_unprintable() -> None:
    """Have characters that stdout cannot encode, as in the names of files, written as escapes instead of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def file_name(text: str) -> str:
    """The text as a name that every file system takes: letters, digits and -._ stay, anything else becomes _."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)
