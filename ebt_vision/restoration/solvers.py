"""Ways to make the energy and the likelihood small together.

Splitting: half-quadratic splitting with a denoiser for the prior's step (Geman & Yang 1995; DPIR, Zhang et al. 2021, alg. 1).
The network is blind: it finds out by itself how much noise an image has.

Renoising: each step adds noise, of a level that falls, to the image before the network sees it. So the network, which is blind,
removes as much as the level says, and holes are filled with structure first and detail later (DiffPIR, Zhu et al. 2023,
algorithm 1, with zeta = 1 and noise that does not shrink the signal; Lugmayr et al. 2022 for holes).

Descent: thinking.think on the sum of energy and weighted likelihood (Romano et al. 2017, sec. 3; Hurault et al. 2022).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.core.thinking_results import ThinkingStep
from ebt_vision.denoising.classical import estimate_sigma
from ebt_vision.restoration.jpeg import JpegIntervals
from ebt_vision.restoration.likelihoods import Convolution, Downsampling, Likelihood, Mask
from ebt_vision.restoration.options import Callback, RestoreOptions, RestoreStep
from ebt_vision.restoration.prior import Prior, TiledEnergy

NOISE_STREAM = 2
"""Stream of random numbers, beside those of denoising.ebt."""
LEAST_NOISE = 0.255
"""The noise, in 0..255 units, that a proximal step assumes where there is less: what DPIR takes for no noise."""
DESCENT_STEP = 0.5
"""Step size of the descent in units of the network, over (1 + weight): the curvature of a likelihood here is 1 at most."""

SUGGESTED: dict[type[Likelihood], RestoreOptions] = {
    Mask: RestoreOptions(solver="renoising", num_steps=20, first_sigma=40.0, last_sigma=2.0, noise=0.0, prior_weight=1.0),
    Convolution: RestoreOptions(solver="renoising", num_steps=8, first_sigma=49.0, last_sigma=2.0, prior_weight=0.23),
    Downsampling: RestoreOptions(
        solver="renoising", num_steps=8, first_sigma=20.0, last_sigma=2.0, noise=0.0, prior_weight=0.23
    ),
    JpegIntervals: RestoreOptions(
        solver="splitting", num_steps=5, first_sigma=49.0, last_sigma=2.0, noise=0.0, prior_weight=1.0
    ),
}
"""What suits each damage. A noise of None is estimated from the image."""


def complete(options: RestoreOptions, likelihood: Likelihood, observed: Tensor) -> RestoreOptions:
    """The options with what is None filled in, for an observation (1, 3, h, w)."""
    suggested = next((SUGGESTED[c] for c in type(likelihood).__mro__ if c in SUGGESTED), SUGGESTED[Convolution])
    names = ("solver", "num_steps", "first_sigma", "last_sigma", "noise", "prior_weight")
    filled = {name: getattr(suggested, name) for name in names if getattr(options, name) is None}
    options = replace(options, **filled)
    if options.noise is None:
        options = replace(options, noise=min(estimate_sigma(observed)[0], 255.0))
    return options


@dataclass(slots=True)
class Record:
    """What a solver reports of its steps."""

    num_steps: int
    callback: Callback | None
    keep_trajectory: bool
    energies: list[float | None] = field(default_factory=list)
    likelihoods: list[float] = field(default_factory=list)
    sums: list[float | None] = field(default_factory=list)
    trajectory: list[Tensor] = field(default_factory=list)
    num_forward: int = 0

    def add(self, show: Callable[[], Tensor], energy: float | None, likelihood: float, weighted: float) -> bool:
        """Note a step; True where the callback ends the work. `weighted` is what the likelihood adds to the energy."""
        self.energies.append(energy)
        self.likelihoods.append(likelihood)
        self.sums.append(None if energy is None else energy + weighted)
        if self.callback is None and not self.keep_trajectory:
            return False
        image = show().clamp(0, 1)
        if self.keep_trajectory:
            self.trajectory.append(image)
        if self.callback is None:
            return False
        step = RestoreStep(
            index=len(self.energies), num_steps=self.num_steps, image=image, energy=energy, likelihood=likelihood
        )
        return self.callback(step) is True


def noise_levels(options: RestoreOptions) -> list[float]:
    """The level of each step on [0, 1], from the first to the last in equal ratios."""
    assert options.num_steps is not None and options.first_sigma is not None and options.last_sigma is not None
    first, last, count = options.first_sigma / 255.0, options.last_sigma / 255.0, options.num_steps
    if count == 1:
        return [last]
    return [first * (last / first) ** (i / (count - 1)) for i in range(count)]


def alternate(prior: Prior, likelihood: Likelihood, observed: Tensor, options: RestoreOptions, record: Record) -> Tensor:
    """Splitting and renoising on (1, 3, h, w): the network, then the likelihood's proximal step, once per noise level."""
    assert options.noise is not None and options.prior_weight is not None
    x = likelihood.start(observed)
    exact = isinstance(likelihood, Mask) and options.noise == 0
    noise = max(options.noise, LEAST_NOISE) / 255.0
    generators = sample_generators(options.seed, [0], NOISE_STREAM)
    for step, level in enumerate(noise_levels(options)):
        shown = x
        if options.solver == "renoising":
            fresh = torch.randn(x.shape, generator=generators[0], dtype=torch.float32)
            shown = x + level * fresh.to(x)
        denoised = prior.denoise(shown, step)
        weight = 0.0 if exact else options.prior_weight * (noise / level) ** 2
        x = likelihood.prox(denoised.image.to(x), observed, weight)
        record.num_forward += denoised.num_forward
        value = float(likelihood.value(x, observed).sum())
        show = functools.partial(likelihood.finish, x, observed)
        if record.add(show, denoised.energy, value / observed.numel(), _per_patch(value, x, prior)):
            break
    return x


