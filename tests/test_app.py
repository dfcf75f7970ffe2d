"""The Gradio page in a real browser, and its endpoints through gradio_client."""

import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from browser import browser, unnamed
from PIL import Image, features

from apps import denoise as app
from apps import recipes, service
from ebt_vision import cli
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.named import NOISE_KINDS

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "apps" / "examples" / "coffee.png"
LONG = 180_000
"""Timeout in milliseconds, long because the machine may be busy."""


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small photograph, 96 x 64."""
    path = tmp_path_factory.mktemp("photos") / "mine.png"
    Image.open(EXAMPLE).resize((96, 64)).save(path)
    return path


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running page with a tiny EBT, slow enough to be stopped, a tiny DiT and a tiny regressor."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    DiT(DiTConfig(**sizes)).save_pretrained(folder / "tiny-dit")
    PatchRegressor(PatchRegressorConfig(**sizes)).save_pretrained(folder / "tiny-regressor")

    def load(name: str) -> Denoiser:
        denoiser = load_denoiser(name)
        if isinstance(denoiser, EBTDenoiser):
            denoiser.model.register_forward_pre_hook(lambda *_: time.sleep(0.25))
        return denoiser

    models = {"tiny-ebt": str(tiny_checkpoint)} | {name: str(folder / name) for name in ("tiny-dit", "tiny-regressor")}
    with served(app.build_page(models, functools.lru_cache(load))) as address:
        yield address


@contextmanager
def served(page: gr.Blocks) -> Iterator[str]:
    """Return the address of a running page."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    page.launch(server_port=port, prevent_thread_lock=True, quiet=True, **app.launch_options())
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close(verbose=False)


def by_command(photo: Path, checkpoint: Path, output: Path, *options: str) -> np.ndarray:
    command = ["denoise", photo, "--model", checkpoint, "--output", output, *options]
    assert cli.main([str(word) for word in command]) == 0
    return np.asarray(Image.open(output / photo.name))


# --- Requests


def controls(**changed) -> list:
    """The values of the page's controls, in their order."""
    values = dict(how=service.ADD, kind="gaussian") | {name: known.default for name, known in NOISE_KINDS.items()}
    values |= dict(
        seed=3,
        steps=4,
        model="m",
        scale=1,
        tolerance=0,
        of="first",
        langevin=0,
        candidates=1,
        tile=service.OWN_TILES,
        strength=1,
        copies=1,
    )
    return list((values | changed).values())


def test_controls_become_a_request() -> None:
    request, label = service.read_controls("a.png", controls(tile="64", tolerance=0.2, of="previous"))
    assert (label, str(request.noise), request.seed, request.tile_size) == ("m", "gaussian:25", 3, 64)
    assert (request.options().tolerance, request.options().tolerance_of) == (0.2, "previous")
    assert service.read_controls("a.png", controls(how=service.NOISY_ALREADY))[0].noise is None
    assert service.read_controls("a.png", controls(strength=0.35))[0].options().strength == 0.35
    assert service.read_controls("a.png", controls(copies=8))[0].options().self_ensemble == 8


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 33},
        {"candidates": 9},
        {"seed": -1},
        {"gaussian": 999},
        {"scale": 0},
        {"tile": "4"},
        {"steps": None},
        {"of": "none"},
        {"strength": 1.6},
        {"copies": 3},
        {"copies": 2, "candidates": 2},
        {"steps": 2.7},
        {"candidates": 1.5},
        {"seed": 0.5},
        {"tile": "64.5"},
    ],
)
def test_what_is_out_of_range_is_refused(changed: dict) -> None:
    with pytest.raises(gr.Error):
        service.read_controls("a.png", controls(**changed))


def test_the_endpoints_take_whole_numbers_that_are_floats_and_no_others() -> None:
    """A client's numbers may be floats."""
    request, _ = service.api_request("a.png", "gaussian", 25, 3.0, 2.0, "m", 1, 0, 0, 1.0, 64.0)
    assert (request.seed, request.num_steps, request.num_candidates, request.tile_size) == (3, 2, 1, 64)
    with pytest.raises(gr.Error, match="steps=2.7 is not a whole number; use 1..32"):
        service.api_request("a.png", "gaussian", 25, 3, 2.7, "m", 1, 0, 0, 1, 0)
    with pytest.raises(gr.Error, match="has no effect without a tolerance"):
        service.api_request("a.png", "gaussian", 25, 3, 2, "m", 1, 0, 0, 1, 0, "previous")


