"""The model types: where the class of each model_type of a config.json is."""

import importlib

from ebt_vision.models.pretrained_model import CheckpointError, PretrainedModel

# Imported when asked for, because diffusers takes seconds.
MODEL_CLASSES = {
    "patch_ebt": ("ebt_vision.models.patch_ebt", "PatchEBT"),
    "patch_regressor": ("ebt_vision.models.regressor", "PatchRegressor"),
    "dit": ("ebt_vision.models.dit", "DiT"),
    "causal_text_ebt": ("ebt_vision.models.causal_text_ebt", "CausalTextEBT"),
    "causal_transformer": ("ebt_vision.models.causal_transformer", "CausalTransformer"),
}


def model_class(model_type: str) -> type[PretrainedModel]:
    """The class of a `model_type`; CheckpointError names the known ones for another."""
    if model_type not in MODEL_CLASSES:
        raise CheckpointError(f"model_type={model_type!r} is unknown; known: {', '.join(MODEL_CLASSES)}")
    module, name = MODEL_CLASSES[model_type]
    cls: type[PretrainedModel] = getattr(importlib.import_module(module), name)
    return cls
