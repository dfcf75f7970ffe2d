"""Optimisers: Muon against hand arithmetic and torch's AdamW, parameter groups, the schedule."""

import pytest
import torch
from torch import nn

from ebt_vision.training.muon import Muon
from ebt_vision.training.optim import build_optimizer, set_learning_rate
from ebt_vision.training.settings import OptimConfig


def test_muon_moves_a_matrix_along_its_orthogonalised_gradient():
    """The first update has the direction U V^T of the gradient's decomposition, at a root mean square of 0.2 times lr."""
    weight = nn.Parameter(torch.zeros(6, 10))
    gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([dict(params=[weight], orthogonal=True)], lr=0.5)
    weight.grad = gradient.clone()
    optimizer.step()
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    expected = -0.5 * 0.2 * 10**0.5 * (u @ vh)
    # Five Newton-Schulz steps bring the singular values near one, not to it (Jordan et al. 2024: 0.7 to 1.2).
    cosine = torch.cosine_similarity(weight.detach().flatten(), expected.flatten(), dim=0)
    assert cosine > 0.98
    torch.testing.assert_close(torch.linalg.svdvals(weight.detach() / (-0.5 * 0.2 * 10**0.5)), torch.ones(6), atol=0.35, rtol=0)


def test_muon_does_not_depend_on_the_gradient_s_scale_and_decays_weights():
    start = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    results = []
    for scale, decay in ((1.0, 0.0), (1000.0, 0.0), (1.0, 0.1)):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient * scale
        Muon([dict(params=[weight], orthogonal=True, weight_decay=decay)], lr=0.1).step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0] - results[2], 0.1 * 0.1 * start)


def test_muon_in_bfloat16_makes_nearly_the_same_update():
    updates = []
    for bfloat16 in (False, True):
        weight = nn.Parameter(torch.zeros(6, 10))
        weight.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
        Muon([dict(params=[weight], orthogonal=True)], lr=0.5, bfloat16=bfloat16).step()
        assert weight.dtype == torch.float32
        updates.append(weight.detach().flatten())
    assert not torch.equal(*updates)
    assert torch.cosine_similarity(*updates, dim=0) > 0.999


def test_muon_s_other_groups_are_adamw():
    ours = nn.Parameter(torch.linspace(-1, 1, 7))
    theirs = nn.Parameter(ours.detach().clone())
    muon = Muon([dict(params=[ours], weight_decay=0.1)], lr=0.01, betas=(0.9, 0.99))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for i in range(5):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(i))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_muon_takes_a_convolution_as_a_matrix_and_refuses_vectors():
    kernel = nn.Parameter(torch.zeros(4, 3, 2, 2))
    matrix = nn.Parameter(torch.zeros(4, 12))
    for parameter in (kernel, matrix):
        gradient = torch.randn(48, generator=torch.Generator().manual_seed(3))
        parameter.grad = gradient.view_as(parameter)
        Muon([dict(params=[parameter], orthogonal=True)], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(), matrix.detach().flatten())
    with pytest.raises(ValueError, match="matrices"):
        Muon([dict(params=[nn.Parameter(torch.zeros(3))], orthogonal=True)], lr=0.1)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.one_class = nn.Embedding(1, 4)
        self.log_step_size = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_and_schedule(name: str):
    model = _Model()
    config = OptimConfig(optimizer=name, lr=0.1, weight_decay=0.5, warmup_updates=2, final_lr_ratio=0.0, step_size_lr_ratio=3.0)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config)
    assert [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups] == [[(2, 3)], [(2,), (1, 4)], [()]]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0, 0.0]
    rates = [set_learning_rate(optimizer, config, step, 12) for step in (0, 1, 2, 7, 12)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.0])
    set_learning_rate(optimizer, config, 2, 12)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.3])


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"optim\.optimizer='sgd' is unknown; use 'adamw' or 'muon'"):
        OptimConfig(optimizer="sgd")  # type: ignore[arg-type]
