"""results.json on disk: atomic writing, checked reading, and merging only of comparable rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ebt_vision.core.atomic_files import write_text

FIELDS = ("about", "protocol", "rows", "combined", "verification")


class MergeError(ValueError):
    """Rows were not measured on the same images with the same noise; the message names them and the remedy."""


def write_results(path: Path, results: Mapping) -> None:
    """Write results.json atomically."""
    write_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def read_results(path: Path) -> dict:
    """Read a results.json, or the one in a folder. Raises ValueError, in one line, for anything else."""
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); use a results.json of eval/denoising.py") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON; use a results.json of eval/denoising.py") from error
    missing = [name for name in FIELDS if not isinstance(results, dict) or name not in results]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is from another program or an older version; make it again")
    return results


def merge_rows(files: Mapping[str, Mapping]) -> list[dict]:
    """Merge the rows of several results (NAME -> results), each with its `source`, grouped by condition and seed.

    A row that several files have with the same figures (such as the noisy input) is kept once. Raises MergeError if rows of one
    condition and seed were measured on different images or noise, if two files have different conditions or seeds, and if the
    same checkpoint has different figures.
    """
    merged: dict[tuple, dict] = {}
    _check_same_conditions(files)
    first: dict[tuple, tuple[str, Mapping]] = {}
    for source, results in files.items():
        for row in results["rows"]:
            table = (row["protocol"], row["condition"], row["seed"], row["sweep"])
            other, like = first.setdefault(table, (source, row))
            for field in ("images", "noise"):
                if row[field] != like[field]:
                    raise MergeError(
                        f"{row['condition']}, seed {row['seed']}: {source} was measured on other {field} than {other}; "
                        "run both with the same --data, --limit, --img-size and --protocol"
                    )
            key = (*table, row["model"], row["hash"], row["method"], row["steps"])
            if key in merged and abs(merged[key]["mse"] - row["mse"]) > 1e-3 * row["mse"]:
                name = f"{row['model']}, {row['method']} {row['steps']}, {row['condition']}"
                there = merged[key]
                raise MergeError(
                    f"{name} has a mean error of {row['mse']:.4g} in {source} and {there['mse']:.4g} in {there['source']}; "
                    "remove one of the files"
                )
            merged.setdefault(key, {"source": source, **row})
    order = list(first)
    return sorted(merged.values(), key=lambda r: order.index((r["protocol"], r["condition"], r["seed"], r["sweep"])))


def _check_same_conditions(files: Mapping[str, Mapping]) -> None:
    """Check that every model met the same conditions, so that the table is fair; sweeps, which are only plotted, are
    ignored."""
    met = {
        source: {(row["protocol"], row["condition"], row["seed"]) for row in results["rows"] if not row["sweep"]}
        for source, results in files.items()
    }
    everything = set().union(*met.values())
    for source, conditions in met.items():
        if lacking := sorted(everything - conditions):
            protocol, condition, seed = lacking[0]
            raise MergeError(
                f"{source} has no rows for {protocol} {condition}, seed {seed}, which another file has; "
                "run it there too, or exclude it with --conditions and --seeds"
            )


def select(results: Mapping, *, conditions: Sequence[str] | None, seeds: Sequence[int] | None) -> dict:
    """Return the results with only the rows of some conditions and seeds; None keeps all."""
    rows = [
        row
        for row in results["rows"]
        if (conditions is None or row["condition"] in conditions) and (seeds is None or row["seed"] in seeds)
    ]
    return {**results, "rows": rows}
