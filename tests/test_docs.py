"""Commands and code of the documentation: every block of code runs, every command is run or at least parsed.

A command that is in neither list below is run in a folder with its files. The appendix of the results is excluded, because its
commands may have options that later versions do not have. Tutorials run in test_tutorials.py.
"""

import argparse
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ebt_vision import cli
from ebt_vision.benchmark.options import OneLineParser, config_to_arguments
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.training.config import load_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if page.parent.name != "benchmark" and page.parent != DOCS / "results"]
PAGES += [DOCS / "results" / "index.md", DOCS / "results" / "data.md"]
NEEDS_DATA = (
    "python eval/denoising.py",
    "python eval/linear_probe.py",
    "python eval/text_perplexity.py",
    "python eval/compare.py",
    "python eval/training_gain.py",
    "python eval/results_page.py",
)
NEEDS_TIME = (
    "python eval/speed.py",
    "python eval/scale.py",
    "python eval/scaling.py",
    "python eval/text_thinking.py",
    "python -m pytest",
    "ebt-vision train",
    "make ",
)
NEEDS_HARDWARE = ("accelerate launch",)
PARSED = NEEDS_DATA + NEEDS_TIME + NEEDS_HARDWARE
OF_A_RUN = "runs/"  # weights that an earlier command of the page would have made
TUTORIAL = "python docs/tutorials/"
PROGRAMS = ("ebt-vision ", "python ", "make ", "accelerate ", "source ")


WITH_CODE = {
    "README.md": 1,
    "docs/scaling.md": 1,
    "docs/how-to/benchmark.md": 2,
    "docs/how-to/data.md": 2,
    "docs/how-to/export.md": 2,
    "docs/how-to/restore.md": 1,
}


