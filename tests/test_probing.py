"""Probes: labels that agree, scores by hand, heads against other implementations, lazily read images and random crops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.data.lazy_images import LazyImages, random_box
from ebt_vision.data.sources import DataError
from ebt_vision.probing import heads
from ebt_vision.probing.feature_cache import FeatureRows
from ebt_vision.probing.heads import KnnHead, LogisticHead, ProbeSet
from ebt_vision.probing.labels import align_labels, stratified_split
from ebt_vision.probing.scores import measure, top_k_accuracy, wilson_interval
from ebt_vision.probing.torch_head import TorchHead

# --- labels


def test_classes_agree_by_name_or_by_number():
    """A folder without one class numbers the others differently, so names are used."""
    labels = align_labels([0, 1, 2], ["ant", "bee", "cat"], [1, 0, 0], ["bee", "cat"])
    assert labels.val.tolist() == [2, 1, 1] and labels.train.tolist() == [0, 1, 2] and labels.num_classes == 3
    labels = align_labels([10, 9, 101, 9], None, [101, 9], None)
    assert labels.class_names == ("9", "10", "101") and labels.train.tolist() == [1, 0, 2, 0] and labels.val.tolist() == [2, 0]
    named = align_labels([3, 1], ["a", "b", "c", "d"], [1], ["a", "b", "c", "d"])  # names without an image are no classes
    assert named.class_names == ("b", "d") and named.val.tolist() == [0]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((None, None, [0], None), "the training set has no labels; use class folders or --label-column"),
        (([0, 1], None, None, None), "the validation set has no labels"),
        (([0, 0], ["ant"], [0], ["ant"]), r"has 1 class \(ant\); a probe needs at least 2"),
        (([0, 1], ["a", "b"], [0, 1], ["a", "x"]), r"labels differ between the splits: .*lacks 1 validation classes \(x\)"),
        (([0, 1], ["a", "b"], [0, 1], None), "training set has class names, the validation set numbers"),
        (([0, 1], None, [0, 1], ["a", "b"]), "validation set has class names, the training set numbers"),
        (([0, 1, -1], None, [0], None), "training set has images without a label"),
    ],
)
def test_labels_that_no_probe_can_use(sets, message: str):
    with pytest.raises(DataError, match=message):
        align_labels(*sets)


def test_the_split_takes_of_every_class_and_knows_its_seed():
    labels = np.repeat([0, 1, 2], [40, 20, 3])
    usable = np.ones(63, bool)
    usable[5] = False
    fit, held = stratified_split(labels, usable, 0.1, 0, "abc")
    assert np.bincount(labels[held]).tolist() == [4, 2, 1] and sorted([*fit, *held]) == [i for i in range(63) if i != 5]
    assert np.array_equal(stratified_split(labels, usable, 0.1, 0, "abc")[1], held)
    assert not np.array_equal(stratified_split(labels, usable, 0.1, 1, "abc")[1], held)
    assert np.bincount(labels[stratified_split(labels, usable, 0.9, 0, "abc")[0]]).min() >= 1
    usable[[60, 61]] = False
    with pytest.raises(DataError, match="class 'c' has 1 readable training image; .*needs at least 2"):
        stratified_split(labels, usable, 0.1, 0, "abc")
    with pytest.raises(ValueError, match="held-out share 1 is not between 0 and 1"):
        stratified_split(labels, usable, 1.0, 0, "abc")


# --- scores


def test_scores_by_hand():
    scores = np.array([[9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [1, 9, 0, 0, 0, 0]], np.float32)
    labels = np.array([0, 0, 0])
    found = measure(scores, labels)
    assert found.top1 == pytest.approx(1 / 3) and found.top5 == pytest.approx(2 / 3)
    assert found.confusion[0].tolist() == [1, 1, 0, 0, 0, 1] and found.confusion.sum() == 3
    assert found.per_class[0] == pytest.approx(1 / 3) and np.isnan(found.per_class[1:]).all()
    assert top_k_accuracy(np.full((1, 3), np.nan), np.array([0]), 1) == 0.0
    assert measure(scores[:, :2], labels).top5 == 1.0


def test_the_interval_is_wilson_s():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


# --- heads


@pytest.fixture(scope="module")
def data() -> ProbeSet:
    """Overlapping clouds in 6 dimensions of unlike scale, 240 images in two shards; the last 60 are not used for fitting."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 240)
    rows = random.normal(size=(240, 6)) + 1.2 * np.eye(3)[labels] @ random.normal(size=(3, 6))
    rows = (rows * [1, 10, 0.1, 1, 1, 0] + [0, 50, 0, 0, 0, 3]).astype(np.float32)  # the last one is constant
    return ProbeSet(views=(FeatureRows([[rows[:150], rows[150:]]], 150),), labels=labels, num_classes=3)


