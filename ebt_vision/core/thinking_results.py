"""The results of thinking: the result, a step for a callback, and the errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


class ThinkingError(RuntimeError):
    """Thinking is impossible; the message gives the reason and the remedy."""


class NonFiniteGradientError(ThinkingError):
    """An energy or its gradient became infinite or NaN; `step` is the thinking step, `samples` the batch positions."""

    def __init__(self, step: int, samples: Sequence[int]):
        self.step, self.samples = step, list(samples)
        super().__init__(
            f"the energy or its gradient is not finite at thinking step {step} for samples {self.samples}; "
            "check the input for NaN, or use a smaller step size"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingStep:
    """The input of a callback: the candidate before the first update (index 0) or after update `index`, and its energy."""

    index: int
    candidate: Tensor  # (B, ...)
    energies: Tensor  # (B,) or (B, S)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingResult:
    """The result of thinking. T is the number of steps; E is (B,) for images, (B, S) for text."""

    final: Tensor
    """The last candidate of every sample, (B, ...)."""
    predictions: tuple[Tensor, ...]
    """The candidate after each update, T of (B, ...), part of the graph if create_graph; empty if not kept."""
    energies: Tensor
    """Energy before the first and after every update, (T + 1, *E); a stopped sample repeats its last energy. The last row is
    NaN with evaluate_final=False."""
    gradient_norms: Tensor
    """Norm of each element's energy gradient at each update, (T, *E); 0 for stopped samples."""
    num_steps: Tensor
    """Number of updates of each sample's final candidate, int64 (B,)."""
    num_forward: Tensor
    """Energy evaluations for each sample, including the last one without a gradient, int64 (B,)."""
    finite: Tensor
    """Whether all energies and gradients were finite, bool (), on the candidates' device; True unless check_finite=False."""


Callback = Callable[[ThinkingStep], object]
"""A return value of True stops thinking."""
