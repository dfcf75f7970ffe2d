"""What every model of the project is on disk: a folder with config.json and model.safetensors, nothing pickled."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model; the message says which file and what to do."""


_CARD = """---
{{ card_data }}
---
A model of ebt_vision: `ebt_vision.checkpoint.load_pretrained(FOLDER)` loads it, `ebt-vision info FOLDER` describes it.
Not filled in yet: the data and their licence, the command, the hardware, the figures.
"""


class PretrainedModel(nn.Module, ModelHubMixin, library_name="ebt_vision", model_card_template=_CARD):
    """A module that is built from one config dataclass and knows how to save, load and push itself.

    Subclasses set `model_type` and `config_class` and take the config as their only argument.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    config: Any
    usage_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the config that say how to start or use the model; the network's output on its weights is the same."""

    @property
    def num_parameters(self) -> int:
        """Every trainable number of the model, whatever optimiser group it is in."""
        return sum(p.numel() for p in self.parameters())

    @property
    def network_config(self) -> dict[str, Any]:
        """The fields of the config that the network's output depends on: what a cache is keyed by, beside the weights."""
        return {name: value for name, value in asdict(self.config).items() if name not in self.usage_fields}

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"model_type": self.model_type, "config": asdict(self.config)}
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (save_directory / WEIGHTS_NAME).chmod(0o644)  # safetensors writes a file that only its owner can read

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **unused: Any,
    ) -> Self:
        def fetch(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id) / name
            return Path(
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )

        return cls.from_files(fetch(CONFIG_NAME), fetch(WEIGHTS_NAME))

    @classmethod
    def from_files(cls, config_path: Path, weights_path: Path) -> Self:
        """Build from the two files, strictly: raises CheckpointError for a file that is missing, damaged or does not fit."""
        stored = read_config(config_path)
        if stored["model_type"] != cls.model_type:
            raise CheckpointError(f"{config_path} holds a {stored['model_type']!r} model, not {cls.model_type!r}")
        try:
            model = cls(cls.config_class(**stored["config"]))
        except TypeError as error:
            raise CheckpointError(f"{config_path} does not fit this version of {cls.__name__}: {error}") from error
        try:
            model.load_state_dict(load_file(weights_path), strict=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{weights_path} cannot be read ({error}); copy the checkpoint again") from error
        except RuntimeError as error:
            raise CheckpointError(f"{weights_path} does not fit its config.json: {error}") from error
        return model.eval()


def read_config(path: Path) -> dict[str, Any]:
    """config.json as {"model_type": str, "config": {...}}; CheckpointError where it is missing or something else."""
    try:
        stored = json.loads(path.read_text())
        return {"model_type": str(stored["model_type"]), "config": dict(stored["config"])}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder has {CONFIG_NAME} and {WEIGHTS_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of an ebt_vision checkpoint ({error})") from error
