"""How well the energy ranks predictions by their true error, among candidates and along the steps of thinking."""

import numpy as np

from ebt_vision.benchmark.measure import Measured, psnr_of
from ebt_vision.benchmark.rows import Row
from ebt_vision.benchmark.statistics import auroc, bootstrap_means, intervals, spearman


def verify_candidates(measured: Measured, *, num_resamples: int, seed: int) -> dict:
    """Measure how well the energy ranks the candidates of an image, within the image and across images.

    The candidates are those of a best-of-N row, or the results after each step of thinking. Gains are in dB of per-image PSNR
    over the mean candidate: for the candidate of lowest energy, and for an oracle that keeps the best. `gain_over_first` is
    over the first candidate. With best of N its start has no added noise, so it is plain thinking (without Langevin noise).
    Worse starts raise the gain over the mean, but never this gain. Each mean over images is {mean, low, high} with a 95 %
    interval. `images_ranked` is the number of images with a rank correlation (equal candidates have none).
    """
    best_of = measured.row.num_candidates > 1
    names = ("candidate_energy", "candidate_mse") if best_of else ("energy", "mse")
    energy, error = (measured.arrays[name] for name in names)  # (n, N), or (n, S)
    psnr = psnr_of(error)
    within = spearman(energy, error)
    average, oracle = psnr.mean(1), psnr.max(1)
    # Each tile chooses its own winner, so a best-of-N image need not equal one candidate.
    chosen = measured.psnr[:, 0] if best_of else psnr[np.arange(len(psnr)), energy.argmin(1)]
    means = {
        "spearman_within": within,
        "auroc_within": auroc(energy, error),
        "gain_over_mean": chosen - average,
        "gain_over_first": chosen - psnr[:, 0],
        "oracle_gain_over_mean": oracle - average,
        "spread_of_candidates": psnr.std(1),
    }
    figures = {name: _mean_with_interval(values, num_resamples, seed) for name, values in means.items()}
    return _where(measured) | {
        "method": measured.row.method if best_of else _steps(measured.row),
        "steps": measured.row.num_steps,
        "images": len(energy),
        "images_ranked": int(np.isfinite(within).sum()),
        **figures,
        "spearman_across": _number(spearman(energy.mean(1), error.mean(1))),
        "auroc_across": _number(auroc(energy.mean(1), error.mean(1))),
    }


def has_candidates(measured: Measured) -> bool:
    """Whether verify_candidates has something to rank: best of N, or thinking with several measured steps.

    The energies of a mean over copies are those of the copies, so such a row has nothing to rank.
    """
    row = measured.row
    return row.num_candidates > 1 or (row.kind == "ebt" and len(row.reported) > 1 and row.self_ensemble == 1)


def verify_thinking(measured: Measured) -> list[dict]:
    """For every step of plain thinking: whether the energy ranks images, and whether energy and PSNR change together.

    `energy_falls` is the fraction of images whose energy is lower after the next step; `psnr_falls` is the fraction whose PSNR
    is lower; `over_thinking` is the fraction with both; `over_thinking_given_fall` is this fraction among images whose energy
    falls.
    """
    energy, error, psnr = measured.arrays["energy"], measured.arrays["mse"], measured.psnr  # (n, S)
    rows = []
    for i, step in enumerate(measured.row.reported):
        row = _where(measured) | {
            "step": step,
            "spearman_across": _number(spearman(energy[:, i], error[:, i])),
            "auroc_across": _number(auroc(energy[:, i], error[:, i])),
        }
        if i + 1 < len(measured.row.reported):
            lower, worse = energy[:, i + 1] < energy[:, i], psnr[:, i + 1] < psnr[:, i]
            row |= {
                "energy_falls": float(lower.mean()),
                "psnr_falls": float(worse.mean()),
                "over_thinking": float((lower & worse).mean()),
                "over_thinking_given_fall": float(worse[lower].mean()) if lower.any() else None,
            }
        rows.append(row)
    return rows


def _steps(row: Row) -> str:
    """Return "steps 1..10", and the part of the method's name after "thinking"."""
    return f"steps {row.reported[0]}..{row.num_steps}{row.method.removeprefix('thinking')}"


def _where(measured: Measured) -> dict:
    return {"model": measured.row.model, "condition": measured.condition.title, "seed": measured.condition.seed}


def _mean_with_interval(values: np.ndarray, num_resamples: int, seed: int) -> dict | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = intervals(bootstrap_means(values[:, None], num_resamples=num_resamples, seed=seed))[:, 0]
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
