"""A replay buffer of thinking trajectories (Du & Mordatch 2019, sec. 3.2; Gladstone et al. 2025, System 2 training).

It keeps where training steps ended, so that later steps think on from there: the model sees the candidates that many
thinking steps produce at the cost of one step. It knows rows of tensors and no modality.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """How much of a batch is thought on from earlier candidates."""

    capacity: int = 0
    """Rows kept by each process; 0 turns the buffer off."""
    share: float = 0.5
    """Largest share of a batch that continues old trajectories, in [0, 1]."""
    max_age: int = 8
    """A trajectory is dropped after so many training steps."""
    start: int = 0
    """The first update that replays: a young model's steps overshoot, and repeated they drive candidates out of all range."""
    partial_moves: float = 0.0
    """Share of the candidates, in [0, 1], that are kept only part of the way from where they started to where the step led, a
    uniform share of it: an energy then meets half-finished candidates that have kept what the image has of texture."""
    renoise_std: float = 0.0
    """Half of the replayed candidates get Gaussian noise of a standard deviation uniform in [0, renoise_std], on [-1, 1]: an
    energy that meets half-finished candidates only where its own steps leave them takes every other one for finished."""
    renoise_max_age: int | None = None
    """The last age at which they do; 1 noises half of the trajectories, once, and leaves the other half as they are, to
    teach the energy when a candidate is finished. None: every age."""
    renoise_start: int = 0
    """The first update that adds it."""

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise ValueError(f"replay.capacity={self.capacity} is negative; use 0 to turn the buffer off")
        for name in ("share", "partial_moves"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"replay.{name}={getattr(self, name)} is not in [0, 1]")
        for name in ("renoise_std", "renoise_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"replay.{name}={getattr(self, name)} is negative; use 0 or more")
        if self.start < 0:
            raise ValueError(f"replay.start={self.start} is negative; use 0 to replay from the first update")
        for name in ("max_age", "renoise_max_age"):
            if (age := getattr(self, name)) is not None and age < 1:
                raise ValueError(f"replay.{name}={age} must be 1 or more")


class ReplayBuffer:
    """Trajectories under way; a row is one entry of each named tensor, and its age in training steps.

    Rows that are sampled leave the buffer, and come back one step older until they reach max_age; only the room they
    leave takes new ones. So every age from 1 to max_age - 1 is equally common, however small the share of new rows.
    """

    def __init__(self, config: ReplayConfig):
        self.config = config
        self.rows: dict[str, Tensor] = {}
        self.ages = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ages)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Take out (rows, ages) of at most share * batch_size random rows; empty while there is nothing."""
        wanted = min(int(self.config.share * batch_size), len(self))
        order = torch.randperm(len(self), generator=generator)
        taken, kept = order[:wanted], order[wanted:].sort().values
        rows = {name: values[taken.to(values.device)] for name, values in self.rows.items()}
        ages = self.ages[taken]
        self.rows = {name: values[kept.to(values.device)] for name, values in self.rows.items()}
        self.ages = self.ages[kept]
        return rows, ages

    def add(self, rows: dict[str, Tensor], ages: Tensor) -> None:
        """Keep rows (B, ...) whose age (B,) is below max_age, the oldest first, as far as there is room."""
        oldest_first = ages.argsort(descending=True, stable=True)
        chosen = oldest_first[ages[oldest_first] < self.config.max_age][: self.config.capacity - len(self)]
        new = {name: values.detach()[chosen.to(values.device)] for name, values in rows.items()}
        self.rows = {name: torch.cat([self.rows[name], v]) if self.rows else v for name, v in new.items()}
        self.ages = torch.cat([self.ages, ages[chosen]])

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {"ages": self.ages, **{f"rows.{name}": values for name, values in self.rows.items()}}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        """What state_dict gave."""
        self.ages = state["ages"]
        self.rows = {n.removeprefix("rows."): t.to(device) for n, t in state.items() if n.startswith("rows.")}
