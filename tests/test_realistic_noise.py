"""The realistic mixture: seeded, with the requested strength, and correlated if selected."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ebt_vision.core.rng import make_generator, sample_generators
from ebt_vision.noise import realistic
from ebt_vision.noise.processes import add_jpeg
from ebt_vision.noise.realistic import RealisticNoiseConfig, add_realistic_noise, realistic_pairs

FULL_SIZE_WITHOUT_NOISE = RealisticNoiseConfig(
    gaussian_share=0.0,
    clean_share=0.0,
    max_realistic_sigma=0.0,
    max_processed_sigma=0.0,
    jpeg_share=0.0,
    full_size_share=1.0,
)
"""Enlarges every image; a fifth of the draws still has a JPEG before the noise."""


def clean_images(count: int = 6, height: int = 37, width: int = 31) -> torch.Tensor:
    rows = torch.linspace(0.2, 0.8, height)[:, None].expand(height, width)
    return rows.expand(count, 3, height, width).clone()


def test_the_same_generators_give_the_same_noise_in_any_batch():
    clean, config = clean_images(), RealisticNoiseConfig()
    untouched = clean.clone()
    state = torch.random.get_rng_state()
    together = add_realistic_noise(clean, config, sample_generators(3, range(6)))
    alone = add_realistic_noise(clean[4:5], config, sample_generators(3, [4]))
    torch.testing.assert_close(together[4:5], alone, rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(clean, untouched)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_white_gaussian_draws_have_the_strength_of_the_formula_and_are_not_clipped():
    config = RealisticNoiseConfig(gaussian_share=1.0, clean_share=0.0, max_sigma=200.0, sigma_power=2.0)
    clean = clean_images(1, 128, 128)
    noisy = add_realistic_noise(clean, config, [make_generator(5)])
    u = torch.rand(8, generator=make_generator(5))[0].item()
    assert (noisy - clean).std().item() * 255 == pytest.approx(200.0 * u**2, rel=0.02)
    assert noisy.max() > 1.0


def test_a_share_of_the_draws_is_clean():
    clean = clean_images(64, 8, 8)
    noisy = add_realistic_noise(clean, RealisticNoiseConfig(clean_share=1.0), sample_generators(0, range(64)))
    assert torch.equal(noisy, clean)
    noisy = add_realistic_noise(clean, RealisticNoiseConfig(clean_share=0.25), sample_generators(0, range(64)))
    same = (noisy == clean).flatten(1).all(1).sum()
    assert 6 <= same <= 26


def test_realistic_draws_are_8_bit_values():
    config = RealisticNoiseConfig(gaussian_share=0.0, clean_share=0.0)
    noisy = add_realistic_noise(clean_images(24), config, sample_generators(1, range(24)))
    assert noisy.min() >= 0 and noisy.max() <= 1
    torch.testing.assert_close(noisy * 255, (noisy * 255).round(), rtol=0, atol=1e-4)


def test_a_full_size_draw_enlarges_the_middle_of_its_image():
    images = torch.rand(3, 3, 40, 24, generator=make_generator(0))
    config = dataclasses.replace(FULL_SIZE_WITHOUT_NOISE, full_size_zoom=(2.0, 2.0))
    clean, noisy = realistic_pairs(images, config, sample_generators(0, range(3)))
    middle = images[..., 10:30, 6:18]
    expected = F.interpolate(middle, size=(40, 24), mode="bicubic", align_corners=False).clamp(0, 1)
    jpeg_first = torch.stack([torch.rand(8, generator=g)[3] < 0.2 for g in sample_generators(0, range(3))])
    torch.testing.assert_close(clean, expected)
    assert not jpeg_first.all()
    torch.testing.assert_close(noisy[~jpeg_first], expected[~jpeg_first], rtol=0, atol=0.51 / 255)


def _full_size_of(image: torch.Tensor, seed: int, **changes) -> torch.Tensor:
    config = RealisticNoiseConfig(full_size_share=1.0, full_size_zoom=(2.0, 2.0), **changes)
    return realistic._full_size(image, config, make_generator(seed))


def test_smoothing_removes_grain_and_keeps_edges_of_full_size_images():
    edge = torch.full((3, 48, 48), 0.3)
    edge[:, :, 24:] = 0.7
    grainy = edge + 0.02 * torch.randn(edge.shape, generator=make_generator(0))
    smooth = realistic._smoothed(grainy[None], 0.1)[0]
    assert smooth[:, :, :20].std() < 0.3 * grainy[:, :, :20].std()
    assert smooth[:, :, 24].mean() - smooth[:, :, 23].mean() > 0.38
    for size in ((3, 2, 9), (3, 1, 1)):
        assert realistic._smoothed(torch.rand(1, *size), 0.1).shape == (1, *size)
    plain = [_full_size_of(grainy, seed)[:, :, :16].std() for seed in range(8)]
    drawn = [_full_size_of(grainy, seed, full_size_smoothing=60.0)[:, :, :16].std() for seed in range(8)]
    shares = sorted(float(a / b) for a, b in zip(drawn, plain, strict=True))
    assert shares[0] < 0.3 and shares[-1] > shares[0] + 0.2  # the amount is drawn


def test_sharpening_makes_the_edges_of_full_size_images_steeper():
    edge = torch.full((3, 48, 48), 0.3)
    edge[:, :, 24:] = 0.7
    plain = _full_size_of(edge, 0)
    sharp = [_full_size_of(edge, seed, full_size_sharpening=2.0) for seed in range(8)]
    steepest = sorted(float(image.diff(dim=2).max() / plain.diff(dim=2).max()) for image in sharp)
    assert steepest[0] >= 1 and steepest[-1] > 1.3 and steepest[-1] > steepest[0] + 0.1  # the amount is drawn
    for image in sharp:
        torch.testing.assert_close(image[:, :, :8], plain[:, :, :8])


def test_the_clean_image_of_a_smoothed_and_sharpened_draw_is_the_target():
    """The noise is added to the sharpened image, so that without noise both are the same up to 8 bits."""
    config = dataclasses.replace(FULL_SIZE_WITHOUT_NOISE, full_size_smoothing=30.0, full_size_sharpening=1.0)
    images = torch.rand(6, 3, 32, 32, generator=make_generator(0))
    clean, noisy = realistic_pairs(images, config, sample_generators(0, range(6)))
    jpeg_first = torch.tensor([draw[3] < 0.2 for draw in _first_draws(0, 6)])
    assert clean.min() >= 0 and clean.max() <= 1 and not jpeg_first.all()
    torch.testing.assert_close(noisy[~jpeg_first], clean[~jpeg_first], rtol=0, atol=0.51 / 255)


def test_full_size_goes_with_realistic_noise_only():
    images = torch.rand(24, 3, 16, 16, generator=make_generator(1))
    config = RealisticNoiseConfig(gaussian_share=0.5, full_size_share=1.0)
    clean, noisy = realistic_pairs(images, config, sample_generators(2, range(24)))
    same = (clean == images).flatten(1).all(1)
    white = torch.tensor([draw[1] < config.clean_share or draw[2] < 0.5 for draw in _first_draws(2, 24)])
    assert torch.equal(same, white) and 4 < white.sum() < 20
    shares_off = dataclasses.replace(config, full_size_share=0.0)
    assert torch.equal(
        add_realistic_noise(images, config, sample_generators(2, range(24))),
        realistic_pairs(images, shares_off, sample_generators(2, range(24)))[1],
    )
    torch.testing.assert_close(noisy[white], add_realistic_noise(images, config, sample_generators(2, range(24)))[white])


def test_jpeg_only_draws_have_a_jpeg_and_no_noise_with_blocks_anywhere():
    image = torch.rand(1, 3, 32, 40, generator=make_generator(3))
    count = 40
    config = RealisticNoiseConfig(gaussian_share=0.0, clean_share=0.0, jpeg_only_share=1.0, jpeg_quality=(30, 30))
    noisy = add_realistic_noise(image.repeat(count, 1, 1, 1), config, sample_generators(0, range(count)))
    places = {(0, 0): add_jpeg(image, 30)[0]}
    for rows in range(16):
        for columns in range(16):
            wide = F.pad(image, (columns, 0, rows, 0), mode="replicate")
            places[rows, columns] = add_jpeg(wide, 30)[0, :, rows:, columns:]
    found = [next(place for place, expected in places.items() if torch.equal(result, expected)) for result in noisy]
    aligned = found.count((0, 0))
    assert 10 <= aligned <= 30 and len(set(found)) > 8


def _first_draws(seed: int, count: int) -> list[list[float]]:
    return [torch.rand(8, generator=g).tolist() for g in sample_generators(seed, range(count))]


@pytest.mark.parametrize("field", sorted({f.__name__ for f in realistic._FIELDS}))
def test_every_field_has_the_strength_asked_for(field: str):
    """On a mid-grey image, which the pipeline does not clip."""
    clean = torch.full((3, 64, 64), 0.5)
    for seed in range(5):
        noise = getattr(realistic, field)(clean, 10 / 255, None, make_generator(seed))
        assert noise.std().item() * 255 == pytest.approx(10.0, rel=0.1)


def test_processed_noise_has_the_strength_asked_for_on_images_of_any_size():
    for seed, size in enumerate([(3, 64, 64), (3, 8, 40), (3, 33, 5)]):
        noise = realistic._processed_noise(torch.full(size, 0.5), 10 / 255, (0.25, 1.0), make_generator(seed))
        assert noise.shape == size and noise.std().item() * 255 == pytest.approx(10.0, rel=1e-4)
    assert realistic._processed_noise(torch.full((3, 1, 40), 0.5), 0.0, (0.25, 1.0), make_generator(0)).abs().max() == 0


def test_each_kind_of_noise_has_its_own_maximum():
    """Sigma 40 at most, 5 for processed noise: the strongest of many draws comes near, and none is far above."""
    clean = torch.full((60, 3, 32, 32), 0.5)
    for share, top in ((0.0, 40.0), (1.0, 5.0)):
        config = RealisticNoiseConfig(
            gaussian_share=0, clean_share=0, jpeg_share=0, max_realistic_sigma=40, max_processed_sigma=5, processed_share=share
        )
        noise = add_realistic_noise(clean, config, sample_generators(0, range(60))) - clean
        strongest = float(noise.flatten(1).std(1).max()) * 255
        assert 0.75 * top < strongest < 1.3 * top


def test_processed_noise_is_fine_in_luminance_and_coarse_in_colour():
    """As in smooth parts of the photographs of RNI15: a median of 0.31 and 0.69 between neighbours."""
    clean, weights = torch.full((3, 96, 96), 0.5), torch.tensor([0.299, 0.587, 0.114])
    luma, colour = [], []
    for seed in range(40):
        noise = realistic._processed_noise(clean, 10 / 255, (0.25, 1.0), make_generator(seed))
        y = torch.einsum("c,chw->hw", weights, noise)
        luma.append(neighbour_correlation(y))
        colour.append(neighbour_correlation(noise[0] - y))
    assert 0.25 < sum(luma) / 40 < 0.5 and 0.65 < sum(colour) / 40 < 0.85


def test_the_blur_of_the_luminance_has_the_range_asked_for():
    """A blur of s px: neighbours have a correlation of exp(-1 / (4 s^2)), less after sharpening."""
    clean, weights = torch.full((3, 96, 96), 0.5), torch.tensor([0.299, 0.587, 0.114])

    def strongest(luma_blur: tuple[float, float]) -> float:
        fields = [realistic._processed_noise(clean, 10 / 255, luma_blur, make_generator(seed)) for seed in range(12)]
        return max(neighbour_correlation(torch.einsum("c,chw->hw", weights, field)) for field in fields)

    assert strongest((1.4, 1.4)) == pytest.approx(0.88, abs=0.03) and strongest((0.3, 0.3)) < 0.15


def test_the_share_of_processed_noise_is_kept():
    """A draw of processed noise alone has coarse colour; one of the other fields without correlation does not."""
    clean = clean_images(30, 64, 64)
    alone = RealisticNoiseConfig(
        gaussian_share=0.0, clean_share=0.0, jpeg_share=0.0, correlated_share=0.0, max_realistic_sigma=20.0
    )
    weights = torch.tensor([0.299, 0.587, 0.114])

    def median(config: RealisticNoiseConfig) -> float:
        noise = add_realistic_noise(clean, config, sample_generators(2, range(30))) - clean
        colour = noise[:, 0] - torch.einsum("c,bchw->bhw", weights, noise)
        return sorted(neighbour_correlation(each) for each in colour)[15]

    assert (
        median(dataclasses.replace(alone, processed_share=1.0))
        > 0.7
        > 0.5
        > median(dataclasses.replace(alone, processed_share=0.0))
    )


def test_demosaicing_correlates_the_noise_of_a_sensor():
    noise = realistic._sensor_noise(torch.full((3, 96, 96), 0.5), 10 / 255, None, make_generator(0))
    assert neighbour_correlation(noise) > 0.2


def test_the_noise_of_a_sensor_depends_on_the_signal():
    """The tone curve is steep in shadows: read noise and shot noise alike are stronger there in sRGB."""
    clean = torch.full((3, 64, 128), 0.05)
    clean[:, :, 64:] = 0.8
    noise = realistic._sensor_noise(clean, 5 / 255, None, make_generator(3))
    assert noise[:, :, :60].std() > 1.5 * noise[:, :, 68:].std()


def test_shot_noise_grows_with_the_light_and_read_noise_does_not():
    raw = torch.tensor([[[0.1, 0.4, 0.7]]])
    shot, read = (realistic._sensor_variance(raw, torch.tensor([share])) - 1e-4 for share in (1.0, 0.0))
    torch.testing.assert_close(shot, raw)  # Poisson: the variance is the mean
    torch.testing.assert_close(read, torch.full_like(raw, 0.4))


def test_the_correlation_is_there_and_keeps_the_strength():
    for seed in range(8):
        noise = torch.randn(3, 64, 64, generator=make_generator(seed))
        correlated = realistic._random_correlation(make_generator(seed, 1))(noise)
        assert correlated.shape == noise.shape
        assert correlated.std().item() == pytest.approx(1.0, abs=0.01)
        assert neighbour_correlation(correlated) > neighbour_correlation(noise) - 0.02
    strong = realistic._random_correlation(generator_of_a_strong_blur())(torch.randn(3, 64, 64, generator=make_generator(9)))
    assert neighbour_correlation(strong) > 0.8  # a blur of 1.5 px: exp(-1 / (4 * 1.5**2)) = 0.89


def generator_of_a_strong_blur() -> torch.Generator:
    """A generator whose next two draws choose a blur of nearly 1.5 px, found by trying."""
    for seed in range(10_000):
        draws = torch.rand(2, generator=make_generator(seed)).tolist()
        if draws[0] >= 0.4 and draws[1] > 0.97:
            return make_generator(seed)
    raise AssertionError("no such seed")


def neighbour_correlation(noise: torch.Tensor) -> float:
    a, b = noise[..., :-1].flatten(), noise[..., 1:].flatten()
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_the_mosaic_sees_each_colour_where_a_bayer_sensor_has_it():
    image = torch.stack([torch.full((4, 4), 1.0), torch.full((4, 4), 2.0), torch.full((4, 4), 3.0)])
    cell = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    assert torch.equal(realistic._mosaic(image)[0], cell.repeat(2, 2))


def test_developing_a_flat_mosaic_gives_the_flat_colour_back():
    srgb = torch.tensor([0.3, 0.5, 0.7])[:, None, None].expand(3, 9, 7)
    gains = torch.tensor([2.0, 1.0, 1.5])
    raw = realistic._mosaic(realistic._to_linear(srgb) / gains[:, None, None])
    torch.testing.assert_close(realistic._develop(raw, gains), srgb, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_sigma": -1.0},
        {"max_realistic_sigma": 300.0},
        {"sigma_power": 0.0},
        {"gaussian_share": 1.5},
        {"processed_share": -0.5},
        {"jpeg_quality": (0, 95)},
        {"jpeg_quality": (90, 80)},
        {"jpeg_only_share": 1.5},
        {"full_size_share": -0.1},
        {"full_size_zoom": (0.5, 2.0)},
        {"full_size_zoom": (3.0, 2.0)},
        {"full_size_zoom": 2.0},
        {"sigma_power": float("nan")},
        {"full_size_smoothing": -1.0},
        {"full_size_smoothing": float("nan")},
        {"full_size_sharpening": 5.0},
        {"processed_luma_blur": (0.0, 1.0)},
        {"processed_luma_blur": (2.0, 1.0)},
        {"processed_luma_blur": 1.0},
        {"jpeg_quality": 80},
        {"jpeg_quality": (30, 60, 90)},
        {"jpeg_quality": (5.5, 92.5)},
        {"jpeg_quality": (True, 90)},
        {"full_size_zoom": ("x", 2.0)},
    ],
)
def test_options_out_of_range_are_refused(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(RealisticNoiseConfig(), **changes)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="RGB"):
        add_realistic_noise(torch.zeros(2, 1, 8, 8), RealisticNoiseConfig(), sample_generators(0, range(2)))
    with pytest.raises(ValueError, match="2 px or more"):
        add_realistic_noise(torch.zeros(1, 3, 8, 1), RealisticNoiseConfig(), sample_generators(0, range(1)))
    with pytest.raises(ValueError, match="one per image"):
        add_realistic_noise(torch.zeros(2, 3, 8, 8), RealisticNoiseConfig(), sample_generators(0, range(3)))
