"""The training engine: it learns, resumes bit for bit, survives kill -9, stops before a bad update."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file

from ebt_vision.cli import main
from ebt_vision.core.rng import sample_generators
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.pretrained_model import read_config
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.processes import signal_and_noise_scale
from ebt_vision.objectives.image import ImageBatch, ObjectiveConfig, RegressorObjective
from ebt_vision.training import engine, stopping
from ebt_vision.training.config import ConfigError, build_config
from ebt_vision.training.loop import Trainer, TrainingDivergedError
from ebt_vision.training.state import checkpoint_folders
from ebt_vision.training.stopping import StopRequest, TrainingInterrupted

MODELS = {
    "patch_ebt": dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0),
    "patch_regressor": dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0),
    "dit": dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth colour images of 16x16, which a model can learn."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(24):
        corners = random.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{i:02d}.png")
    return folder


def experiment(photos: Path, model_type: str = "patch_ebt", **sections: dict) -> dict:
    """Plain data of a tiny experiment with everything switched on."""
    raw: dict = dict(
        name="tiny",
        model_type=model_type,
        model=MODELS[model_type],
        data=dict(path=str(photos), img_size=16, crop="random", flip=True),
        optim=dict(lr=2e-3, warmup_updates=2),
        train=dict(num_updates=12, batch_size=8, ema_decay=0.9, log_every=2, checkpoint_every=4),
        validation=dict(path=str(photos), num_images=4, num_steps=3, every=6, num_grid_images=2),
    )
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return raw


FULL_THINKING = dict(thinking=dict(num_steps=2, min_num_steps=1, step_size_factor=1.5, langevin_std=0.05))
REPLAY = dict(capacity=16, share=0.5, max_age=4, start=2, renoise_std=0.2, renoise_start=3, partial_moves=0.5)


def train(raw: dict, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(build_config(raw), output, device="cpu").run()


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Raw weights, averaged weights and optimiser of the newest checkpoint, as one dictionary."""
    folder = checkpoint_folders(output / "checkpoints")[-1]
    return {f"{p.name}/{n}": t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def assert_bit_equal(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("model_type", MODELS)
def test_every_model_trains_logs_validates_and_exports(photos: Path, tmp_path: Path, model_type: str):
    raw = experiment(photos, model_type, train=dict(num_updates=60, checkpoint_every=30, log_every=10))
    raw["validation"]["every"] = 30
    folder = train(raw, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    last = [line for line in lines if "validation_psnr" in line][-1]["validation_psnr"]["0.1"]
    assert len(last) == 4 and last[1] > last[0]  # one step beats the noisy input
    assert (tmp_path / "samples" / "00000060.png").exists() and list((tmp_path / "tensorboard").iterdir())
    assert load_pretrained(str(folder)).model_type == model_type
    if model_type == "patch_ebt":
        logged = [line for line in lines if "loss" in line][-1]
        assert logged["energy_after_last_update"] < logged["energy_before_last_update"]
        assert logged["step_size"] > 0 and logged["gradient_norm"] > 0


@pytest.mark.parametrize("model_type", ["patch_ebt", "patch_regressor"])
def test_training_on_plain_gaussian_noise(photos: Path, tmp_path: Path, model_type: str):
    model = MODELS[model_type] | dict(noise_process="awgn")
    raw = experiment(photos, model_type, model=model, objective=dict(sigmas=[10, 60], loss="l1"), train=dict(num_updates=60))
    raw["validation"] |= dict(every=30, sigmas=[25, 50])
    folder = train(raw, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    psnr = [line for line in lines if "validation_psnr" in line][-1]["validation_psnr"]
    assert list(psnr) == ["25.0", "50.0"]
    for sigma, (noisy, once, *_) in psnr.items():
        assert abs(noisy - 20 * np.log10(255 / float(sigma))) < 0.5  # not clipped: the noise's own PSNR
        assert once > noisy
    assert read_config(folder / "config.json")["config"]["noise_process"] == "awgn"


def test_each_sample_has_a_sigma_of_its_own_in_the_range():
    model = PatchRegressor(PatchRegressorConfig(**MODELS["patch_regressor"], noise_process="awgn"))
    objective = RegressorObjective(model, ObjectiveConfig(sigmas=(20.0, 40.0)))
    generators = sample_generators(0, range(64))
    batch = ImageBatch(clean=torch.zeros(64, 3, 16, 16), noise=torch.ones(64, 3, 16, 16), generators=generators)
    sigmas = objective.observe(batch)[:, 0, 0, 0] * 255 / 2
    assert 20 <= sigmas.min() < 24 and 36 < sigmas.max() <= 40
    assert torch.equal(sigmas[5:6], objective.observe(replace_batch(batch, 5))[:, 0, 0, 0] * 255 / 2)


def test_a_share_of_the_samples_has_a_lower_level_of_its_own():
    model = PatchRegressor(PatchRegressorConfig(**MODELS["patch_regressor"]))
    zeros, ones = torch.zeros(200, 3, 16, 16), torch.ones(200, 3, 16, 16)
    top = signal_and_noise_scale(0.1)[1]
    for share, low, high in ((0.0, 0, 0), (0.5, 75, 125), (1.0, 195, 200)):  # of 200 samples; standard deviation 7
        objective = RegressorObjective(model, ObjectiveConfig(level=0.1, lower_level_share=share))
        batch = ImageBatch(clean=zeros, noise=ones, generators=sample_generators(0, range(200)))
        scales = objective.observe(batch)[:, 0, 0, 0]
        assert scales.min() > 0 and scales.max() <= top + 1e-6
        assert low <= int((scales < top - 1e-6).sum()) <= high
        assert torch.equal(scales[5:6], objective.observe(replace_batch(batch, 5))[:, 0, 0, 0])
    with pytest.raises(ValueError, match=r"lower_level_share=1.5 is not in \[0, 1\]"):
        ObjectiveConfig(lower_level_share=1.5)


def replace_batch(batch: ImageBatch, index: int) -> ImageBatch:
    """The batch of one sample, with its generator as it was at first."""
    rows = slice(index, index + 1)
    return replace(batch, clean=batch.clean[rows], noise=batch.noise[rows], generators=sample_generators(0, [index]))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_resumed_run_ends_with_bit_equal_weights(photos: Path, tmp_path: Path, model_type: str):
    muon = dict(optimizer="muon")  # AdamW's state is resumed by the killed run below
    extra = dict(optim=muon) | (dict(objective=FULL_THINKING, replay=REPLAY) if model_type == "patch_ebt" else {})
    raw = experiment(photos, model_type, **extra)
    train(raw, tmp_path / "whole")
    config = build_config(raw)
    (tmp_path / "parts").mkdir()
    trainer = Trainer(config, tmp_path / "parts", device="cpu")
    signal_at(trainer, trainer.objective, "forward", 5, signal.SIGINT)
    with pytest.raises(TrainingInterrupted):
        trainer.run()
    assert Trainer(config, tmp_path / "parts", device="cpu").step == 6  # the update under way is finished and saved
    train(raw, tmp_path / "parts")
    assert_bit_equal(tmp_path / "whole", tmp_path / "parts")


def signal_at(trainer: Trainer, owner: object, method: str, step: int, number: signal.Signals) -> None:
    """Send this process a signal after `owner.method` has been called in the update that begins at `step`."""
    original = getattr(owner, method)

    def call(*arguments: object, **options: object) -> object:
        result = original(*arguments, **options)
        if trainer.step == step:
            signal.raise_signal(number)
        return result

    setattr(owner, method, call)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["replay.sample", "objective.forward", "optimizer.step", "ema.update"])
def test_a_signal_anywhere_in_an_update_resumes_bit_equal(photos: Path, tmp_path: Path, place: str, number: signal.Signals):
    raw = experiment(photos, objective=FULL_THINKING, replay=REPLAY, validation=dict(path=None))
    train(raw, tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    trainer = Trainer(build_config(raw), tmp_path / "parts", device="cpu")
    owner, method = place.split(".")
    signal_at(trainer, getattr(trainer, owner), method, 6, number)  # sampling takes replayed rows by then
    with pytest.raises(TrainingInterrupted) as interrupt:
        trainer.run()
    assert interrupt.value.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(raw, tmp_path / "parts")
    assert_bit_equal(tmp_path / "whole", tmp_path / "parts")


def test_a_second_interrupt_ends_at_once_and_leaves_the_last_checkpoint(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stopping, "_SAME_REQUEST", 0.0)
    trainer = Trainer(build_config(experiment(photos, replay=REPLAY)), tmp_path, device="cpu")
    signal_at(trainer, trainer.replay, "sample", 6, signal.SIGINT)
    signal_at(trainer, trainer.objective, "forward", 6, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        trainer.run()
    assert not isinstance(interrupt.value, TrainingInterrupted)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "checkpoints")] == ["step-00000004"]


def test_one_request_may_arrive_as_two_signals():
    with StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert request.signal == signal.SIGTERM


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the shell does for a command in the background
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and request.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_in_one_line_that_it_was_stopped(photos: Path, tmp_path: Path, number: signal.Signals):
    raw = experiment(photos, train=dict(num_updates=100000, log_every=1), validation=dict(path=None))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "ebt_vision.cli", "train", "config.yaml", "--output", "run", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("update 3/"):
            break
    process.send_signal(number)
    rest = process.stderr.read().splitlines()
    assert process.wait() == 128 + number
    assert [line for line in rest if "interrupted at update" in line] == rest[-1:]
    assert not [line for line in rest if "Traceback" in line]
    newest = checkpoint_folders(tmp_path / "run" / "checkpoints")[-1]
    assert f"update {int(newest.name[5:])};" in rest[-1]


@pytest.mark.parametrize("max_age", [1, None])
def test_half_of_the_candidates_are_noised_again_up_to_an_age(photos: Path, tmp_path: Path, max_age: int | None):
    replay = REPLAY | dict(renoise_max_age=max_age)
    trainer = Trainer(build_config(experiment(photos, replay=replay)), tmp_path, device="cpu")
    candidates, ages = torch.zeros(400, 3, 8, 8), torch.arange(400) % 2 + 1
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(trainer._renoise(candidates, ages, generator), candidates)  # not before renoise_start
    trainer.step = REPLAY["renoise_start"]
    stds = trainer._renoise(candidates, ages, generator).flatten(1).std(1)
    for age in (1, 2):
        noised = stds[(ages == age) & (stds > 0)]
        if age == 2 and max_age == 1:
            assert len(noised) == 0
        else:
            assert 70 < len(noised) < 130 and 0.15 < noised.max() < 0.25  # of 200; uniform up to renoise_std, 0.2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_candidates_are_kept_part_of_the_way(photos: Path, tmp_path: Path, share: float):
    config = build_config(experiment(photos, replay=REPLAY | dict(partial_moves=share)))
    trainer = Trainer(config, tmp_path, device="cpu")
    start = torch.full((400, 3, 8, 8), 2.0)
    batch = ImageBatch(clean=start, noise=start, generators=[], start=start)
    output = {"candidate": start + 1.0, "observation": start}
    kept = trainer._rows_to_keep(batch, output, torch.arange(400))["candidate"]
    way = kept[:, 0, 0, 0] - 2.0
    assert torch.equal(kept, (2.0 + way.view(-1, 1, 1, 1)).expand_as(kept))  # one share for each image
    partial = way[way < 1]
    assert abs(len(partial) - 400 * share) < 50 and way.max() <= 1
    if share:
        assert partial.min() < 0.05 and 0.4 < partial.mean() < 0.6
    trainer.step += 1
    again = trainer._rows_to_keep(batch, output, torch.arange(400))["candidate"]
    assert torch.equal(again, kept) == (share == 0)  # other draws at each update


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_bit_equal(photos: Path, tmp_path: Path):
    raw = experiment(photos, objective=FULL_THINKING, replay=REPLAY, train=dict(num_updates=40, checkpoint_every=1))
    raw["validation"] = dict(path=None)
    train(raw, tmp_path / "whole")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "ebt_vision.cli", "train", str(config), "--output", str(output), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for progress in (3, 17):  # kill it twice while it writes a checkpoint every update
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while len(weight := checkpoint_folders(output / "checkpoints")) == 0 or int(weight[-1].name[5:]) < progress:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    assert_bit_equal(tmp_path / "whole", output)
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))  # nothing is logged twice


def test_a_non_finite_gradient_stops_before_the_update_and_keeps_the_last_good_state(photos: Path, tmp_path: Path):
    trainer = Trainer(build_config(experiment(photos)), tmp_path, device="cpu")
    parameter = trainer.model.trunk.blocks[0].mlp.fc1.weight  # type: ignore[union-attr, index]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if trainer.step == 5 else gradient

    parameter.register_hook(poison)
    with pytest.raises(TrainingDivergedError, match="update 6"):
        trainer.run()
    state = weights(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert checkpoint_folders(tmp_path / "checkpoints")[-1].name == "step-00000005"


def test_nothing_of_a_refused_update_is_kept(photos: Path, tmp_path: Path):
    """The loss of one update is not finite; the run resumes and ends like a run without this failure."""
    raw = experiment(photos, objective=FULL_THINKING, replay=REPLAY, train=dict(num_accumulation=2), validation=dict(path=None))
    train(raw, tmp_path / "whole")
    trainer = Trainer(build_config(raw), tmp_path / "parts", device="cpu")
    make_batch = trainer.task.make_batch

    def poison(*arguments: object) -> ImageBatch:
        batch = make_batch(*arguments)  # type: ignore[arg-type]
        return replace(batch, noise=batch.noise * float("inf")) if trainer.step == 6 else batch

    trainer.task.make_batch = poison  # type: ignore[method-assign, assignment]
    with pytest.raises(TrainingDivergedError, match="update 7: loss nan"):
        trainer.run()
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "parts").values())
    train(raw, tmp_path / "parts")
    assert_bit_equal(tmp_path / "whole", tmp_path / "parts")


