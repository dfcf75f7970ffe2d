"""Classical denoisers with the same interface: BM3D and non-local means.

Both use the given noise standard deviation or estimate it. They process image by image on the CPU.
"""

from abc import abstractmethod
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ebt_vision.core.checks import MissingExtraError
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.inputs import pad_to_multiple
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import Callback, DenoiseResult, no_network_result


def estimate_sigma(noisy: Tensor) -> list[float]:
    """Estimate the AWGN standard deviation of each image (B, 3, H, W), in 0..255 units, with scikit-image's wavelets.

    It is the median absolute deviation of the finest wavelet coefficients (Donoho & Johnstone 1994), averaged over channels.
    A channel of one colour has 0.
    """
    return [255.0 * float(np.mean([_channel_sigma(image[..., c]) for c in range(3)])) for image in _to_numpy(noisy)]


def _channel_sigma(channel: np.ndarray) -> float:
    """The estimate of one channel (H, W). scikit-image gives NaN if all coefficients are 0."""
    from skimage.restoration import estimate_sigma as estimate

    sigma = 0.0 if channel.min() == channel.max() else float(estimate(channel))
    return 0.0 if np.isnan(sigma) else sigma


def _to_numpy(images: Tensor) -> np.ndarray:
    return images.detach().cpu().double().permute(0, 2, 3, 1).numpy()  # NCHW -> NHWC


class ClassicalDenoiser(Denoiser):
    """A method that only needs the noise standard deviation: options.sigma, or an estimate for each image."""

    options_used = frozenset(("sigma",))
    min_side = 1
    """Smaller images are reflect-padded to this size."""

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        sigmas = estimate_sigma(noisy) if options.sigma is None else [options.sigma] * len(noisy)
        padded = _to_numpy(pad_to_multiple(noisy, 1, minimum=self.min_side))
        # Return an image without noise unchanged, because the methods divide by sigma.
        images = [self._filter(x, sigma / 255.0) if sigma > 1e-3 else x for x, sigma in zip(padded, sigmas, strict=True)]
        output = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(noisy)  # NHWC -> NCHW
        return no_network_result(output[..., : noisy.shape[-2], : noisy.shape[-1]], noisy, options)

    @abstractmethod
    def _filter(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """Denoise float64 (H, W, 3); `sigma` is in the unit of the image."""

    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions:
        return options if options.sigma is not None else replace(options, sigma=min(estimate_sigma(noisy)[0], 255.0))


class BM3DDenoiser(ClassicalDenoiser):
    """BM3D in colour (Dabov et al. 2007; the implementation of Mäkinen et al. 2020, free for non-commercial use)."""

    name = "bm3d"
    min_side = 16

    def __init__(self) -> None:
        super().__init__()
        try:
            import bm3d
        except ImportError:
            raise MissingExtraError('bm3d is not installed; run: pip install "ebt_vision[classical]"') from None
        self._bm3d = bm3d

    def _filter(self, image: np.ndarray, sigma: float) -> np.ndarray:
        return np.asarray(self._bm3d.bm3d_rgb(image, sigma))


class NonLocalMeansDenoiser(ClassicalDenoiser):
    """Non-local means that subtracts the noise variance from patch distances (Buades et al. 2005; Darbon et al. 2008)."""

    name = "nlm"

    def _filter(self, image: np.ndarray, sigma: float) -> np.ndarray:
        from skimage.restoration import denoise_nl_means

        # scikit-image recommends 0.6 * sigma for the fast mode.
        options = dict(patch_size=5, patch_distance=6, h=0.6 * sigma, sigma=sigma, fast_mode=True, channel_axis=-1)
        return np.asarray(denoise_nl_means(image, **options))


CLASSICAL_DENOISERS: dict[str, type[BM3DDenoiser] | type[NonLocalMeansDenoiser]] = {
    cls.name: cls for cls in (BM3DDenoiser, NonLocalMeansDenoiser)
}
