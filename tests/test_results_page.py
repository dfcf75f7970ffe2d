"""The page of the headline results: it uses only committed files and figures of the shipped weights."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from ebt_vision.models.checkpoint import checkpoint_hash

ROOT = Path(__file__).parents[1]
ABOUT = {
    "command": "python eval/denoising.py --data x",
    "commit": "abc",
    "hardware": "1 CPU",
    "torch": "2",
    "date": "2026-01-01",
}
FIGURES = {
    ("tiny_imagenet_ebt", "thinking", 1): (25.0, 16.0),
    ("tiny_imagenet_ebt", "thinking", 10): (23.0, 21.0),
    ("tiny_imagenet_ebt", "thinking, tolerance 0.006 of the training's", 10): (24.94, 20.9),
    ("tiny_imagenet_dit", "ddim", 1): (23.5, 11.0),
    ("tiny_imagenet_dit", "ddim", 100): (23.2, 16.5),
    ("tiny_imagenet_regressor", "applied", 1): (25.1, 17.0),
    ("tiny_imagenet_regressor", "applied", 3): (20.0, 21.25),
    ("tiny_imagenet_eqm", "descent", 2): (24.0, 17.0),
    ("bm3d", "told sigma", 1): (24.5, 20.5),
    ("identity", "noisy input", 1): (16.4, 11.6),
}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    return importlib.import_module("results_page")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a paper.json that has round figures."""
    rows = []
    for (model, method, steps), values in FIGURES.items():
        weights = checkpoint_hash(model) if model.startswith("tiny") else None
        for level, psnr in zip((0.1, 0.2), values, strict=True):
            row = {"model": model, "hash": weights, "strength": level, "sweep": False, "method": method, "steps": steps}
            rows.append(row | {"steps_used": 2.0, "flops": 1.84e9, "psnr_image": psnr, "psnr_image_ci95": [psnr - 1, psnr + 1]})
    results = {"about": ABOUT, "protocol": {"num_images": 100}, "rows": rows, "combined": [], "verification": {}}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "paper.json").write_text(json.dumps(results))
    return folder


def line(page: str, title: str) -> list[str]:
    (found,) = [text for text in page.splitlines() if text.startswith(f"| {title} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_committed_page_is_what_its_files_give(program):
    evidence = program.read_evidence(ROOT / "docs" / "results" / "data")
    command = "run python eval/results_page.py --readme README.md and commit"
    assert (ROOT / "docs" / "results" / "index.md").read_text() == program.page(evidence), command
    readme = (ROOT / "README.md").read_text()
    assert program.with_headline(readme, evidence) == readme, command


def test_the_table_has_the_figures_and_says_what_is_missing(program, data: Path):
    page = program.page(program.read_evidence(data))
    assert line(page, "EBT, 1 step")[1:3] == ["25.00", "16.00"]
    assert line(page, "EBT, best of 1 to 10 steps")[1:3] == ["25.00", "21.00"]  # the best number differs between levels
    assert line(page, "DiT, best number of passes")[1:3] == ["23.50", "16.50"]
    assert line(page, "regressor, best number of times")[1:3] == ["25.10", "21.25"]
    assert line(page, "**EBT, stops by itself**")[1:] == ["24.94", "20.90", "n/a", "n/a", "1.8", ""]
    assert "Not available: photographs.json, speed.json, probe-tiny_imagenet_ebt.json" in page


def test_the_sentences_follow_from_the_figures(program, data: Path):
    known, unseen, regressor = program.sentences(program.read_evidence(data))
    assert "25.00 dB, 1.50 dB above the DiT's best row, and 0.50 dB above BM3D" in known
    assert "from 16.00 dB after one step to 21.00, 4.50 dB above the DiT's best row" in unseen
    assert "within 0.10 dB of the best number of steps" in unseen
    assert "0.10 dB above the EBT's best at level 0.1 and 0.25 dB above it at level 0.2" in regressor


def test_figures_of_other_weights_are_left_out(program, data: Path):
    text = (data / "paper.json").read_text().replace(checkpoint_hash("tiny_imagenet_ebt"), "0" * 12)
    (data / "paper.json").write_text(text)
    page = program.page(program.read_evidence(data))
    assert line(page, "EBT, 1 step")[1:3] == ["n/a", "n/a"] and line(page, "regressor, once")[1] == "25.10"
    assert (
        "1. **Not available**" in page and "Omitted, because the weights have changed: tiny_imagenet_ebt in paper.json." in page
    )


def test_two_stopping_rules_are_refused(program, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = json.loads((data / "paper.json").read_text())
    ruled = [row for row in results["rows"] if row["method"].startswith("thinking, tolerance")]
    results["rows"] += [row | {"method": "thinking, tolerance 0.02"} for row in ruled]
    (data / "paper.json").write_text(json.dumps(results))
    assert program.main(["--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "2 stopping rules of tiny_imagenet_ebt" in capsys.readouterr().err


def test_further_files_add_models_on_the_same_images(program, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = json.loads((data / "paper.json").read_text())
    whole = program.page(program.read_evidence(data))
    apart = [row for row in results["rows"] if row["model"] == "bm3d"]
    rest = [row for row in results["rows"] if row["model"] != "bm3d"]
    (data / "paper.json").write_text(json.dumps(results | {"rows": rest}))
    (data / "paper-bm3d.json").write_text(json.dumps(results | {"rows": apart}))
    title = "BM3D, true noise level"
    assert line(program.page(program.read_evidence(data)), title) == line(whole, title) != ["n/a"]
    (data / "paper-bm3d.json").write_text(json.dumps(results | {"rows": [row | {"images": "others"} for row in apart]}))
    assert program.main(["--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "paper.json and its further files have other images or noise" in capsys.readouterr().err


def test_it_writes_the_page_and_its_plot(program, data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "kept")
    assert program.main(["--data", str(data), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.md", "headline.png"}
    assert "headline.png" in (tmp_path / "out" / "index.md").read_text()
    assert (tmp_path / "kept" / "paper.json").read_text() == (data / "paper.json").read_text()


def test_without_files_nothing_is_claimed(program, tmp_path: Path):
    page = program.page(program.read_evidence(tmp_path))
    assert "No results.json is committed." in page and "headline.png" not in page
    assert not any(character.isdigit() for cells in page.splitlines() if "n/a |" in cells for character in cells.split("|")[2])


def test_the_table_goes_between_the_marks_of_a_file(program, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- headline -->\nan earlier table\n<!-- end -->\nafter\n")
    command = ["--data", str(data), "--output", str(tmp_path / "out"), "--readme", str(readme)]
    assert program.main(command) == 0
    text = readme.read_text()
    assert text.startswith("# A\n<!-- headline -->\n") and text.endswith("<!-- end -->\nafter\n") and "earlier" not in text
    assert "|  | ID | OOD | GFLOPs |" in text and "n/a" not in text  # columns without a figure are left out
    readme.write_text("# A\n")
    assert program.main(command) == 2 and "no marks" in capsys.readouterr().err