def test_a_real_divergence_is_one_line_and_leaves_a_checkpoint_from_before_it(photos: Path, tmp_path: Path, capsys):
    raw = experiment(photos, replay=REPLAY, optim=dict(lr=1e6, clip_norm=1e9, warmup_updates=0))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ebt-vision:")]
    assert "training diverged at update" in line and "lower optim.lr" in line
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_a_validation_that_thinks_out_of_all_range_does_not_end_the_training(photos: Path, tmp_path: Path, capsys):
    trainer = Trainer(build_config(experiment(photos, train=dict(num_updates=7))), tmp_path, device="cpu")
    step = trainer.ema.update

    def explode(*arguments: object, **options: object) -> None:
        step(*arguments, **options)  # type: ignore[arg-type]
        if trainer.step == 6:
            trainer.ema.module.log_step_size.data.fill_(1e30)  # type: ignore[union-attr, operator]

    trainer.ema.update = explode  # type: ignore[method-assign]
    trainer.run()
    assert "validation at update 6 failed: the energy or its gradient is not finite" in capsys.readouterr().err
    assert trainer.step == 7


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(photos: Path, tmp_path: Path):
    gradients = []
    for parts in (1, 2):
        trainer = Trainer(
            build_config(experiment(photos, train=dict(num_accumulation=parts))), tmp_path / str(parts), device="cpu"
        )
        gradients.append(first_gradients(trainer))
    for whole, split in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)


