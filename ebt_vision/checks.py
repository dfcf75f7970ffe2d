"""One way to refuse an option: its name, what it is, and what to use instead, in one line."""


def check(valid: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError unless `valid`."""
    if not valid:
        raise ValueError(f"{name}={value} is out of range; {remedy}")
