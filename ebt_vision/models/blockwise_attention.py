"""Attention with a first and a second derivative that never stores a whole score matrix, for long sequences on a CPU.

PyTorch's fused attention has no second derivative. Its math path has one, but for N tokens it writes and reads several N x N
matrices for each head. Here the queries are processed in blocks whose scores stay in the cache. Every pass computes the scores
again from the log-sum-exp of the rows, as in FlashAttention (Dao et al. 2022), whose backward pass is the first derivative
below.

With s = head_dim^-1/2, P = softmax(s Q K^T), O = P V, and G the gradient of O, the first derivative is

    dV = P^T G    dS = P * (G V^T - rowsum(G * O))    dQ = s dS K    dK = s dS^T Q

For gradients A, B, C of (dQ, dK, dV), the second derivative is that of <A, dQ> + <B, dK> + <C, dV>. W = s (A K^T + Q B^T):

   T = P * (W - rowsum(P * W))                                     gradient of G V^T
   R = dS * W + P * (G C^T - rowsum(P * W) * G V^T)                gradient of P, times P
   H = R - P * rowsum(R)                                           gradient of the scores
   Q: s (H K + dS B)    K: s (H^T Q + dS^T A)    V: T^T G    G: T V + P C

torch.compile must not see these functions. It computes the second derivative of such a function wrongly and without a message
(torch 2.15). blocks.py therefore checks torch.compiler.is_compiling().
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18
"""Number of scores of one head in a block: about a megabyte in float32."""


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for (B, num_heads, N, head_dim), float32 or float64; differentiable twice.

    In all passes the scores need the memory of a few blocks of BLOCK_SCORES per head, for any number of tokens. There is no
    third derivative: it raises RuntimeError.
    """
    attended: Tensor = _Attention.apply(q, k, v)[0]
    return attended


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries."""
    tokens, rows = q.shape[-2], max(16, BLOCK_SCORES // k.shape[-2])
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _attention_of(q: Tensor, keys: Tensor, log_sum: Tensor) -> Tensor:
    """Compute P for a block of scaled queries."""
    return (q @ keys).sub_(log_sum[..., None]).exp_()


class _Attention(torch.autograd.Function):
    """(q, k, v) -> (attention's output, the log-sum-exp of each row of scores)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scale, keys = q.shape[-1] ** -0.5, k.mT
        output, log_sums = torch.empty_like(q), q.new_empty(q.shape[:-1])
        for rows in _blocks(q, k):
            scores = (q[..., rows, :] * scale) @ keys  # (B, num_heads, block, N)
            log_sums[..., rows] = log_sum = scores.logsumexp(-1)
            output[..., rows, :] = scores.sub_(log_sum[..., None]).exp_() @ v
        return output, log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, output, log_sums = ctx.saved_tensors
        gradients: tuple[Tensor, ...] = _Gradient.apply(q, k, v, grads[0], output.detach(), log_sums)
        return gradients


class _Gradient(torch.autograd.Function):
    """(q, k, v, gradient of the output) -> (dQ, dK, dV); `output` and `log_sums` avoid computing them again."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, output: Tensor, log_sums: Tensor) -> tuple[Tensor, ...]:
        scale, keys, values = q.shape[-1] ** -0.5, k.mT, v.mT
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        along = (grad * output).sum(-1, keepdim=True)
        for rows in _blocks(q, k):
            queries, g = q[..., rows, :] * scale, grad[..., rows, :]
            p = _attention_of(queries, keys, log_sums[..., rows])
            dv += p.mT @ g
            ds = (g @ values).sub_(along[..., rows, :]).mul_(p)
            dq[..., rows, :] = ds @ k * scale
            dk += ds.mT @ queries
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, grad, output, log_sums = ctx.saved_tensors
        a, b, c = grads
        scale, keys, values = q.shape[-1] ** -0.5, k.mT, v.mT
        of_w = (torch.cat([k, b], dim=-1) * scale).mT
        q_out, k_out, v_out, grad_out = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.empty_like(grad)
        along = (grad * output).sum(-1, keepdim=True)
        for rows in _blocks(q, k):
            queries, g, a_rows = q[..., rows, :], grad[..., rows, :], a[..., rows, :]
            p = _attention_of(queries * scale, keys, log_sums[..., rows])
            gv = g @ values
            w = torch.cat([a_rows, queries], dim=-1) @ of_w
            ds = p * (gv - along[..., rows, :])
            pw = p * w
            mean_w = pw.sum(-1, keepdim=True)
            t = pw - p * mean_w
            r = ds * w + p * (g @ c.mT - mean_w * gv)
            h = r - p * r.sum(-1, keepdim=True)
            q_out[..., rows, :] = (h @ k + ds @ b) * scale
            k_out += (h.mT @ queries + ds.mT @ a_rows) * scale
            v_out += t.mT @ g
            grad_out[..., rows, :] = t @ v + p @ c
        return q_out, k_out, v_out, grad_out, None, None
