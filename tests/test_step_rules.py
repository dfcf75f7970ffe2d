"""Step rules by hand arithmetic on quadratic bowls, and what they owe to the loop: samples apart, tolerances, graphs."""

import pytest
import torch
from torch import Tensor

from ebt_vision.core.best_of import best_of
from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.rng import sample_generators
from ebt_vision.core.step_rules import STEP_RULES, Backtracking, BarzilaiBorwein, Fixed, Momentum, find_step_rule
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig

RULES = list(STEP_RULES)


def bowl(candidate: Tensor, *curvature: Tensor) -> Tensor:
    """E = k |y|^2 / 2 with k = 1, or one for each sample or each value."""
    k = curvature[0] if curvature else 1.0
    return 0.5 * (k * candidate.square()).flatten(1).sum(1)


def text_bowl(candidate: Tensor, curvature: Tensor) -> Tensor:
    """(B, S, V) -> (B, S) with a curvature (B, S) for each position."""
    return 0.5 * curvature * candidate.square().sum(-1)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def values(rule, steps: int, curvature: Tensor | None = None, start: Tensor | None = None, step_size: float = 0.1) -> list:
    """The iterates of a rule from 1 as nested lists."""
    start = ones(1, 1) if start is None else start
    config = ThinkingConfig(num_steps=steps, step_size=step_size, step_rule=rule)
    result = think(bowl, start, config, context=() if curvature is None else (curvature,))
    return [p[0].tolist() for p in result.predictions]


def test_fixed_is_plain_descent_and_the_default():
    assert values("fixed", 3) == [pytest.approx([0.9]), pytest.approx([0.81]), pytest.approx([0.729])]
    assert ThinkingConfig().step_rule == "fixed" and find_step_rule("fixed") == Fixed()


def test_barzilai_borwein_finds_the_length_of_the_second_step():
    """Curvatures 1 and 4 from (1, 1): (0.9, 0.6); dy = (-0.1, -0.4), dg = (-0.1, -1.6), a = 0.17 / 0.65; g = (0.9, 2.4)."""
    k = torch.tensor([[1.0, 4.0]], dtype=torch.float64)
    first, second = values("barzilai-borwein", 2, k, ones(1, 2))
    assert first == pytest.approx([0.9, 0.6])
    assert second == pytest.approx([0.9 - 17 / 65 * 0.9, 0.6 - 17 / 65 * 2.4])
    assert values(BarzilaiBorwein(longest=10.0), 2)[1] == pytest.approx([0.0])  # one curvature: a = 1 is the minimum


def test_barzilai_borwein_keeps_within_its_multiples():
    assert values("barzilai-borwein", 2)[1] == pytest.approx([0.9 * (1 - 0.6)])  # a = 1 would be 10 times the step size
    # Curvature 40: 1 -> -3; a = 1 / 40 is a quarter of the step size, so half of it is taken: -3 + 0.05 * 120.
    assert values("barzilai-borwein", 2, torch.tensor(40.0))[1] == pytest.approx([3.0])
    # Where the energy curves down, the longest step: 1 -> 1.1 -> 1.1 + 0.6 * 1.1.
    assert values("barzilai-borwein", 2, torch.tensor(-1.0))[1] == pytest.approx([1.76])
    flat = values("barzilai-borwein", 3, start=torch.zeros(1, 1, dtype=torch.float64))
    assert flat == [[0.0]] * 3  # nothing moves, and nothing is divided by zero


def test_momentum_is_nesterov_s_with_a_plain_first_step():
    """0.9; then -0.09 and half of it: 0.765; v = -0.045 - 0.0765 = -0.1215, so 0.765 - 0.0765 - 0.06075."""
    assert [v[0] for v in values("momentum", 3)] == pytest.approx([0.9, 0.765, 0.62775])
    assert values(Momentum(momentum=0.0), 3) == values("fixed", 3)
    # Nesterov's own two sequences: x descends from the look-ahead point z.
    x, z, seen = 1.0, 1.0, []
    for step in range(6):
        x_next = z - 0.3 * z
        z = x_next + (0.8 if step else 0.0) * (x_next - x)
        x = x_next
        seen.append(z)
    assert [v[0] for v in values(Momentum(momentum=0.8), 6, step_size=0.3)] == pytest.approx(seen)


