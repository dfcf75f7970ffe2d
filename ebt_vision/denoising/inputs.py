"""Preparation of images for a denoiser: checks, working dtype, padding to whole patches."""

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.checks import check

MIN_SIDE = 8
"""Minimum side in pixels; smaller images have too little content to denoise."""


MAX_VALUE = 16.0
"""Larger absolute values cannot be noise on [0, 1]: Gaussian noise of sigma 255 stays below 8."""


def working(images: Tensor) -> Tensor:
    """Convert images, any shape, to float32; float64 stays, so that sums of tiles are accurate."""
    return images if images.dtype == torch.float64 else images.float()


def check_images(noisy: Tensor) -> None:
    """Raise ValueError unless `noisy` is a finite float (B, 3, H, W), about [0, 1], with sides of at least MIN_SIDE.

    Denoising keeps no graph, so a `noisy` that requires a gradient is also refused.
    """
    if not isinstance(noisy, Tensor):
        raise ValueError(f"noisy is a {_kind(noisy)}, not a torch.Tensor; {_TO_TENSOR}")
    if noisy.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "noisy requires a gradient, which a denoiser does not pass on; use thinking.think with create_graph=True, "
            "differentiate_start=True and ThinkingConfig(detach_between_steps=False), or noisy.detach()"
        )
    if noisy.ndim != 4:
        raise ValueError(f"noisy has shape {tuple(noisy.shape)}; use (B, 3, H, W), or noisy[None] for one image")
    if not noisy.is_floating_point():
        raise ValueError(f"noisy has dtype {noisy.dtype}; use floats in [0, 1]; divide 8-bit values by 255")
    if noisy.shape[0] < 1:
        raise ValueError("noisy is an empty batch; use at least one image")
    if noisy.shape[1] != 3:
        raise ValueError(f"noisy has {noisy.shape[1]} channels; use RGB, (B, 3, H, W)")
    if min(noisy.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"noisy is {noisy.shape[-2]}x{noisy.shape[-1]} px; both sides must be {MIN_SIDE} px or more")
    if not bool(torch.isfinite(noisy).all()):
        raise ValueError("noisy has NaN or infinite values; replace them first, for example with torch.nan_to_num")
    _check_range(noisy)


_TO_TENSOR = (
    "give floats in [0, 1], (B, 3, H, W); of 8-bit RGB (H, W, 3) make torch.tensor(np.asarray(x)).permute(2, 0, 1)[None] / 255"
)


def _kind(value: object) -> str:
    return f"{type(value).__module__.split('.')[0]} {type(value).__name__}"


def _check_range(noisy: Tensor) -> None:
    """Raise ValueError for images of another range: 0..255, or, if it can be detected, -1..1."""
    largest = float(noisy.abs().amax())
    if largest > MAX_VALUE:
        raise ValueError(f"noisy has values up to {largest:.4g}; use images in [0, 1]; divide 0..255 by 255")
    means = working(noisy).mean(dim=(1, 2, 3))
    if bool((means < -0.25 - 5.0 / math.sqrt(noisy[0].numel())).any()):  # noise on [0, 1] cannot reach this mean
        raise ValueError(
            f"noisy has a mean of {float(means.amin()):.3g}; use images in [0, 1]; convert -1..1 by (image + 1) / 2"
        )


def checked_ids(image_ids: Sequence[int] | Tensor | None, count: int) -> list[int]:
    """Return one whole number for each of `count` images, from (count,) or None (all 0). Raises ValueError otherwise."""
    if image_ids is None:
        return [0] * count
    try:
        ids = [operator.index(i) for i in image_ids]
    except TypeError:
        raise ValueError(
            f"image_ids={image_ids!r} are not whole numbers; use one per image, for example range({count})"
        ) from None
    if len(ids) != count:
        raise ValueError(f"image_ids has {len(ids)} ids for a batch of {count}; use one per image")
    check(min(ids) >= 0, "image_ids", min(ids), "use 0 or more")
    return ids


def pad_to_multiple(images: Tensor, multiple: int, *, minimum: int = 1) -> Tensor:
    """Reflect-pad (B, C, H, W) below and to the right to multiples of `multiple` no smaller than `minimum`."""
    height, width = (math.ceil(max(side, minimum) / multiple) * multiple for side in images.shape[-2:])
    while images.shape[-2:] != (height, width):
        # A reflection is at most one pixel shorter than the image, so a small image needs several.
        rows = min(height - images.shape[-2], images.shape[-2] - 1)
        columns = min(width - images.shape[-1], images.shape[-1] - 1)
        images = F.pad(images, (0, columns, 0, rows), mode="reflect")
    return images


def crop(images: Tensor, size: Sequence[int]) -> Tensor:
    """Crop images (B, C, H, W) to the top left (height, width); undoes pad_to_multiple."""
    return images[..., : size[0], : size[1]]
