"""The convolutional stem with the contracts of the plain trunk: shapes, second order, batch invariance, checkpoints."""

from pathlib import Path

import pytest
import torch

from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.thinking import think
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig, energy_of
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.models.trunk_config import TrunkConfig

TINY = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, noise_process="awgn")
STEMS = [dict(stem_widths=(4, 8)), dict(stem_widths=(8,), stem_unshuffle=2, stem_blocks=2)]


def tiny_ebt(**changes: object) -> PatchEBT:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(**(TINY | STEMS[0] | changes)))  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.output.weight, std=0.2)  # type: ignore[union-attr]
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stem", STEMS)
def test_shapes_on_a_grid_that_is_not_square(stem: dict):
    model = tiny_ebt(**stem)
    x = images(2, 3, 8, 12)
    assert model(x).shape == (2,)
    assert model.energy_map(x).shape == (2, 2, 3)
    assert model.reconstruct(x).shape == x.shape
    assert model.forward_features(x).shape == (2, 6, 16)
    assert [t.shape for t in model.forward_intermediates(x)] == [(2, 6, 16)] * 2


@pytest.mark.parametrize("stem", STEMS)
def test_the_energy_is_half_the_squared_distance_to_the_reconstruction(stem: dict):
    model, x = tiny_ebt(**stem), images(2, 3, 8, 12)
    expected = 0.5 * (x - model.reconstruct(x)).square().flatten(1).sum(1)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.energy_map(x).flatten(1).sum(1), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stem", STEMS)
def test_second_order_gradients_match_float64_finite_differences(stem: dict):
    model = tiny_ebt(**stem).double()
    noisy, clean = images(2, 3, 4, 8).double(), images(2, 3, 4, 8).double() * 0.5

    def loss(create_graph: bool) -> torch.Tensor:
        result = think(model, noisy, step_size=0.3 * model.step_size, num_steps=1, create_graph=create_graph)
        return (result.final - clean).square().mean()

    loss(True).backward()
    generator = torch.Generator().manual_seed(2)
    epsilon = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += epsilon * direction
            high = loss(False)
            parameter -= 2 * epsilon * direction
            low = loss(False)
            parameter += epsilon * direction
        expected = (high - low).item() / (2 * epsilon)
        assert parameter.grad is not None, name
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name


def test_the_result_for_an_image_does_not_depend_on_its_batch():
    model, x = tiny_ebt().double(), images(3, 3, 8, 8).double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-10, atol=1e-12)


def test_checkpointed_blocks_and_the_compiled_gradient_give_the_same_update():
    grads = []
    for variant in ("plain", "checkpointed", "compiled"):
        model = tiny_ebt()
        model.trunk.checkpoint_blocks = variant == "checkpointed"
        energy = CompiledEnergy(model, backend="aot_eager") if variant == "compiled" else model
        result = think(energy, images(2, 3, 8, 8), step_size=model.step_size, num_steps=1, create_graph=True)
        result.final.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, grads[0][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stem", STEMS)
def test_regressor_and_ebt_share_their_weights_and_their_reconstruction(stem: dict, tmp_path: Path):
    regressor = PatchRegressor(PatchRegressorConfig(**(TINY | stem)))  # type: ignore[arg-type]
    ebt = PatchEBT(PatchEBTConfig(**(TINY | stem)))  # type: ignore[arg-type]
    ebt.load_state_dict(regressor.state_dict() | {"log_step_size": torch.tensor(0.0)})
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(ebt.reconstruct(x), regressor(x))
    regressor.save_pretrained(tmp_path / "model")
    loaded = load_pretrained(str(tmp_path / "model"))
    torch.testing.assert_close(loaded(x), regressor(x))
    assert loaded.config == regressor.config


@pytest.mark.parametrize("stem", STEMS)
def test_an_energy_that_sees_the_observation_can_begin_with_one_that_does_not(stem: dict):
    plain, seeing = tiny_ebt(**stem), tiny_ebt(**stem, observation_context=True)
    seeing.load_state_dict(seeing.adapt_weights(plain.state_dict()))
    y, x = images(2, 3, 8, 8), images(4, 3, 8, 8)[2:]
    torch.testing.assert_close(seeing.reconstruct(y, x), plain.reconstruct(y))
    seeing(y, x).sum().backward()
    gradient = seeing.trunk.stem.input.weight.grad  # type: ignore[union-attr]
    assert gradient[:, gradient.shape[1] // 2 :].abs().max() > 0  # it can learn to see


@pytest.mark.parametrize("stem", STEMS)
def test_a_regressor_is_the_reconstruction_of_an_energy(stem: dict, tmp_path: Path):
    regressor = PatchRegressor(PatchRegressorConfig(**(TINY | stem)))  # type: ignore[arg-type]
    model = energy_of(regressor, suggested_start="proposal", suggested_steps=1, init_step_size=0.25)
    x = images(2, 3, 8, 12)
    torch.testing.assert_close(model.reconstruct(x), regressor(x))
    torch.testing.assert_close(model(x), 0.5 * (x - regressor(x)).square().flatten(1).sum(1))
    assert model.step_size.item() == pytest.approx(0.25) and model.config.suggested_start == "proposal"
    model.half().save_pretrained(tmp_path / "half")
    loaded = load_pretrained(str(tmp_path / "half"))
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded.reconstruct(x), regressor(x), rtol=1e-2, atol=1e-2)  # type: ignore[operator]


def test_a_stem_that_does_not_reach_the_patch_is_refused():
    with pytest.raises(ValueError, match="ends at patches of 2 px, not at patch_size=8"):
        TrunkConfig(stem_widths=(16,))
    with pytest.raises(ValueError, match="stem_unshuffle=0"):
        TrunkConfig(patch_size=2, stem_widths=(16,), stem_unshuffle=0)
    with pytest.raises(ValueError, match="convolutional decoder"):
        PatchEBTConfig(energy_head="linear", stem_widths=(16, 16, 16))


def test_the_linear_head_has_no_reconstruction():
    model = PatchEBT(PatchEBTConfig(img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2, energy_head="linear"))
    with pytest.raises(ValueError, match="no reconstruction"):
        model.reconstruct(images(1, 3, 8, 8))
