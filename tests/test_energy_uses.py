"""Scores of images by every network, AUROC by hand, and the program on small data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.benchmark.energy_scores import Scorer, detection_auroc
from ebt_vision.denoising.base import IdentityDenoiser
from ebt_vision.denoising.load import denoiser_for
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.equilibrium import PatchEqM, PatchEqMConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.processes import signal_and_noise_scale
from eval import energy_uses

SIZES = dict(img_size=16, patch_size=8, embed_dim=192, depth=1, num_heads=3)


def test_auroc_is_the_share_of_pairs_in_order():
    """Pairs (inside, outside) of (1, 2, 3) and (2, 4): above in 1-2, 1-4, 2-4, 3-4, a tie in 2-2, below in 3-2: 4.5 of 6."""
    assert detection_auroc(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4])) == pytest.approx(4.5 / 6)
    assert detection_auroc(torch.tensor([1.0, 2]), torch.tensor([3.0, 4])) == 1.0
    assert detection_auroc(torch.tensor([3.0, 4]), torch.tensor([1.0, 2])) == 0.0


def test_scores_of_fresh_networks_are_half_the_squared_pixels():
    """Plain heads start at zero, so N(y) = 0 and the score is |y|^2 / 2 a patch of 192 values: y is 0.5 * signal everywhere."""
    images = torch.full((2, 3, 16, 16), 0.75)
    signal = signal_and_noise_scale(0.1)[0]
    for model in (
        PatchEBT(PatchEBTConfig(**SIZES)),
        PatchRegressor(PatchRegressorConfig(**SIZES)),
        PatchEqM(PatchEqMConfig(**SIZES)),
    ):
        scorer = Scorer(denoiser_for(model))
        expected = torch.full((2,), 0.5 * 192 * (0.5 * signal) ** 2, dtype=torch.float64)
        torch.testing.assert_close(scorer.score(images), expected, rtol=1e-5, atol=0)
        assert scorer.score_map(images).shape == (2, 2, 2)


def test_a_dit_scores_by_its_error_and_batches_do_not_matter():
    """A fresh DiT predicts no noise, so its error is the mean square of the noise, about 1."""
    torch.manual_seed(0)
    scorer = Scorer(denoiser_for(DiT(DiTConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2))), timestep=20)
    images = torch.rand(3, 3, 16, 16)
    scores = scorer.score(images)
    assert (scores - 1).abs().max() < 0.15 and len(set(scores.tolist())) == 3
    torch.testing.assert_close(scorer.score(images[:1]), scores[:1])
    with pytest.raises(ValueError, match="has no map of scores"):
        scorer.score_map(images)


def test_methods_without_a_network_have_no_score():
    with pytest.raises(ValueError, match="identity has no network"):
        Scorer(IdentityDenoiser())


@pytest.fixture
def folders(tmp_path):
    for name in ("inside", "tune", "other"):
        (tmp_path / name).mkdir()
        for i in range(4):
            pixels = np.random.default_rng([i, len(name)]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    torch.manual_seed(0)
    PatchEBT(PatchEBTConfig(**SIZES)).save_pretrained(tmp_path / "ebt")
    DiT(DiTConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)).save_pretrained(tmp_path / "dit")
    return tmp_path


@pytest.mark.parametrize(
    ("scores", "expected"), [([1, 2, 4], [0.25, 0.5, 1]), ([-4, 2], [-1, 0.5]), ([0, 0], [0, 0]), ([np.nan, 1], [np.nan, 1])]
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_scores_of_the_plot_are_relative_to_the_largest_magnitude(scores, expected):
    np.testing.assert_array_equal(energy_uses.relative(np.array(scores, float)), np.array(expected, float))


@pytest.mark.filterwarnings("error::RuntimeWarning")  # the denoised images of fresh networks are grey, and all scores are 0
def test_the_program_writes_its_tables(folders):
    words = ["--models", str(folders / "ebt"), str(folders / "dit"), "--data", str(folders / "inside"), "--img-size", "16"]
    words += ["--tune-data", str(folders / "tune"), "--others", f"others={folders / 'other'}", "--output", str(folders / "out")]
    assert energy_uses.main([*words, "--device", "cpu"]) == 0
    results = json.loads((folders / "out" / "results.json").read_text())
    ebt, dit = results["models"]
    assert ebt["detection"].keys() == {"others", "drawings", *energy_uses.damaged(torch.rand(1, 3, 16, 16), 0)}
    assert ebt["quality"]["all levels"] > 0.5  # the squared pixels of a noisier image are larger
    assert len(ebt["uncertainty"]["bins"]) == 10 and "uncertainty" not in dit
    assert ebt["timestep"] is None and dit["timestep"] in energy_uses.TIMESTEPS
    report = (folders / "out" / "report.md").read_text()
    assert f"| **mean** | {np.mean(list(ebt['detection'].values())):.3f} |" in report and "| patches |" in report
    assert (folders / "out" / "reliability.png").stat().st_size > 1000


def test_bad_input_is_one_line(folders, capsys):
    words = ["--models", "bm3d", "--data", str(folders / "inside"), "--tune-data", str(folders / "tune"), "--img-size", "16"]
    assert energy_uses.main([*words, "--output", str(folders / "out")]) == 2
    assert energy_uses.main([*words, "--others", "nothing", "--output", str(folders / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "bm3d has no network" in first and "--others 'nothing' is not of the form NAME=PATH" in second
