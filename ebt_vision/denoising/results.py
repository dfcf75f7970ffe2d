"""Results of denoising: the images, with steps, energies and candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebt_vision.denoising.inputs import crop
from ebt_vision.denoising.options import DenoiseOptions

ICON_SIDE = 48
"""Pixels; larger images are never taken for icons."""
ICON_EQUAL_SHARE = 0.6
"""Share of the neighbouring pixels that are exactly equal in an icon of flat areas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseStep:
    """The input of a callback before the first step (index 0) and after each step."""

    index: int
    num_steps: int
    image: Tensor  # (B, 3, H, W) in [0, 1]
    energies: Tensor | None  # (B,), mean over patches
    candidate: int = 0
    num_candidates: int = 1
    image_index: int = 0
    """For images in tiles, which are denoised one after another: batch position of the image in `image` (1, 3, H, W)."""


Callback = Callable[[DenoiseStep], object]
"""A return value of True stops the work, and the image so far is the result. Methods without steps make no calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseResult:
    """Denoised images with steps, energies and candidates. T is options.num_steps, N options.num_candidates."""

    image: Tensor
    """(B, 3, H, W) in [0, 1], clamped."""
    num_steps: Tensor
    """Number of steps of each image, int64 (B,)."""
    num_forward: Tensor
    """Passes through the network for each image, over all candidates and copies, int64 (B,); 0 for classical methods."""
    energies: Tensor | None = None
    """Energy before the first and after every step, mean over patches, (T + 1, B); a stopped image repeats its last energy.
    With a self-ensemble it is the mean over the copies, not the energy of the mean image."""
    model_energy: Tensor | None = None
    """With a likelihood, which `energies` include: the model's own energy of the image, mean over patches, (B,)."""
    candidate_energies: Tensor | None = None
    """Final energy of every candidate, mean over patches, (N, B)."""
    chosen: Tensor | None = None
    """Index of the winning candidate, int64 (B,)."""
    candidate_images: Tensor | None = None
    """With keep_candidates: the final image of every candidate, (N, B, 3, H, W), like `image`."""
    candidate_wins: Tensor | None = None
    """For an image in tiles, each with its own winner: number of tiles that each candidate won, int64 (N, B)."""
    trajectory: tuple[Tensor, ...] | None = None
    """With keep_trajectory: the images before the first and after every step, like `image`; the last one is `image`."""


def finish_result(result: DenoiseResult, size: Sequence[int], like: Tensor) -> DenoiseResult:
    """Crop the images (B, 3, H, W) to `size` = (height, width), clamp them, and bring all to the dtype and device of `like`."""
    values = {name: getattr(result, name) for name in DenoiseResult.__slots__}
    on_device = {name: value.to(like.device) for name, value in values.items() if isinstance(value, Tensor)}
    for name in ("image", "candidate_images"):
        if name in on_device:
            on_device[name] = crop_and_clamp(on_device[name], size).to(like)
    trajectory = result.trajectory and tuple(crop_and_clamp(image, size).to(like) for image in result.trajectory)
    return replace(result, trajectory=trajectory, **on_device)


def is_flat(images: Tensor) -> Tensor:
    """Whether images (B, 3, H, W) surely hold no noise, bool (B,): one constant colour, or a small icon of flat areas.

    An icon has sides of at most ICON_SIDE pixels and 8-bit values, and most neighbouring pixels are exactly equal. A network
    sees little of such an image and shifts saturated colours by some percent. Noise makes neighbours differ: a standard
    deviation of one 8-bit unit leaves about a quarter of the neighbours equal in grey, and a fiftieth in colour.
    """
    constant = (images.amax((2, 3)) == images.amin((2, 3))).all(1)
    if max(images.shape[-2:]) > ICON_SIDE:
        return constant
    pairs = [(images[..., 1:, :], images[..., :-1, :]), (images[..., :, 1:], images[..., :, :-1])]
    equal = torch.cat([(a == b).all(1).flatten(1) for a, b in pairs], dim=1)  # (B, pairs)
    levels = 255.0 * images
    in_range = (images.amin((1, 2, 3)) >= 0) & (images.amax((1, 2, 3)) <= 1)
    is_8_bit = in_range & ((levels - levels.round()).abs().amax((1, 2, 3)) < 1e-3)
    return constant | (is_8_bit & (equal.double().mean(1) >= ICON_EQUAL_SHARE))


def restore_flat_images(result: DenoiseResult, noisy: Tensor) -> DenoiseResult:
    """Put back the images of `noisy` (B, 3, H, W) that hold no noise: those of is_flat."""
    flat = is_flat(noisy)
    if not flat.any():
        return result

    def keep(images: Tensor) -> Tensor:
        return torch.where(flat[:, None, None, None], noisy.clamp(0, 1), images)

    image = keep(result.image)
    candidates = None if result.candidate_images is None else keep(result.candidate_images)
    trajectory = result.trajectory and (*result.trajectory[:-1], image)
    return replace(result, image=image, candidate_images=candidates, trajectory=trajectory)


