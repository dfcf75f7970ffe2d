"""Thinking from the network's proposal, and the strength of denoising."""

from dataclasses import replace

import pytest
import torch

from ebt_vision.core.thinking import think
from ebt_vision.denoising.base import IdentityDenoiser, energy_from_noise, noise_from_energy
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import DenoiseStep
from ebt_vision.denoising.self_ensemble import turned
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.noise.processes import to_image_range, to_model_range
from ebt_vision.objectives.image import EBTObjective

TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, stem_widths=(4, 8), noise_process="awgn")


def tiny_denoiser(**changes: object) -> EBTDenoiser:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(**(TINY | changes)))  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.output.weight, std=0.1)  # type: ignore[union-attr]
    return EBTDenoiser(model)


def noisy_images(count: int = 2, height: int = 16, width: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_proposal_is_the_first_step_and_brings_the_energy_of_the_observation():
    denoiser, noisy = tiny_denoiser(suggested_start="proposal"), noisy_images()
    model, x = denoiser.model, to_model_range(noisy)
    with torch.no_grad():
        expected = model.reconstruct(x)
    result = denoiser.denoise(noisy, DenoiseOptions(num_steps=3, keep_trajectory=True))
    thought = think(model, expected, step_size=model.step_size.detach(), num_steps=2)
    torch.testing.assert_close(result.image, to_image_range(thought.final).clamp(0, 1))
    patches = 4 * 3
    torch.testing.assert_close(result.energies, torch.cat([model(x)[None], thought.energies]).detach() / patches)
    assert result.trajectory is not None and len(result.trajectory) == 4
    torch.testing.assert_close(result.trajectory[0], noisy)
    torch.testing.assert_close(result.trajectory[1], to_image_range(expected).clamp(0, 1))
    assert result.num_steps.tolist() == [3, 3]
    assert result.num_forward.tolist() == [4, 4]  # the proposal, two gradients, the last energy
    once = denoiser.denoise(noisy, DenoiseOptions(num_steps=1))
    torch.testing.assert_close(once.image, to_image_range(expected).clamp(0, 1))
    assert once.energies is not None and once.energies.shape == (2, 2) and once.num_forward.tolist() == [2, 2]
    quick = denoiser.denoise(noisy, DenoiseOptions(num_steps=1, final_energy=False))
    assert torch.equal(quick.image, once.image) and quick.num_forward.tolist() == [1, 1]
    assert quick.energies is not None and torch.equal(quick.energies, once.energies[:1])
    longer = denoiser.denoise(noisy, DenoiseOptions(num_steps=3, final_energy=False))
    assert longer.energies is not None and torch.equal(longer.energies, result.energies)


def test_the_options_take_precedence_over_the_models_suggestion():
    noisy = noisy_images()
    proposing, observing = tiny_denoiser(suggested_start="proposal"), tiny_denoiser()
    for start in ("observation", "proposal"):
        options = DenoiseOptions(num_steps=2, start=start)  # type: ignore[arg-type]
        images = [denoiser.denoise(noisy, options).image for denoiser in (proposing, observing)]
        torch.testing.assert_close(*images, rtol=0, atol=0)
    assert not torch.allclose(proposing.denoise(noisy).image, observing.denoise(noisy).image)


def test_a_callback_hears_of_every_step_and_can_stop_at_each():
    denoiser, noisy = tiny_denoiser(suggested_start="proposal"), noisy_images(1)
    heard: list[DenoiseStep] = []
    full = denoiser.denoise(noisy, DenoiseOptions(num_steps=3, num_candidates=2, keep_trajectory=True), callback=heard.append)
    assert [(step.candidate, step.index) for step in heard] == [(c, i) for c in range(2) for i in range(4)]
    assert full.candidate_energies is not None and full.candidate_energies.shape == (2, 1)
    for last in range(3):
        result = denoiser.denoise(
            noisy, DenoiseOptions(num_steps=3, keep_trajectory=True), callback=lambda step, last=last: step.index == last
        )
        assert result.num_steps.item() == max(last, 1)  # the proposal is there when its step is told
        torch.testing.assert_close(result.image, heard[max(last, 1)].image)


def test_the_result_does_not_depend_on_the_batch():
    denoiser, noisy = tiny_denoiser(suggested_start="proposal"), noisy_images(3)
    options = DenoiseOptions(num_steps=2, num_candidates=2, tolerance=0.01)
    together = denoiser.denoise(noisy, options, image_ids=[0, 1, 2])
    alone = denoiser.denoise(noisy[1:2], options, image_ids=[1])
    torch.testing.assert_close(together.image[1:2], alone.image, rtol=1e-4, atol=1e-5)


def test_validation_reports_the_proposal_first():
    denoiser, x = tiny_denoiser(suggested_start="proposal"), to_model_range(noisy_images())
    prediction = EBTObjective.predict(denoiser.model, x, None, 3)
    assert len(prediction.images) == 3 and prediction.energies is not None and prediction.energies.shape == (4, 2)
    torch.testing.assert_close(prediction.images[0], denoiser.model.reconstruct(x))
    torch.testing.assert_close(prediction.energies[1], denoiser.model(prediction.images[0]))


def test_strength_0_gives_the_image_back_exactly_and_1_is_plain():
    denoiser, noisy = tiny_denoiser(), noisy_images()
    assert torch.equal(denoiser.denoise(noisy, DenoiseOptions(strength=0.0)).image, noisy)
    plain = denoiser.denoise(noisy, DenoiseOptions()).image
    assert torch.equal(denoiser.denoise(noisy, DenoiseOptions(strength=1.0)).image, plain)


def test_a_strength_below_1_minimises_the_sum_of_energy_and_likelihood():
    """|y - N|^2 / 2 + lambda |y - x|^2 / 2 with lambda = (1 - s) / s has its minimum at x + s (N - x)."""
    denoiser, noisy, strength = tiny_denoiser(suggested_start="proposal"), noisy_images(), 0.4
    options = DenoiseOptions(num_steps=1, keep_trajectory=True)
    denoised = denoiser.denoise(noisy, options).image
    y = noisy.clone().requires_grad_()
    weight = (1 - strength) / strength
    total = 0.5 * (y - denoised).square().sum() + 0.5 * weight * (y - noisy).square().sum()
    (gradient,) = torch.autograd.grad(total, y)
    minimum = noisy - gradient.detach() / (1 + weight)  # Newton's step on a quadratic
    weak = denoiser.denoise(noisy, DenoiseOptions(num_steps=1, keep_trajectory=True, strength=strength))
    torch.testing.assert_close(weak.image, minimum)
    assert weak.trajectory is not None and torch.equal(weak.trajectory[-1], weak.image)


def test_a_strength_above_1_denoises_the_noise_that_was_found_amplified():
    denoiser, noisy = tiny_denoiser(suggested_start="proposal"), noisy_images()
    x = to_model_range(noisy)
    with torch.no_grad():
        found = denoiser.model.reconstruct(x)
        expected = denoiser.model.reconstruct(x + 0.3 * (x - found))
    strong = denoiser.denoise(noisy, DenoiseOptions(num_steps=1, strength=1.3)).image
    torch.testing.assert_close(strong, to_image_range(expected).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(IdentityDenoiser().denoise(noisy, DenoiseOptions(strength=1.5)).image, noisy)


def test_tiles_keep_the_strength():
    denoiser, noisy = tiny_denoiser(), noisy_images(1, 40, 24)
    assert torch.allclose(denoiser.denoise(noisy, DenoiseOptions(strength=0.0)).image, noisy, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [dict(strength=-0.1), dict(strength=1.6), dict(start="middle"), dict(strength=float("nan")), dict(clean_below=256.0)],
)
def test_options_out_of_range_are_refused(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes))):
        DenoiseOptions(**changes)


