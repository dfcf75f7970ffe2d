"""Activation checkpointing: first and second gradients equal those of plain blocks, with fewer kept tensors."""

import dataclasses

import pytest
import torch

from ebt_vision.benchmark.training_cost import held_bytes
from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.objectives.image import EBTObjective, ImageBatch, ObjectiveConfig
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.config import ConfigError, build_config

SIZES = dict(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=2, mlp_ratio=2.0)


def batch(dtype: torch.dtype) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 3, 12, 20, generator=generator, dtype=dtype)  # neither square nor the trained size
    return ImageBatch(clean=clean, noise=noise, generators=sample_generators(0, range(3)))


def ebt(*, checkpoint: bool, head: str = "quadratic", dtype: torch.dtype = torch.float64) -> PatchEBT:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(**SIZES, energy_head=head)).to(dtype)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=0.1)
    model.trunk.checkpoint_blocks = checkpoint
    return model


def gradients(model: PatchEBT, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    thinking = ThinkingConfig(num_steps=2, detach_between_steps=False)
    EBTObjective(model, ObjectiveConfig(thinking=thinking))(batch(dtype))["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("head", ["quadratic", "linear"])
def test_second_order_gradients_are_those_of_plain_blocks(head: str):
    """Two steps without a cut between them: the gradient of the second step's gradient goes through the first one's too."""
    plain, again = (gradients(ebt(checkpoint=checkpoint, head=head)) for checkpoint in (False, True))
    for name, gradient in plain.items():
        if gradient is None:
            assert again[name] is None or not again[name].any(), name  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(again[name], gradient, rtol=1e-10, atol=1e-14, msg=name)


def test_the_autocast_of_the_forward_pass_is_that_of_the_second_order():
    """If blocks were computed again in float32, the gradients would differ by the rounding of bfloat16."""
    found = []
    for checkpoint in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            model = ebt(checkpoint=checkpoint, dtype=torch.float32)
            loss = EBTObjective(model, ObjectiveConfig())(batch(torch.float32))["loss"]
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999


def test_first_order_gradients_are_those_of_plain_blocks():
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = PatchRegressor(PatchRegressorConfig(**SIZES)).double()  # type: ignore[arg-type]
        torch.nn.init.normal_(model.head.weight, std=0.1)
        model.trunk.checkpoint_blocks = checkpoint
        model(batch(torch.float64).clean).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-14)


def kept(model: PatchEBT) -> int:
    return held_bytes(lambda: EBTObjective(model, ObjectiveConfig())(batch(torch.float64))["loss"], model.parameters())


def test_less_is_kept_for_the_backward_pass():
    assert 0 < kept(ebt(checkpoint=True)) < 0.4 * kept(ebt(checkpoint=False))


def test_it_is_an_option_of_the_models_that_have_it():
    raw = dict(name="tiny", model_type="patch_ebt", model=SIZES, data=dict(path="."), train=dict(checkpoint_blocks=True))
    config = build_config(raw)
    model = build_model(config)
    build_objective(model, config)
    assert model.trunk.checkpoint_blocks  # type: ignore[union-attr]
    dit = build_config(raw | dict(model_type="dit", model=dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)))
    with pytest.raises(ConfigError, match="checkpoint_blocks is for"):
        build_objective(build_model(dit), dit)
    with pytest.raises(ValueError, match="compile: false"):
        dataclasses.replace(config.train, compile=True)
