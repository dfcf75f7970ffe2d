"""The folder of a run: a lock against a second training, and a check against resuming with other settings."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import BaseFileLock, FileLock, Timeout

from ebt_vision.models.pretrained_model import CONFIG_NAME
from ebt_vision.training.config import ConfigError, ExperimentConfig, build_config, config_to_dict

MAY_DIFFER = (
    "name",
    "validation",
    "train.num_updates",
    "train.num_accumulation",
    "train.num_load_threads",
    "train.compile",
    "train.checkpoint_blocks",
    "train.log_every",
    "train.checkpoint_every",
    "train.num_checkpoints",
)
"""Sections and keys that a resumed run may change: its length, its logging, and how it computes the same updates."""
_MUST_BE_EQUAL = ("model_type", "model", "seed", "replay", "optim.optimizer")  # the training state depends on them


@contextlib.contextmanager
def lock_run(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Create the folder if it is missing and lock it against other trainings. A killed process leaves no lock.

    The main process holds the lock and tells the other processes. Raises ConfigError in every process if another training uses
    the folder, OSError if the folder cannot be written.
    """
    lock: BaseFileLock | None = None
    answer: list[str | None] = [None]
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock", is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            answer = [f"another training uses {output}; wait until it ends or choose another --output"]
        except NotImplementedError:
            warnings.warn(f"the file system of {output} has no locks; do not start a second training there", stacklevel=3)
    if message := broadcast_object_list(answer)[0]:
        raise ConfigError(message)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def check_folder(output: Path) -> None:
    """Raise ConfigError for a folder with an exported model but no checkpoints; a new run would replace the model."""
    if (output / "model" / CONFIG_NAME).exists():
        raise ConfigError(
            f"{output / 'model'} is a trained model, but there is no checkpoint to resume from; "
            "choose another --output, or move the model to train again"
        )


def check_settings(output: Path, stored: dict[str, Any], config: ExperimentConfig, *, allow_changes: bool) -> None:
    """Refuse to resume with settings that differ from the stored ones, except for MAY_DIFFER.

    With `allow_changes` only changes of settings that the training state depends on are refused. Raises ConfigError with one
    line that names every changed setting.
    """
    with contextlib.suppress(ConfigError):  # from an older version: compare its keys without conversion
        stored = config_to_dict(build_config(stored))
    before, now = _flat(stored), _flat(config_to_dict(config))
    differing = [
        key for key in sorted(before.keys() & now.keys()) if before[key] != now[key] and not _is_among(key, MAY_DIFFER)
    ]
    firm = [key for key in differing if _is_among(key, _MUST_BE_EQUAL)]
    if "model_type" in firm:  # the settings that depend on it differ too
        firm = ["model_type"]
    if chosen := firm or ([] if allow_changes else differing):
        changes = ", ".join(f"{key}={before[key]} (now {now[key]})" for key in chosen)
        remedy = "the same settings" if firm else "the same settings, or --allow-changes to resume with the new ones"
        raise ConfigError(f"{output} has a run with {changes}; use {remedy}, or choose another --output")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _is_among(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
