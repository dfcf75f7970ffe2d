"""Experiments as YAML: combine the config dataclasses, which are defined next to their users, and check every key."""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ebt_vision.core.yaml_files import load_yaml
from ebt_vision.data.images import DataConfig
from ebt_vision.data.text import TextDataConfig
from ebt_vision.models.causal_text_ebt import CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformerConfig
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.equilibrium import PatchEqMConfig
from ebt_vision.models.patch_diffusion_config import PatchDiffusionConfig
from ebt_vision.models.patch_ebt import PatchEBTConfig
from ebt_vision.models.registry import MODEL_TYPES, UnknownModelTypeError, config_class, find_model_type
from ebt_vision.models.regressor import PatchRegressorConfig
from ebt_vision.models.trunk_config import PRESETS
from ebt_vision.objectives.image import ObjectiveConfig
from ebt_vision.objectives.text import TextObjectiveConfig
from ebt_vision.training.replay_buffer import ReplayConfig
from ebt_vision.training.settings import OptimConfig, TextValidationConfig, TrainConfig, ValidationConfig

ModelConfig = (
    PatchEBTConfig
    | DiTConfig
    | PatchDiffusionConfig
    | PatchRegressorConfig
    | PatchEqMConfig
    | CausalTextEBTConfig
    | CausalTransformerConfig
)
_IMAGE_SECTIONS: dict[str, type] = {"data": DataConfig, "objective": ObjectiveConfig, "validation": ValidationConfig}
_TEXT_SECTIONS: dict[str, type] = {
    "data": TextDataConfig,
    "objective": TextObjectiveConfig,
    "validation": TextValidationConfig,
}


class ConfigError(ValueError):
    """A config file or override is invalid; the one-line message names the key and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentConfig:
    """All settings of one training run."""

    name: str
    """Names the run's folder under runs/ where no --output is given."""
    model_type: Literal[
        "patch_ebt", "dit", "patch_diffusion", "patch_regressor", "patch_eqm", "causal_text_ebt", "causal_transformer"
    ]
    """Decides what kind of model, data, objective and validation there are: of images or of text."""
    model: ModelConfig
    data: DataConfig | TextDataConfig
    objective: ObjectiveConfig | TextObjectiveConfig
    validation: ValidationConfig | TextValidationConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """Seed of every draw: weights, order, noise. 0 or more."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not in 0..2^63 - 1")


def load_config(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read a YAML experiment and apply `section.key=value` overrides (values in YAML syntax).

    Raises ConfigError for a missing or invalid YAML file, a repeated key, an unknown key (with the nearest known key), a wrong
    type, a number that is not finite, or a value that its dataclass refuses.
    """
    try:
        raw = load_yaml(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}; see the configs/ folder") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config {str(path)!r} must be a mapping of keys to values")
    for override in overrides or []:
        _apply_override(raw, override)
    return build_config(raw)


def build_config(raw: dict[str, Any]) -> ExperimentConfig:
    """Build an ExperimentConfig from plain data and check every key and type. Raises ConfigError like load_config."""
    raw = _with_preset(raw)
    known = MODEL_TYPES.get(str(raw.get("model_type")))
    sections = _TEXT_SECTIONS if known is not None and known.modality == "text" else _IMAGE_SECTIONS
    hints: dict[str, Any] = {"model": PatchEBTConfig if known is None else config_class(raw["model_type"])} | sections
    _check_keys(ExperimentConfig, raw, (), hints)
    _check_finite(raw, "")
    try:
        find_model_type(str(raw.get("model_type")))
    except UnknownModelTypeError as error:
        raise ConfigError(str(error)) from None
    raw = {"objective": {}, "validation": {}} | raw
    for field_ in dataclasses.fields(ExperimentConfig):
        if field_.name not in raw and field_.default is field_.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{field_.name}: Field required")
    types = get_type_hints(ExperimentConfig) | hints
    parts: dict[str, Any] = {name: _validate(types[name], value, name) for name, value in raw.items()}
    try:
        return ExperimentConfig(**parts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Convert a config to plain data for build_config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace model.preset by its fields; explicit keys of the model take precedence."""
    model = raw.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return raw
    preset = model["preset"]
    if preset not in PRESETS:
        raise ConfigError(f"model.preset={preset!r} is unknown; use one of {', '.join(PRESETS)}")
    cls = config_class(raw["model_type"]) if raw.get("model_type") in MODEL_TYPES else PatchEBTConfig
    known = {f.name for f in dataclasses.fields(cls)}
    fields = {key: value for key, value in PRESETS[preset].items() if key in known}
    return raw | {"model": fields | {key: value for key, value in model.items() if key != "preset"}}


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} does not have the form section.key=value")
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is not a section")
    try:
        target[last] = load_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None


def _check_keys(cls: type, raw: Any, path: tuple[str, ...], hints: dict[str, Any]) -> None:
    """Refuse keys that the dataclass does not have, and name the nearest key that it has."""
    if not isinstance(raw, dict):
        return
    types = get_type_hints(cls) | hints
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in raw.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ConfigError(f"unknown key {'.'.join((*path, str(key)))!r}; {hint}")
        if section := _dataclass_of(types[key], value, (*path, key)):
            _check_keys(section, value, (*path, key), {})


def _check_finite(value: Any, path: str) -> None:
    """Refuse .nan and .inf. Comparisons with nan are false, so nan would pass every range check."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} is not a finite number")
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        _check_finite(part, f"{path}.{key}" if path else str(key))


def _dataclass_of(hint: Any, value: Any, path: tuple[str, ...]) -> type | None:
    """The dataclass that a mapping of this type becomes; of several the one that its `name` says."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    options = get_args(hint) if get_origin(hint) in (Union, type(int | str)) else ()
    classes = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    if len(classes) < 2 or not isinstance(value, dict):
        return classes[0] if classes else None
    named = {field_.default: cls for cls in classes for field_ in dataclasses.fields(cls) if field_.name == "name"}
    if value.get("name") not in named:
        raise ConfigError(f"{'.'.join(path)}.name={value.get('name')!r} is unknown; use one of {', '.join(map(str, named))}")
    return named[value["name"]]


def _validate(cls: Any, raw: Any, section: str) -> Any:
    """Check types strictly and run the checks of the dataclasses."""
    try:  # strict: "16" and true are not numbers. JSON mode: a list becomes a tuple, a mapping a dataclass.
        return TypeAdapter(cls).validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        errors = error.errors()  # of a value that may have several types: one for each, and a refusal by its own says most
        first = next((each for each in errors if each["type"] == "value_error"), errors[0])
        place = ".".join([section] * bool(section) + [str(part) for part in first["loc"]])
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("value_error", "missing") else f" (got {first['input']!r})"
        raise ConfigError(f"{place or 'config'}: {message}{given}") from error
