"""From a config to a model and its objective: the one place that knows which belongs to which."""

from torch import nn

from ebt_vision.checkpoint import model_class
from ebt_vision.config import ExperimentConfig
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.objectives import DiTObjective, EBTObjective, Objective, RegressorObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "patch_ebt": EBTObjective,
    "patch_regressor": RegressorObjective,
    "dit": DiTObjective,
}


def build_model(config: ExperimentConfig) -> PretrainedModel:
    """A fresh model with initial weights, in train mode."""
    return model_class(config.model_type)(config.model).train()


def build_objective(model: nn.Module, config: ExperimentConfig) -> Objective:
    """The objective of the model, compiled if the config says so."""
    if config.model_type == "patch_ebt":
        return EBTObjective(model, config.objective, compile_gradient=config.train.compile)  # type: ignore[arg-type]
    if config.train.compile:
        model.compile()
    return OBJECTIVES[config.model_type](model, config.objective)
