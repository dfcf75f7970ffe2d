"""HTML and images of the page: figures in text, curves, filmstrip, heat map, candidates, comparison."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from apps.comparing import Column
from apps.repair import Frame
from apps.thinking_aloud import Answer, Steps, Update

THUMBNAIL = 256
"""Longest side in pixels of an image in the filmstrip."""

CSS = """
.gradio-container {max-width: min(1180px, 100vw) !important; margin: 0 auto !important}
.gradio-container .main, .gradio-container .contain, .contain > .column {min-width: 0}
#answer, #answer .tabs, #answer .tab-wrapper {min-width: 0}
.curves {display: flex; flex-wrap: wrap; gap: 16px}
.curve {flex: 1 1 260px; margin: 0; min-width: 0; max-width: 560px}
.curve figcaption {font-size: 14px; margin-bottom: 4px; color: var(--body-text-color-subdued)}
.curve figcaption b {color: var(--body-text-color); margin-right: 4px}
.curve svg {width: 100%; height: auto; display: block}
.curve text {font-size: 11px; fill: var(--body-text-color-subdued)}
.curve .grid {stroke: var(--border-color-primary); stroke-width: 1}
.curve polyline {fill: none; stroke: var(--primary-500); stroke-width: 2; stroke-linejoin: round}
.curve circle {fill: var(--primary-500); stroke: var(--background-fill-primary); stroke-width: 1.5}
.curve-psnr polyline {stroke: #0d9488} .curve-psnr circle {fill: #0d9488}
.pictures {display: flex; gap: 10px; overflow-x: auto; padding: 4px 2px 8px; width: 0; min-width: 100%}
.pictures figure {margin: 0; flex: 0 0 auto; width: 168px}
.pictures img, .columns img {width: 100%; height: auto; display: block; border-radius: 6px}
.pictures figcaption, .columns figcaption {font-size: 13px; line-height: 1.4; margin-top: 4px; color: var(--body-text-color)}
.pictures .won img {outline: 3px solid var(--primary-500)}
.columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px}
.columns figure {margin: 0; min-width: 0}
.columns .none {aspect-ratio: 3 / 2; display: grid; place-items: center; text-align: center; padding: 8px; border-radius: 6px;
  border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); font-size: 13px}
