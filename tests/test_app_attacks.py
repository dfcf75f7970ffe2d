"""The page with hostile or unusable input: which files it reads, which messages it gives, what it leaves behind."""

import gc
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from test_app import served
from test_app_parts import bad_files
from torch import Tensor

from apps import denoise as app
from apps.service import Service
from ebt_vision.denoising.base import IdentityDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.results import DenoiseResult

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A page with a method that returns images unchanged."""
    with served(app.build_page({"identity": "identity"}, load_denoiser)) as address:
        yield address


@pytest.mark.slow
def test_no_file_of_the_server_is_handed_out(address: str) -> None:
    inside = [ROOT / "README.md", ROOT / "apps" / "denoise.py", Path("/etc/passwd")]
    roundabout = [f"{ROOT}/apps/examples/../../README.md", "..%2f..%2fREADME.md", "apps/denoise.py", "README.md"]
    for path in [*inside, *roundabout]:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy=file://"):
            answer = httpx.get(f"{address}{route}{path}", timeout=60)
            assert answer.status_code >= 400, (route, path)


@pytest.mark.slow
def test_bad_files_get_a_sentence_and_odd_ones_an_answer(address: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, download_files=str(tmp_path / "down"))
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(Exception, match=words) as caught:
            client.predict(image=handle_file(str(tmp_path / name)), api_name="/denoise")
        assert name in str(caught.value) and str(tmp_path) not in str(caught.value) and "Traceback" not in str(caught.value)
    Image.new("CMYK", (40, 20), (0, 200, 0, 10)).save(tmp_path / "print.jpg")
    Image.fromarray(np.full((9, 17), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (30_000, 8), 77).save(tmp_path / "wide.png")
    for name, mode, size in [("print.jpg", "RGB", (40, 20)), ("deep.png", "I;16", (17, 9)), ("wide.png", "L", (30_000, 8))]:
        file, _ = client.predict(image=handle_file(str(tmp_path / name)), api_name="/denoise")
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("PNG", mode, size)
    with pytest.raises(Exception):  # noqa: B017 (gradio's own): the server fetches nothing from its own network for a visitor
        local = {"path": f"{address}/config", "meta": {"_type": "gradio.FileData"}}
        client.predict(image=local, api_name="/denoise")


@pytest.mark.slow
def test_temporary_files_are_deleted_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client, handle_file

    cache = tmp_path / "cache"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(cache))
    monkeypatch.setattr(app, "CACHE_SECONDS", (1, 20))
    Image.new("RGB", (40, 20), "teal").save(tmp_path / "gone.png")
    with served(app.build_page({"identity": "identity"}, load_denoiser)) as address:
        client = Client(address, verbose=False, download_files=str(tmp_path / "down"))
        client.predict(image=handle_file(str(tmp_path / "gone.png")), api_name="/denoise")
        end = time.monotonic() + 120
        while left := [path for path in cache.rglob("*gone*") if path.is_file()]:
            assert time.monotonic() < end, left
            time.sleep(0.2)


def test_a_failed_request_frees_its_memory(tmp_path: Path) -> None:
    seen: list[weakref.ref] = []

    class Failing(IdentityDenoiser):
        def _denoise(self, noisy: Tensor, *rest: object) -> DenoiseResult:
            held = torch.zeros(1000)
            seen.append(weakref.ref(held))
            raise ValueError("it cannot be done")

    Image.new("RGB", (40, 20), "teal").save(tmp_path / "photo.png")
    service = Service({"m": "m"}, lambda name: Failing(), "cpu")
    for _ in range(3):
        with pytest.raises(gr.Error, match="it cannot be done"):
            list(service.api_denoise(str(tmp_path / "photo.png"), "none", 25, 0, 4, "m", 1, 0, 0, 1, 0))
    gc.collect()
    assert len(seen) == 3 and all(found() is None for found in seen)


def test_only_safetensors_are_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint with pickled weights is refused, and code in the pickle does not run."""
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    mark = tmp_path / "ran"

    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    torch.save({"weight": Bad()}, tmp_path / "pytorch_model.bin")
    os.link(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors")
    with pytest.raises(ValueError):
        load_denoiser(str(tmp_path))
    assert not mark.exists()


def test_who_has_left_counts_as_stopped() -> None:
    service = Service({}, load_denoiser, "cpu")
    visitor = SimpleNamespace(session_hash="s")
    service.ask(visitor)
    event = service.stop_of(visitor)
    assert not event.is_set()
    service.forget(visitor)
    assert event.is_set() and service.stop_of(visitor).is_set() and not service._stops
