"""Large images in overlapping tiles, blended without seams and in bounded memory."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ebt_vision.denoiser import MIN_SIDE, DenoiseOptions, Denoiser, DenoiseResult, check_images

MEMORY_BUDGET = 512 * 2**20
"""Bytes of activations that a batch of tiles may take, by the denoiser's own estimate."""
MAX_BATCH_SIZE = 64

Progress = Callable[[int, int], object]
"""(tiles done, tiles in total), called at the start and after each batch; raise in it to give up."""


def denoise_tiled(
    denoiser: Denoiser,
    noisy: Tensor,
    options: DenoiseOptions | None = None,
    *,
    tile_size: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    callback: Progress | None = None,
) -> DenoiseResult:
    """Denoise one image (3, H, W) or (1, 3, H, W), about [0, 1], in square tiles of `tile_size` px with `overlap` px in common.

    The tile defaults to the denoiser's, the overlap to a quarter of it, the batch to what `memory_budget` bytes hold. Where
    tiles overlap they are blended with weights that sum to 1 (see tile_weights), and the last tile of a row or column is moved
    inside the image. The result does not depend on batch_size: each tile's random numbers depend on the seed and its place.

    The result is as of Denoiser.denoise with B = 1: energies are means over the tiles, and so over all their patches; num_steps
    is the largest of the tiles; num_forward is their sum; `chosen` is None, because each tile chooses for itself.
    Raises ValueError for a tile below 8 px, an overlap that leaves no stride, and what Denoiser.denoise raises.
    """
    noisy = noisy[None] if noisy.ndim == 3 else noisy
    check_images(noisy)
    if len(noisy) != 1:
        raise ValueError(f"noisy is a batch of {len(noisy)}; tile one image at a time")
    tile_size = denoiser.tile_size if tile_size is None else tile_size
    if tile_size < MIN_SIDE:
        raise ValueError(f"tile_size={tile_size} is too small; use {MIN_SIDE} px or more")
    overlap = tile_size // 4 if overlap is None else overlap
    if not 0 <= overlap < tile_size:
        raise ValueError(f"overlap={overlap} does not fit tile_size={tile_size}; use 0..{tile_size - 1}")
    height, width = (min(tile_size, side) for side in noisy.shape[-2:])
    if batch_size is None:
        batch_size = memory_budget // max(denoiser.activation_bytes(height, width), 1)
        batch_size = min(max(batch_size, 1), MAX_BATCH_SIZE)
    elif batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    options = denoiser.resolve_options(noisy, options or DenoiseOptions())
    return _run(denoiser, noisy, options, (height, width), overlap, batch_size, callback)


def _run(
    denoiser: Denoiser,
    noisy: Tensor,
    options: DenoiseOptions,
    tile: tuple[int, int],
    overlap: int,
    batch_size: int,
    callback: Progress | None,
) -> DenoiseResult:
    tops, lefts = (tile_starts(side, size, overlap) for side, size in zip(noisy.shape[-2:], tile, strict=True))
    row_weights = tile_weights(tops, tile[0], noisy.shape[-2], overlap).to(noisy)
    column_weights = tile_weights(lefts, tile[1], noisy.shape[-1], overlap).to(noisy)
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]

    def add(total: Tensor, tiles: Tensor, where: list[tuple[int, int]]) -> None:
        for image, (i, j) in zip(tiles, where, strict=True):
            weight = row_weights[i][:, None] * column_weights[j]  # (height, width)
            total[0, :, tops[i] : tops[i] + tile[0], lefts[j] : lefts[j] + tile[1]] += weight * image

    image = torch.zeros_like(noisy)
    trajectory: list[Tensor] = []
    candidates: list[Tensor] = []
    combined: DenoiseResult | None = None
    if callback is not None:
        callback(0, len(places))
    for start in range(0, len(places), batch_size):
        where = places[start : start + batch_size]
        tiles = [noisy[0, :, tops[i] : tops[i] + tile[0], lefts[j] : lefts[j] + tile[1]] for i, j in where]
        ids = list(range(start, start + len(where)))
        result = denoiser.denoise(torch.stack(tiles), options, image_ids=ids)
        # Add the images in place, and let go of them.
        add(image, result.image, where)
        for totals, several in ((trajectory, result.trajectory), (candidates, result.candidate_images)):
            for index, images in enumerate(() if several is None else several):
                if index == len(totals):
                    totals.append(torch.zeros_like(noisy))
                add(totals[index], images, where)
        combined = _combine(combined, replace(result, image=image, trajectory=None, chosen=None, candidate_images=None))
        if callback is not None:
            callback(start + len(where), len(places))
    assert combined is not None
    return replace(
        combined,
        image=image.clamp(0, 1),  # the weights sum to 1 but for rounding
        energies=_over(combined.energies, len(places)),
        candidate_energies=_over(combined.candidate_energies, len(places)),
        candidate_images=torch.stack(candidates).clamp(0, 1) if candidates else None,
        trajectory=tuple(step.clamp(0, 1) for step in trajectory) or None,
    )


def _combine(total: DenoiseResult | None, batch: DenoiseResult) -> DenoiseResult:
    """Sums of energies and passes, maximum of steps, over the tiles so far, as a batch of one."""

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
        candidate_energies=add("candidate_energies"),
    )


def _over(total: Tensor | None, count: int) -> Tensor | None:
    return None if total is None else total / count


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side of `length`: every tile - overlap, the last one moved back to end with the side."""
    if length <= tile:  # the overlap may be longer than such a side
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def tile_weights(starts: list[int], tile: int, length: int, overlap: int) -> Tensor:
    """Weights of the tiles along one side, float64 (num_tiles, tile), that sum to 1 at every pixel of `length`.

    Each tile fades in and out with a raised cosine over `overlap` pixels, but not at the ends of the side; the weights are then
    divided by their sum, which matters where the last tile overlaps by more. The two sides' products weigh a pixel.
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
