"""A diffusion model (DiT, PatchDiffusion) as a denoiser: DDIM sampling, its one-call prediction, and its recursion."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ebt_vision.core.precision import Precision
from ebt_vision.denoising.classical import estimate_sigma
from ebt_vision.denoising.network import ModelDenoiser, SampleWatch
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, join_results
from ebt_vision.models.diffusion import Diffusion
from ebt_vision.noise.processes import alphas_cumprod, level_to_timestep, sigma_to_timestep, to_image_range, to_model_range


class DiTDenoiser(ModelDenoiser):
    """The diffusion baseline.

    `mode`: "ddim" uses options.num_steps passes from the timestep of the noise to the clean image; "x0" predicts the clean
    image in one call and ignores num_steps; "recursion" runs the whole chain num_steps times on its own output.

    It needs the noise level of its input. With options.noise_level the input is an image of the VP process at this level
    (times input_scale). Otherwise it is a photograph with AWGN of options.sigma, given or estimated. It then gets the timestep
    of the same noise-to-signal ratio and is scaled by the sqrt(alpha_bar) of this timestep, without input_scale; num_steps is
    lowered to the number of available timesteps. Images with their own estimates are sampled one by one, without callbacks.
    """

    model: Diffusion
    options_used = frozenset(("num_steps", "noise_level", "sigma"))

    def __init__(
        self,
        model: Diffusion,
        *,
        mode: Literal["ddim", "x0", "recursion"] = "ddim",
        name: str = "dit",
        input_scale: float | None = 1.0,
        precision: Precision = "float32",
    ):
        if mode not in ("ddim", "x0", "recursion"):
            raise ValueError(f"mode={mode!r} is unknown; use 'ddim', 'x0' or 'recursion'")
        super().__init__(model, name=name, input_scale=input_scale, precision=precision)
        self.mode = mode

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        x = to_model_range(noisy)
        if options.noise_level is not None:
            return self._sample(x * self.scale_for(options), level_to_timestep(options.noise_level), options, callback)
        sigmas = estimate_sigma(noisy) if options.sigma is None else [options.sigma] * len(noisy)
        timesteps = [sigma_to_timestep(sigma) for sigma in sigmas]
        if len(set(timesteps)) == 1:
            return self._sample_photographs(x, timesteps[0], options, callback)
        # Each image has its own timestep, and its own chain.
        return join_results(
            [self._sample_photographs(x[i : i + 1], t, options, lambda step: None) for i, t in enumerate(timesteps)]
        )

    def _sample_photographs(self, x: Tensor, timestep: int, options: DenoiseOptions, callback: Callback) -> DenoiseResult:
        x = x * math.sqrt(float(alphas_cumprod()[timestep]))
        if self.mode == "ddim":
            options = replace(options, num_steps=min(options.num_steps, timestep + 1))
        return self._sample(x, timestep, options, callback)

    def _sample(self, x: Tensor, timestep: int, options: DenoiseOptions, callback: Callback) -> DenoiseResult:
        num_steps = 1 if self.mode == "x0" else options.num_steps
        passes = timestep + 1 if self.mode == "recursion" else 1
        watch = SampleWatch(replace(options, num_steps=num_steps), callback)
        if self.mode == "recursion":
            x = self.model.recursion(x, timestep, num_steps, callback=watch)
        else:
            x = self.model.ddim(x, timestep, num_steps, callback=watch)
        steps = torch.full((len(x),), watch.index, dtype=torch.int64, device=x.device)
        return DenoiseResult(
            image=to_image_range(x), num_steps=steps, num_forward=steps * passes, trajectory=watch.trajectory()
        )

    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions:
        if options.noise_level is not None or options.sigma is not None:
            return options
        return replace(options, sigma=min(estimate_sigma(noisy)[0], 255.0))
