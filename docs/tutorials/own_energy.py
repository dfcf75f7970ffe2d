"""Think with your own energy: python docs/tutorials/own_energy.py"""

import torch

from ebt_vision import ThinkingConfig, think
from ebt_vision.core import metrics
from ebt_vision.noise import processes


def energy(candidate: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Return smooth total variation plus the squared distance to the noisy image, (B,)."""
    down = candidate[..., 1:, :-1] - candidate[..., :-1, :-1]
    right = candidate[..., :-1, 1:] - candidate[..., :-1, :-1]
    variation = (down.square() + right.square() + 1e-3).sqrt().sum((1, 2, 3))
    return 0.2 * variation + 0.5 * (candidate - noisy).square().sum((1, 2, 3))


clean = torch.zeros(1, 3, 32, 32)
clean[..., 8:24, 8:24] = 1.0
noisy = processes.add_gaussian_noise(clean, 50, torch.Generator().manual_seed(0))
config = ThinkingConfig(num_steps=100, step_size=0.05, tolerance=1e-3)
result = think(energy, noisy, config, context=(noisy,))
for step in (1, 5, 20, int(result.num_steps)):
    psnr = metrics.psnr(result.predictions[step - 1], clean, data_range=1.0).item()
    print(f"after {step} steps: energy {result.energies[step].item():.2f}, PSNR {psnr:.2f} dB")
