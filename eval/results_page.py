"""Write the page of the headline results from committed results.json files.

    python eval/results_page.py --readme README.md

This command reads docs/results/data/ and writes docs/results/index.md, docs/results/headline.png and the table of the README.
The files in docs/results/data/:

    paper.json          of eval/denoising.py: the paper's protocol, levels 0.1 and 0.2
    photographs.json    of eval/denoising.py --protocol awgn, sigma 25
    paper-*.json, photographs-*.json    further models on the same noisy images, such as paper-bm3d.json
    probe-MODEL.json    of eval/linear_probe.py, one a model
    speed.json          of eval/speed.py --parts inference

A figure is "n/a" if its file is missing or if its weights are no longer shipped.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt

from ebt_vision.benchmark.headline import (
    BM3D,
    DIT,
    EBT,
    EQM,
    LEVELS,
    LINES,
    PHOTOGRAPHS,
    REGRESSOR,
    SIGMA,
    Evidence,
    Line,
    best,
    has_true_sigma,
    is_applied,
    is_descended,
    is_stopped_by_rule,
    is_thinking,
    read_evidence,
    row_for,
    rows_of,
)
from ebt_vision.benchmark.tables import markdown
from ebt_vision.core.arguments import named_path
from ebt_vision.core.atomic_files import write_text

DOCS = Path(__file__).parents[1] / "docs" / "results"
MISSING = "n/a"
MARKS = ("<!-- headline -->", "<!-- end -->")


def main(arguments: list[str] | None = None) -> int:
    """Write the page and return the exit status: 0 success, 2 bad input."""
    parser = argparse.ArgumentParser(prog="results_page", description="Write the page of the headline results.")
    parser.add_argument("--data", type=named_path, default=DOCS / "data", help="folder of the results.json files")
    parser.add_argument("--output", type=named_path, default=DOCS, help="folder of the page")
    parser.add_argument("--readme", type=named_path, help="also write the table into this file, between its two marks")
    settings = parser.parse_args(arguments)
    try:
        evidence = read_evidence(settings.data)
        settings.output.mkdir(parents=True, exist_ok=True)
        write_text(settings.output / "index.md", page(evidence))
        draw(evidence, settings.output / "headline.png")
        if settings.readme:
            write_text(settings.readme, with_headline(settings.readme.read_text(), evidence))
    except (ValueError, OSError) as error:
        print(f"results_page: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(settings.output / "index.md")
    return 0


def table(evidence: Evidence, *, short: bool = False) -> str:
    """The headline table as Markdown. The short table omits columns without a figure."""

    def psnr(strength: float) -> Callable[[Mapping], str]:
        return lambda record: _psnr(row_for(evidence.paper, record["line"], strength, record["line"].model))

    def photographs(record: Mapping) -> str:
        line: Line = record["line"]
        if line.photographs is None:
            return ""
        return _psnr(row_for(evidence.photographs, line, SIGMA, line.photographs))

    def probe(record: Mapping) -> str:
        line: Line = record["line"]
        if line.probed is None:
            return ""
        return f"{100 * evidence.probes[line.probed]['top1']:.1f} %" if line.probed in evidence.probes else MISSING

    def flops(record: Mapping) -> str:
        row = row_for(evidence.paper, record["line"], LEVELS[0], record["line"].model)
        return "" if row is None or not row["flops"] else f"{row['flops'] / 1e9:.2g}"

    def rate(record: Mapping) -> str:
        line: Line = record["line"]
        if line.rate is None:
            return ""
        return f"{evidence.rates[line.rate]:.0f}" if line.rate in evidence.rates else MISSING

    columns: list[tuple[str, Callable[[Mapping], str]]] = [
        ("", lambda record: record["line"].title),
        ("ID", psnr(LEVELS[0])),
        ("OOD", psnr(LEVELS[1])),
        ("photographs", photographs),
        ("probe", probe),
        ("GFLOPs", flops),
        ("images/s", rate),
    ]
    records = [{"line": line} for line in LINES]
    if short:
        columns = [(t, show) for t, show in columns if not t or any(show(r) not in ("", MISSING) for r in records)]
    return markdown(columns, records)


def _psnr(row: Mapping | None) -> str:
    return MISSING if row is None else f"{row['psnr_image']:.2f}"


def sentences(evidence: Evidence) -> list[str]:
    """Three findings: in distribution, out of distribution, and the comparison with the regressor."""
    known, unseen = ({line.title: row_for(evidence.paper, line, x, line.model) for line in LINES} for x in LEVELS)
    one, rule, most = "EBT, 1 step", "**EBT, stops by itself**", "EBT, best of 1 to 10 steps"
    dit, regressor, bm3d = "DiT, best number of passes", "regressor, best number of times", "BM3D, true noise level"
    needed = [known[one], unseen[one], *(rows[title] for rows in (known, unseen) for title in (rule, most, dit, regressor))]
    if None in needed:
        return ["**Not available**: paper.json is missing, or has no rows of the shipped weights for every model."]
    value = {title: (known[title], unseen[title]) for title in known if known[title] and unseen[title]}

    def at(title: str, level: int) -> float:
        row = value[title][level]
        assert row is not None
        return row["psnr_image"]

    told = f", and {_against(at(one, 0), at(bm3d, 0))} BM3D with the true noise level" if bm3d in value else ""
    loss = max(at(most, level) - at(rule, level) for level in (0, 1))
    return [
        f"**In distribution** (level 0.1): one thinking step has {at(one, 0):.2f} dB, {_against(at(one, 0), at(dit, 0))} the "
        f"DiT's best row{told}.",
        f"**Out of distribution** (level 0.2, which no model was trained on): thinking improves from {at(one, 1):.2f} dB after "
        f"one step to {at(most, 1):.2f}, {_against(at(most, 1), at(dit, 1))} the DiT's best row. The EBT decides from its own "
        "energy when to stop, without the noise level. "
        f"With this rule it is within {_up(loss)} dB of the best number of steps at both levels.",
        f"**Limitation**: an energy is not necessary for these figures. The best row of the regressor on the same trunk is "
        f"{_against(at(regressor, 0), at(most, 0))} the EBT's best at level 0.1 and "
        f"{_against(at(regressor, 1), at(most, 1))} it at level 0.2. No stopping rule that was tried works for the regressor.",
    ]


def _against(a: float, b: float) -> str:
    """Compare a with b, both in dB: "0.10 dB above", "level with"."""
    difference = round(a - b, 2)
    if abs(difference) < 0.05:
        return f"level with ({difference:+.2f} dB)"
    return f"{abs(difference):.2f} dB {'above' if difference > 0 else 'below'}"


def _up(value: float) -> str:
    return f"{max(value, 0.005):.2f}"


def page(evidence: Evidence) -> str:
    """The whole page as Markdown."""
    said = [f"{number}. {text}" for number, text in enumerate(sentences(evidence), 1)]
    parts = [
        "# Results",
        "",
        "<!-- Made by `python eval/results_page.py` from docs/results/data; edits are lost. -->",
        "",
        "Denoising with the shipped weights, PSNR in dB:",
        "",
        table(evidence),
        *said,
        "",
    ]
    if evidence.paper:
        parts += ["![PSNR against the number of steps or passes, at both noise levels](headline.png)", ""]
    parts += [_legend(evidence), "## Sources of the figures", ""]
    for name, about in evidence.sources.items():
        images = f", {about['images']:,} images" if "images" in about else ""
        made = f"commit {about['commit']}, {about['hardware']}, torch {about['torch']}, {about['date']}{images}"
        parts += [f"**{name}**: {made}.", "", f"    {_wrapped(about['command'])}", ""]
    if not evidence.sources:
        parts += ["No results.json is committed.", ""]
    missing = [name for name in ("paper.json", "photographs.json", "speed.json") if name not in evidence.sources]
    missing += [f"probe-{name}.json" for name in (EBT, DIT, REGRESSOR) if name not in evidence.probes]
    if missing:
        parts += [f"Not available: {', '.join(missing)}. See [how a figure is made](data.md).", ""]
    if evidence.left_out:
        parts += [f"Omitted, because the weights have changed: {', '.join(evidence.left_out)}.", ""]
    return "\n".join(parts)


def with_headline(text: str, evidence: Evidence) -> str:
    """Insert the table and the findings between the marks of the text. Raises ValueError without marks."""
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"the file has no marks {MARKS[0]} and {MARKS[1]}; add them where the table belongs")
    said = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences(evidence), 1))
    title = "PSNR in dB of the shipped weights. ID is the training noise level 0.1, OOD is level 0.2:"
    return f"{before}{start}\n{title}\n\n{table(evidence, short=True)}\n{said}\n{end}{after}"


def _legend(evidence: Evidence) -> str:
    lines = ["| entry | meaning |", "|---|---|"]
    images = evidence.sources.get("paper.json", {}).get("images")
    number = f", {images:,} validation images" if images else ""
    lines += [
        f"| ID | Tiny ImageNet at 64 px{number}; VP noise of level 0.1, on which all models were trained |",
        "| OOD | the same images at level 0.2, on which no model was trained |",
        f"| photographs | CBSD68, Gaussian noise of sigma {SIGMA:g}; the EBT is `{PHOTOGRAPHS}` |",
        f"| probe | top-1, logistic regression on frozen features, 200 classes of Tiny ImageNet{_fitted_on(evidence)} |",
        "| GFLOPs | matrix products and convolutions for one image of 64 px at level 0.1 |",
        "| images/s | throughput on an idle machine, from speed.json; for an EBT with the energy of the result, one more "
        "forward pass than in GFLOPs |",
        "| best | the best number of steps for each noise, selected on these test images: an upper bound |",
        f"| {MISSING} | not available: no committed file has this figure for the shipped weights |",
    ]
    if row := row_for(evidence.paper, LINES[0], LEVELS[0], EBT):
        low, high = row["psnr_image_ci95"]
        lines.append(f"| interval | 95 % over images: {low:.2f} to {high:.2f} dB for the first ID figure |")
    return "\n".join(lines) + "\n"


def _fitted_on(evidence: Evidence) -> str:
    """The number of training images of the probes, of each number that the files have."""
    numbers = sorted({about["num_train"] for name, about in evidence.sources.items() if name.startswith("probe-")})
    return f"; {' or '.join(f'{number:,}' for number in numbers)} training images" if numbers else ""


def _wrapped(command: str) -> str:
    """Wrap a command to lines that fit a narrow screen, indented as code."""
    lines, line = [], ""
    for word in command.split():
        word = f'"{word}"' if "*" in word else word
        if line and len(line) + len(word) > 84:
            lines.append(line)
            line = ""
        line += f" {word}" if line else word
    return " \\\n        ".join([*lines, line])


def draw(evidence: Evidence, path: Path) -> None:
    """Plot PSNR against steps or passes, one panel per level; draw nothing without rows."""
    if not evidence.paper:
        return
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for axis, level in zip(axes, LEVELS, strict=True):
        series = (
            ("EBT", EBT, is_thinking),
            ("regressor", REGRESSOR, is_applied),
            ("DiT, DDIM", DIT, lambda method: method == "ddim"),
            ("Equilibrium Matching", EQM, is_descended),
        )
        for label, model, method in series:
            rows = rows_of(evidence.paper, model, level, method)
            axis.plot([r["steps"] for r in rows], [r["psnr_image"] for r in rows], marker="o", markersize=3, label=label)
        if ruled := best(rows_of(evidence.paper, EBT, level, is_stopped_by_rule)):
            axis.plot(ruled["steps_used"], ruled["psnr_image"], "*", color="black", markersize=10, label="EBT, stopping rule")
        if bm3d := best(rows_of(evidence.paper, BM3D, level, has_true_sigma)):
            axis.axhline(bm3d["psnr_image"], color="gray", linestyle="--", linewidth=1, label="BM3D, true noise level")
        axis.set(xscale="log", xlabel="steps, applications or passes", title=f"level {level:g}")
    axes[0].set_ylabel("PSNR, dB")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
