"""Step rules: the next candidate of a thinking step, given the gradient of the energy. All rules use the loop `thinking.think`.

A rule is a frozen dataclass with one method, `move`. The loop stores the memory of a rule between steps. The memory consists of
tensors with one row for each sample, so that samples can leave the batch. Inner products and step lengths are computed for each
element (an image, or one position of a text), so no result depends on the other elements of the batch.

All multiples are multiples of the step size that `think()` gets, which is the learned step size of a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ebt_vision.core.checks import check

Memory = tuple[Tensor, ...]
"""Tensors (b, ...) that a rule stores for its next step; empty before the first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The input of a rule at a thinking step: the b samples that still move. E is (b,) for images, (b, S) for text."""

    candidate: Tensor
    """Where energy and gradient were taken, (b, ...)."""
    energy: Tensor
    """Of shape E."""
    gradient: Tensor
    """(b, ...)."""
    step_size: Tensor
    """The paper's alpha, (b,)."""
    memory: Memory
    project: Callable[[Tensor], Tensor]
    """The constraint of think(), or the identity, on candidates (b, ...)."""
    energy_of: Callable[[Tensor, Tensor], Tensor]
    """(candidates (b, ...), rows (k,)) -> the energies of those rows, shape E of k samples, without a graph."""


class StepRule(Protocol):
    """A rule for the next candidate, given the gradient."""

    name: str

    def move(self, step: Step) -> tuple[Tensor, Memory]:
        """Return the next candidates (b, ...), before any projection, and the memory for the next step."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """y <- y - alpha g: plain gradient descent, the rule of the paper (Gladstone et al. 2025, sec. 3)."""

    name: Literal["fixed"] = "fixed"

    def move(self, step: Step) -> tuple[Tensor, Memory]:
        return step.candidate - _spread(step.step_size, step.gradient) * step.gradient, ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BarzilaiBorwein:
    """y <- y - a g with a = <dy, dy> / <dy, dg> of the last step, clamped to multiples of alpha; the first step is alpha.

    Barzilai & Borwein 1988, eq. 5, with the safeguard of Birgin, Martinez & Raydan 2000 (SPG, step 3): if the energy has
    negative curvature, <dy, dg> <= 0, the step is the longest one. No gradient flows through the multiples in training.
    """

    name: Literal["barzilai-borwein"] = "barzilai-borwein"
    shortest: float = 0.5
    """Smallest multiple of the step size, above 0."""
    longest: float = 6.0
    """Largest multiple of the step size."""

    def __post_init__(self) -> None:
        check(self.shortest > 0, "step_rule.shortest", self.shortest, "use a positive number, say 0.5")
        check(self.longest >= self.shortest, "step_rule.longest", self.longest, f"use {self.shortest} (shortest) or more")

    def move(self, step: Step) -> tuple[Tensor, Memory]:
        candidate, gradient = step.candidate.detach(), step.gradient.detach()
        length = step.step_size
        if step.memory:
            moved, turned = candidate - step.memory[0], gradient - step.memory[1]
            curvature = _inner(moved, turned, step.energy)
            alpha = _spread(step.step_size.detach(), curvature)
            multiple = (_inner(moved, moved, step.energy) / curvature / alpha).clamp(self.shortest, self.longest)
            length = _spread(length, multiple) * multiple.where(curvature > 0, torch.full_like(multiple, self.longest))
        return step.candidate - _spread(length, step.gradient) * step.gradient, (candidate, gradient)


@dataclass(frozen=True, kw_only=True, slots=True)
class Momentum:
    """Nesterov's accelerated gradient: v <- m v - alpha g, y <- y - alpha g + m v, with v = 0 after the first step.

    Nesterov 1983, in the form of Bengio et al. 2012 (arXiv 1212.0901, eq. 7), where y are the look-ahead points at which
    energies and gradients are evaluated. The first step has no momentum, as in FISTA (Beck & Teboulle 2009, eq. 4.2), because
    the learned step size of a model fits this step.
    """

    name: Literal["momentum"] = "momentum"
    momentum: float = 0.5
    """m, in [0, 1); 0 is the fixed rule."""

    def __post_init__(self) -> None:
        check(0 <= self.momentum < 1, "step_rule.momentum", self.momentum, "use a number in [0, 1), say 0.5")

    def move(self, step: Step) -> tuple[Tensor, Memory]:
        descent = -_spread(step.step_size, step.gradient) * step.gradient
        if not step.memory:
            return step.candidate + descent, (torch.zeros_like(descent),)
        velocity = self.momentum * step.memory[0] + descent
        return step.candidate + descent + self.momentum * velocity, (velocity,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Backtracking:
    """y <- y - a g with the first a of alpha * (first, first * shrink, ...) that lowers the energy enough, or no step.

    Armijo 1966; with a projection P the condition of Bertsekas 1976: E(P(y - a g)) <= E(y) - share / a * |P(y - a g) - y|^2.
    No energy ever rises. Every trial costs a forward pass for the samples that do not have a step yet.
    """

    name: Literal["backtracking"] = "backtracking"
    first: float = 1.0
    """The multiple of the step size that is tried first."""
    shrink: float = 0.5
    """Factor from one trial to the next, in (0, 1)."""
    share: float = 1e-4
    """Required fraction of the decrease that the gradient predicts, in (0, 1)."""
    num_trials: int = 5
    """Maximum number of trials; after them the sample does not move."""

    def __post_init__(self) -> None:
        check(self.first > 0, "step_rule.first", self.first, "use a positive number, say 1")
        check(0 < self.shrink < 1, "step_rule.shrink", self.shrink, "use a number in (0, 1), say 0.5")
        check(0 < self.share < 1, "step_rule.share", self.share, "use a number in (0, 1), say 1e-4")
        check(self.num_trials >= 1, "step_rule.num_trials", self.num_trials, "use 1 or more")

    def move(self, step: Step) -> tuple[Tensor, Memory]:
        length = self._accepted(step) * _spread(step.step_size, step.energy)
        return step.candidate - _spread(length, step.gradient) * step.gradient, ()

    @torch.no_grad()
    def _accepted(self, step: Step) -> Tensor:
        """Return the multiple of the step size for each element, of shape E; 0 if no trial is accepted."""
        accepted = torch.zeros_like(step.energy)
        multiple = self.first
        for _ in range(self.num_trials):
            rows = (accepted == 0).reshape(len(accepted), -1).any(1).nonzero()[:, 0]
            if not len(rows):
                break
            length = multiple * step.step_size
            trial = step.project(step.candidate - _spread(length, step.gradient) * step.gradient)
            moved = (trial - step.candidate)[rows]
            asked = self.share / _spread(length[rows], step.energy[rows]) * _inner(moved, moved, step.energy)
            lower = step.energy_of(trial, rows) <= step.energy[rows] - asked
            untaken = accepted[rows] == 0
            accepted[rows] = torch.where(lower & untaken, multiple, accepted[rows])
            multiple *= self.shrink
        return accepted


StepRuleName = Literal["fixed", "barzilai-borwein", "momentum", "backtracking"]
AnyStepRule = Fixed | BarzilaiBorwein | Momentum | Backtracking
STEP_RULES: dict[str, type[AnyStepRule]] = {
    "fixed": Fixed,
    "barzilai-borwein": BarzilaiBorwein,
    "momentum": Momentum,
    "backtracking": Backtracking,
}


def find_step_rule(rule: StepRuleName | AnyStepRule) -> AnyStepRule:
    """Return the rule of this name with its defaults, or the rule itself. Raises ValueError for anything else."""
    if isinstance(rule, AnyStepRule):
        return rule
    if not isinstance(rule, str) or rule not in STEP_RULES:
        raise ValueError(f"step_rule={rule!r} is unknown; use one of {', '.join(STEP_RULES)}")
    return STEP_RULES[rule]()


def _inner(left: Tensor, right: Tensor, energy: Tensor) -> Tensor:
    """<left, right> of each element: (b, ...) -> the shape of `energy`, (b,) or (b, S)."""
    return (left * right).flatten(energy.ndim).sum(-1) if left.ndim > energy.ndim else left * right


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Values of samples or elements, with as many dimensions as `like`, to broadcast over it."""
    return values.to(like.dtype).reshape(*values.shape, *[1] * (like.ndim - values.ndim))
