"""Equilibrium Matching (Wang & Du 2025, arXiv 2510.02300): the field between the noisiest and the clean image is regressed."""

import torch
from torch import Tensor, nn

from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.equilibrium import EquilibriumEnergy, PatchEqM
from ebt_vision.objectives.image import ImageBatch, ImageObjective, Prediction

DECAY_START = 0.8
"""Where the target's magnitude starts to fall (the paper's a, its best value)."""


def magnitude(gamma: Tensor) -> Tensor:
    """c(gamma) of the paper's truncated decay, for gamma (B,) in [0, 1]: 1 up to DECAY_START, then linear to 0 at 1."""
    return ((1.0 - gamma) / (1.0 - DECAY_START)).clamp(max=1.0)


class EqMObjective(ImageObjective):
    """Match f(y) with c(gamma) * (x_noisy - x_clean) at y = gamma * x_clean + (1 - gamma) * x_noisy, gamma uniform in [0, 1].

    The paper's x_noisy is pure noise, because it generates images. Here it is the training's noisiest observation.
    """

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        observation = self.observe(batch)
        draws = [torch.rand((), generator=g, device=g.device) for g in batch.generators]
        gamma = torch.stack(draws).to(batch.clean)  # (B,)
        mix = gamma[:, None, None, None]
        target = magnitude(gamma)[:, None, None, None] * (observation - batch.clean)
        field = self.model(mix * batch.clean + (1.0 - mix) * observation)
        return {"loss": (field - target).square().flatten(1).mean(1).mean()}

    @staticmethod
    def predict(model: nn.Module, noisy: Tensor, level: float | None, num_steps: int) -> Prediction:
        """num_steps images (B, C, H, W), one after each step of the descent from `noisy` (B, C, H, W)."""
        assert isinstance(model, PatchEqM)
        result = think(EquilibriumEnergy(model), noisy, ThinkingConfig(num_steps=num_steps), step_size=model.config.step_size)
        return Prediction(images=list(result.predictions), energies=result.energies)
