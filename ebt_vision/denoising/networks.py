"""Denoisers by networks: thinking with PatchEBT, sampling with DiT, applying the regressor."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ebt_vision.core.energies import auto_likelihood_weight, gaussian_likelihood, likelihood_context, with_likelihood
from ebt_vision.core.precision import Precision, autocast, check_precision, has_fast_bfloat16
from ebt_vision.core.rng import randn_like, sample_generators
from ebt_vision.core.thinking import ThinkingResult, ThinkingStep, best_of
from ebt_vision.denoising.base import TRAINING_LEVEL, Denoiser
from ebt_vision.denoising.classical import estimate_sigma
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, DenoiseStep, join_results
from ebt_vision.models.patch_ebt import PatchEBT, num_patches, patch_energy_mean
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise.processes import (
    alphas_cumprod,
    level_to_timestep,
    sigma_to_timestep,
    signal_and_noise_scale,
    to_image_range,
    to_model_range,
)

if TYPE_CHECKING:  # diffusers takes seconds to import
    from ebt_vision.models.dit import DiT

LANGEVIN_STREAM, JITTER_STREAM = 0, 1
"""Streams of random numbers, in addition to the id of an image."""


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

    def __init__(self, model: PretrainedModel, *, name: str, input_scale: float | None = 1.0, precision: Precision = "float32"):
        super().__init__()
        check_precision(precision)
        self.precision = precision
        self.name = name
        self.input_scale = input_scale
        self.signal_scale = signal_scale_of(model)
        self.num_parameters = model.num_parameters
        self.tile_size = model.config.img_size
        if getattr(model.config, "stem_widths", ()):
            self.overlap_share = 0.125  # a convolutional stem sees across patches; a quarter was not better (docs/results)
        self.patch_size = model.config.patch_size
        self.model = model.eval()

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


class EBTDenoiser(ModelDenoiser):
    """PatchEBT: descend the energy from the noisy image or its proposal; keep the candidate of lowest energy.

    With num_candidates above 1 the first candidate starts there, and the others start there plus noise. A proposal N(x) counts
    as the first step: it needs one forward pass, which also gives the energy of x.
    """

    model: PatchEBT
    options_used = frozenset(
        (
            "num_steps",
            "num_candidates",
            "candidate_noise_std",
            "tolerance",
            "tolerance_of",
            "step_rule",
            "langevin_std",
            "step_size_scale",
            "likelihood_weight",
        )
    )

    def __init__(
        self, model: PatchEBT, *, name: str = "ebt", input_scale: float | None = 1.0, precision: Precision = "float32"
    ):
        super().__init__(model, name=name, input_scale=input_scale, precision=precision)
        self.suggested_steps = model.config.suggested_steps
        self.suggested_tolerance = model.config.suggested_tolerance
        self.suggested_tolerance_of = model.config.suggested_tolerance_of
        self.starts_from_proposal = model.config.suggested_start == "proposal"

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        x = to_model_range(noisy) * self.scale_for(options)
        context = self.model.context_of(x)
        proposed = None
        if (options.start or self.model.config.suggested_start) == "proposal":
            proposed = self.model.propose(x, *context)
            if not options.final_energy and options.num_steps == options.num_candidates == 1 and not options.likelihood_weight:
                one = torch.ones(len(x), dtype=torch.int64)
                energies = self._mean(proposed[1][None], x)
                return DenoiseResult(image=to_image_range(proposed[0]), num_steps=one, num_forward=one, energies=energies)
        watch = _Watch(options, x, self.patch_size, callback, proposed)
        likelihood = self._likelihood(x, context, options, proposed)
        result = best_of(
            with_likelihood(self.model, len(context)) if likelihood else self.model,
            watch.starts(image_ids),
            options.thinking(num_before=watch.num_before, training_gain=self._training_gain(x)),
            context=(*context, *likelihood),
            step_size=self.model.step_size.detach() * options.step_size_scale,
            observation_energy=None if proposed is None else proposed[1],
            generator=sample_generators(options.seed, image_ids, LANGEVIN_STREAM, device=x.device),
            callback=watch,
        )
        image = to_image_range(result.final)
        energies = _chosen_energies(result.results, result.chosen, options.num_steps - watch.num_before)
        if proposed is not None:
            energies = torch.cat([proposed[1][None].to(energies), energies])
        model_energy = energies[-1] - gaussian_likelihood(result.final, *likelihood) if likelihood else None
        read_weight = likelihood and options.likelihood_weight == "auto" and proposed is None
        return DenoiseResult(
            image=image,
            num_steps=_of_chosen([r.num_steps for r in result.results], result.chosen) + watch.num_before,
            num_forward=result.num_forward + watch.num_before + (1 if read_weight else 0),
            energies=self._mean(energies, x),
            model_energy=None if model_energy is None else self._mean(model_energy, x),
            candidate_energies=self._mean(result.energies, x),
            chosen=result.chosen,
            candidate_images=to_image_range(result.candidates) if options.keep_candidates else None,
            trajectory=watch.trajectory(result.chosen, image) if options.keep_trajectory else None,
        )

    def _likelihood(
        self, x: Tensor, context: tuple[Tensor, ...], options: DenoiseOptions, proposed: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """Context of the likelihood of the observation, or nothing where it has no weight."""
        weight: Tensor | float
        if options.likelihood_weight == "auto":
            gain = self._training_gain(x)
            if gain is None:
                raise ValueError(f"likelihood_weight='auto': {self.name} has no training_gain to compare with; give a number")
            weight = auto_likelihood_weight(self.model(x, *context) if proposed is None else proposed[1], gain).to(x)
        elif options.likelihood_weight:
            weight = options.likelihood_weight
        else:
            return ()
        return likelihood_context(x, weight, self.model.step_size.detach())

    def _training_gain(self, x: Tensor) -> float | None:
        """What a first step gains at the training's noise on images of this size, summed over patches."""
        gain = self.model.config.training_gain
        return None if gain is None else gain * num_patches(x.shape, self.patch_size)

    def energy_map(self, images: Tensor, noisy: Tensor) -> Tensor:
        x = to_model_range(self.to_network(noisy)) * self.scale_for(DenoiseOptions())
        with torch.no_grad(), self.autocast():
            return self.model.energy_map(to_model_range(self.to_network(images)), *self.model.context_of(x))

    def _mean(self, energies: Tensor, x: Tensor) -> Tensor:
        return patch_energy_mean(energies, x.shape, self.patch_size)


