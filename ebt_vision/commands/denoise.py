"""`ebt-vision denoise`: denoise image files and folders. A file that fails is reported, and the others are still denoised."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ebt_vision.commands.console import duration
from ebt_vision.commands.image_jobs import run_jobs, tile_progress, write_result
from ebt_vision.core.arguments import count, name, named_path, not_negative, number, positive, whole_number

if TYPE_CHECKING:
    from ebt_vision.commands.image_jobs import Work
    from ebt_vision.commands.pipeline import Job
    from ebt_vision.data.image_files import ImageFile
    from ebt_vision.denoising.base import Denoiser
    from ebt_vision.denoising.options import DenoiseOptions
    from ebt_vision.denoising.results import DenoiseResult
    from ebt_vision.noise.named import Noise

MODEL = "a shipped name, a folder, hub:OWNER/NAME, spandrel:FILE, deepinv:NAME[:FILE], bm3d, nlm"


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
    parser.add_argument("--model", metavar="NAME_OR_PATH", type=name, help=MODEL)
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
        help="add Gaussian noise first, in 0..255 units; or KIND:AMOUNT of gaussian, paper, poisson, salt-and-pepper, camera, "
        "jpeg",
    )
    parser.add_argument(
        "--strength",
        metavar="S",
        type=number(float, 0, 1.5),
        default=1.0,
        help="0 to 1.5: a value below 1 keeps grain (0 keeps every pixel), a value above 1 removes more noise",
    )
    parser.add_argument(
        "--self-ensemble",
        metavar="N",
        type=count,
        default=1,
        help="mean over 2, 4 or 8 mirrored and rotated copies: less error for N times the time (default 1: off)",
    )
    parser.add_argument(
        "--clean-below",
        metavar="SIGMA",
        type=number(float, 0, 255),
        help="tiles whose energy shows noise below this standard deviation, in 0..255 units, are clean and take no step "
        "(default: from the model; 0: never)",
    )
    parser.add_argument(
        "--start", choices=("observation", "proposal"), help="start thinking from the noisy image or the network's proposal"
    )
    parser.add_argument(
        "--likelihood-weight",
        metavar="W",
        type=_likelihood_weight,
        default=0.0,
        help="share of the way back to the noisy image that each step goes, against over-thinking: 0 (default) to 1, or auto",
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


def _likelihood_weight(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else number(float, 0, 1)(text)


def _noise(text: str) -> Noise:
    from ebt_vision.noise.named import Noise

    try:
        return Noise.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    if args.tolerance_of is not None and args.tolerance is None:
        raise ValueError(f"--tolerance-of {args.tolerance_of} has no effect without --tolerance; add --tolerance or remove it")

    def prepare() -> Work:
        denoiser, options = _load(args)
        return lambda job, image: _denoise(job, image, denoiser, options, args)

    return run_jobs(args.inputs, args.output, prepare, overwrite=args.overwrite, png=args.png)


def _load(args: argparse.Namespace) -> tuple[Denoiser, DenoiseOptions]:
    from ebt_vision.core.sharing import Share
    from ebt_vision.denoising.base import adapt_to_noise
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
        self_ensemble=args.self_ensemble,
        likelihood_weight=args.likelihood_weight,
        start=args.start,
        clean_below=args.clean_below,
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
    given |= {"--likelihood-weight": ("likelihood_weight", args.likelihood_weight)}
    given |= {"--clean-below": ("clean_below", args.clean_below)}
    if args.tolerance is not None and args.steps is None and denoiser.suggested_steps == 1:
        raise ValueError(f"--tolerance has no effect on the one step that {denoiser.name} suggests; add --steps")
    in_effect = denoiser.options_in_effect(args.steps or denoiser.suggested_steps, args.start)
    for option, (field, value) in given.items():
        if value and field not in denoiser.options_used:
            raise ValueError(f"{option} has no effect on {denoiser.name}; leave it out")
        if value and field not in in_effect:
            if field == "clean_below":
                raise ValueError(f"{option} has no effect where {denoiser.name} does not start from its proposal; leave it out")
            raise ValueError(f"{option} has no effect on the proposal, the one step of {denoiser.name}; add --steps 2 or more")


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
    progress = tile_progress(job.source, start)
    result = denoise_tiled(denoiser, noisy, options, tile_size=args.tile, overlap=args.overlap, callback=progress)
    parts = [_energies(result), _steps(result), duration(time.perf_counter() - start)]
    if args.add_noise:
        before, after = (float(psnr(images.clamp(0, 1), clean, data_range=1.0)) for images in (noisy, result.image.cpu()))
        parts.append(f"PSNR {before:.2f} -> {after:.2f} dB")
    line = f"{job.source} -> {job.target}: " + ", ".join(part for part in parts if part)
    final = image.with_pixels(result.image[0].cpu())
    return lambda: write_result(job, final, line, overwrite=args.overwrite)


def _energies(result: DenoiseResult) -> str:
    if result.energies is None:  # not an energy-based model
        return ""
    return f"energy {float(result.energies[0, 0]):.3f} -> {float(result.energies[-1, 0]):.3f}"


def _steps(result: DenoiseResult) -> str:
    steps = int(result.num_steps[0])
    return f"{steps} step" + "s" * (steps != 1) + " (already clean)" * (steps == 0)
