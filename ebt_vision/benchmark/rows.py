"""The rows of a model in the table, and how each row uses the model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ebt_vision.benchmark.protocols import Condition
from ebt_vision.core.thinking_config import ToleranceOf
from ebt_vision.denoising.base import TRAINING_LEVEL, Denoiser, IdentityDenoiser, for_photographs, for_vp_images
from ebt_vision.denoising.dit import DiTDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.equilibrium import EqMDenoiser
from ebt_vision.denoising.options import SELF_ENSEMBLES, DenoiseOptions
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.noise import processes

Kind = Literal["ebt", "dit", "regressor", "eqm", "identity", "classical", "blind"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSettings:
    """How many variants of each model are measured; the names are those of the program's options."""

    steps: int = 10
    tolerances: tuple[float, ...] = ()
    tolerance_of: ToleranceOf = "first"
    regressor_tolerances: tuple[float, ...] = ()
    """Rows of the regressor that stop when an application changes the image by at most this fraction of the first change."""
    step_sizes: tuple[float, ...] = ()
    """Factors on the learned step size, with thinking rows for each."""
    candidates: int = 8
    candidate_steps: tuple[int, ...] = ()
    """Steps of the best-of-N rows; empty for 1 and `steps`."""
    candidate_noise: float = 0.1
    langevin: float = 0.0
    passes: tuple[int, ...] = (1, 2, 5, 10, 25, 50, 100)
    loops: int = 3
    clean_below: float | None = None
    """See DenoiseOptions."""
    self_ensembles: tuple[int, ...] = ()
    """Numbers of mirrored copies whose mean is measured, for the first row of each model."""

    def __post_init__(self) -> None:
        whole = {"steps": (self.steps,), "candidate-steps": self.candidate_steps, "passes": self.passes}
        for name, values in whole.items():
            if any(value < 1 for value in values):
                raise ValueError(f"--{name} {min(values)} is out of range; use 1 or more")
        if any(scale <= 0 for scale in self.step_sizes):
            raise ValueError(f"--step-sizes {min(self.step_sizes)} is out of range; use positive numbers")
        for copies in self.self_ensembles:
            if copies not in SELF_ENSEMBLES[1:]:
                raise ValueError(f"--self-ensemble {copies} is out of range; use 2, 4 or 8")
        for name, value in {"candidates": self.candidates, "loops": self.loops}.items():
            if value < 0:
                raise ValueError(f"--{name} {value} is out of range; use 0 (no such rows) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run of a model. A run of T steps gives a table row for each of `reported`."""

    model: str
    kind: Kind
    method: str
    num_steps: int
    reported: tuple[int, ...]
    """The steps whose images are measured."""
    mode: Literal["x0", "ddim", "recursion"] | None = None
    """DiT: the sampling mode."""
    start_level: float | None = None
    """DiT: the VP level given to the model, if it is not the level of the noise."""
    tolerance: float | None = None
    tolerance_of: ToleranceOf = "first"
    step_size_scale: float = 1.0
    num_candidates: int = 1
    candidate_noise: float = 0.0
    langevin: float = 0.0
    clean_below: float | None = None
    self_ensemble: int = 1

    @property
    def needs_final_energy(self) -> bool:
        """Whether the result also depends on the energy of the last image, which costs another pass."""
        return self.kind == "ebt" and (self.tolerance is not None or self.num_candidates > 1)


def kind_of(denoiser: Denoiser) -> Kind:
    """Return the kind of a denoiser for its rows. Other one-step methods are classical, or blind if they do not take sigma."""
    kinds: list[tuple[type[Denoiser], Kind]] = [
        (EBTDenoiser, "ebt"),
        (DiTDenoiser, "dit"),
        (RegressorDenoiser, "regressor"),
        (EqMDenoiser, "eqm"),
        (IdentityDenoiser, "identity"),
    ]
    other: Kind = "classical" if "sigma" in denoiser.options_used else "blind"
    return next((kind for cls, kind in kinds if isinstance(denoiser, cls)), other)


def rows_of(name: str, kind: Kind, condition: Condition, settings: RowSettings) -> Iterator[Row]:
    """Return the rows of a model called `name` under a condition."""
    rows = list(_rows_of(name, kind, condition, settings))
    yield from rows
    if kind != "identity":
        for copies in settings.self_ensembles:
            yield replace(rows[0], method=f"{rows[0].method}, mean of {copies} copies", self_ensemble=copies)


def _rows_of(name: str, kind: Kind, condition: Condition, settings: RowSettings) -> Iterator[Row]:
    if kind == "ebt":
        yield from _ebt_rows(name, settings)
    elif kind == "dit":
        yield from _dit_rows(name, condition, settings)
    elif kind == "regressor":
        yield from _regressor_rows(name, settings)
    elif kind == "eqm":
        yield Row(
            model=name, kind=kind, method="descent", num_steps=settings.steps, reported=tuple(range(1, settings.steps + 1))
        )
    elif kind == "identity":
        yield Row(model=name, kind=kind, method="noisy input", num_steps=1, reported=(1,))
    elif kind == "blind":
        yield Row(model=name, kind=kind, method="blind", num_steps=1, reported=(1,))
    else:
        told = "told sigma" if condition.sigma is not None else "sigma estimated"
        yield Row(model=name, kind=kind, method=told, num_steps=1, reported=(1,))


def sweep_rows_of(name: str, kind: Kind, condition: Condition, settings: RowSettings) -> Iterator[Row]:
    """The rows for the plot over noise levels: one run of each network, and the noisy input."""
    wanted = ("thinking", "applied", "descent", "x0", "noisy input")
    yield from (row for row in rows_of(name, kind, condition, settings) if row.method in wanted)


_TOLERANCE_OF: dict[ToleranceOf, str] = {
    "first": "",
    "previous": " of the previous",
    "training": " of the training's",
    "observation": " of the observation's",
}
"""Reference of the tolerance, in the name of its row."""


def _ebt_rows(name: str, settings: RowSettings) -> Iterator[Row]:
    steps = settings.steps
    plain = Row(
        model=name,
        kind="ebt",
        method="thinking",
        num_steps=steps,
        reported=tuple(range(1, steps + 1)),
        clean_below=settings.clean_below,
    )
    yield plain
    for tolerance in settings.tolerances:
        method = f"thinking, tolerance {tolerance:g}{_TOLERANCE_OF[settings.tolerance_of]}"
        yield replace(plain, method=method, reported=(steps,), tolerance=tolerance, tolerance_of=settings.tolerance_of)
    for scale in settings.step_sizes:
        yield replace(plain, method=f"thinking, step size x {scale:g}", step_size_scale=scale)
    if settings.candidates > 1:
        for count in sorted(set(settings.candidate_steps or (1, steps))):
            yield Row(
                model=name,
                kind="ebt",
                method=f"best of {settings.candidates}",
                num_steps=count,
                reported=(count,),
                num_candidates=settings.candidates,
                candidate_noise=settings.candidate_noise,
                langevin=settings.langevin,
                clean_below=settings.clean_below,
            )


def _regressor_rows(name: str, settings: RowSettings) -> Iterator[Row]:
    """Return the rows of a regressor: applied 1..`steps` times, and stopped by the size of its change."""
    steps = settings.steps
    plain = Row(model=name, kind="regressor", method="applied", num_steps=steps, reported=tuple(range(1, steps + 1)))
    yield plain
    for tolerance in settings.regressor_tolerances:
        yield replace(plain, method=f"applied, tolerance {tolerance:g}", reported=(steps,), tolerance=tolerance)


def _dit_rows(name: str, condition: Condition, settings: RowSettings) -> Iterator[Row]:
    timestep = condition.timestep
    yield Row(model=name, kind="dit", method="x0", mode="x0", num_steps=1, reported=(1,))
    for passes in settings.passes:
        if timestep is None or passes <= timestep + 1:  # the number of timesteps is the limit
            yield Row(model=name, kind="dit", method="ddim", mode="ddim", num_steps=passes, reported=(passes,))
    if not settings.loops:
        return
    loops = Row(
        model=name,
        kind="dit",
        method="recursion",
        mode="recursion",
        num_steps=settings.loops,
        reported=tuple(range(1, settings.loops + 1)),
    )
    # In the published code a loop may start at the timestep of the noise or at a given timestep. The last timestep of training
    # gives the paper's 100, 200 and 300 passes.
    yield loops
    if timestep != processes.level_to_timestep(TRAINING_LEVEL):
        yield replace(loops, method=f"recursion from level {TRAINING_LEVEL:g}", start_level=TRAINING_LEVEL)


def prepare(denoiser: Denoiser, row: Row, condition: Condition, noisy: Tensor) -> tuple[Denoiser, Tensor, DenoiseOptions]:
    """Return the denoiser of the row, the images (B, 3, H, W) at the scale that it expects, and its options.

    In the paper's protocol, networks of the VP process get the input unscaled; other methods get it divided by its signal
    scale, with the resulting sigma. In the other protocols, a network of the VP process gets the image times its signal scale,
    and a DiT gets the scale of its timestep. For networks trained on plain Gaussian noise the two cases are exchanged.
    """
    options = DenoiseOptions(
        num_steps=row.num_steps,
        tolerance=row.tolerance,
        tolerance_of=row.tolerance_of,
        step_size_scale=row.step_size_scale,
        num_candidates=row.num_candidates,
        candidate_noise_std=row.candidate_noise,
        langevin_std=row.langevin,
        clean_below=row.clean_below,
        self_ensemble=row.self_ensemble,
        seed=condition.seed,
        keep_trajectory=row.reported != (row.num_steps,),
        keep_candidates=row.num_candidates > 1,
    )
    if isinstance(denoiser, DiTDenoiser) and row.mode is not None:
        denoiser = DiTDenoiser(denoiser.model, mode=row.mode, name=denoiser.name)
    if condition.protocol != "paper":
        level, sigma = row.start_level, condition.sigma
        return for_photographs(denoiser), noisy, replace(options, noise_level=level, sigma=None if level else sigma)
    if row.kind in ("classical", "blind"):
        signal, _ = processes.signal_and_noise_scale(condition.strength)
        scaled = processes.to_image_range(processes.to_model_range(noisy) / signal)
        return denoiser, scaled, replace(options, sigma=min(condition.sigma or math.inf, 255.0))
    denoiser = for_vp_images(denoiser, condition.strength)
    return denoiser, noisy, replace(options, noise_level=row.start_level or condition.strength)
