"""Imports point down only and have no cycles, as in docs/architecture.md; checked on the syntax tree with lazy imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Packages of ebt_vision, bottom up: a package knows those of the lines above its own, and itself.
LAYERS = [
    {"core"},
    {"noise"},
    {"models", "data"},
    {"objectives", "denoising", "text", "probing"},
    {"interop", "restoration"},
    {"training"},
    {"benchmark"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# What the core may use beside torch, numpy and the standard library: kept metric libraries, YAML, safetensors' files, locks.
CORE_PACKAGES = {"torch", "numpy", "kornia", "lpips", "torchmetrics", "torchvision", "safetensors", "yaml"}
CORE_PACKAGES |= {"filelock", "ebt_vision"}


def library_files() -> list[Path]:
    return sorted((ROOT / "ebt_vision").rglob("*.py"))


def program_files() -> list[Path]:
    return sorted([*(ROOT / "apps").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), ROOT / "ebt_vision" / "cli.py"])


def package_of(path: Path) -> str:
    """The package of ebt_vision that a file is in, or its own name where it is in none."""
    return path.relative_to(ROOT / "ebt_vision").parts[0].removesuffix(".py")


def level_of(path: Path) -> int:
    found = [level for level, packages in enumerate(LAYERS) if package_of(path) in packages]
    assert found, f"{path.name} is in no layer: add its package to docs/architecture.md and to this test"
    return found[0]


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


def library_imports(path: Path) -> set[Path]:
    """The files of ebt_vision that a file imports anywhere in it, without packages' own __init__.py."""
    targets = {module_file(name) for name in imported_modules(path) if name.split(".")[0] == "ebt_vision"}
    return {target for target in targets if target and target != path and target.name != "__init__.py"}


MODULES = [path for path in library_files() if path != ROOT / "ebt_vision" / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    for target in library_imports(path):
        below = level_of(target) < level_of(path) or package_of(target) == package_of(path)
        assert below, f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}"


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules in import cycles, sorted."""
    reached = {name: set(targets) for name, targets in imports.items()}
    for middle in reached:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return sorted(name for name, targets in reached.items() if name in targets)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    names = {path: path.relative_to(ROOT).as_posix() for path in MODULES}
    assert circles({names[path]: {names[target] for target in library_imports(path)} for path in MODULES}) == []


@pytest.mark.parametrize("path", [p for p in MODULES if level_of(p) == 0], ids=lambda path: path.name)
def test_the_core_knows_torch_alone(path: Path) -> None:
    import sys

    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert packages <= CORE_PACKAGES | sys.stdlib_module_names


def test_only_diffusion_models_import_diffusers() -> None:
    users = [path for path in library_files() if any(n.split(".")[0] == "diffusers" for n in imported_modules(path))]
    assert {path.name for path in users} <= {"dit.py", "patch_diffusion.py"}


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
