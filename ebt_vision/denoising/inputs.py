"""The images that a denoiser takes: checked, in a working dtype, padded to whole patches."""

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.checks import check

MIN_SIDE = 8
"""Pixels; smaller images hold nothing to denoise by."""


MAX_VALUE = 16.0
"""Values of an image beyond this are no noise on [0, 1]: Gaussian noise of sigma 255 stays below 8."""


def working(images: Tensor) -> Tensor:
    """The images, any shape, in float32 or, where they have it, float64, so that sums of tiles are accurate."""
    return images if images.dtype == torch.float64 else images.float()


def check_images(noisy: Tensor) -> None:
    """ValueError, in one line, unless `noisy` is a finite float (B, 3, H, W), about [0, 1], with sides of at least MIN_SIDE.

    Denoising keeps no graph, so a `noisy` that is to get a gradient is refused too.
    """
    if not isinstance(noisy, Tensor):
        raise ValueError(f"noisy is a {_kind(noisy)}, not a torch.Tensor; {_TO_TENSOR}")
    if noisy.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "noisy requires a gradient, which a denoiser does not pass on; use thinking.think with create_graph=True, "
            "differentiate_start=True and ThinkingConfig(detach_between_steps=False), or noisy.detach()"
        )
    if noisy.ndim != 4:
        raise ValueError(f"noisy has shape {tuple(noisy.shape)}; give (B, 3, H, W), with noisy[None] for one image")
    if not noisy.is_floating_point():
        raise ValueError(f"noisy has dtype {noisy.dtype}; give floats in [0, 1], for 8-bit values image / 255")
    if noisy.shape[0] < 1:
        raise ValueError("noisy is an empty batch; give at least one image")
    if noisy.shape[1] != 3:
        raise ValueError(f"noisy has {noisy.shape[1]} channels; give RGB, (B, 3, H, W)")
    if min(noisy.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"noisy is {noisy.shape[-2]}x{noisy.shape[-1]} px; both sides must be {MIN_SIDE} px or more")
    if not bool(torch.isfinite(noisy).all()):
        raise ValueError("noisy holds NaN or infinite values; replace them first, say with torch.nan_to_num")
    _check_range(noisy)


_TO_TENSOR = (
    "give floats in [0, 1], (B, 3, H, W); of 8-bit RGB (H, W, 3) make torch.tensor(np.asarray(x)).permute(2, 0, 1)[None] / 255"
)


def _kind(value: object) -> str:
    return f"{type(value).__module__.split('.')[0]} {type(value).__name__}"


def _check_range(noisy: Tensor) -> None:
    """ValueError for images of another scale: 0..255, or as far as that can be told, -1..1."""
    largest = float(noisy.abs().amax())
    if largest > MAX_VALUE:
        raise ValueError(f"noisy has values up to {largest:.4g}; give images in [0, 1], for 0..255 image / 255")
    means = working(noisy).mean(dim=(1, 2, 3))
    if bool((means < -0.25 - 5.0 / math.sqrt(noisy[0].numel())).any()):  # noise on [0, 1] does not get there
        raise ValueError(f"noisy has a mean of {float(means.amin()):.3g}; give images in [0, 1], for -1..1 (image + 1) / 2")


def checked_ids(image_ids: Sequence[int] | Tensor | None, count: int) -> list[int]:
    """One whole number for each of `count` images, from (count,) or None, which is all 0; ValueError for anything else."""
    if image_ids is None:
        return [0] * count
    try:
        ids = [operator.index(i) for i in image_ids]
    except TypeError:
        raise ValueError(f"image_ids={image_ids!r} are not whole numbers; give one per image, say range({count})") from None
    if len(ids) != count:
        raise ValueError(f"image_ids has {len(ids)} ids for a batch of {count}; give one per image")
    check(min(ids) >= 0, "image_ids", min(ids), "use 0 or more")
    return ids


def pad_to_multiple(images: Tensor, multiple: int, *, minimum: int = 1) -> Tensor:
    """Reflect-pad (B, C, H, W) below and to the right to multiples of `multiple` no smaller than `minimum`."""
    height, width = (math.ceil(max(side, minimum) / multiple) * multiple for side in images.shape[-2:])
    while images.shape[-2:] != (height, width):
        # A reflection is at most one pixel shorter than the image, so a small image takes several.
        rows = min(height - images.shape[-2], images.shape[-2] - 1)
        columns = min(width - images.shape[-1], images.shape[-1] - 1)
        images = F.pad(images, (0, columns, 0, rows), mode="reflect")
    return images


def crop(images: Tensor, size: Sequence[int]) -> Tensor:
    """The top left (height, width) of images (B, C, H, W): undoes pad_to_multiple."""
    return images[..., : size[0], : size[1]]
