"""Image files from other programs and hostile ones: which data are kept, which messages appear, and that decoding ends."""

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
from PIL import ExifTags, Image, features

from apps import sources
from ebt_vision.cli import main
from ebt_vision.data import decoded, decoding
from ebt_vision.data.decoding import DecodeError, decode_image
from ebt_vision.data.image_files import ImageFile, ImageFileError, quantise, read_image, write_image
from ebt_vision.data.images import DataConfig, load_image_set

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def noise(height=16, width=24, channels=3, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def read_image_of(pixels):
    """(H, W, 3) uint8 -> an ImageFile."""
    return ImageFile(pixels=torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


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
    with pytest.raises(DecodeError, match="more data than pixels"):
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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_extra_channel_that_is_not_called_alpha_is_left_out_and_said(tmp_path, dtype):
    array = noise(channels=4, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unspecified"])
    image = read_image(tmp_path / "a.tif")
    assert image.mode == "RGB" and "extra channel" in image.notes[0]
    assert np.array_equal(quantise(image.pixels, image.bit_depth).transpose(1, 2, 0), array[:, :, :3])
    tifffile.imwrite(tmp_path / "b.tif", array, photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(tmp_path / "b.tif").mode == "RGBA"


def test_damaged_tiffs_get_our_line_alone(tmp_path):
    """libtiff and Python's warnings are silent, too."""
    script = """
import sys
from ebt_vision.data.image_files import ImageFileError, read_image
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
        with tifffile.TiffFile(tmp_path / "whole.tif") as tiff:
            samples = tiff.pages.first.tags[277].valueoffset
        paths.append(tmp_path / f"{kind}.tif")
        paths[-1].write_bytes(data[:samples] + b"\xff\xff" + data[samples + 2 :])
        for seed in range(10):
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
    for place, value in [
        (14, struct.pack("<I", 77)),
        (30, struct.pack("<I", 9)),
        (30, struct.pack("<I", 1)),
        (28, struct.pack("<H", 7)),
    ]:
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


def test_a_heic_of_10_bits_says_that_8_are_read_and_keeps_what_its_colours_mean(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = noise(64, 96, dtype=np.uint16)
    heif = pillow_heif.from_bytes(mode="RGB;16", size=(96, 64), data=pixels.tobytes())
    heif.save(tmp_path / "a.heic", color_primaries=12, transfer_characteristics=13, matrix_coefficients=6, full_range_flag=1)
    image = read_image(tmp_path / "a.heic")
    assert image.notes == ("its 10 bits are reduced to 8",)
    write_image(tmp_path / "a.png", image)
    assert read_image(tmp_path / "a.png").metadata.png_colour == ((b"cICP", b"\x0c\x0d\0\1"),)


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


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@pytest.mark.parametrize(("flags", "bits"), [(0x40, 10), (0x60, 12)])
def test_bits_of_an_avif_that_are_lost_are_said(tmp_path, flags, bits):
    """Pillow writes 8 bits, so the header of such a file is made to say more."""
    Image.fromarray(noise()).save(tmp_path / "a.avif")
    assert read_image(tmp_path / "a.avif").notes == ()
    data = bytearray((tmp_path / "a.avif").read_bytes())
    configuration, channels = data.index(b"av1C") + 4, data.index(b"pixi") + 9
    data[configuration + 2] |= flags
    data[channels : channels + 3] = bytes([bits] * 3)
    (tmp_path / "a.avif").write_bytes(data)
    assert read_image(tmp_path / "a.avif").notes == (f"its {bits} bits are reduced to 8",)


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
    from ebt_vision.core.arguments import named_path
    from ebt_vision.data.image_files import find_images

    for call in (lambda: read_image(""), lambda: find_images([""])):
        with pytest.raises(ImageFileError, match="empty"):
            call()
    with pytest.raises(Exception, match="empty"):
        named_path("")
    assert all("type=Path" not in path.read_text() for path in (ROOT / "eval").glob("*.py"))


# --- Images at the ends of what can be denoised


@pytest.mark.parametrize("width, height", [(1, 40), (40, 1), (7, 40)])
def test_a_strip_that_is_too_narrow_is_refused_in_one_line(tmp_path, capsys, tiny_checkpoint, width, height):
    write_image(tmp_path / "strip.png", read_image_of(noise(height, width)))
    words = ["denoise", str(tmp_path / "strip.png"), "--output", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
    assert main(words) == 2
    reason, summary = capsys.readouterr().err.splitlines()
    assert f"strip.png is {width}x{height} pixels, too small" in reason and reason.endswith("at least 8")
    assert "1 of 1 failed, 0 written" in summary
    assert not list((tmp_path / "out").glob("*.png"))


def test_pure_noise_becomes_an_image_in_range(tmp_path):
    """Nothing of a photograph is in it: the shipped model has to take noise away and to invent no values."""
    pixels = noise(96, 72)
    write_image(tmp_path / "noise.png", read_image_of(pixels))
    assert main(["denoise", str(tmp_path / "noise.png"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    denoised = read_image(tmp_path / "out" / "noise.png").pixels
    assert bool(torch.isfinite(denoised).all()) and denoised.std() < 0.75 * pixels.astype(np.float64).std() / 255
    assert (denoised.mean(dim=(1, 2)) - torch.tensor(pixels.mean(axis=(0, 1)) / 255)).abs().max() < 0.05