FIT, HELD = np.arange(180), np.arange(180, 240)


def test_logistic_regression_is_scikit_learn_s(data: ProbeSet):
    head = LogisticHead([1.0, 0.01])
    trials = head.sweep(data, FIT, HELD)
    assert [trial.hyper for trial in trials] == [{"C": 0.01}, {"C": 1.0}] and all(trial.converged for trial in trials)
    x, labels = data.views[0].rows(np.arange(240)), data.labels
    for trial in trials:
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=trial.hyper["C"], max_iter=1000))
        reference.fit(x[FIT], labels[FIT])
        assert trial.top1 == pytest.approx(reference.score(x[HELD], labels[HELD]), abs=1.1 / 60)
        expected = reference.decision_function(x[HELD])
        scores = head.predict(data, FIT, trial.hyper, data.views[0], HELD)
        np.testing.assert_allclose(scores, expected, atol=0.02)
    two = ProbeSet(views=data.views, labels=(data.labels > 0).astype(int), num_classes=2)
    assert head.predict(two, FIT, {"C": 1.0}, data.views[0], HELD).shape == (60, 2)
    assert LogisticHead([1.0], max_iter=1).sweep(data, FIT, HELD)[0].converged is False


def test_knn_against_a_loop(data: ProbeSet, monkeypatch: pytest.MonkeyPatch):
    x = data.views[0].rows(np.arange(240))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.zeros((60, 3))
    for row, query in enumerate(unit[HELD]):
        cosine = unit[FIT] @ query
        for place in np.argsort(-cosine)[:20]:
            expected[row, data.labels[FIT[place]]] += np.exp(cosine[place] / 0.07)
    scores = KnnHead().predict(data, FIT, {"standardised": False}, data.views[0], HELD)
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    chunks = heads._chunks
    monkeypatch.setattr(heads, "_chunks", lambda indices, size: chunks(indices, 37))  # many pieces give the same
    np.testing.assert_allclose(KnnHead().predict(data, FIT, {"standardised": False}, data.views[0], HELD), scores, rtol=1e-5)
    trials = KnnHead().sweep(data, FIT, HELD)
    assert [trial.hyper["standardised"] for trial in trials] == [False, True] and trials[1].top1 > 0.5
    few = KnnHead().predict(data, FIT[:4], {"standardised": False}, data.views[0], HELD)  # fewer than k
    assert few.shape == (60, 3) and np.isfinite(few).all()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_the_torch_probe_learns_with_many_rates_at_once(optimizer: str, data: ProbeSet):
    rates = (1e-4, 1.0, 1e39) if optimizer == "sgd" else (1e-4, 300.0)
    head = TorchHead(optimizer=optimizer, learning_rates=rates, epochs=8, batch_size=32)
    trials = head.sweep(data, FIT, HELD)
    best = LogisticHead([0.1]).sweep(data, FIT, HELD)[0].top1
    assert trials[1].top1 == pytest.approx(best, abs=0.1) and trials[1].converged
    if optimizer == "sgd":  # one that diverges says so and harms no other
        assert not trials[2].converged and trials[2].top1 == 0.0
    alone = TorchHead(optimizer=optimizer, learning_rates=(rates[1],), epochs=8, batch_size=32).sweep(data, FIT, HELD)
    assert alone[0].top1 == trials[1].top1
    scores = head.predict(data, FIT, {"lr": rates[1]}, data.views[0], HELD)
    assert top_k_accuracy(scores, data.labels[HELD], 1) == trials[1].top1


def test_attention_pooling_finds_the_token_that_counts():
    """The class is in one of 8 tokens, marked by its last channel, at a random place: the mean drowns it."""
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, 400)
    tokens = random.normal(size=(400, 8, 8)).astype(np.float32)
    tokens[..., 7] = 0
    place = random.integers(0, 8, 400)
    tokens[np.arange(400), place, 7] = 1
    tokens[np.arange(400), place, 0] = 2.0 * labels - 1
    fit, held = np.arange(300), np.arange(300, 400)
    head = TorchHead(learning_rates=(3.0,), epochs=20, batch_size=50)
    found = {}
    for name, rows in {"attention": tokens, "mean": tokens.mean(1)}.items():
        found[name] = head.sweep(ProbeSet(views=(FeatureRows([[rows]], 400),), labels=labels, num_classes=2), fit, held)[0].top1
    assert found["attention"] > found["mean"] + 0.1


