"""Peak memory of one task. Use it in a process that does nothing else, because freed memory may be used again."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the peak memory of two calls of `call` beyond the memory before: activations, gradients, optimiser state.

    On CUDA this is memory allocated by PyTorch; elsewhere it is the resident memory of the process, including libraries.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(), call()
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident()
    call(), call()
    return max(0, _highest() - before)


def _resident() -> int:
    """Return the current resident memory and reset its peak (Linux); on other systems return the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _highest()
    return pages * resource.getpagesize()


def _highest() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else 1024 * highest
