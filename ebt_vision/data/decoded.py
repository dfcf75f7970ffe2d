"""The result type and the errors of all decoders."""

import io
import os
import time
from dataclasses import dataclass, field

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from ebt_vision.data.metadata import Metadata

MAX_PIXELS = 89_478_485
"""The largest image that is decoded, in pixels: 89 megapixels, the limit of Pillow (a quarter GB in 8-bit RGB)."""

MIN_SIDE = 8
"""The smallest side that is decoded, in pixels; a smaller image has no complete patch."""

MAX_SECONDS = 60.0
"""The maximum time to read one image; 89 megapixels take about a tenth of it."""


class DecodeError(ValueError):
    """The bytes are not a usable image. The message is the reason and the remedy, for use after the file name."""


class TooLargeError(DecodeError):
    """The image has more pixels than the caller accepts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """One upright image with the contents of its file."""

    pixels: np.ndarray
    """(H, W, 3) RGB or (H, W, 1) grey; uint8 in 0..255 or uint16 in 0..65535."""
    alpha: np.ndarray | None
    """(H, W), dtype and range of `pixels`, not premultiplied; None for an opaque file."""
    icc_profile: bytes | None
    """The colour profile of `pixels`; None without a profile, and for CMYK, which is converted to sRGB."""
    exif: bytes | None
    """EXIF block that starts with b"Exif\\0\\0"; its orientation is 1, because the pixels are already upright."""
    metadata: Metadata = field(default_factory=Metadata)
    """Resolution, XMP, comments and other information about the image."""
    notes: tuple[str, ...] = ()
    """What the decoder left out, one sentence each."""


class TimedBytes(io.BytesIO):
    """Bytes as a file that raises DecodeError after MAX_SECONDS, so that no decoder reads it endlessly."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._end = time.monotonic() + MAX_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        self._check()
        return super().read(size)

    def readinto(self, buffer) -> int:
        self._check()
        return super().readinto(buffer)

    def readline(self, size: int | None = -1) -> bytes:
        self._check()
        return super().readline(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._check()
        return super().seek(offset, whence)

    def _check(self) -> None:
        if time.monotonic() > self._end:
            raise DecodeError(f"takes more than {MAX_SECONDS:.0f} s to read; save it as PNG")


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise TooLargeError for more than `max_pixels`."""
    if width * height > max_pixels:
        raise TooLargeError(f"is {width}x{height} pixels, more than the limit of {max_pixels} pixels; make it smaller")


def check_frames(num_frames: int | str) -> None:
    """Raise DecodeError unless there is one frame; a word such as "several" means that the frames were not counted."""
    if num_frames != 1:
        raise DecodeError(f"has {num_frames} frames or pages; save the frame you want as PNG")


def assemble(
    array: np.ndarray,
    orientation: int,
    icc_profile: bytes | None,
    exif: bytes | None,
    metadata: Metadata,
    notes: tuple[str, ...] = (),
) -> DecodedImage:
    """Convert (H, W, C) as stored to an upright DecodedImage; C = 1..4, and alpha is last if C is even."""
    upright = np.ascontiguousarray(_orient(array, orientation))
    has_alpha = upright.shape[2] in (2, 4)
    return DecodedImage(
        pixels=upright[:, :, :-1] if has_alpha else upright,
        alpha=upright[:, :, -1] if has_alpha else None,
        icc_profile=icc_profile or None,
        exif=exif,
        metadata=metadata.turned() if orientation in (5, 6, 7, 8) else metadata,
        notes=notes,
    )


def _orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation 1..8 to (H, W, C) (EXIF 2.32, sec. 4.6.4 A)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


@dataclass(frozen=True, slots=True)
class TurnedImage:
    """Turns an upright image (..., H, W) back to how its file stores it, and again upright."""

    orientation: int
    """EXIF orientation, 1..8."""

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> "TurnedImage":
        """As the file's EXIF block says; 1 without one."""
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return cls(orientation if orientation in range(1, 9) else 1)

    def upright(self, stored: Tensor) -> Tensor:
        """See _orient."""
        turned = stored.transpose(-2, -1) if self.orientation in (5, 6, 7, 8) else stored
        return turned.flip(self._flipped()).contiguous()

    def as_stored(self, upright: Tensor) -> Tensor:
        """The inverse of `upright`."""
        turned = upright.flip(self._flipped())
        return (turned.transpose(-2, -1) if self.orientation in (5, 6, 7, 8) else turned).contiguous()

    def _flipped(self) -> list[int]:
        rows, columns = self.orientation in (3, 4, 7, 8), self.orientation in (2, 3, 6, 7)
        return [-2] * rows + [-1] * columns


def one_line(error: Exception) -> str:
    """The message of an error from another library, short and in one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
