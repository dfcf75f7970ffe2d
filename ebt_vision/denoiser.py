"""One interface over every way to denoise: EBT, DiT, the regressor, classical methods.

Images are float RGB (B, 3, H, W) in [0, 1]; noise may carry them outside, and they are clipped on the way out only.
The implementations are in model_denoisers.py and classical.py; `load_denoiser` finds them by name.
"""

import contextlib
import copy
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.checks import check, check_number, check_whole
from ebt_vision.corruption import signal_and_noise_scale
from ebt_vision.precision import Precision
from ebt_vision.thinking import ToleranceOf

MIN_SIDE = 8
"""Pixels; smaller images hold nothing to denoise by."""
STARTS = ("observation", "proposal")
MAX_STRENGTH = 1.5
MAX_VALUE = 16.0
"""Values of an image beyond this are no noise on [0, 1]: Gaussian noise of sigma 255 stays below 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseOptions:
    """What to do with an image; a denoiser reads the fields that it has a use for."""

    num_steps: int = 1
    """EBT: thinking steps, the proposal included. Regressor: applications. DiT: passes of DDIM, or loops of the recursion."""
    start: Literal["observation", "proposal"] | None = None
    """EBT: think from the noisy image, or from the proposal N(x), which then is the first step; None: as the model suggests."""
    strength: float = 1.0
    """How much of the noise that was found is removed, 0..1.5. Below 1 the result is the minimum of the energy around the
    denoised image plus (1 - strength) / (2 * strength) * |y - x|^2, which keeps grain: 0 gives the image x back. Above 1 the
    network is shown the noise that it found, `strength` times as strong, and denoises that: a second run, for what is left."""
    num_candidates: int = 1
    """EBT: think from so many starts and keep the image of lowest energy (self-verification)."""
    candidate_noise_std: float = 0.1
    """EBT: standard deviation, on [-1, 1], of the noise added to every start but the first."""
    tolerance: float | None = None
    """EBT: a sample stops once a step gains no more than this share of what its first step did (see ThinkingConfig)."""
    tolerance_of: ToleranceOf = "first"
    """EBT: what that is a share of: the gain of the first step, the previous one, or a first step at the training's noise, or
    the energy of the noisy image."""
    langevin_std: float = 0.0
    """EBT: noise added to the candidate before each gradient, on [-1, 1]."""
    step_size_scale: float = 1.0
    """EBT: factor on the learned step size."""
    seed: int = 0
    """All randomness depends on it and on the image's id."""
    noise_level: float | None = None
    """The VP noise level in (0, 1] of images that the VP process made. A DiT starts there; it takes precedence over `sigma`."""
    sigma: float | None = None
    """Classical, and DiT without a noise_level: AWGN standard deviation in 0..255 units; None estimates it from the image."""
    tile_size: int | None = None
    """Side in pixels of the tiles of larger images: None for the denoiser's own, 0 for the whole image in one piece."""
    keep_trajectory: bool = False
    """Keep the image before the first and after every step."""
    keep_candidates: bool = False
    """EBT: keep the final image of every candidate, not of the winner alone."""

    def __post_init__(self) -> None:
        self._check_kinds()
        check(self.num_steps >= 1, "num_steps", self.num_steps, "use 1 or more")
        check(self.start in (None, *STARTS), "start", self.start, f"use one of {STARTS}, or None")
        check(0 <= self.strength <= MAX_STRENGTH, "strength", self.strength, f"use 0 (off) to {MAX_STRENGTH:g}; 1 is normal")
        check(self.num_candidates >= 1, "num_candidates", self.num_candidates, "use 1 (plain thinking) or more")
        check(self.candidate_noise_std >= 0, "candidate_noise_std", self.candidate_noise_std, "use 0 or more")
        check(self.tolerance is None or self.tolerance >= 0, "tolerance", self.tolerance, "use 0 or more, or None")
        check(
            self.tolerance_of in get_args(ToleranceOf), "tolerance_of", self.tolerance_of, f"use one of {get_args(ToleranceOf)}"
        )
        if self.tolerance is None and self.tolerance_of != "first":
            raise ValueError(f"tolerance_of={self.tolerance_of!r} has no effect without a tolerance; give one, or leave it out")
        check(self.langevin_std >= 0, "langevin_std", self.langevin_std, "use 0 (off) or more")
        check(self.step_size_scale > 0, "step_size_scale", self.step_size_scale, "use a positive number")
        check(self.seed >= 0, "seed", self.seed, "use 0 or more")
        level = self.noise_level
        check(level is None or 0 < level <= 1, "noise_level", level, "use a number in (0, 1], or None")
        check(self.sigma is None or 0 <= self.sigma <= 255, "sigma", self.sigma, "use 0..255, or None to estimate it")
        size = self.tile_size
        remedy = f"use {MIN_SIDE} or more, 0 for the whole image, or None for the denoiser's own"
        check(size is None or size == 0 or size >= MIN_SIDE, "tile_size", size, remedy)

    def _check_kinds(self) -> None:
        for name in ("num_steps", "num_candidates", "seed", "tile_size"):
            if getattr(self, name) is not None or name != "tile_size":
                check_whole(name, getattr(self, name))
        for name in ("strength", "candidate_noise_std", "langevin_std", "step_size_scale"):
            check_number(name, getattr(self, name))
        for name in ("tolerance", "noise_level", "sigma"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseStep:
    """What a callback sees before the first step (index 0) and after each one."""

    index: int
    num_steps: int
    image: Tensor  # (B, 3, H, W) in [0, 1]
    energies: Tensor | None  # (B,), mean over patches
    candidate: int = 0
    num_candidates: int = 1
    image_index: int = 0
    """Of images in tiles, which take turns: the place in the batch of the one that `image` (1, 3, H, W) and `energies` show."""


Callback = Callable[[DenoiseStep], object]
"""Returning True ends the work there; the image so far is the result. Methods without steps call nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseResult:
    """Denoised images and how they came about. T is options.num_steps, N options.num_candidates."""

    image: Tensor
    """(B, 3, H, W) in [0, 1], clamped."""
    num_steps: Tensor
    """Steps that each image has had, int64 (B,)."""
    num_forward: Tensor
    """Passes through the network spent on each image, over all candidates, int64 (B,); 0 for classical methods."""
    energies: Tensor | None = None
    """Energy before the first and after every step, mean over patches, (T + 1, B); an image that stopped repeats its last."""
    candidate_energies: Tensor | None = None
    """Final energy of every candidate, mean over patches, (N, B)."""
    chosen: Tensor | None = None
    """Which candidate won, int64 (B,)."""
    candidate_images: Tensor | None = None
    """With keep_candidates: the final image of every candidate, (N, B, 3, H, W), like `image`, which is one of them."""
    candidate_wins: Tensor | None = None
    """Of an image in tiles, which choose each for itself: how many each candidate won, int64 (N, B)."""
    trajectory: tuple[Tensor, ...] | None = None
    """With keep_trajectory: the images before the first and after every step, like `image`, which is the last."""


class Denoiser(nn.Module, ABC):
    """Noisy images in, clean images out. The result for an image does not depend on what else is in its batch.

    It is a module: `denoiser(noisy)` is the denoised image, and `to`, `parameters` and `state_dict` are those of the network.
    It stays in eval mode.
    """

    name: str
    num_parameters: int = 0
    tile_size: int = 512
    """Side in pixels of the tiles that large images should be cut into: for a network, its training size."""
    overlap_share: float = 0.25
    """Share of a tile that it has in common with the next one, where nobody gives an overlap."""
    patch_size: int = 1
    """Images are padded to multiples of it."""
    options_used: frozenset[str] = frozenset()
    """The fields of DenoiseOptions about how to denoise that make a difference to it; `seed` is not among them."""
    suggested_steps: int = 4
    """What num_steps is on the command line and the page where nobody asks for a number."""
    suggested_tolerance: float | None = None
    """Default tolerance of the command line and the page where neither steps nor a tolerance is given."""
    suggested_tolerance_of: ToleranceOf = "training"
    """What suggested_tolerance is a share of."""
    starts_from_proposal: bool = False
    """Whether thinking starts from a reconstruction of the image unless somebody says otherwise: see noise_from_energy."""
    input_scale: float | None = 1.0
    """Factor on the image, as -1..1, before a network sees it. None picks it by the options' noise_level: see scale_for."""
    signal_scale: float = 1.0
    """What multiplied the signal in the images that a network was trained on: sqrt(alpha_bar) of the VP process, 1 for AWGN."""

    def denoise(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult:
        """Denoise (B, 3, H, W), float, about [0, 1], never clipped on the way in; sides of 8 px or more, any size.

        Images larger than the tile (options.tile_size, or the denoiser's own) are worked on one after the other, in tiles that
        overlap, as the command line and the page do: see ebt_vision.tiling.denoise_tiled. Options default to
        `suggested_options`. Images of the result have the dtype and the device of `noisy`.

        `image_ids` (B, default all 0) tell apart the random numbers of images: the same id and seed give the same ones
        in whatever batch. A callback hears of each step; of images in tiles see DenoiseStep.image_index.
        Raises ValueError for an image or an option that cannot be used and for an image that is to get a gradient (no graph is
        kept: see thinking.think), and what the method itself raises.
        """
        options = self.options_or_suggested(options)
        check_images(noisy)
        tile_size = self.tile_size if options.tile_size is None else options.tile_size
        if tile_size == 0 or max(noisy.shape[-2:]) <= tile_size:
            return self.denoise_whole(noisy, options, image_ids=image_ids, callback=callback)
        from ebt_vision.tiling import denoise_each_tiled  # which imports this file

        return denoise_each_tiled(self, noisy, options, image_ids=checked_ids(image_ids, len(noisy)), callback=callback)

    def denoise_whole(
        self,
        noisy: Tensor,
        options: DenoiseOptions | None = None,
        *,
        image_ids: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
    ) -> DenoiseResult:
        """The same as `denoise` on whole images (B, 3, H, W), whatever their size.

        A network may do badly far from its training's size.

        Sides that patch_size does not divide are reflect-padded, and the padding is cut off again.
        """
        options = self.options_or_suggested(options)
        check_images(noisy)
        ids = checked_ids(image_ids, len(noisy))
        size, dtype = noisy.shape[-2:], noisy.dtype

        stopped = False

        def on_step(step: DenoiseStep) -> object:
            nonlocal stopped
            told = None if callback is None else callback(replace(step, image=_seen(step.image, size).to(dtype)))
            stopped = stopped or told is True
            return told

        # Thinking takes gradients, which inference mode forbids.
        with torch.inference_mode(False), torch.no_grad(), self.autocast():
            plain = noisy.clone() if noisy.is_inference() else noisy
            padded = self.to_network(pad_to_multiple(working(plain), self.patch_size))
            result = self._denoise(padded, options, ids, on_step)
            if options.strength > 1.0 and not stopped:
                stronger = padded + (options.strength - 1.0) * (padded - result.image.to(padded))
                result = self._denoise(stronger, options, ids, on_step)
            return _weakened(_flat_unchanged(_finished(result, size, plain), plain), plain, options.strength)

    def forward(self, noisy: Tensor, options: DenoiseOptions | None = None) -> Tensor:
        """The denoised images alone, (B, 3, H, W) in [0, 1]: `denoise(noisy, options).image`."""
        return self.denoise(noisy, options).image

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked for: no label is dropped while an image is denoised."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, tile_size={self.tile_size}, patch_size={self.patch_size}"

    def overlap_for(self, tile_size: int) -> int:
        """Pixels that tiles of this side have in common, where nobody gives a number."""
        return int(self.overlap_share * tile_size)

    @property
    def suggested_options(self) -> DenoiseOptions:
        """What the command line uses where nobody asks for steps or a tolerance."""
        tolerance = self.suggested_tolerance
        return DenoiseOptions(
            num_steps=self.suggested_steps,
            tolerance=tolerance,
            tolerance_of="first" if tolerance is None else self.suggested_tolerance_of,
        )

    def options_or_suggested(self, options: DenoiseOptions | None) -> DenoiseOptions:
        """`options`, or the suggested ones for None; ValueError for anything else."""
        if options is None:
            return self.suggested_options
        if not isinstance(options, DenoiseOptions):
            raise ValueError(f"options is a {type(options).__name__}; give DenoiseOptions(num_steps=..., ...) or None")
        return options

    def scale_for(self, options: DenoiseOptions) -> float:
        """The factor on the image, as -1..1, before a network sees it.

        It is input_scale. Where that is None, images are photographs, or made by the VP process if there is a noise_level:
        the scale is then that of for_photographs, or of for_vp_images.
        """
        if self.input_scale is not None:
            return self.input_scale
        level = options.noise_level
        return self.signal_scale if level is None else vp_input_scale(self.signal_scale, level)

    @abstractmethod
    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        """The work itself, on a checked and padded batch, under no_grad; the images of the result need no clamping."""

    def to_network(self, noisy: Tensor) -> Tensor:
        """The images (B, 3, H, W) on the device and in the dtype of the work; results come back on the caller's device."""
        return noisy

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that the network runs in: bfloat16 or nothing."""
        return contextlib.nullcontext()

    def resolve_options(self, noisy: Tensor, options: DenoiseOptions) -> DenoiseOptions:
        """The options with what is estimated from `noisy` (1, 3, H, W) filled in, so that its tiles share one estimate."""
        return options

    def energy_map(self, images: Tensor, noisy: Tensor) -> Tensor | None:
        """Energy of each patch of `images` (B, 3, H, W) in [0, 1], (B, H / patch_size, W / patch_size); None without one.

        `noisy` is what they were made from; the sides must be multiples of patch_size.
        """
        return None

    def activation_bytes(self, height: int, width: int) -> int:
        """About how much memory one image of this size takes while it is worked on."""
        return 64 * 3 * height * width * 4


def _finished(result: DenoiseResult, size: Sequence[int], like: Tensor) -> DenoiseResult:
    """The result with its images cropped, clamped and of the dtype of `like`, all on its device."""
    values = {name: getattr(result, name) for name in DenoiseResult.__slots__}
    on_device = {name: value.to(like.device) for name, value in values.items() if isinstance(value, Tensor)}
    for name in ("image", "candidate_images"):
        if name in on_device:
            on_device[name] = _seen(on_device[name], size).to(like)
    trajectory = result.trajectory and tuple(_seen(image, size).to(like) for image in result.trajectory)
    return replace(result, trajectory=trajectory, **on_device)


def _flat_unchanged(result: DenoiseResult, noisy: Tensor) -> DenoiseResult:
    """The result with images of one constant colour given back as they were: they hold no noise."""
    flat = (noisy.amax((2, 3)) == noisy.amin((2, 3))).all(1)  # (B,)
    if not flat.any():
        return result

    def keep(images: Tensor) -> Tensor:
        return torch.where(flat[:, None, None, None], noisy.clamp(0, 1), images)

    image = keep(result.image)
    candidates = None if result.candidate_images is None else keep(result.candidate_images)
    trajectory = result.trajectory and (*result.trajectory[:-1], image)
    return replace(result, image=image, candidate_images=candidates, trajectory=trajectory)


def _weakened(result: DenoiseResult, noisy: Tensor, strength: float) -> DenoiseResult:
    """The result with a strength below 1: its images moved back towards the noisy ones, (B, 3, H, W)."""
    if strength >= 1.0:
        return result

    def weaken(images: Tensor) -> Tensor:
        return (noisy + strength * (images - noisy)).clamp(0, 1)

    image = weaken(result.image)
    candidates = None if result.candidate_images is None else weaken(result.candidate_images)
    trajectory = result.trajectory and (*result.trajectory[:-1], image)
    return replace(result, image=image, candidate_images=candidates, trajectory=trajectory)


def _seen(images: Tensor, size: Sequence[int]) -> Tensor:
    return crop(images.clamp(0, 1), size)


def working(images: Tensor) -> Tensor:
    """The images, any shape, in float32 or, where they have it, float64, so that sums of tiles are accurate."""
    return images if images.dtype == torch.float64 else images.float()


def join_results(results: Sequence[DenoiseResult]) -> DenoiseResult:
    """One result for images that were worked on one by one; a field that is not there, or not alike, in all of them is None.

    Of trajectories that differ in length the shorter ones repeat their last image.
    """

    def joined(name: str, dim: int) -> Tensor | None:
        values = [getattr(result, name) for result in results]
        if any(value is None for value in values) or (dim and len({len(value) for value in values}) > 1):
            return None
        return torch.cat(values, dim=dim)

    image, num_steps, num_forward = (joined(name, 0) for name in ("image", "num_steps", "num_forward"))
    assert image is not None and num_steps is not None and num_forward is not None
    trajectories = [result.trajectory or () for result in results]
    count = max(map(len, trajectories)) if all(trajectories) else 0
    padded = [images + images[-1:] * (count - len(images)) for images in trajectories] if count else []
    return DenoiseResult(
        image=image,
        num_steps=num_steps,
        num_forward=num_forward,
        energies=joined("energies", 1),
        candidate_energies=joined("candidate_energies", 1),
        chosen=joined("chosen", 0),
        candidate_images=joined("candidate_images", 1),
        candidate_wins=joined("candidate_wins", 1),
        trajectory=tuple(torch.cat(images) for images in zip(*padded, strict=True)) or None,
    )


class IdentityDenoiser(Denoiser):
    """Gives the image back, clamped: the "noisy input" row of a table."""

    name = "identity"

    def _denoise(self, noisy: Tensor, options: DenoiseOptions, image_ids: list[int], callback: Callback) -> DenoiseResult:
        return no_network_result(noisy.clone(), noisy, options)


def noise_from_energy(energy: float, patch_size: int) -> float:
    """The standard deviation of the noise that a model sees in an image, in 0..255 units: sqrt(2 E / (3 p^2)) * 127.5.

    `energy` is E(x) = |x - N(x)|^2 / 2 of the noisy RGB image x on [-1, 1], mean over patches of side p = `patch_size`.
    It holds for a model whose N(x) is an honest reconstruction: one that thinks from its proposal. ValueError below 0.
    """
    check(energy >= 0, "energy", energy, "use the first energy of a quadratic head, which is 0 or more")
    check(patch_size >= 1, "patch_size", patch_size, "use 1 or more")
    return math.sqrt(2.0 * energy / (3 * patch_size**2)) * 127.5


def no_network_result(image: Tensor, noisy: Tensor, options: DenoiseOptions) -> DenoiseResult:
    """The result (B, 3, H, W) of a method in one step without a network or an energy."""
    ones = torch.ones(len(noisy), dtype=torch.int64, device=noisy.device)
    trajectory = (noisy, *[image] * options.num_steps) if options.keep_trajectory else None
    return DenoiseResult(image=image, num_steps=ones, num_forward=torch.zeros_like(ones), trajectory=trajectory)


TRAINING_LEVEL = 0.1
"""The VP noise level that the project's models of that process are trained at."""


def for_photographs(denoiser: Denoiser) -> Denoiser:
    """A copy for images with ordinary noise: a network trained on the VP process gets them through its signal scale."""
    denoiser = copy.copy(denoiser)
    denoiser.input_scale = denoiser.signal_scale
    return denoiser


def for_vp_images(denoiser: Denoiser, level: float) -> Denoiser:
    """A copy for images that the VP process made: a network trained on it gets them as they are, others at full signal."""
    denoiser = copy.copy(denoiser)
    denoiser.input_scale = vp_input_scale(denoiser.signal_scale, level)
    return denoiser


def vp_input_scale(signal_scale: float, level: float) -> float:
    """The factor on images that the VP process made at this level, for a network whose training had this signal scale."""
    return 1.0 / signal_and_noise_scale(level)[0] if signal_scale == 1.0 else 1.0


def check_images(noisy: Tensor) -> None:
    """ValueError, in one line, unless `noisy` is a finite float (B, 3, H, W), about [0, 1], with sides of at least MIN_SIDE.

    Denoising keeps no graph, so a `noisy` that is to get a gradient is refused too.
    """
    if not isinstance(noisy, Tensor):
        raise ValueError(f"noisy is a {_kind(noisy)}, not a torch.Tensor; {_TO_TENSOR}")
    if noisy.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "noisy requires a gradient, which a denoiser does not pass on; use thinking.think with create_graph=True, "
            "differentiate_start=True and ThinkingConfig(detach_between_steps=False), or noisy.detach()"
        )
    if noisy.ndim != 4:
        raise ValueError(f"noisy has shape {tuple(noisy.shape)}; give (B, 3, H, W), with noisy[None] for one image")
    if not noisy.is_floating_point():
        raise ValueError(f"noisy has dtype {noisy.dtype}; give floats in [0, 1], for 8-bit values image / 255")
    if noisy.shape[0] < 1:
        raise ValueError("noisy is an empty batch; give at least one image")
    if noisy.shape[1] != 3:
        raise ValueError(f"noisy has {noisy.shape[1]} channels; give RGB, (B, 3, H, W)")
    if min(noisy.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"noisy is {noisy.shape[-2]}x{noisy.shape[-1]} px; both sides must be {MIN_SIDE} px or more")
    if not bool(torch.isfinite(noisy).all()):
        raise ValueError("noisy holds NaN or infinite values; replace them first, say with torch.nan_to_num")
    _check_range(noisy)


_TO_TENSOR = (
    "give floats in [0, 1], (B, 3, H, W); of 8-bit RGB (H, W, 3) make torch.tensor(np.asarray(x)).permute(2, 0, 1)[None] / 255"
)


def _kind(value: object) -> str:
    return f"{type(value).__module__.split('.')[0]} {type(value).__name__}"


def _check_range(noisy: Tensor) -> None:
    """ValueError for images of another scale: 0..255, or as far as that can be told, -1..1."""
    largest = float(noisy.abs().amax())
    if largest > MAX_VALUE:
        raise ValueError(f"noisy has values up to {largest:.4g}; give images in [0, 1], for 0..255 image / 255")
    means = working(noisy).mean(dim=(1, 2, 3))
    if bool((means < -0.25 - 5.0 / math.sqrt(noisy[0].numel())).any()):  # noise on [0, 1] does not get there
        raise ValueError(f"noisy has a mean of {float(means.amin()):.3g}; give images in [0, 1], for -1..1 (image + 1) / 2")


def checked_ids(image_ids: Sequence[int] | Tensor | None, count: int) -> list[int]:
    """One whole number for each of `count` images, from (count,) or None, which is all 0; ValueError for anything else."""
    if image_ids is None:
        return [0] * count
    try:
        ids = [operator.index(i) for i in image_ids]
    except TypeError:
        raise ValueError(f"image_ids={image_ids!r} are not whole numbers; give one per image, say range({count})") from None
    if len(ids) != count:
        raise ValueError(f"image_ids has {len(ids)} ids for a batch of {count}; give one per image")
    check(min(ids) >= 0, "image_ids", min(ids), "use 0 or more")
    return ids


def pad_to_multiple(images: Tensor, multiple: int, *, minimum: int = 1) -> Tensor:
    """Reflect-pad (B, C, H, W) below and to the right to multiples of `multiple` no smaller than `minimum`."""
    height, width = (math.ceil(max(side, minimum) / multiple) * multiple for side in images.shape[-2:])
    while images.shape[-2:] != (height, width):
        # A reflection is at most one pixel shorter than the image, so a small image takes several.
        rows = min(height - images.shape[-2], images.shape[-2] - 1)
        columns = min(width - images.shape[-1], images.shape[-1] - 1)
        images = F.pad(images, (0, columns, 0, rows), mode="reflect")
    return images


def crop(images: Tensor, size: Sequence[int]) -> Tensor:
    """The top left (height, width) of images (B, C, H, W): undoes pad_to_multiple."""
    return images[..., : size[0], : size[1]]


def load_denoiser(name_or_path: str, *, device: str = "cpu", precision: Precision = "auto") -> Denoiser:
    """A denoiser from "bm3d", "nlm" or "identity", a shipped checkpoint's name, a folder, or "hub:OWNER/NAME".

    Its `denoise` does what the command line does: it takes images for photographs unless the options have a noise_level.
    `precision` is that of a network (see ModelDenoiser); classical methods have no use for it.
    Raises CheckpointError (a ValueError) for a name that is not known, MissingExtraError for an optional package.
    """
    if name_or_path == IdentityDenoiser.name:
        return IdentityDenoiser()
    from ebt_vision.classical import CLASSICAL_DENOISERS  # these two import this file

    if name_or_path in CLASSICAL_DENOISERS:
        return CLASSICAL_DENOISERS[name_or_path]()
    from ebt_vision.checkpoint import load_pretrained
    from ebt_vision.model_denoisers import denoiser_for

    name = name_or_path.rstrip("/").rsplit("/", 1)[-1]
    return denoiser_for(load_pretrained(name_or_path, device=device), name=name, input_scale=None, precision=precision)
