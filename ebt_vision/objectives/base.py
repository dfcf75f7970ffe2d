"""The interface between the training loop and an objective, for all modalities.

An objective is a module that holds the model. DistributedDataParallel wraps the objective, so it sees one forward and one
backward pass per training step, for any number of gradients inside thinking. The second-order gradient is then exact over
processes: the inner gradients never touch `.grad`, and only the outer backward pass is reduced.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ebt_vision.core.thinking_results import ThinkingResult


class Objective(nn.Module):
    """Loss of a model on batches of its modality; `forward` returns {"loss": (), and tensors to log or to replay}."""

    thinks: ClassVar[bool] = False
    """Whether a replay buffer can continue trajectories; the next three methods are then defined."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return {"loss": () with a graph, ...}."""

    def continue_thinking(self, batch: Any, rows: dict[str, Tensor]) -> Any:
        """Return the batch with explicit starts; replayed rows take its last places (none if `rows` is empty)."""
        raise NotImplementedError(f"{type(self).__name__} has no trajectories")

    def replay_rows(self, batch: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors (B, ...) by name that a replay buffer keeps, and that continue_thinking takes."""
        raise NotImplementedError(f"{type(self).__name__} has no trajectories")

    def logs(self, batch: Any, output: dict[str, Tensor]) -> dict[str, float | Callable[[], float]]:
        """Return numbers to log with the loss; a callable is evaluated only if it is logged."""
        return {}


def put_last(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return a copy of `tensor` (B, ...) whose last places are `rows` (K, ...)."""
    return tensor if rows is None else torch.cat([tensor[: len(tensor) - len(rows)], rows])


def thinking_output(
    result: ThinkingResult, step_size: Tensor, loss_steps: str, loss_of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the output of an energy-based objective: the mean loss () over the trained steps, and values to log or to replay.

    `loss_of` returns the losses (B,) or (B, S) of a prediction.
    """
    # Only steps in the graph can train; truncation keeps the last few.
    predictions = [p for p in result.predictions if p.requires_grad]
    if loss_steps == "last":
        predictions = predictions[-1:]
    last = len(result.predictions) - 1
    loss = torch.stack([loss_of(p) for p in predictions]).mean()
    return {
        "loss": loss.where(result.finite, torch.nan),  # every process then refuses the update
        "candidate": result.final.detach(),
        "step_size": step_size.detach(),
        "energy_before_last_update": result.energies[last].detach(),
        "candidate_gradient_norm": result.gradient_norms[last],
    }


def thinking_logs(output: dict[str, Tensor], energy_after: Callable[[], float]) -> dict[str, float | Callable[[], float]]:
    """Return step size, and energy before and after the *last* update; the device is read only when they are logged."""
    return {
        "step_size": lambda: output["step_size"].item(),
        "candidate_gradient_norm": lambda: output["candidate_gradient_norm"].mean().item(),
        "energy_before_last_update": lambda: output["energy_before_last_update"].mean().item(),
        "energy_after_last_update": energy_after,
    }
