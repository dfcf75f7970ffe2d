"""Load a model by name or folder: shipped checkpoints, local folders, hub repositories."""

import hashlib
from pathlib import Path

import torch

from ebt_vision.models.pretrained_model import (
    CONFIG_NAME,
    PRETRAINED_DIR,
    WEIGHTS_NAME,
    CheckpointError,
    PretrainedModel,
    checkpoint_class,
    read_config,
)


def list_pretrained() -> list[str]:
    """Return the names of the checkpoints shipped with the package, sorted."""
    return sorted(path.parent.name for path in PRETRAINED_DIR.glob(f"*/{CONFIG_NAME}"))


def default_pretrained(model_type: str = "patch_ebt") -> str:
    """Return the default shipped checkpoint of a type: the first one. Raises CheckpointError if none is shipped."""
    for name in list_pretrained():
        if model_type_of(name) == model_type:
            return name
    raise CheckpointError(f"{PRETRAINED_DIR} has no {model_type}; name a model: a folder or hub:OWNER/NAME")


def model_type_of(name_or_path: str) -> str | None:
    """Return the model_type of a shipped name or a folder, without loading it; None for anything else."""
    try:
        return str(read_config(resolve(name_or_path) / CONFIG_NAME)["model_type"])
    except CheckpointError:
        return None


def pick_device(name: str | None = None) -> str:
    """Return the named device, or the fastest available one. Raises ValueError for a device that this machine does not have."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name is None:
        return "cuda" if "cuda" in available else available[-1]
    if name not in available:
        raise ValueError(f"device={name!r} is not on this machine; use one of: {', '.join(available)}")
    return name


def program_device(name: str | None = None) -> str:
    """pick_device for programs with their own process; on CUDA it allows TF32 for float32 matrix products and convolutions.

    TF32 rounds their inputs to 11 significant bits, as float16 does, and is several times as fast. The library itself does not
    change torch's settings; callers use `torch.set_float32_matmul_precision`.
    """
    device = pick_device(name)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return device


def resolve(name_or_path: str) -> Path:
    """Return the folder of a shipped name or a local path. Raises CheckpointError, which lists the shipped names."""
    if not name_or_path:
        raise CheckpointError("the model's name is empty; give a shipped name, a folder or hub:OWNER/NAME")
    for folder in (PRETRAINED_DIR / name_or_path, Path(name_or_path)):
        if (folder / CONFIG_NAME).is_file():
            return folder
    shipped = ", ".join(list_pretrained()) or "none"
    raise CheckpointError(
        f"model {name_or_path!r} is neither a shipped checkpoint ({shipped}) nor a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
    )


def load_pretrained(name_or_path: str, *, device: str = "cpu") -> PretrainedModel:
    """Load a model in eval mode from a shipped name, a folder, or "hub:OWNER/NAME" (which downloads).

    Raises CheckpointError for an unknown name, and for files that are missing, damaged or do not fit.
    """
    with torch.inference_mode(False):  # so that the weights can be used outside inference_mode
        if name_or_path.startswith("hub:"):
            return PretrainedModel.from_pretrained(name_or_path).to(device)
        folder = resolve(name_or_path)
        return checkpoint_class(folder / CONFIG_NAME).from_files(folder / CONFIG_NAME, folder / WEIGHTS_NAME).to(device)


def file_hash(path: Path) -> str:
    """Return the first 12 hex digits of the SHA-256 of a file of weights, to name it in a table."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def checkpoint_hash(name_or_path: str) -> str:
    """Return the first 12 hex digits of the SHA-256 of the weights, to identify a checkpoint in a table."""
    if name_or_path.startswith("hub:"):
        from huggingface_hub import hf_hub_download

        weights = Path(hf_hub_download(name_or_path.removeprefix("hub:"), WEIGHTS_NAME))
    else:
        weights = resolve(name_or_path) / WEIGHTS_NAME
    return file_hash(weights)
