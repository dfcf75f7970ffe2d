"""PatchRegressor: the trunk and head of a PatchEBT with a quadratic energy, trained to output the clean image in one pass.

A comparison with it shows whether the energy helps, or only the network.
"""

from dataclasses import dataclass

from torch import Tensor

from ebt_vision.models.image_features import ImageFeatures
from ebt_vision.models.patches import unpatchify
from ebt_vision.models.trunk_config import TrunkConfig
from ebt_vision.models.trunks import build_trunk


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchRegressorConfig(TrunkConfig):
    """A patch transformer with a linear patch head; it has only the fields of the trunk."""


class PatchRegressor(ImageFeatures):
    """Noisy images (B, in_chans, H, W) in [-1, 1] -> clean images, same shape; H and W are multiples of patch_size."""

    model_type = "patch_regressor"
    blocks_name = "trunk.blocks"
    config_class = PatchRegressorConfig

    def __init__(self, config: PatchRegressorConfig):
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config)
        self.head = self.trunk.make_head()

    def forward(self, noisy: Tensor) -> Tensor:
        patches = self.trunk.reconstruct_patches(self.head, noisy).float()  # (B, N, patch_dim)
        return unpatchify(patches, self.config.patch_size, *noisy.shape[-2:])

    def block_tokens(self, *inputs: Tensor, indices: list[int]) -> list[Tensor]:
        """See ImageFeatures; the only input is the noisy images."""
        return self.trunk.forward_intermediates(*inputs, indices=indices)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See ImageFeatures."""
        return self.trunk.norm(tokens)
