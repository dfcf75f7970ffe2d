"""Computation of the Gradio page: updates, answers, stopping, comparing, bad uploads, recipes."""

import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from test_odd_files import looping_tiff

from apps import comparing, denoise, figures, recipes, sources, thinking_aloud
from apps.service import Service
from apps.sources import Request
from apps.thinking_aloud import Answer, Update, think_aloud
from ebt_vision import cli
from ebt_vision.data.image_files import read_image, write_image
from ebt_vision.denoising.base import Denoiser, IdentityDenoiser, for_photographs
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.tiling import tile_grid
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.registry import config_class, model_class
from ebt_vision.noise.named import Noise

ROOT = Path(__file__).parent.parent
GAUSSIAN = Noise.parse("25")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Denoiser:
    return load_denoiser(str(tiny_checkpoint))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """A smooth image of an odd size that needs several tiles of the tiny model."""
    rows, columns = np.mgrid[0:45, 0:61]
    pixels = np.stack([rows * 5 % 256, columns * 4 % 256, (rows + columns) * 2 % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "my photo.png")
    return str(tmp_path / "my photo.png")


def run(request: Request, denoiser: Denoiser, stop: threading.Event | None = None) -> tuple[list[Update], Answer]:
    *updates, answer = think_aloud(request, denoiser, stop or threading.Event())
    assert isinstance(answer, Answer) and all(isinstance(update, Update) for update in updates)
    return updates, answer


@pytest.mark.parametrize("noise", ["25", "paper:0.1"])
def test_every_step_is_told_and_answered(tiny: Denoiser, photo: str, noise: str) -> None:
    updates, answer = run(Request(path=photo, noise=Noise.parse(noise), num_steps=3), tiny)
    assert [update.step for update in updates] == [0, 1, 2, 3]
    assert [len(update.energies) for update in updates] == [len(update.psnrs) for update in updates] == [1, 2, 3, 4]
    assert updates[-1].psnrs == pytest.approx(answer.steps.psnrs)
    assert len(answer.steps.frames) == len(answer.steps.energies) == 4 and answer.num_steps == 3 and not answer.stopped
    assert answer.before.shape == answer.after.shape == (45, 61, 3) and answer.before.dtype == np.uint8
    assert (answer.steps.frames[0] == answer.before).all() and (answer.steps.frames[-1] == answer.after).all()
    assert answer.steps.heat is not None and answer.steps.heat.shape == (45, 61)
    assert figures.curves(answer.steps.energies, answer.steps.psnrs).count("<circle") == 8
    assert figures.filmstrip(answer.steps).count("<img") == 4 and "left" in figures.progress(updates[1])


def test_a_photo_that_is_noisy_already_has_no_psnr(tiny: Denoiser, photo: str) -> None:
    _, answer = run(Request(path=photo, num_steps=2), tiny)
    assert answer.psnrs == answer.steps.psnrs == [] and "PSNR" not in figures.facts(answer)
    assert (answer.before == np.asarray(Image.open(photo))).all()


def test_the_page_says_that_a_photo_is_clean_already(photo: str) -> None:
    config = PatchEBTConfig(
        img_size=16, embed_dim=48, depth=1, num_heads=2, suggested_start="proposal", suggested_clean_below=255.0
    )
    updates, answer = run(Request(path=photo, num_steps=1), EBTDenoiser(PatchEBT(config)))
    assert (answer.after == np.asarray(Image.open(photo))).all() and answer.num_steps == 0 and len(answer.energies) == 1
    assert "**Already clean**: every pixel is kept" in figures.facts(answer)
    assert (updates[-1].after == answer.after).all() and len(answer.steps.frames) == 1


def test_a_model_without_an_energy_has_neither_curve_nor_map(photo: str) -> None:
    _, answer = run(Request(path=photo, noise=GAUSSIAN), IdentityDenoiser())
    assert answer.energies == [] and "curve-energy" not in figures.curves(answer.energies, answer.psnrs)
    assert figures.heat_map(answer.steps)[0] is None
    assert answer.psnrs[0] == pytest.approx(answer.psnrs[-1]) and 18 < answer.psnrs[0] < 24


def test_a_strength_above_1_shows_its_second_run(tiny: Denoiser, photo: str) -> None:
    updates, answer = run(Request(path=photo, noise=GAUSSIAN, num_steps=2, strength=1.5), tiny)
    assert [update.step for update in updates] == [0, 1, 2] * 2
    assert [len(update.energies) for update in updates] == [len(update.psnrs) for update in updates] == [1, 2, 3] * 2
    assert updates[-1].psnrs[-1] == pytest.approx(answer.psnrs[-1], abs=0.01)


def test_mirrored_copies_are_named_and_counted(tiny: Denoiser, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinking_aloud, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(thinking_aloud, "PREVIEW_SHARE", float("inf"))
    updates, answer = run(Request(path=photo, noise=GAUSSIAN, num_steps=2, self_ensemble=2), tiny)
    assert any("copy 2 of 2" in update.words for update in updates)
    _, one = run(Request(path=photo, noise=GAUSSIAN, num_steps=2), tiny)
    assert answer.num_forward == 2 * one.num_forward and answer.steps.candidates == []
    assert len(answer.energies) == len(answer.psnrs) + 1 == 3


def test_the_noise_is_what_the_model_sees_where_it_starts_from_a_proposal(
    tiny: Denoiser, tiny_checkpoint: Path, photo: str
) -> None:
    seeing = load_denoiser(str(tiny_checkpoint))
    assert isinstance(seeing, EBTDenoiser)
    object.__setattr__(seeing.model.config, "suggested_start", "proposal")
    seeing.starts_from_proposal = True
    models = {"plain": tiny, "seeing": seeing}
    page = Service({name: name for name in models}, models.__getitem__, "cpu")
    assert "finest wavelets, which misses correlated noise" in page.estimate(photo, "plain")
    assert sources.noise_seen(photo, tiny) is None
    energies = for_photographs(seeing).denoise(read_image(photo).pixels[None], seeing.suggested_options).energies
    assert energies is not None
    expected = (2 * float(energies[0, 0]) / (3 * 8**2)) ** 0.5 * 127.5
    assert sources.noise_seen(photo, seeing) == pytest.approx(expected / seeing.signal_scale, rel=1e-3)
    assert "the model sees" in page.estimate(photo, "seeing") and page.estimate("missing.png", "seeing") == ""


def test_candidates_are_shown_with_the_winner(tiny: Denoiser, photo: str) -> None:
    _, answer = run(Request(path=photo, noise=GAUSSIAN, num_steps=2, num_candidates=3), tiny)
    shown = figures.candidates(answer.steps)
    assert len(answer.steps.candidates) == 3 and shown.count("<img") == 3 and shown.count(" won</b>") == 1
    assert sum(candidate.wins for candidate in answer.steps.candidates) == tile_grid(tiny, (45, 61)).count


def test_stop_ends_after_the_step_under_way(tiny: Denoiser, photo: str) -> None:
    stop = threading.Event()
    stop.set()
    updates, answer = run(Request(path=photo, noise=GAUSSIAN, num_steps=30), tiny, stop)
    assert answer.stopped and answer.num_steps == 0 and len(updates) == 1 and "Stopped" in figures.facts(answer)
    assert np.abs(answer.after.astype(int) - answer.before).max() <= 1  # blending rounds


def test_who_leaves_stops_the_work(tiny: Denoiser, photo: str) -> None:
    stop = threading.Event()
    news = think_aloud(Request(path=photo, noise=GAUSSIAN, num_steps=300), tiny, stop)
    next(news)
    before = threading.active_count()
    news.close()
    assert stop.is_set() and threading.active_count() < before


def test_a_large_image_begins_with_a_close_up(tiny: Denoiser, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(path=photo, noise=GAUSSIAN, num_steps=2)
    _, plain = run(request, tiny)
    monkeypatch.setattr(thinking_aloud, "CLOSE_UP_ABOVE", 1000)
    monkeypatch.setattr(thinking_aloud, "CLOSE_UP", 32)
    updates, answer = run(request, tiny)
    assert "close-up" in updates[0].words and updates[0].after.shape == (32, 32, 3) and updates[-1].after.shape == (45, 61, 3)
    assert (answer.after == plain.after).all() and len(answer.steps.frames) == 3 and answer.steps.frames[0].shape == (32, 32, 3)


def test_what_raises_in_the_thread_is_raised_here(photo: str, tiny: Denoiser) -> None:
    with pytest.raises(ValueError, match="num_steps=0"):
        run(Request(path=photo, num_steps=0), tiny)


@pytest.mark.parametrize("model_type", ["patch_diffusion", "patch_eqm"])
def test_a_checkpoint_of_any_image_model_is_compared(model_type: str, tmp_path: Path) -> None:
    sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model_class(model_type)(config_class(model_type)(**sizes)).save_pretrained(tmp_path / "mine")
    methods = Service(denoise.find_models(str(tmp_path / "mine")), load_denoiser, "cpu")._methods("mine")
    assert str(tmp_path / "mine") in [method.args[0] for method in methods.values()]


def test_methods_are_compared_and_one_that_is_missing_says_why(tiny: Denoiser, photo: str) -> None:
    def missing() -> Denoiser:
        raise ValueError("bm3d is <not> installed")

    methods = {"EBT": lambda: tiny, "None": IdentityDenoiser, "BM3D": missing}
    *_, columns = comparing.compare(Request(path=photo, noise=GAUSSIAN, num_steps=2), methods, threading.Event())
    assert [column.name for column in columns] == ["Noisy", "EBT", "None", "BM3D"]
    assert (
        columns[1].num_forward == 3 and columns[2].num_forward is None and columns[2].psnrs == pytest.approx(columns[0].psnrs)
    )
    shown = figures.comparison(columns)
    assert shown.count('<figure class="column">') == 4 and "3 forward passes" in shown and "is &lt;not&gt; installed" in shown


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [-1e-9, 1e-9], [3e5, -2e5, 1.0]])
def test_a_curve_stays_in_its_frame(values: list[float]) -> None:
    svg = figures.curve(values, "Energy", "unit", "name")
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([-\d.]+)"', svg)]
    assert len(heights) == len(values) and all(0 <= y <= 160 for y in heights)


# --- What does not work


def bad_files(folder: Path) -> dict[str, str]:
    """Name -> part of the expected message."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (folder / "text.png").write_text("not an image")
    noise.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    noise.save(folder / "moving.gif", save_all=True, append_images=[noise.rotate(90)])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (30_000, 3_000)).save(folder / "bomb.png")
    Image.new("1", (6_000, 5_000)).save(folder / "big.png")
    (folder / "loop.tif").write_bytes(looping_tiff())
    return {
        "loop.tif": "lead back",
        "text.png": "not an image",
        "cut.jpg": "damaged or truncated",
        "moving.gif": "frames",
        "dot.png": "too small",
        "bomb.png": "megapixels",
        "big.png": "megapixels",
    }


def test_bad_uploads_are_refused_in_a_sentence(tmp_path: Path) -> None:
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=words) as caught:
            sources.open_source(Request(path=str(tmp_path / name)))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_bytes_are_refused_before_they_are_read(photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="command line"):
        sources.open_source(Request(path=photo))


def test_odd_images_are_taken(tmp_path: Path) -> None:
    Image.new("CMYK", (40, 20), (0, 200, 0, 10)).save(tmp_path / "print.jpg")
    Image.new("L", (3_000, 8), 77).save(tmp_path / "wide.png")
    Image.fromarray(np.full((9, 17), 40_000, np.uint16)).save(tmp_path / "deep.png")
    shapes = [
        sources.open_source(Request(path=str(tmp_path / name))).noisy.shape for name in ("print.jpg", "wide.png", "deep.png")
    ]
    assert shapes == [(1, 3, 20, 40), (1, 3, 8, 3_000), (1, 3, 9, 17)]


# --- Recipes


FULL = dict(
    num_steps=2,
    num_candidates=2,
    tolerance=0.1,
    tolerance_of="previous",
    langevin_std=0.02,
    step_size_scale=0.5,
    tile_size=16,
    strength=1.25,
    seed=7,
)


@pytest.mark.parametrize(
    "settings",
    [
        dict(noise=GAUSSIAN, num_steps=2),
        dict(noise=Noise.parse("poisson:30"), **FULL),
        dict(),
        dict(num_steps=1, self_ensemble=4),
    ],
)
def test_command_and_program_make_the_same_pixels(
    tiny: Denoiser, tiny_checkpoint: Path, photo: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(photo).parent)
    request = Request(path=photo, **settings)
    _, answer = run(request, tiny)
    write_image("page.png", answer.file)
    words = shlex.split(recipes.command(request, str(tiny_checkpoint), "cpu"))
    assert words[0] == "ebt-vision" and cli.main(words[1:]) == 0
    exec(recipes.program(request, str(tiny_checkpoint), "cpu"), {})
    page, by_command, by_program = (
        read_image(name).pixels for name in ("page.png", "out/my photo.png", "my photo-denoised.png")
    )
    assert torch.equal(page, by_command) and torch.equal(page, by_program)


def test_a_name_keeps_what_is_no_image_s_suffix(tiny: Denoiser, tiny_checkpoint: Path, photo: str) -> None:
    """IMG.2024 becomes IMG.2024-denoised.png on the page, by the API and in the program, as the command line names it."""
    named = Path(photo).rename(Path(photo).with_name("IMG.2024"))
    assert "write_image('IMG.2024-denoised.png'," in recipes.program(Request(path=str(named)), "m", "cpu")
    service = Service({"tiny": str(tiny_checkpoint)}, lambda name: tiny, "cpu")
    download, _ = next(service.api_denoise(str(named), "none", 0, 0, 1, "tiny", 1, 0, 0, 1, 0))
    assert Path(download).name == "IMG.2024-denoised.png"
    request = Request(path=str(named), num_steps=1)
    _, answer = run(request, tiny)
    service._final(answer, request, "tiny", named.parent)
    assert (named.parent / "IMG.2024-denoised.png").is_file()


def test_the_defaults_of_the_endpoint_suit_every_shipped_model(photo: str) -> None:
    """Also if the first model, which sets them, suggests a tolerance that others cannot use."""
    others = [name for name in denoise.find_models(None).values() if name != "tiny_imagenet_ebt"]
    service = Service({name: name for name in ["tiny_imagenet_ebt", *others]}, load_denoiser, "cpu")
    tolerance = service.suggested.tolerance
    assert tolerance and service.suggested.tolerance_of == "training"

    def ask(model: str, scale: float = 1, steps: int = 2) -> dict:
        values = (scale, tolerance, 0, 1, 64, "training")
        return next(service.api_denoise(photo, "none", 0, 0, steps, model, *values))[1]

    for model in service.models:
        assert ask(model)["num_forward"] > 0
    for model, steps, message in (
        ("photographs_ebt", 1, "step_size_scale has no effect on the proposal, the one step of .*; use steps=2 or more"),
        ("tiny_imagenet_dit", 2, "step_size_scale has no effect on tiny_imagenet_dit; leave it out"),
    ):
        with pytest.raises(gr.Error, match=message):
            ask(model, scale=2, steps=steps)


def test_bits_profile_and_exif_are_taken_away(tiny: Denoiser, tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 24), 40_000, np.uint16)).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[271] = "A camera"
    Image.new("RGB", (24, 16), "teal").save(tmp_path / "plain.jpg", exif=exif, icc_profile=b"profile" * 20)
    for name in ("deep.png", "plain.jpg"):
        _, answer = run(Request(path=str(tmp_path / name), num_steps=1), tiny)
        write_image(tmp_path / f"out-{name}.png", answer.file)
    assert read_image(tmp_path / "out-deep.png.png").bit_depth == 16
    kept = Image.open(tmp_path / "out-plain.jpg.png")
    assert kept.getexif()[271] == "A camera" and kept.info["icc_profile"] == b"profile" * 20


# --- The program


@pytest.mark.slow
def test_a_wrong_checkpoint_is_one_line() -> None:
    command = [sys.executable, "apps/denoise.py", "--checkpoint", "no/such/folder"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no/such/folder" in done.stderr


@pytest.mark.parametrize("port", ["0", "70000", "x"])
def test_a_port_is_a_number_up_to_65535(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        denoise.main(["--port", port])
    assert stop.value.code == 2 and f"{port!r} is not valid; use a whole number from 1 to 65535" in capsys.readouterr().err
