"""Metadata of an image file: EXIF, XMP, IPTC, resolution, comments, and PNG's description of colours."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import ExifTags, Image, TiffImagePlugin

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_TAGS_KEPT = (
    *("ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "Copyright"),
    *("XResolution", "YResolution", "ResolutionUnit"),
)
ORIENTATION = ExifTags.Base.Orientation.value
IPTC_RESOURCE = 0x0404
"""Number of IPTC among Photoshop's image resources, which a JPEG stores in its segment APP13."""
IPTC_TAG = 33723
"""Number of IPTC among the tags of a TIFF."""
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
INTEROP = ExifTags.IFD.Interop
EXIF_BLOCKS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
POINTERS = (*EXIF_BLOCKS, INTEROP)
DAMAGED_EXIF = "its EXIF block is damaged and is left out"
MAX_ENTRIES = 4096
"""Maximum number of fields in one directory of a TIFF or EXIF block; cameras write fewer than a hundred."""
PNG_COLOUR_CHUNKS = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
MAX_PNG_CHUNKS = 10_000
EXIF_HEADER = b"Exif\0\0"
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes per value of each type of TIFF 6.0 and BigTIFF."""
NOT_TEXT = re.compile(r"Raw profile type|XML:com\.adobe\.xmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """Metadata of a file that another format can also hold."""

    dpi: tuple[float, float] | None = None
    """Pixels per inch, horizontal and vertical."""
    xmp: bytes | None = None
    """XMP packet; its orientation is 1."""
    iptc: bytes | None = None
    """IPTC records (caption, author, keywords) of a JPEG or TIFF, as stored."""
    comment: bytes | None = None
    """Comment of a JPEG or GIF."""
    text: tuple[tuple[str, str], ...] = ()
    """Keywords and texts of a PNG."""
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    """The PNG chunks cICP, sRGB, gAMA and cHRM, by name: the meaning of the pixels if there is no ICC profile."""

    def turned(self) -> "Metadata":
        """Return the metadata for the image rotated by 90 degrees."""
        return self if self.dpi is None else replace(self, dpi=(self.dpi[1], self.dpi[0]))


@dataclass(frozen=True, slots=True)
class Entry:
    """A field of a TIFF or EXIF directory."""

    tag: int
    size: int
    """Size of the value in bytes; -1 for an unknown type."""
    place: int
    """Position of the value in the data."""
    stored: bytes
    """The entry itself."""


@dataclass(frozen=True, slots=True)
class TiffLayout:
    """The number format of a TIFF, BigTIFF or EXIF block."""

    order: str
    big: bool

    @classmethod
    def of(cls, data: bytes) -> "TiffLayout":
        """Read the layout from the first four bytes. Raises ValueError for other bytes."""
        if data[:4] not in TIFF_SIGNATURES:
            raise ValueError("not a TIFF header")
        return cls("<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+"))

    @property
    def offset(self) -> str:
        """The struct code of an offset."""
        return "Q" if self.big else "I"

    @property
    def first(self) -> int:
        """Position of the offset of the first directory."""
        return 8 if self.big else 4

    def number(self, data: bytes | bytearray, place: int, code: str) -> int:
        """Read the integer at `place`. Raises ValueError beyond the end."""
        try:
            return struct.unpack_from(self.order + code, data, place)[0]
        except struct.error:
            raise ValueError("truncated directory") from None

    def directory(self, data: bytes | bytearray, start: int) -> tuple[list[Entry], int]:
        """Return the fields of the directory at `start`, and the position of the offset of the next one. Raises ValueError if
        damaged."""
        size, head = (20, 8) if self.big else (12, 2)
        count = self.number(data, start, "Q" if self.big else "H")
        if count > MAX_ENTRIES:
            raise ValueError(f"directory of {count} fields")
        entries = []
        for place in range(start + head, min(start + head + count * size, len(data) - size + 1), size):
            tag, kind = self.number(data, place, "H"), self.number(data, place + 2, "H")
            length = TYPE_SIZES.get(kind, -1)
            length = length if length < 0 else length * self.number(data, place + 4, self.offset)
            inside = place + (12 if self.big else 8)
            lies_here = length <= (8 if self.big else 4)
            target = inside if lies_here else self.number(data, inside, self.offset)
            entries.append(Entry(tag, length, target, bytes(data[place : place + size])))
        return entries, start + head + count * size


def clean_block(block: bytes, start: int | None = None) -> tuple[bytes, list[int]]:
    """Copy a TIFF or EXIF block with one directory (the first, or the one at `start`) and its sub-blocks. Leave out fields that
    point outside, and return their numbers. Pillow would stop at the first such field.

    All values together are at most four times as long as the block, so that a small file cannot fill the memory. Raises
    ValueError for a block with an unreadable header or directory.
    """
    layout, data = TiffLayout.of(block), bytearray(block)
    start = layout.number(block, layout.first, layout.offset) if start is None else start
    budget, dropped, seen = 4 * len(block) + 2**16, [], set()

    def clean(place: int) -> None:
        nonlocal budget
        seen.add(place)
        kept = []
        for entry in layout.directory(block, place)[0]:
            good = 0 <= entry.size <= budget and entry.place + entry.size <= len(block)
            budget -= entry.size if good else 0
            if good and entry.tag in POINTERS:
                target = layout.number(block, entry.place, layout.offset if entry.size == 8 else "I") if entry.size >= 4 else 0
                try:
                    good = target not in seen
                    if good:
                        clean(target)
                except ValueError:
                    good = False
            if good:
                kept.append(entry.stored)
            else:
                dropped.append(entry.tag)
        count = struct.pack(layout.order + ("Q" if layout.big else "H"), len(kept))
        fields = count + b"".join(kept)
        end = place + len(fields)
        data[place:end] = fields
        if place == start:  # no directory follows; some programs omit this offset in sub-blocks
            data[end : end + struct.calcsize("=" + layout.offset)] = bytes(struct.calcsize("=" + layout.offset))

    clean(start)
    struct.pack_into(layout.order + layout.offset, data, layout.first, start)
    return bytes(data), dropped


def read_exif(image: Image.Image) -> tuple[int, bytes | None, tuple[str, ...]]:
    """Return (orientation, EXIF block with the orientation reset or None, notes on unreadable fields that are left out)."""
    block = _stored_block(image)
    if not block:
        return _xmp_orientation(image), None, () if block is None else (DAMAGED_EXIF,)
    exif = Image.Exif()
    try:
        block, dropped = clean_block(block)
        exif.load(block)
    except Exception:  # a damaged block raises almost any error, but the pixels are still good
        return _xmp_orientation(image), None, (DAMAGED_EXIF,)
    kept, unwritable = readable_exif(exif)
    orientation = kept.get(ORIENTATION, _xmp_orientation(image))
    if orientation not in range(1, 9):
        orientation = 1
    if ORIENTATION in kept:
        kept[ORIENTATION] = 1
    return orientation, kept.tobytes() if len(kept) else None, field_note(dropped + unwritable)


def readable_exif(exif: Image.Exif) -> tuple[Image.Exif, list[int]]:
    """Return the fields that can be written again, and the numbers of the others."""
    kept, dropped = Image.Exif(), []
    for tag in list(exif):
        if tag in EXIF_BLOCKS:
            continue
        try:
            kept[tag] = _written_alone(tag, exif[tag])
        except Exception:  # as above
            dropped.append(tag)
    for block in EXIF_BLOCKS:
        try:
            stored = exif.get(block)
            fields = dict(stored if isinstance(stored, dict) else exif.get_ifd(block))
            if isinstance(fields.get(INTEROP), int):
                fields[INTEROP] = exif.get_ifd(INTEROP)
        except Exception:
            dropped.append(int(block))
            continue
        good = {}
        for tag, value in fields.items():
            try:
                _written_alone(int(block), {tag: value})
                good[tag] = value
            except Exception:
                dropped.append(tag)
        if good:
            kept[block] = good
    return kept, dropped


def tiff_exif(data: bytes) -> tuple[bytes | None, tuple[str, ...]]:
    """Return a TIFF's descriptive tags, EXIF and GPS as an EXIF block, without the tags about storage of the pixels; and notes.

    `data` comes from clean_block.
    """
    try:
        tags, kept = Image.Exif(), Image.Exif()
        tags.load(data)
        has_unit = tags.get(ExifTags.Base.ResolutionUnit, 2) != 1
        for name in TIFF_TAGS_KEPT:
            if ExifTags.Base[name] in tags and (has_unit or "Resolution" not in name):
                kept[ExifTags.Base[name]] = tags[ExifTags.Base[name]]
        for ifd in EXIF_BLOCKS:
            if fields := tags.get_ifd(ifd):
                kept[ifd] = {tag: value for tag, value in fields.items() if tag != INTEROP}
    except Exception:  # as above
        return None, (DAMAGED_EXIF,)
    kept, dropped = readable_exif(kept)
    return kept.tobytes() if len(kept) else None, field_note(dropped)


def upright_xmp(xmp: bytes | str | None) -> bytes | None:
    """Return the packet with tiff:Orientation reset to 1, because the pixels are upright; None for an empty packet."""
    data = xmp.encode() if isinstance(xmp, str) else xmp
    return re.sub(rb'(tiff:Orientation(?:="|>))[0-9]', rb"\g<1>1", data) if data else None


def read_metadata(image: Image.Image, data: bytes) -> Metadata:
    """Return resolution, XMP, IPTC, comment, texts and PNG colours of an image that Pillow has opened from `data`."""
    info = image.info
    dpi = info.get("dpi")
    if dpi == (72, 72) and info.get("jfif_unit") not in (1, 2) and image.format in ("JPEG", "MPO"):
        dpi = None  # Pillow invents a value for a JPEG without resolution
    comment = info.get("comment")
    is_png = data.startswith(PNG_SIGNATURE)
    colour = tuple(_png_colour(data)) if is_png else _heif_colour(info.get("nclx_profile"))
    text = {k: v for k, v in getattr(image, "text", {}).items() if not NOT_TEXT.match(k)} if is_png else {}
    return Metadata(
        dpi=usable_dpi(dpi),
        xmp=upright_xmp(info.get("xmp") or info.get("XML:com.adobe.xmp")),
        iptc=info.get("photoshop", {}).get(IPTC_RESOURCE) or None,
        comment=comment.encode() if isinstance(comment, str) else comment or None,
        text=tuple((str(key), str(value)) for key, value in text.items()),
        png_colour=() if info.get("icc_profile") else colour,
    )


def usable_dpi(dpi: object) -> tuple[float, float] | None:
    """Return two positive finite numbers, or None."""
    try:
        x, y = (float(value) for value in dpi)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1.0 <= x <= 1e5 and 1.0 <= y <= 1e5 else None


def _png_colour(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Return the chunks before the pixels that describe colours (PNG specification, third edition, sec. 11.3.2)."""
    place = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if place + 8 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IDAT":
            return
        if name in PNG_COLOUR_CHUNKS and length <= 32:
            yield name, data[place + 8 : place + 8 + length]
        place += 12 + length


