"""Energies that are sums: values and gradients by hand, the likelihood in thinking, denoising and training."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ebt_vision.core.best_of import best_of
from ebt_vision.core.energies import (
    EnergySum,
    Term,
    auto_likelihood_weight,
    gaussian_likelihood,
    likelihood_context,
    with_likelihood,
)
from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.noise.processes import to_model_range
from ebt_vision.objectives.image import EBTObjective, ImageBatch, ObjectiveConfig


def half_square(candidate: Tensor) -> Tensor:
    return 0.5 * candidate.square().flatten(1).sum(1)


def distance_to(candidate: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (candidate - target).square().flatten(1).sum(1)


def model(**config) -> PatchEBT:
    torch.manual_seed(0)
    network = PatchEBT(PatchEBTConfig(**(dict(img_size=16, embed_dim=16, depth=1, num_heads=2, init_step_size=0.5) | config)))
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return network.eval()


def images(batch: int = 2, **kind) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(**kind)


def test_a_sum_weighs_its_terms_and_hands_each_its_context():
    energy = EnergySum(
        Term(energy_fn=half_square),
        Term(energy_fn=distance_to, weight=2.0, num_context=1),
        Term(energy_fn=distance_to, num_context=1),
    )
    y, a, b = torch.ones(1, 2), torch.zeros(1, 2), 3 * torch.ones(1, 2)
    assert [part.item() for part in energy.parts(y, a, b)] == [1.0, 2.0, 4.0]
    assert energy(y, a, b).item() == 7.0
    with pytest.raises(ValueError, match="take 2 context tensors, got 1"):
        energy(y, a)
    with pytest.raises(ValueError, match="no terms"):
        EnergySum()


def test_terms_that_change_with_the_step_do_so_in_a_sum():
    class Growing:
        def at_step(self, step: int):
            return lambda y: (step + 1) * half_square(y)

    energy = EnergySum(Term(energy_fn=Growing()), Term(energy_fn=half_square))  # type: ignore[arg-type]
    result = think(energy, torch.ones(1, 1), ThinkingConfig(num_steps=2, step_size=0.1))
    assert [p.item() for p in result.predictions] == pytest.approx([0.8, 0.8 * 0.7])  # curvatures 2 and 3
    assert result.energies[:, 0].tolist() == pytest.approx([1.0, 1.5 * 0.64, 2 * 0.56**2])


def test_the_likelihood_is_gaussian_and_its_weight_the_way_back_of_a_step():
    y, x = torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert gaussian_likelihood(y, x, torch.tensor([1.0, 4.0])).tolist() == [2.0, 2.0]
    variance = torch.tensor(0.25)  # up to a constant the logarithm of the density
    density = torch.distributions.Normal(x, variance.sqrt()).log_prob(y) - torch.distributions.Normal(
        x, variance.sqrt()
    ).log_prob(x)
    torch.testing.assert_close(gaussian_likelihood(y, x, (1 / variance).expand(2)), -density.sum(1))
    # On a flat prior a step of weight 0.25 goes a quarter of the way from 3 to 1, whatever the step size.
    energy = EnergySum(Term(energy_fn=lambda y: 0 * half_square(y)), Term(energy_fn=gaussian_likelihood, num_context=2))
    for step_size in (0.1, 2.0):
        context = likelihood_context(x, 0.25, step_size)
        final = think(energy, y, context=context, step_size=step_size, num_steps=1).final
        torch.testing.assert_close(final, y + 0.25 * (x - y))


def test_thinking_on_a_quadratic_prior_ends_where_prior_and_likelihood_balance():
    """E = y^2 / 2 + (y - x)^2 w / (2 a): the minimum is x (w / a) / (1 + w / a); here 0.2 / 0.5 = 0.4, so x * 0.4 / 1.4."""
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    energy = with_likelihood(half_square)
    config = ThinkingConfig(num_steps=60, step_size=0.5)
    result = think(energy, x, config, context=likelihood_context(x, 0.2, 0.5))
    torch.testing.assert_close(result.final, x * 0.4 / 1.4)
    # Each sample has a weight of its own, also as samples leave the batch; of two starts the one nearer to the minimum wins.
    weights = torch.tensor([0.2, 0.0], dtype=torch.float64)
    config = replace(config, tolerance=1e-12)
    both = best_of(energy, [x, 0 * x], config, context=likelihood_context(x, weights, 0.5))
    torch.testing.assert_close(both.final, torch.tensor([[2 * 0.4 / 1.4], [0.0]], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_sum_with_a_network_is_that_of_finite_differences(compiled: bool):
    network, x = model().double(), images(dtype=torch.float64)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)).requires_grad_()
    energy = with_likelihood(network)
    context = likelihood_context(x, torch.tensor([0.3, 0.05]), network.step_size.detach())
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    if compiled:
        gradient = CompiledEnergy(energy, backend="eager").energy_and_gradient(y.detach(), *context)[1]
    else:
        (gradient,) = torch.autograd.grad(energy(y, *context).sum(), y)
    with torch.no_grad():
        ahead, behind = (energy(y + sign * 1e-5 * direction, *context) for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_weight_that_the_energy_asks_for():
    """0.05 of the training's gain over the energy: twice the energy, half the weight; never above a half."""
    weights = auto_likelihood_weight(torch.tensor([10.0, 20.0, 0.1, 0.0]), 10.0)
    assert weights.tolist() == pytest.approx([0.05, 0.025, 0.5, 0.5])
    with pytest.raises(ValueError, match="training_gain"):
        auto_likelihood_weight(torch.ones(1), 0.0)


