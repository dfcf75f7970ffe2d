"""deepinv's plug-and-play restoration with any of our denoisers and linear likelihoods.

It needs deepinv: pip install "ebt_vision[deepinv]". Nothing is downloaded.
"""

import torch
from torch import Tensor

from ebt_vision.denoising.base import Denoiser
from ebt_vision.interop.deepinv import import_deepinv
from ebt_vision.restoration.likelihoods import LinearLikelihood
from ebt_vision.restoration.solvers import LEAST_NOISE

ITERATIONS = 8
"""Iterations of DPIR in deepinv."""


def dpir(observed: Tensor, likelihood: LinearLikelihood, denoiser: Denoiser, *, noise: float) -> tuple[Tensor, int]:
    """Restore (1, 3, h, w) in [0, 1] by deepinv.optim.DPIR (Zhang et al. 2021) with its own schedule.

    Returns the image (1, 3, H, W) and the number of iterations; each of them denoises the whole image once. `noise` is the
    standard deviation of the observation's noise in 0..255 units; DPIR assumes 0.255 or more. The first image is that of the
    likelihood, as for our own solvers. Raises MissingExtraError without deepinv, ValueError for a damage that is not linear.
    """
    import_deepinv()
    import deepinv

    from ebt_vision.interop.deepinv_denoiser import DeepinvDenoiser

    if not isinstance(likelihood, LinearLikelihood):
        raise ValueError(f"DPIR needs a linear damage, not {type(likelihood).__name__}")
    physics = deepinv.physics.LinearPhysics(A=likelihood.apply, A_adjoint=likelihood.adjoint)
    model = deepinv.optim.DPIR(sigma=max(noise, LEAST_NOISE) / 255.0, denoiser=DeepinvDenoiser(denoiser))
    with torch.no_grad():
        image: Tensor = model(observed, physics, init=likelihood.start(observed))
    return likelihood.finish(image, observed).clamp(0, 1), ITERATIONS
