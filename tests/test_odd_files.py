"""Image files as other programs and ill-meaning people write them: what is kept, what is said, and that decoding ends."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, PngImagePlugin, features

from apps import sources
from ebt_vision.data import decoded, decoding
from ebt_vision.data.decoding import DecodeError, decode_image, to_rgb8
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.image_files import ImageFile, ImageFileError, losses, quantise, read_image, write_image

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def noise(height=16, width=24, channels=3, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def png_of(array, *chunks):
    """(H, W, C) uint16 -> PNG with the chunks before its pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def looping_tiff(big=False):
    """Two pages; the second one's next page is the first."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, bigtiff=big, byteorder="<") as writer:
        for seed in (0, 1):
            writer.write(noise(seed=seed), photometric="rgb", metadata=None)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        first, second = (page.offset for page in tiff.pages)
    if big:
        at = second + 8 + 20 * struct.unpack_from("<Q", data, second)[0]
        struct.pack_into("<Q", data, at, first)
    else:
        at = second + 2 + 12 * struct.unpack_from("<H", data, second)[0]
        struct.pack_into("<I", data, at, first)
    return bytes(data)


@pytest.mark.parametrize("big", [False, True])
def test_pages_that_lead_back_to_an_earlier_one_are_refused_at_once(tmp_path, big):
    (tmp_path / "loop.tif").write_bytes(looping_tiff(big))
    start = time.perf_counter()
    with pytest.raises(ImageFileError, match="lead back"):
        read_image(tmp_path / "loop.tif")
    with pytest.raises(ImageFileError, match="lead back"):  # on the page
        sources.open_source(sources.Request(path=str(tmp_path / "loop.tif")))
    Image.fromarray(noise()).save(tmp_path / "good.png")
    images = load_image_set(DataConfig(path=str(tmp_path), img_size=8))  # in training
    assert len(images) == 1 and "lead back" in images.skipped[0][1]
    assert time.perf_counter() - start < 5


def test_a_tiff_of_very_many_pages_is_refused_without_looking_at_all(tmp_path):
    page = struct.pack("<H", 0)
    data = b"II*\0" + struct.pack("<I", 8) + b"".join(page + struct.pack("<I", 8 + 6 * (n + 1)) for n in range(500_000))
    start = time.perf_counter()
    with pytest.raises(DecodeError, match="more than 256"):
        decode_image(data)
    assert time.perf_counter() - start < 2


def test_a_tiff_whose_fields_all_claim_the_whole_file_takes_no_memory_for_them():
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    data += b"\0" * (len(data) % 2)
    (start,) = struct.unpack_from("<I", data, 4)
    count = struct.unpack_from("<H", data, start)[0]
    entries = bytes(data[start + 2 : start + 2 + 12 * count])
    size = 2**20
    evil = b"".join(struct.pack("<HHII", 60_000 + n, 7, size, 8) for n in range(2000))  # 2 GB in a file of 1 MB
    struct.pack_into("<I", data, 4, len(data))
    data += struct.pack("<H", count + 2000) + entries + evil + b"\0" * 4 + b"\0" * size
    found = decode_image(bytes(data))
    assert np.array_equal(found.pixels, noise())
    assert "cannot be read" in found.notes[0]


@pytest.mark.parametrize("compression", ["zlib", "lzma"])
def test_a_strip_that_holds_far_more_than_its_pixels_is_refused(compression):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(dtype=np.uint16), photometric="rgb", compression="zlib", metadata=None, byteorder="<")
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        tags = tiff.pages.first.tags
        offsets, counts, kind = tags[273].valueoffset, tags[279].valueoffset, tags[259].valueoffset
    import lzma

    packed = zlib.compress(bytes(10**7)) if compression == "zlib" else lzma.compress(bytes(10**7))
    struct.pack_into("<H", data, kind, 8 if compression == "zlib" else 34925)
    struct.pack_into("<I" if tags[273].dtype == 4 else "<H", data, offsets, len(data))
    struct.pack_into("<I" if tags[279].dtype == 4 else "<H", data, counts, len(packed))
    with pytest.raises(DecodeError, match="more than its pixels"):
        decode_image(bytes(data) + packed)


def test_a_jpeg_of_very_many_scans_is_refused_by_its_markers(monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "JPEG", progressive=True)
    assert decode_image(buffer.getvalue()).pixels.shape == (16, 24, 3)
    monkeypatch.setattr(decoding, "MAX_SCANNED", 16 * 24 * 5)
    with pytest.raises(DecodeError, match="scans"):
        decode_image(buffer.getvalue())


def test_reading_ends_after_the_longest_time(monkeypatch):
    """A GIF's comments are joined in a time that grows with their square."""
    buffer = io.BytesIO()
    Image.fromarray(noise()[:, :, 0]).save(buffer, "GIF")
    data = buffer.getvalue()
    place = data.index(b"\x2c", 13 + 768)
    comment = b"\x21\xfe" + (b"\xff" + b"a" * 255) * 100 + b"\0"
    data = data[:place] + comment + data[place:]
    assert len(decode_image(data).metadata.comment) == 25_500
    monkeypatch.setattr(decoded, "MAX_SECONDS", 0.0)
    for content in (data, png_of(noise(dtype=np.uint16)), looping_tiff()[:8] + looping_tiff()[8:]):
        with pytest.raises(DecodeError, match="takes more than|lead back"):
            decode_image(content)


