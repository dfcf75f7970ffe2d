import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, features

from ebt_vision.data import image_files
from ebt_vision.data.image_files import (
    ImageFile,
    ImageFileError,
    find_images,
    quantise,
    read_image,
    without_suffix,
    write_image,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HEIGHT, WIDTH = 11, 19
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def random_image(channels, bit_depth, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top = 2**bit_depth
    integers = torch.randint(0, top, (4, HEIGHT, WIDTH), generator=generator)
    integers[:, 0, 0], integers[:, 0, 1] = 0, top - 1
    pixels = (integers[:3] / (top - 1)).float()
    if channels in (1, 2):
        pixels = pixels[:1].repeat(3, 1, 1)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    alpha = (integers[3:] / (top - 1)).float() if channels in (2, 4) else None
    return ImageFile(pixels=pixels, alpha=alpha, bit_depth=bit_depth, mode=mode)


def exif_block(orientation=None):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "A camera"
    exif[ExifTags.Base.Copyright] = "Somebody"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.LensModel: "A lens", ExifTags.Base.FNumber: 2.5}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def png_header(width, height, bit_depth=8, colour_type=2):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_lossless_formats_give_back_every_bit(tmp_path, suffix, bit_depth, channels):
    image = random_image(channels, bit_depth)
    write_image(tmp_path / f"a{suffix}", image)
    again = read_image(tmp_path / f"a{suffix}")
    assert (again.mode, again.bit_depth) == (image.mode, bit_depth)
    assert again.pixels.dtype == torch.float32
    assert torch.equal(again.pixels, image.pixels)
    assert (again.alpha is None) == (image.alpha is None)
    assert image.alpha is None or torch.equal(again.alpha, image.alpha)


@pytest.mark.parametrize("channels", [3, 4])
def test_webp_is_lossless_even_where_it_is_transparent(tmp_path, channels):
    image = random_image(channels, 8)
    write_image(tmp_path / "a.webp", image)
    again = read_image(tmp_path / "a.webp")
    assert torch.equal(again.pixels, image.pixels)
    assert channels == 3 or torch.equal(again.alpha, image.alpha)


def test_16_bit_png_is_what_another_decoder_reads(tmp_path):
    image = random_image(1, 16)
    write_image(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as other:
        assert np.array_equal(np.asarray(other).astype(np.uint16), quantise(image.pixels[0], 16))


def test_16_bit_rgb_png_keeps_the_low_bits(tmp_path):
    ramp = torch.linspace(0, 1, 1000).view(1, 10, 100).repeat(3, 1, 1)
    write_image(tmp_path / "a.png", ImageFile(pixels=ramp, bit_depth=16))
    assert len(read_image(tmp_path / "a.png").pixels[0].unique()) == 1000


def test_jpeg_is_full_colour_resolution_and_close(tmp_path):
    ramp = torch.linspace(0, 1, 64).expand(3, 48, 64).clone()
    write_image(tmp_path / "a.jpg", ImageFile(pixels=ramp))
    assert (read_image(tmp_path / "a.jpg").pixels - ramp).abs().max() < 0.02
    with Image.open(tmp_path / "a.jpg") as other:
        assert [component[1:3] for component in other.layer] == [(1, 1)] * 3


def test_jpeg_of_a_transparent_image_is_composited_on_white(tmp_path):
    image = ImageFile(pixels=torch.zeros(3, 16, 16), alpha=torch.zeros(1, 16, 16), mode="RGBA")
    write_image(tmp_path / "a.jpg", image)
    assert read_image(tmp_path / "a.jpg").pixels.min() > 0.99
    grey = ImageFile(pixels=torch.zeros(3, 16, 16), alpha=torch.full((1, 16, 16), 0.5), mode="LA")
    write_image(tmp_path / "b.jpg", grey)
    read = read_image(tmp_path / "b.jpg")
    assert read.mode == "L" and abs(read.pixels.mean() - 0.5) < 0.01


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profile_and_exif_survive(tmp_path, suffix, bit_depth):
    image = random_image(3, bit_depth)
    image = ImageFile(pixels=image.pixels, bit_depth=bit_depth, icc_profile=SRGB, exif=exif_block())
    write_image(tmp_path / f"a{suffix}", image)
    again = read_image(tmp_path / f"a{suffix}")
    write_image(tmp_path / f"b{suffix}", again)
    again = read_image(tmp_path / f"b{suffix}")
    assert again.icc_profile == SRGB
    exif = Image.Exif()
    exif.load(again.exif)
    assert exif[ExifTags.Base.Model] == "A camera"
    assert exif[ExifTags.Base.Copyright] == "Somebody"
    assert exif.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.LensModel: "A lens", ExifTags.Base.FNumber: 2.5}
    assert exif.get_ifd(ExifTags.IFD.GPSInfo) == {ExifTags.GPS.GPSLatitudeRef: "N"}


# What each orientation says of the stored array (EXIF 2.32): the visual top left, top right, bottom left of [[1,2],[3,4]].
UPRIGHT = {
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
}


def quadrants(orientation_table):
    return np.kron(np.array(orientation_table, np.uint8) * 50, np.ones((8, 8), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_orientation_is_applied_and_reset(tmp_path, suffix, orientation):
    options = {"lossless": True} if suffix == ".webp" else {}
    stored = Image.fromarray(quadrants(UPRIGHT[1])).convert("RGB")
    stored.save(tmp_path / f"a{suffix}", exif=exif_block(orientation), **options)
    image = read_image(tmp_path / f"a{suffix}")
    assert np.array_equal(quantise(image.pixels[0]), quadrants(UPRIGHT[orientation]))
    write_image(tmp_path / f"b{suffix}", image)
    again = read_image(tmp_path / f"b{suffix}")
    assert torch.equal(again.pixels, image.pixels)
    with Image.open(tmp_path / f"b{suffix}") as written:
        assert written.getexif().get(ExifTags.Base.Orientation, 1) == 1
        assert written.getexif()[ExifTags.Base.Model] == "A camera"


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_orientation_of_16_bit_files(tmp_path, orientation):
    stored = (quadrants(UPRIGHT[1]).astype(np.uint16) * 257)[:, :, None].repeat(3, 2)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    plain = ImageFile(pixels=torch.from_numpy(stored.transpose(2, 0, 1) / 65535).float(), bit_depth=16)
    write_image(tmp_path / "a.png", ImageFile(pixels=plain.pixels, bit_depth=16, exif=exif_block(orientation)))
    for name in ("a.tif", "a.png"):
        image = read_image(tmp_path / name)
        assert image.bit_depth == 16
        assert np.array_equal(quantise(image.pixels[0]), quadrants(UPRIGHT[orientation])), name


def test_non_square_rotation_swaps_the_sides(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif_block(6))
    assert read_image(tmp_path / "a.jpg").pixels.shape == (3, 30, 20)


def test_palette_and_one_bit_and_gif(tmp_path):
    colours = Image.new("P", (16, 16), 1)
    colours.putpalette([0, 0, 0, 255, 0, 0])
    colours.save(tmp_path / "a.gif")
    colours.save(tmp_path / "a.png", transparency=1)
    Image.new("1", (16, 16), 1).save(tmp_path / "b.png")
    red = read_image(tmp_path / "a.gif")
    assert red.mode == "RGB" and red.pixels[:, 3, 3].tolist() == [1.0, 0.0, 0.0]
    assert read_image(tmp_path / "a.png").alpha.max() == 0.0
    assert read_image(tmp_path / "b.png").mode == "L"


def test_cmyk_becomes_rgb_without_its_profile(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", icc_profile=b"not a profile")
    image = read_image(tmp_path / "a.jpg")
    assert image.icc_profile is None
    assert torch.allclose(image.pixels[:, 8, 8], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)


def test_planar_and_inverted_tiff(tmp_path):
    values = np.arange(3 * 16 * 16, dtype=np.uint16).reshape(3, 16, 16) * 50
    tifffile.imwrite(tmp_path / "planar.tif", values, photometric="rgb", planarconfig="separate")
    assert np.array_equal(quantise(read_image(tmp_path / "planar.tif").pixels, 16), values)
    tifffile.imwrite(tmp_path / "white.tif", values[0], photometric="miniswhite")
    assert np.array_equal(quantise(read_image(tmp_path / "white.tif").pixels[0], 16), 65535 - values[0])


def test_float_tiff_is_read_in_unit_range_only(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert torch.allclose(read_image(tmp_path / "a.tif").pixels[0], torch.from_numpy(values), atol=1 / 65535)
    tifffile.imwrite(tmp_path / "b.tif", values * 255)
    with pytest.raises(ImageFileError, match=r"scale them to \[0, 1\]"):
        read_image(tmp_path / "b.tif")
    values[3, 3] = np.nan
    tifffile.imwrite(tmp_path / "c.tif", values)
    with pytest.raises(ImageFileError, match="NaN"):
        read_image(tmp_path / "c.tif")


def test_quantise_clamps_and_rounds_half_to_even():
    values = torch.tensor([-0.5, 0.0, 0.5 / 255, 1.5 / 255, 1.0, 7.0], dtype=torch.float64)
    assert quantise(values).tolist() == [0, 0, 0, 2, 255, 255]
    assert quantise(torch.tensor([0.5])).tolist() == [128]
    assert quantise(torch.tensor([0.5, 1.0]), 16).tolist() == [32768, 65535]
    with pytest.raises(ValueError, match="NaN"):
        quantise(torch.tensor([float("nan")]))


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantise_in_blocks_gives_every_sample_of_one_pass_in_float64(bit_depth, dtype, monkeypatch):
    monkeypatch.setattr(image_files, "QUANTISED_AT_ONCE", 100)
    values = torch.randn(3, 13, 37, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before = values.clone()
    whole = (values.double().clamp(0, 1) * (2**bit_depth - 1)).round().numpy()
    for given, expected in [(values, whole), (values.transpose(1, 2), whole.swapaxes(1, 2)), (values[:, ::2], whole[:, ::2])]:
        found = quantise(given, bit_depth)
        assert found.shape == given.shape and np.array_equal(found, expected) and found.dtype.itemsize * 8 == bit_depth
    assert torch.equal(values, before)
    values[2, 12, 36] = float("inf")
    with pytest.raises(ValueError, match="NaN"):
        quantise(values, bit_depth)


def test_writing_a_large_image_takes_little_beside_it(tmp_path):
    """Converting the whole image to float64 had a peak of seven times the pixels."""
    script = """
import resource, sys, torch
from ebt_vision.data.image_files import ImageFile, write_image
write_image(sys.argv[1] + "/small.png", ImageFile(pixels=torch.zeros(3, 8, 8)))
image = ImageFile(pixels=torch.zeros(3, 2000, 3000))  # 72 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_image(sys.argv[1] + "/large.png", image)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert int(done.stdout) * 1024 < 1.5 * 72e6


def read_error(path):
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_paths_that_are_no_image(tmp_path):
    assert "does not exist" in read_error(tmp_path / "missing.png")
    assert "is a folder" in read_error(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    assert "0 bytes" in read_error(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("I am a text " * 100)
    assert "not an image" in read_error(tmp_path / "text.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert "too small" in read_error(tmp_path / "dot.png")
    Image.new("RGB", (64, 7)).save(tmp_path / "line.png")
    assert "too small" in read_error(tmp_path / "line.png")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert "2 frames" in read_error(tmp_path / "film.gif")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "bmp", "png16", "tif16"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(tmp_path, kind, share):
    suffix = "." + kind.removesuffix("16")
    image = random_image(3, 16 if kind.endswith("16") else 8)
    whole = tmp_path / f"whole{suffix}"
    if kind == "bmp":
        Image.fromarray(quantise(image.pixels).transpose(1, 2, 0)).save(whole)
    else:
        write_image(whole, image)
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    message = read_error(cut)
    assert "damaged" in message or "truncated" in message


def test_uncompressed_16_bit_tiff_that_is_cut_is_not_filled_up(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((64, 64, 3), 9, np.uint16), photometric="rgb")
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:-2000])
    assert "truncated" in read_error(tmp_path / "a.tif")


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_a_header_that_claims_a_huge_image_is_refused_unread(tmp_path, bit_depth):
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000, bit_depth))
    assert "pixels" in read_error(tmp_path / "bomb.png")
    tifffile.imwrite(tmp_path / "bomb.tif", np.zeros((16, 16), np.uint8 if bit_depth == 8 else np.uint16))
    data = bytearray((tmp_path / "bomb.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "bomb.tif") as tiff:
        places = [tiff.pages[0].tags[tag].valueoffset for tag in (256, 257)]
    for place in places:
        data[place : place + 2] = struct.pack("<H", 20_000)
    (tmp_path / "bomb.tif").write_bytes(data)
    assert "20000x20000" in read_error(tmp_path / "bomb.tif")


def test_writing_never_overwrites_unasked_and_leaves_no_rest(tmp_path):
    image = random_image(3, 8)
    write_image(tmp_path / "a.png", image)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ImageFileError, match="use --overwrite"):
        write_image(tmp_path / "a.png", random_image(3, 8, seed=1))
    assert (tmp_path / "a.png").read_bytes() == before
    write_image(tmp_path / "a.png", random_image(3, 8, seed=1), overwrite=True)
    assert torch.equal(read_image(tmp_path / "a.png").pixels, random_image(3, 8, seed=1).pixels)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", random_image(3, 8))
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ImageFileError, match="No space left"):
        write_image(tmp_path / "a.png", random_image(3, 8, seed=1), overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_places_that_cannot_be_written(tmp_path):
    image = random_image(3, 8)
    (tmp_path / "file").write_text("")
    for path, word in [
        (tmp_path / "nowhere" / "a.png", "not a folder"),
        (tmp_path / "file" / "a.png", "not a folder"),
        (tmp_path / "a.xyz", "suffix"),
    ]:
        with pytest.raises(ImageFileError, match=word):
            write_image(path, image)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(ImageFileError, match="Permission denied"):
        write_image(tmp_path / "locked" / "a.png", image)


def test_pixels_that_are_not_finite_are_not_written(tmp_path):
    image = random_image(3, 8)
    with pytest.raises(ImageFileError, match="NaN"):
        write_image(tmp_path / "a.png", image.with_pixels(image.pixels * float("nan")))
    assert os.listdir(tmp_path) == []


def test_grey_stays_grey_after_a_change(tmp_path):
    image = random_image(1, 8)
    tinted = image.pixels * torch.tensor([0.9, 1.0, 0.8]).view(3, 1, 1)
    write_image(tmp_path / "a.png", image.with_pixels(tinted))
    again = read_image(tmp_path / "a.png")
    assert again.mode == "L"
    assert torch.allclose(again.pixels[0], tinted.mean(0), atol=0.51 / 255)
    with pytest.raises(ValueError, match="shape"):
        image.with_pixels(torch.zeros(3, 5, 5))


def test_find_images(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "b/deep/3.webp", "b/.hidden/4.png", "b/.5.png", "b/notes.txt", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path / "b", str(tmp_path / "b" / "1.JPG")])
    assert [str(path.relative_to(tmp_path / "b")) for path in found] == ["1.JPG", "2.png", "deep/3.webp"]
    with pytest.raises(ImageFileError, match="has no images"):
        find_images([tmp_path / "c"])
    with pytest.raises(ImageFileError, match="does not exist"):
        find_images([tmp_path / "d"])


def test_a_photograph_followed_by_a_preview_is_its_first_frame(tmp_path):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert read_image(tmp_path / "a.jpg").pixels[0].min() > 0.98


@pytest.mark.skipif(not features.check("libtiff"), reason="Pillow without libtiff")
def test_8_bit_lzw_tiff_is_read(tmp_path):
    picture = Image.fromarray(quantise(random_image(3, 8).pixels).transpose(1, 2, 0))
    picture.save(tmp_path / "a.tif", compression="tiff_lzw")
    assert torch.equal(read_image(tmp_path / "a.tif").pixels, random_image(3, 8).pixels)


def test_a_name_as_long_as_a_name_can_be_is_written(tmp_path: Path):
    source = tmp_path / "a.png"
    Image.fromarray(np.full((9, 9, 3), 100, np.uint8)).save(source)
    target = tmp_path / "out" / ("b" * 251 + ".png")
    target.parent.mkdir()
    write_image(target, read_image(source))
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_pipe_is_refused_at_once(tmp_path: Path):
    """Reading a pipe would wait forever for a writer."""
    os.mkfifo(tmp_path / "pipe.png")
    refused: list[str] = []
    reader = threading.Thread(target=lambda: refused.append(read_error(tmp_path / "pipe.png")), daemon=True)
    reader.start()
    reader.join(20)
    assert refused and "pipe.png is a pipe or a device" in refused[0] and "\n" not in refused[0]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.png", "a"), ("a.JPG", "a"), ("IMG.2024", "IMG.2024"), ("a.b.tif", "a.b"), ("a", "a"), (".png", ".png")],
)
def test_only_an_image_s_suffix_is_taken_off(name: str, stem: str):
    assert without_suffix(Path("in") / name) == Path("in") / stem
