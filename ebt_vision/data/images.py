"""Images for training and measuring: one size, uint8, every draw depends only on (seed, epoch, sample)."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ebt_vision.core.rng import sample_generators
from ebt_vision.data.decoding import DecodeError, decode_image, to_rgb8
from ebt_vision.data.graphics import draw_graphic
from ebt_vision.data.sources import DataError, Source, open_source

MAX_ASPECT_RATIO = 20
"""Longer images are skipped: a square crop contains almost nothing of them, and resizing makes them very large."""

AUGMENT_STREAM, GRAPHICS_STREAM = 0x63726F70, 0x64726177
"""Separate the draws of crops and flips, and of drawings, from other uses of the seed."""

NUM_DECODE_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images to use, and how they become squares of `img_size`."""

    path: str
    """Folder of images, parquet or shards; image or parquet file or glob; *.tar shards with braces; hub:OWNER/NAME."""
    split: str | None = None
    """Sub-folder, file-name prefix or hub split. None: the whole folder (an error if it has several splits), or "train" of a
    hub."""
    image_column: str = "image"
    """Column of the images in parquet and hub sets; field of a shard's samples if they have several (jpg, depth.png)."""
    label_column: str | None = "label"
    """Column of the labels in parquet and hub sets, field of a shard's .json; None ignores all labels."""
    img_size: int = 64
    """Side of the square crop, pixels."""
    short_side: int | None = None
    """Length to which the shorter side of longer images is resized before cropping. Smaller images are resized only as far as
    img_size needs. None: resize to img_size, up or down."""
    cut_sizes: tuple[int, ...] = ()
    """Only in training: cut each crop into squares of one of these sides, drawn for each epoch. The network then sees several
    image sizes at the same number of pixels per update. Each must divide img_size. Empty: crops stay whole."""
    crop: Literal["center", "random"] = "center"
    """Position of the square crop; "random" draws a new position in every epoch."""
    flip: bool = False
    """Mirror left-right with probability 1/2, drawn again in every epoch."""
    rotate: bool = False
    """Rotate by 0, 90, 180 or 270 degrees, drawn again in every epoch."""
    zoom: float = 1.0
    """With crop "random": enlarge half of the crops (bicubic) by a factor in 1..zoom, log-uniform. Small images then also
    represent large photographs, which are smoother. 1 disables this."""
    graphics_share: float = 0.0
    """Fraction of the images, in [0, 1], replaced by synthetic drawings (see graphics.py), drawn again in every epoch. Labels
    do not change, so use it only for denoising."""
    cache: bool = True
    """Hold all images in memory as uint8 (3 * img_size^2 bytes each when cropped at the centre); False decodes on every use."""
    check: bool = True
    """Decode every image at the start and skip unusable ones. False (only with cache=False) skips this check and fails at the
    first unusable image. Use it for a million images known to be good, which every process would otherwise decode."""
    limit: int | None = None
    """Maximum number of images, spread evenly over the set; None for all."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; give a folder, files or hub:OWNER/NAME")
        if self.img_size < 1:
            raise ValueError(f"img_size={self.img_size} must be at least 1")
        if self.short_side is not None and self.short_side < self.img_size:
            raise ValueError(f"short_side={self.short_side} is below img_size={self.img_size}; use {self.img_size} or more")
        if not 1 <= self.zoom <= self.img_size:
            raise ValueError(f"zoom={self.zoom:g} is not in 1..{self.img_size} (img_size); use 1 to enlarge nothing")
        if self.zoom > 1 and self.crop != "random":
            raise ValueError(f"zoom={self.zoom:g} needs crop: random; set crop: random or zoom: 1")
        if not 0 <= self.graphics_share <= 1:
            raise ValueError(f"graphics_share={self.graphics_share:g} is not in [0, 1]")
        for size in self.cut_sizes:
            if size < 1 or self.img_size % size:
                raise ValueError(f"cut_sizes={list(self.cut_sizes)}: {size} does not divide img_size={self.img_size}")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop={self.crop!r} is not 'center' or 'random'")
        if self.cache and not self.check:
            raise ValueError("check=False needs cache=False: the cache decodes every image")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1, or null for all images")


class ImageSet:
    """A fixed list of readable images. `load_image_set` creates it and decodes each image once."""

    labels: list[int] | None
    """The class index of each image, or None."""
    class_names: list[str] | None
    """The name of each class index, if the source has names."""
    skipped: list[tuple[str, str]]
    """(name, reason) of every unusable image; these images have no index."""

    def __init__(self, config: DataConfig, source: Source, seed: int = 0) -> None:
        self.config, self.seed, self._source = config, seed, source
        count = len(source) if config.limit is None else min(config.limit, len(source))
        candidates = [place * len(source) // count for place in range(count)]
        self.skipped = []
        self._entries: list[int] = []  # index of each image in the source
        self._cache: np.ndarray | list[np.ndarray] = []
        if config.check:
            self._load(candidates)
        else:
            self._entries = candidates
        if not self._entries:
            reason = "{} {}".format(*self.skipped[0]) if self.skipped else "it is empty"
            raise DataError(f"no image of {config.path} can be used ({reason}); check the path and the files")
        self.labels = None if source.labels is None else [source.labels[entry] for entry in self._entries]
        self.class_names = source.class_names

    def _load(self, candidates: Sequence[int]) -> None:
        """Decode everything once: fill the cache and find the usable images."""
        size = self.config.img_size
        # Centre crops have one shape and share one array; random crops need the longer side as well.
        squares = self.config.cache and self.config.crop == "center"
        cache = np.empty((len(candidates), 3, size, size), np.uint8) if squares else None
        ragged: list[np.ndarray] = []
        for entry, result in zip(candidates, _with_progress(self._decode_all(candidates), len(candidates)), strict=True):
            if isinstance(result, DecodeError):
                self.skipped.append((self._source.name(entry), str(result)))
                continue
            if cache is not None:
                cache[len(self._entries)] = result
            elif self.config.cache:
                ragged.append(result)
            self._entries.append(entry)
        self._cache = cache[: len(self._entries)] if cache is not None else ragged

    def _decode_all(self, entries: Sequence[int]) -> Iterator[np.ndarray | DecodeError]:
        with ThreadPoolExecutor(NUM_DECODE_THREADS) as pool:
            for start in range(0, len(entries), 256):  # in chunks, so that results do not accumulate
                yield from pool.map(self._try_decode, entries[start : start + 256])

    def _try_decode(self, entry: int) -> np.ndarray | DecodeError:
        try:
            return self._decode(entry)
        except DecodeError as error:
            return error
        except OSError as error:
            return DecodeError(f"cannot be read ({error.strerror or error})")

    def _decode(self, entry: int) -> np.ndarray:
        pixels = to_rgb8(decode_image(self._source.read(entry)))
        return fit(pixels, self.config)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Return a readable name of image `index`."""
        return self._source.name(self._entries[index])

    @property
    def num_skipped(self) -> int:
        """Number of unusable images."""
        return len(self.skipped)

    def report(self) -> str:
        """Describe the set in one line: number, size and classes of images, and the skipped images with reasons."""
        line = f"{len(self)} images of {self.config.img_size}x{self.config.img_size} from {self.config.path}"
        if self.labels is not None:
            line += f", {len(self.class_names) if self.class_names else len(set(self.labels))} classes"
        if self.skipped:
            shown = "; ".join(f"{name} {reason.split(';')[0]}" for name, reason in self.skipped[:3])
            line += f"; {self.num_skipped} skipped: {shown}" + ("; ..." if self.num_skipped > 3 else "")
        return line

    def images(self, indices: Sequence[int] | Tensor, epochs: int | Sequence[int] | Tensor = 0) -> Tensor:
        """Return uint8 RGB (B, 3, img_size, img_size) of the images `indices`, with the crops, flips and so on of their epochs.

        `epochs` is one epoch for all or one per image; it has no effect if nothing is drawn. The draws depend only on
        (seed, epoch, index). Raises IndexError outside 0..len-1, DataError for a file that has disappeared since loading.
        """
        chosen = [int(index) for index in indices]
        if chosen and not 0 <= min(chosen) <= max(chosen) < len(self):
            raise IndexError(f"indices {min(chosen)}..{max(chosen)} are not all in 0..{len(self) - 1}")
        if not chosen:
            return torch.empty((0, 3, self.config.img_size, self.config.img_size), dtype=torch.uint8)
        wide = [self._cached_or_decoded(index) for index in chosen]
        if not self._draws_anything:
            return torch.from_numpy(np.stack(wide))
        per_image = [epochs] * len(chosen) if isinstance(epochs, int) else [int(epoch) for epoch in epochs]
        draws = (self._draw(index, epoch) for index, epoch in zip(chosen, per_image, strict=True))
        made = [self._augmented(*pair) for pair in zip(wide, draws, strict=True)]
        if self.config.graphics_share:
            made = [self._or_drawing(*image) for image in zip(made, chosen, per_image, strict=True)]
        return torch.from_numpy(np.stack(made))

    @property
    def _draws_anything(self) -> bool:
        config = self.config
        return config.crop == "random" or config.flip or config.rotate or config.graphics_share > 0

    def _or_drawing(self, image: np.ndarray, index: int, epoch: int) -> np.ndarray:
        """Return the image, or with probability graphics_share a drawing of the same size."""
        (generator,) = sample_generators(self.seed, [index], GRAPHICS_STREAM, epoch)
        is_photograph = float(torch.rand((), generator=generator)) >= self.config.graphics_share
        return image if is_photograph else draw_graphic(self.config.img_size, generator)

    def _cached_or_decoded(self, index: int) -> np.ndarray:
        if self.config.cache:
            return self._cache[index]
        result = self._try_decode(self._entries[index])
        if isinstance(result, DecodeError):
            name = self._source.name(self._entries[index])
            known = "it was readable when the set was loaded" if self.config.check else "data.check: true would skip it"
            raise DataError(f"{name} of {self.config.path} {result} ({known})")
        return result

    def _draw(self, index: int, epoch: int) -> list[float]:
        """Draw five uniforms in [0, 1) for (flip, top, left, turns, zoom)."""
        (generator,) = sample_generators(self.seed, [index], AUGMENT_STREAM, epoch)
        return [u for count in (3, 2) for u in torch.rand(count, generator=generator, dtype=torch.float64).tolist()]

    def _augmented(self, image: np.ndarray, draw: list[float]) -> np.ndarray:
        """(3, h, w) -> (3, img_size, img_size), with the draws of _draw."""
        size, (flip, top, left, turns, zoom) = self.config.img_size, draw
        if self.config.crop == "random":
            side = round(size / self.config.zoom ** max(0.0, 2.0 * zoom - 1.0))
            y, x = int(top * (image.shape[1] - side + 1)), int(left * (image.shape[2] - side + 1))
            image = image[:, y : y + side, x : x + side]
            if side != size:
                image = _resized(image, size)
        if self.config.rotate:
            image = np.rot90(image, int(4 * turns), axes=(1, 2))
        return image[:, :, ::-1] if self.config.flip and flip < 0.5 else image


