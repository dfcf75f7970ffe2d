"""The accelerate engine of a run: its device, its precision, and the options that it refuses."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, patch_environment

from ebt_vision.models.checkpoint import pick_device
from ebt_vision.training.config import ConfigError, ExperimentConfig


def build_accelerator(config: ExperimentConfig, device: str | None) -> Accelerator:
    """Create the engine on `device`. None uses the settings of accelerate, or else the fastest available device.

    Raises ValueError for a device that this machine does not have. Raises ConfigError for a numbered device with several
    processes (each has its own), for an engine that shards the weights, and for a batch that is not divisible by the processes.
    """
    environment: dict[str, str] = {}
    if device is not None:
        wanted = torch.device(pick_device(device))
        if wanted.index is not None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ConfigError(f"device={device} is one device for several processes; use {wanted.type}, each uses its own")
            environment["ACCELERATE_TORCH_DEVICE"] = device
            torch.cuda.set_device(wanted)
    unused = DistributedDataParallelKwargs(find_unused_parameters=may_leave_parameters_unused(config))
    with patch_environment(**environment):
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_steps=config.train.num_accumulation,
            cpu=device == "cpu",
            kwargs_handlers=[unused],
        )
    if device is not None and not _is_on(accelerator.device, wanted):
        raise ConfigError(f"device={device}: accelerate already runs on {accelerator.device}; start a new process")
    _check_sharding(accelerator)
    _check_batch(accelerator, config)
    return accelerator


def may_leave_parameters_unused(config: ExperimentConfig) -> bool:
    """Whether a parameter may get no gradient in an update. DDP must then search for it after each forward pass."""
    # The bias of the last norm adds a constant to a linear energy; it changes no candidate and gets no gradient.
    return getattr(config.model, "energy_head", None) == "linear"


def _is_on(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and (wanted.index is None or device.index == wanted.index)


def _check_sharding(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ConfigError(
            f"{kind} shards the weights and frees them after a backward pass, but thinking differentiates this pass again; "
            "use `accelerate launch --multi_gpu` (DDP), and train.checkpoint_blocks to save memory"
        )


def _check_batch(accelerator: Accelerator, config: ExperimentConfig) -> None:
    parts = accelerator.num_processes * config.train.num_accumulation
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} is not divisible by {accelerator.num_processes} processes times "
            f"num_accumulation={config.train.num_accumulation}; use a multiple of {parts}"
        )
