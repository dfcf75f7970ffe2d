"""Checks of options: a one-line error with the name, the value and the remedy."""

from numbers import Real


def check(valid: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError unless `valid`."""
    if not valid:
        raise ValueError(f"{name}={value} is out of range; {remedy}")


def check_whole(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of an integer type; True, False and 2.0 are refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; use a whole number, such as 2")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a real number; NaN passes this check, True and False are refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; use a number, such as 0.5")


class MissingExtraError(ValueError):
    """An optional package is not installed; the message has the command to install it."""
