"""Images of the benchmark: squares of one size, or whole photographs. Unreadable images are excluded from every row."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ebt_vision.data.decoding import DecodeError, decode_image, to_rgb8
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.data.sources import DataError, open_source


class BenchmarkImages:
    """A fixed list of readable 8-bit RGB images. The index of an image is its identity, and its noise depends on it."""

    def __init__(self, read: Callable[[int], Tensor], names: Sequence[str], skipped: Sequence[tuple[str, str]], what: str):
        self._read = read
        self.names = list(names)
        self.skipped = [f"{name} {reason}" for name, reason in skipped]
        self.what = what
        self.hash = self._digest()

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """Return uint8 (3, H, W) images of any size."""
        return [self._read(index) for index in indices]

    def spread(self, count: int | None) -> list[int]:
        """Return `count` indices, evenly spread over the set; all of them for None or for a larger count."""
        count = len(self) if count is None else min(count, len(self))
        return [place * len(self) // count for place in range(count)]

    def report(self) -> str:
        """Describe the set in one line: number, source, and unreadable images with reasons."""
        line = f"{len(self)} {self.what}"
        if self.skipped:
            shown = "; ".join(text.split(";")[0] for text in self.skipped[:3])
            line += f"; {len(self.skipped)} skipped: {shown}" + ("; ..." if len(self.skipped) > 3 else "")
        return line

    def _digest(self) -> str:
        """16 hex digits over every pixel and its position: runs with the same digest had the same images in the same order."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            for image in self._pixels(index):
                pixels = image.numpy()
                digest.update(str(pixels.shape).encode())
                digest.update(np.ascontiguousarray(pixels).tobytes())
        return digest.hexdigest()[:16]

    def _pixels(self, index: int) -> list[Tensor]:
        """Return the contribution of one image to the digest."""
        return [self._read(index)]


def load_images(path: str, *, img_size: int | None, limit: int | None = None) -> BenchmarkImages:
    """Return the images at `path` (see DataConfig.path): centre squares of `img_size` px, or whole images for None.

    `limit` takes this number of images, evenly spread. Raises DataError if there is no usable image.
    """
    if img_size is None:
        return _whole_images(path, limit)
    squares = load_image_set(DataConfig(path=path, img_size=img_size, limit=limit))
    names = [squares.name(index) for index in range(len(squares))]
    what = f"images of {img_size}x{img_size} from {path}"
    return BenchmarkImages(lambda index: squares.images([index])[0], names, squares.skipped, what)


def _whole_images(path: str, limit: int | None) -> BenchmarkImages:
    DataConfig(path=path, limit=limit)  # its checks
    source = open_source(path, None, "image", None)
    count = len(source) if limit is None else min(limit, len(source))
    entries: list[int] = []
    skipped: list[tuple[str, str]] = []

    def decode(entry: int) -> Tensor:
        pixels = to_rgb8(decode_image(source.read(entry)))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # HWC -> CHW

    for place in range(count):
        entry = place * len(source) // count
        try:
            decode(entry)
            entries.append(entry)
        except DecodeError as error:
            skipped.append((source.name(entry), str(error)))
        except OSError as error:
            skipped.append((source.name(entry), f"cannot be read ({error.strerror or error})"))
    if not entries:
        reason = "{} {}".format(*skipped[0]) if skipped else "it is empty"
        raise DataError(f"no image of {path} can be used ({reason}); check the path and the files")
    names = [source.name(entry) for entry in entries]
    return BenchmarkImages(lambda index: decode(entries[index]), names, skipped, f"whole images from {path}")
