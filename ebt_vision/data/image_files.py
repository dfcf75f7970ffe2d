"""Image files of users: read with all metadata, and written without losing metadata or the old file."""

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
"""Number of samples converted to float64 at a time; a whole 12-megapixel image would need most of a gigabyte."""


class ImageFileError(ValueError):
    """An image file cannot be read or written; the one-line message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """An upright image in memory with the metadata of its file. `with_pixels` returns a copy with new pixels."""

    pixels: Tensor
    """float32 RGB (3, H, W), in [0, 1] as read; three equal channels for a grey file."""
    alpha: Tensor | None = None
    """float32 (1, H, W) in [0, 1], not premultiplied; None for an opaque image."""
    bit_depth: int = 8
    """8 or 16: bits per sample of the input file, and of the output file if its format supports them."""
    mode: str = "RGB"
    """"L", "LA", "RGB" or "RGBA". A grey image is written as grey: the mean of its channels."""
    icc_profile: bytes | None = None
    """The colour profile of `pixels`."""
    exif: bytes | None = None
    """EXIF block from b"Exif\\0\\0" on; its orientation is 1, because `pixels` are upright."""
    metadata: Metadata = field(default_factory=Metadata)
    """Resolution, XMP, IPTC, comment, PNG texts and colours; each is written if the format supports it."""
    notes: tuple[str, ...] = ()
    """What reading left out, one clause each, such as "its EXIF fields Make cannot be read and are left out"."""
    path: Path | None = None
    """The path of the input file."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[0] != 3:
            raise ValueError(f"pixels has shape {tuple(self.pixels.shape)}, not (3, H, W)")
        if self.alpha is not None and self.alpha.shape != (1, *self.pixels.shape[1:]):
            raise ValueError(f"alpha {tuple(self.alpha.shape)} does not match pixels {tuple(self.pixels.shape)}")
        if self.bit_depth not in (8, 16):
            raise ValueError(f"bit_depth={self.bit_depth} is not 8 or 16")
        if self.mode not in ("L", "LA", "RGB", "RGBA") or self.mode.endswith("A") != (self.alpha is not None):
            raise ValueError(f"mode={self.mode!r} is not L, LA, RGB or RGBA, or does not match alpha")

    def with_pixels(self, pixels: Tensor) -> "ImageFile":
        """Return the image with other pixels (3, H, W) of the same size; where alpha is 0, the original pixels stay."""
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}, but the image has {tuple(self.pixels.shape)}")
        if self.alpha is not None:
            pixels = torch.where(self.alpha.to(pixels) == 0, self.pixels.to(pixels), pixels)
        return dataclasses.replace(self, pixels=pixels)

    def visible_pixels(self) -> Tensor:
        """Return `pixels` (3, H, W) for computing: where alpha is 0, the colour of the nearest visible pixel.

        Colours under alpha 0 are arbitrary, and a network would spread them into visible neighbours.
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


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> ImageFile:
    """Read a still PNG, JPEG, WebP, TIFF, BMP, GIF, PGM, PPM, AVIF or HEIC file; the content determines the format, not the
    name.

    HEIC needs the extra "heic". The orientation is applied to the pixels and the EXIF tag is set to 1, so that the written file
    displays like the input. Raises ImageFileError for a missing path, a folder or a pipe, and for a file that is empty, not an
    image, damaged, animated, smaller than `min_side` on a side, not finite, or larger than `max_pixels` (checked in the header
    before decoding; the error's __cause__ is then a TooLargeError).
    """
    if not str(path):
        raise ImageFileError("the name of the image is empty; name a file")
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would block
            raise ImageFileError(f"{path} is a pipe or a device, not a file; save the image to a file first")
        decoded = decode_image(path.read_bytes(), max_pixels, min_side)
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
    """Convert (H, W, C) uint8 or uint16 to (C, H, W) float32 in [0, 1]."""
    scaled = array.transpose(2, 0, 1).astype(np.float32, order="C")
    scaled /= np.iinfo(array.dtype).max
    return torch.from_numpy(scaled)


def quantise(values: Tensor, bit_depth: int = 8) -> np.ndarray:
    """Convert [0, 1] to uint8 in 0..255 or uint16 in 0..65535, any shape: clamp, then round half to even.

    Raises ValueError for values that are not finite.
    """
    if bit_depth not in (8, 16):
        raise ValueError(f"bit_depth={bit_depth} is not 8 or 16")
    flat = values.detach().reshape(-1)
    samples = np.empty(flat.numel(), np.uint8 if bit_depth == 8 else np.uint16)
    for start in range(0, len(samples), QUANTISED_AT_ONCE):
        block = flat[start : start + QUANTISED_AT_ONCE]
        if not bool(torch.isfinite(block).all()):
            raise ValueError("the image has NaN or infinite pixels, which cannot be written")
        scaled = block.cpu().double().clamp(0.0, 1.0).mul_(2**bit_depth - 1).round_()
        samples[start : start + len(scaled)] = scaled.numpy()
    return samples.reshape(values.shape)


def write_image(path: str | os.PathLike[str], image: ImageFile, overwrite: bool = False) -> None:
    """Write `image` in the format of the suffix of `path`: .png, .jpg, .webp (lossless) or .tif.

    PNG and TIFF keep 16 bits; JPEG (quality 95, 4:4:4) and WebP are written with 8 bits. JPEG has no alpha: the image is
    composited on white. `losses` lists what a format cannot hold. ICC profile, EXIF, resolution and XMP are kept; comments, PNG
    texts and colours, and IPTC are kept if the format supports them. The file appears complete or not at all; a replaced file
    keeps its mode. Raises ImageFileError for another suffix, an existing file without `overwrite`, a missing or read-only
    folder, and pixels that are not finite.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise ImageFileError(f"{path} has no writable image suffix; use .png, .jpg, .webp or .tif")
    if path.is_dir():
        raise ImageFileError(f"{path} is a folder; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise ImageFileError(f"{path} already exists; use --overwrite or another name")
    if not path.parent.is_dir():
        raise ImageFileError(f"{path.parent} is not a folder; create it first")
    try:
        encoded = encode(path.suffix.lower(), _stored_samples(image, _written_bits(path.suffix.lower(), image)), image)
    except (ValueError, OSError) as error:
        raise ImageFileError(f"{path} cannot be written ({error})") from error
    try:
        write_atomically(path, lambda file: file.write(encoded))
    except OSError as error:
        raise ImageFileError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def losses(path: str | os.PathLike[str], image: ImageFile) -> list[str]:
    """List what a file of this suffix cannot hold of `image`, one clause each, such as "its 16 bits become 8"."""
    suffix = Path(path).suffix.lower()
    is_jpeg, is_png = suffix in (".jpg", ".jpeg"), suffix == ".png"
    kind = {".png": "PNG", ".webp": "WebP"}.get(suffix, "JPEG" if is_jpeg else "TIFF")
    found = []
    if image.bit_depth > _written_bits(suffix, image):
        found.append(f"its {image.bit_depth} bits become 8, because {kind} does not support more")
    if image.alpha is not None and is_jpeg:
        found.append("its transparency becomes white, because JPEG does not support it")
    if any(name != b"sRGB" for name, _ in image.metadata.png_colour) and not is_png:
        found.append(f"its description of colours (PNG's gAMA, cHRM or cICP) is left out, because {kind} does not support it")
    if image.metadata.iptc and suffix in (".png", ".webp"):
        found.append(f"its IPTC data (caption, author, keywords) are left out, because {kind} does not support them")
    for name, block in (("XMP", image.metadata.xmp), ("IPTC", image.metadata.iptc)):
        if is_jpeg and block and len(block) > MAX_SEGMENT:
            found.append(f"its {name} data are left out, because JPEG supports at most {MAX_SEGMENT:,} bytes")
    if image.metadata.comment and not is_jpeg:
        found.append(f"its comment is left out, because {kind} does not support it")
    if image.metadata.text and not is_png:
        found.append("its PNG texts are left out")
    return found


def without_suffix(path: Path) -> Path:
    """Remove the suffix of an image format; other suffixes, as in IMG.2024, belong to the name."""
    return path.with_suffix("") if path.suffix.lower() in Image.registered_extensions() else path


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the given files, and every image (by suffix) under each folder, sorted, without hidden files and duplicates.

    Raises ImageFileError for a missing path and for a folder without images.
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
                raise ImageFileError(f"{path} has no images ({' '.join(sorted(SUFFIXES))}); name another folder")
            found.update(dict.fromkeys(visible))
        elif path.exists():
            found[path] = None
        else:
            raise ImageFileError(f"{path} does not exist; check the path")
    return list(found)


def _written_bits(suffix: str, image: ImageFile) -> int:
    return image.bit_depth if suffix in DEEP_SUFFIXES else 8


def _stored_samples(image: ImageFile, bit_depth: int) -> np.ndarray:
    """Return (H, W, C) samples for a file of `image.mode`; C = 1..4, and alpha is last if C is even."""
    colour = image.pixels.mean(dim=0, keepdim=True) if image.mode in ("L", "LA") else image.pixels
    parts = [colour] if image.alpha is None else [colour, image.alpha.to(colour)]
    planes = [plane for part in parts for plane in part]
    return np.ascontiguousarray(np.stack([quantise(plane, bit_depth) for plane in planes], axis=-1))  # (H, W, C)
