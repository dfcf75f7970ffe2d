"""One way to refuse an option: its name, what it is, and what to use instead, in one line."""

import argparse
from numbers import Real
from pathlib import Path


def check(valid: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError unless `valid`."""
    if not valid:
        raise ValueError(f"{name}={value} is out of range; {remedy}")


def named_path(text: str) -> Path:
    """A path for argparse: an empty one, which would be the current folder, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; is a shell variable unset?")
    return Path(text)


def check_whole(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of an integer type; True, False and 2.0 are none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; give a whole number, such as 2")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a real number; NaN is one for this check, True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; give a number, such as 0.5")
