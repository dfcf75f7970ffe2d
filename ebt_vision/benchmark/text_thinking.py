"""Scores of text models on problems with one right answer (data/text_tasks.py), by thinking steps and candidates.

An answer counts as right if each of its tokens, and the end after it, is the most likely one given the right tokens before it.
Greedy generation of the whole answer has the same result, because no position depends on the candidates of another position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebt_vision.benchmark.flops import count_flops
from ebt_vision.core.rng import randn_like, sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.data.text import IGNORED, TokenBatch
from ebt_vision.data.text_tasks import Problem, TaskSizes, problems
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.models.causal_text_ebt import CausalTextEBT
from ebt_vision.objectives.text import token_losses

TEMPERATURES = tuple(float(value) for value in np.round(np.geomspace(0.25, 8.0, 21), 4))
"""The temperatures to choose from; 1 is among them."""
_START = 41
_Z95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScores:
    """Scores of the K scored tokens of P problems after 1..T steps from N starts; N = T = 1 for a model without steps."""

    losses: np.ndarray
    """float32 (N, T, K), in nats, at temperature 1."""
    is_right: np.ndarray
    """bool (N, T, K): the target is the most likely token."""
    energies: np.ndarray | None
    """float32 (N, T, K), after each step; None for a model without an energy."""
    tempered: np.ndarray
    """float64 (T, len(TEMPERATURES)): mean loss of the first start at every temperature."""
    problem: np.ndarray
    """int64 (K,): the problem of each token."""
    num_bytes: int
    """Bytes of all answers."""
    flops: np.ndarray
    """float64 (T + 1,): FLOPs per token of a sequence, for reading the context, then for it and 1..T steps of one start. Only
    matrix products count, forward and backward."""

    @property
    def num_steps(self) -> int:
        return self.losses.shape[1]

    def chosen(self, num_candidates: int) -> np.ndarray:
        """Return the start of lowest energy at each step and token among the first num_candidates, int64 (T, K)."""
        if self.energies is None:
            return np.zeros(self.losses.shape[1:], np.int64)
        return self.energies[:num_candidates].argmin(0)

    def of(self, values: np.ndarray, num_candidates: int) -> np.ndarray:
        """Return the entries (T, K) of values (N, T, K) that belong to the chosen starts."""
        return np.take_along_axis(values, self.chosen(num_candidates)[None], 0)[0]

    def answers(self, num_candidates: int) -> np.ndarray:
        """Return which answers are right after each step, bool (T, P)."""
        right = self.of(self.is_right, num_candidates)
        return np.stack([np.bincount(self.problem, weights=~step) == 0 for step in right])

    def rows(self, num_candidates: int) -> list[dict[str, Any]]:
        """Return one row per number of steps: accuracies, bits per byte, perplexity, and the gain over one step from one start.

        `gain_percent` is how much lower the perplexity per token is, as in the ablation table of Gladstone et al. 2025.
        """
        losses = self.of(self.losses, num_candidates).astype(np.float64)
        right, answers = self.of(self.is_right, num_candidates), self.answers(num_candidates)
        before = self.losses[0, 0].astype(np.float64)
        first = answers if num_candidates == 1 else self.answers(1)
        rows = []
        for step in range(self.num_steps):
            gain, error = _mean_by_problem(before - losses[step], self.problem)
            answer_gain = answers[step].astype(float) - first[0]
            rows.append(
                {
                    "steps": step + 1,
                    "candidates": num_candidates,
                    "token_accuracy": float(right[step].mean()),
                    "answer_accuracy": float(answers[step].mean()),
                    "answer_gain": float(answer_gain.mean()),
                    "answer_gain_error": _Z95 * float(answer_gain.std(ddof=1)) / math.sqrt(len(answer_gain)),
                    "bits_per_byte": losses[step].sum() / math.log(2) / self.num_bytes,
                    "perplexity": math.exp(losses[step].mean()),
                    "gain_nats": gain,
                    "gain_error": _Z95 * error,
                    "gain_percent": 100.0 * (1.0 - math.exp(losses[step].mean() - before.mean())),
                    "flops": float(self.flops[0] + num_candidates * (self.flops[step + 1] - self.flops[0])),
                }
            )
        return rows

    def bits_at(self, temperatures: Sequence[float]) -> list[float]:
        """Return bits per byte of the first start after each step, each step at its temperature out of TEMPERATURES."""
        scale = len(self.problem) / math.log(2) / self.num_bytes
        return [float(row[TEMPERATURES.index(t)]) * scale for row, t in zip(self.tempered, temperatures, strict=True)]


def best_temperatures(tempered: np.ndarray) -> list[float]:
    """Return the temperature of lowest loss after each step, from AnswerScores.tempered (T, len(TEMPERATURES)).

    Choose the temperatures on other problems than the problems that are scored with them.
    """
    return [TEMPERATURES[i] for i in tempered.argmin(1)]


def _mean_by_problem(values: np.ndarray, problem: np.ndarray) -> tuple[float, float]:
    """Return the mean over tokens and its standard error, with problems as independent units (ratio estimator)."""
    counts = np.bincount(problem)
    sums = np.bincount(problem, weights=values)
    mean = float(values.mean())
    residuals = sums - mean * counts
    return mean, float(np.sqrt((residuals**2).sum() / (len(counts) - 1) * len(counts)) / counts.sum())


def task_problems(task: TaskSizes, count: int, seed: int) -> list[Problem]:
    """Return `count` different problems of a task, or fewer if it does not have as many; they depend on task and seed."""
    drawn = islice(problems([task], seed), 20 * count)
    return list(islice(dict.fromkeys(drawn), count))


def answer_batch(group: Sequence[Problem]) -> TokenBatch:
    """Return one row per problem: boundary, question, answer, padding. The answer and the boundary after it are the targets."""
    tokenizer = ByteTokenizer()
    questions = [tokenizer.encode(problem.question) for problem in group]
    answers = [tokenizer.encode(problem.answer) for problem in group]
    length = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True)) + 1
    tokens = torch.full((len(group), length), tokenizer.boundary)
    targets = torch.full((len(group), length), IGNORED)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        both = torch.tensor([*question, *answer])
        tokens[row, 1 : len(both) + 1] = both
        targets[row, len(question) : len(both) + 1] = torch.tensor([*answer, tokenizer.boundary])
    return TokenBatch(tokens=tokens, targets=targets, starts=torch.zeros_like(tokens))


@torch.no_grad()
def score_answers(
    model: nn.Module,
    group: Sequence[Problem],
    *,
    num_steps: int = 16,
    num_candidates: int = 16,
    batch_size: int = 32,
    seed: int = 0,
) -> AnswerScores:
    """Return the scores of a CausalTextEBT or a CausalTransformer on at least two problems.

    Starts depend on (seed, candidate, problem), not on the batch. Raises ValueError for a problem longer than the model's
    context.
    """
    if len(group) < 2:
        raise ValueError(f"{len(group)} problems have no interval; use 2 or more")
    parts, problem, num_tokens = [], [], 0
    tempered, flops = np.zeros(1), np.zeros(1)
    for first in range(0, len(group), batch_size):
        batch = answer_batch(group[first : first + batch_size])
        if batch.tokens.shape[1] > model.config.context_length:  # type: ignore[union-attr, operator]
            raise ValueError(
                f"a problem has {batch.tokens.shape[1]} tokens, above the {model.config.context_length} of the model; "  # type: ignore[union-attr]
                "use smaller sizes"
            )
        part = _score_batch(model, batch, num_steps, num_candidates, seed, first)
        parts.append(part[:3])
        tempered = tempered + part[3]
        scored = batch.targets != IGNORED
        num_tokens += int(scored.sum())
        problem.append(first + scored.nonzero()[:, 0].numpy())
        if first == 0:
            flops = _flops_per_token(model, batch, num_steps)
    losses, is_right, energies = (
        None if any(value is None for value in values) else np.concatenate(values, -1) for values in zip(*parts, strict=True)
    )
    assert losses is not None and is_right is not None
    return AnswerScores(
        losses=losses,
        is_right=is_right,
        energies=energies,
        tempered=tempered / num_tokens,
        problem=np.concatenate(problem),
        num_bytes=sum(len(each.answer.encode()) for each in group),
        flops=flops,
    )


def _score_batch(
    model: nn.Module, batch: TokenBatch, num_steps: int, num_candidates: int, seed: int, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Return losses, is_right, energies (N, T, K), and the summed losses of the first start at each temperature."""
    device = next(model.parameters()).device
    targets = batch.targets.to(device)
    scored = targets != IGNORED
    losses, right, energies = [], [], []
    tempered: np.ndarray | None = None
    for candidate in range(num_candidates if isinstance(model, CausalTextEBT) else 1):
        logits, energy = _predict(model, batch, num_steps, candidate, seed, first)  # (T, B, S, V), (T, B, S)
        kept, answer = logits[:, scored].float(), targets[scored]
        losses.append(torch.stack([token_losses(step[None], answer[None])[0] for step in kept]).cpu())
        right.append((kept.argmax(-1) == answer).cpu())
        if energy is not None:
            energies.append(energy[:, scored].float().cpu())
        if tempered is None:
            rows = [[token_losses(step[None] / t, answer[None]).double().sum().item() for t in TEMPERATURES] for step in kept]
            tempered = np.array(rows)
    assert tempered is not None
    stacked = torch.stack(energies).numpy() if energies else None
    return torch.stack(losses).numpy(), torch.stack(right).numpy(), stacked, tempered


