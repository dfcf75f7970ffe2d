"""A seeded mixture of the kinds of noise in photographs, for training and for evaluation.

A fraction of the draws (`gaussian_share`) is plain white Gaussian noise, not clipped, as in the tables of restoration papers.
The other draws simulate cameras and the web. Each part has its own probability:

   noise field   sensor noise, Gaussian noise with correlated colour channels, speckle, or processed noise. Sensor noise
                 depends on the signal and goes through a Bayer mosaic, demosaicing, white balance and a tone curve (Brooks et
                 al. 2019). Processed noise is what the noise reduction of a camera leaves: fine in luminance, coarse in
                 colour. In smooth parts of real noisy photographs (RNI15, Lebrun et al. 2015) neighbouring pixels have a
                 median correlation of 0.3 in luminance and 0.7 in colour (docs/results/photographs.md).
   correlation   The field is blurred or enlarged, so that neighbouring pixels are similar, as after denoising or resizing.
   JPEG          before the noise, after it, or both; its blocks begin anywhere.
   8 bits        clipped and rounded.

The strength of a draw is a standard deviation in 0..255 units: `max_sigma * u ** sigma_power`, u uniform in [0, 1), with the
maximum of its kind. Weak noise is drawn often, because most photographs have weak noise. Some draws have no noise. The target
is the clean image, so a network learns to remove JPEG artefacts as well as noise.

Photographs at the full size of a camera are smooth: lens and demosaicing leave little detail of one pixel. A network can
therefore remove coarse noise there more strongly than in a photograph that was made smaller. `full_size_share` pairs the two
in training: that fraction of the realistic draws enlarges its clean image first. The grain of the given image is enlarged too,
and looks like coarse noise that belongs to the clean image; `full_size_smoothing` removes it first. `full_size_sharpening`
gives the enlarged image sharp edges again, as cameras do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.checks import check_number, check_whole
from ebt_vision.core.rng import Generators
from ebt_vision.noise.processes import add_jpeg, to_8_bit

_FROM_LUMA_CHROMA = torch.tensor([[1.0, 0.0, 1.0], [1.0, -0.194, -0.509], [1.0, 1.0, 0.0]])
"""Luminance and the differences B - Y and R - Y -> RGB, (3, 3), with the luminance of ITU-R BT.601."""
_JPEG_CELL = 16
"""Side of the blocks of colour in a JPEG with half the resolution for colour; that of brightness is 8."""
_BAYER = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
"""Position of each colour in a 2x2 cell of the mosaic (RGGB), (3, 2, 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RealisticNoiseConfig:
    """Probability and strength of each part of the mixture."""

    max_sigma: float = 75.0
    """Maximum standard deviation of white Gaussian noise, 0..255 units."""
    max_realistic_sigma: float = 50.0
    """Maximum standard deviation of realistic noise except processed noise; stronger correlated noise would hide most of the
    image."""
    max_processed_sigma: float = 20.0
    """Maximum standard deviation of processed noise; stronger coarse colour noise looks like colours of the image."""
    sigma_power: float = 1.5
    """Exponent of the strengths: 1 draws them uniformly; a larger value draws weak noise more often."""
    clean_share: float = 0.04
    """Fraction of the draws without any noise, in [0, 1]."""
    gaussian_share: float = 0.5
    """Fraction of the draws with only white Gaussian noise, in [0, 1]; the others are realistic."""
    correlated_share: float = 0.5
    """Fraction of the realistic draws with spatially correlated noise, in [0, 1]."""
    processed_share: float = 0.5
    """Fraction of the realistic draws with processed noise, in [0, 1]; the others have one of the other fields."""
    jpeg_share: float = 0.4
    """Fraction of the realistic draws that pass through a JPEG after the noise, in [0, 1]. Independent of it, a fifth of the
    realistic draws pass through a JPEG before the noise."""
    jpeg_quality: tuple[int, int] = (30, 95)
    """Lowest and highest quality."""
    jpeg_only_share: float = 0.0
    """Fraction of the realistic draws, in [0, 1], with a JPEG and no noise."""
    full_size_share: float = 0.0
    """Fraction of the realistic draws, in [0, 1], whose clean image is the middle of the given one, enlarged (bicubic). Only
    for `realistic_pairs`."""
    full_size_zoom: tuple[float, float] = (1.5, 3.0)
    """Smallest and largest factor of this enlargement, log-uniform."""
    full_size_smoothing: float = 0.0
    """Maximum standard deviation in colour, 0..255 units, uniform, of a bilateral filter (Tomasi and Manduchi 1998) before this
    enlargement; weaker texture is removed, edges stay. 0: no filter."""
    full_size_sharpening: float = 0.0
    """Maximum amount of unsharp masking after this enlargement, uniform. 0: none."""
    processed_luma_blur: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest standard deviation, px, of the blur of the luminance of processed noise, uniform."""

    def __post_init__(self) -> None:
        for name in ("max_sigma", "max_realistic_sigma", "max_processed_sigma", "full_size_smoothing"):
            if not 0 <= getattr(self, name) <= 255:
                raise ValueError(f"{name}={getattr(self, name):g} is not in 0..255")
        if not 0 <= self.full_size_sharpening <= 4:
            raise ValueError(f"full_size_sharpening={self.full_size_sharpening:g} is not in 0..4")
        if not 0 < self.sigma_power < math.inf:
            raise ValueError(f"sigma_power={self.sigma_power:g} must be positive; 1 draws strengths uniformly")
        for name in [field.name for field in fields(self) if field.name.endswith("_share")]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} is not in [0, 1]")
        for name, check_end, lowest, highest in (
            ("jpeg_quality", check_whole, 1, 100),
            ("full_size_zoom", check_number, 1, 8),
            ("processed_luma_blur", check_number, 0.1, 8),
        ):
            ends = getattr(self, name)
            if not isinstance(ends, tuple | list) or len(ends) != 2:
                raise ValueError(f"{name}={ends!r} is not a range; write [lowest, highest]")
            for end in ends:
                check_end(name, end)
            low, high = ends
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name}=[{low:g}, {high:g}] is not a range in {lowest:g}..{highest:g}")


def add_realistic_noise(clean: Tensor, config: RealisticNoiseConfig, generators: list[torch.Generator]) -> Tensor:
    """Return noisy images (B, 3, H, W), float32 on the CPU, of clean images in [0, 1]; generator i makes every draw of image i.

    White Gaussian draws may leave [0, 1]; realistic draws are whole 8-bit values. The images stay as they are: full_size_share
    is for `realistic_pairs`. Raises ValueError unless there is one generator per image and the images have three channels
    and sides of 2 px or more.
    """
    return realistic_pairs(clean, replace(config, full_size_share=0.0), generators)[1]


def realistic_pairs(images: Tensor, config: RealisticNoiseConfig, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Return clean and noisy images, both (B, 3, H, W), float32 on the CPU, of images (B, 3, H, W) in [0, 1].

    The clean images are the given ones, or the middle of them enlarged (full_size_share). The noise and the errors are those of
    `add_realistic_noise`.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"clean has shape {tuple(images.shape)}; give RGB images, (B, 3, H, W)")
    if len(generators) != len(images):
        raise ValueError(f"got {len(generators)} generators for {len(images)} images; give one per image")
    if min(images.shape[-2:]) < 2:
        raise ValueError(f"clean has shape {tuple(images.shape)}; both sides must be 2 px or more")
    pairs = [_one(image, config, g) for image, g in zip(images.float().cpu(), generators, strict=True)]
    clean, noisy = zip(*pairs, strict=True)
    return torch.stack(clean), torch.stack(noisy)


def add_camera_noise(clean: Tensor, sigma: float, generator: Generators) -> Tensor:
    """Processed noise, as the noise reduction of a camera leaves it, on images (B, 3, H, W) in [0, 1], then 8 bits.

    `sigma` is its standard deviation in 0..255 units, before the values are clipped and rounded. The correlations and the share
    of colour differ from draw to draw, in the ranges of the default RealisticNoiseConfig. `generator` is one for all images, or
    a list with one for each. Raises ValueError for a sigma out of 0..255 and for other shapes.
    """
    check_number("sigma", sigma)
    if not 0 <= sigma <= 255:
        raise ValueError(f"sigma={sigma:g} is out of range; use 0..255, photographs have up to 20")
    if clean.ndim != 4 or clean.shape[1] != 3 or not len(clean) or min(clean.shape[-2:]) < 2:
        raise ValueError(f"clean has shape {tuple(clean.shape)}; give RGB images, (B, 3, H, W), with sides of 2 px or more")
    draws = [generator] * len(clean) if isinstance(generator, torch.Generator) else list(generator)
    if len(draws) != len(clean):
        raise ValueError(f"got {len(draws)} generators for {len(clean)} images; give one per image")
    blur = RealisticNoiseConfig().processed_luma_blur
    images = clean.float().cpu().clamp(0, 1)
    noisy = [image + _processed_noise(image, sigma / 255.0, blur, g) for image, g in zip(images, draws, strict=True)]
    return (to_8_bit(torch.stack(noisy)) / 255.0).to(clean)


def _one(clean: Tensor, config: RealisticNoiseConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(3, H, W) -> clean and noisy image, (3, H, W) each."""
    draw = torch.rand(8, generator=generator).tolist()
    strength = draw[0] ** config.sigma_power / 255.0
    if draw[1] < config.clean_share:
        return clean, clean.clone()
    if draw[2] < config.gaussian_share:
        return clean, clean + config.max_sigma * strength * torch.randn(clean.shape, generator=generator)
    # Two parts that draw numbers only where they are in use, so that the noise of a seed stays the same without them.
    if config.full_size_share:
        clean = _full_size(clean, config, generator)
    if config.jpeg_only_share and float(torch.rand((), generator=generator)) < config.jpeg_only_share:
        return clean, _jpeg(clean, config, generator)
    image = _jpeg(clean, config, generator) if draw[3] < 0.2 else clean
    if draw[7] < config.processed_share:
        image = image + _processed_noise(image, config.max_processed_sigma * strength, config.processed_luma_blur, generator)
    else:
        field = _FIELDS[int(draw[4] * len(_FIELDS))]
        correlation = _random_correlation(generator) if draw[5] < config.correlated_share else None
        image = image + field(image, config.max_realistic_sigma * strength, correlation, generator)
    if draw[6] < config.jpeg_share:
        return clean, _jpeg(image, config, generator)
    return clean, to_8_bit(image) / 255.0


def _full_size(image: Tensor, config: RealisticNoiseConfig, generator: torch.Generator) -> Tensor:
    """Enlarge the middle of (3, H, W) to (3, H, W), or return the image as it is."""
    chosen, amount = torch.rand(2, generator=generator).tolist()
    if chosen >= config.full_size_share:
        return image
    least, most = config.full_size_zoom
    size = [max(1, round(side / (least * (most / least) ** amount))) for side in image.shape[-2:]]
    top, left = ((side - part) // 2 for side, part in zip(image.shape[-2:], size, strict=True))
    part = image[None, :, top : top + size[0], left : left + size[1]]
    if config.full_size_smoothing:
        part = _smoothed(part, config.full_size_smoothing / 255.0 * float(torch.rand((), generator=generator)))
    large = F.interpolate(part, size=image.shape[-2:], mode="bicubic", align_corners=False)[0]
    if config.full_size_sharpening:
        amount = config.full_size_sharpening * float(torch.rand((), generator=generator))
        large = large + amount * (large - _blurred(large, _gaussian(1.2)))
    return large.clamp(0, 1)


def _smoothed(images: Tensor, std: float) -> Tensor:
    """Bilateral filter of (B, C, H, W) with a standard deviation of `std` in colour and 2 px in space."""
    from kornia.filters import bilateral_blur

    reach = min(4, min(images.shape[-2:]) - 1)  # reflected borders need larger images
    return bilateral_blur(images, 2 * reach + 1, max(std, 1e-3), (2.0, 2.0), color_distance_type="l2")


_Correlation = Callable[[Tensor], Tensor]
_Field = Callable[[Tensor, float, _Correlation | None, torch.Generator], Tensor]


def _sensor_noise(clean: Tensor, sigma: float, correlation: _Correlation | None, generator: torch.Generator) -> Tensor:
    """Poisson-Gaussian noise of a sensor (Foi et al. 2008) after the camera pipeline; mean std `sigma`."""
    gains, shot = _uniform(generator, 1.2, 2.4, 3), _uniform(generator, 0.0, 1.0, 1)
    gains[1] = 1.0  # white balance keeps green
    raw = _mosaic(_to_linear(clean.clamp(0, 1)) / gains[:, None, None])  # (1, H, W)
    noise = _sensor_variance(raw, shot).sqrt() * _white((1, *clean.shape[1:]), correlation, generator)
    scale = sigma / 2.0  # a first estimate; linear light is steeper in shadows
    for _ in range(2):
        field = _develop(raw + scale * noise, gains) - _develop(raw, gains)
        scale *= sigma / max(float(field.std()), 1e-6)
    return field


def _sensor_variance(raw: Tensor, shot: Tensor) -> Tensor:
    """Variance of the linear signal `raw`, like it, up to a factor that the caller sets by the strength.

    `shot` is the share of shot noise, which grows with the signal (Poisson); the rest is read noise.
    """
    return shot * raw + (1.0 - shot) * raw.mean() + 1e-4


def _coloured_noise(clean: Tensor, sigma: float, correlation: _Correlation | None, generator: torch.Generator) -> Tensor:
    """Gaussian noise with mixed channels, from independent channels to grey; mean std `sigma`."""
    mixing = torch.eye(3) + _uniform(generator, 0.0, 2.0, 1) * torch.rand(3, 3, generator=generator)
    if float(_uniform(generator, 0.0, 1.0, 1)) < 0.2:
        mixing = torch.ones(3, 3)
    field = torch.einsum("ij,jhw->ihw", mixing, _white(tuple(clean.shape), correlation, generator))
    return field * (sigma / field.std().clamp(min=1e-6))


def _processed_noise(clean: Tensor, sigma: float, luma_blur: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Noise after the processing in a camera: luminance and colour with their own correlation and strength; mean std `sigma`.

    The strength depends on the brightness, as photon noise does after a tone curve: it changes with a random power of it.
    """
    fine, sharpening, coarse, ratio, power = torch.rand(5, generator=generator).tolist()
    low, high = luma_blur
    luma = _blurred(torch.randn((1, *clean.shape[1:]), generator=generator), _gaussian(low + (high - low) * fine))
    luma = luma + max(0.0, 0.8 * sharpening - 0.3) * (luma - _blurred(luma, _gaussian(1.2)))
    chroma = _blurred(torch.randn((2, *clean.shape[1:]), generator=generator), _gaussian(0.4 + 2.0 * coarse))
    chroma = _unit_std(chroma) * (0.3 * 8.0**ratio) * (0.5 + torch.rand(2, 1, 1, generator=generator))
    field = torch.einsum("ij,jhw->ihw", _FROM_LUMA_CHROMA, torch.cat([_unit_std(luma), chroma]))
    brightness = (clean.mean(0, keepdim=True) + 0.1) ** (0.9 * power - 0.6)
    field = field * brightness
    return field * (sigma / field.std().clamp(min=1e-6))


def _speckle(clean: Tensor, sigma: float, correlation: _Correlation | None, generator: torch.Generator) -> Tensor:
    """Noise in proportion to the signal; mean std `sigma`."""
    field = clean * _white(tuple(clean.shape), correlation, generator)
    return field * (sigma / field.std().clamp(min=0.05))


_FIELDS: tuple[_Field, ...] = (_sensor_noise, _sensor_noise, _coloured_noise, _coloured_noise, _speckle)
"""A kind that is listed twice is drawn twice as often."""


def _white(shape: tuple[int, ...], correlation: _Correlation | None, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return noise if correlation is None else correlation(noise)


def _random_correlation(generator: torch.Generator) -> _Correlation:
    """Blur with a standard deviation of 0.3 to 1.5 px, or enlarge by up to 2."""
    resampled, amount = torch.rand(2, generator=generator).tolist()
    if resampled < 0.4:
        return lambda noise: _unit_std(_enlarged(noise, 1.0 + amount))
    kernel = _gaussian(0.3 + 1.2 * amount)
    return lambda noise: _unit_std(_blurred(noise, kernel))


def _gaussian(std: float) -> Tensor:
    """A Gaussian kernel of 9 pixels or, where `std` asks for more, 4 standard deviations to each side; its sum is 1."""
    reach = math.ceil(4 * std) if std > 1.5 else 4
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / std) ** 2)
    return kernel / kernel.sum()


def _enlarged(noise: Tensor, factor: float) -> Tensor:
    """Return the top left part of the noise enlarged by `factor`, with the original shape (C, H, W)."""
    size = [math.ceil(side / factor) for side in noise.shape[-2:]]
    part = noise[None, :, : size[0], : size[1]]
    return F.interpolate(part, size=noise.shape[-2:], mode="bicubic", align_corners=False)[0]


def _blurred(noise: Tensor, kernel: Tensor) -> Tensor:
    """Blur (C, H, W) along both axes; the ends of a kernel wider than the image are cut off."""
    surplus = len(kernel) // 2 - min(noise.shape[-2:]) + 1
    if surplus > 0:
        kernel = kernel[surplus:-surplus] / kernel[surplus:-surplus].sum()
    x = F.pad(noise[:, None], [len(kernel) // 2] * 4, mode="reflect")  # (C, 1, H, W)
    return F.conv2d(F.conv2d(x, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


def _unit_std(noise: Tensor) -> Tensor:
    return noise / noise.std().clamp(min=1e-6)


def _jpeg(image: Tensor, config: RealisticNoiseConfig, generator: torch.Generator) -> Tensor:
    """(3, H, W) -> (3, H, W). The blocks of half of the draws begin anywhere, as in a photograph that was cut afterwards.

    A network that has only seen blocks in line with its patches does not recognise others.
    """
    low, high = config.jpeg_quality
    quality = int(torch.randint(low, high + 1, (), generator=generator))
    moved, top, left = torch.rand(3, generator=generator).tolist()
    origin = (0, 0) if moved < 0.5 else (int(_JPEG_CELL * top), int(_JPEG_CELL * left))
    return add_jpeg(image[None], quality, origin=origin)[0]


def _mosaic(image: Tensor) -> Tensor:
    """(3, H, W) -> (1, H, W): the colour that each pixel of the Bayer mosaic records."""
    return (image * _bayer_masks(image.shape[-2], image.shape[-1])).sum(0, keepdim=True)


def _develop(raw: Tensor, gains: Tensor) -> Tensor:
    """Bilinear demosaicing, white balance, tone curve: (1, H, W) linear -> (3, H, W) in sRGB, about [0, 1]."""
    masks = _bayer_masks(raw.shape[-2], raw.shape[-1])
    kernel = torch.tensor([[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]])[None, None]
    weighted = F.pad((raw * masks)[:, None], [1] * 4, mode="reflect")
    weights = F.pad(masks[:, None], [1] * 4, mode="reflect")
    full = (F.conv2d(weighted, kernel) / F.conv2d(weights, kernel))[:, 0]
    return _to_srgb(full * gains[:, None, None])


def _bayer_masks(height: int, width: int) -> Tensor:
    return _BAYER.repeat(1, math.ceil(height / 2), math.ceil(width / 2))[:, :height, :width]


def _to_linear(srgb: Tensor) -> Tensor:
    """sRGB -> linear light (IEC 61966-2-1)."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)


def _to_srgb(linear: Tensor) -> Tensor:
    """Linear light -> sRGB; values outside 0..1 are extrapolated from the ends of the curve."""
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-6) ** (1 / 2.4) - 0.055)


def _uniform(generator: torch.Generator, low: float, high: float, count: int) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
