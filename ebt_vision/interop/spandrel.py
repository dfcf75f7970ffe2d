"""Restoration networks of the spandrel library, loaded from a file of weights.

Spandrel recognises the architecture and its sizes by the names and shapes of the weights: SCUNet, NAFNet, SwinIR, DRUNet, DnCNN
and others. Restormer and MIRNet are in spandrel_extra_arches, which is used if it is installed.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebt_vision.core.checks import MissingExtraError
from ebt_vision.core.precision import Precision
from ebt_vision.interop.peer import Call, PeerDenoiser
from ebt_vision.models.checkpoint import file_hash
from ebt_vision.models.pretrained_model import CheckpointError

SUFFIXES = (".safetensors", ".pth")
NOISE_MAP_ARCHITECTURES = ("DRUNet", "DnCNN")
"""Networks that get a noise map of 15 / 255 from spandrel if their first layer has a channel for it."""


def load(file: str, *, device: str = "cpu", precision: Precision = "auto") -> PeerDenoiser:
    """Load "spandrel:FILE". FILE is a .safetensors, or a .pth that the restricted unpickler of spandrel accepts.

    Raises MissingExtraError without spandrel; CheckpointError, in one line, for a file that is missing, of another kind, of no
    network that spandrel knows, or of one that does not restore RGB images at their own size.
    """
    descriptor = _descriptor(Path(file), device)
    if precision == "bfloat16" and not descriptor.supports_bfloat16:
        raise ValueError(f"{file} is a {descriptor.architecture.name}, which does not run in bfloat16; use float32")
    takes_sigma = _takes_noise_map(descriptor)
    return PeerDenoiser(
        descriptor.model,
        _with_noise_map(descriptor) if takes_sigma else _one_by_one(descriptor),
        name=f"spandrel:{Path(file).name}",
        takes_sigma=takes_sigma,
        patch_size=descriptor.size_requirements.multiple_of,
        weights_hash=file_hash(Path(file)),
        precision=precision,
    )


def _descriptor(path: Path, device: str) -> Any:
    """Return the ImageModelDescriptor of spandrel for a restoration network on RGB images."""
    try:
        import spandrel
    except ImportError:
        raise MissingExtraError('spandrel is not installed; run: pip install "ebt_vision[spandrel]"') from None
    with contextlib.suppress(ImportError):
        import spandrel_extra_arches

        spandrel_extra_arches.install(ignore_duplicates=True)
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"spandrel:{path} is not a {' or '.join(SUFFIXES)} file; name a file of weights")
    if not path.is_file():
        raise CheckpointError(f"spandrel:{path} is not there; name a file of weights that you have")
    try:
        descriptor = spandrel.ModelLoader(device).load_from_file(path)
    except spandrel.UnsupportedModelError:
        raise CheckpointError(
            f"spandrel:{path} is no network that spandrel knows; Restormer and MIRNet need: pip install spandrel_extra_arches"
        ) from None
    except Exception as error:  # whatever a file of another kind makes its readers raise
        raise CheckpointError(f"spandrel:{path} cannot be loaded ({' '.join(str(error).split())})") from error
    kind = descriptor.architecture.name
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.scale != 1:
        raise CheckpointError(f"spandrel:{path} is a {kind} that changes the size or needs a mask; name one that restores")
    channels = (descriptor.input_channels, descriptor.output_channels)
    if channels != (3, 3):
        raise CheckpointError(f"spandrel:{path} is a {kind} from {channels[0]} to {channels[1]} channels; name one for RGB")
    return descriptor


def _takes_noise_map(descriptor: Any) -> bool:
    first = next(parameter for parameter in descriptor.model.parameters() if parameter.ndim == 4)
    return descriptor.architecture.id in NOISE_MAP_ARCHITECTURES and first.shape[1] == descriptor.input_channels + 1


def _one_by_one(descriptor: Any) -> Call:
    """Run image by image: spandrel guarantees only a batch of one."""
    return lambda images, sigma: torch.cat([descriptor(image[None]) for image in images])


def _with_noise_map(descriptor: Any) -> Call:
    def call(images: Tensor, sigma: Tensor | None) -> Tensor:
        assert sigma is not None
        noise_map = sigma.view(-1, 1, 1, 1).expand(-1, 1, *images.shape[-2:])
        return descriptor.model(torch.cat([images, noise_map], dim=1))

    return call
