"""What the training loop knows of an objective, whatever the modality.

An objective is a module that holds the model. DistributedDataParallel wraps the objective, so it sees one forward and one
backward for a training step, however many times thinking differentiates inside. That keeps the second-order gradient exact over
processes: the inner gradients never touch `.grad`, and only the outer backward is reduced.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ebt_vision.core.thinking import ThinkingResult


class Objective(nn.Module):
    """Loss of one model on batches of its modality; `forward` returns {"loss": (), and tensors to log or to replay}."""

    thinks: ClassVar[bool] = False
    """Whether there are trajectories that a replay buffer can continue; such an objective has the next three methods."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """{"loss": () with a graph, ...}."""

    def continue_thinking(self, batch: Any, rows: dict[str, Tensor]) -> Any:
        """The batch with explicit starts, its last places taken by replayed rows (none of them where `rows` is empty)."""
        raise NotImplementedError(f"{type(self).__name__} has no trajectories")

    def replay_rows(self, batch: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a replay buffer keeps of a batch, and continue_thinking takes back: tensors (B, ...) by name."""
        raise NotImplementedError(f"{type(self).__name__} has no trajectories")

    def logs(self, batch: Any, output: dict[str, Tensor]) -> dict[str, float | Callable[[], float]]:
        """Numbers to log beside the loss; a callable is called only where they are logged."""
        return {}


def put_last(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """`tensor` (B, ...) with its last places taken by `rows` (K, ...), as a new tensor."""
    return tensor if rows is None else torch.cat([tensor[: len(tensor) - len(rows)], rows])


def thinking_output(
    result: ThinkingResult, step_size: Tensor, loss_steps: str, loss_of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What an energy-based objective returns: the mean loss () over the steps that train, and what to log or to replay.

    `loss_of` gives the losses (B,) or (B, S) of a prediction.
    """
    # Only steps that the graph reaches can train; truncation leaves the last few.
    predictions = [p for p in result.predictions if p.requires_grad]
    if loss_steps == "last":
        predictions = predictions[-1:]
    last = len(result.predictions) - 1
    loss = torch.stack([loss_of(p) for p in predictions]).mean()
    return {
        "loss": loss.where(result.finite, torch.nan),  # the training loop refuses the update, in every process alike
        "candidate": result.final.detach(),
        "step_size": step_size.detach(),
        "energy_before_last_update": result.energies[last].detach(),
        "candidate_gradient_norm": result.gradient_norms[last],
    }


def thinking_logs(output: dict[str, Tensor], energy_after: Callable[[], float]) -> dict[str, float | Callable[[], float]]:
    """Step size, and the energy before and after the *last* update; read from the device only when logged."""
    return {
        "step_size": lambda: output["step_size"].item(),
        "candidate_gradient_norm": lambda: output["candidate_gradient_norm"].mean().item(),
        "energy_before_last_update": lambda: output["energy_before_last_update"].mean().item(),
        "energy_after_last_update": energy_after,
    }
