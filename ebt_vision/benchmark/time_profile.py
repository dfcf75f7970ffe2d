"""Where the time of a call goes, by kind of work, as torch's profiler sees it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
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
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        total += own
        if event.key.startswith("Optimizer.step"):  # with all that it calls: AdamW has no matrix products
            found["optimizer"] += event.device_time_total if cuda else event.cpu_time_total
        elif event.key in MATRIX_PRODUCTS:
            found["matrix products"] += own
        elif "scaled_dot_product" in event.key:
            found["fused attention"] += own
        elif event.key.startswith(("graph_", "triton_")):
            found["compiled kernels"] += own
    found["other"] = max(0.0, total - sum(found.values()))
    whole = sum(found.values())
    return {kind: value / whole if whole else 0.0 for kind, value in found.items()}