def test_the_documented_example_has_the_steps_that_the_model_suggests() -> None:
    assert "steps=" not in app.API_HELP and "`steps`" in app.API_HELP
    assert app.launch_options()["show_error"]  # without it a client is told {"error": null}


def test_controls_that_a_method_has_no_use_for_are_not_in_its_command() -> None:
    request, _ = service.read_controls("a.png", controls(candidates=3, tolerance=0.1, of="previous", scale=2, langevin=0.1))
    assert request.without_unused(EBTDenoiser.options_used) == request
    words = recipes.command(request.without_unused(DiTDenoiser.options_used), "m", "cpu").split()
    assert "--steps" in words and not {"--candidates", "--tolerance", "--step-size-scale", "--langevin"} & set(words)
    assert service.read_controls("a.png", controls(of="previous"))[0].options().tolerance is None
    proposing = EBTDenoiser(PatchEBT(PatchEBTConfig(img_size=16, embed_dim=48, depth=1, suggested_start="proposal")))
    for steps, expected in ((1, 0.0), (2, 0.1)):  # a proposal alone has no Langevin noise
        asked = replace(request, num_steps=steps, num_candidates=1)
        assert asked.without_unused(proposing.options_in_effect(steps)).langevin_std == expected


def test_errors_do_not_name_the_servers_folders(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    assert service.friendly(ValueError(f"{path} is empty"), str(path)) == "photo.png is empty"


def test_a_picture_that_comes_again_is_not_written_again(tmp_path: Path) -> None:
    before, after = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    first = service.pair(before, after, tmp_path)
    written = [Path(path).stat().st_mtime_ns for path in first]
    assert service.pair(before, after, tmp_path) == first and first[0] != first[1]
    assert [Path(path).stat().st_mtime_ns for path in first] == written
    assert (np.asarray(Image.open(first[1])) == after).all()


# --- Endpoints


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heic", "avif"])
def test_photographs_of_phones_in_a_browser(address: str, photo: Path, tmp_path: Path, kind: str) -> None:
    """The page denoises a HEIC or AVIF and shows the result, also in a browser without HEIC. The endpoint has the same
    pixels."""
    from gradio_client import Client, handle_file

    if kind == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    path = tmp_path / f"IMG_0001.{kind}"
    Image.open(photo).convert("RGB").save(path, format="HEIF" if kind == "heic" else "AVIF", quality=90)
    with browser() as chromium:
        page = chromium.new_page(accept_downloads=True)
        page.set_default_timeout(LONG)
        page.goto(address)
        upload(page, path)
        wait_for_noise(page, service.NOISY_ALREADY)
        if kind == "heic":
            page.wait_for_function("document.querySelector('#estimate').innerText.includes('cannot show a HEIC')")
        page.click("#denoise")
        page.wait_for_function("[...document.querySelectorAll('#result img')].filter(i => i.naturalWidth == 96).length == 2")
        tab(page, "Download")
        with page.expect_download() as loading:
            page.click("#download")
        assert loading.value.suggested_filename == "IMG_0001-denoised.png"
        shown = np.asarray(Image.open(loading.value.path()))
    client = Client(address, verbose=False, download_files=str(tmp_path / "of-endpoint"))
    file, _ = client.predict(image=handle_file(str(path)), noise="none", api_name="/denoise")
    assert shown.shape == (64, 96, 3) and (np.asarray(Image.open(file)) == shown).all()


@pytest.mark.slow
def test_the_endpoints_give_the_pixels_of_the_command_line(
    address: str, photo: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, download_files=str(tmp_path))
    given = dict(image=handle_file(str(photo)), noise="gaussian", amount=25, seed=5, api_name="/denoise")
    file, told = client.predict(steps=3, **given)
    expected = by_command(photo, tiny_checkpoint, tmp_path / "out", "--add-noise", "25", "--seed", "5", "--steps", "3")
    assert (np.asarray(Image.open(file)) == expected).all() and len(told["energies"]) == 4
    file, _ = client.predict(steps=3, strength=0, **(given | {"noise": "none"}))
    assert (np.asarray(Image.open(file)) == np.asarray(Image.open(photo).convert("RGB"))).all()
    with pytest.raises(Exception, match="steps=99 is out of range"):
        client.predict(steps=99, **given)
    with pytest.raises(Exception, match="steps=2.7 is not a whole number"):
        client.predict(steps=2.7, **given)
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict(model="/etc", **given)
    for option, value in dict(candidates=2, langevin=0.1, step_size_scale=2, tolerance=0.5).items():
        with pytest.raises(Exception, match=f"{option} has no effect on .*; leave it out"):
            client.predict(model="tiny-dit", steps=3, **{option: value}, **given)
    # A file of the server, named instead of sent.
    with pytest.raises(Exception):  # noqa: B017 (gradio's own, of whatever kind)
        client.predict(**(given | {"image": {"path": str(ROOT / "README.md"), "meta": {"_type": "gradio.FileData"}}}))
    rows = client.predict(image=handle_file(str(photo)), noise="gaussian", amount=25, steps=2, api_name="/compare")
    assert (
        [row["name"] for row in rows] == ["Noisy", "EBT", "DiT", "Regressor", "BM3D"]
        and rows[1]["num_forward"] == 3
        and rows[1]["psnrs"]
    )


@dataclass
class Gated:
    """A page whose model waits until `gate` is set."""

    address: str
    gate: threading.Event


@pytest.fixture
def gated(tiny_checkpoint: Path) -> Iterator[Gated]:
    gate = threading.Event()

    def load(name: str) -> Denoiser:
        denoiser = load_denoiser(name)
        assert isinstance(denoiser, EBTDenoiser)
        denoiser.model.register_forward_pre_hook(lambda *_: gate.wait(600) and None)
        return denoiser

    with served(app.build_page({"tiny-ebt": str(tiny_checkpoint)}, functools.lru_cache(load))) as address:
        yield Gated(address, gate)
        gate.set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_visitors_are_served_and_the_next_is_told_to_wait(gated: Gated, photo: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(gated.address, verbose=False, download_files=str(tmp_path), max_workers=40)
    given = dict(image=handle_file(str(photo)), noise="gaussian", amount=25, steps=1, api_name="/denoise")
    jobs = [client.submit(**given)]
    wait_until(lambda: jobs[0].status().code.name == "PROCESSING")  # it holds the model, and is not in the queue any more
    jobs += [client.submit(**given) for _ in range(19)]
    wait_until(lambda: all(job.status().code.name in ("IN_QUEUE", "PROCESSING") for job in jobs))
    with pytest.raises(Exception, match="full"):
        client.predict(**given)
    with browser() as chromium:
        page = chromium.new_page()
        page.goto(gated.address)
        page.click("#denoise")
        page.wait_for_selector("text=currently busy", timeout=LONG)
    gated.gate.set()
    images = [np.asarray(Image.open(job.result()[0])) for job in jobs]
    assert len(images) == 20 and all((image == images[0]).all() for image in images)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stop_reaches_a_request_that_waits_in_the_queue(gated: Gated, photo: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(gated.address, verbose=False)
    first = client.submit(image=handle_file(str(photo)), noise="gaussian", amount=25, steps=1, api_name="/denoise")
    wait_until(lambda: first.status().code.name == "PROCESSING")
    with browser() as chromium:
        page = chromium.new_page()
        page.set_default_timeout(LONG)
        page.goto(gated.address)
        page.click("#denoise")
        page.wait_for_function("document.querySelector('#answer').innerText.includes('queue')")
        page.click("#stop")
        page.wait_for_timeout(500)
        gated.gate.set()
        page.wait_for_function("document.querySelector('#facts').innerText.includes('Stopped early')")
        assert page.locator("#film img").count() == 1, "only the start"


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Check every tenth of a second."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)


# --- The page


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a fresh machine it installs the browser
@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(1366, 900, "light"), (390, 844, "dark")], ids=["laptop", "phone-dark"]
)
def test_denoise_in_a_browser(
    address: str, photo: Path, tiny_checkpoint: Path, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    outside: list[str] = []
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True)
        page.set_default_timeout(LONG)
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or outside.append(r.url))
        page.goto(address)

        # An upload is treated as already noisy; an example gets noise.
        upload(page, photo)
        wait_for_noise(page, service.NOISY_ALREADY)
        page.wait_for_function("document.querySelector('#estimate').innerText.includes('finest wavelets')")
        page.locator("#examples .gallery-item").first.click()
        wait_for_noise(page, service.ADD)
        page.click("#upload button[aria-label='Remove Image']")
        page.wait_for_selector("#upload input[accept='image/*,.heic,.heif,.avif']", state="attached")
        upload(page, photo)
        wait_for_noise(page, service.NOISY_ALREADY)
        assert page.input_value("#strength input[type=number]") == "1" and "keeps grain" in page.inner_text("#strength")
        page.get_by_label(service.ADD).check()
        wait_for_noise(page, service.ADD)

        # Denoise an upload in the default four steps.
        page.click("#denoise")
        page.wait_for_function("document.querySelectorAll('#film img').length == 5")
        assert page.locator("#chart .curve-energy circle").count() == 5
        assert page.locator("#chart .curve-psnr circle").count() == 5
        page.wait_for_function("[...document.querySelectorAll('#result img')].filter(i => i.naturalWidth == 96).length == 2")
        assert all(".png" in source for source in page.eval_on_selector_all("#result img", "found => found.map(i => i.src)"))
        assert "dB" in page.inner_text("#facts")
        assert slide(page, -60) < 50 < slide(page, 120)
        borders_by_keyboard(page)
        assert unnamed(page) == []
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        # The downloaded file equals the output of the command line.
        tab(page, "Download")
        with page.expect_download() as download:
            page.click("#download")
        taken = np.asarray(Image.open(download.value.path()))
        expected = by_command(photo, tiny_checkpoint, tmp_path / "out", "--add-noise", "25")
        assert (taken == expected).all() and download.value.suggested_filename == "mine-denoised.png"

        if scheme == "dark":
            red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[:3]
            assert max(red, green, blue) < 60
            return

        # Stop.
        page.fill("#steps input[type=number]", "32")
        page.keyboard.press("Tab")
        tab(page, "Result")
        page.click("#denoise")
        page.wait_for_function("document.querySelector('#facts').innerText.includes('left')")
        page.click("#stop")
        page.wait_for_function("document.querySelector('#facts').innerText.includes('Stopped early')")
        tab(page, "Download")
        page.wait_for_function("document.querySelector('#command').innerText.includes('image was stopped early')")
        tab(page, "Result")

        # Side by side.
        page.click("#compare")
        page.wait_for_function("document.querySelectorAll('#columns .column').length == 5")
        assert page.locator("#columns figcaption b").all_inner_texts() == ["Noisy", "EBT", "DiT", "Regressor", "BM3D"]

        # A file that is no image: a sentence, and the page goes on.
        upload(page, tmp_path / "text.png")
        page.click("#denoise")
        page.wait_for_selector("text=text.png is not")
    assert outside == [], "the page must work without the network"


