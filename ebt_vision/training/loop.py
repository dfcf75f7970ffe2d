"""The training loop for every model and modality: order, noise, update, log, validate, checkpoint, resume.

All random draws depend only on (seed, epoch, sample) or (seed, step). A run therefore does not depend on the number of
processes or accumulated parts of a batch, and a resumed run continues bit for bit.
"""

import contextlib
import math
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from ebt_vision.core.rng import generators_on, make_generator
from ebt_vision.core.thinking_results import NonFiniteGradientError
from ebt_vision.data.order import BatchIndices, BatchStream
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.objectives.base import Objective
from ebt_vision.training.batch_loader import BatchLoader
from ebt_vision.training.build import build_model, build_objective, build_task
from ebt_vision.training.config import ConfigError, ExperimentConfig, config_to_dict
from ebt_vision.training.engine import build_accelerator
from ebt_vision.training.optim import build_optimizer, set_learning_rate
from ebt_vision.training.replay_buffer import ReplayBuffer, to_device
from ebt_vision.training.reporting import Reporter
from ebt_vision.training.run_folder import check_folder, check_settings, lock_run
from ebt_vision.training.state import (
    checkpoint_folders,
    load_optimizer_tensors,
    newest_step,
    optimizer_tensors,
    read_checkpoint,
    read_state,
    write_checkpoint,
)
from ebt_vision.training.stopping import StopRequest, TrainingInterrupted
from ebt_vision.training.task import Samples, ValidationResult

