"""`ebt-vision restore`: fill in, deblur, enlarge and de-block images, with the network that was trained to denoise."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ebt_vision.commands.console import duration
from ebt_vision.commands.image_jobs import run_jobs, write_result
from ebt_vision.core.arguments import count, name, named_path, not_negative, number, positive, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from ebt_vision.commands.image_jobs import Work
    from ebt_vision.commands.pipeline import Job
    from ebt_vision.data.image_files import ImageFile
    from ebt_vision.denoising.base import Denoiser
    from ebt_vision.restoration.likelihoods import Likelihood
    from ebt_vision.restoration.options import RestoreResult

SOLVERS = ("splitting", "renoising", "descent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command and of its four kinds of damage."""
    parser.description = (
        "Restore images. Results in DIR have the names of their inputs. They keep bit depth, colour profile, EXIF and alpha if "
        "the format supports them."
    )
    kinds = parser.add_subparsers(title="kinds of damage", metavar="KIND", required=True, dest="kind")
    inpaint = kinds.add_parser("inpaint", help="fill in missing pixels; all others stay as they are")
    inpaint.add_argument(
        "--mask", metavar="FILE", type=named_path, help="white where pixels are missing (default: where they are transparent)"
    )
    deblur = kinds.add_parser("deblur", help="undo a known blur")
    kernels = deblur.add_mutually_exclusive_group(required=True)
    kernels.add_argument("--sigma", metavar="PIXELS", type=positive, help="a Gaussian blur")
    kernels.add_argument(
        "--motion",
        metavar=("LENGTH", "ANGLE"),
        type=number(float, -360, 360),
        nargs=2,
        help="a motion in pixels and degrees from the right",
    )
    kernels.add_argument("--disk", metavar="RADIUS", type=positive, help="a lens out of focus")
    kernels.add_argument("--kernel", metavar="FILE", type=named_path, help="a kernel as .npy or .txt, sum 1, or as an image")
    deblur.add_argument(
        "--noise", metavar="SIGMA", type=not_negative, help="noise of the image, in 0..255 units (default: estimated)"
    )
    upscale = kinds.add_parser("upscale", help="enlarge an image that was made smaller by cubic interpolation")
    upscale.add_argument("--scale", type=number(int, 2, 4), default=2, help="2, 3 or 4 (default 2)")
    deblock = kinds.add_parser("deblock", help="remove the artefacts of a JPEG file; the result is a PNG file")
    for kind in (inpaint, deblur, upscale, deblock):
        _add_common(kind)
    parser.set_defaults(run=_run)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", metavar="FILE_OR_FOLDER", nargs="+", type=named_path)
    parser.add_argument(
        "--output", metavar="DIR", type=named_path, required=True, help="folder for the results; created if missing"
    )
    parser.add_argument("--model", metavar="NAME_OR_PATH", type=name, help="a shipped name, a folder or hub:OWNER/NAME")
    parser.add_argument("--solver", choices=SOLVERS, help="default: the one that suits the damage")
    parser.add_argument("--steps", metavar="N", type=count, help="steps of the solver (default: as suits the damage)")
    parser.add_argument(
        "--seed",
        metavar="S",
        type=whole_number,
        default=0,
        help="seed of the noise, and of the first mirrored copy (default 0)",
    )
    parser.add_argument(
        "--runs",
        metavar="N",
        type=count,
        help="mean over N whole runs with the seeds S, S + 1 ...: less error for N times the time (default: as suits the "
        "damage, and 1 with --solver or --steps; not for deblock)",
    )
    parser.add_argument("--tile", metavar="SIZE", type=count, help="tile side in pixels")
    parser.add_argument("--png", action="store_true", help="write PNG whatever the format of the input")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--device", metavar="NAME", type=name, help="cpu, cuda, cuda:1, mps (default: the best available)")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where it is fast"
    )


def _run(args: argparse.Namespace) -> int:
    likelihood = _shared_likelihood(args)  # what is wrong with it is said before any work

    def prepare() -> Work:
        denoiser = _load(args)
        return lambda job, image: _restore(job, image, likelihood, denoiser, args)

    png = args.png or args.kind == "deblock"  # a new JPEG file would have new artefacts
    return run_jobs(args.inputs, args.output, prepare, overwrite=args.overwrite, png=png)


