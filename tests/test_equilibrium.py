"""Equilibrium Matching: its target, its field, descent by the one loop, training, and its rows."""

import pytest
import torch

from ebt_vision.benchmark.protocols import Condition
from ebt_vision.benchmark.rows import RowSettings, kind_of, rows_of
from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.denoising.equilibrium import EqMDenoiser
from ebt_vision.denoising.load import denoiser_for
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models.equilibrium import EquilibriumEnergy, PatchEqM, PatchEqMConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.objectives.equilibrium import EqMObjective, magnitude
from ebt_vision.objectives.image import ImageBatch, ObjectiveConfig
from ebt_vision.training.build import build_model
from ebt_vision.training.config import build_config

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)


def model(**settings) -> PatchEqM:
    torch.manual_seed(0)
    made = PatchEqM(PatchEqMConfig(**SIZES, **settings)).eval()
    with torch.no_grad():
        made.head.weight.normal_(0, 0.02)
    return made


class Pull(torch.nn.Module):
    """f(y) = y / 2: the equilibrium is the grey image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images / 2


def test_the_magnitude_is_one_and_falls_to_zero_at_the_clean_image():
    gamma = torch.tensor([0.0, 0.5, 0.8, 0.9, 1.0])
    torch.testing.assert_close(magnitude(gamma), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0]))


def test_the_loss_is_that_of_the_interpolated_field():
    """With f(y) = y / 2, clean images 0 and noisy ones s: y = (1 - gamma) s, the target is c(gamma) s."""
    config = ObjectiveConfig(level=0.1)
    objective = EqMObjective(Pull(), config)
    size = (6, 3, 8, 8)
    noisy = torch.full(size, 0.3)
    batch = ImageBatch(
        clean=torch.zeros(size), noise=torch.zeros(size), generators=sample_generators(1, range(6)), observation=noisy
    )
    gamma = torch.stack([torch.rand((), generator=g) for g in sample_generators(1, range(6))])
    expected = ((1 - gamma) * 0.15 - magnitude(gamma) * 0.3).square().mean()
    torch.testing.assert_close(objective(batch)["loss"], expected)


def test_descent_follows_the_field_and_reports_its_length():
    """y <- y - 0.5 * y / 2 is 0.75 y; |y / 2|^2 / 2 of 12 values of 1 is 1.5. One forward pass a step, no gradient is taken."""
    start = torch.ones(2, 3, 2, 2)
    result = think(EquilibriumEnergy(Pull()), start, ThinkingConfig(num_steps=3), step_size=0.5)
    torch.testing.assert_close(result.final, start * 0.75**3)
    torch.testing.assert_close(result.energies[:, 0], 1.5 * 0.75 ** (2 * torch.arange(4.0)))
    assert result.num_forward.tolist() == [4, 4]


def test_the_denoiser_is_the_descent_on_the_model_range():
    made = model(step_size=0.3)
    noisy = torch.rand(2, 3, 16, 16)
    options = DenoiseOptions(num_steps=2, keep_trajectory=True)
    result = denoiser_for(made).denoise(noisy, options)
    y = noisy * 2 - 1
    with torch.no_grad():
        for _ in range(2):
            y = y - 0.3 * made(y)
    torch.testing.assert_close(result.image, ((y + 1) / 2).clamp(0, 1))
    assert len(result.trajectory) == 3 and result.energies.shape == (3, 2) and result.num_steps.tolist() == [2, 2]


def test_a_callback_ends_the_descent():
    denoiser = denoiser_for(model())
    result = denoiser.denoise(torch.rand(1, 3, 16, 16), DenoiseOptions(num_steps=5), callback=lambda step: step.index == 2)
    assert result.num_steps.tolist() == [2] and result.energies.shape == (6, 1)


def test_a_tolerance_stops_images_one_by_one():
    """With f(y) = y / 2 every step leaves 0.75^2 of the energy: the gains fall by the same factor."""
    config = ThinkingConfig(num_steps=10, tolerance=0.2)
    result = think(EquilibriumEnergy(Pull()), torch.ones(1, 3, 2, 2), config, step_size=0.5)
    gains = 0.75 ** (2 * torch.arange(10.0))
    assert result.num_steps.item() == int((gains > 0.2).sum()) + 1


def test_it_is_a_row_of_the_benchmark():
    denoiser = denoiser_for(model())
    assert isinstance(denoiser, EqMDenoiser) and kind_of(denoiser) == "eqm"
    condition = Condition(protocol="paper", kind="vp", strength=0.1, seed=0)
    rows = list(rows_of("eqm", "eqm", condition, RowSettings(steps=3)))
    assert [(row.method, row.reported) for row in rows] == [("descent", (1, 2, 3))]


def test_it_begins_with_a_regressor_s_weights(tmp_path):
    regressor = PatchRegressor(PatchRegressorConfig(**SIZES))
    regressor.save_pretrained(tmp_path / "regressor")
    train = dict(init_from=str(tmp_path / "regressor"))
    config = build_config(dict(name="t", model_type="patch_eqm", model=SIZES, data=dict(path="unused"), train=train))
    made = build_model(config)
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(made(images), images - regressor(images))


@pytest.mark.parametrize("bad", [dict(step_size=0.0), dict(suggested_steps=0)])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PatchEqMConfig(**SIZES, **bad)
