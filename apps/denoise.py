"""Serve the Gradio page: python apps/denoise.py [--port N] [--share] [--checkpoint FOLDER].

This module defines the layout and the events of the page. service.py and its helper modules do the work.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for apps.*, when started as a program

import gradio as gr

from apps import figures, repair_page
from apps.repair_page import repair_tab
from apps.sent_image import SentImage
from apps.service import ADD, KIND_OF_MODEL, MAX_CANDIDATES, MAX_STEPS, NOISY_ALREADY, OWN_TILES, Service
from apps.sources import MAX_BYTES
from ebt_vision.core.arguments import number
from ebt_vision.core.thinking_config import ToleranceOf
from ebt_vision.denoising.base import Denoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import MAX_STRENGTH, SELF_ENSEMBLES
from ebt_vision.models.checkpoint import list_pretrained, model_type_of, program_device
from ebt_vision.models.pretrained_model import CheckpointError
from ebt_vision.noise.named import NOISE_KINDS

EXAMPLES = Path(__file__).resolve().parent / "examples"
ACCESS = Path(__file__).resolve().parent / "access.js"
MAX_WAITING = 19
"""Requests that may wait in the queue behind the running one; further requests are refused."""
CACHE_SECONDS = (600, 3600)
"""Interval in seconds of the clean-up of temporary files, and the age in seconds at which they are deleted."""
KIND_TITLES = {
    "gaussian": "Gaussian",
    "paper": "VP noise, as in the paper",
    "poisson": "Poisson (photons)",
    "salt-and-pepper": "Salt and pepper",
    "camera": "Camera noise (coarse in colour)",
    "jpeg": "JPEG",
}

INTRO = """# Denoise by thinking
An *energy-based transformer* (EBT) assigns every image a number, its energy: low for clean images, high for noisy images. It
denoises by lowering the energy. Each **thinking step** is one step of gradient descent."""

API_HELP = """`/denoise` and `/compare` accept the same inputs as the page and use the same queue.

```python
from gradio_client import Client, handle_file
client = Client("http://localhost:7860")  # this page's address
path, facts = client.predict(image=handle_file("photo.png"), noise="gaussian", amount=25, api_name="/denoise")
methods = client.predict(image=handle_file("photo.png"), noise="gaussian", amount=25, api_name="/compare")
```
`steps` is a whole number; the default is the number that the first model suggests. `/denoise` refuses options that have no
effect on the model.
`noise` is `none`, `gaussian`, `paper`, `poisson`, `salt-and-pepper`, `camera` or `jpeg`.
`strength` is 0 to 1.5: values below 1 keep
grain, values above 1 remove more noise. `self_ensemble` is 1, 2, 4 or 8: the result is the mean over this many mirrored copies.
`/denoise` returns a PNG file and a dictionary with the energies, PSNRs, steps and seconds.
`/compare` returns a list with the name, PSNR, forward passes and seconds of each method."""


def theme() -> gr.themes.Base:
    """Gradio's Soft theme with system fonts, so that nothing is downloaded."""
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
    titles |= {"body_text_color_subdued": "*neutral_500", "body_text_color_subdued_dark": "*neutral_400"}  # legible: 4.5 to 1
    titles |= {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    return gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono).set(**titles)


# --- Layout


