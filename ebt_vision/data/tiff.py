"""TIFF -> pixels. Pillow reads samples of up to 8 bits; 16-bit samples, floats and rare compressions use tifffile.

Both libraries get a copy of the file with one page and without fields that point outside the file. A chain of pages that
leads back to itself, or a million pages, therefore costs nothing.
"""

import ctypes
import functools
import logging
import lzma
import zlib
from collections.abc import Callable

import numpy as np
import tifffile
from PIL import Image

from ebt_vision.data.decoded import (
    MAX_PIXELS,
    DecodedImage,
    DecodeError,
    TimedBytes,
    assemble,
    check_frames,
    check_size,
)
from ebt_vision.data.metadata import (
    IPTC_TAG,
    ORIENTATION,
    Metadata,
    TiffLayout,
    clean_block,
    field_note,
    tiff_exif,
    upright_xmp,
    usable_dpi,
)

MAX_PAGES = 256
"""Maximum number of pages of a TIFF to search."""
MAX_SEGMENTS = 400_000
"""Maximum strips or tiles of an image: 89 megapixels in tiles of 16 x 16 pixels have 350,000."""
PILLOW_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946, 34925, 50000})
"""Compressions that Pillow's libtiff can decode."""
REDUCED, MASK = 1, 4
"""Bits of NewSubfileType: the page is a smaller version of another page, or a transparency mask."""
ALPHA_KINDS = (1, 2)
"""Values of ExtraSamples: premultiplied alpha and plain alpha; 0 means unspecified."""

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # do not print its warnings about damaged files


def decode_tiff(data: bytes, max_pixels: int, with_pillow: Callable[..., DecodedImage]) -> DecodedImage:
    """Decode the one full-size page; `with_pillow(data, max_pixels)` decodes a one-page TIFF with Pillow.

    Raises DecodeError, and the errors of the libraries on damaged bytes.
    """
    _silence_libtiff()
    data, dropped = _one_page(data)
    with tifffile.TiffFile(TimedBytes(data), is_lsm=False, is_ndpi=False, is_scanimage=False) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        check_size(page.imagewidth, page.imagelength, max_pixels)
        exif, notes = tiff_exif(data)
        notes = field_note(dropped) + notes
        if page.bitspersample <= 8 and page.compression in PILLOW_COMPRESSIONS:
            try:
                image = with_pillow(data, max_pixels)
            except Image.UnidentifiedImageError:
                raise DecodeError(f"is a TIFF of {_kind(page)}, which is not supported; save it as 8- or 16-bit RGB") from None
            if _num_unspecified(page):
                notes = (*notes, UNSPECIFIED)
            array = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
            return assemble(array, 1, image.icc_profile, exif, _metadata(page), notes)  # Pillow has rotated it upright
        array, more = _decode_page(page, data)
    orientation = page.tags.valueof(ORIENTATION, default=1)
    return assemble(array, orientation, page.tags.valueof(34675), exif, _metadata(page), notes + more)


UNSPECIFIED = "its extra channel, which the file does not mark as alpha, is left out"


def _one_page(data: bytes) -> tuple[bytes, list[int]]:
    """Return the file with only its full-size page, and the fields that were removed."""
    layout = TiffLayout.of(data)
    pages: list[tuple[int, bool]] = []
    seen: set[int] = set()
    place = layout.number(data, layout.first, layout.offset)
    while place:
        if place in seen:
            raise DecodeError("is a TIFF whose pages lead back to an earlier one; save the page you want as PNG")
        if len(seen) == MAX_PAGES:
            check_frames(f"more than {MAX_PAGES}")
        seen.add(place)
        try:
            entries, following = layout.directory(data, place)
        except ValueError as error:
            if pages:
                break  # keep a readable page even if later data is damaged
            raise DecodeError(f"is damaged or truncated ({error}); copy it again") from None
        kinds = [layout.number(data, entry.place, "H" if entry.size == 2 else "I") for entry in entries if entry.tag == 254]
        old = [layout.number(data, entry.place, "H") for entry in entries if entry.tag == 255]  # 2: reduced, of TIFF 5.0
        pages.append((place, bool(kinds and kinds[0] & (REDUCED | MASK)) or 2 in old))
        try:
            place = layout.number(data, following, layout.offset)
        except ValueError:
            break
    full = [place for place, is_other in pages if not is_other] or [place for place, _ in pages[:1]]
    if not full:
        raise DecodeError("is a TIFF without a page; copy it again")
    check_frames(len(full))
    return clean_block(data, full[0])


def _kind(page: tifffile.TiffPage) -> str:
    names = (getattr(value, "name", value) for value in (page.photometric, page.compression))
    return "{}-bit samples, photometric {}, compression {}".format(page.bitspersample, *names)


def _num_unspecified(page: tifffile.TiffPage) -> int:
    return sum(int(kind) not in ALPHA_KINDS for kind in page.extrasamples)


