"""Optimiser and schedule: AdamW or Muon, warm-up and cosine, groups without weight decay, a learning rate for the step size."""

import math

import torch
from torch import nn

from ebt_vision.training.muon import Muon
from ebt_vision.training.settings import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, *, bfloat16: bool = False) -> torch.optim.Optimizer:
    """Create AdamW or Muon with three groups; each has the `lr_ratio` for set_learning_rate. `bfloat16` is as in Muon."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "step_size": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim > 1 and len(parameter) > 1  # an embedding of one class is a vector
        kind = "step_size" if name.endswith("log_step_size") else "matrices" if is_matrix else "vectors"
        groups[kind].append(parameter)
    settings = [("matrices", config.weight_decay, 1.0), ("vectors", 0.0, 1.0), ("step_size", 0.0, config.step_size_lr_ratio)]
    filled = [
        (kind, dict(params=groups[kind], weight_decay=decay, lr_ratio=ratio)) for kind, decay, ratio in settings if groups[kind]
    ]
    if config.optimizer == "muon":
        orthogonal = [group | {"orthogonal": kind == "matrices"} for kind, group in filled]
        return Muon(orthogonal, lr=config.lr, betas=config.betas, bfloat16=bfloat16)
    return torch.optim.AdamW([group for _, group in filled], lr=config.lr, betas=config.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, num_updates: int) -> float:
    """Set and return the learning rate of update `step` (0-based) of `num_updates`: linear warm-up, then cosine."""
    warmup = min(1.0, (step + 1) / max(config.warmup_updates, 1))
    progress = min(max((step - config.warmup_updates) / max(num_updates - config.warmup_updates, 1), 0.0), 1.0)
    cosine = config.final_lr_ratio + (1.0 - config.final_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    lr = config.lr * warmup * cosine
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    return lr
