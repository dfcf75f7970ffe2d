"""Attention by blocks: value and derivatives equal PyTorch's, and an energy trains as with the math path."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models import blocks, blockwise_attention
from ebt_vision.models.blockwise_attention import blockwise_attention as attend
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.objectives.image import EBTObjective, ImageBatch, ObjectiveConfig


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK_SCORES", 16 * 40)  # 40 queries in blocks of 16, 16 and 8


@pytest.fixture
def from_nine_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCKWISE_TOKENS", 9)


def queries_keys_values(tokens: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.usefixtures("one_thread")
def test_value_and_both_derivatives_are_those_of_finite_differences():
    inputs = queries_keys_values()
    torch.testing.assert_close(attend(*inputs), F.scaled_dot_product_attention(*inputs))
    inputs = [x[:1, :2, :20, :4].detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(attend, inputs) and torch.autograd.gradgradcheck(attend, inputs)


def test_second_derivatives_are_those_of_the_math_path():
    found = []
    for function in (attend, F.scaled_dot_product_attention):
        inputs = queries_keys_values()
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
            sum(g.cos().sum() for g in gradients).backward()
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_third_derivative_is_refused():
    inputs = queries_keys_values()
    first = torch.autograd.grad(attend(*inputs).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()


def model(**options) -> PatchEBT:
    torch.manual_seed(0)
    ebt = PatchEBT(PatchEBTConfig(img_size=32, embed_dim=32, depth=2, num_heads=2, **options)).double()
    torch.nn.init.normal_(ebt.head.weight, std=0.1)
    return ebt


def gradients(ebt: PatchEBT, steps: int = 2) -> dict[str, Tensor]:
    images = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = ImageBatch(clean=images[0], noise=images[1], generators=[torch.Generator().manual_seed(i) for i in range(2)])
    thinking = ThinkingConfig(num_steps=steps, detach_between_steps=False)
    EBTObjective(ebt, ObjectiveConfig(thinking=thinking))(batch)["loss"].backward()
    return {name: p.grad for name, p in ebt.named_parameters() if p.grad is not None}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of tokens in each call of blockwise attention."""
    calls: list[int] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[-2])
        return attend(q, k, v)

    monkeypatch.setattr(blocks, "blockwise_attention", attention)
    return calls


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_energy_trains_on_it_as_on_the_math_path(checkpoint: bool, monkeypatch: pytest.MonkeyPatch):
    plain, ebt, calls = gradients(model()), model(), counted(monkeypatch)
    assert not calls
    monkeypatch.setattr(blocks, "BLOCKWISE_TOKENS", 16)
    ebt.trunk.checkpoint_blocks = checkpoint
    for name, gradient in gradients(ebt).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-13, msg=name)
    assert set(calls) == {16}


def test_inference_and_autocast_keep_pytorchs_kernels(from_nine_tokens_on: None, monkeypatch: pytest.MonkeyPatch):
    ebt, calls = model().float(), counted(monkeypatch)
    image = torch.zeros(1, 3, 32, 32)
    think(ebt, image, num_steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        think(ebt, image, num_steps=1, create_graph=True)
    assert not calls


def test_functional_gradients_work_and_compiled_ones_leave_it_alone(from_nine_tokens_on: None, monkeypatch: pytest.MonkeyPatch):
    """torch.compile computes the second derivative of such functions wrongly, so it must use the math path."""
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for function in (lambda ebt: ebt, lambda ebt: CompiledEnergy(ebt, backend="aot_eager")):
        ebt, calls = model(), counted(monkeypatch)
        result = think(function(ebt), image, num_steps=1, create_graph=True, evaluate_final=False)
        result.final.square().sum().backward()
        found.append({name: p.grad for name, p in ebt.named_parameters() if p.grad is not None})
        assert bool(calls) == (len(found) == 1)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-13, msg=name)