def first_gradients(trainer: Trainer) -> list[torch.Tensor]:
    """The gradients of the first update, as the optimiser sees them."""
    from ebt_vision.data.images import load_image_set
    from ebt_vision.data.order import BatchStream

    images = load_image_set(trainer.config.data, seed=0)
    batch_size = trainer.config.train.batch_size
    stream = BatchStream(len(images), batch_size, 0, rank=trainer.rank, world_size=trainer.world_size)
    seen: list[torch.Tensor] = []
    step = trainer.optimizer.step

    def record(*arguments: object) -> None:
        seen.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.model.parameters())
        step()

    trainer.optimizer.step = record
    trainer.update(images, next(stream))
    return seen


def test_another_run_s_folder_is_refused(photos: Path, tmp_path: Path):
    raw = experiment(photos, train=dict(num_updates=1))
    train(raw, tmp_path)
    with pytest.raises(ConfigError, match="choose another --output"):
        train(experiment(photos, "patch_regressor"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (dict(optim=dict(lr=1e-3)), "optim.lr=0.002 (now 0.001)"),
        (dict(optim=dict(warmup_updates=3)), "optim.warmup_updates=2 (now 3)"),
        (dict(train=dict(batch_size=4)), "train.batch_size=8 (now 4)"),
        (dict(data=dict(flip=False)), "data.flip=True (now False)"),
        (dict(objective=dict(level=0.2)), "objective.level=0.1 (now 0.2)"),
        (dict(objective=dict(thinking=dict(num_steps=2))), "objective.thinking.num_steps=1 (now 2)"),
    ],
)
def test_resuming_with_another_setting_names_it_and_needs_a_flag(
    photos: Path, tmp_path: Path, changes: dict, answer: str, capsys: pytest.CaptureFixture[str]
):
    train(experiment(photos, train=dict(num_updates=1)), tmp_path / "run")
    other = experiment(photos, **(changes | {"train": changes.get("train", {}) | dict(num_updates=2)}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(other))
    command = ["train", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line and "--allow-changes" in line and "another --output" in line
    assert main([*command, "--allow-changes"]) == 0
    assert checkpoint_folders(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (dict(optim=dict(optimizer="muon")), "optim.optimizer=adamw (now muon)"),
        (dict(model=dict(depth=2)), "model.depth=1 (now 2)"),
        (dict(replay=REPLAY), "replay.capacity=0 (now 16)"),
    ],
)
def test_what_the_training_state_depends_on_cannot_change(photos: Path, tmp_path: Path, changes: dict, answer: str):
    train(experiment(photos, train=dict(num_updates=1)), tmp_path)
    config = build_config(experiment(photos, **changes))
    for allow_changes in (False, True):
        with pytest.raises(ConfigError) as refusal:
            Trainer(config, tmp_path, device="cpu", allow_changes=allow_changes)
        assert answer in str(refusal.value) and "allow-changes" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_length_logging_and_what_computes_the_same_may_change(photos: Path, tmp_path: Path):
    train(experiment(photos, train=dict(num_updates=1)), tmp_path)
    raw = experiment(
        photos,
        train=dict(num_updates=2, log_every=1, checkpoint_every=1, num_checkpoints=1, num_load_threads=1, num_accumulation=2),
        validation=dict(num_steps=1),
    )
    train(raw | {"name": "renamed"}, tmp_path)
    assert checkpoint_folders(tmp_path / "checkpoints")[-1].name == "step-00000002"


def test_a_run_of_an_older_version_resumes(photos: Path, tmp_path: Path):
    """Its settings lack a new key and have a removed key."""
    raw = experiment(photos, train=dict(num_updates=1))
    train(raw, tmp_path)
    path = checkpoint_folders(tmp_path / "checkpoints")[-1] / "state.json"
    for change in ({"train": ["num_load_threads", "init_from"]}, {"optim": ["step_size_lr_ratio"]}):
        state = json.loads(path.read_text())
        for section, keys in change.items():
            for key in keys:
                del state["config"][section][key]
        state["config"]["optim"]["gone"] = 1
        path.write_text(json.dumps(state))
        assert Trainer(build_config(raw), tmp_path, device="cpu").step == 1


def test_resuming_on_more_or_fewer_samples_is_refused(photos: Path, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(photos.iterdir()):
        (data / path.name).write_bytes(path.read_bytes())
    raw = experiment(data, train=dict(num_updates=1), validation=dict(path=None))
    train(raw, tmp_path / "run")
    (data / path.name).unlink()
    with pytest.raises(ConfigError, match="trained on 24 samples, but data.path now has 23"):
        train(raw | {"train": raw["train"] | dict(num_updates=2)}, tmp_path / "run")


def test_fewer_updates_than_were_made_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(experiment(photos, train=dict(num_updates=3)), tmp_path)
    with pytest.raises(ConfigError, match="at update 3, past train.num_updates=2; use a larger number"):
        train(experiment(photos, train=dict(num_updates=2)), tmp_path)
    train(experiment(photos, train=dict(num_updates=3)), tmp_path)
    assert "already trained to update 3" in capsys.readouterr().err


def test_a_trained_model_without_its_checkpoints_is_not_replaced(photos: Path, tmp_path: Path):
    raw = experiment(photos, train=dict(num_updates=1))
    model = train(raw, tmp_path)
    before = (model / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="is a trained model, but there is no checkpoint"):
        train(raw, tmp_path)
    assert (model / "model.safetensors").read_bytes() == before


def test_a_second_training_in_a_folder_is_one_line(photos: Path, tmp_path: Path):
    raw = experiment(photos)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "ebt_vision.cli", "train", "config.yaml", "--output", "run", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert second.returncode == 2
    assert second.stderr == "ebt-vision: another training uses run; wait until it ends or choose another --output\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    train(raw, tmp_path / "run")  # the lock is gone with its holder


def test_a_training_holds_its_folder_and_lets_go_of_it(photos: Path, tmp_path: Path):
    trainer = Trainer(build_config(experiment(photos)), tmp_path, device="cpu")
    held = []
    update = trainer.update

    def watch(*arguments: object) -> dict:
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".lock").acquire(timeout=0)
        held.append(trainer.step)
        return update(*arguments)  # type: ignore[arg-type]

    trainer.update = watch  # type: ignore[method-assign]
    trainer.run()
    assert len(held) == 12
    with FileLock(tmp_path / ".lock", timeout=0), pytest.raises(ConfigError, match="another training uses"):
        Trainer(build_config(experiment(photos)), tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(photos: Path, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment(photos)))
    command = ["train", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), "--device", device]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"device={device!r} is not on this machine; use one of: cpu" in line


