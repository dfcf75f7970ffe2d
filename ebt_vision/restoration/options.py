"""Options and result of restore()."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from ebt_vision.core.checks import check, check_number, check_whole

SolverName = Literal["splitting", "renoising", "descent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreOptions:
    """How to restore. None selects the default for the likelihood (see solvers.SUGGESTED)."""

    solver: SolverName | None = None
    """splitting: half-quadratic splitting. renoising: denoise, apply the observation, add less noise than before. descent:
    think on the energy plus the weighted likelihood."""
    num_steps: int | None = None
    """Number of passes per tile; for the descent, number of updates."""
    noise: float | None = None
    """Standard deviation of the noise of the observation, in 0..255 units; None estimates it if the damage is a blur."""
    num_averaged: int | None = None
    """Number of last steps whose images are averaged, all at last_sigma; 1 returns the last image. Not for the descent."""
    first_sigma: float | None = None
    """Noise level of the first step, in 0..255 units; the levels fall in equal ratios. Not for the descent."""
    last_sigma: float | None = None
    """Noise level of the last step, 0.1 or more."""
    prior_weight: float | None = None
    """Weight of the prior relative to the likelihood, above 0; 1 follows from the noise levels."""
    moving_tiles: bool | None = None
    """Move the grid of tiles from step to step. Without it seams can be visible. None: as suits the damage; not for JPEG, whose
    blocks the network recognises best in line with its patches."""
    turning_tiles: bool = True
    """Denoise another mirrored or rotated copy of the tiles in each step; their errors average out. Not for the descent. The
    blocks of a JPEG stay in line with the patches of the network if the sides of the image are multiples of 8."""
    seed: int = 0
    """Seed of the noise of renoising; it also selects the first copy of turning_tiles."""
    num_runs: int | None = None
    """Number of whole runs, with the seeds `seed`, `seed` + 1 ...; the result is their mean. Each run of renoising is close to
    one draw from the images that explain the observation, and the mean has a smaller squared error. Renoising only. None: as
    suits the damage, and 1 if `solver` or `num_steps` is given."""
    tile_size: int | None = None
    """Side of the tiles in pixels; None: the training size of the network."""
    keep_trajectory: bool = False
    """Keep the image after every step."""

    def __post_init__(self) -> None:
        names = get_args(SolverName)
        check(self.solver in (None, *names), "solver", self.solver, f"use one of {', '.join(names)}, or None")
        if self.num_steps is not None:
            check_whole("num_steps", self.num_steps)
            check(self.num_steps >= 1, "num_steps", self.num_steps, "use 1 or more")
        if self.num_averaged is not None:
            check_whole("num_averaged", self.num_averaged)
            limit = self.num_steps or self.num_averaged
            check(1 <= self.num_averaged <= limit, "num_averaged", self.num_averaged, "use 1 to num_steps")
        for name in ("noise", "first_sigma", "last_sigma", "prior_weight"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
        check(self.noise is None or 0 <= self.noise <= 255, "noise", self.noise, "use 0..255")
        for name in ("first_sigma", "last_sigma"):
            value = getattr(self, name)
            check(value is None or 0.1 <= value <= 255, name, value, "use 0.1..255")
        weight = self.prior_weight
        check(weight is None or weight > 0, "prior_weight", weight, "use a number above 0")
        if self.num_runs is not None:
            check_whole("num_runs", self.num_runs)
            check(self.num_runs >= 1, "num_runs", self.num_runs, "use 1 or more")
        check_whole("seed", self.seed)
        check(self.seed >= 0, "seed", self.seed, "use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreStep:
    """The input of a callback after each step."""

    index: int
    """Number of the step from 1 on, over all runs."""
    num_steps: int
    """Number of steps of all runs."""
    image: Tensor
    """(1, 3, H, W) in [0, 1]; from the second run on the mean with the finished runs."""
    energy: float | None
    """Energy of the input of the network, mean over patches; None for a method without an energy."""
    likelihood: float
    """Half the squared distance to the observation, mean over its values."""


Callback = Callable[[RestoreStep], object]
"""Called after each step; returning True stops the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreResult:
    """A restored image and its history. T is the number of steps, over all runs one after another."""

    image: Tensor
    """(1, 3, H, W) in [0, 1]."""
    energies: tuple[float | None, ...]
    """The energy at each step, mean over patches (T). It is the energy of the image with the noise that renoising added."""
    likelihoods: tuple[float, ...]
    """Half the squared distance of each step's image to the observation, mean over its values (T)."""
    sums: tuple[float | None, ...]
    """The energy plus the weighted likelihood at each step, in model units, mean over patches (T)."""
    num_forward: int
    """Passes through the network, over all tiles."""
    solver: SolverName
    num_runs: int
    """Number of runs that the image is the mean of."""
    noise: float | None
    """The noise of the observation, given or estimated, in 0..255 units."""
    trajectory: tuple[Tensor, ...] | None = None
    """With keep_trajectory: the image after each step, like `image`."""

    def with_images(self, change: Callable[[Tensor], Tensor]) -> "RestoreResult":
        """Return the same result, with `change` applied to each of its images."""
        trajectory = self.trajectory and tuple(change(image) for image in self.trajectory)
        return replace(self, image=change(self.image), trajectory=trajectory)

    def to(self, like: Tensor) -> "RestoreResult":
        """Return the same result with its images in the dtype and on the device of `like` (any shape)."""
        return self.with_images(lambda image: image.to(like))
