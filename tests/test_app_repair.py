"""The Repair tab: what it computes, the endpoint /restore, and the tab in a real browser."""

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from browser import browser, unnamed
from PIL import Image
from test_app import LONG, served

from apps import denoise as app
from apps import figures, paint_box, repair_page, repair_service
from apps.repair import Progress, Repaired, RepairRequest, damaged_file, enlarged, repair
from ebt_vision import cli
from ebt_vision.denoising.base import Denoiser, IdentityDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.restoration.likelihoods import Downsampling, Mask
from ebt_vision.restoration.solvers import SUGGESTED

STEPS = {damage: options.num_steps for damage, options in SUGGESTED.items()}
EXAMPLE = Path(__file__).parent.parent / "apps" / "examples" / "coffee.png"


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Denoiser:
    return load_denoiser(str(tiny_checkpoint))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small photograph, 96 x 64."""
    Image.open(EXAMPLE).convert("RGB").resize((96, 64)).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


def run(request: RepairRequest, denoiser: Denoiser, stop: threading.Event | None = None) -> tuple[list[Progress], Repaired]:
    folder = Path(request.path).parent / "repaired"
    folder.mkdir(exist_ok=True)
    *news, answer = repair(request, denoiser, stop or threading.Event(), folder)
    assert isinstance(answer, Repaired) and all(isinstance(item, Progress) for item in news)
    return news, answer  # type: ignore[return-value]


def square(size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """A painting (H, W), True on rows 20..29 and columns 30..49."""
    marked = np.zeros(size, dtype=bool)
    marked[20:30, 30:50] = True
    return marked


# --- The work


def test_painted_pixels_change_and_no_others_and_every_step_is_told(tiny: Denoiser, photo: Path) -> None:
    news, answer = run(RepairRequest(path=str(photo), damage="holes", painted=torch.from_numpy(square())), tiny)
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open(answer.fillings[0].path))
    assert (after[~square()] == before[~square()]).all() and (after[square()] != before[square()]).any(-1).mean() > 0.9
    assert (answer.before == before).all() and answer.fillings[0].path.name == "mine-repaired.png"
    frames = answer.fillings[0].frames
    assert [len(item.frames) for item in news] == list(range(1, news[0].num_steps + 1)) and len(frames) == news[0].num_steps
    assert all(frame.energy is not None and frame.likelihood == 0 for frame in frames) and not answer.stopped
    assert (frames[-1].image == after).all() and news[0].before.shape == frames[0].image.shape
    shown = figures.repair_filmstrip(frames)
    assert shown.count("<img") == len(frames) and f"energy {frames[0].energy:.3f}" in shown
    curves = figures.repair_curves(frames)
    assert curves.count("<circle") == len(frames) and "known pixels do not change" in curves and "step 1:" in curves


def test_the_page_and_the_command_make_the_same_pixels(
    tiny: Denoiser, tiny_checkpoint: Path, photo: Path, tmp_path: Path
) -> None:
    Image.fromarray(square().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    _, answer = run(RepairRequest(path=str(photo), damage="holes", mask=str(tmp_path / "mask.png"), seed=3), tiny)
    command = ["restore", "inpaint", photo, "--mask", tmp_path / "mask.png", "--seed", 3, "--runs", 1]
    assert (
        cli.main(
            [str(word) for word in [*command, "--model", tiny_checkpoint, "--output", tmp_path / "out", "--device", "cpu"]]
        )
        == 0
    )
    expected = np.asarray(Image.open(tmp_path / "out" / "mine.png"))
    assert (np.asarray(Image.open(answer.fillings[0].path)) == expected).all()


def test_fillings_have_seeds_of_their_own_and_the_lowest_energy_is_first(tiny: Denoiser, photo: Path) -> None:
    request = RepairRequest(path=str(photo), damage="holes", painted=torch.from_numpy(square()), num_fillings=3, seed=5)
    news, answer = run(request, tiny)
    energies = [filling.energy for filling in answer.fillings if filling.energy is not None]
    assert len(energies) == 3 and energies == sorted(energies) and {filling.seed for filling in answer.fillings} == {5, 6, 7}
    assert {item.filling for item in news} == {0, 1, 2}
    pixels = [np.asarray(Image.open(filling.path)) for filling in answer.fillings]
    assert (pixels[0] != pixels[1]).any() and (pixels[1] != pixels[2]).any()
    slider, line, _, _, gallery, _ = repair_service._final(answer, Path(request.path).parent)
    assert slider[1] == gallery["value"][0][0] == str(answer.fillings[0].path) and gallery["visible"]
    assert [caption for _, caption in gallery["value"]] == [f"seed {f.seed}, energy {f.energy:.4f}" for f in answer.fillings]
    assert "may not rank candidates" in line


def test_stop_keeps_the_steps_so_far(tiny: Denoiser, photo: Path) -> None:
    stop = threading.Event()
    stop.set()
    request = RepairRequest(path=str(photo), damage="holes", painted=torch.from_numpy(square()), num_fillings=4)
    news, answer = run(request, tiny, stop)
    assert answer.stopped and len(news) == len(answer.fillings) == 1 and len(answer.fillings[0].frames) == 1


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (dict(damage="gaussian", size=1.2), (96, 64)),
        (dict(damage="motion", size=5, angle=30), (96, 64)),
        (dict(damage="disk", size=2), (96, 64)),
        (dict(damage="enlarge", scale=3), (288, 192)),
    ],
)
def test_other_damages(photo: Path, settings: dict, size: tuple[int, int]) -> None:
    _, answer = run(RepairRequest(path=str(photo), **settings), IdentityDenoiser())
    result = Image.open(answer.fillings[0].path)
    assert result.size == size and answer.before.shape == (size[1], size[0], 3)
    assert answer.fillings[0].energy is None and "curve-likelihood" in figures.repair_curves(answer.fillings[0].frames)


def test_the_blocks_of_a_jpeg_are_read_from_its_file(tiny: Denoiser, photo: Path) -> None:
    """A JPEG that is stored on its side comes back upright, and its frames are upright too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(photo.with_suffix(".jpg"), quality=15, exif=exif)
    _, answer = run(RepairRequest(path=str(photo.with_suffix(".jpg")), damage="jpeg"), tiny)
    result = np.asarray(Image.open(answer.fillings[0].path))
    assert result.shape == answer.before.shape == answer.fillings[0].frames[0].image.shape == (96, 64, 3)
    assert 0 < np.abs(result.astype(int) - answer.before).mean() < 20
    assert answer.fillings[0].frames[-1].likelihood < 1e-6