class Parsed(Exception):
    """Stops a program after its command line has been parsed."""


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands in indented lines and `inline code` of a page, without the comments beside them."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text())
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+ [^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [re.split(r"(?<=\S)\s{4,}(?=[a-z]|that |EBT)", line.strip())[0] for line in lines if line.startswith(PROGRAMS)]
    return [re.sub(r"\s+", " ", line) for line in found]


ALL = [pytest.param(command, id=f"{page.stem}: {command[:60]}") for page in PAGES for command in commands(page)]
RUN = [
    pytest.param(*param.values, id=param.id, marks=pytest.mark.slow if " generate " in str(param.values[0]) else ())
    for param in ALL
    if not str(param.values[0]).startswith((*PARSED, "source", TUTORIAL)) and OF_A_RUN not in str(param.values[0])
]


def test_the_pages_are_read():
    """Some known commands are found, complete and without comments."""
    found = [param.values[0] for param in ALL]
    assert len(found) > 25
    assert "ebt-vision denoise photo.jpg --steps 10 --tolerance 0.1 --output out/" in found
    assert any(word.startswith("accelerate") and word.endswith("optim.lr=5.0e-4") for word in found)
    assert 'make demo ARGS="--port 8000 --share --checkpoint runs/mine/model --device cuda"' in found
    with_code = {page.relative_to(ROOT).as_posix(): len(code_blocks(page, "python")) for page in PAGES}
    with_code = {name: count for name, count in with_code.items() if count and "tutorials/" not in name}
    assert with_code == WITH_CODE  # each of them is run below
    every_block = sum(page.read_text().count("\n```") // 2 for page in PAGES)
    assert every_block == sum(len(code_blocks(page, language)) for page in PAGES for language in ("python", "yaml"))


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    """The program's own parser accepts every command, including configs, keys and values."""
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "source":
        assert words == [".venv/bin/activate"] and "-m venv .venv" in (ROOT / "Makefile").read_text()
    elif program == "make":
        understand_make(words, monkeypatch)
    elif program == "accelerate":
        understand_launch(words, monkeypatch)
    elif program == "ebt-vision":
        understand_cli(words)
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif command.startswith(TUTORIAL):
        assert (ROOT / words[0]).with_suffix(".md").exists()  # so test_tutorials.py runs it
    else:
        understand_program(words, monkeypatch)


def understand_cli(words: list[str]) -> None:
    args = cli._parse(words)
    if words[0] == "train":
        load_config(args.config, args.overrides)


def understand_launch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args([word.replace("$RANK", "0") for word in words if word != "launch"])
    if not args.module:
        assert args.training_script.startswith("eval/")
        options = [word for word in args.training_script_args if word not in ("--config", "grid.yaml")]
        understand_program([args.training_script, *(options or ["--data", "FOLDER"])], monkeypatch)
        return
    assert args.training_script == "ebt_vision.cli"
    understand_cli(args.training_script_args)


def understand_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target, *variables = words
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for variable in variables:
        if variable.startswith("PYTHON="):
            continue
        assert variable.startswith("ARGS=")
        understand_program(["apps/denoise.py", *shlex.split(variable.removeprefix("ARGS="))], monkeypatch)


def understand_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, *options = words
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    # Options that the page leaves to the reader ("...") are those of the same program's first command on it.
    options = options[:-1] + ["--data", "FOLDER", "--output", "results"] if options[-1:] == ["..."] else options
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
    Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray(np.pad(np.full((6, 9), 255, np.uint8), ((9, 25), (12, 35)))).save(tmp_path / "mask.png")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    shutil.copy(tmp_path / "small.png", tmp_path / "photos")
    shutil.copy(tmp_path / "photo.jpg", tmp_path / "photos" / "more")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", RUN)
def test_every_command_that_needs_no_data_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    program, *words = shlex.split(command)
    assert program == "ebt-vision", f"{command} is neither run here nor listed as one that cannot be"
    assert cli.main(words) == 0, capsys.readouterr().err
    if words[0] == "denoise":
        stems = ["photo", "small"] if words[1] == "photos" else [Path(words[1]).stem]
        assert sorted(path.stem for path in (folder / "out").rglob("*.*")) == stems
    else:
        assert capsys.readouterr().out.strip()


def test_the_readme_s_program_runs():
    (program,) = code_blocks(ROOT / "README.md", "python")
    names: dict = {"noisy": torch.rand(1, 3, 37, 31, generator=torch.Generator().manual_seed(0))}
    exec(compile(program, "README.md", "exec"), names)
    assert names["result"].image.shape == (1, 3, 37, 31) and names["result"].energies.shape[1:] == (1,)


def test_the_restore_page_s_program_runs():
    (program,) = code_blocks(DOCS / "how-to" / "restore.md", "python")
    image = torch.rand(1, 3, 37, 31, generator=torch.Generator().manual_seed(0))
    names: dict = {"image": image, "known": image[0, 0] < 0.5}
    exec(compile(program, "restore.md", "exec"), names)
    assert names["result"].image.shape == (1, 3, 37, 31)


def test_the_cluster_s_shards_are_made_as_the_page_says(tmp_path: Path):
    """Run the recipe on two classes of small images; training then reads the shards with the pattern of the page."""
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
    parser = denoising.denoising_parser()
    settings = parser.parse(["--config", str(tmp_path / "benchmark.yaml")])
    given = yaml.safe_load(text)
    assert config_to_arguments(tmp_path / "benchmark.yaml", parser)
    assert settings.models == given["models"] and settings.seeds == given["seeds"] and settings.data == given["data"]
    assert denoising.groups_of(settings.group) == given["group"]
    assert sys.modules["denoising"] is denoising


def test_a_peer_of_one_s_own_is_a_denoiser(capsys: pytest.CaptureFixture[str]):
    for program in code_blocks(DOCS / "how-to" / "benchmark.md", "python"):
        exec(compile(program, "benchmark.md", "exec"), {})
    noisy, denoised = (float(value) for value in re.findall(r"([\d.]+) dB", capsys.readouterr().out))
    assert noisy == pytest.approx(20.17, abs=0.2) and denoised == pytest.approx(noisy + 9.5, abs=0.5)  # 10 log10(9) = 9.54


def test_data_is_laid_out_as_the_page_says(folder: Path):
    """The validation images of Tiny ImageNet get class folders, and ImageNet becomes small photographs."""
    classes, photographs = code_blocks(DOCS / "how-to" / "data.md", "python")
    source = folder / "data" / "tiny-imagenet-200" / "val"
    (source / "images").mkdir(parents=True)
    shutil.copy(folder / "photo.jpg", source / "images" / "val_0.JPEG")
    (source / "val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\t32\t44\t62\n")
    exec(compile(classes, "data.md", "exec"), {})
    images = load_image_set(DataConfig(path=str(folder / "data" / "tiny-imagenet-200" / "validation"), img_size=32))
    assert images.class_names == ["n01443537"] and images.labels == [0]

    for number in range(10):
        made = folder / "data" / "imagenet" / "train" / f"n{number:08d}" / "x.JPEG"
        made.parent.mkdir(parents=True)
        shutil.copy(folder / "photo.jpg", made)
    exec(compile(photographs, "data.md", "exec"), {})
    found = sorted((folder / "data" / "imagenet-photos").rglob("*.png"))
    assert [path.parent.name for path in found] == ["train"] * 9 + ["validation"]
    with Image.open(found[0]) as image:
        assert image.size == (224, 160)


def test_an_exported_program_runs_without_the_package(folder: Path):
    assert cli.main(["export", "photographs_ebt", "--output", "photographs.pt2"]) == 0
    program, with_onnxruntime = code_blocks(DOCS / "how-to" / "export.md", "python")
    assert "ebt_vision" not in program + with_onnxruntime
    names: dict = {}
    exec(compile(program, "export.md", "exec"), names)
    assert names["clean"].shape == (1, 3, 64, 64) and 0 <= float(names["clean"].min()) <= float(names["clean"].max()) <= 1
    pytest.importorskip("onnxruntime")
    assert cli.main(["export", "photographs_ebt", "--output", "photographs.onnx"]) == 0
    exec(compile(with_onnxruntime, "export.md", "exec"), names)
    assert Image.open("denoised.png").size == Image.open("photo.jpg").size


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_outside_the_site_lead_somewhere(page: Path):
    """The strict build of the site checks its own links."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_no_line_needs_a_wide_screen():
    """Code of at most 100 characters, tables of at most eight columns, nine in the results' appendix."""
    for page in PAGES:
        text = page.read_text()
        code = [line[4:] for line in text.splitlines() if line.startswith("    ") and not line.lstrip().startswith("- ")]
        code += [
            line for language in ("python", "yaml") for block in code_blocks(page, language) for line in block.splitlines()
        ]
        assert not (long := [line for line in code if len(line) > 100]), f"{page.name}: {long[0]}"
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert not (wide := [row for row in rows if row.replace("\\|", "").count("|") > 9]), f"{page.name}: {wide[0][:60]}"
    for page in (DOCS / "results").glob("*.md"):
        assert all(row.count("|") <= 10 for row in page.read_text().splitlines() if row.startswith("|")), page.name


def test_pictures_of_pages_are_small():
    assert all(path.stat().st_size < 400_000 for path in DOCS.glob("*.png"))
