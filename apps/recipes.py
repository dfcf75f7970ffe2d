"""Write the command line and the Python program that make the same pixels as the page."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from apps.sources import Request
from ebt_vision.data.image_files import without_suffix
from ebt_vision.denoising.options import DenoiseOptions

UNFINISHED = "# The page's image was stopped early. This makes the finished image.\n"
"""Comment above the command and the program if the page shows an unfinished image."""


def command(request: Request, model: str, device: str) -> str:
    """Return the command line for a request. It names the image without its folder."""
    words = ["ebt-vision", "denoise", Path(request.path).name, "--model", model, "--steps", str(request.num_steps)]
    if request.noise is not None:
        words += ["--add-noise", str(request.noise)]
    words += ["--seed", str(request.seed)]
    if request.num_candidates != 1:
        words += ["--candidates", str(request.num_candidates)]
    if request.tolerance is not None:
        words += ["--tolerance", repr(request.tolerance)]
        if request.tolerance_of != "first":
            words += ["--tolerance-of", request.tolerance_of]
    if request.langevin_std:
        words += ["--langevin", repr(request.langevin_std)]
    if request.step_size_scale != 1:
        words += ["--step-size-scale", repr(request.step_size_scale)]
    if request.strength != 1:
        words += ["--strength", repr(request.strength)]
    if request.self_ensemble != 1:
        words += ["--self-ensemble", str(request.self_ensemble)]
    if request.tile_size is not None:
        words += ["--tile", str(request.tile_size)]
    return shlex.join([*words, "--png", "--device", device, "--output", "out/"])


def program(request: Request, model: str, device: str) -> str:
    """Return the Python program for a request."""
    path = Path(request.path)
    options, plain = asdict(request.options()), asdict(DenoiseOptions())
    given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value != plain[name] or name == "num_steps")
    noise = request.noise
    made = "None" if noise is None else f"Noise(kind={noise.kind!r}, amount={noise.amount!r})"
    noisy = "image.visible_pixels()[None]" if noise is None else f"noise.add(image.visible_pixels()[None], seed={request.seed})"
    tile = "" if request.tile_size is None else f", tile_size={request.tile_size}"
    return f"""from ebt_vision import DenoiseOptions, denoise_tiled, load_denoiser
from ebt_vision.data.image_files import read_image, write_image
from ebt_vision.denoising.base import adapt_to_noise
from ebt_vision.noise.named import Noise

image = read_image({path.name!r})
noise = {made}
noisy = {noisy}
denoiser = adapt_to_noise(load_denoiser({model!r}, device={device!r}), noise)
result = denoise_tiled(denoiser, noisy, DenoiseOptions({given}){tile})
write_image({without_suffix(path).name + "-denoised.png"!r}, image.with_pixels(result.image[0]))
"""
