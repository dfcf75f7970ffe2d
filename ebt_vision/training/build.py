"""Build the model, objective and task of a config. Only this module knows which belong together."""

import re

import torch
from torch import Tensor, nn

from ebt_vision.data.images import DataConfig
from ebt_vision.data.text import TextDataConfig
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.patch_trunk import PatchTrunk
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.models.registry import model_class, objective_class
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.objectives.base import Objective
from ebt_vision.objectives.image import ObjectiveConfig
from ebt_vision.training.config import ConfigError, ExperimentConfig
from ebt_vision.training.image_task import ImageTask
from ebt_vision.training.task import Task
from ebt_vision.training.text_task import TextTask

STEP_SIZE = "log_step_size"
RELATED_MODELS = frozenset({"patch_ebt", "patch_eqm", "patch_regressor"})
"""Types with one trunk and one head: each can begin with the other's weights."""

_STEM_BLOCK = re.compile(r"(trunk\.stem|head)\.levels\.\d+\.[1-9]\d*\.")
"""Parameters of the second and later blocks of a level."""


def build_model(config: ExperimentConfig) -> PretrainedModel:
    """Build a model in train mode with initial weights or the weights of train.init_from; see PatchEBT.adapt_weights.

    A PatchEBT with a quadratic head and a regressor of the same size accept the weights of each other: the prediction of the
    regressor becomes the reconstruction of the energy. Raises ConfigError if the two models differ in type or size,
    CheckpointError if init_from cannot be loaded.
    """
    model = model_class(config.model_type)(config.model).train()
    if config.train.init_from is None:
        return model
    start = load_pretrained(config.train.init_from)
    related = {start.model_type, config.model_type} <= RELATED_MODELS
    if start.model_type != config.model_type and not related:
        raise ConfigError(f"train.init_from={config.train.init_from} is a {start.model_type}, not a {config.model_type}")
    weights, mine = start.state_dict(), model.state_dict()
    if isinstance(model, PatchEBT):
        weights = model.adapt_weights(weights)
    if start.model_type != config.model_type:  # only the EBT has a learned step size
        weights = {name: value for name, value in weights.items() if name != STEP_SIZE}
        weights |= {name: value for name, value in mine.items() if name == STEP_SIZE}
    weights = _new_blocks(weights, mine) | weights
    for name in sorted(weights.keys() | mine.keys()):
        shapes = [tuple(state[name].shape) if name in state else "missing" for state in (weights, mine)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"train.init_from={config.train.init_from} does not fit model: {name} is {shapes[0]} there, {shapes[1]} here"
            )
    model.load_state_dict(weights)
    return model


def _new_blocks(weights: dict[str, Tensor], mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Initial weights (the identity) of the residual blocks of stem and decoder that are missing in `weights`."""
    new = {name: value for name, value in mine.items() if name not in weights and _STEM_BLOCK.match(name)}
    return {name: torch.zeros_like(value) if ".conv2." in name else value for name, value in new.items()}


def build_objective(model: nn.Module, config: ExperimentConfig) -> Objective:
    """Build the objective of the model, compiled if configured. Raises ConfigError for an option that it does not use."""
    cls = objective_class(config.model_type)
    if config.replay.capacity and not cls.thinks:
        raise ConfigError(f"replay.capacity={config.replay.capacity} is for energy-based models; use 0 for {config.model_type}")
    if isinstance(config.objective, ObjectiveConfig) and config.objective.energy_order_weight and not cls.thinks:
        raise ConfigError(f"objective.energy_order_weight is for energy-based models; use 0 for {config.model_type}")
    if config.replay.capacity and isinstance(config.data, DataConfig) and config.data.cut_sizes:
        raise ConfigError("replay.capacity cannot be combined with data.cut_sizes: replayed rows have one size; use 0 or []")
    if config.replay.capacity and isinstance(config.objective, ObjectiveConfig) and config.objective.thinking_share < 1:
        raise ConfigError(
            "replay.capacity cannot be combined with objective.thinking_share: a replayed row needs a sample; use 1"
        )
    reconstructs = isinstance(config.objective, ObjectiveConfig) and config.objective.reconstruction_weight > 0
    if reconstructs and not (isinstance(model, PatchEBT) and model.config.energy_head == "quadratic"):
        raise ConfigError("objective.reconstruction_weight is only for patch_ebt with a quadratic energy_head; use 0")
    realistic = isinstance(config.objective, ObjectiveConfig) and config.objective.realistic_noise is not None
    if realistic and noise_process_of(model) != "awgn":
        raise ConfigError(
            f"objective.realistic_noise is for models of noise_process 'awgn', not for this {config.model_type}; use null"
        )
    if config.train.checkpoint_blocks:
        trunk = getattr(model, "trunk", None)
        if not isinstance(trunk, PatchTrunk):
            raise ConfigError(
                f"train.checkpoint_blocks is for models on the patch trunk (patch_*), not {config.model_type}; use false"
            )
        trunk.checkpoint_blocks = True
    if cls.thinks:  # the gradient of the energy is compiled
        objective: Objective = cls(model, config.objective, compile_gradient=config.train.compile)
        return objective
    if config.train.compile:
        model.compile()
    objective = cls(model, config.objective)
    return objective


def build_task(config: ExperimentConfig) -> Task:
    """Build the task of the modality. Raises ConfigError for settings that cannot be combined."""
    tasks: dict[type, type[Task]] = {DataConfig: ImageTask, TextDataConfig: TextTask}
    return tasks[type(config.data)](config)
