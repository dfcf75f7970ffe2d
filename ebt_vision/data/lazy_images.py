"""Images that are decoded on use: for sets that are read once, or partly, or by several processes.

`ImageSet` decodes everything at the start to find the readable images. Here an unreadable image keeps its index, and a mask
is returned with the pixels. Opening a set of a million images reads only their names and labels.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebt_vision.core.rng import sample_generators
from ebt_vision.data.decoding import DecodeError, decode_image, to_rgb8
from ebt_vision.data.images import NUM_DECODE_THREADS, DataConfig, fit
from ebt_vision.data.sources import open_source

_VIEW_STREAM = 0x76696577
MIN_AREA, MAX_RATIO = 0.08, 4.0 / 3.0
"""For random resized crops: the area fraction is uniform in [0.08, 1], the aspect ratio log-uniform in [3/4, 4/3] (Szegedy et
al. 2015, sec. 6, with torchvision's defaults). A box that is too wide or high is cut, not drawn again."""


class LazyImages:
    """Squares of config.img_size from any source of `DataConfig`. Only the fields that select images are used, not crop, flip
    and cache. View 0 of an image is its centred square. View v > 0 is the random resized crop and flip of (seed, v, position in
    the source).
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self._source = open_source(config.path, config.split, config.image_column, config.label_column)
        total = len(self._source)
        count = total if config.limit is None else min(config.limit, total)
        self.entries = [place * total // count for place in range(count)]
        """The position of each image in the source; with a limit, spread evenly over the source."""
        labels = self._source.labels
        self.labels = None if labels is None else [labels[entry] for entry in self.entries]
        self.class_names = self._source.class_names
        self.fingerprint = self._source.fingerprint()

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """Return a readable name of image `index`."""
        return self._source.name(self.entries[index])

    def read(self, indices: Sequence[int], view: int = 0) -> tuple[Tensor, np.ndarray]:
        """Return (uint8 RGB (B, 3, img_size, img_size), bool (B,): which images are readable); unreadable images are black."""
        size = self.config.img_size
        pixels = np.zeros((len(indices), 3, size, size), np.uint8)
        readable = np.zeros(len(indices), bool)
        entries = [self.entries[index] for index in indices]
        draws = [torch.rand(5, generator=g).tolist() for g in sample_generators(self.seed, entries, _VIEW_STREAM, view)]
        with ThreadPoolExecutor(NUM_DECODE_THREADS) as pool:
            decoded = pool.map(self._try_decode, indices, [view] * len(indices), draws)
            for place, image in enumerate(decoded):
                if image is not None:
                    pixels[place], readable[place] = image, True
        return torch.from_numpy(pixels), readable

    def _try_decode(self, index: int, view: int, draw: list[float]) -> np.ndarray | None:
        try:
            image = to_rgb8(decode_image(self._source.read(self.entries[index])))
            if view == 0:
                return fit(image, replace(self.config, crop="center"))
            return _resized_crop(image, self.config.img_size, draw)
        except (DecodeError, OSError):
            return None


def random_box(height: int, width: int, draw: Sequence[float]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels, inside the image, from four uniforms in [0, 1): area, ratio, top, left."""
    area = height * width * (MIN_AREA + (1.0 - MIN_AREA) * draw[0])
    ratio = math.exp((2.0 * draw[1] - 1.0) * math.log(MAX_RATIO))  # width / height
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    top, left = draw[2] * (height - h), draw[3] * (width - w)
    return left, top, left + w, top + h


def _resized_crop(pixels: np.ndarray, img_size: int, draw: Sequence[float]) -> np.ndarray:
    """(H, W, 3) -> (3, img_size, img_size), bicubic with antialiasing; mirrored if the fifth uniform is below 1/2."""
    box = random_box(pixels.shape[0], pixels.shape[1], draw)
    square = Image.fromarray(pixels).resize((img_size, img_size), Image.Resampling.BICUBIC, box=box)
    image = np.asarray(square).transpose(2, 0, 1)  # HWC -> CHW
    return image[:, :, ::-1] if draw[4] < 0.5 else image
