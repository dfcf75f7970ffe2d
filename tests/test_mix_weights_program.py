"""eval/mix_weights.py: the written weights are the mean asked for."""

import sys
from pathlib import Path

import pytest
import torch

from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import mix_weights


def test_the_mean_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PatchRegressorConfig(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, noise_process="awgn")
    for seed in (0, 1):
        torch.manual_seed(seed)
        PatchRegressor(config).save_pretrained(tmp_path / str(seed))
    words = [str(tmp_path / "0"), str(tmp_path / "1"), "--share", "0.25", "--output", str(tmp_path / "mean")]
    assert mix_weights.main(words) == 0
    first, second, mean = (load_pretrained(str(tmp_path / name)).state_dict() for name in ("0", "1", "mean"))
    for name in mean:
        torch.testing.assert_close(mean[name], 0.75 * first[name] + 0.25 * second[name])
    assert mix_weights.main(words) == 2
    assert "exists; choose another --output" in capsys.readouterr().err
