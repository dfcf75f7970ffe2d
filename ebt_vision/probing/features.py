"""Token features of every network for probes: layers, inputs and pooling.

An extractor returns the tokens of any of its layers for images (B, 3, H, W) in [-1, 1]. `extract` feeds it under every
requested condition (noise level, timestep, thinking steps) and pools, all layers in one pass. The layers:

   block0 .. blockN    the tokens after a block, before any norm (the last one: the final tokens before the norm)
   final               the final tokens after the norm
   gradient            EBT: the gradient of the energy with respect to the candidate, one token per patch
   sideS               pixels: the image averaged to S x S, one token
"""

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking import ThinkingConfig, think
from ebt_vision.models.checkpoint import load_pretrained, resolve
from ebt_vision.models.equilibrium import PatchEqM
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.patch_trunk import PatchTrunk
from ebt_vision.models.patches import patchify
from ebt_vision.models.pretrained_model import CONFIG_NAME, checkpoint_class, read_config
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise import processes

if TYPE_CHECKING:  # diffusers takes seconds to import
    from ebt_vision.models.dit import DiT

POOLS = ("mean", "max", "tokens")
"""tokens keeps all tokens, for a head with its own pooling."""
PIXEL_SIDES = (4, 8, 16, 32)
TIMM_PREFIX, RANDOM_PREFIX, PIXELS = "timm:", "random:", "pixels"