def wait_for_noise(page, how: str) -> None:
    """Wait until the page selects "add noise" or "already noisy"."""
    page.wait_for_function("how => document.querySelector('#how input:checked')?.value === how", arg=how)


def slide(page, pixels: int) -> float:
    """Drag the slider between before and after; return the hidden part of the right image in percent."""
    handle = page.locator("#result .outer")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    return cut_off(page)


def cut_off(page) -> float:
    """Return the hidden part of the right image in percent."""
    style = page.eval_on_selector_all("#result img", "found => found.map(image => image.style.clipPath).join('')")
    return float(style.split()[-1].rstrip("%)"))


def borders_by_keyboard(page) -> None:
    """The Tab key reaches the border between the images, keys move it, and it announces its position."""
    border = page.get_by_role("slider", name="Border between before and after")
    page.get_by_role("tab", name="Result", exact=True).focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if border.evaluate("element => element === document.activeElement"):
            break
    for key, low, high in [
        ("Home", 0, 1),
        ("ArrowRight", 1, 4),
        ("PageUp", 10, 15),
        ("ArrowLeft", 8, 12),
        ("End", 99, 100),
        ("PageDown", 87, 92),
    ]:
        page.keyboard.press(key)
        page.wait_for_timeout(300)
        assert low <= cut_off(page) <= high, key
        assert abs(float(border.get_attribute("aria-valuenow")) - cut_off(page)) < 2


def tab(page, name: str) -> None:
    """Open a tab of the answer, if necessary from the menu of tabs that do not fit."""
    if not page.get_by_role("tab", name=name, exact=True).first.is_visible():
        page.locator("#answer .overflow-menu button").first.click()
        page.locator("#answer .overflow-dropdown button", has_text=name).click()
        return
    page.get_by_role("tab", name=name, exact=True).first.click()


def upload(page, path: Path) -> None:
    """Replace the file in the image box."""
    if page.locator("#upload button[aria-label='Remove Image']").count():
        page.click("#upload button[aria-label='Remove Image']")
    page.set_input_files("#upload input[type=file]", path)
    page.wait_for_selector("#upload img")
