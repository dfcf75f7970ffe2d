"""Records as tables: Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}

Column = tuple[str, Callable[[Mapping], str]]


def markdown(columns: Sequence[Column], records: Sequence[Mapping]) -> str:
    """A Markdown table."""
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[show(record).replace("|", "\\|") for _, show in columns] for record in records]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex(columns: Sequence[Column], records: Sequence[Mapping], *, caption: str = "") -> str:
    """Format a LaTeX table with booktabs rules."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(caption)}}}"] if caption else []
    lines += [rf"\begin{{tabular}}{{{'l' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(_escaped(title) for title, _ in columns) + r" \\", r"\midrule"]
    lines += [" & ".join(_escaped(show(record)) for _, show in columns) + r" \\" for record in records]
    lines += [r"\bottomrule", r"\end{tabular}"] + ([r"\end{table}"] if caption else [])
    return "\n".join(lines) + "\n"


def comma_separated(records: Sequence[Mapping]) -> str:
    """Format CSV of every field in full precision; a pair of numbers becomes NAME_low and NAME_high."""
    flat = [_flat(record) for record in records]
    names = list(dict.fromkeys(name for record in flat for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def row_columns(records: Sequence[Mapping]) -> list[Column]:
    """Return the columns of the main table; columns without any value are omitted."""
    columns: list[tuple[str, str, Callable[[Mapping], str]]] = [
        ("model", "model", lambda r: str(r["model"])),
        ("parameters", "parameters", lambda r: f"{r['parameters']:,}" if r["parameters"] else ""),
        ("method", "method", lambda r: str(r["method"])),
        ("steps", "steps", _steps),
        ("passes", "passes", lambda r: _number(r["passes"], ".4g") if r["passes"] else "0"),
        ("GFLOPs", "flops", lambda r: _number(r["flops"] and r["flops"] / 1e9, ".3g")),
        ("s/image", "seconds_per_image", lambda r: _number(r["seconds_per_image"], ".3g")),
        ("PSNR per image", "psnr_image", lambda r: with_interval(r, "psnr_image", 2)),
        ("PSNR of mean MSE", "psnr_batch", lambda r: with_interval(r, "psnr_batch", 2)),
        ("MSE", "mse", lambda r: with_interval(r, "mse", 1)),
        ("SSIM", "ssim", lambda r: with_interval(r, "ssim", 4)),
        ("LPIPS", "lpips", lambda r: with_interval(r, "lpips", 4)),
        ("energy", "energy", lambda r: with_interval(r, "energy", 3)),
        ("dB over reference", "difference", lambda r: with_interval(r, "difference", 2, sign="+")),
    ]
    return [(title, show) for title, field, show in columns if any(r.get(field) is not None for r in records)]


def spread_columns(records: Sequence[Mapping]) -> list[Column]:
    """Return the columns of the table over seeds and checkpoints: mean and spread."""
    columns: list[tuple[str, str, Callable[[Mapping], str]]] = [
        ("model", "model", lambda r: str(r["model"])),
        ("method", "method", lambda r: str(r["method"])),
        ("steps", "steps", _steps),
        ("runs", "num_runs", lambda r: str(r["num_runs"])),
        ("PSNR per image", "psnr_image", lambda r: _with_spread(r, "psnr_image", 2)),
        ("PSNR of mean MSE", "psnr_batch", lambda r: _with_spread(r, "psnr_batch", 2)),
        ("MSE", "mse", lambda r: _with_spread(r, "mse", 1)),
        ("SSIM", "ssim", lambda r: _with_spread(r, "ssim", 4)),
        ("LPIPS", "lpips", lambda r: _with_spread(r, "lpips", 4)),
        ("energy", "energy", lambda r: _with_spread(r, "energy", 3)),
    ]
    return [(title, show) for title, field, show in columns if any(r.get(field) is not None for r in records)]


def with_interval(record: Mapping, name: str, digits: int, sign: str = "") -> str:
    """Format value [low, high]; empty without a value."""
    value, pair = record.get(name), record.get(f"{name}_ci95")
    if value is None:
        return ""
    shown = f"{value:{sign}.{digits}f}"
    return shown + (f" [{pair[0]:{sign}.{digits}f}, {pair[1]:{sign}.{digits}f}]" if pair else "")


def _with_spread(record: Mapping, name: str, digits: int) -> str:
    if record[name] is None:
        return ""
    spread = record[f"{name}_spread"]
    return f"{record[name]:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def _steps(record: Mapping) -> str:
    used = record.get("steps_used")
    if used is None or used == record["steps"]:
        return str(record["steps"])
    return f"{used:.2f} used of {record['steps']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _flat(record: Mapping) -> dict:
    flat: dict = {}
    for name, value in record.items():
        if name.endswith("_ci95"):
            low, high = value or ("", "")
            flat |= {f"{name}_low": low, f"{name}_high": high}
        else:
            flat[name] = "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else value
    return flat