def test_what_is_painted_on_a_view_covers_what_it_shows_of_the_photograph() -> None:
    small = torch.zeros(2, 3, dtype=torch.bool)
    small[0, 1] = True
    expected = torch.zeros(5, 9, dtype=torch.bool)
    expected[0:3, 3:6] = True  # the third of five rows meets both rows of the view
    assert torch.equal(enlarged(small, (5, 9)), expected)
    assert enlarged(expected, (2, 3)).tolist() == [[False, True, False], [False, True, False]]


def test_transparent_pixels_are_filled_in_where_nothing_is_marked(tiny: Denoiser, photo: Path) -> None:
    picture = np.dstack([np.asarray(Image.open(photo)), np.where(square(), 0, 255).astype(np.uint8)])
    Image.fromarray(picture).save(photo)
    _, answer = run(RepairRequest(path=str(photo), damage="holes"), tiny)
    result = Image.open(answer.fillings[0].path)
    assert result.mode == "RGB" and (np.asarray(result)[~square()] == picture[~square(), :3]).all()


# --- What does not work


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(damage="holes"), "No pixels are missing"),
        (dict(damage="holes", painted=torch.zeros(5, 5, dtype=torch.bool)), "No pixels are missing"),
        (dict(damage="holes", painted=torch.ones(5, 5, dtype=torch.bool)), "whole photograph"),
        (dict(damage="holes", mask="small.png"), "the mask is 10x12 px, the image 96x64"),
        (dict(damage="holes", mask="text.png"), "text.png is not an image"),
        (dict(damage="jpeg"), "not a JPEG"),
        (dict(damage="gaussian", size=12.0), "give a kernel smaller than the image"),
        (dict(damage="gaussian", size=0.0), "use 0.1 to 50 pixels"),
        (dict(damage="enlarge", scale=4), "this page makes up to 0"),
    ],
)
def test_what_cannot_be_repaired_is_refused_in_a_line(
    photo: Path, settings: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    if settings["damage"] == "enlarge":
        monkeypatch.setattr("apps.repair.MAX_PIXELS", 20_000)
    Image.new("L", (10, 12), 255).save("small.png")
    Path("text.png").write_text("not an image")
    with pytest.raises(ValueError, match=words) as caught:
        run(RepairRequest(path=str(photo), **settings), IdentityDenoiser())
    assert "\n" not in str(caught.value)


def test_tiny_and_huge_images(tmp_path: Path, tiny: Denoiser) -> None:
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "small.png")
    painted = torch.zeros(8, 8, dtype=torch.bool)
    painted[3, 4] = True
    _, answer = run(RepairRequest(path=str(tmp_path / "small.png"), damage="holes", painted=painted), tiny)
    assert Image.open(answer.fillings[0].path).size == (8, 8)
    Image.new("RGB", (2, 2)).save(tmp_path / "dot.png")
    Image.new("1", (6_000, 5_000)).save(tmp_path / "big.png")
    for name, words in (("dot.png", "too small"), ("big.png", "megapixels")):
        with pytest.raises(ValueError, match=words):
            damaged_file(RepairRequest(path=str(tmp_path / name), damage="jpeg"))
    assert repair_service.RepairService(None).view(str(tmp_path / "big.png")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed", [{"damage": "rain"}, {"scale": 5}, {"scale": 2.5}, {"seed": -1}, {"fillings": 9}, {"size": None}, {"angle": 999}]
)
def test_controls_out_of_range_are_refused(changed: dict) -> None:
    with pytest.raises(gr.Error):
        repair_service.repair_request("a.png", **({"damage": "holes"} | changed))
    with pytest.raises(gr.Error, match="Upload a photograph first"):
        repair_service.repair_request(None, "holes")


