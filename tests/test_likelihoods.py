"""Likelihoods: adjoints, gradients, proximal steps, kernels, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ebt_vision.restoration.jpeg import JpegIntervals, JpegTables, from_blocks, to_blocks
from ebt_vision.restoration.likelihoods import (
    Convolution,
    Downsampling,
    Likelihood,
    LinearLikelihood,
    Mask,
    UserOperator,
    adjoint_error,
    conjugate_gradients,
    disk_kernel,
    gaussian_kernel,
    motion_kernel,
    resize_matrix,
)

SIZE = (24, 36)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear() -> dict[str, LinearLikelihood]:
    return {
        "mask": Mask(rand(*SIZE) < 0.5),
        "gaussian": Convolution(gaussian_kernel(1.1)),
        "motion": Convolution(motion_kernel(7, 30)),
        "circular": Convolution(disk_kernel(2.2), circular=True),
        "down 2": Downsampling(2),
        "down 3": Downsampling(3),
        "user": UserOperator(lambda x: x.flip(-1) * 0.5, lambda y: y.flip(-1) * 0.5, size=SIZE),
    }


def jpeg_bytes(image: Tensor, quality: int = 10, subsampling: int = 0) -> bytes:
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def smooth_image(height: int = 32, width: int = 48) -> Tensor:
    """Waves in three colours that stay well inside [0, 1], (1, 3, H, W) float64."""
    rows, columns = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    planes = [0.5 + 0.2 * torch.sin(0.3 * rows + k) * torch.cos(0.21 * (k + 1) * columns) for k in range(3)]
    return torch.stack(planes)[None]


def jpeg(tmp_path: Path, subsampling: int) -> tuple[JpegIntervals, Tensor, Tensor]:
    """(likelihood, original in 8 bits, decoded)."""
    original = (smooth_image() * 255).round() / 255
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes(original, subsampling=subsampling))
    decoded = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].double() / 255
    return JpegIntervals(JpegTables.of_file(path)), original, decoded


@pytest.mark.parametrize("name", linear())
def test_operator_and_adjoint_agree(name: str) -> None:
    assert adjoint_error(linear()[name], (1, 3, *SIZE)) < 1e-6


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [*linear(), "jpeg", "jpeg with coarse chroma"])
def test_gradient_matches_finite_differences(name: str, tmp_path: Path) -> None:
    likelihood: Likelihood
    if name in linear():
        likelihood, x = linear()[name], rand(1, 3, *SIZE)
        observed = likelihood.apply(rand(1, 3, *SIZE, seed=1))
    else:
        likelihood, _, observed = jpeg(tmp_path, 2 if "coarse" in name else 0)
        observed = observed[..., :20, :44]  # blocks that the border cuts, too
        x = observed + 0.2 * rand(*observed.shape, seed=1)
    direction, h = rand(*x.shape, seed=2) - 0.5, 1e-5
    above, below = (likelihood.value(x + sign * h * direction, observed) for sign in (1, -1))
    slope = (likelihood.gradient(x, observed) * direction).sum()
    torch.testing.assert_close(((above - below) / (2 * h)).sum(), slope, rtol=1e-6, atol=1e-6)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("name", linear())
@pytest.mark.parametrize("weight", [0.01, 1.0])
def test_the_proximal_step_is_stationary(name: str, weight: float) -> None:
    likelihood, z = linear()[name], rand(1, 3, *SIZE)
    observed = likelihood.apply(rand(1, 3, *SIZE, seed=1))
    x = likelihood.prox(z, observed, weight)
    residual = likelihood.gradient(x, observed) + weight * (x - z)
    start = likelihood.gradient(z, observed)
    assert float(residual.norm() / start.norm()) < 2e-5


def test_the_proximal_step_of_a_mask_by_hand() -> None:
    known = torch.tensor([[True, False]]).expand(8, 2).repeat(1, 4)
    z, observed = torch.full((1, 3, 8, 8), 0.2), torch.full((1, 3, 8, 8), 0.8)
    exact, soft = (Mask(known).prox(z, observed, weight) for weight in (0.0, 2.0))
    assert torch.equal(exact[0, 0, 0, :2], torch.tensor([0.8, 0.2]))  # bit for bit
    torch.testing.assert_close(soft[0, 0, 0, :2], torch.tensor([0.4, 0.2]))  # (0.8 + 2 * 0.2) / 3


def test_a_mask_starts_from_the_nearest_known_pixels() -> None:
    known = torch.ones(9, 9, dtype=torch.bool)
    known[4, 4] = False
    image = rand(1, 3, 9, 9).float()
    start = Mask(known).start(image)
    ring = image[..., 3:6, 3:6].sum((-2, -1)) - image[..., 4, 4]
    torch.testing.assert_close(start[..., 4, 4], ring / 8)
    assert torch.equal(start[..., known], image[..., known])
    one = torch.zeros(40, 9, dtype=torch.bool)
    one[0, 0] = True
    torch.testing.assert_close(Mask(one).start(torch.full((1, 3, 40, 9), 0.3)), torch.full((1, 3, 40, 9), 0.3))


def test_a_blur_leaves_a_constant_alone_and_knows_nothing_beyond_the_border() -> None:
    blur = Convolution(gaussian_kernel(1.0))
    reach = blur.margins[0]
    assert reach == 4
    x = rand(1, 3, 30, 30)
    y = blur.apply(x)
    assert y.shape[-2:] == (22, 22)
    direct = torch.nn.functional.conv2d(x.transpose(0, 1), blur.kernel.flip(0, 1)[None, None]).transpose(0, 1)
    torch.testing.assert_close(y, direct)
    torch.testing.assert_close(blur.apply(torch.full_like(x, 0.4)), torch.full_like(y, 0.4))
    assert blur.finish(blur.start(y), y).shape == y.shape


def test_kernels() -> None:
    for kernel in (gaussian_kernel(1.6), motion_kernel(9, 20), disk_kernel(3)):
        assert float(kernel.sum()) == pytest.approx(1.0)
        assert kernel.shape[0] % 2 == 1
        torch.testing.assert_close(kernel, kernel.flip(0, 1))
    offsets = torch.arange(-6, 7, dtype=torch.float64)
    gaussian = gaussian_kernel(1.6)
    assert float((gaussian.sum(0) * offsets**2).sum()) == pytest.approx(1.6**2, rel=0.01)
    level = motion_kernel(5, 0)
    assert float(level[level.shape[0] // 2].sum()) == pytest.approx(1.0)  # one row
    torch.testing.assert_close(motion_kernel(5, 90), level.T)
    steep = motion_kernel(9, 45)
    assert float(steep.flip(1).diagonal().sum()) > float(steep.diagonal().sum())  # up to the right
    assert float((disk_kernel(3) > 0).sum()) == pytest.approx(29, abs=16)


def test_down_sampling_keeps_constants_and_is_pillows_cubic() -> None:
    torch.testing.assert_close(resize_matrix(6, 3).sum(1), torch.ones(6, dtype=torch.float64))
    image = rand(20, 28).float()
    pillow = np.asarray(Image.fromarray(image.numpy()).resize((14, 10), Image.Resampling.BICUBIC))
    ours = Downsampling(2).apply(image[None, None].expand(1, 3, -1, -1))
    np.testing.assert_allclose(ours[0, 0].numpy(), pillow, atol=1e-5)


def test_conjugate_gradients_solve_a_small_system_exactly() -> None:
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    solution = conjugate_gradients(lambda d: d @ matrix, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(solution, torch.tensor([[1 / 11, 7 / 11]], dtype=torch.float64))


def test_the_cosine_transform_is_orthonormal() -> None:
    planes = rand(2, 16, 24)
    coefficients = to_blocks(planes)
    assert coefficients.shape == (2, 2, 3, 8, 8)
    torch.testing.assert_close(from_blocks(coefficients), planes)
    torch.testing.assert_close(coefficients.square().sum(), planes.square().sum())
    torch.testing.assert_close(to_blocks(torch.ones(1, 8, 8, dtype=torch.float64))[0, 0, 0, 0, 0], torch.tensor(8.0).double())


@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_intervals_hold_the_original_and_the_projection(subsampling: int, tmp_path: Path) -> None:
    likelihood, original, decoded = jpeg(tmp_path, subsampling)
    assert likelihood.tables.subsampling == ((2, 2) if subsampling else (1, 1))
    if not subsampling:  # the encoder rounds to whole numbers on the way
        assert float(likelihood.value(original, decoded).sum()) < 1e-3
        assert float(likelihood.value(decoded, decoded).sum()) < 1e-3
    far = original + 0.8 * (rand(*original.shape) - 0.5)
    assert float(likelihood.value(far, decoded).sum()) > 0.1
    inside = likelihood.prox(far, decoded, 1.0)
    assert float(likelihood.value(inside, decoded).sum()) < 1e-20
    torch.testing.assert_close(likelihood.prox(inside, decoded, 1.0), inside)


def test_a_grey_jpeg_and_other_files(tmp_path: Path) -> None:
    Image.fromarray((rand(16, 16) * 255).byte().numpy()).save(tmp_path / "grey.jpg", quality=20)
    tables = JpegTables.of_file(tmp_path / "grey.jpg")
    assert tables.is_grey and tables.luma[0] == 40  # 16 at quality 50, times 2.5
    grey = torch.from_numpy(np.array(Image.open(tmp_path / "grey.jpg")))[None, None].expand(1, 3, -1, -1).double() / 255
    moved = JpegIntervals(tables).prox(grey + 0.1, grey, 1.0)
    torch.testing.assert_close(moved[:, 0], moved[:, 2])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is a PNG file, not a JPEG"):
        JpegTables.of_file(tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot be read"):
        JpegTables.of_file(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(torch.ones(8, 8, dtype=torch.bool)), "nothing to fill in; mark"),
        (lambda: Mask(torch.zeros(8, 8, dtype=torch.bool)), "nothing to fill in from"),
        (lambda: Mask(torch.zeros(8, 8)), "give bool"),
        (lambda: Convolution(torch.full((3, 3), 0.2)), "sums to 1.8, not 1"),
        (lambda: Convolution(torch.full((2, 3), 1 / 6)), "must be odd"),
        (lambda: Convolution(torch.tensor([[-0.5, 1.0, 0.5]])), "below 0"),
        (lambda: Downsampling(5), "use 2, 3 or 4"),
        (lambda: Downsampling(2).apply(rand(1, 3, 9, 8)), "no multiple of scale=2"),
        (lambda: UserOperator(lambda x: x, None, size=(8, 8)), "has no adjoint"),
        (lambda: UserOperator(lambda x: x.roll(1, -1), lambda y: y.roll(1, -1), size=(8, 8)), "use its transpose"),
        (lambda: Mask(rand(8, 8) < 0.5).check_observed(rand(1, 3, 8, 9)), "the mask is 8x8 px, the image 9x8"),
        (lambda: Convolution(gaussian_kernel(2)).check_observed(rand(1, 3, 16, 40)), "smaller than the image"),
        (lambda: gaussian_kernel(0), "use 0.1 to 50 pixels"),
        (lambda: JpegTables(luma=(1,) * 63, chroma=(1,) * 64), "give 64 steps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
