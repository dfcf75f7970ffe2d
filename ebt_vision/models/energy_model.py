"""The energy contract that every energy-based model of the project keeps, whatever its modality."""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ebt_vision.models.pretrained_model import PretrainedModel

MIN_STEP_SIZE = 1e-4


class EnergyModel(PretrainedModel):
    """E(candidate, *context) -> one energy per element, lower is better, and the step size learned with it.

    Images (B, C, H, W) give (B,), text (B, S, V) gives (B, S). The energy of an image is the **sum** over its patches, so
    that a patch's gradient, and with it the right step size, does not depend on the image's size. No element's energy
    depends on another element of the batch.
    """

    usage_fields: ClassVar[tuple[str, ...]] = ("init_step_size",)  # the step size that was learned lies with the weights

    def __init__(self, init_step_size: float):
        super().__init__()
        if init_step_size < MIN_STEP_SIZE:
            raise ValueError(f"init_step_size={init_step_size} is below {MIN_STEP_SIZE}")
        self.log_step_size = nn.Parameter(torch.tensor(math.log(init_step_size)))

    @property
    def step_size(self) -> Tensor:
        """The learned step size (the paper's alpha), a positive tensor () that carries a gradient.

        Stored as its logarithm, so that the learning rate is relative to it: the paper's code reaches the same with a
        learning rate of three times alpha and a clamp at 1e-4.
        """
        return self.log_step_size.exp().clamp(min=MIN_STEP_SIZE)

    @abstractmethod
    def forward(self, candidate: Tensor, *context: Tensor) -> Tensor:
        """Energies of the candidates, float32 or wider."""


def check_energies(energies: Tensor, expected_shape: tuple[int, ...]) -> Tensor:
    """The energies themselves if they keep the contract's shape, (B,) or (B, S); ValueError says which one is wanted."""
    if tuple(energies.shape) != expected_shape:
        raise ValueError(f"an energy of shape {expected_shape} is wanted, got {tuple(energies.shape)}")
    return energies
