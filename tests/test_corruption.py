"""Corruptions by hand and against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_vision.noise.processes import add_jpeg, add_motion_blur, add_restoration_noise


def gradient(height: int = 37, width: int = 31) -> torch.Tensor:
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    return torch.stack([rows.expand(height, width), columns.expand(height, width), (rows + columns) / 2])[None]


def test_jpeg_is_a_jpeg_file():
    clean = gradient()
    data = io.BytesIO()
    pixels = (clean[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(data, "JPEG", quality=30)
    expected = np.asarray(Image.open(data)).astype(np.float64)
    found = add_jpeg(clean, 30)[0].permute(1, 2, 0).double().numpy() * 255
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(add_jpeg(clean, 95)[0].numpy() - clean[0].numpy()).mean() < np.abs(found / 255 - pixels / 255).mean()
    with pytest.raises(ValueError, match="quality=0 is not in 1..100"):
        add_jpeg(clean, 0)


def test_motion_blur_follows_its_line():
    point = torch.zeros(1, 3, 15, 17)
    point[:, :, 7, 8] = 1.0
    along = add_motion_blur(point, 5, angle=0.0)
    assert along[0, 0].sum().item() == pytest.approx(1.0)
    assert torch.equal(along[0, 0].nonzero()[:, 0].unique(), torch.tensor([7]))  # one row
    torch.testing.assert_close(along, along.flip(-1).roll(0, -1))  # alike to both sides
    assert along[0, 0, 7, 8].item() == pytest.approx(0.25, abs=0.01)  # a path of 4 px from centre to centre
    up = add_motion_blur(point, 5, angle=90.0)
    torch.testing.assert_close(up[0, 0, 5:10, 8], along[0, 0, 7, 6:11], atol=1e-6, rtol=0)
    flat = torch.full((2, 3, 37, 31), 0.3)
    torch.testing.assert_close(add_motion_blur(flat, 9), flat)
    with pytest.raises(ValueError, match="length=80"):
        add_motion_blur(flat, 80)


def test_restoration_noise_leaves_the_global_stream_alone():
    state = np.random.get_state()[1].copy()
    add_restoration_noise(gradient(), 25)
    assert np.array_equal(state, np.random.get_state()[1])
    with pytest.raises(ValueError, match="sigma=-1 is negative"):
        add_restoration_noise(gradient(), -1)
