"""The denoising benchmark, paper protocol: VP noise on [-1, 1] at level 0.1 (as in training) and 0.2 (unseen).

    python eval/denoising.py --models tiny_imagenet_ebt bm3d --data "validation-*.parquet" --output results/

Every model sees the same images with the same noise: the noise of an image comes from (seed, level, index of the image).
Per image the mean squared error is kept (on 0..255, after clamping, not rounded) after every step; the table gives the mean
of per-image PSNRs and the PSNR of the mean error, which is what the paper's table has. Parts are written as they are done:
the same command goes on where it was interrupted. Energies are means over patches.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from ebt_vision import corruption, metrics
from ebt_vision.checkpoint import checkpoint_hash
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.denoiser import DenoiseOptions, Denoiser, load_denoiser
from ebt_vision.rng import sample_generators

_NOISE_STREAM = 21


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of using one model; a method with steps gives a row for each of `steps` of one run."""

    model: str
    method: str
    num_steps: int
    """Steps of the run."""
    reported: tuple[int, ...]
    """The steps whose images are measured."""
    passes_per_step: int
    tolerance: float | None = None


def rows_of(denoiser: Denoiser, level: float, settings: argparse.Namespace) -> Iterator[Row]:
    """The rows that a model gets."""
    name, kind = denoiser.name, type(denoiser).__name__
    if kind == "EBTDenoiser":
        steps = tuple(range(1, settings.steps + 1))
        yield Row(model=name, method="thinking", num_steps=settings.steps, reported=steps, passes_per_step=1)
        for tolerance in settings.tolerances:
            method = f"thinking, tolerance {tolerance:g}"
            last = (settings.steps,)
            yield Row(
                model=name, method=method, num_steps=settings.steps, reported=last, passes_per_step=1, tolerance=tolerance
            )
    elif kind == "RegressorDenoiser":
        yield Row(model=name, method="applied", num_steps=3, reported=(1, 2, 3), passes_per_step=1)
    elif kind == "DiTDenoiser":
        yield Row(model=name, method="x0", num_steps=1, reported=(1,), passes_per_step=1)
        for passes in settings.passes:
            yield Row(model=name, method="ddim", num_steps=passes, reported=(passes,), passes_per_step=1)
    else:
        yield Row(
            model=name,
            method="noisy input" if name == "identity" else "told sigma",
            num_steps=1,
            reported=(1,),
            passes_per_step=0,
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    settings = _parse(arguments)
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"denoising: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"denoising: interrupted; the same command goes on from the parts in {settings.output}", file=sys.stderr)
        return 130
    return 0


def run(settings: argparse.Namespace) -> None:
    """Measure every row and write results.json and report.md into settings.output."""
    settings.output.mkdir(parents=True, exist_ok=True)
    images = load_image_set(
        DataConfig(path=settings.data, img_size=settings.img_size, limit=settings.limit), seed=settings.seed
    )
    print(images.report(), file=sys.stderr)
    records = []
    for name in settings.models:
        denoiser = load_denoiser(name, device=settings.device)
        identity = {"name": name, "hash": checkpoint_hash(name) if denoiser.num_parameters else None}
        for level in settings.levels:
            for row in rows_of(denoiser, level, settings):
                records += measure(denoiser, row, level, images, identity, settings)
    about = _about(settings, len(images))
    (settings.output / "results.json").write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
    (settings.output / "report.md").write_text(report(about, records))
    print(report(about, records))


def measure(denoiser: Denoiser, row: Row, level: float, images, identity: dict, settings: argparse.Namespace) -> list[dict]:
    """The records of a row, part by part; parts that are on disk are not made again."""
    denoiser = _in_mode(denoiser, row)
    key = {"row": asdict(row), "level": level, "seed": settings.seed, "data": settings.data, "count": len(images), **identity}
    folder = settings.output / "parts" / _slug(f"{row.model}-{row.method}-{row.num_steps}-{level:g}")
    _claim(folder, key)
    starts = range(0, len(images), settings.batch_size)
    title = f"{row.model}, {row.method} {row.num_steps}, level {level:g}"
    parts = []
    for start in track(starts, description=title, disable=not sys.stderr.isatty()):
        path = folder / f"{start:08d}.npz"
        if not path.exists():
            indices = list(range(start, min(start + settings.batch_size, len(images))))
            _write_part(path, _measure_part(denoiser, row, level, indices, images, settings))
        with np.load(path) as part:
            parts.append({name: part[name] for name in part.files})
    print(f"done: {title}", file=sys.stderr)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}  # (num_images, ...)
    return [_record(denoiser, row, level, i, whole, identity) for i in range(len(row.reported))]


