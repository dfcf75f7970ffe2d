"""Features on disk: memory-mapped .npy shards, each with its SHA-256, made once and shared by several processes.

    CACHE/tiny_imagenet_ebt-train-3f2a...-90cd.../
        key.json                        what the features were made of
        noise0.block2.mean/00007.npy    images 7 * shard_size and on, (rows, D) or (rows, N, D)
        noise0.block2.mean/00007.json   its checksum and shape: the shard is done
        claims/00007.lock               held by the process that makes shard 7

The folder's name ends in hashes of the settings (data, transform, seed, dtype) and of the inputs (weights, files). Other
weights or changed files get another folder, and features of the old ones are never read. A shard is written under a temporary
name and renamed, and its checksum is written last. Unfinished shards of a killed process are made again. Claims are file locks,
which end with their process.

Disk: 2 bytes per number in float16. ImageNet-1k at width 1536 needs 1.28 M x 1536 x 2 = 3.9 GB per pooled feature (train) and
0.15 GB (validation). Attention pooling needs 64 tokens, 252 GB per layer. Memory: one shard, in float32, of all features that
are made at once (1/200 of the set: 40 MB for such a feature), plus the rows that are read.
"""

import errno
import glob
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ebt_vision.core.atomic_files import write_atomically
from ebt_vision.core.names import file_name

FORMAT = 1
"""Increased when features of the same key would change, or when their format on disk changes."""
READABLE = "readable"
"""The name under which each shard stores which of its images are readable: bool (rows,)."""
WAIT_SECONDS = 1.0

Compute = Callable[[range, list[str]], dict[str, np.ndarray]]
"""(indices of a shard, its missing names) -> an array (rows, ...) for each name."""


class CacheError(ValueError):
    """The cache cannot be used or written; the one-line message has the remedy."""


