"""The patch transformer that PatchEBT and the regressor share: image in, tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ebt_vision.models.blocks import Block, axial_rope
from ebt_vision.models.checkpointing import checkpoint_block
from ebt_vision.models.image_features import take_indices


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkConfig:
    """Size of a patch transformer, in timm's names."""

    img_size: int = 64
    """Side in pixels of the training images; any other size works at inference."""
    patch_size: int = 8
    in_chans: int = 3
    embed_dim: int = 256
    depth: int = 6
    num_heads: int = 4
    mlp_ratio: float = 4.0
    stem_widths: tuple[int, ...] = ()
    """Channels of a convolutional stem and decoder, one width a level, fine to coarse (see conv_trunk.py). A level halves the
    resolution, from 1 / stem_unshuffle to 1 / patch_size. Empty: a linear patch embedding and no decoder, the plain trunk."""
    stem_blocks: int = 1
    """Residual blocks at each level of a convolutional stem, and as many of its decoder."""
    stem_unshuffle: int = 1
    """A convolutional stem starts at 1 / stem_unshuffle of the resolution (pixel_unshuffle, as in FFDNet); 1 is full size."""
    noise_process: Literal["vp", "awgn"] = "vp"
    """What the training images went through: the VP process at one level, which shrinks the signal, as in the paper; or plain
    Gaussian noise of many strengths, as photographs have it. It is stored here because it says how input must be scaled."""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.noise_process not in ("vp", "awgn"):
            raise ValueError(f"noise_process={self.noise_process!r} is unknown; use 'vp' or 'awgn'")
        if self.img_size % self.patch_size:
            low = self.img_size // self.patch_size * self.patch_size
            remedy = " or ".join(str(size) for size in (low, low + self.patch_size) if size)
            raise ValueError(f"img_size={self.img_size} is not divisible by patch_size={self.patch_size}; use {remedy}")
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"embed_dim={self.embed_dim} must be a multiple of 4 * num_heads={4 * self.num_heads} (2-D rotary positions)"
            )
        object.__setattr__(self, "stem_widths", tuple(self.stem_widths))  # config.json gives a list
        if self.stem_widths:
            self._check_stem()

    def _check_stem(self) -> None:
        for name in ("stem_blocks", "stem_unshuffle"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if min(self.stem_widths) < 1:
            raise ValueError(f"stem_widths={list(self.stem_widths)} must all be 1 or more")
        reached = self.stem_unshuffle * 2 ** len(self.stem_widths)
        if reached != self.patch_size:
            raise ValueError(
                f"stem_widths={list(self.stem_widths)} with stem_unshuffle={self.stem_unshuffle} ends at patches of "
                f"{reached} px, not at patch_size={self.patch_size}; give one width for each halving"
            )

    @property
    def patch_dim(self) -> int:
        """Values in one patch."""
        return self.patch_size**2 * self.in_chans


def noise_process_of(model: nn.Module) -> str:
    """The noise process that a network is trained on: its config's, "vp" where that has none (DiT)."""
    return str(getattr(getattr(model, "config", None), "noise_process", "vp"))


PRESETS: dict[str, dict[str, int | float]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    # The size of the paper's denoising experiment: 128 px, 64 tokens (Gladstone et al. 2025, code).
    "paper_large": dict(img_size=128, patch_size=16, embed_dim=1536, depth=24, num_heads=16, mlp_ratio=1.0),
}
"""The field's sizes (DeiT, ViT) and the paper's; img_size and patch_size are the caller's unless named."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """NCHW -> NLC: (B, C, H, W) -> (B, H/p * W/p, p * p * C)."""
    B, C, H, W = images.shape
    p = patch_size
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """NLC -> NCHW, the inverse of patchify for images of (height, width)."""
    B, _, dim = patches.shape
    p = patch_size
    x = patches.reshape(B, height // p, width // p, p, p, dim // p**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, dim // p**2, height, width)


class PatchTrunk(nn.Module):
    """Patch embedding and transformer blocks; `num_inputs` images of in_chans each are stacked on the channels."""

    def __init__(self, config: TrunkConfig, *, num_inputs: int = 1):
        super().__init__()
        self.config = config
        self._make_embedding(config, num_inputs)
        self.blocks = nn.ModuleList(Block(config.embed_dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.apply(_init_linear)
        self.checkpoint_blocks = False
        """Compute the blocks' activations again in backward passes instead of keeping them (see checkpointing.py)."""

    def _make_embedding(self, config: TrunkConfig, num_inputs: int) -> None:
        self.embed = nn.Linear(config.patch_dim * num_inputs, config.embed_dim)

    def make_head(self) -> nn.Module:
        """The head that reconstruct_patches takes, initialised; it belongs to the model, not to the trunk."""
        head = nn.Linear(self.config.embed_dim, self.config.patch_dim)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def with_second_input(self, weights: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
        """The embedding's weights, by name, of a trunk with one input for one with two; the second counts for nothing yet.

        Empty where `weights` has no embedding of one input. `prefix` goes before the trunk's own names.
        """
        name, chans = f"{prefix}embed.weight", self.config.in_chans
        plain = weights.get(name)
        if plain is None or plain.shape[1] != self.config.patch_dim:
            return {}
        first = plain.unflatten(1, (-1, chans))  # pixels of a patch, channels
        return {name: torch.cat([first, torch.zeros_like(first)], dim=2).flatten(1)}  # as forward_intermediates stacks them

    def forward(self, *images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) in [-1, 1] -> normed tokens (B, N, embed_dim)."""
        return self.norm(self.forward_intermediates(*images, indices=[self.config.depth - 1])[0])

    def reconstruct_patches(self, head: nn.Module, *images: Tensor) -> Tensor:
        """The network's reconstruction of the first of the images, as patches (B, N, patch_dim), by a head of make_head."""
        return head(self(*images))

    def forward_intermediates(self, *images: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """Tokens (B, N, embed_dim) after the blocks of take_indices (default all), before the final norm."""
        grid = check_image_size(images[0], self.config.patch_size)
        # Embed. The patches of a candidate and of its context lie on the channels.
        x = self._embed(torch.cat(images, dim=1))  # (B, N, embed_dim)
        return self._run_blocks(x, grid, indices)

    def _embed(self, images: Tensor) -> Tensor:
        """Stacked images (B, num_inputs * in_chans, H, W) -> tokens (B, N, embed_dim)."""
        return self.embed(patchify(images, self.config.patch_size))

    def _run_blocks(self, x: Tensor, grid: tuple[int, int], indices: int | Sequence[int] | None) -> list[Tensor]:
        rope = axial_rope(*grid, self.config.embed_dim // self.config.num_heads, device=x.device)
        wanted = take_indices(len(self.blocks), indices)
        outputs = []
        for i, block in enumerate(self.blocks[: wanted[-1] + 1]):
            x = checkpoint_block(block, x, rope) if self.checkpoint_blocks else block(x, rope)
            if i in wanted:
                outputs.append(x)
        return outputs


def build_trunk(config: TrunkConfig, *, num_inputs: int = 1) -> PatchTrunk:
    """The plain trunk, or with config.stem_widths the one with a convolutional stem."""
    if config.stem_widths:
        from ebt_vision.models.conv_trunk import ConvTrunk  # a subclass of what this file has

        return ConvTrunk(config, num_inputs=num_inputs)
    return PatchTrunk(config, num_inputs=num_inputs)


def check_image_size(images: Tensor, patch_size: int) -> tuple[int, int]:
    """The patch grid (rows, columns) of images (B, C, H, W); ValueError where the patch does not divide them."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} is not divisible by patch_size={patch_size}; the Denoiser pads such images"
        )
    return height // patch_size, width // patch_size


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
