"""Transformer blocks that can be differentiated twice.

Thinking takes the gradient of the network with respect to its input, and training differentiates this gradient again. Of
PyTorch's attention kernels only the math path has a second derivative; the fused kernels (flash, memory-efficient) raise an
error or cut the graph silently. These blocks therefore call scaled_dot_product_attention, and the caller selects the kernel:
thinking.py requests the math path when it keeps the graph of the gradient; all other calls use the fast kernels. If the math
path is requested, long sequences on a CPU use blockwise_attention.py, which has a second derivative and no N x N matrices.

Conditioning: the paper's code feeds one learned constant into adaLN, which costs 6 * d^2 parameters per block for six vectors.
Here these vectors are parameters: the scale of the norm and the gate of LayerScale (Touvron et al. 2021).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.models.blockwise_attention import blockwise_attention

BLOCKWISE_TOKENS = 2048
"""From this sequence length on, attention with a second derivative runs block by block (docs/results/speed.md)."""
PLAIN_TOKENS = 1024
"""Up to this sequence length, attention in bfloat16 on a CPU without gradients is two matrix products and a softmax. PyTorch's
fused kernel takes 1.5 times as long at 529 tokens (docs/results/photographs.md)."""


def axial_rope(height: int, width: int, head_dim: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin (height * width, head_dim // 2) of 2-D rotary positions (Su et al. 2021; axial, Heo et al. 2024).

    Half of the frequencies rotate with the row, the other half with the column. Any grid works, also H != W.
    Raises ValueError unless head_dim is a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} is not a multiple of 4; change num_heads or embed_dim")
    num_freqs = head_dim // 4
    freqs = 100.0 ** (-torch.arange(num_freqs, dtype=torch.float32, device=device) / num_freqs)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * freqs  # (height, num_freqs)
    cols = torch.arange(width, dtype=torch.float32, device=device)[:, None] * freqs  # (width, num_freqs)
    angles = torch.cat(
        [rows[:, None].expand(height, width, num_freqs), cols[None].expand(height, width, num_freqs)], dim=-1
    ).reshape(height * width, 2 * num_freqs)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, num_heads, N, head_dim) by angles (N, head_dim // 2), pairing the two halves of head_dim."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over (B, num_heads, N, head_dim) with PyTorch's kernels, by blocks (see BLOCKWISE_TOKENS), or plain (see
    PLAIN_TOKENS)."""
    if not torch.compiler.is_compiling():
        if q.shape[-2] >= BLOCKWISE_TOKENS and _takes_blocks(q):
            return blockwise_attention(q, k, v)
        if q.shape[-2] <= PLAIN_TOKENS and q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.is_grad_enabled():
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, num_heads, N, N)
            return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _takes_blocks(q: Tensor) -> bool:
    math_alone = not torch.backends.cuda.flash_sdp_enabled()  # sdpa_kernel sets these flags for every device
    full_precision = q.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(q.device.type)
    return math_alone and full_precision and q.device.type == "cpu"


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        B, N, dim = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, num_heads, N, head_dim)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        x = self_attention(q, k, v)  # (B, num_heads, N, head_dim)
        return self.proj(x.transpose(1, 2).reshape(B, N, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between, (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block with gated residuals, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, init_gate: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.gate1 = nn.Parameter(torch.full((dim,), init_gate))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.gate2 = nn.Parameter(torch.full((dim,), init_gate))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.gate1 * self.attn(self.norm1(x), rope)
        return x + self.gate2 * self.mlp(self.norm2(x))
