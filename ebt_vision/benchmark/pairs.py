"""Real noise: pairs of a noisy and a clean photograph of the same scene, found by patterns of file names."""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebt_vision.benchmark.images import BenchmarkImages
from ebt_vision.data.decoding import DecodeError, decode_image, to_rgb8
from ebt_vision.data.sources import DataError


class BenchmarkPairs(BenchmarkImages):
    """Clean photographs, each with the noisy photograph of the same scene; both are 8-bit RGB of one size."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], skipped: Sequence[tuple[str, str]], what: str):
        self._pairs = list(pairs)
        names = [noisy.name for noisy, _ in pairs]
        super().__init__(lambda index: read_rgb(self._pairs[index][1]), names, skipped, what)

    def noisy(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the noisy photographs, uint8 (3, H, W) each."""
        return [read_rgb(self._pairs[index][0]) for index in indices]

    def _pixels(self, index: int) -> list[Tensor]:
        return [*super()._pixels(index), *self.noisy([index])]


def load_pairs(folder: str, patterns: str, *, limit: int | None = None) -> BenchmarkPairs:
    """Find the pairs in `folder` and its sub-folders by "NOISY:CLEAN", two patterns such as "*_noisy*:*_clean*".

    Two files are a pair if the stars of their patterns match the same text. Patterns are for paths relative to `folder`.
    `limit` takes this number of pairs, evenly spread, and keeps those that can be used.
    Raises ValueError for an invalid pattern, DataError if there is no pair.
    """
    noisy_pattern, clean_pattern = parse_patterns(patterns)
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder; --pairs needs a folder of noisy and clean images")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    clean = {key: path for path in files if (key := _stars(clean_pattern, path.relative_to(root).as_posix())) is not None}
    noisy = {key: path for path in files if (key := _stars(noisy_pattern, path.relative_to(root).as_posix())) is not None}
    if not noisy.keys() & clean.keys():
        raise DataError(
            f"{folder} has no pair of {patterns}: {len(noisy)} files match the first pattern, {len(clean)} the second"
        )
    pairs: list[tuple[Path, Path]] = []
    skipped = [(path.name, "has no clean image") for key, path in noisy.items() if key not in clean]
    keys = [key for key in noisy if key in clean]
    count = len(keys) if limit is None else min(limit, len(keys))
    for key in (keys[place * len(keys) // count] for place in range(count)):  # chosen first: full frames take long to decode
        try:
            sizes = [tuple(read_rgb(path[key]).shape[-2:]) for path in (noisy, clean)]
        except DecodeError as error:
            skipped.append((noisy[key].name, str(error)))
            continue
        if sizes[0] != sizes[1]:
            skipped.append((noisy[key].name, "differs in size from its clean image"))
            continue
        pairs.append((noisy[key], clean[key]))
    if not pairs:
        raise DataError(f"no pair of {folder} can be used ({skipped[0][0]} {skipped[0][1]}); check the files")
    return BenchmarkPairs(pairs, skipped, f"pairs {patterns} from {folder}")


def parse_patterns(text: str) -> tuple[str, str]:
    """Split "NOISY:CLEAN". Raises ValueError unless both patterns have the same number of stars (at least one) and differ."""
    noisy, colon, clean = text.partition(":")
    if not colon or ":" in clean or noisy == clean or not noisy.count("*") == clean.count("*") > 0:
        raise ValueError(f'--pairs {text!r} must be two patterns with equally many stars, such as "*_noisy*:*_clean*"')
    return noisy, clean


def read_rgb(path: Path) -> Tensor:
    """Read uint8 (3, H, W). Raises DecodeError for a file that is not an image, OSError for an unreadable file."""
    pixels = to_rgb8(decode_image(path.read_bytes()))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # HWC -> CHW


def _stars(pattern: str, name: str) -> tuple[str, ...] | None:
    """Return the texts that the stars of `pattern` match in `name`; None without a match."""
    translated = (fnmatch.translate(part) for part in pattern.split("*"))  # "(?s:...)" and an end that Python 3.14 spells anew
    parts = [text[len("(?s:") : text.rindex(")")] for text in translated]
    found = re.fullmatch("(.*)".join(parts), name, flags=re.DOTALL)
    return found and found.groups()
