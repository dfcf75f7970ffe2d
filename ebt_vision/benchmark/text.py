"""Perplexity of text models over thinking steps and candidates, and kinds of shifted text.

All means are over tokens: perplexity is the exponential of the mean loss over all tokens, never a mean over batches. A model
without steps has the same value for any number of steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebt_vision.core.rng import make_generator, randn_like, sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.data.text import IGNORED, TextSet, TokenBatch
from ebt_vision.models.causal_text_ebt import CausalTextEBT
from ebt_vision.objectives.text import token_losses

_START, _LANGEVIN, _SHIFT = 31, 32, 33
NUM_BINS = 10


def candidate_counts(num_candidates: int) -> list[int]:
    """Return the numbers of candidates to report: the powers of two below `num_candidates`, and `num_candidates` itself."""
    return [*(2**i for i in range((num_candidates - 1).bit_length())), num_candidates]


def as_is(text: str, seed: int = 0) -> str:
    """The text itself."""
    return text


def swap_case(text: str, seed: int = 0) -> str:
    """Swap capital and small letters."""
    return text.swapcase()


def add_typos(text: str, seed: int = 0, share: float = 0.1) -> str:
    """Put a typo into a fraction `share` of the characters: a random letter, a doubled character, or none. Uses only the
    seed."""
    g = make_generator(seed, _SHIFT)
    hit = (torch.rand(len(text), generator=g) < share).tolist()
    kinds = torch.randint(3, (len(text),), generator=g).tolist()
    letters = torch.randint(26, (len(text),), generator=g).tolist()
    typo: dict[int, Callable[[str, int], str]] = {
        0: lambda character, letter: chr(97 + letter),
        1: lambda character, letter: character * 2,
        2: lambda character, letter: "",
    }
    rows = zip(text, hit, kinds, letters, strict=True)
    return "".join(typo[kind](character, letter) if now else character for character, now, kind, letter in rows)


SHIFTS: dict[str, Callable[[str, int], str]] = {"as is": as_is, "swapped case": swap_case, "typos": add_typos}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScores:
    """Losses in nats of K tokens after 1..T steps from each of N random starts."""

    losses: np.ndarray
    """float32 (N, T, K)."""
    energies: np.ndarray | None
    """float32 (N, T, K), after each step; None for a model without energies."""
    bytes_per_token: float
    """Mean number of text bytes of these K tokens."""

    def best_of(self, num_candidates: int) -> np.ndarray:
        """Return losses (T, K) of the start with the lowest energy at each step and token, among the first num_candidates."""
        if self.energies is None:
            return self.losses[0]
        chosen = self.energies[:num_candidates].argmin(0)
        return np.take_along_axis(self.losses, chosen[None], 0)[0]

    def summary(self, num_candidates: int) -> list[dict[str, Any]]:
        """Return a row for each number of steps: perplexity, bits per byte, and the gain over the first step with its error."""
        losses = self.best_of(num_candidates).astype(np.float64)
        first = self.losses[0, 0].astype(np.float64)
        rows = []
        for step, values in enumerate(losses, 1):
            gain = first - values
            rows.append(
                {
                    "steps": step,
                    "candidates": num_candidates,
                    "tokens": values.size,
                    "perplexity": math.exp(values.mean()),
                    "bits_per_byte": values.mean() / math.log(2) / self.bytes_per_token,
                    "gain_nats": gain.mean(),
                    "gain_error": gain.std(ddof=1) / math.sqrt(gain.size) if gain.size > 1 else math.nan,
                }
            )
        return rows

    def gain_by_difficulty(self, difficulty: np.ndarray) -> list[dict[str, float]]:
        """Return the mean gain in nats of the last step over the first, in tenths of the tokens from the easiest to the
        hardest.

        `difficulty` (K,) must not come from the first candidate, or the hardest tenth gains by chance alone.
        """
        gain = (self.losses[0, 0] - self.losses[0, -1]).astype(np.float64)
        parts = np.array_split(np.argsort(difficulty, kind="stable"), min(NUM_BINS, len(difficulty)))
        return [{"difficulty": float(difficulty[part].mean()), "gain_nats": float(gain[part].mean())} for part in parts]


@torch.no_grad()
def score_text(
    model: nn.Module,
    samples: TextSet,
    *,
    num_steps: int = 10,
    num_candidates: int = 8,
    langevin_std: float = 0.0,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> TextScores:
    """Return the losses of the first `max_tokens` tokens of a text at every number of steps and from every start.

    Starts depend on (seed, candidate, sequence), not on the batch.
    """
    length = samples.config.context_length
    num_sequences = samples.num_windows if max_tokens is None else min(samples.num_windows, -(-max_tokens // length))
    losses: list[Tensor] = []
    energies: list[Tensor] = []
    for first in range(0, num_sequences, batch_size):
        batch = samples.all_sequences(first, min(first + batch_size, num_sequences))
        device = next(model.parameters()).device
        targets = batch.targets.to(device)
        scored = targets != IGNORED
        if isinstance(model, CausalTextEBT):
            part, energy = _think(model, batch, num_steps, num_candidates, langevin_std, seed, first)
            energies.append(energy[..., scored].float().cpu())
        else:
            logits = model(batch.tokens.to(device), batch.starts.to(device))
            part = token_losses(logits, targets)[None, None]
        losses.append(part[..., scored].float().cpu())
    kept = torch.cat(losses, dim=-1).numpy()[..., :max_tokens]
    return TextScores(
        losses=kept,
        energies=torch.cat(energies, dim=-1).numpy()[..., :max_tokens] if energies else None,
        bytes_per_token=samples.bytes_per_token(kept.shape[-1]),
    )


def _think(
    model: CausalTextEBT,
    batch: TokenBatch,
    num_steps: int,
    num_candidates: int,
    langevin_std: float,
    seed: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Return losses and energies (N, T, B, S) of one batch; the context is read once for all candidates."""
    weight = model.head.weight
    targets = batch.targets.to(weight.device)
    context = model.context_of(batch.tokens.to(weight.device), batch.starts.to(weight.device))
    losses, energies = [], []
    for candidate in range(num_candidates):
        indices = range(first, first + len(targets))
        empty = torch.empty(*targets.shape, model.config.vocab_size, dtype=weight.dtype, device=weight.device)
        result = think(
            model,
            randn_like(empty, sample_generators(seed, indices, _START, candidate, device=weight.device)),
            ThinkingConfig(num_steps=num_steps, langevin_std=langevin_std),
            context=context,
            step_size=model.step_size.detach(),
            generator=sample_generators(seed, indices, _LANGEVIN, candidate, device=weight.device),
        )
        losses.append(torch.stack([token_losses(p, targets) for p in result.predictions]))
        energies.append(result.energies[1:])
    return torch.stack(losses), torch.stack(energies)
