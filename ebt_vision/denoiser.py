"""One interface over every way to denoise: EBT, DiT, the regressor, classical methods.

Images are float RGB (B, 3, H, W) in [0, 1]; noise may carry them outside, and they are clipped on the way out only.
The implementations are in model_denoisers.py and classical.py; `load_denoiser` finds them by name.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.checks import check
from ebt_vision.corruption import signal_and_noise_scale
from ebt_vision.thinking import ToleranceOf

MIN_SIDE = 8
"""Pixels; smaller images hold nothing to denoise by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseOptions:
    """What to do with an image; a denoiser reads the fields that it has a use for."""

    num_steps: int = 1
    """EBT: thinking steps. Regressor: applications. DiT: passes of DDIM, or loops of the recursion."""
    num_candidates: int = 1
    """EBT: think from so many starts and keep the image of lowest energy (self-verification)."""
    candidate_noise_std: float = 0.1
    """EBT: standard deviation, on [-1, 1], of the noise added to every start but the first."""
    tolerance: float | None = None
    """EBT: a sample stops once a step gains no more than this share of what its first step did (see ThinkingConfig)."""
    tolerance_of: ToleranceOf = "first"
    """EBT: what that is a share of: the gain of the first step, the previous one, or a first step at the training's noise."""
    langevin_std: float = 0.0
    """EBT: noise added to the candidate before each gradient, on [-1, 1]."""
    step_size_scale: float = 1.0
    """EBT: factor on the learned step size."""
    seed: int = 0
    """All randomness depends on it and on the image's id."""
    noise_level: float | None = None
    """DiT: the VP noise level in (0, 1] that it is told, for input that the VP process made; it goes before `sigma`."""
    sigma: float | None = None
    """Classical, and DiT without a noise_level: AWGN standard deviation in 0..255 units; None estimates it from the image."""
    keep_trajectory: bool = False
    """Keep the image before the first and after every step."""
    keep_candidates: bool = False
    """EBT: keep the final image of every candidate, not of the winner alone."""

    def __post_init__(self) -> None:
        check(self.num_steps >= 1, "num_steps", self.num_steps, "use 1 or more")
        check(self.num_candidates >= 1, "num_candidates", self.num_candidates, "use 1 (plain thinking) or more")
        check(self.candidate_noise_std >= 0, "candidate_noise_std", self.candidate_noise_std, "use 0 or more")
        check(self.tolerance is None or self.tolerance >= 0, "tolerance", self.tolerance, "use 0 or more, or None")
        check(
            self.tolerance_of in get_args(ToleranceOf), "tolerance_of", self.tolerance_of, f"use one of {get_args(ToleranceOf)}"
        )
        check(self.langevin_std >= 0, "langevin_std", self.langevin_std, "use 0 (off) or more")
        check(self.step_size_scale > 0, "step_size_scale", self.step_size_scale, "use a positive number")
        check(self.seed >= 0, "seed", self.seed, "use 0 or more")
        level = self.noise_level
        check(level is None or 0 < level <= 1, "noise_level", level, "use a number in (0, 1], or None")
        check(self.sigma is None or 0 <= self.sigma <= 255, "sigma", self.sigma, "use 0..255, or None to estimate it")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseStep:
    """What a callback sees before the first step (index 0) and after each one."""

    index: int
    num_steps: int
    image: Tensor  # (B, 3, H, W) in [0, 1]
    energies: Tensor | None  # (B,), mean over patches
    candidate: int = 0
    num_candidates: int = 1


