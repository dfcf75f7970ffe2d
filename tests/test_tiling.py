"""Tiles: weights that sum to 1, no seams, and no dependence on the batch of tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebt_vision.denoising.base import Denoiser, IdentityDenoiser
from ebt_vision.denoising.classical import NonLocalMeansDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.denoising.results import no_network_result
from ebt_vision.denoising.tiling import (
    denoise_tiled,
    energy_map_tiled,
    fitted_side,
    tile_grid,
    tile_starts,
    tile_weights,
)
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig


def tiny_ebt() -> EBTDenoiser:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2, init_step_size=0.3))
    nn.init.normal_(model.head.weight, std=0.1)
    return EBTDenoiser(model)


class OffsetDenoiser(Denoiser):
    """Adds 0.2 to every second tile and subtracts it from the others: the worst case at a border."""

    name = "offset"

    def _denoise(self, noisy, options, image_ids, callback):
        signs = torch.tensor([(-1.0) ** i for i in image_ids]).reshape(-1, 1, 1, 1)
        return no_network_result(noisy + 0.2 * signs, noisy, options)


class BatchRecorder(IdentityDenoiser):
    """Keeps the sizes of the batches it is given."""

    def __init__(self):
        self.shapes = []

    def _denoise(self, noisy, options, image_ids, callback):
        self.shapes.append(tuple(noisy.shape))
        return super()._denoise(noisy, options, image_ids, callback)

    def activation_bytes(self, height, width):
        return 1000


@settings(max_examples=100)
@given(length=st.integers(8, 600), longest=st.integers(2, 16), overlap=st.integers(0, 15))
def test_fitted_tiles_are_no_more_and_no_shorter_works(length, longest, overlap):
    longest, multiple = 8 * longest, 8
    side = fitted_side(length, longest, overlap, multiple)
    count = len(tile_starts(length, longest, overlap))
    assert side <= longest and len(tile_starts(length, side, overlap)) == count
    shorter = side - multiple
    assert count == 1 or shorter <= overlap or len(tile_starts(length, shorter, overlap)) > count


def test_the_own_tiles_of_a_network_with_a_convolutional_stem_fit_the_image():
    sizes = dict(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    conv = RegressorDenoiser(PatchRegressor(PatchRegressorConfig(**sizes, stem_widths=(8, 8), stem_unshuffle=2)))
    plain = RegressorDenoiser(PatchRegressor(PatchRegressorConfig(**sizes)))
    assert (conv.tile_size, plain.tile_size, conv.overlap_for(192), conv.overlap_for(64)) == (96, 64, 16, 8)
    grid = tile_grid(conv, (100, 150))  # overlap 12: two rows of (100 + 12) / 2, two columns of (150 + 12) / 2
    assert (grid.tile, grid.overlap, grid.tops, grid.lefts) == ((56, 88), 12, [0, 44], [0, 62])
    assert tile_grid(conv, (100, 150), 64).tile == (64, 64) and tile_grid(plain, (100, 150)).tile == (64, 64)
    assert tile_grid(conv, (40, 150)).tile == (40, 88) and tile_grid(conv, (100, 150), 0).tile == (100, 150)
    seen = []
    original = conv.model.forward
    conv.model.forward = lambda x: seen.append(tuple(x.shape[-2:])) or original(x)
    image = torch.rand(1, 3, 100, 150, generator=torch.Generator().manual_seed(0))
    result = conv.denoise(image)
    assert set(seen) == {(56, 88)} and int(result.num_forward) == 4
    assert energy_map_tiled(conv, image, image) is None


@given(length=st.integers(8, 200), tile=st.integers(8, 64), share=st.floats(0, 0.99))
def test_tiles_cover_the_side_and_their_weights_sum_to_one(length, tile, share):
    tile = min(tile, length)
    overlap = min(int(share * tile), tile - 1)
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == length - tile
    assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, tile_weights(starts, tile, length, overlap), strict=True):
        assert (weight > 0).all()
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 91), (10, 50), (9, 8)])
@pytest.mark.parametrize("overlap", [0, 4, 9])
def test_identity_gives_the_image_back(height, width, overlap):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    result = denoise_tiled(
        IdentityDenoiser(), image, DenoiseOptions(num_steps=2, keep_trajectory=True), tile_size=16, overlap=overlap
    )
    torch.testing.assert_close(result.image, image[None], rtol=0, atol=1e-6)
    assert len(result.trajectory) == 3
    torch.testing.assert_close(result.trajectory[0], image[None], rtol=0, atol=1e-6)
    assert result.energies is None


def test_no_seam_even_where_tiles_disagree():
    grey = torch.full((3, 80, 90), 0.5)  # an odd number of columns, so that the signs make a checkerboard
    grey[:, ::4, ::4] += 1e-6  # tiles of one constant colour are given back
    steps = {}
    for overlap in (0, 8, 16):
        image = denoise_tiled(OffsetDenoiser(), grey, tile_size=32, overlap=overlap).image
        steps[overlap] = max(image.diff(dim=2).abs().max().item(), image.diff(dim=3).abs().max().item())
    # Neighbouring tiles differ by 0.4 at most, and a raised cosine over 16 px climbs by at most pi / 2 / 16 a pixel.
    assert steps[16] <= 0.4 * torch.pi / 2 / 16
    assert steps[0] > 0.2  # the test can tell a seam


def test_result_does_not_depend_on_the_batch_of_tiles():
    image = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0))
    options = DenoiseOptions(num_steps=3, num_candidates=2, langevin_std=0.05, tolerance=0.1, keep_trajectory=True)
    one, five = (denoise_tiled(tiny_ebt(), image, options, batch_size=batch_size) for batch_size in (1, 5))
    torch.testing.assert_close(one.image, five.image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.energies, five.energies, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.trajectory[1], five.trajectory[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(one.num_forward, five.num_forward) and torch.equal(one.num_steps, five.num_steps)


def test_results_of_tiles_are_combined():
    image = torch.rand(3, 16, 28, generator=torch.Generator().manual_seed(0))
    options = DenoiseOptions(num_steps=2, num_candidates=2)
    result = denoise_tiled(tiny_ebt(), image, options, overlap=4)
    tiles = tiny_ebt().denoise(torch.stack([image[:, :, :16], image[:, :, 12:]]), options, image_ids=[0, 1])
    torch.testing.assert_close(result.energies, tiles.energies.mean(1, keepdim=True))
    torch.testing.assert_close(result.candidate_energies, tiles.candidate_energies.mean(1, keepdim=True))
    assert result.num_steps.tolist() == [2] and result.num_forward.tolist() == [12]
    torch.testing.assert_close(result.image[..., :12], tiles.image[:1, ..., :12])
    torch.testing.assert_close(result.image[..., 16:], tiles.image[1:, ..., 4:])
    assert result.chosen is None


def test_one_tile_is_the_whole_image():
    image = torch.rand(3, 13, 11, generator=torch.Generator().manual_seed(0))
    whole = tiny_ebt().denoise(image[None], DenoiseOptions(num_steps=2))
    tiled = denoise_tiled(tiny_ebt(), image, DenoiseOptions(num_steps=2))
    torch.testing.assert_close(tiled.image, whole.image)
    torch.testing.assert_close(tiled.energies, whole.energies)


def test_noise_is_estimated_once_for_the_whole_image():
    image = 0.5 + 0.1 * torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(0))
    image[:, :, :24] = 0.5  # half of it has none
    denoiser = NonLocalMeansDenoiser()
    sigma = denoiser.resolve_options(image[None], DenoiseOptions()).sigma
    estimated = denoise_tiled(denoiser, image, tile_size=24)
    told = denoise_tiled(denoiser, image, DenoiseOptions(sigma=sigma), tile_size=24)
    assert torch.equal(estimated.image, told.image)


def test_batches_follow_the_memory_budget_and_progress_counts_tiles():
    denoiser, seen = BatchRecorder(), []
    denoise_tiled(
        denoiser,
        torch.rand(3, 16, 64),
        tile_size=16,
        overlap=0,
        memory_budget=3000,
        callback=lambda done, total: seen.append((done, total)),
    )
    assert denoiser.shapes == [(3, 3, 16, 16), (1, 3, 16, 16)]
    assert seen == [(0, 4), (3, 4), (4, 4)]
    denoise_tiled(denoiser, torch.rand(3, 16, 16), memory_budget=1)  # one tile at least
    assert denoiser.shapes[-1] == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tile_size=4), "tile_size=4 is too small"),
        (dict(tile_size=16, overlap=16), "overlap=16 does not fit tile_size=16; use 0..15"),
        (dict(tile_size=16, overlap=-1), "overlap=-1"),
        (dict(batch_size=0), "batch_size=0 must be 1 or more"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        denoise_tiled(IdentityDenoiser(), torch.rand(3, 16, 16), **arguments)
    with pytest.raises(ValueError, match="batch of 2"):
        denoise_tiled(IdentityDenoiser(), torch.rand(2, 3, 16, 16))


# --- Steps, stopping, maps


def scene(height: int = 40, width: int = 52) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_steps_are_told_of_the_whole_image():
    noisy, heard = scene(), []
    plain = denoise_tiled(tiny_ebt(), noisy, DenoiseOptions(num_steps=2), batch_size=5)
    result = denoise_tiled(
        tiny_ebt(),
        noisy,
        DenoiseOptions(num_steps=2),
        batch_size=5,
        on_step=lambda step: heard.append((step, step.image())) and None,
    )
    assert torch.equal(result.image, plain.image)
    num_tiles = heard[0][0].num_tiles
    assert num_tiles > 10 and len(heard) == 3 * -(-num_tiles // 5)
    shares = [step.share_done for step, _ in heard]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    torch.testing.assert_close(heard[0][1], noisy)  # nothing done yet
    torch.testing.assert_close(heard[-1][1], result.image)
    single = denoise_tiled(
        tiny_ebt(), noisy[..., :16, :16], DenoiseOptions(num_steps=2), on_step=lambda s: heard.append((s, 0))
    )
    assert [step.energy for step, _ in heard[-3:]] == pytest.approx(single.energies[:, 0].tolist())


@pytest.mark.parametrize(("tiles", "index"), [(0, 0), (0, 1), (5, 0), (5, 1)])
def test_true_stops_between_steps_and_the_rest_stays_noisy(tiles, index):
    noisy, last = scene(), []

    def on_step(step):
        last[:] = [step, step.image()]
        return step.tiles_done == tiles and step.index == index

    options = DenoiseOptions(num_steps=3, num_candidates=2, keep_trajectory=True, keep_candidates=True)
    result = denoise_tiled(tiny_ebt(), noisy, options, batch_size=5, on_step=on_step)
    assert last[0].tiles_done == tiles and last[0].index == index and last[0].candidate == 0
    torch.testing.assert_close(result.image, last[1])
    torch.testing.assert_close(result.image[..., -8:, -8:], noisy[..., -8:, -8:])
    assert torch.isfinite(result.energies).all() and result.trajectory[-1].shape == noisy.shape
    assert int(result.num_forward) == (5 * 2 * 4 if tiles else 0) + 5 * (index + 1)


def test_every_tile_chooses_for_itself_and_wins_are_counted():
    result = denoise_tiled(tiny_ebt(), scene(), DenoiseOptions(num_candidates=3), batch_size=4)
    assert result.candidate_wins.shape == (3, 1)
    assert int(result.candidate_wins.sum()) == len(tile_starts(40, 16, 4)) * len(tile_starts(52, 16, 4))


def test_the_energy_map_sums_to_the_energy():
    denoiser, image = tiny_ebt(), scene(16, 16)
    energies = energy_map_tiled(denoiser, image, image)
    result = denoiser.denoise(image)
    assert energies.shape == (16, 16)
    assert float(energies.mean()) == pytest.approx(float(result.energies[0]), rel=1e-5)
    assert energy_map_tiled(denoiser, scene(30, 37), scene(30, 37)).shape == (30, 37)  # sides that no patch divides
    flat = energies.reshape(4, 4, 4, 4)
    assert torch.equal(flat[:, :1, :, :1].expand_as(flat), flat)  # the same all over a patch
    assert energy_map_tiled(IdentityDenoiser(), image, image) is None
