"""Types of argparse options. An invalid value gives a one-line error that names the valid values."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Accept a finite number of `kind` from `low` to `high`, both included."""
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
    """Accept a finite number above 0."""
    try:
        value = float(not_negative(text))
    except argparse.ArgumentTypeError:
        value = 0.0
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; use a number above 0")
    return value


def one_of(*words: str) -> Callable[[str], str]:
    """Accept one of the words."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return parse


def name(text: str) -> str:
    """Accept a non-empty name. An unset shell variable would give an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; is a shell variable unset?")
    return text


def named_path(text: str) -> Path:
    """Accept a non-empty path. An empty path would mean the current folder."""
    return Path(name(text))
