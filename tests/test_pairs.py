"""The protocol of real noise: pairs by their names, measured as they are."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.benchmark.pairs import load_pairs, parse_patterns
from ebt_vision.data.sources import DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import denoising

PATTERNS = "*_noisy*:*_clean*"


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs of which one lies in another folder, a noisy image without a clean one, a pair of two sizes, no image."""
    folder = tmp_path / "pairs"
    for number, name in enumerate(("a", "b", "deep/c")):
        clean = np.full((37, 31 + number, 3), 100, np.uint8)
        write(folder / f"{name}_clean.png", clean)
        write(folder / f"{name}_noisy.png", clean + np.uint8(number + 1))
    write(folder / "d_noisy.png", np.zeros((8, 8, 3), np.uint8))
    write(folder / "e_noisy.png", np.zeros((8, 8, 3), np.uint8))
    write(folder / "e_clean.png", np.zeros((8, 9, 3), np.uint8))
    write(folder / "f_clean.png", np.zeros((8, 9, 3), np.uint8))
    (folder / "f_noisy.png").write_text("no image")
    return folder


def test_pairs_are_found_by_what_the_stars_stand_for(pairs: Path):
    found = load_pairs(str(pairs), PATTERNS)
    assert found.names == ["a_noisy.png", "b_noisy.png", "c_noisy.png"]
    for index, (clean, noisy) in enumerate(zip(found.images(range(3)), found.noisy(range(3)), strict=True)):
        assert torch.equal(noisy, clean + index + 1)
    assert any("d_noisy.png has no clean image" in text for text in found.skipped)
    assert any("e_noisy.png differs in size" in text for text in found.skipped)
    assert len(found.skipped) == 3
    assert load_pairs(str(pairs), PATTERNS, limit=1).names == ["a_noisy.png"]


def test_the_digest_knows_both_images(pairs: Path):
    before = load_pairs(str(pairs), PATTERNS).hash
    write(pairs / "a_noisy.png", np.full((37, 31, 3), 50, np.uint8))
    assert load_pairs(str(pairs), PATTERNS).hash != before


def test_the_noisy_input_has_the_error_of_the_files(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--protocol", "real", "--pairs", PATTERNS, "--models", "identity", "--data", str(pairs), "--strip", "1"]
    output = tmp_path / "out"
    assert denoising.main([*command, "--output", str(output)]) == 0
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    assert row["protocol"] == "real" and row["mse"] == pytest.approx((1 + 4 + 9) / 3)
    report = (output / "report.md").read_text()
    assert "real noise" in report and "real camera noise" in report and "d_noisy.png" in report
    before = (output / "results.json").read_text()
    assert denoising.main([*command, "--output", str(output)]) == 0  # from its parts
    assert json.loads((output / "results.json").read_text())["rows"][0]["mse"] == json.loads(before)["rows"][0]["mse"]


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (["--protocol", "real"], "must be used together"),
        (["--pairs", PATTERNS], "must be used together"),
        (["--protocol", "real", "--pairs", "noisy:clean"], "two patterns with equally many stars"),
        (["--protocol", "real", "--pairs", "*_n*:*"], "two patterns with equally many stars"),
        (["--protocol", "real", "--pairs", PATTERNS, "--img-size", "64"], "uses whole photographs"),
        (["--protocol", "real", "--pairs", PATTERNS, "--clipped"], "8-bit files"),
        (["--protocol", "real", "--pairs", "*_x*:*_y*"], "no pair"),
    ],
)
def test_a_wrong_request_is_one_line(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more, answer):
    command = ["--models", "identity", "--data", str(pairs), "--output", str(tmp_path / "out"), *more]
    assert denoising.main(command) == 2
    error = capsys.readouterr().err
    assert answer in error.splitlines()[-1] and error.splitlines()[-1].startswith("denoising: ")


def test_patterns_and_folders_that_cannot_be_used(tmp_path: Path):
    assert parse_patterns("noisy/*.png:clean/*.png") == ("noisy/*.png", "clean/*.png")
    with pytest.raises(ValueError, match="two patterns"):
        parse_patterns("*:*")
    with pytest.raises(DataError, match="is not a folder"):
        load_pairs(str(tmp_path / "no"), PATTERNS)


def test_pairs_in_two_folders(tmp_path: Path):
    write(tmp_path / "noisy" / "1.png", np.zeros((9, 9, 3), np.uint8))
    write(tmp_path / "clean" / "1.png", np.zeros((9, 9, 3), np.uint8))
    assert load_pairs(str(tmp_path), "noisy/*.png:clean/*.png").names == ["1.png"]


@pytest.mark.parametrize(
    ("patterns", "noisy", "clean"),
    [  # SIDD-Medium, SIDD's validation crops as files, PolyU, RENOIR
        ("*_NOISY_SRGB_*:*_GT_SRGB_*", "Data/0001_S6/0001_NOISY_SRGB_010.PNG", "Data/0001_S6/0001_GT_SRGB_010.PNG"),
        ("*/input_crops/*:*/target_crops/*", "val/input_crops/0-1.png", "val/target_crops/0-1.png"),
        ("*_[Rr]eal.JPG:*_[Mm]ean.JPG", "CroppedImages/Canon5D2_bag_Real.JPG", "CroppedImages/Canon5D2_bag_mean.JPG"),
        ("*/*Noisy.bmp:*/*Reference.bmp", "Batch_001/IMG_1Noisy.bmp", "Batch_001/IMG_1Reference.bmp"),
    ],
)
def test_names_of_public_sets(tmp_path: Path, patterns: str, noisy: str, clean: str):
    write(tmp_path / noisy, np.full((16, 24, 3), 90, np.uint8))
    write(tmp_path / clean, np.full((16, 24, 3), 60, np.uint8))
    found = load_pairs(str(tmp_path), patterns)
    assert found.names == [Path(noisy).name]
    assert (found.noisy([0])[0].float().mean() - found.images([0])[0].float().mean()).item() == pytest.approx(30, abs=2)


def test_a_limit_decodes_the_chosen_pairs_alone(pairs: Path):
    (pairs / "b_noisy.png").write_text("no image")
    found = load_pairs(str(pairs), PATTERNS, limit=1)
    assert found.names == ["a_noisy.png"] and not any("b_noisy" in text for text in found.skipped)
