"""Where the time of a call goes, by kind of work, as torch's profiler sees it."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
"""In the names of the fused operations; on CUDA the inner ones launch the kernels."""
COMPILED = ("graph_", "triton_")
KINDS = ("matrix products", "fused attention", "compiled kernels", "optimizer", "other")


def show_compiled_kernels() -> None:
    """Let torch.compile's CPU kernels appear in profiles by themselves. To be called before anything is compiled."""
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True


def time_by_kind(call: Callable[[], object], device: torch.device | str = "cpu") -> dict[str, float]:
    """Shares of one call's time in 0..1, one for each of KINDS; they sum to 1. `call` should have been warmed up.

    On an accelerator the time of its kernels is counted, and kernels of matrix products and of attention are told by the
    operations that launched them. Profiling itself takes time, which lands in "other".
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
        if event.is_user_annotation and on_device:  # the span of a named region, which counts all of its kernels again
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        # A kernel is listed by itself and again in the operation that launched it: the sum is over kernels, the kinds are told
        # by the operations, but for compiled kernels, which carry their names themselves.
        total += own if on_device == cuda else 0.0
        if event.key.startswith(COMPILED):
            found["compiled kernels"] += own if on_device == cuda else 0.0
        elif on_device:
            continue
        elif event.key.startswith("Optimizer.step"):  # with all that it calls: AdamW has no matrix products
            found["optimizer"] += event.device_time_total if cuda else event.cpu_time_total
        elif event.key in MATRIX_PRODUCTS:
            found["matrix products"] += own
        elif any(name in event.key for name in ATTENTION):
            found["fused attention"] += own
    found["other"] = max(0.0, total - sum(found.values()))
    whole = sum(found.values())
    return {kind: value / whole if whole else 0.0 for kind, value in found.items()}
