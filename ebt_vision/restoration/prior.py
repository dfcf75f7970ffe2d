"""A denoiser as the prior of a restoration. It works on tiles, and the grid of tiles moves from step to step.

On a fixed grid, errors at the borders of the tiles add up over the steps. On a moving grid these errors average out. The
network makes different errors on mirrored and rotated copies of a tile. If each step takes another copy, these errors average
out as well (the periodical self-ensemble of DPIR, Zhang et al. 2021).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.energy_functions import EnergyFunction
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.inputs import MIN_SIDE
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.self_ensemble import NUM_COPIES, turned, turned_back
from ebt_vision.denoising.tiling import fitted_side, tile_starts, tile_weights
from ebt_vision.models.patch_ebt import num_patches
from ebt_vision.noise.processes import to_model_range

GOLDEN = (0.7548776662466927, 0.5698402909980532)
"""Increments of a low-discrepancy sequence in two dimensions (Roberts 2018), so that the grids of a few steps differ much."""

TILES_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoised:
    """The result of one denoising pass of the prior."""

    image: Tensor
    """(B, 3, H, W) in [0, 1]."""
    energy: float | None
    """Energy of the input of the network, mean over the patches of all tiles; None for a method without an energy."""
    num_forward: int


def tile_side(denoiser: Denoiser, tile_size: int | None) -> int:
    """Return the given side of the tiles, in pixels, or the training size of the network, or else the denoiser's own side."""
    return tile_size if tile_size is not None else denoiser.training_size or denoiser.tile_size


