"""One interface over every way to denoise: EBT, DiT, the regressor, classical methods.

Images are float RGB (B, 3, H, W) in [0, 1]; noise may carry them outside, and they are clipped on the way out only.
Implementations are in networks.py and classical.py; `load.load_denoiser` finds them by name.
"""

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from ebt_vision.core.checks import check
from ebt_vision.core.thinking import ToleranceOf
from ebt_vision.denoising.inputs import check_images, checked_ids, pad_to_multiple, working
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import (
    Callback,
    DenoiseResult,
    DenoiseStep,
    apply_strength,
    crop_and_clamp,
    finish_result,
    no_network_result,
    restore_flat_images,
)
from ebt_vision.denoising.tiling import denoise_each_tiled
from ebt_vision.noise.named import Noise
from ebt_vision.noise.processes import signal_and_noise_scale


class Denoiser(nn.Module, ABC):
    """Noisy images in, clean images out. The result for an image does not depend on what else is in its batch.

    It is a module: `denoiser(noisy)` is the denoised image, and `to`, `parameters` and `state_dict` are those of the network.
    It stays in eval mode.
    """

    name: str
    num_parameters: int = 0
    weights_hash: str | None = None
    """First 12 hex digits of the SHA-256 of the weights of another library's network."""
    tile_size: int = 512
    """Side in pixels of the tiles that large images should be cut into: for a network, its training size."""
    overlap_share: float = 0.25
    """Share of a tile that it has in common with the next one, where nobody gives an overlap."""
    patch_size: int = 1
    """Images are padded to multiples of it."""
    options_used: frozenset[str] = frozenset()
    """The fields of DenoiseOptions about how to denoise that make a difference to it; `seed` is not among them."""
    suggested_steps: int = 4
    """What num_steps is on the command line and the page where nobody asks for a number."""
    suggested_tolerance: float | None = None
    """Default tolerance of the command line and the page where neither steps nor a tolerance is given."""
    suggested_tolerance_of: ToleranceOf = "training"
    """What suggested_tolerance is a share of."""
    starts_from_proposal: bool = False
    """Whether thinking starts from a reconstruction of the image unless somebody says otherwise: see noise_from_energy."""
    input_scale: float | None = 1.0
    """Factor on the image, as -1..1, before a network sees it. None picks it by the options' noise_level: see scale_for."""
    signal_scale: float = 1.0
    """What multiplied the signal in the images that a network was trained on: sqrt(alpha_bar) of the VP process, 1 for AWGN."""

    def denoise(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult:
        """Denoise (B, 3, H, W), float, about [0, 1], never clipped on the way in; sides of 8 px or more, any size.

        Images larger than the tile (options.tile_size, or the denoiser's own) are worked on one after the other, in tiles that
        overlap, as the command line and the page do: see ebt_vision.denoising.tiling.denoise_tiled. Options default to
        `suggested_options`. Images of the result have the dtype and the device of `noisy`.

        `image_ids` (B, default all 0) tell apart the random numbers of images: the same id and seed give the same ones
        in whatever batch. A callback hears of each step; of images in tiles see DenoiseStep.image_index.
        Raises ValueError for an image or an option that cannot be used and for an image that is to get a gradient (no graph is
        kept: see thinking.think), and what the method itself raises.
        """
        options = self.options_or_suggested(options)
        check_images(noisy)
        tile_size = self.tile_size if options.tile_size is None else options.tile_size
        if tile_size == 0 or max(noisy.shape[-2:]) <= tile_size:
            return self.denoise_whole(noisy, options, image_ids=image_ids, callback=callback)
        return denoise_each_tiled(self, noisy, options, image_ids=checked_ids(image_ids, len(noisy)), callback=callback)

    def denoise_whole(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult:
        """The same as `denoise` on whole images (B, 3, H, W), whatever their size.

        A network may do badly far from its training's size.

        Sides that patch_size does not divide are reflect-padded, and the padding is cut off again.
        """
        options = self.options_or_suggested(options)
        check_images(noisy)
        ids = checked_ids(image_ids, len(noisy))
        size, dtype = noisy.shape[-2:], noisy.dtype

        stopped = False

        def on_step(step: DenoiseStep) -> object:
            nonlocal stopped
            told = None if callback is None else callback(replace(step, image=crop_and_clamp(step.image, size).to(dtype)))
            stopped = stopped or told is True
            return told

        # Thinking takes gradients, which inference mode forbids.
        with torch.inference_mode(False), torch.no_grad(), self.autocast():
            plain = noisy.clone() if noisy.is_inference() else noisy
            padded = self.to_network(pad_to_multiple(working(plain), self.patch_size))
            result = self._denoise(padded, options, ids, on_step)
            if options.strength > 1.0 and not stopped:
                stronger = padded + (options.strength - 1.0) * (padded - result.image.to(padded))
                result = self._denoise(stronger, options, ids, on_step)
            return apply_strength(restore_flat_images(finish_result(result, size, plain), plain), plain, options.strength)

    def forward(self, noisy: Tensor, options: DenoiseOptions | None = None) -> Tensor:
        """The denoised images alone, (B, 3, H, W) in [0, 1]: `denoise(noisy, options).image`."""
        return self.denoise(noisy, options).image

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked for: no label is dropped while an image is denoised."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, tile_size={self.tile_size}, patch_size={self.patch_size}"

    def overlap_for(self, tile_size: int) -> int:
        """Pixels that tiles of this side have in common, where nobody gives a number."""
        return int(self.overlap_share * tile_size)

    @property
    def suggested_options(self) -> DenoiseOptions:
        """What the command line uses where nobody asks for steps or a tolerance."""
        tolerance = self.suggested_tolerance
        return DenoiseOptions(
            num_steps=self.suggested_steps,
            tolerance=tolerance,
            tolerance_of="first" if tolerance is None else self.suggested_tolerance_of,
        )

    def options_or_suggested(self, options: DenoiseOptions | None) -> DenoiseOptions:
        """`options`, or the suggested ones for None; ValueError for anything else."""
        if options is None:
            return self.suggested_options
        if not isinstance(options, DenoiseOptions):
            raise ValueError(f"options is a {type(options).__name__}; give DenoiseOptions(num_steps=..., ...) or None")
        return options

    def scale_for(self, options: DenoiseOptions) -> float:
        """The factor on the image, as -1..1, before a network sees it.

        It is input_scale. Where that is None, images are photographs, or made by the VP process if there is a noise_level:
        the scale is then that of for_photographs, or of for_vp_images.
        """
        if self.input_scale is not None:
            return self.input_scale
        level = options.noise_level
        return self.signal_scale if level is None else vp_input_scale(self.signal_scale, level)

    @abstractmethod
    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        """The work itself, on a checked and padded batch, under no_grad; the images of the result need no clamping."""

    def to_network(self, noisy: Tensor) -> Tensor:
        """The images (B, 3, H, W) on the device and in the dtype of the work; results come back on the caller's device."""
        return noisy

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that the network runs in: bfloat16 or nothing."""
        return contextlib.nullcontext()

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


class IdentityDenoiser(Denoiser):
    """Gives the image back, clamped: the "noisy input" row of a table."""

    name = "identity"

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        return no_network_result(noisy.clone(), noisy, options)


def noise_from_energy(energy: float, patch_size: int) -> float:
    """The standard deviation of the noise that a model sees in an image, in 0..255 units: sqrt(2 E / (3 p^2)) * 127.5.

    `energy` is E(x) = |x - N(x)|^2 / 2 of the noisy RGB image x on [-1, 1], mean over patches of side p = `patch_size`.
    It holds for a model whose N(x) is an honest reconstruction: one that thinks from its proposal. ValueError below 0.
    """
    check(energy >= 0, "energy", energy, "use the first energy of a quadratic head, which is 0 or more")
    check(patch_size >= 1, "patch_size", patch_size, "use 1 or more")
    return math.sqrt(2.0 * energy / (3 * patch_size**2)) * 127.5


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
    denoiser.input_scale = vp_input_scale(denoiser.signal_scale, level)
    return denoiser


def vp_input_scale(signal_scale: float, level: float) -> float:
    """The factor on images that the VP process made at this level, for a network whose training had this signal scale."""
    return 1.0 / signal_and_noise_scale(level)[0] if signal_scale == 1.0 else 1.0


def adapt_to_noise(denoiser: Denoiser, noise: Noise | None) -> Denoiser:
    """The denoiser as it should be used for images with this noise, None for photographs that are noisy as they are."""
    level = None if noise is None else noise.noise_level
    return for_photographs(denoiser) if level is None else for_vp_images(denoiser, level)
