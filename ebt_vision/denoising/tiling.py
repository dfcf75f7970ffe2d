"""Large images in overlapping tiles, blended without visible seams and with bounded memory."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ebt_vision.core.checks import check_whole
from ebt_vision.denoising.inputs import MIN_SIDE, check_images, crop, pad_to_multiple, working
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, DenoiseStep, join_results

MEMORY_BUDGET = 512 * 2**20
"""Maximum bytes of activations for a batch of tiles, by the denoiser's own estimate."""
MAX_BATCH_SIZE = 64
TILES_OF_AN_IMAGE = 2**32
"""Tile t of the image with id i uses the random numbers of id i * TILES_OF_AN_IMAGE + t."""

Progress = Callable[[int, int], object]
"""(finished tiles, all tiles), called at the start and after each batch; raise an exception in it to stop."""


class TiledDenoiser(Protocol):
    """The methods of a denoiser that tiling needs; base.Denoiser documents and implements them."""

    tile_size: int
    fits_tiles: bool
    patch_size: int

    def options_or_suggested(self, options: DenoiseOptions | None) -> DenoiseOptions: ...
    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions: ...
    def overlap_for(self, tile_size: int) -> int: ...
    def activation_bytes(self, height: int, width: int) -> int: ...
    def energy_map(self, images: Tensor, noisy: Tensor) -> Tensor | None: ...
    def denoise_whole(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledStep:
    """The input of a step callback: a step of the current batch of tiles. Other tiles are finished or still to come."""

    index: int
    num_steps: int
    candidate: int
    num_candidates: int
    energy: float | None
    """Mean energy over the patches of the tiles of this batch."""
    tiles_done: int
    tiles_now: int
    num_tiles: int
    image: Callable[[], Tensor]
    """Returns the image so far, (1, 3, H, W) in [0, 1], noisy where no tile is finished; call it only during the callback."""

    @property
    def share_done(self) -> float:
        """Fraction of the finished work, in 0..1, if every tile uses all its steps."""
        batch = (self.candidate + self.index / self.num_steps) / self.num_candidates
        return (self.tiles_done + self.tiles_now * batch) / self.num_tiles


StepCallback = Callable[[TiledStep], object]
"""A return value of True stops the work; the result so far is kept, noisy where nothing is finished."""


def denoise_tiled(
    denoiser: TiledDenoiser,
    noisy: Tensor,
    options: DenoiseOptions | None = None,
    *,
    tile_size: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    image_id: int = 0,
    callback: Progress | None = None,
    on_step: StepCallback | None = None,
) -> DenoiseResult:
    """Denoise one image (3, H, W) or (1, 3, H, W), about [0, 1], in tiles of `tile_size` px that overlap by `overlap` px.

    The tile size defaults to the options, or else to the denoiser's own (see tile_grid); 0 means the whole image. The overlap
    defaults to that of the denoiser (overlap_for), the batch to what fits into `memory_budget` bytes, the options to the
    suggested ones. Overlapping tiles are blended with weights that sum to 1 (see tile_weights). The last tile of a row or
    column is moved inside the image. The result does not depend on batch_size: the random numbers of a tile depend only on the
    seed, `image_id` and its position.

    The result is as from Denoiser.denoise with B = 1. Energies are means over the tiles, and so over all patches. num_steps is
    the maximum over tiles, num_forward the sum. `chosen` is None, because each tile has its own winner; see `candidate_wins`.
    `on_step` may stop the work; the energies are then those of the finished tiles, or of the first batch. Raises ValueError for
    a tile below 8 px, an overlap that leaves no stride, and the errors of Denoiser.denoise.
    """
    noisy = noisy[None] if isinstance(noisy, Tensor) and noisy.ndim == 3 else noisy
    check_images(noisy)
    if len(noisy) != 1:
        raise ValueError(f"noisy is a batch of {len(noisy)}; tile one image at a time, or call Denoiser.denoise for all")
    options = denoiser.options_or_suggested(options)
    grid = tile_grid(denoiser, noisy.shape[-2:], options.tile_size if tile_size is None else tile_size, overlap)
    if batch_size is None:
        batch_size = memory_budget // max(denoiser.activation_bytes(*grid.tile), 1)
        batch_size = min(max(batch_size, 1), MAX_BATCH_SIZE)
    elif batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    with torch.no_grad():
        image = working(noisy)
        options = denoiser.resolve_options(image, options)
        tiling = _Tiling(image, grid, image_id)
        return _of_dtype(_run(denoiser, tiling, options, batch_size, callback, on_step), noisy.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """The tiles of one image: their size, (height, width) in pixels, and their first rows and columns."""

    tile: tuple[int, int]
    overlap: int
    tops: list[int]
    lefts: list[int]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tops) * len(self.lefts)


def tile_grid(
    denoiser: TiledDenoiser, size: Sequence[int], tile_size: int | None = None, overlap: int | None = None
) -> TileGrid:
    """Return the tiles of `denoise_tiled` for an image of `size` (height, width).

    `tile_size` None is the denoiser's own, and 0 the whole image; `overlap` None is the denoiser's own (overlap_for). For a
    denoiser with `fits_tiles`, its own tiles get as small as possible without more of them. Raises ValueError for a tile below
    8 px and for an overlap that leaves no stride.
    """
    longest = denoiser.tile_size if tile_size is None else tile_size
    check_whole("tile_size", longest)
    longest = longest or max(size)
    if longest < MIN_SIDE:
        raise ValueError(f"tile_size={longest} is too small; use {MIN_SIDE} px or more")
    overlap = denoiser.overlap_for(longest) if overlap is None else overlap
    check_whole("overlap", overlap)
    if not 0 <= overlap < longest:
        raise ValueError(f"overlap={overlap} does not fit tile_size={longest}; use 0..{longest - 1}")
    height, width = size
    tile = (min(longest, height), min(longest, width))
    if tile_size is None and denoiser.fits_tiles:
        tile = (
            fitted_side(height, longest, overlap, denoiser.patch_size),
            fitted_side(width, longest, overlap, denoiser.patch_size),
        )
    return TileGrid(
        tile=tile, overlap=overlap, tops=tile_starts(height, tile[0], overlap), lefts=tile_starts(width, tile[1], overlap)
    )


def fitted_side(length: int, longest: int, overlap: int, multiple: int) -> int:
    """Return the shortest side of the tiles along `length`, a multiple of `multiple` or `longest`, for which there are no more
    of them than with sides of `longest`."""
    count = len(tile_starts(length, longest, overlap))
    if count == 1:
        return min(longest, length)
    shortest = math.ceil((length + (count - 1) * overlap) / count)
    return min(longest, math.ceil(shortest / multiple) * multiple)


def _of_dtype(result: DenoiseResult, dtype: torch.dtype) -> DenoiseResult:
    """Convert the images of the result to the dtype of the input."""
    candidates, trajectory = result.candidate_images, result.trajectory
    return replace(
        result,
        image=result.image.to(dtype),
        candidate_images=None if candidates is None else candidates.to(dtype),
        trajectory=trajectory and tuple(image.to(dtype) for image in trajectory),
    )


def denoise_each_tiled(
    denoiser: TiledDenoiser,
    noisy: Tensor,
    options: DenoiseOptions,
    *,
    image_ids: Sequence[int],
    callback: Callback | None = None,
) -> DenoiseResult:
    """Denoise each image of (B, 3, H, W) by denoise_tiled, as one result of batch size B; Denoiser.denoise uses it for large
    images.

    If the callback returns True, the remaining images stay noisy.
    """
    stopped = False

    def on_step(step: TiledStep, index: int) -> bool:
        nonlocal stopped
        if not stopped and callback is not None:
            told = DenoiseStep(
                index=step.index,
                num_steps=step.num_steps,
                image=step.image().to(noisy),
                energies=None if step.energy is None else torch.tensor([step.energy], device=noisy.device),
                candidate=step.candidate,
                num_candidates=step.num_candidates,
                image_index=index,
            )
            stopped = callback(told) is True
        return stopped

    results = []
    for index, (image, image_id) in enumerate(zip(noisy, image_ids, strict=True)):
        listen = None if callback is None else functools.partial(on_step, index=index)
        results.append(denoise_tiled(denoiser, image, options, image_id=image_id, on_step=listen))
    return join_results(results)


class _Tiling:
    """An image cut into tiles: their positions, their pixels, and sums that blend them."""

    def __init__(self, noisy: Tensor, grid: TileGrid, image_id: int = 0):
        self.noisy, self.tile, self.image_id = noisy, grid.tile, image_id
        self.tops, self.lefts = grid.tops, grid.lefts
        self.row_weights = tile_weights(self.tops, grid.tile[0], noisy.shape[-2], grid.overlap).to(noisy)
        self.column_weights = tile_weights(self.lefts, grid.tile[1], noisy.shape[-1], grid.overlap).to(noisy)
        self.places = [(i, j) for i in range(len(self.tops)) for j in range(len(self.lefts))]

    def ids(self, start: int, stop: int) -> list[int]:
        """Ids for the random numbers of tiles start..stop - 1; a single tile uses the id of the image."""
        first = self.image_id * TILES_OF_AN_IMAGE if len(self.places) > 1 else self.image_id
        return list(range(first + start, first + stop))

    def cut(self, images: Tensor, start: int, stop: int) -> Tensor:
        """Return tiles start..stop - 1 of `images` (1, C, H, W), (n, C, h, w)."""
        return torch.stack([images[0][self._window(place)] for place in self.places[start:stop]])

    def add(self, total: Tensor, tiles: Tensor, start: int) -> None:
        """Add tiles (n, C, h, w), starting with number `start`, to `total` (1, C, H, W), with their weights."""
        for image, place in zip(tiles, self.places[start : start + len(tiles)], strict=True):
            weight = self.row_weights[place[0]][:, None] * self.column_weights[place[1]]  # (h, w)
            total[0][self._window(place)] += weight * image

    def fill(self, total: Tensor, start: int) -> None:
        """Add the noisy pixels of all tiles from `start` on."""
        for number in range(start, len(self.places)):
            self.add(total, self.cut(self.noisy, number, number + 1), number)

    def _window(self, place: tuple[int, int]) -> tuple[slice, slice, slice]:
        top, left = self.tops[place[0]], self.lefts[place[1]]
        return slice(None), slice(top, top + self.tile[0]), slice(left, left + self.tile[1])


def _run(
    denoiser: TiledDenoiser,
    tiling: _Tiling,
    options: DenoiseOptions,
    batch_size: int,
    callback: Progress | None,
    on_step: StepCallback | None,
) -> DenoiseResult:
    noisy, num_tiles = tiling.noisy, len(tiling.places)
    image = torch.zeros_like(noisy)
    trajectory: list[Tensor] = []
    candidates: list[Tensor] = []
    combined: DenoiseResult | None = None
    counted = done = 0  # number of tiles in `combined` and in `image`
    if callback is not None:
        callback(0, num_tiles)
    while done < num_tiles:
        tiles = tiling.cut(noisy, done, done + batch_size)
        watch = _Watch(tiling, image, tiles, done, on_step)
        result = denoiser.denoise_whole(tiles, options, image_ids=tiling.ids(done, done + len(tiles)), callback=watch)
        if watch.stopped and watch.index == 0 and watch.candidate == 0:  # as users see it, not as scaled for the network
            result = replace(result, image=tiles.clamp(0, 1))
        # Add the images in place and free them.
        tiling.add(image, result.image, done)
        for totals, several in ((trajectory, result.trajectory), (candidates, result.candidate_images)):
            for index, images in enumerate(() if several is None else several):
                if index == len(totals):
                    totals.append(torch.zeros_like(noisy))
                tiling.add(totals[index], images, done)
        if combined is None or not watch.stopped:  # a stopped batch may have fewer candidates
            combined = _combine(combined, _shared(result, image, options))
            counted += len(tiles)
        else:
            candidates.clear()
            combined = replace(combined, num_forward=combined.num_forward + result.num_forward.sum(), candidate_energies=None)
        done += len(tiles)
        if callback is not None:
            callback(done, num_tiles)
        if watch.stopped:
            for total in (image, *trajectory, *candidates):
                tiling.fill(total, done)
            break
    assert combined is not None
    return replace(
        combined,
        image=image.clamp_(0, 1),  # the weights sum to 1 up to rounding
        energies=_over(combined.energies, counted),
        model_energy=_over(combined.model_energy, counted),
        candidate_energies=_over(combined.candidate_energies, counted),
        candidate_images=torch.stack(candidates).clamp(0, 1) if candidates else None,
        trajectory=tuple(step.clamp_(0, 1) for step in trajectory) or None,
    )


class _Watch:
    """Receive the steps of one batch of tiles and report them to `on_step` for the whole image."""

    def __init__(self, tiling: _Tiling, image: Tensor, tiles: Tensor, start: int, on_step: StepCallback | None):
        self.tiling, self.image, self.tiles, self.start, self.on_step = tiling, image, tiles, start, on_step
        self.stopped, self.index, self.candidate = False, 0, 0

    def __call__(self, step: DenoiseStep) -> bool:
        if self.on_step is None:
            return False
        self.index, self.candidate = step.index, step.candidate
        told = self.on_step(
            TiledStep(
                index=step.index,
                num_steps=step.num_steps,
                candidate=step.candidate,
                num_candidates=step.num_candidates,
                energy=None if step.energies is None else float(step.energies.mean()),
                tiles_done=self.start,
                tiles_now=len(self.tiles),
                num_tiles=len(self.tiling.places),
                image=lambda: self._image(step),
            )
        )
        self.stopped = told is True
        return self.stopped

    def _image(self, step: DenoiseStep) -> Tensor:
        image = self.image.clone()
        # Before the first step: the tiles as users see them, not as scaled for the network.
        self.tiling.add(image, self.tiles if step.index == 0 else step.image.to(image), self.start)
        self.tiling.fill(image, self.start + len(self.tiles))
        return image.clamp_(0, 1)


def _shared(result: DenoiseResult, image: Tensor, options: DenoiseOptions) -> DenoiseResult:
    """Add to a batch's result what all batches share: the image, and the number of tiles that each candidate won."""
    wins = None if result.chosen is None else torch.bincount(result.chosen, minlength=options.num_candidates)[:, None]
    return replace(result, image=image, trajectory=None, chosen=None, candidate_images=None, candidate_wins=wins)


def _combine(total: DenoiseResult | None, batch: DenoiseResult) -> DenoiseResult:
    """Return sums of energies and passes, and the maximum of steps, over the tiles so far, as a batch of one."""

    def add(name: str) -> Tensor | None:
        value = getattr(batch, name)
        if value is None:
            return None
        value = value.sum(-1, keepdim=True)
        return value if total is None else getattr(total, name) + value

    num_forward = add("num_forward")
    assert num_forward is not None
    steps = batch.num_steps.max(0, keepdim=True).values
    return replace(
        batch,
        num_steps=steps if total is None else torch.maximum(total.num_steps, steps),
        num_forward=num_forward,
        energies=add("energies"),
        model_energy=add("model_energy"),
        candidate_energies=add("candidate_energies"),
        candidate_wins=add("candidate_wins"),
    )


def _over(total: Tensor | None, count: int) -> Tensor | None:
    return None if total is None else total / count


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the start of each tile along a side of `length`: every tile - overlap; the last one is moved back to the end."""
    if length <= tile:  # the overlap may be longer than this side
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def tile_weights(starts: list[int], tile: int, length: int, overlap: int) -> Tensor:
    """Weights of the tiles along one side, float64 (num_tiles, tile), that sum to 1 at every pixel of `length`.

    Each tile fades in and out with a raised cosine over `overlap` pixels, except at the ends of the side. The weights are then
    divided by their sum, which matters if the last tile overlaps more. The weight of a pixel is the product of the two sides.
    """
    ramp = torch.sin(math.pi / 2 * (torch.arange(overlap, dtype=torch.float64) + 0.5) / max(overlap, 1)).square()
    weights = torch.ones(len(starts), tile, dtype=torch.float64)
    total = torch.zeros(length, dtype=torch.float64)
    for weight, start in zip(weights, starts, strict=True):
        if start > 0:
            weight[:overlap] *= ramp
        if start + tile < length:
            weight[tile - overlap :] *= ramp.flip(0)
        total[start : start + tile] += weight
    for weight, start in zip(weights, starts, strict=True):
        weight /= total[start : start + tile]
    return weights


def energy_map_tiled(denoiser: TiledDenoiser, images: Tensor, noisy: Tensor, *, tile_size: int | None = None) -> Tensor | None:
    """For each pixel, return the energy of its patch, float32 (H, W), blended over tiles as in denoise_tiled.

    The energy is that of `images` (1, 3, H, W) in [0, 1]; `noisy`, of the same shape, is their observation. None for a method
    without an energy.
    """
    check_images(images)
    grid = tile_grid(denoiser, images.shape[-2:], tile_size, (tile_size or denoiser.tile_size) // 4)
    tiling = _Tiling(images, grid)
    total = torch.zeros_like(images[:, :1])
    batch_size = min(max(MEMORY_BUDGET // max(denoiser.activation_bytes(*grid.tile), 1), 1), MAX_BATCH_SIZE)
    for start in range(0, len(tiling.places), batch_size):
        tiles, sources = (
            pad_to_multiple(tiling.cut(whole, start, start + batch_size), denoiser.patch_size) for whole in (images, noisy)
        )
        energies = denoiser.energy_map(tiles, sources)  # (n, h / patch_size, w / patch_size)
        if energies is None:
            return None
        pixels = energies.repeat_interleave(denoiser.patch_size, 1).repeat_interleave(denoiser.patch_size, 2)
        tiling.add(total, crop(pixels[:, None].to(total), grid.tile), start)
    return total[0, 0]