def load_image_set(config: DataConfig, seed: int = 0) -> ImageSet:
    """Open the source of `config` and decode every image once, with a progress bar on stderr.

    Unreadable images are skipped and listed in `ImageSet.skipped`; `report()` describes them. With cache=False the images are
    also decoded here, to find the readable ones, and again on every use. `seed` is for crops and flips. Raises DataError if
    there is no usable image.
    """
    return ImageSet(config, open_source(config.path, config.split, config.image_column, config.label_column), seed)


def fit(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (3, h, w) uint8 by `config`; with crop="center", also cut a centred square.

    Bicubic with antialiasing; pixels do not change if the shorter side already fits. Raises DecodeError for an image longer
    than MAX_ASPECT_RATIO.
    """
    height, width = pixels.shape[:2]
    shorter, size = min(height, width), config.img_size
    if max(height, width) > MAX_ASPECT_RATIO * shorter:
        raise DecodeError(f"is {width}x{height} pixels, longer than 1:{MAX_ASPECT_RATIO}; crop it")
    wanted = size if config.short_side is None else max(min(config.short_side, shorter), size)
    if shorter != wanted:
        height, width = round(height * wanted / shorter), round(width * wanted / shorter)
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    if config.crop == "center":
        top, left = (height - size) // 2, (width - size) // 2
        pixels = pixels[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # HWC -> CHW


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """(3, s, s) uint8 -> (3, size, size) uint8, bicubic."""
    pixels = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _with_progress(results: Iterable, total: int) -> Iterable:
    console = Console(stderr=True)
    return track(results, "Reading images", total=total, console=console, transient=True, disable=not console.is_terminal)
