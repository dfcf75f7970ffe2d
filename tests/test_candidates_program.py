"""eval/candidates.py: each kind's candidates are what it says, and the ways to use them are right on images made by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.denoising.self_ensemble import turned, turned_back
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import candidates

SETTINGS = SimpleNamespace(steps=2, candidates=3, start_noise=0.1, langevin=0.05, seed=0)


@pytest.fixture(scope="module")
def model() -> PatchEBT:
    torch.manual_seed(0)
    made = PatchEBT(PatchEBTConfig(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, init_step_size=0.3)).eval()
    torch.nn.init.normal_(made.head.weight, std=0.1)
    return made


def noisy_images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def plain(model: PatchEBT, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return think(model, images, ThinkingConfig(num_steps=2), step_size=scale * model.step_size.detach()).final.detach()


def test_every_kind_begins_with_plain_thinking_and_all_has_each_once(model: PatchEBT) -> None:
    noisy = noisy_images()
    maker = candidates.Candidates(model, SETTINGS)
    with torch.no_grad():
        made = {kind: (images, energies) for kind, images, energies in maker.each(candidates.KINDS, noisy, [0, 1])}
    assert list(made) == list(candidates.KINDS)
    counts = {kind: len(images) for kind, (images, _) in made.items()}
    assert counts == {"starts": 3, "langevin": 3, "rules": 7, "grids": 8, "mirrored": 8, "proposal": 3, "all": 27}
    first = plain(model, noisy)
    for images, energies in made.values():
        torch.testing.assert_close(images[0], first)
        assert energies.shape == (len(images), 2, 2, 2)
        torch.testing.assert_close(energies.sum((2, 3))[-1], model(images[-1]).detach())
    assert len({tuple(image.flatten().tolist()) for image in made["all"][0]}) == 27
    mirrored, rules = made["mirrored"][0], made["rules"][0]
    torch.testing.assert_close(mirrored[5], turned_back(plain(model, turned(noisy, 5)), 5))
    torch.testing.assert_close(rules[1], plain(model, noisy, 0.7))


def test_a_shifted_grid_moves_the_image_by_its_pixels(model: PatchEBT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where thinking gives its start back, a shift there and back changes nothing; with thinking it does."""
    noisy, maker = noisy_images(), candidates.Candidates(model, SETTINGS)
    monkeypatch.setattr(candidates, "SHIFTS", ((0, 0), (2, 0), (1, 3)))
    with torch.no_grad():
        assert not torch.allclose(maker.of("grids", noisy, [0, 1])[2], maker.of("grids", noisy, [0, 1])[0])
    windows: list[torch.Tensor] = []
    monkeypatch.setattr(maker, "_think", lambda start, noisy: windows.append(start) or start)
    made = maker.of("grids", noisy, [0, 1])
    assert all(torch.equal(image, noisy) for image in made)
    assert windows[-1].shape[-2:] == (24, 24) and torch.equal(windows[-1][..., 1:17, 3:19], noisy)


def test_patches_of_lowest_score_and_weights_by_energy() -> None:
    images = torch.stack([torch.full((1, 1, 2, 4), value) for value in (0.0, 1.0)])  # two candidates with two patches of 2 px
    scores = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 3.0]]]])  # (N=2, B=1, 1, 2)
    chosen = candidates.chosen_per_patch(images, scores, 2)
    assert chosen[0, 0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    mean = candidates.weighted_mean(images, scores, 1.0, 2)
    weights = [np.exp(0) / (np.exp(0) + np.exp(-1)), np.exp(-3) / (1 + np.exp(-3))]
    torch.testing.assert_close(mean[0, 0], torch.tensor([[weights[0]] * 2 + [weights[1]] * 2] * 2, dtype=torch.float32))
    torch.testing.assert_close(candidates.weighted_mean(images, scores, 1e-4, 2), chosen)


def test_each_way_has_the_psnr_of_its_image() -> None:
    """A grey image; candidate 0 is off by 0.1 everywhere, candidate 1 by 0.2 and by nothing in its right patch."""
    clean = torch.full((1, 3, 2, 4), 128, dtype=torch.uint8)
    grey = 128 / 127.5 - 1
    images = torch.stack([torch.full((1, 3, 2, 4), grey + error) for error in (0.1, 0.2)])
    images[1, ..., 2:] = grey
    energies = torch.tensor([[[[1.0, 2.0]]], [[[2.0, 0.5]]]])
    ways, rank = candidates.measure_batch(images, energies, clean, [1e-4], 2)

    def decibels(squared_error: float) -> float:
        return 10 * np.log10(4 / squared_error)

    assert ways["first"][0] == pytest.approx(decibels(0.01), abs=1e-3)
    assert ways["lowest energy"][0] == pytest.approx(decibels(0.02), abs=1e-3)  # 2.5 is below 3.0
    assert ways["mean candidate"][0] == pytest.approx((decibels(0.01) + decibels(0.02)) / 2, abs=1e-3)
    assert ways["lowest energy per patch"][0] == pytest.approx(decibels(0.005), abs=1e-3)
    assert ways["weighted, temperature 0.0001"][0] == pytest.approx(decibels(0.005), abs=1e-3)
    assert ways["mean of the images"][0] == pytest.approx(decibels((0.15**2 + 0.05**2) / 2), abs=1e-3)
    assert ways["oracle"][0] == pytest.approx(decibels(0.01), abs=1e-3)
    assert ways["oracle per patch"][0] == pytest.approx(decibels(0.005), abs=1e-3)
    assert rank.tolist() == [-1.0]


def test_the_program(model: PatchEBT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    words = ["--data", str(tmp_path / "images"), "--model", str(tmp_path / "model"), "--levels", "0.1", "--temperatures", "0.5"]
    words += ["--kinds", "rules", "mirrored", "--output", str(tmp_path / "out.json")]
    assert candidates.main(words) == 0
    told = capsys.readouterr().out
    assert "Level 0.1, 1 steps: PSNR" in told and "| mirrored (8) |" in told and "| rules (5) |" in told
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["kind"] for result in results] == ["rules", "mirrored"]
    for result in results:
        gain, psnr = result["gains"]["lowest energy"][0], result["psnr"]
        assert gain == pytest.approx(psnr["lowest energy"] - psnr["first"]) and psnr["oracle"] >= psnr["lowest energy"]
    assert candidates.main([*words, "--model", "tiny_imagenet_dit"]) == 2
    assert "give a patch_ebt" in capsys.readouterr().err.splitlines()[-1]
