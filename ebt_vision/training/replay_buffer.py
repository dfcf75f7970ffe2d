"""A replay buffer of thinking trajectories (Du & Mordatch 2019, sec. 3.2; Gladstone et al. 2025, System 2 training).

It stores the candidates at the end of training steps, and later steps continue thinking from them. The model then sees the
candidates of many thinking steps at the cost of one step. The buffer stores rows of tensors, independent of the modality.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Settings of the replay buffer: how much of a batch continues from earlier candidates."""

    capacity: int = 0
    """Rows kept by each process; 0 disables the buffer."""
    share: float = 0.5
    """Maximum fraction of a batch that continues old trajectories, in [0, 1]."""
    max_age: int = 8
    """Number of training steps after which a trajectory is dropped."""
    start: int = 0
    """First update that replays. Steps of an untrained model overshoot, and repeated steps make candidates diverge."""
    partial_moves: float = 0.0
    """Fraction of the candidates, in [0, 1], that are moved only part of the way of their step (uniform in [0, 1)). Such
    half-finished candidates still have the texture of the image, and the energy trains on them."""
    renoise_std: float = 0.0
    """Standard deviation, on [-1, 1]. Half of the replayed candidates get Gaussian noise of a standard deviation uniform in
    [0, renoise_std]. Without it the energy trains only on its own steps and treats other half-finished candidates as clean."""
    renoise_max_age: int | None = None
    """Maximum age of candidates that get noise; None: every age. With 1, half of the trajectories get noise once. The others
    stay without noise and teach the energy when a candidate is already clean."""
    renoise_start: int = 0
    """First update that adds noise to replayed candidates."""

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
    """Unfinished trajectories. A row is one entry of each named tensor, and its age in training steps.

    Sampled rows leave the buffer and return one step older until they reach max_age. New rows fill only the free places. All
    ages from 1 to max_age - 1 are then equally common, however few new rows there are.

    The rows are stored in tensors that are allocated once. `roll_back` undoes all sampling and adding since the last `commit`;
    until the next commit no row of the buffer is overwritten.
    """

    def __init__(self, config: ReplayConfig):
        self.config = config
        self.ages = torch.zeros(0, dtype=torch.int64)
        self._slots = torch.zeros(0, dtype=torch.int64)  # position of each row in the storage, ordered by age
        self._storage: dict[str, Tensor] = {}
        self._num_slots = 0
        self._committed = (self.ages, self._slots)

    def __len__(self) -> int:
        return len(self.ages)

    @property
    def rows(self) -> dict[str, Tensor]:
        """Return a copy of every row, ordered by age."""
        return {name: values[to_device(self._slots, values.device)] for name, values in self._storage.items()}

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Remove and return (rows, ages) of at most share * batch_size random rows; empty if the buffer is empty."""
        wanted = min(int(self.config.share * batch_size), len(self))
        order = torch.randperm(len(self), generator=generator)
        taken, kept = order[:wanted], order[wanted:].sort().values
        slots = self._slots[taken]
        rows = {name: values[to_device(slots, values.device)] for name, values in self._storage.items()}
        ages = self.ages[taken]
        self.ages, self._slots = self.ages[kept], self._slots[kept]
        return rows, ages

    def add(self, rows: dict[str, Tensor], ages: Tensor) -> None:
        """Keep rows (B, ...) whose age (B,) is below max_age, the oldest first, while there is room."""
        oldest_first = ages.argsort(descending=True, stable=True)
        chosen = oldest_first[ages[oldest_first] < self.config.max_age][: self.config.capacity - len(self)]
        slots = self._free_slots(rows, len(chosen))
        for name, values in rows.items():
            storage = self._storage[name]
            kept = values.detach()[to_device(chosen, values.device)]
            storage.index_copy_(0, to_device(slots, storage.device), kept.to(storage))
        self.ages, self._slots = torch.cat([self.ages, ages[chosen]]), torch.cat([self._slots, slots])

    def commit(self) -> None:
        """Make all sampling and adding so far permanent."""
        self._committed = (self.ages, self._slots)

    def roll_back(self) -> None:
        """Undo all sampling and adding since the last commit."""
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
        """Return free positions in the storage, int64 (count,); committed rows are not free. Grow the storage if needed."""
        if not self._storage:
            self._storage = {name: values.detach().new_empty((0, *values.shape[1:])) for name, values in rows.items()}
        is_free = torch.ones(self._num_slots, dtype=torch.bool)
        is_free[self._slots] = False
        is_free[self._committed[1]] = False
        free = is_free.nonzero()[:, 0]
        if (missing := count - len(free)) > 0:  # at the start, and for the uncommitted rows of one update
            size = max(self.config.capacity, self._num_slots + missing)
            for name, values in self._storage.items():
                self._storage[name] = torch.cat([values, values.new_empty((size - len(values), *values.shape[1:]))])
            free = torch.cat([free, torch.arange(self._num_slots, size)])
            self._num_slots = size
        return free[:count]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a CPU tensor, any shape, to the device without waiting for earlier work of a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
