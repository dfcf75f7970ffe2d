"""Samples and metadata -> the bytes of a PNG, JPEG, WebP or TIFF file."""

import io
import os
import struct
import zlib
from typing import Protocol

import numpy as np
import tifffile
from PIL import ExifTags, Image, PngImagePlugin

from ebt_vision.data.metadata import IPTC_RESOURCE, IPTC_TAG, PNG_SIGNATURE, TIFF_TAGS_KEPT, Metadata, tiff_directory

JPEG_QUALITY = 95
DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that can hold 16 bits."""
MAX_SEGMENT = 65_502
"""Maximum bytes of XMP, IPTC or a comment in one segment of a JPEG."""


class Description(Protocol):
    """The metadata to write with the samples."""

    @property
    def icc_profile(self) -> bytes | None: ...

    @property
    def exif(self) -> bytes | None: ...

    @property
    def metadata(self) -> Metadata: ...


def encode(suffix: str, array: np.ndarray, image: Description) -> bytes:
    """Encode (H, W, C) to the bytes of a file: uint8, or uint16 for PNG and TIFF; C = 1..4, and alpha is last if C is even."""
    if suffix in (".tif", ".tiff"):
        return _encode_tiff(array, image)
    if suffix == ".png":
        return _encode_png16(array, image) if array.dtype == np.uint16 else _encode_png8(array, image)
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    metadata = image.metadata
    written: dict[str, object] = {"icc_profile": image.icc_profile, "exif": image.exif, "xmp": metadata.xmp}
    buffer = io.BytesIO()
    if suffix == ".webp":
        options = {name: value for name, value in written.items() if value}
        picture.save(buffer, "WEBP", lossless=True, exact=True, **options)
        return buffer.getvalue()
    if array.shape[2] in (2, 4):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    written |= {"dpi": metadata.dpi and tuple(min(round(value), 65_535) for value in metadata.dpi)}
    written |= {"comment": metadata.comment and metadata.comment[:MAX_SEGMENT]}
    if metadata.xmp and len(metadata.xmp) > MAX_SEGMENT:
        del written["xmp"]
    if metadata.iptc and len(metadata.iptc) <= MAX_SEGMENT:
        written["extra"] = _iptc_segment(metadata.iptc)
    options = {name: value for name, value in written.items() if value}
    picture = picture.convert("L" if array.shape[2] <= 2 else "RGB")
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, **options)
    return buffer.getvalue()


def _iptc_segment(iptc: bytes) -> bytes:
    """Return the segment APP13 of a JPEG with only IPTC: one image resource without a name, padded to an even length."""
    resource = b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
    content = b"Photoshop 3.0\0" + resource
    return b"\xff\xed" + struct.pack(">H", 2 + len(content)) + content


def _encode_png8(array: np.ndarray, image: Description) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for name, content in _png_chunks(image):
        chunks.add(name, content)
    options = {"icc_profile": image.icc_profile, "exif": image.exif, "dpi": image.metadata.dpi}
    buffer = io.BytesIO()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    # zlib's level 3 takes half as long as its default, 6, and photographs do not get larger.
    picture.save(buffer, "PNG", compress_level=3, pnginfo=chunks, **{name: value for name, value in options.items() if value})
    return buffer.getvalue()


def _png_chunks(image: Description) -> list[tuple[bytes, bytes]]:
    """Return the PNG chunks other than profile, EXIF and resolution: colours, texts and XMP."""
    metadata = image.metadata
    texts = PngImagePlugin.PngInfo()
    for key, value in metadata.text:
        texts.add_itxt(key[:79], value, zip=len(value) > 1000)
    if metadata.xmp:
        texts.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
    colour = () if image.icc_profile else metadata.png_colour
    return [*colour, *((chunk[0], chunk[1]) for chunk in texts.chunks)]


def _encode_png16(array: np.ndarray, image: Description) -> bytes:
    """Encode a 16-bit PNG, which Pillow cannot write (PNG specification, third edition, sec. 5, 9 and 11)."""

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
    parts += [chunk(name, content) for name, content in _png_chunks(image)]
    if image.metadata.dpi:
        parts.append(chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in image.metadata.dpi), 1)))
    if image.exif:
        parts.append(chunk(b"eXIf", image.exif.removeprefix(b"Exif\0\0")))
    parts += [chunk(b"IDAT", zlib.compress(filtered.tobytes())), chunk(b"IEND", b"")]
    return b"".join(parts)


def _encode_tiff(array: np.ndarray, image: Description) -> bytes:
    """Encode a TIFF with tifffile; Pillow cannot write 16-bit colour, and cannot compress if there is an EXIF block."""
    exif = Image.Exif()
    if image.exif:
        exif.load(image.exif)
    kept = {name: exif[ExifTags.Base[name]] for name in TIFF_TAGS_KEPT if ExifTags.Base[name] in exif}
    tags: list[tuple] = [(ExifTags.Base[name].value, "s", 0, str(kept[name]), True) for name in kept if "Resol" not in name]
    blocks = {int(ifd): fields for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) if (fields := exif.get_ifd(ifd))}
    # tifffile writes no pointer to an EXIF block, so a placeholder number holds its position until the block is written.
    tags += [(ifd - 1, "I", 1, 0, True) for ifd in blocks]
    if image.metadata.iptc:
        tags.append((IPTC_TAG, "B", len(image.metadata.iptc), image.metadata.iptc, True))
    if image.metadata.xmp:
        tags.append((700, "B", len(image.metadata.xmp), image.metadata.xmp, True))
    resolution, unit = image.metadata.dpi, 2
    if "XResolution" in kept and "YResolution" in kept:
        resolution, unit = (float(kept["XResolution"]), float(kept["YResolution"])), kept.get("ResolutionUnit", 2)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array[:, :, 0] if array.shape[2] == 1 else array,
        byteorder="<",
        photometric="rgb" if array.shape[2] >= 3 else "minisblack",
        planarconfig="contig" if array.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if array.shape[2] in (2, 4) else None,
        compression="zlib",
        iccprofile=image.icc_profile,
        extratags=tags,
        resolution=resolution,
        resolutionunit=unit if resolution else None,
        metadata=None,
        software=False,
    )
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as tiff:
        entries = {ifd: tiff.pages.first.tags[ifd - 1].offset for ifd in blocks}
    for ifd, fields in blocks.items():
        start = buffer.seek(0, os.SEEK_END)
        start += buffer.write(b"\0" * (start % 2))  # an IFD begins on a word boundary
        buffer.write(tiff_directory(fields, ifd, start))
        buffer.seek(entries[ifd])
        buffer.write(struct.pack("<HHII", ifd, 4, 1, start))  # an entry: tag, type LONG, count, value
    return buffer.getvalue()
