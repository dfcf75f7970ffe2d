"""Solvers: methods that minimise the energy and the likelihood together.

Splitting: half-quadratic splitting with a denoiser for the prior's step (Geman & Yang 1995; DPIR, Zhang et al. 2021, alg. 1).
The network is blind: it estimates the noise of an image itself.

Renoising: each step adds noise to the image before the network denoises it. The noise level falls from step to step. The blind
network then removes noise of this level, and holes get structure first and detail later (DiffPIR, Zhu et al. 2023,
algorithm 1, with zeta = 1 and noise that does not shrink the signal; Lugmayr et al. 2022 for holes).

Descent: thinking.think on the sum of energy and weighted likelihood (Romano et al. 2017, sec. 3; Hurault et al. 2022).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
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
"""Stream of random numbers, in addition to those of denoising.ebt."""
NOISE_BLOCK = 512
"""Side in pixels of the blocks for the noise and the first image of holes."""
START_MARGIN = 128
"""Width in pixels of the surroundings of a block that its first image depends on."""
LEAST_NOISE = 0.255
"""Minimum noise, in 0..255 units, that a proximal step assumes; DPIR uses this value for images without noise."""
DESCENT_STEP = 0.5
"""Step size of the descent in units of the network, over (1 + weight): the curvature of a likelihood here is 1 at most."""

SUGGESTED: dict[type[Likelihood], RestoreOptions] = {
    Mask: RestoreOptions(
        solver="renoising",
        num_steps=26,
        num_averaged=16,
        first_sigma=40.0,
        last_sigma=15.0,
        noise=0.0,
        prior_weight=1.0,
        num_runs=2,
        moving_tiles=True,
    ),
    Convolution: RestoreOptions(
        solver="renoising",
        num_steps=8,
        num_averaged=1,
        first_sigma=49.0,
        last_sigma=2.0,
        prior_weight=0.23,
        num_runs=3,
        moving_tiles=True,
    ),
    Downsampling: RestoreOptions(
        solver="renoising",
        num_steps=44,
        num_averaged=40,
        first_sigma=20.0,
        last_sigma=15.0,
        noise=0.0,
        prior_weight=0.23,
        num_runs=1,
        moving_tiles=True,
    ),
    JpegIntervals: RestoreOptions(
        solver="splitting",
        num_steps=5,
        num_averaged=1,
        first_sigma=49.0,
        last_sigma=2.0,
        noise=0.0,
        prior_weight=1.0,
        num_runs=1,
        moving_tiles=False,
    ),
}
"""Default options for each damage. A noise of None is estimated from the image."""


def complete(options: RestoreOptions, likelihood: Likelihood, observed: Tensor) -> RestoreOptions:
    """Return the options for an observation (1, 3, h, w), with defaults in place of None."""
    suggested = next((SUGGESTED[c] for c in type(likelihood).__mro__ if c in SUGGESTED), SUGGESTED[Convolution])
    names = ("solver", "num_steps", "num_averaged", "first_sigma", "last_sigma", "noise", "prior_weight", "moving_tiles")
    filled = {name: getattr(suggested, name) for name in names if getattr(options, name) is None}
    if options.num_averaged is None:  # the suggested share of other numbers of steps; 1 for another solver
        assert suggested.num_steps is not None and suggested.num_averaged is not None
        steps = options.num_steps or suggested.num_steps
        same = options.solver in (None, suggested.solver)
        filled["num_averaged"] = max(round(steps * suggested.num_averaged / suggested.num_steps), 1) if same else 1
    if options.num_runs is None:
        chosen_by_user = options.solver is not None or options.num_steps is not None
        filled["num_runs"] = 1 if chosen_by_user else suggested.num_runs
    options = replace(options, **filled)
    if options.noise is None:
        options = replace(options, noise=min(estimate_sigma(observed)[0], 255.0))
    return options


@dataclass(slots=True)
class Record:
    """The report of a solver about its steps."""

    num_steps: int
    callback: Callback | None
    keep_trajectory: bool
    energies: list[float | None] = field(default_factory=list)
    likelihoods: list[float] = field(default_factory=list)
    sums: list[float | None] = field(default_factory=list)
    trajectory: list[Tensor] = field(default_factory=list)
    num_forward: int = 0

    def add(self, show: Callable[[], Tensor], energy: float | None, likelihood: float, weighted: float) -> bool:
        """Record a step; return True if the callback stops the work. `weighted` is the likelihood term of the sum."""
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
    """Return the noise level of each step on [0, 1]: it falls in equal ratios, then stays for the averaged steps."""
    assert options.num_steps is not None and options.num_averaged is not None
    assert options.first_sigma is not None and options.last_sigma is not None
    first, last = options.first_sigma / 255.0, options.last_sigma / 255.0
    falling = options.num_steps - options.num_averaged  # steps before the last level
    return [first * (last / first) ** (i / falling) for i in range(falling)] + [last] * options.num_averaged


class Average:
    """Mean of the images of the last `num_averaged` steps. In earlier steps, the result is the image of the step.

    An image of renoising is close to one draw from all images that explain the observation. The mean of several draws has a
    smaller squared error than each of them.
    """

    def __init__(self, options: RestoreOptions):
        assert options.num_steps is not None and options.num_averaged is not None
        self.first = options.num_steps - options.num_averaged
        self.total: Tensor | None = None

    def add(self, values: Tensor, step: int) -> Tensor:
        """Return the mean so far, with the values of this step, in any shape."""
        if step <= self.first:
            self.total = values.clone() if step == self.first else None
            return values
        assert self.total is not None
        self.total = self.total + values
        return self.total / (step - self.first + 1)


def alternate(prior: Prior, likelihood: Likelihood, observed: Tensor, options: RestoreOptions, record: Record) -> Tensor:
    """Splitting and renoising on (1, 3, h, w): at each noise level, denoise and take the proximal step of the likelihood."""
    assert options.noise is not None and options.prior_weight is not None
    if isinstance(likelihood, Mask) and options.noise == 0:
        return fill(prior, observed, options, record)
    x = mean = likelihood.start(observed)
    average = Average(options)
    noise = max(options.noise, LEAST_NOISE) / 255.0
    generators = sample_generators(options.seed, [0], NOISE_STREAM)
    for step, level in enumerate(noise_levels(options)):
        shown = x
        if options.solver == "renoising":
            fresh = torch.randn(x.shape, generator=generators[0], dtype=torch.float32)
            shown = x + level * fresh.to(x)
        denoised = prior.denoise(shown, step)
        weight = options.prior_weight * (noise / level) ** 2
        x = likelihood.prox(denoised.image.to(x), observed, weight)
        mean = average.add(x, step)
        record.num_forward += denoised.num_forward
        value = float(likelihood.value(mean, observed).sum())
        show = functools.partial(likelihood.finish, mean, observed)
        if record.add(show, denoised.energy, value / observed.numel(), _per_patch(value, mean, prior)):
            break
    return mean


def fill(prior: Prior, observed: Tensor, options: RestoreOptions, record: Record) -> Tensor:
    """Like `alternate`, for (1, 3, H, W) with missing pixels. The known pixels have no noise and do not change."""
    assert prior.region is not None
    hole = prior.region.to(observed.device)
    x = start_holes(observed, hole)
    noise = BlockNoise(options.seed, x.shape[-2:], prior.region, reach=prior.tile)
    average, means = Average(options), x[..., hole]

    def show() -> Tensor:
        image = x.clone()
        image[..., hole] = means
        return image

    for step, level in enumerate(noise_levels(options)):
        filled = prior.fill(x, step, noise.draw(level) if options.solver == "renoising" else None)
        record.num_forward += filled.num_forward
        means = average.add(x[..., hole], step)
        if record.add(show, filled.energy, 0.0, 0.0):
            break
    x[..., hole] = means
    return x


def start_holes(observed: Tensor, region: Tensor) -> Tensor:
    """Return a copy of (1, 3, H, W) with Mask.start in the missing pixels `region` (H, W), computed only near them."""
    x = observed.clone()
    for rows, columns in _blocks(region.shape):
        if not bool(region[rows, columns].any()):
            continue
        wide = [slice(max(part.start - START_MARGIN, 0), part.stop + START_MARGIN) for part in (rows, columns)]
        missing = region[wide[0], wide[1]]
        if bool(missing.all()):  # a hole larger than the block and its surroundings
            return Mask(~region).start(observed)
        part = Mask(~missing).start(observed[..., wide[0], wide[1]])
        top, left = rows.start - wide[0].start, columns.start - wide[1].start
        target = x[..., rows, columns]
        target.copy_(part[..., top : top + target.shape[-2], left : left + target.shape[-1]])
    return x


def _blocks(size: Sequence[int]) -> list[tuple[slice, slice]]:
    rows, columns = ([slice(at, at + NOISE_BLOCK) for at in range(0, side, NOISE_BLOCK)] for side in size)
    return list(itertools.product(rows, columns))


class BlockNoise:
    """White noise on (1, 3, H, W), new in each step, drawn only in blocks within `reach` of a region."""

    def __init__(self, seed: int, size: Sequence[int], region: Tensor, *, reach: int):
        self.blocks = {
            index: block
            for index, block in enumerate(_blocks(size))
            if bool(region[tuple(slice(max(part.start - reach, 0), part.stop + reach) for part in block)].any())
        }
        self._generators = sample_generators(seed, list(self.blocks), NOISE_STREAM)
        self._values = torch.empty(1, 3, *size)

    def draw(self, level: float) -> Tensor:
        """Return noise of standard deviation `level`; the next call overwrites it. Other blocks are undefined."""
        for (rows, columns), generator in zip(self.blocks.values(), self._generators, strict=True):
            place = self._values[..., rows, columns]
            place.copy_(torch.randn(place.shape, generator=generator)).mul_(level)
        return self._values


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
    """Return the value of a likelihood in units of the network, mean over patches."""
    patch = prior.denoiser.patch_size
    return 4.0 * value / max(x.shape[-2] // patch * (x.shape[-1] // patch), 1)


SOLVERS = {"splitting": alternate, "renoising": alternate, "descent": descend}