class _Watch:
    """Pass the starts to best_of and receive every step: report it, keep it, and stop if requested.

    `proposed` is the proposal and the energy of the observation `x`, if thinking starts from the proposal.
    """

    def __init__(
        self,
        options: DenoiseOptions,
        x: Tensor,
        patch_size: int,
        callback: Callback,
        proposed: tuple[Tensor, Tensor] | None,
    ):
        self.options, self.x, self.patch_size, self.callback, self.proposed = options, x, patch_size, callback, proposed
        self.num_before = 0 if proposed is None else 1  # steps before the first thinking step
        self.candidate, self.stopped = 0, False
        self.images: list[list[Tensor]] = []  # for each candidate, after each step

    def starts(self, image_ids: list[int]) -> Iterator[Tensor]:
        first = self.x if self.proposed is None else self.proposed[0]
        for candidate in range(self.options.num_candidates):
            if self.stopped:
                return
            self.candidate = candidate
            self.images.append([])
            if self.proposed is not None:
                self._tell(0, self.x, self.proposed[1])
            if candidate == 0:
                yield first
            else:
                seed, device = self.options.seed, first.device
                generators = sample_generators(seed, image_ids, JITTER_STREAM, candidate, device=device)
                yield first + self.options.candidate_noise_std * randn_like(first, generators)

    def __call__(self, step: ThinkingStep) -> bool:
        if self.stopped:  # before the first step of thinking
            return True
        return self._tell(step.index + self.num_before, step.candidate, step.energies)

    def _tell(self, index: int, candidate: Tensor, energies: Tensor) -> bool:
        image = to_image_range(candidate)
        if self.options.keep_trajectory:
            self.images[-1].append(image)
        told = self.callback(
            DenoiseStep(
                index=index,
                num_steps=self.options.num_steps,
                image=image,
                energies=patch_energy_mean(energies, self.x.shape, self.patch_size),
                candidate=self.candidate,
                num_candidates=self.options.num_candidates,
            )
        )
        self.stopped = told is True
        return self.stopped

    def trajectory(self, chosen: Tensor, final: Tensor) -> tuple[Tensor, ...]:
        count = self.options.num_steps + 1
        padded = [images + [images[-1]] * (count - len(images)) for images in self.images]
        steps = [_of_chosen([images[i] for images in padded], chosen) for i in range(count)]
        return (*steps[:-1], final)