def descend(prior: Prior, likelihood: Likelihood, observed: Tensor, options: RestoreOptions, record: Record) -> Tensor:
    """Think on energy + likelihood / prior_weight, of (1, 3, h, w). On a fixed grid no step raises the sum (backtracking)."""
    assert options.prior_weight is not None and options.num_steps is not None
    weight = 1.0 / options.prior_weight
    total = TiledEnergy(prior, lambda y: likelihood.value(y, observed), weight)
    start = likelihood.start(observed)
    known = isinstance(likelihood, Mask) and options.noise == 0
    patches = total.num_patches(start)

    def listen(step: ThinkingStep) -> bool:
        if step.index == 0:
            return False
        value = float(likelihood.value(step.candidate, observed).sum())
        weighted = weight * 4.0 * value / patches
        show = functools.partial(likelihood.finish, step.candidate, observed)
        energy = float(step.energies.sum()) / patches - weighted
        return record.add(show, energy, value / observed.numel(), weighted)

    result = think(
        total,
        start,
        ThinkingConfig(num_steps=options.num_steps, step_rule="backtracking"),
        step_size=DESCENT_STEP / (1.0 + weight) / 4.0,  # of images in [0, 1]: a quarter of that on [-1, 1]
        project=(lambda y: likelihood.prox(y, observed, 0.0)) if known else None,
        callback=listen,
        keep_predictions=False,
    )
    tiles = math.ceil(start.shape[-2] / prior.tile) * math.ceil(start.shape[-1] / prior.tile)
    record.num_forward += int(result.num_forward.sum()) * tiles
    return result.final


def _per_patch(value: float, x: Tensor, prior: Prior) -> float:
    """A likelihood's value in units of the network, mean over patches."""
    patch = prior.denoiser.patch_size
    return 4.0 * value / max(x.shape[-2] // patch * (x.shape[-1] // patch), 1)


SOLVERS = {"splitting": alternate, "renoising": alternate, "descent": descend}