def test_backtracking_halves_the_step_until_the_energy_falls_enough():
    """Curvature 1, alpha 3: 1 -> -2 raises E = 0.5 to 2; 1.5 -> -0.5 lowers it to 0.125. Asked for: 0.5 - 1e-4 * 1.5."""
    result = think(bowl, ones(1, 1), ThinkingConfig(num_steps=1, step_size=3.0, step_rule="backtracking"))
    assert result.final.item() == pytest.approx(-0.5)
    assert result.num_forward.tolist() == [4]  # the gradient, two trials, the last energy
    strict = Backtracking(share=0.3)  # 0.125 <= 0.5 - 0.3 * 1.5 does not hold; 0.75 does: 0.03125 <= 0.5 - 0.3 * 0.75
    assert values(strict, 1, step_size=3.0)[0] == pytest.approx([0.25])
    assert values(Backtracking(first=4.0, num_trials=1), 1, step_size=0.1)[0] == pytest.approx([0.6])
    assert values(Backtracking(num_trials=2, shrink=0.9), 2, step_size=3.0) == [[1.0], [1.0]]  # 3 and 2.7 raise it: it stays


@pytest.mark.parametrize("step_size", [0.1, 1.5, 1000.0])
def test_backtracking_never_raises_an_energy(step_size: float):
    def bumpy(candidate: Tensor) -> Tensor:
        return (candidate.square() + 3 * torch.cos(5 * candidate)).flatten(1).sum(1)

    start = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = ThinkingConfig(num_steps=6, step_size=step_size, step_rule="backtracking")
    energies = think(bumpy, start, config, project=lambda y: y.clamp(-3, 3)).energies
    assert (energies.diff(dim=0) <= 0).all()
    assert (energies[-1] < energies[0]).any() == (step_size < 1000.0)  # the last is too long for five trials


def test_backtracking_asks_for_the_energy_where_the_projection_ends():
    """The step of 2 from 1 ends at -1, which gains nothing; but the projection puts it at 0.5, which does: no second trial."""
    config = ThinkingConfig(num_steps=1, step_size=2.0, step_rule="backtracking")
    result = think(bowl, ones(1, 1), config, project=lambda y: y.clamp(min=0.5))
    assert result.final.item() == pytest.approx(0.5) and result.num_forward.tolist() == [3]
    assert think(bowl, ones(1, 1), config).final.item() == pytest.approx(0.0)  # without: the second trial, 1


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_s_result_does_not_depend_on_its_batch(rule: str):
    """Also as samples leave the batch one after the other, with noise and random step sizes."""
    start = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor([8.0, 0.2, 1.0, 3.0], dtype=torch.float64)
    sizes: list[int] = []

    def energy(candidate: Tensor, scale: Tensor) -> Tensor:
        sizes.append(len(candidate))
        return scale * (bowl(candidate) + 0.1 * candidate.pow(4).flatten(1).sum(1))

    config = ThinkingConfig(num_steps=12, step_size=0.3, tolerance=0.01, step_rule=rule, step_size_factor=1.5)
    whole = think(energy, start, config, context=(scale,), generator=sample_generators(3, range(4)))
    assert whole.num_steps.unique().numel() > 1 and sum(sizes) == whole.num_forward.sum()
    for i in range(4):
        one = slice(i, i + 1)
        alone = think(energy, start[one], config, context=(scale[one],), generator=sample_generators(3, [i]))
        torch.testing.assert_close(whole.final[one], alone.final)
        assert whole.num_steps[i] == alone.num_steps[0] and whole.num_forward[i] == alone.num_forward[0]
    assert (whole.energies.diff(dim=0) <= 0).all()  # with a tolerance no energy rises, whatever the rule


