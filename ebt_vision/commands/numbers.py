"""Numbers and names on the command line: what cannot be used is refused in one line that says what to give."""

import argparse
import math


def _number(text: str, kind: type[int] | type[float], low: float, remedy: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not value >= low or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; {remedy}")
    return value


def count(text: str) -> int:
    """A whole number, 1 or more."""
    return int(_number(text, int, 1, "use a whole number, 1 or more"))


def whole_number(text: str) -> int:
    """A whole number, 0 or more."""
    return int(_number(text, int, 0, "use a whole number, 0 or more"))


def not_negative(text: str) -> float:
    """A number, 0 or more."""
    return float(_number(text, float, 0, "use a number, 0 or more"))


def positive(text: str) -> float:
    """A number above 0."""
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a number above 0")
    return value


def name(text: str) -> str:
    """A name that is not empty: a shell variable that is unset gives an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; is a shell variable unset?")
    return text
