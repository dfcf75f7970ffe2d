"""Validation on images during training: PSNR at 1..N steps and a grid of samples, always with the same images and noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from ebt_vision.core import metrics
from ebt_vision.core.rng import sample_generators
from ebt_vision.models.registry import objective_class
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise import processes
from ebt_vision.objectives.image import EBTObjective, ImageObjective, ObjectiveConfig
from ebt_vision.training.config import ExperimentConfig
from ebt_vision.training.settings import ValidationConfig
from ebt_vision.training.task import VALIDATION_STREAM

_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageValidation:
    """For each noise strength: mean per-image PSNR (dB) of the noisy images and after each step, energies, an image grid."""

    unit: Literal["level", "sigma"]
    """Unit of the strengths: levels of the VP process, or standard deviations of AWGN in 0..255 units."""
    psnr: dict[float, list[float]]
    """Strength -> [noisy, 1 step, 2 steps, ...]."""
    energies: dict[float, list[float]]
    """Strength -> mean energy before the first and after every step; empty for models without an energy."""
    grid: Tensor
    """(num_rows, C, H, W) in [0, 1]: for each of the first images noisy, every step, clean, at the first strength."""
    grid_columns: int

    def record(self) -> dict[str, Any]:
        return {"validation_psnr": self.psnr, "validation_energy": self.energies}

    def scalars(self) -> dict[str, float]:
        return {
            f"psnr_{self.unit}_{strength}/steps_{steps}": value
            for strength, values in self.psnr.items()
            for steps, value in enumerate(values)
        }

    def lines(self) -> list[str]:
        return [
            f"  {self.unit} {strength:g}: noisy {values[0]:.2f} dB, then " + " ".join(f"{v:.2f}" for v in values[1:])
            for strength, values in self.psnr.items()
        ]

    def save_sample(self, folder: Path, step: int) -> None:
        """Write the grid as STEP.png."""
        save_image(self.grid, folder / f"{step:08d}.png", nrow=self.grid_columns)


@torch.no_grad()
def validate_images(model: nn.Module, clean: Tensor, config: ExperimentConfig, device: torch.device | str) -> ImageValidation:
    """Denoise held-out images (B, C, H, W) in [-1, 1] at every strength; predictions are clamped, as in the paper."""
    settings = config.validation
    objective = objective_class(config.model_type)
    assert isinstance(settings, ValidationConfig) and issubclass(objective, ImageObjective)
    thinking: dict[str, Any] = {}
    if issubclass(objective, EBTObjective):  # think as in training
        assert isinstance(config.objective, ObjectiveConfig)
        thinking["likelihood_weight"] = config.objective.likelihood_weight
    vp = noise_process_of(model) == "vp"
    strengths = settings.levels if vp else settings.sigmas
    was_training = model.training
    model.eval()
    psnr: dict[float, list[float]] = {}
    energies: dict[float, list[float]] = {}
    rows: list[Tensor] = []
    for strength in strengths:
        sums: list[Tensor] = []
        energy_sums: list[Tensor] = []
        for start in range(0, len(clean), _BATCH_SIZE):
            part = clean[start : start + _BATCH_SIZE]
            generators = sample_generators(config.seed, range(start, start + len(part)), VALIDATION_STREAM)
            if vp:
                noisy = processes.add_vp_noise(part, strength, generators)
            else:
                noisy = processes.add_gaussian_noise(part, 2.0 * strength, generators)  # [-1, 1] is twice as wide as [0, 1]
            level = strength if vp else None
            prediction = objective.predict(model, noisy.to(device), level, settings.num_steps, **thinking)
            images = [noisy, *(image.cpu().clamp(-1.0, 1.0) for image in prediction.images)]
            sums.append(torch.stack([metrics.psnr(image, part, data_range=2.0).sum() for image in images]))
            if prediction.energies is not None:
                energy_sums.append(prediction.energies.cpu().double().sum(1))
            if strength == strengths[0] and start == 0:
                rows = [*images, part]
        psnr[strength] = (torch.stack(sums).sum(0) / len(clean)).tolist()
        energies[strength] = (torch.stack(energy_sums).sum(0) / len(clean)).tolist() if energy_sums else []
    model.train(was_training)
    columns = torch.stack([row[: settings.num_grid_images] for row in rows], dim=1)  # (images, columns, C, H, W)
    grid = processes.to_image_range(columns.flatten(0, 1)).clamp(0.0, 1.0)
    return ImageValidation(unit="level" if vp else "sigma", psnr=psnr, energies=energies, grid=grid, grid_columns=len(rows))
