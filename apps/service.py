"""The actions of the page's buttons and endpoints: they turn controls into a request, and updates and answers into outputs."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import numpy as np
from PIL import Image

from apps import figures, recipes
from apps.background import free_memory
from apps.comparing import compare
from apps.sources import Request, estimate, noise_seen
from apps.thinking_aloud import Answer, Update, think_aloud
from ebt_vision.core.thinking_config import ToleranceOf
from ebt_vision.core.thinking_results import ThinkingError
from ebt_vision.data.image_files import without_suffix, write_image
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.load import is_of_library
from ebt_vision.denoising.options import SELF_ENSEMBLES, DenoiseOptions
from ebt_vision.models.checkpoint import list_pretrained, model_type_of
from ebt_vision.noise.named import NOISE_KINDS, Noise

MAX_STEPS, MAX_CANDIDATES = 32, 8
MAX_SEED = 2**53
"""The largest number up to which a browser represents all whole numbers exactly."""
NOISY_ALREADY, ADD = "My photo is already noisy", "Add noise first"
OWN_TILES = "Default of the model"
OF_ENDPOINT = {
    "step_size_scale": "step_size_scale",
    "tolerance": "tolerance",
    "tolerance_of": "tolerance_of",
    "langevin": "langevin_std",
    "candidates": "num_candidates",
}
"""Options of thinking of the endpoint /denoise, and their fields in a Request."""
KIND_OF_MODEL = {
    "patch_ebt": "EBT",
    "dit": "DiT",
    "patch_diffusion": "Diffusion on the trunk",
    "patch_regressor": "Regressor",
    "patch_eqm": "Equilibrium Matching",
}


class Service:
    """The actions of the buttons and endpoints. The service processes one request at a time; visitors can stop their own."""

    def __init__(self, models: dict[str, str], load: Callable[[str], Denoiser], device: str):
        self.models, self.load, self.device = models, load, device
        first = next(iter(models.values()), None)
        self.suggested = DenoiseOptions(num_steps=4) if first is None else load(first).suggested_options
        """The initial number of thinking steps and tolerance of the page."""
        self._stops: dict[str, threading.Event] = {}

    def denoise(self, path: str | None, values: Sequence[Any], visitor: gr.Request) -> Iterator[tuple]:
        """Yield values for the outputs of the page; see `_live` and `_final`."""
        request, label = read_controls(path, values)
        denoiser = self.denoiser(label)
        request = request.without_unused(denoiser.options_in_effect(request.num_steps))
        with tempfile.TemporaryDirectory() as folder:
            for news in self.guarded(think_aloud(request, denoiser, self.stop_of(visitor)), path):
                if isinstance(news, Update):
                    yield _live(news, Path(folder))
                else:
                    yield self._final(news, request, label, Path(folder))

    def compare(self, path: str | None, values: Sequence[Any], visitor: gr.Request) -> Iterator[str]:
        """Yield the comparison so far as HTML."""
        request, label = read_controls(path, values)
        stop = self.stop_of(visitor)
        for columns in self.guarded(compare(request, self._methods(label), stop), path):
            yield figures.comparison(columns)

    def api_denoise(
        self,
        image,
        noise,
        amount,
        seed,
        steps,
        model,
        step_size_scale,
        tolerance,
        langevin,
        candidates,
        tile,
        tolerance_of="first",
        strength=1.0,
        self_ensemble=1,
    ):
        """Denoise an image; yield a PNG file and a dictionary of figures."""
        values = (noise, amount, seed, steps, model, step_size_scale, tolerance, langevin, candidates, tile)
        request, label = api_request(image, *values, tolerance_of, strength, self_ensemble)
        denoiser = self.denoiser(label)
        request = self._in_effect(request, denoiser)
        folder = Path(tempfile.mkdtemp())
        try:
            *_, answer = self.guarded(think_aloud(request, denoiser, threading.Event()), image)
            target = folder / f"{without_suffix(Path(image)).name}-denoised.png"
            write_image(target, answer.file)
            told = {name: getattr(answer, name) for name in ("energies", "psnrs", "num_steps", "num_forward", "seconds")}
            yield str(target), told  # yield, not return: gradio copies the file before the clean-up below
        finally:
            remove_folder(folder)

    def _in_effect(self, request: Request, denoiser: Denoiser) -> Request:
        """Reset the options without effect to their defaults. Raises gr.Error if the client of the endpoint changed one.

        A client who leaves the tolerance as it is gets the one that this denoiser suggests.
        """
        first, own = self.suggested, denoiser.suggested_options
        if (request.tolerance, request.tolerance_of) == (first.tolerance, first.tolerance_of):
            request = replace(request, tolerance=own.tolerance, tolerance_of=own.tolerance_of)
        used = request.without_unused(denoiser.options_in_effect(request.num_steps))
        suggested = {"tolerance": own.tolerance, "tolerance_of": own.tolerance_of}
        for option, name in OF_ENDPOINT.items():
            if getattr(request, name) in (getattr(used, name), suggested.get(name)):
                continue
            message = f"{option} has no effect on {denoiser.name}; leave it out"
            if name in denoiser.options_used:
                message = f"{option} has no effect on the proposal, the one step of {denoiser.name}; use steps=2 or more"
            raise gr.Error(message, title="Error", print_exception=False)
        return used

    def api_compare(self, image, noise, amount, seed, steps, model, strength=1.0, self_ensemble=1):
        """Compare the methods on an image; return a list of dictionaries."""
        values = (noise, amount, seed, steps, model, 1.0, 0.0, 0.0, 1, 0)
        request, label = api_request(image, *values, strength=strength, self_ensemble=self_ensemble)
        *_, columns = self.guarded(compare(request, self._methods(label), threading.Event()), image)
        fields = ("name", "psnrs", "num_forward", "seconds", "problem")
        return [{name: getattr(column, name) for name in fields} for column in columns]

    def estimate(self, path: str | None, label: str | None = None) -> str:
        """Describe the estimated noise of a photograph; empty if the file cannot be read."""
        if not path:
            return ""
        try:
            seen = noise_seen(path, self.load(self.models[label])) if label in self.models else None
            if seen is not None:
                text = f"Noise in this image as the model sees it: about σ = **{seen:.1f}** of 255."
            else:
                text = (
                    f"Noise in this image: about σ = **{estimate(path):.1f}** of 255. "
                    "This is an estimate from the finest wavelets, which misses correlated noise."
                )
            heic = Path(path).suffix.lower() in (".heic", ".heif")
            return text + " Some browsers cannot show a HEIC here; they show the result." * heic
        except (ValueError, OSError, ThinkingError, MemoryError):
            return ""  # the Denoise button reports the error

    def ask(self, visitor: gr.Request) -> None:
        """Register a request of a visitor, so that Stop also works while the request waits in the queue."""
        event = self._stops.get(visitor.session_hash or "")
        if event is None or event.is_set():
            self._stops[visitor.session_hash or ""] = threading.Event()

    def stop(self, visitor: gr.Request) -> None:
        """Stop the running request of this visitor after the current step, or the waiting one as soon as it starts."""
        event = self._stops.get(visitor.session_hash or "")
        if event is not None:
            event.set()

    def forget(self, visitor: gr.Request) -> None:
        """Stop and remove the requests of a visitor who has left."""
        self.stop(visitor)
        self._stops.pop(visitor.session_hash or "", None)

    def stop_of(self, visitor: gr.Request) -> threading.Event:
        """Return the event of the visitor's last `ask`; for a visitor who has left, an event that is already set."""
        event = self._stops.get(visitor.session_hash or "")
        if event is None:
            event = threading.Event()
            event.set()
        return event

    def denoiser(self, label: str) -> Denoiser:
        if label not in self.models:
            raise gr.Error(f"There is no model {label!r} here.", print_exception=False)
        return self.load(self.models[label])

    def _methods(self, label: str) -> dict[str, Callable[[], Denoiser]]:
        """Return the loaders of the chosen EBT (or the first), one model of each other kind, networks of other libraries,
        and BM3D."""
        found = {kind: name for name in reversed(self.models.values()) for kind in [model_type_of(name)]}
        if model_type_of(self.models.get(label, "")) == "patch_ebt":
            found["patch_ebt"] = self.models[label]
        methods: dict[str, Callable[[], Denoiser]] = {
            title: functools.partial(self.load, found[kind]) for kind, title in KIND_OF_MODEL.items() if kind in found
        }
        peers = {label: name for label, name in self.models.items() if is_of_library(name)}
        methods |= {label: functools.partial(self.load, name) for label, name in peers.items()}
        return methods | {"BM3D": functools.partial(self.load, "bm3d")}

    def _final(self, answer: Answer, request: Request, label: str, folder: Path) -> tuple:
        target = folder / f"{without_suffix(Path(request.path)).name}-denoised.png"
        write_image(target, answer.file)
        heat, legend = figures.heat_map(answer.steps)
        model = self.models[label] if self.models[label] in list_pretrained() else label  # do not show server folders
        unfinished = recipes.UNFINISHED if answer.stopped else ""
        return (
            pair(answer.before, answer.after, folder),
            figures.facts(answer),
            figures.curves(answer.steps.energies, answer.steps.psnrs),
            figures.filmstrip(answer.steps),
            heat,
            legend,
            figures.candidates(answer.steps),
            gr.update(value=str(target), interactive=True),
            unfinished + recipes.command(request, model, self.device),
            unfinished + recipes.program(request, model, self.device),
        )

    def guarded(self, news: Iterator, path: str | None) -> Iterator:
        """Yield from `news` and turn errors into messages for the visitor."""
        try:
            yield from news
        except (ValueError, OSError, ThinkingError, MemoryError) as error:
            raise gr.Error(friendly(error, path or ""), title="Error", print_exception=False) from None
        finally:
            free_memory()