def _load(args: argparse.Namespace) -> Denoiser:
    from ebt_vision.core.sharing import Share
    from ebt_vision.denoising.load import load_denoiser
    from ebt_vision.models.checkpoint import default_pretrained, program_device

    device = Share.of_environment().device(program_device(args.device))
    return load_denoiser(args.model or default_pretrained(), device=device, precision=args.precision)


def _shared_likelihood(args: argparse.Namespace) -> Likelihood | None:
    """Return the damage that all files share; None if it depends on the file."""
    from ebt_vision.restoration.files import read_mask
    from ebt_vision.restoration.likelihoods import Convolution, Downsampling, Mask

    if args.kind == "inpaint" and args.mask is not None:
        return Mask(read_mask(args.mask, mixed=True))
    if args.kind == "deblur":
        return Convolution(_kernel(args))
    return Downsampling(args.scale) if args.kind == "upscale" else None


def _kernel(args: argparse.Namespace) -> Tensor:
    from ebt_vision.restoration.likelihoods import disk_kernel, gaussian_kernel, motion_kernel

    if args.sigma is not None:
        return gaussian_kernel(args.sigma)
    if args.motion is not None:
        return motion_kernel(*args.motion)
    return disk_kernel(args.disk) if args.disk is not None else _read_kernel(args.kernel)


def _read_kernel(path: Path) -> Tensor:
    """Read a kernel from a file. An image is divided by its sum."""
    import numpy as np
    import torch

    from ebt_vision.data.image_files import read_image

    suffix = path.suffix.lower()
    if suffix not in (".npy", ".txt", ".csv"):
        grey = read_image(path, min_side=1).pixels.mean(0).double()
        if float(grey.sum()) == 0:
            raise ValueError(f"{path} is black, so it is no kernel; give an image that is bright where the blur is")
        return grey / grey.sum()
    try:
        if suffix == ".npy":
            array = np.asarray(np.load(path, allow_pickle=False))
        elif not path.read_text().strip():
            raise ValueError("it is empty")
        else:
            array = np.loadtxt(path, delimiter="," if suffix == ".csv" else None, ndmin=2)
        if array.size == 0 or array.dtype.kind not in "biuf":
            raise ValueError(f"{array.size} values of type {array.dtype}")
        return torch.from_numpy(np.asarray(array, dtype=np.float64))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a kernel ({error}); give rows of numbers") from error


def _restore(
    job: Job, image: ImageFile, likelihood: Likelihood | None, denoiser: Denoiser, args: argparse.Namespace
) -> Callable[[], str]:
    """Restore one image. Return a function that writes the result and returns the line to print."""
    from ebt_vision.restoration.files import DamagedFile, jpeg_file, transparent_file
    from ebt_vision.restoration.options import RestoreOptions
    from ebt_vision.restoration.restore import restore

    start = time.perf_counter()
    options = RestoreOptions(
        solver=args.solver,
        num_steps=args.steps,
        noise=getattr(args, "noise", None),
        seed=args.seed,
        num_runs=args.runs,
        tile_size=args.tile,
    )
    if likelihood is not None:
        damaged = DamagedFile(image=image, likelihood=likelihood)
    else:
        damaged = (transparent_file if args.kind == "inpaint" else jpeg_file)(image, job.source)
    result = restore(damaged.observed(), damaged.likelihood, options, denoiser=denoiser)
    outcome = _energies(result) if result.num_runs == 1 else f"{result.num_runs} runs"
    parts = [outcome, f"{len(result.likelihoods)} steps", f"{result.num_forward} passes"]
    line = f"{job.source} -> {job.target}: " + ", ".join(
        part for part in [*parts, duration(time.perf_counter() - start)] if part
    )
    final = damaged.with_result(result.image[0].cpu())
    return lambda: write_result(job, final, line, overwrite=args.overwrite)


def _energies(result: RestoreResult) -> str:
    first, last = result.energies[0], result.energies[-1]
    return "" if first is None or last is None else f"energy {first:.3f} -> {last:.3f}"
