"""eval/linear_probe.py from end to end on tiny models: output, resuming, errors, and when it reads which images."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ebt_vision.data.lazy_images import LazyImages
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.probing import selection
from ebt_vision.probing.extraction import FeatureMaker

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import linear_probe


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes of 12 and 4 images: a colour each, and noise."""
    folder = tmp_path_factory.mktemp("classes")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for number, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 160, (32, 32, 3))
                pixels[..., number] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dit") / "dit"
    torch.manual_seed(0)
    model = DiT(DiTConfig(img_size=32, embed_dim=16, depth=2, num_heads=2))
    for block in model.transformer.transformer_blocks:  # adaLN-zero would make its blocks do nothing
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def probe(model: object, photos: Path, output: Path, *more: str) -> int:
    """The exit status of one command; each of `more` may hold several words."""
    words = [word for part in more for word in part.split()]
    common = ["--data", str(photos), "--output", str(output), "--cache", str(output / "cache"), "--device", "cpu"]
    return linear_probe.main(["--model", str(model), *common, "--batch-size", "16", "--held-out", "0.25", *words])


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_an_ebt_with_all_that_it_has(photos: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture):
    features = "--layers all,gradient --pool mean,max,attention --noise-levels 0 0.1 --thinking-steps 0 1 --dtype float32"
    heads = "--heads knn logistic torch --cs 0.01 1 --learning-rates 1 --epochs 2 --probe-batch-size 16"
    options = f"{features} {heads}"
    assert probe(tiny_checkpoint, photos, tmp_path, options) == 0
    found = results(tmp_path)
    # 4 conditions, 3 layers, 2 pools (the torch head has 3).
    assert [sum(entry["head"] == head for entry in found["sweep"]) for head in ("knn", "logistic", "torch")] == [24, 24, 36]
    about, rows = found["about"], {row["head"]: row for row in found["validation"]}
    assert about["class_names"] == ["blue", "green", "red"] and about["num_held_out"] == 9 and about["num_train"] == 36
    for head, row in rows.items():
        assert row["num_images"] == 12 and row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
        assert row["top5"] == 1.0 and row["held_out_top1"] == max(
            trial["top1"] for entry in found["sweep"] if entry["head"] == head for trial in entry["trials"]
        )
        with np.load(tmp_path / f"confusion-{head}.npz") as stored:
            assert stored["confusion"].sum(1).tolist() == [4, 4, 4]
            assert stored["confusion"].trace() / 12 == pytest.approx(row["top1"])
            assert (stored["top5_classes"][:, 0] == stored["labels"]).mean() == pytest.approx(row["top1"])
        per_class = list(csv.DictReader((tmp_path / f"per_class-{head}.csv").open()))
        assert [line["class"] for line in per_class] == about["class_names"]
        assert sum(int(line["correct"]) for line in per_class) == round(12 * row["top1"])
    assert rows["logistic"]["top1"] > 0.6  # colours can be read from any of these tokens
    report = (tmp_path / "report.md").read_text()
    assert "chance 33.33 %" in report and "36 training and 12 validation images" in report and "(Wilson)" in report
    for picture in ("layers.png", "noise_level.png", "thinking_steps.png", "confusion-torch.png"):
        assert Image.open(tmp_path / picture).width > 300, picture
    # The same command does nothing twice: no trial is made again, and the validation set is measured with no other choice.
    capsys.readouterr()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    assert probe(tiny_checkpoint, photos, tmp_path, options) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()} == written
    again = results(tmp_path)
    assert [row["top1"] for row in again["validation"]] == [row["top1"] for row in found["validation"]]
    assert again["about"]["num_validation_choices"] == found["about"]["num_validation_choices"] == 3
    assert "0 images through the network" in capsys.readouterr().out


def test_a_dit_swept_over_timesteps(photos: Path, tmp_path: Path, dit: str):
    options = "--timesteps 0 99 --noise-levels 0 matched --layers 0 -1 last2 --heads knn"
    assert probe(dit, photos, tmp_path, options) == 0
    conditions = list(dict.fromkeys(json.dumps(entry["condition"]) for entry in results(tmp_path)["sweep"]))
    noise = [(condition["timestep"], condition["noise_level"]) for condition in map(json.loads, conditions)]
    assert noise == [(0, 0.0), (0, 0.001), (99, 0.0), (99, 0.1)]
    assert {entry["layer"] for entry in results(tmp_path)["sweep"]} == {"block0", "block1", "last2"}
    assert (tmp_path / "timestep.png").exists() and not (tmp_path / "thinking_steps.png").exists()
    last = next((tmp_path / "cache").glob("*-train-*"))
    assert not list(last.glob("*last2*"))  # joined from the blocks, not stored again
    assert (
        probe(dit, photos, tmp_path / "paper", "--layers", "final", "--heads", "knn") == 0
    )  # t = 0 and clean, as in the paper
    assert results(tmp_path / "paper")["validation"][0]["condition"] == "noise0-t0"


