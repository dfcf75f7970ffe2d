import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebt_vision.data.order import BatchStream, epoch_order


def test_an_epoch_is_a_permutation_of_its_seed_and_number():
    order = epoch_order(100, seed=3, epoch=2)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, 3, 2))
    assert not torch.equal(order, epoch_order(100, 3, 1))
    assert not torch.equal(order, epoch_order(100, 4, 2))


def test_the_global_random_stream_is_untouched():
    before = torch.get_rng_state()
    next(BatchStream(10, 4, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_tail_and_head_are_joined_and_every_sample_is_seen_once_an_epoch():
    batches = list(itertools.islice(BatchStream(10, 4, seed=1), 5))  # 20 samples: two epochs
    assert all(len(batch.indices) == 4 for batch in batches)
    epochs, indices = (torch.cat([getattr(b, name) for b in batches]) for name in ("epochs", "indices"))
    assert epochs.tolist() == [0] * 10 + [1] * 10
    for epoch in (0, 1):
        assert torch.equal(indices[epochs == epoch], epoch_order(10, 1, epoch))
    assert torch.cat([b.positions for b in batches]).tolist() == list(range(20))
    assert [b.step for b in batches] == [0, 1, 2, 3, 4]


@settings(max_examples=30)
@given(
    num_samples=st.integers(1, 23),
    per_process=st.integers(1, 7),
    world_size=st.integers(1, 4),
    start=st.integers(0, 12),
    seed=st.integers(0, 5),
)
def test_processes_together_see_the_global_batch_wherever_they_start(num_samples, per_process, world_size, start, seed):
    size = per_process * world_size
    alone = BatchStream(num_samples, size, seed)
    for _ in range(start):
        next(alone)
    ranks = [BatchStream(num_samples, size, seed, rank, world_size, start_step=start) for rank in range(world_size)]
    for _ in range(3):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert {part.step for part in parts} == {whole.step}
        for name in ("epochs", "indices", "positions"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_batch_larger_than_the_set():
    batch = next(BatchStream(3, 8, seed=0))
    assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch.indices[:3].tolist()) == [0, 1, 2]


def test_batches_that_cannot_be_shared():
    with pytest.raises(ValueError, match="use 8"):
        BatchStream(10, 7, seed=0, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank=2"):
        BatchStream(10, 8, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="num_samples=0"):
        BatchStream(0, 8, seed=0)
