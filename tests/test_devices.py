"""One rule for --device in all programs: the best device where none is named, and a device that is not there is refused."""

import importlib
from pathlib import Path

import pytest

from ebt_vision import cli

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "eval").glob("*.py") if '"--device"' in path.read_text())
NEEDED = {
    "denoising": ["--models", "identity", "--data", "photos"],
    "linear_probe": ["--model", "some", "--data", "photos"],
    "page_load": [],
    "speed": [],
    "text_perplexity": ["--models", "some", "--data", "book.txt"],
}


def test_every_program_with_the_option_is_checked():
    assert set(PROGRAMS) == set(NEEDED)


@pytest.fixture(autouse=True)
def programs_can_be_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "eval")


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_the_option_a_program_names_no_device(program: str):
    """pick_device then takes the best one."""
    module = importlib.import_module(program)
    parse = module._parse if program == "linear_probe" else module._parser().parse
    assert parse(NEEDED[program]).device is None


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_refuses_a_device_that_is_not_there(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main = importlib.import_module(program).main
    assert main([*NEEDED[program], "--device", "abacus", "--output", str(tmp_path)]) == 2
    assert "device='abacus' is not on this machine; use one of: cpu" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [["denoise", "photo.png", "--output", "o"], ["generate", "To be"], ["train", "a.yaml"]])
def test_a_command_names_no_device_without_the_option(command: list[str]):
    assert cli._parse(command).device is None
