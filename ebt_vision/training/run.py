"""Start a training run from a config file: what `ebt-vision train` calls, in one process or under torchrun."""

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
    """Train what the config says into `output` (default runs/NAME), on from a checkpoint there; returns its folder.

    `device` and `allow_changes` are Trainer's.

    Raises ConfigError for a config that is wrong or an output that cannot be written, and what Trainer raises.
    """
    config = load_config(config_path, overrides)
    folder = output or Path("runs") / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {str(folder)!r} cannot be written: {error.strerror}; choose another --output") from error
    return Trainer(config, folder, device=device, allow_changes=allow_changes).run()
