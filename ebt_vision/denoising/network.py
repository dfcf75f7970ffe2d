"""The common base of the denoisers by networks: weights, precision, memory; the watch on samples without energies."""

import contextlib
import math

import torch
from torch import Tensor

from ebt_vision.core.precision import Precision, autocast, check_precision, has_fast_bfloat16
from ebt_vision.denoising.base import TRAINING_LEVEL, Denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseStep
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise.processes import signal_and_noise_scale, to_image_range


def signal_scale_of(model: PretrainedModel) -> float:
    """Factor on the signal in a network's training images; see Denoiser.signal_scale."""
    return signal_and_noise_scale(TRAINING_LEVEL)[0] if noise_process_of(model) == "vp" else 1.0


class ModelDenoiser(Denoiser):
    """The common base of the network denoisers; the model is put into eval mode.

    `precision`: "bfloat16" runs the network under autocast; energies and images stay float32. "auto" does this if the device is
    fast at bfloat16 and the network adds to its input, as with a convolutional decoder; rounding then has no measurable cost. A
    network that outputs the whole image would round it.
    """

    model: PretrainedModel
    training_size: int

    def __init__(self, model: PretrainedModel, *, name: str, input_scale: float | None = 1.0, precision: Precision = "float32"):
        super().__init__()
        check_precision(precision)
        self.precision = precision
        self.name = name
        self.input_scale = input_scale
        self.signal_scale = signal_scale_of(model)
        self.num_parameters = model.num_parameters
        self.patch_size = model.config.patch_size
        self.tile_size = self.training_size = model.config.img_size
        if getattr(model.config, "stem_widths", ()):  # its training has crops of several sizes (docs/results/photographs.md)
            self.tile_size += self.tile_size // 2 // self.patch_size * self.patch_size
            self.fits_tiles = True
        self.model = model.eval()

    def overlap_for(self, tile_size: int) -> int:
        # A convolutional stem sees across patches, so that two patches are enough.
        return min(2 * self.patch_size, tile_size // 8) if self.fits_tiles else super().overlap_for(tile_size)

    def to_network(self, noisy: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        if weight.is_inference():
            raise ValueError(
                "the weights were made or moved under torch.inference_mode, which forbids gradients; leave it first"
            )
        return noisy.to(weight)

    @property
    def uses_bfloat16(self) -> bool:
        """Whether the network runs in bfloat16 on its current device."""
        weight = next(self.model.parameters())
        if self.precision == "auto":
            adds_to_input = bool(getattr(self.model.config, "stem_widths", ()))
            return adds_to_input and weight.dtype == torch.float32 and has_fast_bfloat16(weight.device)
        return self.precision == "bfloat16"

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(next(self.model.parameters()).device, bfloat16=self.uses_bfloat16)

    def activation_bytes(self, height: int, width: int) -> int:
        # A block keeps about 34 floats per token and channel for a backward pass, and its attention maps twice.
        config = self.model.config
        tokens = math.ceil(height / config.patch_size) * math.ceil(width / config.patch_size)
        per_block = 34 * tokens * config.embed_dim + 2 * config.num_heads * tokens**2
        floats = config.depth * per_block
        # A residual block of a convolutional stem or decoder keeps about 8 floats per pixel and channel of its level.
        pixels = height * width / getattr(config, "stem_unshuffle", 1) ** 2
        for width_of_level in getattr(config, "stem_widths", ()):
            floats += round(pixels * width_of_level * (16 * config.stem_blocks + 4))
            pixels /= 4
        return 4 * floats


class SampleWatch:
    """Receive every sample on [-1, 1]: report it and keep it; True stops the sampling."""

    def __init__(self, options: DenoiseOptions, callback: Callback):
        self.options, self.callback = options, callback
        self.index = 0
        self.images: list[Tensor] = []

    def __call__(self, index: int, sample: Tensor) -> bool:
        """Record the sample (B, 3, H, W) on [-1, 1] after step `index`; return whether the callback stops the work."""
        self.index, image = index, to_image_range(sample)
        if self.options.keep_trajectory:
            self.images.append(image)
        step = DenoiseStep(index=index, num_steps=self.options.num_steps, image=image, energies=None)
        return self.callback(step) is True

    def trajectory(self) -> tuple[Tensor, ...] | None:
        if not self.options.keep_trajectory:
            return None
        return tuple(self.images + self.images[-1:] * (self.options.num_steps + 1 - len(self.images)))
