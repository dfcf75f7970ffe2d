"""Many images: order, reading ahead, claims between processes, and shares of accelerate launch."""

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from ebt_vision.commands.console import BAD_INPUT
from ebt_vision.commands.image_jobs import run_jobs, write_result
from ebt_vision.commands.pipeline import Job, Pipeline
from ebt_vision.core.sharing import CLAIMS, Share, shared_folder
from ebt_vision.data.image_files import ImageFile


def jobs_in(folder: Path, count: int) -> list[Job]:
    return [Job(source=folder / f"in{i}", target=folder / "out" / f"{i}.txt") for i in range(count)]


def pipeline(folder: Path, **parts: Callable) -> Pipeline[str, str]:
    def work(job: Job, read: str) -> Callable[[], str]:
        def write() -> str:
            job.target.write_text(read)
            return read

        return write

    parts = {"read": lambda job: job.source.name, "work": work, "is_done": lambda job: job.target.exists()} | parts
    return Pipeline(folder / "out", **parts)  # type: ignore[arg-type]


def test_outcomes_come_in_order_and_no_lock_is_left(tmp_path: Path):
    jobs = jobs_in(tmp_path, 7)
    outcomes = list(pipeline(tmp_path).run(jobs))
    assert [outcome.value for outcome in outcomes] == [f"in{i}" for i in range(7)]
    assert [outcome.job for outcome in outcomes] == jobs
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i}.txt" for i in range(7)]
    assert list(pipeline(tmp_path / "none").run([])) == []


def test_the_next_image_is_read_while_one_is_worked_on(tmp_path: Path):
    second_is_read = threading.Event()

    def read(job: Job) -> str:
        if job.source.name == "in1":
            second_is_read.set()
        return job.source.name

    def work(job: Job, read: str) -> Callable[[], str]:
        assert job.source.name != "in0" or second_is_read.wait(timeout=30)
        return lambda: read

    outcomes = list(pipeline(tmp_path, read=read, work=work).run(jobs_in(tmp_path, 2)))
    assert [(outcome.value, outcome.error) for outcome in outcomes] == [("in0", None), ("in1", None)]


@pytest.mark.parametrize("stage", ["read", "work", "write"])
def test_an_error_is_the_outcome_of_its_job_alone(stage: str, tmp_path: Path):
    def fail(job: Job, at: str) -> str:
        if job.source.name == "in1" and at == stage:
            raise ValueError(at)
        return job.source.name

    def work(job: Job, read: str) -> Callable[[], str]:
        fail(job, "work")
        return lambda: fail(job, "write")

    outcomes = list(pipeline(tmp_path, read=lambda job: fail(job, "read"), work=work).run(jobs_in(tmp_path, 3)))
    assert [outcome.value for outcome in outcomes] == ["in0", None, "in2"]
    assert str(outcomes[1].error) == stage and not (tmp_path / "out" / CLAIMS).exists()


def test_an_interrupt_comes_after_what_is_done(tmp_path: Path):
    def work(job: Job, read: str) -> Callable[[], str]:
        if job.source.name == "in2":
            raise KeyboardInterrupt
        return lambda: read

    done = []
    with pytest.raises(KeyboardInterrupt):
        for outcome in pipeline(tmp_path, work=work).run(jobs_in(tmp_path, 5)):
            done.append(outcome.value)
    assert done == ["in0", "in1"] and not (tmp_path / "out" / CLAIMS).exists()


def test_what_another_process_has_or_has_done_is_left_to_it(tmp_path: Path):
    jobs = jobs_in(tmp_path, 3)
    held = []

    def read(job: Job) -> str:
        if job is jobs[0]:  # another process claims the second image, and finishes the third
            name = next((tmp_path / "out" / CLAIMS).iterdir()).name
            assert name.endswith(".lock")
            held.append(FileLock(pipeline(tmp_path)._claim(jobs[1]).lock_file, thread_local=False))  # type: ignore[union-attr]
            held[0].acquire(timeout=5)
            jobs[2].target.write_text("another's")
        return job.source.name

    outcomes = list(pipeline(tmp_path, read=read).run(jobs))
    assert [(outcome.value, outcome.error) for outcome in outcomes] == [("in0", None), (None, None), (None, None)]
    assert jobs[2].target.read_text() == "another's" and not jobs[1].target.exists()
    held[0].release()


