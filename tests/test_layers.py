"""Imports point down only, as docs/architecture.md says; checked on the syntax tree, so lazy imports count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The level of a file of ebt_vision/ by the longest matching prefix of its path.
LEVELS = {
    "__init__.py": 0,
    "checks.py": 0,
    "terminal.py": 0,
    "rng.py": 0,
    "precision.py": 0,
    "models/blockwise_attention.py": 0,
    "thinking.py": 1,
    "energy_order.py": 1,
    "corruption.py": 1,
    "metrics.py": 1,
    "models/blocks.py": 1,
    "realistic_noise.py": 2,
    "models/": 2,
    "checkpoint.py": 3,
    "provenance.py": 3,
    "whole_files.py": 3,
    "yaml_files.py": 3,
    "objectives.py": 3,
    "text_objectives.py": 3,
    "generation.py": 3,
    "features.py": 3,
    "feature_cache.py": 3,
    "denoiser.py": 3,
    "model_denoisers.py": 3,
    "tiling.py": 3,
    "noise.py": 3,
    "classical.py": 3,
    "image_files.py": 3,
    "export.py": 3,
    "data/": 3,
    "training/": 4,
    "benchmark/": 4,
    "probing/": 4,
    "config.py": 4,
    "commands/": 5,
    "cli.py": 6,
    "__main__.py": 7,
}
# Files of one level may import each other there, and nowhere else.
SOCIABLE = {2, 3, 4, 5}
# Level 0 and 1 know torch, numpy and the standard library; metrics may use a kept metric library, with torchvision's networks
# and safetensors' files for its backbone, and corruption Pillow's JPEG.
BOTTOM_PACKAGES = {"torch", "numpy", "kornia", "lpips", "torchmetrics", "torchvision", "safetensors", "PIL", "ebt_vision"}


def library_files() -> list[Path]:
    return sorted((ROOT / "ebt_vision").rglob("*.py"))


def program_files() -> list[Path]:
    return sorted([*(ROOT / "apps").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), ROOT / "ebt_vision" / "cli.py"])


def level_of(path: Path) -> int:
    name = path.relative_to(ROOT / "ebt_vision").as_posix()
    if name.endswith("/__init__.py"):
        return 0
    found = [prefix for prefix in LEVELS if name == prefix or (prefix.endswith("/") and name.startswith(prefix))]
    assert found, f"{name} is in no level: add it to docs/architecture.md and to this test"
    return LEVELS[max(found, key=len)]


def imported_modules(path: Path) -> set[str]:
    """Every dotted name that the file imports anywhere; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}; write the full name"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_file(name: str) -> Path | None:
    """The file of a module of ebt_vision, None for a name that is no module."""
    path = ROOT / Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@pytest.mark.parametrize("path", library_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    mine = level_of(path)
    for name in imported_modules(path):
        target = module_file(name) if name.split(".")[0] == "ebt_vision" else None
        if target is None or target == path or target.name == "__init__.py":
            continue
        theirs = level_of(target)
        assert theirs < mine or (theirs == mine and mine in SOCIABLE), (
            f"{path.name} (level {mine}) imports {name} (level {theirs})"
        )


@pytest.mark.parametrize("path", [p for p in library_files() if level_of(p) <= 1], ids=lambda path: path.name)
def test_the_bottom_knows_torch_alone(path: Path) -> None:
    import sys

    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert packages <= BOTTOM_PACKAGES | sys.stdlib_module_names


def test_only_dit_imports_diffusers() -> None:
    users = [path for path in library_files() if any(n.split(".")[0] == "diffusers" for n in imported_modules(path))]
    assert {path.name for path in users} <= {"dit.py"}


@pytest.mark.parametrize("path", program_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_programs_do_not_import_each_other(path: Path) -> None:
    package = path.parent.name
    for name in imported_modules(path):
        if path.name != "cli.py":
            assert not name.startswith(("ebt_vision.cli", "ebt_vision.commands")), f"{path.name} imports the command line"
        first = name.split(".")[0]
        assert first not in {"apps", "eval"} or (first == package and package == "apps"), f"{path.name} imports {name}"


def test_no_star_imports() -> None:
    for path in [*library_files(), *program_files(), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno}"
