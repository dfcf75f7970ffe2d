"""Types of argparse options: a value that cannot be used is refused in one line that says what to give."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A finite number of `kind`, from `low` to `high`, both included."""
    what = "a whole number" if kind is int else "a number"
    limits = f", {low:g} or more" if math.isinf(high) else f" from {low:g} to {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; use {what}{limits}")
        return value

    return parse


count = number(int, 1)
whole_number = number(int, 0)
not_negative = number(float, 0)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(not_negative(text))
    except argparse.ArgumentTypeError:
        value = 0.0
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a number above 0")
    return value


def one_of(*words: str) -> Callable[[str], str]:
    """One of the words."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return parse


def name(text: str) -> str:
    """A name that is not empty: a shell variable that is unset gives an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; is a shell variable unset?")
    return text


def named_path(text: str) -> Path:
    """A path that is not empty: an empty one would be the current folder."""
    return Path(name(text))
