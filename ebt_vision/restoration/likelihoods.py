"""Likelihoods: the distance between an observation y and an image x after a known damage.

Most damages are linear, y = A x + noise, and the value is |A x - y|^2 / 2. Solvers divide it by the variance of the noise.
Images are RGB (B, 3, H, W) in [0, 1]; x may be larger than y (down-sampling, a blur with unknown borders). The proximal
step is

    prox(z) = argmin_x |A x - y|^2 / 2 + weight / 2 * |x - z|^2

(Parikh & Boyd 2014, sec. 1.1), in closed form if there is one, otherwise by conjugate gradients. Weight 0 gives the nearest
image that explains y exactly, if there is one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ebt_vision.core.checks import check

CG_STEPS = 40
"""Maximum number of conjugate gradient steps in one proximal step."""
CG_TOLERANCE = 1e-5
"""They stop if the residual is at most this fraction of the right-hand side."""

LinearMap = Callable[[Tensor], Tensor]


class Likelihood(ABC):
    """A known damage. The observation y (B, 3, h, w) is an argument of every method."""

    @abstractmethod
    def value(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return (B,): 0 if x explains the observation."""

    @abstractmethod
    def gradient(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return the gradient of `value` with respect to x, (B, 3, H, W)."""

    @abstractmethod
    def prox(self, z: Tensor, observed: Tensor, weight: float) -> Tensor:
        """Return the proximal step from z (B, 3, H, W); see the top of this file."""

    def start(self, observed: Tensor) -> Tensor:
        """Return a first image x for an observation."""
        return observed.clone()

    def finish(self, x: Tensor, observed: Tensor) -> Tensor:
        """Convert x to the image to return."""
        return x

    def check_observed(self, observed: Tensor) -> None:  # noqa: B027 - most damages have nothing to check
        """Raise a one-line ValueError for an observation (B, 3, h, w) that cannot have this damage."""


class LinearLikelihood(Likelihood):
    """y = A x + noise, with A by `apply` and its adjoint by `adjoint`."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x, (B, 3, H, W) -> (B, 3, h, w)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, 3, h, w) -> (B, 3, H, W)."""

    def value(self, x: Tensor, observed: Tensor) -> Tensor:
        return 0.5 * (self.apply(x) - observed).square().flatten(1).sum(1)

    def gradient(self, x: Tensor, observed: Tensor) -> Tensor:
        return self.adjoint(self.apply(x) - observed)

    def prox(self, z: Tensor, observed: Tensor, weight: float) -> Tensor:
        # With x = z + d: (A^T A + weight) d = A^T (y - A z).
        change = conjugate_gradients(
            lambda d: self.adjoint(self.apply(d)) + weight * d,
            self.adjoint(observed - self.apply(z)),
            precondition=lambda r: self.precondition(r, weight),
        )
        return z + change

    def precondition(self, residual: Tensor, weight: float) -> Tensor:
        """Return approximately (A^T A + weight)^-1 of the residual (B, 3, H, W); by default the residual itself."""
        return residual


def conjugate_gradients(
    operator: LinearMap, target: Tensor, *, precondition: LinearMap = lambda r: r, num_steps: int = CG_STEPS
) -> Tensor:
    """Solve operator(d) = target for a symmetric positive definite operator, separately for each sample (B, ...).

    Preconditioned conjugate gradients from d = 0 (Hestenes & Stiefel 1952; Saad 2003, algorithm 9.1).
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))

    solution, residual = torch.zeros_like(target), target.clone()
    limit = CG_TOLERANCE**2 * inner(target, target)
    z = precondition(residual)
    direction, rz = z, inner(residual, z)
    for _ in range(num_steps):
        if bool((inner(residual, residual) <= limit).all()):
            break
        image = operator(direction)
        length = _ratio(rz, inner(direction, image))
        solution = solution + length * direction
        residual = residual - length * image
        z = precondition(residual)
        before, rz = rz, inner(residual, z)
        direction = z + _ratio(rz, before) * direction
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 for a sample that is already solved."""
    return torch.where(below.abs() > 0, above / below.where(below.abs() > 0, torch.ones_like(below)), torch.zeros_like(above))


class Mask(LinearLikelihood):
    """Some pixels of (B, 3, H, W) are known and the others are missing: y = m x."""

    def __init__(self, known: Tensor):
        """`known`: bool, (H, W) or (B, 1, H, W); True for a known pixel. ValueError if no pixel or every pixel is known."""
        if known.dtype != torch.bool or known.ndim not in (2, 4):
            raise ValueError(f"known is {known.dtype} {tuple(known.shape)}; give bool (H, W), True where a pixel is known")
        if bool(known.all()):
            raise ValueError("known is True everywhere, so there is nothing to fill in; mark the missing pixels with False")
        if not bool(known.any()):
            raise ValueError("known is False everywhere, so there is nothing to fill in from; mark the known pixels with True")
        self.known = known if known.ndim == 4 else known[None, None]

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.known, x, torch.zeros_like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def value(self, x: Tensor, observed: Tensor) -> Tensor:
        return 0.5 * self.apply(x - observed).square().flatten(1).sum(1)

    def gradient(self, x: Tensor, observed: Tensor) -> Tensor:
        return self.apply(x - observed)

    def prox(self, z: Tensor, observed: Tensor, weight: float) -> Tensor:
        """Weight 0 puts the known pixels back, bit for bit."""
        known = observed if weight == 0 else (observed + weight * z) / (1 + weight)
        return torch.where(self.known, known.to(z), z)

    def start(self, observed: Tensor) -> Tensor:
        """Fill each missing pixel with the mean of the known pixels in the smallest square around it that has any."""
        weight = self.known.expand(len(observed), -1, -1, -1).to(observed)
        image, size = observed * weight, 1
        filled = torch.where(self.known, observed, torch.zeros_like(observed))
        missing = ~self.known.expand_as(weight.bool())
        while bool(missing.any()):
            size = 2 * size + 1
            reach = min(size // 2, max(observed.shape[-2:]))
            total, count = (_box_sum(planes, reach) for planes in (image, weight))
            found = missing & (count > 0.5)
            filled = torch.where(found, total / count.clamp(min=1), filled)
            missing = missing & ~found
        return filled

    def check_observed(self, observed: Tensor) -> None:
        check_mask_size(self.known, observed)


def check_mask_size(mask: Tensor, image: Tensor) -> None:
    """Raise a one-line ValueError unless a mask (..., H, W) has the size of an image (..., H, W)."""
    (height, width), (rows, columns) = mask.shape[-2:], image.shape[-2:]
    if (height, width) != (rows, columns):
        raise ValueError(f"the mask is {width}x{height} px, the image {columns}x{rows}; give a mask of its size")


def _box_sum(planes: Tensor, reach: int) -> Tensor:
    """Sum over the square of `reach` pixels to each side, (B, C, H, W), by cumulative sums in float64."""
    for dim in (-2, -1):
        length = planes.shape[dim]
        sums = torch.cat([torch.zeros_like(planes.narrow(dim, 0, 1), dtype=torch.float64), planes.double().cumsum(dim)], dim)
        index = torch.arange(length, device=planes.device)
        planes = sums.index_select(dim, (index + reach + 1).clamp(max=length)) - sums.index_select(
            dim, (index - reach).clamp(min=0)
        )
    return planes.to(torch.float32)


class Convolution(LinearLikelihood):
    """Blur: y = k * x, where x is larger than y by half of the kernel on each side.

    Every pixel of y then depends only on pixels of x, so no assumption about pixels beyond the border is necessary (Almeida &
    Figueiredo 2013). With `circular`, x has the size of y and wraps around, as in many papers; the proximal step is then in
    closed form, by FFT (Zhang et al. 2021, eq. 9 with scale 1).
    """

    def __init__(self, kernel: Tensor, *, circular: bool = False):
        """`kernel` (kh, kw): odd sides, sum 1, no negative values; ValueError otherwise. The convolution mirrors the kernel."""
        if kernel.ndim != 2 or not kernel.is_floating_point():
            raise ValueError(f"kernel is {kernel.dtype} {tuple(kernel.shape)}; give floats (height, width)")
        if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise ValueError(f"kernel is {kernel.shape[0]}x{kernel.shape[1]}; both sides must be odd, so that it has a centre")
        if not bool(torch.isfinite(kernel).all()) or bool((kernel < 0).any()):
            raise ValueError("kernel has values below 0 or not finite; a blur has none")
        if abs(float(kernel.double().sum()) - 1.0) > 1e-3:
            raise ValueError(f"kernel sums to {float(kernel.sum()):.4g}, not 1; divide it by its sum")
        self.kernel = (kernel.double() / kernel.double().sum()).cpu()
        self.circular = circular
        self.margins = (0, 0) if circular else (kernel.shape[0] // 2, kernel.shape[1] // 2)
        self._transfers: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def apply(self, x: Tensor) -> Tensor:
        return self._crop(self._filter(x, self._transfer(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns = self.margins
        padded = torch.nn.functional.pad(y, (columns, columns, rows, rows))
        return self._filter(padded, self._transfer(padded).conj())

    def prox(self, z: Tensor, observed: Tensor, weight: float) -> Tensor:
        if not self.circular:
            return super().prox(z, observed, weight)
        return z + self.precondition(self.adjoint(observed - self.apply(z)), weight)

    def precondition(self, residual: Tensor, weight: float) -> Tensor:
        power = self._transfer(residual).abs().square()
        return self._filter(residual, 1.0 / (power + max(weight, 1e-8)))

    def start(self, observed: Tensor) -> Tensor:
        rows, columns = self.margins
        return torch.nn.functional.pad(observed, (columns, columns, rows, rows), mode="reflect")

    def finish(self, x: Tensor, observed: Tensor) -> Tensor:
        return self._crop(x)

    def check_observed(self, observed: Tensor) -> None:
        if any(k >= side for k, side in zip(self.kernel.shape, observed.shape[-2:], strict=True)):
            kernel, image = tuple(self.kernel.shape), tuple(observed.shape[-2:])
            raise ValueError(
                f"the kernel is {kernel[1]}x{kernel[0]} px, the image {image[1]}x{image[0]}; "
                "give a kernel smaller than the image"
            )

    def _crop(self, x: Tensor) -> Tensor:
        rows, columns = self.margins
        return x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]

    def _filter(self, x: Tensor, transfer: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])

    def _transfer(self, x: Tensor) -> Tensor:
        """The kernel's FFT for images of this size, (H, W // 2 + 1) complex."""
        height, width = x.shape[-2:]
        key = (height, width, x.dtype)
        if key not in self._transfers:
            padded = torch.zeros(height, width, dtype=torch.float64)
            padded[: self.kernel.shape[0], : self.kernel.shape[1]] = self.kernel
            centred = padded.roll((-(self.kernel.shape[0] // 2), -(self.kernel.shape[1] // 2)), (0, 1))
            self._transfers = {key: torch.fft.rfft2(centred).to(torch.promote_types(x.dtype, torch.complex64))}
        return self._transfers[key].to(x.device)


class Downsampling(LinearLikelihood):
    """y = the image x, `scale` times smaller, by cubic interpolation with anti-aliasing.

    A x = R x C^T, with a matrix for the rows and one for the columns: Keys' cubic (a = -0.5, as in MATLAB and Pillow),
    stretched by the scale and renormalised at the borders. Images are (B, 3, H, W). The singular values of both matrices
    give the proximal step in closed form.
    """

    def __init__(self, scale: int):
        """`scale`: 2, 3 or 4."""
        if isinstance(scale, bool) or scale not in (2, 3, 4):
            raise ValueError(f"scale={scale!r} does not fit; use 2, 3 or 4")
        self.scale = scale
        self._factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.scale or x.shape[-1] % self.scale:
            raise ValueError(f"x is {x.shape[-1]}x{x.shape[-2]} px, no multiple of scale={self.scale}; crop it")
        rows, columns = (resize_matrix(side // self.scale, self.scale).to(x) for side in x.shape[-2:])
        return rows @ x @ columns.T

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns = (resize_matrix(side, self.scale).to(y) for side in y.shape[-2:])
        return rows.T @ y @ columns

    def prox(self, z: Tensor, observed: Tensor, weight: float) -> Tensor:
        (u, s, vh), (p, t, qh) = (self._svd(side) for side in observed.shape[-2:])
        u, s, vh, p, t, qh = (factor.to(z) for factor in (u, s, vh, p, t, qh))
        singular = s[:, None] * t  # (h, w)
        residual = u.T @ (observed - self.apply(z)) @ p
        return z + vh.T @ (singular / (singular.square() + weight) * residual) @ qh

    def start(self, observed: Tensor) -> Tensor:
        """Cubic enlargement."""
        return torch.nn.functional.interpolate(observed, scale_factor=self.scale, mode="bicubic")

    def _svd(self, side: int) -> tuple[Tensor, Tensor, Tensor]:
        if side not in self._factors:
            if len(self._factors) > 1:
                self._factors.clear()
            u, s, vh = torch.linalg.svd(resize_matrix(side, self.scale), full_matrices=False)
            self._factors[side] = (u, s, vh)
        return self._factors[side]


def resize_matrix(small: int, scale: int) -> Tensor:
    """(small, scale * small) float64: one side of the anti-aliased cubic down-sampling; each row sums to 1 (Keys 1981)."""
    centres = (torch.arange(small, dtype=torch.float64) + 0.5) * scale
    pixels = torch.arange(small * scale, dtype=torch.float64) + 0.5
    d = ((pixels - centres[:, None]) / scale).abs()
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    return weights / weights.sum(1, keepdim=True)


class UserOperator(LinearLikelihood):
    """Any linear damage of (B, 3, H, W), given A and its adjoint. The dot-product test checks the pair (Claerbout 1992)."""

    def __init__(self, apply: LinearMap, adjoint: LinearMap | None, *, size: tuple[int, int]):
        """`size` (H, W) of x; `apply` and `adjoint` work on (B, 3, H, W) and (B, 3, h, w). ValueError unless they fit."""
        if adjoint is None:
            raise ValueError("adjoint=None: the operator has no adjoint; give A^T, which maps observations to images")
        self._apply, self._adjoint, self.size = apply, adjoint, size
        error = adjoint_error(self, (1, 3, *size))
        if not error <= 1e-6:
            raise ValueError(f"adjoint is not that of apply: <A x, y> and <x, A^T y> differ by {error:.1e}; use its transpose")

    def apply(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._adjoint(y)

    def start(self, observed: Tensor) -> Tensor:
        """Return A^T y, scaled by least squares to explain the observation."""
        back = self.adjoint(observed)
        again = self.apply(back)
        scale = (again * observed).flatten(1).sum(1) / again.square().flatten(1).sum(1).clamp(min=1e-12)
        return back * scale.reshape(-1, 1, 1, 1)

    def check_observed(self, observed: Tensor) -> None:
        shape = self.apply(torch.zeros(1, 3, *self.size, dtype=observed.dtype, device=observed.device)).shape[1:]
        if shape != observed.shape[1:]:
            raise ValueError(
                f"the observation is {tuple(observed.shape[1:])}, the operator gives {tuple(shape)}; make them agree"
            )


def adjoint_error(operator: LinearLikelihood, shape: tuple[int, int, int, int]) -> float:
    """Return |<A x, y> - <x, A^T y>| / (|A x| |y|) for random float64 x (of `shape`) and y.

    For a correct adjoint this is a rounding error.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    image = operator.apply(x)
    y = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    back = operator.adjoint(y)
    if back.shape != x.shape:
        raise ValueError(f"adjoint gives {tuple(back.shape)} for an image of {tuple(x.shape)}; it must map back to the image")
    difference = (image * y).sum() - (x * back).sum()
    return float(difference.abs() / (image.norm() * y.norm()).clamp(min=1e-300))


def gaussian_kernel(sigma: float) -> Tensor:
    """A Gaussian blur of `sigma` pixels, (k, k) float64, cut off at 4 sigma."""
    check(0.1 <= sigma <= 50, "sigma", sigma, "use 0.1 to 50 pixels")
    reach = max(int(4 * sigma + 0.5), 1)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma).square())
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> Tensor:
    """A straight motion of `length` pixels at `angle` degrees, counter-clockwise from the right, (k, k) float64."""
    check(1 <= length <= 200, "length", length, "use 1 to 200 pixels")
    turn = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, max(int(16 * length), 1), dtype=torch.float64)
    return _bilinear_kernel(-along * turn.sin(), along * turn.cos())


def disk_kernel(radius: float) -> Tensor:
    """A lens out of focus: a disk of `radius` pixels with soft edges, (k, k) float64."""
    check(0.5 <= radius <= 50, "radius", radius, "use 0.5 to 50 pixels")
    reach = int(radius + 1)
    steps = (torch.arange((2 * reach + 1) * 8, dtype=torch.float64) + 0.5) / 8 - reach - 0.5
    inside = (steps[:, None].square() + steps.square() <= radius**2).double()
    kernel = inside.reshape(2 * reach + 1, 8, 2 * reach + 1, 8).mean((1, 3))
    return kernel / kernel.sum()


def _bilinear_kernel(rows: Tensor, columns: Tensor) -> Tensor:
    """Return points (n,), in pixels from the centre, as a kernel; each point is distributed over its four nearest pixels."""
    reach = int(max(float(rows.abs().max()), float(columns.abs().max()))) + 1
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    top, left = rows.floor(), columns.floor()
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (rows - top - down).abs()) * (1 - (columns - left - right).abs())
            kernel.index_put_(((top + down + reach).long(), (left + right + reach).long()), weight, accumulate=True)
    return kernel / kernel.sum()
