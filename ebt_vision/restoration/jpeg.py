"""JPEG as a likelihood: the coefficient in the file is rounded, so the coefficient of the original lies in a known interval.

The intervals are those of the 8x8 cosine transform of Y, Cb and Cr (ITU-T T.81 and T.871). The grid of Cb and Cr can be two
times coarser. The coefficients are not read from the file. They are computed from the decoded pixels and rounded to the
quantisation steps. They are exact for Y, except for clipped pixels. For sub-sampled Cb and Cr they are approximate, because the
decoder has interpolated the pixels.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ebt_vision.core.checks import check
from ebt_vision.restoration.likelihoods import Likelihood

BLOCK = 8
MAX_ROUNDS, CLOSE_ENOUGH = 30, 1e-4
"""Alternating projections stop after this number of rounds, or if no value is farther than this from [0, 1]."""

# T.871, sec. 7: RGB to Y, Cb, Cr, without the offset of chroma.
_TO_YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], dtype=torch.float64
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegTables:
    """The quantisation of a JPEG file."""

    luma: tuple[int, ...]
    """64 steps of Y, row by row, in 0..255 units of the orthonormal transform."""
    chroma: tuple[int, ...]
    """64 steps of Cb and Cr."""
    subsampling: tuple[int, int] = (1, 1)
    """Number of rows and columns per chroma sample: (1, 1), (1, 2), (2, 1) or (2, 2)."""
    is_grey: bool = False

    def __post_init__(self) -> None:
        for name in ("luma", "chroma"):
            table = getattr(self, name)
            check(len(table) == 64 and min(table) >= 1, name, f"{len(table)} steps", "give 64 steps of 1 or more")
        check(set(self.subsampling) <= {1, 2}, "subsampling", self.subsampling, "use 1 or 2 a side")

    @classmethod
    def of_file(cls, path: str | os.PathLike[str] | BinaryIO) -> "JpegTables":
        """Read the tables of a JPEG file. Raises ValueError for any other file and for CMYK."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                if image.format not in ("JPEG", "MPO"):
                    raise ValueError(f"{path} is a {image.format} file, not a JPEG, which alone has quantisation tables")
                return cls._of_image(image, str(path))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read as a JPEG ({error}); check the file") from error

    @classmethod
    def _of_image(cls, image: Any, name: str) -> "JpegTables":
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"{name} is a JPEG in {image.mode}; convert it to RGB first")
        luma = tuple(int(step) for step in image.quantization[0])
        if image.mode == "L":
            return cls(luma=luma, chroma=luma, is_grey=True)
        _, columns, rows, _ = image.layer[0]  # sampling factors, the horizontal one first
        _, chroma_columns, chroma_rows, table = image.layer[1]
        subsampling = (rows // chroma_rows, columns // chroma_columns)
        chroma = tuple(int(step) for step in image.quantization[table])
        return cls(luma=luma, chroma=chroma, subsampling=subsampling)


class JpegIntervals(Likelihood):
    """The value is half the squared distance of the coefficients to their intervals, in units of [0, 1].

    The proximal step is the projection on the intervals in the metric of Y, Cb, Cr, for any weight, because an interval has no
    noise. Blocks that the right or lower border cuts are only approximately inside, because the pixels beyond are not known.
    """

    def __init__(self, tables: JpegTables):
        self.tables = tables

    def value(self, x: Tensor, observed: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for excess in self._excesses(x, observed):
            total = total + 0.5 * excess.square().flatten(1).sum(1)
        return total

    def gradient(self, x: Tensor, observed: Tensor) -> Tensor:
        planes = [
            self._spread(from_blocks(excess), channel) / self._cells(channel)
            for channel, excess in enumerate(self._excesses(x, observed))
        ]
        planes = [plane[..., : x.shape[-2], : x.shape[-1]] for plane in self._fold_back(planes, x)]
        return torch.einsum("dc,bdhw->bchw", _TO_YCC.to(x)[: len(planes)], torch.stack(planes, 1))

    def prox(self, z: Tensor, observed: Tensor, weight: float) -> Tensor:
        planes = [self._spread(from_blocks(excess), channel) for channel, excess in enumerate(self._excesses(z, observed))]
        planes += [torch.zeros_like(planes[0])] * (3 - len(planes))
        change = torch.stack([plane[..., : z.shape[-2], : z.shape[-1]] for plane in planes], 1)
        return z - torch.einsum("cd,bdhw->bchw", torch.linalg.inv(_TO_YCC).to(z), change)

    def finish(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return an image (B, 3, H, W) near x, in [0, 1] and in the intervals, by alternating projections (Bregman 1965)."""
        for _ in range(MAX_ROUNDS):
            clamped = x.clamp(0, 1)
            if float((clamped - x).abs().amax()) < CLOSE_ENOUGH:
                break
            x = self.prox(clamped, observed, 0.0)
        return x

    def _fold_back(self, planes: list[Tensor], x: Tensor) -> list[Tensor]:
        """The adjoint of the padding: values beyond the border are added to the last row and column."""
        height, width = x.shape[-2:]
        folded = []
        for plane in planes:
            plane = plane.clone()
            plane[..., height - 1, :] += plane[..., height:, :].sum(-2)
            plane[..., :, width - 1] += plane[..., :, width:].sum(-1)
            folded.append(plane)
        return folded

    def _excesses(self, x: Tensor, observed: Tensor) -> list[Tensor]:
        """Return how far the coefficients of Y (and Cb, Cr) of x are outside their intervals, each (B, rows, columns, 8, 8)."""
        return [
            mine - mine.clamp(theirs - step / 2, theirs + step / 2)
            for mine, theirs, step in zip(self._coefficients(x), self._quantised(observed), self._steps(x), strict=True)
        ]

    def _quantised(self, observed: Tensor) -> list[Tensor]:
        return [(c / step).round() * step for c, step in zip(self._coefficients(observed), self._steps(observed), strict=True)]

    def _steps(self, x: Tensor) -> list[Tensor]:
        tables = [self.tables.luma] + ([] if self.tables.is_grey else [self.tables.chroma] * 2)
        return [torch.tensor(table, dtype=x.dtype, device=x.device).reshape(BLOCK, BLOCK) / 255.0 for table in tables]

    def _coefficients(self, x: Tensor) -> list[Tensor]:
        ycc = torch.einsum("dc,bchw->bdhw", _TO_YCC.to(x), x)
        ycc[:, 0] -= 128.0 / 255.0
        found = []
        for channel in range(1 if self.tables.is_grey else 3):
            rows, columns = self._cell_sides(channel)
            plane = pad_edges(ycc[:, channel], BLOCK * rows, BLOCK * columns)
            small = plane.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).mean((-3, -1))
            found.append(to_blocks(small))
        return found

    def _cell_sides(self, channel: int) -> tuple[int, int]:
        return self.tables.subsampling if channel else (1, 1)

    def _cells(self, channel: int) -> int:
        return math.prod(self._cell_sides(channel))

    def _spread(self, plane: Tensor, channel: int) -> Tensor:
        """Repeat each sample of (B, h, w) over its pixels."""
        rows, columns = self._cell_sides(channel)
        return plane.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def pad_edges(planes: Tensor, rows: int, columns: int) -> Tensor:
    """(B, H, W) with the last row and column repeated up to multiples of `rows` and `columns`."""
    below, right = -planes.shape[-2] % rows, -planes.shape[-1] % columns
    return torch.nn.functional.pad(planes[:, None], (0, right, 0, below), mode="replicate")[:, 0]


def to_blocks(planes: Tensor) -> Tensor:
    """The orthonormal 8x8 cosine transform of (B, H, W), as (B, H / 8, W / 8, 8, 8)."""
    dct = cosine_matrix().to(planes)
    blocks = planes.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2)
    return dct @ blocks @ dct.T


def from_blocks(coefficients: Tensor) -> Tensor:
    """The inverse, and adjoint, of to_blocks: (B, H / 8, W / 8, 8, 8) -> (B, H, W)."""
    dct = cosine_matrix().to(coefficients)
    blocks = dct.T @ coefficients @ dct
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def cosine_matrix() -> Tensor:
    """The orthonormal DCT-II of 8 samples, (BLOCK, BLOCK) float64."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / BLOCK * k[:, None] * (k + 0.5)) * math.sqrt(2.0 / BLOCK)
    matrix[0] /= math.sqrt(2.0)
    return matrix
