"""What to do with an image: the options that every denoiser takes."""

from dataclasses import dataclass
from typing import Literal

from ebt_vision.core.checks import check, check_number, check_whole
from ebt_vision.core.thinking_options import ThinkingOptions
from ebt_vision.denoising.inputs import MIN_SIDE

STARTS = ("observation", "proposal")


MAX_STRENGTH = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseOptions(ThinkingOptions):
    """What to do with an image; a denoiser reads the fields that it has a use for.

    Of the thinking options, `num_steps` counts the proposal too. For a regressor it is the number of applications, for a DiT
    the passes of DDIM or the loops of the recursion. Noise is on [-1, 1].
    """

    start: Literal["observation", "proposal"] | None = None
    """EBT: think from the noisy image, or from the proposal N(x), which then is the first step; None: as the model suggests."""
    strength: float = 1.0
    """How much of the noise that was found is removed, 0..1.5. Below 1 the result is the minimum of the energy around the
    denoised image plus (1 - strength) / (2 * strength) * |y - x|^2, which keeps grain: 0 gives the image x back. Above 1 the
    network is shown the noise that it found, `strength` times as strong, and denoises that: a second run, for what is left."""
    likelihood_weight: float | Literal["auto"] = 0.0
    """EBT: share of the way back to the noisy image that each step goes, in [0, 1]: thinking descends the sum of the model's
    energy and a likelihood of the observation (core/energies.py), and the energies of the result are those of the sum. "auto":
    more for cleaner images, by what their energy says; it needs a model with a training_gain. 0: the model's energy alone."""
    candidate_noise_std: float = 0.1
    """EBT: standard deviation, on [-1, 1], of the noise added to every start but the first."""
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
        ThinkingOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        for name in ("strength", "candidate_noise_std"):
            check_number(name, getattr(self, name))
        for name in ("noise_level", "sigma"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        check(self.start in (None, *STARTS), "start", self.start, f"use one of {STARTS}, or None")
        check(0 <= self.strength <= MAX_STRENGTH, "strength", self.strength, f"use 0 (off) to {MAX_STRENGTH:g}; 1 is normal")
        if self.likelihood_weight != "auto":
            check_number("likelihood_weight", self.likelihood_weight)
            valid = 0 <= self.likelihood_weight <= 1
            check(valid, "likelihood_weight", self.likelihood_weight, "use 0 (off) to 1, or 'auto'")
        check(self.candidate_noise_std >= 0, "candidate_noise_std", self.candidate_noise_std, "use 0 or more")
        level = self.noise_level
        check(level is None or 0 < level <= 1, "noise_level", level, "use a number in (0, 1], or None")
        check(self.sigma is None or 0 <= self.sigma <= 255, "sigma", self.sigma, "use 0..255, or None to estimate it")
        self._check_tile_size()

    def _check_tile_size(self) -> None:
        size = self.tile_size
        if size is not None:
            check_whole("tile_size", size)
            remedy = f"use {MIN_SIDE} or more, 0 for the whole image, or None for the denoiser's own"
            check(size == 0 or size >= MIN_SIDE, "tile_size", size, remedy)
