"""The Denoiser interface with real models at a tiny size, and the classical methods on an image with structure."""

import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from ebt_vision.core.checks import MissingExtraError
from ebt_vision.core.metrics import psnr
from ebt_vision.core.step_rules import Momentum
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.denoising.base import IdentityDenoiser, for_photographs, for_vp_images
from ebt_vision.denoising.classical import BM3DDenoiser, NonLocalMeansDenoiser, estimate_sigma
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.inputs import crop, pad_to_multiple
from ebt_vision.denoising.load import denoiser_for, load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.pretrained_model import CheckpointError
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.processes import add_gaussian_noise, alphas_cumprod, sigma_to_timestep, to_image_range, to_model_range

SIZE = dict(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "log_step_size":
            nn.init.normal_(parameter, std=0.15)
    return model


def ebt(**overrides) -> EBTDenoiser:
    return EBTDenoiser(randomised(PatchEBT(PatchEBTConfig(**{**SIZE, "init_step_size": 0.3, **overrides}))))


def dit(mode: str = "ddim") -> DiTDenoiser:
    return DiTDenoiser(randomised(DiT(DiTConfig(**SIZE))), mode=mode)


def regressor() -> RegressorDenoiser:
    return RegressorDenoiser(randomised(PatchRegressor(PatchRegressorConfig(**SIZE))))


def test_a_regressor_is_applied_once_by_default() -> None:
    """Applied again it loses 2.5 dB at its training level (docs/results/base.md)."""
    denoiser, noisy = regressor(), noisy_images()
    default = denoiser.denoise(noisy)
    assert default.num_forward.tolist() == [1]
    assert torch.equal(default.image, denoiser.denoise(noisy, DenoiseOptions(num_steps=1)).image)


def noisy_images(count: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    """Noise around grey that exceeds [0, 1]."""
    return 0.5 + 0.4 * torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


EVERY_KIND = {
    "ebt linear": (lambda: ebt(energy_head="linear"), DenoiseOptions(num_steps=2)),
    "ebt quadratic": (ebt, DenoiseOptions(num_steps=2)),
    "ebt with context": (lambda: ebt(observation_context=True), DenoiseOptions(num_steps=2)),
    "ebt best of": (ebt, DenoiseOptions(num_steps=2, num_candidates=3, langevin_std=0.05)),
    "ebt tolerance": (ebt, DenoiseOptions(num_steps=6, tolerance=0.3)),
    "ebt tolerance of the previous": (ebt, DenoiseOptions(num_steps=6, tolerance=0.3, tolerance_of="previous")),
    "ebt tolerance of the training's": (
        lambda: ebt(training_gain=0.5),
        DenoiseOptions(num_steps=6, tolerance=0.3, tolerance_of="training"),
    ),
    "dit ddim": (dit, DenoiseOptions(num_steps=3, noise_level=0.05)),
    "dit by sigma": (dit, DenoiseOptions(num_steps=3, sigma=25)),
    "dit estimating": (dit, DenoiseOptions(num_steps=3)),
    "dit x0": (lambda: dit("x0"), DenoiseOptions(noise_level=0.1)),
    "dit recursion": (lambda: dit("recursion"), DenoiseOptions(num_steps=2, noise_level=0.005)),
    "regressor": (regressor, DenoiseOptions(num_steps=2)),
    "identity": (IdentityDenoiser, DenoiseOptions()),
    "nlm": (NonLocalMeansDenoiser, DenoiseOptions()),
}


@pytest.fixture(params=EVERY_KIND, ids=lambda kind: kind.replace(" ", "-"))
def kind(request):
    make, options = EVERY_KIND[request.param]
    return make(), options


# --- What every denoiser keeps


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 9), (8, 31)])
def test_any_size_in_the_same_size_out(kind, height, width):
    denoiser, options = kind
    noisy = noisy_images(2, height, width)
    before = noisy.clone()
    result = denoiser.denoise(noisy, options)
    assert result.image.shape == noisy.shape
    assert result.image.min() >= 0 and result.image.max() <= 1
    assert result.num_steps.dtype == result.num_forward.dtype == torch.int64
    assert result.num_steps.shape == result.num_forward.shape == (2,)
    assert torch.equal(noisy, before)
    assert not result.image.requires_grad


