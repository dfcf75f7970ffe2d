"""Load a denoiser by name or folder."""

import importlib

from ebt_vision.core.precision import Precision
from ebt_vision.denoising.base import Denoiser, IdentityDenoiser
from ebt_vision.denoising.classical import CLASSICAL_DENOISERS
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.equilibrium import EqMDenoiser
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.equilibrium import PatchEqM
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.models.registry import image_model_types
from ebt_vision.models.regressor import PatchRegressor

LIBRARIES = {"spandrel": "ebt_vision.interop.spandrel", "deepinv": "ebt_vision.interop.deepinv"}
"""Prefixes of names, each with the module whose `load` takes the rest; imported when asked for: it is above this package."""


def is_of_library(name_or_path: str) -> bool:
    """Whether a name is that of another library's network: "spandrel:FILE" or "deepinv:NAME"."""
    return name_or_path.partition(":")[0] in LIBRARIES and ":" in name_or_path


def load_denoiser(name_or_path: str, *, device: str = "cpu", precision: Precision = "auto") -> Denoiser:
    """Load a denoiser: "bm3d", "nlm", "identity", a shipped checkpoint's name, a folder, or "hub:OWNER/NAME".

    "spandrel:FILE" and "deepinv:NAME" are networks of those libraries: see ebt_vision.interop.

    Its `denoise` works like the command line: images are photographs unless the options have a noise_level. `precision` is for
    networks (see ModelDenoiser); classical methods ignore it. Raises CheckpointError (a ValueError) for an unknown name,
    MissingExtraError for a missing optional package.
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


def denoiser_for(
    model: PretrainedModel,
    *,
    name: str | None = None,
    input_scale: float | None = 1.0,
    precision: Precision = "float32",
) -> Denoiser:
    """The denoiser of a model of any type (diffusion: by DDIM); ValueError for one that has none, such as a text model."""
    name = name or model.model_type
    if isinstance(model, PatchEBT):
        return EBTDenoiser(model, name=name, input_scale=input_scale, precision=precision)
    if isinstance(model, PatchEqM):
        return EqMDenoiser(model, name=name, input_scale=input_scale, precision=precision)
    if isinstance(model, PatchRegressor):
        return RegressorDenoiser(model, name=name, input_scale=input_scale, precision=precision)
    if isinstance(model, Diffusion):
        return DiTDenoiser(model, name=name, input_scale=input_scale, precision=precision)
    raise ValueError(f"a {model.model_type!r} model does not denoise images; use one of {', '.join(image_model_types())}")
