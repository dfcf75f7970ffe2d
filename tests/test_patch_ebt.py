"""The energy contract of PatchEBT: shapes, independence, second order against finite differences, save and load."""

import json
from pathlib import Path

import pytest
import torch

from ebt_vision.core.energy_functions import CompiledEnergy
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.patches import patchify, unpatchify
from ebt_vision.models.pretrained_model import CheckpointError
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.models.trunk_config import PRESETS

TINY = dict(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)


def tiny_ebt(**changes: object) -> PatchEBT:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(**(TINY | changes)))  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=0.2)  # the zero head of a fresh model would hide mistakes
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("head", ["linear", "quadratic"])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_second_order_gradients_match_float64_finite_differences(head: str, context: bool, detach: bool):
    """The training gradient, through two thinking steps, of every parameter against central differences."""
    model = tiny_ebt(energy_head=head, observation_context=context).double()
    noisy, clean = images(2, 3, 4, 6).double(), images(2, 3, 4, 6).double() * 0.5
    config = ThinkingConfig(num_steps=2, detach_between_steps=detach)

    def loss(create_graph: bool) -> torch.Tensor:
        result = think(
            model,
            noisy,
            config,
            context=model.context_of(noisy),
            step_size=0.3 * model.step_size,
            create_graph=create_graph,
        )
        return sum(((p - clean) ** 2).mean() for p in result.predictions[-1 if not detach else 0 :])  # type: ignore[return-value]

    if detach:  # a detached second step does not see the first one's parameters: check one step alone
        config = ThinkingConfig(num_steps=1)
    loss(True).backward()
    epsilon = 1e-5
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += epsilon * direction
            high = loss(False)
            parameter -= 2 * epsilon * direction
            low = loss(False)
            parameter += epsilon * direction
        expected = (high - low).item() / (2 * epsilon)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name


def test_the_compiled_gradient_gives_the_eager_values_and_second_order():
    model = tiny_ebt()
    noisy = images(2, 3, 8, 8)
    grads = []
    # aot_eager traces first and second order as inductor does, and needs no C++ compiler.
    for energy_fn in (model, CompiledEnergy(model, backend="aot_eager")):
        model.zero_grad()
        result = think(energy_fn, noisy, step_size=model.step_size, num_steps=2, create_graph=True)
        result.final.square().mean().backward()
        grads.append([result.energies.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for eager, functional in zip(*grads, strict=True):
        torch.testing.assert_close(functional, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["linear", "quadratic"])
def test_the_energy_is_a_sum_over_patches_and_works_at_any_size(head: str):
    model = tiny_ebt(energy_head=head)
    for height, width in ((8, 8), (4, 14), (2, 2), (22, 10)):
        candidate = images(3, 3, height, width)
        energy_map = model.energy_map(candidate)
        assert energy_map.shape == (3, height // 2, width // 2) and energy_map.dtype == torch.float32
        torch.testing.assert_close(model(candidate), energy_map.sum((1, 2)))
    with pytest.raises(ValueError, match="patch_size=2"):
        model(images(1, 3, 5, 8))
    with pytest.raises(ValueError, match="observation_context"):
        model(images(1, 3, 8, 8), images(1, 3, 8, 8))


@pytest.mark.parametrize("context", [False, True])
def test_an_image_s_result_does_not_depend_on_its_batch(context: bool):
    model = tiny_ebt(observation_context=context)
    noisy = images(5, 3, 8, 12)
    whole = think(model, noisy, context=model.context_of(noisy), num_steps=3, step_size=0.5)
    for i in range(5):
        one = noisy[i : i + 1]
        alone = think(model, one, context=model.context_of(one), num_steps=3, step_size=0.5)
        torch.testing.assert_close(alone.final[0], whole.final[i], rtol=1e-4, atol=1e-5)


def test_the_observation_is_seen_where_it_is_context():
    model = tiny_ebt(observation_context=True)
    candidate = images(1, 3, 8, 8)
    assert not torch.allclose(model(candidate, candidate), model(candidate, candidate + 0.5))


def test_patchify_is_inverted_and_keeps_patches_together():
    picture = images(2, 3, 6, 4)
    patches = patchify(picture, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(unpatchify(patches, 2, 6, 4), picture)
    torch.testing.assert_close(patches[0, 1].sum(), picture[0, :, 0:2, 2:4].sum())


def test_wrong_sizes_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="use 28 or 32"):
        PatchEBTConfig(img_size=30, patch_size=4, embed_dim=64, num_heads=4)
    with pytest.raises(ValueError, match="larger embed_dim"):
        PatchEBTConfig(img_size=64, patch_size=8, embed_dim=128, num_heads=4, energy_head="linear")
    with pytest.raises(ValueError, match="num_heads"):
        PatchEBTConfig(embed_dim=100, num_heads=3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_the_paper_s_large_has_its_size(name: str):
    with torch.device("meta"):
        model = PatchEBT(PatchEBTConfig(**PRESETS[name]))  # type: ignore[arg-type]
    if name == "paper_large":  # 24 blocks of 6 d^2: about half of the paper's 685 M is adaLN that we do not need
        assert 3.3e8 < model.num_parameters < 3.5e8


def test_saving_and_loading_gives_the_same_energies_and_strictly(tmp_path: Path):
    model = tiny_ebt()
    model.save_pretrained(tmp_path / "ebt")
    assert {path.name for path in (tmp_path / "ebt").iterdir()} >= {"config.json", "model.safetensors"}
    loaded = load_pretrained(str(tmp_path / "ebt"))
    candidate = images(2, 3, 8, 8)
    assert torch.equal(loaded(candidate), model(candidate)) and loaded.config == model.config
    assert torch.equal(PatchEBT.from_pretrained(str(tmp_path / "ebt"))(candidate), model(candidate))

    stored = json.loads((tmp_path / "ebt" / "config.json").read_text())
    stored["config"]["depth"] = 3
    (tmp_path / "ebt" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(str(tmp_path / "ebt"))
    with pytest.raises(CheckpointError, match="neither a shipped checkpoint"):
        load_pretrained(str(tmp_path / "nothing"))


def test_a_damaged_weights_file_is_one_line(tmp_path: Path):
    tiny_ebt().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        load_pretrained(str(tmp_path))


def test_the_regressor_shares_the_trunk_and_the_parameter_count():
    regressor = PatchRegressor(PatchRegressorConfig(**TINY))
    noisy = images(2, 3, 4, 10)
    assert regressor(noisy).shape == noisy.shape and float(regressor(noisy).detach().abs().max()) == 0.0
    assert regressor.num_parameters + 1 == tiny_ebt().num_parameters  # the step size is the EBT's one more


def test_where_compiling_fails_training_goes_on_with_a_notice():
    def no_compiler(graph: object, inputs: object) -> object:
        raise RuntimeError("no C++ compiler")

    model, noisy = tiny_ebt(), images(2, 3, 8, 8)
    energy_fn = CompiledEnergy(model, backend=no_compiler)
    grads = []
    for function in (model, energy_fn):
        model.zero_grad()
        if function is energy_fn:
            with pytest.warns(UserWarning, match="cannot be compiled .*no C\\+\\+ compiler"):
                result = think(function, noisy, step_size=model.step_size, num_steps=2, create_graph=True)
        else:
            result = think(function, noisy, step_size=model.step_size, num_steps=2, create_graph=True)
        result.final.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
