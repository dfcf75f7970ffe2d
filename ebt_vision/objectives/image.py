"""Objectives of the image models: from clean images and noise to the loss and values to log."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.core.energies import likelihood_context, with_likelihood
from ebt_vision.core.energy_functions import CompiledEnergy, EnergyFunction
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.core.thinking_results import ThinkingResult
from ebt_vision.models.diffusion import Diffusion
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise import processes
from ebt_vision.noise.realistic import RealisticNoiseConfig
from ebt_vision.objectives.base import Objective, put_last, thinking_logs, thinking_output
from ebt_vision.objectives.energy_order import energy_as_error, energy_order_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """The part of one process in a training batch; images in [-1, 1]."""

    clean: Tensor
    """(B, C, H, W)."""
    noise: Tensor
    """Standard normal, (B, C, H, W); the same for all models trained with one seed."""
    generators: list[torch.Generator]
    """One generator per sample, for all further draws."""
    start: Tensor | None = None
    """Start of thinking, if a replay buffer provides candidates; None starts at the observation."""
    observation: Tensor | None = None
    """The observation, (B, C, H, W), if the task or a replay buffer provides it; None computes it from clean and noise."""


_DISTANCES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss, "l1": F.l1_loss}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Settings of the loss; `thinking` and `loss_steps` are only for the EBT."""

    level: float = 0.1
    """Noise level of the training images in (0, 1]: 0.1 is timestep 99 of 1000. Diffusion trains on all timesteps up to it."""
    lower_level_share: float = 0.0
    """Share of the samples, in [0, 1], whose level is drawn uniformly between 0 and `level`; the others have `level` itself. 0
    is the paper's protocol. Models of noise_process "vp" but for diffusion, which trains on all timesteps up to it anyway."""
    sigmas: tuple[float, float] = (0.0, 75.0)
    """For models of noise_process "awgn", instead of `level`: range of the uniform standard deviation (0..255 units)."""
    realistic_noise: RealisticNoiseConfig | None = None
    """For models of noise_process "awgn", instead of `sigmas`: the mixture of noise.realistic. null: only Gaussian noise."""
    loss: Literal["smooth_l1", "mse", "l1"] = "smooth_l1"
    """Distance between a prediction and the clean image; the paper uses smooth_l1 (beta 1). Diffusion has its own loss."""
    loss_steps: Literal["every", "last"] = "every"
    """Average the loss over all thinking steps, or use only the last step."""
    reconstruction_weight: float = 0.0
    """Weight of the distance between the clean image and N(x), the reconstruction of the observation x; 0 disables it. It makes
    N(x) a proposal to start from, and makes the energy near zero for a clean image."""
    proposal_share: float = 0.0
    """Fraction of the samples, in [0, 1], that start thinking from N(x) instead of x; needs reconstruction_weight."""
    thinking_share: float = 1.0
    """Fraction of the samples of a batch, in (0, 1], on which thinking is trained: the last ones. The others train only the
    reconstruction, at a third of the cost. A value below 1 needs reconstruction_weight."""
    likelihood_weight: float = 0.0
    """Share of the way back to the observation that each thinking step goes, in [0, 1]: the energy that is descended is the sum
    of the model's and a likelihood of the observation (core/energies.py); 0 is off."""
    energy_order_weight: float = 0.0
    """Weight of a loss on the order of energies along thinking and of the clean image (energy_order.py); 0 disables it. Only
    for image EBTs; it costs a forward and a backward pass of two more candidates."""
    energy_order_scale: float = 5e-4
    """Mean squared error, on [-1, 1], by which two candidates clearly differ."""
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    """Thinking during training; its step_size is ignored, because the model has a learned one."""

    def __post_init__(self) -> None:
        processes.level_to_timestep(self.level)  # raises for a level out of range
        if not 0 <= self.lower_level_share <= 1:
            raise ValueError(f"objective.lower_level_share={self.lower_level_share:g} is not in [0, 1]")
        low, high = self.sigmas
        if not 0 <= low <= high <= 255:
            raise ValueError(f"objective.sigmas=[{low:g}, {high:g}] is not a range in 0..255")
        if self.loss not in _DISTANCES:
            raise ValueError(f"objective.loss={self.loss!r} is unknown; use one of {', '.join(_DISTANCES)}")
        if self.reconstruction_weight < 0:
            raise ValueError(f"objective.reconstruction_weight={self.reconstruction_weight:g} is negative; use 0 to disable it")
        if not 0 <= self.proposal_share <= 1:
            raise ValueError(f"objective.proposal_share={self.proposal_share:g} is not in [0, 1]")
        if self.proposal_share and not self.reconstruction_weight:
            raise ValueError(f"objective.proposal_share={self.proposal_share:g} needs reconstruction_weight, for example 1")
        if not 0 < self.thinking_share <= 1:
            raise ValueError(f"objective.thinking_share={self.thinking_share:g} is not in (0, 1]")
        if self.thinking_share < 1 and not self.reconstruction_weight:
            raise ValueError(f"objective.thinking_share={self.thinking_share:g} needs reconstruction_weight, for example 1")
        if not 0 <= self.likelihood_weight <= 1:
            raise ValueError(f"objective.likelihood_weight={self.likelihood_weight:g} is not in [0, 1]; 0 turns it off")
        if self.energy_order_weight < 0:
            raise ValueError(f"objective.energy_order_weight={self.energy_order_weight:g} is negative; use 0 to disable it")
        if self.energy_order_scale <= 0:
            raise ValueError(f"objective.energy_order_scale={self.energy_order_scale:g} must be positive")
        if self.thinking.tolerance is not None:
            raise ValueError("objective.thinking.tolerance must be null in training: the graph needs every sample")
        if self.thinking.num_steps < 1:
            raise ValueError(f"objective.thinking.num_steps={self.thinking.num_steps} must be 1 or more in training")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Predictions for noisy images: `images[i]` (B, C, H, W) in [-1, 1] after i + 1 steps, and energies if any."""

    images: list[Tensor]
    energies: Tensor | None = None  # (T + 1, B)


class ImageObjective(Objective):
    """An objective on image batches."""

    def __init__(self, model: nn.Module, config: ObjectiveConfig):
        super().__init__()
        self.model, self.config = model, config

    @staticmethod
    @abstractmethod
    def predict(model: nn.Module, noisy: Tensor, level: float | None, num_steps: int) -> Prediction:
        """Denoise (B, C, H, W) in [-1, 1] at 1..num_steps steps, for validation; `level` is None for AWGN."""

    def observe(self, batch: ImageBatch) -> Tensor:
        """Return the noisy images of a batch, (B, C, H, W): as provided, at the training level, or with a sigma drawn per
        sample."""
        if batch.observation is not None:
            return batch.observation
        if noise_process_of(self.model) == "vp":
            scales = [processes.signal_and_noise_scale(level) for level in self._levels(batch.generators)]
            signal, noise = torch.tensor(scales).to(batch.clean).T[:, :, None, None, None]  # (B, 1, 1, 1) each
            return signal * batch.clean + noise * batch.noise
        low, high = self.config.sigmas
        draws = [torch.rand((), generator=g, device=g.device) for g in batch.generators]
        sigmas = low + (high - low) * torch.stack(draws).to(batch.clean)
        return batch.clean + (2.0 / 255.0) * sigmas[:, None, None, None] * batch.noise  # [-1, 1] corresponds to 255 units

    def _levels(self, generators: list[torch.Generator]) -> list[float]:
        """The VP noise level of each sample."""
        level, share = self.config.level, self.config.lower_level_share
        if share == 0:
            return [level] * len(generators)
        draws = [torch.rand(2, generator=g, device=g.device).tolist() for g in generators]
        return [level * (1.0 - depth) if choice < share else level for choice, depth in draws]

    def distance(self, prediction: Tensor, clean: Tensor) -> Tensor:
        """Return the configured loss of each sample, (B,)."""
        return _DISTANCES[self.config.loss](prediction, clean, reduction="none").flatten(1).mean(1)


class EBTObjective(ImageObjective):
    """Think from the observation (or a replayed candidate) and compare with the clean image (paper, sec. 3)."""

    thinks = True

    def __init__(self, model: PatchEBT, config: ObjectiveConfig, *, compile_gradient: bool = False):
        super().__init__(model, config)
        energy_fn: EnergyFunction = model
        if config.likelihood_weight:
            energy_fn = with_likelihood(model, int(model.config.observation_context))
        self.energy_fn = CompiledEnergy(energy_fn) if compile_gradient else energy_fn

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        model: PatchEBT = self.model  # type: ignore[assignment]
        observation = self.observe(batch)
        reconstruction = None
        if self.config.reconstruction_weight:
            reconstruction = model.reconstruct(observation, *model.context_of(observation))
        output = self._think(batch, observation, None if reconstruction is None else reconstruction.detach())
        if reconstruction is not None:
            distance = self.distance(reconstruction, batch.clean).mean()
            output["loss"] = output["loss"] + self.config.reconstruction_weight * distance
            output["reconstruction_loss"] = distance.detach()
        return output

    def _think(self, batch: ImageBatch, observation: Tensor, proposal: Tensor | None) -> dict[str, Tensor]:
        """Return the loss of thinking on the last thinking_share of the batch, and values to log or to replay."""
        model: PatchEBT = self.model  # type: ignore[assignment]
        first = len(observation) - max(1, round(self.config.thinking_share * len(observation)))
        clean, generators, observation = batch.clean[first:], batch.generators[first:], observation[first:]
        start = observation if batch.start is None else batch.start[first:]
        if proposal is not None:
            start = self._with_proposals(generators, observation, start, proposal[first:])
        result = think(
            self.energy_fn,
            start,
            self.config.thinking,
            context=_context(model, observation, self.config.likelihood_weight),
            step_size=model.step_size,
            create_graph=True,
            generator=generators,
            evaluate_final=False,
            check_finite=False,
        )
        output = thinking_output(result, model.step_size, self.config.loss_steps, lambda p: self.distance(p, clean).mean())
        if self.config.energy_order_weight:
            order = self.energy_order_loss(result, clean, observation, start)
            output |= {"loss": output["loss"] + self.config.energy_order_weight * order, "energy_order_loss": order.detach()}
        return output | {"observation": observation}

    def _with_proposals(
        self, generators: list[torch.Generator], observation: Tensor, start: Tensor, proposal: Tensor
    ) -> Tensor:
        """Return the starts (B, C, H, W); the proposal replaces proposal_share of those that are still the observation."""
        if not self.config.proposal_share:
            return start
        draws = torch.stack([torch.rand((), generator=g, device=g.device) for g in generators]).to(start.device)
        fresh = (start == observation).flatten(1).all(1)  # not a replayed trajectory
        chosen = fresh & (draws < self.config.proposal_share)
        return torch.where(chosen[:, None, None, None], proposal.to(start), start)

    def energy_order_loss(self, result: ThinkingResult, clean: Tensor, observation: Tensor, start: Tensor) -> Tensor:
        """Return the loss () on the order of energies of the start, the last candidate and the clean image."""
        model: PatchEBT = self.model  # type: ignore[assignment]
        candidates = [start, result.final.detach(), clean]
        # Thinking has taken the start's energy already, but with Langevin noise that of the start and the noise.
        # With a likelihood it was the sum's.
        known = 0 if self.config.thinking.has_langevin_noise or self.config.likelihood_weight else 1
        others = candidates[known:]
        context = (torch.cat([c] * len(others)) for c in model.context_of(observation))
        others_energies = model(torch.cat(others), *context).unflatten(0, (len(others), -1))
        energies = torch.cat([result.energies[:known], others_energies])
        energies = energy_as_error(energies, model.step_size.detach(), clean[0].numel())
        errors = [F.mse_loss(c, clean, reduction="none").flatten(1).mean(1) for c in candidates]
        return energy_order_loss(energies, torch.stack(errors), self.config.energy_order_scale)

    def continue_thinking(self, batch: ImageBatch, rows: dict[str, Tensor]) -> ImageBatch:
        """See Objective. Observations are made once and stay with the candidates that started from them."""
        own = self.observe(batch)
        start, observation = put_last(own, rows.get("candidate")), put_last(own, rows.get("observation"))
        return replace(batch, clean=put_last(batch.clean, rows.get("clean")), start=start, observation=observation)

    def replay_rows(self, batch: ImageBatch, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Objective."""
        return {"candidate": output["candidate"], "clean": batch.clean, "observation": output["observation"]}

    def logs(self, batch: ImageBatch, output: dict[str, Tensor]) -> dict[str, float | Callable[[], float]]:
        """See Objective."""
        candidate, observation = output["candidate"], output["observation"]
        logs = thinking_logs(output, lambda: self.energy_of(candidate, observation).mean().item())
        if "reconstruction_loss" in output:
            logs["reconstruction_loss"] = output["reconstruction_loss"].item()
        return logs

    @torch.no_grad()
    def energy_of(self, candidate: Tensor, observation: Tensor) -> Tensor:
        """Return the energy (B,) of candidates, to log the energy after the last update; with a likelihood, the sum."""
        model: PatchEBT = self.model  # type: ignore[assignment]
        return self.energy_fn(candidate, *_context(model, observation, self.config.likelihood_weight))

    @staticmethod
    def predict(
        model: nn.Module, noisy: Tensor, level: float | None, num_steps: int, *, likelihood_weight: float = 0.0
    ) -> Prediction:
        """Return num_steps images (B, 3, H, W). With suggested_start "proposal" the first is the proposal, where thinking
        starts."""
        assert isinstance(model, PatchEBT)
        own, alpha = model.context_of(noisy), model.step_size.detach()
        energy_fn = with_likelihood(model, len(own)) if likelihood_weight else model
        context = _context(model, noisy, likelihood_weight)
        if model.config.suggested_start == "observation":
            result = think(energy_fn, noisy, context=context, step_size=alpha, num_steps=num_steps)
            return Prediction(images=list(result.predictions), energies=result.energies)
        with torch.no_grad():
            proposal, energy = model.propose(noisy, *own)
        result = think(energy_fn, proposal, context=context, step_size=alpha, num_steps=num_steps - 1)
        return Prediction(images=[proposal, *result.predictions], energies=torch.cat([energy[None], result.energies]))


