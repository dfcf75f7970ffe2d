"""Objectives of the text models: from packed sequences to the cross-entropy of the next token and values to log."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.core.energy_functions import CompiledEnergy, EnergyFunction
from ebt_vision.core.rng import Generators, rand_like, randn_like
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.data.text import IGNORED
from ebt_vision.models.causal_text_ebt import CausalTextEBT
from ebt_vision.models.causal_transformer import CausalTransformer
from ebt_vision.objectives.base import Objective, put_last, thinking_logs, thinking_output


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """The part of one process in a training batch of packed sequences."""

    tokens: Tensor
    """int64 (B, S)."""
    targets: Tensor
    """int64 (B, S): the next token of each token, IGNORED if there is none."""
    starts: Tensor
    """int64 (B, S): the start of each token's document."""
    generators: list[torch.Generator]
    """One generator per sequence, for all draws."""
    start: Tensor | None = None
    """Start of thinking, (B, S, vocab_size), if a replay buffer provides candidate logits; None draws them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextObjectiveConfig:
    """Settings of the loss; all are for the EBT only, the language model has no settings."""

    loss_steps: Literal["every", "last"] = "every"
    """Average the loss over all thinking steps, or use only the last step."""
    thinking: ThinkingConfig = field(default_factory=lambda: ThinkingConfig(num_steps=2))
    """Thinking during training; its step_size is ignored, because the model has a learned one."""
    answer_share: float = 0.0
    """Share of the positions, in [0, 1], whose start is part of the way from random logits to a token: (1 - t) z + t c, with t
    uniform in [0, 1], z ~ N(0, 1) and c = answer_logit at the token, 0 elsewhere. The energy then trains at every distance."""
    wrong_share: float = 0.5
    """Share of these starts, in [0, 1], that lead to a wrong token, the target of another position. With right tokens alone, an
    energy that keeps every candidate would have no loss."""
    answer_logit: float = 8.0
    """Logit of the token at the end of the way."""

    def __post_init__(self) -> None:
        for name in ("answer_share", "wrong_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"objective.{name}={getattr(self, name)} is not in [0, 1]")
        if self.answer_logit <= 0:
            raise ValueError(f"objective.answer_logit={self.answer_logit} must be positive")
        if self.thinking.tolerance is not None:
            raise ValueError("objective.thinking.tolerance must be null in training: the graph needs every sample")
        if self.thinking.num_steps < 1 or self.thinking.min_num_steps == 0:
            raise ValueError("objective.thinking.num_steps and min_num_steps must be 1 or more in training")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPrediction:
    """`logits[i]` (B, S, vocab_size) after i + 1 steps, and energies (T + 1, B, S) if the model has any."""

    logits: list[Tensor]
    energies: Tensor | None = None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, (B, S), float32 or wider; 0 where the target is IGNORED."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


def batch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over sequences of the mean over tokens, (): the parts of a batch then average to the whole."""
    return (token_losses(logits, targets).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)).mean()


def draw_candidates(tokens: Tensor, vocab_size: int, dtype: torch.dtype, generator: Generators | None) -> Tensor:
    """Draw the start of thinking: logits ~ N(0, 1), (B, S, vocab_size), as in the paper."""
    return randn_like(torch.empty(*tokens.shape, vocab_size, dtype=dtype, device=tokens.device), generator)


def toward_tokens(start: Tensor, targets: Tensor, config: TextObjectiveConfig, generator: Generators | None) -> Tensor:
    """Move a share of random starts (B, S, vocab_size) part of the way to a token; see TextObjectiveConfig.answer_share.

    `targets` is int64 (B, S). The wrong tokens of a sequence are its own targets at another place. Positions without a target
    stay as they are.
    """
    is_moved, is_wrong, t, place = rand_like(start[..., :4], generator).unbind(-1)  # (B, S) each
    other = targets.gather(1, (place * targets.shape[1]).long().clamp(max=targets.shape[1] - 1))
    token = torch.where(is_wrong < config.wrong_share, other, targets)
    end = config.answer_logit * F.one_hot(token.clamp(min=0), start.shape[-1]).to(start)
    moved = (is_moved < config.answer_share) & (targets != IGNORED) & (token != IGNORED)
    return torch.where(moved[..., None], torch.lerp(start, end, t[..., None]), start)


