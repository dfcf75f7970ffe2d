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

    The rows lie in tensors that are allocated once. `roll_back` undoes all that was sampled and added since the last
    `commit`: until then no row that was in the buffer is overwritten.
    """

    def __init__(self, config: ReplayConfig):
        self.config = config
        self.ages = torch.zeros(0, dtype=torch.int64)
        self._slots = torch.zeros(0, dtype=torch.int64)  # where each row lies in the storage, in the order of the ages
        self._storage: dict[str, Tensor] = {}
        self._num_slots = 0
        self._committed = (self.ages, self._slots)

    def __len__(self) -> int:
        return len(self.ages)

    @property
    def rows(self) -> dict[str, Tensor]:
        """A copy of every row, in the order of the ages."""
        return {name: values[to_device(self._slots, values.device)] for name, values in self._storage.items()}

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Take out (rows, ages) of at most share * batch_size random rows; empty while there is nothing."""
        wanted = min(int(self.config.share * batch_size), len(self))
        order = torch.randperm(len(self), generator=generator)
        taken, kept = order[:wanted], order[wanted:].sort().values
        slots = self._slots[taken]
        rows = {name: values[to_device(slots, values.device)] for name, values in self._storage.items()}
        ages = self.ages[taken]
        self.ages, self._slots = self.ages[kept], self._slots[kept]
        return rows, ages

    def add(self, rows: dict[str, Tensor], ages: Tensor) -> None:
        """Keep rows (B, ...) whose age (B,) is below max_age, the oldest first, as far as there is room."""
        oldest_first = ages.argsort(descending=True, stable=True)
        chosen = oldest_first[ages[oldest_first] < self.config.max_age][: self.config.capacity - len(self)]
        slots = self._free_slots(rows, len(chosen))
        for name, values in rows.items():
            storage = self._storage[name]
            kept = values.detach()[to_device(chosen, values.device)]
            storage.index_copy_(0, to_device(slots, storage.device), kept.to(storage))
        self.ages, self._slots = torch.cat([self.ages, ages[chosen]]), torch.cat([self._slots, slots])

    def commit(self) -> None:
        """Make final what was sampled and added."""
        self._committed = (self.ages, self._slots)

    def roll_back(self) -> None:
        """Undo what was sampled and added since the last commit."""
        self.ages, self._slots = self._committed

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {"ages": self.ages, **{f"rows.{name}": values for name, values in self.rows.items()}}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        """What state_dict gave."""
        self.ages = state["ages"]
        self._storage = {n.removeprefix("rows."): t.to(device).clone() for n, t in state.items() if n.startswith("rows.")}
        self._num_slots = len(self.ages)
        self._slots = torch.arange(self._num_slots)
        self.commit()

    def _free_slots(self, rows: dict[str, Tensor], count: int) -> Tensor:
        """Places of the storage that neither the rows nor the committed rows use, int64 (count,); it grows if there are few."""
        if not self._storage:
            self._storage = {name: values.detach().new_empty((0, *values.shape[1:])) for name, values in rows.items()}
        is_free = torch.ones(self._num_slots, dtype=torch.bool)
        is_free[self._slots] = False
        is_free[self._committed[1]] = False
        free = is_free.nonzero()[:, 0]
        if (missing := count - len(free)) > 0:  # at first, and once for the rows of one update that wait for their commit
            size = max(self.config.capacity, self._num_slots + missing)
            for name, values in self._storage.items():
                self._storage[name] = torch.cat([values, values.new_empty((size - len(values), *values.shape[1:]))])
            free = torch.cat([free, torch.arange(self._num_slots, size)])
            self._num_slots = size
        return free[:count]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor, any shape, on the device, without waiting for a GPU's earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
