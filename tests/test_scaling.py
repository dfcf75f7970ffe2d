"""Scaling laws on points with known exponents, and a tiny grid from the command to the report."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ebt_vision.benchmark import scaling_report
from ebt_vision.benchmark.scaling_fit import Fit, fit_law, ratio_of_rates
from ebt_vision.benchmark.scaling_grid import Grid, Point, Recipe, all_points, folder_of
from ebt_vision.benchmark.scaling_runs import GridRuns, read_error
from ebt_vision.benchmark.training_cost import training_cost
from ebt_vision.core.sharing import CLAIMS, claim_part, release
from ebt_vision.training.config import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import scaling

COSTS = np.geomspace(1e5, 1e8, 6)


def noisy(errors: np.ndarray, std: float, seed: int = 0) -> np.ndarray:
    return errors * np.exp(std * np.random.default_rng(seed).standard_normal(errors.shape))


def test_a_power_law_without_noise_is_found_exactly():
    fit = fit_law(COSTS, 7.0 * COSTS**-0.25, "power", num_resamples=100)
    assert (fit.a, fit.b, fit.c) == pytest.approx((0.0, 7.0, 0.25))
    assert fit.c_ci95 == pytest.approx((0.25, 0.25)) and fit.a_ci95 is None
    np.testing.assert_allclose(fit.predict(np.array([1e6])), 7.0 * 1e6**-0.25)


def test_a_floor_is_told_from_a_slow_rate():
    errors = 0.2 + 30.0 * COSTS**-0.5
    fit = fit_law(COSTS, errors, "saturating", num_resamples=100)
    assert (fit.a, fit.b, fit.c) == pytest.approx((0.2, 30.0, 0.5), rel=1e-3)
    assert fit_law(COSTS, errors, "power", num_resamples=100).c < 0.1  # what a law without a floor makes of it


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_true_exponent_and_shrink_with_the_noise(seed: int):
    wide, narrow = (fit_law(COSTS, noisy(COSTS**-0.3, std, seed), "power", seed=seed) for std in (0.1, 0.01))
    for fit in (wide, narrow):
        low, high = fit.c_ci95
        assert low < 0.3 + 0.01 and high > 0.3 - 0.01 and low < fit.c < high
    assert narrow.c_ci95[1] - narrow.c_ci95[0] < 0.2 * (wide.c_ci95[1] - wide.c_ci95[0])


def test_intervals_cover_as_often_as_they_say():
    """Of 200 power laws with noise, about 190 have their exponent in the interval."""
    hits = 0
    for seed in range(200):
        fit = fit_law(COSTS, noisy(COSTS**-0.3, 0.05, seed), "power", num_resamples=200, seed=seed)
        hits += fit.c_ci95[0] <= 0.3 <= fit.c_ci95[1]
    assert 178 <= hits <= 199


def test_a_fit_without_spare_points_has_no_interval():
    assert fit_law(COSTS[:2], [2.0, 1.0], "power").c_ci95 is None
    with pytest.raises(ValueError, match="2 different costs are too few for the saturating law; measure 3"):
        fit_law(COSTS[:2], [2.0, 1.0], "saturating")
    with pytest.raises(ValueError, match="positive and finite"):
        fit_law(COSTS, [*COSTS[:5], -1.0], "power")


def test_the_ratio_of_rates():
    fast = fit_law(COSTS, noisy(COSTS**-0.27, 0.005), "power", seed=1)
    slow = fit_law(COSTS, noisy(COSTS**-0.20, 0.005, seed=2), "power", seed=2)
    ratio = ratio_of_rates(fast, slow)
    assert ratio.value == pytest.approx(1.35, rel=0.03) and ratio.ci95[0] < 1.35 < ratio.ci95[1] < 1.5
    assert ratio.ci95[0] > 1
    rising: Fit = replace(slow, c=-0.1)
    assert ratio_of_rates(fast, rising) is None
    uncertain = replace(slow, resampled_c=np.linspace(-0.1, 0.4, 1000))
    assert ratio_of_rates(fast, uncertain).ci95 is None


BASE = Point(family="ebt", width=48, depth=1, data=0, batch=4, updates=4, lr=1e-3)
RECIPE = Recipe(modality="image", data="photos", validation="held-out", img_size=8)


def test_axes_differ_in_one_value_and_share_the_base():
    grid = Grid(
        families=("ebt", "dit"),
        base=BASE,
        values={"width": (48, 96), "batch": (4, 8), "data": (10.0,)},
        lrs=(1e-3, 1e-2),
        lr_of={"ebt": 1e-2, "dit": 1e-3},
    )
    assert [(p.family, p.lr) for p in grid.tuning()] == [("ebt", 1e-3), ("ebt", 1e-2), ("dit", 1e-3), ("dit", 1e-2)]
    points = grid.points()
    ebt = replace(BASE, lr=1e-2)
    assert [p for p in points["width"] if p.family == "ebt"] == [ebt, replace(ebt, width=96)]
    assert [p for p in points["data"] if p.family == "dit"] == [replace(BASE, family="dit", data=10.0)]
    assert len(all_points(points)) == 2 * 4  # the base is on two axes and trained once


def test_families_share_the_recipe():
    configs = {family: RECIPE.config(replace(BASE, family=family)) for family in ("ebt", "regressor", "dit")}
    for name in ("data", "optim", "train"):
        assert len({repr(getattr(config, name)) for config in configs.values()}) == 1
    assert configs["ebt"].optim.warmup_updates == 1 and configs["ebt"].replay.capacity == 0
    changed = replace(RECIPE, overrides=("dit:optim.weight_decay=0.5", "all:data.flip=false"))
    assert changed.config(replace(BASE, family="dit")).optim.weight_decay == 0.5
    assert changed.config(BASE).optim.weight_decay != 0.5 and not changed.config(BASE).data.flip
    assert folder_of(changed.config(BASE)) != folder_of(configs["ebt"])
    with pytest.raises(ConfigError, match="unknown key"):
        replace(RECIPE, overrides=("all:data.flop=1",)).config(BASE)


def test_training_costs_of_every_family():
    """By hand: a block has width^2 * 12 weights (MLP ratio 4), and each is used for 6 FLOPs a token: forward and backward."""
    tokens, one, three = 4, 12 * 48**2, 3
    regressor = [training_cost(RECIPE.config(replace(BASE, family="regressor", depth=d))).flops for d in (1, three)]
    block = (regressor[1] - regressor[0]) / (three - 1)
    attention = 6 * 2 * tokens**2 * 48
    assert block == pytest.approx(6 * tokens * one + attention, rel=0.05)
    ebt, dit = (training_cost(RECIPE.config(replace(BASE, family=family))) for family in ("ebt", "dit"))
    assert 2 < ebt.flops / regressor[0] < 4 and dit.num_parameters > 12 * 48**2
    text = Recipe(modality="text", data="text", validation="text", context_length=16)
    costs = [training_cost(text.config(replace(BASE, family=family, width=32))) for family in ("ebt", "transformer")]
    assert costs[0].flops > 2 * costs[1].flops > 0
    assert costs[0].num_parameters - costs[1].num_parameters == 1 + 32  # the step size and the gate


def test_the_error_of_a_log_is_that_of_its_last_validation(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "validation_psnr": {"0.1": [5, 10]}}\n{"step": 2, "validation_psnr": {"0.1": [5, 10, 20]}}\n')
    assert read_error(log) == pytest.approx(0.01)
    log.write_text('{"step": 1, "validation_bits_per_byte": [3.0, 2.5]}\n{"step": 2, "loss": 1}\n')
    assert read_error(log) == 2.5
    log.write_text('{"step": 2, "loss": 1}\n')
    assert read_error(log) is None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def test_a_run_that_another_process_trains_is_waited_for(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = replace(RECIPE, data=str(photos), validation=str(photos))
    runs = GridRuns(recipe, tmp_path / "out", device="cpu", say=lambda line: None)
    name = folder_of(recipe.config(BASE))
    (tmp_path / "out" / CLAIMS).mkdir(parents=True)
    claim = claim_part(tmp_path / "out" / CLAIMS, name)
    waited: list[float] = []

    def finish(seconds: float) -> None:
        waited.append(seconds)
        path = tmp_path / "out" / "runs" / name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"error": 0.5}))
        release(claim)

    monkeypatch.setattr("ebt_vision.benchmark.scaling_runs.time.sleep", finish)
    assert runs.results([BASE]) == {BASE: {"error": 0.5}} and len(waited) == 1


def test_a_tiny_grid_of_images(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    command = [
        "--data",
        str(photos),
        "--validation",
        str(photos),
        "--img-size",
        "8",
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    command += ["--width", "48", "--depth", "1", "--batch-size", "4", "--updates", "3", "--widths", "48", "64", "96"]
    command += ["--lrs", "1e-3", "3e-3", "--families", "ebt", "regressor", "--held-out", "4", "--resamples", "100"]
    assert scaling.main(command) == 0
    results = json.loads((output / "results.json").read_text())
    assert set(results["tuning"]["chosen"]) == {"ebt", "regressor"} and len(results["tuning"]["runs"]) == 4
    tried = {(run["family"], run["lr"]): run["error"] for run in results["tuning"]["runs"]}
    for family, lr in results["tuning"]["chosen"].items():
        assert tried[family, lr] == min(error for (of, _), error in tried.items() if of == family)
    assert [len(pairs) for pairs in results["points"]["width"].values()] == [3, 3]
    assert {(fit["axis"], fit["law"]) for fit in results["fits"]} == {
        (axis, law) for axis in ("width", "flops") for law in ("power", "saturating")
    }
    assert len(results["runs"]) == 4 + 2 * 2  # the base size is one of those of the tuning
    assert results["cost"]["flops"] == pytest.approx(sum(run["training_flops"] for run in results["runs"]))
    assert (output / "scaling.png").exists() and "## Rate against the baselines" in (output / "report.md").read_text()
    assert not list(output.rglob("checkpoints")) and not (output / CLAIMS).exists()
    capsys.readouterr()
    before = [run["seconds"] for run in results["runs"]]
    assert scaling.main(command) == 0  # nothing is trained again
    assert "training " not in capsys.readouterr().err
    assert [run["seconds"] for run in json.loads((output / "results.json").read_text())["runs"]] == before


def test_a_tiny_grid_of_text(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    output = tmp_path / "out"
    command = ["--modality", "text", "--data", str(text), "--output", str(output), "--device", "cpu", "--context-length", "16"]
    command += ["--width", "32", "--depth", "1", "--batch-size", "2", "--updates", "2", "--lrs", "3e-3", "--held-out", "4"]
    assert scaling.main([*command, "--data-sizes", "0.1", "0.5", "1"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert [x for x, _ in results["points"]["data"]["transformer"]] == [0.1, 0.5, 1.0]
    assert 7 < results["points"]["data"]["ebt"][0][1] < 9  # bits of a byte, nearly untrained


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--widths", "48"], "needs --validation"),
        (["--validation", "x"], "no axis is given"),
        (["--validation", "x", "--widths", "48", "--families", "transformer"], "unknown for image"),
        (["--validation", "x", "--widths", "48", "--img-size", "30"], "not divisible"),
        (["--modality", "text", "--data-sizes", "5"], "are shares of it"),
    ],
)
def test_a_wrong_request_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str):
    assert scaling.main(["--data", "nowhere", "--output", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("scaling: ")


def test_numbers_and_durations_of_the_report_are_short():
    assert scaling_report._with_interval(2.66, (7e-25, 2.81)) == "2.66 [0, 2.81]"
    assert scaling_report._with_interval(0.5, None) == "0.5" and scaling_report._with_interval(None, None) == ""
    assert [scaling_report._duration(h) for h in (2.5, 0.05, 4.9e-5)] == ["2.5 h", "3 min", "0.18 s"]
