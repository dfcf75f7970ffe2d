"""Images in the training loop: noise from (seed, epoch, sample), PSNR at 1..N steps on held-out images."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ebt_vision import corruption
from ebt_vision.data.images import DataConfig, ImageSet, load_image_set
from ebt_vision.objectives import ImageBatch
from ebt_vision.rng import randn_like
from ebt_vision.training.settings import ValidationConfig
from ebt_vision.training.task import Task
from ebt_vision.training.validation import ImageValidation, validate_images


class ImageTask(Task):
    """Denoising of images."""

    def load_samples(self) -> ImageSet:
        return load_image_set(self._data, seed=self.config.seed)

    def make_batch(self, samples: ImageSet, indices: Sequence[int], epochs: Sequence[int], device: torch.device) -> ImageBatch:
        clean = corruption.to_model_range(samples.images(indices, epochs).to(device).float() / 255.0)
        generators = self.generators(indices, epochs)
        return ImageBatch(clean=clean, noise=randn_like(clean.cpu(), generators).to(device), generators=generators)

    def load_held_out(self) -> Tensor | None:
        """The validation images, float (B, C, H, W) in [-1, 1]."""
        settings = self.config.validation
        assert isinstance(settings, ValidationConfig)
        if settings.path is None:
            return None
        data = replace(
            self._data, path=settings.path, split=settings.split, limit=settings.num_images, crop="center", flip=False
        )
        images = load_image_set(data, seed=self.config.seed)
        return corruption.to_model_range(images.images(list(range(len(images)))).float() / 255.0)

    def validate(self, model: nn.Module, held_out: Tensor, device: torch.device) -> ImageValidation:
        return validate_images(model, held_out, self.config, device)

    @property
    def _data(self) -> DataConfig:
        assert isinstance(self.config.data, DataConfig)
        return self.config.data