def test_the_folder_of_claims_stays_while_a_process_is_in_it(tmp_path: Path):
    first, second = shared_folder(tmp_path / "claims"), shared_folder(tmp_path / "claims")
    with first:
        with second:
            pass
        assert (tmp_path / "claims").is_dir()
    assert not (tmp_path / "claims").exists()


def test_a_folder_that_is_removed_while_a_process_enters_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder, flock, removed = tmp_path / "claims", fcntl.flock, []

    def remove_then_lock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and len(removed) < 3:
            folder.rmdir()
            removed.append(True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with shared_folder(folder):
        assert folder.is_dir() and len(removed) == 3
    assert not folder.exists()


def test_shares_are_whole_and_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    jobs = jobs_in(tmp_path, 8)
    assert Share.of_environment().of(jobs) == jobs and Share.of_environment().device("cuda") == "cuda"
    shares = []
    for rank in range(3):
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank % 2}.items():
            monkeypatch.setenv(name, str(value))
        share = Share.of_environment()
        assert share.device("cuda") == f"cuda:{rank % 2}" and share.device("cpu") == "cpu"
        shares.append(share.of(jobs))
    assert sorted(sum(shares, []), key=jobs.index) == jobs
    assert [len(share) for share in shares] == [3, 3, 2]


@pytest.mark.parametrize("first", [0, 1])
def test_a_process_that_starts_late_has_the_same_share(first: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / f"{i}.png")
    worked: list[list[str]] = []

    def work(job: Job, image: ImageFile) -> Callable[[], str]:
        worked[-1].append(job.source.name)
        return lambda: write_result(job, image, job.source.name, overwrite=False)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (first, 1 - first):
        worked.append([])
        monkeypatch.setenv("RANK", str(rank))
        assert run_jobs([tmp_path / "in"], tmp_path / "out", lambda: work, overwrite=False, png=False) == 0
    assert worked[first] == ["0.png", "2.png", "4.png"] and worked[1 - first] == ["1.png", "3.png"]
    assert run_jobs([tmp_path / "in"], tmp_path / "out", lambda: work, overwrite=False, png=False) == BAD_INPUT  # they exist


def test_several_processes_do_not_write_into_the_folder_that_they_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="choose another --output"):
        run_jobs([tmp_path], tmp_path / "." / "", lambda: pytest.fail("nothing is loaded"), overwrite=True, png=True)


def test_the_first_process_counts_the_inputs_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, status in ((0, BAD_INPUT), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert run_jobs([tmp_path / "none.png"], tmp_path / "out", pytest.fail, overwrite=False, png=False) == status


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"RANK": "x"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
    ],
)
def test_ranks_that_do_not_fit_are_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the environment has .*(RANK|WORLD_SIZE).*; start several processes with accelerate"):
        Share.of_environment()


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_two_processes_denoise_each_image_once(launched: bool, tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i:02d}.png")
    command = [sys.executable, "-m", "ebt_vision", "denoise", tmp_path / "in", "--output", tmp_path / "out"]
    command += ["--model", tiny_checkpoint, "--device", "cpu"]
    environments = [
        os.environ | ({"RANK": str(r), "WORLD_SIZE": "2", "LOCAL_RANK": str(r)} if launched else {}) for r in (0, 1)
    ]
    runs = [subprocess.Popen(command, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for e in environments]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs if launched] in ([], [0, 0]), outputs
    lines = [line.split(" -> ")[0].rsplit("/", 1)[1] for out, _ in outputs for line in out.splitlines()]
    assert sorted(lines) == [f"{i:02d}.png" for i in range(12)], outputs
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(lines)
    if launched:
        assert [len(out.splitlines()) for out, _ in outputs] == [6, 6]
