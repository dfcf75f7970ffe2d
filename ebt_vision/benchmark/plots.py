"""Plots of the benchmark, drawn without a display. Each function writes one PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from ebt_vision.benchmark.measure import Measured

DPI = 110
MARKERS = "osD^vP*Xhp<>"
MAX_POINTS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """Images of a model for one input: the noisy image, some steps and the clean image, each with its title."""

    condition: str
    pictures: list[tuple[str, Tensor]]
    """(title, image (3, H, W) in [0, 1])."""


def plot_cost(records: Sequence[Mapping], path: Path) -> None:
    """Plot PSNR against forward passes and against FLOPs for all models, one row of two plots per condition.

    Methods without a network are dashed lines. For several seeds the mean is drawn.
    """
    conditions = list(dict.fromkeys(record["condition"] for record in records))
    figure, axes = new_sheet(len(conditions), 2, width=5.6, height=3.9)
    colours = _colours([record["model"] for record in records])
    series = list(dict.fromkeys((record["model"], record["method"]) for record in records))
    for condition, line in zip(conditions, axes, strict=True):
        for number, (model, method) in enumerate(series):
            key = (condition, model, method)
            points = _mean_points([r for r in records if (r["condition"], r["model"], r["method"]) == key])
            style = {"color": colours[model], "label": f"{model}, {method}", "linewidth": 1.3}
            for axis, cost in zip(line, ("passes", "flops"), strict=True):
                if all(point[cost] for point in points):
                    heights = [point["psnr_image"] for point in points]
                    axis.plot([point[cost] for point in points], heights, **style, marker=_marker(number), markersize=5)
                else:
                    for point in points:
                        axis.axhline(point["psnr_image"], **style, linestyle=_dashes(number))
        for axis, name in zip(line, ("forward passes for an image", "FLOPs for an image"), strict=True):
            axis.set(xscale="log", xlabel=name, ylabel="PSNR per image, dB", title=condition)
            axis.grid(alpha=0.3)
        _label_in_plain_numbers(line[0].xaxis)
    _legend(figure, axes[0, 0])
    save_sheet(figure, path)


def plot_sweep(records: Sequence[Mapping], path: Path) -> None:
    """Plot PSNR against noise level: one plot per model, one line per number of steps, with the noisy input."""
    models = list(dict.fromkeys(record["model"] for record in records if record["method"] != "noisy input"))
    figure, axes = new_sheet(1, max(len(models), 1), width=4.6, height=3.9)
    noisy = [record for record in records if record["method"] == "noisy input"]
    for axis, model in zip(axes[0], models, strict=False):
        mine = [record for record in records if record["model"] == model]
        steps = sorted({(record["method"], record["steps"]) for record in mine})
        for number, (method, step) in enumerate(steps):
            chosen = [record for record in mine if (record["method"], record["steps"]) == (method, step)]
            shade = _shade(number / max(len(steps) - 1, 1))
            axis.plot(*_over_strength(chosen), color=shade, marker=".", label=f"{method}, {step}")
        if noisy:
            axis.plot(*_over_strength(noisy), color="grey", linestyle="--", label="noisy input")
        axis.set(xlabel="noise level", ylabel="PSNR per image, dB", title=model)
        axis.set_xticks(sorted({record["strength"] for record in records}))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    save_sheet(figure, path)


def plot_energy(measured: Sequence[Measured], path: Path) -> None:
    """Plot energy against true error, one point per image (at most MAX_POINTS), for the first and last step of each run."""
    runs = [run for run in measured if run.row.method == "thinking"]
    figure, axes = new_sheet(max((len(runs) + 2) // 3, 1), min(max(len(runs), 1), 3), width=4.2, height=3.6)
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, run in zip(axes.flat, runs, strict=False):
        every = max(len(run.indices) // MAX_POINTS, 1)
        last = len(run.row.reported) - 1
        for i, colour in dict([(0, "tab:blue"), (last, "tab:orange")]).items():
            energy, error = run.arrays["energy"][::every, i], run.arrays["mse"][::every, i]
            label = f"step {run.row.reported[i]}"
            axis.scatter(energy, error, s=6, alpha=0.5, color=colour, label=label, linewidths=0)
        axis.set_yscale("log")
        _label_in_plain_numbers(axis.yaxis)
        axis.set(xlabel="energy, mean over patches", ylabel="mean squared error, 0..255")
        axis.set_title(f"{run.row.model}\n{run.condition.title}, seed {run.condition.seed}", fontsize=9)
        axis.legend(fontsize=7)
    save_sheet(figure, path)


def plot_strips(strips: Sequence[Strip], path: Path) -> None:
    """Draw one row per strip: images with their titles."""
    columns = max(len(strip.pictures) for strip in strips)
    figure, axes = new_sheet(len(strips), columns, width=1.7, height=1.95)
    for axis in axes.flat:
        axis.axis("off")
    for strip, line in zip(strips, axes, strict=True):
        for axis, (title, image) in zip(line, strip.pictures, strict=False):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
            axis.set_title(title, fontsize=7)
        line[0].set_title(f"{strip.condition}\n{strip.pictures[0][0]}", fontsize=7)
    save_sheet(figure, path)


def _mean_points(records: Sequence[Mapping]) -> list[dict]:
    """Return one point per number of steps: the mean over seeds, in order of cost."""
    points = []
    for step in sorted({record["steps"] for record in records}):
        chosen = [record for record in records if record["steps"] == step]
        points.append({name: _mean([record[name] for record in chosen]) for name in ("passes", "flops", "psnr_image")})
    return points


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _over_strength(records: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    strengths = sorted({record["strength"] for record in records})
    means = [np.mean([record["psnr_image"] for record in records if record["strength"] == s]) for s in strengths]
    return strengths, [float(mean) for mean in means]


def new_sheet(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of plots in lines and columns, each of this size in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, fontsize=7)


def _colours(models: Sequence[str]) -> dict[str, str]:
    return {model: f"C{number % 10}" for number, model in enumerate(dict.fromkeys(models))}


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _dashes(number: int) -> tuple[int, tuple[int, int]]:
    return (0, (3 + 2 * (number % 4), 2))


def _label_in_plain_numbers(axis: Axis) -> None:
    """Place ticks at 1, 2, 5, 10, ... on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _shade(share: float) -> tuple[float, float, float]:
    """Colours from light blue to dark red, so that more steps are warmer."""
    return (0.25 + 0.6 * share, 0.55 - 0.4 * share, 0.9 - 0.75 * share)


def save_sheet(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG."""
    figure.savefig(path, dpi=DPI)
