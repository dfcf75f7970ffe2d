"""The diffusion model on the trunk of the EBT: its network, its training, and its use as a denoiser and an extractor."""

import pytest
import torch
from torch import nn

from ebt_vision.core.rng import make_generator, sample_generators
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.load import denoiser_for, load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models.patch_diffusion import PatchDiffusion
from ebt_vision.models.patch_diffusion_config import PatchDiffusionConfig
from ebt_vision.models.patches import unpatchify
from ebt_vision.noise.processes import alphas_cumprod, to_model_range
from ebt_vision.objectives.image import ImageBatch, ObjectiveConfig
from ebt_vision.probing.features import Feature, FeatureCondition, extract
from ebt_vision.probing.load import load_extractor
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.config import build_config

PLAIN = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0)
CONV = PLAIN | dict(patch_size=8, stem_widths=(8, 16), stem_unshuffle=2)


def network(sizes: dict) -> PatchDiffusion:
    torch.manual_seed(0)
    model = PatchDiffusion(PatchDiffusionConfig(**sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # the plain head starts at zero
    return model.eval()


@pytest.mark.parametrize("sizes", [PLAIN, CONV])
def test_the_noise_is_the_output_of_the_head_with_the_timestep_in_every_token(sizes: dict):
    model = network(sizes)
    x, t = torch.randn(2, 3, 16, 32, generator=make_generator(0)), torch.tensor([3, 700])
    noise, variance = model(x, t)
    assert variance is None and noise.shape == x.shape
    trunk = model.trunk
    added = model.embedder(model.frequencies(t))
    assert added.shape == (2, 32)
    tokens = trunk._embed(x) + added[:, None]
    tokens = trunk.norm(trunk._run_blocks(tokens, (16 // sizes["patch_size"], 32 // sizes["patch_size"]), [1])[0])
    plain = sizes is PLAIN
    expected = unpatchify(model.head(tokens), 4, 16, 32) if plain else model.head(tokens, trunk.stem(x)[1], (2, 4))
    torch.testing.assert_close(noise, expected)
    assert not torch.allclose(noise, model(x, t.flip(0))[0], atol=1e-3)  # the timestep matters
    torch.testing.assert_close(model(x[1:], t[1:])[0], noise[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_features(x, t), tokens)


@pytest.mark.parametrize("sizes", [PLAIN, CONV])
def test_a_trunk_reconstructs_as_before_without_a_timestep(sizes: dict):
    model = network(sizes)
    x = torch.randn(2, 3, 16, 16, generator=make_generator(0))
    output = unpatchify(model.trunk.output_patches(model.head, x), sizes["patch_size"], 16, 16)
    reconstruction = unpatchify(model.trunk.reconstruct_patches(model.head, x), sizes["patch_size"], 16, 16)
    torch.testing.assert_close(reconstruction, output if sizes is PLAIN else x + output)


def test_the_loss_is_the_squared_error_of_the_noise():
    model = network(PLAIN)
    clean, noise = torch.randn(2, 2, 3, 16, 16, generator=make_generator(1))
    t = torch.tensor([0, 400])
    alpha_bar = alphas_cumprod()[t].float()[:, None, None, None]
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    expected = (model(noisy, t)[0] - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(model.loss(clean, noise, t), expected)


def test_it_learns_from_a_config_and_denoises_the_same(tmp_path):
    sizes = CONV | dict(stem_widths=[8, 16])
    config = build_config(
        dict(
            name="x",
            model_type="patch_diffusion",
            model=sizes,
            data=dict(path="unused", img_size=16),
            objective=dict(level=0.1),
        )
    )
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, PatchDiffusion)
    objective = build_objective(model, config)
    assert objective.config == ObjectiveConfig(level=0.1)
    clean = torch.zeros(8, 3, 16, 16) + torch.linspace(-0.5, 0.5, 8)[:, None, None, None]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        generators = sample_generators(0, range(8), step)
        noise = torch.stack([torch.randn(3, 16, 16, generator=g) for g in generators])
        loss = objective(ImageBatch(clean=clean, noise=noise, generators=generators))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.3) and sum(losses[-5:]) / 5 < 0.8 * losses[0]

    model.eval().save_pretrained(tmp_path / "model")
    denoiser = load_denoiser(str(tmp_path / "model"))
    assert isinstance(denoiser, DiTDenoiser)
    images = torch.rand(1, 3, 16, 16, generator=make_generator(4))
    result = denoiser_for(model).denoise(images, DenoiseOptions(num_steps=3, noise_level=0.1))
    expected = model.ddim(to_model_range(images), 99, 3)
    torch.testing.assert_close(to_model_range(result.image), expected.clamp(-1, 1))
    extractor = load_extractor(str(tmp_path / "model"))
    feature = Feature(condition=FeatureCondition(timestep=50), layer="block1", pool="mean")
    (found,) = extract(extractor, images, [0], [feature]).values()
    assert found.shape == (1, 32)


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="use 'vp'"):
        PatchDiffusionConfig(**PLAIN, noise_process="awgn")
    with pytest.raises(ValueError, match="images and timesteps"):
        network(PLAIN).forward_features(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="patch"):
        network(PLAIN)(torch.zeros(1, 3, 18, 16), torch.tensor([0]))