def _live(update: Update, folder: Path) -> tuple:
    drawn = figures.curves(update.energies, update.psnrs)
    rest = [gr.skip()] * 3 + [gr.update(interactive=False)] + [gr.skip()] * 2  # the last answer cannot be downloaded any more
    return (pair(update.before, update.after, folder), figures.progress(update), drawn, "", *rest)


def pair(before: np.ndarray, after: np.ndarray, folder: Path) -> tuple[str, str]:
    """Write two images as PNG files named by a hash of their pixels.

    With arrays, gradio would overwrite the file of an unchanged image (such as the noisy one) while a browser downloads it. The
    browser would then show a broken image.
    """
    return _png(before, folder), _png(after, folder)


def _png(image: np.ndarray, folder: Path) -> str:
    path = folder / f"{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
    if not path.exists():
        Image.fromarray(image).save(path, compress_level=1)
    return str(path)


def remove_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def read_controls(path: str | None, values: Sequence[Any]) -> tuple[Request, str]:
    """Return the request from the controls, in their order on the page, and the label of the model."""
    how, kind, *amounts, seed, steps, label, scale, tolerance, of, langevin, candidates, tile, strength, copies = values
    amount = dict(zip(NOISE_KINDS, amounts, strict=True))[kind]
    size = 0 if tile == OWN_TILES else tile
    if of in get_args(ToleranceOf) and not tolerance:
        of = "first"  # without a tolerance the reference has no meaning
    noise = "none" if how == NOISY_ALREADY else kind
    values = (noise, amount, seed, steps, label, scale, tolerance, langevin, candidates, size, of, strength, copies)
    return api_request(path, *values)


