"""The programs about the photograph denoiser: where it stops, and the test images of screenshots and line art."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import graphics
import sheet
import stopping

TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, stem_widths=(4, 8), noise_process="awgn")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ebt = PatchEBT(PatchEBTConfig(**TINY, suggested_start="proposal", suggested_steps=2))  # type: ignore[arg-type]
    torch.nn.init.normal_(ebt.head.output.weight, std=0.05)  # type: ignore[union-attr]
    ebt.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_stops_follow_the_rule_by_hand():
    energies = torch.tensor([[10.0, 10.0, 10.0, 10.0], [0.5, 4.0, 4.0, 4.0], [0.4, 2.0, 5.0, 3.0], [0.3, 0.9, 1.0, 2.5]])
    assert stopping.stops(energies, 0.1).tolist() == [1, 3, 1, 3]  # at once; at the end; before it rose; never
    assert stopping.stops(energies, 0.05).tolist() == [1, 3, 1, 3]
    assert stopping.stops(energies, 0.25).tolist() == [1, 2, 1, 3]
    assert stopping.stops(energies, 0.0).tolist() == [3, 3, 1, 3]


def test_clean_images_take_no_step_by_hand(model: Path):
    denoiser = load_denoiser(str(model))  # patches of 4 px: noise of 127.5 has the energy 48 / 2
    assert stopping.clean_steps(torch.tensor([24.0, 24.1, 5.9, 6.1]), denoiser, 127.5).tolist() == [0, 2, 0, 0]
    assert stopping.clean_steps(torch.tensor([24.0, 24.1, 5.9, 6.1]), denoiser, 63.75).tolist() == [2, 2, 0, 2]


def test_the_rule_is_that_of_thinking(model: Path):
    denoiser, generator = load_denoiser(str(model)), torch.Generator().manual_seed(0)
    noisy = torch.rand(4, 3, 16, 16, generator=generator)
    whole = denoiser.denoise_whole(noisy, DenoiseOptions(num_steps=4))
    assert whole.energies is not None
    tolerance = float((whole.energies[2] / whole.energies[0]).median())
    stopped = denoiser.denoise_whole(noisy, DenoiseOptions(num_steps=4, tolerance=tolerance, tolerance_of="observation"))
    assert stopped.num_steps.tolist() == stopping.stops(whole.energies, tolerance).tolist()
    assert 1 <= stopped.num_steps.min() < stopped.num_steps.max()


def test_the_table_of_a_tiny_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    arguments = ["--data", str(tmp_path / "photos"), "--img-size", "16", "--steps", "3", "--sigmas", "25"]
    assert stopping.main(["--model", str(model), *arguments]) == 0
    told = capsys.readouterr().out
    assert re.search(r"sigma 25: after 0\.\.3 steps( \d+\.\d\d){4}\n", told) and "full size: after" in told
    assert "  clean below 0: " in told and "clean below 0.5: at most" in told
    assert "tolerance 1: at most" in told and "3 steps for all: at most" in told
    assert stopping.main(["--model", str(model), *arguments[:-4], "--steps", "1"]) == 2
    assert f"--steps 1 is below the 2 steps that {model} suggests" in capsys.readouterr().err
    assert stopping.main(["--model", "tiny_imagenet_ebt", *arguments]) == 2
    assert "does not think from a proposal" in capsys.readouterr().err


def test_graphics_are_drawn_and_have_flat_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert graphics.main(["--output", str(tmp_path / "graphics")]) == 0
    names = {path.stem for path in (tmp_path / "graphics").iterdir()}
    assert names == {"plot", "diagram", "window", "city_map", "colours", "page"}
    colours = np.asarray(Image.open(tmp_path / "graphics" / "colours.png").convert("RGB"))
    assert colours.shape == (320, 480, 3) and tuple(colours[-20, 20]) == (255, 0, 0)  # pure red
    (tmp_path / "file").touch()
    assert graphics.main(["--output", str(tmp_path / "file")]) == 2
    assert "cannot be created" in capsys.readouterr().err


def test_the_sheet_shows_every_photograph(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    arguments = ["--data", str(tmp_path / "photos"), "--models", str(model), "--size", "16", "--dpi", "50"]
    assert sheet.main([*arguments, "--output", str(tmp_path / "out" / "sheet.png")]) == 0
    assert Image.open(tmp_path / "out" / "sheet.png").size == (340, 185)  # 2 x 2 squares side by side, in 2 lines
    assert sheet.middle(torch.arange(48.0).view(3, 4, 4), 2)[0].tolist() == [[5.0, 6.0], [9.0, 10.0]]
    assert sheet.main(["--data", str(tmp_path / "none"), "--models", str(model), "--output", "x.png"]) == 2
    assert "none" in capsys.readouterr().err
