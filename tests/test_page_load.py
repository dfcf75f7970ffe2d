"""The programs that measure the page under load and take its pictures; no timing is asserted."""

import json
import sys
from pathlib import Path

import pytest
from browser import chromium_path
from conftest import scope_of
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import page_load
import page_picture


def test_one_process_has_all_tests_that_open_the_page():
    folder = Path(__file__).parent
    opening = [path.name for path in folder.glob("test_*.py") if "from browser import" in path.read_text()]
    assert len(opening) >= 3 and {scope_of(f"tests/{name}::test_it[a-b]") for name in opening} == {"page"}
    assert scope_of("tests/test_thinking.py::test_it") == "test_thinking.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_size_and_twenty_visitors_are_measured(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--sizes", "64x48", "--requests", "2", "--visitors-size", "32x32", "--checkpoint", str(tiny_checkpoint)]
    assert page_load.main([*options, "--note", "A trial.", "--device", "cpu", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (row,), several = results["sizes"], results["visitors"]
    assert row["size"] == [64, 48] and len(row["requests"]) == 2
    for found in row["requests"]:
        assert 0 < found["first_preview"] <= found["total"] and "in 4 steps" in found["facts"]
        assert found["peak"] is None or found["peak"] >= row["memory_at_rest"]
    assert (several["count"], several["done"], several["problems"]) == (20, 20, [])
    told = several["message_to_one_more"]  # nothing where such small images were done before it came: see test_app.py
    assert told == "" or "full" in told
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "A trial." in report and "| 64x48 (0.0 MP) | 2 |" in report and "20 served" in report


@pytest.mark.slow
def test_a_page_that_does_not_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert page_load.main(["--checkpoint", "no/such/folder", "--device", "cpu", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("page_load: the page did not start: denoise: ") and "no/such/folder" in said[-1]


@pytest.mark.parametrize("size", ["512", "4x4", "axb"])
def test_a_size_must_be_width_and_height(size: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        page_load.main(["--sizes", size])
    assert caught.value.code == 2 and "WIDTHxHEIGHT" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a fresh machine it installs the browser
def test_the_pictures_of_the_page_are_taken(tiny_checkpoint: Path, tmp_path: Path):
    chromium_path()
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    assert page_picture.main(["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path)]) == 0
    widths = {path.name: Image.open(path).size[0] for path in tmp_path.glob("*.png")}
    assert widths == {"app.png": 900, "app_phone.png": 390, "repair.png": 900}
    assert all(path.stat().st_size < 400_000 for path in tmp_path.glob("*.png"))


def test_without_chromium_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(page_picture.shutil, "which", lambda name: None)
    assert page_picture.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "page_picture: no chromium was found; install one: apt install chromium\n"