.scale {height: 10px; border-radius: 5px; max-width: 320px}
[data-testid=slider]:focus {outline: none}
[data-testid=slider]:focus-visible .icon-wrap {outline: 3px solid var(--body-text-color); outline-offset: 2px}
.hint {font-size: 13px; color: var(--body-text-color-subdued)}
"""


# --- Text


def facts(answer: Answer) -> str:
    """Describe the result in one or two lines of Markdown."""
    parts = []
    if answer.psnrs:
        parts.append(f"PSNR **{answer.psnrs[0]:.1f} → {answer.psnrs[-1]:.1f} dB**")
    if answer.energies:
        parts.append(f"energy **{answer.energies[0]:.2f} → {answer.energies[-1]:.2f}** in {_count(answer.num_steps, 'step')}")
    parts.append(f"{answer.seconds:.1f} s")
    if answer.stopped:
        parts.insert(0, "**Stopped early**")
    elif answer.energies and answer.num_steps == 0:
        parts.insert(0, "**Already clean**: every pixel is kept")
    return " · ".join(parts) + (f"\n\n{answer.note}" if answer.note else "")


def progress(update: Update) -> str:
    """Describe the progress in one line of Markdown."""
    parts = [f"**Step {update.step}**"]
    if update.energies:
        parts.append(f"energy {update.energies[-1]:.2f}")
    if update.psnrs:
        parts.append(f"PSNR {update.psnrs[-1]:.1f} dB")
    if update.words:
        parts.append(update.words)
    if 0 < update.share < 1:
        left = update.seconds / update.share * (1 - update.share)
        parts.append("about " + (f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left"))
    return " · ".join(parts)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


# --- Curves


def curves(energies: Sequence[float], psnrs: Sequence[float]) -> str:
    """Draw the energy and, if known, the PSNR as HTML curves with one point per step, including step 0."""
    panels = []
    if energies:
        panels.append(curve(energies, "Energy", "mean per patch, lower is better", "curve-energy"))
    if len(psnrs) > 1:
        panels.append(curve(psnrs, "PSNR", "dB, higher is better", "curve-psnr"))
    return f'<div class="curves">{"".join(panels)}</div>'


def curve(values: Sequence[float], title: str, unit: str, name: str, first: int = 0) -> str:
    """Draw the values of steps `first`, `first` + 1 ... as an SVG line chart that scales with the page."""
    width, height, left, right, top, bottom = 360, 190, 52, 14, 14, 34
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    low, high = low - 0.06 * span, high + 0.06 * span

    decimals = min(max(1 - math.floor(math.log10(span / 3)), 0), 6)  # enough to tell the ticks apart

    def x(step: int) -> float:
        return left + (width - left - right) * step / max(len(values) - 1, 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    grid = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>'
        f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.{decimals}f}</text>'
        for tick in np.linspace(low + 0.05 * span, high - 0.05 * span, 4)
    )
    every = 1 + (len(values) - 1) // 9
    labels = "".join(
        f'<text x="{x(step):.1f}" y="{height - bottom + 16}" text-anchor="middle">{first + step}</text>'
        for step in range(0, len(values), every)
    )
    points = "".join(
        f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"><title>step {first + step}: {value:.4g}</title></circle>'
        for step, value in enumerate(values)
    )
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values))
    return (
        f'<figure class="curve {name}"><figcaption><b>{html.escape(title)}</b> {html.escape(unit)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)} after each step">{grid}{labels}'
        f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">thinking step</text>'
        f'<polyline points="{line}"/>{points}</svg></figure>'
    )


def repair_curves(frames: Sequence[Frame]) -> str:
    """Draw the energy, if there is one, and the likelihood after each step of a repair."""
    energies = [frame.energy for frame in frames if frame.energy is not None]
    panels = [curve(energies, "Energy", "of what the network saw, mean per patch", "curve-energy", 1)] if energies else []
    values = [frame.likelihood for frame in frames]
    if not any(values):
        exact = '<p class="hint">Likelihood: 0 after every step. The known pixels do not change.</p>'
        return f'<div class="curves">{"".join(panels)}</div>{exact}'
    panels.append(curve(values, "Likelihood", "half the squared distance to the photograph", "curve-likelihood", 1))
    return f'<div class="curves">{"".join(panels)}</div>'


# --- Images


def repair_filmstrip(frames: Sequence[Frame]) -> str:
    """Show the image after every step of a repair, with its energy and its likelihood, as HTML."""
    pictures = []
    for number, frame in enumerate(frames, 1):
        lines = [f"<b>step {number}</b>"]
        if frame.energy is not None:
            lines.append(f"energy {frame.energy:.3f}")
        lines.append(f"likelihood {frame.likelihood:.2e}" if frame.likelihood else "likelihood 0")
        pictures.append(_picture(frame.image, f"The image after step {number}", " · ".join(lines)))
    return _strip(pictures, "The image after each step")


def filmstrip(steps: Steps) -> str:
    """Show the image after every step, with its energy and PSNR, as HTML."""
    pictures = []
    for index, frame in enumerate(steps.frames):
        lines = [f"<b>{'noisy' if index == 0 else f'step {index}'}</b>"]
        if index < len(steps.energies):
            lines.append(f"energy {steps.energies[index]:.3f}")
        if index < len(steps.psnrs):
            lines.append(f"{steps.psnrs[index]:.2f} dB")
        alt = "The noisy image" if index == 0 else f"The image after step {index}"
        pictures.append(_picture(frame, alt, " · ".join(lines)))
    return _strip(pictures, "The image after each step")


def _strip(pictures: Sequence[str], name: str) -> str:
    return f'<div class="pictures" role="list" tabindex="0" aria-label="{name}">{"".join(pictures)}</div>'


def candidates(steps: Steps) -> str:
    """Show the candidates of self-verification and the selected one as HTML."""
    found = steps.candidates
    if not found:
        return (
            '<p class="hint">Set <i>Candidates</i> above 1. The model then thinks from several starts and keeps the '
            "candidate of lowest energy.</p>"
        )
    best = max(range(len(found)), key=lambda index: (found[index].wins, -found[index].energy))
    total = sum(candidate.wins for candidate in found)
    if total == 1:
        why = f"Candidate {best + 1} won: its energy, {found[best].energy:.4f}, is the lowest."
    else:
        why = (
            f"The image has {total} tiles. Each tile keeps its candidate of lowest energy. "
            f"Candidate {best + 1} won most tiles: {found[best].wins}."
        )
    pictures = [
        _picture(
            candidate.image,
            f"Candidate {index + 1}",
            " · ".join(
                [f"<b>{index + 1}{' won' if index == best else ''}</b>", f"energy {candidate.energy:.4f}"]
                + [f"{value:.2f} dB" for value in candidate.psnrs]
                + ([f"won {_count(candidate.wins, 'tile')}"] if total > 1 else [])
            ),
            "won" if index == best else "",
        )
        for index, candidate in enumerate(found)
    ]
    return f'<p>{html.escape(why)}</p><div class="pictures" tabindex="0" aria-label="The candidates">{"".join(pictures)}</div>'


def heat_map(steps: Steps) -> tuple[np.ndarray | None, str]:
    """Return the last image in grey with its energy in colour, uint8 (h, w, 3) or None, and a legend as HTML."""
    if steps.heat is None:
        return None, '<p class="hint">This model has no energy.</p>'
    from matplotlib import colormaps

    low, high = float(steps.heat.min()), float(np.quantile(steps.heat, 0.995))
    share = np.clip((steps.heat - low) / max(high - low, 1e-12), 0, 1)
    grey = steps.frames[-1].mean(-1, keepdims=True) / 255
    inferno = colormaps["inferno"]
    mixed = 0.35 * grey + 0.65 * inferno(share)[..., :3]
    colours = ", ".join("#" + "".join(f"{round(255 * part):02x}" for part in inferno(at)[:3]) for at in np.linspace(0, 1, 7))
    legend = (
        f'<div class="scale" style="background: linear-gradient(to right, {colours})"></div>'
        f'<p class="hint">Energy per patch, from {low:.3f} (dark: clean to the model) to {high:.3f} (bright: the model is '
        "unsure).</p>"
    )
    return (255 * mixed).round().astype(np.uint8), legend


def comparison(columns: Sequence[Column]) -> str:
    """Show the methods side by side as HTML: image, PSNR, passes, seconds."""
    return f'<div class="columns">{"".join(map(_column, columns))}</div>'


def _column(column: Column) -> str:
    name = html.escape(column.name)
    if column.image is None:
        box = f'<div class="none">{html.escape(column.problem)}</div>'
        return f'<figure class="column">{box}<figcaption><b>{name}</b></figcaption></figure>'
    lines = [f"{value:.2f} dB" for value in column.psnrs]
    if column.seconds is not None:
        passes = (
            "no network"
            if column.num_forward is None
            else _count(column.num_forward, "forward pass").replace("passs", "passes")
        )
        lines += [passes, f"{column.seconds:.1f} s"]
    if column.problem:
        lines.append(html.escape(column.problem))
    picture = f'<img alt="By {name}" src="{_data_uri(column.image)}">'
    return f'<figure class="column">{picture}<figcaption><b>{name}</b><br>{"<br>".join(lines)}</figcaption></figure>'


def _picture(image: np.ndarray, alt: str, caption: str, name: str = "") -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    source = _data_uri(np.asarray(picture))
    shown = f'<img alt="{html.escape(alt)}" src="{source}"><figcaption>{caption}</figcaption>'
    return f'<figure class="{name}" role="listitem">{shown}</figure>'


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
