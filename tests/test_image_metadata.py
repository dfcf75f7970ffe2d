"""Metadata and hidden pixels of image files: which are kept, and which are left out with a note."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, IptcImagePlugin, PngImagePlugin
from test_odd_files import noise, png_of

from apps import sources
from ebt_vision.core.rng import make_generator
from ebt_vision.data.decoding import decode_image, to_rgb8
from ebt_vision.data.image_files import ImageFile, losses, read_image, write_image
from ebt_vision.data.metadata import Metadata
from ebt_vision.denoising.base import for_photographs
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.results import is_flat
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.checkpoint import default_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


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


# Two records of IPTC: number 2:105 (headline) and 2:25 (keyword), an odd number of bytes together.
IPTC = b"\x1c\x02\x69\x00\x08Headline" + b"\x1c\x02\x19\x00\x03key"


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_iptc_of_a_jpeg_survives_beside_the_rest(tmp_path, suffix, bit_depth):
    segment = b"Photoshop 3.0\0" + b"8BIM" + struct.pack(">HHI", 0x0404, 0, len(IPTC)) + IPTC + b"\0"
    extra = b"\xff\xed" + struct.pack(">H", 2 + len(segment)) + segment
    Image.fromarray(noise()).save(tmp_path / "a.jpg", extra=extra, comment=b"A comment", xmp=XMP)
    image = read_image(tmp_path / "a.jpg")
    assert image.metadata.iptc == IPTC and image.notes == ()
    write_image(tmp_path / f"b{suffix}", ImageFile(pixels=image.pixels, bit_depth=bit_depth, metadata=image.metadata))
    again = read_image(tmp_path / f"b{suffix}")
    assert again.metadata.iptc == IPTC and again.metadata.xmp == image.metadata.xmp
    with Image.open(tmp_path / f"b{suffix}") as other:
        assert IptcImagePlugin.getiptcinfo(other) == {(2, 105): b"Headline", (2, 25): b"key"}
        assert suffix == ".tif" or other.info["comment"] == b"A comment"
    lost = [] if suffix == ".jpg" else ["its comment is left out, because TIFF does not support it"]
    assert losses(f"b{suffix}", image) == lost


def test_iptc_that_cannot_be_kept_is_said(tmp_path):
    long = Metadata(iptc=IPTC * 4000, xmp=b"x" * 70_000)
    image = ImageFile(pixels=torch.zeros(3, 16, 16), metadata=long)
    for suffix, kind in ((".png", "PNG"), (".webp", "WebP")):
        assert losses(f"a{suffix}", image) == [
            f"its IPTC data (caption, author, keywords) are left out, because {kind} does not support them"
        ]
    assert [loss.split(" are ")[0] for loss in losses("a.jpg", image)] == ["its XMP data", "its IPTC data"]
    write_image(tmp_path / "a.jpg", image)
    assert read_image(tmp_path / "a.jpg").metadata == Metadata()


def test_comments_and_texts_survive_in_their_own_format(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.jpg", comment=b"A comment")
    write_image(tmp_path / "b.jpg", read_image(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "b.jpg") as other:
        assert other.info["comment"] == b"A comment"
    for suffix, kind in ((".png", "PNG"), (".webp", "WebP"), (".tif", "TIFF")):
        lost = losses(f"a{suffix}", read_image(tmp_path / "a.jpg"))
        assert lost == [f"its comment is left out, because {kind} does not support it"]
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


@pytest.mark.parametrize("png", [False, True])
def test_the_command_line_says_what_is_lost(tmp_path, tiny_checkpoint, capsys, png):
    from ebt_vision.cli import main

    exif = exif_with(MALFORMED["outside"], (0x0112, 3, 1, struct.pack(">HH", 6, 0)))
    image = ImageFile(pixels=torch.zeros(3, 16, 24), alpha=torch.ones(1, 16, 24), mode="RGBA", bit_depth=16, exif=exif)
    write_image(tmp_path / "a.png", image)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    args = [str(tmp_path / "a.jpg"), "--output", str(tmp_path / "out"), "--model", str(tiny_checkpoint), "--device", "cpu"]
    assert main(["denoise", *args, *(["--png"] if png else [])]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "ImageDescription" in lines[0] and "left out" in lines[0]
    assert len(lines) == (1 if png else 3) and all("--png keeps it" in line for line in lines[1:])
    result = read_image(tmp_path / "out" / ("a.png" if png else "a.jpg"))
    assert result.pixels.shape == (3, 24, 16) and result.bit_depth == (16 if png else 8)


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


@pytest.mark.parametrize("size", [12, 16, 24, 48])
def test_a_flat_disc_on_white_keeps_its_colours_and_a_noisy_one_is_denoised(size):
    denoiser = load_denoiser(default_pretrained())
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = (rows - size / 2 + 0.5) ** 2 + (columns - size / 2 + 0.5) ** 2 < (0.4 * size) ** 2
    cyan = torch.tensor([0.0, 1.0, 1.0])[:, None, None].expand(3, size, size)
    icon = torch.where(disc, cyan, 1.0)[None]
    assert torch.equal(denoiser.denoise(icon).image, icon)
    noisy = icon + 0.1 * torch.randn(icon.shape, generator=make_generator(0))
    assert (denoiser.denoise(noisy).image - icon).square().mean() < 0.7 * (noisy - icon).square().mean()


def test_faint_noise_is_not_taken_for_flat_areas():
    """Of grey noise of one 8-bit unit, the largest share of equal neighbours that noise can have in practice."""
    grey = torch.randn(1, 1, 32, 32, generator=make_generator(0)).expand(1, 3, 32, 32)
    noisy = (128 + grey).round() / 255
    assert is_flat(torch.full((1, 3, 32, 32), 0.5)).all() and not is_flat(noisy).any()


@pytest.mark.parametrize("size", [8, 12, 16])
@pytest.mark.parametrize("colour", [(255, 0, 0), (255, 255, 0), (0, 255, 0), (20, 60, 220)])
def test_a_small_flat_icon_keeps_its_colour(size, colour):
    denoiser = for_photographs(load_denoiser(default_pretrained()))
    pixels = (torch.tensor(colour) / 255)[:, None, None].expand(3, size, size)
    alpha = torch.ones(1, size, size)
    alpha[:, :2] = alpha[:, :, :2] = 0.0
    icon = ImageFile(pixels=torch.where(alpha > 0, pixels, 1 - pixels), alpha=alpha, mode="RGBA")
    done = icon.with_pixels(denoise_tiled(denoiser, icon.visible_pixels()).image[0])
    mean = done.pixels[:, alpha[0] > 0].mean(dim=1)
    assert (mean - torch.tensor(colour) / 255).abs().max() < 0.01