def _context(model: PatchEBT, observation: Tensor, likelihood_weight: float) -> tuple[Tensor, ...]:
    """What think() is given as context: the model's own, and the likelihood's if it has a weight."""
    own = model.context_of(observation)
    if not likelihood_weight:
        return own
    return (*own, *likelihood_context(observation, likelihood_weight, model.step_size))


class RegressorObjective(ImageObjective):
    """The clean image in one pass; validation applies the model again to its own output."""

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        return {"loss": self.distance(self.model(self.observe(batch)), batch.clean).mean()}

    @staticmethod
    def predict(model: nn.Module, noisy: Tensor, level: float | None, num_steps: int) -> Prediction:
        assert isinstance(model, PatchRegressor)
        images = []
        for _ in range(num_steps):
            noisy = model(noisy)
            images.append(noisy)
        return Prediction(images=images)


class DiffusionObjective(ImageObjective):
    """Noise prediction, with the model's variance term if it has one; timesteps uniform up to the training level (paper's code:
    [0, 100))."""

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        limit = processes.level_to_timestep(self.config.level) + 1
        draws = [torch.randint(limit, (), generator=g, device=g.device) for g in batch.generators]
        timesteps = torch.stack(draws).to(batch.clean.device)
        model: Diffusion = self.model  # type: ignore[assignment]
        return {"loss": model.loss(batch.clean, batch.noise, timesteps).mean()}

    @staticmethod
    def predict(model: nn.Module, noisy: Tensor, level: float | None, num_steps: int) -> Prediction:
        """Return num_steps images (B, 3, H, W): x0 in one call first, then DDIM with 2..num_steps passes."""
        assert level is not None and isinstance(model, Diffusion)  # trained on the VP process
        timestep = processes.level_to_timestep(level)
        images = [model.predict_clean(noisy, timestep)]
        images += [model.ddim(noisy, timestep, num_steps=n) for n in range(2, num_steps + 1)]
        return Prediction(images=images)
