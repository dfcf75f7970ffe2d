"""Damages of the restoration benchmark, and the classical methods that restoration is compared with.

All images are RGB (1, 3, H, W) in [0, 1]. A blur wraps around in the benchmark, so that no method must guess pixels at borders.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ebt_vision.core.metrics import psnr
from ebt_vision.core.rng import sample_generators
from ebt_vision.data.image_files import quantise
from ebt_vision.restoration.jpeg import JpegIntervals, JpegTables
from ebt_vision.restoration.likelihoods import Convolution, Downsampling, Likelihood, Mask, gaussian_kernel

DAMAGE_STREAM = 77
"""Stream of random numbers, in addition to the seed and the number of the image."""
BLUR_SIGMA, BLUR_NOISE, JPEG_QUALITY = 1.6, 2.0, 10
TV_ROUNDS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Damaged:
    """A damaged image and its damage."""

    observed: Tensor
    likelihood: Likelihood


def damage(task: str, clean: Tensor, *, seed: int, number: int) -> Damaged:
    """Damage image `number`, (1, 3, H, W); equal seed and number give equal damage. Raises ValueError for an unknown task."""
    generator = sample_generators(seed, [number], DAMAGE_STREAM)[0]
    height, width = clean.shape[-2:]
    if task in ("missing", "scratch", "text"):
        makers = {"missing": _missing, "scratch": _scratch, "text": _text}
        mask = Mask(makers[task](height, width, generator))
        return Damaged(observed=mask.apply(clean), likelihood=mask)
    if task in ("upscale2", "upscale4"):
        down = Downsampling(int(task[-1]))
        return Damaged(observed=_eight_bits(down.apply(clean)), likelihood=down)
    if task == "blur":
        blur = Convolution(gaussian_kernel(BLUR_SIGMA), circular=True)
        noise = torch.randn(clean.shape, generator=generator)
        return Damaged(observed=blur.apply(clean) + BLUR_NOISE / 255.0 * noise, likelihood=blur)
    if task == "jpeg":
        file = io.BytesIO()
        Image.fromarray(quantise(clean[0].permute(1, 2, 0))).save(file, "JPEG", quality=JPEG_QUALITY)
        decoded = np.array(Image.open(file))
        observed = torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255.0
        return Damaged(observed=observed, likelihood=JpegIntervals(JpegTables.of_file(file)))
    raise ValueError(f"task={task!r} is unknown; use one of {', '.join(TASKS)}")


TASKS = ("missing", "scratch", "text", "upscale2", "upscale4", "blur", "jpeg")


def _eight_bits(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255.0).round() / 255.0


def _missing(height: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.rand(height, width, generator=generator) < 0.5


def _scratch(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Two lines of 3 px from side to side."""
    picture = Image.new("L", (width, height), 255)
    ends = torch.rand(4, generator=generator).tolist()
    ImageDraw.Draw(picture).line([(0, ends[0] * height), (width, ends[1] * height)], fill=0, width=3)
    ImageDraw.Draw(picture).line([(ends[2] * width, 0), (ends[3] * width, height)], fill=0, width=3)
    return torch.from_numpy(np.array(picture)) > 0


