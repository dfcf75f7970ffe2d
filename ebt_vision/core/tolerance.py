"""The stopping rules of ThinkingConfig.tolerance_of: which samples continue, from their energies so far."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ebt_vision.core.thinking_config import ThinkingConfig


def continues(config: ThinkingConfig, energies: Sequence[Tensor], observation_energy: Tensor | None) -> Tensor:
    """Return whether each sample continues, bool (B,).

    `energies` are those before the first and after every update so far, each (B,) or (B, S). `observation_energy` (B,) is for
    tolerance_of="observation" and defaults to the energy before the first update. A sample whose energy rose never continues.
    """
    assert config.tolerance is not None
    step = len(energies) - 1
    moving = torch.ones(len(energies[0]), dtype=torch.bool, device=energies[0].device)
    if step >= 1:
        last = gain(energies, step)
        moving = last >= 0 if config.tolerance_of == "observation" else last > config.tolerance * _reference(config, energies)
    if config.tolerance_of == "observation":
        observed = _total(energies[0]) if observation_energy is None else observation_energy
        moving = moving & (_total(energies[step]) > config.tolerance * observed)
    return moving


def gain(energies: Sequence[Tensor], step: int) -> Tensor:
    """Return the gain of update `step` (1, 2, ...): the decrease of the energy of each sample, (B,)."""
    return _total(energies[step - 1]) - _total(energies[step])


def _total(energy: Tensor) -> Tensor:
    """Sum the energies of the elements of each sample: (B,) or (B, S) -> (B,)."""
    return energy.reshape(len(energy), -1).sum(1)


def _reference(config: ThinkingConfig, energies: Sequence[Tensor]) -> Tensor:
    """Return the gain that the tolerance is relative to, after the last update, (B,)."""
    step = len(energies) - 1
    reference = gain(energies, max(1, step - 1) if config.tolerance_of == "previous" else 1).clamp(min=0)
    if config.tolerance_of == "training":
        assert config.training_gain is not None  # checked by ThinkingConfig
        return config.training_gain**2 / reference.clamp(min=torch.finfo(reference.dtype).tiny)
    return reference
