"""Validation on images while training: PSNR at 1..N steps and a grid of samples, always on the same images and noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from ebt_vision import corruption, metrics
from ebt_vision.config import ExperimentConfig
from ebt_vision.objectives import ImageObjective
from ebt_vision.rng import sample_generators
from ebt_vision.training.build import OBJECTIVES
from ebt_vision.training.settings import ValidationConfig
from ebt_vision.training.task import VALIDATION_STREAM

_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageValidation:
    """Per level: the mean per-image PSNR of the noisy images and after each step (dB), energies, and a picture."""

    psnr: dict[float, list[float]]
    """Level -> [noisy, 1 step, 2 steps, ...]."""
    energies: dict[float, list[float]]
    """Level -> mean energy before the first and after every step; empty for models without an energy."""
    grid: Tensor
    """(num_rows, C, H, W) in [0, 1]: for each of the first images noisy, every step, clean, at the first level."""
    grid_columns: int

    def record(self) -> dict[str, Any]:
        return {"validation_psnr": self.psnr, "validation_energy": self.energies}

    def scalars(self) -> dict[str, float]:
        return {
            f"psnr_level_{level}/steps_{steps}": value
            for level, values in self.psnr.items()
            for steps, value in enumerate(values)
        }

    def lines(self) -> list[str]:
        return [
            f"  level {level}: noisy {values[0]:.2f} dB, then " + " ".join(f"{v:.2f}" for v in values[1:])
            for level, values in self.psnr.items()
        ]

    def save_sample(self, folder: Path, step: int) -> None:
        """The grid as STEP.png."""
        save_image(self.grid, folder / f"{step:08d}.png", nrow=self.grid_columns)


@torch.no_grad()
def validate_images(model: nn.Module, clean: Tensor, config: ExperimentConfig, device: torch.device | str) -> ImageValidation:
    """Denoise held-out images (B, C, H, W) in [-1, 1] at every level; predictions are clamped, as in the paper."""
    settings = config.validation
    objective = OBJECTIVES[config.model_type]
    assert isinstance(settings, ValidationConfig) and issubclass(objective, ImageObjective)
    was_training = model.training
    model.eval()
    psnr: dict[float, list[float]] = {}
    energies: dict[float, list[float]] = {}
    rows: list[Tensor] = []
    for level in settings.levels:
        sums: list[Tensor] = []
        energy_sums: list[Tensor] = []
        for start in range(0, len(clean), _BATCH_SIZE):
            part = clean[start : start + _BATCH_SIZE]
            generators = sample_generators(config.seed, range(start, start + len(part)), VALIDATION_STREAM)
            noisy = corruption.add_vp_noise(part, level, generators)
            prediction = objective.predict(model, noisy.to(device), level, settings.num_steps)
            images = [noisy, *(image.cpu().clamp(-1.0, 1.0) for image in prediction.images)]
            sums.append(torch.stack([metrics.psnr(image, part, data_range=2.0).sum() for image in images]))
            if prediction.energies is not None:
                energy_sums.append(prediction.energies.double().cpu().sum(1))
            if level == settings.levels[0] and start == 0:
                rows = [*images, part]
        psnr[level] = (torch.stack(sums).sum(0) / len(clean)).tolist()
        energies[level] = (torch.stack(energy_sums).sum(0) / len(clean)).tolist() if energy_sums else []
    model.train(was_training)
    columns = torch.stack([row[: settings.num_grid_images] for row in rows], dim=1)  # (images, columns, C, H, W)
    grid = corruption.to_image_range(columns.flatten(0, 1)).clamp(0.0, 1.0)
    return ImageValidation(psnr=psnr, energies=energies, grid=grid, grid_columns=len(rows))
