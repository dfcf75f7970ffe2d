"""The benchmark in several processes: the results of one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from ebt_vision.benchmark.processes import OtherProcessFailedError, Processes
from ebt_vision.core.sharing import Share

ROOT = Path(__file__).parents[1]


def without_time(value: object) -> object:
    """The value without what two runs of one command differ in."""
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k not in ("about", "seconds_per_image")}
    return [without_time(v) for v in value] if isinstance(value, list) else value


def run(command: list[str], folder: Path, count: int) -> dict:
    """results.json of the benchmark in `count` processes, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, str(ROOT / "eval" / "denoising.py"), *command, "--output", str(folder)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, env=os.environ | own, stdout=pipe, stderr=pipe, text=True))
    ended = [process.communicate(timeout=280) for process in started]
    assert [process.returncode for process in started] == [0] * count, [errors for _, errors in ended]
    assert all(not out for out, _ in ended[1:])  # the first one speaks for all
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path: Path, tiny_checkpoint: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{seed}.png")
    command = ["--models", str(tiny_checkpoint), "identity", "--data", str(photos), "--img-size", "32", "--batch-size", "2"]
    command += ["--levels", "0.1", "--sweep", "--steps", "2", "--candidates", "2", "--strip", "0", "--device", "cpu"]
    one, two = (run(command, tmp_path / str(count), count) for count in (1, 2))
    assert one["rows"] and without_time(two) == without_time(one)
    parts = [sorted(p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).rglob("*.npz")) for n in "12"]
    assert parts[0] == parts[1]


def test_shares_are_joined_in_the_order_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    whole = list("abcdefg")
    shares = [Share(index=index, count=3).of(whole) for index in range(3)]
    processes = Processes(Share(index=1, count=3))
    monkeypatch.setattr(processes, "gather", lambda own: shares)
    assert shares[1] == ["b", "e"] and processes.join(shares[1]) == whole
    assert not processes.is_main
    with Processes(Share()) as alone:
        assert alone.is_main and alone.join(whole) == whole


def in_processes(work: Callable[[Processes], object], count: int = 3) -> list[object]:
    """What `work` returns in each of several processes, here threads of one store; an error is returned, not raised."""
    store = dist.HashStore()

    def one(index: int) -> object:
        try:
            with Processes(Share(index=index, count=count), store) as processes:
                return work(processes)
        except (ValueError, OtherProcessFailedError) as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def test_every_process_hears_of_every_value_in_every_round():
    def work(processes: Processes) -> list[list[int]]:
        return [processes.gather(10 * i + processes.share.index) for i in range(4)]

    assert in_processes(work) == [[[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]] * 3


def test_no_process_waits_for_one_that_failed():
    def work(processes: Processes) -> list[int]:
        if processes.share.index == 1:
            raise ValueError("bad input")
        return processes.gather(0)

    first, second, third = in_processes(work)
    assert isinstance(second, ValueError)
    for error in (first, third):
        assert isinstance(error, OtherProcessFailedError) and "process 1 failed" in str(error)
