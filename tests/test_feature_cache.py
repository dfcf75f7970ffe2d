"""The cache of features: made once, atomic, checked by checksums, shared by processes."""

import errno
import multiprocessing
import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from ebt_vision.probing import feature_cache
from ebt_vision.probing.feature_cache import READABLE, CacheError, FeatureCache, FeatureRows, default_shard_size

NUM_IMAGES, SHARD_SIZE = 23, 5


def make_cache(root: Path, *, weights: str = "w", dtype: str = "float16", **settings) -> FeatureCache:
    return FeatureCache(
        root, "net/a b-train", {"dtype": dtype, **settings}, {"weights": weights}, NUM_IMAGES, shard_size=SHARD_SIZE
    )


def values(indices: range, name: str) -> np.ndarray:
    """Rows that contain their image number: (rows, 3), or (rows, 2, 3) for the name "tokens"."""
    rows = np.arange(indices.start, indices.stop, dtype=np.float32)[:, None] + np.array([0.0, 0.25, 0.5], np.float32)
    return np.stack([rows, -rows], axis=1) if name == "tokens" else rows * (2 if name == "twice" else 1)


def compute(indices: range, names: list[str]) -> dict[str, np.ndarray]:
    return {name: np.array([i != 7 for i in indices]) if name == READABLE else values(indices, name) for name in names}


