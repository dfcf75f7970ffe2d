"""The Gradio page: what it computes, and the real page in a real browser."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser
from PIL import Image

from apps import denoise as app
from ebt_vision.denoiser import Denoiser, IdentityDenoiser, load_denoiser

ROOT = Path(__file__).parent.parent
EXAMPLE = str(ROOT / "apps" / "examples" / "coffee.png")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Denoiser:
    return load_denoiser(str(tiny_checkpoint))


# --- What it computes


@pytest.mark.parametrize("noise", [app.GAUSSIAN, app.PAPER])
def test_an_answer_has_a_point_for_every_step(tiny: Denoiser, noise: str) -> None:
    result = app.answer(app.Request(path=EXAMPLE, noise=noise, num_steps=3), tiny)
    assert len(result.energies) == len(result.psnrs) == 4
    assert result.before.shape == result.after.shape == (171, 256, 3) and result.before.dtype == np.uint8
    assert app.curves(result).count("<circle") == 8


def test_without_added_noise_there_is_no_psnr(tiny: Denoiser) -> None:
    result = app.answer(app.Request(path=EXAMPLE, noise=app.NO_NOISE, num_steps=2), tiny)
    assert result.psnrs == [] and "PSNR" not in app.facts(result) + app.curves(result)
    assert (result.before == np.asarray(Image.open(EXAMPLE))).all()


def test_a_model_without_an_energy_has_no_energy_curve() -> None:
    result = app.answer(app.Request(path=EXAMPLE, noise=app.GAUSSIAN, sigma=25), IdentityDenoiser())
    assert result.energies == [] and "curve-energy" not in app.curves(result)
    assert result.psnrs[0] == pytest.approx(result.psnrs[-1]) == pytest.approx(20.7, abs=0.5)


def test_the_seed_decides_the_noise() -> None:
    clean = torch.full((1, 3, 16, 16), 0.5)
    first, again, other = (app.add_noise(clean, app.Request(path="", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_large_image_is_shrunk_and_says_so(tmp_path: Path) -> None:
    Image.new("RGB", (app.MAX_SIDE * 2, 300), "grey").save(tmp_path / "wide.png")
    result = app.answer(app.Request(path=str(tmp_path / "wide.png"), noise=app.NO_NOISE), IdentityDenoiser())
    assert result.after.shape == (150, app.MAX_SIDE, 3) and f"to {app.MAX_SIDE}×150" in app.facts(result)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [-1e-9, 1e-9], [3e5, -2e5, 1.0]])
def test_a_curve_stays_in_its_frame(values: list[float]) -> None:
    svg = app.curve(values, "Energy", "unit", "name")
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([-\d.]+)"', svg)]
    assert len(heights) == len(values) and all(0 <= y <= 160 for y in heights)


def test_errors_do_not_name_the_servers_folders(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    assert app.friendly(ValueError(f"{path} is empty"), str(path)) == "photo.png is empty"


def test_a_wrong_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--checkpoint", "no/such/folder"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "no/such/folder" in err[0]


# --- The page


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running page with the tiny model, started as a user starts it."""
    port = free_port()
    log = tmp_path_factory.mktemp("app") / "log.txt"
    command = [sys.executable, "apps/denoise.py", "--port", str(port), "--checkpoint", str(tiny_checkpoint)]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, f"the page did not start:\n{log.read_text()}"
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a fresh machine it installs the browser
@pytest.mark.parametrize(("width", "height"), [(1366, 900), (390, 844)], ids=["laptop", "phone"])
def test_denoise_in_a_browser(address: str, tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "mine.png").write_bytes(Path(EXAMPLE).read_bytes())
    (tmp_path / "text.png").write_text("not an image")
    outside: list[str] = []
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or outside.append(r.url))
        page.goto(address)

        # Denoise an upload in the default four steps.
        upload(page, tmp_path / "mine.png")
        page.click("#denoise")
        page.wait_for_selector("#chart .curve-energy circle", timeout=60_000)
        assert page.locator("#chart .curve-energy circle").count() == 5
        assert page.locator("#chart .curve-psnr circle").count() == 5
        page.wait_for_function("[...document.querySelectorAll('#result img')].filter(i => i.naturalWidth == 256).length == 2")
        assert "dB" in page.inner_text("#facts")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        # More steps, more points.
        page.fill("#steps input[type=number]", "7")
        page.keyboard.press("Tab")
        page.click("#denoise")
        page.wait_for_function("document.querySelectorAll('#chart .curve-energy circle').length == 8", timeout=60_000)

        # A file that is no image: a sentence, and the page goes on.
        upload(page, tmp_path / "text.png")
        page.click("#denoise")
        page.wait_for_selector("text=text.png is not", timeout=60_000)
    assert outside == [], "the page must work without the network"


def upload(page, path: Path) -> None:
    """Put a file into the image box, in the place of the one there."""
    if page.locator("#upload button[aria-label='Remove Image']").count():
        page.click("#upload button[aria-label='Remove Image']")
    page.set_input_files("#upload input[type=file]", path)
    page.wait_for_selector("#upload img")
