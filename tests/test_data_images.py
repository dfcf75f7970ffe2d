import io
import struct
import tarfile
import zlib

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ebt_vision.core.rng import make_generator
from ebt_vision.data.graphics import draw_graphic
from ebt_vision.data.image_files import ImageFile, write_image
from ebt_vision.data.images import DataConfig, DataError, load_image_set
from ebt_vision.data.sources import expand_braces

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def noise(seed, height=16, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_table_without_rows_holds_no_images(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty\.parquet has no images: 0 rows in 1 parquet") as caught:
        load_image_set(DataConfig(path=str(tmp_path / "empty.parquet"), img_size=16), seed=0)
    assert "\n" not in str(caught.value)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def load(path, seed=0, **options):
    return load_image_set(DataConfig(path=str(path), **{"img_size": 16, **options}), seed)


def as_tensor(*arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


# Sources.


def test_a_flat_folder_has_no_classes(tmp_path):
    for number in range(3):
        save(tmp_path / f"test_{number}.png", noise(number))  # a name that looks like a split is a name
    images = load(tmp_path)
    assert len(images) == 3 and images.labels is None and images.class_names is None
    assert torch.equal(images.images([0, 2]), as_tensor(noise(0), noise(2)))
    assert images.images([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("deeper", ["", "images/"])
def test_class_folders_nested_or_not(tmp_path, deeper):
    for number, name in enumerate(["cat", "cat", "ant"]):
        save(tmp_path / name / f"{deeper}{number}.PNG", noise(number))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    images = load(tmp_path)
    assert images.class_names == ["ant", "cat"]
    assert images.labels == [0, 1, 1]
    assert torch.equal(images.images([0]), as_tensor(noise(2)))
    assert load(tmp_path, label_column=None).labels is None


def test_splits_of_a_folder(tmp_path):
    save(tmp_path / "train" / "a" / "0.png", noise(0))
    save(tmp_path / "val" / "a" / "1.png", noise(1))
    with pytest.raises(DataError, match="splits train, val; choose one"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, split="val").images([0]), as_tensor(noise(1)))
    with pytest.raises(DataError, match=r"neither a folder 'test'.*train.*val"):
        load(tmp_path, split="test")


def make_parquet(path, pixels, **columns):
    encoded = [p if isinstance(p, bytes | None) else png(p) for p in pixels]
    rows = {"image": [None if data is None else {"bytes": data, "path": None} for data in encoded], **columns}
    features = datasets.Features({"image": datasets.Image()})
    for name, values in columns.items():
        features[name] = datasets.Value("string" if isinstance(values[0], str) else "int64")
    if "label" in columns and isinstance(columns["label"][0], int):
        features["label"] = datasets.ClassLabel(names=["ant", "bee", "cat"])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def test_parquet_files_globs_folders_and_columns(tmp_path):
    make_parquet(tmp_path / "train-00000.parquet", [noise(0), noise(1)], label=[2, 0])
    make_parquet(tmp_path / "train-00001.parquet", [noise(2)], label=[1])
    make_parquet(tmp_path / "validation-00000.parquet", [noise(3)], label=[1])
    one = load(tmp_path / "train-00001.parquet")
    assert one.labels == [1] and one.class_names == ["ant", "bee", "cat"]
    for images in (load(tmp_path / "train-*.parquet"), load(tmp_path, split="train")):
        assert images.labels == [2, 0, 1]
        assert torch.equal(images.images([2, 0, 1]), as_tensor(noise(2), noise(0), noise(1)))
    with pytest.raises(DataError, match="splits train, validation; choose one"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"no column 'img'; set image_column to one of \['image', 'label'\]"):
        load(tmp_path, split="train", image_column="img")
    with pytest.raises(DataError, match="no column 'klass'"):
        load(tmp_path, split="train", label_column="klass")
    with pytest.raises(DataError, match="remove it"):
        load(tmp_path / "train-*.parquet", split="train")


def test_a_parquet_file_that_changed_is_read_anew(tmp_path):
    make_parquet(tmp_path / "a.parquet", [noise(0)], label=[0])
    assert torch.equal(load(tmp_path / "a.parquet").images([0]), as_tensor(noise(0)))
    make_parquet(tmp_path / "a.parquet", [noise(1), noise(2)], label=[1, 1])
    assert torch.equal(load(tmp_path / "a.parquet").images([0]), as_tensor(noise(1)))


def test_string_labels_missing_labels_and_unlabelled_rows(tmp_path):
    make_parquet(tmp_path / "a.parquet", [noise(0), noise(1)], kind=["dog", "ant"])
    images = load(tmp_path / "a.parquet", label_column="kind")
    assert images.labels == [1, 0] and images.class_names == ["ant", "dog"]
    assert load(tmp_path / "a.parquet").labels is None
    make_parquet(tmp_path / "b.parquet", [noise(0)], kind=[-1])
    assert load(tmp_path / "b.parquet", label_column="kind").labels is None


def test_rows_without_an_image_are_skipped(tmp_path):
    make_parquet(tmp_path / "a.parquet", [noise(0), None, b"", noise(3)], label=[0, 1, 2, 2])
    images = load(tmp_path / "a.parquet")
    assert images.labels == [0, 2]
    assert [name for name, _ in images.skipped] == ["row 1", "row 2"]


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is what a table begins with")
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        load(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_said_to_be_missing_whatever_the_split(tmp_path):
    for split in (None, "train"):
        with pytest.raises(DataError, match="no file at .*nowhere; check the path"):
            load_image_set(DataConfig(path=str(tmp_path / "nowhere"), split=split))


def test_the_hub_is_asked_for_the_name_and_the_split(monkeypatch):
    asked = []

    def load_dataset(name, data_files, split):
        asked.append((name, data_files, split))
        if name == "some/missing":
            raise FileNotFoundError("no such\ndata set")
        return datasets.Dataset.from_dict({"img": [png(noise(0))], "label": [4]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = load("hub:some/pictures", split="test", image_column="img")
    assert torch.equal(images.images([0]), as_tensor(noise(0)))
    assert images.labels == [4]
    with pytest.raises(DataError, match=r"hub:some/missing cannot be loaded \(no such data set\)"):
        load("hub:some/missing")
    assert asked == [("some/pictures", None, "test"), ("some/missing", None, "train")]


def test_webdataset_shards_written_by_webdataset(tmp_path):
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"s-{shard:03d}.tar")) as writer:
            for number in range(2):
                n = 2 * shard + number
                writer.write({"__key__": f"dir/im{n}", "png": png(noise(n)), "cls": n + 10, "json": {"label": n}})
    for images in (load(tmp_path / "s-{000..001}.tar"), load(tmp_path / "s-*.tar"), load(tmp_path)):
        assert images.labels == [10, 11, 12, 13]  # .cls goes before .json
        assert torch.equal(images.images([3, 0]), as_tensor(noise(3), noise(0)))
    with pytest.raises(DataError, match=r"s-002\.tar"):
        load(tmp_path / "s-{000..002}.tar")


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_shards_with_json_labels_or_some_labels_or_damage(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(noise(0)), "0.json": b'{"label": 7}', "0.txt": b"a caption"})
    assert load(tmp_path / "a.tar").labels == [7]
    write_tar(tmp_path / "e.tar", {"0.cls": b"3", "0.json": b'{"label": 7}', "0.png": png(noise(0))})
    assert load(tmp_path / "e.tar").labels == [3]
    write_tar(tmp_path / "b.tar", {"0.png": png(noise(0)), "0.cls": b"3", "1.png": png(noise(1)), "2.png": b"broken"})
    images = load(tmp_path / "b.tar")
    assert images.labels is None and len(images) == 2
    assert images.skipped[0][0] == "b.tar:2"
    data = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(data[:1000])
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path / "c.tar")
    write_tar(tmp_path / "d.tar", {"0.txt": b"text"})
    with pytest.raises(DataError, match="no images in"):
        load(tmp_path / "d.tar")


def test_shards_whose_samples_have_several_images(tmp_path):
    first, depth = noise(0), noise(1)
    write_tar(tmp_path / "a.tar", {"0.depth.png": png(depth), "0.png": png(first), "0.cls": b"3"})
    assert torch.equal(load(tmp_path / "a.tar").images([0]), as_tensor(first))
    assert torch.equal(load(tmp_path / "a.tar", image_column="depth.png").images([0]), as_tensor(depth))
    write_tar(tmp_path / "b.tar", {f"photo.{i}.png": png(noise(i)) for i in range(6)})
    with pytest.raises(DataError, match=r"sample photo in .*b.tar has 6 images \(0.png, 1.png, 2.png, ...; keys end at"):
        load(tmp_path / "b.tar")
    assert torch.equal(load(tmp_path / "b.tar", image_column="4.png").images([0]), as_tensor(noise(4)))


def test_shards_with_class_names_and_with_a_label_that_cannot_be_read(tmp_path):
    samples = {"0.png": png(noise(0)), "1.png": png(noise(1))}
    write_tar(tmp_path / "a.tar", samples | {"0.cls": b"tabby cat\n", "1.cls": b"dog"})
    images = load(tmp_path / "a.tar")
    assert images.labels == [1, 0] and images.class_names == ["dog", "tabby cat"]
    write_tar(tmp_path / "b.tar", samples | {"0.cls": b"cat", "1.cls": b"7"})
    with pytest.raises(DataError, match="both 7 and 'cat' occur"):
        load(tmp_path / "b.tar")
    write_tar(tmp_path / "c.tar", samples | {"0.json": b'{"label": 1}', "1.json": b'{"label": '})
    with pytest.raises(DataError, match="1.json in .*c.tar is not valid JSON .*set label_column to null"):
        load(tmp_path / "c.tar")
    assert load(tmp_path / "c.tar", label_column=None).labels is None


@pytest.mark.parametrize("num_real", [0, 1])
def test_class_folders_that_are_links(tmp_path, num_real):
    """A link next to a real folder or alone, and a link that leads back to its own folder."""
    for i, name in enumerate(("cat", "dog")):
        save(tmp_path / "elsewhere" / name / "0.png", noise(i))
    root = tmp_path / "train"
    root.mkdir()
    for i, name in enumerate(("cat", "dog")):
        if i < num_real:
            save(root / name / "0.png", noise(i))
        else:
            (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "dog" / "again").symlink_to(root)
    images = load(root)
    assert images.labels == [0, 1] and images.class_names == ["cat", "dog"]
    assert torch.equal(images.images([0, 1]), as_tensor(noise(0), noise(1)))


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_a_file_with_braces_in_its_name(tmp_path):
    save(tmp_path / "a{1,2}.png", noise(0))
    assert len(load(tmp_path / "a{1,2}.png")) == 1


@pytest.mark.parametrize("path", ["missing", "missing/*.parquet", "empty", "text"])
def test_no_images_at_all(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    with pytest.raises(DataError, match="no (images|file) at") as caught:
        load(tmp_path / path)
    assert "\n" not in str(caught.value)


# Pixels.


def test_unreadable_images_are_skipped_counted_and_reported(tmp_path):
    save(tmp_path / "a" / "good.png", noise(0))
    save(tmp_path / "b" / "good.png", noise(1))
    whole = png(noise(2))
    (tmp_path / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "text.png").write_text("not an image")
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "nowhere.png")
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = whole[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    (tmp_path / "a" / "bomb.png").write_bytes(bomb)
    save(tmp_path / "a" / "ribbon.png", noise(0, 8, 200))
    for cache in (True, False):
        images = load(tmp_path, cache=cache)
        assert len(images) == 2 and images.labels == [0, 1]
        assert torch.equal(images.images([0, 1]), as_tensor(noise(0), noise(1)))
        reasons = {name.removeprefix("a/"): reason for name, reason in images.skipped}
        assert images.num_skipped == len(reasons) == 6
        for name, word in {"cut": "damaged", "text": "not an image", "bomb": "pixels", "ribbon": "longer"}.items():
            assert word in reasons[f"{name}.png"]
        assert "0 bytes" in reasons["empty.jpg"]
        report = images.report()
        assert "\n" not in report and "2 images" in report and "6 skipped" in report and "bomb.png" in report


def test_a_trusted_set_is_not_decoded_before_it_is_used(tmp_path):
    save(tmp_path / "a.png", noise(0))
    (tmp_path / "b.png").write_bytes(b"no image")
    images = load(tmp_path, cache=False, check=False)
    assert len(images) == 2 and torch.equal(images.images([0]), as_tensor(noise(0)))
    with pytest.raises(DataError, match="b.*data.check: true"):
        images.images([1])
    with pytest.raises(ValueError, match="needs cache=False"):
        DataConfig(path="x", check=False)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of .* can be used \(a\.png is empty"):
        load(tmp_path)


def one_image(path, **options):
    return load(path, label_column=None, **options).images([0])[0]


def test_colour_modes_become_rgb(tmp_path):
    rgb = noise(0)
    grey = Image.fromarray(rgb[:, :, 0])
    grey.save(tmp_path / "grey.png")
    assert torch.equal(one_image(tmp_path / "grey.png"), torch.from_numpy(rgb[:, :, 0]).expand(3, 16, 16))
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert torch.equal(one_image(tmp_path / "palette.png"), as_tensor(np.asarray(palette.convert("RGB")))[0])
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    assert one_image(tmp_path / "cmyk.tif")[:, 0, 0].tolist() == [0, 255, 255]
    Image.new("RGBA", (16, 16), (200, 0, 100, 51)).save(tmp_path / "alpha.png")  # 0.2 of the colour, 0.8 of white
    assert one_image(tmp_path / "alpha.png")[:, 0, 0].tolist() == [244, 204, 224]


def test_16_bit_images_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = torch.from_numpy(np.rint(values / 257.0).astype(np.uint8))
    Image.fromarray(values).save(tmp_path / "grey.png")
    tifffile.imwrite(tmp_path / "grey.tif", values)
    pixels = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, 16, 16)
    write_image(tmp_path / "colour.png", ImageFile(pixels=pixels, bit_depth=16))
    for name in ("grey.png", "grey.tif", "colour.png"):
        assert torch.equal(one_image(tmp_path / name), expected.expand(3, 16, 16)), name


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 16, 16))  # white on the left; turned clockwise it is on top
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    upright = load(tmp_path, crop="random").images([0], epochs=0)  # random: the whole long side is at hand
    images = [load(tmp_path, crop="random").images([0], epochs=epoch)[0] for epoch in range(8)]
    assert upright.shape == (1, 3, 16, 16)
    assert all(torch.equal(image, image[:, :, :1].expand_as(image)) for image in images)  # rows are of one colour
    assert all((image[0, 1:, 0] <= image[0, :-1, 0]).all() for image in images)  # and white is above black


def test_the_shorter_side_is_resized_and_the_centre_cut(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    save(tmp_path / "a.png", pixels)
    assert one_image(tmp_path)[:, :, 1:-1].min() > 200  # the white middle third, but for ringing at its borders
    save(tmp_path / "a.png", noise(0, 16, 37))
    assert torch.equal(one_image(tmp_path), as_tensor(noise(0, 16, 37)[:, 10:26])[0])  # no resize: pixels as they are


def test_short_side_leaves_more_to_crop_from_and_enlarges_no_further_than_the_crop(tmp_path):
    for name, height, width in (("large", 60, 96), ("small", 20, 40), ("tiny", 8, 12)):
        save(tmp_path / f"{name}.png", noise(0, height, width))
    images = load(tmp_path, short_side=30, crop="random")
    sides = {images.name(i).rsplit("/", 1)[-1]: images._cache[i].shape[1:] for i in range(3)}
    assert sides == {"large.png": (30, 48), "small.png": (20, 40), "tiny.png": (16, 24)}
    assert images.images(range(3)).shape == (3, 3, 16, 16)
    index = [i for i in range(3) if images.name(i).endswith("small.png")][0]
    centre = load(tmp_path, short_side=30).images([index])[0]
    assert torch.equal(centre, as_tensor(noise(0, 20, 40)[2:18, 12:28])[0])
    with pytest.raises(ValueError, match="short_side=8 is below img_size=16"):
        load(tmp_path, short_side=8)


def test_resizing_is_antialiased_both_ways(tmp_path):
    checks = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    save(tmp_path / "a.png", np.repeat(checks[:, :, None], 3, axis=2).astype(np.uint8))
    assert (one_image(tmp_path).float() - 127.5).abs().max() < 20
    save(tmp_path / "a.png", np.full((8, 9, 3), 77, np.uint8))
    assert (one_image(tmp_path) == 77).all()


# Draws.


def test_draws_depend_on_seed_epoch_and_index_alone(tmp_path):
    for number in range(6):
        save(tmp_path / f"{number}.png", noise(number, 16 + number, 40))
    options = {"crop": "random", "flip": True}
    images = load(tmp_path, **options)
    together = images.images([0, 1, 2, 3, 4, 5], epochs=3)
    assert torch.equal(images.images(torch.tensor([4, 1]), epochs=torch.tensor([3, 3])), together[[4, 1]])
    assert torch.equal(load(tmp_path, cache=False, **options).images([5], epochs=[3])[0], together[5])
    assert not torch.equal(images.images(range(6), epochs=4), together)
    assert not torch.equal(load(tmp_path, seed=1, **options).images(range(6), epochs=3), together)
    mixed = images.images([2, 2], epochs=[3, 4])
    assert torch.equal(mixed[0], together[2]) and torch.equal(mixed[1], images.images([2], epochs=4)[0])


def test_crops_reach_both_ends_and_flips_are_even(tmp_path):
    ramp = np.repeat(np.arange(20, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, 2)
    save(tmp_path / "a.png", ramp)
    crops = load(tmp_path, crop="random").images([0] * 200, epochs=range(200))
    assert set(crops[:, 0, 0, 0].tolist()) == {0, 1, 2, 3, 4}
    flips = load(tmp_path, flip=True).images([0] * 200, epochs=range(200))
    plain = load(tmp_path).images([0])[0]
    flipped = [bool(torch.equal(image, plain.flip(-1))) for image in flips]
    assert all(torch.equal(image, plain) for image, flip in zip(flips, flipped, strict=True) if not flip)
    assert 70 < sum(flipped) < 130


def test_quarter_turns_are_even_and_leave_other_draws_as_they_were(tmp_path):
    save(tmp_path / "a.png", noise(0, 20, 28))
    plain, turned = (load(tmp_path, crop="random", rotate=rotate) for rotate in (False, True))
    counts = [0, 0, 0, 0]
    for epoch in range(200):
        (crop,), (other,) = plain.images([0], epoch), turned.images([0], epoch)
        counts[[torch.equal(torch.rot90(crop, k, (1, 2)), other) for k in range(4)].index(True)] += 1
    assert min(counts) > 30, counts


def test_half_of_the_crops_are_enlarged(tmp_path):
    save(tmp_path / "a.png", noise(0, 40, 40))
    plain, zoomed = (load(tmp_path, crop="random", short_side=40, zoom=zoom) for zoom in (1.0, 2.0))
    whole = np.asarray(Image.open(tmp_path / "a.png")).transpose(2, 0, 1)
    windows = {
        w.tobytes() for w in np.lib.stride_tricks.sliding_window_view(whole, (16, 16), axis=(1, 2))[0].reshape(-1, 16, 16)
    }
    kept = sum(zoomed.images([0], epoch)[0, 0].numpy().tobytes() in windows for epoch in range(200))
    assert 70 <= kept <= 130
    roughness = [float(s.images([0] * 200, range(200)).float().diff(dim=3).abs().mean()) for s in (plain, zoomed)]
    assert roughness[1] < 0.95 * roughness[0]  # enlarged noise is smoother


def test_a_share_of_the_images_are_drawings(tmp_path):
    save(tmp_path / "a.png", noise(0))
    save(tmp_path / "b.png", noise(1))
    plain, mixed = (load(tmp_path, graphics_share=share) for share in (0.0, 0.25))
    (photograph,) = plain.images([1])
    epochs = range(200)
    results = mixed.images([1] * 200, epochs)
    drawings = [epoch for epoch in epochs if not torch.equal(results[epoch], photograph)]
    assert 30 <= len(drawings) <= 70
    first = drawings[0]
    assert torch.equal(mixed.images([0, 1], [0, first])[1], results[first])  # of seed, epoch and index alone
    assert not torch.equal(load(tmp_path, 1, graphics_share=1.0).images([1], [first])[0], results[first])
    assert len({results[epoch].numpy().tobytes() for epoch in drawings}) > 0.9 * len(drawings)


def test_drawings_have_flat_colours_and_depend_on_their_generator_alone():
    state = torch.get_rng_state()
    drawings = [draw_graphic(48, make_generator(0, number)) for number in range(60)]
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(drawings[3], draw_graphic(48, make_generator(0, 3)))
    assert all(drawing.shape == (3, 48, 48) and drawing.dtype == np.uint8 for drawing in drawings)
    flat = [np.mean((np.diff(drawing.astype(int), axis=2) == 0).all(0)) for drawing in drawings]
    assert np.median(flat) > 0.5  # neighbours of one colour, which noise and photographs do not have
    strong = [np.ptp(drawing.astype(int), axis=0) > 128 for drawing in drawings]  # the channels differ by half of the range
    assert np.mean(strong) > 0.3
    changes = [np.mean(np.diff(mask.astype(int), axis=1) != 0) for mask in strong]
    assert np.mean([change > 0.1 for change in changes]) > 0.1  # strong colours in small areas


def test_the_caller_cannot_change_the_cache_nor_the_global_stream(tmp_path):
    save(tmp_path / "a.png", noise(0))
    images = load(tmp_path, flip=True)
    state = torch.get_rng_state()
    first = images.images([0])
    first.zero_()
    assert images.images([0]).any()
    assert torch.equal(torch.get_rng_state(), state)
    # The draws of the images are not those that anybody else gets from the same seed.
    assert make_generator(0, 0, 0).initial_seed() != make_generator(0, 0x63726F70, 0, 0).initial_seed()


def test_indices_outside_and_files_that_vanish(tmp_path):
    save(tmp_path / "a.png", noise(0))
    images = load(tmp_path, cache=False)
    for index in (-1, 1):
        with pytest.raises(IndexError, match="not all in 0..0"):
            images.images([index])
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png .*readable when the set was loaded"):
        images.images([0])


def test_limit_is_spread_over_the_set(tmp_path):
    for number in range(10):
        save(tmp_path / f"c{number // 5}" / f"{number}.png", noise(number))
    images = load(tmp_path, limit=4)
    assert images.labels == [0, 0, 1, 1]
    assert len(load(tmp_path, limit=99)) == 10


@pytest.mark.parametrize(
    "options",
    [{"path": ""}, {"img_size": 0}, {"crop": "middle"}, {"limit": 0}, {"zoom": 2.0}, {"zoom": 0.5}, {"graphics_share": 2.0}],
    ids=lambda options: next(iter(options)),
)
def test_config_checks(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DataConfig(**{"path": "somewhere", **options})
