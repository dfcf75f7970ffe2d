"""Settings of a training run that do not belong to one part of it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch, precision, checkpoints."""

    init_from: str | None = None
    """Initialise with the weights of another model: a shipped name, a folder or hub:OWNER/NAME. A PatchEBT with
    observation_context accepts weights without it. A PatchEBT and a regressor of the same size accept each other's weights. A
    network with more model.stem_blocks accepts weights with fewer; the new blocks start as the identity."""
    num_updates: int = 1000
    batch_size: int = 32
    """Samples per update, in total over all processes and accumulated parts."""
    num_accumulation: int = 1
    """Number of parts into which each process splits its batch to save memory; the gradient is the same."""
    num_load_threads: int = 0
    """Threads per process that prepare the next batches while the model works; with 0 each batch is made when it is needed."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: bfloat16 autocast, and bfloat16 in Muon. Fast on GPUs and on CPUs with AMX or AVX512-BF16, very slow on others."""
    compile: bool = False
    """Compile the gradient of the energy (a CPU needs a C++ compiler); for DiT and regressor, compile the forward pass."""
    checkpoint_blocks: bool = False
    """Keep only the input of each block instead of all activations: twice the arithmetic for a fraction of the memory."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are validated and exported. The decay is warmed up over the first updates."""
    log_every: int = 20
    checkpoint_every: int = 500
    num_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

    def __post_init__(self) -> None:
        for name in ("num_updates", "batch_size", "num_accumulation", "log_every", "checkpoint_every", "num_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 1 or more")
        if self.num_load_threads < 0:
            raise ValueError(f"train.num_load_threads={self.num_load_threads} is negative; use 0 or more")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"train.ema_decay={self.ema_decay} is not in [0, 1)")
        if self.checkpoint_blocks and self.compile:
            raise ValueError("train.checkpoint_blocks cannot be combined with train.compile; use compile: false")
        if self.batch_size % self.num_accumulation:
            raise ValueError(f"train.batch_size={self.batch_size} is not divisible by num_accumulation={self.num_accumulation}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Validation on images during training, with the averaged weights."""

    path: str | None = None
    """Held-out images, in the same forms as data.path; null disables validation."""
    split: str | None = None
    num_images: int = 128
    levels: tuple[float, ...] = (0.1, 0.2)
    """Noise levels to denoise at; the first one is reported first."""
    sigmas: tuple[float, ...] = (15.0, 25.0, 50.0)
    """Standard deviations in 0..255 units; they replace `levels` for models of noise_process "awgn"."""
    num_steps: int = 8
    every: int = 500
    """Updates between two validations; another validation is made at the end."""
    num_grid_images: int = 6

    def __post_init__(self) -> None:
        for name in ("num_images", "num_steps", "every", "num_grid_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name}={getattr(self, name)} must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextValidationConfig:
    """Validation on text during training, with the averaged weights."""

    path: str | None = None
    """Held-out text, in the same forms as data.path; null disables validation."""
    split: str | None = None
    share: tuple[float, float] = (0.0, 1.0)
    """Part of the token stream to use, as in data.share."""
    max_tokens: int | None = None
    num_sequences: int = 64
    """Number of sequences to measure, from the start of the text."""
    num_steps: int = 8
    every: int = 500
    """Updates between two validations; another validation is made at the end."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_sequences", "num_steps", "every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name}={getattr(self, name)} must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Settings of an optimiser with linear warm-up and cosine decay."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of matrices (see Muon) and uses AdamW for the rest; both have the same lr."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    """For matrices only; norms, biases, gates and the step size have no weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_updates: int = 200
    final_lr_ratio: float = 0.01
    """Learning rate at the end of the cosine, as a fraction of lr."""
    step_size_lr_ratio: float = 3.0
    """Learning rate of the logarithm of the step size, relative to lr (paper's code: 3 alpha, for alpha itself)."""
    clip_norm: float = 1.0
    """Maximum norm of the whole gradient."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optim.optimizer={self.optimizer!r} is unknown; use 'adamw' or 'muon'")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive and finite")
        for name in ("weight_decay", "warmup_updates", "final_lr_ratio", "step_size_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")
