"""The benchmark programs on tiny models: rows, resuming, refusing what does not belong together."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision import corruption, metrics
from ebt_vision.models.dit import DiT, DiTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import denoising
import picture
import training_speed


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("baselines")
    PatchRegressor(PatchRegressorConfig(img_size=32, embed_dim=32, depth=1, num_heads=2)).save_pretrained(folder / "reg")
    DiT(DiTConfig(img_size=32, embed_dim=32, depth=1, num_heads=2)).save_pretrained(folder / "dit")
    return [str(folder / "reg"), str(folder / "dit")]


def arguments(photos: Path, output: Path, models: list[str], *more: str) -> list[str]:
    common = ["--data", str(photos), "--output", str(output), "--img-size", "32", "--batch-size", "2", "--steps", "3"]
    return ["--models", *models, *common, *more]


def results(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())["rows"]


def test_every_model_gets_its_rows_on_the_same_noise(photos: Path, tmp_path: Path, tiny_checkpoint: Path, baselines: list[str]):
    models = ["identity", str(tiny_checkpoint), *baselines]
    assert denoising.main(arguments(photos, tmp_path, models, "--passes", "4", "--tolerances", "0.5")) == 0
    rows = results(tmp_path)
    methods = [(row["method"], row["steps"]) for row in rows if row["level"] == 0.1]
    assert methods == [
        ("noisy input", 1),
        *[("thinking", step) for step in (1, 2, 3)],
        ("thinking, tolerance 0.5", 3),
        *[("applied", step) for step in (1, 2, 3)],
        ("x0", 1),
        ("ddim", 4),
    ]
    for row in rows:  # the batch figure is that of the mean error; per image is never below it
        assert row["psnr_batch"] == pytest.approx(20 * np.log10(255) - 10 * np.log10(row["mse"]))
        assert row["psnr_image"] >= row["psnr_batch"] and row["num_images"] == 5
    # The noisy row by another route: the level's noise on [-1, 1], clamped.
    noisy = {row["level"]: row["mse"] for row in rows if row["method"] == "noisy input"}
    pixels = [np.asarray(Image.open(photos / f"{i}.png")) for i in range(5)]
    clean = corruption.to_model_range(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255)
    for level, value in noisy.items():
        again = corruption.add_vp_noise(clean, level, torch.Generator().manual_seed(3)).clamp(-1, 1)
        assert float(metrics.mse(again, clean).mean()) * 127.5**2 == pytest.approx(value, rel=0.05)
    assert "| noisy input |" in (tmp_path / "report.md").read_text()


def test_it_goes_on_from_the_parts_that_are_done(photos: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch):
    command = arguments(photos, tmp_path / "cut", [str(tiny_checkpoint)])
    write, done = denoising._write_part, []

    def cut_off(path: Path, part: dict) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(path)
        write(path, part)

    monkeypatch.setattr(denoising, "_write_part", cut_off)
    assert denoising.main(command) == 130
    again: list[Path] = []
    monkeypatch.setattr(denoising, "_write_part", lambda path, part: (again.append(path), write(path, part)))
    assert denoising.main(command) == 0
    assert len(done) == 4 and not set(done) & set(again)
    assert denoising.main(arguments(photos, tmp_path / "whole", [str(tiny_checkpoint)])) == 0
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in results(tmp_path / "cut")]
    assert timeless == [{k: v for k, v in row.items() if "seconds" not in k} for row in results(tmp_path / "whole")]


def test_parts_of_other_settings_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert denoising.main(arguments(photos, tmp_path, ["identity"])) == 0
    assert denoising.main(arguments(photos, tmp_path, ["identity"], "--seed", "1")) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert denoising.main(arguments(photos, tmp_path, ["no-such-model"])) == 2
    assert "neither a shipped checkpoint" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path, photos: Path, tiny_checkpoint: Path):
    target = tmp_path / "picture.png"
    picture.main(["--model", str(tiny_checkpoint), "--images", str(photos / "0.png"), "--steps", "1", "--output", str(target)])
    assert Image.open(target).width > 100


def test_the_plain_step_is_the_paper_s(capsys: pytest.CaptureFixture):
    """The plain version has the published size: about 685 M parameters at depth 24, width 1536, MLP ratio 1."""
    size = ["--img-size", "128", "--patch-size", "16", "--embed-dim", "1536", "--depth", "24", "--num-heads", "16"]
    with torch.device("meta"):
        model = training_speed.PlainEBT(training_speed._parse([*size, "--mlp-ratio", "1"]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(685e6, rel=0.02)