def test_a_linear_head_has_no_proposal():
    with pytest.raises(ValueError, match="needs energy_head='quadratic'"):
        PatchEBTConfig(img_size=8, patch_size=2, embed_dim=16, num_heads=2, energy_head="linear", suggested_start="proposal")


def test_the_first_energy_gives_the_noise_in_8_bit_units():
    x, patch_size = torch.zeros(1, 3, 64, 64), 4
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 20 / 127.5
    energy = 0.5 * noise.square().sum().item() / (64 // patch_size) ** 2  # a perfect reconstruction, mean over patches
    assert noise_from_energy(energy, patch_size) == pytest.approx(20, rel=0.03)
    assert noise_from_energy(0.0, 8) == 0.0 and noise_from_energy(0.5 * 3 * 64, 8) == pytest.approx(127.5)
    with pytest.raises(ValueError, match="energy=-1"):
        noise_from_energy(-1.0, 8)
    assert noise_from_energy(energy_from_noise(7.5, 8), 8) == pytest.approx(7.5)


# --- Images that are already clean


def two_noises() -> tuple[EBTDenoiser, torch.Tensor, float]:
    """Return a denoiser, two images, and a standard deviation between the noise that it sees in the first and in the second."""
    denoiser = tiny_denoiser(suggested_start="proposal")
    noisy = noisy_images() * torch.tensor([0.1, 1.0]).reshape(2, 1, 1, 1)
    noisy[0] += 0.45
    energies = denoiser.denoise(noisy, DenoiseOptions(num_steps=1)).energies
    assert energies is not None
    first, second = (noise_from_energy(float(energy), 4) for energy in energies[0])
    assert first < 0.9 * second
    return denoiser, noisy, (first + second) / 2


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("final_energy", [True, False])
def test_a_clean_image_takes_no_step_and_keeps_every_pixel(num_steps: int, final_energy: bool):
    denoiser, noisy, between = two_noises()
    options = DenoiseOptions(num_steps=num_steps, final_energy=final_energy, keep_trajectory=num_steps > 1)
    steps: list[DenoiseStep] = []
    plain = denoiser.denoise(noisy, options)
    kept = denoiser.denoise(noisy, replace(options, clean_below=between), callback=steps.append)
    assert kept.num_steps.tolist() == [0, num_steps] and torch.equal(kept.num_forward, plain.num_forward)
    assert torch.equal(kept.image[0], noisy[0]) and torch.equal(kept.image[1], plain.image[1])
    assert not torch.equal(plain.image[0], noisy[0])
    assert plain.energies is not None and kept.energies is not None
    assert torch.equal(kept.energies[:, 1], plain.energies[:, 1])
    assert torch.equal(kept.energies[:, 0], plain.energies[0, 0].expand(len(plain.energies)))
    for image in [*(kept.trajectory or ()), *(step.image for step in steps)]:
        assert torch.equal(image[0], noisy[0])
    assert torch.equal(denoiser.denoise(noisy, replace(options, clean_below=0.0)).image, plain.image)


def test_each_tile_is_judged_for_itself():
    denoiser, noisy, between = two_noises()
    wide = torch.cat([noisy[:1], noisy[1:]], dim=3)  # the halves of one image
    wide = torch.cat([wide[..., :12].repeat(1, 1, 1, 2)[..., :16], wide[..., 12:].repeat(1, 1, 1, 2)[..., :16]], dim=3)
    options = DenoiseOptions(num_steps=1, clean_below=between)
    result = denoise_tiled(denoiser, wide, options, tile_size=16, overlap=0)
    assert torch.equal(result.image[..., :16], wide[..., :16]) and not torch.equal(result.image[..., 16:], wide[..., 16:])
    assert result.num_steps.tolist() == [1]


def test_the_model_suggests_when_an_image_is_clean():
    denoiser, noisy, between = two_noises()
    suggesting = tiny_denoiser(suggested_start="proposal", suggested_clean_below=between)
    options = DenoiseOptions(num_steps=1, clean_below=between)
    assert torch.equal(suggesting.denoise(noisy, DenoiseOptions(num_steps=1)).image, denoiser.denoise(noisy, options).image)
    assert suggesting.denoise(noisy, DenoiseOptions(num_steps=1)).num_steps.tolist() == [0, 1]
    assert suggesting.denoise(noisy, DenoiseOptions(num_steps=1, start="observation")).num_steps.tolist() == [1, 1]
    with pytest.raises(ValueError, match="clean_below=3 needs a start from the proposal"):
        suggesting.denoise(noisy, DenoiseOptions(num_steps=1, start="observation", clean_below=3.0))
    with pytest.raises(ValueError, match="suggested_clean_below needs suggested_start='proposal'"):
        tiny_denoiser(suggested_clean_below=1.0)
    with pytest.raises(ValueError, match="suggested_clean_below=-1 is not in 0..255"):
        tiny_denoiser(suggested_start="proposal", suggested_clean_below=-1.0)


def test_the_copies_of_a_self_ensemble_decide_together_and_keep_the_dtype():
    denoiser, noisy, between = two_noises()
    noisy = noisy.double() / 3  # values that float32 cannot hold
    plain = denoiser.denoise(noisy, DenoiseOptions(num_steps=1, self_ensemble=8))
    assert plain.energies is not None
    first, second = plain.energies[0].tolist()
    each = [denoiser.denoise(turned(noisy, copy), DenoiseOptions(num_steps=1)).energies for copy in range(8)]
    highest = max(float(energies[0, 0]) for energies in each if energies is not None)
    assert first < highest < second  # a copy alone would take its step
    limit = noise_from_energy(first * 1.0001, 4)
    for strength in (1.0, 1.5):
        result = denoiser.denoise(noisy, DenoiseOptions(num_steps=1, self_ensemble=8, clean_below=limit, strength=strength))
        assert torch.equal(result.image[0], noisy[0]) and result.num_steps.tolist() == [0, 1]
        assert not torch.equal(result.image[1], noisy[1])


def test_images_of_the_vp_process_always_take_their_steps():
    denoiser, noisy, between = two_noises()
    options = DenoiseOptions(num_steps=1, noise_level=0.1)
    assert torch.equal(
        denoiser.denoise(noisy, replace(options, clean_below=255.0)).image, denoiser.denoise(noisy, options).image
    )


def test_candidates_of_a_clean_image_are_the_image():
    denoiser, noisy, between = two_noises()
    options = DenoiseOptions(num_steps=2, num_candidates=3, clean_below=between, keep_candidates=True)
    result = denoiser.denoise(noisy, options)
    assert result.candidate_images is not None and result.candidate_energies is not None and result.energies is not None
    assert torch.equal(result.candidate_images[:, 0], noisy[:1].expand(3, -1, -1, -1))
    assert torch.equal(result.candidate_energies[:, 0], result.energies[:1, 0].expand(3))
    assert not torch.equal(result.candidate_images[0, 1], result.candidate_images[1, 1])


def test_stopping_a_strong_run_does_not_begin_the_second():
    denoiser, noisy = tiny_denoiser(), noisy_images(1)
    heard: list[int] = []
    stop = lambda step: heard.append(step.index) or step.index == 1  # noqa: E731
    strong = denoiser.denoise(noisy, DenoiseOptions(num_steps=2, strength=1.5), callback=stop)
    assert heard == [0, 1]
    torch.testing.assert_close(strong.image, denoiser.denoise(noisy, DenoiseOptions(num_steps=1)).image)


def test_the_model_may_suggest_to_stop_at_a_share_of_the_observation_s_energy():
    noisy, results = noisy_images(), []
    for tolerance in (1e9, 1e-9):
        stopping = dict(suggested_tolerance=tolerance, suggested_tolerance_of="observation")
        denoiser = tiny_denoiser(suggested_start="proposal", suggested_steps=3, **stopping)
        assert denoiser.suggested_options.tolerance_of == "observation"
        results.append(denoiser.denoise_whole(noisy))
    at_once, all_steps = results
    assert at_once.num_steps.tolist() == [1, 1] and at_once.num_forward.tolist() == [2, 2]  # the proposal and its energy
    torch.testing.assert_close(at_once.image, denoiser.denoise_whole(noisy, DenoiseOptions(num_steps=1)).image)
    assert at_once.energies is not None and at_once.energies.shape == (4, 2)  # the last is repeated
    assert torch.equal(at_once.energies[1], at_once.energies[3])
    assert all_steps.num_forward.min() > 2
    with pytest.raises(ValueError, match="suggested_tolerance_of='first' is unknown; use 'training' or 'observation'"):
        tiny_denoiser(suggested_tolerance_of="first")
