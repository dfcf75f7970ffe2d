"""Repair a photograph with a known damage and report every step. This module does not depend on the page."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from apps.background import in_thread
from apps.sources import MAX_PIXELS, read_upload, reduced, to_bytes
from ebt_vision.data.image_files import ImageFile, without_suffix, write_image
from ebt_vision.denoising.base import Denoiser
from ebt_vision.restoration.files import DamagedFile, jpeg_file, read_mask, transparent_file
from ebt_vision.restoration.likelihoods import (
    Convolution,
    Downsampling,
    Mask,
    check_mask_size,
    disk_kernel,
    gaussian_kernel,
    motion_kernel,
)
from ebt_vision.restoration.options import RestoreOptions, RestoreStep
from ebt_vision.restoration.restore import restore

Damage = Literal["holes", "gaussian", "motion", "disk", "enlarge", "jpeg"]
MAX_FILLINGS = 4
FRAME = 512
"""Longest side in pixels of the image of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairRequest:
    """What a visitor wants to be repaired."""

    path: str
    damage: Damage
    painted: Tensor | None = None
    """bool (h, w), True where the visitor painted, on a view of the photograph of any size."""
    mask: str | None = None
    """File of a mask, white where pixels are missing; it is used together with what is painted."""
    size: float = 1.6
    """Standard deviation, length or radius of the blur, in pixels."""
    angle: float = 0.0
    """Direction of the motion in degrees, counter-clockwise from the right."""
    noise: float | None = None
    """Noise of a blurred photograph, in 0..255 units; None estimates it."""
    scale: int = 2
    seed: int = 0
    num_fillings: int = 1
    """Fillings of the holes, with seeds `seed`, `seed` + 1 ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The image after a step."""

    image: np.ndarray
    """Downscaled to FRAME, uint8 (h, w, 3)."""
    energy: float | None
    """Mean over patches of what the network was shown, with its noise; None for a model without an energy."""
    likelihood: float
    """Half the squared distance to the photograph, mean over its values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The work so far."""

    before: np.ndarray
    """The photograph, of the size of the frames."""
    frames: list[Frame]
    num_steps: int
    filling: int
    num_fillings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """The result for one seed."""

    seed: int
    path: Path
    """The restored image as a PNG file, with the metadata of the photograph."""
    frames: list[Frame]
    num_forward: int

    @property
    def energy(self) -> float | None:
        """The energy at the last step."""
        return self.frames[-1].energy if self.frames else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """The final result for the page."""

    before: np.ndarray
    """The photograph, uint8 (H, W, 3), enlarged like the result."""
    fillings: list[Filling]
    """The lowest energy first."""
    seconds: float
    stopped: bool


def repair(request: RepairRequest, denoiser: Denoiser, stop: threading.Event, folder: Path) -> Iterator[Progress | Repaired]:
    """Yield the Progress after every step, then Repaired, with its files in `folder`.

    If `stop` is set, Repaired follows after the current step. Raises ValueError (including ImageFileError), OSError and
    ThinkingError with a message for the visitor.
    """

    def work(post: Callable[[Progress | Repaired], None]) -> Progress | Repaired:
        return _repaired(request, denoiser, stop, post, folder)

    yield from in_thread(work, stop)


def _repaired(
    request: RepairRequest,
    denoiser: Denoiser,
    stop: threading.Event,
    post: Callable[[Progress], None],
    folder: Path,
) -> Repaired:
    start = time.perf_counter()
    damaged = damaged_file(request)
    count = request.num_fillings if request.damage == "holes" else 1
    fillings: list[Filling] = []
    for index in range(count):
        if stop.is_set() and fillings:
            break
        fillings.append(_filling(request, damaged, denoiser, stop, post, folder, index, count))
    if all(filling.energy is not None for filling in fillings):
        fillings.sort(key=lambda filling: filling.energy or 0.0)
    shown = damaged.image.visible_pixels()
    scale = request.scale if request.damage == "enlarge" else 1
    return Repaired(
        before=to_bytes(_of_size(shown, (scale * shown.shape[-2], scale * shown.shape[-1]))),
        fillings=fillings,
        seconds=time.perf_counter() - start,
        stopped=stop.is_set(),
    )


