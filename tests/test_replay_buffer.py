"""The replay buffer: rows leave, return older, and all ages are equally common."""

import torch

from ebt_vision.core.rng import make_generator
from ebt_vision.training.replay_buffer import ReplayBuffer, ReplayConfig


def test_a_sampled_row_leaves_with_all_its_tensors_and_its_age():
    buffer = ReplayBuffer(ReplayConfig(capacity=8, share=1.0, max_age=5))
    values = torch.arange(4.0)
    buffer.add({"candidate": values[:, None], "clean": -values[:, None]}, torch.ones(4, dtype=torch.int64))
    rows, ages = buffer.sample(3, make_generator(0))
    assert torch.equal(rows["candidate"], -rows["clean"]) and ages.tolist() == [1, 1, 1]
    left = buffer.rows["candidate"]
    assert sorted(torch.cat([rows["candidate"], left]).flatten().tolist()) == [0.0, 1.0, 2.0, 3.0] and len(buffer) == 1


def test_finished_trajectories_go_and_old_ones_come_before_new_ones():
    buffer = ReplayBuffer(ReplayConfig(capacity=2, share=0.5, max_age=3))
    buffer.add({"candidate": torch.tensor([10.0, 11.0, 12.0, 13.0])}, torch.tensor([1, 3, 2, 1]))
    assert buffer.rows["candidate"].tolist() == [12.0, 10.0] and buffer.ages.tolist() == [2, 1]


def test_every_age_is_equally_common():
    buffer = ReplayBuffer(ReplayConfig(capacity=64, share=0.5, max_age=6))
    counts = torch.zeros(7)
    for step in range(3000):
        ages = torch.zeros(8, dtype=torch.int64)
        _, old = buffer.sample(8, make_generator(1, step))
        if len(old):
            ages[-len(old) :] = old
        if step > 500:
            counts += torch.bincount(old, minlength=7)
        buffer.add({"candidate": torch.zeros(8, 1)}, ages + 1)
    shares = counts[1:6] / counts.sum()
    assert counts[0] == 0 and counts[6] == 0
    assert shares.min() > 0.18 and shares.max() < 0.22


def test_the_state_comes_back_whole():
    buffer = ReplayBuffer(ReplayConfig(capacity=4, share=0.5, max_age=3))
    buffer.add({"candidate": torch.randn(3, 2), "clean": torch.randn(3, 2)}, torch.tensor([1, 2, 1]))
    other = ReplayBuffer(buffer.config)
    other.load_state_dict(buffer.state_dict())
    ours, theirs = buffer.sample(2, make_generator(3)), other.sample(2, make_generator(3))
    assert torch.equal(ours[0]["candidate"], theirs[0]["candidate"]) and torch.equal(ours[1], theirs[1])


def test_an_empty_buffer_gives_nothing():
    rows, ages = ReplayBuffer(ReplayConfig(capacity=4)).sample(8, make_generator(0))
    assert rows == {} and len(ages) == 0
