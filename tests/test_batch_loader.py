"""Batches prepared in advance: the same, in order, on time; errors are raised when the batch is requested."""

import threading
from pathlib import Path

import pytest
import torch
from test_training import REPLAY, assert_bit_equal, experiment, photos, train  # noqa: F401  (a fixture)

from ebt_vision.core.rng import randn_like, sample_generators
from ebt_vision.data.order import BatchStream
from ebt_vision.objectives.text import TextBatch
from ebt_vision.training.batch_loader import BatchLoader
from ebt_vision.training.config import ConfigError, build_config


def test_a_run_with_threads_ends_with_bit_equal_weights(photos: Path, tmp_path: Path):  # noqa: F811
    raw = experiment(photos, replay=REPLAY, train=dict(num_updates=6, num_accumulation=2), data=dict(cache=False))
    raw["validation"] = dict(path=None)
    train(raw, tmp_path / "plain")
    threaded = raw | {"train": raw["train"] | dict(num_load_threads=3)}
    train(threaded, tmp_path / "threaded")
    assert_bit_equal(tmp_path / "plain", tmp_path / "threaded")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def make(indices: list[int], epochs: list[int]) -> TextBatch:
    """A batch that contains its sample numbers."""
    if 7 in indices:
        raise OSError("sample 7 has vanished")
    tokens, generators = torch.tensor(indices)[:, None], sample_generators(0, indices)
    start = randn_like(torch.zeros(len(indices), 1, 4), generators)
    return TextBatch(tokens=tokens, targets=tokens, starts=tokens * 0, generators=generators, start=start)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_parts_come_in_order_and_errors_where_they_are_asked_for(num_threads: int):
    stream = BatchStream(8, 4, seed=0)
    loader = BatchLoader(make, torch.device("cpu"), num_threads=num_threads, num_parts=2)
    for indices in stream:
        if indices.step == 4:
            break
        loader.prepare(stream, indices.step, 4)
        for part, wanted in enumerate(indices.indices.chunk(2)):
            if 7 in wanted:
                with pytest.raises(OSError, match="sample 7"):
                    loader.take(indices, part)
            else:
                assert torch.equal(loader.take(indices, part).tokens[:, 0], wanted)
    loader.close()


def test_a_negative_number_of_threads_is_refused(photos: Path):  # noqa: F811
    with pytest.raises(ConfigError, match="num_load_threads=-1 is negative"):
        build_config(experiment(photos, train=dict(num_load_threads=-1)))