def test_a_numbered_device_is_the_one_that_accelerate_gets(photos: Path, monkeypatch: pytest.MonkeyPatch):
    config, seen = build_config(experiment(photos)), []

    class Asked(Exception):
        pass

    def accelerator(**options: object) -> None:
        seen.append(os.environ["ACCELERATE_TORCH_DEVICE"])
        raise Asked

    monkeypatch.setattr(engine, "Accelerator", accelerator)
    monkeypatch.setattr(engine, "pick_device", lambda name: name)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    with pytest.raises(Asked):
        engine.build_accelerator(config, "cuda:1")
    assert seen == [torch.device("cuda:1"), "cuda:1"] and "ACCELERATE_TORCH_DEVICE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device=cuda:1 is one device for several processes; use cuda"):
        engine.build_accelerator(config, "cuda:1")


def test_only_a_linear_head_leaves_a_parameter_without_a_gradient(photos: Path, tmp_path: Path):
    sections: list[dict] = [
        dict(model=dict(embed_dim=48, energy_head="linear")),
        dict(model=dict(observation_context=True), objective=FULL_THINKING),
        dict(objective=dict(energy_order_weight=1.0), replay=REPLAY),
    ]
    raws = [experiment(photos, **each) for each in sections] + [experiment(photos, kind) for kind in MODELS]
    for number, raw in enumerate(raws):
        trainer = Trainer(build_config(raw), tmp_path / str(number), device="cpu")
        batch = trainer.task.make_batch(trainer.task.load_samples(), [0, 1], [0, 0], torch.device("cpu"))
        trainer.objective(batch)["loss"].backward()
        unused = any(parameter.grad is None for parameter in trainer.model.parameters())
        assert unused == engine.may_leave_parameters_unused(trainer.config) == (number == 0)
