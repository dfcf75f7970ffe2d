"""Thinking: predict by gradient descent on an energy (Gladstone et al. 2025, arXiv 2507.02092, sec. 3).

This file has the one thinking loop of the project. It knows an energy function and no model; training and inference, images
and text differ by arguments alone:

    y <- y - step_size * dE(y, context)/dy        once per thinking step

Other rules for the step are in step_rules.py.

The energy function takes `(candidate, *context)`, all batch first, and returns one energy per element, lower is better:
(B,) for images, (B, S) for text. Elements must not depend on one another, so that the gradient of the sum is the gradient
of each.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebt_vision.core.checks import check
from ebt_vision.core.rng import Generators, rand_like, randn_like
from ebt_vision.core.step_rules import AnyStepRule, BarzilaiBorwein, Memory, Step, StepRuleName, find_step_rule


class EnergyFunction(Protocol):
    """`(candidate (B, ...), *context) -> energies (B,) or (B, S)`; lower is better."""

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor: ...


@runtime_checkable
class SteppedEnergy(Protocol):
    """An energy that changes with the thinking step: `at_step(t)` is the one whose gradient makes update t + 1.

    The energy after the last of T updates is `at_step(T)`'s.
    """

    def at_step(self, step: int) -> EnergyFunction: ...


@runtime_checkable
class EnergyWithGradient(Protocol):
    """An energy function that gives its direction of ascent itself, so that think() does not differentiate it."""

    def energy_and_gradient(self, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]: ...


class CompiledEnergy:
    """An energy function whose value and gradient come from one graph compiled by torch.compile, for long training.

    Candidate (B, ...) and context (B, ...) -> energies (B,) or (B, S).

    torch.compile cannot differentiate a compiled forward pass twice. It can compile the gradient (torch.func.grad) as a
    function of its own, whose backward is then the second order. Same values to rounding; needs a C++ compiler on the CPU.
    Where compiling fails it says so once, as a warning, and goes on without it.
    """

    def __init__(self, energy_fn: EnergyFunction, *, backend: str | Callable[..., Any] = "inductor"):
        self.energy_fn = energy_fn
        self._eager = functools.partial(_functional_gradient, energy_fn)
        self._energy_and_gradient = torch.compile(self._eager, backend=backend)

    def __call__(self, candidate: Tensor, *context: Tensor) -> Tensor:
        return self.energy_fn(candidate, *context)

    def energy_and_gradient(self, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(energies (B,) or (B, S), gradient (B, ...) of their sum), both part of the graph where one is recorded."""
        try:
            gradient, energy = self._energy_and_gradient(candidate, *context)
        except torch._dynamo.exc.TorchDynamoException as error:  # without a C++ compiler, say
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"the energy's gradient cannot be compiled ({reason}); going on without", stacklevel=2)
            self._energy_and_gradient = self._eager
            gradient, energy = self._eager(candidate, *context)
        return energy, gradient


