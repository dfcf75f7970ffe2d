"""A release: the same version number everywhere, its citation, and a wheel that works alone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import ebt_vision

ROOT = Path(__file__).parents[1]


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["version"] == ebt_vision.__version__
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2507.02092" and len(paper["authors"]) == 10


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1] == ebt_vision.__version__


def test_only_tested_python_versions_are_declared():
    """CONTRIBUTING.md lists the versions with which all of `make test` has passed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [word.rsplit(" ", 1)[1] for word in project["classifiers"] if re.search(r":: 3\.\d+$", word)]
    (tested,) = re.findall(r"Tested versions: ([\d., and]+)\.\n", (ROOT / "CONTRIBUTING.md").read_text())
    assert declared == re.findall(r"3\.\d+", tested)
    assert project["requires-python"] == f">={declared[0]}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_denoises_in_a_fresh_environment(tmp_path: Path):
    """Built and installed without the network; torch and the rest are those of the running environment."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ebt_vision", source / "ebt_vision", ignore=shutil.ignore_patterns("__pycache__"))
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run(sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"ebt_vision-{ebt_vision.__version__}-")

    # A .pth file lends the dependencies. An editable ebt_vision among them is not: .pth files of lent folders are not read.
    _run(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    _run(python, *pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    where = _run(python, "-c", "import ebt_vision; print(ebt_vision.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)

    pixels = np.random.default_rng(0).integers(0, 255, (24, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    _run(python.with_name("ebt-vision"), "denoise", "photo.png", "--steps", "1", "--output", "out", cwd=tmp_path)
    with Image.open(tmp_path / "out" / "photo.png") as image:
        assert image.size == (31, 24)
        assert not np.array_equal(np.asarray(image), pixels)


def _run(*words: object, cwd: Path | None = None) -> str:
    """The output of a program that succeeds; it does not see this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
