"""Denoise with one model and report every step. This module does not depend on the page."""

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
"""Images with more pixels show the steps of a close-up only, because images of all steps would not fit into memory."""
CLOSE_UP, PREVIEW = 256, 640
"""Longest sides in pixels of the close-up and of the preview."""
PREVIEW_SECONDS, PREVIEW_SHARE = 0.5, 0.1
"""For a large image: the minimum seconds between previews, and the maximum fraction of the time for previews."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The progress of the work."""

    before: np.ndarray
    """The noisy image, downscaled, uint8 (h, w, 3)."""
    after: np.ndarray
    """The image so far, downscaled, uint8 (h, w, 3)."""
    energies: list[float]
    """Mean energy per patch before the first and after every step so far."""
    psnrs: list[float]
    """PSNR in dB before the first and after every step so far; only the last PSNR if the image is in tiles. Empty if the clean
    image is not known."""
    step: int
    share: float
    """Fraction of the work that is done, in 0..1."""
    seconds: float
    words: str
    """The current part of the work; empty for the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A candidate of self-verification."""

    energy: float
    image: np.ndarray
    psnrs: list[float]
    wins: int
    """Number of tiles that kept this candidate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The steps of thinking on the whole image or the close-up: one entry for the start and for each step."""

    frames: list[np.ndarray]
    energies: list[float]
    psnrs: list[float]
    candidates: list[Candidate]
    heat: np.ndarray | None
    """For each pixel of the last frame, the energy of its patch, float32 (h, w)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The final result for the page."""

    before: np.ndarray
    """The noisy image, uint8 (H, W, 3)."""
    after: np.ndarray
    """The denoised image, uint8 (H, W, 3)."""
    file: ImageFile
    """The denoised image with the metadata of the input file."""
    energies: list[float]
    """Energies of the whole image; empty for a model without an energy."""
    psnrs: list[float]
    """PSNR of the whole image before and after; empty if the clean image is not known."""
    steps: Steps
    num_steps: int
    num_forward: int
    seconds: float
    stopped: bool
    note: str = ""


def think_aloud(request: Request, denoiser: Denoiser, stop: threading.Event) -> Iterator[Update | Answer]:
    """Denoise and yield Updates, then the Answer. If `stop` is set, the Answer follows after the current step.

    Raises ValueError (including ImageFileError), OSError and ThinkingError with a message for the visitor.
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
        # First denoise the middle and keep every step; then the whole image, whose steps would not fit into memory.
        view = source.middle(CLOSE_UP)
        words = f"first a close-up of the middle {CLOSE_UP}×{CLOSE_UP} pixels"
        note = f"The steps, the map and the candidates show only the middle {CLOSE_UP}×{CLOSE_UP} pixels."
        reporter = _Reporter(view, stop, post, words, request.self_ensemble > 1)
        seen = denoise_tiled(denoiser, view.noisy, kept, tile_size=request.tile_size, on_step=reporter)
    else:
        shown = kept
    if large and stop.is_set():
        after, whole = source.noisy.clamp(0, 1), seen
        note = f"Stopped before the whole image was started. {note}"
    else:
        reporter = _Reporter(source, stop, post, "", request.self_ensemble > 1)
        whole = denoise_tiled(denoiser, source.noisy, shown, tile_size=request.tile_size, on_step=reporter)
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
    """Receive the steps of an image and post Updates: for every step of a small image, at intervals for a large one."""

    def __init__(self, source: Source, stop: threading.Event, post: Callable[[Update], None], words: str, copies: bool):
        self.source, self.stop, self.post, self.words = source, stop, post, words
        self.candidate = "copy" if copies else "candidate"
        self.before = to_bytes(reduced(source.noisy, PREVIEW))
        self.start = time.perf_counter()
        self.next = 0.0
        self.energies: dict[int, list[float]] = {}  # step -> [sum over tiles, number of tiles]
        self.psnrs: list[float] = []

    def __call__(self, step: TiledStep) -> bool:
        now = time.perf_counter() - self.start
        if step.index == 0 and step.candidate == 0 and step.tiles_now == step.num_tiles:
            self.energies, self.psnrs = {}, []  # a strength above 1 runs thinking twice
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
                    words=self.words or _tiles(step, self.candidate),
                )
            )
            done = time.perf_counter() - self.start
            self.next = done + max(PREVIEW_SECONDS, (done - now) / PREVIEW_SHARE)
        return self.stop.is_set()


def _tiles(step: TiledStep, candidate: str) -> str:
    candidate = f"{candidate} {step.candidate + 1} of {step.num_candidates}" if step.num_candidates > 1 else ""
    tiles = f"{step.tiles_done} of {step.num_tiles} tiles done" if step.tiles_now < step.num_tiles else ""
    return ", ".join(part for part in (candidate, tiles) if part)


def _steps(result: DenoiseResult, view: Source, denoiser: Denoiser, request: Request) -> Steps:
    count = int(result.num_steps[0]) + 1
    images = [view.noisy, *(result.trajectory or (view.noisy, result.image))[1:count]]  # the start is shown as the noisy image
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
