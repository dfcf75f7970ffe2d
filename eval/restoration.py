"""Restoration against classical methods: PSNR, SSIM, passes through the network and seconds on images with a known damage.

    python eval/restoration.py --data data/cbsd68 --choose-on "data/imagenet-photos/train-*.parquet" \
        --images 20 --size 160 --output out/restoration

The parameters of the classical methods are chosen by PSNR on the training images of --choose-on, like the defaults of
restore(). results.json is written after every task, and report.md at the end. --classical-from takes the classical rows from
the results.json of an earlier run on the same images, so that new weights are compared without the slow classical methods.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebt_vision.benchmark.images import load_images
from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.restoration import BLUR_NOISE, CLASSICAL, TASKS, Method, choose, damage
from ebt_vision.benchmark.restoration_deepinv import dpir
from ebt_vision.benchmark.statistics import bootstrap_means, intervals
from ebt_vision.core.arguments import count, named_path, number, whole_number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.metrics import MissingBackboneError, PerceptualDistance, psnr, ssim
from ebt_vision.core.provenance import provenance
from ebt_vision.denoising.base import Denoiser, for_photographs
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.interop.deepinv import import_deepinv
from ebt_vision.models.checkpoint import program_device
from ebt_vision.restoration.likelihoods import Convolution
from ebt_vision.restoration.options import RestoreOptions
from ebt_vision.restoration.restore import restore
from ebt_vision.restoration.solvers import SOLVERS

SAME_PSNR = 0.01
"""Differences of a PSNR in dB up to this value are rounding: decoders of JPEG differ between machines."""
Restorer = Callable[[Any], tuple[Tensor, int]]
"""Damaged image -> (restored image, passes through a network)."""


def measure(
    task: str, images: list[Tensor], method: Restorer, *, seed: int, lpips: PerceptualDistance | None = None
) -> dict[str, Any]:
    """Run one method on all images; return the figures of each image, their means and 95 % intervals."""
    psnrs, ssims, distances, passes, seconds = [], [], [], [], []
    for index, clean in enumerate(images):
        damaged = damage(task, clean, seed=seed, number=index)
        begin = time.perf_counter()
        restored, num_forward = method(damaged)
        seconds.append(time.perf_counter() - begin)
        restored = (restored.clamp(0, 1) * 255.0).round() / 255.0
        psnrs.append(float(psnr(restored, clean, data_range=1.0)))
        ssims.append(float(ssim(restored, clean, data_range=1.0)))
        if lpips is not None:
            distances.append(float(lpips(restored, clean)))
        passes.append(num_forward)
    low, high = intervals(bootstrap_means(np.array(psnrs)[:, None], seed=seed))[:, 0]
    return {
        "psnr": float(np.mean(psnrs)),
        "psnr_interval": [float(low), float(high)],
        "ssim": float(np.mean(ssims)),
        "lpips": float(np.mean(distances)) if distances else None,
        "num_forward": float(np.mean(passes)),
        "seconds": float(np.median(seconds)),
        "psnrs": psnrs,
    }


def differences(rows: list[dict[str, Any]], *, seed: int) -> None:
    """Add to each row with a network its PSNR minus that of the best classical method, with a paired 95 % interval."""
    classical = [row for row in rows if not row["is_network"]]
    if not classical:
        return
    best = max(classical, key=lambda row: float(row["psnr"]))
    for row in rows:
        if row["is_network"]:
            gains = np.array(row["psnrs"]) - np.array(best["psnrs"])
            low, high = intervals(bootstrap_means(gains[:, None], seed=seed))[:, 0]
            row["against"] = best["method"]
            row["gain"], row["gain_interval"] = float(gains.mean()), [float(low), float(high)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| task | method | parameter | PSNR (95 % of images' means) | minus best classical | SSIM | LPIPS | passes | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["psnr_interval"]
        gain = "{:+.2f} ({:+.2f} to {:+.2f})".format(row["gain"], *row["gain_interval"]) if "gain" in row else ""
        lpips = "" if row["lpips"] is None else f"{row['lpips']:.3f}"
        lines.append(
            f"| {row['task']} | {row['method']} | {row['parameter']} | {row['psnr']:.2f} ({low:.2f} to {high:.2f}) | {gain} | "
            f"{row['ssim']:.4f} | {lpips} | {row['num_forward']:.0f} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write results.json and report.md; exit status 2 for bad input."""
    settings = _parser().parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        device = program_device(settings.device)
        denoisers = {name: load_denoiser(name, device=device) for name in settings.models}
        images = _load(settings.data, settings.size, settings.images)
        others = _load(settings.choose_on, settings.size, settings.choose_images) if settings.choose_on else []
        earlier, about = _classical_rows(settings.classical_from, settings, images) if settings.classical_from else (None, None)
        if settings.dpir:
            import_deepinv()
        lpips = _lpips(settings.lpips_backbone, device)
    except (ValueError, OSError) as error:
        print(f"restoration: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    settings.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        **provenance("eval/restoration.py", sys.argv[1:] if arguments is None else arguments, device),
        "seed": settings.seed,
        "num_images": len(images),
        "size": list(images[0].shape[-2:]),
        "threads": torch.get_num_threads(),
        "classical_from": about,
        "rows": [],
    }
    for task in settings.tasks:
        rows = [] if earlier is None else [row for row in earlier if row["task"] == task]
        for method in _methods(task, settings, denoisers, others):
            row = measure(task, images, method.run, seed=settings.seed, lpips=lpips)
            rows.append(
                {"task": task, "method": method.name, "parameter": method.parameter, "is_network": method.is_network} | row
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        differences(rows, seed=settings.seed)
        results["rows"] += rows
        write_text(settings.output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(settings.output / "report.md", table(results["rows"]))
    return 0


@dataclass(frozen=True, slots=True)
class NamedMethod:
    """A row of the table."""

    name: str
    parameter: object
    run: Restorer
    is_network: bool = False


def _methods(task: str, settings: Any, denoisers: dict[str, Denoiser], others: list[Tensor]) -> Iterator[NamedMethod]:
    """The classical methods, then for each denoiser: restore(), the other solvers, deepinv's DPIR."""
    for name, (method, _) in CLASSICAL[task].items() if settings.classical_from is None else ():
        if name not in settings.skip:
            value = choose(task, name, others, seed=settings.seed + 1)
            yield NamedMethod(name, value or "", functools.partial(_classical, method, value))
    for name, denoiser in denoisers.items():
        for solver in (None, *settings.solvers):
            if solver == "descent" and not isinstance(denoiser, EBTDenoiser):
                continue
            options = RestoreOptions(seed=settings.seed, solver=solver)
            yield NamedMethod(name, solver or "", functools.partial(_ours, denoiser, options), is_network=True)
        if settings.runs and task != "jpeg":
            options = RestoreOptions(seed=settings.seed, num_runs=settings.runs)
            label = "1 run" if settings.runs == 1 else f"{settings.runs} runs"
            yield NamedMethod(name, label, functools.partial(_ours, denoiser, options), is_network=True)
        if settings.dpir and task != "jpeg":
            yield NamedMethod(name, "deepinv DPIR", functools.partial(_dpir, for_photographs(denoiser)), is_network=True)


def _classical(method: Method, value: float, damaged: Any) -> tuple[Tensor, int]:
    return method(damaged, value), 0


def _ours(denoiser: Denoiser, options: RestoreOptions, damaged: Any) -> tuple[Tensor, int]:
    result = restore(damaged.observed, damaged.likelihood, options, denoiser=denoiser)
    return result.image, result.num_forward


def _dpir(denoiser: Denoiser, damaged: Any) -> tuple[Tensor, int]:
    noise = BLUR_NOISE if isinstance(damaged.likelihood, Convolution) else 0.0
    return dpir(damaged.observed, damaged.likelihood, denoiser, noise=noise)


def _classical_rows(path: Path, settings: Any, images: list[Tensor]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows without a network of an earlier results.json, and what made them.

    Raises ValueError if they are of other images or settings, or incomplete.
    """
    if settings.choose_on:
        raise ValueError("--choose-on has no effect with --classical-from, whose parameters were chosen before; leave out one")
    try:
        earlier = json.loads(path.read_text())
        rows = [row for row in earlier["rows"] if not row["is_network"]]
        found = {(row["task"], row["method"]): np.array(row["psnrs"], dtype=float) for row in rows}
        theirs = {"seed": earlier["seed"], "size": earlier["size"], "num_images": earlier["num_images"]}
        about = earlier.get("classical_from") or {name: earlier[name] for name in ("command", "commit", "hardware", "date")}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); choose another --classical-from") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no results.json of this program; choose another --classical-from") from error
    ours = {"seed": settings.seed, "size": list(images[0].shape[-2:]), "num_images": len(images)}
    for name, value in ours.items():
        if theirs[name] != value:
            said = f"{path} has {name}={theirs[name]}, and this run {value}"
            raise ValueError(f"{said}; the classical rows must be of the same images")
    for task in settings.tasks:
        for name in CLASSICAL[task]:
            if name not in settings.skip and (task, name) not in found:
                raise ValueError(f"{path} has no row {name} of {task}; add --skip {name}, or leave out --classical-from")
        name, (method, _) = next(iter(CLASSICAL[task].items()))  # the damaged image itself
        before = found.get((task, name), np.empty(0))
        now = np.array(measure(task, images, functools.partial(_classical, method, 0.0), seed=settings.seed)["psnrs"])
        if before.shape != now.shape or not np.allclose(before, now, rtol=0, atol=SAME_PSNR):
            raise ValueError(f"{path} is of other images: {name} of {task} has other PSNR values; leave out --classical-from")
    return [row for row in rows if row["method"] not in settings.skip], about


def _lpips(backbone: str | None, device: str) -> PerceptualDistance | None:
    """Return LPIPS if its backbone is available; None, and an empty column, if it is not and none was requested."""
    try:
        return PerceptualDistance(backbone, device=device)
    except MissingBackboneError as error:
        if backbone:
            raise
        print(error, file=sys.stderr)
        return None


def _load(path: str, size: int, limit: int) -> list[Tensor]:
    """Return the central squares of the images without resizing, (1, 3, size, size)."""
    source = load_images(path, img_size=None, limit=limit)
    squares = []
    for pixels, name in zip(source.images(range(len(source))), source.names, strict=True):
        height, width = pixels.shape[-2:]
        if min(height, width) < size:
            raise ValueError(f"{name} is {width}x{height} px; use a --size of {min(height, width)} or less")
        top, left = (height - size) // 2, (width - size) // 2
        squares.append(pixels[None, :, top : top + size, left : left + size].float() / 255.0)
    return squares


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="restoration", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="images to measure on")
    parser.add_argument("--choose-on", help="training images, on which classical parameters are chosen; first value without")
    parser.add_argument("--models", nargs="*", default=["photographs_ebt"], help="priors: any denoiser, bm3d too")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--solvers", nargs="*", choices=SOLVERS, default=[], help="rows of these solvers as well")
    parser.add_argument("--runs", type=count, help="rows of the mean of this many runs as well; not for JPEG")
    parser.add_argument("--dpir", action="store_true", help="rows of deepinv's DPIR with each model as well")
    parser.add_argument("--lpips-backbone", metavar="FILE", help="torchvision's AlexNet weights, or 'download'")
    parser.add_argument("--skip", nargs="*", default=[], metavar="METHOD", help="classical methods to leave out, say BM3D")
    parser.add_argument(
        "--classical-from", metavar="FILE", type=named_path, help="take the classical rows of this results.json"
    )
    parser.add_argument("--images", type=count, default=20)
    parser.add_argument("--choose-images", type=count, default=4)
    parser.add_argument("--size", type=number(int, 32), default=256, help="side of the squares; a multiple of 4")
    parser.add_argument("--seed", type=whole_number, default=0)
    parser.add_argument("--threads", type=count, help="of torch (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    parser.add_argument("--output", type=named_path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
