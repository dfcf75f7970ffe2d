"""eval/noise_left.py: strength and correlation of known noise, the windows it takes, and its table."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import noise_left


def grey_noise(size: int, std: float, blur: int = 1) -> Tensor:
    """A slope with grey noise of `std` in 0..255 units, the mean of `blur` x `blur` pixels; (3, size, size) in [0, 1]."""
    noise = torch.randn(1, 1, size + blur - 1, size + blur - 1, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.avg_pool2d(noise, blur, stride=1)[0] * blur
    return (torch.linspace(0.3, 0.6, size) + noise * std / 255.0).expand(3, size, size)


def test_strength_and_correlation_of_known_noise() -> None:
    found = noise_left.fields(noise_left.windows(grey_noise(160, 6.0)))
    row = noise_left.noise_row(found)
    assert row["luma"] == pytest.approx(6.0, rel=0.03) and row["colour"] == pytest.approx(0.0, abs=1e-4)
    assert row["luma, 1 px"] == pytest.approx(0.0, abs=0.02)
    coarse = noise_left.noise_row(noise_left.fields(noise_left.windows(grey_noise(160, 6.0, blur=2))))
    # The mean of 2 x 2 pixels shares half of its pixels with the next one, and none with the one after that.
    assert coarse["luma, 1 px"] == pytest.approx(0.5, abs=0.03) and coarse["luma, 2 px"] == pytest.approx(0.0, abs=0.03)


def test_a_quadratic_surface_is_no_noise() -> None:
    line = torch.linspace(0.0, 1.0, 64)
    image = (0.3 + 0.2 * line**2 + 0.3 * line[:, None] * line).expand(3, 64, 64)
    assert noise_left.strength(noise_left.fields(noise_left.windows(image))[0]) < 1e-3


def test_the_smoothest_windows_are_taken_and_clipped_ones_never() -> None:
    image = grey_noise(256, 2.0).clone()
    image[:, :, 128:] = grey_noise(256, 9.0)[:, :, 128:]
    image[:, :64] = 1.0
    parts = noise_left.windows(image)
    chosen = noise_left.smoothest(parts)
    assert len(parts) == 225 and len(chosen) == 11
    rows, columns = chosen // 15, chosen % 15
    assert rows.min() >= 4 and columns.max() <= 6
    assert len(noise_left.smoothest(noise_left.windows(torch.ones(3, 64, 64)))) == 0


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that halves the distance to grey leaves half of the noise."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name, image in (("noisy", grey_noise(96, 8.0)), ("white", torch.ones(3, 64, 64)), ("small", torch.ones(3, 16, 64))):
        pixels = (image * 255.0).round().to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(photographs / f"{name}.png")

    class Halved:
        image: Tensor

    def halved(denoiser: object, noisy: Tensor) -> Halved:
        result = Halved()
        result.image = 0.5 * noisy[None] + 0.25
        return result

    monkeypatch.setattr(noise_left, "denoise_tiled", halved)
    output = tmp_path / "left.json"
    assert noise_left.main(["--data", str(photographs), "--models", "photographs_ebt", "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert "small.png is left out: it is smaller" in said.err and "white.png is left out: every window" in said.err
    (row,) = json.loads(output.read_text())["rows"]
    assert row["photograph"] == "noisy" and row["luma"] == pytest.approx(8.0, rel=0.1)
    assert row["photographs_ebt left: luma"] == pytest.approx(0.5, abs=1e-3)
    assert "| median |" in said.out and "photographs_ebt left: luma" in said.out
    (photographs / "noisy.png").unlink()
    assert noise_left.main(["--data", str(photographs)]) == 2
    assert "no photograph in" in capsys.readouterr().err
