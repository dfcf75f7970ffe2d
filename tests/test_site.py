"""The documentation site: errors of its strict build, and that it contains every page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason='the documentation needs pip install "ebt_vision[docs]"')

ROOT = Path(__file__).parents[1]


def build(folder: Path, **pages: str) -> subprocess.CompletedProcess:
    """Build a small site with this project's settings and these pages, as `make check` builds the whole one."""
    docs = folder / "docs"
    docs.mkdir()
    (docs / "style.css").touch()
    for name, text in pages.items():
        (docs / f"{name}.md").write_text(text)
    nav = "".join(f"  - {name}.md\n" for name in pages if name != "forgotten")
    settings = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nsite_dir: site\nnav:\n{nav}"
    (folder / "mkdocs.yml").write_text(settings)
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_links_and_references_that_exist_are_built(tmp_path: Path):
    done = build(tmp_path, index="# A\n\n[b](b.md#b)\n", b="# B\n\n::: ebt_vision.core.rng.make_generator\n")
    assert done.returncode == 0, done.stderr
    assert "make_generator" in (tmp_path / "site" / "b.html").read_text()


@pytest.mark.parametrize(
    ("pages", "named"),
    [
        ({"index": "# A\n\n[gone](gone.md)\n"}, "gone.md"),
        ({"index": "# A\n\n[b](b.md#gone)\n", "b": "# B\n"}, "#gone"),
        ({"index": "# A\n\n![picture](gone.png)\n"}, "gone.png"),
        ({"index": "# A\n\n::: ebt_vision.core.rng.gone\n"}, "ebt_vision.core.rng.gone"),
        ({"index": "# A\n", "forgotten": "# F\n"}, "forgotten.md"),
    ],
    ids=["page", "heading", "picture", "reference", "navigation"],
)
def test_what_is_missing_fails_the_build(pages: dict[str, str], named: str, tmp_path: Path):
    done = build(tmp_path, **pages)
    assert done.returncode == 1 and named in done.stderr + done.stdout


def test_make_check_builds_strictly():
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text()
