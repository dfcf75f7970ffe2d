"""A page in which to denoise an image by thinking: python apps/denoise.py [--port N] [--share] [--checkpoint FOLDER].

The first half computes and knows no page; the second half is the page and computes nothing.
"""

from __future__ import annotations

import argparse
import functools
import html
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ebt_vision.checkpoint import CheckpointError, default_pretrained, list_pretrained, pick_device
from ebt_vision.corruption import add_gaussian_noise, add_vp_noise, to_image_range, to_model_range
from ebt_vision.denoiser import DenoiseOptions, Denoiser, for_photographs, load_denoiser
from ebt_vision.image_files import read_image
from ebt_vision.metrics import psnr
from ebt_vision.rng import make_generator
from ebt_vision.thinking import ThinkingError
from ebt_vision.tiling import denoise_tiled

EXAMPLES = Path(__file__).parent / "examples"
MAX_SIDE = 768
MAX_STEPS = 16
NO_NOISE, GAUSSIAN, PAPER = "None", "Gaussian", "Paper's"


# --- Compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a visitor asks for."""

    path: str
    noise: str = GAUSSIAN
    sigma: float = 25.0
    """Standard deviation of the Gaussian noise, in 0..255 units."""
    level: float = 0.1
    """The paper's noise level, in (0, 1]."""
    seed: int = 0
    num_steps: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the page shows."""

    before: np.ndarray
    """The noisy image, uint8 (H, W, 3)."""
    after: np.ndarray
    """The denoised image, uint8 (H, W, 3)."""
    energies: list[float]
    """Mean energy per patch before the first and after every step; empty for a model without an energy."""
    psnrs: list[float]
    """PSNR in dB of every entry of `energies`, or of before and after; empty if the clean image is not known."""
    seconds: float
    note: str = ""


def answer(request: Request, denoiser: Denoiser, on_tile: Callable[[int, int], object] | None = None) -> Answer:
    """Read, add noise, think, measure. `on_tile` is called with the tiles done and their number.

    Raises ValueError (ImageFileError among them), OSError and ThinkingError with a message for the visitor.
    """
    clean, note = _shrink(read_image(request.path).pixels[None])  # (1, 3, H, W)
    noisy = add_noise(clean, request)
    options = DenoiseOptions(
        num_steps=request.num_steps,
        seed=request.seed,
        noise_level=request.level if request.noise == PAPER else None,
        sigma=request.sigma if request.noise == GAUSSIAN else None,
        keep_trajectory=True,
    )
    start = time.perf_counter()
    suited = denoiser if request.noise == PAPER else for_photographs(denoiser)
    result = denoise_tiled(suited, noisy, options, callback=on_tile)
    seconds = time.perf_counter() - start
    images = (noisy, *(result.trajectory or (noisy, result.image))[1:])  # the start as it is seen, not as the network gets it
    return Answer(
        before=to_bytes(noisy),
        after=to_bytes(result.image),
        energies=[] if result.energies is None else result.energies[:, 0].tolist(),
        psnrs=[] if request.noise == NO_NOISE else [_psnr(image.cpu(), clean) for image in images],
        seconds=seconds,
        note=note,
    )


def add_noise(clean: Tensor, request: Request) -> Tensor:
    """The noisy observation of clean images (B, 3, H, W) in [0, 1]; not clipped. Raises ValueError for a bad amount."""
    generator = make_generator(request.seed)
    if request.noise == GAUSSIAN:
        return add_gaussian_noise(clean, request.sigma, generator)
    if request.noise == PAPER:
        return to_image_range(add_vp_noise(to_model_range(clean), request.level, generator))
    return clean


def to_bytes(images: Tensor) -> np.ndarray:
    """The first of (B, 3, H, W) in [0, 1], clipped and rounded, as uint8 (H, W, 3)."""
    return (images[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _psnr(images: Tensor, clean: Tensor) -> float:
    return float(psnr(images.clamp(0, 1), clean, data_range=1.0)[0])


def _shrink(images: Tensor) -> tuple[Tensor, str]:
    height, width = images.shape[-2:]
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return images, ""
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    return images, f"Shrunk from {width}×{height} to {size[1]}×{size[0]} for this page; the command line keeps the full size."


# --- What is shown


def facts(result: Answer) -> str:
    """The result in a line or two of Markdown."""
    parts = []
    if result.psnrs:
        parts.append(f"PSNR **{result.psnrs[0]:.1f} → {result.psnrs[-1]:.1f} dB**")
    if result.energies:
        steps = len(result.energies) - 1
        parts.append(f"energy **{result.energies[0]:.2f} → {result.energies[-1]:.2f}** in {steps} step" + "s" * (steps != 1))
    parts.append(f"{result.seconds:.1f} s")
    return " · ".join(parts) + (f"\n\n{result.note}" if result.note else "")


def curves(result: Answer) -> str:
    """The energy curve, and PSNR's where it is known, as HTML with one point for each step, step 0 included."""
    panels = []
    if result.energies:
        panels.append(curve(result.energies, "Energy", "mean per patch, lower is better", "curve-energy"))
    if len(result.psnrs) > 1:
        panels.append(curve(result.psnrs, "PSNR", "dB, higher is better", "curve-psnr"))
    return f'<div class="curves">{"".join(panels)}</div>'


