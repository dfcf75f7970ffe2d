"""Training speed: our training step against the plainest eager version of the paper's, at the same size, side by side.

    python eval/training_speed.py --embed-dim 256 --depth 4 --mlp-ratio 2

The plain step is what the paper's published code does, written directly: blocks whose norms, gates and shifts come from adaLN
fed with one learned constant, attention as two matrix products and a softmax, one linear unit a patch, float32, the gradient of
the energy taken eagerly with create_graph and differentiated again. Ours is the project's own step as it is trained: per-block
vectors in place of adaLN, and the gradient compiled (models/blocks.py, thinking.CompiledEnergy). Both take one thinking step
from the noisy image, smooth-L1 to the clean one, backward, clip, AdamW. Rounds alternate, so that what else the machine does
touches both; the figure is the ratio of the medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.config import build_config
from ebt_vision.models.patch_trunk import patchify
from ebt_vision.objectives import ImageBatch
from ebt_vision.rng import sample_generators
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.optim import build_optimizer


class PlainBlock(nn.Module):
    """A DiT block as the paper's code has it: six vectors from adaLN for every sample."""

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
    """The paper's bidirectional EBT, one energy per image."""

    def __init__(self, settings: argparse.Namespace):
        super().__init__()
        dim, tokens = settings.embed_dim, (settings.img_size // settings.patch_size) ** 2
        self.patch_size = settings.patch_size
        self.embed = nn.Linear(3 * settings.patch_size**2, dim)
        self.positions = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.constant = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.blocks = nn.ModuleList(PlainBlock(dim, settings.num_heads, settings.mlp_ratio) for _ in range(settings.depth))
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


def plain_step(settings: argparse.Namespace, noisy: Tensor, clean: Tensor) -> Callable[[], None]:
    """One update of the plain version."""
    model = PlainEBT(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        candidate = noisy.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(candidate).sum(), candidate, create_graph=True)
        F.smooth_l1_loss(candidate - model.step_size.clamp(min=1e-4) * gradient, clean).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_step(settings: argparse.Namespace, clean: Tensor, *, head: str, compiled: bool) -> Callable[[], None]:
    """One update of the project's own objective and optimiser."""
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    config = build_config(
        {
            "name": "speed",
            "model_type": "patch_ebt",
            "model": {name: getattr(settings, name) for name in names} | {"energy_head": head},
            "data": {"path": "unused"},
            "train": {"compile": compiled},
        }
    )
    model = build_model(config)
    objective, optimizer = build_objective(model, config), build_optimizer(model, config.optim)
    batch = ImageBatch(clean=clean, noise=torch.randn_like(clean), generators=sample_generators(0, range(len(clean))))

    def step() -> None:
        optimizer.zero_grad()
        objective(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()

    return step


def main(arguments: list[str] | None = None) -> int:
    """Print images per second of every version and its ratio to the plain one."""
    settings = _parse(arguments)
    torch.manual_seed(0)
    size = (settings.batch_size, 3, settings.img_size, settings.img_size)
    clean, noisy = torch.randn(size), torch.randn(size)
    versions = {
        "plain eager": plain_step(settings, noisy, clean),
        "ours, linear head, eager": our_step(settings, clean, head="linear", compiled=False),
        "ours, linear head, compiled": our_step(settings, clean, head="linear", compiled=True),
        "ours, quadratic head, compiled": our_step(settings, clean, head="quadratic", compiled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for step in versions.values():  # compile and warm up
        step()
        step()
    for _ in range(settings.rounds):
        for name, step in versions.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    plain = statistics.median(seconds["plain eager"])
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {settings.batch_size}, {settings.rounds} rounds"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:32} {settings.batch_size / median:8.1f} images/s   {plain / median:.2f} x plain")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed against the plainest eager version of the paper's step.")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--mlp-ratio", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
