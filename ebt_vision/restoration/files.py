"""Image files as inputs and results of restore(): masks, transparency, JPEG tables."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ebt_vision.data.decoded import TurnedImage
from ebt_vision.data.image_files import MAX_PIXELS, ImageFile, read_image
from ebt_vision.restoration.jpeg import JpegIntervals, JpegTables
from ebt_vision.restoration.likelihoods import Downsampling, Likelihood, Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedFile:
    """An image file with its damage."""

    image: ImageFile
    likelihood: Likelihood
    turned: TurnedImage = TurnedImage(1)
    """How the file stores its pixels; the blocks of a JPEG lie on this grid."""
    makes_opaque: bool = False
    """Whether transparent pixels are the ones to be filled in."""

    def observed(self) -> Tensor:
        """The pixels (3, H, W) for restore()."""
        shown = self.image.visible_pixels()
        return shown if self.turned.orientation == 1 else self.turned.as_stored(shown)

    def upright(self, restored: Tensor) -> Tensor:
        """A restored image (3, H, W), turned as people see it."""
        return restored if self.turned.orientation == 1 else self.turned.upright(restored)

    def with_result(self, restored: Tensor) -> ImageFile:
        """The image with the result (3, H, W). Filled pixels become opaque; an enlarged image gets an enlarged alpha."""
        image, pixels, alpha = self.image, self.upright(restored), self.image.alpha
        if self.makes_opaque and alpha is not None:
            alpha = torch.where(alpha == 0, torch.ones_like(alpha), alpha)
            if bool((alpha == 1).all()):
                return replace(image, pixels=pixels, alpha=None, mode=image.mode.removesuffix("A"))
            return replace(image, pixels=pixels, alpha=alpha)
        if isinstance(self.likelihood, Downsampling):
            if alpha is not None:
                scale = float(self.likelihood.scale)
                alpha = torch.nn.functional.interpolate(alpha[None], scale_factor=scale, mode="bilinear")[0]
            return replace(image, pixels=pixels, alpha=alpha)
        return image.with_pixels(pixels)


def jpeg_file(image: ImageFile, path: Path) -> DamagedFile:
    """Return an image that was read from the JPEG file at `path`, with its tables. Raises ValueError for other files."""
    likelihood = JpegIntervals(JpegTables.of_file(path))
    return DamagedFile(image=image, likelihood=likelihood, turned=TurnedImage.of_file(path))


def transparent_file(image: ImageFile, path: Path) -> DamagedFile:
    """Return an image whose transparent pixels are missing. Raises ValueError without transparent pixels."""
    if image.alpha is None or not bool((image.alpha == 0).any()):
        raise ValueError(f"{path} has no transparent pixels to fill in; erase what is to go, or give a mask")
    if not bool((image.alpha > 0).any()):
        raise ValueError(
            f"{path} is transparent everywhere, so there is nothing to fill in from; give an image with known pixels"
        )
    return DamagedFile(image=image, likelihood=Mask(image.alpha[0] > 0), makes_opaque=True)


def read_mask(path: Path, max_pixels: int = MAX_PIXELS, *, mixed: bool = False) -> Tensor:
    """Read a mask: bool (H, W), True for known pixels. Missing pixels are white in the file.

    With `mixed`, raises ValueError for a mask that marks no pixel or all of them.
    """
    mask = read_image(path, max_pixels)
    marked = mask.pixels.mean(0) > 0.5
    known = ~(marked if mask.alpha is None else marked & (mask.alpha[0] > 0.5))
    if mixed and bool(known.all()):
        raise ValueError(f"{path} has no white pixels, so nothing is missing; make the missing pixels white, above 127 of 255")
    if mixed and not bool(known.any()):
        raise ValueError(f"{path} is white everywhere, so there is nothing to fill in from; make the known pixels black")
    return known
