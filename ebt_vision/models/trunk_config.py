"""The size of a patch transformer: its config and the usual named sizes."""

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkConfig:
    """Size of a patch transformer, in timm's names."""

    img_size: int = 64
    """Side in pixels of the training images; inference works at any size."""
    patch_size: int = 8
    in_chans: int = 3
    embed_dim: int = 256
    depth: int = 6
    num_heads: int = 4
    mlp_ratio: float = 4.0
    stem_widths: tuple[int, ...] = ()
    """Channels of a convolutional stem and decoder, one width per level, fine to coarse (see conv_trunk.py). Levels halve the
    resolution from 1 / stem_unshuffle to 1 / patch_size. Empty: the plain trunk with a linear patch embedding and no
    decoder."""
    stem_blocks: int = 1
    """Residual blocks at each level of a convolutional stem and of its decoder."""
    stem_unshuffle: int = 1
    """A convolutional stem starts at 1 / stem_unshuffle of the resolution (pixel_unshuffle, as in FFDNet); 1 is full size."""
    noise_process: Literal["vp", "awgn"] = "vp"
    """Noise of the training images: the VP process at one level, which scales the signal down, as in the paper; or plain
    Gaussian noise of many strengths, as for photographs. It is stored here because the input must be scaled to match."""

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
        object.__setattr__(self, "stem_widths", tuple(self.stem_widths))  # config.json has a list
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
        """Number of values in one patch."""
        return self.patch_size**2 * self.in_chans


def noise_process_of(model: nn.Module) -> str:
    """Return the noise process of a network's training from its config; "vp" if the config has none (DiT)."""
    return str(getattr(getattr(model, "config", None), "noise_process", "vp"))


PRESETS: dict[str, dict[str, int | float]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    # The size of the paper's denoising experiment: 128 px, 64 tokens (Gladstone et al. 2025, code).
    "paper_large": dict(img_size=128, patch_size=16, embed_dim=1536, depth=24, num_heads=16, mlp_ratio=1.0),
}
"""Usual sizes (DeiT, ViT) and the paper's size; set img_size and patch_size yourself unless a preset has them."""
