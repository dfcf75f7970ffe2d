"""Scaling study: trains a grid along one axis at a time and compares how fast the errors of EBTs and their baselines fall.

    python eval/scaling.py --data "data/tiny-imagenet-200/train-*.parquet" \
        --validation "data/tiny-imagenet-200/validation-*.parquet" --widths 64 96 128 192 256 --output runs/scaling
    python eval/scaling.py --modality text --data data/tinyshakespeare/input.txt --data-sizes 0.03 0.1 0.3 1
    accelerate launch --num_processes 8 eval/scaling.py --config grid.yaml

Every run is one training of the project's own loop with one recipe for all families. First the learning rate of each family is
tuned at the base size. Then one value at a time is changed along each axis. Runs are kept in --output: the same command resumes
an interrupted grid, also inside a run. Several processes, started by accelerate launch or by hand, share the grid; each has its
own GPU. results.json, report.md and scaling.png hold the fits error = a + b C^-c and b C^-c and the ratio of rates.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.results import write_results
from ebt_vision.benchmark.scaling_grid import AXES, FAMILIES, Grid, Point, Recipe, all_points
from ebt_vision.benchmark.scaling_report import cost_of, curves, fits_of, plot_scaling, report, run_records
from ebt_vision.benchmark.scaling_runs import GridRuns
from ebt_vision.core.arguments import count, named_path, number, positive, whole_number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.core.sharing import Share
from ebt_vision.models.checkpoint import program_device
from ebt_vision.training.stopping import TrainingInterrupted

ERRORS = {
    "image": "geometric mean over held-out images of the mean squared error on [0, 1], at noise level 0.1",
    "text": "bits per byte of held-out text",
}
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 success, 2 bad input, 130 interrupted."""
    settings = _parser().parse(arguments)
    settings.command = list(sys.argv[1:] if arguments is None else arguments)
    share = Share.of_environment()
    for name in _LAUNCHER:  # each run is trained by one process alone
        os.environ.pop(name, None)
    try:
        run(settings, share)
    except (ValueError, OSError) as error:
        print(f"scaling: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, TrainingInterrupted):
        print(f"scaling: interrupted; run the same command to resume from {settings.output}", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace, share: Share) -> None:
    """Train the missing runs, fit, and write all results into settings.output; only the first process writes."""
    device = share.device(program_device(settings.device))
    recipe, grid = _recipe(settings), _grid(settings)
    untuned = replace(grid, lr_of=dict.fromkeys(grid.families, grid.lrs[0]))
    for point in all_points(untuned.points()):
        recipe.config(point)  # an impossible size stops the program before any training
    runs = GridRuns(recipe, settings.output, device=device, say=lambda line: print(line, file=sys.stderr, flush=True))
    # Tune, where there is a choice.
    tuning = grid.tuning()
    tuned = runs.results(tuning, first=share.index) if len(grid.lrs) > 1 else {}
    chosen = {family: _best_lr(family, tuned, grid) for family in grid.families}
    # Train the points of all axes.
    by_axis = replace(grid, lr_of=chosen).points()
    points = all_points(by_axis)
    results = runs.results(points, first=share.index * len(points) // share.count)
    if share.index:
        return
    found = curves(by_axis, results)
    records, ratios, fits = fits_of(found, num_resamples=settings.resamples, seed=settings.seed)
    everything = {**tuned, **results}
    tried = [{"family": point.family, "lr": point.lr, "error": tuned[point]["error"]} for point in tuned]
    written = {
        "about": provenance("eval/scaling.py", settings.command, device),
        "grid": {
            "modality": settings.modality,
            "error": ERRORS[settings.modality],
            "axes": {axis: list(values) for axis, values in grid.values.items()},
            "lrs": list(grid.lrs),
            "seeds": list(grid.seeds),
            "bootstrap": {"num_resamples": settings.resamples, "seed": settings.seed},
        },
        "tuning": {"chosen": chosen, "runs": tried},
        "runs": run_records(list(everything), everything),
        "points": {axis: {family: list(map(list, pairs)) for family, pairs in each.items()} for axis, each in found.items()},
        "fits": records,
        "ratios": ratios,
        "cost": cost_of(list(everything.values()), settings.share),
    }
    write_results(settings.output / "results.json", written)
    plot_scaling(found, fits, settings.output / "scaling.png")
    write_text(settings.output / "report.md", report(written))
    print((settings.output / "report.md").read_text())


def _best_lr(family: str, tuned: dict[Point, dict], grid: Grid) -> float:
    """Return the learning rate with the lowest error. Raises ValueError if a family diverged at all of them."""
    if not tuned:
        return grid.lrs[0]
    errors = {p.lr: r["error"] for p, r in tuned.items() if p.family == family and r["error"] is not None}
    if not errors:
        raise ValueError(f"{family} diverged at every one of --lrs {' '.join(map(str, grid.lrs))}; add smaller ones")
    return min(errors, key=lambda lr: errors[lr])


def _recipe(settings: argparse.Namespace) -> Recipe:
    if settings.modality == "image" and not settings.validation:
        raise ValueError("--modality image needs --validation, held-out images; text may hold out the end of --data")
    return Recipe(
        modality=settings.modality,
        data=settings.data,
        validation=settings.validation or settings.data,
        img_size=settings.img_size,
        patch_size=settings.patch_size,
        context_length=settings.context_length,
        thinking_steps=settings.thinking_steps,
        optimizer=settings.optimizer,
        num_held_out=settings.held_out,
        overrides=tuple(settings.override),
        mixed_precision=settings.mixed_precision,
    )


def _grid(settings: argparse.Namespace) -> Grid:
    known = FAMILIES[settings.modality]
    families = tuple(dict.fromkeys(settings.families or known))
    if unknown := [family for family in families if family not in known]:
        raise ValueError(f"--families {' '.join(unknown)} is unknown for {settings.modality}; use some of {', '.join(known)}")
    values = {
        "width": settings.widths,
        "depth": settings.depths,
        "data": settings.data_sizes,
        "batch": settings.batch_sizes,
        "updates": settings.num_updates,
    }
    if settings.modality == "text" and any(size > 1 for size in settings.data_sizes):
        raise ValueError("--data-sizes of text are shares of it, above 0 and up to 1")
    base = Point(
        family=families[0],
        width=settings.width,
        depth=settings.depth,
        data=0,
        batch=settings.batch_size,
        updates=settings.updates,
        lr=settings.lrs[0],
    )
    axes = {axis: tuple(dict.fromkeys(values[axis])) for axis in AXES if values[axis]}
    if not axes:
        raise ValueError("no axis is given; give some of --widths, --depths, --data-sizes, --batch-sizes, --num-updates")
    return Grid(families=families, base=base, values=axes, lrs=tuple(dict.fromkeys(settings.lrs)), seeds=tuple(settings.seeds))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="scaling", description="Train a grid of models and fit how their errors fall.")
    add = parser.add_argument_group("what is trained").add_argument
    add("--modality", choices=tuple(FAMILIES), default="image")
    add("--families", nargs="+", default=[], help="the first is compared with the others (default: all of the modality)")
    add("--data", required=True, help="training images or text, as data.path of a config")
    add("--validation", help="held-out images or text (text: the last tenth of --data)")
    add("--output", type=named_path, default=Path("runs/scaling"), help="folder for the runs and the results")
    add("--img-size", type=count, default=32)
    add("--patch-size", type=count, default=4)
    add("--context-length", type=count, default=128, help="text: bytes of a sequence")
    add("--thinking-steps", type=count, default=1, help="EBT: in training and when it is measured")
    add("--override", nargs="*", default=[], metavar="FAMILY:KEY=VALUE", help="a config key of a family, or of all")
    add("--held-out", type=count, default=256, help="held-out images or sequences")
    axes = parser.add_argument_group("axes; the other values stay at the base").add_argument
    axes("--widths", type=count, nargs="*", default=[], help="of the networks; the axis is their parameters")
    axes("--depths", type=count, nargs="*", default=[])
    axes("--data-sizes", type=positive, nargs="*", default=[], help="images, or shares of the text")
    axes("--batch-sizes", type=count, nargs="*", default=[])
    axes("--num-updates", type=count, nargs="*", default=[])
    base = parser.add_argument_group("the base").add_argument
    base("--width", type=count, default=128)
    base("--depth", type=count, default=4)
    base("--batch-size", type=count, default=32)
    base("--updates", type=count, default=1000)
    recipe = parser.add_argument_group("the recipe").add_argument
    recipe("--optimizer", choices=("adamw", "muon"), default="muon")
    recipe(
        "--lrs",
        type=positive,
        nargs="+",
        default=[1e-3, 3e-3, 1e-2],
        help="tried at the base size; a single one is used as it is",
    )
    recipe("--seeds", type=whole_number, nargs="+", default=[0], help="each point is trained once per seed")
    recipe("--mixed-precision", choices=("no", "bf16"), default="no")
    how = parser.add_argument_group("execution").add_argument
    how("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    how("--resamples", type=number(int, 100), default=1000, help="bootstrap samples")
    how("--seed", type=whole_number, default=0, help="seed of the bootstrap")
    how("--share", type=number(float, 1e-4, 1), default=0.2, help="share of an H100's peak assumed for the cost on GPUs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
