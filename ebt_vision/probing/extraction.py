"""From images to cached features of one network: missing features are made shard by shard, all layers in one pass."""

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ebt_vision.data.lazy_images import LazyImages
from ebt_vision.data.sources import HUB_PREFIX
from ebt_vision.probing.extractors import FeatureExtractor
from ebt_vision.probing.feature_cache import READABLE, FeatureCache, FeatureRows
from ebt_vision.probing.features import Feature, extract

_SECONDS_BETWEEN_LINES = 20.0


class FeatureMaker:
    """Make and open the features of one network, and record the cost."""

    def __init__(
        self, extractor: FeatureExtractor, root: Path, *, dtype: str, batch_size: int, seed: int, say: Callable[[str], None]
    ) -> None:
        self.extractor, self.seed, self._say = extractor, seed, say
        self._root, self._dtype, self._batch_size = root, dtype, batch_size
        self.identity = [extractor.identity, seed, dtype]
        """Everything that features depend on, except the images and the requested features."""
        self._reported: set[Path] = set()
        self._shapes: dict[Feature, tuple[int, ...]] = {}
        self.num_made, self.seconds = 0, 0.0
        """Number of images that this process has read and passed through the network, and the seconds."""
        self.bytes_used = 0
        """Bytes on disk of all requested features."""

    def shapes(self, features: Sequence[Feature]) -> dict[Feature, tuple[int, ...]]:
        """Return the shape of each feature of one image, found with a black image. Raises ValueErrors like `extract`."""
        left = [feature for feature in features if feature not in self._shapes]
        if left:
            blank = torch.zeros(1, 3, self.extractor.img_size, self.extractor.img_size, dtype=torch.uint8)
            found = extract(self.extractor, blank, [0], left)
            self._shapes |= {feature: tuple(array.shape[1:]) for feature, array in found.items()}
        return {feature: self._shapes[feature] for feature in features}

    def make(self, images: LazyImages, split: str, features: Sequence[Feature], view: int = 0) -> FeatureCache:
        """Return the cache with all `features`; `split` ("train" or "val") separates their noise. Raises ValueErrors like
        extract."""
        by_name = {feature.name: feature for feature in features}
        cache = self._cache(images, split, view)
        for folder in set(cache.stale()) - self._reported:
            self._reported.add(folder)
            self._say(f"stale cache: {folder} was made from other weights or files and is not used; delete it to free space")
        shapes = self.shapes(features)
        row_bytes = {feature.name: math.prod(shape) * cache.dtype.itemsize for feature, shape in shapes.items()}
        cache.check_space(row_bytes)
        self.bytes_used += sum(row_bytes.values()) * len(images)

        def compute(indices: range, names: list[str]) -> dict[str, np.ndarray]:
            begin = time.perf_counter()
            arrays = self._compute(images, split, view, indices, [by_name[name] for name in names if name in by_name])
            self.seconds += time.perf_counter() - begin
            self.num_made += len(indices)
            return arrays

        cache.fill(list(by_name), compute, self._say, _Progress(f"{split} features", cache.num_shards, self._say))
        return cache

    def _cache(self, images: LazyImages, split: str, view: int) -> FeatureCache:
        config = images.config
        place = config.path if config.path.startswith(HUB_PREFIX) else os.path.abspath(os.path.expanduser(config.path))
        settings = {
            "model": self.extractor.name,
            "data": place,
            "split": [split, config.split, config.image_column],
            "limit": config.limit,
            "img_size": config.img_size,
            "view": [view, images.seed] if view else 0,
            "noise_seed": self.seed,
            "dtype": self._dtype,
        }
        made_of = {"weights": self.extractor.identity, "files": images.fingerprint}
        return FeatureCache(self._root, f"{self.extractor.name}-{split}", settings, made_of, len(images))

    def _compute(
        self, images: LazyImages, split: str, view: int, indices: range, features: list[Feature]
    ) -> dict[str, np.ndarray]:
        # Training and validation noise use different seeds, and each view has its own seed.
        seed = 2 * (self.seed * 1000 + view) + (split == "val")
        parts: dict[str, list[np.ndarray]] = {name: [] for name in [READABLE, *(feature.name for feature in features)]}
        for start in range(indices.start, indices.stop, self._batch_size):
            batch = range(start, min(start + self._batch_size, indices.stop))
            pixels, readable = images.read(batch, view)
            entries = [images.entries[index] for index in batch]
            parts[READABLE].append(readable)
            for feature, array in extract(self.extractor, pixels, entries, features, seed=seed).items():
                parts[feature.name].append(array.numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def open_features(cache: FeatureCache, features: Sequence[Feature]) -> FeatureRows:
    """Return the features concatenated, read from the disk."""
    return cache.open([feature.name for feature in features])


class _Progress:
    """Report progress with the remaining time at intervals."""

    def __init__(self, title: str, total: int, say: Callable[[str], None]) -> None:
        self._title, self._total, self._say = title, total, say
        self._first: int | None = None
        self._begin = self._last_report = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first, self._begin, self._last_report = done, now, now
            if done < self._total:
                self._say(f"{self._title}: {done} of {self._total} shards exist")
        elif done < self._total and now - self._last_report > _SECONDS_BETWEEN_LINES:
            left = (now - self._begin) / (done - self._first) * (self._total - done)
            self._say(f"{self._title}: {done} of {self._total} shards, about {left / 60:.1f} min left")
            self._last_report = now
