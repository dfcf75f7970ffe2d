"""The part of eval/speed.py on photographs: the users' denoisers with default settings, against the network of DnCNN."""

import argparse
import functools

import torch
from speed_rounds import timed
from torch import Tensor, nn

from ebt_vision.benchmark.timing import Version
from ebt_vision.core.precision import autocast, has_fast_bfloat16
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.models.checkpoint import default_pretrained


def dncnn() -> nn.Module:
    """The network of DnCNN for blind colour denoising, with random weights: 20 layers of 64 channels (Zhang et al. 2017, sec.
    IV).

    Noisy images (B, 3, H, W) -> denoised images. Batch normalisation is omitted: at inference it is part of the convolutions.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(inplace=True)]
    for _ in range(18):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1)).eval()


def photographs(settings: argparse.Namespace) -> dict:
    """Time the network of DnCNN first, then each of --photograph-models as in `ebt-vision denoise`, on one square photograph.

    If the processor is fast at bfloat16, which these models then use, DnCNN is also measured in bfloat16. An EBT is also
    measured with its proposal compiled, unless --no-compile is given; the compilation is not timed.
    """
    side = settings.photograph_size
    generator = torch.Generator().manual_seed(settings.seed)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9, generator=generator), (side, side), mode="bicubic")
    noisy = (smooth + 25 / 255 * torch.randn(smooth.shape, generator=generator)).to(settings.device)
    network = dncnn().to(settings.device).to(memory_format=torch.channels_last)

    def peer(*, bfloat16: bool) -> Tensor:
        with torch.no_grad(), autocast(settings.device, bfloat16=bfloat16):
            return noisy - network(noisy)

    name = "DnCNN's network"
    versions = [Version(name=name, call=functools.partial(peer, bfloat16=False), units=side * side)]
    if has_fast_bfloat16(settings.device):
        versions.append(Version(name=f"{name}, bfloat16", call=functools.partial(peer, bfloat16=True), units=side * side))
    for name in settings.photograph_models or [default_pretrained()]:
        denoiser = load_denoiser(name, device=settings.device)
        versions.append(Version(name=name, call=functools.partial(denoiser.denoise, noisy), units=side * side))
        if settings.compile and isinstance(denoiser, EBTDenoiser):
            compiled = load_denoiser(name, device=settings.device)
            assert isinstance(compiled, EBTDenoiser)
            compiled.model.propose = torch.compile(compiled.model.propose)  # type: ignore[method-assign]
            versions.append(
                Version(name=f"{name}, compiled", call=functools.partial(compiled.denoise, noisy), units=side * side)
            )
    return timed(settings, versions, (side * side // 64, 576, 64), "pixels")