def test_the_controls_of_the_damage_are_used() -> None:
    values = ["motion", None, None, 1.6, 9, 45, 3, None, 2, 1, 7, "m"]
    request, label = repair_service.read_controls("a.png", values)
    assert (label, request.size, request.angle, request.noise, request.seed) == ("m", 9, 45, None, 7)
    values[0], values[7] = "disk", 2.5
    assert (repair_service.read_controls("a.png", values)[0].size, request.scale) == (3, 2)
    assert repair_service.read_controls("a.png", values)[0].noise == 2.5


def test_a_large_photograph_is_painted_on_in_a_view(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_service, "VIEW", 48)
    assert repair_service.RepairService(None).view(str(photo))["background"].shape == (32, 48, 3)  # type: ignore[arg-type]


def test_a_painting_that_is_too_large_or_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = paint_box.PaintBox()
    layer = np.zeros((6, 8, 4), np.uint8)
    layer[2, 3] = (255, 0, 0, 9)
    Image.fromarray(layer).save(tmp_path / "layer.png")
    (tmp_path / "text.png").write_text("not an image")
    value = {"background": None, "layers": [{"path": str(tmp_path / "layer.png")}], "composite": None, "id": None}
    found = box.preprocess(box.data_model(**value))
    assert found.shape == (6, 8) and np.argwhere(found).tolist() == [[2, 3]]
    assert box.preprocess(box.data_model()) is None and box.preprocess(None) is None
    monkeypatch.setattr(paint_box, "MAX_SIDE", 7)
    with pytest.raises(gr.Error, match="larger than 7"):
        box.preprocess(box.data_model(**value))
    with pytest.raises(gr.Error, match="cannot be read"):
        box.preprocess(box.data_model(**(value | {"layers": [{"path": str(tmp_path / "text.png")}]})))


