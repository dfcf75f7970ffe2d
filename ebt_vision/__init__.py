"""Energy-Based Transformers for vision: train, compare, denoise.

The public names below are loaded on first use, so that `import ebt_vision` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebt_vision.core.best_of import best_of
    from ebt_vision.core.thinking import think
    from ebt_vision.core.thinking_config import ThinkingConfig
    from ebt_vision.core.thinking_results import ThinkingResult, ThinkingStep
    from ebt_vision.denoising.base import Denoiser
    from ebt_vision.denoising.load import load_denoiser
    from ebt_vision.denoising.options import DenoiseOptions
    from ebt_vision.denoising.results import DenoiseResult, DenoiseStep
    from ebt_vision.denoising.tiling import denoise_tiled
    from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
    from ebt_vision.models.checkpoint import list_pretrained, load_pretrained
    from ebt_vision.models.dit import DiT
    from ebt_vision.models.dit_config import DiTConfig
    from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
    from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
    from ebt_vision.probing.load import load_extractor
    from ebt_vision.restoration.options import RestoreOptions, RestoreResult
    from ebt_vision.restoration.restore import restore
    from ebt_vision.training.config import load_config

__version__ = "0.1.0"

_MODULE_OF = {
    "CausalTextEBT": "models.causal_text_ebt",
    "CausalTextEBTConfig": "models.causal_text_ebt",
    "DenoiseOptions": "denoising.options",
    "DenoiseResult": "denoising.results",
    "DenoiseStep": "denoising.results",
    "Denoiser": "denoising.base",
    "DiT": "models.dit",
    "DiTConfig": "models.dit_config",
    "PatchEBT": "models.patch_ebt",
    "PatchEBTConfig": "models.patch_ebt",
    "PatchRegressor": "models.regressor",
    "PatchRegressorConfig": "models.regressor",
    "RestoreOptions": "restoration.options",
    "RestoreResult": "restoration.options",
    "ThinkingConfig": "core.thinking_config",
    "ThinkingResult": "core.thinking_results",
    "ThinkingStep": "core.thinking_results",
    "best_of": "core.best_of",
    "denoise_tiled": "denoising.tiling",
    "list_pretrained": "models.checkpoint",
    "load_config": "training.config",
    "load_denoiser": "denoising.load",
    "load_extractor": "probing.load",
    "load_pretrained": "models.checkpoint",
    "restore": "restoration.restore",
    "think": "core.thinking",
}

__all__ = [
    "CausalTextEBT",
    "CausalTextEBTConfig",
    "DenoiseOptions",
    "DenoiseResult",
    "DenoiseStep",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "PatchEBT",
    "PatchEBTConfig",
    "PatchRegressor",
    "PatchRegressorConfig",
    "RestoreOptions",
    "RestoreResult",
    "ThinkingConfig",
    "ThinkingResult",
    "ThinkingStep",
    "__version__",
    "best_of",
    "denoise_tiled",
    "list_pretrained",
    "load_config",
    "load_denoiser",
    "load_extractor",
    "load_pretrained",
    "restore",
    "think",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
