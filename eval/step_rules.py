"""Compare step rules and likelihoods of a Tiny ImageNet EBT, and repeated application of the regressor: PSNR after 1..N steps.

    python eval/step_rules.py --data "data/tiny-imagenet-200/validation-*.parquet" --output docs/results/data/step_rules.json

Noise, images and PSNR are those of the benchmark's paper protocol. Each run of N steps gives the PSNR after every step, and
where each tolerance would have stopped each image, without a run of its own. Choose parameters on training images. The
tables go to standard output.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from ebt_vision.benchmark.images import load_images
from ebt_vision.benchmark.measure import observed
from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.protocols import Condition, paper_psnr
from ebt_vision.benchmark.tables import markdown
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.energies import auto_likelihood_weight, likelihood_context, with_likelihood
from ebt_vision.core.provenance import provenance
from ebt_vision.core.step_rules import STEP_RULES, AnyStepRule, BarzilaiBorwein, find_step_rule
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.models.checkpoint import checkpoint_hash, load_pretrained
from ebt_vision.models.patch_ebt import PatchEBT, num_patches
from ebt_vision.models.regressor import PatchRegressor
from ebt_vision.noise.processes import to_model_range

Weight = float | Literal["auto"]
_BATCH_SIZE = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """Mean number of steps and passes with a tolerance, over the images."""

    tolerance: float
    psnr: float
    steps: float
    passes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The results of one method at one level: means over the images."""

    method: str
    level: float
    psnr: tuple[float, ...]
    """PSNR after each step, in dB."""
    passes: float
    """Passes through the network in the whole run."""
    stopped: tuple[Stopped, ...]


def stops_by_gain(energies: Tensor, tolerance: float, training_gain: float, patience: int = 0) -> tuple[Tensor, Tensor]:
    """Return the kept steps and forward passes, int64 (B,), of think() with tolerance_of="training", from energies (T + 1, B).

    A sample ends at the first step k that raises its energy, which is taken back, or that gains no more than tolerance *
    training_gain^2 / what its first step gained. With `patience` p, which think() does not have, it ends after p + 1 such steps
    one after another and keeps its step of lowest energy, as the nonmonotone line search of Grippo et al. 1986 allows.
    """
    gains = energies[:-1] - energies[1:]  # (T, B)
    least = tolerance * training_gain**2 / gains[0].clamp(min=torch.finfo(gains.dtype).tiny)
    ended = (gains < 0) | (gains <= least)
    if patience:
        in_a_row = ended.long().cumsum(0)
        before = torch.cat([torch.zeros_like(in_a_row[: patience + 1]), in_a_row])[: len(in_a_row)]
        ended = in_a_row - before == patience + 1
    last = _first_true(ended)
    if patience:
        steps = torch.arange(len(energies), device=energies.device)[:, None]
        kept = energies.masked_fill(steps > last + 1, math.inf).argmin(0)
    else:
        kept = last + 1 - (gains.gather(0, last[None])[0] < 0).long()
    return kept, last + 2


def stops_by_change(changes: Tensor, tolerance: float) -> Tensor:
    """Return the applications, int64 (B,), of a RegressorDenoiser with this tolerance, from squared changes (T, B)."""
    return _first_true(changes <= tolerance * changes[0]) + 1


def _first_true(ended: Tensor) -> Tensor:
    """Return the first True row of each column of (T, B), or the last row, int64 (B,)."""
    everywhere = torch.cat([ended[:-1], torch.ones_like(ended[:1])])
    return everywhere.long().argmax(0)


