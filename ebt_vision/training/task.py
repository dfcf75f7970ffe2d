"""What the training loop asks of a modality: its samples, its batches and how it is validated."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ebt_vision.core.rng import make_generator
from ebt_vision.training.config import ExperimentConfig

# Streams of make_generator, so that no two uses of the seed draw the same numbers; the loop has 2 and 3.
NOISE_STREAM = 1
VALIDATION_STREAM = 9


class Samples(Protocol):
    """A fixed list of training samples, visited by index."""

    def __len__(self) -> int: ...

    def report(self) -> str:
        """One line for people."""


class ValidationResult(Protocol):
    """What a validation found, as a Reporter writes it."""

    def record(self) -> dict[str, Any]:
        """Plain data for the log."""

    def scalars(self) -> dict[str, float]:
        """Curves for TensorBoard."""

    def lines(self) -> list[str]:
        """Lines for the person who watches."""

    def save_sample(self, folder: Path, step: int) -> None:
        """Write something to look at, if there is any, under the name of the update."""


class Task(ABC):
    """One modality's part of a run; `config.data` and `config.validation` are of its kind."""

    def __init__(self, config: ExperimentConfig):
        self.config = config

    @abstractmethod
    def load_samples(self) -> Any:
        """The training samples; DataError where there are none."""

    @abstractmethod
    def make_batch(self, samples: Any, indices: Sequence[int], epochs: Sequence[int], device: torch.device) -> Any:
        """The batch of samples `indices`, each as drawn for its epoch from (seed, epoch, index) alone, on the device."""

    @abstractmethod
    def load_held_out(self) -> Any | None:
        """What validate() measures on; None where the config names none."""

    @abstractmethod
    def validate(self, model: nn.Module, held_out: Any, device: torch.device) -> ValidationResult:
        """Measure the model, always on the same samples and draws; it is left in the mode it was in."""

    def generators(self, indices: Sequence[int], epochs: Sequence[int]) -> list[torch.Generator]:
        """One for each training sample, for every draw it needs."""
        return [make_generator(self.config.seed, NOISE_STREAM, e, i) for e, i in zip(epochs, indices, strict=True)]
