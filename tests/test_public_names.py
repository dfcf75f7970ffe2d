"""`import ebt_vision` provides the public names without importing torch and diffusers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ebt_vision

SOURCE = Path(ebt_vision.__file__).read_text()


@pytest.mark.parametrize("name", sorted(set(ebt_vision.__all__) - {"__version__"}))
def test_each_public_name_is_that_of_its_module(name: str) -> None:
    module = importlib.import_module(f"ebt_vision.{ebt_vision._MODULE_OF[name]}")
    assert getattr(ebt_vision, name) is getattr(module, name)


def test_type_checkers_and_programs_see_the_same_names() -> None:
    block = next(node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {name: f"ebt_vision.{module}" for name, module in ebt_vision._MODULE_OF.items()}
    assert set(ebt_vision.__all__) == {*seen, "__version__"} and set(ebt_vision.__all__) <= set(dir(ebt_vision))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ebt_vision.nothing  # noqa: B018


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import ebt_vision", ("torch", "numpy", "diffusers", "gradio")),
        ("import ebt_vision.training.config", ("diffusers", "gradio", "timm", "sklearn")),
        ("from ebt_vision import load_denoiser", ("diffusers", "gradio", "datasets")),
    ],
)
def test_an_import_does_not_load_what_it_does_not_need(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"
