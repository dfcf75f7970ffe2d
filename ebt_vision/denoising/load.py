"""From a name or a folder to a denoiser."""

import importlib

from ebt_vision.core.precision import Precision
from ebt_vision.denoising.base import Denoiser, IdentityDenoiser
from ebt_vision.denoising.classical import CLASSICAL_DENOISERS
from ebt_vision.denoising.networks import denoiser_for
from ebt_vision.models.checkpoint import load_pretrained

LIBRARIES = {"spandrel": "ebt_vision.interop.spandrel", "deepinv": "ebt_vision.interop.deepinv"}
"""Prefixes of names, each with the module whose `load` takes the rest; imported when asked for: it is above this package."""


def is_of_library(name_or_path: str) -> bool:
    """Whether a name is that of another library's network: "spandrel:FILE" or "deepinv:NAME"."""
    return name_or_path.partition(":")[0] in LIBRARIES and ":" in name_or_path


def load_denoiser(name_or_path: str, *, device: str = "cpu", precision: Precision = "auto") -> Denoiser:
    """A denoiser from "bm3d", "nlm" or "identity", a shipped checkpoint's name, a folder, or "hub:OWNER/NAME".

    "spandrel:FILE" and "deepinv:NAME" are networks of those libraries: see ebt_vision.interop.

    Its `denoise` does what the command line does: it takes images for photographs unless the options have a noise_level.
    `precision` is that of a network (see ModelDenoiser); classical methods have no use for it.
    Raises CheckpointError (a ValueError) for a name that is not known, MissingExtraError for an optional package.
    """
    if name_or_path == IdentityDenoiser.name:
        return IdentityDenoiser()
    if name_or_path in CLASSICAL_DENOISERS:
        return CLASSICAL_DENOISERS[name_or_path]()
    if is_of_library(name_or_path):
        library, _, rest = name_or_path.partition(":")
        return importlib.import_module(LIBRARIES[library]).load(rest, device=device, precision=precision)
    name = name_or_path.rstrip("/").rsplit("/", 1)[-1]
    return denoiser_for(load_pretrained(name_or_path, device=device), name=name, input_scale=None, precision=precision)