def _text(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Lines of text in the small font of Pillow."""
    picture = Image.new("L", (width, height), 255)
    left = float(torch.rand(1, generator=generator)) * 20 - 20
    for top in range(4, height, 24):
        ImageDraw.Draw(picture).text((left, top), "one energy, many repairs " * 8, fill=0)
    return torch.from_numpy(np.array(picture)) > 127


Method = Callable[[Damaged, float], Tensor]
"""(damaged image, parameter) -> restored image."""


def start(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """Return the damaged image at full size: nearest means in holes, cubic enlargement, otherwise unchanged."""
    return damaged.likelihood.finish(damaged.likelihood.start(damaged.observed), damaged.observed)


def biharmonic(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """scikit-image's inpaint_biharmonic (Damelin & Hoang 2018)."""
    from skimage.restoration import inpaint_biharmonic

    assert isinstance(damaged.likelihood, Mask)
    missing = ~damaged.likelihood.known[0, 0].numpy()
    return _tensor(inpaint_biharmonic(_array(damaged.observed), missing, channel_axis=-1))


def total_variation(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """Alternate TV denoising (Chambolle 2004) of weight `parameter` and the proximal step of the likelihood."""
    from skimage.restoration import denoise_tv_chambolle

    x = damaged.likelihood.start(damaged.observed)
    for _ in range(TV_ROUNDS):
        smooth = _tensor(denoise_tv_chambolle(_array(x), weight=parameter, max_num_iter=20, channel_axis=-1))
        x = damaged.likelihood.prox(smooth.to(x), damaged.observed, _tv_weight(damaged.likelihood))
    return damaged.likelihood.finish(x, damaged.observed)


def _tv_weight(likelihood: Likelihood) -> float:
    if isinstance(likelihood, Mask):
        return 0.0
    return 0.05 if isinstance(likelihood, Convolution) else 1e-3


def wiener(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """scikit-image's Wiener filter with a Laplacian prior of balance `parameter` (Orieux et al. 2010)."""
    from skimage.restoration import wiener as wiener_filter

    kernel = _kernel(damaged)
    planes = [wiener_filter(plane, kernel, parameter, clip=False) for plane in damaged.observed[0].double().numpy()]
    return torch.from_numpy(np.stack(planes))[None].float()


def richardson_lucy(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """scikit-image's Richardson-Lucy with `parameter` iterations, on an image that is wrapped around."""
    from skimage.restoration import richardson_lucy as lucy

    kernel = _kernel(damaged)
    pad = 2 * kernel.shape[0]
    wrapped = torch.nn.functional.pad(damaged.observed.clamp(1e-3, 1), (pad, pad, pad, pad), mode="circular")
    planes = [lucy(plane, kernel, num_iter=int(parameter)) for plane in wrapped[0].double().numpy()]
    return torch.from_numpy(np.stack(planes))[None, :, pad:-pad, pad:-pad].float()


def back_projection(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """Cubic enlargement, then `parameter` rounds that enlarge and add the remaining difference (Irani & Peleg 1991)."""
    x = damaged.likelihood.start(damaged.observed)
    assert isinstance(damaged.likelihood, Downsampling)
    for _ in range(int(parameter)):
        x = x + damaged.likelihood.start(damaged.observed - damaged.likelihood.apply(x))
    return x


def bm3d(damaged: Damaged, parameter: float) -> Tensor:  # (1, 3, H, W)
    """BM3D with the noise level `parameter`, in 0..255 units."""
    from ebt_vision.denoising.load import load_denoiser
    from ebt_vision.denoising.options import DenoiseOptions

    return load_denoiser("bm3d").denoise(damaged.observed, DenoiseOptions(sigma=parameter)).image


def _kernel(damaged: Damaged) -> np.ndarray:
    assert isinstance(damaged.likelihood, Convolution)
    return damaged.likelihood.kernel.numpy()


_TV = (0.005, 0.0003, 0.0006, 0.00125, 0.0025, 0.01, 0.02, 0.04, 0.08, 0.16)
_HOLES: dict[str, tuple[Method, Sequence[float]]] = {
    "start": (start, (0.0,)),
    "biharmonic": (biharmonic, (0.0,)),
    "TV": (total_variation, _TV),
}
_ENLARGE: dict[str, tuple[Method, Sequence[float]]] = {
    "bicubic": (start, (0.0,)),
    "back-projection": (back_projection, (1, 2, 5, 10, 20, 40, 80)),
    "TV": (total_variation, _TV),
}
CLASSICAL: dict[str, dict[str, tuple[Method, Sequence[float]]]] = {
    **{task: _HOLES for task in ("missing", "scratch", "text")},
    **{task: _ENLARGE for task in ("upscale2", "upscale4")},
    "blur": {
        "start": (start, (0.0,)),
        "Wiener": (wiener, (0.003, 0.0003, 0.001, 0.01, 0.03, 0.1)),
        "Richardson-Lucy": (richardson_lucy, (5, 10, 20, 40, 80, 160)),
        "TV": (total_variation, _TV),
    },
    "jpeg": {"start": (start, (0.0,)), "TV": (total_variation, _TV), "BM3D": (bm3d, (5, 10, 15, 20, 25, 30, 35, 40))},
}
"""Task -> its methods, with the values to choose their parameter from. The choice uses other images than the measurement."""


def choose(task: str, name: str, images: Sequence[Tensor], *, seed: int) -> float:
    """Return the parameter with the best mean PSNR on `images`, (1, 3, H, W) each; a single value is returned unmeasured."""
    method, values = CLASSICAL[task][name]
    if len(values) == 1 or not images:
        return values[0]
    damaged = [damage(task, clean, seed=seed, number=number) for number, clean in enumerate(images)]
    scores = [
        sum(float(psnr(method(d, value).clamp(0, 1), clean, data_range=1.0)) for d, clean in zip(damaged, images, strict=True))
        for value in values
    ]
    return values[int(np.argmax(scores))]


def _array(image: Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).double().numpy()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None].float()
