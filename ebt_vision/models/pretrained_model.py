"""Saving and loading of every model: a folder with config.json and model.safetensors, without pickle."""

import contextlib
import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ebt_vision.models.registry import UnknownModelTypeError, model_class

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
PRETRAINED_DIR = Path(__file__).parents[1] / "pretrained"
"""The folder of the shipped checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model; the message names the file and the remedy."""


_CARD = """---
{{ card_data }}
---
A model of ebt_vision: `ebt_vision.models.checkpoint.load_pretrained(FOLDER)` loads it, `ebt-vision info FOLDER` describes it.
Not filled in yet: the data and their licence, the command, the hardware, the figures.
"""


class PretrainedModel(nn.Module, ModelHubMixin, library_name="ebt_vision", model_card_template=_CARD):
    """A module that is built from one config dataclass, with saving, loading and pushing.

    Subclasses set `model_type` and `config_class` and take the config as their only argument.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    config: Any
    card: str | None = None
    """The model card of the weights with their licence; save_pretrained writes it with the weights."""
    usage_fields: ClassVar[tuple[str, ...]] = ()
    """Config fields for initialisation or use of the model; the output of the network does not depend on them."""

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def network_config(self) -> dict[str, Any]:
        """The config fields that determine the output of the network, for cache keys together with the weights."""
        return {name: value for name, value in asdict(self.config).items() if name not in self.usage_fields}

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"model_type": self.model_type, "config": asdict(self.config)}
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (save_directory / WEIGHTS_NAME).chmod(0o644)  # safetensors makes the file readable only for its owner
        if self.card is not None and not (save_directory / CARD_NAME).exists():
            (save_directory / CARD_NAME).write_text(self.card, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a model in eval mode, on the CPU in float32, from a shipped name, a folder or a repository of the Hugging Face
        hub.

        The class must match the checkpoint; `PretrainedModel.from_pretrained` finds it. The keywords are for downloads, as in
        huggingface_hub. Raises CheckpointError for an unknown name and for files that are missing, damaged or of another class,
        ValueError for other keywords: use `.to(device, dtype)` on the result.
        """
        if unknown:
            raise ValueError(f"from_pretrained does not accept {', '.join(unknown)}; {_keyword_remedy(next(iter(unknown)))}")
        name = str(pretrained_model_name_or_path)
        if not name:
            raise CheckpointError("the model's name is empty; give a shipped name, a folder or OWNER/NAME")
        download = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
        download |= {"local_files_only": local_files_only, "revision": revision}
        files = local_folder(name) or _downloaded(name.removeprefix("hub:"), download)
        return cls._class_for(files / CONFIG_NAME).from_files(files / CONFIG_NAME, files / WEIGHTS_NAME)

    @classmethod
    def _class_for(cls, config_path: Path) -> type[Self]:
        if cls is not PretrainedModel:
            return cls
        return cast(type[Self], checkpoint_class(config_path))

    @classmethod
    def from_files(cls, config_path: Path, weights_path: Path) -> Self:
        """Build the model from the two files, strictly, and keep its model card.

        The model can be used outside of torch.inference_mode even if it is loaded inside. Raises CheckpointError for a file
        that is missing, damaged or does not fit.
        """
        with torch.inference_mode(False):
            return cls._from_files(config_path, weights_path)

    @classmethod
    def _from_files(cls, config_path: Path, weights_path: Path) -> Self:
        stored = read_config(config_path)
        if stored["model_type"] != cls.model_type:
            raise CheckpointError(f"{config_path} is for a {stored['model_type']!r} model, not for {cls.model_type!r}")
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
        card = config_path.with_name(CARD_NAME)
        model.card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        return model.eval()


def local_folder(name: str) -> Path | None:
    """Return the folder of a shipped name or of a path to a folder; None for anything else."""
    if (PRETRAINED_DIR / name / CONFIG_NAME).is_file():
        return PRETRAINED_DIR / name
    return Path(name) if Path(name).is_dir() else None


def _downloaded(repository: str, options: dict[str, Any]) -> Path:
    """Return the cached folder of a hub repository. Raises CheckpointError if it cannot be downloaded."""
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            folder = Path(hf_hub_download(repository, name, **options)).parent
    except (OSError, ValueError) as error:  # huggingface_hub raises either
        shipped = ", ".join(sorted(path.parent.name for path in PRETRAINED_DIR.glob(f"*/{CONFIG_NAME}"))) or "none"
        raise CheckpointError(
            f"{repository!r} is neither a shipped checkpoint ({shipped}) nor a folder, and cannot be downloaded: "
            f"{' '.join(str(error).split())}"
        ) from error
    with contextlib.suppress(EntryNotFoundError, OSError):  # a repository may have no card
        hf_hub_download(repository, CARD_NAME, **options)
    return folder


def _keyword_remedy(name: str) -> str:
    if name in ("torch_dtype", "dtype", "map_location", "device", "device_map"):
        return "call .to(device, dtype) on the model"
    if name == "strict":
        return "loading is always strict"
    known = ("force_download", "token", "cache_dir", "local_files_only", "revision")
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it accepts {', '.join(known)}"


def checkpoint_class(config_path: Path) -> type[PretrainedModel]:
    """Return the model class of a config.json. Raises CheckpointError for an unknown model type, and like read_config."""
    try:
        cls: type[PretrainedModel] = model_class(read_config(config_path)["model_type"])
    except UnknownModelTypeError as error:
        raise CheckpointError(f"{config_path}: {error}") from None
    return cls


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json as {"model_type": str, "config": {...}}. Raises CheckpointError if it is missing or invalid."""
    try:
        stored = json.loads(path.read_text())
        return {"model_type": str(stored["model_type"]), "config": dict(stored["config"])}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder has {CONFIG_NAME} and {WEIGHTS_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of an ebt_vision checkpoint ({error})") from error
