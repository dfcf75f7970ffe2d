"""A network of another library behind the Denoiser interface."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ebt_vision.core.precision import Precision, autocast, check_precision
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.classical import estimate_sigma
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, DenoiseStep
from ebt_vision.noise.processes import to_image_range, to_model_range

Call = Callable[[Tensor, Tensor | None], Tensor]
"""Images (B, 3, H, W) and, for a network that takes a noise map, sigma (B,), both in [0, 1] units, to images."""

_FLOATS_PER_CHANNEL = 16


class PeerDenoiser(Denoiser):
    """A network of another library: one pass, with or without the standard deviation of the noise as input.

    `call` runs `network`. With `takes_sigma` it gets options.sigma, or an estimate for each image. `patch_size` is what the
    sides of its input must be multiples of. The images of the VP process are brought to full signal first (Denoiser.scale_for).
    """

    tile_size = 256

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        *,
        name: str,
        takes_sigma: bool,
        patch_size: int = 1,
        weights_hash: str | None = None,
        precision: Precision = "float32",
    ):
        super().__init__()
        check_precision(precision)
        self.precision = "float32" if precision == "auto" else precision
        self.name, self.patch_size, self.weights_hash = name, patch_size, weights_hash
        self.input_scale = None
        self.takes_sigma = takes_sigma
        self.options_used = frozenset(("sigma",)) if takes_sigma else frozenset()
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        self.network = network.eval().requires_grad_(False)
        self._call = call

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        ones = torch.ones(len(noisy), dtype=torch.int64, device=noisy.device)
        if callback(DenoiseStep(index=0, num_steps=1, image=noisy, energies=None)) is True:
            stopped = (noisy,) * (options.num_steps + 1) if options.keep_trajectory else None
            return DenoiseResult(image=noisy, num_steps=0 * ones, num_forward=0 * ones, trajectory=stopped)
        x = self._at_full_signal(noisy, options)
        sigma = None
        if self.takes_sigma:
            sigmas = estimate_sigma(x) if options.sigma is None else [options.sigma] * len(x)
            sigma = torch.tensor(sigmas, dtype=x.dtype, device=x.device) / 255.0
        # Spandrel runs networks under inference_mode; the copy can be written to outside of it.
        image = self._call(x, sigma).to(noisy).clone()
        callback(DenoiseStep(index=1, num_steps=1, image=image, energies=None))
        trajectory = (noisy, *[image] * options.num_steps) if options.keep_trajectory else None
        num_forward = ones if self.num_parameters else torch.zeros_like(ones)
        return DenoiseResult(image=image, num_steps=ones, num_forward=num_forward, trajectory=trajectory)

    def _at_full_signal(self, noisy: Tensor, options: DenoiseOptions) -> Tensor:
        scale = self.scale_for(options)
        return noisy if scale == 1.0 else to_image_range(to_model_range(noisy) * scale)

    def to_network(self, noisy: Tensor) -> Tensor:
        weight = next(self.network.parameters(), None)
        return noisy if weight is None else noisy.to(weight)

    def autocast(self) -> contextlib.AbstractContextManager:
        weight = next(self.network.parameters(), None)
        device = "cpu" if weight is None else weight.device
        return autocast(device, bfloat16=self.precision == "bfloat16")

    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions:
        if not self.takes_sigma or options.sigma is not None:
            return options
        return replace(options, sigma=min(estimate_sigma(self._at_full_signal(noisy, options))[0], 255.0))

    def activation_bytes(self, height: int, width: int) -> int:
        first = next((layer for layer in self.network.modules() if isinstance(layer, nn.Conv2d)), None)
        channels = 64 if first is None else first.out_channels
        return 4 * _FLOATS_PER_CHANNEL * channels * height * width


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the first 12 hex digits of the SHA-256 of weights, of any shapes, that were not read from a file."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
