"""PatchEqM: Equilibrium Matching (Wang & Du 2025, arXiv 2510.02300) on the trunk that PatchEBT and the regressor share.

Equilibrium Matching learns a gradient field f(y) that is zero at clean images and does not depend on a noise level. Images are
sampled by descending along it, y <- y - step_size * f(y). Here f(y) = y - N(y), where N is the trunk with its head. The field
costs one forward pass, where the gradient of an EBT costs about three.
"""

from dataclasses import dataclass

from torch import Tensor

from ebt_vision.models.image_features import ImageFeatures
from ebt_vision.models.patches import unpatchify
from ebt_vision.models.trunk_config import TrunkConfig
from ebt_vision.models.trunks import build_trunk


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchEqMConfig(TrunkConfig):
    """The trunk's fields, and how to sample."""

    step_size: float = 0.5
    """Step of the descent; 1 with the field at the noisiest images would reach the clean image in one step."""
    suggested_steps: int = 4
    """Default number of steps."""

    def __post_init__(self) -> None:
        TrunkConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        if self.step_size <= 0:
            raise ValueError(f"step_size={self.step_size} must be above 0")
        if self.suggested_steps < 1:
            raise ValueError(f"suggested_steps={self.suggested_steps} must be 1 or more")


class PatchEqM(ImageFeatures):
    """Images (B, in_chans, H, W) in [-1, 1] -> the field f(y), same shape; H and W are multiples of patch_size.

    `core.thinking.think` descends along it through EquilibriumEnergy.
    """

    model_type = "patch_eqm"
    blocks_name = "trunk.blocks"
    config_class = PatchEqMConfig
    usage_fields = ("step_size", "suggested_steps")

    def __init__(self, config: PatchEqMConfig):
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config)
        self.head = self.trunk.make_head()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.trunk.reconstruct_patches(self.head, images).float()  # (B, N, patch_dim)
        return images - unpatchify(patches, self.config.patch_size, *images.shape[-2:])

    def block_tokens(self, *inputs: Tensor, indices: list[int]) -> list[Tensor]:
        """See ImageFeatures; the one input is the noisy images, (B, in_chans, H, W)."""
        return self.trunk.forward_intermediates(*inputs, indices=indices)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See ImageFeatures; tokens (B, N, embed_dim)."""
        return self.trunk.norm(tokens)


class EquilibriumEnergy:
    """A PatchEqM as think() takes it: the energy |f(y)|^2 / 2, and f(y) in place of the energy's gradient.

    The energy is the distance of images (B, in_chans, H, W) from an equilibrium. f is not its gradient: that would need the
    network's Jacobian.
    """

    def __init__(self, model: PatchEqM):
        self.model = model

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor:
        return self.energy_and_gradient(candidate)[0]

    def energy_and_gradient(self, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(energies (B,), field (B, in_chans, H, W)) of candidates (B, in_chans, H, W), in one forward pass."""
        field = self.model(candidate)
        return 0.5 * field.square().flatten(1).sum(1), field
