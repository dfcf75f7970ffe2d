"""--device in all programs: the default is the fastest available device, and a missing device is refused."""

import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from ebt_vision import cli
from ebt_vision.models import checkpoint
from ebt_vision.models.checkpoint import pick_device, program_device
from ebt_vision.training.config import load_config

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "eval").glob("*.py") if '"--device"' in path.read_text())
PROGRAMS = sorted([*PROGRAMS, "denoising"])  # its options are in benchmark/denoising_options.py
NEEDED = {
    "denoising": ["--models", "identity", "--data", "photos"],
    "energy_uses": ["--models", "some", "--data", "photos", "--tune-data", "photos"],
    "linear_probe": ["--model", "some", "--data", "photos"],
    "page_load": [],
    "picture": ["--model", "some", "--images", "photo.png", "--output", "picture.png"],
    "restoration": ["--models", "some", "--data", "photos", "--output", "restored"],
    "scaling": ["--data", "photos", "--families", "patch_ebt"],
    "sheet": ["--data", "photos", "--models", "some", "--output", "sheet.png"],
    "speed": [],
    "stopping": ["--model", "some", "--data", "photos"],
    "training_gain": ["--model", "some", "--data", "photos"],
    "text_perplexity": ["--models", "some", "--data", "book.txt"],
    "text_thinking": ["--models", "some"],
}


def test_every_program_with_the_option_is_checked():
    assert set(PROGRAMS) == set(NEEDED)


@pytest.fixture(autouse=True)
def programs_can_be_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "eval")


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_the_option_a_program_names_no_device(program: str):
    """pick_device then selects the fastest one."""
    module = importlib.import_module(program)
    if program == "linear_probe":
        parse = module._parse
    else:
        parse = (module.denoising_parser() if program == "denoising" else module._parser()).parse
    assert parse(NEEDED[program]).device is None


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_refuses_a_device_that_is_not_there(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main = importlib.import_module(program).main
    output = [] if program in ("stopping", "training_gain") else ["--output", str(tmp_path)]  # these print
    assert main([*NEEDED[program], "--device", "abacus", *output]) == 2
    assert "device='abacus' is not on this machine; use one of: cpu" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [["denoise", "photo.png", "--output", "o"], ["generate", "To be"], ["train", "a.yaml"]])
def test_a_command_names_no_device_without_the_option(command: list[str]):
    assert cli._parse(command).device is None


@pytest.fixture
def asked_precision(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record calls of torch.set_float32_matmul_precision on a simulated machine with a GPU."""
    told: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return told


def test_programs_use_tf32_on_cuda_and_nowhere_else(asked_precision: list[str]):
    assert pick_device() == "cuda" and asked_precision == []  # the library changes nothing
    assert program_device("cpu") == "cpu" and asked_precision == []
    assert program_device() == "cuda" and program_device("cuda:1") == "cuda:1"
    assert asked_precision == ["high", "high"] and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_takes_its_device_from_one_place(program: str):
    module = importlib.import_module(program)
    assert module.program_device is program_device and not hasattr(module, "pick_device")


@pytest.mark.parametrize("command", [["denoise", "photo.png", "--output", "o"], ["generate", "To be"], ["train", "a.yaml"]])
def test_so_does_every_command(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("photo.png")
    Path("a.yaml").write_text("name: a")

    def refuse(name: str | None) -> str:
        raise ValueError(f"told {name}")

    monkeypatch.setattr(checkpoint, "program_device", refuse)
    with pytest.raises(ValueError, match="told cpu"):
        arguments = cli._parse([*command, "--device", "cpu"])
        arguments.run(arguments)


def test_the_gpu_config_loads_ahead_and_replays_late():
    config = load_config(ROOT / "configs" / "tiny_imagenet_ebt_gpu.yaml")
    assert config.train.num_load_threads > 0 and config.replay.start >= config.optim.warmup_updates
