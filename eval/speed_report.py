"""The tables of eval/speed.py, as Markdown."""

from typing import Any

from ebt_vision.benchmark.time_profile import KINDS
from ebt_vision.benchmark.timing import Timing


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    about = results["about"]
    made = ", ".join([f"commit {about['commit']}", about["hardware"], f"{about['threads']} threads", f"torch {about['torch']}"])
    lines = [
        "# Speed",
        "",
        f"    {about['command']}",
        "",
        f"{made}, {about['date']}. Medians; ± is half the quartile distance.",
        "",
    ]
    for part, found in results["parts"].items():
        lines += [f"## {part}", ""]
        lines += _generation_table(found) if part == "generation" else _table(found)
        lines += [""]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    unit = found["unit"]
    lines = [f"The machine's matrix rate in these rounds: {found['matrix_rate'] / 1e9:,.1f} GFLOP/s.", ""]
    lines += [
        f"| version | {unit}/s | times the first | s per call | first call, s | MFLOPs of one | of the matrix rate | memory |"
    ]
    lines += ["|" + "---|" * 8]
    for row in (Timing(**row) for row in found["rows"]):
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB"
        times = f"{row.seconds:.4f} ± {row.spread:.4f} | {row.first_seconds:.1f}"
        work = f"{row.flops_per_unit / 1e6:,.1f} | {100 * row.share_of_matrix_rate:.0f} %"
        lines.append(f"| {row.name} | {row.rate:,.1f} | {row.ratio:.2f} | {times} | {work} | {peak} |")
    return lines + _profile_table(found.get("profile", {}))


def _profile_table(profile: dict[str, dict[str, float]]) -> list[str]:
    """Return the time fractions of the calls; empty without profiles."""
    if not profile:
        return []
    lines = ["", f"| share of the time | {' | '.join(KINDS)} |", "|" + "---|" * (1 + len(KINDS))]
    return lines + [
        f"| {name} | {' | '.join(f'{100 * shares[kind]:.0f} %' for kind in KINDS)} |" for name, shares in profile.items()
    ]


def _generation_table(found: dict[str, Any]) -> list[str]:
    lines = ["| tokens | with the cache, s | recomputing, s | ratio |", "|---|---|---|---|"]
    return lines + [
        f"| {row['tokens']} | {row['cache_seconds']:.2f} | {row['recomputing_seconds']:.2f} | {row['ratio']:.2f} |"
        for row in found["rows"]
    ]