def curve(values: Sequence[float], title: str, unit: str, name: str) -> str:
    """One line chart of values[step] as an SVG figure that scales with the page."""
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
    every = 1 if len(values) <= 9 else 2
    labels = "".join(
        f'<text x="{x(step):.1f}" y="{height - bottom + 16}" text-anchor="middle">{step}</text>'
        for step in range(0, len(values), every)
    )
    points = "".join(
        f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"><title>step {step}: {value:.3f}</title></circle>'
        for step, value in enumerate(values)
    )
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values))
    return (
        f'<figure class="curve {name}"><figcaption><b>{html.escape(title)}</b> {html.escape(unit)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)} after each step">{grid}{labels}'
        f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">thinking step</text>'
        f'<polyline points="{line}"/>{points}</svg></figure>'
    )


# --- The page

INTRO = """# Denoise by thinking
An *energy-based transformer* gives every image a number, its energy: low for clean pictures, high for noisy ones. It denoises
by walking downhill on that energy, one **thinking step** at a time. More steps, more thought."""

CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto !important}
.curves {display: flex; flex-wrap: wrap; gap: 16px}
.curve {flex: 1 1 260px; margin: 0; min-width: 0}
.curve figcaption {font-size: 14px; margin-bottom: 4px; color: var(--body-text-color-subdued)}
.curve figcaption b {color: var(--body-text-color); margin-right: 4px}
.curve svg {width: 100%; height: auto; display: block}
.curve text {font-size: 11px; fill: var(--body-text-color-subdued)}
.curve .grid {stroke: var(--border-color-primary); stroke-width: 1}
.curve polyline {fill: none; stroke: var(--primary-500); stroke-width: 2; stroke-linejoin: round}
.curve circle {fill: var(--primary-500); stroke: var(--background-fill-primary); stroke-width: 1.5}
.curve-psnr polyline {stroke: #0d9488} .curve-psnr circle {fill: #0d9488}
"""


def theme() -> gr.themes.Base:
    """Gradio's Soft with the system's own fonts: nothing is fetched."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "Menlo", "Consolas", "monospace")
    plain = {"background_fill": "transparent", "text_color": "*body_text_color", "text_weight": "600"}
    titles = {f"block_{part}_{key}": value for part in ("title", "label") for key, value in plain.items()}
    titles |= {
        "block_title_padding": "0",
        "block_label_background_fill": "*block_background_fill",
        "block_label_shadow": "none",
    }
    titles |= {f"{name}_dark": value for name, value in titles.items() if name.endswith(("fill", "color"))}
    titles |= {"body_background_fill": "*neutral_50", "body_background_fill_dark": "*neutral_950"}
    return gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono).set(**titles)