def think_runs(
    model: PatchEBT,
    batches: Sequence[tuple[Tensor, Tensor]],
    rule: AnyStepRule,
    weight: Weight,
    num_steps: int,
    tolerances: Sequence[float],
    patience: int = 0,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """PSNR after each step (T, B), passes (B,), and of each tolerance the steps kept and passes, of (clean, noisy) batches."""
    alpha, gain = model.step_size.detach(), model.config.training_gain
    if gain is None:
        raise ValueError("the model has no training_gain, which the stopping rule needs; see eval/training_gain.py")
    psnrs, energies, passes = [], [], []
    for clean, noisy in batches:
        total_gain = gain * num_patches(noisy.shape, model.config.patch_size)
        context = model.context_of(noisy)
        read = 0
        energy_fn = model
        if weight:
            read = 1 if weight == "auto" else 0
            with torch.no_grad():
                share = auto_likelihood_weight(model(noisy, *context), total_gain) if weight == "auto" else weight
            energy_fn = with_likelihood(model, len(context))  # type: ignore[assignment]
            context = (*context, *likelihood_context(noisy, share, alpha))
        config = ThinkingConfig(num_steps=num_steps, step_rule=rule)
        result = think(energy_fn, noisy, config, context=context, step_size=alpha)
        psnrs.append(torch.stack([paper_psnr(image, clean) for image in result.predictions]))
        energies.append(result.energies)
        passes.append(result.num_forward + read - 1)  # the last energy is for the table alone
    measured, spent = torch.cat(psnrs, 1), torch.cat(passes)
    stops = [stops_by_gain(torch.cat(energies, 1), tolerance, total_gain, patience) for tolerance in tolerances]
    # A rule that tries steps spends more than a pass a step.
    each = (spent - read).double() / num_steps
    return measured, spent, [(kept, (used - 1) * each + 1 + read) for kept, used in stops]


def apply_runs(model: PatchRegressor, batches: Sequence[tuple[Tensor, Tensor]], num_steps: int) -> tuple[Tensor, Tensor]:
    """PSNR after each application and its squared change, both (T, B)."""
    psnrs, changes = [], []
    for clean, noisy in batches:
        rows, moved = [], []
        for _ in range(num_steps):
            after = model(noisy)
            moved.append((after - noisy).square().flatten(1).sum(1))
            rows.append(paper_psnr(after, clean))
            noisy = after
        psnrs.append(torch.stack(rows))
        changes.append(torch.stack(moved))
    return torch.cat(psnrs, 1), torch.cat(changes, 1)


def _stopped(tolerance: float, psnrs: Tensor, kept: Tensor, passes: Tensor, start: Tensor) -> Stopped:
    everything = torch.cat([start[None], psnrs])
    return Stopped(
        tolerance=tolerance,
        psnr=float(everything.gather(0, kept[None]).mean()),
        steps=float(kept.double().mean()),
        passes=float(passes.double().mean()),
    )


@torch.no_grad()
def measure(settings) -> Iterator[Run]:
    """Run all methods at every level."""
    images = load_images(settings.data, img_size=64, limit=settings.limit)
    indices = list(range(len(images)))
    ebt, regressor = load_pretrained(settings.model), load_pretrained(settings.regressor)
    assert isinstance(ebt, PatchEBT) and isinstance(regressor, PatchRegressor)
    ways = [(find_step_rule(rule), weight) for rule in settings.rules for weight in settings.likelihood_weights]
    if settings.longest is not None:
        ways = [
            (BarzilaiBorwein(longest=settings.longest) if isinstance(rule, BarzilaiBorwein) else rule, weight)
            for rule, weight in ways
        ]
    for level in settings.levels:
        condition = Condition(protocol="paper", kind="level", strength=level, seed=settings.seed)
        pairs = [observed(images, condition, indices[i : i + _BATCH_SIZE]) for i in range(0, len(indices), _BATCH_SIZE)]
        batches = [(clean, to_model_range(noisy)) for clean, noisy in pairs]
        start = torch.cat([paper_psnr(noisy, clean) for clean, noisy in batches])
        for rule, weight in ways:
            psnrs, passes, stops = think_runs(
                ebt, batches, rule, weight, settings.steps, settings.tolerances, settings.patience
            )
            ended = [_stopped(t, psnrs, *stop, start) for t, stop in zip(settings.tolerances, stops, strict=True)]
            name = rule.name + (f", likelihood {weight}" if weight else "")
            yield _run(name, level, psnrs, float(passes.double().mean()), ended)
        psnrs, changes = apply_runs(regressor, batches, settings.steps)
        counts = [(t, stops_by_change(changes, t)) for t in settings.regressor_tolerances]
        yield _run("regressor", level, psnrs, settings.steps, [_stopped(t, psnrs, n, n, start) for t, n in counts])


def _run(method: str, level: float, psnrs: Tensor, passes: float, stopped: Sequence[Stopped]) -> Run:
    return Run(method=method, level=level, psnr=tuple(psnrs.mean(1).tolist()), passes=passes, stopped=tuple(stopped))


def tables(runs: Sequence[Run]) -> str:
    """Return a table for each level and one for each tolerance."""
    text = []
    for level in dict.fromkeys(run.level for run in runs):
        records = [asdict(run) for run in runs if run.level == level]
        steps = range(len(records[0]["psnr"]))
        columns = [("method", lambda r: r["method"])]
        columns += [(str(step + 1), lambda r, step=step: f"{r['psnr'][step]:.2f}") for step in steps]  # type: ignore[misc]
        columns += [("passes", lambda r: f"{r['passes']:.1f}")]
        text.append(f"### Level {level:g}\n\n{markdown(columns, records)}")
    levels = list(dict.fromkeys(run.level for run in runs))
    lines: list[dict] = []
    for method in dict.fromkeys(run.method for run in runs):
        own = {run.level: run for run in runs if run.method == method}
        best = {level: max(run.psnr) for level, run in own.items()}
        figures: dict[object, str] = {level: f"{best[level]:.2f}" for level in levels}
        lines.append({"method": f"{method}, best number", "behind": ""} | figures)
        for place in range(len(own[levels[0]].stopped)):
            stopped = {level: own[level].stopped[place] for level in levels}
            cells: dict[object, str] = {level: f"{s.psnr:.2f} ({s.passes:.1f})" for level, s in stopped.items()}
            behind = max(best[level] - s.psnr for level, s in stopped.items())
            title = f"{method}, tolerance {stopped[levels[0]].tolerance:g}"
            lines.append({"method": title, "behind": f"{behind:.2f}"} | cells)
    columns = [("method", lambda r: r["method"])]
    columns += [(f"{level:g}", lambda r, level=level: r[level]) for level in levels]  # type: ignore[misc]
    columns += [("at most behind", lambda r: r["behind"])]
    text.append(f"### Where it stops: PSNR (passes)\n\n{markdown(columns, lines)}")
    return "\n\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and write the figures; exit status 2 for bad input."""
    settings = _parser().parse(arguments)
    try:
        runs = []
        for run in measure(settings):
            runs.append(run)
            print(f"level {run.level:g} {run.method}: {' '.join(f'{p:.2f}' for p in run.psnr)}", file=sys.stderr, flush=True)
        about = provenance("eval/step_rules.py", sys.argv[1:] if arguments is None else arguments)
        if settings.output:
            weights = {name: checkpoint_hash(name) for name in (settings.model, settings.regressor)}
            figures = {"about": about, "weights": weights, "runs": [asdict(run) for run in runs]}
            write_text(settings.output, json.dumps(figures, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"step_rules: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(tables(runs))
    return 0


def _weight(text: str) -> Weight:
    return "auto" if text == "auto" else number(float, 0, 1)(text)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="step_rules", description="Compare step rules and likelihoods of an EBT.")
    add = parser.add_argument
    add("--data", required=True, help="images, as data.path of a config")
    add("--model", default="tiny_imagenet_ebt", help="an EBT with a training_gain")
    add("--regressor", default="tiny_imagenet_regressor")
    add("--limit", type=number(int, 1), default=100, help="images, spread over the set")
    add("--levels", type=number(float, 0, 1), nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    add("--steps", type=number(int, 1), default=10)
    add("--rules", choices=tuple(STEP_RULES), nargs="*", default=["fixed", "barzilai-borwein", "momentum"])
    add("--longest", type=number(float, 1), help="Barzilai-Borwein's longest step, in step sizes (default: the rule's own)")
    add("--likelihood-weights", type=_weight, nargs="+", default=[0.0, "auto"], metavar="W")
    add("--tolerances", type=number(float, 0), nargs="*", default=[0.006], help="shares, as tolerance_of training")
    add("--patience", type=number(int, 0), default=0, help="steps in a row that may miss a tolerance; 0 is what think() does")
    add("--regressor-tolerances", type=number(float, 0), nargs="*", default=[0.02, 0.05])
    add("--seed", type=number(int, 0), default=0)
    add("--output", type=named_path, metavar="FILE", help="where the figures are written, JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