def _functional_gradient(energy_fn: EnergyFunction, candidate: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
    def total(candidate: Tensor) -> tuple[Tensor, Tensor]:
        energy = energy_fn(candidate, *context)
        return energy.sum(), energy

    return torch.func.grad(total, has_aux=True)(candidate)


class ThinkingError(RuntimeError):
    """Thinking cannot go on; the message says why and what to do."""


class NonFiniteGradientError(ThinkingError):
    """An energy or its gradient became infinite or NaN; `step` is the thinking step, `samples` the batch positions."""

    def __init__(self, step: int, samples: Sequence[int]):
        self.step, self.samples = step, list(samples)
        super().__init__(
            f"the energy or its gradient is not finite at thinking step {step} for samples {self.samples}; "
            "check the input for NaN, or use a smaller step size"
        )


ToleranceOf = Literal["first", "previous", "training", "observation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingConfig:
    """How to think; the defaults are the plain deterministic descent of inference."""

    num_steps: int = 1
    """Updates of the candidate; the largest number of them with a random number or a tolerance."""
    min_num_steps: int | None = None
    """If set, each call draws its number of steps uniformly from min_num_steps..num_steps (a landscape regulariser)."""
    step_size: float = 1.0
    """The paper's alpha, in candidate units squared per energy unit; a model's learned one takes its place."""
    step_size_factor: float = 1.0
    """Each sample's step size is drawn uniformly from [step_size / factor, step_size * factor]; 1 draws nothing."""
    step_rule: StepRuleName | AnyStepRule = "fixed"
    """How far a step goes along the gradient: the name of a rule of step_rules.py, or the rule itself with its settings."""
    langevin_std: float | tuple[float, ...] = 0.0
    """Standard deviation, in candidate units, of the noise added to the candidate before each gradient: one, or one a step."""
    detach_between_steps: bool = True
    """Cut the graph before every step, so that a loss on step t trains step t alone."""
    backprop_steps: int | None = None
    """If set, only the last so many steps are part of the graph (truncation); None keeps all of them."""
    tolerance: float | None = None
    """If set, a sample stops once a step lowers its energy by no more than this share of what its first step did, or of what
    tolerance_of names."""
    tolerance_of: ToleranceOf = "first"
    """previous: of what the step before did. An energy that falls step by step at an even rate, as that of an input far from
    anything that was trained on, is then thought on; one that settles at once stops. training: of `training_gain` times
    training_gain / what the sample's own first step did: the noisier the input, the smaller the gains that are worth a step.
    observation: a sample stops once its energy is no more than this share of the energy of what was observed. A candidate with
    so little energy needs no step, so a good start ends at once. See `observation_energy` of think()."""
    training_gain: float | None = None
    """By how much a first step lowers the energy of an input with the training's noise, on average; for `training` alone."""

    def __post_init__(self) -> None:
        check(self.num_steps >= 0, "num_steps", self.num_steps, "use 1 or more, or 0 to return the start")
        low = self.min_num_steps
        check(low is None or 0 <= low <= self.num_steps, "min_num_steps", low, f"use 0..{self.num_steps}")
        check(self.step_size > 0, "step_size", self.step_size, "use a positive number")
        check(self.step_size_factor >= 1, "step_size_factor", self.step_size_factor, "use 1 (off) or more")
        find_step_rule(self.step_rule)
        self._check_langevin_std()
        check(self.backprop_steps is None or self.backprop_steps >= 1, "backprop_steps", self.backprop_steps, "use 1 or more")
        check(self.tolerance is None or self.tolerance >= 0, "tolerance", self.tolerance, "use 0 or more, or None")
        check(
            self.tolerance_of in get_args(ToleranceOf), "tolerance_of", self.tolerance_of, f"use one of {get_args(ToleranceOf)}"
        )
        gain = self.training_gain
        check(gain is None or gain > 0, "training_gain", gain, "use a positive number")
        if self.tolerance is not None and self.tolerance_of == "training" and gain is None:
            raise ValueError("tolerance_of='training': the model has no training_gain; use 'first' or 'previous'")

    @property
    def has_langevin_noise(self) -> bool:
        """Whether noise is added at any step."""
        return any(std > 0 for std in self._langevin_stds)

    def langevin_std_at(self, step: int) -> float:
        """Standard deviation of the noise before gradient `step` (0, 1, ...)."""
        return self.langevin_std[step] if isinstance(self.langevin_std, tuple) else self.langevin_std

    @property
    def _langevin_stds(self) -> tuple[float, ...]:
        return self.langevin_std if isinstance(self.langevin_std, tuple) else (self.langevin_std,)

    def _check_langevin_std(self) -> None:
        for std in self._langevin_stds:
            check(std >= 0, "langevin_std", self.langevin_std, "use 0 (off) or more")
        self.check_schedule(self.num_steps)

    def check_schedule(self, num_steps: int) -> None:
        """ValueError unless a langevin_std for each step is there for `num_steps` steps."""
        if isinstance(self.langevin_std, tuple):
            given = len(self.langevin_std)
            remedy = f"give one for each of the {num_steps} steps"
            check(given >= num_steps, "langevin_std", f"{self.langevin_std} ({given} values)", remedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingStep:
    """What a callback sees: the candidate before the first update (index 0) or after update `index`, and its energy."""

    index: int
    candidate: Tensor  # (B, ...)
    energies: Tensor  # (B,) or (B, S)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingResult:
    """What thinking found. T is the number of steps; E is (B,) for images, (B, S) for text."""

    final: Tensor
    """The last candidate of every sample, (B, ...)."""
    predictions: tuple[Tensor, ...]
    """The candidate after each update, T of (B, ...), part of the graph if create_graph; empty if not kept."""
    energies: Tensor
    """Energy before the first and after every update, (T + 1, *E); a stopped sample repeats its last one. The last row
    is NaN with evaluate_final=False."""
    gradient_norms: Tensor
    """Norm of each element's energy gradient at each update, (T, *E); 0 where a sample had stopped."""
    num_steps: Tensor
    """Updates that each sample's final candidate has had, int64 (B,)."""
    num_forward: Tensor
    """Energy evaluations spent on each sample, the last one without a gradient included, int64 (B,)."""
    finite: Tensor
    """Whether every energy with its gradient was finite, bool (), on the candidates' device; True unless check_finite=False."""


Callback = Callable[[ThinkingStep], object]
Projection = Callable[[Tensor], Tensor]
"""Candidates (B, ...) to the nearest ones that meet a constraint, same shape, each sample by itself."""


def think(
    energy_fn: EnergyFunction,
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
    """Descend the energy from `y0` (B, ...); the caller's tensors are never changed, and it works under torch.no_grad().

    `context` tensors (B, ...) are handed to the energy after the candidate. `step_size`, a number or a tensor () or (B,),
    takes the config's place and may need a gradient; so does `num_steps`. `observation_energy` (B,), for a tolerance of the
    observation alone, defaults to the energies of `y0`. `create_graph` makes the predictions differentiable
    with respect to the energy's parameters and the step size; with `differentiate_start` with respect to `y0` too, as unrolled
    and plug-and-play methods need. That takes a config with detach_between_steps=False and no backprop_steps.

    `project` is applied to the candidates after each update, to put known pixels back, say. It is given all of them (B, ...),
    those of stopped samples too, whose results are not used. A start that meets the constraint is the caller's to give.

    `generator` feeds every random draw. `callback` is called with the start and after each update; if it returns True, thinking
    ends there. With a tolerance an update that raised the energy of a sample is taken back, after the callback has seen it.
    Without `evaluate_final` the last energy is not computed, which saves a forward pass. Without `check_finite`
    the host does not wait for the device at every step: nothing is raised for a gradient that is not finite, and
    `ThinkingResult.finite` says whether there was one.

    Raises ThinkingError under torch.inference_mode() and where the energy does not depend on the candidate,
    NonFiniteGradientError where a gradient is not finite, ValueError for a tolerance together with create_graph, for a `y0`
    that needs a gradient which it would not get, for a `project` that changes a shape, and for a schedule too short.
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
    """The state of one call of think(): the candidates and which samples still move."""

    energy_fn: EnergyFunction
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
    finite: Tensor | None = None  # (), of the steps that were not checked
    active: Tensor | None = None  # indices of the moving samples; None stands for all of them
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
            # At the first step the graph leads to y0, if think() has left it there, and no further back.
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
                if not moving.any():  # without the cost of a gradient
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
        """(candidate, energy, what computes the gradient) of the moving samples, Langevin noise added to the candidate."""
        candidate = self._select(start)
        langevin_std = self.config.langevin_std_at(step)
        if langevin_std > 0:
            candidate = candidate + langevin_std * randn_like(candidate, self._generators())
        energy, gradient_of = self._energy_then_gradient(candidate, step, in_graph)
        self._check(energy.detach(), self._index(), step)
        return (candidate if in_graph else candidate.detach()), (energy if in_graph else energy.detach()), gradient_of

    def _check(self, values: Tensor, index: Tensor, step: int) -> None:
        """Note, or raise NonFiniteGradientError, where a value of a sample of `index` is not finite."""
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
        """Energies of `rows` of candidates of the moving samples, where a step rule asks for them."""
        index = self._index()[rows]
        forwards[index] += 1
        energy_fn = self.energy_fn.at_step(step) if isinstance(self.energy_fn, SteppedEnergy) else self.energy_fn
        return energy_fn(candidate[rows], *(tensor[index] for tensor in self.context))

    def _nan_energy(self) -> Tensor:
        return torch.full(self.y.shape[:1], torch.nan, device=self.y.device)

    def _settle(self, used: Tensor, previous: Tensor | None, step: int) -> Tensor | None:
        """Drop the samples whose last update gained too little; returns which of the active ones go on (None: all)."""
        if self.config.tolerance is None:
            return None
        index = self._index()
        moving = torch.ones(len(index), dtype=torch.bool, device=index.device)
        if previous is not None and step >= 1:
            gain = self._gain(step)[index]
            rose = index[gain < 0]
            if len(rose):  # the update made it worse: take it back
                self.y = self.y.index_copy(0, rose, previous[rose])
                self.energies[-1] = self.energies[-1].index_copy(0, rose, self.energies[-2][rose])
                used[rose] -= 1
            moving = gain >= 0
            if self.config.tolerance_of != "observation":
                moving = gain > self.config.tolerance * self._yardstick(step)[index]
        if self.config.tolerance_of == "observation":
            moving = moving & (self._total(step) > self.config.tolerance * self._observed())[index]
        if moving.all():
            return None
        self.active = index[moving]
        return moving

    def _gain(self, step: int) -> Tensor:
        """By how much update `step` (1, 2, ...) lowered the energy of each sample, summed over its elements, (B,)."""
        return self._total(step - 1) - self._total(step)

    def _total(self, step: int) -> Tensor:
        """The energy of each sample after update `step`, summed over its elements, (B,)."""
        return self.energies[step].reshape(len(self.energies[step]), -1).sum(1)

    def _observed(self) -> Tensor:
        """The energy of what was observed, (B,)."""
        return self._total(0) if self.observation_energy is None else self.observation_energy

    def _yardstick(self, step: int) -> Tensor:
        """What a tolerance is a share of after update `step`, (B,)."""
        of = self.config.tolerance_of
        gain = self._gain(max(1, step - 1) if of == "previous" else 1).clamp(min=0)
        if of == "training":
            assert self.config.training_gain is not None  # ThinkingConfig sees to it
            return self.config.training_gain**2 / gain.clamp(min=torch.finfo(gain.dtype).tiny)
        return gain

    def _update(self, candidate: Tensor) -> None:
        self.y = self._spread(self._projected(candidate), self.y)

    def _projected(self, candidate: Tensor) -> Tensor:
        """The moving candidates, projected. A projection may know each sample by its place, so it is given all of them."""
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
                "y0 needs a gradient, which create_graph alone does not give it; use differentiate_start=True or y0.detach()"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfResult:
    """The winner of N candidates by energy (self-verification), and all that were tried."""

    final: Tensor
    """The candidate of lowest energy of each element, (B, ...)."""
    energies: Tensor
    """Final energy of every candidate, (N, *E)."""
    chosen: Tensor
    """Which candidate won, int64, shape E."""
    results: tuple[ThinkingResult, ...]
    """How each candidate was thought, N of them, without trajectories."""

    @property
    def candidates(self) -> Tensor:
        """Every candidate, (N, B, ...)."""
        return torch.stack([result.final for result in self.results])

    @property
    def num_forward(self) -> Tensor:
        """Energy evaluations over all candidates, int64 (B,)."""
        return torch.stack([result.num_forward for result in self.results]).sum(0)


def best_of(
    energy_fn: EnergyFunction,
    starts: Tensor | Iterator[Tensor] | Sequence[Tensor],
    config: ThinkingConfig | None = None,
    *,
    context: tuple[Tensor, ...] = (),
    step_size: Tensor | float | None = None,
    observation_energy: Tensor | None = None,
    project: Projection | None = None,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> BestOfResult:
    """Think from each of N starts, each (B, ...), one after the other, and keep the candidate of lowest energy per element.

    The generator goes on from one candidate to the next, so Langevin noise and random step sizes differ between them. Ties keep
    the earlier one. Raises ValueError without a start, and what think() raises.
    """
    results = tuple(
        think(
            energy_fn,
            start,
            config,
            context=context,
            step_size=step_size,
            observation_energy=observation_energy,
            project=project,
            generator=generator,
            callback=callback,
            keep_predictions=False,
        )
        for start in starts
    )
    if not results:
        raise ValueError("best_of needs at least one start")
    energies = torch.stack([result.energies[-1] for result in results])  # (N, *E)
    finals = torch.stack([result.final for result in results])  # (N, B, ...)
    chosen = energies.argmin(0)
    index = chosen.reshape(1, *chosen.shape, *[1] * (finals.ndim - 1 - chosen.ndim)).expand(1, *finals.shape[1:])
    return BestOfResult(final=finals.gather(0, index)[0], energies=energies, chosen=chosen, results=results)
