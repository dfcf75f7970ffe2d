"""Time of a call by kind of work, from torch's profiler."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
"""Parts of the names of fused operations; on CUDA the inner operations launch the kernels."""
COMPILED = ("graph_", "triton_")
KINDS = ("matrix products", "fused attention", "compiled kernels", "optimizer", "other")


def show_compiled_kernels() -> None:
    """Show torch.compile's CPU kernels separately in profiles. Call this before anything is compiled."""
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True


def time_by_kind(call: Callable[[], object], device: torch.device | str = "cpu") -> dict[str, float]:
    """Return the fraction of one call's time for each of KINDS, in 0..1, with sum 1. Warm up `call` first.

    On an accelerator the time of kernels is counted; the launching operations tell kernels of matrix products from attention.
    The overhead of profiling is in "other".
    """
    cuda = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    found = dict.fromkeys(KINDS, 0.0)
    total = 0.0
    for event in profiler.key_averages():
        on_device = event.device_type != DeviceType.CPU
        if event.is_user_annotation and on_device:  # a named region would count all its kernels again
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        # A kernel is listed separately and again in the operation that launched it. The sum is over kernels; the operations
        # give the kinds, except for compiled kernels, which have their own names.
        total += own if on_device == cuda else 0.0
        if event.key.startswith(COMPILED):
            found["compiled kernels"] += own if on_device == cuda else 0.0
        elif on_device:
            continue
        elif event.key.startswith("Optimizer.step"):  # includes everything it calls; AdamW has no matrix products
            found["optimizer"] += event.device_time_total if cuda else event.cpu_time_total
        elif event.key in MATRIX_PRODUCTS:
            found["matrix products"] += own
        elif any(name in event.key for name in ATTENTION):
            found["fused attention"] += own
    found["other"] = max(0.0, total - sum(found.values()))
    whole = sum(found.values())
    return {kind: value / whole if whole else 0.0 for kind, value in found.items()}