class Prior:
    """Denoise an image (1, 3, H, W) in tiles. With `region`, bool (H, W), only tiles that touch the region are denoised.

    Pixels of other tiles stay as they are. With `turning`, step k denoises copy k + first_copy of each tile (see
    self_ensemble.turned).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        tile_size: int | None,
        moving: bool,
        turning: bool = False,
        first_copy: int = 0,
        region: Tensor | None = None,
    ):
        self.denoiser, self.moving, self.turning, self.first_copy = denoiser, moving, turning, first_copy
        self.tile = tile_side(denoiser, tile_size)
        if self.tile < MIN_SIDE:
            raise ValueError(f"tile_size={self.tile} is too small; use {MIN_SIDE} or more")
        self.overlap = denoiser.overlap_for(self.tile)
        self.fits = denoiser.fits_tiles and tile_size is None
        self.region = region
        self._total: Tensor | None = None

    def denoise(self, image: Tensor, step: int) -> Denoised:
        """One pass of the denoiser over the tiles of this step's grid."""
        found = self._work_on(image, step)
        total, weights = torch.zeros_like(image), torch.zeros_like(image[:, :1])
        for tile, clean in found.outputs():
            total[0, :, tile.rows, tile.columns] += clean
            weights[0, :, tile.rows, tile.columns] += tile.weight.to(weights)
        # Where no tile was worked on, and where those that were fade out, the image stays.
        output = total + (1.0 - weights) * image
        return Denoised(image=output.clamp(0, 1), energy=found.energy, num_forward=found.num_forward)

    def fill(self, image: Tensor, step: int, noise: Tensor | None = None) -> Denoised:
        """Replace the pixels of the region in `image`, in place, by the denoised image + noise.

        No pixel outside the tiles that touch the region is read or written, so a thin scratch costs little in a large image.
        """
        assert self.region is not None
        found = self._work_on(image, step, noise)
        if self._total is None or self._total.shape != image.shape or self._total.dtype != image.dtype:
            self._total = torch.empty_like(image)
        places = [(..., tile.rows, tile.columns) for tile in found.tiles]
        for place in places:
            self._total[place] = 0.0
        for tile, clean in found.outputs():
            self._total[..., tile.rows, tile.columns] += clean
        for place in places:  # all tiles of a missing pixel are among these, so their weights sum to 1 there
            image[place] = torch.where(self.region[place[1:]], self._total[place].clamp(0, 1), image[place])
        return Denoised(image=image, energy=found.energy, num_forward=found.num_forward)

    def _work_on(self, image: Tensor, step: int, noise: Tensor | None = None) -> "_Work":
        copy = (self.first_copy + step) % NUM_COPIES if self.turning else 0
        return _Work(self.denoiser, image, noise, self._tiles(image.shape[-2:], self.shift(step, image)), copy)

    def shift(self, step: int, image: Tensor) -> tuple[int, int]:
        """Return how many pixels the grid of this step begins above and to the left of the image, below a quarter of a tile.

        If one tile covers a side, it still covers it, and the shift is less than a patch.
        """
        if not self.moving:
            return 0, 0
        top, left = (
            int((0.5 + step * share) % 1.0 * (self.tile // 4 if side > self.tile else min(self.denoiser.patch_size, side - 1)))
            for share, side in zip(GOLDEN, image.shape[-2:], strict=True)
        )
        return top, left

    def _side(self, length: int) -> int:
        """Side of the tiles along a side that is longer than a tile."""
        return fitted_side(length, self.tile, self.overlap, self.denoiser.patch_size) if self.fits else self.tile

    def _tiles(self, size: Sequence[int], shift: tuple[int, int]) -> list["_Tile"]:
        """Return the tiles to denoise, for an image of this size (H, W)."""
        sides = [side + add for side, add in zip(size, shift, strict=True)]
        tile = [total if side <= self.tile else self._side(total) for total, side in zip(sides, size, strict=True)]
        starts = [tile_starts(side, length, self.overlap) for side, length in zip(sides, tile, strict=True)]
        weights = [
            tile_weights(places, length, side, self.overlap) for places, length, side in zip(starts, tile, sides, strict=True)
        ]
        found = []
        for top, row_weight in zip(starts[0], weights[0], strict=True):
            for left, column_weight in zip(starts[1], weights[1], strict=True):
                above, beside = max(shift[0] - top, 0), max(shift[1] - left, 0)
                rows = slice(top + above - shift[0], top + tile[0] - shift[0])
                columns = slice(left + beside - shift[1], left + tile[1] - shift[1])
                if self.region is None or bool(self.region[rows, columns].any()):
                    weight = row_weight[above:, None] * column_weight[beside:]
                    found.append(_Tile(rows=rows, columns=columns, mirrored=(above, beside), weight=weight))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tile:
    """A tile of an image. If the grid begins outside the image, the input of the network is mirrored there."""

    rows: slice
    columns: slice
    mirrored: tuple[int, int]
    """Number of mirrored rows above and mirrored columns to the left."""
    weight: Tensor
    """(h, w), of the pixels inside the image."""


_PROPOSAL = DenoiseOptions(num_steps=1, final_energy=False, clean_below=0.0)
"""The solver needs N(x) of every tile, also of clean ones."""


class _Work:
    """One pass of a denoiser over tiles of image + noise."""

    def __init__(self, denoiser: Denoiser, image: Tensor, noise: Tensor | None, tiles: list[_Tile], copy: int):
        self.denoiser, self.image, self.noise, self.tiles, self.copy = denoiser, image, noise, tiles, copy
        self.energy: float | None = None
        """Mean over all tiles; known after `outputs`."""
        self.num_forward = 0

    def outputs(self) -> Iterator[tuple[_Tile, Tensor]]:
        """Yield each tile with its weighted output (3, h, w)."""
        energies: list[float] = []
        for start in range(0, len(self.tiles), TILES_AT_ONCE):
            group = self.tiles[start : start + TILES_AT_ONCE]
            shown = turned(torch.cat([self._cut(tile) for tile in group]), self.copy)
            result = self.denoiser.denoise_whole(shown, _PROPOSAL)
            self.num_forward += int(result.num_forward.sum())
            energies += [] if result.energies is None else result.energies[0].tolist()
            for tile, clean in zip(group, turned_back(result.image, self.copy), strict=True):
                above, beside = tile.mirrored
                yield tile, tile.weight.to(clean) * clean[:, above:, beside:]
        self.energy = sum(energies) / len(energies) if energies else None

    def _cut(self, tile: _Tile) -> Tensor:
        shown = self.image[..., tile.rows, tile.columns]
        if self.noise is not None:
            shown = shown + self.noise[..., tile.rows, tile.columns].to(shown)
        above, beside = tile.mirrored
        return F.pad(shown, (beside, 0, above, 0), mode="reflect") if above or beside else shown


class TiledEnergy:
    """The energy of an image (B, 3, H, W) in [0, 1], a sum over tiles side by side, plus a weighted term: a SteppedEnergy.

    The grid of tiles moves from step to step. Where it meets the border, the image is mirrored.
    """

    def __init__(self, prior: Prior, term: Callable[[Tensor], Tensor], weight: float):
        """`term` maps images (B, 3, H, W) in [0, 1] to (B,). The sum is E(y) + 4 * weight * term(y); 4 is for model units."""
        if not isinstance(prior.denoiser, EBTDenoiser):
            raise ValueError(f"{prior.denoiser.name} has no energy to descend; use solver='splitting', or an EBT")
        self.prior, self.term, self.weight = prior, term, weight
        self.model = prior.denoiser.model
        self.scale = prior.denoiser.scale_for(DenoiseOptions())

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor:
        """The sum on the first grid, (B,)."""
        return self.at_step(0)(candidate, *context)

    def at_step(self, step: int) -> EnergyFunction:
        """The sum on the grid of this step."""
        return lambda candidate, *context: self.energy(candidate, step) + self.weight * 4.0 * self.term(candidate)

    def energy(self, image: Tensor, step: int) -> Tensor:
        """Return only E, (B,), in units of the network: the sum over all patches of the grid."""
        patch = self.model.config.patch_size
        tile = self.prior.tile // patch * patch
        top, left = self.prior.shift(step, image)
        size = [min(tile, -(-(side + add) // patch) * patch) for side, add in zip(image.shape[-2:], (top, left), strict=True)]
        below, right = (-(side + add) % s for side, add, s in zip(image.shape[-2:], (top, left), size, strict=True))
        padded = _mirror(image, (left, right, top, below))
        total = torch.zeros(len(image), dtype=image.dtype, device=image.device)
        for rows in padded.split(size[0], -2):
            for shown in rows.split(size[1], -1):
                x = to_model_range(shown) * self.scale
                total = total + self.model(x, *self.model.context_of(x)).to(total)
        return total

    def num_patches(self, image: Tensor) -> int:
        """Return the number of patches of the image itself."""
        patch = self.model.config.patch_size
        return max(num_patches(image.shape, patch), 1)


def _mirror(image: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Mirror by (left, right, top, bottom) pixels; these numbers may exceed the sides of the image."""
    left, right, top, bottom = pads
    columns = _mirrored(torch.arange(-left, image.shape[-1] + right), image.shape[-1]).to(image.device)
    rows = _mirrored(torch.arange(-top, image.shape[-2] + bottom), image.shape[-2]).to(image.device)
    return image[..., rows, :][..., columns]


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Return positions on a line of `length` that is mirrored at its ends repeatedly (half-sample symmetric)."""
    folded = index % (2 * length)
    return torch.minimum(folded, 2 * length - 1 - folded)
