"""The package as people install it: a wheel brings the checkpoints and the command, and the version is one."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import ebt_vision

ROOT = Path(__file__).parents[1]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ebt_vision.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {ebt_vision.__version__}" in changes or "## Unreleased" in changes


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_denoises(tmp_path: Path):
    """The packages that it depends on are borrowed from this environment, so nothing is downloaded."""
    source = tmp_path / "source"  # a build leaves files beside its sources
    shutil.copytree(ROOT / "ebt_vision", source / "ebt_vision", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*build, source], check=True, timeout=240)
    (wheel,) = tmp_path.glob("ebt_vision-*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    packages = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})["purelib"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages, wheel]
    subprocess.run(install, check=True, timeout=120)
    Path(packages, "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    python = environment / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import ebt_vision; print(ebt_vision.__file__)"], capture_output=True, text=True, cwd="/"
    )
    assert where.stdout.startswith(str(environment)), where
    command = [python, "-m", "ebt_vision", "denoise", tmp_path / "photo.png", "--output", tmp_path / "out", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "out" / "photo.png").size == (32, 24)
