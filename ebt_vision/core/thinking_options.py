"""The options of thinking for users of a model: on a command line, on a page or in a program."""

from dataclasses import dataclass

from ebt_vision.core.checks import check, check_number, check_whole
from ebt_vision.core.step_rules import AnyStepRule, StepRuleName, find_step_rule
from ebt_vision.core.thinking_config import ThinkingConfig, ToleranceOf, check_tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingOptions:
    """How to think with a trained energy. DenoiseOptions and GenerateOptions add options for images and for text."""

    num_steps: int = 1
    """Number of thinking steps; the maximum number with a tolerance."""
    num_candidates: int = 1
    """Number of starts; the candidate of lowest energy is kept (self-verification)."""
    tolerance: float | None = None
    """A sample stops when the gain of a step is at most this fraction of the reference tolerance_of. None: never."""
    tolerance_of: ToleranceOf = "first"
    """Reference of the tolerance: the gain of the first step, the gain of the previous step, the gain of a first step at the
    training noise level, or the energy of the observation. ThinkingConfig.tolerance_of has the formulas."""
    step_rule: StepRuleName | AnyStepRule = "fixed"
    """How far a step goes along the gradient: see step_rules.py."""
    langevin_std: float = 0.0
    """Standard deviation of the noise added to the candidate before each gradient, in the candidate's units."""
    step_size_scale: float = 1.0
    """Factor on the learned step size."""
    seed: int = 0
    """All random draws depend on the seed and the sample."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_candidates", "seed"):
            check_whole(name, getattr(self, name))
        for name in ("langevin_std", "step_size_scale"):
            check_number(name, getattr(self, name))
        check(self.num_steps >= 1, "num_steps", self.num_steps, "use 1 or more")
        check(self.num_candidates >= 1, "num_candidates", self.num_candidates, "use 1 (plain thinking) or more")
        check_tolerance(self.tolerance, self.tolerance_of)
        if self.tolerance is None and self.tolerance_of != "first":
            raise ValueError(f"tolerance_of={self.tolerance_of!r} has no effect without a tolerance; give one, or leave it out")
        find_step_rule(self.step_rule)
        check(self.langevin_std >= 0, "langevin_std", self.langevin_std, "use 0 (off) or more")
        check(self.step_size_scale > 0, "step_size_scale", self.step_size_scale, "use a positive number")
        check(self.seed >= 0, "seed", self.seed, "use 0 or more")

    def thinking(self, *, num_before: int = 0, training_gain: float | None = None) -> ThinkingConfig:
        """Return the ThinkingConfig of these options. `num_before` is the number of steps before thinking (a proposal is one).

        `training_gain` comes from the model, for tolerance_of="training". The caller applies the scale of the step size.
        """
        return ThinkingConfig(
            num_steps=self.num_steps - num_before,
            step_rule=self.step_rule,
            langevin_std=self.langevin_std,
            tolerance=self.tolerance,
            tolerance_of=self.tolerance_of,
            training_gain=training_gain,
        )
