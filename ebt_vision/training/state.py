"""The training state on disk: complete or absent, resumable bit for bit, without pickle.

A checkpoint is a folder `step-00001000`. It is written under a temporary name, flushed to the disk and then renamed. Renaming
is atomic, so a process killed at any moment leaves the earlier checkpoint intact. Random numbers need no state: every draw
depends on (seed, step, sample).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ebt_vision.models.pretrained_model import CheckpointError

_PREFIX, _TEMPORARY = "step-", ".writing-"


def checkpoint_folders(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(p for p in directory.glob(f"{_PREFIX}*") if p.is_dir() and (p / "state.json").is_file())


def newest_step(directory: Path) -> int:
    """Return the update of the newest complete checkpoint; 0 if there is none."""
    folders = checkpoint_folders(directory)
    return int(folders[-1].name.removeprefix(_PREFIX)) if folders else 0


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of the optimiser as named tensors: "exp_avg.trunk.embed.weight" and so on."""
    state = optimizer.state
    return {
        f"{key}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state from optimizer_tensors. Raises CheckpointError if a parameter has no state."""
    parameters = dict(model.named_parameters())
    for key_and_name, value in tensors.items():
        key, _, name = key_and_name.partition(".")
        if name not in parameters:
            raise CheckpointError(f"the optimiser state has {name!r}, which this model does not have; use the run's own config")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU, its moments beside the parameter.
        optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device).clone()


def write_checkpoint(
    directory: Path,
    step: int,
    shared: dict[str, dict[str, Tensor]],
    own: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
    rank: int = 0,
    barrier: Any = lambda: None,
) -> Path:
    """Write `shared` tensors (once) and each process's `own` tensors as NAME.safetensors and NAME-RANK.safetensors.

    Keep the newest `keep` checkpoints. Every process must call this with its rank and a barrier. Return the folder.
    """
    final, temporary = directory / f"{_PREFIX}{step:08d}", directory / f"{_TEMPORARY}{step:08d}"
    if rank == 0:
        for leftover in directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    barrier()
    for name, tensors in own.items():
        _write_tensors(temporary / f"{name}-{rank}.safetensors", tensors)
    if rank == 0:
        for name, tensors in shared.items():
            _write_tensors(temporary / f"{name}.safetensors", tensors)
        _write_bytes(temporary / "state.json", json.dumps(state, indent=2).encode())
    barrier()
    if rank == 0:
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_directory(directory)
        for old in checkpoint_folders(directory)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def read_checkpoint(folder: Path, names: list[str], own: list[str], rank: int = 0) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Return (tensors by name, state) of a checkpoint folder. Raises CheckpointError for a missing or damaged file."""
    try:
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in names}
        tensors |= {name: load_file(folder / f"{name}-{rank}.safetensors") for name in own}
    except Exception as error:  # safetensors and the file system raise different kinds
        raise _damaged(folder, error) from error
    return tensors, read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint folder without its tensors. Raises CheckpointError if it is damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return state
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged ({error}); delete it to resume from the previous checkpoint")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
