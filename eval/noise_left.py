"""How much noise models leave in photographs without clean images: the smoothest windows before and after.

    python eval/noise_left.py --data data/rni15 --models photographs_ebt --output runs/noise_left.json

A window of 32x32 px has noise and content. The program subtracts the quadratic surface that fits best, and takes the rest for
noise. It uses the twentieth of the windows, or eight, with the least noise in luminance; windows with clipped pixels do not
count. Columns, means over these windows:

    luma, colour       standard deviation of luminance and of R - Y, 0..255 units
    1 px, 2 px         correlation of pixels at this distance, the mean of rows and columns
    left: luma, colour the standard deviation of the result over that of the noisy photograph

Texture counts as noise here, and a model that blurs everything leaves nothing. The program shows what the noise of cameras is
like (the mixture of noise/realistic.py follows RNI15), and whether a model leaves it. For a choice among models, use
eval/held_out.py beside it. `MODEL+OTHER@0.3` mixes weights as there.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from held_out import load
from torch import Tensor

from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.benchmark.tables import Column, markdown
from ebt_vision.core.arguments import named_path
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.provenance import provenance
from ebt_vision.data.image_files import find_images, read_image
from ebt_vision.denoising.tiling import denoise_tiled

WINDOW = 32
SHARE = 20
"""One of this many windows is used."""
LEAST_WINDOWS = 8
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
"""ITU-R BT.601."""

Fields = tuple[Tensor, Tensor]
"""Noise of luminance and of R - Y in windows, both (windows, WINDOW, WINDOW), 0..255 units."""


def windows(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> windows (N, 3, WINDOW, WINDOW), float64 in 0..255, half a window apart."""
    step = WINDOW // 2
    parts = (image.double() * 255.0).unfold(1, WINDOW, step).unfold(2, WINDOW, step)  # (3, rows, columns, WINDOW, WINDOW)
    return parts.permute(1, 2, 0, 3, 4).reshape(-1, 3, WINDOW, WINDOW)


def without_surface(values: Tensor) -> Tensor:
    """Subtract from each of (N, WINDOW, WINDOW) the quadratic surface that fits best."""
    line = torch.linspace(-1.0, 1.0, WINDOW, dtype=torch.float64)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    terms = torch.stack([torch.ones_like(rows), rows, columns, rows * columns, rows**2, columns**2]).flatten(1)  # (6, pixels)
    basis = torch.linalg.qr(terms.T).Q  # (pixels, 6)
    flat = values.flatten(1)
    return (flat - flat @ basis @ basis.T).unflatten(1, (WINDOW, WINDOW))


def fields(parts: Tensor) -> Fields:
    """Noise of windows (N, 3, WINDOW, WINDOW)."""
    luma = torch.einsum("c,nchw->nhw", _LUMA, parts)
    return without_surface(luma), without_surface(parts[:, 0] - luma)


def smoothest(parts: Tensor) -> Tensor:
    """Return the indices of the windows with the least noise in luminance; none for an image where all are clipped."""
    inside = ((parts > 1.0) & (parts < 254.0)).flatten(1).all(1).nonzero().flatten()
    if not len(inside):
        return inside
    spread = fields(parts[inside])[0].flatten(1).std(1)
    count = max(LEAST_WINDOWS, len(parts) // SHARE)
    return inside[spread.argsort()[:count]]


def correlation(values: Tensor, distance: int) -> float:
    """Mean over windows (N, WINDOW, WINDOW) of the correlation of pixels `distance` apart; 0 without noise."""
    variance = values.square().mean((1, 2)).clamp(min=1e-12)
    across = (values[:, :, distance:] * values[:, :, :-distance]).mean((1, 2))
    down = (values[:, distance:] * values[:, :-distance]).mean((1, 2))
    return float(((across + down) / (2.0 * variance)).mean())


def strength(values: Tensor) -> float:
    """Mean standard deviation of windows."""
    return float(values.square().mean((1, 2)).sqrt().mean())


def noise_row(found: Fields) -> dict[str, float]:
    """Strength and correlations of the noise of one photograph."""
    row = {}
    for name, values in zip(("luma", "colour"), found, strict=True):
        row[name] = strength(values)
        row |= {f"{name}, {distance} px": correlation(values, distance) for distance in (1, 2)}
    return row


def run(settings: Any) -> None:
    """Measure every photograph, print a table and write the figures."""
    denoisers = {name: load(name) for name in settings.models}
    rows: list[dict[str, Any]] = []
    for path in find_images([settings.data]):
        noisy = read_image(path).visible_pixels()
        if min(noisy.shape[-2:]) < WINDOW:
            print(f"{path.name} is left out: it is smaller than a window of {WINDOW} px", file=sys.stderr)
            continue
        parts = windows(noisy)
        chosen = smoothest(parts)
        if not len(chosen):
            print(f"{path.name} is left out: every window has clipped pixels", file=sys.stderr)
            continue
        before = fields(parts[chosen])
        row: dict[str, Any] = {"photograph": path.stem, "windows": len(chosen)} | noise_row(before)
        for name, denoiser in denoisers.items():
            after = fields(windows(denoise_tiled(denoiser, noisy).image[0].cpu())[chosen])
            for kind, old, new in zip(("luma", "colour"), before, after, strict=True):
                row[f"{name} left: {kind}"] = strength(new) / max(strength(old), 1e-12)
        rows.append(row)
    if not rows:
        raise ValueError(f"no photograph in {settings.data} has a smooth window without clipped pixels")
    numbers = [name for name in rows[0] if name not in ("photograph", "windows")]
    middle = {name: float(torch.tensor([row[name] for row in rows]).quantile(0.5)) for name in numbers}
    shown: list[Column] = [("photograph", lambda record: record["photograph"])]
    shown += [(name, lambda record, name=name: f"{record[name]:.2f}") for name in numbers]  # type: ignore[misc]
    print(markdown(shown, [*rows, {"photograph": "median"} | middle]), end="")
    if settings.output:
        about = provenance("eval/noise_left.py", settings.command)
        write_text(settings.output, json.dumps({"about": about, "rows": rows, "median": middle}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    return run_program(_parser(), run, arguments)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="noise_left", description="Measure the noise that models leave in photographs.")
    add = parser.add_argument
    add("--data", type=named_path, required=True, help="a folder of noisy photographs")
    add("--models", nargs="*", default=[], help="shipped names or folders, or MODEL+OTHER@SHARE; none: the noise alone")
    add("--output", type=named_path, metavar="FILE", help="where the figures are written, JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
