"""Small text files that are there whole or as they were before, whenever the process ends."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, whose folder is made if it is missing, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text)
    os.replace(temporary, path)
