"""Merge the results of several runs of eval/denoising.py into one table.

    python eval/compare.py results/ebt results/dit/results.json --format markdown
    python eval/compare.py results/* --format latex --conditions "level 0.1" --output table.tex

Rows are refused if they were measured on different images or with different noise. Rows of several seeds become mean and
spread. CSV has every field of every row in full precision.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

from ebt_vision.benchmark.options import OneLineParser
from ebt_vision.benchmark.report import by_condition
from ebt_vision.benchmark.results import MergeError, merge_rows, read_results, select
from ebt_vision.benchmark.summary import combine
from ebt_vision.benchmark.tables import comma_separated, latex, markdown, row_columns, spread_columns
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 2 bad input."""
    settings = _parser().parse(arguments)
    try:
        text = compare(settings)
        if settings.output is None:
            print(text, end="")
        else:
            write_text(settings.output, text)
    except (ValueError, OSError) as error:
        print(f"compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def compare(settings: argparse.Namespace) -> str:
    """Return the merged table in the requested format."""
    files = {}
    for path in settings.results:
        name = str(path.parent if path.name == "results.json" else path)
        files[name] = select(read_results(path), conditions=settings.conditions, seeds=settings.seeds)
    if settings.models is not None:
        files = {name: _of_models(results, settings.models) for name, results in files.items()}
    rows = [row for row in merge_rows(files) if not row["sweep"]]
    if not rows:
        raise MergeError("no rows match; see report.md of the results for their conditions, seeds and models")
    if settings.format == "csv":
        return comma_separated(rows)
    return "\n".join(_tables(rows, settings.format))


def _tables(rows: Sequence[Mapping], form: str) -> list[str]:
    """Return a table for each condition; for several seeds with mean and spread."""
    texts = []
    several = len({row["seed"] for row in rows}) > 1
    for condition in dict.fromkeys(row["condition"] for row in rows):
        chosen = [row for row in rows if row["condition"] == condition]
        if several:
            combined = combine(chosen)
            title = f"{condition}, mean and standard deviation over seeds"
            texts.append(_table(spread_columns(combined), combined, title, form))
            continue
        for _, seed, group in by_condition(chosen):
            title = f"{condition}, seed {seed}, {group[0]['num_images']} images"
            texts.append(_table(row_columns(group), group, title, form))
    return texts


def _table(columns, rows: Sequence[Mapping], title: str, form: str) -> str:
    if form == "latex":
        return latex(columns, rows, caption=title)
    return f"## {title}\n\n{markdown(columns, rows)}"


def _of_models(results: Mapping, models: Sequence[str]) -> dict:
    return {**results, "rows": [row for row in results["rows"] if row["model"] in models]}


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="compare", description="Merge results of the denoising benchmark into one table.")
    parser.add_argument("results", nargs="+", type=named_path, help="results.json files, or folders that contain one")
    parser.add_argument("--format", choices=("markdown", "latex", "csv"), default="markdown")
    parser.add_argument("--conditions", nargs="+", help='tables to write, for example "level 0.1" (default: all)')
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), help="seeds to use (default: all)")
    parser.add_argument("--models", nargs="+", help="models to show (default: all)")
    parser.add_argument("--output", type=named_path, help="file to write (default: the screen)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
