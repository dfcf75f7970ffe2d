"""Image files for people: read with everything that should survive, written back without losing it or the old file."""

import dataclasses
import io
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, TiffImagePlugin
from torch import Tensor

from ebt_vision.data.decoding import MAX_PIXELS, MIN_SIDE, PNG_SIGNATURE, SUFFIXES, TIFF_TAGS_KEPT, DecodeError, decode_image

__all__ = ["MAX_PIXELS", "MIN_SIDE", "ImageFile", "ImageFileError", "find_images", "quantise", "read_image", "write_image"]

WRITABLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
JPEG_QUALITY = 95
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
        """The same image with other pixels (3, H, W) of the same size."""
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}, the image {tuple(self.pixels.shape)}")
        return dataclasses.replace(self, pixels=pixels)


def read_image(path: str | os.PathLike[str]) -> ImageFile:
    """Read a still PNG, JPEG, WebP, TIFF, BMP, GIF or PPM file; what it is shows its content, not its name.

    The EXIF orientation is applied to the pixels and the tag reset to 1, so that what is written displays as what was read.
    Raises ImageFileError for a path that is missing or a folder, and for a file that is empty, no image, damaged, animated,
    smaller than MIN_SIDE a side, larger than MAX_PIXELS (by its header, before it is decoded) or not finite.
    """
    path = Path(path)
    try:
        decoded = decode_image(path.read_bytes())
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
        scaled = block.to("cpu", torch.float64).clamp(0.0, 1.0).mul_(2**bit_depth - 1).round_()
        samples[start : start + len(scaled)] = scaled.numpy()
    return samples.reshape(values.shape)


def write_image(path: str | os.PathLike[str], image: ImageFile, overwrite: bool = False) -> None:
    """Write `image` in the format of the suffix of `path`: .png, .jpg, .webp (lossless) or .tif.

    PNG and TIFF keep 16 bits; JPEG (quality 95, 4:4:4) and WebP are written in 8. JPEG has no alpha: the image is composited
    on white. ICC profile and EXIF are kept. The file appears whole or not at all. Raises ImageFileError for another suffix,
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
        encoded = _encode(path.suffix.lower(), image)
    except (ValueError, OSError) as error:
        raise ImageFileError(f"{path} cannot be written ({error})") from error
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(encoded)
        os.replace(partial, path)
    except OSError as error:
        raise ImageFileError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
    finally:
        if partial.exists():
            partial.unlink()


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, and every image (by suffix) under each folder, sorted, hidden ones left out; no file twice.

    Raises ImageFileError for a path that is not there and for a folder without images.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
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


def _encode(suffix: str, image: ImageFile) -> bytes:
    keeps_16_bit = suffix in (".png", ".tif", ".tiff")
    array = _stored_samples(image, image.bit_depth if keeps_16_bit else 8)  # (H, W, C)
    if suffix in (".tif", ".tiff"):
        return _encode_tiff(array, image)
    if array.dtype == np.uint16:
        return _encode_png16(array, image)
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    metadata = {"icc_profile": image.icc_profile, "exif": image.exif}
    options = {name: value for name, value in metadata.items() if value}
    buffer = io.BytesIO()
    if suffix == ".png":
        picture.save(buffer, "PNG", **options)
    elif suffix == ".webp":
        picture.save(buffer, "WEBP", lossless=True, exact=True, **options)
    else:
        if image.alpha is not None:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture.convert("L" if image.mode in ("L", "LA") else "RGB").save(
            buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, **options
        )
    return buffer.getvalue()


def _stored_samples(image: ImageFile, bit_depth: int) -> np.ndarray:
    """(H, W, C) samples as a file of `image.mode` has them, C = 1..4, alpha last."""
    colour = image.pixels.mean(dim=0, keepdim=True) if image.mode in ("L", "LA") else image.pixels
    parts = [colour] if image.alpha is None else [colour, image.alpha.to(colour)]
    planes = [plane for part in parts for plane in part]
    return np.ascontiguousarray(np.stack([quantise(plane, bit_depth) for plane in planes], axis=-1))  # (H, W, C)


def _encode_png16(array: np.ndarray, image: ImageFile) -> bytes:
    """16-bit PNG, which Pillow cannot write (PNG specification, third edition, sec. 5, 9 and 11)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = array.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = np.frombuffer(array.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    filtered = np.zeros((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2  # filter type Up: the difference from the row above, modulo 256
    filtered[:, 1:] = rows
    filtered[1:, 1:] -= rows[:-1]
    parts = [PNG_SIGNATURE, chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if image.icc_profile:
        parts.append(chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(image.icc_profile)))
    if image.exif:
        parts.append(chunk(b"eXIf", image.exif.removeprefix(b"Exif\0\0")))
    parts += [chunk(b"IDAT", zlib.compress(filtered.tobytes())), chunk(b"IEND", b"")]
    return b"".join(parts)


def _encode_tiff(array: np.ndarray, image: ImageFile) -> bytes:
    """TIFF with tifffile, because Pillow cannot write 16-bit colour, nor compress where there is an EXIF block."""
    exif = Image.Exif()
    if image.exif:
        exif.load(image.exif)
    kept = {name: exif[ExifTags.Base[name]] for name in TIFF_TAGS_KEPT if ExifTags.Base[name] in exif}
    tags: list[tuple] = [(ExifTags.Base[name].value, "s", 0, str(kept[name]), True) for name in kept if "Resol" not in name]
    blocks = {int(ifd): fields for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) if (fields := exif.get_ifd(ifd))}
    # tifffile writes no pointer to an EXIF block: the number before it holds the place until the block is there.
    tags += [(ifd - 1, "I", 1, 0, True) for ifd in blocks]
    has_resolution = "XResolution" in kept and "YResolution" in kept
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array[:, :, 0] if array.shape[2] == 1 else array,
        byteorder="<",
        photometric="rgb" if array.shape[2] >= 3 else "minisblack",
        planarconfig="contig" if array.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if image.alpha is not None else None,
        compression="zlib",
        iccprofile=image.icc_profile,
        extratags=tags,
        resolution=(float(kept["XResolution"]), float(kept["YResolution"])) if has_resolution else None,
        resolutionunit=kept.get("ResolutionUnit", 2) if has_resolution else None,
        metadata=None,
        software=False,
    )
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as tiff:
        entries = {ifd: tiff.pages.first.tags[ifd - 1].offset for ifd in blocks}
    for ifd, fields in blocks.items():
        start = buffer.seek(0, os.SEEK_END)
        start += buffer.write(b"\0" * (start % 2))  # an IFD begins on a word boundary
        directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=ifd)
        for tag, value in fields.items():
            if not isinstance(value, dict):
                directory[tag] = value
        buffer.write(directory.tobytes(start))
        buffer.seek(entries[ifd])
        buffer.write(struct.pack("<HHII", ifd, 4, 1, start))  # an entry: tag, type LONG, count, value
    return buffer.getvalue()
