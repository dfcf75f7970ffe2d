"""The regressor as a denoiser: applied one or more times to its own output."""

import torch
from torch import Tensor

from ebt_vision.core.precision import Precision
from ebt_vision.denoising.network import ModelDenoiser, SampleWatch
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.noise.processes import to_image_range, to_model_range


class RegressorDenoiser(ModelDenoiser):
    """The feed-forward baseline, applied options.num_steps times to its own output.

    With a tolerance a sample stops once an application changes it by no more than this share of what the first one did, as
    squared distances |y - R(y)|^2. The share is of the first change or, with tolerance_of="previous", of the one before.
    """

    model: PatchRegressor
    suggested_steps = 1
    """A second application removes detail wherever the noise is that of the training or less (docs/results/base.md)."""
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
        watch = SampleWatch(options, callback)
        x = to_model_range(noisy) * self.scale_for(options)
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        moving = torch.arange(len(x), device=x.device)  # the samples that are still changed
        reference: Tensor | None = None  # the change that the tolerance is relative to, of the moving samples
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
                reference = change if reference is None else reference
                continues = change > options.tolerance * reference
                reference = change if options.tolerance_of == "previous" else reference
                moving, reference = moving[continues], reference[continues]
        return DenoiseResult(image=to_image_range(x), num_steps=steps, num_forward=steps, trajectory=watch.trajectory())
