"""The smoke configs reach the results in their headers."""

import json
import re
from pathlib import Path

import pytest

from ebt_vision.training.config import load_config
from ebt_vision.training.loop import Trainer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def last_validation(name: str, output: Path, key: str):
    """Train the config on the CPU; the last validation in its log."""
    config = load_config(CONFIGS / name)
    if not Path(config.data.path).exists():
        pytest.skip(f"{config.data.path} is not here")
    output.mkdir()
    Trainer(config, output, device="cpu").run()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line][-1]


def promised(name: str, pattern: str) -> list[float]:
    found = re.search(pattern, (CONFIGS / name).read_text())
    assert found is not None, f"the header of {name} promises nothing of this form: {pattern}"
    return [float(number) for number in found.groups()]


@pytest.mark.slow
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    first, noisy = promised("smoke.yaml", r"about ([\d.]+) dB at level 0.1 after one step \(noisy ([\d.]+) dB\)")
    psnr = last_validation("smoke.yaml", tmp_path / "run", "validation_psnr")["0.1"]
    assert psnr[0] == pytest.approx(noisy, abs=0.05) and psnr[1] == pytest.approx(first, abs=0.3)


@pytest.mark.slow
def test_text_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    (bits,) = promised("text_smoke.yaml", r"about ([\d.]+) bits per byte after one step")
    assert last_validation("text_smoke.yaml", tmp_path / "run", "validation_bits_per_byte")[0] == pytest.approx(bits, abs=0.1)
