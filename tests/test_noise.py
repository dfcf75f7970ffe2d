"""Noise by name, on the command line and in the library."""

from typing import Literal

import pytest
import torch

from ebt_vision.core.rng import make_generator
from ebt_vision.denoising.base import adapt_to_noise
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.noise.named import NOISE_KINDS, Noise
from ebt_vision.noise.processes import add_gaussian_noise, signal_and_noise_scale
from ebt_vision.noise.realistic import add_camera_noise


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_the_seed_decides_the_noise(kind: str) -> None:
    noise = Noise(kind=kind, amount=NOISE_KINDS[kind].default)
    clean = torch.rand(1, 3, 19, 23, generator=make_generator(5))
    kept = clean.clone()
    first, again, other = (noise.add(clean, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and torch.equal(clean, kept) and not torch.equal(first, clean)
    assert torch.equal(first, other) == (kind == "jpeg")  # the one without a random draw
    assert Noise.parse(str(noise)) == noise


def test_camera_noise_has_its_strength_and_8_bits() -> None:
    clean = torch.full((4, 3, 64, 64), 0.5)
    generators = [make_generator(0, i) for i in range(4)]
    noisy = add_camera_noise(clean, 12.0, generators)
    levels = 255.0 * noisy
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close((levels - 127.5).flatten(1).std(1), torch.full((4,), 12.0), rtol=0.02, atol=0.1)
    torch.testing.assert_close(add_camera_noise(clean[1:2], 12.0, [make_generator(0, 1)])[0], noisy[1])  # whatever the batch
    grey = noisy.mean(1)
    colour = noisy[:, 0] - noisy[:, 2]
    near = [((a - a.mean())[:, :, 1:] * (a - a.mean())[:, :, :-1]).mean() / a.var() for a in (grey, colour)]
    assert near[1] > near[0] + 0.1  # colour is coarser than luminance
    assert torch.equal(add_camera_noise(clean, 0.0, make_generator(0)), (255 * clean).round() / 255)
    with pytest.raises(ValueError, match="sigma=-1 is out of range"):
        add_camera_noise(clean, -1.0, make_generator(0))
    with pytest.raises(ValueError, match="3 generators for 4 images"):
        add_camera_noise(clean, 1.0, generators[:3])
    with pytest.raises(ValueError, match="give RGB images"):
        add_camera_noise(clean[:, :1], 1.0, generators)


def test_a_number_is_gaussian_noise() -> None:
    clean = torch.full((1, 3, 8, 8), 0.5)
    assert Noise.parse("25") == Noise(kind="gaussian", amount=25)
    assert torch.equal(Noise.parse("25").add(clean, 3), add_gaussian_noise(clean, 25, make_generator(3)))


@pytest.mark.parametrize("process", ["vp", "awgn"])
def test_input_gets_the_scale_that_the_network_was_trained_at(process: Literal["vp", "awgn"]) -> None:
    model = PatchEBT(PatchEBTConfig(img_size=16, embed_dim=192, depth=1, num_heads=3, noise_process=process))
    noises = (None, Noise.parse("25"), Noise.parse("paper:0.1"), Noise.parse("paper:0.2"))
    scales = [adapt_to_noise(EBTDenoiser(model), noise).input_scale for noise in noises]
    low, lower = signal_and_noise_scale(0.1)[0], signal_and_noise_scale(0.2)[0]
    assert scales == ([low, low, 1.0, 1.0] if process == "vp" else [1.0, 1.0, 1 / low, 1 / lower])


def test_a_noise_tells_its_strength() -> None:
    assert Noise.parse("paper:0.2").noise_level == 0.2 and Noise.parse("paper:0.2").sigma is None
    assert Noise.parse("25").sigma == 25 and Noise.parse("poisson:30").sigma is None


@pytest.mark.parametrize("text", ["", "loud", "300", "-1", "nan", "fog:1", "jpeg:0", "paper:2", "gaussian:", ":5"])
def test_a_wrong_noise_says_what_to_use(text: str) -> None:
    with pytest.raises(ValueError, match="use"):
        Noise.parse(text)