@pytest.mark.parametrize("start", ["observation", "proposal"])
def test_denoising_with_a_likelihood_is_thinking_on_the_sum(start):
    network = model(training_gain=0.4)
    denoiser, noisy = EBTDenoiser(network), images()
    x, alpha = to_model_range(noisy), network.step_size.detach()
    with torch.no_grad():
        energy = network(x)
        first = x if start == "observation" else network.propose(x)[0]
    for weight, expected in ((0.3, 0.3), ("auto", 0.05 * 0.4 * 4 / energy)):  # 2 x 2 patches
        result = denoiser.denoise(noisy, DenoiseOptions(num_steps=3, likelihood_weight=weight, start=start))
        context = likelihood_context(x, expected, alpha)
        thought = think(with_likelihood(network), first, context=context, step_size=alpha, num_steps=3 - (start == "proposal"))
        torch.testing.assert_close(to_model_range(result.image), thought.final.clamp(-1, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(result.energies[-1], thought.energies[-1] / 4)
        torch.testing.assert_close(result.model_energy, network(thought.final).detach() / 4)
        assert (result.model_energy < result.energies[-1]).all()
        extra = 1 if weight == "auto" and start == "observation" else 0  # to read the weight from the energy of x
        assert result.num_forward.tolist() == [4 + extra] * 2
    plain = denoiser.denoise(noisy, DenoiseOptions(num_steps=3))
    assert plain.model_energy is None and plain.num_forward.tolist() == [4, 4]


def test_a_full_weight_gives_the_image_back_and_tiles_have_the_mean_of_their_energies():
    denoiser, noisy = EBTDenoiser(model(img_size=16)), images(1)
    wide = torch.cat([noisy, noisy], dim=-1)  # two tiles that are alike
    whole = denoiser.denoise(noisy, DenoiseOptions(num_steps=2, likelihood_weight=0.5))
    tiled = denoiser.denoise(wide, DenoiseOptions(num_steps=2, likelihood_weight=0.5, tile_size=16))
    torch.testing.assert_close(tiled.model_energy, whole.model_energy, rtol=0.2, atol=0.0)
    # The more weight, the nearer to the observation.
    gaps = []
    for weight in (0.0, 0.2, 0.6):
        image = denoiser.denoise(noisy, DenoiseOptions(num_steps=4, likelihood_weight=weight)).image
        gaps.append(float((image - noisy).square().mean()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_weights_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="likelihood_weight=1.5 .* use 0 \\(off\\) to 1, or 'auto'"):
        DenoiseOptions(likelihood_weight=1.5)
    with pytest.raises(ValueError, match="likelihood_weight='off' is a str"):
        DenoiseOptions(likelihood_weight="off")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="objective.likelihood_weight=-1"):
        ObjectiveConfig(likelihood_weight=-1.0)
    with pytest.raises(ValueError, match="likelihood_weight='auto': ebt has no training_gain to compare with; give a number"):
        EBTDenoiser(model()).denoise(images(), DenoiseOptions(likelihood_weight="auto"))


@pytest.mark.parametrize("context", [False, True])
def test_training_descends_the_sum(context: bool):
    """The loss is that of thinking on the sum by hand, and the learned step size has a gradient."""
    network, clean = model(observation_context=context), to_model_range(images())
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    config = ObjectiveConfig(
        likelihood_weight=0.2, thinking=ThinkingConfig(num_steps=2, detach_between_steps=False), loss="mse"
    )
    objective = EBTObjective(network, config)
    batch = ImageBatch(clean=clean, noise=noise, generators=generators)
    output = objective(batch)
    x = objective.observe(batch)
    own = (x,) if context else ()
    y, losses = x.clone(), []
    for _ in range(2):
        y = y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network(y, *own).sum(), y)
        y = y - network.step_size * gradient - 0.2 * (y - x)
        losses.append((y - clean).square().mean())
    torch.testing.assert_close(output["loss"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    output["loss"].backward()
    assert all(p.grad is not None for p in network.parameters())
    prediction = EBTObjective.predict(network, x, 0.1, 2, likelihood_weight=0.2)
    torch.testing.assert_close(prediction.images[-1], y.detach(), rtol=1e-4, atol=1e-5)
    last = objective.energy_of(y.detach(), x)
    torch.testing.assert_close(prediction.energies[-1], last, rtol=1e-4, atol=1e-4)
