"""The figures of the page of headline results: read from results.json files, and selected for each line of the table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebt_vision.benchmark.results import read_results
from ebt_vision.models.checkpoint import checkpoint_hash, list_pretrained
from ebt_vision.probing.load import load_extractor

EBT, DIT, REGRESSOR, BM3D = "tiny_imagenet_ebt", "tiny_imagenet_dit", "tiny_imagenet_regressor", "bm3d"
EQM = "tiny_imagenet_eqm"
PHOTOGRAPHS = "photographs_ebt"
LEVELS, SIGMA = (0.1, 0.2), 25.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The figures of the shipped weights from the committed files; a missing file is empty."""

    paper: Sequence[Mapping]
    """Rows of paper.json."""
    photographs: Sequence[Mapping]
    """Rows of photographs.json."""
    probes: Mapping[str, Mapping]
    """Model -> its best row by logistic regression."""
    rates: Mapping[str, float]
    """Row of speed.json -> images per second."""
    sources: Mapping[str, Mapping]
    """File -> its provenance."""
    left_out: Sequence[str]
    """Figures of weights that are no longer shipped."""


def read_evidence(folder: Path) -> Evidence:
    """Read the existing files. Raises ValueError for a file that is not a results.json."""
    sources: dict[str, Mapping] = {}
    left_out: list[str] = []
    tables: dict[str, list[Mapping]] = {"paper": [], "photographs": []}
    for name in tables:
        for path in [p for p in (folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))) if p.exists()]:
            results = read_results(path)
            sources[path.name] = results["about"] | {"images": results["protocol"]["num_images"]}
            rows = [row for row in results["rows"] if not row["sweep"]]
            shipped = {model: _is_shipped(model, weights) for model, weights in {(r["model"], r["hash"]) for r in rows}}
            tables[name] += [row for row in rows if shipped[row["model"]]]
            left_out += [f"{model} in {path.name}" for model, same in sorted(shipped.items()) if not same]
        _check_one_rule(f"{name}.json", tables[name])
        _check_same_images(f"{name}.json", tables[name])
    probes: dict[str, Mapping] = {}
    for path in sorted(folder.glob("probe-*.json")):
        results = _read_json(path, "about", "validation")
        model = results["about"]["model"]
        if load_extractor(model).identity != results["about"]["weights"]:
            left_out.append(f"{model} in {path.name}")
            continue
        sources[path.name] = results["about"] | {"images": results["about"]["num_val"]}
        logistic = [row for row in results["validation"] if row["head"] == "logistic"]
        probes[model] = max(logistic, key=lambda row: row["held_out_top1"])
    rates: dict[str, float] = {}
    if (folder / "speed.json").exists():
        results = _read_json(folder / "speed.json", "about", "parts")
        sources["speed.json"] = results["about"]
        rates = {row["name"]: row["rate"] for row in results["parts"].get("inference", {}).get("rows", [])}
    return Evidence(
        paper=tables["paper"],
        photographs=tables["photographs"],
        probes=probes,
        rates=rates,
        sources=sources,
        left_out=left_out,
    )


def _check_one_rule(file: str, rows: Sequence[Mapping]) -> None:
    """Raise ValueError if a model has more than one stopping rule; the page does not choose among rules."""
    rules: dict[str, set[str]] = {}
    for row in rows:
        if is_stopped_by_rule(row["method"]):
            rules.setdefault(row["model"], set()).add(row["method"])
    for model, methods in rules.items():
        if len(methods) > 1:
            raise ValueError(
                f"{file} has {len(methods)} stopping rules of {model}; run it with only the model's suggested tolerance"
            )


def _check_same_images(file: str, rows: Sequence[Mapping]) -> None:
    """Raise ValueError if the rows of one noise were not measured on the same noisy images."""
    seen: dict[str, set[tuple]] = {}
    for row in rows:
        seen.setdefault(str(row.get("condition")), set()).add((row.get("images"), row.get("noise")))
    for condition, measured in seen.items():
        if len(measured) > 1:
            raise ValueError(
                f"{file} and its further files have other images or noise at {condition}; measure them on the same"
            )


def _read_json(path: Path, *fields: str) -> dict:
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON; copy the program's results.json again") from error
    if missing := [name for name in fields if name not in results]:
        raise ValueError(f"{path} has no {', '.join(missing)}: another program wrote it; copy the right results.json")
    return results


def _is_shipped(model: str, weights: str | None) -> bool:
    """Whether these weights are shipped; always true for methods without weights."""
    return weights is None or (model in list_pretrained() and checkpoint_hash(model) == weights)


def rows_of(rows: Sequence[Mapping], model: str, strength: float, method: Callable[[str], bool]) -> list[Mapping]:
    """The rows of a model at one noise strength whose method is accepted, sorted by number of steps."""
    found = [r for r in rows if r["model"] == model and r["strength"] == strength and method(r["method"])]
    return sorted(found, key=lambda row: row["steps"])


def best(rows: Sequence[Mapping]) -> Mapping | None:
    """The row of highest PSNR, or None."""
    return max(rows, key=lambda row: row["psnr_image"], default=None)


def is_thinking(method: str) -> bool:
    return method == "thinking"


def is_stopped_by_rule(method: str) -> bool:
    return method.startswith("thinking, tolerance")


def is_sampled(method: str) -> bool:
    return method in ("x0", "ddim")


def is_applied(method: str) -> bool:
    return method == "applied"


def is_descended(method: str) -> bool:
    return method == "descent"


def has_true_sigma(method: str) -> bool:
    return method == "told sigma"


def is_noisy_input(method: str) -> bool:
    return method == "noisy input"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of the table: a model and the rows that it may use."""

    title: str
    model: str
    method: Callable[[str], bool]
    steps: int | None = None
    """Use only this number of steps; None uses the best number for each noise."""
    probed: str | None = None
    rate: str | None = None
    """The row of speed.json."""
    photographs: str | None = None
    """The model for the photographs column."""


LINES = (
    Line(title="**EBT, stops by itself**", model=EBT, method=is_stopped_by_rule, probed=EBT, photographs=PHOTOGRAPHS),
    Line(title="EBT, 1 step", model=EBT, method=is_thinking, steps=1, rate="EBT, 1 step", photographs=PHOTOGRAPHS),
    Line(title="EBT, best of 1 to 10 steps", model=EBT, method=is_thinking, photographs=PHOTOGRAPHS),
    Line(title="DiT, DDIM, 100 passes", model=DIT, method=is_sampled, steps=100, probed=DIT, rate="DiT, DDIM, 100 passes"),
    Line(title="DiT, best number of passes", model=DIT, method=is_sampled),
    Line(title="regressor, once", model=REGRESSOR, method=is_applied, steps=1, probed=REGRESSOR, rate="regressor, once"),
    Line(title="regressor, best number of times", model=REGRESSOR, method=is_applied),
    Line(title="Equilibrium Matching, best number of steps", model=EQM, method=is_descended),
    Line(title="BM3D, true noise level", model=BM3D, method=has_true_sigma, photographs=BM3D),
    Line(title="noisy input", model="identity", method=is_noisy_input, photographs="identity"),
)


def row_for(rows: Sequence[Mapping], line: Line, strength: float, model: str) -> Mapping | None:
    """The row for a line of the table, or None."""
    found = rows_of(rows, model, strength, line.method)
    return best([row for row in found if line.steps in (None, row["steps"])])