def test_an_animation_of_any_length_is_refused(tmp_path):
    frames = [Image.fromarray(noise(seed=n)) for n in range(3)]
    for suffix, options in [(".gif", {}), (".webp", {}), (".png", {}), (".tif", {})]:
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
        with pytest.raises(ImageFileError, match="3 frames or pages"):
            read_image(tmp_path / f"a{suffix}")
    data = (tmp_path / "a.gif").read_bytes()
    comment = b"\x21\xfe" + (b"\xff" + b"a" * 255) * 4200 + b"\0"  # after 1 MB frames are not counted
    with pytest.raises(DecodeError, match="several frames"):
        decode_image(data[:-1] + comment + b"\x3b")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("thumbnail_first", [False, True])
def test_the_full_size_page_of_a_tiff_is_read(tmp_path, dtype, thumbnail_first):
    picture, small = noise(dtype=dtype), noise(8, 12, dtype=dtype, seed=1)
    pages = [(picture, 0), (small, 1)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for array, kind in reversed(pages) if thumbnail_first else pages:
            writer.write(array, photometric="rgb", subfiletype=kind, metadata=None)
    image = read_image(tmp_path / "a.tif")
    assert np.array_equal(quantise(image.pixels, image.bit_depth).transpose(1, 2, 0), picture)


def exif_with(*entries, order=">"):
    """An EXIF block of entries (tag, type, count, four bytes), and what is put after it."""
    head = b"MM\0*" if order == ">" else b"II*\0"
    fields = b"".join(struct.pack(order + "HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, len(entries)) + fields + bytes(4) + b"A camera\0Somebody\0"


MALFORMED = {
    "outside": (0x010E, 2, 100, struct.pack(">I", 10**6)),
    "far too long": (0x010E, 2, 2**32 - 1, struct.pack(">I", 20)),
    "of no type": (0x010E, 99, 1, b"\0\0\0\1"),
    "a block outside": (0x8769, 4, 1, struct.pack(">I", 10**6)),
    "a block that is the first": (0x8769, 4, 1, struct.pack(">I", 8)),
    "a text of numbers": (0x9286, 5, 3, struct.pack(">I", 20)),
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_malformed_exif_field_costs_nothing_but_itself(tmp_path, kind, orientation, place, suffix):
    text = 8 + 2 + 12 * 3 + 4
    entries = [
        (0x0110, 2, 9, struct.pack(">I", text)),
        (0x0112, 3, 1, struct.pack(">HH", orientation, 0)),
    ]
    entries.insert(place, MALFORMED[kind])
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:, :12] = 255
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif_with(*entries))
    image = read_image(tmp_path / f"a{suffix}")
    bright = image.pixels.mean(0) > 0.5
    expected = np.rot90(stored[:, :, 0] > 0, -1) if orientation == 6 else stored[:, :, 0] > 0
    assert (bright.numpy() == expected).mean() > 0.95
    exif = Image.Exif()
    exif.load(image.exif)
    assert exif[ExifTags.Base.Model] == "A camera" and exif[ExifTags.Base.Orientation] == 1
    if kind != "a text of numbers":
        assert len(image.notes) == 1 and "left out" in image.notes[0]
    write_image(tmp_path / f"b{suffix}", image)
    assert read_image(tmp_path / f"b{suffix}").notes == ()


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_exif_block_of_any_bytes_never_hides_the_orientation(order):
    """Each byte of the field before it is changed to others."""
    block = exif_with(
        (0x010F, 2, 9, struct.pack(order + "I", 38)), (0x0112, 3, 1, struct.pack(order + "HH", 6, 0)), order=order
    )
    pixels = Image.fromarray(noise())
    for place in range(16, 28):
        for value in (0, 1, 0x69, 0xFF):
            changed = bytearray(block)
            changed[place] = value
            buffer = io.BytesIO()
            pixels.save(buffer, "JPEG", exif=bytes(changed))
            assert decode_image(buffer.getvalue()).pixels.shape == (24, 16, 3), (place, value)


def test_an_exif_block_that_is_none_is_left_out_and_said():
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "JPEG", exif=b"Exif\0\0nothing of the kind")
    image = decode_image(buffer.getvalue())
    assert image.exif is None and "damaged" in image.notes[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_16_bit_png_becomes_alpha(tmp_path, channels):
    array = noise(channels=channels, dtype=np.uint16)
    array[3:6, 4:9] = np.arange(1, channels + 1) * 257 + 1
    colour = struct.pack(f">{channels}H", *(np.arange(1, channels + 1) * 257 + 1))
    (tmp_path / "a.png").write_bytes(png_of(array, (b"tRNS", colour)))
    image = read_image(tmp_path / "a.png")
    assert image.mode == ("LA" if channels == 1 else "RGBA") and image.bit_depth == 16
    hidden = np.zeros((16, 24), bool)
    hidden[3:6, 4:9] = True
    assert np.array_equal(image.alpha[0].numpy() == 0, hidden) and float(image.alpha.max()) == 1.0
    write_image(tmp_path / "b.png", image)
    assert torch.equal(read_image(tmp_path / "b.png").alpha, image.alpha)


COLOURS = {
    b"gAMA": struct.pack(">I", 100_000),
    b"cHRM": struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600),
    b"cICP": b"\x09\x10\0\1",
}


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("name", COLOURS)
def test_how_a_png_describes_its_colours_is_kept_or_said_to_be_lost(tmp_path, bit_depth, name):
    data = png_of(noise(dtype=np.uint16), (name, COLOURS[name]))
    if bit_depth == 8:
        info = PngImagePlugin.PngInfo()
        info.add(name, COLOURS[name])
        buffer = io.BytesIO()
        Image.fromarray(noise()).save(buffer, "PNG", pnginfo=info)
        data = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(data)
    image = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", image)
    written = (tmp_path / "b.png").read_bytes()
    place = written.index(name)
    assert written[place + 4 : place + 4 + len(COLOURS[name])] == COLOURS[name] and place < written.index(b"IDAT")
    assert losses("b.png", image) == []
    assert any("colours" in loss for loss in losses("b.jpg", image))
    with Image.open(tmp_path / "b.png") as other:
        other.load()


@pytest.mark.parametrize("magic", [2, 3, 5, 6])
@pytest.mark.parametrize("top", [65535, 1023])
def test_pgm_and_ppm_of_more_than_8_bits(tmp_path, magic, top):
    channels = 3 if magic in (3, 6) else 1
    values = np.random.default_rng(0).integers(0, top + 1, (16, 24, channels))
    header = f"P{magic}\n# a comment\n24 16\n{top}\n".encode()
    body = values.astype(">u2").tobytes() if magic > 3 else " ".join(map(str, values.ravel())).encode()
    (tmp_path / "a.ppm").write_bytes(header + body)
    image = read_image(tmp_path / "a.ppm")
    assert image.bit_depth == 16 and image.mode == ("RGB" if channels == 3 else "L")
    found = quantise(image.pixels[:channels], 16).transpose(1, 2, 0)
    assert np.array_equal(found, np.rint(values * (65535 / top)).astype(np.uint16))
    (tmp_path / "cut.ppm").write_bytes((header + body)[:-600])
    with pytest.raises(ImageFileError, match="truncated"):
        read_image(tmp_path / "cut.ppm")


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_resolution_survives(tmp_path, suffix, bit_depth):
    Image.fromarray(noise()).save(tmp_path / "a.png", dpi=(300, 150))
    image = read_image(tmp_path / "a.png")
    deep = ImageFile(pixels=image.pixels, bit_depth=bit_depth, metadata=image.metadata)
    write_image(tmp_path / f"b{suffix}", deep)
    for name in ("a.png", f"b{suffix}"):
        assert read_image(tmp_path / name).metadata.dpi == pytest.approx((300, 150), abs=0.02)
    with Image.open(tmp_path / f"b{suffix}") as other:
        assert tuple(map(float, other.info["dpi"])) == pytest.approx((300, 150), abs=0.02)


def test_resolution_is_turned_with_the_pixels_and_not_made_up(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise()).save(tmp_path / "a.jpg", exif=exif, dpi=(300, 150))
    assert read_image(tmp_path / "a.jpg").metadata.dpi == (150, 300)
    Image.fromarray(noise()).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").metadata.dpi is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_extra_channel_that_is_not_called_alpha_is_left_out_and_said(tmp_path, dtype):
    array = noise(channels=4, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unspecified"])
    image = read_image(tmp_path / "a.tif")
    assert image.mode == "RGB" and "extra channel" in image.notes[0]
    assert np.array_equal(quantise(image.pixels, image.bit_depth).transpose(1, 2, 0), array[:, :, :3])
    tifffile.imwrite(tmp_path / "b.tif", array, photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(tmp_path / "b.tif").mode == "RGBA"


def test_exif_that_imagemagick_writes_as_text_is_kept(tmp_path):
    block = exif_with((0x0110, 2, 9, struct.pack(">I", 38)), (0x0112, 3, 1, struct.pack(">HH", 6, 0)))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    Image.fromarray(noise()).save(tmp_path / "a.png", pnginfo=info)
    image = read_image(tmp_path / "a.png")
    exif = Image.Exif()
    exif.load(image.exif)
    assert image.pixels.shape == (3, 24, 16) and exif[ExifTags.Base.Model] == "A camera"


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="A title"/></x:xmpmeta>'


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_xmp_survives_with_its_orientation_reset(tmp_path, suffix, bit_depth):
    Image.fromarray(noise()).save(tmp_path / "a.webp", xmp=XMP, lossless=True)
    image = read_image(tmp_path / "a.webp")
    assert image.pixels.shape == (3, 24, 16)  # it was turned
    write_image(tmp_path / f"b{suffix}", ImageFile(pixels=image.pixels, bit_depth=bit_depth, metadata=image.metadata))
    again = read_image(tmp_path / f"b{suffix}")
    assert again.pixels.shape == (3, 24, 16)
    assert again.metadata.xmp == XMP.replace(b'"6"', b'"1"')


def test_comments_and_texts_survive_in_their_own_format(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.jpg", comment=b"A comment")
    write_image(tmp_path / "b.jpg", read_image(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "b.jpg") as other:
        assert other.info["comment"] == b"A comment"
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "A title")
    Image.fromarray(noise()).save(tmp_path / "a.png", pnginfo=info)
    image = read_image(tmp_path / "a.png")
    for depth in (8, 16):
        write_image(tmp_path / f"{depth}.png", ImageFile(pixels=image.pixels, bit_depth=depth, metadata=image.metadata))
        with Image.open(tmp_path / f"{depth}.png") as other:
            assert other.text == {"Title": "A title"}
    assert any("texts" in loss for loss in losses("a.jpg", image))


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0o600)
    image = read_image(tmp_path / "a.png")
    write_image(tmp_path / "a.png", image, overwrite=True)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o600
    before = os.umask(0o027)
    try:
        write_image(tmp_path / "b.png", image)
    finally:
        os.umask(before)
    assert (tmp_path / "b.png").stat().st_mode & 0o777 == 0o640


def test_what_a_format_cannot_hold_is_said():
    image = ImageFile(pixels=torch.zeros(3, 16, 16), alpha=torch.ones(1, 16, 16), mode="RGBA", bit_depth=16)
    assert len(losses("a.jpg", image)) == 2 and len(losses("a.webp", image)) == 1
    assert losses("a.png", image) == losses("a.tif", image) == []


HIDING = np.zeros((32, 48), np.float32)
HIDING[8:24, 10:40] = 1.0
HIDING[9, 11:30] = 0.5


def with_hidden(colour):
    pixels = torch.from_numpy(noise(32, 48).astype(np.float32) / 255).permute(2, 0, 1)
    alpha = torch.from_numpy(HIDING)[None]
    pixels = torch.where(alpha == 0, torch.as_tensor(colour).expand_as(pixels), pixels)
    return ImageFile(pixels=pixels, alpha=alpha, mode="RGBA")


def test_colours_hidden_under_alpha_0_have_no_influence_and_stay():
    wild = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1))
    images = [with_hidden(0.0), with_hidden(1.0), with_hidden(wild)]
    visible = [image.visible_pixels() for image in images]
    assert torch.equal(visible[0], visible[1]) and torch.equal(visible[0], visible[2])
    seen = images[0].alpha[0] > 0
    assert torch.equal(visible[0][:, seen], images[0].pixels[:, seen])
    assert torch.equal(visible[0][:, 0, 0], images[0].pixels[:, 8, 10])  # the nearest that is seen
    done = images[2].with_pixels(visible[2] * 0.5)
    assert torch.equal(done.pixels[:, ~seen], wild[:, ~seen])
    assert torch.equal(done.pixels[:, seen], visible[2][:, seen] * 0.5)
    opaque = ImageFile(pixels=wild)
    assert opaque.visible_pixels() is opaque.pixels
    nothing = ImageFile(pixels=wild, alpha=torch.zeros(1, 32, 48), mode="RGBA")
    assert torch.equal(nothing.visible_pixels(), torch.zeros_like(wild))


def test_hidden_colours_do_not_matter_to_the_command_line_the_page_and_training(tmp_path, tiny_checkpoint):
    from ebt_vision.cli import main

    results = []
    for name, colour in (("black", 0.0), ("white", 1.0)):
        write_image(tmp_path / f"{name}.png", with_hidden(colour))
        args = [str(tmp_path / f"{name}.png"), "--output", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
        assert main(["denoise", *args, "--add-noise", "25", "--device", "cpu"]) == 0
        results.append(read_image(tmp_path / "out" / f"{name}.png"))
    seen = results[0].alpha[0] > 0
    assert torch.equal(results[0].pixels[:, seen], results[1].pixels[:, seen])
    black, white = (tmp_path / f"{name}.png" for name in ("black", "white"))
    page = [sources.open_source(sources.Request(path=str(path))).noisy for path in (black, white)]
    assert torch.equal(page[0], page[1])
    assert np.array_equal(*(to_rgb8(decode_image(path.read_bytes())) for path in (black, white)))


@pytest.mark.parametrize("size", [8, 12, 16])
@pytest.mark.parametrize("colour", [(255, 0, 0), (255, 255, 0), (20, 60, 220)])
def test_a_small_flat_icon_keeps_its_colour(size, colour):
    from ebt_vision.checkpoint import default_pretrained
    from ebt_vision.denoiser import for_photographs, load_denoiser
    from ebt_vision.tiling import denoise_tiled

    denoiser = for_photographs(load_denoiser(default_pretrained()))
    pixels = (torch.tensor(colour) / 255)[:, None, None].expand(3, size, size)
    alpha = torch.ones(1, size, size)
    alpha[:, :2] = alpha[:, :, :2] = 0.0
    icon = ImageFile(pixels=torch.where(alpha > 0, pixels, 1 - pixels), alpha=alpha, mode="RGBA")
    done = icon.with_pixels(denoise_tiled(denoiser, icon.visible_pixels()).image[0])
    mean = done.pixels[:, alpha[0] > 0].mean(dim=1)
    assert (mean - torch.tensor(colour) / 255).abs().max() < 0.01


def test_damaged_tiffs_get_our_line_alone(tmp_path):
    """libtiff and Python's warnings are silent, too."""
    script = """
import sys
from ebt_vision.image_files import ImageFileError, read_image
for path in sys.argv[1:]:
    try:
        read_image(path)
    except ImageFileError as error:
        print(error)
"""
    kinds = ["tiff_lzw", "tiff_deflate", "jpeg", "packbits", None]
    paths = []
    for kind in kinds if features.check("libtiff") else [None]:
        Image.fromarray(noise(64, 64)).save(tmp_path / "whole.tif", compression=kind)
        data = (tmp_path / "whole.tif").read_bytes()
        for seed in range(30):
            generator = np.random.default_rng(seed)
            bad = bytearray(data)
            for place in generator.integers(8, len(data), 20):
                bad[place] = generator.integers(256)
            paths.append(tmp_path / f"{kind}{seed}.tif")
            paths[-1].write_bytes(bad[: len(data) // 2] if seed % 3 == 0 else bad)
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") > 20 and all(line.startswith(str(tmp_path)) for line in done.stdout.splitlines())


def test_what_is_not_supported_is_not_called_damaged(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    for place, value in [(14, struct.pack("<I", 77)), (30, struct.pack("<I", 9)), (28, struct.pack("<H", 7))]:
        changed = bytes(data[:place]) + value + bytes(data[place + len(value) :])
        with pytest.raises(DecodeError, match="not supported") as caught:
            decode_image(changed)
        assert "damaged" not in str(caught.value)


def tiff_of_compression(number, dtype):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(dtype=dtype), photometric="rgb", metadata=None)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        struct.pack_into("<H", data, tiff.pages.first.tags[259].valueoffset, number)
    return bytes(data)


@pytest.mark.parametrize(("number", "dtype"), [(5, np.uint16), (50001, np.uint8), (34887, np.uint8)])
def test_a_compression_that_needs_imagecodecs_names_the_extra(number, dtype):
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        with pytest.raises(DecodeError, match=r"ebt_vision\[tiff\]"):
            decode_image(tiff_of_compression(number, dtype))
    else:
        pytest.skip("imagecodecs is installed")


def test_a_compression_that_nobody_knows_is_not_supported():
    for dtype in (np.uint8, np.uint16):
        with pytest.raises(DecodeError, match="not supported"):
            decode_image(tiff_of_compression(12345, dtype))


def test_a_12_bit_tiff_names_its_bits(tmp_path):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(channels=1, dtype=np.uint16)[:, :, 0], metadata=None)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        struct.pack_into("<H", data, tiff.pages.first.tags[258].valueoffset, 12)
    with pytest.raises(DecodeError, match="12-bit"):
        decode_image(bytes(data))


def test_a_heic_without_its_plugin_names_the_extra(monkeypatch):
    monkeypatch.setattr(decoding, "pillow_heif", None)
    monkeypatch.setattr(decoding, "FORMATS", tuple(name for name in decoding.FORMATS if name != "HEIF"))
    with pytest.raises(DecodeError, match=r'pip install "ebt_vision\[heic\]"') as caught:
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_read_upright(tmp_path, orientation):
    pytest.importorskip("pillow_heif")
    smooth = np.zeros((64, 96, 3), np.uint8)
    smooth[:, :48] = (200, 40, 40)
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "A telephone"
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(smooth).save(tmp_path / "a.heic", format="HEIF", quality=90, exif=exif.tobytes())
    image = read_image(tmp_path / "a.heic")
    expected = np.rot90(smooth, -1) if orientation == 6 else smooth
    error = np.abs(quantise(image.pixels).transpose(1, 2, 0).astype(int) - expected)
    assert np.median(error) < 4
    kept = Image.Exif()
    kept.load(image.exif)
    assert kept[ExifTags.Base.Model] == "A telephone" and kept.get(ExifTags.Base.Orientation, 1) == 1


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_read_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "A telephone"
    exif[ExifTags.Base.Orientation] = orientation
    smooth = np.full((64, 96, 3), 40, np.uint8)
    smooth[:, :48] = 200
    Image.fromarray(smooth).save(tmp_path / "a.avif", quality=90, exif=exif)
    image = read_image(tmp_path / "a.avif")
    expected = np.rot90(smooth, -1) if orientation == 6 else smooth
    assert np.abs(quantise(image.pixels).transpose(1, 2, 0).astype(int) - expected).mean() < 4
    found = load_image_set(DataConfig(path=str(tmp_path), img_size=16))
    assert len(found) == 1


@pytest.mark.parametrize("words", [["", "--output", "o"], ["a.png", "--output", ""], ["a.png", "--output="]])
def test_an_empty_argument_is_refused(tmp_path, monkeypatch, capsys, words):
    from ebt_vision.cli import main

    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise()).save("a.png")
    with pytest.raises(SystemExit) as caught:
        main(["denoise", *words])
    assert caught.value.code == 2 and "empty" in capsys.readouterr().err
    assert os.listdir() == ["a.png"]


def test_empty_names_are_refused_in_python_and_by_the_programs():
    from ebt_vision.checks import named_path
    from ebt_vision.image_files import find_images

    for call in (lambda: read_image(""), lambda: find_images([""])):
        with pytest.raises(ImageFileError, match="empty"):
            call()
    with pytest.raises(Exception, match="empty"):
        named_path("")
    assert all("type=Path" not in path.read_text() for path in (ROOT / "eval").glob("*.py"))
