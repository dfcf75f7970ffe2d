"""The results of a scaling study as records, report.md and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ebt_vision.benchmark.plots import MARKERS, new_sheet, save_sheet
from ebt_vision.benchmark.scaling_fit import NUM_PARAMETERS, Fit, Law, Ratio, fit_law, ratio_of_rates
from ebt_vision.benchmark.scaling_grid import SIZE_AXES, Point, name_of
from ebt_vision.benchmark.tables import Column, markdown

Results = Mapping[Point, Mapping[str, Any]]
X_NAMES = {
    "width": "parameters, by width",
    "depth": "parameters, by depth",
    "data": "training data",
    "batch": "samples an update",
    "updates": "updates",
    "flops": "training FLOPs",
}
H100_PEAK = 989e12
"""Published dense bfloat16 FLOPs/s of one GPU."""


def curves(by_axis: Mapping[str, Sequence[Point]], results: Results) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Axis -> family -> its points (x, error), smallest x first. Runs without an error are left out.

    The axis "flops" holds the runs of SIZE_AXES, each once.
    """
    known = {axis: list(points) for axis, points in by_axis.items()}
    if sized := dict.fromkeys(point for axis in SIZE_AXES for point in known.get(axis, ())):
        known["flops"] = list(sized)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for axis, points in known.items():
        for point in points:
            result = results[point]
            pairs = found.setdefault(axis, {}).setdefault(point.family, [])
            if result["error"] is not None:
                pairs.append((_x(axis, point, result), result["error"]))
        for pairs in found.get(axis, {}).values():
            pairs.sort()
    return found


def _x(axis: str, point: Point, result: Mapping[str, Any]) -> float:
    if axis in ("width", "depth"):
        return float(result["parameters"])
    if axis == "flops":
        return float(result["training_flops"])
    return float(getattr(point, axis)) or 1.0  # data=0 is all of a text


def fits_of(
    found: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, num_resamples: int, seed: int
) -> tuple[list[dict], list[dict], dict[tuple[str, str, Law], Fit]]:
    """(records of fits, records of ratios of the first family's rate to each other one's, the fits by axis, family, law)."""
    fits: dict[tuple[str, str, Law], Fit] = {}
    for axis, families in found.items():
        for number, (family, pairs) in enumerate(families.items()):
            for law in NUM_PARAMETERS:
                if len({x for x, _ in pairs}) >= NUM_PARAMETERS[law]:
                    own = seed + number  # so that two families' draws are independent
                    costs, errors = [x for x, _ in pairs], [error for _, error in pairs]
                    fits[axis, family, law] = fit_law(costs, errors, law, num_resamples=num_resamples, seed=own)
    records = [
        {"axis": axis, "family": family, "law": law, "a": fit.a, "a_ci95": fit.a_ci95, "b": fit.b, "c": fit.c}
        | {"c_ci95": fit.c_ci95, "num_points": fit.num_points, "rms_residual": fit.rms_residual}
        for (axis, family, law), fit in fits.items()
    ]
    ratios = []
    for axis, families in found.items():
        first, *others = families
        for other in others:
            for law in NUM_PARAMETERS:
                pair = (fits.get((axis, first, law)), fits.get((axis, other, law)))
                ratio: Ratio | None = None if pair[0] is None or pair[1] is None else ratio_of_rates(pair[0], pair[1])
                value, interval = (None, None) if ratio is None else (ratio.value, ratio.ci95)
                ratios.append(
                    {"axis": axis, "family": first, "baseline": other, "law": law, "ratio": value, "ratio_ci95": interval}
                    | {"verdict": _verdict(ratio)}
                )
    return records, ratios, fits


def _verdict(ratio: Ratio | None) -> str:
    if ratio is None:
        return "no rate to compare with"
    if ratio.ci95 is None:
        return "undecided: no interval"
    low, high = ratio.ci95
    return "faster" if low > 1 else "slower" if high < 1 else "undecided: the interval holds 1"


