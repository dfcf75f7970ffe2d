"""The request of a visitor, and its image: reading, size check, optional noise."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.metrics import mse, psnr_from_mse
from ebt_vision.core.thinking_options import ThinkingOptions
from ebt_vision.data.decoding import TooLargeError
from ebt_vision.data.image_files import ImageFile, ImageFileError, quantise, read_image
from ebt_vision.denoising.base import Denoiser, adapt_to_noise, noise_from_energy
from ebt_vision.denoising.classical import estimate_sigma
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.noise.named import Noise

MAX_PIXELS = 24_000_000
MAX_BYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Request(ThinkingOptions):
    """The options that a visitor selected."""

    path: str
    noise: Noise | None = None
    """Noise to add first; None for a photograph that is already noisy."""
    num_steps: int = 4
    tile_size: int | None = None
    """Tile size in pixels; None for the default of the model."""
    strength: float = 1.0
    self_ensemble: int = 1

    def without_unused(self, options_used: Collection[str]) -> Request:
        """Return the request with defaults for all options that are not in `options_used`."""
        plain = Request(path=self.path)
        thinking = ("num_candidates", "tolerance", "tolerance_of", "step_rule", "langevin_std", "step_size_scale")
        unused = {field for field in thinking if field not in options_used}
        if self.tolerance_of in ("training", "observation") and "step_size_scale" not in options_used:
            unused |= {"tolerance", "tolerance_of"}  # shares of an energy, which this denoiser does not have
        return replace(self, **{field: getattr(plain, field) for field in unused})

    def options(self) -> DenoiseOptions:
        """Return the options for a denoiser. Raises ValueError for a value out of range."""
        return DenoiseOptions(
            **{field.name: getattr(self, field.name) for field in fields(ThinkingOptions)},
            strength=self.strength,
            self_ensemble=self.self_ensemble,
            sigma=None if self.noise is None else self.noise.sigma,
            noise_level=None if self.noise is None else self.noise.noise_level,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An image file and its pixels, (1, 3, H, W), about [0, 1]."""

    file: ImageFile
    noisy: Tensor
    clean: Tensor | None
    """None if it is not known."""

    def middle(self, side: int) -> Source:
        """Return the middle `side` x `side` pixels; a shorter side is not cut."""
        top, left = (max(length - side, 0) // 2 for length in self.noisy.shape[-2:])
        cut = (..., slice(top, top + side), slice(left, left + side))
        return replace(self, noisy=self.noisy[cut], clean=None if self.clean is None else self.clean[cut])

    def psnr(self, image: Tensor) -> list[float]:
        """Return the PSNR in dB of the clipped image (1, 3, H, W) as a list of one; empty if the clean image is not known."""
        if self.clean is None:
            return []
        rows = zip(image.clamp(0, 1).split(256, -2), self.clean.split(256, -2), strict=True)  # in parts: mse needs float64
        errors = torch.stack([mse(part, known)[0] * known.numel() for part, known in rows])
        return [float(psnr_from_mse(errors.sum() / self.clean.numel(), data_range=1.0))]


def read_upload(path: Path) -> ImageFile:
    """Read an image file of a visitor. Raises ImageFileError for an unreadable or too large file."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ImageFileError(f"{path} has more than {MAX_BYTES >> 20} MB; use the command line for this file")
    try:
        return read_image(path, max_pixels=MAX_PIXELS)
    except ImageFileError as error:
        if isinstance(error.__cause__, TooLargeError):
            raise ImageFileError(
                f"{error}: this page accepts {MAX_PIXELS // 10**6} megapixels; use the command line for more"
            ) from None
        raise


def open_source(request: Request) -> Source:
    """Read an image and add noise. Raises ImageFileError for an unreadable or too large file, ValueError for a bad amount."""
    file = read_upload(Path(request.path))
    image = file.visible_pixels()[None]
    if request.noise is None:
        return Source(file=file, noisy=image, clean=None)
    return Source(file=file, noisy=request.noise.add(image, request.seed), clean=image)


def estimate(path: str) -> float:
    """Estimate the noise standard deviation of a photograph, 0..255 units, by wavelets on its middle 512 x 512 pixels."""
    return estimate_sigma(open_source(Request(path=path)).middle(512).noisy)[0]


def noise_seen(path: str, denoiser: Denoiser) -> float | None:
    """Estimate the noise std of a photograph, 0..255 units, from the model's energy of the middle 256 x 256 pixels.

    Returns None for a model whose thinking does not start from the proposal; see noise_from_energy.
    """
    if not denoiser.starts_from_proposal:
        return None
    denoiser = adapt_to_noise(denoiser, None)
    result = denoise_tiled(denoiser, open_source(Request(path=path)).middle(256).noisy, DenoiseOptions(num_steps=1))
    if result.energies is None:
        return None
    options = DenoiseOptions()
    return noise_from_energy(float(result.energies[0, 0]), denoiser.patch_size) / denoiser.scale_for(options)


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert (3, H, W), or the first of (B, 3, H, W), in [0, 1] to uint8 (H, W, 3), clipped and rounded."""
    image = images[0] if images.ndim == 4 else images
    return np.ascontiguousarray(quantise(image).transpose(1, 2, 0))  # CHW -> HWC


def reduced(images: Tensor, side: int) -> Tensor:
    """Downscale (1, 3, H, W) so that its longest side is at most `side`."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return F.interpolate(images.clamp(0, 1), size=size, mode="area")
