"""What the page computes: read an image, add noise, think aloud step by step, compare methods. It knows no page."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ebt_vision.classical import estimate_sigma
from ebt_vision.denoiser import DenoiseOptions, Denoiser, DenoiseResult
from ebt_vision.image_files import ImageFile, ImageFileError, quantise, read_image
from ebt_vision.metrics import mse, psnr_from_mse
from ebt_vision.noise import Noise, suited
from ebt_vision.tiling import TiledStep, denoise_tiled, energy_map_tiled, num_tiles

MAX_PIXELS = 24_000_000
MAX_BYTES = 100 * 2**20
CLOSE_UP_ABOVE = 1_000_000
"""Pixels above which the steps are shown of a close-up: an image of every step of the whole would not fit into memory."""
CLOSE_UP, COMPARED, PREVIEW = 256, 512, 640
"""Longest sides in pixels of the close-up, of what is compared, and of the image while it is worked on."""
PREVIEW_SECONDS, PREVIEW_SHARE = 0.5, 0.1
"""Of a large image: the least time between previews, and how much of all time they may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a visitor asks for."""

    path: str
    noise: Noise | None = None
    """Noise to add first; None for a photograph that is noisy already."""
    seed: int = 0
    num_steps: int = 4
    step_size_scale: float = 1.0
    tolerance: float | None = None
    langevin_std: float = 0.0
    num_candidates: int = 1
    tile_size: int | None = None
    """None for the model's own."""

    def options(self) -> DenoiseOptions:
        """The same for a denoiser; ValueError for what is out of range."""
        return DenoiseOptions(
            num_steps=self.num_steps,
            num_candidates=self.num_candidates,
            tolerance=self.tolerance,
            langevin_std=self.langevin_std,
            step_size_scale=self.step_size_scale,
            seed=self.seed,
            sigma=None if self.noise is None else self.noise.sigma,
            noise_level=None if self.noise is None else self.noise.noise_level,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An image that was read, and what is to be denoised; both (1, 3, H, W), about [0, 1]."""

    file: ImageFile
    noisy: Tensor
    clean: Tensor | None
    """None where it is not known."""

    def middle(self, side: int) -> Source:
        """The middle `side` x `side` pixels of it, or what there is."""
        top, left = (max(length - side, 0) // 2 for length in self.noisy.shape[-2:])
        cut = (..., slice(top, top + side), slice(left, left + side))
        return replace(self, noisy=self.noisy[cut], clean=None if self.clean is None else self.clean[cut])

    def psnr(self, image: Tensor) -> list[float]:
        """PSNR in dB of an image (1, 3, H, W), clipped, as a list of one; empty if the clean image is not known."""
        if self.clean is None:
            return []
        rows = zip(image.clamp(0, 1).split(256, -2), self.clean.split(256, -2), strict=True)  # they become float64
        errors = torch.stack([mse(part, known)[0] * known.numel() for part, known in rows])
        return [float(psnr_from_mse(errors.sum() / self.clean.numel(), data_range=1.0))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """How far the work is."""

    before: np.ndarray
    """The noisy image, small, uint8 (h, w, 3)."""
    after: np.ndarray
    """The image so far, alike."""
    energies: list[float]
    """Mean energy per patch before the first and after every step so far."""
    psnrs: list[float]
    """PSNR in dB, alike, if the clean image is known and the image is worked on in one piece; else the last one or none."""
    step: int
    share: float
    """Of the work that is done, in 0..1."""
    seconds: float
    words: str
    """What is being worked on; empty for the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One of the candidates of self-verification."""

    energy: float
    image: np.ndarray
    psnrs: list[float]
    wins: int
    """Tiles that kept it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """How thinking went, of the whole image or of the close-up: an entry for the start and for each step."""

    frames: list[np.ndarray]
    energies: list[float]
    psnrs: list[float]
    candidates: list[Candidate]
    heat: np.ndarray | None
    """Energy of the patch that each pixel of the last frame lies in, float32 (h, w)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the page shows."""

    before: np.ndarray
    """The noisy image, uint8 (H, W, 3)."""
    after: np.ndarray
    """The denoised image, uint8 (H, W, 3)."""
    file: ImageFile
    """The denoised image to be written."""
    energies: list[float]
    """Of the whole image; empty for a model without an energy."""
    psnrs: list[float]
    """Of the whole image before and after; empty if the clean one is not known."""
    steps: Steps
    num_steps: int
    num_forward: int
    seconds: float
    stopped: bool
    note: str = ""


def open_source(request: Request) -> Source:
    """Read an image and add noise. ImageFileError for a file that is no image or too large, ValueError for a bad amount."""
    path = Path(request.path)
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ImageFileError(f"{path} has more than {MAX_BYTES >> 20} MB; use the command line for it")
    _check_size(path)
    file = read_image(path)
    image = file.pixels[None]
    if image.shape[-2] * image.shape[-1] > MAX_PIXELS:
        raise _too_large(path, image.shape[-1], image.shape[-2])
    if request.noise is None:
        return Source(file=file, noisy=image, clean=None)
    return Source(file=file, noisy=request.noise.add(image, request.seed), clean=image)


def _check_size(path: Path) -> None:
    """Refuse by the header what would take a long time to decode; whatever else is wrong is read_image's to tell."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # on damaged bytes Pillow raises nearly anything
        return
    if width * height > MAX_PIXELS:
        raise _too_large(path, width, height)


def _too_large(path: Path, width: int, height: int) -> ImageFileError:
    return ImageFileError(
        f"{path} is {width}x{height} pixels; this page takes {MAX_PIXELS // 10**6} megapixels, the command line more"
    )


def estimate(path: str) -> float:
    """The standard deviation of the noise of a photograph, 0..255 units, from its middle 512 x 512 pixels."""
    return estimate_sigma(open_source(Request(path=path)).middle(512).noisy)[0]


def think_aloud(request: Request, denoiser: Denoiser, stop: threading.Event) -> Iterator[Update | Answer]:
    """Denoise; yields Updates while it goes on, and the Answer at last. Once `stop` is set the answer comes after this step.

    Raises ValueError (ImageFileError among them), OSError and ThinkingError with a message for the visitor.
    """

    def work(post: Callable[[Update | Answer], None]) -> Update | Answer:
        return _answer(request, denoiser, stop, post)

    yield from in_thread(work, stop)


def _answer(request: Request, denoiser: Denoiser, stop: threading.Event, post: Callable[[Update], None]) -> Answer:
    options = request.options()
    source = open_source(request)
    start = time.perf_counter()
    denoiser = suited(denoiser, request.noise)
    options = denoiser.resolve_options(source.noisy, options)
    kept = replace(options, keep_trajectory=True, keep_candidates=request.num_candidates > 1)
    height, width = source.noisy.shape[-2:]
    large = height * width > CLOSE_UP_ABOVE
    view, note, shown = source, "", options
    if large:
        # Every step of the middle first, then the whole, whose steps would not fit into memory.
        view = source.middle(CLOSE_UP)
        words = f"first a close-up of the middle {CLOSE_UP}×{CLOSE_UP} pixels"
        note = f"The steps, the map and the candidates are those of the middle {CLOSE_UP}×{CLOSE_UP} pixels."
        reporter = _Reporter(view, stop, post, words)
        seen = denoise_tiled(denoiser, view.noisy, kept, tile_size=request.tile_size, on_step=reporter)
    else:
        shown = kept
    if large and stop.is_set():
        after, whole = source.noisy.clamp(0, 1), seen
        note = f"Stopped before the whole image was begun. {note}"
    else:
        whole = denoise_tiled(
            denoiser, source.noisy, shown, tile_size=request.tile_size, on_step=_Reporter(source, stop, post, "")
        )
        after = whole.image
        seen = seen if large else whole
    seconds = time.perf_counter() - start
    num_steps = int(whole.num_steps[0])
    return Answer(
        before=to_bytes(source.noisy),
        after=to_bytes(after),
        file=source.file.with_pixels(after[0]),
        energies=[] if whole.energies is None else whole.energies[: num_steps + 1, 0].tolist(),
        psnrs=source.psnr(source.noisy) + source.psnr(after),
        steps=_steps(seen, view, denoiser, request),
        num_steps=num_steps,
        num_forward=int(whole.num_forward[0]),
        seconds=seconds,
        stopped=stop.is_set(),
        note=note,
    )


class _Reporter:
    """Hears of the steps of an image, and posts what a visitor should see of them: all of a small one, some of a large one."""

    def __init__(self, source: Source, stop: threading.Event, post: Callable[[Update], None], words: str):
        self.source, self.stop, self.post, self.words = source, stop, post, words
        self.before = to_bytes(reduced(source.noisy, PREVIEW))
        self.start = time.perf_counter()
        self.next = 0.0
        self.energies: dict[int, list[float]] = {}  # step -> its sum over tiles, their number
        self.psnrs: list[float] = []

    def __call__(self, step: TiledStep) -> bool:
        now = time.perf_counter() - self.start
        if step.energy is not None and step.candidate == 0:
            total = self.energies.setdefault(step.index, [0.0, 0.0])
            total[0] += step.energy * step.tiles_now
            total[1] += step.tiles_now
        every = step.tiles_now == step.num_tiles and step.candidate == 0
        if every or now >= self.next:
            image = step.image()
            found = self.source.psnr(self.source.noisy if step.index == 0 and every else image)
            self.psnrs = self.psnrs + found if every else found
            self.post(
                Update(
                    before=self.before,
                    after=to_bytes(reduced(image, PREVIEW)),
                    energies=[total / count for total, count in self.energies.values()],
                    psnrs=list(self.psnrs),
                    step=step.index,
                    share=step.share_done,
                    seconds=now,
                    words=self.words or _tiles(step),
                )
            )
            done = time.perf_counter() - self.start
            self.next = done + max(PREVIEW_SECONDS, (done - now) / PREVIEW_SHARE)
        return self.stop.is_set()


def _tiles(step: TiledStep) -> str:
    candidate = f"candidate {step.candidate + 1} of {step.num_candidates}" if step.num_candidates > 1 else ""
    tiles = f"{step.tiles_done} of {step.num_tiles} tiles done" if step.tiles_now < step.num_tiles else ""
    return ", ".join(part for part in (candidate, tiles) if part)


def _steps(result: DenoiseResult, view: Source, denoiser: Denoiser, request: Request) -> Steps:
    count = int(result.num_steps[0]) + 1
    images = [view.noisy, *(result.trajectory or (view.noisy, result.image))[1:count]]  # the start as it is seen
    images[-1] = result.image if count > 1 else images[-1]
    heat = energy_map_tiled(denoiser, result.image, view.noisy, tile_size=request.tile_size)
    return Steps(
        frames=[to_bytes(image) for image in images],
        energies=[] if result.energies is None else result.energies[:count, 0].tolist(),
        psnrs=[value for image in images for value in view.psnr(image)],
        candidates=_candidates(result, view),
        heat=None if heat is None else heat.cpu().numpy(),
    )


def _candidates(result: DenoiseResult, view: Source) -> list[Candidate]:
    if result.candidate_images is None or result.candidate_energies is None or result.candidate_wins is None:
        return []
    found = zip(
        result.candidate_energies[:, 0].tolist(), result.candidate_images, result.candidate_wins[:, 0].tolist(), strict=False
    )
    return [
        Candidate(energy=energy, image=to_bytes(image), psnrs=view.psnr(image), wins=int(wins)) for energy, image, wins in found
    ]


# --- Compare


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One method on the image that all were given."""

    name: str
    image: np.ndarray | None = None
    """uint8 (h, w, 3)."""
    psnrs: list[float] = field(default_factory=list)
    num_forward: int | None = None
    """Passes through the network for each tile; None for a method without one."""
    seconds: float | None = None
    problem: str = ""


def compare(request: Request, methods: dict[str, Callable[[], Denoiser]], stop: threading.Event) -> Iterator[list[Column]]:
    """The columns so far, the noisy image first: each method {name: how to load it} on the same middle of the image.

    Every method takes the request's steps, the regressor one. A method that cannot be loaded or run says why.
    """
    options = request.options()
    source = open_source(request).middle(COMPARED)
    columns = [Column(name="Noisy", image=to_bytes(source.noisy), psnrs=source.psnr(source.noisy))]
    yield columns
    for name, load in methods.items():
        if stop.is_set():
            return
        yield [*columns, Column(name=name, problem="working …")]
        work = functools.partial(_column, name, load, source, options, request, stop)
        (column,) = in_thread(work, stop, own=False)
        columns = [*columns, column]
        yield columns


def _column(
    name: str,
    load: Callable[[], Denoiser],
    source: Source,
    options: DenoiseOptions,
    request: Request,
    stop: threading.Event,
    post: Callable[[Column], None],
) -> Column:
    try:
        denoiser = suited(load(), request.noise)
        if "regressor" in name.lower():
            options = replace(options, num_steps=1)
        start = time.perf_counter()
        result = denoise_tiled(denoiser, source.noisy, options, tile_size=request.tile_size, on_step=lambda step: stop.is_set())
    except (ValueError, OSError, RuntimeError) as error:
        return Column(name=name, problem=str(error))
    height, width = source.noisy.shape[-2:]
    tiles = num_tiles(height, width, request.tile_size or denoiser.tile_size)
    return Column(
        name=name,
        image=to_bytes(result.image),
        psnrs=source.psnr(result.image),
        num_forward=round(int(result.num_forward[0]) / tiles) if denoiser.num_parameters else None,
        seconds=time.perf_counter() - start,
        problem="stopped" if stop.is_set() else "",
    )


# --- Shared

T = TypeVar("T")


def in_thread(work: Callable[[Callable[[T], None]], T], stop: threading.Event, *, own: bool = True) -> Iterator[T]:
    """What `work(post)` posts, as it does, and what it returns, last; what it raises is raised here.

    If nobody listens any more, `stop` is set where it is our `own`, and the work is waited for: one at a time on a device.
    """
    posts: queue.SimpleQueue[tuple[str, T | BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            posts.put(("end", work(lambda value: posts.put(("post", value)))))
        except BaseException as error:  # raised again by the listener
            posts.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        kind = "post"
        while kind == "post":
            kind, value = posts.get()
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        if own and thread.is_alive():
            stop.set()
        thread.join()


def to_bytes(images: Tensor) -> np.ndarray:
    """The first of (B, 3, H, W), or (3, H, W), in [0, 1], clipped and rounded, as uint8 (H, W, 3)."""
    image = images[0] if images.ndim == 4 else images
    return np.ascontiguousarray(quantise(image).transpose(1, 2, 0))  # CHW -> HWC


def reduced(images: Tensor, side: int) -> Tensor:
    """(1, 3, H, W), made smaller where its longest side is above `side`."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return F.interpolate(images.clamp(0, 1), size=size, mode="area")


def free_memory() -> None:
    """Give an accelerator's unused memory back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