def _of_chosen(values: list[Tensor], chosen: Tensor) -> Tensor:
    """values[chosen[b]][b] for each sample b: N of (B, ...) -> (B, ...)."""
    return torch.stack(values)[chosen, torch.arange(len(chosen), device=chosen.device)]


def repeat_last(energies: Tensor, count: int) -> Tensor:
    """Energies (T + 1, B) of a run that may have ended early, with the last row repeated up to `count` rows."""
    return torch.cat([energies, energies[-1:].expand(count - len(energies), -1)])


def _chosen_energies(results: tuple[ThinkingResult, ...], chosen: Tensor, num_steps: int) -> Tensor:
    """Return energies (num_steps + 1, B) of the winners; if all samples stopped early, the last row is repeated."""
    rows = []
    for result in results:
        rows.append(repeat_last(result.energies, num_steps + 1))
    return _of_chosen([energies.T for energies in rows], chosen).T


class RegressorDenoiser(ModelDenoiser):
    """The feed-forward baseline, applied options.num_steps times to its own output.

    With a tolerance a sample stops once an application changes it by no more than this share of what the first one did, as
    squared distances |y - R(y)|^2. The share is of the first change or, with tolerance_of="previous", of the one before.
    """

    model: PatchRegressor
    options_used = frozenset(("num_steps", "tolerance", "tolerance_of"))

    def __init__(
        self,
        model: PatchRegressor,
        *,
        name: str = "regressor",
        input_scale: float | None = 1.0,
        precision: Precision = "float32",
    ):
        super().__init__(model, name=name, input_scale=input_scale, precision=precision)

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        if options.tolerance is not None and options.tolerance_of not in ("first", "previous"):
            raise ValueError(
                f"tolerance_of={options.tolerance_of!r} needs an energy; use 'first' or 'previous' for {self.name}"
            )
        watch = _Samples(options, callback)
        x = to_model_range(noisy) * self.scale_for(options)
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        moving = torch.arange(len(x), device=x.device)  # the samples that are still changed
        yardstick: Tensor | None = None  # what a change is compared with, of the moving samples
        passes, stopped = 0, watch(0, x)
        while passes < options.num_steps and len(moving) and not stopped:
            before = x[moving]
            after = self.model(before)
            x = x.index_copy(0, moving, after)
            steps[moving] += 1
            passes += 1
            stopped = watch(passes, x)
            if options.tolerance is not None:
                change = (after - before).square().flatten(1).sum(1)
                yardstick = change if yardstick is None else yardstick
                goes_on = change > options.tolerance * yardstick
                yardstick = change if options.tolerance_of == "previous" else yardstick
                moving, yardstick = moving[goes_on], yardstick[goes_on]
        return DenoiseResult(image=to_image_range(x), num_steps=steps, num_forward=steps, trajectory=watch.trajectory())


class DiTDenoiser(ModelDenoiser):
    """The diffusion baseline.

    `mode`: "ddim" uses options.num_steps passes from the timestep of the noise to the clean image; "x0" predicts the clean
    image in one call and ignores num_steps; "recursion" runs the whole chain num_steps times on its own output.

    A DiT needs the noise level of its input. With options.noise_level the input is an image of the VP process at this level
    (times input_scale). Otherwise it is a photograph with AWGN of options.sigma, given or estimated. It then gets the timestep
    of the same noise-to-signal ratio and is scaled by the sqrt(alpha_bar) of this timestep, without input_scale; num_steps is
    lowered to the number of available timesteps. Images with their own estimates are sampled one by one, without callbacks.
    """

    model: "DiT"
    options_used = frozenset(("num_steps", "noise_level", "sigma"))

    def __init__(
        self,
        model: "DiT",
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
        watch = _Samples(replace(options, num_steps=num_steps), callback)
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


class _Samples:
    """Receive every sample on [-1, 1]: report it and keep it; True stops the sampling."""

    def __init__(self, options: DenoiseOptions, callback: Callback):
        self.options, self.callback = options, callback
        self.index = 0
        self.images: list[Tensor] = []

    def __call__(self, index: int, sample: Tensor) -> bool:
        self.index, image = index, to_image_range(sample)
        if self.options.keep_trajectory:
            self.images.append(image)
        step = DenoiseStep(index=index, num_steps=self.options.num_steps, image=image, energies=None)
        return self.callback(step) is True

    def trajectory(self) -> tuple[Tensor, ...] | None:
        if not self.options.keep_trajectory:
            return None
        return tuple(self.images + self.images[-1:] * (self.options.num_steps + 1 - len(self.images)))
