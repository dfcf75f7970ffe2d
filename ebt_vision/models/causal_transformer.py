"""CausalTransformer: the Transformer++ baseline, a language model on the trunk of CausalTextEBT."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_vision.models.causal_trunk import Cache, CausalTrunk, CausalTrunkConfig
from ebt_vision.models.pretrained_model import PretrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalTransformerConfig(CausalTrunkConfig):
    """A causal transformer with an output layer; it has only the fields of the trunk."""


class CausalTransformer(PretrainedModel):
    """Tokens (B, N) -> logits (B, N, vocab_size) of each next token."""

    model_type = "causal_transformer"
    config_class = CausalTransformerConfig

    def __init__(self, config: CausalTransformerConfig):
        super().__init__()
        self.config = config
        self.trunk = CausalTrunk(config)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Return the logits, float32 or wider; `starts` as in CausalTrunk.encode."""
        return self.extend(tokens, starts)[0]

    def extend(self, tokens: Tensor, starts: Tensor | None = None, past: Cache = ()) -> tuple[Tensor, Cache]:
        """Return (logits (B, N, vocab_size), cache) of tokens (B, N) that follow `past`."""
        hidden, cache = self.trunk.encode(tokens, starts, past)
        logits = self.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), cache