def test_each_epoch_trains_on_the_next_view(data: ProbeSet):
    """The centred squares are noise here and are not trained on; the two views hold the classes."""
    x = data.views[0].rows(np.arange(240))
    noise = FeatureRows([[np.random.default_rng(2).normal(size=x.shape).astype(np.float32)]], 240)
    views = [FeatureRows([[x]], 240) for _ in range(2)]
    read = []
    for number, view in enumerate(views):
        rows = view.rows
        view.rows = lambda indices, rows=rows, number=number: (read.append(number), rows(indices))[1]  # type: ignore[method-assign]
    several = ProbeSet(views=(noise, *views), labels=data.labels, num_classes=3)
    head = TorchHead(learning_rates=(1.0,), epochs=5, batch_size=90)
    scores = head.predict(several, FIT, {"lr": 1.0}, data.views[0], HELD)
    assert read == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0] and top_k_accuracy(scores, data.labels[HELD], 1) > 0.5


def test_heads_refuse_what_cannot_be():
    for bad in (lambda: LogisticHead([0.0]), lambda: TorchHead(epochs=0), lambda: TorchHead(learning_rates=[-1.0])):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(ValueError, match="optimizer='adam' is unknown; use sgd or lars"):
        TorchHead(optimizer="adam")
    LogisticHead([1.0]).check_size(1_000_000, 900)
    with pytest.raises(ValueError, match="are 6.1 GB, too many for logistic regression; use --heads torch"):
        LogisticHead([1.0]).check_size(1_000_000, 1536)


# --- images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(6):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (37, 50, 3), dtype=np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    (folder / "a" / "1.png").write_bytes(b"not an image")
    return folder


def test_lazy_images_are_those_of_an_image_set(photos: Path):
    config = DataConfig(path=str(photos), img_size=16)
    lazy, whole = LazyImages(config), load_image_set(config)
    assert len(lazy) == 7 and len(whole) == 6 and lazy.labels == [0, 0, 0, 0, 1, 1, 1] and lazy.class_names == ["a", "b"]
    pixels, readable = lazy.read(range(7))
    assert readable.tolist() == [True, False, True, True, True, True, True] and lazy.name(1) == "a/1.png"
    assert torch.equal(pixels[torch.from_numpy(readable)], whole.images(range(6))) and not pixels[1].any()
    some = LazyImages(DataConfig(path=str(photos), img_size=16, limit=3))
    assert some.entries == [0, 2, 4] and some.labels == [0, 0, 1]
    assert torch.equal(some.read([1])[0], pixels[2:3])


def test_random_views_are_of_the_seed_the_view_and_the_image(photos: Path):
    lazy = LazyImages(DataConfig(path=str(photos), img_size=16), seed=1)
    first = lazy.read([2, 4], 1)[0]
    assert torch.equal(lazy.read([4], 1)[0], first[1:])
    others = [lazy.read([4], 2)[0], LazyImages(lazy.config, seed=2).read([4], 1)[0], lazy.read([4])[0]]
    assert all(not torch.equal(other, first[1:]) for other in others)
    part = LazyImages(DataConfig(path=str(photos), img_size=16, limit=3), seed=1)
    assert torch.equal(part.read([1, 2], 1)[0], first)  # an image has its views in whatever part of the set it stands


def test_random_boxes_are_inside_and_of_every_size():
    draws = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)).tolist()
    areas = []
    for left, top, right, bottom in (random_box(37, 50, draw) for draw in draws):
        assert 0 <= left < right <= 50.001 and 0 <= top < bottom <= 37.001
        areas.append((right - left) * (bottom - top) / (37 * 50))
    assert 0.07 < min(areas) < 0.12 and max(areas) > 0.9 and np.mean(areas) == pytest.approx(0.5, abs=0.06)


def test_the_fingerprint_follows_the_files(tmp_path: Path, photos: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)  # with the times of change
    one, other = (LazyImages(DataConfig(path=str(path), img_size=16)).fingerprint for path in (photos, copy))
    assert one == other
    (copy / "a" / "6.png").symlink_to(copy / "nowhere.png")
    linked = LazyImages(DataConfig(path=str(copy), img_size=16))
    assert linked.fingerprint != one and not linked.read([4])[1].any()  # an image that cannot be read, and no more than that
    (copy / "a" / "6.png").unlink()
    Image.new("RGB", (40, 40)).save(copy / "a" / "2.png")
    assert LazyImages(DataConfig(path=str(copy), img_size=16)).fingerprint != one