def test_alone_or_in_a_batch(kind):
    denoiser, options = kind
    noisy = noisy_images(3, 16, 12)
    together = denoiser.denoise(noisy, options, image_ids=[5, 6, 7])
    for i in range(3):
        alone = denoiser.denoise(noisy[i : i + 1], options, image_ids=[5 + i])
        torch.testing.assert_close(alone.image, together.image[i : i + 1], rtol=1e-4, atol=1e-5)
        assert alone.num_steps == together.num_steps[i] and alone.num_forward == together.num_forward[i]
        if alone.energies is not None:
            torch.testing.assert_close(alone.energies[:, 0], together.energies[:, i], rtol=1e-4, atol=1e-5)


def test_trajectory_ends_with_the_image(kind):
    denoiser, options = kind
    fields = asdict(options)
    result = denoiser.denoise(noisy_images(2, 16, 12), DenoiseOptions(**{**fields, "keep_trajectory": True}))
    assert all(image.shape == (2, 3, 16, 12) for image in result.trajectory)
    assert torch.equal(result.trajectory[-1], result.image)
    assert len(result.trajectory) >= 2


@pytest.mark.parametrize(
    ("noisy", "message"),
    [
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\); use \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 16, 16), "1 channels; use RGB"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide 8-bit values by 255"),
        (torch.zeros(1, 3, 7, 16), "7x16 px; both sides must be 8 px or more"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN"),
        (torch.full((1, 3, 16, 16), torch.inf), "infinite"),
        (torch.zeros(0, 3, 16, 16), "empty batch"),
        (torch.full((1, 3, 16, 16), 30.0), r"values up to 30; use images in \[0, 1\]; divide 0..255 by 255"),
        (torch.full((1, 3, 16, 16), -0.8), r"mean of -0.8; .* convert -1..1 by \(image \+ 1\) / 2"),
        (np.zeros((16, 16, 3), np.uint8), r"a numpy ndarray, not a torch.Tensor; .* / 255"),
        (Image.new("RGB", (16, 16)), "a PIL Image, not a torch.Tensor"),
        ([[0.0] * 16] * 16, "a builtins list, not a torch.Tensor"),
    ],
)
def test_images_that_cannot_be_used(noisy, message):
    with pytest.raises(ValueError, match=message) as error:
        IdentityDenoiser().denoise(noisy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("num_candidates", 0),
        ("tolerance", -0.1),
        ("langevin_std", -1.0),
        ("step_size_scale", 0.0),
        ("candidate_noise_std", -1.0),
        ("noise_level", 1.5),
        ("sigma", -1.0),
        ("seed", -1),
        ("tile_size", 7),
    ],
)
def test_options_that_cannot_be_used(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} is out of range; use"):
        DenoiseOptions(**{name: value})


@pytest.mark.parametrize("size", [16, 40])  # whole, and in tiles
def test_an_image_that_is_to_get_a_gradient_is_refused_and_think_gives_it(size: int):
    denoiser = ebt()
    noisy = torch.rand(1, 3, size, size, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires a gradient.*differentiate_start=True.*or noisy\.detach\(\)") as error:
        denoiser(noisy)
    assert "\n" not in str(error.value)
    with torch.no_grad():
        quiet = denoiser(noisy)  # nobody waits for a gradient here
    assert torch.equal(quiet, denoiser(noisy.detach()))
    config = ThinkingConfig(detach_between_steps=False)
    result = think(denoiser.model, noisy, config, step_size=0.1, create_graph=True, differentiate_start=True)
    (gradient,) = torch.autograd.grad(result.final.sum(), noisy)
    assert gradient.shape == noisy.shape and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_steps", 2.0, "num_steps=2.0 is a float; use a whole number"),
        ("num_steps", True, "num_steps=True is a bool"),
        ("num_candidates", "2", "num_candidates='2' is a str"),
        ("seed", None, "seed=None is a NoneType"),
        ("tile_size", 64.0, "tile_size=64.0 is a float"),
        ("tolerance", "0.1", "tolerance='0.1' is a str; use a number"),
        ("langevin_std", None, "langevin_std=None is a NoneType; use a number"),
    ],
)
def test_options_of_another_type(name, value, message):
    with pytest.raises(ValueError, match=message):
        DenoiseOptions(**{name: value})
    with pytest.raises(ValueError, match="options is a int; give DenoiseOptions"):
        IdentityDenoiser().denoise(noisy_images(), 2)


