"""The programs of the tutorials on small generated data, and that the pages show these programs."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
NAMES = sorted(page.stem for page in TUTORIALS.glob("*.md"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a tutorial in a folder with photographs of two classes, light and dark; return its output."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for label, light in (("dark", 60), ("light", 190)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = light + random.integers(-50, 50, (64, 80, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)

    def run_tutorial(name: str, *words: object) -> list[str]:
        path = TUTORIALS / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path), *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_tutorial


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_its_program(name: str):
    """Every block of the page is in the program, in its order, and everything but imports and docstring is shown."""
    program = (TUTORIALS / f"{name}.py").read_text()
    page = (TUTORIALS / f"{name}.md").read_text()
    blocks = [block.rstrip("\n") for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]
    places = [program.find(block) for block in blocks]
    assert blocks and -1 not in places and places == sorted(places)
    code = program[program.rindex("import ") :].partition("\n\n")[2]
    for block in blocks:
        code = code.replace(block, "")
    assert not code.strip()


def test_there_are_five():
    assert NAMES == ["compare", "denoise", "own_energy", "probe", "train"]


def test_your_own_energy_removes_noise_in_twenty_lines(run):
    lines = run("own_energy")
    psnr = [float(line.split()[-2]) for line in lines]
    energy = [float(re.search(r"energy ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) == 4 and psnr == sorted(psnr) and psnr[-1] > 24 and energy == sorted(energy, reverse=True)
    program = (TUTORIALS / "own_energy.py").read_text().partition("def energy")[2]
    assert len([line for line in program.splitlines() if line.strip()]) <= 20


def test_energies_fall_while_a_photograph_is_denoised(run, tmp_path: Path):
    lines = run("denoise", "photos/train/dark/0.png")
    energies = [float(re.search(r"energy ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) == 10 and energies[:5] == sorted(energies[:5], reverse=True)
    psnr = [float(line.split()[-2]) for line in lines[5:]]
    assert psnr[0] == pytest.approx(20.2, abs=0.5) and max(psnr) > psnr[0] + 3  # 20 log10(255 / 25) = 20.17
    with Image.open(tmp_path / "denoised.png") as image:
        assert image.size == (80, 64)


def test_a_small_ebt_is_trained_on_a_folder(run, tmp_path: Path):
    small = ["train.num_updates=6", "train.batch_size=4", "replay.start=2", "replay.capacity=8", "validation.every=3"]
    lines = run("train", *small, "validation.num_images=4", "validation.num_steps=2", "model.embed_dim=48")
    assert lines[0] == "6 updates of 4 images of 32 px"
    (known,) = [line for line in lines if line.startswith("level 0.1: noisy ")]
    assert len(known.split()) == 8
    model = load_pretrained(str(tmp_path / "runs" / "tutorial_ebt" / "model"))
    assert model.config.embed_dim == 48


def test_an_ebt_and_a_dit_are_compared(run, tiny_checkpoint: Path, tmp_path: Path):
    torch.manual_seed(0)
    DiT(DiTConfig(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)).save_pretrained(tmp_path / "dit")
    lines = run("compare", tiny_checkpoint, tmp_path / "dit", "photos/validation")
    rows = [line for line in lines if " steps: " in line]
    assert "6 images of 32 px" in lines[-9] and len(rows) == 8
    assert all(re.search(r": -?\d+\.\d\d, -?\d+\.\d\d$", row) for row in rows)


def test_a_probe_tells_dark_from_light(run, tiny_checkpoint: Path, tmp_path: Path):
    from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig

    config = PatchEBTConfig(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    PatchEBT(config).save_pretrained(tmp_path / "ebt")
    lines = run("probe", tmp_path / "ebt", "photos/train", "photos/validation")
    assert lines[-2:] == [
        f"{tmp_path / 'ebt'}: 100.0 % of the test images, 2 classes",
        f"random:{tmp_path / 'ebt'}: 100.0 % of the test images, 2 classes",
    ]
