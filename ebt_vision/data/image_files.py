"""Image files for people: read with everything that should survive, written back without losing it or the old file."""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ebt_vision.core.atomic_files import write_atomically
from ebt_vision.data.decoding import MAX_PIXELS, MIN_SIDE, SUFFIXES, DecodeError, decode_image
from ebt_vision.data.encoding import DEEP_SUFFIXES, MAX_SEGMENT, encode
from ebt_vision.data.metadata import Metadata

__all__ = [
    "MAX_PIXELS",
    "MIN_SIDE",
    "ImageFile",
    "ImageFileError",
    "find_images",
    "losses",
    "quantise",
    "read_image",
    "without_suffix",
    "write_image",
]

WRITABLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
QUANTISED_AT_ONCE = 2**20
"""Samples that are float64 at a time: all those of a 12-megapixel image would take most of a gigabyte."""


class ImageFileError(ValueError):
    """An image file cannot be read or written; the message is one line that names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """An upright image in memory and what its file should keep. `with_pixels` gives a copy with a result in it."""

    pixels: Tensor
    """float32 RGB (3, H, W), in [0, 1] as read; three equal channels where the file is grey."""
    alpha: Tensor | None = None
    """float32 (1, H, W) in [0, 1], not premultiplied; None for an opaque image."""
    bit_depth: int = 8
    """8 or 16: the bits of each sample in the file that was read, and in the one that is written where it can hold them."""
    mode: str = "RGB"
    """"L", "LA", "RGB" or "RGBA": a grey image is written grey, as the mean of its channels."""
    icc_profile: bytes | None = None
    """The colour profile of `pixels`."""
    exif: bytes | None = None
    """EXIF block from b"Exif\\0\\0" on; its orientation is 1, since `pixels` are upright."""
    metadata: Metadata = field(default_factory=Metadata)
    """Resolution, XMP, IPTC, comment, PNG texts and colours: each is written where the format has a place for it."""
    notes: tuple[str, ...] = ()
    """What was left out in reading, a clause each, such as "its EXIF fields Make cannot be read and are left out"."""
    path: Path | None = None
    """Where it was read."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[0] != 3:
            raise ValueError(f"pixels has shape {tuple(self.pixels.shape)}, not (3, H, W)")
        if self.alpha is not None and self.alpha.shape != (1, *self.pixels.shape[1:]):
            raise ValueError(f"alpha {tuple(self.alpha.shape)} does not fit pixels {tuple(self.pixels.shape)}")
        if self.bit_depth not in (8, 16):
            raise ValueError(f"bit_depth={self.bit_depth} is not 8 or 16")
        if self.mode not in ("L", "LA", "RGB", "RGBA") or self.mode.endswith("A") != (self.alpha is not None):
            raise ValueError(f"mode={self.mode!r} is not L, LA, RGB or RGBA with an alpha where it says so")

    def with_pixels(self, pixels: Tensor) -> "ImageFile":
        """The same image with other pixels (3, H, W) of the same size; where alpha is 0 the image keeps its own."""
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}, the image {tuple(self.pixels.shape)}")
        if self.alpha is not None:
            pixels = torch.where(self.alpha.to(pixels) == 0, self.pixels.to(pixels), pixels)
        return dataclasses.replace(self, pixels=pixels)

    def visible_pixels(self) -> Tensor:
        """`pixels` (3, H, W) to compute with: where alpha is 0, the colour of the nearest pixel that can be seen.

        The colours that a file hides there are arbitrary, and a network would carry them into their neighbours.
        """
        if self.alpha is None:
            return self.pixels
        hidden = (self.alpha[0] == 0).cpu().numpy()
        if hidden.all():
            return torch.zeros_like(self.pixels)
        if not hidden.any():
            return self.pixels
        rows, columns = ndimage.distance_transform_edt(hidden, return_distances=False, return_indices=True)
        return self.pixels[:, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read a still PNG, JPEG, WebP, TIFF, BMP, GIF, PGM, PPM, AVIF or HEIC file; its content says what it is, not its name.

    HEIC needs the extra "heic". The orientation is applied to the pixels and the EXIF tag reset to 1, so that what is written
    displays as what was read. Raises ImageFileError for a path that is missing, a folder or a pipe, and for a file that is
    empty, no image, damaged, animated, smaller than MIN_SIDE a side, larger than `max_pixels` (by its header, before it is
    decoded; the error's __cause__ is then a TooLargeError) or not finite.
    """
    if not str(path):
        raise ImageFileError("the name of the image is empty; name a file")
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would wait for its writer
            raise ImageFileError(f"{path} is a pipe or a device, not a file; save the image to a file first")
        decoded = decode_image(path.read_bytes(), max_pixels)
    except FileNotFoundError:
        raise ImageFileError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise ImageFileError(f"{path} is a folder, not an image; name a file in it") from None
    except OSError as error:
        raise ImageFileError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except DecodeError as error:
        raise ImageFileError(f"{path} {error}") from error
    grey = decoded.pixels.shape[2] == 1
    pixels = _to_float(decoded.pixels)
    return ImageFile(
        pixels=pixels.repeat(3, 1, 1) if grey else pixels,
        alpha=None if decoded.alpha is None else _to_float(decoded.alpha[:, :, None]),
        bit_depth=16 if decoded.pixels.dtype == np.uint16 else 8,
        mode=("L" if grey else "RGB") + ("" if decoded.alpha is None else "A"),
        icc_profile=decoded.icc_profile,
        exif=decoded.exif,
        metadata=decoded.metadata,
        notes=decoded.notes,
        path=path,
    )


def _to_float(array: np.ndarray) -> Tensor:
    """(H, W, C) uint8 or uint16 -> (C, H, W) float32 in [0, 1]."""
    scaled = array.transpose(2, 0, 1).astype(np.float32, order="C")
    scaled /= np.iinfo(array.dtype).max
    return torch.from_numpy(scaled)


def quantise(values: Tensor, bit_depth: int = 8) -> np.ndarray:
    """[0, 1] -> uint8 in 0..255 or uint16 in 0..65535, any shape: clamped, then rounded half to even.

    Raises ValueError for values that are not finite.
    """
    if bit_depth not in (8, 16):
        raise ValueError(f"bit_depth={bit_depth} is not 8 or 16")
    flat = values.detach().reshape(-1)
    samples = np.empty(flat.numel(), np.uint8 if bit_depth == 8 else np.uint16)
    for start in range(0, len(samples), QUANTISED_AT_ONCE):
        block = flat[start : start + QUANTISED_AT_ONCE]
        if not bool(torch.isfinite(block).all()):
            raise ValueError("the image has NaN or infinite pixels, which no file can hold")
        scaled = block.cpu().double().clamp(0.0, 1.0).mul_(2**bit_depth - 1).round_()
        samples[start : start + len(scaled)] = scaled.numpy()
    return samples.reshape(values.shape)


def write_image(path: str | os.PathLike[str], image: ImageFile, overwrite: bool = False) -> None:
    """Write `image` in the format of the suffix of `path`: .png, .jpg, .webp (lossless) or .tif.

    PNG and TIFF keep 16 bits; JPEG (quality 95, 4:4:4) and WebP are written in 8. JPEG has no alpha: the image is composited
    on white; `losses` names what a format cannot hold. ICC profile, EXIF, resolution and XMP are kept, comments and PNG's texts
    and colours where the format has them; IPTC is not. The file appears whole or not at all, and one that is replaced keeps
    its mode. Raises ImageFileError for another suffix,
    a file that is there without `overwrite`, a folder that is missing or not writable, and pixels that are not finite.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise ImageFileError(f"{path} has no suffix that can be written; use .png, .jpg, .webp or .tif")
    if path.is_dir():
        raise ImageFileError(f"{path} is a folder; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise ImageFileError(f"{path} exists already; use --overwrite, or another name")
    if not path.parent.is_dir():
        raise ImageFileError(f"{path.parent} is not a folder; make it first")
    try:
        encoded = encode(path.suffix.lower(), _stored_samples(image, _written_bits(path.suffix.lower(), image)), image)
    except (ValueError, OSError) as error:
        raise ImageFileError(f"{path} cannot be written ({error})") from error
    try:
        write_atomically(path, lambda file: file.write(encoded))
    except OSError as error:
        raise ImageFileError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def losses(path: str | os.PathLike[str], image: ImageFile) -> list[str]:
    """What of `image` a file of this suffix cannot hold, a clause each, such as "its 16 bits become 8"."""
    suffix = Path(path).suffix.lower()
    is_jpeg, is_png = suffix in (".jpg", ".jpeg"), suffix == ".png"
    kind = {".png": "PNG", ".webp": "WebP"}.get(suffix, "JPEG" if is_jpeg else "TIFF")
    found = []
    if image.bit_depth > _written_bits(suffix, image):
        found.append(f"its {image.bit_depth} bits become 8, because {kind} has no more")
    if image.alpha is not None and is_jpeg:
        found.append("its transparency becomes white, because JPEG has none")
    if any(name != b"sRGB" for name, _ in image.metadata.png_colour) and not is_png:
        found.append(f"its description of colours (PNG's gAMA, cHRM or cICP) is left out, because {kind} has none")
    if image.metadata.iptc and suffix in (".png", ".webp"):
        found.append(f"its IPTC data (caption, author, keywords) are left out, because {kind} has none")
    for name, block in (("XMP", image.metadata.xmp), ("IPTC", image.metadata.iptc)):
        if is_jpeg and block and len(block) > MAX_SEGMENT:
            found.append(f"its {name} data are left out, because JPEG holds {MAX_SEGMENT:,} bytes of them")
    if image.metadata.comment and not is_jpeg:
        found.append(f"its comment is left out, because {kind} has no place for it")
    if image.metadata.text and not is_png:
        found.append("its PNG texts are left out")
    return found


def without_suffix(path: Path) -> Path:
    """The path without an image's suffix; one of another kind, as in IMG.2024, belongs to the name."""
    return path.with_suffix("") if path.suffix.lower() in Image.registered_extensions() else path


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, and every image (by suffix) under each folder, sorted, hidden ones left out; no file twice.

    Raises ImageFileError for a path that is not there and for a folder without images.
    """
    found: dict[Path, None] = {}
    named = list(paths)
    if any(not str(path) for path in named):
        raise ImageFileError("the name of an input is empty; is a shell variable unset?")
    for path in map(Path, named):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            if not visible:
                raise ImageFileError(f"{path} holds no images ({' '.join(sorted(SUFFIXES))}); name another folder")
            found.update(dict.fromkeys(visible))
        elif path.exists():
            found[path] = None
        else:
            raise ImageFileError(f"{path} does not exist; check the path")
    return list(found)


def _written_bits(suffix: str, image: ImageFile) -> int:
    return image.bit_depth if suffix in DEEP_SUFFIXES else 8


def _stored_samples(image: ImageFile, bit_depth: int) -> np.ndarray:
    """(H, W, C) samples as a file of `image.mode` has them, C = 1..4, alpha last."""
    colour = image.pixels.mean(dim=0, keepdim=True) if image.mode in ("L", "LA") else image.pixels
    parts = [colour] if image.alpha is None else [colour, image.alpha.to(colour)]
    planes = [plane for part in parts for plane in part]
    return np.ascontiguousarray(np.stack([quantise(plane, bit_depth) for plane in planes], axis=-1))  # (H, W, C)