def api_request(
    path,
    noise,
    amount,
    seed,
    steps,
    label,
    scale,
    tolerance,
    langevin,
    candidates,
    tile,
    tolerance_of="first",
    strength=1.0,
    self_ensemble=1,
) -> tuple[Request, str]:
    """Check the inputs of an endpoint and return the request and the label of the model."""
    if not path:
        raise gr.Error("Upload an image or select an example first.", title="No image", print_exception=False)
    try:
        request = Request(
            path=path,
            noise=None if noise == "none" else Noise(kind=noise, amount=float(amount)),
            seed=whole(seed or 0, "seed", 0, MAX_SEED),
            num_steps=whole(steps, "steps", 1, MAX_STEPS),
            step_size_scale=float(scale),
            tolerance=float(tolerance) or None,
            tolerance_of=tolerance_of,
            langevin_std=float(langevin),
            num_candidates=whole(candidates, "candidates", 1, MAX_CANDIDATES),
            tile_size=whole(tile, "tile", 16, 512) if tile else None,
            strength=float(strength),
            self_ensemble=whole(self_ensemble, "self_ensemble", 1, max(SELF_ENSEMBLES)),
        )
        request.options()
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error), title="Error", print_exception=False) from None
    return request, label


def whole(value: Any, name: str, low: int, high: int) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError(f"{name}={value} is not a whole number; use {low}..{high}")
    if not low <= number <= high:
        raise ValueError(f"{name}={value} is out of range; use {low}..{high}")
    return int(number)


def friendly(error: BaseException, path: str) -> str:
    """Return the error message for a visitor, without folders of the server."""
    if isinstance(error, MemoryError):
        return "There is not enough memory for this image; try a smaller one."
    return str(error).replace(str(Path(path).parent) + os.sep, "")