def _metadata(page: tifffile.TiffPage) -> Metadata:
    xmp = page.tags.valueof(700)
    per_inch = {2: 1.0, 3: 2.54}.get(int(page.tags.valueof(296, default=2)))
    try:
        (a, b), (c, d) = page.tags.valueof(282), page.tags.valueof(283)
        dpi = None if per_inch is None else usable_dpi((a / b * per_inch, c / d * per_inch))
    except (TypeError, ValueError, ZeroDivisionError):
        dpi = None
    iptc = page.tags.valueof(IPTC_TAG)
    return Metadata(
        dpi=dpi,
        xmp=upright_xmp(xmp if isinstance(xmp, bytes | str) else None),
        iptc=iptc if isinstance(iptc, bytes) and iptc else None,
    )


def _decode_page(page: tifffile.TiffPage, data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return (H, W, C) uint8 or uint16, with alpha last if C is even; and notes."""
    photometric, dtype = page.photometric, np.dtype(page.dtype)
    known = dtype.kind == "f" or (dtype in (np.uint8, np.uint16) and isinstance(page.bitspersample, int))
    if page.axes not in ("YX", "YXS", "SYX") or photometric not in (0, 1, 2) or not known:
        raise DecodeError(f"is a TIFF of {_kind(page)}, which is not supported; save it as 8- or 16-bit RGB")
    num_colours = 3 if photometric == 2 else 1
    if page.samplesperpixel > num_colours + 1:
        raise DecodeError(f"has {page.samplesperpixel} channels; save it as grey, RGB or RGBA")
    array = _samples(page, data)
    if dtype.kind == "f":
        array, top = _unit_to_16_bit(array), 65535
    else:
        full = (1 << page.bitspersample) - 1
        top = 255 if full <= 255 else 65535
        if full != top:  # for example, 12 bits are stored in 16
            array = np.rint(array.astype(np.float64) * (top / full)).astype(array.dtype)
    colours, extra = array[:, :, :num_colours], array[:, :, num_colours:]
    if photometric == 0:  # 0 is white
        colours = top - colours
    notes: tuple[str, ...] = ()
    if extra.size and _num_unspecified(page):
        extra, notes = extra[:, :, :0], (UNSPECIFIED,)
    if extra.size and page.extrasamples and int(page.extrasamples[0]) == 1:  # colours premultiplied by alpha
        colours = np.minimum(np.rint(colours * (float(top) / np.maximum(extra, 1))), top).astype(array.dtype)
    return np.concatenate([colours, extra], axis=2), notes


def _samples(page: tifffile.TiffPage, data: bytes) -> np.ndarray:
    """Return (H, W, C) as stored."""
    if any(start + size > len(data) for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise DecodeError("is truncated; copy it again")
    _check_segments(page, data)
    try:
        array = page.asarray()
    except ValueError as error:
        if "imagecodecs" in str(error):
            remedy = '`pip install "ebt_vision[tiff]"`, or save it as PNG'
            raise DecodeError(f"is a TIFF of {_kind(page)}, which needs imagecodecs; {remedy}") from None
        if not isinstance(page.compression, tifffile.COMPRESSION):
            raise DecodeError(f"is a TIFF of {_kind(page)}, which is not supported; save it as PNG") from None
        raise
    return np.moveaxis(array, 0, -1) if page.axes == "SYX" else np.atleast_3d(array)


def _check_segments(page: tifffile.TiffPage, data: bytes) -> None:
    """Refuse strips and tiles whose number or decompressed size is far too large for the image; they would fill the memory."""
    expected = int(np.prod(page.chunks, dtype=np.float64)) * np.dtype(page.dtype).itemsize
    if len(page.dataoffsets) > MAX_SEGMENTS or expected > MAX_PIXELS * 16:
        raise DecodeError(f"is a TIFF of {len(page.dataoffsets)} strips of {expected} bytes, which is too many; save it as PNG")
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        if page.compression in (8, 32946):
            decompressed = zlib.decompressobj().decompress(data[start : start + size], expected + 1)
        elif page.compression == 34925:
            decompressed = lzma.LZMADecompressor().decompress(data[start : start + size], expected + 1)
        else:
            return
        if len(decompressed) > expected:
            raise DecodeError("is damaged (a strip has more data than pixels); copy it again")


def _unit_to_16_bit(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise DecodeError("has NaN or infinite pixels; replace them first")
    if array.min() < 0.0 or array.max() > 1.0:
        raise DecodeError(f"has float pixels in [{array.min():g}, {array.max():g}]; scale them to [0, 1]")
    return np.rint(array.astype(np.float64) * 65535.0).astype(np.uint16)


@functools.cache
def _silence_libtiff() -> None:
    """Suppress the messages that Pillow's libtiff prints to stderr about damaged files; our own message is enough. Nothing
    changes if libtiff cannot be reached, for example if it is linked into Pillow."""
    try:
        library = ctypes.CDLL(Image.core.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            handler = getattr(library, name)
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
    except (OSError, AttributeError):
        pass
