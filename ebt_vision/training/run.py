"""Start a training run from a config file; `ebt-vision train` calls this, in one process or under torchrun."""

from pathlib import Path

from ebt_vision.training.config import ConfigError, load_config
from ebt_vision.training.loop import Trainer


def train(
    config_path: str | Path,
    overrides: list[str] | None = None,
    *,
    output: Path | None = None,
    device: str | None = None,
    allow_changes: bool = False,
) -> Path:
    """Train by a config into `output` (default runs/NAME), resume from a checkpoint in it, and return the folder of the model.

    `device` and `allow_changes` are as in Trainer.

    Raises ConfigError for an invalid config or an output that cannot be written, and the errors of Trainer.
    """
    config = load_config(config_path, overrides)
    folder = output or Path("runs") / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {str(folder)!r} cannot be written: {error.strerror}; choose another --output") from error
    return Trainer(config, folder, device=device, allow_changes=allow_changes).run()
