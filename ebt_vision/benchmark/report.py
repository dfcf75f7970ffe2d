"""report.md: all contents of results.json as tables."""

from collections.abc import Mapping, Sequence

from ebt_vision.benchmark.tables import Column, markdown, row_columns, spread_columns

MEASURES = {
    "paper": "VP noise on [-1, 1], linear betas 1e-4..0.02; outputs clamped to 0..255, not rounded.",
    "awgn": "y = x + N(0, sigma/255), numpy's RandomState(seed) again for every image; outputs clamped, rounded to 8 bit.",
    "camera": "Noise as the noise reduction of a camera leaves it, 8-bit input; outputs clamped, rounded to 8 bit.",
    "real": "Photographs with real camera noise, and clean photographs of the same scenes; outputs clamped, rounded to 8 bit.",
    "ood": "One fixed strength per corruption, drawn from (seed, image); outputs clamped, rounded to 8 bit.",
}
CLIPPED = "The noisy input is clipped and rounded to 8 bits; not comparable with rows on float input."
FLOAT = "The noisy input is float and not clipped."
NOTES = """\
- **PSNR per image** is the mean over images of the PSNR. **PSNR of mean MSE** is the PSNR of the mean error over all images, as
  in the paper. RGB, data range 255, float64; an image without error counts as 100 dB.
- **SSIM**: 11x11 Gaussian window of sigma 1.5, valid area, mean over the channels (kornia).
- **Passes** through the network: one for each step of an EBT (with its gradient), one for each forward pass of other models. If
  the last energy decides (best of N, tolerance), its pass counts too. With tiles, passes are per tile.
- **FLOPs** by torch.utils.flop_counter: 2 for a multiply-add, including the gradient with respect to the input, over all tiles.
- **Seconds** of a step before the last one are the time of the run, divided in proportion to FLOPs.
- **[a, b]** is a 95 % bootstrap interval over images. **Energies** are means over patches.
"""


def report(results: Mapping, plots: Sequence[str] = ()) -> str:
    """Write the results as Markdown; `plots` are file names next to the report."""
    about, protocol = results["about"], results["protocol"]
    kinds = [MEASURES[protocol["name"]]]
    if protocol["name"] in ("awgn", "ood"):
        kinds.append(CLIPPED if protocol["clipped"] else FLOAT)
    seeds = " ".join(map(str, protocol["seeds"]))
    lines = [
        f"# Denoising, {protocol['name']} protocol",
        "",
        f"{protocol['num_images']} images ({protocol['images']}), seed {seeds}, commit {about['commit']}, {about['hardware']}, "
        f"torch {about['torch']}, {about['date']}.",
        "",
        f"    {about['command']}",
        "",
        " ".join(kinds),
        "",
        NOTES,
        f"LPIPS: {protocol['lpips']}.",
    ]
    lines += [f"Excluded from every row: {name}." for name in protocol["left_out"]]
    lines += _rows(results) + _combined(results) + _verification(results)
    lines += [text for name in plots for text in ("", f"![{name}]({name})")]
    return "\n".join(lines).rstrip() + "\n"


def _rows(results: Mapping) -> list[str]:
    lines = []
    for condition, seed, records in by_condition([row for row in results["rows"] if not row["sweep"]]):
        reference = records[0]["reference"]
        against = f" Differences are of per-image PSNR to {reference}, paired." if reference else ""
        lines += ["", f"## {condition}, seed {seed}", "", f"{records[0]['num_images']} images.{against}", ""]
        lines.append(markdown(row_columns(records), records))
    return lines


def _combined(results: Mapping) -> list[str]:
    lines: list[str] = []
    rows = [row for row in results["combined"] if not row["sweep"]]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        chosen = [row for row in rows if row["condition"] == condition]
        lines += ["", f"## {condition}: mean ± standard deviation over seeds and checkpoints", ""]
        lines.append(markdown(spread_columns(chosen), chosen))
    return lines


def _verification(results: Mapping) -> list[str]:
    candidates, thinking = results["verification"]["candidates"], results["verification"]["thinking"]
    lines: list[str] = []
    where: list[Column] = [
        ("model", lambda r: r["model"]),
        ("condition", lambda r: r["condition"]),
        ("seed", lambda r: str(r["seed"])),
    ]
    if candidates:
        lines += ["", "## Does the energy rank candidates?", ""]
        lines += ["Gains are in dB of per-image PSNR, over the mean candidate unless stated otherwise; the oracle keeps the"]
        lines += [
            "candidate of lowest error. The first of N candidates starts without added noise: it is plain thinking. Under"
        ]
        lines += [
            '"steps", the candidates are the results after each thinking step: can the energy tell when to stop?',
            "",
        ]
        columns: list[Column] = [
            *where,
            ("method", lambda r: r["method"]),
            ("steps", lambda r: str(r["steps"])),
            ("Spearman within an image", lambda r: _interval(r["spearman_within"])),
            ("AUROC within", lambda r: _interval(r["auroc_within"])),
            ("gain of the lowest energy", lambda r: _interval(r["gain_over_mean"])),
            ("over the first candidate", lambda r: _interval(r["gain_over_first"])),
            ("gain of the oracle", lambda r: _interval(r["oracle_gain_over_mean"])),
            ("spread of candidates, dB", lambda r: _interval(r["spread_of_candidates"])),
            ("Spearman across images", lambda r: _share(r["spearman_across"])),
            ("AUROC across", lambda r: _share(r["auroc_across"])),
        ]
        lines.append(markdown(columns, candidates))
    if thinking:
        lines += ["", "## Do further steps help? Energy and PSNR from each step to the next", ""]
        columns = [
            *where,
            ("from step", lambda r: str(r["step"])),
            ("energy falls", lambda r: _share(r.get("energy_falls"))),
            ("PSNR falls", lambda r: _share(r.get("psnr_falls"))),
            ("both: over-thinking", lambda r: _share(r.get("over_thinking"))),
            ("PSNR falls where energy does", lambda r: _share(r.get("over_thinking_given_fall"))),
            ("Spearman across images", lambda r: _share(r["spearman_across"])),
            ("AUROC across", lambda r: _share(r["auroc_across"])),
        ]
        lines.append(markdown(columns, thinking))
    return lines


def by_condition(records: Sequence[Mapping]) -> list[tuple[str, int, list[Mapping]]]:
    """Return (condition, seed, its records), in order of appearance."""
    keys = dict.fromkeys((record["condition"], record["seed"]) for record in records)
    return [(*key, [r for r in records if (r["condition"], r["seed"]) == key]) for key in keys]


def _interval(value: Mapping | None) -> str:
    return "" if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