def test_tolerance_of_needs_a_tolerance():
    with pytest.raises(ValueError, match="tolerance_of='previous' has no effect without a tolerance"):
        DenoiseOptions(tolerance_of="previous")


@pytest.mark.parametrize("make", [ebt, regressor])
def test_an_image_of_one_colour_is_given_back(make):
    flat = torch.tensor([1.0, 0.0, 0.25])[:, None, None].expand(3, 16, 20)
    noisy = torch.stack([flat, torch.rand(3, 16, 20)])
    denoiser = make()
    result = denoiser.denoise_whole(noisy, DenoiseOptions(num_steps=2, keep_trajectory=True))
    assert torch.equal(result.image[0], flat) and torch.equal(result.trajectory[-1], result.image)
    assert not torch.equal(result.image[1], noisy[1])
    large = flat[None].repeat(1, 1, 3, 2)
    torch.testing.assert_close(denoiser.denoise(large).image, large, rtol=0, atol=1e-6)  # in tiles, but for rounding


def test_image_ids():
    with pytest.raises(ValueError, match="2 ids for a batch of 1"):
        IdentityDenoiser().denoise(noisy_images(), image_ids=[0, 1])
    with pytest.raises(ValueError, match=r"not whole numbers; use one per image, for example range\(1\)"):
        IdentityDenoiser().denoise(noisy_images(), image_ids=[0.5])
    with pytest.raises(ValueError, match="image_ids=-1 is out of range"):
        IdentityDenoiser().denoise(noisy_images(), image_ids=[-1])
    noisy, options = noisy_images(2), DenoiseOptions(langevin_std=0.1)
    listed, tensor = (ebt().denoise(noisy, options, image_ids=ids).image for ids in ([3, 4], torch.tensor([3, 4])))
    assert torch.equal(listed, tensor)


# --- A denoiser as a module, and what it keeps of its input


def test_a_denoiser_is_a_module():
    denoiser, noisy = ebt(), noisy_images(2)
    assert torch.equal(denoiser(noisy), denoiser.denoise(noisy).image)
    assert sum(p.numel() for p in denoiser.parameters()) == denoiser.num_parameters
    assert {name.split(".")[0] for name in denoiser.state_dict()} == {"model"}
    assert not denoiser.train().model.training
    assert "EBTDenoiser" in repr(denoiser) and "name='ebt'" in repr(denoiser) and "PatchEBT" in repr(denoiser)
    double = denoiser.to(torch.float64)
    assert double is denoiser and next(denoiser.parameters()).dtype == torch.float64
    torch.testing.assert_close(denoiser(noisy), ebt()(noisy), rtol=1e-4, atol=1e-5)
    assert torch.equal(IdentityDenoiser()(noisy), noisy.clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_images_come_back_in_the_dtype_of_the_input(kind, dtype):
    denoiser, options = kind
    noisy = noisy_images(2, 16, 12)
    options = replace(options, keep_trajectory=True, keep_candidates=True)
    seen = []
    result = denoiser.denoise(noisy.to(dtype), options, callback=lambda step: seen.append(step.image.dtype))
    images = [result.image, *result.trajectory] + ([] if result.candidate_images is None else [result.candidate_images])
    assert {image.dtype for image in images} == {dtype} and set(seen) <= {dtype}
    plain = denoiser.denoise(noisy.to(dtype).float(), options)
    torch.testing.assert_close(result.image.float(), plain.image, rtol=0, atol=0.01)
    tiled = denoise_tiled(denoiser, noisy[:1].to(dtype), replace(options, tile_size=8))
    assert {tiled.image.dtype, *(image.dtype for image in tiled.trajectory)} == {dtype}


def test_inference_mode_around_loading_and_denoising(tmp_path):
    ebt().model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded, noisy = load_denoiser(str(tmp_path)), noisy_images(1, 20, 20)
        inside = loaded.denoise(noisy).image
        made = ebt()
    torch.testing.assert_close(inside, load_denoiser(str(tmp_path)).denoise(noisy_images(1, 20, 20)).image)
    assert loaded.denoise(noisy_images()).image.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"weights were made or moved under torch.inference_mode") as error:
        made.denoise(noisy_images())
    assert "\n" not in str(error.value)


