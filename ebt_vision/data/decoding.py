"""Image bytes -> upright 8- or 16-bit pixels, with alpha and metadata: the one decoder for training and for users' files.

Pillow reads all formats that it does not reduce to 8 bits. 16-bit PNG uses torchvision, 16-bit and float TIFF use tifffile
(tiff.py), PGM and PPM of more than 8 bits use pnm.py. Sizes are checked in the header, before any pixel is decoded. Input that
could take endless time is refused as well: see MAX_SECONDS, MAX_PAGES and MAX_SCANNED.
"""

import contextlib
import importlib
import io
import logging
import re
import struct
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, features

from ebt_vision.data.decoded import (
    MAX_PIXELS,
    MAX_SECONDS,
    MIN_SIDE,
    DecodedImage,
    DecodeError,
    TimedBytes,
    TooLargeError,
    assemble,
    check_frames,
    check_size,
    one_line,
)
from ebt_vision.data.metadata import PNG_SIGNATURE, TIFF_SIGNATURES, read_exif, read_metadata
from ebt_vision.data.pnm import decode_deep_pnm, is_deep
from ebt_vision.data.tiff import decode_tiff

pillow_heif: Any = None
with contextlib.suppress(ImportError):  # the extra "heic"
    pillow_heif = importlib.import_module("pillow_heif")
    pillow_heif.register_heif_opener()

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "MAX_SECONDS",
    "MIN_SIDE",
    "SUFFIXES",
    "DecodeError",
    "DecodedImage",
    "TooLargeError",
    "decode_image",
    "to_rgb8",
]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", *(["AVIF"] if features.check("avif") else []))
if pillow_heif is not None:
    FORMATS = (*FORMATS, "HEIF")
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".heic", ".heif", ".avif"}
)
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
UNSUPPORTED = ("unsupported", "not supported", "unknown raw mode")
"""Words in Pillow's messages about complete files of an unsupported kind."""
MAX_BOXES = 1000
"""Maximum number of boxes of an AVIF to search for the description of the image, which is among the first."""
MAX_SCANNED = 4_000_000_000
"""Maximum pixels times scans of a JPEG. A progressive JPEG of 89 megapixels in 10 scans has 0.9e9. A scan costs time even if
it is empty."""

# Pillow's warnings about damaged files are not printed: relevant ones become an error or a note. catch_warnings is not used,
# because it is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> DecodedImage:
    """Decode one still image (PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, AVIF, HEIC) and apply its orientation.

    16-bit PNG, TIFF, PGM and PPM keep 16 bits. Float TIFF must lie in [0, 1] and becomes 16 bit. Palettes become RGB.
    Unreadable EXIF fields are left out and listed in `notes`; the EXIF thumbnail is left out. Smaller pages of a TIFF are
    ignored. HEIC needs the extra "heic". Raises DecodeError for bytes that are empty, not an image, damaged, animated, smaller
    than `min_side`, not finite, or slower to read than MAX_SECONDS. Raises TooLargeError for more than `max_pixels`.
    """
    image = _decode(data, max_pixels)
    height, width = image.pixels.shape[:2]
    if min(width, height) < min_side:
        raise DecodeError(f"is {width}x{height} pixels, too small; each side needs at least {min_side}")
    return image


