"""What README.md and docs/*.md tell people to type: every block of code runs, every command is run or at least parsed.

A command that is in neither list below is run, in a folder with the files that it names.
"""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ebt_vision import cli
from ebt_vision.benchmark.options import OneLineParser, config_to_arguments
from ebt_vision.config import load_config
from ebt_vision.data.images import DataConfig, load_image_set

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_DATA = (
    "python eval/denoising.py",
    "python eval/linear_probe.py",
    "python eval/text_perplexity.py",
    "python eval/compare.py",
)
NEEDS_TIME = ("python eval/speed.py", "python eval/scale.py", "ebt-vision train", "make test", "make demo")
NEEDS_HARDWARE = ("accelerate launch",)
PARSED = NEEDS_DATA + NEEDS_TIME + NEEDS_HARDWARE
PROGRAMS = ("ebt-vision ", "python ", "make ", "accelerate ", "source ")


class Parsed(Exception):
    """Ends a program once its command line has been understood."""


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page's indented lines and `inline code`, without what is said beside them."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text())
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+ [^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [re.split(r"(?<=\S)\s{4,}(?=[a-z]|that |EBT)", line.strip())[0] for line in lines if line.startswith(PROGRAMS)]
    return [re.sub(r"\s+", " ", line) for line in found]


ALL = [pytest.param(command, id=f"{page.stem}: {command[:60]}") for page in PAGES for command in commands(page)]
RUN = [
    pytest.param(*param.values, id=param.id, marks=pytest.mark.slow if " generate " in str(param.values[0]) else ())
    for param in ALL
    if not str(param.values[0]).startswith((*PARSED, "source"))
]


def test_the_pages_are_read():
    """At the least these are there, whole and without the words beside them."""
    found = [param.values[0] for param in ALL]
    assert len(found) > 25
    assert "ebt-vision denoise photo.jpg --steps 10 --tolerance 0.1 --output out/" in found
    assert any(word.startswith("accelerate") and word.endswith("optim.lr=5.0e-4") for word in found)
    assert 'make demo ARGS="--port 8000 --share --checkpoint runs/mine --device cuda"' in found
    assert [len(code_blocks(page, "python")) for page in PAGES if page.stem in ("README", "scaling")] == [1, 1]
    every_block = sum(page.read_text().count("\n```") // 2 for page in PAGES)
    assert every_block == sum(len(code_blocks(page, language)) for page in PAGES for language in ("python", "yaml"))


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    """By the program's own parser, configs and keys with their values included."""
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "source":
        assert words == [".venv/bin/activate"] and "-m venv .venv" in (ROOT / "Makefile").read_text()
    elif program == "make":
        understand_make(words, monkeypatch)
    elif program == "accelerate":
        understand_launch(words)
    elif program == "ebt-vision":
        understand_cli(words)
    else:
        understand_program(words, monkeypatch)


def understand_cli(words: list[str]) -> None:
    args = cli._parse(words)
    if words[0] == "train":
        load_config(args.config, args.overrides)


def understand_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args([word.replace("$RANK", "0") for word in words if word != "launch"])
    assert args.module and args.training_script == "ebt_vision.cli"
    understand_cli(args.training_script_args)


def understand_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target, *variables = words
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for variable in variables:
        assert variable.startswith("ARGS=")
        understand_program(["apps/denoise.py", *shlex.split(variable.removeprefix("ARGS="))], monkeypatch)


def understand_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, *options = words
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    # Options that the page leaves to the reader ("...") are those of the same program's first command on it.
    options = options[:-1] + ["--data", "FOLDER", "--output", "results"] if options[-1] == "..." else options
    parse = argparse.ArgumentParser.parse_args

    def understood(parser: argparse.ArgumentParser, given: list[str] | None = None, *rest: object):
        settings = parse(parser, given)
        if isinstance(parser, OneLineParser) and not parser.add_help:  # the one that looks for --config alone
            return settings
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understood)
    with pytest.raises(Parsed):
        importlib.import_module(Path(path).stem).main(options)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the commands name."""
    random = np.random.default_rng(0)
    for name, size in (("photo.jpg", (40, 56)), ("small.png", (37, 31))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", RUN)
def test_every_command_that_needs_no_data_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    program, *words = shlex.split(command)
    assert program == "ebt-vision", f"{command} is neither run here nor listed as one that cannot be"
    assert cli.main(words) == 0, capsys.readouterr().err
    if words[0] == "denoise":
        assert [path.stem for path in (folder / "out").iterdir()] == [Path(words[1]).stem]
    else:
        assert capsys.readouterr().out.strip()


def test_the_readme_s_program_runs():
    (program,) = code_blocks(ROOT / "README.md", "python")
    names: dict = {"noisy": torch.rand(1, 3, 37, 31, generator=torch.Generator().manual_seed(0))}
    exec(compile(program, "README.md", "exec"), names)
    assert names["result"].image.shape == (1, 3, 37, 31) and names["result"].energies.shape[1:] == (1,)


def test_the_cluster_s_shards_are_made_as_the_page_says(tmp_path: Path):
    """The recipe on two classes of small images; training then reads the shards with the page's pattern."""
    random = np.random.default_rng(0)
    for name, size in (("a/0.png", (128, 128)), ("a/1.jpg", (150, 200)), ("b/2.png", (90, 64))):
        path = tmp_path / "imagenet" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    (tmp_path / "imagenet-128").mkdir()
    (program,) = code_blocks(ROOT / "docs" / "scaling.md", "python")
    assert program.count("/data/") == 2
    exec(compile(program.replace("/data/", f"{tmp_path}/"), "scaling.md", "exec"), {})
    images = load_image_set(DataConfig(path=str(tmp_path / "imagenet-128" / "train-*.tar"), img_size=128))
    assert images.labels == [0, 0, 1] and images.images([0, 1, 2]).shape == (3, 3, 128, 128)
    original = np.asarray(Image.open(tmp_path / "imagenet" / "train" / "a" / "0.png"))
    assert np.array_equal(images.images([0])[0].permute(1, 2, 0).numpy(), original)


def test_the_benchmark_s_config_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    denoising = importlib.import_module("denoising")
    (text,) = code_blocks(ROOT / "docs" / "benchmark.md", "yaml")
    (tmp_path / "benchmark.yaml").write_text(text)
    parser = denoising._parser()
    settings = parser.parse(["--config", str(tmp_path / "benchmark.yaml")])
    given = yaml.safe_load(text)
    assert config_to_arguments(tmp_path / "benchmark.yaml", parser)
    assert settings.models == given["models"] and settings.seeds == given["seeds"] and settings.data == given["data"]
    assert denoising._groups(settings.group) == given["group"]
    assert sys.modules["denoising"] is denoising
