"""The table of model types: the classes of each, by name, and its modality (images or text).

Classes are imported on use, because diffusers, which the DiT needs, takes seconds to import.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal


class UnknownModelTypeError(ValueError):
    """A model_type is not in the table; the message lists the known ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelType:
    """The parts of one model type as "module:name" below ebt_vision."""

    model: str
    config: str
    objective: str
    modality: Literal["image", "text"]


MODEL_TYPES = {
    "patch_ebt": ModelType(
        model="models.patch_ebt:PatchEBT",
        config="models.patch_ebt:PatchEBTConfig",
        objective="objectives.image:EBTObjective",
        modality="image",
    ),
    "dit": ModelType(
        model="models.dit:DiT",
        config="models.dit_config:DiTConfig",
        objective="objectives.image:DiffusionObjective",
        modality="image",
    ),
    "patch_diffusion": ModelType(
        model="models.patch_diffusion:PatchDiffusion",
        config="models.patch_diffusion_config:PatchDiffusionConfig",
        objective="objectives.image:DiffusionObjective",
        modality="image",
    ),
    "patch_regressor": ModelType(
        model="models.regressor:PatchRegressor",
        config="models.regressor:PatchRegressorConfig",
        objective="objectives.image:RegressorObjective",
        modality="image",
    ),
    "patch_eqm": ModelType(
        model="models.equilibrium:PatchEqM",
        config="models.equilibrium:PatchEqMConfig",
        objective="objectives.equilibrium:EqMObjective",
        modality="image",
    ),
    "causal_text_ebt": ModelType(
        model="models.causal_text_ebt:CausalTextEBT",
        config="models.causal_text_ebt:CausalTextEBTConfig",
        objective="objectives.text:TextEBTObjective",
        modality="text",
    ),
    "causal_transformer": ModelType(
        model="models.causal_transformer:CausalTransformer",
        config="models.causal_transformer:CausalTransformerConfig",
        objective="objectives.text:LanguageModelObjective",
        modality="text",
    ),
}


def find_model_type(name: str) -> ModelType:
    """Return the entry of a `model_type`. Raises UnknownModelTypeError, which names the known types."""
    if name not in MODEL_TYPES:
        raise UnknownModelTypeError(f"model_type={name!r} is unknown; use one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[name]


def image_model_types() -> list[str]:
    """Return the names of the model types of images."""
    return [name for name, entry in MODEL_TYPES.items() if entry.modality == "image"]


def model_class(model_type: str) -> Any:
    """Return the PretrainedModel subclass of a model type."""
    return _load(find_model_type(model_type).model)


def config_class(model_type: str) -> Any:
    """Return the config dataclass of a model type without importing its network."""
    return _load(find_model_type(model_type).config)


def objective_class(model_type: str) -> Any:
    """Return the training objective (objectives.base.Objective) of a model type."""
    return _load(find_model_type(model_type).objective)


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(f"ebt_vision.{module}"), name)
