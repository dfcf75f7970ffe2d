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

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise ValueError(f"replay.capacity={self.capacity} is negative; use 0 to turn the buffer off")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"replay.share={self.share} is not in [0, 1]")
        if self.max_age < 1:
            raise ValueError(f"replay.max_age={self.max_age} must be 1 or more")


class ReplayBuffer:
    """A ring of rows; a row is one entry of each named tensor, and its age in training steps."""

    def __init__(self, config: ReplayConfig):
        self.config = config
        self.rows: dict[str, Tensor] = {}
        self.ages = torch.zeros(0, dtype=torch.int64)
        self._next = 0

    def __len__(self) -> int:
        return len(self.ages)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """(rows, ages) of at most share * batch_size different rows; empty while there is nothing."""
        wanted = min(int(self.config.share * batch_size), len(self))
        index = torch.randperm(len(self), generator=generator)[:wanted]
        return {name: rows[index.to(rows.device)] for name, rows in self.rows.items()}, self.ages[index]

    def add(self, rows: dict[str, Tensor], ages: Tensor) -> None:
        """Keep rows (B, ...) whose age (B,) is below max_age, over the oldest entries once the ring is full."""
        keep = ages < self.config.max_age
        count = min(int(keep.sum()), self.config.capacity)
        if count == 0:
            return
        values = {name: tensor.detach()[keep.to(tensor.device)][:count] for name, tensor in rows.items()}
        ages = ages[keep][:count]
        room = min(self.config.capacity - len(self), count)
        if room:  # grow until the ring is full
            self.rows = {n: torch.cat([self.rows[n], v[:room]]) if self.rows else v[:room].clone() for n, v in values.items()}
            self.ages = torch.cat([self.ages, ages[:room]])
        for i in range(room, count):
            for name, value in values.items():
                self.rows[name][self._next] = value[i]
            self.ages[self._next] = ages[i]
            self._next = (self._next + 1) % self.config.capacity

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {"ages": self.ages, "next": torch.tensor(self._next), **{f"rows.{n}": r for n, r in self.rows.items()}}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        """What state_dict gave."""
        self.ages, self._next = state["ages"], int(state["next"])
        self.rows = {n.removeprefix("rows."): t.to(device) for n, t in state.items() if n.startswith("rows.")}
