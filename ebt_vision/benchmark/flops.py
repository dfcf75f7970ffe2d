"""Floating-point operations of a run, by PyTorch's counter: 2 for each multiply-add of matrix products and convolutions.

The gradient with respect to the image is counted as well. Element-wise operations, norms and softmax are not counted, because
the counter knows only products. While counting, attention uses the math path, so that the counter sees its products.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ebt_vision.benchmark.rows import Row
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.options import DenoiseOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of one image."""

    step: int
    """FLOPs of one step: for an EBT the energy and its gradient, for the others a forward pass."""
    final: int
    """FLOPs of the energy of the last image of an EBT; plain thinking does not need this energy."""

    def of_run(self, row: Row, num_forward: float, step: int) -> float:
        """Return the FLOPs up to the image of `step`, in a run with `num_forward` passes for this image."""
        if not row.needs_final_energy:
            return self.step * num_forward * step / row.num_steps
        # A run that stopped early ends with an unused gradient; other runs end with an energy only.
        whole, rest = divmod(num_forward, row.num_steps + 1)
        return whole * (row.num_steps * self.step + self.final) + rest * self.step


class CostMeter:
    """Count the FLOPs of each model once for every image size."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], Cost | None] = {}

    def cost(self, denoiser: Denoiser, height: int, width: int) -> Cost | None:
        """Return the cost of one image of this size without tiles; None for a method without a network."""
        key = (denoiser.name, height, width)
        if key not in self._known:
            self._known[key] = _measure(denoiser, height, width) if denoiser.num_parameters else None
        return self._known[key]


def _measure(denoiser: Denoiser, height: int, width: int) -> Cost:
    if isinstance(denoiser, DiTDenoiser):
        denoiser = DiTDenoiser(denoiser.model, mode="ddim", name=denoiser.name)
    image = torch.full((1, 3, height, width), 0.5)
    counts = []
    several = "num_steps" in denoiser.options_used
    for num_steps in (1, 2) if several else (1,):
        options = DenoiseOptions(num_steps=num_steps, noise_level=0.1, sigma=25.0)
        counts.append(count_flops(lambda options=options: denoiser.denoise_whole(image, options)))  # type: ignore[misc]
    if not several:
        return Cost(step=counts[0], final=0)
    step = counts[1] - counts[0]
    return Cost(step=step, final=counts[0] - step)


def count_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of matrix products and convolutions in one call, including backward passes."""
    with sdpa_kernel(SDPBackend.MATH), _counter() as counter:
        call()
    return int(counter.get_total_flops())


def _counter() -> FlopCounterMode:
    """PyTorch's counter without sums per module; the hooks for these sums refuse torch.autograd.grad from a leaf."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """Replaces the ModuleTracker of the counter: everything is counted for the whole model."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass
