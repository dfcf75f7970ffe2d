"""The energy contract of every energy-based model, for all modalities."""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ebt_vision.models.pretrained_model import PretrainedModel

MIN_STEP_SIZE = 1e-4


class EnergyModel(PretrainedModel):
    """E(candidate, *context) -> one energy per element (lower is better), with a learned step size.

    Images (B, C, H, W) give (B,), text (B, S, V) gives (B, S). The energy of an image is the **sum** over its patches, so that
    the gradient of a patch, and with it the best step size, does not depend on the size of the image. The energy of an element
    does not depend on other elements of the batch.
    """

    usage_fields: ClassVar[tuple[str, ...]] = ("init_step_size",)  # the learned step size is stored with the weights

    def __init__(self, init_step_size: float):
        super().__init__()
        if init_step_size < MIN_STEP_SIZE:
            raise ValueError(f"init_step_size={init_step_size} is below {MIN_STEP_SIZE}")
        self.log_step_size = nn.Parameter(torch.tensor(math.log(init_step_size)))

    @property
    def step_size(self) -> Tensor:
        """The learned step size (the paper's alpha), a positive tensor () with a gradient.

        It is stored as its logarithm, so that the learning rate is relative. The paper's code has the same effect with a
        learning rate of three times alpha and a clamp at 1e-4.
        """
        return self.log_step_size.exp().clamp(min=MIN_STEP_SIZE)

    @abstractmethod
    def forward(self, candidate: Tensor, *context: Tensor) -> Tensor:
        """Return the energies of the candidates, float32 or wider."""


def check_energies(energies: Tensor, expected_shape: tuple[int, ...]) -> Tensor:
    """Return the energies if their shape fits the contract, (B,) or (B, S); otherwise raise ValueError with the right shape."""
    if tuple(energies.shape) != expected_shape:
        raise ValueError(f"expected an energy of shape {expected_shape}, got {tuple(energies.shape)}")
    return energies
