"""Scores from every kind of network for how unlikely an image or a patch is. A higher score means less likely.

    EBT            its energy E(y), a map over patches
    regressor, EqM |y - N(y)|^2 / 2 a patch: how much the network would change
    DiT            its error at one timestep: the mean squared error of the noise that it predicts (no map)

Scores are means over patches, so the scores of images of different sizes can be compared.
"""

from typing import cast

import torch
from torch import Tensor

from ebt_vision.benchmark.statistics import auroc_of
from ebt_vision.core.rng import randn_like, sample_generators
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.network import ModelDenoiser, signal_scale_of
from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.equilibrium import PatchEqM
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.patches import patchify
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.noise.processes import to_model_range

NOISE_DRAWS = 4
"""Number of noise draws over which the error of a DiT is averaged."""
_BATCH_SIZE = 100


class Scorer:
    """Scores images (B, 3, H, W) in [0, 1], H and W multiples of the patch size, by one network.

    A network of the VP process gets the image times the signal scale of its training, like a photograph. The DiT gets
    `timestep`, in 0..999, and its noise for an image does not depend on the other images. Raises ValueError for a denoiser
    without a network.
    """

    def __init__(self, denoiser: ModelDenoiser, *, timestep: int = 50, seed: int = 0):
        if not isinstance(denoiser, ModelDenoiser):
            raise ValueError(f"{getattr(denoiser, 'name', denoiser)} has no network; score with an EBT, a regressor or a DiT")
        self.denoiser, self.timestep, self.seed = denoiser, timestep, seed
        self.has_map = not isinstance(denoiser, DiTDenoiser)

    @torch.no_grad()
    def score(self, images: Tensor) -> Tensor:
        """Scores (B,), float64, on the CPU."""
        parts = []
        for start in range(0, len(images), _BATCH_SIZE):
            part = images[start : start + _BATCH_SIZE]
            parts.append(self._map(part).flatten(1).mean(1) if self.has_map else self._dit_error(part, start))
        return torch.cat(parts).double().cpu()

    @torch.no_grad()
    def score_map(self, images: Tensor) -> Tensor:
        """Return the patch scores, (B, H / patch_size, W / patch_size), float64, on the CPU. Raises ValueError for a DiT."""
        if not self.has_map:
            raise ValueError(f"{self.denoiser.name} has no map of scores; use an EBT, a regressor or an EqM")
        parts = [self._map(images[start : start + _BATCH_SIZE]) for start in range(0, len(images), _BATCH_SIZE)]
        return torch.cat(parts).double().cpu()

    def _map(self, images: Tensor) -> Tensor:
        model = self.denoiser.model
        y = to_model_range(self.denoiser.to_network(images)) * signal_scale_of(model)
        if isinstance(model, PatchEBT):
            return model.energy_map(y, *model.context_of(y))
        change = model(y) if isinstance(model, PatchEqM) else y - cast(PatchRegressor, model)(y)
        grid = tuple(side // self.denoiser.patch_size for side in images.shape[-2:])
        return 0.5 * patchify(change, self.denoiser.patch_size).square().sum(-1).unflatten(1, grid)

    def _dit_error(self, images: Tensor, first: int) -> Tensor:
        model = cast(Diffusion, self.denoiser.model)
        clean = to_model_range(self.denoiser.to_network(images))
        timesteps = torch.full((len(images),), self.timestep, dtype=torch.int64, device=clean.device)
        total = torch.zeros(len(images), device=clean.device)
        for draw in range(NOISE_DRAWS):
            generators = sample_generators(self.seed, range(first, first + len(images)), draw)
            noise = randn_like(clean, generators)
            total += model.noise_error(clean, noise, timesteps)
        return total / NOISE_DRAWS


def detection_auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the probability that an image of `outside` (M,) scores higher than one of `inside` (N,); ties count half.

    Mann & Whitney 1947; 0.5 is chance, 1 is perfect separation.
    """
    positive = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]) > 0
    return float(auroc_of(torch.cat([inside, outside]).numpy(), positive.numpy()))