Callback = Callable[[DenoiseStep], object]
"""Returning True ends the work there; the image so far is the result. Methods without steps call nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseResult:
    """Denoised images and how they came about. T is options.num_steps, N options.num_candidates."""

    image: Tensor
    """(B, 3, H, W) in [0, 1], clamped."""
    num_steps: Tensor
    """Steps that each image has had, int64 (B,)."""
    num_forward: Tensor
    """Passes through the network spent on each image, over all candidates, int64 (B,); 0 for classical methods."""
    energies: Tensor | None = None
    """Energy before the first and after every step, mean over patches, (T + 1, B); an image that stopped repeats its last."""
    candidate_energies: Tensor | None = None
    """Final energy of every candidate, mean over patches, (N, B)."""
    chosen: Tensor | None = None
    """Which candidate won, int64 (B,)."""
    candidate_images: Tensor | None = None
    """With keep_candidates: the final image of every candidate, (N, B, 3, H, W), like `image`, which is one of them."""
    candidate_wins: Tensor | None = None
    """Of an image in tiles, which choose each for itself: how many each candidate won, int64 (N, B)."""
    trajectory: tuple[Tensor, ...] | None = None
    """With keep_trajectory: the images before the first and after every step, like `image`, which is the last."""


class Denoiser(ABC):
    """Noisy images in, clean images out. The result for an image does not depend on what else is in its batch."""

    name: str
    num_parameters: int = 0
    tile_size: int = 512
    """Side in pixels of the tiles that large images should be cut into: for a network, its training size."""
    patch_size: int = 1
    """Images are padded to multiples of it."""
    suggested_steps: int = 4
    """What num_steps is on the command line and the page where nobody asks for a number."""
    suggested_tolerance: float | None = None
    """What tolerance is on the command line, of the training's noise, where nobody asks for steps or a tolerance."""
    input_scale: float = 1.0
    """Factor on the image, as -1..1, before a network sees it: see for_photographs and for_vp_images, which set it."""
    signal_scale: float = 1.0
    """What multiplied the signal in the images that a network was trained on: sqrt(alpha_bar) of the VP process, 1 for AWGN."""

    def denoise(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult:
        """Denoise (B, 3, H, W), float, about [0, 1], never clipped on the way in; sides of 8 px or more, any size.

        `image_ids` (B, default all 0) tell apart the random numbers of images: the same id and seed give the same ones
        in whatever batch. Sides that patch_size does not divide are reflect-padded, and the padding is cut off again.
        Raises ValueError for an image or an option that cannot be used, and what the method itself raises.
        """
        options = options or DenoiseOptions()
        check_images(noisy)
        ids = [0] * len(noisy) if image_ids is None else list(image_ids)
        if len(ids) != len(noisy):
            raise ValueError(f"image_ids has {len(ids)} ids for a batch of {len(noisy)}; give one per image")
        size = noisy.shape[-2:]

        def on_step(step: DenoiseStep) -> object:
            return None if callback is None else callback(replace(step, image=crop(step.image.clamp(0, 1), size)))

        with torch.no_grad():
            padded = pad_to_multiple(noisy, self.patch_size)
            result = self._denoise(self.to_network(padded), options, ids, on_step)
        return _finished(result, size, noisy.device)

    @abstractmethod
    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        """The work itself, on a checked and padded batch, under no_grad; the images of the result need no clamping."""

    def to_network(self, noisy: Tensor) -> Tensor:
        """The images on the device and in the dtype that the work is done in; results come back on the caller's device."""
        return noisy

    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions:
        """The options with what is estimated from `noisy` (1, 3, H, W) filled in, so that its tiles share one estimate."""
        return options

    def energy_map(self, images: Tensor, noisy: Tensor) -> Tensor | None:
        """Energy of each patch of `images` (B, 3, H, W) in [0, 1], (B, H / patch_size, W / patch_size); None without one.

        `noisy` is what they were made from; the sides must be multiples of patch_size.
        """
        return None

    def activation_bytes(self, height: int, width: int) -> int:
        """About how much memory one image of this size takes while it is worked on."""
        return 64 * 3 * height * width * 4


def _finished(result: DenoiseResult, size: Sequence[int], device: torch.device) -> DenoiseResult:
    """The result with its images cropped and clamped, on the caller's device."""
    values = {name: getattr(result, name) for name in DenoiseResult.__slots__}
    on_device = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    for name in ("image", "candidate_images"):
        if name in on_device:
            on_device[name] = crop(on_device[name].clamp(0, 1), size)
    trajectory = result.trajectory and tuple(crop(image.to(device).clamp(0, 1), size) for image in result.trajectory)
    return replace(result, trajectory=trajectory, **on_device)


class IdentityDenoiser(Denoiser):
    """Gives the image back, clamped: the "noisy input" row of a table."""

    name = "identity"

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        return no_network_result(noisy.clone(), noisy, options)


def no_network_result(image: Tensor, noisy: Tensor, options: DenoiseOptions) -> DenoiseResult:
    """The result of a method in one step without a network or an energy."""
    ones = torch.ones(len(noisy), dtype=torch.int64, device=noisy.device)
    trajectory = (noisy, *[image] * options.num_steps) if options.keep_trajectory else None
    return DenoiseResult(image=image, num_steps=ones, num_forward=torch.zeros_like(ones), trajectory=trajectory)


TRAINING_LEVEL = 0.1
"""The VP noise level that the project's models of that process are trained at."""


def for_photographs(denoiser: Denoiser) -> Denoiser:
    """A copy for images with ordinary noise: a network trained on the VP process gets them through its signal scale."""
    denoiser = copy.copy(denoiser)
    denoiser.input_scale = denoiser.signal_scale
    return denoiser


def for_vp_images(denoiser: Denoiser, level: float) -> Denoiser:
    """A copy for images that the VP process made: a network trained on it gets them as they are, others at full signal."""
    denoiser = copy.copy(denoiser)
    denoiser.input_scale = 1.0 / signal_and_noise_scale(level)[0] if denoiser.signal_scale == 1.0 else 1.0
    return denoiser


def check_images(noisy: Tensor) -> None:
    """ValueError, in one line, unless `noisy` is a finite float (B, 3, H, W) with sides of at least MIN_SIDE."""
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


def load_denoiser(name_or_path: str, *, device: str = "cpu") -> Denoiser:
    """A denoiser from "bm3d", "nlm" or "identity", a shipped checkpoint's name, a folder, or "hub:OWNER/NAME".

    Raises CheckpointError (a ValueError) for a name that is not known, MissingExtraError for an optional package.
    """
    if name_or_path == IdentityDenoiser.name:
        return IdentityDenoiser()
    from ebt_vision.classical import CLASSICAL_DENOISERS  # these two import this file

    if name_or_path in CLASSICAL_DENOISERS:
        return CLASSICAL_DENOISERS[name_or_path]()
    from ebt_vision.checkpoint import load_pretrained
    from ebt_vision.model_denoisers import denoiser_for

    return denoiser_for(load_pretrained(name_or_path, device=device), name=name_or_path.rstrip("/").rsplit("/", 1)[-1])
