"""A grid of trainings that differ along one axis at a time, with one recipe for all families."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ebt_vision.core.yaml_files import load_yaml
from ebt_vision.training.config import ConfigError, ExperimentConfig, build_config

Modality = Literal["image", "text"]
FAMILIES: dict[Modality, dict[str, str]] = {
    "image": {"ebt": "patch_ebt", "regressor": "patch_regressor", "dit": "dit"},
    "text": {"ebt": "causal_text_ebt", "transformer": "causal_transformer"},
}
"""Family -> model_type. The first family is compared with each of the others."""
AXES = ("width", "depth", "data", "batch", "updates")
SIZE_AXES = ("width", "depth", "updates")
"""The runs of these axes form the axis of FLOPs: all data, base batch size."""
HEAD_WIDTH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One training of the grid."""

    family: str
    width: int
    depth: int
    data: float
    """Number of images, or share of the training text; 0 means all."""
    batch: int
    updates: int
    lr: float
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The settings that all runs share."""

    modality: Modality
    data: str
    validation: str
    """Held-out images or text. If text has the same path as `data`, the last tenth is held out."""
    img_size: int = 32
    patch_size: int = 4
    context_length: int = 128
    thinking_steps: int = 1
    """Thinking steps of the EBT, in training and in validation."""
    optimizer: str = "muon"
    num_held_out: int = 256
    overrides: tuple[str, ...] = ()
    """FAMILY:section.key=value, or all:section.key=value."""
    mixed_precision: str = "no"

    def config(self, point: Point) -> ExperimentConfig:
        """Return the experiment of the point. Raises ConfigError for a size that the model refuses."""
        model_type = FAMILIES[self.modality][point.family]
        size = {"embed_dim": point.width, "depth": point.depth, "num_heads": max(point.width // HEAD_WIDTH, 1)}
        raw: dict[str, Any] = {
            "name": name_of(point),
            "model_type": model_type,
            "seed": point.seed,
            # A tenth of the updates warm up, whatever their number.
            "optim": {"optimizer": self.optimizer, "lr": point.lr, "warmup_updates": max(point.updates // 10, 1)},
            "train": {
                "num_updates": point.updates,
                "batch_size": point.batch,
                "ema_decay": 0.99,
                "log_every": max(point.updates // 10, 1),
                "checkpoint_every": max(point.updates // 4, 1),
                "num_checkpoints": 1,
                "mixed_precision": self.mixed_precision,
            },
        }
        raw |= self._image(point, size) if self.modality == "image" else self._text(point, size)
        if point.family == "ebt":
            raw["objective"] = raw.get("objective", {}) | {"thinking": {"num_steps": self.thinking_steps}}
        for override in self.overrides:
            family, _, rest = override.partition(":")
            if family in ("all", point.family):
                _override(raw, rest)
        return build_config(raw)

    def _image(self, point: Point, size: dict[str, Any]) -> dict[str, Any]:
        model = {"img_size": self.img_size, "patch_size": self.patch_size, **size}
        data: dict[str, Any] = {"path": self.data, "img_size": self.img_size, "crop": "random", "flip": True}
        if point.data:
            data["limit"] = round(point.data)
        steps = self.thinking_steps if point.family == "ebt" else 1  # the regressor applied once, the DiT's x0 in one call
        held_out = {"path": self.validation, "num_images": self.num_held_out, "levels": [0.1], "num_steps": steps}
        return {"model": model, "data": data, "objective": {"level": 0.1}, "validation": held_out | _at_the_end(point)}

    def _text(self, point: Point, size: dict[str, Any]) -> dict[str, Any]:
        model = {"context_length": self.context_length, **size}
        if point.family == "ebt":  # the recipe of configs/text_shakespeare_ebt.yaml
            model |= {"energy_head": "quadratic", "add_last_token": True, "init_gate": 0.1}
        inside = self.data == self.validation
        last = (0.9 if inside else 1.0) * (point.data or 1.0)
        length = {"context_length": self.context_length}
        data = {"path": self.data, "share": [0.0, last], "random_offset": True, **length}
        steps = self.thinking_steps if point.family == "ebt" else 1
        held_out = {"path": self.validation, "share": [0.9 if inside else 0.0, 1.0], "num_sequences": self.num_held_out}
        return {"model": model, "data": data, "validation": held_out | {"num_steps": steps} | _at_the_end(point)}


def name_of(point: Point) -> str:
    """Return a readable name, also used for folders."""
    data = f"n{point.data:g}" if point.data else "all"
    sizes = f"w{point.width}-d{point.depth}-{data}-b{point.batch}-u{point.updates}"
    return f"{point.family}-{sizes}-lr{point.lr:g}-s{point.seed}"


def folder_of(config: ExperimentConfig) -> str:
    """Return the folder of a run: the name of the point and 8 hex digits of the hash of its whole config."""
    text = json.dumps(asdict(config), sort_keys=True, default=str)
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The sizes to train: `base` (its family and lr are ignored), and the values of each axis with all else equal."""

    families: tuple[str, ...]
    base: Point
    values: Mapping[str, tuple[float, ...]]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    lr_of: Mapping[str, float] = field(default_factory=dict)
    """Family -> the learning rate that tuning selected."""

    def tuning(self) -> list[Point]:
        """Return the base size of each family at every learning rate, with the first seed."""
        each = [(family, lr) for family in self.families for lr in self.lrs]
        return [replace(self.base, family=family, lr=lr, seed=self.seeds[0]) for family, lr in each]

    def points(self) -> dict[str, list[Point]]:
        """Return axis -> points, with the tuned learning rates."""
        return {axis: list(self._along(axis)) for axis in self.values}

    def _along(self, axis: str) -> Iterator[Point]:
        whole = axis in ("width", "depth", "batch", "updates")
        for family in self.families:
            for value in self.values[axis]:
                size: dict[str, Any] = {axis: round(value) if whole else value}
                for seed in self.seeds:
                    yield replace(self.base, family=family, lr=self.lr_of[family], seed=seed, **size)


def all_points(by_axis: Mapping[str, Sequence[Point]]) -> list[Point]:
    """Return each point once, the cheapest first, so that an interrupted grid has complete axes of small runs."""
    unique = dict.fromkeys(point for points in by_axis.values() for point in points)
    return sorted(unique, key=lambda p: p.width**2 * p.depth * p.batch * p.updates)


def _at_the_end(point: Point) -> dict[str, int]:
    return {"every": point.updates}


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *parents, last = key.split(".")
    if not equals or not last:
        raise ConfigError(f"--override {text!r} is not of the form FAMILY:section.key=value")
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = load_yaml(value)
