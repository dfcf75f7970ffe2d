"""Thinking: predict by gradient descent on an energy (Gladstone et al. 2025, arXiv 2507.02092, sec. 3).

This file has the only thinking loop of the project. It takes an energy function (energy_functions.py), not a model. Training
and inference, images and text differ only in arguments:

   y <- y - step_size * dE(y, context)/dy        once per thinking step

Other rules for the step are in step_rules.py, the rules for stopping in tolerance.py.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.core.checks import check
from ebt_vision.core.energy_functions import EnergyFunction, EnergyWithGradient, SteppedEnergy
from ebt_vision.core.rng import Generators, rand_like, randn_like
from ebt_vision.core.step_rules import AnyStepRule, BarzilaiBorwein, Memory, Step, find_step_rule
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.core.thinking_results import (
    Callback,
    NonFiniteGradientError,
    ThinkingError,
    ThinkingResult,
    ThinkingStep,
)
from ebt_vision.core.tolerance import continues, gain

Projection = Callable[[Tensor], Tensor]
"""Candidates (B, ...) to the nearest ones that meet a constraint, same shape, each sample by itself."""


def think(
    energy_fn: EnergyFunction | SteppedEnergy,
    y0: Tensor,
    config: ThinkingConfig | None = None,
    *,
    context: tuple[Tensor, ...] = (),
    step_size: Tensor | float | None = None,
    num_steps: int | None = None,
    observation_energy: Tensor | None = None,
    create_graph: bool = False,
    differentiate_start: bool = False,
    project: Projection | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
    keep_predictions: bool = True,
    evaluate_final: bool = True,
    check_finite: bool = True,
) -> ThinkingResult:
    """Descend the energy from `y0` (B, ...). The caller's tensors never change. Works under torch.no_grad().

    The energy gets the `context` tensors (B, ...) after the candidate. `step_size`, a number or a tensor () or (B,), overrides
    the config and may require a gradient; `num_steps` also overrides the config. `observation_energy` (B,) is for
    tolerance_of="observation" and defaults to the energies of `y0`. `create_graph` makes the predictions differentiable with
    respect to the parameters of the energy and the step size. `differentiate_start` makes them differentiable with respect to
    `y0` as well, for unrolled and plug-and-play methods. It needs a config with detach_between_steps=False and no
    backprop_steps.

    `project` is applied to the candidates after each update, for example to restore known pixels. It gets all candidates
    (B, ...), also those of stopped samples, whose results are not used. The caller gives a start that meets the constraint.

    `generator` is used for every random draw. `callback` is called with the start and after each update; if it returns True,
    thinking stops. With a tolerance, an update that raised the energy of a sample is undone after the callback. Without
    `evaluate_final` the last energy is not computed, which saves a forward pass. Without `check_finite` the host does not wait
    for the device at every step: a non-finite gradient raises no error, and `ThinkingResult.finite` reports it.

    Raises ThinkingError under torch.inference_mode() and for an energy that does not depend on the candidate,
    NonFiniteGradientError for a gradient that is not finite, ValueError for a tolerance together with create_graph, for a
    `y0` that requires a gradient but would not get one, for a `project` that changes a shape, and for a schedule of Langevin
    noise that is too short.
    """
    config = config or ThinkingConfig()
    if torch.is_inference_mode_enabled() or y0.is_inference():
        raise ThinkingError("thinking needs gradients, which inference_mode forbids; use torch.no_grad() instead")
    if config.tolerance is not None and create_graph:
        raise ValueError("tolerance stops samples one by one, which a training graph cannot follow; use tolerance=None")
    _check_differentiable_start(config, y0, create_graph, differentiate_start)
    rule = find_step_rule(config.step_rule)
    steps = _draw_num_steps(config, num_steps, generator)
    config.check_schedule(steps)
    alpha = _draw_step_sizes(config, y0, step_size, generator)
    with torch.enable_grad(), _double_backward_attention(create_graph):
        start = y0 if differentiate_start and y0.requires_grad else y0.detach()
        observed = None if observation_energy is None else observation_energy.detach()
        descent = _Descent(
            energy_fn, start, context, alpha, config, rule, create_graph, project, generator, check_finite, observed
        )
        return descent.run(steps, callback, keep_predictions, evaluate_final)


@dataclass(slots=True)
class _Descent:
    """The state of one call of think(): the candidates and the samples that still move."""

    energy_fn: EnergyFunction | SteppedEnergy
    y: Tensor
    context: tuple[Tensor, ...]
    alpha: Tensor  # (B,)
    config: ThinkingConfig
    rule: AnyStepRule
    create_graph: bool
    project: Projection | None
    generator: Generators | None
    check_finite: bool
    observation_energy: Tensor | None = None  # (B,)
    finite: Tensor | None = None  # (), for steps without a check
    active: Tensor | None = None  # indices of the moving samples; None means all
    energies: list[Tensor] = field(default_factory=list)

    def run(self, num_steps: int, callback: Callback | None, keep_predictions: bool, evaluate_final: bool) -> ThinkingResult:
        batch = self.y.shape[0]
        used, forwards = torch.zeros(2, batch, dtype=torch.int64, device=self.y.device)
        predictions: list[Tensor] = []
        norms: list[Tensor] = []
        first_graph_step = max(num_steps - (self.config.backprop_steps or num_steps), 0)
        previous: Tensor | None = None  # the candidates one update ago, to go back to where the energy rose
        memory: Memory = ()  # of the step rule, of the moving samples

        for step in range(num_steps):
            # Energy and gradient of the samples that still move.
            in_graph = self.create_graph and step >= first_graph_step
            # At the first step the graph leads back to y0 if think() kept it, and no further.
            connected = in_graph and not self.config.detach_between_steps and (step > first_graph_step or step == 0)
            start = self.y if connected and self.y.requires_grad else self.y.detach()
            candidate, energy, gradient_of = self._evaluate(start, step, in_graph)
            self._count(forwards)
            self._record(energy)
            ended = self._ended(callback, step)

            # Stop the samples that have settled; they keep the better of their last two candidates.
            moving = self._settle(used, previous, step)
            if ended:
                return self._result(predictions, norms, used, forwards)
            if moving is not None:
                if not moving.any():  # saves the cost of a gradient
                    return self._result(predictions, norms, used, forwards)
                candidate, energy = candidate[moving], energy[moving]
                memory = tuple(kept[moving] for kept in memory)
            gradient = gradient_of() if moving is None else gradient_of()[moving]
            norm = gradient.detach().flatten(energy.ndim).norm(dim=-1)
            self._check(norm, self._index(), step)

            # Update.
            previous = self.y
            moved, memory = self.rule.move(
                Step(
                    candidate=candidate,
                    energy=energy.detach(),
                    gradient=gradient,
                    step_size=self._select(self.alpha),
                    memory=memory if connected else tuple(kept.detach() for kept in memory),
                    project=self._projected,
                    energy_of=functools.partial(self._trial_energy, step, forwards),
                )
            )
            self._update(moved)
            used[self._index()] += 1
            norms.append(self._spread(norm.detach(), torch.zeros_like(self.energies[0])))
            if keep_predictions:
                predictions.append(self.y)

        if evaluate_final:
            with torch.no_grad():
                energy = self._energy(self._select(self.y.detach()), num_steps)
            self._count(forwards)
        else:
            energy = torch.full_like(self._select(self.energies[0]), torch.nan) if self.energies else self._nan_energy()
        self._record(energy)
        if evaluate_final:
            self._ended(callback, num_steps)
            self._settle(used, previous, num_steps)
        return self._result(predictions, norms, used, forwards)

    def _evaluate(self, start: Tensor, step: int, in_graph: bool) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Return (candidate, energy, gradient function) of the moving samples; Langevin noise is added to the candidate."""
        candidate = self._select(start)
        langevin_std = self.config.langevin_std_at(step)
        if langevin_std > 0:
            candidate = candidate + langevin_std * randn_like(candidate, self._generators())
        energy, gradient_of = self._energy_then_gradient(candidate, step, in_graph)
        self._check(energy.detach(), self._index(), step)
        return (candidate if in_graph else candidate.detach()), (energy if in_graph else energy.detach()), gradient_of

    def _check(self, values: Tensor, index: Tensor, step: int) -> None:
        """Record whether the values of samples `index` are finite, or raise NonFiniteGradientError."""
        finite = torch.isfinite(values).reshape(len(values), -1).all(1)
        if not self.check_finite:
            self.finite = finite.all() if self.finite is None else self.finite & finite.all()
        elif not finite.all():
            raise NonFiniteGradientError(step, index[~finite].tolist())

    def _energy_then_gradient(self, candidate: Tensor, step: int, in_graph: bool) -> tuple[Tensor, Callable[[], Tensor]]:
        if isinstance(self.energy_fn, EnergyWithGradient):
            with torch.set_grad_enabled(in_graph):
                context = tuple(self._select(tensor) for tensor in self.context)
                energy, gradient = self.energy_fn.energy_and_gradient(candidate, *context)
                return energy, lambda: gradient
        if not candidate.requires_grad:
            candidate.requires_grad_()
        energy = self._energy(candidate, step)
        if not energy.requires_grad:
            raise ThinkingError("the energy does not depend on the candidate, so there is no gradient to follow")
        return energy, lambda: torch.autograd.grad(energy.sum(), candidate, create_graph=in_graph)[0]

    def _energy(self, candidate: Tensor, step: int) -> Tensor:
        energy_fn = self.energy_fn.at_step(step) if isinstance(self.energy_fn, SteppedEnergy) else self.energy_fn
        return energy_fn(candidate, *(self._select(tensor) for tensor in self.context))

    @torch.no_grad()
    def _trial_energy(self, step: int, forwards: Tensor, candidate: Tensor, rows: Tensor) -> Tensor:
        """Return the energies of `rows` of candidates of the moving samples, for a step rule that asks for them."""
        index = self._index()[rows]
        forwards[index] += 1
        energy_fn = self.energy_fn.at_step(step) if isinstance(self.energy_fn, SteppedEnergy) else self.energy_fn
        return energy_fn(candidate[rows], *(tensor[index] for tensor in self.context))

    def _nan_energy(self) -> Tensor:
        return torch.full(self.y.shape[:1], torch.nan, device=self.y.device)

    def _settle(self, used: Tensor, previous: Tensor | None, step: int) -> Tensor | None:
        """Stop the samples whose last update gained too little; return which active samples continue (None: all)."""
        if self.config.tolerance is None:
            return None
        index = self._index()
        moving = continues(self.config, self.energies, self.observation_energy)[index]
        if previous is not None and step >= 1:
            rose = index[gain(self.energies, step)[index] < 0]
            if len(rose):  # the update raised the energy: undo it
                self.y = self.y.index_copy(0, rose, previous[rose])
                self.energies[-1] = self.energies[-1].index_copy(0, rose, self.energies[-2][rose])
                used[rose] -= 1
        if moving.all():
            return None
        self.active = index[moving]
        return moving

    def _update(self, candidate: Tensor) -> None:
        self.y = self._spread(self._projected(candidate), self.y)

    def _projected(self, candidate: Tensor) -> Tensor:
        """Project the moving candidates. `project` gets all samples, because it may depend on their positions in the batch."""
        if self.project is None:
            return candidate
        everything = self._spread(candidate, self.y)
        projected = self.project(everything)
        if projected.shape != everything.shape:
            raise ValueError(
                f"project made {tuple(projected.shape)} of {tuple(everything.shape)}; return candidates of the same shape"
            )
        return self._select(projected)

    def _record(self, energy: Tensor) -> None:
        self.energies.append(self._spread(energy, self.energies[-1]) if self.active is not None else energy)

    def _ended(self, callback: Callback | None, step: int) -> bool:
        if callback is None:
            return False
        state = ThinkingStep(index=step, candidate=self.y.detach(), energies=self.energies[-1].detach())
        return callback(state) is True

    def _result(self, predictions: list[Tensor], norms: list[Tensor], used: Tensor, forwards: Tensor) -> ThinkingResult:
        energies = torch.stack(self.energies)
        return ThinkingResult(
            final=self.y,
            predictions=tuple(predictions),
            energies=energies,
            gradient_norms=torch.stack(norms) if norms else energies[:0].detach(),
            num_steps=used,
            num_forward=forwards,
            finite=torch.ones((), dtype=torch.bool, device=self.y.device) if self.finite is None else self.finite,
        )

    def _index(self) -> Tensor:
        return torch.arange(len(self.y), device=self.y.device) if self.active is None else self.active

    def _select(self, tensor: Tensor) -> Tensor:
        return tensor if self.active is None else tensor[self.active]

    def _spread(self, values: Tensor, full: Tensor) -> Tensor:
        return values if self.active is None else full.index_copy(0, self.active, values)

    def _generators(self) -> Generators | None:
        if self.active is None or self.generator is None or isinstance(self.generator, torch.Generator):
            return self.generator
        return [self.generator[i] for i in self.active.tolist()]

    def _count(self, forwards: Tensor) -> None:
        forwards[self._index()] += 1


