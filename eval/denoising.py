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
from typing import Literal, cast, get_args

import pyarrow
import pyarrow.parquet
from rich.console import Console
from rich.progress import track

from ebt_vision.benchmark import plots
from ebt_vision.benchmark.flops import CostMeter
from ebt_vision.benchmark.images import BenchmarkImages, load_images
from ebt_vision.benchmark.measure import Bench, Measured, Subject, observed
from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.pairs import load_pairs
from ebt_vision.benchmark.parts import Part, join
from ebt_vision.benchmark.processes import Processes
from ebt_vision.benchmark.protocols import OOD_STRENGTHS, PROTOCOLS, Condition
from ebt_vision.benchmark.report import report
from ebt_vision.benchmark.results import write_results
from ebt_vision.benchmark.rows import Row, RowSettings, kind_of, rows_of, sweep_rows_of
from ebt_vision.benchmark.summary import candidate_columns, combine, per_image_columns, summarise
from ebt_vision.benchmark.verification import has_candidates, verify_candidates, verify_thinking
from ebt_vision.core import metrics
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.names import file_name
from ebt_vision.core.provenance import provenance
from ebt_vision.core.sharing import Share
from ebt_vision.core.thinking_config import ToleranceOf
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.load import is_of_library, load_denoiser
from ebt_vision.models.checkpoint import checkpoint_hash, program_device

SWEEP = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
Protocol = Literal["paper", "awgn", "ood", "real"]
MODELS = "shipped names, folders, hub:OWNER/NAME, bm3d, nlm, identity, spandrel:FILE, deepinv:NAME[:FILE]"


