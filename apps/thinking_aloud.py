"""What the page computes of one model: it thinks aloud, step by step. It knows no page."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from apps.background import in_thread
from apps.sources import Request, Source, open_source, reduced, to_bytes
from ebt_vision.data.image_files import ImageFile
from ebt_vision.denoising.base import Denoiser, adapt_to_noise
from ebt_vision.denoising.results import DenoiseResult
from ebt_vision.denoising.tiling import TiledStep, denoise_tiled, energy_map_tiled

CLOSE_UP_ABOVE = 1_000_000
"""Pixels above which the steps are shown of a close-up: an image of every step of the whole would not fit into memory."""
CLOSE_UP, PREVIEW = 256, 640
"""Longest sides in pixels of the close-up, and of the image while it is worked on."""
PREVIEW_SECONDS, PREVIEW_SHARE = 0.5, 0.1
"""Of a large image: the least time between previews, and how much of all time they may take."""


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
    denoiser = adapt_to_noise(denoiser, request.noise)
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
        if step.index == 0 and step.candidate == 0 and step.tiles_now == step.num_tiles:
            self.energies, self.psnrs = {}, []  # a strength above 1 thinks twice
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
