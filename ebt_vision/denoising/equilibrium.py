"""Equilibrium Matching as a denoiser: descent along the learned field from the noisy image."""

from torch import Tensor

from ebt_vision.core.precision import Precision
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_results import ThinkingStep
from ebt_vision.denoising.network import ModelDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, DenoiseStep, repeat_last
from ebt_vision.models.equilibrium import EquilibriumEnergy, PatchEqM
from ebt_vision.models.patch_ebt import patch_energy_mean
from ebt_vision.noise.processes import to_image_range, to_model_range


class EqMDenoiser(ModelDenoiser):
    """PatchEqM: options.num_steps steps, one forward pass each. Energies are |f|^2 / 2, mean over patches."""

    model: PatchEqM
    options_used = frozenset(("num_steps", "tolerance", "tolerance_of", "step_size_scale"))

    def __init__(
        self, model: PatchEqM, *, name: str = "eqm", input_scale: float | None = 1.0, precision: Precision = "float32"
    ):
        super().__init__(model, name=name, input_scale=input_scale, precision=precision)
        self.suggested_steps = model.config.suggested_steps

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        images: list[Tensor] = []

        def on_step(step: ThinkingStep) -> bool:
            images.append(to_image_range(step.candidate))
            energies = patch_energy_mean(step.energies, noisy.shape, self.patch_size)
            told = DenoiseStep(index=step.index, num_steps=options.num_steps, image=images[-1], energies=energies)
            return callback(told) is True

        result = think(
            EquilibriumEnergy(self.model),
            to_model_range(noisy) * self.scale_for(options),
            options.thinking(),
            step_size=self.model.config.step_size * options.step_size_scale,
            callback=on_step,
        )
        missing = options.num_steps + 1 - len(images)
        energies = repeat_last(result.energies, options.num_steps + 1)
        trajectory = (*(images + images[-1:] * missing)[:-1], to_image_range(result.final)) if options.keep_trajectory else None
        return DenoiseResult(
            image=to_image_range(result.final),
            num_steps=result.num_steps,
            num_forward=result.num_forward,
            energies=patch_energy_mean(energies, noisy.shape, self.patch_size),
            trajectory=trajectory,
        )
