"""Options of all denoisers."""

from dataclasses import dataclass
from typing import Literal

from ebt_vision.core.checks import check, check_number, check_whole
from ebt_vision.core.thinking_options import ThinkingOptions
from ebt_vision.denoising.inputs import MIN_SIDE

STARTS = ("observation", "proposal")


MAX_STRENGTH = 1.5
SELF_ENSEMBLES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseOptions(ThinkingOptions):
    """Options for denoising an image. A denoiser uses only some of the fields.

    `num_steps` includes the proposal. For a regressor it is the number of applications, for a DiT the passes of DDIM or the
    loops of the recursion. Noise is on [-1, 1].
    """

    start: Literal["observation", "proposal"] | None = None
    """EBT: start thinking from the noisy image or from the proposal N(x), which counts as one step; None: as the model
    suggests."""
    clean_below: float | None = None
    """EBT that starts from its proposal: an image whose energy shows noise below this standard deviation, in 0..255 units, is
    already clean and takes no step (base.noise_from_energy). Each tile of a large image is judged for itself. None: as the
    model suggests; 0: never."""
    strength: float = 1.0
    """How much of the noise is removed, 0..1.5. Below 1 the result is x + strength * (denoised - x), which keeps grain; 0
    returns x. It minimises a quadratic energy around the denoised image plus (1 - strength) / (2 * strength) * |y - x|^2. Above
    1 the network denoises a second time; the input is the denoised image plus `strength` times the noise that it found."""
    self_ensemble: int = 1
    """Number of mirrored and rotated copies that are denoised, 1, 2, 4 or 8; the result is their mean (self_ensemble.py). The
    time grows with the number of copies. It works with every denoiser, and with one candidate only."""
    likelihood_weight: float | Literal["auto"] = 0.0
    """EBT: weight of a likelihood of the observation (core/energies.py), in [0, 1]. Thinking descends the sum of the model's
    energy and the likelihood; each step also moves the candidate by this fraction of the way back to the noisy image. The
    energies of the result are energies of the sum. "auto" computes the weight from the energy of the noisy image, larger for
    cleaner images; it needs a model with a training_gain. 0 uses the energy of the model alone."""
    candidate_noise_std: float = 0.1
    """EBT: standard deviation, on [-1, 1], of the noise added to every start except the first."""
    noise_level: float | None = None
    """VP noise level in (0, 1] for images of the VP process. A DiT starts at this level; it takes precedence over `sigma`."""
    sigma: float | None = None
    """Classical methods, and DiT without noise_level: AWGN standard deviation in 0..255 units; None estimates it."""
    tile_size: int | None = None
    """Side in pixels of the tiles for larger images; None uses the denoiser's own, 0 denoises the whole image at once."""
    keep_trajectory: bool = False
    """Keep the images before the first and after every step."""
    keep_candidates: bool = False
    """EBT: keep the final images of all candidates, not only of the winner."""
    final_energy: bool = True
    """EBT: also measure the energy of the result. Without it a single proposal (one step, one candidate) takes one pass instead
    of two. `energies` then ends with the energy of the noisy image, and no callback is called."""

    def __post_init__(self) -> None:
        ThinkingOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        for name in ("strength", "candidate_noise_std"):
            check_number(name, getattr(self, name))
        for name in ("noise_level", "sigma", "clean_below"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        check(self.start in (None, *STARTS), "start", self.start, f"use one of {STARTS}, or None")
        check(0 <= self.strength <= MAX_STRENGTH, "strength", self.strength, f"use 0 (off) to {MAX_STRENGTH:g}; 1 is normal")
        check(self.self_ensemble in SELF_ENSEMBLES, "self_ensemble", self.self_ensemble, "use 1 (off), 2, 4 or 8 copies")
        if self.self_ensemble > 1 and self.num_candidates > 1:
            raise ValueError(
                f"self_ensemble={self.self_ensemble} and num_candidates={self.num_candidates} do not go together; set one to 1"
            )
        if self.likelihood_weight != "auto":
            check_number("likelihood_weight", self.likelihood_weight)
            valid = 0 <= self.likelihood_weight <= 1
            check(valid, "likelihood_weight", self.likelihood_weight, "use 0 (off) to 1, or 'auto'")
        check(self.candidate_noise_std >= 0, "candidate_noise_std", self.candidate_noise_std, "use 0 or more")
        level = self.noise_level
        check(level is None or 0 < level <= 1, "noise_level", level, "use a number in (0, 1], or None")
        check(self.sigma is None or 0 <= self.sigma <= 255, "sigma", self.sigma, "use 0..255, or None to estimate it")
        below = self.clean_below
        check(below is None or 0 <= below <= 255, "clean_below", below, "use 0 (never) to 255, or None for the model's own")
        self._check_tile_size()

    def _check_tile_size(self) -> None:
        size = self.tile_size
        if size is not None:
            check_whole("tile_size", size)
            remedy = f"use {MIN_SIDE} or more, 0 for the whole image, or None for the denoiser's own"
            check(size == 0 or size >= MIN_SIDE, "tile_size", size, remedy)