def _filling(
    request: RepairRequest,
    damaged: DamagedFile,
    denoiser: Denoiser,
    stop: threading.Event,
    post: Callable[[Progress], None],
    folder: Path,
    index: int,
    count: int,
) -> Filling:
    # One run, so that the curve of the energies is one descent.
    options = RestoreOptions(seed=request.seed + index, noise=request.noise if _is_blur(request) else None, num_runs=1)
    frames: list[Frame] = []
    before: list[np.ndarray] = []

    def listen(step: RestoreStep) -> bool:
        image = damaged.upright(reduced(step.image, FRAME))
        if not before:
            before.append(to_bytes(_of_size(damaged.image.visible_pixels(), image.shape[-2:])))
        frames.append(Frame(image=to_bytes(image), energy=step.energy, likelihood=step.likelihood))
        post(Progress(before=before[0], frames=list(frames), num_steps=step.num_steps, filling=index, num_fillings=count))
        return stop.is_set()

    result = restore(damaged.observed(), damaged.likelihood, options, denoiser=denoiser, callback=listen)
    name = f"{without_suffix(Path(request.path)).name}-repaired" + (f"-{options.seed}" if count > 1 else "")
    write_image(folder / f"{name}.png", damaged.with_result(result.image[0].cpu()))
    return Filling(seed=options.seed, path=folder / f"{name}.png", frames=frames, num_forward=result.num_forward)


def _of_size(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """(3, H, W) enlarged or reduced to this size (h, w)."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    smaller = pixels.shape[-2] > size[0]
    mode = "area" if smaller else "bicubic"
    return torch.nn.functional.interpolate(pixels[None], size=tuple(size), mode=mode)[0]


def _is_blur(request: RepairRequest) -> bool:
    return request.damage in ("gaussian", "motion", "disk")


def damaged_file(request: RepairRequest) -> DamagedFile:
    """Read the photograph with its damage. Raises ValueError, in one line, for what does not fit together."""
    path = Path(request.path)
    image = read_upload(path)
    if request.damage == "holes":
        return _with_holes(image, request)
    if request.damage == "jpeg":
        return jpeg_file(image, path)
    if request.damage == "enlarge":
        pixels = image.pixels.shape[-2] * image.pixels.shape[-1] * request.scale**2
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"scale={request.scale} makes {pixels / 1e6:.0f} megapixels; this page makes up to {MAX_PIXELS // 10**6}; "
                "use a smaller photograph, or the command line"
            )
        return DamagedFile(image=image, likelihood=Downsampling(request.scale))
    if request.damage == "motion":
        return DamagedFile(image=image, likelihood=Convolution(motion_kernel(request.size, request.angle)))
    kernel = gaussian_kernel if request.damage == "gaussian" else disk_kernel
    return DamagedFile(image=image, likelihood=Convolution(kernel(request.size)))


def _with_holes(image: ImageFile, request: RepairRequest) -> DamagedFile:
    size = (image.pixels.shape[-2], image.pixels.shape[-1])
    missing = torch.zeros(size, dtype=torch.bool)
    if request.mask is not None:
        known = read_mask(Path(request.mask), MAX_PIXELS)
        check_mask_size(known, missing)
        missing |= ~known
    if request.painted is not None and bool(request.painted.any()):
        missing |= enlarged(request.painted, size)
    if bool(missing.any()):
        if bool(missing.all()):
            raise ValueError("The whole photograph is marked as missing; leave some of it, to fill in from")
        return DamagedFile(image=image, likelihood=Mask(~missing))
    if image.alpha is not None and bool((image.alpha == 0).any()):
        return transparent_file(image, Path(request.path))
    raise ValueError("No pixels are missing; paint over what is to go, or give a mask that shows it in white")


def enlarged(painted: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (h, w), bool, as one of `size` (H, W): True where a pixel of the result meets a painted one."""
    for dim, side in enumerate(size):
        small = painted.shape[dim]
        if small != side:
            at = torch.arange(side)
            first, last = at * small // side, ((at + 1) * small - 1) // side
            # The pixels first..last of the small mask, by cumulative counts.
            counts = torch.cat([torch.zeros_like(painted.narrow(dim, 0, 1), dtype=torch.int32), painted.cumsum(dim).int()], dim)
            painted = counts.index_select(dim, last + 1) > counts.index_select(dim, first)
    return painted
