"""Apple's GPU has no float64, so float64 sums are computed on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ebt_vision.core import metrics
from ebt_vision.data.image_files import quantise
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.noise import processes
from ebt_vision.objectives.image import EBTObjective, Prediction
from ebt_vision.objectives.text import TextEBTObjective, TextPrediction
from ebt_vision.text.generation import GenerateOptions, choose_token
from ebt_vision.training.build import build_model
from ebt_vision.training.config import build_config
from ebt_vision.training.text_task import TextTask
from ebt_vision.training.validation import validate_images


class OnDevice(Tensor):
    """A tensor of a device without float64: only what .cpu() gives can become float64, as on Apple's GPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is Tensor.cpu:
            return result.as_subclass(Tensor)
        if isinstance(result, OnDevice) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


def there(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnDevice)


IMAGES = torch.rand(2, 3, 37, 31, generator=torch.Generator().manual_seed(0))
TEXT = dict(vocab_size=257, context_length=16, embed_dim=16, depth=1, num_heads=2)


def test_the_stand_in_refuses_float64_until_it_is_on_the_cpu():
    with pytest.raises(TypeError, match="no float64"):
        there(IMAGES).double()
    assert type(there(IMAGES).cpu().double()) is Tensor


def test_metrics():
    for metric in (metrics.psnr, metrics.ssim):
        value = metric(there(IMAGES), there(IMAGES * 0.9), data_range=1.0)
        assert torch.equal(value, metric(IMAGES, IMAGES * 0.9, data_range=1.0)) and value.dtype == torch.float64
    error = torch.tensor([0.01])
    assert metrics.psnr_from_mse(there(error), data_range=1.0).item() == pytest.approx(20.0)


def test_noise_samples_and_tokens():
    noisy = processes.add_restoration_noise(there(IMAGES), 25.0)
    assert torch.equal(noisy, processes.add_restoration_noise(IMAGES, 25.0))
    assert (quantise(there(IMAGES), 8) == quantise(IMAGES, 8)).all()
    logits = torch.tensor([0.1, 3.0, 0.2])
    drawn = [choose_token(x, GenerateOptions(), torch.Generator().manual_seed(4)) for x in (there(logits), logits)]
    assert drawn[0] == drawn[1]


def test_validation_of_images(monkeypatch: pytest.MonkeyPatch):
    raw = dict(
        name="tiny",
        model_type="patch_ebt",
        model=dict(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2),
        data=dict(path="unused", img_size=16),
        validation=dict(levels=[0.1], num_steps=2),
    )
    config = build_config(raw)
    model = build_model(config)
    assert isinstance(model, PatchEBT)
    clean = 2.0 * IMAGES[..., :16, :16] - 1.0
    want = validate_images(model, clean, config, "cpu")

    def predict(*args, **options) -> Prediction:
        found = original(*args, **options)
        return Prediction(images=[there(image) for image in found.images], energies=there(found.energies))

    original = EBTObjective.predict
    monkeypatch.setattr(EBTObjective, "predict", predict)
    found = validate_images(model, clean, config, "cpu")
    assert found.psnr == want.psnr and found.energies == want.energies


def test_validation_of_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text("to be or not to be, that is the question. " * 4)
    raw = dict(
        name="tiny",
        model_type="causal_text_ebt",
        model=TEXT,
        data=dict(path=str(book), context_length=16, share=[0.0, 0.5]),
        validation=dict(path=str(book), share=[0.5, 1.0], num_steps=2),
    )
    config = build_config(raw)
    task, model = TextTask(config), build_model(config)
    held_out = task.load_held_out()
    assert held_out is not None
    want = task.validate(model, held_out, torch.device("cpu"))

    def predict(*args) -> TextPrediction:
        found = original(*args)
        return TextPrediction(logits=[there(logits) for logits in found.logits], energies=there(found.energies))

    original = TextEBTObjective.predict
    monkeypatch.setattr(TextEBTObjective, "predict", predict)
    found = task.validate(model, held_out, torch.device("cpu"))
    assert found.bits_per_byte == want.bits_per_byte and found.energies == want.energies
