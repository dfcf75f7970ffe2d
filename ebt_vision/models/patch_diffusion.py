"""PatchDiffusion: a diffusion model on the trunk that PatchEBT and the regressor share, plain or with a convolutional stem.

The DiT differs from an EBT in its network too. A comparison with this model shows the method alone.
"""

from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor

from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.patch_diffusion_config import PatchDiffusionConfig
from ebt_vision.models.patches import unpatchify
from ebt_vision.models.trunks import build_trunk

_FREQUENCIES = 256


class PatchDiffusion(Diffusion):
    """Predicts the noise in VP-noised images (B, in_chans, H, W); H and W are multiples of patch_size.

    The embedding of the timestep is added to every token before the blocks. The variance is not learned.
    """

    model_type = "patch_diffusion"
    blocks_name = "trunk.blocks"
    config_class = PatchDiffusionConfig

    def __init__(self, config: PatchDiffusionConfig):
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config)
        self.head = self.trunk.make_head()
        # As in the DiT: sines and cosines of the timestep, then two linear layers.
        self.frequencies = Timesteps(_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.embedder = TimestepEmbedding(_FREQUENCIES, config.embed_dim)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, None]:
        """See Diffusion; there are no variance values. Raises ValueError for sides that the patch does not divide."""
        patches = self.trunk.output_patches(self.head, noisy, conditioning=self._embed(timesteps)).float()  # (B, N, patch_dim)
        return unpatchify(patches, self.config.patch_size, *noisy.shape[-2:]), None

    def block_tokens(self, *inputs: Tensor, indices: list[int]) -> list[Tensor]:
        """See ImageFeatures; the inputs are the noisy images and their timesteps, int64 (B,)."""
        if len(inputs) != 2:
            raise ValueError(
                f"a PatchDiffusion needs images and timesteps, got {len(inputs)} inputs; use model(images, timesteps)"
            )
        return self.trunk.forward_intermediates(inputs[0], indices=indices, conditioning=self._embed(inputs[1]))

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See ImageFeatures; tokens (B, N, embed_dim)."""
        return self.trunk.norm(tokens)

    def _embed(self, timesteps: Tensor) -> Tensor:
        """Timesteps, int64 (B,) -> (B, embed_dim)."""
        return self.embedder(self.frequencies(timesteps).to(self.embedder.linear_1.weight.dtype))
