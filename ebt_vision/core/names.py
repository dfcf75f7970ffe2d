"""Names for file systems and terminals."""

import io
import sys


def escape_unprintable() -> None:
    """Write characters that stdout cannot encode, as in file names, as escapes instead of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def file_name(text: str) -> str:
    """Convert text to a name for every file system: letters, digits and -._ stay, other characters become _."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)