def build_page(models: dict[str, str], load: Callable[[str], Denoiser]) -> gr.Blocks:
    """The page for models {label: name or folder}; `load` turns one into a Denoiser. Without models it says so."""

    def run(path, noise, sigma, level, seed, num_steps, label, progress=gr.Progress()):  # noqa: B008 (Gradio wants it so)
        if not path:
            raise gr.Error("Upload an image or pick one of the examples first.", title="No image", print_exception=False)
        request = Request(path=path, noise=noise, sigma=sigma, level=level, seed=int(seed or 0), num_steps=int(num_steps))
        try:
            result = answer(request, load(models[label]), lambda done, total: progress((done, total), unit="tiles"))
        except (ValueError, OSError, ThinkingError) as error:
            raise gr.Error(friendly(error, path), title="This did not work", print_exception=False) from error
        return (result.before, result.after), facts(result), curves(result)

    def show_amount(noise):
        return gr.update(visible=noise == GAUSSIAN), gr.update(visible=noise == PAPER)

    examples = [str(path) for path in sorted(EXAMPLES.glob("*.png"))]
    with gr.Blocks(title="Denoise by thinking", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        if not models:
            gr.Markdown("**No trained model is in this copy yet:** start the page with `--checkpoint FOLDER`.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                upload = gr.Image(
                    examples[0] if examples else None,
                    label="Image",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=240,
                    elem_id="upload",
                )
                # The file as it was sent: read_image judges it and says what is wrong with it. (A subclass of gr.Image would
                # have gradio write a .pyi beside this file.)
                upload.preprocess = lambda payload: None if payload is None else payload.path
                gr.Examples([[path] for path in examples], [upload], label="Or one of these")
                noise = gr.Radio([NO_NOISE, GAUSSIAN, PAPER], value=PAPER, label="Noise to add")
                sigma = gr.Slider(0, 100, value=25, step=1, label="Noise strength (0 to 255)", visible=False)
                level = gr.Slider(0.02, 0.5, value=0.1, step=0.01, label="Noise level")
                steps = gr.Slider(1, MAX_STEPS, value=4, step=1, label="Thinking steps", elem_id="steps")
                with gr.Row():
                    model = gr.Dropdown(list(models), value=next(iter(models), None), label="Model", min_width=140, scale=2)
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80, scale=1)
                button = gr.Button("Denoise", variant="primary", size="lg", interactive=bool(models), elem_id="denoise")
            with gr.Column(scale=3, min_width=300, elem_id="answer"):
                slider = gr.ImageSlider(
                    label="Before | after",
                    format="png",
                    type="numpy",
                    max_height=520,
                    elem_id="result",
                    interactive=False,
                )
                line = gr.Markdown(elem_id="facts")
                chart = gr.HTML(elem_id="chart")
        noise.change(show_amount, [noise], [sigma, level], show_progress="hidden")
        inputs = [upload, noise, sigma, level, seed, steps, model]
        button.click(run, inputs, [slider, line, chart], show_progress_on=[slider])
    return page


def friendly(error: Exception, path: str) -> str:
    """An error's message for a visitor: without the server's folders."""
    return str(error).replace(str(Path(path).parent) + os.sep, "")


def find_models(checkpoint: str | None) -> dict[str, str]:
    """Label -> name or folder: the one asked for first, then the shipped ones, the best to start with leading."""
    models = {Path(checkpoint).name or checkpoint: checkpoint} if checkpoint else {}
    names = list_pretrained()
    if names:
        names.sort(key=lambda name: name != default_pretrained())
    return models | {name: name for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Open the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Open a page in which to denoise images.")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's relay; needs the network")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a model to offer beside the shipped ones")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    args = parser.parse_args(argv)
    try:
        load = functools.lru_cache(maxsize=4)(functools.partial(load_denoiser, device=pick_device(args.device)))
        models = find_models(args.checkpoint)
        if models:
            load(next(iter(models.values())))
        page = build_page(models, load)
        page.launch(
            server_port=args.port, share=args.share, inbrowser=sys.stdout.isatty(), theme=theme(), css=CSS, footer_links=[]
        )
    except (CheckpointError, ValueError, OSError) as error:
        print(f"denoise: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
