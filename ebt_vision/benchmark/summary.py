"""The rows of results.json from the figures of every image: means with intervals, differences to a reference, spreads."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from ebt_vision.benchmark.measure import Measured, psnr_of
from ebt_vision.benchmark.statistics import bootstrap_means, intervals, mean_and_spread

METRICS = ("mse", "ssim", "lpips", "energy")
SPREAD_METRICS = ("psnr_image", "psnr_batch", "mse", "ssim", "lpips", "energy", "passes", "flops", "steps_used")


def summarise(
    measured: Sequence[Measured], *, image_hash: str, reference: str | None, num_resamples: int, seed: int
) -> list[dict]:
    """Return a record for every reported step of every run; records of a condition are compared with its reference.

    `reference` is MODEL:METHOD:STEPS. None uses the best ddim row of the DiT, or no reference if there is none. Raises
    ValueError for a reference that no condition has.
    """
    groups: dict[tuple, list[Measured]] = defaultdict(list)
    for run in measured:
        groups[run.condition, run.sweep].append(run)
    records = []
    for runs in groups.values():
        records += _condition_records(runs, image_hash, reference, num_resamples, seed)
    if reference and records and not any(record["reference"] for record in records):
        known = ", ".join(sorted({name_of(record) for record in records}))
        raise ValueError(f"--reference {reference} is not a row of this run; the rows are: {known}")
    return records


def name_of(record: Mapping) -> str:
    """MODEL:METHOD:STEPS."""
    return f"{record['model']}:{record['method']}:{record['steps']}"


def _condition_records(
    runs: list[Measured], image_hash: str, reference: str | None, num_resamples: int, seed: int
) -> list[dict]:
    columns = [(run, i) for run in runs for i in range(len(run.row.reported))]
    records = [_record(run, i, image_hash) for run, i in columns]
    values = {name: np.stack([run.arrays[name][:, i] for run, i in columns], axis=1) for name in METRICS}  # (n, rows)
    values["psnr_image"] = psnr_of(values["mse"])
    resampled = {name: bootstrap_means(array, num_resamples=num_resamples, seed=seed) for name, array in values.items()}
    for name, means in resampled.items():
        for record, pair in zip(records, intervals(means).T, strict=True):
            record[f"{name}_ci95"] = _pair(pair)
    for record, pair in zip(records, intervals(psnr_of(resampled["mse"])).T, strict=True):
        record["psnr_batch_ci95"] = _pair(pair)
    place = _reference_place(records, runs, reference)
    for record, column, means in zip(records, values["psnr_image"].T, resampled["psnr_image"].T, strict=True):
        record |= {"reference": None, "difference": None, "difference_ci95": None}
        if place is not None:
            record["reference"] = name_of(records[place])
            record["difference"] = float((column - values["psnr_image"][:, place]).mean())
            record["difference_ci95"] = _pair(intervals((means - resampled["psnr_image"][:, place])[:, None])[:, 0])
    return records


def _record(run: Measured, i: int, image_hash: str) -> dict:
    arrays, condition = run.arrays, run.condition
    means = {name: _mean(arrays[name][:, i]) for name in METRICS}
    flops = _mean(arrays["flops"][:, i])
    whole = _mean(arrays["flops"][:, -1]) if run.row.reported[-1] == run.row.num_steps else None
    share = flops / whole if flops and whole else 1.0
    return {
        "model": run.row.model,
        "hash": run.model_hash,
        "parameters": run.parameters,
        "protocol": condition.protocol,
        "condition": condition.title,
        "strength": condition.strength,
        "clipped": condition.clipped,
        "seed": condition.seed,
        "sweep": run.sweep,
        "method": run.row.method,
        "steps": run.row.reported[i],
        "candidates": run.row.num_candidates,
        "steps_used": float(arrays["steps_used"].mean()) if run.row.tolerance is not None else float(run.row.reported[i]),
        "passes": float(arrays["passes"][:, i].mean()),
        "flops": flops,
        "seconds_per_image": float(arrays["seconds"].mean() * share),
        "psnr_image": float(run.psnr[:, i].mean()),
        "psnr_batch": float(psnr_of(arrays["mse"][:, i].mean())),
        **means,
        "num_images": len(run.indices),
        "images": image_hash if not run.sweep else f"{image_hash}, {len(run.indices)} of them",
        "noise": condition.noise_hash,
    }


def _reference_place(records: list[dict], runs: list[Measured], reference: str | None) -> int | None:
    if reference is not None:
        return next((i for i, record in enumerate(records) if name_of(record) == reference), None)
    dits = {run.row.model for run in runs if run.row.kind == "dit"}
    rows = [i for i, record in enumerate(records) if record["model"] in dits and record["method"] == "ddim"]
    return max(rows, key=lambda i: records[i]["psnr_image"], default=None)


def combine(records: Sequence[Mapping], groups: Mapping[str, Sequence[str]] | None = None) -> list[dict]:
    """Return means and spreads over the seeds of the noise and over the checkpoints of a group (NAME -> models).

    A model of a group counts only under the name of the group. Only rows with several runs are returned, in order of
    appearance. A spread is the standard deviation over runs (divisor n - 1).
    """
    group_of = {model: name for name, models in (groups or {}).items() for model in models}
    runs: dict[tuple, list[Mapping]] = defaultdict(list)
    for record in records:
        name = group_of.get(record["model"], record["model"])
        runs[name, record["condition"], record["sweep"], record["method"], record["steps"]].append(record)
    combined = []
    for (name, condition, sweep, method, steps), members in runs.items():
        if len(members) < 2:
            continue
        row = {
            "model": name,
            "condition": condition,
            "sweep": sweep,
            "method": method,
            "steps": steps,
            "num_runs": len(members),
            "seeds": sorted({member["seed"] for member in members}),
            "members": sorted({member["model"] for member in members}),
        }
        for metric in SPREAD_METRICS:
            found = [member[metric] for member in members]
            whole = all(value is not None for value in found)
            row[metric], row[f"{metric}_spread"] = mean_and_spread(np.asarray(found)) if whole else (None, None)
        combined.append(row)
    return combined


def per_image_columns(measured: Sequence[Measured], names: Sequence[str]) -> dict[str, list | np.ndarray]:
    """Return the columns of a table with one line per image and row; `names` are the names of the images."""
    columns: dict[str, list] = defaultdict(list)
    for run in measured:
        count = len(run.indices)
        for i, step in enumerate(run.row.reported):
            columns["model"] += [run.row.model] * count
            columns["condition"] += [run.condition.title] * count
            columns["seed"] += [run.condition.seed] * count
            columns["sweep"] += [run.sweep] * count
            columns["method"] += [run.row.method] * count
            columns["steps"] += [step] * count
            columns["image"] += run.indices
            columns["name"] += [names[index] for index in run.indices]
            columns["psnr"].append(run.psnr[:, i])
            for name in METRICS:
                columns[name].append(run.arrays[name][:, i])
            used = run.arrays["steps_used"] if run.row.tolerance is not None else np.full(count, float(step))
            columns["steps_used"].append(used)
    numeric = ("psnr", *METRICS, "steps_used")
    return {name: np.concatenate(column) if name in numeric else column for name, column in columns.items()}


def candidate_columns(measured: Sequence[Measured]) -> dict[str, list | np.ndarray]:
    """Return the columns of a table with one line per candidate, image and best-of-N row; empty without such rows."""
    columns: dict[str, list] = defaultdict(list)
    for run in measured:
        if "candidate_mse" not in run.arrays:
            continue
        count, num_candidates = run.arrays["candidate_mse"].shape
        columns["model"] += [run.row.model] * count * num_candidates
        columns["condition"] += [run.condition.title] * count * num_candidates
        columns["seed"] += [run.condition.seed] * count * num_candidates
        columns["steps"] += [run.row.num_steps] * count * num_candidates
        columns["image"] += [index for index in run.indices for _ in range(num_candidates)]
        columns["candidate"] += list(range(num_candidates)) * count
        columns["mse"].append(run.arrays["candidate_mse"].ravel())
        columns["energy"].append(run.arrays["candidate_energy"].ravel())
    return {name: np.concatenate(column) if name in ("mse", "energy") else column for name, column in columns.items()}


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).any() else float(values.mean())


def _pair(pair: np.ndarray) -> list[float] | None:
    return None if np.isnan(pair).any() else [float(pair[0]), float(pair[1])]
