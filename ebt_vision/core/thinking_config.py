"""The config of thinking: steps, step size, noise, gradient graph and tolerance."""

from dataclasses import dataclass
from typing import Literal, get_args

from ebt_vision.core.checks import check, check_number
from ebt_vision.core.step_rules import AnyStepRule, StepRuleName, find_step_rule

ToleranceOf = Literal["first", "previous", "training", "observation"]


def check_tolerance(tolerance: float | None, tolerance_of: str) -> None:
    """Raise ValueError unless the tolerance is None or a number of 0 or more, and its reference is one of ToleranceOf."""
    if tolerance is not None:
        check_number("tolerance", tolerance)
        check(tolerance >= 0, "tolerance", tolerance, "use 0 or more, or None")
    known = get_args(ToleranceOf)
    check(tolerance_of in known, "tolerance_of", tolerance_of, f"use one of {known}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingConfig:
    """Options of thinking; the defaults are plain deterministic descent for inference."""

    num_steps: int = 1
    """Number of updates of the candidate; the maximum if the number is random or there is a tolerance."""
    min_num_steps: int | None = None
    """If set, each call draws its number of steps uniformly from min_num_steps..num_steps (regularises the landscape)."""
    step_size: float = 1.0
    """The paper's alpha, in candidate units squared per energy unit; the learned step size of a model replaces it."""
    step_size_factor: float = 1.0
    """Each sample's step size is drawn uniformly from [step_size / factor, step_size * factor]; 1 draws nothing."""
    step_rule: StepRuleName | AnyStepRule = "fixed"
    """How far a step goes along the gradient: the name of a rule of step_rules.py, or the rule itself with its settings."""
    langevin_std: float | tuple[float, ...] = 0.0
    """Standard deviation, in candidate units, of the noise added to the candidate before each gradient: one for all steps, or
    one per step."""
    detach_between_steps: bool = True
    """Cut the graph before every step, so that a loss on step t trains only step t."""
    backprop_steps: int | None = None
    """If set, only this number of last steps is in the graph (truncation); None keeps all steps."""
    tolerance: float | None = None
    """If set, a sample stops after step k when its gain g_k = E_(k-1) - E_k is at most `tolerance` times a reference; see
    tolerance_of."""
    tolerance_of: ToleranceOf = "first"
    """When a sample stops after step k. E_k is the energy after step k, g_k = E_(k-1) - E_k the gain, t the tolerance:

    - first: g_k <= t * g_1, relative to the first gain
    - previous: g_k <= t * g_(k-1), relative to the previous gain
    - training: g_k <= t * G^2 / g_1, where G is training_gain; stronger noise has a larger g_1 and so a lower threshold
    - observation: E_k <= t * E_observation (see think()); this rule can stop before the first step

    Under every rule a step that raises the energy is undone, and the sample stops."""
    training_gain: float | None = None
    """G of the rule `training`: the mean gain of a first step on inputs with the training noise."""

    def __post_init__(self) -> None:
        check(self.num_steps >= 0, "num_steps", self.num_steps, "use 1 or more, or 0 to return the start")
        low = self.min_num_steps
        check(low is None or 0 <= low <= self.num_steps, "min_num_steps", low, f"use 0..{self.num_steps}")
        check(self.step_size > 0, "step_size", self.step_size, "use a positive number")
        check(self.step_size_factor >= 1, "step_size_factor", self.step_size_factor, "use 1 (off) or more")
        find_step_rule(self.step_rule)
        self._check_langevin_std()
        check(self.backprop_steps is None or self.backprop_steps >= 1, "backprop_steps", self.backprop_steps, "use 1 or more")
        check_tolerance(self.tolerance, self.tolerance_of)
        gain = self.training_gain
        check(gain is None or gain > 0, "training_gain", gain, "use a positive number")
        if self.tolerance is not None and self.tolerance_of == "training" and gain is None:
            raise ValueError("tolerance_of='training': the model has no training_gain; use 'first' or 'previous'")

    @property
    def has_langevin_noise(self) -> bool:
        """Whether noise is added at any step."""
        return any(std > 0 for std in self._langevin_stds)

    def langevin_std_at(self, step: int) -> float:
        """Standard deviation of the noise before gradient `step` (0, 1, ...)."""
        return self.langevin_std[step] if isinstance(self.langevin_std, tuple) else self.langevin_std

    @property
    def _langevin_stds(self) -> tuple[float, ...]:
        return self.langevin_std if isinstance(self.langevin_std, tuple) else (self.langevin_std,)

    def _check_langevin_std(self) -> None:
        for std in self._langevin_stds:
            check(std >= 0, "langevin_std", self.langevin_std, "use 0 (off) or more")
        self.check_schedule(self.num_steps)

    def check_schedule(self, num_steps: int) -> None:
        """Raise ValueError if a schedule of langevin_std has fewer values than `num_steps`."""
        if isinstance(self.langevin_std, tuple):
            given = len(self.langevin_std)
            remedy = f"give one for each of the {num_steps} steps"
            check(given >= num_steps, "langevin_std", f"{self.langevin_std} ({given} values)", remedy)
