"""Noise processes from clean to noisy images: every corruption, with its unit and its source.

Every function takes images (B, C, H, W) and a generator (one for the batch or one per sample, see `rng`), never changes its
input, and never clips unless documented. Functions in [-1, 1] follow the paper; functions in [0, 1] follow the restoration
literature. Only `to_model_range` and `to_image_range` convert between the two ranges.
"""

import functools
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.rng import Generators, rand_like, randn_like

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


def to_model_range(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], any shape; values outside the range stay outside."""
    return images * 2.0 - 1.0


def to_image_range(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], any shape; values outside the range stay outside."""
    return (images + 1.0) / 2.0


@functools.cache
def alphas_cumprod() -> Tensor:
    """Return alpha_bar_t of DDPM's linear schedule for t = 0..999, float64 (1000,) (Ho et al. 2020, sec. 4)."""
    # Name the device: under `torch.device("meta")` the cache would keep a table without values.
    betas = torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64, device="cpu")
    return torch.cumprod(1.0 - betas, dim=0)


def level_to_timestep(level: float) -> int:
    """Return the timestep of a noise level in (0, 1]: level 0.1 is timestep 99, 0.2 is 199 (Gladstone et al. 2025, code)."""
    if not 0.0 < level <= 1.0:
        raise ValueError(f"noise level={level} is not in (0, 1]; the paper trains at 0.1")
    return max(round(level * NUM_TRAIN_TIMESTEPS) - 1, 0)


def signal_and_noise_scale(level: float) -> tuple[float, float]:
    """Return (sqrt(alpha_bar), sqrt(1 - alpha_bar)) at a noise level: about (0.947, 0.321) at 0.1."""
    alpha_bar = float(alphas_cumprod()[level_to_timestep(level)])
    return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)


def add_vp_noise(clean: Tensor, level: float, generator: Generators | None = None) -> Tensor:
    """DDPM's forward process on images (B, C, H, W) in [-1, 1]: sqrt(a) * clean + sqrt(1 - a) * N(0, 1).

    Ho et al. 2020, eq. 4.
    """
    signal, noise = signal_and_noise_scale(level)
    return signal * clean + noise * randn_like(clean, generator)


def add_gaussian_noise(clean: Tensor, sigma: float, generator: Generators | None = None) -> Tensor:
    """Add AWGN to images (B, C, H, W) in [0, 1]; `sigma` is in the usual 0..255 units; not clipped."""
    if sigma < 0:
        raise ValueError(f"sigma={sigma} is negative; the restoration papers use 15, 25 and 50")
    return clean + (sigma / 255.0) * randn_like(clean, generator)