_NOISE_STREAM = 0x70726F62
_ROUNDING = 1e-3
"""Tolerance for floats outside [0, 1]: rounding of half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureCondition:
    """The input of a network."""

    noise_level: float = 0.0
    """VP noise level of the input in [0, 1]: the image is scaled by the signal scale, and noise is added; 0 is the clean image.
    A model of noise_process "awgn" gets the same divided by the signal scale, as in its training."""
    timestep: int | None = None
    """DiT: the timestep in 0..999."""
    thinking_steps: int = 0
    """EBT: number of thinking steps from the input before the tokens are taken."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_level <= 1.0:
            raise ValueError(f"noise level {self.noise_level:g} is not in [0, 1]; use 0 for clean images, 0.1 as in training")
        if self.timestep is not None and not 0 <= self.timestep < processes.NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"timestep {self.timestep} is not in 0..{processes.NUM_TRAIN_TIMESTEPS - 1}")
        if self.thinking_steps < 0:
            raise ValueError(f"thinking steps {self.thinking_steps} must be 0 (none) or more")

    @property
    def name(self) -> str:
        """Name for files and tables: noise0.1, noise0-t50, noise0-think2."""
        timestep = "" if self.timestep is None else f"-t{self.timestep}"
        return f"noise{self.noise_level:g}{timestep}" + (f"-think{self.thinking_steps}" if self.thinking_steps else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """One array of features: (D,) per image, or (N, D) with the pool "tokens"."""

    condition: FeatureCondition
    layer: str
    pool: str

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown; use one of {', '.join(POOLS)}")

    @property
    def name(self) -> str:
        """Name for files, unique among the features of a model."""
        return f"{self.condition.name}.{self.layer}.{self.pool}"


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


class DiTExtractor(FeatureExtractor):
    """DiT: blocks at a timestep; `final` is layer-normed without modulation."""

    takes_timestep = True

    def __init__(self, model: "DiT", name: str, identity: str) -> None:
        super().__init__(name, model.config.img_size, model.config.depth, ("final",), identity)
        self.model = model.requires_grad_(False).eval()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.device = next(model.parameters()).device

    def tokens(self, candidate: Tensor, observation: Tensor, timestep: int | None, layers: Sequence[str]) -> dict[str, Tensor]:
        assert timestep is not None, "a DiT always needs a timestep"
        t = torch.full((len(candidate),), timestep, dtype=torch.int64, device=candidate.device)
        found = _by_layer(
            layers, lambda wanted: self.model.forward_intermediates(candidate, t, indices=wanted), len(self.blocks)
        )
        if "final" in layers:
            found["final"] = self.model.transformer.norm_out(found["final"])
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


def choose_layers(extractor: FeatureExtractor, words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Convert words of a command line to layers, possibly concatenated: {"last2": ("block2", "block3")}.

    A word is "all" (the blocks and the final tokens), the name of a layer, the number of a block (negative from the end), or
    lastK: the last K blocks. Raises ValueError for other words.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    blocks = extractor.blocks
    for word in words:
        if word == "all":
            chosen |= {layer: (layer,) for layer in extractor.usual_layers}
        elif word in extractor.layers:
            chosen[word] = (word,)
        elif re.fullmatch(r"-?\d+", word) and -len(blocks) <= int(word) < len(blocks):
            chosen[blocks[int(word)]] = (blocks[int(word)],)
        elif (last := re.fullmatch(r"last(\d+)", word)) and 1 <= int(last[1]) <= len(blocks):
            chosen[word] = blocks[-int(last[1]) :]
        else:
            ways = f"all, 0..{len(blocks) - 1}, last1..last{len(blocks)}, " if blocks else "all, "
            raise ValueError(f"{extractor.name} has no layer {word!r}; use {ways}{', '.join(extractor.extra_layers)}")
    return chosen


def extract(
    extractor: FeatureExtractor, images: Tensor, indices: Sequence[int], features: Sequence[Feature], *, seed: int = 0
) -> dict[Feature, Tensor]:
    """Return all `features`, float32 (B, D) or (B, N, D) on the CPU, of images (B, 3, H, W), in one pass.

    Images are uint8, or floats in [0, 1] of any precision. The noise of an image depends on (seed, timestep of the level, its
    index), so that all models see the same noise. Raises ValueError for invalid images and for a layer or condition that the
    network does not have, ThinkingError if thinking diverges.
    """
    for feature in features:
        check_feature(extractor, feature)
    clean = processes.to_model_range(_unit_range(images))
    found: dict[Feature, Tensor] = {}
    with torch.no_grad():
        for level in sorted({feature.condition.noise_level for feature in features}):
            here = [feature for feature in features if feature.condition.noise_level == level]
            observation = _at_level(clean, level, indices, seed, extractor.noise_process).to(extractor.device)
            candidates = extractor.candidates(observation, {feature.condition.thinking_steps for feature in here})
            for condition in dict.fromkeys(feature.condition for feature in here):
                asked = [feature for feature in here if feature.condition == condition]
                candidate = candidates[condition.thinking_steps]
                layers = list(dict.fromkeys(feature.layer for feature in asked))
                tokens = extractor.tokens(candidate, observation, condition.timestep, layers)
                found |= {feature: pool_tokens(tokens[feature.layer], feature.pool).float().cpu() for feature in asked}
    return found


def _unit_range(images: Tensor) -> Tensor:
    """Convert images to float32 in [0, 1]. Raises a one-line ValueError for invalid images."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        kind = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise ValueError(f"images is {kind}; use a tensor (B, 3, H, W), uint8 or float in [0, 1]")
    if images.dtype == torch.uint8:
        return images.float() / 255.0
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; use uint8, or floats in [0, 1]")
    unit = images.float()
    if not bool(torch.isfinite(unit).all()):
        raise ValueError("images has NaN or infinite values; replace them first, for example with torch.nan_to_num")
    low, high = (float(value) for value in unit.aminmax()) if unit.numel() else (0.0, 0.0)
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        remedy = "for 0..255 use images / 255, for -1..1 (images + 1) / 2, for noise images.clamp(0, 1)"
        raise ValueError(f"images has values in [{low:.4g}, {high:.4g}]; use floats in [0, 1]: {remedy}")
    return unit


def check_feature(extractor: FeatureExtractor, feature: Feature) -> None:
    """Raise ValueError if the network does not have this layer or does not support this input."""
    condition = feature.condition
    if feature.layer not in extractor.layers:
        raise ValueError(f"{extractor.name} has no layer {feature.layer!r}; it has {', '.join(extractor.layers)}")
    if condition.thinking_steps and not extractor.takes_thinking:
        raise ValueError(f"{extractor.name} does not think: thinking steps are only for a PatchEBT; remove them")
    if (condition.timestep is None) == extractor.takes_timestep:
        needs = (
            "needs a timestep; set one, 0 as in the paper" if extractor.takes_timestep else "takes no timestep; leave it out"
        )
        raise ValueError(f"{extractor.name} {needs}")


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """(B, N, D) -> (B, D) by mean or max over the tokens; "tokens" keeps all."""
    if pool == "tokens":
        return tokens
    return tokens.mean(1) if pool == "mean" else tokens.amax(1)


def _at_level(clean: Tensor, level: float, indices: Sequence[int], seed: int, noise_process: str) -> Tensor:
    if level == 0.0:
        return clean
    timestep = processes.level_to_timestep(level)
    noisy = processes.add_vp_noise(clean, level, sample_generators(seed, indices, _NOISE_STREAM, timestep))
    return noisy if noise_process == "vp" else noisy / processes.signal_and_noise_scale(level)[0]


def load_extractor(
    name: str, *, img_size: int | None = None, device: str = "cpu", seed: int = 0, timm_weights: str | None = None
) -> FeatureExtractor:
    """Load the extractor of a shipped name, a folder, "hub:OWNER/NAME", "timm:NAME", "random:NAME" or "pixels".

    `random:NAME` has the architecture of NAME and random weights from `seed`. A timm model also has random weights, unless
    `timm_weights` is a file (safetensors, or a state dict of torch.save) or "pretrained", which downloads. `img_size` is only
    for timm and pixels, 64 if None; a checkpoint has its own. Raises ValueError if a name, a file or a size does not fit.
    """
    if timm_weights is not None and not name.startswith(TIMM_PREFIX):
        raise ValueError(f"timm weights are only for a timm:NAME model, not for {name}; remove them")
    if name == PIXELS:
        return PixelExtractor(img_size or 64)
    if name.startswith(TIMM_PREFIX):
        return _load_timm(name, img_size or 64, device, seed, timm_weights)
    if name.startswith(RANDOM_PREFIX):
        config_path = resolve(name.removeprefix(RANDOM_PREFIX)) / CONFIG_NAME
        cls = checkpoint_class(config_path)
        with _seeded(seed):
            model = cls(cls.config_class(**read_config(config_path)["config"])).to(device)
    else:
        model = load_pretrained(name, device=device)
    own = model.config.img_size
    if img_size not in (None, own):
        raise ValueError(f"{name} was trained at {own} px, not at img_size={img_size}; remove img_size to use {own}")
    identity = weights_hash(model, json.dumps(model.network_config, sort_keys=True))
    if isinstance(model, PatchEBT | PatchRegressor | PatchEqM):
        return TrunkExtractor(model, name, identity)
    if model.model_type == "dit":
        return DiTExtractor(cast("DiT", model), name, identity)
    raise ValueError(f"a {model.model_type!r} model has no image features; use patch_ebt, patch_eqm, patch_regressor or dit")


def _load_timm(name: str, img_size: int, device: str, seed: int, weights: str | None) -> FeatureExtractor:
    import timm

    options: dict = {"num_classes": 0}
    if weights is not None:
        options |= {"pretrained": True}
        options |= {} if weights == "pretrained" else {"pretrained_cfg_overlay": {"file": weights}}
    bare = name.removeprefix(TIMM_PREFIX)
    try:
        with _seeded(seed):
            try:
                model = timm.create_model(bare, img_size=img_size, **options)
            except TypeError:  # a convolutional network, which accepts any size
                model = timm.create_model(bare, **options)
        return TimmExtractor(model.to(device), name, img_size, weights_hash(model, bare))
    except Exception as error:  # timm raises many kinds of errors, from KeyError to those of the hub
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} cannot be created at {img_size} px ({reason}); check its name, weights and size") from error


def weights_hash(model: nn.Module, architecture: str) -> str:
    """SHA-256 over an architecture's description and every tensor of the model, 64 hex digits."""
    digest = hashlib.sha256(f"{type(model).__name__} {architecture}".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which initialisers draw from the global stream with `seed`; afterwards the stream is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