# --- The running page


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A page with a method that returns images unchanged; holes then keep the noise that was added to them."""
    with served(app.build_page({"identity": "identity"}, functools.lru_cache(load_denoiser))) as address:
        yield address


@pytest.mark.slow
def test_the_endpoint_restores(address: str, photo: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, download_files=str(tmp_path / "down"))
    Image.fromarray(square().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    given = dict(image=handle_file(str(photo)), mask=handle_file(str(tmp_path / "mask.png")), api_name="/restore")
    file, told = client.predict(damage="holes", seed=4, **given)
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open(file))
    assert (after[~square()] == before[~square()]).all() and (after[square()] != before[square()]).any()
    assert told["num_steps"] == len(told["energies"]) == len(told["likelihoods"]) and told["seed"] == 4
    again = client.predict(damage="holes", seed=4, **given)[0]
    assert (np.asarray(Image.open(again)) == after).all()
    file, _ = client.predict(damage="enlarge", scale=2, **(given | {"mask": None}))
    assert Image.open(file).size == (192, 128)
    with pytest.raises(Exception, match="No pixels are missing"):
        client.predict(damage="holes", **(given | {"mask": None}))
    with pytest.raises(Exception, match="mine.png is a PNG file, not a JPEG") as caught:
        client.predict(damage="jpeg", **(given | {"mask": None}))
    assert str(tmp_path) not in str(caught.value)
    assert 'api_name="/restore"' in repair_page.API_HELP


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a fresh machine it installs the browser
@pytest.mark.parametrize(("width", "height", "touch"), [(1366, 900, False), (390, 844, True)], ids=["laptop", "phone-touch"])
def test_repair_in_a_browser(address: str, photo: Path, width: int, height: int, touch: bool) -> None:
    outside: list[str] = []
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height}, has_touch=touch, accept_downloads=True)
        page.set_default_timeout(LONG)
        page.on("request", lambda r: outside.extend([] if r.url.startswith((address, "data:", "blob:")) else [r.url]))
        page.goto(address)
        page.get_by_role("tab", name="Repair", exact=True).click()

        # Nothing uploaded, then nothing painted: a line each.
        page.click("#repair")
        page.wait_for_selector("text=Upload a photograph first")
        page.set_input_files("#repair-photo input[type=file]", photo)
        page.wait_for_selector("#repair-photo img")
        canvas = page.locator("#paint canvas").first
        page.wait_for_function("document.querySelector('#paint').innerText.includes('%')")
        page.click("#repair")
        page.wait_for_selector("text=No pixels are missing")
        assert unnamed(page) == []

        # Paint a stroke. The pixels outside of it stay as they are.
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        paint(page, (box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]), touch)
        page.click("#repair")
        page.wait_for_function(f"document.querySelectorAll('#repair-film img').length == {STEPS[Mask]}")
        page.wait_for_function("[...document.querySelectorAll('#repaired img')].filter(i => i.naturalWidth == 96).length == 2")
        before, after = np.asarray(Image.open(photo)), download(page)
        changed = np.argwhere((after != before).any(-1))
        assert 20 < len(changed) < 0.75 * 96 * 64, "the stroke, and it alone"
        assert np.abs(changed.mean(0) - (32, 48)).max() < 8, "it is in the middle"
        assert (after[:6] == before[:6]).all() and (after[:, :6] == before[:, :6]).all()
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        if touch:
            return

        # Enlarge.
        page.get_by_label(repair_page.DAMAGES["enlarge"]).check()
        page.wait_for_selector("#scale")
        page.wait_for_selector("#paint", state="hidden")
        page.click("#repair")
        page.wait_for_function("[...document.querySelectorAll('#repaired img')].filter(i => i.naturalWidth == 192).length == 2")
        page.wait_for_function(f"document.querySelectorAll('#repair-film img').length == {STEPS[Downsampling]}")
        assert page.locator("#repair-chart .curve-likelihood circle").count() == STEPS[Downsampling]
        assert download(page).shape == (128, 192, 3)

        # A PNG has no JPEG tables.
        page.get_by_label(repair_page.DAMAGES["jpeg"]).check()
        page.click("#repair")
        page.wait_for_selector("text=mine.png is a PNG file, not a JPEG")
    assert outside == [], "the page must work without the network"


def paint(page, middle: tuple[float, float], touch: bool) -> None:
    """Draw a short line through a point of the page, by mouse or by finger."""
    x, y = middle
    if not touch:
        page.mouse.move(x - 10, y)
        page.mouse.down()
        page.mouse.move(x + 10, y, steps=5)
        page.mouse.up()
    else:
        session = page.context.new_cdp_session(page)
        for kind, at in [("touchStart", -10), ("touchMove", 0), ("touchMove", 10), ("touchEnd", None)]:
            points = [] if at is None else [{"x": x + at, "y": y}]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(500)  # the editor sends the painting to the server


def download(page) -> np.ndarray:
    """The pixels of the file that the download button gives."""
    page.wait_for_function("!document.querySelector('#repair-download').disabled")
    with page.expect_download() as found:
        page.click("#repair-download")
    assert found.value.suggested_filename == "mine-repaired.png"
    return np.asarray(Image.open(found.value.path()))