class CleanImages:
    """The images of `noisy` (B, 3, H, W) that are clean by their energy: they take no step and keep every pixel.

    `is_clean` maps the energies (B,) of the noisy images to bool (B,), or to None if none is clean.
    """

    def __init__(self, noisy: Tensor, is_clean: Callable[[Tensor], Tensor | None]):
        self.noisy, self.is_clean = noisy, is_clean
        self.clean: Tensor | None = None
        self.first: Tensor | None = None
        """Energies of the noisy images, (B,)."""

    def judge(self, energies: Tensor | None) -> None:
        """Decide by the first row of energies (T + 1, B)."""
        self.first = None if energies is None else energies[0]
        self.clean = None if self.first is None else self.is_clean(self.first)

    @property
    def all(self) -> bool:
        return self.clean is not None and bool(self.clean.all())

    def step(self, step: DenoiseStep) -> DenoiseStep:
        """Put the clean images into a step; the very first call, before the first step, decides which they are."""
        if step.energies is None:
            return step
        if step.index == 0 and self.clean is None:
            self.judge(step.energies[None])
        if self.clean is None or self.first is None or not self.clean.any():
            return step
        return replace(step, image=self._keep(step.image), energies=torch.where(self.clean, self.first, step.energies))

    def result(self, result: DenoiseResult) -> DenoiseResult:
        """Put the clean images into a result: no step, and all energies those of the noisy image."""
        if self.clean is None or not self.clean.any():
            return result
        assert result.energies is not None
        first = result.energies[0]
        clean = self.clean.to(first.device)
        candidates, model_energy = result.candidate_energies, result.model_energy
        return replace(
            result,
            image=self._keep(result.image),
            num_steps=torch.where(clean.to(result.num_steps.device), 0, result.num_steps),
            energies=torch.where(clean, first, result.energies),
            model_energy=None if model_energy is None else torch.where(clean, first, model_energy),
            candidate_energies=None if candidates is None else torch.where(clean, first, candidates),
            candidate_images=None if result.candidate_images is None else self._keep(result.candidate_images),
            trajectory=result.trajectory and tuple(self._keep(image) for image in result.trajectory),
        )

    def _keep(self, images: Tensor) -> Tensor:
        assert self.clean is not None
        clean = self.clean.to(images.device)[:, None, None, None]
        return torch.where(clean, self.noisy.clamp(0, 1).to(images), images)


def apply_strength(result: DenoiseResult, noisy: Tensor, strength: float) -> DenoiseResult:
    """Apply a strength below 1: move the images of the result back towards the noisy images, (B, 3, H, W)."""
    if strength >= 1.0:
        return result

    def weaken(images: Tensor) -> Tensor:
        return (noisy + strength * (images - noisy)).clamp(0, 1)

    image = weaken(result.image)
    candidates = None if result.candidate_images is None else weaken(result.candidate_images)
    trajectory = result.trajectory and (*result.trajectory[:-1], image)
    return replace(result, image=image, candidate_images=candidates, trajectory=trajectory)


def crop_and_clamp(images: Tensor, size: Sequence[int]) -> Tensor:
    """The top left `size` = (height, width) of images (B, 3, H, W), clamped to [0, 1]."""
    return crop(images.clamp(0, 1), size)


def join_results(results: Sequence[DenoiseResult]) -> DenoiseResult:
    """Join results of images that were denoised one by one. A field that is missing or differs in shape becomes None.

    Shorter trajectories repeat their last image.
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
        model_energy=joined("model_energy", 0),
        candidate_energies=joined("candidate_energies", 1),
        chosen=joined("chosen", 0),
        candidate_images=joined("candidate_images", 1),
        candidate_wins=joined("candidate_wins", 1),
        trajectory=tuple(torch.cat(images) for images in zip(*padded, strict=True)) or None,
    )


def repeat_last(energies: Tensor, count: int) -> Tensor:
    """Energies (T + 1, B) of a run that may have ended early, with the last row repeated up to `count` rows."""
    return torch.cat([energies, energies[-1:].expand(count - len(energies), -1)])


def no_network_result(image: Tensor, noisy: Tensor, options: DenoiseOptions) -> DenoiseResult:
    """Return the result (B, 3, H, W) of a one-step method without a network or an energy."""
    ones = torch.ones(len(noisy), dtype=torch.int64, device=noisy.device)
    trajectory = (noisy, *[image] * options.num_steps) if options.keep_trajectory else None
    return DenoiseResult(image=image, num_steps=ones, num_forward=torch.zeros_like(ones), trajectory=trajectory)
