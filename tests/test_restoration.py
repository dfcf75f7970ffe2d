"""restore(): solvers, tiles, what is reported, what is refused; and the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ebt_vision.cli import main
from ebt_vision.core.metrics import psnr
from ebt_vision.core.rng import sample_generators
from ebt_vision.data.decoded import TurnedImage, _orient
from ebt_vision.denoising.base import IdentityDenoiser, for_photographs
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.denoising.self_ensemble import turned, turned_back
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.restoration import solvers
from ebt_vision.restoration.jpeg import JpegIntervals, JpegTables
from ebt_vision.restoration.likelihoods import Convolution, Downsampling, Mask, UserOperator, gaussian_kernel
from ebt_vision.restoration.options import RestoreOptions, RestoreStep
from ebt_vision.restoration.prior import Prior, TiledEnergy, tile_side
from ebt_vision.restoration.restore import restore
from ebt_vision.restoration.solvers import NOISE_STREAM, BlockNoise, complete, noise_levels, start_holes


def tiny_ebt() -> EBTDenoiser:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2, init_step_size=0.3))
    nn.init.normal_(model.head.weight, std=0.05)
    return EBTDenoiser(model)


class Recorder(IdentityDenoiser):
    """Counts the tiles that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.tile_size = 16
        self.batches: list[int] = []  # shared with copies

    @property
    def num_tiles(self) -> int:
        return sum(self.batches)

    def _denoise(self, noisy, options, image_ids, callback):
        self.batches.append(len(noisy))
        return super()._denoise(noisy, options, image_ids, callback)