class TextObjective(Objective):
    """An objective on text batches."""

    def __init__(self, model: nn.Module, config: TextObjectiveConfig):
        super().__init__()
        self.model, self.config = model, config

    @staticmethod
    def predict(model: nn.Module, batch: TextBatch, num_steps: int) -> TextPrediction:
        """Predict every next token at 1..num_steps steps, for validation."""
        raise NotImplementedError


class TextEBTObjective(TextObjective):
    """Think from random logits (or replayed ones) and compare with the next token (paper, sec. 3)."""

    thinks = True

    def __init__(self, model: CausalTextEBT, config: TextObjectiveConfig, *, compile_gradient: bool = False):
        super().__init__(model, config)
        if compile_gradient and model.config.num_landscapes > 1:
            raise ValueError("train.compile supports only one energy; use compile: false with num_landscapes above 1")
        self.energy_fn: EnergyFunction = CompiledEnergy(model) if compile_gradient else model

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        model: CausalTextEBT = self.model  # type: ignore[assignment]
        result = think(
            self.energy_fn,
            self._drawn(batch) if batch.start is None else batch.start,
            self.config.thinking,
            context=model.context_of(batch.tokens, batch.starts),  # once, for every step
            step_size=model.step_size,
            create_graph=True,
            generator=batch.generators,
            evaluate_final=False,
            check_finite=False,
        )
        return thinking_output(result, model.step_size, self.config.loss_steps, lambda p: batch_loss(p, batch.targets))

    def continue_thinking(self, batch: TextBatch, rows: dict[str, Tensor]) -> TextBatch:
        """See Objective."""
        return replace(
            batch,
            tokens=put_last(batch.tokens, rows.get("tokens")),
            targets=put_last(batch.targets, rows.get("targets")),
            starts=put_last(batch.starts, rows.get("starts")),
            start=put_last(self._drawn(batch), rows.get("candidate")),
        )

    def replay_rows(self, batch: TextBatch, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Objective."""
        return {"candidate": output["candidate"], "tokens": batch.tokens, "targets": batch.targets, "starts": batch.starts}

    def logs(self, batch: TextBatch, output: dict[str, Tensor]) -> dict[str, float | Callable[[], float]]:
        """See Objective."""
        return thinking_logs(output, lambda: self.energy_of(output["candidate"], batch).mean().item())

    @torch.no_grad()
    def energy_of(self, candidate: Tensor, batch: TextBatch) -> Tensor:
        """Return the energy (B, S) of candidates, to log the energy after the last update."""
        model: CausalTextEBT = self.model  # type: ignore[assignment]
        return model(candidate, *model.context_of(batch.tokens, batch.starts))

    def _drawn(self, batch: TextBatch) -> Tensor:
        model: CausalTextEBT = self.model  # type: ignore[assignment]
        drawn = draw_candidates(batch.tokens, model.config.vocab_size, torch.float32, batch.generators)
        return toward_tokens(drawn, batch.targets, self.config, batch.generators) if self.config.answer_share else drawn

    @staticmethod
    def predict(model: nn.Module, batch: TextBatch, num_steps: int) -> TextPrediction:
        assert isinstance(model, CausalTextEBT)
        result = think(
            model,
            draw_candidates(batch.tokens, model.config.vocab_size, torch.float32, batch.generators),
            context=model.context_of(batch.tokens, batch.starts),
            step_size=model.step_size.detach(),
            num_steps=num_steps,
        )
        return TextPrediction(logits=list(result.predictions), energies=result.energies)


class LanguageModelObjective(TextObjective):
    """The next token in one pass."""

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        return {"loss": batch_loss(self.model(batch.tokens, batch.starts), batch.targets)}

    @staticmethod
    def predict(model: nn.Module, batch: TextBatch, num_steps: int) -> TextPrediction:
        """Return the same logits for any number of steps: one entry."""
        assert isinstance(model, CausalTransformer)
        return TextPrediction(logits=[model(batch.tokens, batch.starts)])