def test_a_part_for_the_sweep_and_all_for_the_head(photos: Path, tmp_path: Path):
    options = ["--layers", "side4,side8", "--img-size", "16", "--heads", "logistic", "--cs", "0.1", "--sweep-limit", "18"]
    assert probe("pixels", photos, tmp_path, *options) == 0
    found = results(tmp_path)
    assert found["about"]["num_sweep"] == 18 and found["about"]["num_train"] == 36 and len(found["sweep"]) == 2
    assert len(list((tmp_path / "trials").iterdir())) == 3  # and the chosen one again, on all
    assert found["validation"][0]["top1"] == 1.0


def test_choices_are_made_before_the_validation_set_is_read(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[tuple[str, str]] = []
    read, sweep = LazyImages.read, selection.Head.__subclasses__()[0].sweep

    def watched_read(self, indices, view=0):
        events.append(("read", str(self.config.split)))
        return read(self, indices, view)

    def watched_sweep(self, *args):
        events.append(("sweep", ""))
        return sweep(self, *args)

    monkeypatch.setattr(LazyImages, "read", watched_read)
    monkeypatch.setattr(selection.Head.__subclasses__()[0], "sweep", watched_sweep)
    assert probe("pixels", photos, tmp_path, "--layers", "side4", "--heads", "logistic", "--img-size", "16") == 0
    assert events.index(("read", "val")) > events.index(("sweep", "")) > events.index(("read", "train"))
    first = events.index(("read", "val"))
    assert {event for event in events[first:]} == {("read", "val")}  # one after another: nothing is chosen afterwards


def test_random_crops_and_timm(photos: Path, tmp_path: Path):
    options = "--img-size 32 --layers final --heads torch --views 2 --epochs 2 --learning-rates 0.1 --probe-batch-size 16"
    assert probe("timm:test_resnet", photos, tmp_path, options) == 0
    assert len(list((tmp_path / "cache").glob("*-train-*"))) == 3 and len(list((tmp_path / "cache").glob("*-val-*"))) == 1


def test_it_goes_on_where_it_was_interrupted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("ebt_vision.probing.feature_cache.default_shard_size", lambda count: 10)
    options = ["--layers", "side4,side8", "--img-size", "16", "--heads", "knn"]
    compute, starts = FeatureMaker._compute, []

    def cut_off(self, images, split, view, indices, features):
        if len(starts) == 2:
            raise KeyboardInterrupt
        starts.append((split, indices.start))
        return compute(self, images, split, view, indices, features)

    monkeypatch.setattr(FeatureMaker, "_compute", cut_off)
    assert probe("pixels", photos, tmp_path, *options) == 130
    assert "interrupted; features in" in capsys.readouterr().err
    kept, starts = starts, []
    monkeypatch.setattr(
        FeatureMaker, "_compute", lambda self, *args: (starts.append((args[1], args[3].start)), compute(self, *args))[1]
    )
    assert probe("pixels", photos, tmp_path, *options) == 0
    assert kept == [("train", 0), ("train", 10)] and starts == [("train", 20), ("train", 30), ("val", 0), ("val", 10)]
    # A helper makes the training features alone.
    starts.clear()
    assert probe("pixels", photos, tmp_path / "helped", *options, "--extract-only") == 0
    assert [split for split, _ in starts] == ["train"] * 4 and not (tmp_path / "helped" / "results.json").exists()


def test_changed_files_make_the_cache_stale(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data, options = tmp_path / "data", ["--layers", "side4", "--img-size", "16", "--heads", "knn"]
    shutil.copytree(photos, data)
    assert probe("pixels", data, tmp_path / "out", *options) == 0
    (data / "train" / "red" / "3.png").write_bytes(b"no image any more")
    assert probe("pixels", data, tmp_path / "out", *options) == 0
    assert capsys.readouterr().err.count("stale cache: ") == 1
    assert "1 training images of the sweep cannot be read" in (tmp_path / "out" / "report.md").read_text()


def one_class(data: Path) -> None:
    for name in ("red", "green"):
        shutil.rmtree(data / "train" / name)
        shutil.rmtree(data / "val" / name)


def one_image(data: Path) -> None:
    for path in list((data / "train" / "red").iterdir())[1:]:
        path.unlink()


def another_class(data: Path) -> None:
    (data / "val" / "red").rename(data / "val" / "pink")


def no_validation(data: Path) -> None:
    shutil.rmtree(data / "val")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (one_class, "", "has 1 class (blue); a probe needs at least 2"),
        (one_image, "", "class 'red' has 1 readable training image; choices are made on held-out images"),
        (another_class, "", "labels differ between the splits: the training set lacks 1 validation classes (pink)"),
        (no_validation, "", "has no validation set"),
        (None, "--val-split nope", "has neither a folder 'nope'"),
        (None, "--model EBT --img-size 64", "was trained at 32 px, not at img_size=64"),
        (None, "--model no-such", "neither a shipped checkpoint"),
        (None, "--data no/such", "no/such is not a folder with splits; use one, or hub:OWNER/NAME, or add --val-data"),
        (None, "--layers block7", "pixels has no layer 'block7'"),
        (None, "--timesteps 3", "pixels takes no timestep"),
        (None, "--thinking-steps 2", "pixels does not think"),
        (None, "--noise-levels matched", "is the noise of a timestep, but pixels takes no timestep"),
        (None, "--noise-levels 2", "noise level 2 is not in [0, 1]"),
        (None, "--pool attention", "the logistic head cannot train attention pooling; use --heads torch"),
        (None, "--views 2", "only the torch head trains on random crops"),
        (None, "--held-out 1.5", "held-out share 1.5 is not between 0 and 1"),
        (None, "--limit-train 2", "lacks 1 validation classes"),
    ],
)
def test_bad_input_is_one_line(spoil, options, message, photos: Path, tmp_path: Path, tiny_checkpoint: Path, capsys):
    data = photos
    if spoil is not None:
        data = tmp_path / "data"
        shutil.copytree(photos, data)
        spoil(data)
    words = options.replace("EBT", str(tiny_checkpoint)).split()
    size = [] if "--img-size" in words else ["--img-size", "16"] if "--model" not in words else []
    assert probe("pixels", data, tmp_path / "out", "--heads", "logistic", *size, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("linear_probe: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_validation_set_that_cannot_be_used_is_said_for_its_own_reason(photos: Path, tmp_path: Path, capsys):
    """A null among its labels is no missing split."""
    encoded = [path.read_bytes() for path in sorted((photos / "train").rglob("*.png"))[:4]]
    for split, labels in (("train", ["a", "b", "a", "b"]), ("validation", ["a", None, "b", "a"])):
        images = pyarrow.array([{"bytes": data, "path": None} for data in encoded])
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), tmp_path / f"{split}-0.parquet")
    assert probe("pixels", tmp_path, tmp_path / "out", "--heads", "knn", "--img-size", "16") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "1 of 4 rows have no label in column 'label'" in line
        and "the first is row 1" in line
        and "has no validation" not in line
    )


def test_what_would_not_fit_in_memory_is_said_before_the_sweep(photos: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("ebt_vision.probing.heads.MAX_LOGISTIC_BYTES", 36 * 48 * 4 - 1)  # of all images, not of the sweep's
    options = ["--layers", "side4", "--img-size", "16", "--heads", "logistic", "--sweep-limit", "12"]
    assert probe("pixels", photos, tmp_path, *options) == 2
    assert "36 x 48 features are" in capsys.readouterr().err and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "words",
    ["--heads forest", "--pool cls", "--cs 0", "--noise-levels much", "--epochs 0", "--views -1", "--held-out nan"],
)
def test_options_that_are_no_good_are_one_line(words: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        probe("pixels", photos, tmp_path, *words.split())
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_full_disk_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    import errno

    from ebt_vision.probing import feature_cache

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache.np, "save", full)
    assert probe("pixels", photos, tmp_path, "--layers", "side4", "--img-size", "16") == 2
    assert "the disk of" in (line := capsys.readouterr().err.strip().splitlines()[-1]) and "is full; free space" in line