# Streams of make_generator, so that no two uses of the seed draw the same numbers; tasks use other streams.
_REPLAY = 3
_PARTIAL_MOVES = 31


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is not finite. The update was not made, and the state before it was saved."""


class Trainer:
    """One run of an experiment in `output`. It resumes from the newest checkpoint in this folder, if there is one.

    `device` is a name for pick_device; None uses the fastest available device. A run with other settings is refused
    (run_folder.py); `allow_changes` resumes with the new settings if possible. Raises ConfigError for settings that cannot be
    combined.
    """

    def __init__(
        self, config: ExperimentConfig, output: Path, *, device: str | None = None, allow_changes: bool = False
    ) -> None:
        self.config, self.output, self.task = config, output, build_task(config)
        self.accelerator = build_accelerator(config, device)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._allow_changes = allow_changes
        self._stop, self._stop_is_agreed = StopRequest(), False
        self._loader: BatchLoader | None = None
        with lock_run(output, self.accelerator):
            self._check_run()  # before building the model, which takes seconds
            torch.manual_seed(config.seed)  # for the initial weights; only the trainer seeds globally, never the library
            self.model: PretrainedModel = build_model(config)
            self.ema = ModelEmaV3(self.model, decay=config.train.ema_decay, use_warmup=True)
            bfloat16 = config.train.mixed_precision == "bf16"
            self.optimizer = build_optimizer(self.model, config.optim, bfloat16=bfloat16)
            self.objective: Objective = self.accelerator.prepare(build_objective(self.model, config))
            self.ema.module.to(self.accelerator.device)
            self.replay = ReplayBuffer(config.replay)
            self.step = 0
            self._num_samples: int | None = None  # size of the training set, known after loading
            self._resume()

    def run(self) -> Path:
        """Train to the end and return the folder of the exported model (averaged weights).

        SIGINT and SIGTERM stop the run between two updates: it writes a checkpoint and raises TrainingInterrupted. Raises
        TrainingDivergedError before an update that is not finite, ConfigError if another training uses the folder.
        """
        with lock_run(self.output, self.accelerator):
            if (step := newest_step(self.output / "checkpoints")) != self.step:
                raise ConfigError(
                    f"another training has continued {self.output} to update {step}; run again to resume from there"
                )
            return self._run()

    def _run(self) -> Path:
        samples: Samples = self.task.load_samples()
        self._check_samples(samples)
        held_out = self.task.load_held_out() if self.accelerator.is_main_process else None
        reporter = Reporter(self.output, self.config, self.step, is_main=self.accelerator.is_main_process)
        reporter.say(f"{self.model.num_parameters:,} parameters; {samples.report()}")
        stream = BatchStream(
            len(samples),
            self.config.train.batch_size,
            self.config.seed,
            rank=self.rank,
            world_size=self.world_size,
            start_step=self.step,
        )
        if self.step == self.config.train.num_updates:
            reporter.say(f"already trained to update {self.step}; increase train.num_updates to continue")
        loader = self._loader = self._new_loader(samples)
        message = "stopping after this update; press Ctrl-C again to stop without a checkpoint"
        try:
            with StopRequest(message if self.accelerator.is_main_process else "") as self._stop:
                while self.step < self.config.train.num_updates:
                    loader.prepare(stream, self.step, self.config.train.num_updates)
                    self._advance(samples, next(stream), held_out, reporter)
                    if self._is_stopping and self.step < self.config.train.num_updates:
                        self._save_if_new()
                        reporter.say(f"interrupted at update {self.step}; run the same command to resume")
                        raise TrainingInterrupted(self._stop.signal or signal.SIGTERM)
        finally:
            loader.close()
            reporter.close()
        return self.output / "model"

    def _advance(self, samples: Samples, indices: BatchIndices, held_out: Any | None, reporter: Reporter) -> None:
        """Make one update, then log, validate and save if due."""
        logs = self.update(samples, indices)
        settings, last = self.config.train, self.step == self.config.train.num_updates
        if self.step % settings.log_every == 0 or last:
            reporter.log(self.step, {name: value() if callable(value) else value for name, value in logs.items()})
        if held_out is not None and (self.step % self.config.validation.every == 0 or last):
            self._validate(held_out, reporter)
        if self.step % settings.checkpoint_every == 0 or last:
            self.save()

    def _validate(self, held_out: Any, reporter: Reporter) -> None:
        """Validate the averaged weights. If thinking fails with them, report it and continue training."""
        try:
            result: ValidationResult = self.task.validate(self.ema.module, held_out, self.accelerator.device)
        except NonFiniteGradientError as error:
            reporter.say(f"validation at update {self.step} failed: {error}")
        else:
            reporter.validation(self.step, result)

    def update(self, samples: Samples, indices: BatchIndices) -> dict[str, Any]:
        """Make update number `step` and return the values to log.

        Raises TrainingDivergedError before an update that is not finite. The update is discarded, and the state before it is
        saved.
        """
        lr = set_learning_rate(self.optimizer, self.config.optim, self.step, self.config.train.num_updates)
        self.optimizer.zero_grad()
        parts = torch.arange(len(indices.indices)).chunk(self.config.train.num_accumulation)
        losses = []
        loader = self._loader or self._new_loader(samples)
        for i, part in enumerate(parts):
            batch, ages = self._with_replay(loader.take(indices, i), part)
            with self.accelerator.no_sync(self.objective) if i < len(parts) - 1 else contextlib.nullcontext():
                output = self.objective(batch)
                self.accelerator.backward(output["loss"])  # divided by the number of parts
            losses.append(output["loss"].detach())
            if self._replays:
                self.replay.add(self._rows_to_keep(batch, output, part), ages + 1)
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.clip_norm)
        loss_value, norm_value = self._agree(torch.stack(losses).mean(), norm)
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            self._refuse(loss_value, norm_value)
        self.optimizer.step()
        self.replay.commit()
        self.step += 1
        self.ema.update(self.model, step=self.step)
        return {"loss": loss_value, "lr": lr, "gradient_norm": norm_value} | self._objective.logs(batch, output)

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """Return (loss, gradient norm) as means over the processes; share a request to stop among all processes.

        This is the only place in an update where the host waits for the device.
        """
        asked = to_device(torch.tensor([0.0 if self._stop.signal is None else 1.0]), loss.device)
        values = self.accelerator.reduce(torch.cat([loss.view(1), norm.view(1), asked.to(loss)]), reduction="mean")
        mean_loss, mean_norm, share = values.tolist()
        self._stop_is_agreed = share > 0
        return mean_loss, mean_norm

    @property
    def _is_stopping(self) -> bool:
        """Whether training stops before the next update; the answer is the same in every process."""
        return self._stop_is_agreed if self.world_size > 1 else self._stop.signal is not None

    def _refuse(self, loss: float, norm: float) -> NoReturn:
        """Discard the current update, save the state before it and raise TrainingDivergedError."""
        self.optimizer.zero_grad()
        self.replay.roll_back()
        self._save_if_new()
        raise TrainingDivergedError(
            f"training diverged at update {self.step + 1}: loss {loss:g}, gradient norm {norm:g}; the state before it is saved "
            f"in {self.output}; lower optim.lr and use another --output, or resume with --allow-changes"
        )

    def _new_loader(self, samples: Samples) -> BatchLoader:
        settings = self.config.train
        return BatchLoader(
            lambda indices, epochs: self.task.make_batch(samples, indices, epochs, torch.device("cpu")),
            self.accelerator.device,
            num_threads=settings.num_load_threads,
            num_parts=settings.num_accumulation,
        )

    def _with_replay(self, batch: Any, part: Tensor) -> tuple[Any, Tensor]:
        """Return this process's part of a batch, with replayed candidates in the last places, and their ages."""
        ages = torch.zeros(len(part), dtype=torch.int64)
        if not self._replays:
            return batch, ages
        generator = make_generator(self.config.seed, _REPLAY, self.step, self.rank, int(part[0]))
        rows, old_ages = self.replay.sample(len(part), generator)
        if count := len(old_ages):
            rows["candidate"] = self._renoise(rows["candidate"], old_ages, generator)
            ages[len(part) - count :] = old_ages
        return self._objective.continue_thinking(batch, rows if count else {}), ages

    def _rows_to_keep(self, batch: Any, output: dict[str, Tensor], part: Tensor) -> dict[str, Tensor]:
        """Return the rows of a part of a batch that the replay buffer keeps."""
        rows = self._objective.replay_rows(batch, output)
        if self.config.replay.partial_moves:
            generator = make_generator(self.config.seed, _PARTIAL_MOVES, self.step, self.rank, int(part[0]))
            candidate = rows["candidate"]
            draws = torch.rand([2, len(candidate), *[1] * (candidate.ndim - 1)], generator=generator)
            partial, share = to_device(draws, candidate.device).to(candidate)
            share = share.where(partial < self.config.replay.partial_moves, 1.0)
            rows["candidate"] = torch.lerp(batch.start.to(candidate), candidate, share)
        return rows

    def _renoise(self, candidates: Tensor, ages: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise to about half of the replayed candidates, if their ages allow it."""
        settings = self.config.replay
        if not settings.renoise_std or self.step < settings.renoise_start:
            return candidates
        device = candidates.device
        (generator,) = generators_on([generator], device)
        each = [len(candidates), *[1] * (candidates.ndim - 1)]
        std = settings.renoise_std * torch.rand(each, generator=generator, device=device)
        noise = std * torch.randn(candidates.shape, generator=generator, device=device)
        young = to_device(ages <= (settings.renoise_max_age or settings.max_age), device)
        chosen = (torch.rand(each, generator=generator, device=device) < 0.5) & young.view(each)
        return candidates + (chosen * noise).to(candidates)

    @property
    def _replays(self) -> bool:
        return self.config.replay.capacity > 0 and self.step >= self.config.replay.start

    @property
    def _objective(self) -> Objective:
        """Return the objective without the wrappers of accelerate."""
        objective: Objective = self.accelerator.unwrap_model(self.objective)
        return objective

    def _save_if_new(self) -> None:
        """Save, unless the newest checkpoint is of this update; writing it again would remove the only one for a moment."""
        if newest_step(self.output / "checkpoints") != self.step:
            self.save()

    def save(self) -> None:
        """Write a checkpoint and export the averaged weights as output/model."""
        own = {"replay": self.replay.state_dict()} if self.config.replay.capacity else {}
        shared = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        state = {
            "step": self.step,
            "world_size": self.world_size,
            "num_samples": self._num_samples,
            "config": config_to_dict(self.config),
            "time": time.time(),
        }
        write_checkpoint(
            self.output / "checkpoints",
            self.step,
            shared,
            own,
            state,
            keep=self.config.train.num_checkpoints,
            rank=self.rank,
            barrier=self.accelerator.wait_for_everyone,
        )
        if self.accelerator.is_main_process:
            self.ema.module.save_pretrained(self.output / "model")

    def _check_run(self) -> None:
        """Refuse a folder that holds another run, before reading anything except its settings."""
        folders = checkpoint_folders(self.output / "checkpoints")
        if not folders:
            check_folder(self.output)
            return
        state = read_state(folders[-1])
        check_settings(self.output, state["config"], self.config, allow_changes=self._allow_changes)
        if self.config.replay.capacity and state["world_size"] != self.world_size:
            raise ConfigError(
                f"{self.output} was trained by {state['world_size']} processes, and its replay buffer is divided among them; "
                f"resume with the same number, not {self.world_size}"
            )
        if state["step"] > self.config.train.num_updates:
            raise ConfigError(
                f"{self.output} is at update {state['step']}, past train.num_updates={self.config.train.num_updates}; "
                "use a larger number to continue, or another --output"
            )

    def _check_samples(self, samples: Samples) -> None:
        """Refuse to resume on a training set of another size, because its order of samples would differ."""
        if self._num_samples not in (None, len(samples)) and not self._allow_changes:
            raise ConfigError(
                f"{self.output} was trained on {self._num_samples} samples, but data.path now has {len(samples)}; "
                "use the same data, --allow-changes or another --output"
            )
        self._num_samples = len(samples)

    def _resume(self) -> None:
        folders = checkpoint_folders(self.output / "checkpoints")
        if not folders:
            return
        own = ["replay"] if self.config.replay.capacity else []
        tensors, state = read_checkpoint(folders[-1], ["model", "ema", "optimizer"], own, self.rank)
        self.model.load_state_dict(tensors["model"])
        self.ema.module.load_state_dict(tensors["ema"])
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
        if own:
            self.replay.load_state_dict(tensors["replay"], self.accelerator.device)
        self.step = int(state["step"])
        self._num_samples = state.get("num_samples")