def _decode(data: bytes, max_pixels: int) -> DecodedImage:
    if not data:
        raise DecodeError("is empty (0 bytes); copy it again")
    try:
        if data.startswith(TIFF_SIGNATURES):
            return decode_tiff(data, max_pixels, _decode_with_pillow)
        if is_deep(data):
            return decode_deep_pnm(data, max_pixels)
        return _decode_with_pillow(data, max_pixels)
    except (DecodeError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise DecodeError(_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise TooLargeError(f"has far more than {MAX_PIXELS} pixels, the limit; make it smaller") from None
    except Exception as error:  # damaged bytes raise almost any error: SyntaxError, struct.error, KeyError
        if isinstance(error, NotImplementedError) or any(word in str(error).lower() for word in UNSUPPORTED):
            raise DecodeError(f"is of a kind that is not supported ({one_line(error)}); save it as PNG") from error
        raise DecodeError(f"is damaged or truncated ({one_line(error)}); copy it again") from error


def _unidentified(data: bytes) -> str:
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS and pillow_heif is None:
        return 'is a HEIC image, which needs pillow-heif; `pip install "ebt_vision[heic]"`, or save it as PNG'
    if brand in AVIF_BRANDS and "AVIF" not in FORMATS:
        return "is an AVIF image, which needs Pillow 11.3 or later; `pip install -U pillow`, or save it as PNG"
    return "is not an image or is damaged; use PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, AVIF or HEIC"


def to_rgb8(image: DecodedImage) -> np.ndarray:
    """Convert to (H, W, 3) uint8 RGB: 16 bit is divided by 257 and rounded, grey is repeated, alpha is composited on white."""
    pixels = _to_8_bit(image.pixels)
    if image.alpha is not None:
        alpha = _to_8_bit(image.alpha)[:, :, None].astype(np.uint32)
        pixels = ((pixels * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _decode_with_pillow(data: bytes, max_pixels: int) -> DecodedImage:
    with Image.open(TimedBytes(data), formats=FORMATS) as image:
        check_size(*image.size, max_pixels)
        check_frames(_num_frames(image, len(data)))
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") * image.width * image.height > MAX_SCANNED:
            raise DecodeError("is a JPEG of too many scans, which would take too long; save it as PNG")
        image.load()
        icc_profile = image.info.get("icc_profile")
        # Pillow rotates a TIFF upright, and decode_tiff reads its EXIF.
        orientation, exif, notes = (1, None, ()) if image.format == "TIFF" else read_exif(image)
        metadata = read_metadata(image, data)
        bits = _avif_bits(data) if image.format == "AVIF" else image.info.get("bit_depth", 8) if image.format == "HEIF" else 8
        if bits > 8:
            notes = (*notes, f"its {bits} bits are reduced to 8")
        if data.startswith(PNG_SIGNATURE) and data[24] == 16:  # IHDR's bit depth
            array = _decode_png16(data, image.info.get("transparency"))  # after load(), which has better messages about damage
        elif image.mode.startswith("I;16"):
            array = np.asarray(image).astype(np.uint16)[:, :, None]
        elif image.mode == "CMYK":
            array, icc_profile = np.asarray(_cmyk_to_rgb(image, icc_profile)), None
        else:
            array = np.atleast_3d(np.asarray(image.convert(_target_mode(image))))
    return assemble(array, orientation, icc_profile, exif, metadata, notes)


def _avif_bits(data: bytes) -> int:
    """Bits per sample of an AVIF (8, 10 or 12) from its AV1 configurations (AV1-ISOBMFF, sec. 2.3); Pillow does not report
    it."""
    place = 0
    for _ in range(MAX_BOXES):
        if place + 8 > len(data):
            break
        size, name = struct.unpack_from(">I4s", data, place)
        if name == b"meta":
            # The third byte after the name: tier, high_bitdepth, twelve_bit, ...
            flags = [found[1][0] for found in re.finditer(b"av1C..(.)", data[place : place + size], re.DOTALL)]
            return max((8 if not f & 0x40 else 12 if f & 0x20 else 10 for f in flags), default=8)
        place += max(size, 8)
    return 8


def _num_frames(image: Image.Image, num_bytes: int) -> int | str:
    if image.format in ("MPO", "HEIF", "TIFF"):
        # An MPO is a photograph followed by a preview or a second view, so the first frame is the image. The first frame of a
        # HEIF is its primary image, and a TIFF has only one page here.
        return 1
    if image.format == "GIF" and num_bytes > 2**20:  # counting its frames would read all of them
        return "several" if getattr(image, "is_animated", False) else 1
    return getattr(image, "n_frames", 1)


def _decode_png16(data: bytes, transparent: int | tuple[int, int, int] | None) -> np.ndarray:
    """Decode to (H, W, C) uint16; `transparent` is the one colour with alpha 0 (tRNS of PNG)."""
    from torchvision.io import ImageReadMode, decode_png  # importing takes a second

    samples = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    array = samples.permute(1, 2, 0).numpy()  # CHW -> HWC
    if transparent is None or array.shape[2] in (2, 4):
        return array
    opaque = (array != np.array(transparent).reshape(1, 1, -1)).any(axis=2, keepdims=True)
    return np.concatenate([array, np.where(opaque, 65535, 0).astype(np.uint16)], axis=2)


def _target_mode(image: Image.Image) -> str:
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise DecodeError(f"has pixels of Pillow mode {image.mode}, which is not supported; save it as 8- or 16-bit RGB")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return "LA" if grey else "RGBA"
    return "L" if grey else "RGB"


def _cmyk_to_rgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    if icc_profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # unusable profile: convert without it
    return image.convert("RGB")
