"""Image quality, per sample: float64 (B,), explicit data range, no average over the batch that is not named so."""

import math

import torch
from torch import Tensor


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, (B, C, H, W) pairs -> float64 (B,), in the square of the images' unit."""
    _check_pair(prediction, target)
    return (prediction.double() - target.double()).square().flatten(1).mean(1)


def psnr(prediction: Tensor, target: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B, C, H, W) pairs -> float64 (B,); inf for equal images.

    `data_range` is the distance from black to white: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.
    """
    return psnr_from_mse(mse(prediction, target), data_range=data_range)


def psnr_from_mse(error: Tensor, *, data_range: float) -> Tensor:
    """10 log10(data_range^2 / error), any shape. The paper's PSNR is this, of the *mean* error of a batch."""
    if data_range <= 0:
        raise ValueError(f"data_range={data_range} must be positive: 1 for [0, 1] images")
    return 20.0 * math.log10(data_range) - 10.0 * torch.log10(error.double())


def ssim(prediction: Tensor, target: Tensor, *, data_range: float) -> Tensor:
    """Structural similarity of each image, float64 (B,): 11x11 Gaussian, sigma 1.5, valid area (Wang et al. 2004), by kornia.

    Raises ValueError where an image is smaller than the window.
    """
    from kornia.metrics import ssim as ssim_map

    _check_pair(prediction, target)
    if min(target.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11x11, the image is {tuple(target.shape[-2:])}; use an image of 11 or more")
    values = ssim_map(prediction.double(), target.double(), 11, max_val=data_range, padding="valid")
    return values.flatten(1).mean(1)


def _check_pair(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"prediction and target must be (B, C, H, W) of one shape, got {shapes}")
