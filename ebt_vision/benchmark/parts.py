"""Figures on disk, batch by batch; the same command resumes after an interruption."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ebt_vision.core.atomic_files import write_atomically, write_text

Part = dict[str, np.ndarray]
"""Arrays with one row per image of a batch."""


class Parts:
    """The batches of one run in their own folder; `key` has everything that they depend on.

    Raises ValueError if the folder has parts that were made with another key.
    """

    def __init__(self, folder: Path, key: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "key.json"
        key = json.loads(json.dumps(key))
        if path.exists():
            _check_key(folder, _read_key(path), key)
        else:
            write_text(path, json.dumps(key, sort_keys=True, indent=1))

    def get(self, indices: Sequence[int], make: Callable[[Sequence[int]], Part]) -> Part:
        """Return the part of these images; make and write it if it is missing or unreadable."""
        path = self.folder / f"{indices[0]:08d}.npz"
        part = read_part(path)
        if part is None:
            part = make(indices)
            write_part(path, part)
        return part


def join(parts: Sequence[Part]) -> Part:
    """Join the parts, (num_images, ...)."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_part(path: Path) -> Part | None:
    """Read a part from its file; None if it is missing or damaged."""
    try:
        with np.load(path) as part:
            return {name: part[name] for name in part.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write_part(path: Path, part: Part) -> None:
    """Write a part atomically."""
    write_atomically(path, lambda file: np.savez(file, **part))  # type: ignore[arg-type]


def _read_key(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError):
        return {}


def _check_key(folder: Path, old: dict, new: dict) -> None:
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        raise ValueError(f"{folder} has parts made with other {', '.join(different)}; choose another --output")
