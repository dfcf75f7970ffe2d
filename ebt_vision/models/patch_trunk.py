"""The patch transformer that PatchEBT and the regressor share: image in, tokens out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebt_vision.models.blocks import Block, axial_rope
from ebt_vision.models.checkpointing import checkpoint_block
from ebt_vision.models.image_features import take_indices
from ebt_vision.models.patches import check_image_size, patchify
from ebt_vision.models.trunk_config import TrunkConfig


class PatchTrunk(nn.Module):
    """Patch embedding and transformer blocks; `num_inputs` images of in_chans each are concatenated along the channels."""

    def __init__(self, config: TrunkConfig, *, num_inputs: int = 1):
        super().__init__()
        self.config = config
        self._make_embedding(config, num_inputs)
        self.blocks = nn.ModuleList(Block(config.embed_dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.apply(_init_linear)
        self.checkpoint_blocks = False
        """Compute the activations of the blocks again in backward passes instead of keeping them (see checkpointing.py)."""

    def _make_embedding(self, config: TrunkConfig, num_inputs: int) -> None:
        self.embed = nn.Linear(config.patch_dim * num_inputs, config.embed_dim)

    def make_head(self) -> nn.Module:
        """Create the initialised head for reconstruct_patches. It belongs to the model, not to the trunk."""
        head = nn.Linear(self.config.embed_dim, self.config.patch_dim)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def with_second_input(self, weights: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
        """Extend the embedding weights of a trunk with one input to two inputs; the weights of the second input are zero.

        Return them by name; empty if `weights` has no embedding of one input. `prefix` precedes the trunk's own names.
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
        """Reconstruct the first of the images as patches (B, N, patch_dim), with a head of make_head."""
        return self.output_patches(head, *images)

    def output_patches(self, head: nn.Module, *images: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """Return the output of a head of make_head as patches (B, N, patch_dim); `conditioning`: see forward_intermediates."""
        tokens = self.forward_intermediates(*images, indices=[self.config.depth - 1], conditioning=conditioning)[0]
        return head(self.norm(tokens))

    def forward_intermediates(
        self, *images: Tensor, indices: int | Sequence[int] | None = None, conditioning: Tensor | None = None
    ) -> list[Tensor]:
        """Return tokens (B, N, embed_dim) after the blocks of take_indices (default all), before the final norm.

        `conditioning` (B, embed_dim) is added to every token before the blocks.
        """
        grid = check_image_size(images[0], self.config.patch_size)
        # Embed. The patches of a candidate and of its context are concatenated along the channels.
        x = self._embed(torch.cat(images, dim=1))  # (B, N, embed_dim)
        return self._run_blocks(x if conditioning is None else x + conditioning[:, None], grid, indices)

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


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
