"""What the image models are trained on: clean images and noise go in, the loss and what to log come out."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebt_vision.core.energies import likelihood_context, with_likelihood
from ebt_vision.core.thinking import CompiledEnergy, EnergyFunction, ThinkingConfig, ThinkingResult, think
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.models.trunk_config import noise_process_of
from ebt_vision.noise import processes
from ebt_vision.noise.realistic import RealisticNoiseConfig
from ebt_vision.objectives.base import Objective, put_last, thinking_logs, thinking_output
from ebt_vision.objectives.energy_order import energy_as_error, energy_order_loss

if TYPE_CHECKING:  # diffusers takes seconds to import
    from ebt_vision.models.dit import DiT


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """One process's share of a training batch; images in [-1, 1]."""

    clean: Tensor
    """(B, C, H, W)."""
    noise: Tensor
    """Standard normal, (B, C, H, W): the same for every model trained with one seed."""
    generators: list[torch.Generator]
    """One for each sample, for every further draw."""
    start: Tensor | None = None
    """Candidates to think on from, where a replay buffer gave some; None starts at the observation."""
    observation: Tensor | None = None
    """What was observed, (B, C, H, W), where the task or a replay buffer gave it; None makes it of clean and noise."""


_DISTANCES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss, "l1": F.l1_loss}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """How the loss is made; `thinking` and `loss_steps` are for the EBT alone."""

    level: float = 0.1
    """Noise level of the training images in (0, 1]: 0.1 is timestep 99 of 1000. The DiT trains on all timesteps up to it."""
    sigmas: tuple[float, float] = (0.0, 75.0)
    """Models of noise_process "awgn", in place of `level`: each sample's standard deviation is uniform in it (0..255 units)."""
    realistic_noise: RealisticNoiseConfig | None = None
    """Models of noise_process "awgn", in place of `sigmas`: the mixture of noise.realistic. null: Gaussian noise alone."""
    loss: Literal["smooth_l1", "mse", "l1"] = "smooth_l1"
    """Distance between a prediction and the clean image; smooth_l1 (beta 1) is the paper's. The DiT has its own."""
    loss_steps: Literal["every", "last"] = "every"
    """Average the loss over every thinking step, or take the last one's alone."""
    reconstruction_weight: float = 0.0
    """Weight of the distance between the clean image and N(x), the energy's reconstruction of the observation x; 0 is off.
    It makes N(x) a proposal to start from, and the energy an honest distance: near zero for a clean image."""
    proposal_share: float = 0.0
    """Share of the samples, in [0, 1], that start thinking from N(x) instead of x; needs reconstruction_weight."""
    thinking_share: float = 1.0
    """Share of a batch's samples, in (0, 1], that thinking trains on, its last ones; the others train the reconstruction alone,
    at a third of the cost. Below 1 it needs reconstruction_weight."""
    likelihood_weight: float = 0.0
    """Share of the way back to the observation that each thinking step goes, in [0, 1]: the energy that is descended is the sum
    of the model's and a likelihood of the observation (core/energies.py); 0 is off."""
    energy_order_weight: float = 0.0
    """Weight of a loss on the order of energies along thinking and against the clean image (energy_order.py); 0 is off. Image
    EBTs only; costs a forward and backward of two candidates more."""
    energy_order_scale: float = 5e-4
    """Mean squared error, on [-1, 1], by which two candidates differ clearly."""
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    """Thinking during training; its step_size is not used: the model's learned one is."""

    def __post_init__(self) -> None:
        processes.level_to_timestep(self.level)  # raises for a level out of range
        low, high = self.sigmas
        if not 0 <= low <= high <= 255:
            raise ValueError(f"objective.sigmas=[{low:g}, {high:g}] is not a range in 0..255")
        if self.loss not in _DISTANCES:
            raise ValueError(f"objective.loss={self.loss!r} is unknown; use one of {', '.join(_DISTANCES)}")
        if self.reconstruction_weight < 0:
            raise ValueError(
                f"objective.reconstruction_weight={self.reconstruction_weight:g} is negative; use 0 to turn it off"
            )
        if not 0 <= self.proposal_share <= 1:
            raise ValueError(f"objective.proposal_share={self.proposal_share:g} is not in [0, 1]")
        if self.proposal_share and not self.reconstruction_weight:
            raise ValueError(f"objective.proposal_share={self.proposal_share:g} needs reconstruction_weight, say 1")
        if not 0 < self.thinking_share <= 1:
            raise ValueError(f"objective.thinking_share={self.thinking_share:g} is not in (0, 1]")
        if self.thinking_share < 1 and not self.reconstruction_weight:
            raise ValueError(f"objective.thinking_share={self.thinking_share:g} needs reconstruction_weight, say 1")
        if not 0 <= self.likelihood_weight <= 1:
            raise ValueError(f"objective.likelihood_weight={self.likelihood_weight:g} is not in [0, 1]; 0 turns it off")
        if self.energy_order_weight < 0:
            raise ValueError(f"objective.energy_order_weight={self.energy_order_weight:g} is negative; use 0 to turn it off")
        if self.energy_order_scale <= 0:
            raise ValueError(f"objective.energy_order_scale={self.energy_order_scale:g} must be positive")
        if self.thinking.tolerance is not None:
            raise ValueError("objective.thinking.tolerance must be null in training: the graph needs every sample")
        if self.thinking.num_steps < 1:
            raise ValueError(f"objective.thinking.num_steps={self.thinking.num_steps} must be 1 or more in training")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model predicts for noisy images: `images[i]` (B, C, H, W) in [-1, 1] after i + 1 steps, and energies if any."""

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
        """The noisy images of a batch, (B, C, H, W): given, or at the training level, or each with a sigma drawn for it."""
        if batch.observation is not None:
            return batch.observation
        if noise_process_of(self.model) == "vp":
            signal, noise = processes.signal_and_noise_scale(self.config.level)
            return signal * batch.clean + noise * batch.noise
        low, high = self.config.sigmas
        draws = [torch.rand((), generator=g, device=g.device) for g in batch.generators]
        sigmas = low + (high - low) * torch.stack(draws).to(batch.clean)
        return batch.clean + (2.0 / 255.0) * sigmas[:, None, None, None] * batch.noise  # the range [-1, 1] is 255 units

    def distance(self, prediction: Tensor, clean: Tensor) -> Tensor:
        """The configured loss of each sample, (B,)."""
        return _DISTANCES[self.config.loss](prediction, clean, reduction="none").flatten(1).mean(1)


class EBTObjective(ImageObjective):
    """Think from the observation (or from a replayed candidate) and compare with the clean image (paper, sec. 3)."""

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
        """The loss of thinking and what to log or to replay, of the last thinking_share of the batch."""
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
        """The starts (B, C, H, W), with proposal_share of those that are still the observation replaced by the proposal."""
        if not self.config.proposal_share:
            return start
        draws = torch.stack([torch.rand((), generator=g, device=g.device) for g in generators]).to(start.device)
        fresh = (start == observation).flatten(1).all(1)  # no trajectory of a replay buffer
        chosen = fresh & (draws < self.config.proposal_share)
        return torch.where(chosen[:, None, None, None], proposal.to(start), start)

    def energy_order_loss(self, result: ThinkingResult, clean: Tensor, observation: Tensor, start: Tensor) -> Tensor:
        """The loss () on the order of energies of the start, the last candidate and the clean image."""
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
        """See Objective: observations are made once and go with the candidate that was thought from them."""
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
        """Energy (B,) of candidates, to log what the last update reached; the sum, where there is a likelihood."""
        model: PatchEBT = self.model  # type: ignore[assignment]
        return self.energy_fn(candidate, *_context(model, observation, self.config.likelihood_weight))

    @staticmethod
    def predict(
        model: nn.Module, noisy: Tensor, level: float | None, num_steps: int, *, likelihood_weight: float = 0.0
    ) -> Prediction:
        """num_steps images (B, 3, H, W). With suggested_start "proposal" the first is the proposal; thinking starts there."""
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
    """The clean image in one pass; at validation the model is applied to its own output again."""

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


class DiTObjective(ImageObjective):
    """Noise prediction with learned variance, timesteps uniform up to the training level (paper's code: [0, 100))."""

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        limit = processes.level_to_timestep(self.config.level) + 1
        draws = [torch.randint(limit, (), generator=g, device=g.device) for g in batch.generators]
        timesteps = torch.stack(draws).to(batch.clean.device)
        model: DiT = self.model  # type: ignore[assignment]
        return {"loss": model.loss(batch.clean, batch.noise, timesteps).mean()}

    @staticmethod
    def predict(model: nn.Module, noisy: Tensor, level: float | None, num_steps: int) -> Prediction:
        """num_steps images (B, 3, H, W): the one-call x0 first, then DDIM with 2..num_steps passes."""
        assert level is not None, "a DiT is trained on the VP process"
        dit = cast("DiT", model)
        timestep = processes.level_to_timestep(level)
        images = [dit.predict_clean(noisy, timestep)]
        images += [dit.ddim(noisy, timestep, num_steps=n) for n in range(2, num_steps + 1)]
        return Prediction(images=images)
