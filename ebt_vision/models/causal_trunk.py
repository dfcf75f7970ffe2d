"""The causal trunk of CausalTextEBT and CausalTransformer: tokens to hidden states and a cache."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ebt_vision.models.causal_blocks import CausalBlock, rope_1d, visible_context

Cache = tuple[Tensor, ...]
"""The cache of T context tokens, batch first: document starts and tokens, int64 (B, T), then keys and values of each block,
(B, num_heads, T, head_dim). It consists of plain tensors, so that think() can take it as context."""
_STARTS, _TOKENS, _FIRST_KEYS = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalTrunkConfig:
    """Size of a causal transformer over tokens."""

    vocab_size: int = 257
    """Number of tokens in the vocabulary: 256 bytes and the document boundary, or the size of a tokenizer."""
    context_length: int = 256
    """Maximum number of context tokens in training."""
    embed_dim: int = 384
    depth: int = 6
    num_heads: int = 6
    mlp_ratio: float = 8 / 3
    """Hidden width of SwiGLU relative to embed_dim; 8/3 has as many parameters as a plain MLP with ratio 4."""

    def __post_init__(self) -> None:
        for name in ("context_length", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size} must be 2 or more")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must be positive")
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"embed_dim={self.embed_dim} must be a multiple of 2 * num_heads={2 * self.num_heads} (rotary positions)"
            )


class CausalTrunk(nn.Module):
    """Token embedding, causal blocks and a final norm, with one input for context tokens and one for candidates."""

    def __init__(self, config: CausalTrunkConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        hidden = round(config.embed_dim * config.mlp_ratio)
        gain = (2 * config.depth) ** -0.5  # keeps the variance of the residual stream equal to the embedding's
        self.blocks = nn.ModuleList(
            CausalBlock(config.embed_dim, config.num_heads, hidden, init_gain=gain) for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.embed_dim, eps=1e-6)

    @property
    def layers(self) -> list[CausalBlock]:
        """The blocks, from the first to the last."""
        return cast(list[CausalBlock], list(self.blocks))

    def encode(self, tokens: Tensor, starts: Tensor | None = None, past: Cache = ()) -> tuple[Tensor, Cache]:
        """Return (normed hidden states (B, N, embed_dim), cache of all tokens so far) of tokens (B, N) that follow `past`.

        `starts` int64 (B, N) is the start of each token's document, counted from the first token of the past; None means one
        document from position 0. Raises ValueError for tokens of another shape.
        """
        x, cache = self._context_stream(tokens, starts, past, with_hidden=True)
        assert x is not None
        return self.norm(x), cache

    def remember(self, tokens: Tensor, starts: Tensor | None = None, past: Cache = ()) -> Cache:
        """Return the cache of encode(), without the last block's output, which no key or value needs."""
        return self._context_stream(tokens, starts, past, with_hidden=False)[1]

    def candidate_states(self, x: Tensor, cache: Cache) -> Tensor:
        """Return normed hidden states (B, C, embed_dim) of embedded candidates, one after each of the last C tokens of
        `cache`."""
        C, T = x.shape[1], cache[_STARTS].shape[1]
        if C > T:
            raise ValueError(f"{C} candidates need as many context tokens, got {T}")
        rope = self._rope(T - C + 1, C, x.device)
        visible = visible_context(cache[_STARTS], C)
        for i, block in enumerate(self.layers):
            keys, values = cache[_FIRST_KEYS + 2 * i : _FIRST_KEYS + 2 * i + 2]
            x = block.candidate(x, rope, keys, values, visible)
        return self.norm(x)

    def embed_last(self, cache: Cache, count: int) -> Tensor:
        """Return the embeddings (B, count, embed_dim) of the last `count` tokens of `cache`."""
        return self.embed(cache[_TOKENS][:, -count:])

    def _context_stream(
        self, tokens: Tensor, starts: Tensor | None, past: Cache, *, with_hidden: bool
    ) -> tuple[Tensor | None, Cache]:
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"expected tokens of shape (B, N) with N >= 1, got {tuple(tokens.shape)}")
        starts = torch.zeros_like(tokens) if starts is None else starts
        num_past = past[_STARTS].shape[1] if past else 0
        all_starts = torch.cat([past[_STARTS], starts], dim=1) if past else starts
        all_tokens = torch.cat([past[_TOKENS], tokens], dim=1) if past else tokens
        x: Tensor = self.embed(tokens)  # (B, N, embed_dim)
        rope = self._rope(num_past, tokens.shape[1], x.device)
        visible = visible_context(all_starts, tokens.shape[1])
        cache = [all_starts, all_tokens]
        for i, block in enumerate(self.layers):
            q, k, v = block.project(x, rope)
            if past:
                keys, values = past[_FIRST_KEYS + 2 * i : _FIRST_KEYS + 2 * i + 2]
                k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
            cache += [k, v]
            if i + 1 == len(self.blocks) and not with_hidden:
                return None, tuple(cache)
            x = block.context(x, q, k, v, visible)
        return x, tuple(cache)

    def _rope(self, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return rope_1d(first, count, self.config.embed_dim // self.config.num_heads, device=device)
