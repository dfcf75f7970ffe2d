"""Self-verification: think from several starts and keep the candidate of lowest energy (Gladstone et al. 2025, sec. 3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_vision.core.energy_functions import EnergyFunction, SteppedEnergy
from ebt_vision.core.rng import Generators
from ebt_vision.core.thinking import Projection, think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.core.thinking_results import Callback, ThinkingResult


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfResult:
    """The result of self-verification: the candidate of lowest energy among N, and all candidates."""

    final: Tensor
    """The candidate of lowest energy of each element, (B, ...)."""
    energies: Tensor
    """Final energy of every candidate, (N, *E)."""
    chosen: Tensor
    """Index of the winning candidate, int64, shape E."""
    results: tuple[ThinkingResult, ...]
    """The thinking result of each of the N candidates, without trajectories."""

    @property
    def candidates(self) -> Tensor:
        """Every candidate, (N, B, ...)."""
        return torch.stack([result.final for result in self.results])

    @property
    def num_forward(self) -> Tensor:
        """Energy evaluations over all candidates, int64 (B,)."""
        return torch.stack([result.num_forward for result in self.results]).sum(0)


def best_of(
    energy_fn: EnergyFunction | SteppedEnergy,
    starts: Tensor | Iterator[Tensor] | Sequence[Tensor],
    config: ThinkingConfig | None = None,
    *,
    context: tuple[Tensor, ...] = (),
    step_size: Tensor | float | None = None,
    observation_energy: Tensor | None = None,
    project: Projection | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> BestOfResult:
    """Think from each of N starts, each (B, ...), one after another, and keep the candidate of lowest energy per element.

    All candidates draw from the same generator in turn, so Langevin noise and random step sizes differ between them. With equal
    energies the earlier candidate wins. Raises ValueError without a start, and the errors of think().
    """
    results = tuple(
        think(
            energy_fn,
            start,
            config,
            context=context,
            step_size=step_size,
            observation_energy=observation_energy,
            project=project,
            generator=generator,
            callback=callback,
            keep_predictions=False,
        )
        for start in starts
    )
    if not results:
        raise ValueError("best_of needs at least one start")
    energies = torch.stack([result.energies[-1] for result in results])  # (N, *E)
    finals = torch.stack([result.final for result in results])  # (N, B, ...)
    chosen = energies.argmin(0)
    index = chosen.reshape(1, *chosen.shape, *[1] * (finals.ndim - 1 - chosen.ndim)).expand(1, *finals.shape[1:])
    return BestOfResult(final=finals.gather(0, index)[0], energies=energies, chosen=chosen, results=results)
