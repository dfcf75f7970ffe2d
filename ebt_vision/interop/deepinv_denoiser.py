"""A Denoiser as a denoiser of deepinv, for its plug-and-play algorithms, physics and trainers.

    from ebt_vision import load_denoiser
    from ebt_vision.interop.deepinv_denoiser import DeepinvDenoiser

    prior = deepinv.optim.PnP(DeepinvDenoiser(load_denoiser("photographs_ebt")))

Importing this file needs deepinv: pip install "ebt_vision[deepinv]".
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import join_results
from ebt_vision.interop.deepinv import import_deepinv

_Base: Any = import_deepinv().Denoiser


class DeepinvDenoiser(_Base):
    """A deepinv.models.Denoiser that uses one of our denoisers: `denoiser(x, sigma)`.

    `options` default to the denoiser's suggested ones, without `clean_below`: clean images take their steps as well. It keeps
    no graph: the output never gets a gradient, so deepinv can use it in plug-and-play iterations but not train it, nor unfold
    through it.
    """

    def __init__(self, denoiser: Denoiser, options: DenoiseOptions | None = None):
        super().__init__()
        self.denoiser = denoiser
        options = denoiser.options_or_suggested(options)
        # Plug-and-play methods need the network's result for every image.
        self.options = replace(options, clean_below=0.0) if options.clean_below is None else options

    def forward(self, x: Tensor, sigma: float | Tensor | list[float] | None = None, **kwargs: object) -> Tensor:
        """Denoise x (B, 3, H, W), about [0, 1], or (B, 1, H, W), which is denoised as grey RGB and averaged.

        `sigma` is the noise's standard deviation on [0, 1]: a number, or one for each image in any shape of B values. Methods
        that take none ignore it; with None those that take one estimate it. Raises ValueError for what Denoiser.denoise does.
        """
        images = x.detach()
        if images.ndim == 4 and images.shape[1] == 1:
            return self._run(images.expand(-1, 3, -1, -1), sigma).mean(1, keepdim=True)
        return self._run(images, sigma)

    def _run(self, images: Tensor, sigma: float | Tensor | list[float] | None) -> Tensor:
        if sigma is None:
            return self.denoiser.denoise(images, self.options).image
        sigmas = self._handle_sigma(sigma, batch_size=len(images)).tolist()
        told = [replace(self.options, sigma=min(max(255.0 * float(value), 0.0), 255.0)) for value in sigmas]
        if len(set(sigmas)) == 1:
            return self.denoiser.denoise(images, told[0]).image
        pairs = zip(images, told, strict=True)
        return join_results([self.denoiser.denoise(image[None], options) for image, options in pairs]).image