def build_page(models: dict[str, str], load: Callable[[str], Denoiser], device: str = "cpu") -> gr.Blocks:
    """Build the page for models {label: name or folder}; `load` turns a name into a Denoiser. `models` may be empty."""
    service = Service(models, load, device)
    with gr.Blocks(title="Denoise by thinking", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown(INTRO)
        if not models:
            gr.Markdown("**This copy has no trained model.** Start the page with `--checkpoint FOLDER`.")
        with gr.Tabs(elem_id="tasks"):
            with gr.Tab("Denoise", id="denoise-tab"), gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    upload, controls = _controls(page, service, models)
                    go, other, halt = _buttons(bool(models))
                with gr.Column(scale=3, min_width=300, elem_id="answer"):
                    tabs, outputs, compared = _answers()
            with gr.Tab("Repair", id="repair-tab"):
                repair_tab(service, models)

        def show_denoising(visitor: gr.Request, path, *values):  # must not be named denoise: that is the endpoint
            yield from service.denoise(path, values, visitor)

        def side_by_side(visitor: gr.Request, path, *values):
            yield from service.compare(path, values, visitor)

        def ask_for_result(visitor: gr.Request):
            service.ask(visitor)
            return gr.Tabs(selected="result")

        def ask_for_comparison(visitor: gr.Request):
            service.ask(visitor)
            return gr.Tabs(selected="compare")

        one = dict(concurrency_id="device", concurrency_limit=1, api_visibility="private", trigger_mode="once")
        small = dict(queue=False, api_visibility="private", show_progress="hidden")
        asked = go.click(ask_for_result, None, [tabs], **small)
        asked.then(show_denoising, [upload, *controls], outputs, show_progress_on=[outputs[1]], **one)
        asked = other.click(ask_for_comparison, None, [tabs], **small)
        asked.then(side_by_side, [upload, *controls], [compared], show_progress="minimal", **one)
        halt.click(service.stop, None, None, **small)
        page.unload(service.forget)
        _endpoints(service, models)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def _buttons(enabled: bool) -> tuple[gr.Button, gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button("Denoise", variant="primary", size="lg", interactive=enabled, elem_id="denoise", min_width=90)
        other = gr.Button("Compare", size="lg", interactive=enabled, elem_id="compare", min_width=90)
        halt = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", min_width=70)
    return go, other, halt


def _controls(page: gr.Blocks, service: Service, models: dict[str, str]) -> tuple[gr.Image, list]:
    """Build the image box and the controls, in the order of read_controls."""
    examples = [str(path) for path in sorted(EXAMPLES.glob("*.png"))]
    upload = SentImage(
        examples[0] if examples else None,
        label="Image",
        type="filepath",
        sources=["upload", "clipboard", "webcam"],
        height=240,
        elem_id="upload",
    )
    gr.Examples([[path] for path in examples], [upload], label="Or use an example", elem_id="examples")
    originals = {Path(path).read_bytes() for path in examples}
    seen = gr.Markdown(elem_id="estimate", elem_classes="hint")
    how = gr.Radio([ADD, NOISY_ALREADY], value=ADD, label="Noise", elem_id="how")
    kind = gr.Dropdown(
        [(KIND_TITLES[name], name) for name in NOISE_KINDS], value="gaussian", label="Kind of noise", elem_id="kind"
    )
    amounts = [
        gr.Slider(
            known.low,
            min(known.high, 100) if name == "gaussian" else known.high,
            value=known.default,
            step=known.step,
            label=f"Amount: {known.unit}",
            visible=name == "gaussian",
            elem_id=f"amount-{name}",
        )
        for name, known in NOISE_KINDS.items()
    ]
    steps = gr.Slider(1, MAX_STEPS, value=service.suggested.num_steps, step=1, label="Thinking steps", elem_id="steps")
    strength = gr.Slider(
        0,
        MAX_STRENGTH,
        value=1,
        step=0.05,
        label="Strength",
        info="A value below 1 keeps grain. A value above 1 removes more noise.",
        elem_id="strength",
    )
    with gr.Row():
        model = gr.Dropdown(list(models), value=next(iter(models), None), label="Model", min_width=140, scale=2)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80, scale=1, elem_id="seed")
    with gr.Accordion("More thinking options", open=False, elem_id="more"):
        scale = gr.Slider(0.1, 3, value=1, step=0.1, label="Step size, as a multiple of the learned step size")
        tolerance = gr.Slider(
            0,
            1,
            value=service.suggested.tolerance or 0,
            step=0.001,
            label="Tolerance: stop when the gain of a step falls below this fraction of the reference; 0: never stop",
            elem_id="tolerance",
        )
        of = gr.Radio(
            [
                ("gain of the first step (try 0.02)", "first"),
                ("gain of the previous step (try 0.05)", "previous"),
                ("gain in training, adapted to the noise (try 0.006)", "training"),
                ("energy of the noisy image: stop below this energy (try 0.05)", "observation"),
            ],
            value=service.suggested.tolerance_of,
            label="Reference of the tolerance",
            elem_id="tolerance-of",
        )
        langevin = gr.Slider(0, 0.3, value=0, step=0.01, label="Langevin noise in each step")
        candidates = gr.Slider(
            1,
            MAX_CANDIDATES,
            value=1,
            step=1,
            label="Candidates: number of starts; the result of lowest energy is kept",
            elem_id="candidates",
        )
        copies = gr.Radio(
            list(SELF_ENSEMBLES),
            value=1,
            label="Mirrored copies: the result is the mean over this many copies; more take longer and have less error",
            elem_id="copies",
        )
        tile = gr.Dropdown(
            [OWN_TILES, "32", "64", "128", "256"], value=OWN_TILES, label="Tile size for large images, in pixels"
        )

    def show(how, kind):
        return [gr.update(visible=how == ADD)] + [gr.update(visible=how == ADD and kind == name) for name in NOISE_KINDS]

    def noise_for(path):
        """Select "add noise" for an example, and "already noisy" for an uploaded photograph."""
        if not path:
            return gr.skip()
        return ADD if Path(path).read_bytes() in originals else NOISY_ALREADY

    quiet = dict(api_visibility="private", show_progress="hidden", queue=False)
    gr.on([how.change, kind.change], show, [how, kind], [kind, *amounts], **quiet)
    looks = dict(api_visibility="private", show_progress="hidden", concurrency_id="look", concurrency_limit=1)
    upload.change(noise_for, [upload], [how], **quiet)
    gr.on([page.load, upload.change, model.change], service.estimate, [upload, model], [seen], **looks)
    return upload, [how, kind, *amounts, seed, steps, model, scale, tolerance, of, langevin, candidates, tile, strength, copies]


def _answers() -> tuple[gr.Tabs, list, gr.HTML]:
    """Build the tabs, the outputs in the order of Service._final, and the output of the comparison."""
    with gr.Tabs() as tabs:
        with gr.Tab("Result", id="result"):
            slider = gr.ImageSlider(
                label="Before | after", format="png", type="filepath", max_height=520, elem_id="result", interactive=False
            )
            line = gr.Markdown(elem_id="facts")
            chart = gr.HTML(elem_id="chart")
            film = gr.HTML(elem_id="film")
        with gr.Tab("Where it is unsure", id="map", render_children=True):
            heat = gr.Image(
                label="Energy of each patch",
                format="png",
                interactive=False,
                elem_id="heat",
                buttons=["download", "fullscreen"],
            )
            legend = gr.HTML()
        with gr.Tab("Candidates", id="candidates", render_children=True):
            tried = gr.HTML('<p class="hint">No result yet. Press Denoise.</p>', elem_id="tried")
        with gr.Tab("Compare", id="compare", render_children=True):
            gr.Markdown(
                "The EBT, its baselines and BM3D denoise the same noisy image (only the middle of a large image). The "
                "regressor makes one step, the other networks the selected number of steps. Diffusion models and BM3D get "
                "the noise level or estimate it. The others do not use the noise level."
            )
            compared = gr.HTML('<p class="hint">Press Compare.</p>', elem_id="columns")
        with gr.Tab("Download", id="take", render_children=True):
            download = gr.DownloadButton("Download the PNG", interactive=False, elem_id="download")
            gr.Markdown(
                "The PNG has full size, and keeps 16 bits, EXIF and colour profile of the image. The command and the program "
                "below make the same pixels:"
            )
            line_of_shell = gr.Code(label="Command line", language="shell", elem_id="command", lines=2, wrap_lines=True)
            program = gr.Code(label="Python", language="python", elem_id="program", lines=8)
        with gr.Tab("API", id="api", render_children=True):
            gr.Markdown(f"{API_HELP}\n\n{repair_page.API_HELP}")
    return tabs, [slider, line, chart, film, heat, legend, tried, download, line_of_shell, program], compared


def _endpoints(service: Service, models: dict[str, str]) -> None:
    """Add /denoise and /compare for gradio_client, with hidden controls."""
    suggested = service.suggested
    with gr.Column(visible=False):
        image = SentImage(label="image", type="filepath")
        noise = gr.Dropdown(["none", *NOISE_KINDS], value="none", label="noise")
        model = gr.Dropdown(list(models), value=next(iter(models), None), label="model")
        numbers = dict(
            amount=25,
            seed=0,
            steps=suggested.num_steps,
            step_size_scale=1,
            tolerance=suggested.tolerance or 0,
            langevin=0,
            candidates=1,
            tile=0,
        )
        fields = {name: gr.Number(value, label=name) for name, value in numbers.items()}
        file, told, rows = gr.File(label="denoised"), gr.JSON(label="facts"), gr.JSON(label="methods")
        strength = gr.Number(1, label="strength")
        copies = gr.Number(1, label="self_ensemble")
        first = [image, noise, fields["amount"], fields["seed"], fields["steps"], model]
        tolerance_of = gr.Dropdown(list(get_args(ToleranceOf)), value=suggested.tolerance_of, label="tolerance_of")
        rest = [fields[name] for name in ("step_size_scale", "tolerance", "langevin", "candidates", "tile")] + [tolerance_of]
        one = dict(concurrency_id="device", concurrency_limit=1)
        gr.Button().click(service.api_denoise, [*first, *rest, strength, copies], [file, told], api_name="denoise", **one)
        gr.Button().click(service.api_compare, [*first, strength, copies], [rows], api_name="compare", **one)


# --- Start


def find_models(checkpoint: str | None, peers: Sequence[str] = ()) -> dict[str, str]:
    """Return label -> name or folder: the given checkpoint, the shipped EBTs, the other shipped denoisers, the peers.

    The label of a peer keeps the library and the file's name, not its folder.
    """
    models = {Path(checkpoint).name or checkpoint: checkpoint} if checkpoint else {}
    names = [name for name in list_pretrained() if model_type_of(name) in KIND_OF_MODEL]
    names.sort(key=lambda name: model_type_of(name) != "patch_ebt")
    labels = {re.sub(r"(?<=:)[^:()]*/", "", peer): peer for peer in peers}
    return models | {name: name for name in names} | labels


def launch_options() -> dict[str, Any]:
    """Return the arguments of Blocks.launch()."""
    script = f"<script>{ACCESS.read_text(encoding='utf-8')}</script>"
    return dict(theme=theme(), css=figures.CSS, head=script, footer_links=[], max_file_size=MAX_BYTES, show_error=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page and return the exit status."""
    parser = argparse.ArgumentParser(description="Serve a web page that denoises images.")
    parser.add_argument("--port", type=number(int, 1, 65535), help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="create a public link through Gradio's relay; needs the network")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a model to offer in addition to the shipped ones")
    parser.add_argument(
        "--peers", metavar="NAME", nargs="+", default=[], help="others to compare: spandrel:FILE, deepinv:NAME:FILE"
    )
    parser.add_argument("--device", help="cpu, cuda, mps (default: the fastest available)")
    args = parser.parse_args(argv)
    try:
        device = program_device(args.device)
        load = functools.lru_cache(maxsize=8)(functools.partial(load_denoiser, device=device))
        models = find_models(args.checkpoint, args.peers)
        for name in [*list(models.values())[:1], *args.peers]:
            load(name)
        page = build_page(models, load, device)
        page.launch(server_port=args.port, share=args.share, inbrowser=sys.stdout.isatty(), **launch_options())
    except (CheckpointError, ValueError, OSError) as error:
        print(f"denoise: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
