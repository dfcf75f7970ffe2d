"""Noise by name, as on the command line and the page, and what denoisers get to know about it."""

from dataclasses import dataclass

from torch import Tensor

from ebt_vision.core.rng import make_generator
from ebt_vision.noise import processes, realistic


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseKind:
    """A kind of noise and its valid amounts."""

    unit: str
    """Meaning of the amount, for display after "amount:"."""
    low: float
    high: float
    default: float
    step: float


NOISE_KINDS: dict[str, NoiseKind] = {
    "gaussian": NoiseKind(unit="standard deviation, 0 to 255 units", low=0, high=255, default=25, step=1),
    "paper": NoiseKind(unit="VP noise level; the paper trains at 0.1", low=0.01, high=1, default=0.1, step=0.01),
    "poisson": NoiseKind(unit="photons at white; fewer is noisier", low=1, high=1000, default=30, step=1),
    "salt-and-pepper": NoiseKind(unit="fraction of the pixels", low=0, high=1, default=0.1, step=0.01),
    "camera": NoiseKind(
        unit="standard deviation, 0 to 255 units, of noise as a camera leaves it: coarse in colour",
        low=0,
        high=50,
        default=10,
        step=1,
    ),
    "jpeg": NoiseKind(unit="JPEG quality; lower is worse", low=1, high=100, default=10, step=1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Noise of one kind and amount; see NOISE_KINDS."""

    kind: str
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in NOISE_KINDS:
            raise ValueError(f"noise {self.kind!r} is unknown; use one of {', '.join(NOISE_KINDS)}")
        known = NOISE_KINDS[self.kind]
        if not known.low <= self.amount <= known.high:
            raise ValueError(
                f"amount={self.amount:g} of {self.kind} noise is out of range; use {known.low:g}..{known.high:g} ({known.unit})"
            )

    @classmethod
    def parse(cls, text: str) -> "Noise":
        """Parse "KIND:AMOUNT", or a number, which means Gaussian noise of this sigma. Raises ValueError for other text."""
        kind, colon, amount = text.rpartition(":")
        try:
            value = float(amount)
        except ValueError:
            raise ValueError(f"noise {text!r} is not valid; use a number (Gaussian, 0..255), or KIND:AMOUNT") from None
        return cls(kind=kind if colon else "gaussian", amount=value)

    def __str__(self) -> str:
        return f"{self.kind}:{repr(float(self.amount)).removesuffix('.0')}"  # exact

    def add(self, clean: Tensor, seed: int) -> Tensor:
        """Return the noisy observation of clean images (B, 3, H, W) in [0, 1], not clipped. The same seed gives the same
        noise."""
        generator = make_generator(seed)
        match self.kind:
            case "gaussian":
                return processes.add_gaussian_noise(clean, self.amount, generator)
            case "paper":
                noisy = processes.add_vp_noise(processes.to_model_range(clean), self.amount, generator)
                return processes.to_image_range(noisy)
            case "poisson":
                return processes.add_poisson_noise(clean, self.amount, generator)
            case "salt-and-pepper":
                return processes.add_salt_and_pepper(clean, self.amount, generator)
            case "camera":
                return realistic.add_camera_noise(clean, self.amount, generator)
            case "jpeg":
                return processes.add_jpeg(clean, round(self.amount))
        raise AssertionError(self.kind)

    @property
    def noise_level(self) -> float | None:
        """Value for DenoiseOptions.noise_level."""
        return self.amount if self.kind == "paper" else None

    @property
    def sigma(self) -> float | None:
        """Value for DenoiseOptions.sigma: the true sigma of Gaussian noise; None for other noise, so that methods estimate
        it."""
        return self.amount if self.kind == "gaussian" else None
