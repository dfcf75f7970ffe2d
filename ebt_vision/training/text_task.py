"""Training on text: packed sequences, and validation by bits per byte at 1..N steps on held-out text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebt_vision.core.rng import sample_generators
from ebt_vision.data.text import IGNORED, TextDataConfig, TextSet, TokenBatch, load_text_set
from ebt_vision.models.registry import objective_class
from ebt_vision.objectives.text import TextBatch, TextObjective, token_losses
from ebt_vision.training.config import ConfigError, ExperimentConfig
from ebt_vision.training.settings import TextValidationConfig
from ebt_vision.training.task import VALIDATION_STREAM, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class TextValidation:
    """Means over all held-out tokens."""

    bits_per_byte: list[float]
    """Bits per byte after each step; one entry for a model without steps."""
    perplexity: list[float]
    """Perplexity per token: the exponential of the mean loss over all tokens."""
    energies: list[float]
    """Mean energy before the first and after every step; empty for models without an energy."""

    def record(self) -> dict[str, Any]:
        return {
            "validation_bits_per_byte": self.bits_per_byte,
            "validation_perplexity": self.perplexity,
            "validation_energy": self.energies,
        }

    def scalars(self) -> dict[str, float]:
        return {f"bits_per_byte/steps_{i}": value for i, value in enumerate(self.bits_per_byte, 1)}

    def lines(self) -> list[str]:
        return ["  bits per byte " + " ".join(f"{value:.4f}" for value in self.bits_per_byte)]

    def save_sample(self, folder: Path, step: int) -> None:
        """Write nothing: text has no images."""


class TextTask(Task):
    """Training for the prediction of the next token."""

    def __init__(self, config: ExperimentConfig):
        super().__init__(config)
        self._check_length()

    def load_samples(self) -> TextSet:
        return self._load(self._data)

    def make_batch(self, samples: TextSet, indices: Sequence[int], epochs: Sequence[int], device: torch.device) -> TextBatch:
        return text_batch(samples.sequences(indices, epochs), self.generators(indices, epochs), device)

    def load_held_out(self) -> TextSet | None:
        settings = self._validation
        if settings.path is None:
            return None
        return self._load(
            replace(
                self._data,
                path=settings.path,
                split=settings.split,
                share=settings.share,
                max_tokens=settings.max_tokens,
                random_offset=False,
            )
        )

    @torch.no_grad()
    def validate(self, model: nn.Module, held_out: TextSet, device: torch.device) -> TextValidation:
        objective = objective_class(self.config.model_type)
        assert issubclass(objective, TextObjective)
        was_training = model.training
        model.eval()
        num_tokens, losses, energies = 0, [], []
        size = self._validation.batch_size
        num_sequences = min(held_out.num_windows, self._validation.num_sequences)
        for first in range(0, num_sequences, size):
            part = held_out.all_sequences(first, min(first + size, num_sequences))
            sequences = range(first, first + len(part.tokens))
            batch = text_batch(part, sample_generators(self.config.seed, sequences, VALIDATION_STREAM, device=device), device)
            prediction = objective.predict(model, batch, self._validation.num_steps)
            losses.append(torch.stack([token_losses(p, batch.targets).cpu().double().sum() for p in prediction.logits]))
            scored = part.targets != IGNORED
            num_tokens += int(scored.sum())
            if prediction.energies is not None:
                energies.append(prediction.energies.cpu().double()[:, scored].sum(1))
        model.train(was_training)
        nats = (torch.stack(losses).sum(0) / num_tokens).tolist()
        return TextValidation(
            bits_per_byte=[value / math.log(2) / held_out.bytes_per_token(num_tokens) for value in nats],
            perplexity=[math.exp(value) for value in nats],
            energies=(torch.stack(energies).sum(0) / num_tokens).tolist() if energies else [],
        )

    def _load(self, data: TextDataConfig) -> TextSet:
        samples = load_text_set(data, seed=self.config.seed)
        size: int = self.config.model.vocab_size  # type: ignore[union-attr]
        if samples.tokenizer.vocab_size > size:
            raise ConfigError(
                f"model.vocab_size={size} is below the {samples.tokenizer.vocab_size} tokens of data.tokenizer="
                f"{data.tokenizer}; use model.vocab_size: {samples.tokenizer.vocab_size}"
            )
        return samples

    def _check_length(self) -> None:
        length: int = self.config.model.context_length  # type: ignore[union-attr]
        if self._data.context_length > length:
            raise ConfigError(
                f"data.context_length={self._data.context_length} is above model.context_length={length}; use the same for both"
            )

    @property
    def _data(self) -> TextDataConfig:
        assert isinstance(self.config.data, TextDataConfig)
        return self.config.data

    @property
    def _validation(self) -> TextValidationConfig:
        assert isinstance(self.config.validation, TextValidationConfig)
        return self.config.validation


def text_batch(sequences: TokenBatch, generators: list[torch.Generator], device: torch.device) -> TextBatch:
    """Return packed sequences on the device; generators stay unchanged."""
    return TextBatch(
        tokens=sequences.tokens.to(device),
        targets=sequences.targets.to(device),
        starts=sequences.starts.to(device),
        generators=generators,
    )
