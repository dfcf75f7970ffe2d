"""Training on images: noise from (seed, epoch, sample), and validation by PSNR at 1..N steps on held-out images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ebt_vision.core.rng import make_generator, randn_like
from ebt_vision.data.images import DataConfig, ImageSet, load_image_set
from ebt_vision.noise import processes
from ebt_vision.noise.realistic import realistic_pairs
from ebt_vision.objectives.image import ImageBatch, ObjectiveConfig
from ebt_vision.training.settings import ValidationConfig
from ebt_vision.training.task import Task
from ebt_vision.training.validation import ImageValidation, validate_images

CUT_STREAM = 0x637574
"""Separates the draws of cut crops from other uses of the seed."""


def cut_images(images: Tensor, size: int) -> Tensor:
    """Cut images (B, C, H, W) into squares, (B * H / size * W / size, C, size, size), row by row; `size` divides H and W."""
    squares = images.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, size, size)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def _places(indices: Sequence[int], epochs: Sequence[int], count: int) -> Iterator[tuple[int, int, int]]:
    """Return (epoch, index, square) of every square, in the order of cut_images."""
    for epoch, index in zip(epochs, indices, strict=True):
        for square in range(count):
            yield epoch, index, square


class ImageTask(Task):
    """Denoising of images."""

    def load_samples(self) -> ImageSet:
        return load_image_set(self._data, seed=self.config.seed)

    def make_batch(self, samples: ImageSet, indices: Sequence[int], epochs: Sequence[int], device: torch.device) -> ImageBatch:
        clean = processes.to_model_range(samples.images(indices, epochs).to(device).float() / 255.0)
        generators = self.generators(indices, epochs)
        if cut := self._cut_size(epochs[0]):
            clean = cut_images(clean, cut)
            count = len(clean) // len(indices)
            generators = [make_generator(self.config.seed, CUT_STREAM, *at) for at in _places(indices, epochs, count)]
        noise = randn_like(clean.cpu(), generators).to(device)
        clean, observation = self._observed(clean, generators)
        return ImageBatch(clean=clean, noise=noise, generators=generators, observation=observation)

    def _observed(self, clean: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor | None]:
        """Return clean images and the same with realistic noise, (B, 3, H, W) in [-1, 1]; None for the second if the objective
        adds the noise."""
        objective = self.config.objective
        if not isinstance(objective, ObjectiveConfig) or objective.realistic_noise is None:
            return clean, None
        pair = realistic_pairs(processes.to_image_range(clean), objective.realistic_noise, generators)
        chosen, noisy = (processes.to_model_range(images).to(clean.device) for images in pair)
        return chosen, noisy

    def _cut_size(self, epoch: int) -> int | None:
        """Return the side of the squares in this epoch; None if crops stay whole."""
        sizes = self._data.cut_sizes
        if not sizes:
            return None
        draw = torch.randint(len(sizes), (), generator=make_generator(self.config.seed, CUT_STREAM, int(epoch)))
        return sizes[int(draw)]

    def load_held_out(self) -> Tensor | None:
        """Return the validation images, float (B, C, H, W) in [-1, 1]."""
        settings = self.config.validation
        assert isinstance(settings, ValidationConfig)
        if settings.path is None:
            return None
        whole = replace(self._data, crop="center", flip=False, rotate=False, zoom=1.0, graphics_share=0.0, cut_sizes=())
        data = replace(whole, path=settings.path, split=settings.split, limit=settings.num_images)
        images = load_image_set(data, seed=self.config.seed)
        return processes.to_model_range(images.images(list(range(len(images)))).float() / 255.0)

    def validate(self, model: nn.Module, held_out: Tensor, device: torch.device) -> ImageValidation:
        return validate_images(model, held_out, self.config, device)

    @property
    def _data(self) -> DataConfig:
        assert isinstance(self.config.data, DataConfig)
        return self.config.data