@dataclass(kw_only=True)
class _Collected:
    """The results of the run so far."""

    measured: list[Measured] = field(default_factory=list)
    strips: dict[str, list[plots.Strip]] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 2 bad input, 130 interrupted."""
    settings = _parser().parse(arguments)
    settings.command = _without_output(sys.argv[1:] if arguments is None else arguments)
    try:
        with Processes(Share.of_environment()) as processes:
            run(settings, processes)
    except (ValueError, OSError) as error:
        print(f"denoising: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"denoising: interrupted; run the same command to resume from {settings.output}", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace, processes: Processes) -> None:
    """Measure every row, this process its share of the batches; the first one writes everything into settings.output."""
    _check_together(settings)
    groups = _groups(settings.group)
    names = distinct_names(list(dict.fromkeys([*settings.models, *(model for group in groups.values() for model in group)])))
    groups = {name: [names[model] for model in models] for name, models in groups.items()}
    device = settings.device = processes.share.device(program_device(settings.device))
    conditions, sweep = conditions_of(settings)
    row_settings = _row_settings(settings)
    subjects = {
        model: _subject(model, name, settings) for model, name in names.items()
    }  # a wrong name is found before the work
    bench = _bench(settings, device, processes)
    collected = _Collected()
    for subject in subjects.values():
        _measure_subject(subject, conditions, sweep, row_settings, bench, settings, collected, processes)
    if not processes.is_main:
        return
    results = _results(settings, bench, collected.measured, groups)
    _write(settings.output, results, bench, collected)
    print((settings.output / "report.md").read_text())


def conditions_of(settings: argparse.Namespace) -> tuple[list[Condition], list[Condition]]:
    """Return the conditions of the tables, and those of the sweep over noise levels (only in the paper protocol)."""
    seeds = settings.seeds or [settings.seed]
    kinds: list[tuple[str, float]] = {
        "paper": [("level", level) for level in settings.levels],
        "awgn": [("sigma", sigma) for sigma in settings.sigmas],
        "ood": [(kind, OOD_STRENGTHS.get(kind, 0.0)) for kind in settings.corruptions],
        "real": [("pairs", 0.0)],
    }[settings.protocol]
    protocol = cast(Protocol, settings.protocol)
    main_conditions = [
        Condition(protocol=protocol, kind=kind, strength=strength, seed=seed, clipped=settings.clipped)
        for seed in dict.fromkeys(seeds)
        for kind, strength in dict.fromkeys(kinds)
    ]
    levels = settings.sweep if protocol == "paper" else []
    return main_conditions, [Condition(protocol="paper", kind="level", strength=level, seed=seeds[0]) for level in levels]


def distinct_names(models: Sequence[str]) -> dict[str, str]:
    """Return the names of the models in tables: the last part of the path, or as many parts as make it unique."""
    names: dict[str, str] = {}
    for model in models:
        parts = _path_of(model)
        others = [_path_of(other) for other in models if other != model]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names[model] = "/".join(parts[-length:])
    if len(set(names.values())) < len(names):
        raise ValueError(f"--models has one model twice: {' '.join(models)}; remove one")
    return names


def _path_of(model: str) -> list[str]:
    return model.removeprefix("hub:").removeprefix("spandrel:").rstrip("/").split("/")


def _subject(model: str, name: str, settings: argparse.Namespace) -> Subject:
    denoiser: Denoiser = load_denoiser(model, device=settings.device, precision=settings.precision)
    denoiser.name = name
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
    whole = settings.img_size == "whole" or (settings.img_size is None and settings.protocol in ("awgn", "real"))
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
    row_settings: RowSettings,
    bench: Bench,
    settings: argparse.Namespace,
    collected: _Collected,
    processes: Processes,
) -> None:
    """Measure all rows of one model, and return its strip of images."""
    name, kind = subject.name, kind_of(subject.denoiser)
    everything = bench.images.spread(None)
    some = bench.images.spread(settings.sweep_limit)
    runs = [(c, row, everything, False) for c in conditions for row in rows_of(name, kind, c, row_settings)]
    runs += [(c, row, some, True) for c in sweep for row in sweep_rows_of(name, kind, c, row_settings)]
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


def _row_settings(settings: argparse.Namespace) -> RowSettings:
    return RowSettings(
        steps=settings.steps,
        tolerances=tuple(settings.tolerances),
        tolerance_of=settings.tolerance_of,
        regressor_tolerances=tuple(settings.regressor_tolerances),
        step_sizes=tuple(settings.step_sizes),
        candidates=settings.candidates,
        candidate_steps=tuple(settings.candidate_steps),
        candidate_noise=settings.candidate_noise,
        langevin=settings.langevin,
        passes=tuple(sorted(set(settings.passes))),
        loops=settings.loops,
    )


OPTIONS_OF = {
    "levels": ("paper",),
    "sweep": ("paper",),
    "sweep_limit": ("paper",),
    "sigmas": ("awgn",),
    "corruptions": ("ood",),
}
"""The protocols in which an option has an effect; a Condition checks --clipped itself."""


def _check_together(settings: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect with the others."""
    parser = _parser()
    for name, protocols in OPTIONS_OF.items():
        value = getattr(settings, name)
        if value and value != parser.get_default(name) and settings.protocol not in protocols:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect with --protocol {settings.protocol}, only with {' and '.join(protocols)}")
    if settings.tolerance_of != parser.get_default("tolerance_of") and not settings.tolerances:
        raise ValueError(
            f"--tolerance-of {settings.tolerance_of} has no effect without --tolerances; add --tolerances or remove it"
        )
    for name in ("candidate_steps", "candidate_noise", "langevin"):
        if not settings.candidates and getattr(settings, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --candidates 0; remove it")


def _groups(texts: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, equals, models = text.partition("=")
        groups[name] = [model for model in models.split(",") if model]
        if not name or not equals or len(groups[name]) < 2:
            raise ValueError(f"--group {text} does not have the form NAME=MODEL,MODEL with at least two models")
    return groups


def _without_output(arguments: Sequence[str]) -> list[str]:
    """Return the command without --output, so that runs into different folders have the same command."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != "--output" and not word.startswith("--output="):
            kept.append(word)
        skip = word == "--output"
    return kept


def _whole_or_pixels(text: str) -> int | str:
    return "whole" if text == "whole" else int(number(int, 8)(text))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="denoising", description="The denoising benchmark.")
    add = parser.add_argument_group("what is measured").add_argument
    add("--models", nargs="+", required=True, help=MODELS)
    add("--data", required=True, help="images: a folder, parquet files or hub:OWNER/NAME")
    add("--protocol", choices=PROTOCOLS, default="paper")
    add("--pairs", metavar="NOISY:CLEAN", help='real: patterns of the file names, such as "*_noisy*:*_clean*"')
    add("--output", type=named_path, default=Path("results"), help="folder of all results")
    add("--limit", type=number(int, 1), help="number of images, spread evenly over the set")
    add("--img-size", type=_whole_or_pixels, help="side of centre squares, or whole (default 64; awgn: whole)")
    add("--group", nargs="*", default=[], metavar="NAME=A,B", help="checkpoints to combine into mean and spread")
    _add_noise(parser)
    _add_rows(parser)
    add = parser.add_argument_group("how").add_argument
    add("--tile", type=_whole_or_pixels, help="side of tiles, or whole (default: from the model; paper: whole)")
    add("--overlap", type=number(int, 0), help="overlap of tiles in pixels (default: from each model)")
    add("--batch-size", type=number(int, 1), help="images at a time (default 100; 1 for whole images)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="precision of the networks; see ebt-vision denoise",
    )
    add("--lpips-backbone", metavar="FILE", help="torchvision's weights of the backbone, or download")
    add("--lpips-net", choices=("alex", "vgg", "squeeze"), default="alex")
    add("--resamples", type=number(int, 100), default=1000, help="bootstrap samples")
    add("--strip", type=number(int, 0), default=2, help="number of images in the strip of each model; 0 disables strips")
    return parser


def _add_noise(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("noise").add_argument
    level = number(float, 1e-3, 1)
    add("--levels", type=level, nargs="+", default=[0.1, 0.2], help="paper: VP noise levels")
    add("--sigmas", type=number(float, 0, 255), nargs="+", default=[15.0, 25.0, 50.0], help="awgn: 0..255 units")
    add("--corruptions", nargs="+", default=list(OOD_STRENGTHS), help=f"ood: some of {', '.join(OOD_STRENGTHS)}")
    switch = argparse.BooleanOptionalAction
    add("--clipped", action=switch, default=False, help="awgn, ood: clip the noisy input and round it to 8 bits")
    add("--sweep", type=level, nargs="*", default=list(SWEEP), help="paper: levels of the plot over levels; no value: no plot")
    add("--sweep-limit", type=number(int, 1), default=256, help="number of images of the sweep, spread evenly")
    add("--seed", type=number(int, 0), default=0)
    add("--seeds", type=number(int, 0), nargs="*", default=[], help="several seeds, combined into mean and spread")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rows").add_argument
    count, amount = number(int, 1), number(float, 0)
    add("--steps", type=count, default=10, help="EBT: thinking steps; regressor: how often it is applied")
    add("--tolerances", type=amount, nargs="*", default=[], help="EBT: tolerances, with a row of adaptive thinking for each")
    add(
        "--tolerance-of",
        choices=get_args(ToleranceOf),
        default="first",
        help="EBT: reference of --tolerances; see ebt-vision denoise",
    )
    add("--regressor-tolerances", type=amount, nargs="*", default=[], help="regressor: rows stopped by the size of its change")
    add("--step-sizes", type=amount, nargs="*", default=[], help="EBT: factors on the learned step size, with rows for each")
    add("--candidates", type=number(int, 0), default=8, help="EBT: candidates of best-of-N; 0 disables it")
    add("--candidate-steps", type=count, nargs="*", default=[], help="EBT: steps of best-of-N (default: 1 and --steps)")
    add("--candidate-noise", type=amount, default=0.1, help="EBT: noise on the candidates' starts, on [-1, 1]")
    add("--langevin", type=amount, default=0.0, help="EBT: noise before each gradient of a candidate, on [-1, 1]")
    add("--passes", type=count, nargs="*", default=[1, 2, 5, 10, 25, 50, 100], help="DiT: passes of DDIM")
    add("--loops", type=number(int, 0), default=3, help="DiT: loops of the recursion; 0 disables it")
    add("--reference", metavar="MODEL:METHOD:STEPS", help="the row to compare with (default: the best ddim row)")


if __name__ == "__main__":
    sys.exit(main())
