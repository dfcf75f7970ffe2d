"""Causal Transformer++ blocks (RMSNorm, SwiGLU, rotary positions) with two streams: context tokens and candidates.

At every position, a causal EBT scores one candidate for the next token against the tokens before it. The paper's code runs 2S
tokens through every block and writes the candidates' own scores onto a superdiagonal. Here the two streams are separate. The
context attends only to the context, so its keys and values are computed once for all thinking steps. A candidate's scores
against the context and its one score against itself are joined before the softmax.

Only the candidate stream is differentiated twice, so its attention is written out. The context stream is differentiated once
and uses the fast kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.models.blocks import apply_rope

ROPE_BASE = 10_000.0
_NORM_EPS = 1e-6


def rope_1d(first: int, count: int, head_dim: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin (count, head_dim // 2) of rotary positions first..first+count-1 (Su et al. 2021).

    Raises ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; change num_heads or embed_dim")
    freqs = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.arange(first, first + count, dtype=torch.float32, device=device)[:, None] * freqs
    return angles.cos(), angles.sin()


def visible_context(starts: Tensor, num_queries: int) -> Tensor:
    """Return which of T context tokens the last `num_queries` positions see: bool (B, 1, num_queries, T).

    `starts` (B, T) is the position of the first token of each token's document: position i sees starts[i]..i.
    """
    T = starts.shape[1]
    keys = torch.arange(T, device=starts.device)
    queries = keys[T - num_queries :, None]
    return ((keys <= queries) & (keys >= starts[:, T - num_queries :, None]))[:, None]


class CausalAttention(nn.Module):
    """Multi-head attention of tokens to tokens, and of candidates to tokens and themselves."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries, rotated keys, and values of x (B, N, dim): three of (B, num_heads, N, head_dim)."""
        B, N, dim = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def merge(self, x: Tensor) -> Tensor:
        """(B, num_heads, N, head_dim) -> (B, N, dim), projected."""
        return self.proj(x.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Attention of context tokens to context tokens, (B, N, dim); differentiable once."""
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=visible))

    def attend_with_self(self, own: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Attention of candidates with `own` (q, k, v) to the context and themselves, never to each other, (B, C, dim)."""
        q, k, v = own
        q = q * q.shape[-1] ** -0.5
        scores = (q @ keys.transpose(-2, -1)).masked_fill(~visible, float("-inf"))  # (B, num_heads, C, T)
        own_score = (q * k).sum(-1, keepdim=True)  # (B, num_heads, C, 1)
        weights = torch.cat([scores, own_score], dim=-1).softmax(dim=-1)
        return self.merge(weights[..., :-1] @ values + weights[..., -1:] * v)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020), (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_and_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class CausalBlock(nn.Module):
    """Pre-norm block; both streams use the same weights."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, *, init_gain: float = 1.0):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=_NORM_EPS)
        self.attn = CausalAttention(dim, num_heads)
        self.norm2 = nn.RMSNorm(dim, eps=_NORM_EPS)
        self.mlp = SwiGLU(dim, hidden_dim)
        for layer in (self.attn.qkv, self.mlp.gate_and_up):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attn.proj, self.mlp.down):  # the layers that add to the residual stream
            nn.init.xavier_uniform_(layer.weight, gain=init_gain)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, N, dim), each (B, num_heads, N, head_dim)."""
        return self.attn.project(self.norm1(x), rope)

    def context(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Context tokens x (B, N, dim), their queries, all keys and values so far -> (B, N, dim)."""
        x = x + self.attn.attend(q, keys, values, visible)
        return x + self.mlp(self.norm2(x))

    def candidate(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Candidates x (B, C, dim) against the context's keys and values -> (B, C, dim)."""
        x = x + self.attn.attend_with_self(self.project(x, rope), keys, values, visible)
        return x + self.mlp(self.norm2(x))
