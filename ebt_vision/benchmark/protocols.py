"""Protocols of the benchmark: the noise of an image, what a method knows about it, and how its output is measured.

paper   the VP process on [-1, 1] at a noise level; outputs clamped, not rounded (Gladstone et al. 2025, code).
awgn    y = x + N(0, sigma / 255), drawn as in the restoration papers; outputs clamped and rounded to 8 bits.
real    pairs of a noisy and a clean photograph (see pairs.py); no noise is added, outputs are clamped and rounded to 8 bits.
camera  noise as the noise reduction of a camera leaves it (noise/realistic.py); the input has 8 bits, outputs are clamped and
        rounded to 8 bits.
ood     corruptions on which no model was trained, with one fixed strength each; outputs clamped and rounded to 8 bits.

`clipped` is a separate track of awgn and ood: the noisy image is clipped and rounded to 8 bits, as in a camera or a file. Its
rows never share a table with rows on the float input of the papers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from ebt_vision.core.metrics import psnr
from ebt_vision.core.rng import Generators, sample_generators
from ebt_vision.noise import processes
from ebt_vision.noise.realistic import add_camera_noise

_VP_STREAM = 21
_OOD_STREAM = 22
_CAMERA_STREAM = 23

Protocol = Literal["paper", "awgn", "camera", "ood", "real"]
OOD_STRENGTHS: dict[str, float] = {"salt-and-pepper": 0.05, "poisson": 30.0, "speckle": 0.2, "jpeg": 10.0, "motion-blur": 9.0}
"""Fraction of pixels, photons at white, standard deviation, JPEG quality, pixels of the path (at 45 degrees)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One kind of noise for all models, with its own table."""

    protocol: Protocol
    kind: str
    """"level", "sigma", "camera", a key of OOD_STRENGTHS, or "pairs"."""
    strength: float
    seed: int = 0
    clipped: bool = False

    def __post_init__(self) -> None:
        if self.protocol == "paper":
            processes.level_to_timestep(self.strength)  # raises ValueError out of range
            if self.clipped:
                raise ValueError("--clipped is a track of awgn and ood; the paper's noise is never clipped")
        if self.protocol == "real" and self.clipped:
            raise ValueError("--clipped is a track of awgn and ood; the noisy images of pairs are 8-bit files")
        if self.protocol == "camera" and self.clipped:
            raise ValueError("--clipped is a track of awgn and ood; camera noise always has 8 bits")
        if self.protocol == "camera" and not 0 <= self.strength <= 255:
            raise ValueError(f"sigma={self.strength:g} of camera noise is out of range; use 0..255, photographs have up to 20")
        if self.protocol == "awgn" and not 0 <= self.strength <= 255:
            raise ValueError(f"sigma={self.strength:g} is out of range; use 0..255, the papers' are 15, 25 and 50")
        if self.protocol == "ood" and self.kind not in OOD_STRENGTHS:
            raise ValueError(f"corruption {self.kind!r} is unknown; use some of {', '.join(OOD_STRENGTHS)}")

    @property
    def title(self) -> str:
        """Title of its table, without the seed."""
        if self.protocol == "real":
            return "real noise"
        return f"{self.kind} {self.strength:g}" + (", 8-bit input" if self.clipped else "")

    @property
    def noise_hash(self) -> str:
        """12 hex digits over everything that the noise depends on, except the images."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def timestep(self) -> int | None:
        """The timestep of the VP process with this noise-to-signal ratio; None if there is no such timestep."""
        if self.protocol == "paper":
            return processes.level_to_timestep(self.strength)
        return processes.sigma_to_timestep(self.strength) if self.protocol == "awgn" else None

    @property
    def sigma(self) -> float | None:
        """The AWGN standard deviation in 0..255 units for a method that gets the image at its own scale. None: the method must
        estimate sigma."""
        if self.protocol == "paper":
            signal, noise = processes.signal_and_noise_scale(self.strength)
            return 255.0 * noise / signal / 2.0
        return self.strength if self.protocol == "awgn" else None

    def observe(self, clean: Tensor, indices: Sequence[int]) -> Tensor:
        """Add noise to clean uint8 images: (B, 3, H, W), about [0, 1]; the noise depends on the seed and the index."""
        images = clean.float() / 255.0
        assert self.protocol != "real", "the noisy images of pairs are files"
        if self.protocol == "paper":
            generators = sample_generators(self.seed, indices, _VP_STREAM, processes.level_to_timestep(self.strength))
            noisy = processes.add_vp_noise(processes.to_model_range(images), self.strength, generators)
            return processes.to_image_range(noisy)
        if self.protocol == "camera":
            return add_camera_noise(images, self.strength, sample_generators(self.seed, indices, _CAMERA_STREAM))
        if self.protocol == "awgn":
            noisy = processes.add_restoration_noise(images, self.strength, self.seed)
        else:
            stream = sorted(OOD_STRENGTHS).index(self.kind)
            noisy = _corrupted(images, self.kind, self.strength, sample_generators(self.seed, indices, _OOD_STREAM, stream))
        return processes.to_8_bit(noisy) / 255.0 if self.clipped else noisy

    def measured(self, image: Tensor) -> Tensor:
        """Return an output (B, 3, H, W) in [0, 1] as it is compared with the clean pixels.

        The result is clamped, on 0..255, and rounded except in the paper's protocol.
        """
        return 255.0 * image if self.protocol == "paper" else processes.to_8_bit(image)

    @property
    def key(self) -> str:
        """The name of the condition in file names."""
        text = f"{self.protocol}-{self.kind}-{self.strength:g}-seed{self.seed}"
        return text + ("-8bit" if self.clipped else "")


def _corrupted(images: Tensor, kind: str, strength: float, generators: Generators) -> Tensor:
    match kind:
        case "salt-and-pepper":
            return processes.add_salt_and_pepper(images, strength, generators)
        case "poisson":
            return processes.add_poisson_noise(images, strength, generators)
        case "speckle":
            return processes.add_speckle(images, strength, generators)
        case "jpeg":
            return processes.add_jpeg(images, round(strength))
        case "motion-blur":
            return processes.add_motion_blur(images, round(strength))
    raise AssertionError(kind)


def same_shapes(images: Sequence[Tensor]) -> list[list[int]]:
    """Return groups of neighbouring positions of `images` (3, H, W) with the same shape; each group can be a batch."""
    groups: list[list[int]] = []
    for position, image in enumerate(images):
        if groups and images[groups[-1][-1]].shape == image.shape:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def paper_psnr(images: Tensor, clean: Tensor) -> Tensor:
    """PSNR (B,) in dB of images (B, 3, H, W) on [-1, 1] and uint8 clean images, clamped, as in the paper's protocol."""
    return psnr((images.clamp(-1, 1) + 1) * 127.5, clean.float(), data_range=255.0)
