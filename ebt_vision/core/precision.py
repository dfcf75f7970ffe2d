"""Whether bfloat16 is fast on a device, and the autocast context that uses it."""

import contextlib
from typing import Literal, get_args

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""auto: bfloat16 if the device is fast at bfloat16 and the network loses no quality, otherwise float32."""


def has_fast_bfloat16(device: str | torch.device) -> bool:
    """Whether the device has instructions for bfloat16: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX.

    Other CPUs emulate bfloat16 and are many times slower than with float32. MPS counts as slow, because its autocast is new.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for them
        return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
    return False


def autocast(device: str | torch.device, *, bfloat16: bool) -> contextlib.AbstractContextManager[None]:
    """torch.autocast in bfloat16 on the device; a context that does nothing without `bfloat16`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one of Precision."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} is unknown; use one of {', '.join(get_args(Precision))}")
