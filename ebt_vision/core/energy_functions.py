"""Energy functions, the input of thinking: their interfaces, and one that torch.compile speeds up.

An energy function takes `(candidate, *context)`, all batch first, and returns one energy per element, lower is better: (B,)
for images, (B, S) for text. Elements must not depend on one another, so that the gradient of the sum is the gradient of each.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class EnergyFunction(Protocol):
    """`(candidate (B, ...), *context) -> energies (B,) or (B, S)`; lower is better."""

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor: ...


@runtime_checkable
class SteppedEnergy(Protocol):
    """An energy that changes with the thinking step: update t + 1 uses the gradient of `at_step(t)`.

    After the last of T updates the energy is `at_step(T)`.
    """

    def at_step(self, step: int) -> EnergyFunction: ...


@runtime_checkable
class EnergyWithGradient(Protocol):
    """An energy function that also returns its direction of ascent. think() uses this direction and does not differentiate."""

    def energy_and_gradient(self, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]: ...


class CompiledEnergy:
    """An energy function whose value and gradient come from one graph of torch.compile, for long training.

    Candidate (B, ...) and context (B, ...) -> energies (B,) or (B, S).

    torch.compile cannot differentiate a compiled forward pass twice. It can compile the gradient (torch.func.grad) as a
    function; the backward pass of this function is the second order. Values agree up to rounding. A CPU needs a C++ compiler.
    If compiling fails, a warning is given once and the energy runs without compiling.
    """

    def __init__(self, energy_fn: EnergyFunction, *, backend: str | Callable[..., Any] = "inductor"):
        self.energy_fn = energy_fn
        self._eager = functools.partial(_functional_gradient, energy_fn)
        self._energy_and_gradient = torch.compile(self._eager, backend=backend)

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor:
        return self.energy_fn(candidate, *context)

    def energy_and_gradient(self, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return (energies (B,) or (B, S), gradient (B, ...) of their sum); both are in the graph if one is recorded."""
        try:
            gradient, energy = self._energy_and_gradient(candidate, *context)
        except torch._dynamo.exc.TorchDynamoException as error:  # for example without a C++ compiler
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"the energy's gradient cannot be compiled ({reason}); continuing without compiling", stacklevel=2)
            self._energy_and_gradient = self._eager
            gradient, energy = self._eager(candidate, *context)
        return energy, gradient


def _functional_gradient(energy_fn: EnergyFunction, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
    def total(candidate: Tensor) -> tuple[Tensor, Tensor]:
        energy = energy_fn(candidate, *context)
        return energy.sum(), energy

    return torch.func.grad(total, has_aux=True)(candidate)
