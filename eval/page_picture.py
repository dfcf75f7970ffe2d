"""The pictures of the page for the documentation: repair.png, app.png and app_phone.png.

    python eval/page_picture.py --output docs

The program starts the page and opens it in chromium. It denoises an example with Gaussian noise of 50, and repairs another
after painting over a part of it. It needs playwright and chromium (apt install chromium).
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page_visitor import PROGRAM, served
from PIL import Image

from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.core.arguments import named_path

EXAMPLES = PROGRAM.parent / "examples"
STROKES = [[(0.285, 0.28), (0.285, 0.97)], [(0.7, 0.28), (0.7, 0.97)]]
"""What is painted over in rocket.png: lines through points, as shares of width and height."""
MAX_WIDTH = 900
WITHOUT_SECONDS = """document.querySelectorAll("#facts p, #repair-facts p").forEach(
    line => line.innerHTML = line.innerHTML.replace(/ · [\\d.]+ s\\b/, "")
)"""
"""Remove the seconds of the result, which depend on the machine."""
TIMEOUT = 900
"""Longest wait in seconds."""


def run(settings: argparse.Namespace) -> None:
    """Write the three pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise ValueError("no chromium was found; install one: apt install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ValueError("playwright is not installed; run: pip install playwright") from None
    settings.output.mkdir(parents=True, exist_ok=True)
    options = ["--device=cpu", *(["--checkpoint", settings.checkpoint] if settings.checkpoint else [])]
    with served(options, timeout=TIMEOUT) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, act, width in (("repair", repair, 1280), ("app", denoise, 1280), ("app_phone", denoise, 390)):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(1000 * TIMEOUT)
            page.goto(server.address)
            act(page)
            page.evaluate(WITHOUT_SECONDS)
            page.wait_for_timeout(1500)  # images fade in
            path = settings.output / f"{name}.png"
            page.screenshot(path=path, full_page=True)
            page.close()
            _reduce(path)
            print(path)
        browser.close()


def denoise(page: Any) -> None:
    """Add noise to the first example and denoise it."""
    page.locator("#estimate", has_text="of 255").wait_for()
    page.fill("#amount-gaussian input[type=number]", "50")
    page.keyboard.press("Tab")
    page.click("#denoise")
    page.locator("#film img").first.wait_for()


def repair(page: Any) -> None:
    """Paint over two masts of an example and repair it."""
    page.get_by_role("tab", name="Repair", exact=True).click()
    page.set_input_files("#repair-photo input[type=file]", EXAMPLES / "rocket.png")
    page.locator("#paint", has_text="%").wait_for()
    page.wait_for_timeout(1500)  # the canvas takes its size
    canvas = page.locator("#paint canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    zoom = int(re.findall(r"(\d+)%", page.inner_text("#paint"))[0]) / 100
    with Image.open(EXAMPLES / "rocket.png") as photo:
        width, height = (zoom * side for side in photo.size)  # it lies in the middle of the canvas
    left, top = box["x"] + (box["width"] - width) / 2, box["y"] + (box["height"] - height) / 2
    for (x, y), *others in STROKES:
        page.mouse.move(left + x * width, top + y * height)
        page.mouse.down()
        for x, y in others:
            page.mouse.move(left + x * width, top + y * height, steps=4)
        page.mouse.up()
    page.wait_for_timeout(1500)  # the editor sends the painting
    page.click("#repair")
    page.locator("#repair-film img").first.wait_for()
    page.evaluate("window.scrollTo(0, 0)")


def _reduce(path: Path) -> None:
    """Reduce a picture to MAX_WIDTH and to 256 colours, which need a fifth of the bytes."""
    with Image.open(path) as shown:
        small = shown.convert("RGB")
    small.thumbnail((MAX_WIDTH, small.height), Image.Resampling.LANCZOS)
    small = small.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(path, optimize=True)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="page_picture", description="Take the pictures of the page.")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a model instead of the shipped one")
    parser.add_argument("--output", type=named_path, required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input or a page that failed, 130 interrupted."""
    return run_program(_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
