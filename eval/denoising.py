"""The denoising benchmark: all uses of all models, on the same images with the same noise.

    python eval/denoising.py --models tiny_imagenet_ebt tiny_imagenet_dit bm3d --data "validation-*.parquet" --output results/
    python eval/denoising.py --protocol awgn --models tiny_imagenet_ebt bm3d --data data/cbsd68 --output results/
    python eval/denoising.py --protocol real --pairs "*_noisy*:*_clean*" --models photographs_ebt --data FOLDER
    python eval/denoising.py --config benchmark.yaml
    accelerate launch --num_processes 8 eval/denoising.py --protocol awgn --models photographs_ebt --data data/cbsd68

The program writes results.json, per_image.parquet, candidates.parquet, report.md and plots into the output folder. Figures are
saved batch by batch: after an interruption the same command resumes, and at most one batch is lost. Two runs of one command
give the same results.json except for the date and the seconds. Several processes, started by accelerate launch or
torchrun, share the batches and give the same results; each has its own GPU. eval/compare.py merges several results.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
from rich.console import Console
from rich.progress import track

from ebt_vision.benchmark import plots
from ebt_vision.benchmark.denoising_options import (
    check_options,
    conditions_of,
    denoising_parser,
    distinct_names,
    groups_of,
    row_settings,
    without_output,
)
from ebt_vision.benchmark.flops import CostMeter
from ebt_vision.benchmark.images import BenchmarkImages, load_images
from ebt_vision.benchmark.measure import Bench, Measured, Subject, observed
from ebt_vision.benchmark.pairs import load_pairs
from ebt_vision.benchmark.parts import Part, join
from ebt_vision.benchmark.processes import OtherProcessFailedError, Processes
from ebt_vision.benchmark.protocols import Condition
from ebt_vision.benchmark.report import report
from ebt_vision.benchmark.results import write_results
from ebt_vision.benchmark.rows import Row, RowSettings, kind_of, rows_of, sweep_rows_of
from ebt_vision.benchmark.summary import candidate_columns, combine, per_image_columns, summarise
from ebt_vision.benchmark.verification import has_candidates, verify_candidates, verify_thinking
from ebt_vision.core import metrics
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.names import file_name
from ebt_vision.core.provenance import provenance
from ebt_vision.core.sharing import Share
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.load import is_of_library, load_denoiser
from ebt_vision.models.checkpoint import checkpoint_hash, program_device


@dataclass(kw_only=True)
class _Collected:
    """The results of the run so far."""

    measured: list[Measured] = field(default_factory=list)
    strips: dict[str, list[plots.Strip]] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 1 another process failed, 2 bad input, 130 interrupted."""
    settings = denoising_parser().parse(arguments)
    settings.command = without_output(sys.argv[1:] if arguments is None else arguments)
    try:
        with Processes(Share.of_environment()) as processes:
            run(settings, processes)
    except (ValueError, OSError) as error:
        print(f"denoising: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OtherProcessFailedError as error:
        print(f"denoising: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"denoising: interrupted; run the same command to resume from {settings.output}", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace, processes: Processes) -> None:
    """Measure every row, this process its share of the batches; the first one writes everything into settings.output."""
    check_options(settings)
    groups = groups_of(settings.group)
    names = distinct_names(list(dict.fromkeys([*settings.models, *(model for group in groups.values() for model in group)])))
    groups = {name: [names[model] for model in models] for name, models in groups.items()}
    device = settings.device = processes.share.device(program_device(settings.device))
    conditions, sweep = conditions_of(settings)
    rows = row_settings(settings)
    subjects = {
        model: _subject(model, name, settings) for model, name in names.items()
    }  # a wrong name is found before the work
    bench = _bench(settings, device, processes)
    collected = _Collected()
    for subject in subjects.values():
        _measure_subject(subject, conditions, sweep, rows, bench, settings, collected, processes)
    if not processes.is_main:
        return
    results = _results(settings, bench, collected.measured, groups)
    _write(settings.output, results, bench, collected)
    print((settings.output / "report.md").read_text())


def _subject(model: str, name: str, settings: argparse.Namespace) -> Subject:
    denoiser: Denoiser = load_denoiser(model, device=settings.device, precision=settings.precision)
    denoiser.name = name
    if settings.clean_below and "clean_below" in denoiser.options_used - denoiser.options_in_effect(settings.steps):
        raise ValueError(f"--clean-below has no effect on {name}, which does not start from its proposal; leave it out")
    weights = denoiser.weights_hash
    if denoiser.num_parameters and not is_of_library(model):
        weights = checkpoint_hash(model)
    return Subject(name=name, denoiser=denoiser, hash=weights)


def _bench(settings: argparse.Namespace, device: str, processes: Processes) -> Bench:
    real = settings.protocol == "real"
    if real != (settings.pairs is not None):
        raise ValueError('--protocol real and --pairs "*_noisy*:*_clean*" must be used together')
    if real and settings.img_size not in (None, "whole"):
        raise ValueError(
            f"--img-size {settings.img_size} cannot be combined with --protocol real, which uses whole photographs"
        )
    whole = settings.img_size == "whole" or (settings.img_size is None and settings.protocol in ("awgn", "camera", "real"))
    img_size = None if whole else (settings.img_size or 64)
    try:
        lpips = metrics.PerceptualDistance(settings.lpips_backbone, net=settings.lpips_net, device=device)
    except metrics.MissingBackboneError as error:
        if settings.lpips_backbone:
            raise
        lpips = None
        _say(str(error), processes)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {settings.output} cannot be created ({error.strerror}); choose another folder") from error
    if real:
        images: BenchmarkImages = load_pairs(settings.data, settings.pairs, limit=settings.limit)
    else:
        images = load_images(settings.data, img_size=img_size, limit=settings.limit)
    _say(images.report(), processes)
    if len(set(processes.gather(images.hash))) > 1:
        raise ValueError(f"--data {settings.data} holds other images for each process; give all machines the same files")
    own = "whole" if settings.protocol == "paper" else 0  # as `ebt-vision denoise` treats photographs
    tile = own if settings.tile is None else settings.tile
    return Bench(
        images=images,
        folder=settings.output / "parts",
        batch_size=settings.batch_size or (1 if whole else 100),
        tile=None if tile == "whole" else int(tile),
        lpips=lpips,
        meter=CostMeter(),
        overlap=settings.overlap,
    )


def _measure_subject(
    subject: Subject,
    conditions: Sequence[Condition],
    sweep: Sequence[Condition],
    row_options: RowSettings,
    bench: Bench,
    settings: argparse.Namespace,
    collected: _Collected,
    processes: Processes,
) -> None:
    """Measure all rows of one model, and return its strip of images."""
    name, kind = subject.name, kind_of(subject.denoiser)
    everything = bench.images.spread(None)
    some = bench.images.spread(settings.sweep_limit)
    runs = [(c, row, everything, False) for c in conditions for row in rows_of(name, kind, c, row_options)]
    runs += [(c, row, some, True) for c in sweep for row in sweep_rows_of(name, kind, c, row_options)]
    own: list[list[Part]] = []  # for each run, of this process's batches
    for place, (condition, row, indices, _) in enumerate(runs, start=1):
        title = f"{name} {place}/{len(runs)}: {row.method} {row.num_steps}, {condition.title}, seed {condition.seed}"
        parts = bench.parts(subject, row, condition, indices)
        batches = processes.share.of(bench.batches(indices))
        own.append(bench.measure(subject, row, condition, _with_progress(batches, title, processes), parts))
        _say(f"done: {title}", processes)
    for (condition, row, indices, is_sweep), mine in zip(runs, own, strict=True):
        measured = processes.join(mine)
        if not processes.is_main:
            continue
        collected.measured.append(
            Measured(
                row=row,
                condition=condition,
                model_hash=subject.hash,
                parameters=subject.denoiser.num_parameters,
                indices=indices,
                arrays=join(measured),
                sweep=is_sweep,
            )
        )
        drawn = row.method in ("thinking", "applied", "x0", "told sigma", "sigma estimated", "blind") and not is_sweep
        if drawn and settings.strip and condition.seed == conditions[0].seed:
            chosen = bench.images.spread(settings.strip)
            collected.strips.setdefault(name, []).extend(_strip(subject, row, condition, bench, index) for index in chosen)


def _strip(subject: Subject, row: Row, condition: Condition, bench: Bench, index: int) -> plots.Strip:
    clean, noisy = observed(bench.images, condition, [index])
    result, _ = bench.denoise(subject.denoiser, row, condition, noisy, [index])
    steps = row.reported if len(row.reported) <= 5 else tuple(sorted({1, 2, 4, row.num_steps // 2, row.num_steps}))
    pictures = [("noisy", noisy[0].clamp(0, 1))]
    for step in steps:
        image = result.image if result.trajectory is None else result.trajectory[step]
        psnr = float(metrics.psnr(condition.measured(image.cpu().double()), clean.double(), data_range=255.0))
        pictures.append((f"{step} step{'s' * (step > 1)}\n{psnr:.1f} dB", image[0]))
    return plots.Strip(condition=condition.title, pictures=[*pictures, ("clean", clean[0].float() / 255.0)])


def _results(settings: argparse.Namespace, bench: Bench, measured: Sequence[Measured], groups: dict[str, list[str]]) -> dict:
    """Return the contents of results.json. Two runs of one command differ only in the date and the seconds."""
    resampling = {"num_resamples": settings.resamples, "seed": settings.seed}
    rows = summarise(measured, image_hash=bench.images.hash, reference=settings.reference, **resampling)
    tables = [run for run in measured if not run.sweep]
    protocol = {
        "name": settings.protocol,
        "data": settings.data,
        "images": bench.images.hash,
        "num_images": len(bench.images),
        "left_out": bench.images.skipped,
        "seeds": settings.seeds or [settings.seed],
        "clipped": settings.clipped,
        "tile": "whole" if bench.tile is None else bench.tile or "the model's own",
        "overlap": "the model's own" if bench.overlap is None else bench.overlap,
        "lpips": bench.lpips.name if bench.lpips else "not available: pass --lpips-backbone",
        "ssim": "11x11 Gaussian, sigma 1.5, valid area, kornia",
        "bootstrap": resampling,
    }
    return {
        "about": provenance("eval/denoising.py", settings.command, settings.device),
        "protocol": protocol,
        "rows": rows,
        "combined": combine(rows, groups),
        "verification": {
            "candidates": [verify_candidates(run, **resampling) for run in tables if has_candidates(run)],
            "thinking": [row for run in tables if run.row.method == "thinking" for row in verify_thinking(run)],
        },
    }


def _write(folder: Path, results: dict, bench: Bench, collected: _Collected) -> None:
    write_results(folder / "results.json", results)
    tables = {"per_image": per_image_columns(collected.measured, bench.images.names)}
    tables["candidates"] = candidate_columns(collected.measured)
    for name, columns in tables.items():
        if columns:
            texts = [column for column in ("model", "condition", "method", "name") if column in columns]
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet", use_dictionary=texts)
    rows = [row for row in results["rows"] if not row["sweep"]]
    sweep = [row for row in results["rows"] if row["sweep"]]
    thinking = [run for run in collected.measured if run.row.method == "thinking" and not run.sweep]
    drawn = ["cost.png"]
    plots.plot_cost(rows, folder / "cost.png")
    if any(row["method"] != "noisy input" for row in sweep):
        plots.plot_sweep(sweep, folder / "levels.png")
        drawn.append("levels.png")
    if thinking:
        plots.plot_energy(thinking, folder / "energy.png")
        drawn.append("energy.png")
    for name, strips in collected.strips.items():
        file = f"strip-{file_name(name)}.png"
        plots.plot_strips(strips, folder / file)
        drawn.append(file)
    write_text(folder / "report.md", report(results, drawn))


def _with_progress(batches: list[list[int]], title: str, processes: Processes):
    console = Console(stderr=True)
    return track(batches, title, console=console, transient=True, disable=not (console.is_terminal and processes.is_main))


def _say(message: str, processes: Processes) -> None:
    if processes.is_main:
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
