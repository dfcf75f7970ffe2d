"""`ebt-vision denoise`: denoise image files and folders. A file that fails is reported, and the others are still denoised."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ebt_vision.commands.console import BAD_INPUT, INTERRUPTED, duration, is_users, one_line, say, tell
from ebt_vision.core.arguments import count, name, named_path, not_negative, positive, whole_number
from ebt_vision.denoising.base import adapt_to_noise

if TYPE_CHECKING:
    from ebt_vision.commands.pipeline import Job
    from ebt_vision.data.image_files import ImageFile
    from ebt_vision.denoising.base import Denoiser
    from ebt_vision.denoising.options import DenoiseOptions
    from ebt_vision.denoising.results import DenoiseResult
    from ebt_vision.noise.named import Noise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.description = (
        "Denoise images. Results in DIR have the names of their inputs. They keep bit depth, colour profile, EXIF and alpha if "
        "the format supports them."
    )
    parser.add_argument("inputs", metavar="FILE_OR_FOLDER", nargs="+", type=named_path)
    parser.add_argument(
        "--output", metavar="DIR", type=named_path, required=True, help="folder for the results; created if missing"
    )
    parser.add_argument("--model", metavar="NAME_OR_PATH", type=name, help="a shipped name, a folder or hub:OWNER/NAME")
    parser.add_argument(
        "--steps", metavar="N", type=count, help="thinking steps (default: as suggested by the model, with its tolerance)"
    )
    parser.add_argument("--candidates", metavar="N", type=count, default=1, help="think N times and keep the lowest energy")
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=not_negative,
        help="stop when the gain of a step falls below this fraction of the --tolerance-of reference; try 0.02",
    )
    parser.add_argument(
        "--tolerance-of",
        choices=("first", "previous", "training", "observation"),
        help="reference of T. first (default): the gain of the first step. previous: the gain of the previous step (try 0.05). "
        "training: the mean first gain at the training noise level, adapted to the noise (try 0.006). observation: the energy "
        "of the noisy image; stop when the energy falls below this fraction of it (try 0.05)",
    )
    parser.add_argument("--step-size-scale", metavar="F", type=positive, default=1.0, help="factor on the learned step size")
    parser.add_argument(
        "--step-rule",
        choices=("fixed", "barzilai-borwein", "momentum", "backtracking"),
        default="fixed",
        help="how far a step goes: the learned step size (default), or longer steps for stronger noise than the training's",
    )
    parser.add_argument("--langevin", metavar="STD", type=not_negative, default=0.0, help="noise in each thinking step")
    parser.add_argument(
        "--add-noise",
        metavar="SIGMA",
        type=_noise,
        help="add Gaussian noise first, in 0..255 units; or KIND:AMOUNT of gaussian, paper, poisson, salt-and-pepper, jpeg",
    )
    parser.add_argument(
        "--strength",
        metavar="S",
        type=not_negative,
        default=1.0,
        help="0 to 1.5: a value below 1 keeps grain (0 returns the input unchanged), a value above 1 removes more noise",
    )
    parser.add_argument(
        "--start", choices=("observation", "proposal"), help="start thinking from the noisy image or the network's proposal"
    )
    parser.add_argument("--seed", metavar="S", type=whole_number, default=0, help="seed of all noise (default 0)")
    parser.add_argument("--tile", metavar="SIZE", type=count, help="tile side in pixels for large images")
    parser.add_argument(
        "--overlap",
        metavar="PIXELS",
        type=whole_number,
        help="overlap of neighbouring tiles in pixels (default: from the model); a larger overlap is slower and smoother",
    )
    parser.add_argument("--png", action="store_true", help="always write PNG")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    parser.add_argument("--device", metavar="NAME", type=name, help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto (default): bfloat16 if the processor is fast at bfloat16 and the model loses no quality; otherwise float32",
    )
    parser.set_defaults(run=_run)


def _noise(text: str) -> Noise:
    from ebt_vision.noise.named import Noise

    try:
        return Noise.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    from ebt_vision.commands.pipeline import Pipeline, Share

    if args.tolerance_of is not None and args.tolerance is None:
        raise ValueError(f"--tolerance-of {args.tolerance_of} has no effect without --tolerance; add --tolerance or remove it")
    share = Share.of_environment()
    jobs, problems = _plan(args.inputs, args.output, args.overwrite, args.png)
    for problem in problems if share.index == 0 else ():
        say(problem)
    jobs = share.of(jobs)
    failed, done, num_all = len(problems), 0, len(jobs)
    if jobs:
        _make_folder(args.output)
        denoiser, options = _load(args)
    started = time.time_ns()
    pipeline: Pipeline[ImageFile, str] = Pipeline(
        args.output,
        read=lambda job: _read(job.source),
        work=lambda job, image: _denoise(job, image, denoiser, options, args),
        is_done=lambda job: _is_done(job.target, started if args.overwrite else None),
    )
    start = time.perf_counter()
    try:
        for number, outcome in enumerate(pipeline.run(jobs), 1):
            job, error = outcome.job, outcome.error
            if outcome.value is not None:
                done += 1
                left = (time.perf_counter() - start) / number * (num_all - number)
                tell(outcome.value + (f", {duration(left)} left" if number < num_all else ""))
            elif error is None:
                say(f"{job.source}: skipped; another run has written {job.target} or is working on this image")
            elif isinstance(error, Exception) and is_users(error):
                message = one_line(error)
                say(message if str(job.source) in message else f"{job.source}: {message}")
                failed += 1
            else:
                raise error
    except KeyboardInterrupt:
        say(f"interrupted; {done} of {num_all} images are finished and kept in {args.output}")
        return INTERRUPTED
    if failed:
        say(f"{failed} of {failed + done} failed, {done} written to {args.output}")
        return BAD_INPUT
    return 0


def _is_done(target: Path, since: int | None) -> bool:
    """Whether a finished result exists: any result, or only one written after the time `since` (ns)."""
    try:
        return since is None or target.stat().st_mtime_ns > since if target.exists() else False
    except OSError:
        return False


def _plan(inputs: Sequence[Path], output: Path, overwrite: bool, png: bool) -> tuple[list[Job], list[str]]:
    """Return the jobs, and one line for each input that cannot be denoised."""
    from ebt_vision.commands.pipeline import Job

    jobs: dict[Path, Job] = {}
    problems: list[str] = []
    sources: set[Path] = set()
    for path in inputs:
        try:
            pairs = list(_targets(path, output, png))
        except (ValueError, OSError) as error:
            problems.append(one_line(error))
            continue
        for source, target in pairs:
            sources.add(source.resolve())
            if target in jobs and jobs[target].source != source:
                problems.append(f"{source}: {jobs[target].source} has the same result {target}; rename one of the inputs")
            elif target.exists() and not overwrite:
                problems.append(f"{source}: {target} exists; choose another --output, or add --overwrite to replace it")
            else:
                jobs[target] = Job(source=source, target=target)
    for target, job in list(jobs.items()):
        if target.exists() and target.resolve() in sources - {job.source.resolve()}:
            problems.append(f"{job.source}: its result {target} would replace another input; choose another --output")
            del jobs[target]
    return list(jobs.values()), problems


def _targets(path: Path, output: Path, png: bool) -> Iterator[tuple[Path, Path]]:
    from ebt_vision.data.image_files import find_images

    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device, not a file; save the image to a file first")
    if not path.is_dir():
        for source in find_images([path]):
            yield source, output / _result_name(Path(source.name), png)
        return
    found = find_images([path])
    inside = output.resolve().is_relative_to(path.resolve()) and output.resolve() != path.resolve()
    earlier = {file for file in found if file.resolve().is_relative_to(output.resolve())} if inside else set()
    if len(earlier) == len(found):
        raise ValueError(f"{path} has no images except earlier results in {output}; name a folder with images")
    left_out = _left_out(path, set(found), output.resolve())
    if left_out:
        say(f"{path}: skipped {left_out}; to denoise a skipped image, name the file itself")
    for source in found:
        if source not in earlier:
            yield source, output / _result_name(source.relative_to(path), png)


def _result_name(relative: Path, png: bool) -> Path:
    """Return the name of a result. The suffix of its format replaces the suffix of an image format; other suffixes stay."""
    from ebt_vision.data.image_files import WRITABLE_SUFFIXES, without_suffix

    if relative.suffix.lower() in WRITABLE_SUFFIXES and not png:
        return relative
    return relative.with_name(without_suffix(relative).name + ".png")


def _left_out(folder: Path, found: set[Path], output: Path) -> str:
    """Describe the visible files and linked folders in `folder` that are neither found images nor in `output`."""
    suffixes: list[str] = []
    links: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != output]
        links += [str((here / f).relative_to(folder)) for f in folders if (here / f).is_symlink()]
        suffixes += [Path(f).suffix or f for f in files if not f.startswith(".") and here / f not in found]
    kinds = sorted(set(suffixes))
    named = ", ".join(kinds[:5]) + (", ..." if len(kinds) > 5 else "")
    parts = [f"{len(suffixes)} file{'s' * (len(suffixes) > 1)} not named as images ({named})"] if suffixes else []
    parts += [f"the linked folder{'s' * (len(links) > 1)} {', '.join(sorted(links))}"] if links else []
    return " and ".join(parts)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {folder} cannot be created ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output {folder} is not writable; choose another folder")


def _load(args: argparse.Namespace) -> tuple[Denoiser, DenoiseOptions]:
    from ebt_vision.commands.pipeline import Share
    from ebt_vision.denoising.load import load_denoiser
    from ebt_vision.denoising.options import DenoiseOptions
    from ebt_vision.models.checkpoint import default_pretrained, program_device

    device = Share.of_environment().device(program_device(args.device))
    denoiser = load_denoiser(args.model or default_pretrained(), device=device, precision=args.precision)
    _check_options(denoiser, args)
    noise = args.add_noise
    stopping = {"tolerance": args.tolerance, "tolerance_of": args.tolerance_of or "first"}
    if args.steps is None and args.tolerance is None:
        suggested = denoiser.suggested_options
        stopping = {"tolerance": suggested.tolerance, "tolerance_of": suggested.tolerance_of}
    options = DenoiseOptions(
        num_steps=args.steps or denoiser.suggested_steps,
        num_candidates=args.candidates,
        **stopping,
        step_rule=args.step_rule,
        langevin_std=args.langevin,
        step_size_scale=args.step_size_scale,
        strength=args.strength,
        start=args.start,
        seed=args.seed,
        sigma=noise and noise.sigma,
        noise_level=noise and noise.noise_level,
    )
    return adapt_to_noise(denoiser, noise), options


def _check_options(denoiser: Denoiser, args: argparse.Namespace) -> None:
    """Raise ValueError for an option that the model does not use."""
    given = {"--steps": ("num_steps", args.steps), "--tolerance": ("tolerance", args.tolerance)}
    given |= {"--candidates": ("num_candidates", args.candidates - 1), "--langevin": ("langevin_std", args.langevin)}
    given |= {"--step-size-scale": ("step_size_scale", args.step_size_scale - 1)}
    given |= {"--step-rule": ("step_rule", args.step_rule != "fixed")}
    for option, (field, value) in given.items():
        if value and field not in denoiser.options_used:
            raise ValueError(f"{option} has no effect on {denoiser.name}; leave it out")


def _read(source: Path) -> ImageFile:
    from ebt_vision.data import image_files

    return image_files.read_image(source)


def _denoise(
    job: Job, image: ImageFile, denoiser: Denoiser, options: DenoiseOptions, args: argparse.Namespace
) -> Callable[[], str]:
    """Denoise one image. Return a function that writes the result and returns the line to print."""
    from ebt_vision.core.metrics import psnr
    from ebt_vision.denoising.tiling import denoise_tiled

    start = time.perf_counter()
    clean = image.visible_pixels()[None]  # (1, 3, H, W)
    noisy = clean
    if args.add_noise:  # the noise depends only on the seed, not on the other files
        noisy = args.add_noise.add(clean, args.seed)
    progress = _tile_progress(job.source, start)
    result = denoise_tiled(denoiser, noisy, options, tile_size=args.tile, overlap=args.overlap, callback=progress)
    parts = [_energies(result), _steps(result), duration(time.perf_counter() - start)]
    if args.add_noise:
        before, after = (float(psnr(images.clamp(0, 1), clean, data_range=1.0)) for images in (noisy, result.image.cpu()))
        parts.append(f"PSNR {before:.2f} -> {after:.2f} dB")
    line = f"{job.source} -> {job.target}: " + ", ".join(part for part in parts if part)
    final = image.with_pixels(result.image[0].cpu())
    return lambda: _write(job, final, line, overwrite=args.overwrite)


def _write(job: Job, image: ImageFile, line: str, *, overwrite: bool) -> str:
    from ebt_vision.data.image_files import losses, write_image

    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_image(job.target, image, overwrite=overwrite)
    lost = losses(job.target, image)
    for note in [*image.notes, *lost]:
        say(f"{job.source}: {note}" + ("; --png keeps it" if note in lost and job.target.suffix.lower() != ".png" else ""))
    return line


def _tile_progress(source: Path, start: float) -> Callable[[int, int], None]:
    """On a terminal, show the progress on a large image in one line, and clear this line at the end."""

    def show(done: int, total: int) -> None:
        if total < 2 or not sys.stderr.isatty():
            return
        line = ""
        if done < total:
            left = f", {duration((time.perf_counter() - start) / done * (total - done))} left" if done else ""
            line = f"{source}: tile {done} of {total}{left}"
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    return show


def _energies(result: DenoiseResult) -> str:
    if result.energies is None:  # not an energy-based model
        return ""
    return f"energy {float(result.energies[0, 0]):.3f} -> {float(result.energies[-1, 0]):.3f}"


def _steps(result: DenoiseResult) -> str:
    steps = int(result.num_steps[0])
    return f"{steps} step" + "s" * (steps != 1)
