"""The interface between the training loop and a modality: samples, batches and validation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ebt_vision.core.rng import make_generator
from ebt_vision.training.config import ExperimentConfig

# Streams of make_generator, so that no two uses of the seed draw the same numbers; the loop uses 2 and 3.
NOISE_STREAM = 1
VALIDATION_STREAM = 9


class Samples(Protocol):
    """A fixed list of training samples, visited by index."""

    def __len__(self) -> int: ...

    def report(self) -> str:
        """Describe the samples in one line."""


class ValidationResult(Protocol):
    """The result of a validation, for a Reporter."""

    def record(self) -> dict[str, Any]:
        """Return plain data for the log."""

    def scalars(self) -> dict[str, float]:
        """Curves for TensorBoard."""

    def lines(self) -> list[str]:
        """Return lines for the user."""

    def save_sample(self, folder: Path, step: int) -> None:
        """Write a sample, if there is any, under the number of the update."""


class Task(ABC):
    """The part of a run that depends on the modality; `config.data` and `config.validation` are of its kind."""

    def __init__(self, config: ExperimentConfig):
        self.config = config

    @abstractmethod
    def load_samples(self) -> Any:
        """Return the training samples. Raises DataError if there are none."""

    @abstractmethod
    def make_batch(self, samples: Any, indices: Sequence[int], epochs: Sequence[int], device: torch.device) -> Any:
        """Return the batch of samples `indices` on the device; each depends only on (seed, epoch, index)."""

    @abstractmethod
    def load_held_out(self) -> Any | None:
        """Return the samples for validate(); None if the config names none."""

    @abstractmethod
    def validate(self, model: nn.Module, held_out: Any, device: torch.device) -> ValidationResult:
        """Measure the model, always on the same samples and draws. The mode of the model does not change."""

    def generators(self, indices: Sequence[int], epochs: Sequence[int]) -> list[torch.Generator]:
        """Return a generator for each training sample, for all its draws."""
        return [make_generator(self.config.seed, NOISE_STREAM, e, i) for e, i in zip(epochs, indices, strict=True)]