def add_restoration_noise(clean: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Add AWGN to images in [0, 1] exactly as the restoration papers draw it for their tables; not clipped.

    Their programs call `np.random.seed(0)` and then `np.random.normal(0, sigma / 255, (H, W, C))` before every image (Zhang et
    al., KAIR). All images of one shape therefore get the same noise. `sigma` is in 0..255 units.
    """
    if sigma < 0:
        raise ValueError(f"sigma={sigma} is negative; the restoration papers use 15, 25 and 50")
    channels, height, width = clean.shape[1:]
    noise = np.random.RandomState(seed).normal(0.0, sigma / 255.0, (height, width, channels))
    noisy = clean.cpu().double() + torch.from_numpy(noise).permute(2, 0, 1)  # HWC -> CHW
    return noisy.to(clean.dtype).to(clean.device)  # in this order: not every device has float64


def sigma_to_timestep(sigma: float) -> int:
    """Return the timestep whose noise-to-signal ratio is nearest to AWGN of `sigma` (0..255 units) on [0, 1] images."""
    alpha_bar = alphas_cumprod()
    ratio = ((1.0 - alpha_bar) / alpha_bar).sqrt()  # noise std over signal scale, on [-1, 1]
    return int((ratio - 2.0 * sigma / 255.0).abs().argmin())


def add_salt_and_pepper(clean: Tensor, amount: float, generator: Generators | None = None) -> Tensor:
    """Set a fraction `amount` (0..1) of the pixels of images (B, C, H, W) in [0, 1] to black or white, half each.

    All channels of a pixel get the same value.
    """
    if not 0.0 <= amount <= 1.0:
        raise ValueError(f"amount={amount} is not in [0, 1]")
    draw = rand_like(clean[:, :1], generator)  # (B, 1, H, W)
    noisy = torch.where(draw < amount / 2, torch.zeros_like(clean), clean)
    return torch.where(draw > 1.0 - amount / 2, torch.ones_like(clean), noisy)


def add_poisson_noise(clean: Tensor, peak: float, generator: Generators | None = None) -> Tensor:
    """Photon noise on images (B, C, H, W) in [0, 1]: Poisson(clean * peak) / peak, `peak` photons at white.

    The result is not clipped above.
    """
    if peak <= 0:
        raise ValueError(f"peak={peak} must be positive: the number of photons at white")
    rate = clean.clamp(min=0.0).cpu() * peak
    if generator is None or isinstance(generator, torch.Generator):
        counts = torch.poisson(rate, generator=generator)
    else:
        counts = torch.stack([torch.poisson(r, generator=g) for r, g in zip(rate, generator, strict=True)])
    return (counts / peak).to(clean.device)


def add_speckle(clean: Tensor, std: float, generator: Generators | None = None) -> Tensor:
    """Multiplicative noise on images (B, C, H, W) in [0, 1]: clean * (1 + std * N(0, 1)); not clipped."""
    return clean + clean * std * randn_like(clean, generator)


def add_jpeg(clean: Tensor, quality: int, *, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """Round images (B, 3, H, W) in [0, 1] to 8 bits and pass them through a JPEG of `quality` 1..100; no random draw.

    `origin`: how many rows above and columns to the left of the image the blocks begin, as if it had been cut afterwards.
    """
    from PIL import Image

    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality} is not in 1..100")
    rows, columns = origin
    wide = F.pad(clean, (columns, 0, rows, 0), mode="replicate")
    decoded = []
    for image in to_8_bit(wide).to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy():  # NCHW -> NHWC
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file))))
    images = torch.stack(decoded)[:, rows:, columns:].permute(0, 3, 1, 2)  # NHWC -> NCHW
    return (images.to(clean.dtype) / 255.0).to(clean.device)


def add_motion_blur(clean: Tensor, length: int, angle: float = 45.0) -> Tensor:
    """Average images (B, C, H, W) over a straight path of `length` pixels at `angle` degrees; no random draw.

    Borders are reflected.
    """
    if length < 1 or length // 2 >= min(clean.shape[-2:]):
        raise ValueError(f"length={length} must be 1 or more and fit the image of {tuple(clean.shape[-2:])}")
    radius = length // 2
    kernel = _line_kernel(length, math.radians(angle)).to(clean)
    weight = kernel.expand(clean.shape[1], 1, *kernel.shape)
    return F.conv2d(F.pad(clean, [radius] * 4, mode="reflect"), weight, groups=clean.shape[1])


def _line_kernel(length: int, angle: float) -> Tensor:
    """Kernel (2r + 1, 2r + 1), r = length // 2: points along the line, each distributed over its four nearest pixels; sums to
    1."""
    radius = length // 2
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 16 * length, dtype=torch.float64)
    grid = torch.arange(-radius, radius + 1, dtype=torch.float64)
    rows = (1.0 - (grid[:, None] + along * math.sin(angle)).abs()).clamp(min=0.0)  # (2r + 1, points)
    columns = (1.0 - (grid[:, None] - along * math.cos(angle)).abs()).clamp(min=0.0)
    kernel = rows @ columns.T
    return kernel / kernel.sum()


def to_8_bit(images: Tensor) -> Tensor:
    """[0, 1] -> whole numbers 0..255, any shape, clipped and rounded, in the dtype of `images`."""
    return (images.clamp(0.0, 1.0) * 255.0).round()