class Watched:
    """A `compute` that records its calls and may fail at a shard."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[tuple[int, list[str]]] = []
        self.fail_at, self.error = fail_at, error or KeyboardInterrupt()

    def __call__(self, indices: range, names: list[str]) -> dict[str, np.ndarray]:
        if len(self.asked) == self.fail_at:
            raise self.error
        self.asked.append((indices.start, names))
        return compute(indices, names)


def fill(cache: FeatureCache, names: list[str], by=compute) -> list[str]:
    """The messages."""
    said: list[str] = []
    cache.fill(names, by, said.append, lambda done: None)
    return said


def test_rows_come_back_in_any_order_side_by_side_and_as_tokens(tmp_path: Path):
    cache = make_cache(tmp_path)
    assert fill(cache, ["once", "twice", "tokens"]) == [] and cache.num_shards == 5
    rows = cache.open(["once", "twice"])
    indices = [22, 0, 5, 4, 5]
    assert rows.shape == (23, 6) and len(rows) == 23
    expected = np.concatenate([values(range(23), "once")[indices], values(range(23), "twice")[indices]], axis=1)
    assert np.array_equal(rows.rows(indices), expected) and rows.rows(indices).dtype == np.float32
    assert np.array_equal(cache.open(["tokens"]).rows(range(23)), values(range(23), "tokens"))
    assert np.flatnonzero(~cache.readable()).tolist() == [7]
    assert np.load(cache.folder / "once" / "00000.npy").dtype == np.float16
    assert all(isinstance(shard, np.memmap) for shard in rows._shards[0])


def test_only_what_is_missing_is_made(tmp_path: Path):
    fill(make_cache(tmp_path), ["once"])
    again, more = Watched(), Watched()
    fill(make_cache(tmp_path), ["once"], again)
    fill(make_cache(tmp_path), ["once", "twice"], more)
    assert again.asked == [] and more.asked == [(start, ["twice"]) for start in range(0, 23, 5)]


def test_an_interrupted_extraction_goes_on(tmp_path: Path):
    first, second = Watched(fail_at=2), Watched()
    with pytest.raises(KeyboardInterrupt):
        fill(make_cache(tmp_path), ["once"], first)
    cache = make_cache(tmp_path)
    with pytest.raises(CacheError, match="lacks 3 of 5 shards"):
        cache.open(["once"])
    fill(cache, ["once"], second)
    assert [start for start, _ in first.asked] == [0, 5] and [start for start, _ in second.asked] == [10, 15, 20]
    assert np.array_equal(cache.open(["once"]).rows(range(23)), values(range(23), "once"))


def test_what_a_killed_process_left_half_done_is_made_again(tmp_path: Path):
    cache = make_cache(tmp_path)
    fill(cache, ["once"])
    shard = cache.folder / "once" / "00001.npy"
    shard.with_suffix(".json").unlink()  # killed between the features and their checksum
    (cache.folder / "once" / "00001.999.writing").write_bytes(b"half")
    watched = Watched()
    fill(make_cache(tmp_path), ["once"], watched)
    assert watched.asked == [(5, ["once"])] and not list(cache.folder.rglob("*.writing"))


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:40], lambda data: b""])
def test_a_damaged_shard_is_found_and_made_again(damage, tmp_path: Path):
    cache = make_cache(tmp_path)
    fill(cache, ["once"])
    path = cache.folder / "once" / "00002.npy"
    path.write_bytes(damage(path.read_bytes()))
    watched, cache = Watched(), make_cache(tmp_path)
    (said,) = fill(cache, ["once"], watched)
    assert str(path) in said and "damaged" in said and watched.asked == [(10, ["once"])]
    assert np.array_equal(cache.open(["once"]).rows(range(23)), values(range(23), "once"))


def test_other_weights_or_settings_are_another_folder(tmp_path: Path):
    first = make_cache(tmp_path)
    fill(first, ["once"])
    assert make_cache(tmp_path).folder == first.folder and first.stale() == []
    changed = make_cache(tmp_path, weights="v")
    watched = Watched()
    fill(changed, ["once"], watched)
    assert len(watched.asked) == 5 and changed.folder != first.folder and changed.stale() == [first.folder]
    assert make_cache(tmp_path, seed=1).folder != first.folder and make_cache(tmp_path, seed=1).stale() == []
    (first.folder / "key.json").write_text("{}")
    with pytest.raises(CacheError, match="stale cache: .*delete"):
        make_cache(tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, done = np.save, []

    def full(file, array, **options):
        if len(done) == 4:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(file.name)
        save(file, array, **options)

    monkeypatch.setattr(feature_cache.np, "save", full)
    with pytest.raises(CacheError, match="disk of .* is full; free space or choose another --cache"):
        fill(make_cache(tmp_path), ["once"])
    assert not list(tmp_path.rglob("*.writing"))
    monkeypatch.setattr(feature_cache.np, "save", save)
    watched = Watched()
    fill(make_cache(tmp_path), ["once"], watched)
    assert [start for start, _ in watched.asked] == [10, 15, 20]


def test_too_little_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = make_cache(tmp_path)
    cache.check_space({"once": 6})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
    with pytest.raises(CacheError, match="need about 2.50 GB, but .* has only 1.00 GB left"):
        cache.check_space({"once": 10**8})
    fill(cache, ["once"])
    cache.check_space({"once": 10**8})  # nothing is missing


def test_values_that_do_not_fit(tmp_path: Path):
    big = lambda indices, names: {n: a if n == READABLE else a * 1e5 for n, a in compute(indices, names).items()}  # noqa: E731
    with pytest.raises(CacheError, match="too large for float16; use float32"):
        fill(make_cache(tmp_path), ["once"], big)
    fill(make_cache(tmp_path, dtype="float32"), ["once"], big)
    broken = lambda indices, names: {n: a * (1 if n == READABLE else np.nan) for n, a in compute(indices, names).items()}  # noqa: E731
    with pytest.raises(CacheError, match="once has values that are not finite"):
        fill(make_cache(tmp_path / "other"), ["once"], broken)
    with pytest.raises(CacheError, match="dtype='int8' is unknown"):
        make_cache(tmp_path, dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be used .*choose another --cache"):
        make_cache(tmp_path / "file")


def _slow_worker(root: Path, log: Path) -> None:
    def slow(indices: range, names: list[str]) -> dict[str, np.ndarray]:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {indices.start}\n")
        time.sleep(0.1)
        return compute(indices, names)

    fill(make_cache(root), ["once"], slow)


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_cache, "WAIT_SECONDS", 0.05)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_slow_worker, args=(tmp_path, tmp_path / "log")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    starts = [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(starts) == [0, 5, 10, 15, 20]  # each shard once, whoever made it
    assert np.array_equal(make_cache(tmp_path).open(["once"]).rows(range(23)), values(range(23), "once"))


def test_the_claim_of_a_killed_process_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_cache, "WAIT_SECONDS", 0.05)
    log = tmp_path / "log"

    def hang(indices: range, names: list[str]) -> dict[str, np.ndarray]:
        log.write_text("claimed")
        time.sleep(60)
        raise AssertionError("it should have been killed")

    worker = multiprocessing.get_context("fork").Process(target=fill, args=(make_cache(tmp_path), ["once"], hang))
    worker.start()
    while not log.exists():
        time.sleep(0.02)
    assert worker.pid is not None
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        os.kill(worker.pid, signal.SIGKILL)  # once we wait for it

    make_cache(tmp_path).fill(["once"], compute, say, lambda done: None)
    worker.join(10)
    assert len(said) == 1 and "waiting for another process" in said[0]
    assert make_cache(tmp_path).missing(["once"]) == {}


def test_shards_of_large_sets():
    assert default_shard_size(300) == 1000 and default_shard_size(100_000) == 1000
    size = default_shard_size(1_281_167)
    assert -(-1_281_167 // size) <= 200
    rows = FeatureRows([[np.ones((2, 3)), np.zeros((1, 3))]], 2)
    assert rows.shape == (3, 3) and rows.rows([2, 1]).tolist() == [[0, 0, 0], [1, 1, 1]]
