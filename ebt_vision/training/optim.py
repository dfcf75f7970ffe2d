"""Optimiser and schedule: AdamW, warm-up and cosine, groups without weight decay, the step size's own learning rate."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

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
        for name in ("lr", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "warmup_updates", "final_lr_ratio", "step_size_lr_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over three groups, each with the `lr_ratio` that set_learning_rate multiplies by."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "step_size": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "step_size" if name.endswith("log_step_size") else "decay" if parameter.ndim > 1 else "no_decay"
        groups[kind].append(parameter)
    settings = [("decay", config.weight_decay, 1.0), ("no_decay", 0.0, 1.0), ("step_size", 0.0, config.step_size_lr_ratio)]
    return torch.optim.AdamW(
        [dict(params=groups[kind], weight_decay=wd, lr_ratio=ratio) for kind, wd, ratio in settings if groups[kind]],
        lr=config.lr,
        betas=config.betas,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, num_updates: int) -> float:
    """Set and return the learning rate of update `step` (0-based) of `num_updates`: linear warm-up, then cosine."""
    warmup = min(1.0, (step + 1) / max(config.warmup_updates, 1))
    progress = min(max((step - config.warmup_updates) / max(num_updates - config.warmup_updates, 1), 0.0), 1.0)
    cosine = config.final_lr_ratio + (1.0 - config.final_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    lr = config.lr * warmup * cosine
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    return lr
