"""The EBT as a denoiser: thinking from the noisy image or its proposal, with one or more candidates."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ebt_vision.core.best_of import best_of
from ebt_vision.core.energies import auto_likelihood_weight, gaussian_likelihood, likelihood_context, with_likelihood
from ebt_vision.core.precision import Precision
from ebt_vision.core.rng import randn_like, sample_generators
from ebt_vision.core.thinking_results import ThinkingResult, ThinkingStep
from ebt_vision.denoising.base import energy_from_noise
from ebt_vision.denoising.network import ModelDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, DenoiseStep, repeat_last
from ebt_vision.models.patch_ebt import PatchEBT, num_patches, patch_energy_mean
from ebt_vision.noise.processes import to_image_range, to_model_range

LANGEVIN_STREAM, JITTER_STREAM = 0, 1
"""Streams of random numbers, in addition to the id of an image."""


class EBTDenoiser(ModelDenoiser):
    """PatchEBT: descend the energy from the noisy image or its proposal; keep the candidate of lowest energy.

    With num_candidates above 1 the first candidate starts there, and the others start there plus noise. A proposal N(x) counts
    as the first step: it needs one forward pass, which also gives the energy of x. An image that is already clean by its energy
    takes no step (DenoiseOptions.clean_below).
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
            "clean_below",
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
        elif options.clean_below:
            raise ValueError(
                f"clean_below={options.clean_below:g} needs a start from the proposal, whose energy measures noise"
            )
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

    def is_clean(self, energies: Tensor, options: DenoiseOptions) -> Tensor | None:
        below = self.model.config.suggested_clean_below if options.clean_below is None else options.clean_below
        proposes = (options.start or self.model.config.suggested_start) == "proposal"
        if not below or not proposes or options.noise_level is not None:  # a step also rescales images of the VP process
            return None
        return energies <= energy_from_noise(below * self.scale_for(options), self.patch_size)

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


def _chosen_energies(results: tuple[ThinkingResult, ...], chosen: Tensor, num_steps: int) -> Tensor:
    """Return energies (num_steps + 1, B) of the winners; if all samples stopped early, the last row is repeated."""
    rows = []
    for result in results:
        rows.append(repeat_last(result.energies, num_steps + 1))
    return _of_chosen([energies.T for energies in rows], chosen).T
