"""Image bytes -> 8- or 16-bit pixels, upright, with alpha and metadata: the one decoder for training and for people's files.

Pillow reads everything but two things it would cut to 8 bits: 16-bit PNG goes through torchvision, 16-bit and float TIFF
through tifffile. Sizes are checked from the header, before any pixel is decoded.
"""

import io
import logging
from dataclasses import dataclass

import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms
from torchvision.io import ImageReadMode, decode_png

MAX_PIXELS = 89_478_485
"""The largest image that is decoded, in pixels: 89 megapixels, Pillow's own limit (a quarter GB in 8-bit RGB)."""

MIN_SIDE = 8
"""The smallest side that is decoded, in pixels: below it there is no patch to work on."""

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"})
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_TAGS_KEPT = (
    *("ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "Copyright"),
    *("XResolution", "YResolution", "ResolutionUnit"),
)
ORIENTATION = ExifTags.Base.Orientation.value

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its remarks on a damaged file are not printed unasked


class DecodeError(ValueError):
    """The bytes are no usable image. The message is the reason and the remedy, to be put after the file's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """One upright image as its file holds it."""

    pixels: np.ndarray
    """(H, W, 3) RGB or (H, W, 1) grey; uint8 in 0..255 or uint16 in 0..65535."""
    alpha: np.ndarray | None
    """(H, W), dtype and range of `pixels`, not premultiplied; None for an opaque file."""
    icc_profile: bytes | None
    """The profile `pixels` are in; None without one, and for CMYK, which is converted to sRGB."""
    exif: bytes | None
    """EXIF block that starts with b"Exif\\0\\0", its orientation reset to 1 because the pixels are upright already."""


def decode_image(data: bytes) -> DecodedImage:
    """Decode one still image (PNG, JPEG, WebP, TIFF, BMP, GIF, PPM) and apply its EXIF orientation.

    16-bit PNG and TIFF keep their 16 bits; float TIFF must lie in [0, 1] and becomes 16 bit; palettes become RGB. EXIF that
    cannot be parsed is left out, and so is its thumbnail. Raises DecodeError for bytes that are empty, no image, damaged,
    animated, smaller than MIN_SIDE, larger than MAX_PIXELS, or not finite.
    """
    if not data:
        raise DecodeError("is empty (0 bytes); copy it again")
    try:
        return _decode_tiff(data) if data.startswith(TIFF_SIGNATURES) else _decode_with_pillow(data)
    except (DecodeError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise DecodeError("is not an image, or is damaged; PNG, JPEG, WebP, TIFF, BMP, GIF and PPM are read") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"has far more than the {MAX_PIXELS} pixels that are decoded; make it smaller") from None
    except Exception as error:  # on damaged bytes the decoders raise nearly anything: SyntaxError, struct.error, KeyError
        raise DecodeError(f"is damaged or truncated ({_one_line(error)}); copy it again") from error


def to_rgb8(image: DecodedImage) -> np.ndarray:
    """(H, W, 3) uint8 RGB: 16 bit is divided by 257 and rounded, grey is repeated, alpha is composited on white."""
    pixels = _to_8_bit(image.pixels)
    if image.alpha is not None:
        alpha = _to_8_bit(image.alpha)[:, :, None].astype(np.uint32)
        pixels = ((pixels * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _check_header(width: int, height: int, num_frames: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"is {width}x{height} pixels, more than the {MAX_PIXELS} that are decoded; make it smaller")
    if min(width, height) < MIN_SIDE:
        raise DecodeError(f"is {width}x{height} pixels, too small; each side needs at least {MIN_SIDE}")
    if num_frames > 1:
        raise DecodeError(f"has {num_frames} frames or pages; save the one you mean as PNG")


def _decode_with_pillow(data: bytes) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # An MPO is a photograph followed by a preview or a second view: the first frame is the picture.
        _check_header(*image.size, 1 if image.format == "MPO" else getattr(image, "n_frames", 1))
        image.load()
        icc_profile = image.info.get("icc_profile")
        if image.format == "TIFF":
            orientation, exif = 1, _tiff_exif(data)  # Pillow turns a TIFF upright by itself
        else:
            orientation, exif = _read_exif(image)
        if data.startswith(PNG_SIGNATURE) and data[24] == 16:  # IHDR's bit depth
            array = _decode_png16(data)  # after load(), whose messages on damaged data are better
        elif image.mode.startswith("I;16"):
            array = np.asarray(image).astype(np.uint16)[:, :, None]
        elif image.mode == "CMYK":
            array, icc_profile = np.asarray(_cmyk_to_rgb(image, icc_profile)), None
        else:
            array = np.atleast_3d(np.asarray(image.convert(_target_mode(image))))
    return _assemble(array, orientation, icc_profile, exif)


def _decode_png16(data: bytes) -> np.ndarray:
    samples = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return samples.permute(1, 2, 0).numpy()  # CHW -> HWC


def _assemble(array: np.ndarray, orientation: int, icc_profile: bytes | None, exif: bytes | None) -> DecodedImage:
    """(H, W, C) of 1 to 4 channels, an even number having alpha last, as stored -> DecodedImage."""
    upright = np.ascontiguousarray(_orient(array, orientation))
    has_alpha = upright.shape[2] in (2, 4)
    return DecodedImage(
        pixels=upright[:, :, :-1] if has_alpha else upright,
        alpha=upright[:, :, -1] if has_alpha else None,
        icc_profile=icc_profile or None,
        exif=exif,
    )


def _orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation 1..8 to (H, W, C) (EXIF 2.32, sec. 4.6.4 A)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def _target_mode(image: Image.Image) -> str:
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise DecodeError(f"has pixels of Pillow mode {image.mode}, which is not read; save it as 8- or 16-bit RGB")
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
            pass  # a profile that cannot be used: convert without one
    return image.convert("RGB")


def _read_exif(image: Image.Image) -> tuple[int, bytes | None]:
    """The orientation, and the EXIF block with the orientation reset."""
    try:
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        if "exif" not in image.info:  # the orientation came from XMP, which is not carried
            return orientation, None
        if ORIENTATION in exif:
            exif[ORIENTATION] = 1
        return orientation, exif.tobytes()
    except Exception:  # Pillow raises nearly anything on a damaged block, and the pixels are still good
        return 1, None


def _tiff_exif(data: bytes) -> bytes | None:
    """A TIFF's descriptive tags, EXIF and GPS as an EXIF block, without the tags that say how its pixels are stored."""
    try:
        tags, kept = Image.Exif(), Image.Exif()
        tags.load(data)
        for name in TIFF_TAGS_KEPT:
            if ExifTags.Base[name] in tags:
                kept[ExifTags.Base[name]] = tags[ExifTags.Base[name]]
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if fields := tags.get_ifd(ifd):
                kept[ifd] = fields
        return kept.tobytes() if len(kept) else None
    except Exception:  # as in _read_exif
        return None


def _decode_tiff(data: bytes) -> DecodedImage:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = [page for page in tiff.pages if not page.is_reduced]  # type: ignore[union-attr]
        page = pages[0] if pages else tiff.pages[0]
        _check_header(page.imagewidth, page.imagelength, len(pages))  # type: ignore[union-attr]
        if page.bitspersample <= 8:  # type: ignore[union-attr]
            return _decode_with_pillow(data)
        return _decode_deep_tiff(page, data)  # type: ignore[arg-type]


def _decode_deep_tiff(page: tifffile.TiffPage, data: bytes) -> DecodedImage:
    photometric, dtype = page.photometric, np.dtype(page.dtype)
    if page.axes not in ("YX", "YXS", "SYX") or photometric not in (0, 1, 2) or not (dtype == np.uint16 or dtype.kind == "f"):
        raise DecodeError(f"is a TIFF of {dtype} samples and photometric {photometric!r}; save it as 8- or 16-bit RGB")
    if any(start + size > len(data) for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise DecodeError("is truncated; copy it again")
    try:
        array = page.asarray()
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        compression = getattr(page.compression, "name", page.compression)
        remedy = "`pip install imagecodecs`, or save it as PNG"
        raise DecodeError(f"is a {dtype} TIFF with {compression} compression; {remedy}") from None
    array = np.moveaxis(array, 0, -1) if page.axes == "SYX" else np.atleast_3d(array)  # (H, W, C)
    if dtype.kind == "f":
        if not np.isfinite(array).all():
            raise DecodeError("has NaN or infinite pixels; replace them before it is used")
        if array.min() < 0.0 or array.max() > 1.0:
            raise DecodeError(f"has float pixels in [{array.min():g}, {array.max():g}]; scale them to [0, 1]")
        array = np.rint(array.astype(np.float64) * 65535.0).astype(np.uint16)
    num_colours = 3 if photometric == 2 else 1
    if array.shape[2] > num_colours + 1:
        raise DecodeError(f"has {array.shape[2]} channels; save it as grey, RGB or RGBA")
    colours, extra = array[:, :, :num_colours], array[:, :, num_colours:]
    if photometric == 0:  # 0 is white
        colours = 65535 - colours
    if extra.size and page.extrasamples and int(page.extrasamples[0]) == 1:  # colours premultiplied by alpha
        colours = np.minimum(np.rint(colours * (65535.0 / np.maximum(extra, 1))), 65535).astype(np.uint16)
    orientation = page.tags.valueof(ORIENTATION, default=1)
    icc_profile = page.tags.valueof(34675)
    return _assemble(np.concatenate([colours, extra], axis=2), orientation, icc_profile, _tiff_exif(data))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
