"""Docstrings of public functions give the shapes of their arrays; checked on the syntax tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ebt_vision"
ARRAY = re.compile(r"\b(Tensor|ndarray)\b")
NOT_ONE_ARRAY = re.compile(r"\b(Callable|dict)\[")  # a function, or tensors by name: weights, a loss and what to log
# (B, C, H, W), (n, 3), (len(x), ...), (count, head_dim // 2), (1, 3, H, W), () and the like; not N(0, 1) or (0..1).
_SIZE = r"(?:min\(\w+, \w+\)|[A-Za-z]\w*(?:\(\w+\))?(?: [*+/]+ \w+)?|\d+|\*\w+|\.\.\.)"
SHAPE = re.compile(
    rf"(?<![A-Za-z])\((?=[^)]*[A-Za-z.]){_SIZE},(?: {_SIZE},?)*\)|\(\d+,\)|\(\)|NCHW|NLC|\b[Aa]ny shape|\b[Ss]ame shape"
)


def takes_or_gives_arrays(function: ast.FunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    types = [ast.unparse(node) for node in (*(a.annotation for a in arguments), function.returns) if node]
    return any(ARRAY.search(text) and not NOT_ONE_ARRAY.search(text) for text in types)


def undocumented(source: str) -> Iterator[str]:
    """Yield the names of public functions that take or return arrays and document no shape.

    A shape may be in the docstring, in a comment of the signature, or in the docstring of the class. An override without a
    docstring uses that of its base; `forward` and `__call__` use that of their class.
    """
    lines = source.splitlines()

    def visit(body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, node)
            called = isinstance(node, ast.FunctionDef) and node.name in ("forward", "__call__")
            if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and not called):
                continue
            text = ast.get_docstring(node)
            if not takes_or_gives_arrays(node) or (text is None and owner is not None and not called):
                continue
            signature = lines[node.lineno - 1 : node.body[0].lineno - 1]
            said = [
                text or "",
                ast.get_docstring(owner) or "" if owner else "",
                *(line.partition("#")[2] for line in signature),
            ]
            if not any(SHAPE.search(part) for part in said):
                yield f"{owner.name}.{node.name}" if owner else node.name

    yield from visit(ast.parse(source).body, None)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_functions_say_the_shapes_of_their_arrays(path: Path):
    assert not (names := list(undocumented(path.read_text()))), f"no shape, such as (B, C, H, W), in {', '.join(names)}"


def test_the_check_finds_what_says_nothing():
    source = '''
def bare(x: Tensor) -> Tensor:
    """Twice x."""
def shaped(x: Tensor) -> Tensor:
    """Twice x (B, 3, H, W)."""
def numbers(x: float) -> float:
    """Twice x."""
class Net:
    """A network."""
    def forward(self, x: Tensor) -> Tensor:
        return x
'''
    assert list(undocumented(source)) == ["bare", "Net.forward"]
