"""Settings of a training run that belong to no single part of it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch, precision, checkpoints."""

    init_from: str | None = None
    """Begin with the weights of another model of the same parts: a shipped name, a folder or hub:OWNER/NAME. A PatchEBT with
    observation_context may begin with one without; a PatchEBT and a regressor of the same size with each other's weights; a
    network with more model.stem_blocks with one of fewer, the new blocks being the identity at first."""
    num_updates: int = 1000
    batch_size: int = 32
    """Samples of one update, over all processes and accumulated parts together."""
    num_accumulation: int = 1
    """Parts that a process's share of the batch is split into to save memory; the gradient is the same."""
    num_load_threads: int = 0
    """Threads of each process that make the next batches while the model works; 0 makes each when its turn comes."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 autocast, and bfloat16 in Muon; pays on GPUs and on CPUs with AMX or AVX512-BF16, and is very slow on others."""
    compile: bool = False
    """Compile the energy's gradient (needs a C++ compiler on the CPU); the DiT and the regressor compile their forward."""
    checkpoint_blocks: bool = False
    """Keep each block's input instead of its activations: twice the arithmetic for a fraction of the memory."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones validated and exported; warmed up over the first updates."""
    log_every: int = 20
    checkpoint_every: int = 500
    num_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        for name in ("num_updates", "batch_size", "num_accumulation", "log_every", "checkpoint_every", "num_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 1 or more")
        if self.num_load_threads < 0:
            raise ValueError(f"train.num_load_threads={self.num_load_threads} is negative; use 0 or more")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"train.ema_decay={self.ema_decay} is not in [0, 1)")
        if self.checkpoint_blocks and self.compile:
            raise ValueError("train.checkpoint_blocks does not go together with train.compile; use compile: false")
        if self.batch_size % self.num_accumulation:
            raise ValueError(f"train.batch_size={self.batch_size} is not divisible by num_accumulation={self.num_accumulation}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """What is measured while training, on the averaged weights."""

    path: str | None = None
    """Held-out images, as data.path; null turns validation off."""
    split: str | None = None
    num_images: int = 128
    levels: tuple[float, ...] = (0.1, 0.2)
    """Noise levels to denoise at; the first is the one reported first."""
    sigmas: tuple[float, ...] = (15.0, 25.0, 50.0)
    """In place of `levels` for models of noise_process "awgn": standard deviations in 0..255 units."""
    num_steps: int = 8
    every: int = 500
    """Updates between two validations; one more is made at the end."""
    num_grid_images: int = 6

    def __post_init__(self) -> None:
        for name in ("num_images", "num_steps", "every", "num_grid_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name}={getattr(self, name)} must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextValidationConfig:
    """What is measured on text while training, on the averaged weights."""

    path: str | None = None
    """Held-out text, as data.path; null turns validation off."""
    split: str | None = None
    share: tuple[float, float] = (0.0, 1.0)
    """The part of its token stream to use, as data.share."""
    max_tokens: int | None = None
    num_sequences: int = 64
    """The first so many sequences are measured."""
    num_steps: int = 8
    every: int = 500
    """Updates between two validations; one more is made at the end."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_sequences", "num_steps", "every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name}={getattr(self, name)} must be 1 or more")


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
