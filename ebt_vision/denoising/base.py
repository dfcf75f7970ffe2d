"""One interface for all denoisers: EBT, DiT, the regressor, classical methods.

Images are float RGB (B, 3, H, W) in [0, 1]. Noise may carry them outside this range; only the output is clipped.
ebt.py, regressor.py, dit.py, equilibrium.py and classical.py implement it; `load.load_denoiser` finds them by name.
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
from ebt_vision.core.thinking_config import ToleranceOf
from ebt_vision.denoising.inputs import check_images, checked_ids, pad_to_multiple, working
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import (
    Callback,
    CleanImages,
    DenoiseResult,
    DenoiseStep,
    apply_strength,
    crop_and_clamp,
    finish_result,
    no_network_result,
    restore_flat_images,
)
from ebt_vision.denoising.self_ensemble import denoise_copies
from ebt_vision.denoising.tiling import denoise_each_tiled
from ebt_vision.noise.named import Noise
from ebt_vision.noise.processes import signal_and_noise_scale

OF_STEPS = frozenset(("langevin_std", "step_size_scale", "step_rule", "likelihood_weight", "tolerance", "tolerance_of"))
"""Fields of DenoiseOptions for the steps that follow a proposal."""


class Denoiser(nn.Module, ABC):
    """Noisy images in, clean images out. The result for an image does not depend on the other images in its batch.

    A Denoiser is a module: `denoiser(noisy)` returns the denoised image, and `to`, `parameters` and `state_dict` act on the
    network. It always stays in eval mode.
    """

    name: str
    num_parameters: int = 0
    weights_hash: str | None = None
    """First 12 hex digits of the SHA-256 of the weights of another library's network."""
    tile_size: int = 512
    """Side in pixels of the tiles for large images; for a network, its training size, or 1.5 times that with a convolutional
    stem."""
    training_size: int | None = None
    """Side in pixels of a network's training images; None for another method. `restore` uses tiles of this size: with smaller
    tiles it computes fewer pixels outside the damage."""
    overlap_share: float = 0.25
    """Default overlap of neighbouring tiles, as a fraction of the tile; see overlap_for."""
    fits_tiles: bool = False
    """Whether tiles may be smaller than tile_size where the same number of them covers the image; see tiling.tile_grid."""
    patch_size: int = 1
    """Images are padded to multiples of this size."""
    options_used: frozenset[str] = frozenset()
    """The fields of DenoiseOptions that this denoiser uses, without `seed`."""
    suggested_steps: int = 4
    """Default number of steps of the command line and the page."""
    suggested_tolerance: float | None = None
    """Default tolerance of the command line and the page where neither steps nor a tolerance is given."""
    suggested_tolerance_of: ToleranceOf = "training"
    """Reference of suggested_tolerance."""
    starts_from_proposal: bool = False
    """Whether thinking starts from a reconstruction of the image by default; see noise_from_energy."""
    input_scale: float | None = 1.0
    """Factor on the image, in -1..1, before the network. None derives it from noise_level in the options; see scale_for."""
    signal_scale: float = 1.0
    """Factor on the signal in the training images of a network: sqrt(alpha_bar) of the VP process, 1 for AWGN."""

    def denoise(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult:
        """Denoise (B, 3, H, W), float, about [0, 1]. The input is never clipped. Sides can have any size from 8 px on.

        Images larger than the tile (options.tile_size, or the denoiser's own) are denoised one after another in overlapping
        tiles, as by the command line and the page; see ebt_vision.denoising.tiling.denoise_tiled. Options default to
        `suggested_options`. Images of the result have the dtype and device of `noisy`.

        `image_ids` (B, default all 0) select the random numbers of images: the same id and seed give the same numbers in any
        batch. A callback gets each step; for images in tiles see DenoiseStep.image_index.
        Raises ValueError for an invalid image or option and for an image that requires a gradient (no graph is kept; see
        thinking.think), and the errors of the method itself.
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
        """Like `denoise`, on whole images (B, 3, H, W) of any size.

        A network may perform badly far from its training size.

        Sides that patch_size does not divide are reflect-padded, and the padding is removed from the result.
        """
        options = self.options_or_suggested(options)
        check_images(noisy)
        ids = checked_ids(image_ids, len(noisy))
        size, dtype = noisy.shape[-2:], noisy.dtype

        stopped = False
        keeps = CleanImages(noisy, lambda energies: self.is_clean(energies, options))

        def on_step(step: DenoiseStep) -> object:
            nonlocal stopped
            if callback is None:
                return None
            shown = replace(step, image=crop_and_clamp(step.image, size).to(dtype))
            told = callback(keeps.step(shown))
            stopped = stopped or told is True
            return told

        # Thinking needs gradients, which inference mode forbids.
        with torch.inference_mode(False), torch.no_grad(), self.autocast():
            plain = noisy.clone() if noisy.is_inference() else noisy
            padded = self.to_network(pad_to_multiple(working(plain), self.patch_size))
            result = denoise_copies(self._denoise, padded, options, ids, on_step)
            keeps.judge(result.energies)
            if options.strength > 1.0 and not stopped and not keeps.all:
                stronger = padded + (options.strength - 1.0) * (padded - result.image.to(padded))
                first = result.num_forward
                result = denoise_copies(self._denoise, stronger, options, ids, on_step)
                result = replace(result, num_forward=result.num_forward + first)
            finished = keeps.result(restore_flat_images(finish_result(result, size, plain), plain))
            return apply_strength(finished, plain, options.strength)

    def forward(self, noisy: Tensor, options: DenoiseOptions | None = None) -> Tensor:
        """Return only the denoised images, (B, 3, H, W) in [0, 1]: `denoise(noisy, options).image`."""
        return self.denoise(noisy, options).image

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode for any `mode`, so that no label is dropped during denoising."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, tile_size={self.tile_size}, patch_size={self.patch_size}"

    def overlap_for(self, tile_size: int) -> int:
        """Default overlap in pixels for tiles of this side."""
        return int(self.overlap_share * tile_size)

    @property
    def suggested_options(self) -> DenoiseOptions:
        """Options that the command line uses when neither steps nor a tolerance is given."""
        tolerance = self.suggested_tolerance
        return DenoiseOptions(
            num_steps=self.suggested_steps,
            tolerance=tolerance,
            tolerance_of="first" if tolerance is None else self.suggested_tolerance_of,
        )

    def options_or_suggested(self, options: DenoiseOptions | None) -> DenoiseOptions:
        """Return `options`, or the suggested options for None. Raises ValueError for anything else."""
        if options is None:
            return self.suggested_options
        if not isinstance(options, DenoiseOptions):
            raise ValueError(f"options is a {type(options).__name__}; give DenoiseOptions(num_steps=..., ...) or None")
        return options

    def options_in_effect(self, num_steps: int, start: str | None = None) -> frozenset[str]:
        """Return the fields of `options_used` that have an effect with this number of steps from this start.

        None is the start that the model suggests.

        A single proposal has no steps after it, and only the energy of a model that proposes shows noise. The fields that work
        with every denoiser, such as strength, are not among them.
        """
        from_proposal = start == "proposal" or (start is None and self.starts_from_proposal)
        if not from_proposal:
            return self.options_used - {"clean_below"}
        return self.options_used - OF_STEPS if num_steps == 1 else self.options_used

    def scale_for(self, options: DenoiseOptions) -> float:
        """Return the factor on the image, in -1..1, before the network.

        It is input_scale if that is set. Otherwise images are photographs, or images of the VP process if there is a
        noise_level; the scale is then that of for_photographs or for_vp_images.
        """
        if self.input_scale is not None:
            return self.input_scale
        level = options.noise_level
        return self.signal_scale if level is None else vp_input_scale(self.signal_scale, level)

    @abstractmethod
    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        """Denoise a checked and padded batch under no_grad; the images of the result need no clamping."""

    def is_clean(self, energies: Tensor, options: DenoiseOptions) -> Tensor | None:
        """Whether noisy images with these energies, (B,), mean over patches, take no step: bool (B,), or None for never.

        See DenoiseOptions.clean_below.
        """
        return None

    def to_network(self, noisy: Tensor) -> Tensor:
        """Move images (B, 3, H, W) to the device and dtype of the network; results return to the device of the caller."""
        return noisy

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which the network runs: bfloat16 autocast or nothing."""
        return contextlib.nullcontext()

    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions:
        """Fill in options that are estimated from `noisy` (1, 3, H, W), so that all its tiles share one estimate."""
        return options

    def energy_map(self, images: Tensor, noisy: Tensor) -> Tensor | None:
        """Return the energy of each patch of `images` (B, 3, H, W) in [0, 1], (B, H / patch_size, W / patch_size), or None.

        `noisy` is the observation of `images`; the sides must be multiples of patch_size. None for a method without an energy.
        """
        return None

    def activation_bytes(self, height: int, width: int) -> int:
        """Estimate the bytes of memory for one image of this size."""
        return 64 * 3 * height * width * 4


class IdentityDenoiser(Denoiser):
    """Returns the image itself, clamped: the "noisy input" row of a table."""

    name = "identity"

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        return no_network_result(noisy.clone(), noisy, options)


def noise_from_energy(energy: float, patch_size: int) -> float:
    """Noise standard deviation of an image as a model sees it, in 0..255 units: sqrt(2 E / (3 p^2)) * 127.5.

    `energy` is E(x) = |x - N(x)|^2 / 2 of the noisy RGB image x on [-1, 1], mean over patches of side p = `patch_size`.
    This is valid for a model whose N(x) was trained as a reconstruction, that is, a model that thinks from its proposal.
    Raises ValueError below 0.
    """
    check(energy >= 0, "energy", energy, "use the first energy of a quadratic head, which is 0 or more")
    check(patch_size >= 1, "patch_size", patch_size, "use 1 or more")
    return math.sqrt(2.0 * energy / (3 * patch_size**2)) * 127.5


def energy_from_noise(sigma: float, patch_size: int) -> float:
    """Inverse of `noise_from_energy`: the energy, mean over patches, of an image with noise of `sigma` in 0..255 units."""
    return 0.5 * 3 * patch_size**2 * (sigma / 127.5) ** 2


TRAINING_LEVEL = 0.1
"""The VP noise level at which the project's VP models are trained."""


def for_photographs(denoiser: Denoiser) -> Denoiser:
    """Copy a denoiser for images with ordinary noise: a network of the VP process gets them scaled by its signal scale."""
    denoiser = copy.copy(denoiser)
    denoiser.input_scale = denoiser.signal_scale
    return denoiser


def for_vp_images(denoiser: Denoiser, level: float) -> Denoiser:
    """Copy a denoiser for images of the VP process: a network of this process gets them unscaled, others at full signal."""
    denoiser = copy.copy(denoiser)
    denoiser.input_scale = vp_input_scale(denoiser.signal_scale, level)
    return denoiser


def vp_input_scale(signal_scale: float, level: float) -> float:
    """Factor on images of the VP process at this level, for a network trained with this signal scale."""
    return 1.0 / signal_and_noise_scale(level)[0] if signal_scale == 1.0 else 1.0


def adapt_to_noise(denoiser: Denoiser, noise: Noise | None) -> Denoiser:
    """Adapt a denoiser to images with this noise; None means photographs that are already noisy."""
    level = None if noise is None else noise.noise_level
    return for_photographs(denoiser) if level is None else for_vp_images(denoiser, level)