def report(results: Mapping[str, Any]) -> str:
    """Return the text of report.md for a results.json."""
    about, grid = results["about"], results["grid"]
    error = grid["error"]
    lines = ["# Scaling study", "", f"Error: {error}.", ""]
    lines += ["## Rate against the baselines", ""]
    lines += [
        "The rate is the exponent c of an axis; the ratio is the first family's over the baseline's. 1.35 is 35 % faster."
    ]
    lines += ["Intervals are 95 %, of a residual bootstrap.", ""]
    columns: list[Column] = [
        ("axis", lambda r: r["axis"]),
        ("baseline", lambda r: r["baseline"]),
        ("law", lambda r: LAW_NAMES[r["law"]]),
        ("ratio of rates", lambda r: _with_interval(r["ratio"], r["ratio_ci95"])),
        ("what the interval says", lambda r: f"{r['family']} {r['verdict']}"),
    ]
    lines += [markdown(columns, results["ratios"]), "## Fits", ""]
    columns = [
        ("axis", lambda r: f"{r['axis']} ({X_NAMES[r['axis']]})"),
        ("family", lambda r: r["family"]),
        ("law", lambda r: LAW_NAMES[r["law"]]),
        ("exponent c", lambda r: _with_interval(r["c"], r["c_ci95"])),
        ("floor a", lambda r: "" if r["law"] == "power" else _with_interval(r["a"], r["a_ci95"])),
        ("points", lambda r: str(r["num_points"])),
        ("residual, %", lambda r: f"{100 * r['rms_residual']:.2f}"),
    ]
    lines += [markdown(columns, results["fits"]), "![the points and the fits](scaling.png)", "", "## Learning rates", ""]
    lines += ["Tuned for each family at the base size with the first seed, the same for all its runs."]
    edge = [family for family, rate in results["tuning"]["chosen"].items() if rate in _ends(grid["lrs"])]
    if edge:
        lines += [f"The best one of {', '.join(edge)} is at the end of those tried: wider --lrs may change it."]
    columns = [("family", lambda r: r["family"]), ("lr", lambda r: f"{r['lr']:g}"), ("error", lambda r: _number(r["error"]))]
    lines += ["", markdown(columns, results["tuning"]["runs"]), "## Runs", ""]
    columns = [
        ("run", lambda r: r["name"]),
        ("parameters", lambda r: f"{r['parameters']:,}"),
        ("training FLOPs", lambda r: f"{r['training_flops']:.3g}"),
        ("seconds", lambda r: "" if r["seconds"] is None else f"{r['seconds']:,.0f}"),
        ("error", lambda r: _number(r["error"])),
    ]
    cost = results["cost"]
    lines += [markdown(columns, results["runs"]), "## Cost", ""]
    lines += [
        f"All runs, tuning included: {cost['flops']:.3g} FLOPs of products, {cost['seconds']:,.0f} s (resumed runs aside).",
        f"Assuming {cost['share']:.0%} of the {H100_PEAK / 1e12:,.0f} TFLOP/s of an H100: "
        f"{_duration(cost['hours_h100'])} on one, {_duration(cost['hours_8_h100'])} on eight with runs side by side. "
        "Small networks reach less than that share.",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['hardware']}, torch {about['torch']}, {about['date']}.",
        "",
    ]
    return "\n".join(lines)


LAW_NAMES: dict[Law, str] = {"power": "b C^-c", "saturating": "a + b C^-c"}


def plot_scaling(
    found: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], fits: Mapping[tuple[str, str, Law], Fit], path: Path
) -> None:
    """Plot the error against each axis, both logarithmic: points, the pure power law (dashed), the law with a floor (solid)."""
    figure, axes = new_sheet((len(found) + 2) // 3, min(len(found), 3), width=4.4, height=3.6)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, families) in zip(axes.flat, found.items(), strict=False):
        for number, (family, pairs) in enumerate(families.items()):
            if pairs:
                _draw(axis, number, family, pairs, {law: fits.get((name, family, law)) for law in NUM_PARAMETERS})
        axis.set(xscale="log", yscale="log", xlabel=X_NAMES[name], ylabel="error", title=name)
        axis.grid(alpha=0.3, which="both")
        for side in (axis.xaxis, axis.yaxis):  # plain numbers; between the powers of ten only where there are few
            low, high = side.get_view_interval()
            side.set_minor_formatter(StrMethodFormatter("{x:g}") if high < 30.0 * low else NullFormatter())
            side.set_major_formatter(StrMethodFormatter("{x:g}"))
            side.set_minor_locator(LogLocator(subs=(2.0, 5.0) if high > 2.0 * low else (1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
        axis.legend(fontsize=7)
    save_sheet(figure, path)


def _draw(axis: Axes, number: int, family: str, pairs: Sequence[tuple[float, float]], fits: Mapping[Law, Fit | None]) -> None:
    x, y = np.asarray(pairs).T
    axis.plot(x, y, MARKERS[number], color=f"C{number}", markersize=5, label=family)
    fine = np.geomspace(x.min(), x.max(), 50)
    for law, style in {"power": "--", "saturating": "-"}.items():
        if fit := fits.get(law):  # type: ignore[call-overload]
            axis.plot(fine, fit.predict(fine), style, color=f"C{number}", linewidth=1.0)


def run_records(points: Sequence[Point], results: Results) -> list[dict]:
    """Return a record for every run."""
    return [{"name": name_of(point), "family": point.family, **results[point]} for point in points]


def cost_of(results: Sequence[Mapping[str, Any]], share: float) -> dict[str, float]:
    """Return the cost of the runs here, and on GPUs that reach `share` of their peak."""
    flops = float(sum(result["training_flops"] for result in results))
    hours = flops / (share * H100_PEAK) / 3600.0
    seconds = float(sum(result["seconds"] or 0.0 for result in results))
    return {"flops": flops, "seconds": seconds, "share": share, "hours_h100": hours, "hours_8_h100": hours / 8.0}


def _ends(values: Sequence[float]) -> set[float]:
    return {min(values), max(values)} if len(set(values)) > 1 else set()


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return ""
    return _short(value) + ("" if interval is None else f" [{_short(interval[0])}, {_short(interval[1])}]")


def _short(value: float) -> str:
    """Three digits; a floor that the fit left at almost nothing is 0."""
    return "0" if abs(value) < 1e-6 else f"{value:.3g}"


def _duration(hours: float) -> str:
    if hours >= 1.0:
        return f"{hours:,.1f} h"
    return f"{60.0 * hours:.3g} min" if hours >= 1.0 / 60.0 else f"{3600.0 * hours:.2g} s"


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.5g}"
