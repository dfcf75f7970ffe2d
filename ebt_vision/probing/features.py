"""Features of images for probes: the input of the network (noise level, timestep, thinking steps), layers and pooling.

`extract` computes all requested features of images (B, 3, H, W), all layers of an input in one pass. extractors.py lists the
layers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebt_vision.core.rng import sample_generators
from ebt_vision.noise import processes
from ebt_vision.probing.extractors import FeatureExtractor

POOLS = ("mean", "max", "tokens")
"""tokens keeps all tokens, for a head with its own pooling."""

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