def default_shard_size(num_images: int) -> int:
    """At most 200 shards, so that several features can be open at once, but at least 1,000 images per shard."""
    return max(1000, -(-num_images // 200))


class FeatureRows:
    """Features of all images, read from the mapped files on request."""

    def __init__(self, shards: Sequence[Sequence[np.ndarray]], shard_size: int) -> None:
        """`shards[part][shard]` is (rows, ..., D_part); the parts are concatenated on the last axis."""
        self._shards, self._shard_size = shards, shard_size
        first = [part[0] for part in shards]
        width = sum(shard.shape[-1] for shard in first)
        self.shape: tuple[int, ...] = (sum(len(shard) for shard in shards[0]), *first[0].shape[1:-1], width)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return float32 (len(indices), ...), in the order of `indices`, which need not be sorted."""
        wanted = np.asarray(indices, dtype=np.int64)
        result = np.empty((len(wanted), *self.shape[1:]), np.float32)
        shard_of = wanted // self._shard_size
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            rows = wanted[places] - shard * self._shard_size
            start = 0
            for part in self._shards:
                stop = start + part[shard].shape[-1]
                result[places, ..., start:stop] = part[shard][rows]
                start = stop
        return result


class FeatureCache:
    """The features of one list of images under one key; see the module docstring."""

    def __init__(
        self,
        root: Path,
        title: str,
        settings: dict[str, Any],
        made_of: dict[str, str],
        num_images: int,
        *,
        shard_size: int | None = None,
    ) -> None:
        """`title` is for users. `settings` (with "dtype") and `made_of`, the hashes of weights and files, must contain
        everything that the features depend on. Raises CacheError if the folder cannot be created or does not fit its name.
        """
        if settings["dtype"] not in ("float16", "float32"):
            raise CacheError(f"dtype={settings['dtype']!r} is unknown; use float16 or float32")
        if num_images < 1:
            raise CacheError("there are no images to extract features from; check the data")
        self.num_images, self.dtype = num_images, np.dtype(settings["dtype"])
        self.shard_size = shard_size or default_shard_size(num_images)
        settings = {"format": FORMAT, "num_images": num_images, "shard_size": self.shard_size, **settings}
        self._prefix = f"{file_name(title)}-{_short_hash(settings)}-"
        self.folder = root / (self._prefix + _short_hash(made_of))
        self._checked: set[tuple[str, int]] = set()
        text = json.dumps({"settings": settings, "made_of": made_of}, sort_keys=True, indent=1)
        try:
            (self.folder / "claims").mkdir(parents=True, exist_ok=True)
            path = self.folder / "key.json"
            if not path.exists():
                _write(path, text.encode())
            elif path.read_text() != text:
                raise CacheError(f"stale cache: {path} does not fit its folder; delete {self.folder} and run again")
        except OSError as error:
            raise self._explained(error, root) from error

    @property
    def num_shards(self) -> int:
        """Number of shards of each feature."""
        return -(-self.num_images // self.shard_size)

    def indices(self, shard: int) -> range:
        """Return the images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def stale(self) -> list[Path]:
        """Return folders with the same title and settings, but made from other weights or files; they are never read."""
        found = self.folder.parent.glob(glob.escape(self._prefix) + "*")
        return sorted(path for path in found if path != self.folder and path.is_dir())

    def missing(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Return the missing names of each incomplete shard. A damaged shard counts as missing."""
        wanted = [*names, READABLE]
        lacks = {shard: [name for name in wanted if not self._done(name, shard)] for shard in range(self.num_shards)}
        return {shard: left for shard, left in lacks.items() if left}

    def fill(self, names: Sequence[str], compute: Compute, say: Callable[[str], None], progress: Callable[[int], None]) -> None:
        """Make the missing shards of `names`; wait for shards that another process is making.

        `compute` must also return READABLE. `say` gets messages about damage and waiting, `progress` the number of finished
        shards (of num_shards). Raises CacheError for a full disk and for values that the dtype cannot hold; finished shards are
        kept.
        """
        self._report_damage(names, say)
        left = self.missing(names)
        progress(self.num_shards - len(left))
        waiting = False
        while left:
            before = len(left)
            for shard in list(left):
                lock = FileLock(self.folder / "claims" / f"{shard:05d}.lock")
                try:
                    with lock.acquire(timeout=0):
                        self._make(shard, [name for name in left[shard] if not self._done(name, shard)], compute)
                except Timeout:
                    continue
                del left[shard]
                progress(self.num_shards - len(left))
            if left and len(left) == before:
                if not waiting:
                    say(f"waiting for another process that is making {len(left)} shards of {self.folder.name}")
                waiting = True
                time.sleep(WAIT_SECONDS)

    def open(self, names: Sequence[str]) -> FeatureRows:
        """Return the features `names` concatenated. Raises CacheError if a shard is missing."""
        left = self.missing(names)
        if left:
            raise CacheError(f"{self.folder} lacks {len(left)} of {self.num_shards} shards; run the extraction again")
        parts = [[np.load(self._path(name, i), mmap_mode="r") for i in range(self.num_shards)] for name in names]
        return FeatureRows(parts, self.shard_size)

    def readable(self) -> np.ndarray:
        """bool (num_images,): which images are readable; features of the others are meaningless."""
        return np.concatenate([np.load(self._path(READABLE, shard)) for shard in range(self.num_shards)])

    def check_space(self, row_bytes: dict[str, int]) -> None:
        """Raise CacheError unless the disk has room for the missing features, whose rows have this number of bytes."""
        left = (name for shard in range(self.num_shards) for name in row_bytes if not self._sidecar(name, shard).exists())
        need = sum(row_bytes[name] * self.shard_size for name in left)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise CacheError(
                f"the features need about {need / 1e9:.2f} GB, but {self.folder.parent} has only {free / 1e9:.2f} GB left; "
                "ask for fewer layers or conditions, or choose another --cache"
            )

    def _make(self, shard: int, names: list[str], compute: Compute) -> None:
        if not names:
            return
        rows = self.indices(shard)
        arrays = compute(rows, names)
        for name in names:
            array = np.asarray(arrays[name])
            assert len(array) == len(rows), f"{name}: {len(array)} rows for {len(rows)} images"
            if array.dtype != bool:
                array = self._cast(array, name)
            try:
                self._store(name, shard, array)
            except OSError as error:
                raise self._explained(error, self.folder) from error

    def _store(self, name: str, shard: int, array: np.ndarray) -> None:
        path = self._path(name, shard)
        path.parent.mkdir(exist_ok=True)
        for leftover in path.parent.glob(f"{path.stem}.*.writing"):  # left by a killed process: this process now has the claim
            leftover.unlink()
        _write(path, array)
        record = {"sha256": _sha256(path), "shape": list(array.shape)}
        _write(self._sidecar(name, shard), json.dumps(record).encode())
        self._checked.add((name, shard))

    def _cast(self, array: np.ndarray, name: str) -> np.ndarray:
        if not np.isfinite(array).all():
            raise CacheError(f"{name} has values that are not finite; exclude this layer or condition, or check the weights")
        with np.errstate(over="ignore"):
            cast = array.astype(self.dtype)
        if not np.isfinite(cast).all():
            raise CacheError(f"{name} has values up to {np.abs(array).max():.3g}, too large for {self.dtype}; use float32")
        return cast

    def _done(self, name: str, shard: int) -> bool:
        """Whether a shard is intact; its checksum is computed once per process."""
        if (name, shard) in self._checked:
            return True
        try:
            record = json.loads(self._sidecar(name, shard).read_text())
            whole = record["sha256"] == _sha256(self._path(name, shard))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if whole:
            self._checked.add((name, shard))
        return whole

    def _report_damage(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        for name in [*names, READABLE]:
            for shard in range(self.num_shards):
                if self._sidecar(name, shard).exists() and not self._done(name, shard):
                    say(f"{self._path(name, shard)} is damaged (wrong checksum); it is made again")

    def _path(self, name: str, shard: int) -> Path:
        return self.folder / name / f"{shard:05d}.npy"

    def _sidecar(self, name: str, shard: int) -> Path:
        return self._path(name, shard).with_suffix(".json")

    def _explained(self, error: OSError, where: Path) -> CacheError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CacheError(f"the disk of {where} is full; free space or choose another --cache; finished shards are kept")
        return CacheError(f"the cache {where} cannot be used ({error.strerror or error}); choose another --cache")


def _short_hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, content: np.ndarray | bytes) -> None:
    if isinstance(content, bytes):
        write_atomically(path, lambda file: file.write(content))
    else:
        write_atomically(path, lambda file: np.save(file, content, allow_pickle=False))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
