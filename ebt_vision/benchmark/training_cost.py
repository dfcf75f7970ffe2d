"""Cost of a training step, counted without running the whole network: matrix products and kept activations of one sample.

All blocks are equal, so networks with one and two blocks give the cost of any depth. Both run on the CPU in float32.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ebt_vision.benchmark.flops import count_flops
from ebt_vision.core.rng import sample_generators
from ebt_vision.data.images import DataConfig
from ebt_vision.objectives.image import ImageBatch
from ebt_vision.objectives.text import TextBatch
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.config import ExperimentConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCost:
    """The cost of one sample in one training step, and the size of the network."""

    num_parameters: int
    flops: int
    """FLOPs of the matrix products: forward, gradient of thinking, second order."""
    kept_bytes: int
    """Bytes that autograd keeps between loss and backward pass in float32, without weights; less under bfloat16 autocast."""


def training_cost(config: ExperimentConfig) -> TrainingCost:
    """The cost of a config's own step on one image or one sequence."""
    depth = config.model.depth
    one, two = (_measure(_with_depth(config, blocks)) for blocks in (1, 2))
    return TrainingCost(
        num_parameters=one.num_parameters + (depth - 1) * (two.num_parameters - one.num_parameters),
        flops=one.flops + (depth - 1) * (two.flops - one.flops),
        kept_bytes=one.kept_bytes + (depth - 1) * (two.kept_bytes - one.kept_bytes),
    )


def held_bytes(call: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> int:
    """Return the bytes that autograd keeps after `call` has computed its loss, without the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held.add(holder := _Held(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = call()
    storages = [holder.tensor.untyped_storage() for holder in held]
    total = sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())
    del loss  # releases the graph
    return total


class _Held:
    """A tensor that autograd keeps; this object lives as long."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _with_depth(config: ExperimentConfig, depth: int) -> ExperimentConfig:
    model = replace(config.model, depth=depth)
    return replace(config, model=model, train=replace(config.train, compile=False))


def _batch(config: ExperimentConfig) -> ImageBatch | TextBatch:
    generators = sample_generators(0, [0])
    if isinstance(config.data, DataConfig):
        images = torch.zeros(1, 3, config.data.img_size, config.data.img_size)
        return ImageBatch(clean=images, noise=images + 1.0, generators=generators)
    tokens = torch.zeros(1, config.data.context_length, dtype=torch.int64)
    return TextBatch(tokens=tokens, targets=tokens, starts=tokens, generators=generators)


def _measure(config: ExperimentConfig) -> TrainingCost:
    model = build_model(config)
    objective = build_objective(model, config)
    batch = _batch(config)
    flops = count_flops(lambda: objective(batch)["loss"].backward())
    kept = held_bytes(lambda: objective(batch)["loss"], model.parameters())
    return TrainingCost(num_parameters=model.num_parameters, flops=flops, kept_bytes=kept)
