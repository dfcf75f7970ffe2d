"""Several real processes (torch.distributed.run, gloo): gradients, replay, resuming, errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import REPLAY, experiment, photos, weights  # noqa: F401  (a fixture)

from ebt_vision.training.config import ConfigError, build_config
from ebt_vision.training.loop import Trainer

ROOT = Path(__file__).parents[1]
UNROLLED = dict(thinking=dict(num_steps=2, detach_between_steps=False, step_size_factor=1.5))


def launch(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes to its end."""
    process = start(tmp_path, script, *arguments)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(tmp_path: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a script in two processes, which share a process group with torchrun as a terminal's do."""
    path = tmp_path / "worker.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(path), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )


def gradients(raw: dict, output: Path) -> list[torch.Tensor]:
    """Every gradient of the first update, in float64, as the optimiser gets it."""
    from test_training import first_gradients

    torch.set_default_dtype(torch.float64)
    try:
        trainer = Trainer(build_config(raw), output, device="cpu")
        torch.manual_seed(1)  # a head that is no longer zero: else most gradients are
        torch.nn.init.normal_(trainer.model.head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
        make_batch = trainer.task.make_batch

        def in_float64(*arguments: object) -> object:
            batch = make_batch(*arguments)  # type: ignore[arg-type]
            object.__setattr__(batch, "clean", batch.clean.double())
            object.__setattr__(batch, "noise", batch.noise.double())
            return batch

        trainer.task.make_batch = in_float64  # type: ignore[method-assign]
        return first_gradients(trainer)
    finally:
        torch.set_default_dtype(torch.float32)


GRADIENTS = """
import os, sys, torch, yaml
from pathlib import Path
from safetensors.torch import save_file
from test_processes import gradients
folder = Path(sys.argv[1])
for name, raw in yaml.safe_load((folder / "cases.yaml").read_text()).items():
    found = gradients(raw, folder / name)
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        save_file({str(i): g.contiguous() for i, g in enumerate(found)}, folder / f"{name}.safetensors")
torch.distributed.barrier()
os._exit(0)  # threads of gloo can abort a process at its end (pytorch/pytorch#179291)
"""


@pytest.mark.slow
def test_two_processes_with_half_the_batch_give_the_one_process_gradients(photos: Path, tmp_path: Path):  # noqa: F811
    """Second order through DDP, accumulation and activation checkpointing: the mean of the parts is the whole, to 1e-10."""
    wide = dict(embed_dim=48)
    cases = {
        "quadratic": experiment(photos, objective=UNROLLED),
        "linear": experiment(photos, objective=UNROLLED, model=wide | dict(energy_head="linear")),
        "accumulated": experiment(photos, objective=UNROLLED, train=dict(num_accumulation=2)),
        "checkpointed": experiment(photos, objective=UNROLLED, train=dict(checkpoint_blocks=True)),
    }
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    done = launch(tmp_path, GRADIENTS, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    for name, raw in cases.items():
        plain = raw | {"train": raw["train"] | dict(num_accumulation=1, checkpoint_blocks=False)}
        alone, both = gradients(plain, tmp_path / f"{name}-alone"), load_file(tmp_path / f"{name}.safetensors")
        assert sum(g.abs().max() > 1e-4 for g in alone) > len(alone) / 2, name
        for i, gradient in enumerate(alone):
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(both[str(i)], gradient, rtol=1e-10, atol=1e-14, msg=f"{name} {i}")


TRAIN = """
import sys
from ebt_vision.cli import main
sys.exit(main(["train", sys.argv[1], "--output", sys.argv[2], "--device", "cpu", *sys.argv[3:]]))
"""


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(photos: Path, tmp_path: Path):  # noqa: F811
    """Four updates by two processes and four by one end where eight by one do: no draw depends on the processes."""
    raw = experiment(photos, train=dict(num_updates=8, checkpoint_every=4, batch_size=8, log_every=8))
    raw["validation"] = dict(path=None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    done = launch(tmp_path, TRAIN, str(config), str(tmp_path / "shared"), "train.num_updates=4", "optim.lr=2e-3")
    assert done.returncode == 0, done.stderr[-2000:]
    first = Trainer(build_config(raw), tmp_path / "shared", device="cpu")
    assert first.step == 4
    short = raw | {"train": raw["train"] | dict(num_updates=4)}
    (tmp_path / "alone").mkdir()
    Trainer(build_config(short), tmp_path / "alone", device="cpu").run()  # the schedule knows the length: four, then eight
    for output in ("alone", "shared"):
        Trainer(build_config(raw), tmp_path / output, device="cpu").run()
    ours, theirs = weights(tmp_path / "shared"), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_replay_keeps_every_process_s_rows_and_wants_as_many_processes_again(photos: Path, tmp_path: Path):  # noqa: F811
    """The replay buffer is the only state of a single process; another number of processes is refused in one line."""
    raw = experiment(photos, replay=REPLAY, train=dict(num_updates=4, checkpoint_every=4))
    raw["validation"] = dict(path=None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    done = launch(tmp_path, TRAIN, str(config), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    rows = [load_file(folder / f"replay-{rank}.safetensors")["rows.candidate"] for rank in (0, 1)]
    assert len(rows[0]) and not torch.equal(*rows)
    with pytest.raises(ConfigError, match="trained by 2 processes.*resume with the same number, not 1") as refusal:
        Trainer(build_config(raw), tmp_path / "run", device="cpu")
    assert "\n" not in str(refusal.value)


STOP_ONE = """
import os, signal, sys
from ebt_vision.cli import main
from ebt_vision.training.loop import Trainer

original = Trainer.update

def update(self, *arguments):
    if self.step == 3 and self.rank == 1:
        signal.raise_signal(signal.SIGTERM)
    return original(self, *arguments)

Trainer.update = update
status = main(["train", sys.argv[1], "--output", sys.argv[2], "--device", "cpu", *sys.argv[3:]])
open(os.path.join(sys.argv[2], "status-" + os.environ["RANK"]), "w").write(str(status))
"""


@pytest.mark.slow
def test_both_processes_stop_at_the_same_update_when_one_is_asked_to(photos: Path, tmp_path: Path):  # noqa: F811
    raw = experiment(photos, replay=REPLAY, objective=UNROLLED, validation=dict(path=None))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    done = launch(tmp_path, TRAIN, str(config), str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr[-2000:]
    done = launch(tmp_path, STOP_ONE, str(config), str(tmp_path / "parts"))
    assert [(tmp_path / "parts" / f"status-{rank}").read_text() for rank in (0, 1)] == ["143", "143"], done.stderr[-2000:]
    assert done.stderr.count("interrupted at update 4;") == 1  # the main process alone says it
    done = launch(tmp_path, TRAIN, str(config), str(tmp_path / "parts"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at update 4" in done.stderr
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_ctrl_c_to_all_processes_ends_them_with_a_checkpoint(photos: Path, tmp_path: Path):  # noqa: F811
    """The terminal sends SIGINT to torchrun and to its processes, and torchrun sends them another."""
    raw = experiment(photos, replay=REPLAY, validation=dict(path=None), train=dict(num_updates=100000, log_every=1))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    process = start(tmp_path, TRAIN, str(config), str(tmp_path / "run"))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("update 5/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert "interrupted at update" in rest, rest[-2000:]
    folder = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert {path.name for path in folder.glob("replay-*")} == {"replay-0.safetensors", "replay-1.safetensors"}
    assert f"interrupted at update {int(folder.name[5:])};" in rest


@pytest.mark.slow
def test_a_divergence_seen_by_one_process_ends_both(photos: Path, tmp_path: Path):  # noqa: F811
    raw = experiment(photos, replay=REPLAY, validation=dict(path=None))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    poison = "self.rank == 1 and self.task.__setattr__('make_batch', bad(self.task.make_batch))"
    script = STOP_ONE.replace("signal.raise_signal(signal.SIGTERM)", poison).replace(
        "original = Trainer.update",
        """
from dataclasses import replace

def bad(make_batch):
    def call(*arguments):
        batch = make_batch(*arguments)
        return replace(batch, noise=batch.noise * float("inf"))
    return call

original = Trainer.update""",
    )
    done = launch(tmp_path, script, str(config), str(tmp_path / "run"))
    assert [(tmp_path / "run" / f"status-{rank}").read_text() for rank in (0, 1)] == ["2", "2"], done.stderr[-2000:]
    assert "training diverged at update 4" in done.stderr
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_the_weights_are_refused(
    photos: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(ConfigError, match=f"{kind} shards the weights.*DDP"):
        Trainer(build_config(experiment(photos)), tmp_path, device="cpu")
