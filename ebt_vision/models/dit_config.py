"""The size of a DiT, separate from the network, because importing diffusers takes seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Size of a DiT, in timm's names; the MLP ratio is 4, which diffusers fixes."""

    img_size: int = 64
    """Side in pixels of the training images; for other sizes the positions are scaled to the range of the training grid."""
    patch_size: int = 8
    in_chans: int = 3
    embed_dim: int = 256
    depth: int = 6
    num_heads: int = 4
    learn_sigma: bool = True
    """Also predict the variance and add its term to the loss, as in DiT (Nichol & Dhariwal 2021)."""
    shared_embedder: bool = True
    """One timestep and label embedder, as in the paper; False gives every block its own, as diffusers does."""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.img_size % self.patch_size:
            low = self.img_size // self.patch_size * self.patch_size
            remedy = " or ".join(str(size) for size in (low, low + self.patch_size) if size)
            raise ValueError(f"img_size={self.img_size} is not divisible by patch_size={self.patch_size}; use {remedy}")
        if self.embed_dim % 4:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of 4 (2-D sine-cosine positions)")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}")
