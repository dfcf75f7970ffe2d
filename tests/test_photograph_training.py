"""Training on realistic noise with a convolutional stem, the trained reconstruction and proposals, on tiny images."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ebt_vision.core.rng import sample_generators
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.objectives.image import EBTObjective, ImageBatch, ObjectiveConfig
from ebt_vision.training.build import build_model, build_objective, build_task
from ebt_vision.training.config import ConfigError, build_config
from ebt_vision.training.image_task import cut_images
from ebt_vision.training.loop import Trainer

MODEL = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, stem_widths=[4, 8], noise_process="awgn")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(12):
        corners = random.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((24, 16), Image.Resampling.BILINEAR).save(folder / f"{i:02d}.png")
    return folder


def experiment(photos: Path, model_type: str = "patch_ebt", **sections: dict) -> dict:
    raw: dict = dict(
        name="tiny",
        model_type=model_type,
        model=MODEL,
        data=dict(path=str(photos), img_size=16, crop="random", flip=True),
        objective=dict(loss="l1", realistic_noise=dict(gaussian_share=0.3)),
        optim=dict(optimizer="muon", lr=2e-3, warmup_updates=2, final_lr_ratio=1.0),
        train=dict(num_updates=6, batch_size=8, ema_decay=0.9, log_every=1, checkpoint_every=3),
        validation=dict(path=None),
    )
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return raw


HONEST = dict(reconstruction_weight=1.0, proposal_share=0.5)
REPLAY = dict(capacity=8, share=0.25, max_age=3)


@pytest.mark.parametrize(
    ("model_type", "sections"), [("patch_regressor", {}), ("patch_ebt", dict(objective=HONEST, replay=REPLAY))]
)
def test_a_resumed_run_ends_at_the_same_weights(model_type: str, sections: dict, photos: Path, tmp_path: Path):
    config = build_config(experiment(photos, model_type, **sections))  # a constant learning rate: any number of updates
    whole = Trainer(config, tmp_path / "whole", device="cpu").run()
    Trainer(replace(config, train=replace(config.train, num_updates=3)), tmp_path / "parts", device="cpu").run()
    Trainer(config, tmp_path / "parts", device="cpu").run()
    parts = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    for name, value in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)


def test_the_task_makes_the_observation_in_any_batch(photos: Path):
    config = build_config(experiment(photos))
    task = build_task(config)
    samples = task.load_samples()
    together = task.make_batch(samples, [3, 5], [0, 0], torch.device("cpu"))
    alone = task.make_batch(samples, [5], [0], torch.device("cpu"))
    assert together.observation is not None and alone.observation is not None
    torch.testing.assert_close(together.observation[1:], alone.observation, rtol=0, atol=0)
    objective = build_objective(build_model(config), config)
    assert objective.observe(together) is together.observation
    plain = build_config(experiment(photos, objective=dict(realistic_noise=None)))
    assert build_task(plain).make_batch(samples, [3], [0], torch.device("cpu")).observation is None


def test_crops_are_cut_into_squares_of_a_size_drawn_for_each_epoch(photos: Path):
    config = build_config(experiment(photos, data=dict(cut_sizes=[8, 16])))
    task = build_task(config)
    samples = task.load_samples()
    sides = set()
    for epoch in range(8):
        batch = task.make_batch(samples, [3, 5], [epoch, epoch], torch.device("cpu"))
        side = batch.clean.shape[-1]
        sides.add(side)
        assert batch.clean.shape == (2 * (16 // side) ** 2, 3, side, side)
        assert batch.clean.numel() == 2 * 3 * 16 * 16
        whole = samples.images([3, 5], [epoch, epoch]).float() / 127.5 - 1
        torch.testing.assert_close(batch.clean[0], whole[0, :, :side, :side], rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.clean[-1], whole[1, :, -side:, -side:], rtol=0, atol=1e-6)
        alone = task.make_batch(samples, [5], [epoch], torch.device("cpu"))
        torch.testing.assert_close(alone.observation, batch.observation[-len(alone.clean) :], rtol=0, atol=0)
        assert len(batch.generators) == len(batch.clean)
    assert sides == {8, 16}


def test_cut_images_goes_row_by_row():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert cut_images(image, 2)[:, 0, 0, 0].tolist() == [0, 2, 4, 12, 14, 16]


def tiny_batch(count: int = 64) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(2, count, 3, 8, 8, generator=generator)
    return ImageBatch(clean=clean, noise=noise, generators=sample_generators(0, range(count)))


def honest_objective(**changes: object) -> EBTObjective:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(**(MODEL | dict(img_size=8))))  # type: ignore[arg-type]
    return EBTObjective(model, ObjectiveConfig(loss="l1", **(HONEST | changes)))  # type: ignore[arg-type]


def test_the_reconstruction_adds_its_weighted_distance_to_the_loss():
    losses = {}
    for weight in (1.0, 3.0):
        objective = honest_objective(reconstruction_weight=weight, proposal_share=0.0)
        batch = tiny_batch()
        observation = objective.observe(batch)
        expected = (objective.model.reconstruct(observation) - batch.clean).abs().mean()
        output = objective(replace(batch, observation=observation))
        torch.testing.assert_close(output["reconstruction_loss"], expected)
        losses[weight] = output["loss"]
    torch.testing.assert_close(losses[3.0] - losses[1.0], 2 * expected)


def test_a_share_of_the_samples_starts_from_the_proposal_and_replayed_ones_do_not():
    objective = honest_objective(proposal_share=0.5)
    batch = tiny_batch()
    observation = objective.observe(batch)
    start = observation.clone()
    start[-8:] += 1.0  # trajectories under way
    proposal = torch.full_like(observation, 9.0)
    starts = objective._with_proposals(batch.generators, observation, start, proposal)
    proposed = (starts == 9.0).flatten(1).all(1)
    assert not proposed[-8:].any()
    assert torch.equal(starts[~proposed], start[~proposed])
    assert math.isclose(proposed[:-8].float().mean().item(), 0.5, abs_tol=0.2)


@pytest.mark.parametrize(
    ("sections", "answer"),
    [
        (dict(objective=dict(proposal_share=0.5)), "needs reconstruction_weight"),
        (dict(objective=dict(reconstruction_weight=-1.0)), "reconstruction_weight=-1 is negative"),
        (dict(objective=dict(reconstruction_weight=1.0, proposal_share=2.0)), "proposal_share=2 is not in"),
        (dict(objective=dict(thinking_share=0.5)), "thinking_share=0.5 needs reconstruction_weight"),
        (dict(objective=dict(thinking_share=0.0)), r"thinking_share=0 is not in \(0, 1\]"),
        (dict(objective=dict(realistic_noise=dict(gaussian_share=2.0))), "gaussian_share=2 is not in"),
        (dict(objective=dict(realistic_noise=dict(gausian_share=0.5))), "did you mean 'gaussian_share'"),
        (dict(model=dict(stem_widths=[4])), "ends at patches of 2 px"),
        (dict(data=dict(cut_sizes=[5])), "5 does not divide img_size=16"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(sections: dict, answer: str, photos: Path):
    with pytest.raises(ConfigError, match=answer):
        build_config(experiment(photos, **sections))


def test_a_replay_buffer_and_cut_crops_do_not_go_together(photos: Path):
    config = build_config(experiment(photos, data=dict(cut_sizes=[8]), replay=REPLAY))
    with pytest.raises(ConfigError, match="cannot be combined"):
        build_objective(build_model(config), config)


@pytest.mark.parametrize("model_type", ["patch_diffusion", "patch_regressor", "dit"])
def test_realistic_noise_is_not_for_the_vp_process(model_type: str, photos: Path):
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    config = build_config(experiment(photos, model_type) | {"model": sizes})
    with pytest.raises(ConfigError, match=f"'awgn', not for this {model_type}; use null"):
        build_objective(build_model(config), config)


def test_thinking_trains_on_a_share_of_the_batch(photos: Path):
    objective = honest_objective(thinking_share=0.25, proposal_share=0.0)
    batch = tiny_batch(16)
    output = objective(batch)
    assert len(output["candidate"]) == len(output["observation"]) == 4
    last = replace(batch, clean=batch.clean[12:], noise=batch.noise[12:], generators=sample_generators(0, range(12, 16)))
    alone = honest_objective(proposal_share=0.0)(last)
    torch.testing.assert_close(output["candidate"], alone["candidate"])
    losses = [out["loss"] - out["reconstruction_loss"] for out in (output, alone)]
    torch.testing.assert_close(*losses)
    config = build_config(experiment(photos, objective=HONEST | dict(thinking_share=0.5), replay=REPLAY))
    with pytest.raises(ConfigError, match="cannot be combined with objective.thinking_share"):
        build_objective(build_model(config), config)


def test_a_reconstruction_is_for_the_quadratic_energy_alone(photos: Path):
    config = build_config(experiment(photos, "patch_regressor", objective=dict(reconstruction_weight=1.0)))
    with pytest.raises(ConfigError, match="is only for patch_ebt with a quadratic"):
        build_objective(build_model(config), config)
