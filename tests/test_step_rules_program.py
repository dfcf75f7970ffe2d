"""eval/step_rules.py: where it says that thinking stops is where thinking stops, and its figures are those of the models."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.processes import to_image_range

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import step_rules

SIZES = dict(img_size=64, embed_dim=16, depth=1, num_heads=2)


def bowl(candidate: Tensor, curvature: Tensor) -> Tensor:
    return 0.5 * curvature * candidate.square().flatten(1).sum(1)


@pytest.mark.parametrize("rule", ["fixed", "barzilai-borwein", "momentum"])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.2])
def test_a_tolerance_stops_where_thinking_does(rule: str, tolerance: float):
    """Curvatures whose energies settle soon, late and not at all, and one that a step of 1 makes worse."""
    start = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature = torch.tensor([0.9, 0.3, 0.05, 2.5, 1.7], dtype=torch.float64)
    config = ThinkingConfig(num_steps=6, step_rule=rule)  # type: ignore[arg-type]
    whole = think(bowl, start, config, context=(curvature,))
    stopping = ThinkingConfig(
        num_steps=6,
        step_rule=rule,
        tolerance=tolerance,
        tolerance_of="training",
        training_gain=2.0,  # type: ignore[arg-type]
    )
    stopped = think(bowl, start, stopping, context=(curvature,))
    kept, passes = step_rules.stops_by_gain(whole.energies, tolerance, 2.0)
    assert torch.equal(kept, stopped.num_steps) and torch.equal(passes, stopped.num_forward)


def test_patience_goes_over_a_rise_and_keeps_the_lowest_energy():
    energies = torch.tensor([[20.0, 20.0, 20.0], [10.0, 10.0, 10.0], [12.0, 12.0, 9.995], [4.0, 13.0, 5.0], [3.0, 1.0, 4.0]])
    kept, passes = step_rules.stops_by_gain(energies, 0.1, 1.0)
    assert kept.tolist() == [1, 1, 2] and passes.tolist() == [3, 3, 3]
    kept, passes = step_rules.stops_by_gain(energies, 0.1, 1.0, patience=1)
    assert kept.tolist() == [4, 1, 4] and passes.tolist() == [5, 4, 5]
    kept, _ = step_rules.stops_by_gain(energies, 0.1, 1.0, patience=2)
    assert kept.tolist() == [4, 4, 4]


def test_a_change_stops_where_the_regressor_does():
    torch.manual_seed(0)
    model = PatchRegressor(PatchRegressorConfig(**SIZES))
    torch.nn.init.normal_(model.head.weight, std=0.3)
    noisy = 2 * torch.rand(4, 3, 64, 64) - 1
    clean = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        _, changes = step_rules.apply_runs(model, [(clean[:2], noisy[:2]), (clean[2:], noisy[2:])], 5)
    for tolerance in (0.0, 0.1, 0.5, 1.0):
        result = RegressorDenoiser(model).denoise(to_image_range(noisy), DenoiseOptions(num_steps=5, tolerance=tolerance))
        assert torch.equal(step_rules.stops_by_change(changes, tolerance), result.num_steps)


def test_the_program_writes_its_figures_and_prints_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    ebt = PatchEBT(PatchEBTConfig(**SIZES, init_step_size=0.3, training_gain=4.0))
    ebt.save_pretrained(tmp_path / "ebt")
    PatchRegressor(PatchRegressorConfig(**SIZES)).save_pretrained(tmp_path / "regressor")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    command = ["--data", str(tmp_path / "photos"), "--model", str(tmp_path / "ebt"), "--output", str(tmp_path / "out.json")]
    command += ["--regressor", str(tmp_path / "regressor"), "--levels", "0.1", "--steps", "2"]
    assert step_rules.main([*command, "--rules", "fixed", "backtracking", "--likelihood-weights", "0", "auto"]) == 0
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["method"] for run in runs] == [
        "fixed",
        "fixed, likelihood auto",
        "backtracking",
        "backtracking, likelihood auto",
        "regressor",
    ]
    assert [run["passes"] for run in runs] == [2, 3, 4, 5, 2]  # the weight is read in one pass; a trial is one
    # E = |y|^2 / 2, as the head starts at zero: a step of 0.3 leaves 0.7 of the noisy image.
    assert runs[0]["psnr"] == pytest.approx(runs[2]["psnr"])
    assert "### Level 0.1" in capsys.readouterr().out
    assert step_rules.main(["--data", str(tmp_path / "none")]) == 2
