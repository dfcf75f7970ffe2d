"""The loss on the order of energies: its minimum, its unit, and that training with it orders candidates."""

import pytest
import torch

from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.objectives.energy_order import energy_as_error, energy_order_loss
from ebt_vision.objectives.image import EBTObjective, ImageBatch, ObjectiveConfig
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.config import ConfigError, build_config


def model(**options) -> PatchEBT:
    torch.manual_seed(0)
    ebt = PatchEBT(PatchEBTConfig(img_size=16, embed_dim=32, depth=1, num_heads=2, **options))
    torch.nn.init.normal_(ebt.head.weight, std=0.1)
    return ebt


def batch(size: int = 6) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, size, 3, 16, 16, generator=generator)
    clean = (clean.mean(dim=(2, 3), keepdim=True) + torch.zeros_like(clean)).clamp(-1, 1)  # flat colours
    return ImageBatch(clean=clean, noise=noise, generators=[torch.Generator().manual_seed(i) for i in range(size)])


def test_it_is_lowest_where_energies_differ_as_errors_do():
    errors = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    energies = (errors + 7.0 * torch.arange(5.0, dtype=torch.float64)).requires_grad_()  # any constant for each image
    loss = energy_order_loss(energies, errors, 5e-4)
    (gradient,) = torch.autograd.grad(loss, energies)
    assert gradient.abs().max() < 1e-12
    for other in (errors.flip(0), torch.zeros_like(errors), 3 * errors):
        assert energy_order_loss(other, errors, 5e-4) > loss


def test_its_gradient_lowers_the_better_candidate():
    energies = torch.zeros(2, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy_order_loss(energies, torch.tensor([[0.01], [0.02]]), 5e-4), energies)
    assert gradient[0] > 0 > gradient[1]  # descent: the first, better one falls


def test_one_candidate_has_no_order():
    with pytest.raises(ValueError, match="two candidates"):
        energy_order_loss(torch.zeros(1, 4), torch.zeros(1, 4), 1e-3)


def test_an_energy_whose_step_is_exact_has_the_unit_of_the_error():
    """E = |x - c|^2 / (2 alpha): one step of alpha ends at c, and E in the unit of an error is the mean squared one."""
    generator = torch.Generator().manual_seed(0)
    x, clean = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    alpha = torch.tensor(0.6, dtype=torch.float64)
    energy = (x - clean).square().flatten(1).sum(1) / (2 * alpha)
    torch.testing.assert_close(energy_as_error(energy, alpha, clean[0].numel()), (x - clean).square().flatten(1).mean(1))


def trained(weight: float, context: bool) -> tuple[float, float]:
    """(what is left of the order loss, the share of images whose clean image has the lowest energy) after 60 updates."""
    ebt, images = model(observation_context=context), batch()
    optimizer = torch.optim.Adam(ebt.parameters(), lr=1e-3)
    objective = EBTObjective(ebt, ObjectiveConfig(energy_order_weight=weight))
    for _ in range(60):
        optimizer.zero_grad()
        output = objective(images)
        output["loss"].backward()
        optimizer.step()
    noisy = objective.observe(images)
    with torch.no_grad():
        energies = torch.stack([ebt(x, *ebt.context_of(noisy)) for x in (noisy, output["candidate"], images.clean)])
    return output["energy_order_loss"].item(), (energies.argmin(0) == 2).float().mean().item()


@pytest.mark.parametrize("context", [False, True])
def test_training_with_it_puts_the_clean_image_lowest(context: bool):
    (loss, lowest), (plain_loss, plain_lowest) = trained(100.0, context), trained(1e-9, context)
    assert lowest == 1.0 >= plain_lowest
    assert loss < 0.1 * plain_loss


def test_it_is_the_weighted_part_of_the_loss():
    plain, weighted = (EBTObjective(model(), ObjectiveConfig(energy_order_weight=w))(batch()) for w in (0.0, 2.0))
    assert "energy_order_loss" not in plain
    torch.testing.assert_close(weighted["loss"], plain["loss"] + 2.0 * weighted["energy_order_loss"])
    torch.testing.assert_close(weighted["candidate"], plain["candidate"])


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="energy_order_weight=-1 is negative"):
        ObjectiveConfig(energy_order_weight=-1.0)
    with pytest.raises(ValueError, match="energy_order_scale=0 must be positive"):
        ObjectiveConfig(energy_order_scale=0.0)


def test_more_steps_than_one_are_ordered_from_the_first_start():
    thinking = ThinkingConfig(num_steps=3, detach_between_steps=False, backprop_steps=2)
    objective = EBTObjective(model(), ObjectiveConfig(energy_order_weight=1.0, thinking=thinking))
    objective(batch())["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_langevin_noise_is_not_part_of_the_start(monkeypatch):
    """The energy of the start is computed at the start itself, like its error."""
    seen = {}
    monkeypatch.setattr(
        "ebt_vision.objectives.image.energy_order_loss",
        lambda energies, errors, scale: seen.update(e=energies, r=errors) or energies.sum(),
    )
    ebt = model()
    objective = EBTObjective(ebt, ObjectiveConfig(energy_order_weight=1.0, thinking=ThinkingConfig(langevin_std=0.5)))
    output, images = objective(batch()), batch()
    candidates = (objective.observe(images), output["candidate"], images.clean)
    expected = energy_as_error(torch.stack([ebt(c) for c in candidates]), ebt.step_size, images.clean[0].numel())
    torch.testing.assert_close(seen["e"], expected)
    torch.testing.assert_close(seen["r"], torch.stack([(c - images.clean).square().flatten(1).mean(1) for c in candidates]))


@pytest.mark.parametrize("section", [{"objective": {"energy_order_weight": 1.0}}, {"replay": {"capacity": 8}}])
def test_options_of_energies_are_refused_for_other_models(section: dict):
    sizes = {"img_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    raw = {"name": "t", "model_type": "patch_regressor", "model": sizes, "data": {"path": "unused"}} | section
    config = build_config(raw)
    with pytest.raises(ConfigError, match="is for energy-based models; use 0 for patch_regressor"):
        build_objective(build_model(config), config)