# --- Large images


def test_large_images_are_denoised_in_tiles():
    """As in the command line and the page: a network performs worse far from its training size."""
    denoiser, noisy = ebt(), noisy_images(2, 40, 21)
    options = DenoiseOptions(num_steps=3, langevin_std=0.05, num_candidates=2, keep_trajectory=True, keep_candidates=True)
    result = denoiser.denoise(noisy, options)
    for i in range(2):
        tiled = denoise_tiled(ebt(), noisy[i], options)
        for name in ("image", "num_steps", "num_forward"):
            torch.testing.assert_close(getattr(result, name)[i : i + 1], getattr(tiled, name), rtol=1e-4, atol=1e-5)
        for name in ("energies", "candidate_energies", "candidate_wins", "candidate_images"):
            torch.testing.assert_close(getattr(result, name)[:, i : i + 1], getattr(tiled, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.trajectory[1][i : i + 1], tiled.trajectory[1], rtol=1e-4, atol=1e-5)
    # Whole, in other tiles, and small enough for one tile.
    whole = denoiser.denoise(noisy, replace(options, tile_size=0))
    assert torch.equal(whole.image, denoiser.denoise_whole(noisy, options).image)
    assert not torch.allclose(whole.image, result.image, atol=1e-3)
    smaller = denoiser.denoise(noisy[:1], replace(options, tile_size=8))
    torch.testing.assert_close(smaller.image, denoise_tiled(ebt(), noisy[0], options, tile_size=8).image, rtol=1e-4, atol=1e-5)
    single = denoiser.denoise(noisy[..., :16, :16], options)
    assert torch.equal(single.image, denoiser.denoise_whole(noisy[..., :16, :16], options).image)


def test_the_ids_of_large_images_decide_their_noise():
    options, noisy = DenoiseOptions(langevin_std=0.1), noisy_images(1, 24, 24)
    together = ebt().denoise(noisy[[0, 0, 0]], options, image_ids=[0, 5, 5]).image
    assert torch.equal(together[1], together[2]) and not torch.allclose(together[0], together[1])
    torch.testing.assert_close(ebt().denoise(noisy, options, image_ids=[5]).image, together[1:2])


def test_a_callback_hears_of_each_large_image_and_stops_the_rest():
    noisy, seen = noisy_images(2, 24, 24), []
    result = ebt().denoise(noisy, DenoiseOptions(num_steps=2), callback=seen.append)
    assert [(step.image_index, step.index) for step in seen] == [(i, index) for i in (0, 1) for index in (0, 1, 2)]
    assert all(step.image.shape == (1, 3, 24, 24) and step.energies.shape == (1,) for step in seen)
    torch.testing.assert_close(seen[-1].image, result.image[1:])
    stopped = ebt().denoise(noisy, DenoiseOptions(num_steps=2), callback=lambda step: step.index == 1)
    torch.testing.assert_close(stopped.image[:1], seen[1].image)
    torch.testing.assert_close(stopped.image[1:], noisy[1:].clamp(0, 1))


def test_without_options_a_denoiser_does_what_it_suggests():
    denoiser, noisy = ebt(suggested_steps=6, suggested_tolerance=0.4, training_gain=0.5), noisy_images(2, 20, 24)
    told = DenoiseOptions(num_steps=6, tolerance=0.4, tolerance_of="training")
    assert denoiser.suggested_options == told
    assert torch.equal(denoiser.denoise(noisy).image, denoiser.denoise(noisy, told).image)
    assert torch.equal(denoise_tiled(denoiser, noisy[0]).image, denoise_tiled(denoiser, noisy[0], told).image)


def test_a_loaded_denoiser_takes_images_for_photographs_unless_told_of_the_vp_process(tmp_path):
    for noise_process in ("vp", "awgn"):
        ebt(noise_process=noise_process).model.save_pretrained(tmp_path / noise_process)
        loaded, noisy = load_denoiser(str(tmp_path / noise_process)), noisy_images(1, 20, 20)
        for level, prepare in ((None, for_photographs), (0.2, lambda denoiser: for_vp_images(denoiser, 0.2))):
            options = DenoiseOptions(num_steps=2, noise_level=level)
            expected = prepare(ebt(noise_process=noise_process)).denoise(noisy, options).image
            assert torch.equal(loaded.denoise(noisy, options).image, expected)


@settings(max_examples=30)
@given(height=st.integers(2, 20), width=st.integers(2, 20), multiple=st.integers(1, 40))
def test_padding_reflects_and_is_undone(height, width, multiple):
    images = torch.rand(1, 3, height, width)
    padded = pad_to_multiple(images, multiple)
    assert padded.shape[-2] % multiple == padded.shape[-1] % multiple == 0
    assert padded.shape[-2] < height + multiple and padded.shape[-1] < width + multiple
    assert torch.equal(crop(padded, (height, width)), images)
    if padded.shape[-2] > height:
        assert torch.equal(padded[:, :, height, :width], images[:, :, height - 2])


# --- EBT


def test_ebt_is_thinking_in_the_model_range():
    denoiser = ebt()
    noisy = noisy_images(2)
    result = denoiser.denoise(noisy, DenoiseOptions(num_steps=3, step_size_scale=0.5))
    thought = think(
        denoiser.model, to_model_range(noisy), ThinkingConfig(num_steps=3), step_size=0.5 * denoiser.model.step_size.detach()
    )
    torch.testing.assert_close(result.image, to_image_range(thought.final).clamp(0, 1))
    torch.testing.assert_close(result.energies, thought.energies / 16)  # 4 x 4 patches
    assert result.num_forward.tolist() == [4, 4] and result.num_steps.tolist() == [3, 3]


@pytest.mark.parametrize("rule", ["barzilai-borwein", Momentum(momentum=0.8), "backtracking"])
def test_ebt_takes_the_steps_of_the_rule_that_is_asked_for(rule):
    denoiser, noisy = ebt(), noisy_images(2)
    result = denoiser.denoise(noisy, DenoiseOptions(num_steps=3, step_rule=rule))
    thought = think(
        denoiser.model,
        to_model_range(noisy),
        ThinkingConfig(num_steps=3, step_rule=rule),
        step_size=denoiser.model.step_size.detach(),
    )
    torch.testing.assert_close(result.image, to_image_range(thought.final).clamp(0, 1))
    assert torch.equal(result.num_forward, thought.num_forward)
    if rule != "backtracking":  # which takes plain steps as long as they lower the energy
        assert not torch.allclose(result.image, denoiser.denoise(noisy, DenoiseOptions(num_steps=3)).image, atol=1e-4)


def test_input_is_not_clipped():
    noisy = torch.full((1, 3, 16, 16), 1.5)
    noisy[..., :8] = 0.5
    assert not torch.allclose(ebt().denoise(noisy).image, ebt().denoise(noisy.clamp(0, 1)).image, atol=1e-3)


@pytest.mark.parametrize("make", [ebt, regressor, dit])
def test_input_scale_scales_what_the_network_sees(make):
    noisy, scale, options = noisy_images(), 0.8, DenoiseOptions(noise_level=0.01)
    scaled = make()
    scaled.input_scale = scale
    by_hand = to_image_range(scale * to_model_range(noisy))
    torch.testing.assert_close(scaled.denoise(noisy, options).image, make().denoise(by_hand, options).image)


def test_best_of_keeps_the_lowest_energy():
    denoiser, noisy = ebt(), noisy_images(3)
    options = DenoiseOptions(num_steps=2, num_candidates=4, candidate_noise_std=0.5)
    result = denoiser.denoise(noisy, options)
    assert result.candidate_energies.shape == (4, 3)
    assert torch.equal(result.chosen, result.candidate_energies.argmin(0))
    torch.testing.assert_close(result.energies[-1], result.candidate_energies.min(0).values)
    energy = denoiser.model(to_model_range(denoiser.denoise(noisy * 0.1 + 0.45, options).image)).detach() / 16
    torch.testing.assert_close(energy, denoiser.denoise(noisy * 0.1 + 0.45, options).energies[-1], rtol=1e-3, atol=1e-4)
    assert result.num_forward.tolist() == [12] * 3  # (2 steps + the last energy) of 4 candidates
    # The first candidate starts from the image itself.
    plain = denoiser.denoise(noisy, DenoiseOptions(num_steps=2))
    torch.testing.assert_close(plain.candidate_energies[0], result.candidate_energies[0])


def test_seed_and_image_decide_the_noise_and_the_global_stream_does_not():
    denoiser = ebt()
    noisy = noisy_images(1)[[0, 0]]
    options = DenoiseOptions(num_steps=2, num_candidates=2, langevin_std=0.1)
    state = torch.get_rng_state()
    first = denoiser.denoise(noisy, options, image_ids=[1, 2])
    torch.manual_seed(99)
    again = denoiser.denoise(noisy, options, image_ids=[1, 2])
    assert torch.equal(first.candidate_energies, again.candidate_energies)
    assert not torch.allclose(first.candidate_energies[:, 0], first.candidate_energies[:, 1])
    other = denoiser.denoise(noisy, DenoiseOptions(num_steps=2, num_candidates=2, langevin_std=0.1, seed=1), image_ids=[1, 2])
    assert not torch.allclose(first.candidate_energies, other.candidate_energies)
    torch.set_rng_state(state)
    denoiser.denoise(noisy, options)
    assert torch.equal(torch.get_rng_state(), state)


def test_tolerance_stops_early_and_the_energies_keep_their_length():
    result = ebt().denoise(noisy_images(2), DenoiseOptions(num_steps=30, tolerance=0.5))
    assert result.energies.shape == (31, 2)
    assert result.num_steps.max() < 30 and result.num_forward.max() < 31
    assert torch.equal(result.energies[-1], result.energies[-2])


def test_the_trainings_gain_is_per_patch_and_must_be_known():
    """It is an energy per patch, as everything that people are shown, so that it holds for any size."""
    options = DenoiseOptions(num_steps=12, tolerance=0.02, tolerance_of="training")
    noisy = noisy_images(1)
    plain = ebt().denoise(noisy, DenoiseOptions(num_steps=12))
    gains = -plain.energies[:, 0].diff()
    known = float((gains[0] * gains[4] / options.tolerance) ** 0.5)  # the fifth step gains just too little
    stopped = ebt(training_gain=1.0001 * known).denoise(noisy, options)
    assert stopped.num_steps.tolist() == [5] and ebt(training_gain=0.9999 * known).denoise(noisy, options).num_steps.item() > 5
    torch.testing.assert_close(stopped.energies[-1], plain.energies[5])
    with pytest.raises(ValueError, match="has no training_gain"):
        ebt().denoise(noisy, options)


def test_callback_sees_every_step_of_every_candidate_and_can_stop_all():
    seen = []
    options = DenoiseOptions(num_steps=2, num_candidates=2)
    ebt().denoise(noisy_images(1, 10, 10), options, callback=seen.append)
    assert [(step.candidate, step.index) for step in seen] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(step.image.shape == (1, 3, 10, 10) and step.image.max() <= 1 for step in seen)
    assert all(step.energies.shape == (1,) for step in seen)
    stopped = ebt().denoise(noisy_images(1, 10, 10), options, callback=lambda step: step.index == 1)
    assert stopped.candidate_energies.shape == (1, 1) and stopped.num_steps.tolist() == [1]
    torch.testing.assert_close(stopped.image, seen[1].image)


# --- DiT and regressor


def test_dit_modes_are_those_of_the_model():
    noisy = noisy_images()
    x = to_model_range(noisy)
    model = dit().model

    def run(mode: str, **options) -> tuple[torch.Tensor, int]:
        result = dit(mode).denoise(noisy, DenoiseOptions(**options))
        return result.image, int(result.num_forward)

    for (image, passes), expected, count in (
        (run("ddim", num_steps=4, noise_level=0.01), model.ddim(x, 9, 4), 4),
        (run("x0", num_steps=4, noise_level=0.01), model.predict_clean(x, 9), 1),
        (run("recursion", num_steps=2, noise_level=0.01), model.recursion(x, 9, 2), 20),
    ):
        torch.testing.assert_close(image, to_image_range(expected).clamp(0, 1))
        assert passes == count
    with pytest.raises(ValueError, match="use 1..10"):
        run("ddim", num_steps=11, noise_level=0.01)
    with pytest.raises(ValueError, match="mode='ode' is unknown"):
        dit("ode")


def test_dit_takes_a_photograph_at_the_timestep_of_its_noise():
    noisy = noisy_images()
    t = sigma_to_timestep(25.0)
    expected = dit().model.ddim(to_model_range(noisy) * alphas_cumprod()[t].sqrt().float(), t, 3)
    result = dit().denoise(noisy, DenoiseOptions(num_steps=3, sigma=25.0))
    torch.testing.assert_close(result.image, to_image_range(expected).clamp(0, 1))
    assert dit().denoise(noisy, DenoiseOptions(num_steps=50, sigma=0.0)).num_steps.tolist() == [1]  # timestep 0 alone


def test_regressor_stops_where_its_change_is_a_small_share_of_the_first():
    """R(y) = c y on the sample's own c: changes (1 - c)^2 c^2k |x|^2, so their shares of the first are c^2k."""
    factors = torch.tensor([0.5, 0.9, 0.1])

    class Shrink(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            batches.append(len(images))
            return images * factors[ids(images)][:, None, None, None]

    def ids(images: torch.Tensor) -> list[int]:  # the sign pattern of the first pixels names the sample
        return [int((image[0, 0, :3] > 0).int().argmax()) for image in images]

    denoiser, batches = regressor(), []
    noisy = torch.full((3, 3, 16, 16), 0.3)
    for sample in range(3):
        noisy[sample, 0, 0, sample] = 0.7
    denoiser.model = Shrink()
    denoiser.model.register_parameter("one", torch.nn.Parameter(torch.ones(1)))  # tells its dtype
    options = DenoiseOptions(num_steps=8, tolerance=0.05)
    result = denoiser.denoise(noisy, options)
    assert result.num_steps.tolist() == [4, 8, 2]  # 0.25, 0.063, 0.016; 0.81^7 = 0.23; 0.01
    assert torch.equal(result.num_forward, result.num_steps) and batches == [3, 3, 2, 2, 1, 1, 1, 1]
    expected = to_model_range(noisy) * (factors**result.num_steps)[:, None, None, None]
    torch.testing.assert_close(result.image, to_image_range(expected))
    previous = denoiser.denoise(noisy, replace(options, tolerance=0.3, tolerance_of="previous"))
    assert previous.num_steps.tolist() == [2, 8, 2]  # shares of the one before: 0.25, 0.81, 0.01
    with pytest.raises(ValueError, match="tolerance_of='training' needs an energy; use 'first' or 'previous' for regressor"):
        denoiser.denoise(noisy, replace(options, tolerance_of="training"))


def test_regressor_is_applied_to_its_own_output():
    denoiser, noisy = regressor(), noisy_images()
    expected = denoiser.model(denoiser.model(to_model_range(noisy)))
    result = denoiser.denoise(noisy, DenoiseOptions(num_steps=2))
    torch.testing.assert_close(result.image, to_image_range(expected).clamp(0, 1))
    stopped = denoiser.denoise(noisy, DenoiseOptions(num_steps=5), callback=lambda step: step.index == 2)
    assert stopped.num_forward.tolist() == [2]
    torch.testing.assert_close(stopped.image, result.image)


# --- Classical


def checkerboard(height: int = 37, width: int = 45) -> torch.Tensor:
    rows, columns = torch.arange(height)[:, None] // 8, torch.arange(width) // 8
    return (0.25 + 0.5 * ((rows + columns) % 2)).expand(1, 3, height, width)


@pytest.mark.parametrize("name", ["bm3d", "nlm", "identity"])
def test_a_denoiser_without_a_network_is_a_module_like_the_others(name):
    """The benchmark asks every denoiser for its parameters."""
    denoiser = load_denoiser(name)
    assert list(denoiser.parameters()) == [] and denoiser.state_dict() == {} and name in repr(denoiser)


@pytest.mark.parametrize(("make", "gain"), [(BM3DDenoiser, 8.0), (NonLocalMeansDenoiser, 5.0)])
def test_classical_methods_denoise(make, gain):
    clean = checkerboard()
    noisy = add_gaussian_noise(clean, 25.0, torch.Generator().manual_seed(0))
    before = psnr(noisy, clean, data_range=1.0).item()
    result = make().denoise(noisy)
    assert psnr(result.image, clean, data_range=1.0).item() > before + gain
    assert result.num_forward.tolist() == [0]
    too_little = make().denoise(noisy, DenoiseOptions(sigma=2.0))
    assert psnr(too_little.image, clean, data_range=1.0).item() < before + 2.0
    # Smaller than BM3D's blocks, and without noise at all.
    assert make().denoise(noisy[..., :8, :9]).image.shape == (1, 3, 8, 9)
    torch.testing.assert_close(make().denoise(clean, DenoiseOptions(sigma=0.0)).image, clean)


def test_estimated_sigma():
    noisy = add_gaussian_noise(torch.full((2, 3, 64, 64), 0.5), 20.0, torch.Generator().manual_seed(0))
    assert estimate_sigma(noisy) == pytest.approx([20.0, 20.0], rel=0.05)
    noisy[0], noisy[1, 0] = 0.5, 0.5  # one colour; a red channel without noise
    assert estimate_sigma(noisy) == pytest.approx([0.0, 20.0 * 2 / 3], rel=0.05)


def test_without_bm3d_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)  # makes the import fail
    with pytest.raises(MissingExtraError, match=r'pip install "ebt_vision\[classical\]"'):
        load_denoiser("bm3d")


# --- By name


def test_load_denoiser(tmp_path):
    assert isinstance(load_denoiser("identity"), IdentityDenoiser)
    assert load_denoiser("nlm").name == "nlm"
    for made in (ebt(), dit(), regressor()):
        folder = tmp_path / type(made).__name__
        made.model.save_pretrained(folder)
        loaded = load_denoiser(str(folder))
        assert type(loaded) is type(made) and loaded.name == folder.name
        assert (loaded.num_parameters, loaded.tile_size, loaded.patch_size) == (made.model.num_parameters, 16, 4)
        options = DenoiseOptions(noise_level=0.01)
        assert torch.equal(loaded.denoise(noisy_images(), options).image, made.denoise(noisy_images(), options).image)
    with pytest.raises(CheckpointError, match="'nothing' is neither"):
        load_denoiser("nothing")
    assert isinstance(denoiser_for(ebt().model), EBTDenoiser)
