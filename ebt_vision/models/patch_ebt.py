"""PatchEBT: the bidirectional, patch-based energy-based transformer for images (Gladstone et al. 2025)."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ebt_vision.models.energy_model import EnergyModel, check_energies
from ebt_vision.models.image_features import ImageFeatures
from ebt_vision.models.patches import check_image_size, patchify, unpatchify
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.models.trunk_config import TrunkConfig
from ebt_vision.models.trunks import build_trunk


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchEBTConfig(TrunkConfig):
    """A patch transformer with an energy head."""

    energy_head: Literal["linear", "quadratic"] = "quadratic"
    """linear: one linear unit per patch, as in the paper. quadratic: half the squared distance between a patch and its
    reconstruction (Salimans & Ho 2021, sec. 3; gradient-step denoisers, Hurault et al. 2022, eq. 8)."""
    observation_context: bool = False
    """Give the energy the noisy observation as context: E(x, y) instead of the paper's E(y)."""
    suggested_start: Literal["observation", "proposal"] = "observation"
    """Default start of thinking: the noisy image, or its reconstruction N(x) for a model trained with
    objective.reconstruction_weight. The proposal then counts as the first step."""
    suggested_steps: int = 4
    """Default number of thinking steps. It is stored with the weights, because they determine when overthinking starts."""
    suggested_tolerance: float | None = None
    """Default tolerance together with suggested_steps (see thinking_config.ThinkingConfig); None: no tolerance."""
    suggested_tolerance_of: Literal["training", "observation"] = "training"
    """Reference of suggested_tolerance."""
    suggested_clean_below: float = 0.0
    """Default of DenoiseOptions.clean_below, 0..255 units, for a model that starts from its proposal. It is chosen on training
    images by eval/stopping.py; 0: every image takes its steps."""
    training_gain: float | None = None
    """Mean gain of a first step (decrease of the energy, mean over patches) at the training noise level, measured by
    eval/training_gain.py. Only tolerance_of="training" needs it."""
    init_step_size: float = 1.0
    """Initial step size. The paper's 3000 for a mean over 64 patches equals 47 for this sum (linear head)."""

    def __post_init__(self) -> None:
        # Name the class explicitly: slots=True creates a new class, which zero-argument super() does not know.
        TrunkConfig.__post_init__(self)
        if self.suggested_start not in ("observation", "proposal"):
            raise ValueError(f"suggested_start={self.suggested_start!r} is unknown; use 'observation' or 'proposal'")
        if self.suggested_start == "proposal" and self.energy_head != "quadratic":
            raise ValueError("suggested_start='proposal' needs energy_head='quadratic', which has a reconstruction")
        if self.suggested_steps < 1:
            raise ValueError(f"suggested_steps={self.suggested_steps} must be 1 or more")
        if not 0 <= self.suggested_clean_below <= 255:
            raise ValueError(f"suggested_clean_below={self.suggested_clean_below:g} is not in 0..255")
        if self.suggested_clean_below and self.suggested_start != "proposal":
            raise ValueError("suggested_clean_below needs suggested_start='proposal', whose energy measures noise")
        for name in ("suggested_tolerance", "training_gain"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0, or null")
        if self.suggested_tolerance_of not in ("training", "observation"):
            raise ValueError(
                f"suggested_tolerance_of={self.suggested_tolerance_of!r} is unknown; use 'training' or 'observation'"
            )
        needs_gain = self.suggested_tolerance is not None and self.suggested_tolerance_of == "training"
        if needs_gain and self.training_gain is None:
            raise ValueError(f"suggested_tolerance={self.suggested_tolerance} needs training_gain: see eval/training_gain.py")
        if self.energy_head not in ("linear", "quadratic"):
            raise ValueError(f"energy_head={self.energy_head!r} is unknown; use 'linear' or 'quadratic'")
        if self.energy_head == "linear" and self.stem_widths:
            raise ValueError("energy_head='linear' does not use a convolutional decoder; use 'quadratic', or stem_widths: []")
        if self.energy_head == "linear" and self.embed_dim < self.patch_dim:
            raise ValueError(
                f"embed_dim={self.embed_dim} is below patch_size**2 * in_chans={self.patch_dim}: the gradient of a linear head "
                "cannot leave the span of the patch embedding; use a larger embed_dim, a smaller patch or the quadratic head"
            )


_SUGGESTIONS = ("suggested_start", "suggested_steps", "suggested_tolerance", "suggested_tolerance_of", "suggested_clean_below")


class PatchEBT(ImageFeatures, EnergyModel):
    """Energy of candidate images (B, in_chans, H, W) in [-1, 1], H and W multiples of patch_size, as (B,)."""

    model_type = "patch_ebt"
    blocks_name = "trunk.blocks"
    config_class = PatchEBTConfig
    usage_fields = (*EnergyModel.usage_fields, *_SUGGESTIONS, "training_gain")

    def __init__(self, config: PatchEBTConfig):
        super().__init__(config.init_step_size)
        self.config = config
        self.trunk = build_trunk(config, num_inputs=2 if config.observation_context else 1)
        # A linear head starts at zero, as in the paper's code. So does the quadratic head of a plain trunk: E is then |y|^2 /
        # 2.
        if config.energy_head == "quadratic":
            self.head = self.trunk.make_head()
        else:
            self.head = nn.Linear(config.embed_dim, 1, bias=False)
            nn.init.zeros_(self.head.weight)

    def forward(self, candidate: Tensor, *context: Tensor) -> Tensor:
        """Return the energy of each image, (B,) float32: the sum over its patches (see EnergyModel). Raises ValueError like
        energy_map."""
        return check_energies(self.energy_map(candidate, *context).flatten(1).sum(1), (candidate.shape[0],))

    def energy_map(self, candidate: Tensor, *context: Tensor) -> Tensor:
        """Return the energy of each patch, (B, H / patch_size, W / patch_size), float32 or wider.

        With observation_context, `context` is the noisy observation (B, in_chans, H, W); otherwise it is empty. Raises
        ValueError for another context.
        """
        grid = check_image_size(candidate, self.config.patch_size)
        if self.config.energy_head == "linear":
            self._check_context(context)
            return _wide(self.head(self.trunk(candidate, *context))).sum(-1).unflatten(1, grid)
        reconstruction = self._reconstruct_patches(candidate, *context)  # (B, N, patch_dim)
        energies = 0.5 * (patchify(candidate, self.config.patch_size) - reconstruction).square().sum(-1)
        return energies.unflatten(1, grid)

    def reconstruct(self, candidate: Tensor, *context: Tensor) -> Tensor:
        """Return N(candidate), (B, in_chans, H, W), float32 or wider, in one forward pass: the reconstruction in the quadratic
        energy.

        Raises ValueError for the linear head, which has no reconstruction, and for a context that does not fit the model.
        """
        if self.config.energy_head == "linear":
            raise ValueError("energy_head='linear' has no reconstruction; use a model with the quadratic head")
        patches = self._reconstruct_patches(candidate, *context)
        return unpatchify(patches, self.config.patch_size, *candidate.shape[-2:])

    def propose(self, observation: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return N(observation), (B, in_chans, H, W), and the energy (B,) of the observation, in one forward pass."""
        proposal = self.reconstruct(observation, *context)
        return proposal, 0.5 * (observation - proposal).square().flatten(1).sum(1)

    def _reconstruct_patches(self, candidate: Tensor, *context: Tensor) -> Tensor:
        self._check_context(context)
        return _wide(self.trunk.reconstruct_patches(self.head, candidate, *context))

    def _check_context(self, context: tuple[Tensor, ...]) -> None:
        wanted = int(self.config.observation_context)
        if len(context) != wanted:
            raise ValueError(
                f"observation_context={self.config.observation_context} needs {wanted} context images, got {len(context)}"
            )

    def block_tokens(self, *inputs: Tensor, indices: list[int]) -> list[Tensor]:
        """See ImageFeatures; the inputs are the candidate and its context."""
        self._check_context(inputs[1:])
        return self.trunk.forward_intermediates(*inputs, indices=indices)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See ImageFeatures."""
        return self.trunk.norm(tokens)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapt weights of a PatchEBT without observation_context to a model with it: the embedding of the observation starts
        at zero, so that energies do not change. Weights of other models are returned unchanged."""
        if not self.config.observation_context:
            return weights
        return weights | self.trunk.with_second_input(weights, prefix="trunk.")

    def context_of(self, noisy: Tensor) -> tuple[Tensor, ...]:
        """Return the context of think() for noisy images (B, in_chans, H, W) in [-1, 1]."""
        return (noisy,) if self.config.observation_context else ()


def energy_of(regressor: PatchRegressor, **settings: Any) -> PatchEBT:
    """Return a PatchEBT with the weights of `regressor`: E(y) = |y - N(y)|^2 / 2, where N is the prediction of the regressor.

    `settings` are fields of PatchEBTConfig in addition to those of the trunk, such as suggested_start or init_step_size. N is a
    trained denoiser, but the gradient of this energy has not been trained: see docs/results/photographs.md.
    """
    model = PatchEBT(PatchEBTConfig(**asdict(regressor.config), energy_head="quadratic", **settings))
    model.load_state_dict(model.state_dict() | regressor.state_dict())
    return model.eval()


def _wide(output: Tensor) -> Tensor:
    """Convert to float32 or wider: bfloat16 is too coarse for sums of squares."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def patch_energy_mean(energies: Tensor, image_shape: torch.Size, patch_size: int) -> Tensor:
    """Return the energy for users: the mean over patches, comparable across image sizes. Same shape as `energies`."""
    return energies / num_patches(image_shape, patch_size)


def num_patches(image_shape: torch.Size, patch_size: int) -> int:
    """Number of patches of an image (..., H, W)."""
    return image_shape[-2] // patch_size * (image_shape[-1] // patch_size)