def _check_differentiable_start(config: ThinkingConfig, y0: Tensor, create_graph: bool, differentiate_start: bool) -> None:
    if not differentiate_start:
        if create_graph and y0.requires_grad:
            raise ValueError(
                "y0 requires a gradient, which create_graph alone does not provide; use differentiate_start=True or y0.detach()"
            )
    elif not create_graph:
        raise ValueError("differentiate_start=True needs the graph of the steps; use create_graph=True with it")
    elif config.detach_between_steps or config.backprop_steps is not None:
        raise ValueError(
            f"differentiate_start=True with detach_between_steps={config.detach_between_steps} and "
            f"backprop_steps={config.backprop_steps}: the graph is cut before it reaches y0; use False and None"
        )
    elif isinstance(find_step_rule(config.step_rule), BarzilaiBorwein):
        raise ValueError(
            "step_rule='barzilai-borwein' has lengths that depend on y0 and are no part of the graph: the gradient would be "
            "wrong with differentiate_start=True; use 'fixed', 'momentum' or 'backtracking'"
        )


def _draw_num_steps(config: ThinkingConfig, num_steps: int | None, generator: Generators | None) -> int:
    if num_steps is not None:
        check(num_steps >= 0, "num_steps", num_steps, "use 1 or more, or 0 to return the start")
        return num_steps
    if config.min_num_steps is None:
        return config.num_steps
    first = generator if generator is None or isinstance(generator, torch.Generator) else generator[0]
    device = first.device if first is not None else None
    return int(torch.randint(config.min_num_steps, config.num_steps + 1, (), generator=first, device=device))


def _draw_step_sizes(
    config: ThinkingConfig, y0: Tensor, step_size: Tensor | float | None, generator: Generators | None
) -> Tensor:
    """Each sample's step size (B,), uniform in [alpha / factor, alpha * factor] (paper, System 2 training)."""
    alpha = torch.as_tensor(config.step_size if step_size is None else step_size, dtype=y0.dtype, device=y0.device)
    alpha = alpha.expand(y0.shape[0])
    factor = config.step_size_factor
    if factor == 1.0:
        return alpha
    draw = rand_like(alpha.detach(), generator)
    return alpha * (1.0 / factor + draw * (factor - 1.0 / factor))


def _double_backward_attention(create_graph: bool) -> contextlib.AbstractContextManager[None]:
    """PyTorch's fused attention kernels have no second derivative; its math path has (see models/blocks.py)."""
    return sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext()
