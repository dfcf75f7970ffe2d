"""Optimiser and schedule: AdamW or Muon, warm-up and cosine, groups without weight decay, the step size's own learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ebt_vision.training.muon import Muon


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """An optimiser with linear warm-up and cosine decay."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of matrices (see Muon) and leaves the rest to AdamW; both take the same lr."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    """On matrices alone; norms, biases, gates and the step size have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_updates: int = 200
    final_lr_ratio: float = 0.01
    """Where the cosine ends, as a share of lr."""
    step_size_lr_ratio: float = 3.0
    """Learning rate of the logarithm of the step size, relative to lr (the paper's code: 3 times alpha, on alpha itself)."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optim.optimizer={self.optimizer!r} is unknown; use 'adamw' or 'muon'")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive and finite")
        for name in ("weight_decay", "warmup_updates", "final_lr_ratio", "step_size_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")


def build_optimizer(model: nn.Module, config: OptimConfig, *, bfloat16: bool = False) -> torch.optim.Optimizer:
    """AdamW or Muon over three groups, each with the `lr_ratio` that set_learning_rate multiplies by; `bfloat16` as in Muon."""
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