def _measure_part(
    denoiser: Denoiser, row: Row, level: float, indices: list[int], images, settings: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Per image: mse (B, steps) on 0..255, energy (B, steps), steps used (B,) and seconds (B,)."""
    clean = corruption.to_model_range(images.images(indices).float() / 255.0)
    timestep = corruption.level_to_timestep(level)
    noisy = corruption.add_vp_noise(clean, level, sample_generators(settings.seed, indices, _NOISE_STREAM, timestep))
    options = DenoiseOptions(num_steps=row.num_steps, noise_level=level, keep_trajectory=True, tolerance=row.tolerance)
    if row.method == "told sigma":  # classical methods get the image at its own scale, and the noise that it then has
        signal, noise = corruption.signal_and_noise_scale(level)
        noisy, options = noisy / signal, replace(options, sigma=255.0 * noise / signal / 2.0)
    begin = time.perf_counter()
    result = denoiser.denoise(corruption.to_image_range(noisy), options, image_ids=indices)
    seconds = time.perf_counter() - begin
    target = 255.0 * corruption.to_image_range(clean)
    trajectory = result.trajectory or (noisy, result.image)
    errors = torch.stack([metrics.mse(255.0 * trajectory[step], target) for step in row.reported], dim=1)  # (B, steps)
    energies = torch.full_like(errors, torch.nan)
    if result.energies is not None:
        energies = torch.stack([result.energies[step] for step in row.reported], dim=1).double()
    return {
        "mse": errors.numpy(),
        "energy": energies.numpy(),
        "steps_used": result.num_steps.numpy(),
        "seconds": np.full(len(indices), seconds / len(indices)),
    }


def _record(denoiser: Denoiser, row: Row, level: float, i: int, whole: dict[str, np.ndarray], identity: dict) -> dict:
    error = torch.from_numpy(whole["mse"][:, i])
    psnr = metrics.psnr_from_mse(error, data_range=255.0)
    half_width = 1.96 * float(psnr.std()) / math.sqrt(len(psnr)) if len(psnr) > 1 else math.nan
    energy = float(whole["energy"][:, i].mean())
    return {
        "model": row.model,
        "hash": identity["hash"],
        "parameters": denoiser.num_parameters,
        "level": level,
        "method": row.method,
        "steps": row.reported[i],
        "passes": row.reported[i] * row.passes_per_step,
        "steps_used": float(whole["steps_used"].mean()) if row.tolerance is not None else row.reported[i],
        "psnr_image": float(psnr.mean()),
        "psnr_image_ci95": half_width,
        "psnr_batch": float(metrics.psnr_from_mse(error.mean(), data_range=255.0)),
        "mse": float(error.mean()),
        "energy": None if math.isnan(energy) else energy,
        "seconds_per_image_whole_run": float(whole["seconds"].mean()),
        "num_images": len(psnr),
    }


def report(about: dict, records: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        f"{about['num_images']} images, seed {about['seed']}, commit {about['commit']}, {about['hardware']}, {about['date']}.",
        f"Command: `{about['command']}`",
        "",
        "| model | parameters | level | method | steps | PSNR per image | PSNR of mean MSE | MSE | energy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        energy = "" if r["energy"] is None else f"{r['energy']:.3f}"
        steps = f"{r['steps_used']:.2f} used of {r['steps']}" if "tolerance" in r["method"] else r["steps"]
        lines.append(
            f"| {r['model']} | {r['parameters']:,} | {r['level']:g} | {r['method']} | {steps} "
            f"| {r['psnr_image']:.2f} ± {r['psnr_image_ci95']:.2f} | {r['psnr_batch']:.2f} | {r['mse']:.1f} | {energy} |"
        )
    return "\n".join(lines) + "\n"


def _in_mode(denoiser: Denoiser, row: Row) -> Denoiser:
    if row.method not in ("x0", "ddim"):
        return denoiser
    from ebt_vision.model_denoisers import DiTDenoiser

    assert isinstance(denoiser, DiTDenoiser)
    return DiTDenoiser(denoiser.model, mode=row.method, name=denoiser.name)  # type: ignore[arg-type]


def _claim(folder: Path, key: dict) -> None:
    """Make the folder of a row's parts, or check that its parts were made with the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "key.json", json.dumps(key, sort_keys=True, indent=1)
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"{folder} holds parts of another run (other data, seed, limit or checkpoint); choose another --output"
        )
    path.write_text(text)


def _write_part(path: Path, part: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        np.savez(file, **part)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


def _about(settings: argparse.Namespace, num_images: int) -> dict:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": " ".join(["python", "eval/denoising.py", *settings.command]),
        "seed": settings.seed,
        "num_images": num_images,
        "commit": git.stdout.strip() or "unknown",
        "hardware": f"{os.cpu_count()} x {platform.machine()} CPU"
        if settings.device == "cpu"
        else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Denoising benchmark, paper protocol.")
    parser.add_argument("--models", nargs="+", required=True, help="shipped names, folders, bm3d, nlm, identity")
    parser.add_argument("--data", required=True, help="images: a folder, parquet files or hub:OWNER/NAME")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for parts, results.json and report.md")
    parser.add_argument("--limit", type=int, help="use so many images, spread evenly over the set")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--steps", type=int, default=10, help="thinking steps of an EBT")
    parser.add_argument("--tolerances", type=float, nargs="*", default=[], help="rows of adaptive thinking")
    parser.add_argument("--passes", type=int, nargs="*", default=[10, 100], help="passes of DDIM")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    settings = parser.parse_args(arguments)
    settings.command = sys.argv[1:] if arguments is None else arguments
    return settings


if __name__ == "__main__":
    sys.exit(main())
