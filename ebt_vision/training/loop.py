"""The training loop, for every model and modality: order, noise, update, log, validate, checkpoint, resume.

Everything random comes from (seed, epoch, sample) or (seed, step), so a run does not depend on how many processes or
accumulated parts share a batch, and a resumed run goes on exactly where it stopped.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from timm.utils import ModelEmaV3
from torch import Tensor

from ebt_vision.config import ConfigError, ExperimentConfig, config_to_dict
from ebt_vision.data.order import BatchIndices, BatchStream
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.objectives import Objective
from ebt_vision.rng import make_generator
from ebt_vision.training.batch_loader import BatchLoader
from ebt_vision.training.build import build_model, build_objective, build_task
from ebt_vision.training.optim import build_optimizer, set_learning_rate
from ebt_vision.training.replay_buffer import ReplayBuffer
from ebt_vision.training.reporting import Reporter
from ebt_vision.training.state import (
    checkpoint_folders,
    load_optimizer_tensors,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from ebt_vision.training.task import Samples

# Streams of make_generator, so that no two uses of the seed draw the same numbers; a task has others.
_REPLAY = 3
_PARTIAL_MOVES = 31


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is not finite; the update was not made and the state before it was saved."""


class Trainer:
    """One run of an experiment in `output`; goes on from the newest checkpoint there, if any."""

    def __init__(self, config: ExperimentConfig, output: Path, *, device: str | None = None):
        self.config, self.output, self.task = config, output, build_task(config)
        handlers = [
            DistributedDataParallelKwargs(find_unused_parameters=True)
        ]  # a linear head's last norm bias has no gradient
        self.accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_steps=config.train.num_accumulation,
            cpu=device == "cpu",
            kwargs_handlers=handlers,
        )
        self._check_engine()
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._check_batch()
        torch.manual_seed(config.seed)  # initial weights; in the trainer's own process, not in the library
        self.model: PretrainedModel = build_model(config)
        self.ema = ModelEmaV3(self.model, decay=config.train.ema_decay, use_warmup=True)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.objective: Objective = self.accelerator.prepare(build_objective(self.model, config))
        self.ema.module.to(self.accelerator.device)
        self.replay = ReplayBuffer(config.replay)
        self.step = 0
        self._loader: BatchLoader | None = None
        self._resume()

    def run(self) -> Path:
        """Train to the end; returns the folder of the exported model (averaged weights)."""
        samples: Samples = self.task.load_samples()
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
        loader = self._loader = self._new_loader(samples)
        try:
            for indices in stream:
                if self.step >= self.config.train.num_updates:
                    break
                loader.prepare(stream, self.step, self.config.train.num_updates)
                self._advance(samples, indices, held_out, reporter)
        except KeyboardInterrupt:
            self.save()
            reporter.say(f"interrupted at update {self.step}; the same command goes on from here")
            raise
        finally:
            loader.close()
            reporter.close()
        return self.output / "model"

    def _advance(self, samples: Samples, indices: BatchIndices, held_out: Any | None, reporter: Reporter) -> None:
        """One update and whatever is due after it."""
        logs = self.update(samples, indices)
        settings, last = self.config.train, self.step == self.config.train.num_updates
        if self.step % settings.log_every == 0 or last:
            reporter.log(self.step, {name: value() if callable(value) else value for name, value in logs.items()})
        if held_out is not None and (self.step % self.config.validation.every == 0 or last):
            reporter.validation(self.step, self.task.validate(self.ema.module, held_out, self.accelerator.device))
        if self.step % settings.checkpoint_every == 0 or last:
            self.save()

    def update(self, samples: Samples, indices: BatchIndices) -> dict[str, Any]:
        """Make update number `step`; returns what to log. Raises TrainingDivergedError before a non-finite update."""
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
        loss = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.clip_norm)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            self.save()
            raise TrainingDivergedError(
                f"update {self.step + 1}: loss {loss.item()}, gradient norm {norm.item()}; the state before it is saved in "
                f"{self.output}; lower optim.lr or the step size"
            )
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.model, step=self.step)
        return {"loss": loss.item(), "lr": lr, "gradient_norm": norm.item()} | self._objective.logs(batch, output)

    def _new_loader(self, samples: Samples) -> BatchLoader:
        settings = self.config.train
        return BatchLoader(
            lambda indices, epochs: self.task.make_batch(samples, indices, epochs, torch.device("cpu")),
            self.accelerator.device,
            num_threads=settings.num_load_threads,
            num_parts=settings.num_accumulation,
        )

    def _with_replay(self, batch: Any, part: Tensor) -> tuple[Any, Tensor]:
        """The part of this process's share of a batch, with replayed candidates in its last places, and their ages."""
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
        """What the replay buffer keeps of a part of a batch."""
        rows = self._objective.replay_rows(batch, output)
        if self.config.replay.partial_moves:
            generator = make_generator(self.config.seed, _PARTIAL_MOVES, self.step, self.rank, int(part[0]))
            candidate = rows["candidate"]
            partial, share = torch.rand([2, len(candidate), *[1] * (candidate.ndim - 1)], generator=generator).to(candidate)
            share = share.where(partial < self.config.replay.partial_moves, 1.0)
            rows["candidate"] = torch.lerp(batch.start.to(candidate), candidate, share)
        return rows

    def _renoise(self, candidates: Tensor, ages: Tensor, generator: torch.Generator) -> Tensor:
        """Replayed candidates, about half of them, as far as their ages allow, with noise."""
        settings = self.config.replay
        if not settings.renoise_std or self.step < settings.renoise_start:
            return candidates
        each = [len(candidates), *[1] * (candidates.ndim - 1)]
        std = settings.renoise_std * torch.rand(each, generator=generator)
        noise = std * torch.randn(candidates.shape, generator=generator)
        young = ages <= (settings.renoise_max_age or settings.max_age)
        chosen = (torch.rand(each, generator=generator) < 0.5) & young.view(each)
        return candidates + (chosen * noise).to(candidates)

    @property
    def _replays(self) -> bool:
        return self.config.replay.capacity > 0 and self.step >= self.config.replay.start

    @property
    def _objective(self) -> Objective:
        """The objective itself, without what accelerate wraps it in."""
        objective: Objective = self.accelerator.unwrap_model(self.objective)
        return objective

    def save(self) -> None:
        """Write a checkpoint and export the averaged weights as output/model."""
        own = {"replay": self.replay.state_dict()} if self.config.replay.capacity else {}
        shared = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        state = {"step": self.step, "world_size": self.world_size, "config": config_to_dict(self.config), "time": time.time()}
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

    def _resume(self) -> None:
        folders = checkpoint_folders(self.output / "checkpoints")
        if not folders:
            return
        own = ["replay"] if self.config.replay.capacity else []
        tensors, state = read_checkpoint(folders[-1], ["model", "ema", "optimizer"], own, self.rank)
        self._check_same(state)
        self.model.load_state_dict(tensors["model"])
        self.ema.module.load_state_dict(tensors["ema"])
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
        if own:
            self.replay.load_state_dict(tensors["replay"], self.accelerator.device)
        self.step = int(state["step"])

    def _check_same(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another model or with a replay buffer of another number of processes."""
        stored, ours = state["config"], config_to_dict(self.config)
        for key in ("model_type", "model", "seed", "replay"):
            if stored[key] != ours[key]:
                raise ConfigError(
                    f"{self.output} holds a run with {key}={stored[key]}, the config says {ours[key]}; choose another --output"
                )
        if self.config.replay.capacity and state["world_size"] != self.world_size:
            raise ConfigError(
                f"{self.output} was trained by {state['world_size']} processes and its replay buffer is shared over them; "
                f"resume with as many, not {self.world_size}"
            )

    def _check_engine(self) -> None:
        """Refuse engines that shard the weights."""
        kind = self.accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
            raise ConfigError(
                f"{kind} shards the weights and frees them after a backward pass, which thinking differentiates again; "
                "use `accelerate launch --multi_gpu` (DDP), and train.checkpoint_blocks to save memory"
            )

    def _check_batch(self) -> None:
        parts = self.world_size * self.config.train.num_accumulation
        if self.config.train.batch_size % parts:
            raise ConfigError(
                f"train.batch_size={self.config.train.batch_size} is not divisible by {self.world_size} processes times "
                f"num_accumulation={self.config.train.num_accumulation}; use a multiple of {parts}"
            )
