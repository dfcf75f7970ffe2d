"""eval/held_out.py: the noise of its columns, the mean of weights, and its table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import held_out


def regressor(seed: int, embed_dim: int = 16) -> PatchRegressor:
    torch.manual_seed(seed)
    config = PatchRegressorConfig(img_size=32, patch_size=8, embed_dim=embed_dim, depth=1, num_heads=2, noise_process="awgn")
    model = PatchRegressor(config)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def test_every_column_has_its_noise_and_the_seed_alone_decides() -> None:
    grey = torch.full((4, 3, 64, 64), 0.5)
    made, again, other = (held_out.conditions(grey, [5.0, 25.0], seed) for seed in (0, 0, 1))
    further = ["full size", "JPEG 10", "JPEG 10, moved", "drawings", "drawings, 25", "waves, 25"]
    assert list(made) == ["sigma 5", "sigma 25", "realistic", "processed", *further]
    for name, (clean, noisy) in made.items():
        assert clean.shape == noisy.shape and torch.equal(noisy, again[name][1])
        assert name in ("drawings", "JPEG 10", "JPEG 10, moved") or not torch.equal(noisy, other[name][1])
    std = {name: float((noisy - clean).std()) * 255 for name, (clean, noisy) in made.items()}
    assert std["sigma 5"] == pytest.approx(5, rel=0.02) and std["sigma 25"] == pytest.approx(25, rel=0.02)
    assert std["drawings"] == 0 and std["drawings, 25"] == pytest.approx(25, rel=0.02)
    assert 0 < std["processed"] < 20 and 0 < std["realistic"] < 30
    assert not torch.equal(made["sigma 5"][1][0], made["sigma 5"][1][1])


def test_weights_are_mixed_and_other_shapes_refused() -> None:
    first, second = regressor(0), regressor(1)
    before, others = {k: v.clone() for k, v in first.state_dict().items()}, second.state_dict()
    mixed = held_out.mixed(first, second, 0.25).state_dict()
    assert all(torch.allclose(mixed[name], 0.75 * before[name] + 0.25 * others[name]) for name in mixed)
    with pytest.raises(ValueError, match="mix two trainings of one config"):
        held_out.mixed(regressor(0), regressor(1, embed_dim=32), 0.5)
    with pytest.raises(ValueError, match="the share in photographs_ebt.photographs_ebt@2"):
        held_out.load("photographs_ebt+photographs_ebt@2")
    with pytest.raises(ValueError, match="write MODEL"):
        held_out.load("photographs_ebt+photographs_ebt")


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for number in range(3):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photographs" / f"{number}.png")
    for seed in (0, 1):
        regressor(seed).save_pretrained(tmp_path / str(seed))
    mixture = f"{tmp_path / '0'}+{tmp_path / '1'}@0"
    words = ["--models", str(tmp_path / "0"), mixture, "--data", str(tmp_path / "photographs"), "--split", ""]
    words += ["--size", "32", "--images", "2", "--sigmas", "25", "--output", str(tmp_path / "out.json")]
    assert held_out.main(words) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows[str(tmp_path / "0")] == rows[mixture]
    assert rows["noisy"]["drawings"] == 99.0 and rows["noisy"]["sigma 25"] == pytest.approx(20.4, abs=0.5)
    assert len(capsys.readouterr().out.splitlines()) == 5