def _heif_colour(profile: dict | None) -> tuple[tuple[bytes, bytes], ...]:
    """Return a HEIC's colour description (ITU-T H.273) as PNG chunks; empty for sRGB."""
    names = ("color_primaries", "transfer_characteristics")
    primaries, transfer = (int((profile or {}).get(name, 2)) for name in names)
    if 2 in (primaries, transfer) or (primaries, transfer) in ((1, 13), (1, 1), (1, 6)):  # 2 means unspecified
        return ()
    return ((b"cICP", bytes((primaries & 255, transfer & 255, 0, 1))),)  # RGB, full range


def _stored_block(image: Image.Image) -> bytes | None:
    """Return the EXIF block of a file that Pillow has opened, without its header."""
    block = image.info.get("exif")
    if block is None and "Raw profile type exif" in image.info:  # as ImageMagick stores it, in hexadecimal digits
        try:
            block = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        except ValueError:
            return b""
    return None if block is None else bytes(block).removeprefix(EXIF_HEADER)


def _xmp_orientation(image: Image.Image) -> int:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp.encode() if isinstance(xmp, str) else xmp)
    return int(found[1]) if found else 1


def _written_alone(tag: int, value: object) -> object:
    """Return `value` after a trial write; raises Pillow's error for a value that cannot be written."""
    trial = Image.Exif()
    trial[tag] = value
    trial.tobytes()
    return value


def field_note(dropped: list[int]) -> tuple[str, ...]:
    if not dropped:
        return ()
    names = [str(ExifTags.TAGS.get(tag, tag)) for tag in dropped[:5]]
    return (f"its EXIF fields {', '.join(names)}{' and others' if len(dropped) > 5 else ''} cannot be read and are left out",)


def tiff_directory(fields: dict, group: int, start: int) -> bytes:
    """Encode the fields of an EXIF or GPS block as a little-endian directory for position `start` of a TIFF."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=group)
    for tag, value in fields.items():
        if not isinstance(value, dict):
            directory[tag] = value
    return directory.tobytes(start)