@pytest.mark.parametrize("rule", RULES)
def test_best_of_thinks_every_candidate_by_the_rule(rule: str):
    starts = [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
    config = ThinkingConfig(num_steps=3, step_size=0.3, step_rule=rule)
    result = best_of(bowl, starts, config)
    for start, thought in zip(starts, result.results, strict=True):
        assert torch.equal(thought.final, think(bowl, start, config).final)
    assert torch.equal(bowl(result.final), result.energies.min(0).values)


@pytest.mark.parametrize("rule", RULES)
def test_positions_of_a_text_have_lengths_of_their_own(rule: str):
    start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature = torch.tensor([[0.5, 1.0, 6.0], [30.0, 2.0, 0.1]], dtype=torch.float64)
    config = ThinkingConfig(num_steps=4, step_size=0.3, step_rule=rule)
    whole = think(text_bowl, start, config, context=(curvature,)).final
    for position in range(3):
        one = slice(position, position + 1)
        alone = think(text_bowl, start[:, one], config, context=(curvature[:, one],)).final
        torch.testing.assert_close(whole[:, one], alone)


def test_the_learned_step_size_gets_the_gradient_of_every_rule():
    """y2 = y0 (1 - a) (1 - b a) with b = 1, or the multiple of the rule: d/da = -y0 (1 + b - 2 a b)."""
    for rule, multiple in {"fixed": 1.0, "momentum": 1.5, "barzilai-borwein": 6.0, "backtracking": 1.0}.items():
        alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        config = ThinkingConfig(num_steps=2, detach_between_steps=False, step_rule=rule)
        result = think(bowl, 3 * ones(1, 1), config, step_size=alpha, create_graph=True)
        result.final.sum().backward()
        assert alpha.grad is not None
        assert alpha.grad.item() == pytest.approx(-3 * (1 + multiple - 0.2 * multiple)), rule


def test_what_a_rule_remembers_is_cut_from_the_graph_with_the_steps():
    """Detached, the last step alone trains: y3 = c - (1 + m) a y2 + m^2 v2, v2 a constant."""
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    config = ThinkingConfig(num_steps=3, step_rule="momentum")
    result = think(bowl, ones(1, 1), config, step_size=alpha, create_graph=True)
    result.final.sum().backward()
    assert alpha.grad is not None and alpha.grad.item() == pytest.approx(-1.5 * 0.765)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["fixed", "momentum", "backtracking"])
def test_the_start_gets_the_gradient_of_finite_differences(rule: str):
    def quartic(candidate: Tensor) -> Tensor:
        return candidate.pow(4).flatten(1).sum(1)

    config = ThinkingConfig(num_steps=3, step_size=0.1, detach_between_steps=False, step_rule=rule)
    start = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for energy_fn in (quartic, CompiledEnergy(quartic, backend="eager")):
        assert torch.autograd.gradcheck(
            lambda y, e=energy_fn: think(e, y, config, create_graph=True, differentiate_start=True).final,  # type: ignore[misc]
            start,
        )


def test_a_gradient_that_would_be_wrong_is_refused():
    config = ThinkingConfig(num_steps=2, detach_between_steps=False, step_rule="barzilai-borwein")
    start = ones(1, 1).requires_grad_()
    with pytest.raises(ValueError, match="barzilai-borwein.*use 'fixed', 'momentum' or 'backtracking'"):
        think(bowl, start, config, create_graph=True, differentiate_start=True)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ThinkingConfig(step_rule="newton"), "step_rule='newton' is unknown; use one of fixed, barzilai-borwein"),
        (lambda: BarzilaiBorwein(shortest=0.0), "shortest=0.0"),
        (lambda: BarzilaiBorwein(longest=0.1), "longest=0.1 .* use 0.5"),
        (lambda: Momentum(momentum=1.0), "momentum=1.0"),
        (lambda: Backtracking(shrink=1.0), "shrink=1.0"),
        (lambda: Backtracking(share=0.0), "share=0.0"),
        (lambda: Backtracking(first=0.0), "first=0.0"),
        (lambda: Backtracking(num_trials=0), "num_trials=0"),
    ],
)
def test_a_bad_setting_is_refused_by_name(make, said: str):
    with pytest.raises(ValueError, match=said):
        make()
