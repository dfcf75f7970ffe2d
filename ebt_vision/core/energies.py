"""Sums of energies: the energy of a model plus a likelihood of the observation.

By Bayes' rule -log p(y | x) = -log p(y) - log p(x | y) up to a constant, so a prior energy E(y) and a likelihood add up to the
energy E(x, y) of a candidate y for an observation x. `think()` accepts the sum like any other energy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebt_vision.core.checks import check
from ebt_vision.core.energy_functions import EnergyFunction, SteppedEnergy


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One energy of a sum, and its part of the context."""

    energy_fn: Callable[..., Tensor]
    """Any energy, a model or a function; see energy_functions.EnergyFunction."""
    weight: float = 1.0
    num_context: int = 0
    """Number of context tensors of this term; they follow those of the terms before it."""


class EnergySum:
    """Maps a candidate (B, ...) and the context of all terms, in order, to the weighted sum of their energies."""

    def __init__(self, *terms: Term):
        if not terms:
            raise ValueError("EnergySum has no terms; give one Term or more")
        self.terms = terms

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor:
        first, *others = self.parts(candidate, *context)
        for energy in others:
            first = first + energy
        return first

    def parts(self, candidate: Tensor, *context: Tensor) -> list[Tensor]:
        """Return the weighted energy of each term, (B,) or (B, S). Raises ValueError for another number of context tensors."""
        wanted = sum(term.num_context for term in self.terms)
        if len(context) != wanted:
            raise ValueError(f"the terms of this sum take {wanted} context tensors, got {len(context)}")
        energies, used = [], 0
        for term in self.terms:
            energy = term.energy_fn(candidate, *context[used : used + term.num_context])
            energies.append(energy if term.weight == 1.0 else term.weight * energy)
            used += term.num_context
        return energies

    def at_step(self, step: int) -> "EnergySum":
        """Return the sum at a thinking step, for terms that depend on the step (see SteppedEnergy)."""
        fns = [t.energy_fn.at_step(step) if isinstance(t.energy_fn, SteppedEnergy) else t.energy_fn for t in self.terms]
        return EnergySum(*(replace(term, energy_fn=fn) for term, fn in zip(self.terms, fns, strict=True)))


def gaussian_likelihood(candidate: Tensor, *context: Tensor) -> Tensor:
    """precision / 2 * |y - x|^2 of each sample, (B,): -log p(x | y) for x = y + Gaussian noise of variance 1 / precision.

    `context` is the observation (B, ...), as the candidate, and the precision (B,).
    """
    observation, precision = context
    wide = torch.promote_types(candidate.dtype, torch.float32)  # a sum of squares is not for bfloat16
    return 0.5 * precision * (candidate - observation).square().flatten(1).sum(1, dtype=wide)


def with_likelihood(prior: EnergyFunction, num_context: int = 0) -> EnergySum:
    """Return the sum of a prior, with `num_context` context tensors, and a Gaussian likelihood (see likelihood_context)."""
    return EnergySum(Term(energy_fn=prior, num_context=num_context), Term(energy_fn=gaussian_likelihood, num_context=2))


def likelihood_context(observation: Tensor, weight: Tensor | float, step_size: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the context for with_likelihood: the observation (B, ...) and the precision weight / step_size, (B,).

    `weight`, a number or (B,), is the fraction of the way back to the observation in one step of `step_size`: the gradient of
    weight / (2 step_size) |y - x|^2, times the step size, is weight (y - x). The result does not depend on the step size.
    """
    precision = torch.as_tensor(weight, dtype=observation.dtype, device=observation.device) / step_size
    return observation, precision.expand(len(observation))


AUTO_LIKELIHOOD_WEIGHT = 0.05
"""likelihood_weight="auto" for an observation whose energy equals the gain of a first step at the noise of training."""
MAX_LIKELIHOOD_WEIGHT = 0.5


def auto_likelihood_weight(energy: Tensor, training_gain: float) -> Tensor:
    """Return the weight of the likelihood for observations of this energy, (B,): 0.05 * training_gain / energy, at most 0.5.

    The energy of an observation grows with the variance of its noise, so this is the precision of Gaussian noise up to a
    constant. The constant was chosen on training images: docs/results/step_rules.md. Both arguments have the same unit, sums or
    means over patches.
    """
    check(training_gain > 0, "training_gain", training_gain, "use the model's: see eval/training_gain.py")
    weight = AUTO_LIKELIHOOD_WEIGHT * training_gain / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    return weight.clamp(max=MAX_LIKELIHOOD_WEIGHT)