def _predict(
    model: nn.Module, batch: TokenBatch, num_steps: int, candidate: int, seed: int, first: int
) -> tuple[Tensor, Tensor | None]:
    device = next(model.parameters()).device
    tokens, starts = batch.tokens.to(device), batch.starts.to(device)
    if not isinstance(model, CausalTextEBT):
        return model(tokens, starts)[None], None
    # The last values that torch draws depend on the length, so the length is always the longest.
    shape = (len(tokens), model.config.context_length, model.config.vocab_size)
    empty = torch.empty(shape, dtype=model.head.weight.dtype, device=device)
    generators = sample_generators(seed, range(first, first + len(tokens)), _START, candidate, device=device)
    result = think(
        model,
        randn_like(empty, generators)[:, : tokens.shape[1]],
        num_steps=num_steps,
        context=model.context_of(tokens, starts),
        step_size=model.step_size.detach(),
    )
    return torch.stack(list(result.predictions)), result.energies[1:]


def _flops_per_token(model: nn.Module, batch: TokenBatch, num_steps: int) -> np.ndarray:
    """Return (T + 1,): reading the context, then 1..T steps with the final energy; every step costs the same."""
    size = batch.tokens.numel()
    counts = [
        count_flops(lambda steps=steps: _predict(model, batch, steps, 0, 0, 0)) / size  # type: ignore[misc]
        for steps in ((1, 2) if isinstance(model, CausalTextEBT) else (1,))
    ]
    if not isinstance(model, CausalTextEBT):
        return np.array([0.0, counts[0]])
    context = count_flops(lambda: model.context_of(batch.tokens.to(model.head.weight.device))) / size
    return np.array([context, *(counts[0] + (counts[1] - counts[0]) * step for step in range(num_steps))])
