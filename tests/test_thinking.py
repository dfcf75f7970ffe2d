"""think() by hand arithmetic on energies whose descent is known, and its contract with its caller."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ebt_vision.core.best_of import best_of
from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.core.thinking_results import NonFiniteGradientError, ThinkingError, ThinkingStep
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig


def half_square(candidate: Tensor) -> Tensor:
    """E = |y|^2 / 2, so the gradient is y and a step of a multiplies y by 1 - a."""
    return 0.5 * candidate.square().flatten(1).sum(1)


def distance_to(candidate: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (candidate - target).square().flatten(1).sum(1)


def text_energy(candidate: Tensor) -> Tensor:
    """(B, S, V) -> (B, S)."""
    return 0.5 * candidate.square().sum(-1)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_step_of_a_tenth_from_one_gives_nine_tenths():
    result = think(half_square, torch.ones(1, 1, 1, 1), ThinkingConfig(num_steps=2, step_size=0.1))
    assert result.final.item() == pytest.approx(0.81)
    assert [p.item() for p in result.predictions] == pytest.approx([0.9, 0.81])
    assert result.energies[:, 0].tolist() == pytest.approx([0.5, 0.405, 0.32805])
    assert result.gradient_norms[:, 0].tolist() == pytest.approx([1.0, 0.9])
    assert result.num_steps.tolist() == [2] and result.num_forward.tolist() == [3]


def test_context_comes_after_the_candidate_and_text_has_an_energy_per_position():
    target = images()
    result = think(distance_to, torch.zeros_like(target), context=(target,), step_size=1.0, num_steps=1)
    torch.testing.assert_close(result.final, target)
    text = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    result = think(text_energy, text, ThinkingConfig(num_steps=3, step_size=0.5))
    assert result.energies.shape == (4, 2, 4) and result.gradient_norms.shape == (3, 2, 4)
    torch.testing.assert_close(result.final, text / 8)


def test_the_caller_s_tensors_and_the_global_stream_are_untouched_and_no_grad_is_no_obstacle():
    start = images().requires_grad_()
    before = start.detach().clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = ThinkingConfig(num_steps=2, langevin_std=0.5, step_size_factor=2.0, min_num_steps=1)
    with torch.no_grad():
        result = think(half_square, start, config, generator=torch.Generator().manual_seed(1))
    assert torch.equal(start.detach(), before) and start.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.final.requires_grad and not result.energies.requires_grad


def test_inference_mode_and_a_constant_energy_are_named_errors():
    with torch.inference_mode(), pytest.raises(ThinkingError, match="no_grad"):
        think(half_square, images())
    with pytest.raises(ThinkingError, match="does not depend"):
        think(lambda y: torch.zeros(len(y)), images())


def test_a_non_finite_gradient_names_the_step_and_the_sample():
    start = images(3)
    start[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteGradientError) as error:
        think(half_square, start)
    assert error.value.step == 0 and error.value.samples == [1]


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": -1},
        {"step_size": 0.0},
        {"step_size_factor": 0.5},
        {"langevin_std": -1.0},
        {"tolerance": -0.1},
        {"tolerance": "0.1"},
        {"tolerance_of": "second"},
    ],
)
def test_a_bad_setting_is_refused_by_name(bad: dict):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ThinkingConfig(**bad)
    with pytest.raises(ValueError, match="num_steps"):
        think(half_square, images(), num_steps=-1)


def test_learned_step_size_gets_a_gradient_through_the_unrolled_steps():
    """y2 = y0 (1 - a)^2; d/da of y2^2 / 2 is -2 y0^2 (1 - a)^3 without detaching, half of it with."""
    for detach, factor in ((False, 2.0), (True, 1.0)):
        alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        config = ThinkingConfig(num_steps=2, detach_between_steps=detach)
        start = torch.full((1, 1), 3.0, dtype=torch.float64)
        result = think(half_square, start, config, step_size=alpha, create_graph=True)
        (0.5 * result.final.square()).sum().backward()
        assert alpha.grad is not None
        assert alpha.grad.item() == pytest.approx(-factor * 9.0 * 0.9**3)


@pytest.mark.usefixtures("one_thread")
def test_the_predictions_can_be_differentiated_with_respect_to_the_start():
    config = ThinkingConfig(num_steps=3, step_size=0.1, detach_between_steps=False)
    graph = dict(create_graph=True, differentiate_start=True)
    start = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    result = think(half_square, start, config, **graph)
    (gradient,) = torch.autograd.grad(result.final.sum(), start)
    assert gradient.item() == pytest.approx(0.9**3) and start.grad is None

    def quartic(candidate: Tensor) -> Tensor:
        return candidate.pow(4).flatten(1).sum(1)

    start = images().double().requires_grad_()
    for energy_fn in (quartic, CompiledEnergy(quartic, backend="eager")):
        assert torch.autograd.gradcheck(lambda y, e=energy_fn: think(e, y, config, **graph).final, start)  # type: ignore[misc]
    untouched = images()
    think(quartic, untouched, config, **graph)
    assert not untouched.requires_grad


@pytest.mark.usefixtures("one_thread")
def test_the_start_of_a_network_s_thinking_gets_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, embed_dim=16, depth=1, num_heads=2, init_step_size=0.5)).double()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    config = ThinkingConfig(num_steps=2, detach_between_steps=False)
    start = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(start)

    def final(y: Tensor, **graph) -> Tensor:
        return think(model, y, config, step_size=model.step_size.detach(), **graph).final.square().sum()

    (gradient,) = torch.autograd.grad(final(start, create_graph=True, differentiate_start=True), start)
    ahead, behind = (final((start + sign * 1e-5 * direction).detach()).item() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


def test_a_start_whose_gradient_would_be_lost_is_refused():
    start = images().requires_grad_()
    with pytest.raises(ValueError, match="use differentiate_start=True or y0.detach()"):
        think(half_square, start, create_graph=True)
    with pytest.raises(ValueError, match="use create_graph=True with it"):
        think(half_square, start, ThinkingConfig(detach_between_steps=False), differentiate_start=True)
    for bad in (ThinkingConfig(), ThinkingConfig(detach_between_steps=False, num_steps=3, backprop_steps=1)):
        with pytest.raises(ValueError, match="the graph is cut before it reaches y0; use False and None"):
            think(half_square, start, bad, create_graph=True, differentiate_start=True)


def test_truncation_keeps_only_the_last_steps_in_the_graph():
    """Of three steps the last two are in the graph: d y3 / da = -2 y1 (1 - a) with y1 a constant."""
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    config = ThinkingConfig(num_steps=3, detach_between_steps=False, backprop_steps=2)
    start = torch.full((1, 1), 3.0, dtype=torch.float64)
    result = think(half_square, start, config, step_size=alpha, create_graph=True)
    assert [p.grad_fn is not None for p in result.predictions[1:]] == [True, True]
    result.final.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.item() == pytest.approx(-2 * (3.0 * 0.9) * 0.9)


def test_random_step_sizes_stay_in_their_range_and_differ_by_sample():
    start = torch.ones(256, 1, dtype=torch.float64)
    config = ThinkingConfig(step_size=0.2, step_size_factor=2.0)
    steps = 1.0 - think(half_square, start, config, generator=torch.Generator().manual_seed(0)).final[:, 0]
    assert steps.min() >= 0.1 and steps.max() <= 0.4 and steps.unique().numel() > 250
    assert steps.mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_number_of_steps_is_drawn_from_its_whole_range():
    config = ThinkingConfig(num_steps=4, min_num_steps=2, step_size=0.1)
    generator = torch.Generator().manual_seed(0)
    drawn = [len(think(half_square, torch.ones(1, 1), config, generator=generator).predictions) for _ in range(40)]
    assert set(drawn) == {2, 3, 4}


def test_langevin_noise_is_added_before_the_gradient():
    start = torch.zeros(2000, 1, dtype=torch.float64)
    config = ThinkingConfig(step_size=0.5, langevin_std=0.3)
    final = think(half_square, start, config, generator=torch.Generator().manual_seed(0)).final
    assert final.std().item() == pytest.approx(0.15, rel=0.05)  # (0 + noise) * (1 - 0.5)


def test_one_generator_per_sample_makes_the_result_independent_of_the_batch():
    start = images(4)
    config = ThinkingConfig(num_steps=3, step_size=0.1, langevin_std=0.2, step_size_factor=1.5)
    whole = think(half_square, start, config, generator=sample_generators(7, range(4))).final
    alone = [think(half_square, start[i : i + 1], config, generator=sample_generators(7, [i])).final for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(alone))


def test_langevin_noise_may_have_a_schedule_with_one_value_a_step():
    start = torch.zeros(2000, 1, dtype=torch.float64)
    config = ThinkingConfig(num_steps=2, step_size=0.5, langevin_std=(0.0, 0.3))
    first, second = think(half_square, start, config, generator=torch.Generator().manual_seed(0)).predictions
    assert torch.equal(first, start)  # no noise at the first step
    assert second.std().item() == pytest.approx(0.15, rel=0.05)
    same = replace(config, langevin_std=(0.2, 0.2))
    draws = [
        think(half_square, start, c, generator=torch.Generator().manual_seed(1)).final
        for c in (same, replace(same, langevin_std=0.2))
    ]
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match=r"\(1 values\).*each of the 2 steps"):
        replace(config, langevin_std=(0.1,))
    with pytest.raises(ValueError, match="each of the 3 steps"):
        think(half_square, start, config, num_steps=3)


def floor_at_half(candidate: Tensor) -> Tensor:
    return candidate.clamp(min=0.5)


def test_a_projection_is_applied_after_each_update_and_not_to_the_start():
    """y <- max(0.7 y, 0.5) from 1: 0.7, then 0.49 becomes 0.5, then 0.35 becomes 0.5."""
    config = ThinkingConfig(num_steps=3, step_size=0.3)
    result = think(half_square, torch.ones(1, 1, dtype=torch.float64), config, project=floor_at_half)
    assert [p.item() for p in result.predictions] == pytest.approx([0.7, 0.5, 0.5])
    assert result.energies[:, 0].tolist() == pytest.approx([0.5, 0.245, 0.125, 0.125])
    low = torch.full((1, 1), 0.1, dtype=torch.float64)
    assert torch.equal(think(half_square, low, num_steps=0, project=floor_at_half).final, low)


def test_known_pixels_are_put_back_and_stopped_samples_stay_with_their_own():
    """The projection knows each sample by its place in the whole batch, also when some have left it."""
    known = images(3)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[..., :2] = True
    scale = torch.tensor([1.0, 0.1, 0.3], dtype=torch.float64)
    sizes: list[int] = []

    def energy(candidate: Tensor, scale: Tensor) -> Tensor:
        sizes.append(len(candidate))
        return scale * half_square(candidate)

    config = ThinkingConfig(num_steps=30, step_size=0.9, tolerance=1e-3)
    result = think(energy, known, config, context=(scale,), project=lambda y: torch.where(mask, known, y))
    assert sizes[-1] < 3 and result.num_steps.unique().numel() == 3
    assert torch.equal(result.final[mask], known[mask])
    kept = (1 - 0.9 * scale) ** result.num_steps
    torch.testing.assert_close(result.final[~mask], (kept[:, None, None, None] * known)[~mask])
    best = best_of(energy, [known, known], config, context=(scale,), project=lambda y: torch.where(mask, known, y))
    torch.testing.assert_close(best.final, result.final)


def test_a_projection_is_part_of_the_graph():
    """The second pixel is put back after each step: its gradient is 0, that of the free one 0.9^2."""
    start = torch.full((1, 2), 3.0, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[True, False]])
    config = ThinkingConfig(num_steps=2, step_size=0.1, detach_between_steps=False)
    fixed = torch.full((1, 2), 5.0, dtype=torch.float64)
    result = think(
        half_square, start, config, create_graph=True, differentiate_start=True, project=lambda y: torch.where(keep, y, fixed)
    )
    (gradient,) = torch.autograd.grad(result.final.sum(), start)
    assert gradient.flatten().tolist() == pytest.approx([0.81, 0.0])
    assert result.final.flatten().tolist() == pytest.approx([2.43, 5.0])


def test_a_projection_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 6\) of \(2, 3, 5, 7\)"):
        think(half_square, images(), project=lambda y: y[..., 1:])


def test_a_settled_sample_leaves_the_batch_and_saves_forward_passes():
    sizes: list[int] = []

    def energy(candidate: Tensor, scale: Tensor) -> Tensor:
        sizes.append(len(candidate))
        return scale * half_square(candidate)

    start, scale = torch.ones(2, 4, dtype=torch.float64), torch.tensor([1.0, 0.1], dtype=torch.float64)
    config = ThinkingConfig(num_steps=50, step_size=0.9, tolerance=1e-3)
    result = think(energy, start, config, context=(scale,))
    assert result.num_steps[0] < result.num_steps[1] < 50
    assert sum(sizes) == result.num_forward.sum() and sizes[-1] == 1
    # Every sample's result is that of thinking alone, and its energies repeat once it has stopped.
    for i in range(2):
        alone = think(energy, start[i : i + 1], config, context=(scale[i : i + 1],))
        torch.testing.assert_close(result.final[i], alone.final[0])
        assert result.num_steps[i] == alone.num_steps[0] and result.num_forward[i] == alone.num_forward[0]
    stopped = result.energies[int(result.num_steps[0]) :, 0]
    assert torch.equal(stopped, stopped[:1].expand_as(stopped))


def test_the_tolerance_may_be_a_share_of_the_step_before():
    """An energy that falls by the same fraction in every step never settles; one with a small second gain settles at once."""
    start = torch.ones(1, 4, dtype=torch.float64)
    halves = ThinkingConfig(num_steps=8, step_size=0.5, tolerance=0.2)  # energies fall to a quarter with every step
    assert think(half_square, start, halves).num_steps.tolist() == [3]  # 0.75, 0.1875, 0.047 against 0.15
    assert think(half_square, start, replace(halves, tolerance_of="previous")).num_steps.tolist() == [8]
    assert think(half_square, start, replace(halves, tolerance_of="previous", tolerance=0.3)).num_steps.tolist() == [2]
    with pytest.raises(ValueError, match="tolerance_of"):
        ThinkingConfig(tolerance_of="last")  # type: ignore[arg-type]


def test_the_tolerance_may_be_a_share_of_the_observation_s_energy():
    """A candidate with little energy relative to the observation needs no step, and no gradient is computed."""
    gradients: list[int] = []

    def energy(candidate: Tensor) -> Tensor:
        if candidate.requires_grad:
            candidate.register_hook(lambda gradient: gradients.append(len(gradient)))
        return half_square(candidate)

    good, poor = 0.1 * torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)  # energies 0.02 and 2
    config = ThinkingConfig(num_steps=9, step_size=0.5, tolerance=0.01, tolerance_of="observation")
    observed = torch.full((1,), 4.0, dtype=torch.float64)
    ended = think(energy, good, config, observation_energy=observed)
    assert ended.num_steps.tolist() == [0] and ended.num_forward.tolist() == [1] and gradients == []
    assert torch.equal(ended.final, good) and ended.energies.tolist() == [[pytest.approx(0.02)]]
    both = think(energy, torch.cat([good, poor]), config, observation_energy=observed.repeat(2))
    assert both.num_steps.tolist() == [0, 3]  # 2, 0.5, 0.125, 0.031 against 0.04
    assert both.num_forward.tolist() == [1, 4]
    torch.testing.assert_close(both.final[1:], think(energy, poor, config, observation_energy=observed).final)
    assert think(energy, poor, config).num_steps.tolist() == [4]  # 0.0078 against 0.02, of its own start
    worse = think(half_square, poor, replace(config, step_size=3.0), observation_energy=observed)  # 1 -> -2: the energy rises
    assert worse.num_steps.tolist() == [0] and torch.equal(worse.final, poor)


def test_the_tolerance_may_be_a_share_of_what_a_first_step_does_at_the_trainings_noise():
    """Stronger noise lowers the threshold of the gain."""
    weak, known, strong = (size * torch.ones(1, 4, dtype=torch.float64) for size in (0.5, 1.0, 2.0))
    config = ThinkingConfig(num_steps=20, step_size=0.5, tolerance=0.04, tolerance_of="training", training_gain=1.5)
    assert think(half_square, known, config).num_steps.tolist() == [4]  # 1.5, 0.375, 0.094, 0.023 against 0.06
    assert think(half_square, weak, config).num_steps.tolist() == [2]  # 0.375, 0.094 against 0.24
    assert think(half_square, strong, config).num_steps.tolist() == [6]  # 6, 1.5, 0.375, 0.094, 0.023, 0.006 against 0.015
    both = think(half_square, torch.cat([weak, strong]), config)
    assert both.num_steps.tolist() == [2, 6]
    flat = think(lambda y: 0 * half_square(y), known, replace(config, tolerance=0.0))  # nothing gained, nothing to divide by
    assert flat.num_steps.tolist() == [1]
    with pytest.raises(ValueError, match="training_gain"):
        ThinkingConfig(tolerance=0.1, tolerance_of="training")
    with pytest.raises(ValueError, match="training_gain"):
        ThinkingConfig(training_gain=0.0)


def test_with_a_tolerance_an_update_that_raises_the_energy_is_taken_back():
    start = torch.ones(1, 1, dtype=torch.float64)
    result = think(half_square, start, ThinkingConfig(num_steps=5, step_size=3.0, tolerance=0.0))  # y -> -2 y
    torch.testing.assert_close(result.final, start)
    assert result.num_steps.tolist() == [0]
    assert result.energies[-1].item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="tolerance"):
        think(half_square, start, ThinkingConfig(tolerance=0.0), create_graph=True)


@pytest.mark.parametrize("num_steps", [1, 5])  # the callback ends thinking at its last step, or before
def test_an_update_that_raises_the_energy_is_taken_back_where_a_callback_ends_thinking(num_steps: int):
    start = torch.tensor([[1.0], [0.1]], dtype=torch.float64)  # with a step of 3 both get worse: y -> -2 y
    config = ThinkingConfig(num_steps=num_steps, step_size=3.0, tolerance=0.0)
    result = think(half_square, start, config, callback=lambda step: step.index == 1)
    assert torch.equal(result.final, start) and result.num_steps.tolist() == [0, 0]
    assert torch.equal(result.energies[-1], half_square(start))


def test_the_callback_sees_the_start_and_every_update_and_can_end_thinking():
    seen: list[ThinkingStep] = []
    config = ThinkingConfig(num_steps=4, step_size=0.1)
    think(half_square, torch.ones(1, 1), config, callback=seen.append)
    assert [step.index for step in seen] == [0, 1, 2, 3, 4]
    assert [step.candidate.item() for step in seen] == pytest.approx([0.9**i for i in range(5)])
    assert [step.energies.item() for step in seen] == pytest.approx([0.5 * 0.81**i for i in range(5)])
    result = think(half_square, torch.ones(1, 1), config, callback=lambda step: step.index == 2)
    assert result.final.item() == pytest.approx(0.81) and result.energies.shape[0] == 3


def test_best_of_keeps_the_lowest_energy_of_each_element():
    starts = torch.tensor([[[3.0], [1.0]], [[2.0], [5.0]], [[4.0], [4.0]]])  # (N=3, B=2, 1)
    result = best_of(half_square, starts, ThinkingConfig(num_steps=1, step_size=0.5))
    assert result.chosen.tolist() == [1, 0]
    assert result.final.flatten().tolist() == pytest.approx([1.0, 0.5])
    assert result.energies.shape == (3, 2) and result.num_forward.tolist() == [6, 6]
    text = torch.stack([torch.full((1, 2, 3), 2.0), torch.tensor([[[1.0] * 3, [4.0] * 3]])])  # (N=2, B=1, S=2, V=3)
    assert best_of(text_energy, text, ThinkingConfig(step_size=0.5)).chosen.tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="at least one"):
        best_of(half_square, [])


def test_zero_steps_return_the_start_and_its_energy():
    start = images()
    result = think(half_square, start, num_steps=0)
    assert torch.equal(result.final, start) and result.energies.shape == (1, 2)
