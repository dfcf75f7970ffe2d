"""One way to refuse an option: its name, what it is, and what to use instead, in one line."""

import argparse
from pathlib import Path


def check(valid: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError unless `valid`."""
    if not valid:
        raise ValueError(f"{name}={value} is out of range; {remedy}")


def named_path(text: str) -> Path:
    """A path for argparse: an empty one, which would be the current folder, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a shell variable unset?")
    return Path(text)