def image(height: int = 37, width: int = 45, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def holes(height: int = 37, width: int = 45) -> Mask:
    return Mask(torch.rand(height, width, generator=torch.Generator().manual_seed(3)) < 0.6)


@pytest.mark.parametrize("solver", ["splitting", "renoising", "descent"])
def test_known_pixels_come_back_bit_for_bit(solver) -> None:
    observed, mask = image(), holes()
    kept = observed.clone()
    result = restore(observed, mask, RestoreOptions(solver=solver, num_steps=2), denoiser=tiny_ebt())
    assert torch.equal(observed, kept)
    known = mask.known.expand_as(observed)
    assert torch.equal(result.image[known], observed[known])
    assert float((result.image[~known] - observed[~known]).abs().min()) >= 0
    assert not torch.equal(result.image, observed)
    assert result.likelihoods == (0.0, 0.0) and len(result.energies) == len(result.sums) == 2
    assert result.sums == pytest.approx(result.energies)


def test_only_tiles_that_touch_a_hole_are_worked_on() -> None:
    known = torch.ones(200, 200, dtype=torch.bool)
    known[100:103, 40:44] = False
    denoiser = Recorder()
    result = restore(image(200, 200), Mask(known), RestoreOptions(num_steps=3), denoiser=denoiser)
    assert 3 <= denoiser.num_tiles <= 3 * 9  # the grid of the whole image has more than 200
    assert torch.equal(result.image[..., known], image(200, 200)[..., known])
    whole = Recorder()
    restore(image(200, 200), Mask(torch.rand(200, 200) < 0.5), RestoreOptions(num_steps=1), denoiser=whole)
    assert whole.num_tiles > 200


def test_a_long_scratch_costs_its_own_tiles_and_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window around a diagonal is the whole image; 25 x 25 tiles of 16 px with a stride of 12 or more cover it."""
    known = ~torch.eye(300, dtype=torch.bool)
    monkeypatch.setattr(Prior, "denoise", lambda *_: pytest.fail("this works on whole images"))
    denoiser = Recorder()
    restore(image(300, 300), Mask(known), RestoreOptions(num_steps=1), denoiser=denoiser)
    assert 25 <= denoiser.num_tiles <= 4 * 25  # at most two tiles beside each other a row, and their overlap
    noise = BlockNoise(7, (2000, 1100), torch.ones(2000, 1100).tril(-1540) > 0, reach=16)  # from row 1540 on
    assert noise.blocks == {
        6: (slice(1024, 1536), slice(0, 512)),
        9: (slice(1536, 2048), slice(0, 512)),
    }
    (expected,) = sample_generators(7, [6], NOISE_STREAM)
    drawn = noise.draw(0.5)[..., 1024:1536, :512]
    torch.testing.assert_close(drawn, 0.5 * torch.randn(1, 3, 512, 512, generator=expected))
    assert not torch.equal(drawn.clone(), noise.draw(0.5)[..., 1024:1536, :512])


@pytest.mark.parametrize("step", [0, 3])
def test_filling_is_denoising_at_the_missing_pixels(step: int) -> None:
    x, noise, region = image(), 0.1 * image(seed=1), ~holes().known[0, 0]
    region[:, 25:] = False
    prior = Prior(tiny_ebt(), tile_size=None, moving=True, region=region)
    filled, expected = prior.fill(x.clone(), step, noise), prior.denoise(x + noise, step)
    torch.testing.assert_close(filled.image[..., region], expected.image[..., region], atol=1e-6, rtol=0)
    assert torch.equal(filled.image[..., ~region], x[..., ~region])
    assert (filled.energy, filled.num_forward) == (pytest.approx(expected.energy), expected.num_forward)


def test_holes_are_filled_the_same_whatever_lies_far_away() -> None:
    known = torch.ones(120, 120, dtype=torch.bool)
    known[60:64, 60:64] = False
    changed = image(120, 120)
    changed[..., :20, :] = 0.5
    options = RestoreOptions(num_steps=2)
    a, b = (restore(x, Mask(known), options, denoiser=tiny_ebt()).image for x in (image(120, 120), changed))
    assert torch.equal(a[..., 60:64, 60:64], b[..., 60:64, 60:64])


def test_the_grid_of_tiles_moves_and_leaves_no_seam() -> None:
    denoiser = IdentityDenoiser()
    denoiser.tile_size = 16
    prior, x = Prior(denoiser, tile_size=None, moving=True), image()
    assert len({prior.shift(step, x) for step in range(8)}) == 8
    assert all(0 <= side < 4 for step in range(8) for side in prior.shift(step, x))
    for step in range(3):
        torch.testing.assert_close(prior.denoise(x, step).image, x, atol=1e-6, rtol=0)
    assert Prior(denoiser, tile_size=None, moving=False).shift(5, x) == (0, 0)


def test_tiles_have_the_training_size_of_a_network() -> None:
    sizes = dict(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    conv = RegressorDenoiser(PatchRegressor(PatchRegressorConfig(**sizes, stem_widths=(8, 8), stem_unshuffle=2)))
    assert (conv.tile_size, tile_side(conv, None), tile_side(conv, 96), tile_side(IdentityDenoiser(), None)) == (
        96,
        64,
        96,
        512,
    )
    assert Prior(conv, tile_size=None, moving=False).overlap == 8


class RightNeighbour(IdentityDenoiser):
    """Moves the image by one pixel to the left: not the same on a mirrored or rotated copy."""

    def _denoise(self, noisy, options, image_ids, callback):
        result = super()._denoise(noisy, options, image_ids, callback)
        return replace(result, image=result.image.roll(-1, -1))


def test_each_step_denoises_another_copy_of_the_tiles() -> None:
    x = image(16, 16)
    prior = Prior(RightNeighbour(), tile_size=16, moving=False, turning=True, first_copy=6)
    for step, copy in enumerate((6, 7, 0, 1, 2)):
        expected = turned_back(turned(x, copy).roll(-1, -1), copy)
        torch.testing.assert_close(prior.denoise(x, step).image, expected)
    same = Prior(RightNeighbour(), tile_size=16, moving=False)
    assert all(torch.equal(same.denoise(x, step).image, x.roll(-1, -1)) for step in range(3))


def test_copies_of_tiles_that_are_no_squares_come_back_in_place() -> None:
    x = image(37, 45)
    prior = Prior(IdentityDenoiser(), tile_size=16, moving=True, turning=True, region=~holes().known[0, 0])
    for step in range(8):
        torch.testing.assert_close(prior.denoise(x, step).image, x, atol=1e-6, rtol=0)
        noise = 0.2 * image(37, 45, seed=1) - 0.1
        expected = torch.where(prior.region, (x + noise).clamp(0, 1), x)
        torch.testing.assert_close(prior.fill(x.clone(), step, noise).image, expected, atol=1e-6, rtol=0)


def test_the_seed_chooses_the_first_copy() -> None:
    observed, mask = image(), holes()
    options = RestoreOptions(solver="splitting", num_steps=1, turning_tiles=False)
    chosen = (options, *(replace(options, seed=seed, turning_tiles=True) for seed in (0, 8, 5)))
    plain, first, again, other = (restore(observed, mask, o, denoiser=tiny_ebt()).image for o in chosen)
    assert torch.equal(plain, first) and torch.equal(plain, again)  # copy 0 is the tile itself
    assert not torch.equal(plain, other)


def test_descent_never_raises_the_sum_on_a_grid_that_stays() -> None:
    blur = Convolution(gaussian_kernel(1.0), circular=True)
    observed = blur.apply(0.4 + 0.2 * image())  # no pixel is clamped at the end
    options = RestoreOptions(solver="descent", num_steps=5, moving_tiles=False, noise=0.0)
    result = restore(observed, blur, options, denoiser=tiny_ebt())
    sums = [value for value in result.sums if value is not None]
    assert len(sums) == 5 and all(after <= before + 1e-4 for before, after in zip(sums, sums[1:], strict=False))
    assert sums[-1] < sums[0]
    prior = Prior(for_photographs(tiny_ebt()), tile_size=None, moving=False)
    total = TiledEnergy(prior, lambda y: blur.value(y, observed), 1 / 0.23)
    expected = float(total.at_step(5)(result.image).detach()) / total.num_patches(observed)
    assert sums[-1] == pytest.approx(expected, rel=1e-3)


def test_the_energy_over_tiles_is_the_models_own_on_one_tile() -> None:
    denoiser, x = tiny_ebt(), image(16, 16)
    total = TiledEnergy(Prior(denoiser, tile_size=None, moving=False), lambda y: torch.ones(len(y)), 2.0)
    torch.testing.assert_close(total.energy(x, 0), denoiser.model(2 * x - 1))
    torch.testing.assert_close(total.at_step(0)(x), denoiser.model(2 * x - 1) + 8.0)
    with pytest.raises(ValueError, match="no energy to descend"):
        restore(image(), holes(), RestoreOptions(solver="descent"), denoiser=IdentityDenoiser())


def test_splitting_explains_the_observation() -> None:
    blur = Convolution(gaussian_kernel(1.2))
    observed = blur.apply(image(48, 48))
    assert observed.shape[-1] == 38
    result = restore(observed, blur, RestoreOptions(solver="splitting", num_steps=4, noise=1.0), denoiser=IdentityDenoiser())
    assert result.image.shape == observed.shape
    start = float(blur.value(blur.start(observed), observed)) / observed.numel()
    assert max(result.likelihoods) < 0.01 * start and result.likelihoods[-1] < result.likelihoods[0]
    assert result.energies == result.sums == (None,) * 4 and result.num_forward == 0


def test_upscaling_and_a_users_operator() -> None:
    small = Downsampling(3).apply(image(36, 45))
    result = restore(small, Downsampling(3), RestoreOptions(solver="splitting", num_steps=2), denoiser=IdentityDenoiser())
    assert result.image.shape == (1, 3, 36, 45) and result.likelihoods[-1] < 1e-4
    half = UserOperator(lambda x: 0.5 * x, lambda y: 0.5 * y, size=(16, 16))
    result = restore(0.5 * image(16, 16), half, RestoreOptions(noise=0.0), denoiser=IdentityDenoiser())
    torch.testing.assert_close(result.image, image(16, 16), atol=1e-3, rtol=0)


def test_deblocking_stays_within_the_intervals(tmp_path: Path) -> None:
    path = write_jpeg(tmp_path / "a.jpg")
    decoded = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
    likelihood = JpegIntervals(JpegTables.of_file(path))
    result = restore(decoded, likelihood, RestoreOptions(num_steps=2), denoiser=tiny_ebt())
    assert not torch.equal(result.image, decoded)
    assert float(likelihood.value(result.image, decoded).sum()) < 1e-6


@pytest.mark.parametrize("side", [40, 700])
def test_holes_start_from_the_pixels_around_them(side: int) -> None:
    """With a denoiser that changes nothing, the holes keep their start: the mean of their surroundings, never black."""
    known = torch.ones(side, side, dtype=torch.bool)
    known[5:9, 3:30] = False
    known[-3:, :] = False
    flat = torch.full((1, 3, side, side), 0.6)
    damaged = torch.where(known, flat, torch.zeros(()))
    options = RestoreOptions(solver="splitting", num_steps=2)
    torch.testing.assert_close(restore(damaged, Mask(known), options, denoiser=IdentityDenoiser()).image, flat)
    assert torch.equal(start_holes(damaged, ~known)[..., known], damaged[..., known])


def test_a_hole_larger_than_a_block_starts_from_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "NOISE_BLOCK", 8)
    monkeypatch.setattr(solvers, "START_MARGIN", 4)
    known = torch.ones(40, 40, dtype=torch.bool)
    known[4:36, 4:36] = False
    damaged = torch.where(known, torch.full((1, 3, 40, 40), 0.6), torch.zeros(()))
    torch.testing.assert_close(start_holes(damaged, ~known), torch.full((1, 3, 40, 40), 0.6))


def test_the_shipped_energy_fills_holes_better_than_their_start() -> None:
    """A picture with edges and half of its pixels missing: the default must gain at least 2 dB over the nearest means."""
    rows, columns = torch.arange(64)[:, None] / 7.0, torch.arange(64) / 5.0
    waves = torch.stack([torch.sin(rows + k) * torch.cos(columns * (1 + k / 3)) for k in range(3)])[None]
    clean = 0.2 + 0.6 * (waves > 0).float()
    mask = Mask(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5)
    damaged = mask.apply(clean)
    before, after = (psnr(image, clean, data_range=1.0).item() for image in (mask.start(damaged), restore(damaged, mask).image))
    assert after > before + 2.0


def test_renoising_draws_from_its_seed_alone() -> None:
    denoiser = tiny_ebt()
    state = torch.get_rng_state()
    first, again, other = (
        restore(image(), holes(), RestoreOptions(num_steps=2, seed=seed), denoiser=denoiser).image for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("damage", ["holes", "enlargement"])
def test_several_runs_give_the_mean_of_the_runs_with_the_next_seeds(damage: str) -> None:
    likelihood = holes() if damage == "holes" else Downsampling(2)
    denoiser, options = tiny_ebt(), RestoreOptions(num_steps=2, noise=0.0, num_averaged=1, seed=5, keep_trajectory=True)
    single = [restore(image(), likelihood, replace(options, seed=seed), denoiser=denoiser) for seed in (5, 6, 7)]
    steps: list[RestoreStep] = []
    mean = restore(image(), likelihood, replace(options, num_runs=3), denoiser=denoiser, callback=steps.append)
    torch.testing.assert_close(mean.image, sum(each.image for each in single) / 3)
    assert not torch.allclose(single[0].image, single[1].image)
    if damage == "holes":
        assert torch.equal(mean.image[..., likelihood.known[0, 0]], image()[..., likelihood.known[0, 0]])
    assert mean.num_runs == 3 and all(each.num_runs == 1 for each in single)
    assert mean.num_forward == sum(each.num_forward for each in single)
    assert mean.energies == tuple(energy for each in single for energy in each.energies)
    assert mean.trajectory is not None and len(mean.trajectory) == 6
    assert [(step.index, step.num_steps) for step in steps] == [(number, 6) for number in range(1, 7)]
    torch.testing.assert_close(steps[-1].image, mean.image)
    for stop, finished in ((3, 1), (4, 2), (1, 0)):
        runs = replace(options, num_runs=3)
        stopped = restore(image(), likelihood, runs, denoiser=denoiser, callback=lambda step, stop=stop: step.index == stop)
        if finished:
            torch.testing.assert_close(stopped.image, sum(each.image for each in single[:finished]) / finished)
        assert len(stopped.energies) == stop


def test_the_default_number_of_runs_suits_the_damage_and_other_settings_have_one() -> None:
    for likelihood, runs in ((holes(), 2), (Downsampling(2), 1), (Convolution(gaussian_kernel(1.0)), 3)):
        assert complete(RestoreOptions(), likelihood, image()).num_runs == runs
    for options in (RestoreOptions(num_steps=3), RestoreOptions(solver="splitting"), RestoreOptions(num_runs=1)):
        assert complete(options, holes(), image()).num_runs == 1
    denoiser = tiny_ebt()
    blur = Convolution(gaussian_kernel(1.0))
    result = restore(image(), blur, denoiser=denoiser)
    single = restore(image(), blur, RestoreOptions(num_runs=1), denoiser=denoiser)
    assert result.num_runs == 3 and result.num_forward == 3 * single.num_forward


def test_several_runs_keep_known_pixels_of_any_dtype() -> None:
    known = holes().known[0, 0]
    for dtype in (torch.float32, torch.float64):
        exact = image().to(dtype) / 3
        mean = restore(exact, holes(), RestoreOptions(num_steps=1, num_runs=7), denoiser=tiny_ebt())
        assert torch.equal(mean.image[..., known], exact[..., known])


def test_several_runs_need_a_solver_with_noise() -> None:
    with pytest.raises(ValueError, match="num_runs=2 needs noise; solver='splitting'"):
        restore(image(), holes(), RestoreOptions(num_runs=2, solver="splitting"), denoiser=tiny_ebt())
    with pytest.raises(ValueError, match="num_runs=0"):
        RestoreOptions(num_runs=0)


def test_options_are_filled_in_and_the_noise_of_a_blurred_image_is_estimated() -> None:
    blur = Convolution(gaussian_kernel(1.6), circular=True)
    noisy = blur.apply(image(96, 96)) + 4 / 255 * torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    filled = complete(RestoreOptions(), blur, noisy)
    assert filled.solver == "renoising" and filled.noise == pytest.approx(4.0, rel=0.15)
    assert complete(RestoreOptions(num_steps=3), holes(), image()).noise == 0.0
    levels = noise_levels(RestoreOptions(num_steps=3, num_averaged=1, first_sigma=51, last_sigma=2.04))
    assert levels == pytest.approx([0.2, 0.04, 0.008])
    levels = noise_levels(RestoreOptions(num_steps=5, num_averaged=3, first_sigma=51, last_sigma=2.04))
    assert levels == pytest.approx([0.2, 0.04, 0.008, 0.008, 0.008])
    assert complete(RestoreOptions(num_steps=13), holes(), image()).num_averaged == 8  # the suggested share of the steps
    assert complete(RestoreOptions(solver="splitting"), holes(), image()).num_averaged == 1
    assert complete(RestoreOptions(), holes(), image()).moving_tiles is True
    assert complete(RestoreOptions(moving_tiles=False), holes(), image()).moving_tiles is False
    jpeg = JpegIntervals(JpegTables(luma=(16,) * 64, chroma=(16,) * 64, subsampling=(1, 1)))
    assert complete(RestoreOptions(), jpeg, image()).moving_tiles is False  # blocks in line with the patches
    assert complete(RestoreOptions(moving_tiles=True), jpeg, image()).moving_tiles is True
    with pytest.raises(ValueError, match="num_averaged=4 .*use 1 to num_steps"):
        RestoreOptions(num_steps=3, num_averaged=4)


@pytest.mark.parametrize("likelihood", ["holes", "down"])
def test_the_last_images_are_averaged(likelihood: str) -> None:
    damage = holes() if likelihood == "holes" else Downsampling(2)
    observed = image() if likelihood == "holes" else damage.apply(image(32, 32))
    options = RestoreOptions(num_steps=5, num_averaged=3, keep_trajectory=True)
    averaged = restore(observed, damage, options, denoiser=tiny_ebt())
    assert averaged.trajectory is not None
    single = restore(observed, damage, replace(options, num_averaged=1, first_sigma=40.0, last_sigma=40.0), denoiser=tiny_ebt())
    again = restore(observed, damage, replace(options, first_sigma=40.0, last_sigma=40.0), denoiser=tiny_ebt())
    assert single.trajectory is not None and again.trajectory is not None
    x, m = [step.double() for step in single.trajectory], [step.double() for step in again.trajectory]
    for step in range(3):
        torch.testing.assert_close(m[step], x[step], atol=1e-6, rtol=0)
    inside = ((torch.stack(x[2:]) > 0) & (torch.stack(x[2:]) < 1)).all(0)  # clamping does not commute with means
    torch.testing.assert_close(m[3][inside], ((x[2] + x[3]) / 2)[inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(m[4][inside], ((x[2] + x[3] + x[4]) / 3)[inside], atol=1e-6, rtol=0)
    assert torch.equal(averaged.image, averaged.trajectory[-1])


def test_a_callback_sees_whole_images_and_ends_the_work() -> None:
    known = torch.ones(80, 80, dtype=torch.bool)
    known[40, 40] = False
    seen = []

    def stop(step):
        seen.append(step)
        return step.index == 2

    options = RestoreOptions(num_steps=5, keep_trajectory=True)
    result = restore(image(80, 80), Mask(known), options, denoiser=tiny_ebt(), callback=stop)
    assert [step.index for step in seen] == [1, 2] and seen[0].num_steps == 5
    assert seen[1].image.shape == (1, 3, 80, 80) and torch.equal(seen[1].image, result.image)
    assert result.trajectory is not None and len(result.trajectory) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_turn_back(orientation: int) -> None:
    stored = torch.arange(12).reshape(1, 3, 4)
    turned = TurnedImage(orientation)
    upright = turned.upright(stored)
    assert np.array_equal(upright[0].numpy(), _orient(stored.permute(1, 2, 0).numpy(), orientation)[..., 0])
    assert torch.equal(turned.as_stored(upright), stored)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: restore(image(), holes(37, 44), denoiser=IdentityDenoiser()), "the mask is 44x37 px"),
        (lambda: restore(image().expand(2, -1, -1, -1), holes(), denoiser=IdentityDenoiser()), "one image at a time"),
        (lambda: restore(image() * 255, holes(), denoiser=IdentityDenoiser()), "divide 0..255 by 255"),
        (lambda: RestoreOptions(solver="magic"), "use one of splitting"),  # type: ignore[arg-type]
        (lambda: RestoreOptions(num_steps=0), "use 1 or more"),
        (lambda: RestoreOptions(prior_weight=0), "above 0"),
        (lambda: restore(image(), holes(), RestoreOptions(tile_size=4), denoiser=IdentityDenoiser()), "tile_size=4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def write_jpeg(path: Path, *, size: tuple[int, int] = (48, 32), orientation: int = 1) -> Path:
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = 127 + 60 * np.sin(0.3 * rows) * np.cos(0.2 * columns)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.stack([waves, waves.T.T * 0.8, 255 - waves], -1).astype(np.uint8)).save(
        path, quality=10, subsampling=0, exif=exif
    )
    return path


def write_png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def pixels(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, channels), dtype=np.uint8)


COMMON = ["--model", "identity", "--steps", "2", "--device", "cpu"]


def test_command_inpaint_keeps_every_other_pixel(tmp_path: Path) -> None:
    source = write_png(tmp_path / "a.png", pixels())
    mask = np.zeros((24, 32), np.uint8)
    mask[8:12, 8:12] = 255
    write_png(tmp_path / "mask.png", mask)
    command = ["restore", "inpaint", str(source), "--mask", str(tmp_path / "mask.png"), "--output", str(tmp_path / "out")]
    assert main([*command, *COMMON]) == 0
    result = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(result[mask == 0], pixels()[mask == 0])
    assert not np.array_equal(result[mask > 0], pixels()[mask > 0])


def test_command_inpaint_fills_transparent_pixels(tmp_path: Path) -> None:
    array = pixels(channels=4)
    array[..., 3] = 255
    array[3:6, 3:6, 3] = 0
    write_png(tmp_path / "a.png", array)
    assert main(["restore", "inpaint", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), *COMMON]) == 0
    result = Image.open(tmp_path / "out" / "a.png")
    assert result.mode == "RGB"
    shown = array[..., 3] == 255
    assert np.array_equal(np.asarray(result)[shown], array[..., :3][shown])


def test_command_deblur_upscale_and_deblock(tmp_path: Path) -> None:
    source, jpeg = write_png(tmp_path / "a.png", pixels()), write_jpeg(tmp_path / "b.jpg", orientation=6)
    np.savetxt(tmp_path / "k.txt", np.full((3, 3), 1 / 9))
    out = ["--output", str(tmp_path / "out"), *COMMON]
    assert main(["restore", "deblur", str(source), "--kernel", str(tmp_path / "k.txt"), *out]) == 0
    assert main(["restore", "upscale", str(source), "--scale", "2", "--overwrite", *out]) == 0
    assert Image.open(tmp_path / "out" / "a.png").size == (64, 48)
    assert main(["restore", "deblock", str(jpeg), *out]) == 0
    assert Image.open(tmp_path / "out" / "b.png").size == (32, 48)  # upright
    upright = np.rot90(np.asarray(Image.open(jpeg)), -1).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "out" / "b.png")).astype(int) - upright).max() <= 1  # identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inpaint", "a.png"], "a.png has no transparent pixels to fill in"),
        (["inpaint", "a.png", "--mask", "small.png"], "the mask is 10x10 px, the image 32x24"),
        (["inpaint", "a.png", "--mask", "black.png"], "black.png has no white pixels, so nothing is missing; make"),
        (["inpaint", "a.png", "--mask", "white.png"], "white.png is white everywhere"),
        (["inpaint", "clear.png"], "clear.png is transparent everywhere"),
        (["deblur", "a.png", "--kernel", "k.txt"], "sums to 2"),
        (["deblur", "a.png", "--kernel", "none.npy"], "does not exist"),
        (
            ["deblur", "a.png", "--kernel", "empty.txt"],
            "empty.txt cannot be read as a kernel (it is empty); give rows",
        ),
        (
            ["deblur", "a.png", "--kernel", "complex.npy"],
            "complex.npy cannot be read as a kernel (1 values of type complex",
        ),
        (["upscale", "a.png", "--output", "taken"], "its result taken/a.png is a folder; choose another --output"),
        (["deblur", "a.png", "--sigma", "9"], "smaller than the image"),
        (["deblock", "a.png"], "is a PNG file, not a JPEG"),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "a.png", pixels())
    write_png(tmp_path / "small.png", np.eye(10, dtype=np.uint8) * 255)
    write_png(tmp_path / "black.png", np.zeros((24, 32), np.uint8))
    write_png(tmp_path / "white.png", np.full((24, 32), 255, np.uint8))
    write_png(tmp_path / "clear.png", np.zeros((24, 32, 4), np.uint8))
    (tmp_path / "taken" / "a.png").mkdir(parents=True)
    np.savetxt("k.txt", np.full((1, 1), 2.0))
    np.save("complex.npy", np.full((1, 1), 1 + 1j))
    (tmp_path / "empty.txt").touch()
    out = [] if "--output" in arguments else ["--output", "out"]
    assert main(["restore", *arguments, *out, *COMMON]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[0] and len(lines) <= 2 and "Traceback" not in "".join(lines)


def test_command_deblurs_an_image_of_one_colour(tmp_path: Path) -> None:
    flat = np.full((24, 32, 3), (200, 90, 10), np.uint8)
    source = write_png(tmp_path / "flat.png", flat)
    words = ["restore", "deblur", str(source), "--sigma", "1", "--solver", "splitting"]
    assert main([*words, "--output", str(tmp_path / "out"), *COMMON]) == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "out" / "flat.png")).astype(int) - flat).max() <= 1


def test_a_small_image_is_a_kernel(tmp_path: Path) -> None:
    """A white pixel in the middle of 3x3 black ones blurs nothing, and without noise the photograph comes back."""
    source, dot = write_png(tmp_path / "a.png", pixels()), np.zeros((3, 3), np.uint8)
    dot[1, 1] = 255
    words = ["restore", "deblur", str(source), "--kernel", str(write_png(tmp_path / "k.png", dot)), "--noise", "0"]
    assert main([*words, "--solver", "splitting", "--output", str(tmp_path / "out"), *COMMON]) == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "out" / "a.png")).astype(int) - pixels()).max() <= 1


def test_the_same_file_under_two_names_is_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    source, again = write_png(tmp_path / "a.png", pixels()), tmp_path / "sub" / ".." / "a.png"
    assert main(["restore", "upscale", str(source), str(again), "--output", str(tmp_path / "out"), *COMMON]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("words", [["--motion", "9", "nan"], ["--motion", "x", "0"]])
def test_a_motion_takes_finite_numbers(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["restore", "deblur", "a.png", *words, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and "is not valid; use a number from -360 to 360" in capsys.readouterr().err
