"""The tokens of any layer of a frozen network, one class a kind of network. The layers:

block0 .. blockN    the tokens after a block, before any norm (the last one: the final tokens before the norm)
final               the final tokens after the norm
gradient            EBT: the gradient of the energy with respect to the candidate, one token per patch
sideS               pixels: the image averaged to S x S, one token
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.equilibrium import PatchEqM
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.patch_trunk import PatchTrunk
from ebt_vision.models.patches import patchify
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise import processes

PIXELS = "pixels"
PIXEL_SIDES = (4, 8, 16, 32)


class FeatureExtractor(ABC):
    """Tokens of the layers of a frozen network. The tokens of an image do not depend on the other images in its batch."""

    takes_timestep = False
    takes_thinking = False
    noise_process = "vp"
    """"awgn": noisy inputs keep their signal at full strength."""

    def __init__(self, name: str, img_size: int, num_blocks: int, extra_layers: tuple[str, ...], identity: str) -> None:
        self.name, self.img_size, self.identity = name, img_size, identity
        """identity: a hash of architecture and weights, independent of the name."""
        self.blocks = tuple(f"block{i}" for i in range(num_blocks))
        self.extra_layers = extra_layers
        self.device = torch.device("cpu")
        self.num_parameters = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers."""
        return self.blocks + self.extra_layers

    @property
    def usual_layers(self) -> tuple[str, ...]:
        """The layers of "all": those of one forward pass."""
        return (*self.blocks, "final")

    def candidates(self, observation: Tensor, num_steps: Iterable[int]) -> dict[int, Tensor]:
        """Return the candidate (B, 3, H, W) after each of `num_steps` thinking steps; only for an EBT."""
        return dict.fromkeys(num_steps, observation)

    @abstractmethod
    def tokens(self, candidate: Tensor, observation: Tensor, timestep: int | None, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return tokens (B, N, D) of each of `layers`; `observation` is the input where thinking started."""


class TrunkExtractor(FeatureExtractor):
    """PatchEBT and regressor: blocks of the trunk; also thinking and gradient of the EBT."""

    def __init__(self, model: PatchEBT | PatchRegressor | PatchEqM, name: str, identity: str) -> None:
        self.takes_thinking = isinstance(model, PatchEBT)
        extra = ("final", "gradient") if self.takes_thinking else ("final",)
        super().__init__(name, model.config.img_size, model.config.depth, extra, identity)
        self.model = model.requires_grad_(False).eval()
        self.noise_process = noise_process_of(model)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.device = next(model.parameters()).device

    def candidates(self, observation: Tensor, num_steps: Iterable[int]) -> dict[int, Tensor]:
        steps = sorted(set(num_steps))
        found = {0: observation}
        if steps[-1] > 0:
            assert isinstance(self.model, PatchEBT)
            config = ThinkingConfig(num_steps=steps[-1])
            context = self.model.context_of(observation)
            step_size = self.model.step_size.detach()
            result = think(self.model, observation, config, context=context, step_size=step_size, evaluate_final=False)
            found |= {step: result.predictions[step - 1] for step in steps if step}
        return found

    def tokens(self, candidate: Tensor, observation: Tensor, timestep: int | None, layers: Sequence[str]) -> dict[str, Tensor]:
        context = self.model.context_of(observation) if isinstance(self.model, PatchEBT) else ()
        trunk: PatchTrunk = self.model.trunk
        inner = [layer for layer in layers if layer != "gradient"]
        found = _by_layer(
            inner, lambda wanted: trunk.forward_intermediates(candidate, *context, indices=wanted), len(self.blocks)
        )
        if "final" in layers:
            found["final"] = trunk.norm(found["final"])
        if "gradient" in layers:
            found["gradient"] = patchify(self._gradient(candidate, context), self.model.config.patch_size)
        return found

    def _gradient(self, candidate: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():
            candidate = candidate.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.model(candidate, *context).sum(), candidate)
        return gradient


class DiffusionExtractor(FeatureExtractor):
    """A diffusion model: blocks at a timestep; `final` is normed, in a DiT without modulation."""

    takes_timestep = True

    def __init__(self, model: Diffusion, name: str, identity: str) -> None:
        super().__init__(name, model.config.img_size, model.config.depth, ("final",), identity)
        self.model = model.requires_grad_(False).eval()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.device = next(model.parameters()).device

    def tokens(self, candidate: Tensor, observation: Tensor, timestep: int | None, layers: Sequence[str]) -> dict[str, Tensor]:
        assert timestep is not None, "a diffusion model always needs a timestep"
        t = torch.full((len(candidate),), timestep, dtype=torch.int64, device=candidate.device)
        found = _by_layer(
            layers, lambda wanted: self.model.forward_intermediates(candidate, t, indices=wanted), len(self.blocks)
        )
        if "final" in layers:
            found["final"] = self.model.final_norm(found["final"])
        return found


class TimmExtractor(FeatureExtractor):
    """Any timm model with forward_features; with forward_intermediates also its blocks. Prefix tokens are removed."""

    def __init__(self, model: Any, name: str, img_size: int, identity: str) -> None:
        from timm.data import resolve_data_config

        self.model = model.requires_grad_(False).eval()
        device = next(model.parameters()).device
        count = 0
        if hasattr(model, "forward_intermediates"):
            with torch.no_grad():
                probe = torch.zeros(1, 3, img_size, img_size, device=device)
                count = len(self.model.forward_intermediates(probe, output_fmt="NCHW", intermediates_only=True))
        super().__init__(name, img_size, count, ("final",), identity)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.device = device
        config = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", {}))
        self._mean, self._std = (torch.tensor(config[key], device=device).reshape(1, 3, 1, 1) for key in ("mean", "std"))

    def tokens(self, candidate: Tensor, observation: Tensor, timestep: int | None, layers: Sequence[str]) -> dict[str, Tensor]:
        x = (processes.to_image_range(candidate) - self._mean) / self._std
        wanted = sorted({int(layer.removeprefix("block")) for layer in layers if layer != "final"})
        found: dict[str, Tensor] = {}
        if wanted:
            final, outputs = self.model.forward_intermediates(x, indices=wanted, output_fmt="NCHW")
            found = {f"block{i}": output.flatten(2).transpose(1, 2) for i, output in zip(wanted, outputs, strict=True)}
        else:
            final = self.model.forward_features(x)
        if "final" in layers:
            found["final"] = self._to_tokens(final)
        return found

    def _to_tokens(self, final: Tensor) -> Tensor:
        if final.ndim == 4:  # a map
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return final.flatten(1, 2) if channels_last else final.flatten(2).transpose(1, 2)
        return final[:, getattr(self.model, "num_prefix_tokens", 0) :] if final.ndim == 3 else final[:, None]


class PixelExtractor(FeatureExtractor):
    """No network: the averaged image itself, as a lower bound for all rows."""

    def __init__(self, img_size: int) -> None:
        sides = sorted({side for side in PIXEL_SIDES if side < img_size} | {img_size})
        super().__init__(PIXELS, img_size, 0, tuple(f"side{side}" for side in sides), PIXELS)

    @property
    def usual_layers(self) -> tuple[str, ...]:
        return tuple(layer for layer in self.layers if int(layer.removeprefix("side")) <= PIXEL_SIDES[-1])

    def tokens(self, candidate: Tensor, observation: Tensor, timestep: int | None, layers: Sequence[str]) -> dict[str, Tensor]:
        sides = {layer: int(layer.removeprefix("side")) for layer in layers}
        return {layer: F.adaptive_avg_pool2d(candidate, side).flatten(1)[:, None] for layer, side in sides.items()}


def _by_layer(layers: Sequence[str], run: Callable[[list[int]], list[Tensor]], num_blocks: int) -> dict[str, Tensor]:
    """Return the tokens of "blockI" and of "final" (here the last block's) from one pass over the blocks."""
    index = {layer: num_blocks - 1 if layer == "final" else int(layer.removeprefix("block")) for layer in layers}
    wanted = sorted(set(index.values()))
    tokens = dict(zip(wanted, run(wanted), strict=True)) if wanted else {}
    return {layer: tokens[i] for layer, i in index.items()}
