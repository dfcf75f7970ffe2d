"""The plainest faithful implementations of the paper's training steps, as a baseline for eval/speed.py.

Image: a direct implementation of the paper's published code. Norms, gates and shifts of blocks come from adaLN with one learned
constant. Attention is two matrix products and a softmax. There is one linear unit per patch, the energy is the mean, in
float32. The gradient of the energy is taken eagerly with create_graph and differentiated again. Text: the layout of the paper
with our blocks and weights. At every thinking step S context tokens and S candidates run through all blocks together, with one
mask.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.models.causal_blocks import rope_1d
from ebt_vision.models.causal_text_ebt import CausalTextEBT
from ebt_vision.models.patches import patchify
from ebt_vision.models.trunk_config import TrunkConfig


class PlainBlock(nn.Module):
    """A DiT block as in the paper's code: six vectors from adaLN for every sample."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        B, N, dim = x.shape
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(B, N, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + gate1 * self.proj((weights @ v).transpose(1, 2).reshape(B, N, dim))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainEBT(nn.Module):
    """The paper's bidirectional EBT: images (B, 3, H, W) to one energy per image, (B,)."""

    def __init__(self, sizes: TrunkConfig):
        super().__init__()
        dim = sizes.embed_dim
        self.patch_size = sizes.patch_size
        self.embed = nn.Linear(3 * sizes.patch_size**2, dim)
        self.positions = nn.Parameter(torch.randn(1, (sizes.img_size // sizes.patch_size) ** 2, dim) * 0.02)
        self.constant = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.blocks = nn.ModuleList(PlainBlock(dim, sizes.num_heads, sizes.mlp_ratio) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, 1, bias=False)
        self.step_size = nn.Parameter(torch.tensor(3000.0))

    def forward(self, images: Tensor) -> Tensor:
        condition = self.constant.expand(len(images), -1)
        x = self.embed(patchify(images, self.patch_size)) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.head(self.norm(x) * (1 + scale) + shift).mean((1, 2))


def plain_image_update(sizes: TrunkConfig, noisy: Tensor, clean: Tensor) -> Callable[[], None]:
    """One update: a thinking step from `noisy` (B, 3, H, W), smooth-L1 to `clean`, backward, clip, AdamW."""
    model = PlainEBT(sizes).to(noisy.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def update() -> None:
        optimizer.zero_grad()
        candidate = noisy.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(candidate).sum(), candidate, create_graph=True)
        F.smooth_l1_loss(candidate - model.step_size.clamp(min=1e-4) * gradient, clean).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def plain_text_energy(model: CausalTextEBT) -> Callable[..., Tensor]:
    """Energy (B, S) of candidates (B, S, V) after tokens (B, S), with 2S tokens through every block."""

    def energy(candidate: Tensor, tokens: Tensor) -> Tensor:
        S = tokens.shape[1]
        x = torch.cat([model.trunk.embed(tokens), candidate.softmax(-1) @ model.trunk.embed.weight], dim=1)
        causal, own = torch.ones(S, S, dtype=torch.bool).tril(), torch.eye(S, dtype=torch.bool)
        mask = torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([causal, own], 1)], 0).to(x.device)
        cos, sin = rope_1d(0, S + 1, model.config.embed_dim // model.config.num_heads, device=x.device)
        rope = torch.cat([cos[:S], cos[1:]]), torch.cat([sin[:S], sin[1:]])
        for block in model.trunk.layers:
            q, k, v = block.project(x, rope)
            x = block.context(x, q, k, v, mask)
        output = model.head(model.trunk.norm(x[:, S:]))
        return (0.5 * (candidate - output).square() if model.config.energy_head == "quadratic" else output).sum(-1)

    return energy
