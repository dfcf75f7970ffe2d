"""Load a denoiser by name or folder."""

from ebt_vision.core.precision import Precision
from ebt_vision.denoising.base import Denoiser, IdentityDenoiser
from ebt_vision.denoising.classical import CLASSICAL_DENOISERS
from ebt_vision.denoising.networks import denoiser_for
from ebt_vision.models.checkpoint import load_pretrained


def load_denoiser(name_or_path: str, *, device: str = "cpu", precision: Precision = "auto") -> Denoiser:
    """Load a denoiser: "bm3d", "nlm", "identity", a shipped checkpoint's name, a folder, or "hub:OWNER/NAME".

    Its `denoise` works like the command line: images are photographs unless the options have a noise_level. `precision` is for
    networks (see ModelDenoiser); classical methods ignore it. Raises CheckpointError (a ValueError) for an unknown name,
    MissingExtraError for a missing optional package.
    """
    if name_or_path == IdentityDenoiser.name:
        return IdentityDenoiser()
    if name_or_path in CLASSICAL_DENOISERS:
        return CLASSICAL_DENOISERS[name_or_path]()
    name = name_or_path.rstrip("/").rsplit("/", 1)[-1]
    return denoiser_for(load_pretrained(name_or_path, device=device), name=name, input_scale=None, precision=precision)
