"""CausalTextEBT: at every position, the energy of a candidate for the next token (Gladstone et al. 2025, sec. 3 and app.).

A candidate is a vector of logits over the vocabulary. Thinking starts from random logits and descends the energy. Candidate t
sees the tokens 0..t and itself, but no other candidate.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ebt_vision.core.energy_functions import EnergyFunction
from ebt_vision.models.causal_trunk import Cache, CausalTrunk, CausalTrunkConfig
from ebt_vision.models.energy_model import EnergyModel, check_energies


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalTextEBTConfig(CausalTrunkConfig):
    """A causal transformer with an energy head."""

    energy_head: Literal["linear", "quadratic"] = "quadratic"
    """linear: one linear unit per position, as in the paper. quadratic: |y - N(x, y)|^2 / 2 over the logits y, as in PatchEBT.
    It has the same parameters as the output layer of a language model, and a step of size 1 ends near the output of such a
    model."""
    init_step_size: float = 1.0
    """Initial step size; the paper's linear head has 500 (System 1) or a fixed 5 (System 2)."""
    add_last_token: bool = False
    """Add the embedding of the last token to the first embedding of a candidate's stream, as in a language model. In the paper
    the stream starts with the candidate alone, and one layer is spent on fetching the last token."""
    init_gate: float | None = None
    """Initial value of a learned scale vector on the candidate's embedding (for example 0.1); None adds no such parameters.
    With add_last_token the energy then hardly depends on the point where a step is taken. Later steps therefore keep the result
    of the first step, even without training them. 0 is allowed and also learns."""
    num_landscapes: int = 1
    """Number of energies that differ by a learned embedding of the thinking step. Step t uses number t; all further steps use
    the last one. With more than one, energies of different steps are not comparable."""

    def __post_init__(self) -> None:
        CausalTrunkConfig.__post_init__(self)
        if self.energy_head not in ("linear", "quadratic"):
            raise ValueError(f"energy_head={self.energy_head!r} is unknown; use 'linear' or 'quadratic'")
        if self.num_landscapes < 1:
            raise ValueError(f"num_landscapes={self.num_landscapes} must be 1 or more")


class CausalTextEBT(EnergyModel):
    """Energies (B, C) of candidate logits (B, C, vocab_size), one candidate after each of the last C context tokens."""

    model_type = "causal_text_ebt"
    config_class = CausalTextEBTConfig

    def __init__(self, config: CausalTextEBTConfig):
        super().__init__(config.init_step_size)
        self.config = config
        self.trunk = CausalTrunk(config)
        quadratic = config.energy_head == "quadratic"
        self.head = nn.Linear(config.embed_dim, config.vocab_size if quadratic else 1, bias=False)
        nn.init.zeros_(self.head.weight)  # linear: as in the paper's code; quadratic: the energy is then |y|^2 / 2
        if config.init_gate is not None:
            self.gate = nn.Parameter(torch.full((config.embed_dim,), config.init_gate))
        if config.num_landscapes > 1:
            self.landscapes = nn.Parameter(torch.zeros(config.num_landscapes, config.embed_dim))

    def forward(self, candidate: Tensor, *context: Tensor, landscape: int = 0) -> Tensor:
        """Return the energy of each candidate, (B, C), float32 or wider; `context` is the result of context_of()."""
        # Embed: the mean of the token embeddings under the distribution of the candidate.
        x = candidate.softmax(dim=-1) @ self.trunk.embed.weight  # (B, C, embed_dim)
        if self.config.init_gate is not None:
            x = x * self.gate
        if self.config.add_last_token:
            x = x + self.trunk.embed_last(context, x.shape[1])
        if self.config.num_landscapes > 1:
            x = x + self.landscapes[landscape]
        # Blocks and energy.
        output = self.head(self.trunk.candidate_states(x, context))  # (B, C, vocab_size or 1)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.config.energy_head == "quadratic":
            output = 0.5 * (candidate - output).square()
        return check_energies(output.sum(-1), tuple(candidate.shape[:2]))

    def at_step(self, step: int) -> EnergyFunction:
        """Return the energy of thinking step `step` (see energy_functions.SteppedEnergy)."""
        if self.config.num_landscapes == 1:
            return self
        return functools.partial(self, landscape=min(step, self.config.num_landscapes - 1))

    def context_of(self, tokens: Tensor, starts: Tensor | None = None, past: Cache = ()) -> Cache:
        """Return the context of think() for tokens (B, N) after `past`; see CausalTrunk.encode for `starts`.

        It does not depend on candidates: compute it once and use it for every step and every candidate.
        """
        return self.trunk.remember(tokens, starts, past)
