"""The layout and the events of the Repair tab, and the endpoint /restore. repair_service.py does the work."""

from __future__ import annotations

from typing import get_args

import gradio as gr

from apps.paint_box import PaintBox
from apps.repair import MAX_FILLINGS, Damage
from apps.repair_service import RepairService
from apps.sent_image import SentImage
from apps.service import Service

DAMAGES: dict[str, str] = {
    "holes": "Something is to go, or is missing",
    "gaussian": "Gaussian blur",
    "motion": "Motion blur",
    "disk": "Out of focus",
    "enlarge": "Too small: enlarge",
    "jpeg": "JPEG blocks",
}

INTRO = """The network was trained to remove noise and JPEG artefacts, not other damages. Its energy says what photographs look
like. The likelihood says what your photograph shows, if the damage is as you describe it. The steps look for an image where
both are low."""

API_HELP = """`/restore` repairs a known damage. `damage` is `holes`, `gaussian`, `motion`, `disk`, `enlarge` or `jpeg`.

```python
mask = handle_file("mask.png")  # white where pixels are missing
path, facts = client.predict(image=handle_file("photo.png"), mask=mask, damage="holes", seed=0, api_name="/restore")
path, facts = client.predict(image=handle_file("photo.png"), mask=None, damage="enlarge", scale=2, api_name="/restore")
```
`size` is the standard deviation (`gaussian`), the length (`motion`) or the radius (`disk`) of a blur in pixels, `angle` the
direction of a motion in degrees, `noise` the noise of a blurred image in 0..255 units (below 0: estimated), `scale` 2, 3 or 4.
With `holes` and `mask=None`, transparent pixels are filled in. `jpeg` reads the tables of the file. `/restore` returns a PNG
file and a dictionary with the energies and likelihoods of all steps."""


def repair_tab(service: Service, models: dict[str, str]) -> None:
    """Build the tab inside the current gr.Tab."""
    repairs = RepairService(service)
    gr.Markdown(INTRO)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload, controls = _controls(repairs, models)
            with gr.Row():
                go = gr.Button("Repair", variant="primary", size="lg", interactive=bool(models), elem_id="repair", min_width=90)
                halt = gr.Button("Stop", variant="stop", size="lg", elem_id="repair-stop", min_width=70)
        with gr.Column(scale=3, min_width=300, elem_id="repair-answer"):
            outputs = _answers()

    def show_repair(visitor: gr.Request, path, *values):
        yield from repairs.repair(path, values, visitor)

    def ask_for_repair(visitor: gr.Request):
        service.ask(visitor)

    small = dict(queue=False, api_visibility="private", show_progress="hidden")
    one = dict(concurrency_id="device", concurrency_limit=1, api_visibility="private", trigger_mode="once")
    asked = go.click(ask_for_repair, None, None, **small)
    asked.then(show_repair, [upload, *controls], outputs, show_progress_on=[outputs[1]], **one)
    halt.click(service.stop, None, None, **small)
    _endpoint(repairs, models)


def _controls(repairs: RepairService, models: dict[str, str]) -> tuple[gr.Image, list]:
    """Build the image box and the controls, in the order of repair_service.read_controls."""
    upload = SentImage(
        label="Photograph", type="filepath", sources=["upload", "clipboard", "webcam"], height=240, elem_id="repair-photo"
    )
    damage = gr.Radio([(title, name) for name, title in DAMAGES.items()], value="holes", label="Damage", elem_id="damage")
    with gr.Column() as holes:
        painting = PaintBox(
            label="Paint over what is to go",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(colors=["#e11d48"], color_mode="fixed"),
            format="png",
            buttons=["fullscreen"],
            height=380,
            elem_id="paint",
            placeholder="Upload a photograph above. Then paint here with mouse, pen or finger.",
        )
        with gr.Accordion("Without painting: upload a mask", open=False, elem_id="mask-box"):
            gr.Markdown(
                "An image of the same size, white where pixels are missing. With neither a mask nor paint, the transparent "
                "pixels of the photograph are filled in.",
                elem_classes="hint",
            )
            mask = SentImage(label="Mask", type="filepath", sources=["upload"], height=160, elem_id="mask")
        fillings = gr.Slider(1, MAX_FILLINGS, value=1, step=1, label="Candidates, each with its own seed", elem_id="fillings")
    sigma = gr.Slider(0.3, 10, value=1.6, step=0.1, label="Standard deviation in pixels", visible=False, elem_id="sigma")
    length = gr.Slider(2, 60, value=9, step=1, label="Length of the motion in pixels", visible=False, elem_id="length")
    angle = gr.Slider(
        -180, 180, value=0, step=1, label="Angle in degrees, counter-clockwise from the right", visible=False, elem_id="angle"
    )
    radius = gr.Slider(0.5, 20, value=3, step=0.5, label="Radius in pixels", visible=False, elem_id="radius")
    noise = gr.Number(
        None, label="Noise of the photograph, 0..255 (empty: estimated)", minimum=0, visible=False, elem_id="blur-noise"
    )
    scale = gr.Radio([2, 3, 4], value=2, label="Enlarge by", visible=False, elem_id="scale")
    with gr.Row():
        model = gr.Dropdown(list(models), value=next(iter(models), None), label="Model", min_width=140, scale=2)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80, scale=1, elem_id="repair-seed")

    def show(damage):
        blur = damage in ("gaussian", "motion", "disk")
        visible = (damage == "holes", damage == "gaussian", damage == "motion", damage == "motion", damage == "disk", blur)
        return [gr.update(visible=value) for value in (*visible, damage == "enlarge")]

    quiet = dict(api_visibility="private", show_progress="hidden")
    damage.change(show, [damage], [holes, sigma, length, angle, radius, noise, scale], queue=False, **quiet)
    upload.change(repairs.view, [upload], [painting], concurrency_id="look", concurrency_limit=1, **quiet)
    return upload, [damage, painting, mask, sigma, length, angle, radius, noise, scale, fillings, seed, model]


def _answers() -> list:
    """Build the outputs in the order of repair_service._final."""
    slider = gr.ImageSlider(
        label="Before | after", format="png", type="filepath", max_height=520, elem_id="repaired", interactive=False
    )
    line = gr.Markdown(elem_id="repair-facts")
    chart = gr.HTML(elem_id="repair-chart")
    film = gr.HTML('<p class="hint">The image after each step appears here.</p>', elem_id="repair-film")
    gallery = gr.Gallery(
        label="Candidates, the lowest energy first", visible=False, columns=2, format="png", elem_id="repair-gallery"
    )
    download = gr.DownloadButton("Download the PNG", interactive=False, elem_id="repair-download")
    return [slider, line, chart, film, gallery, download]


def _endpoint(repairs: RepairService, models: dict[str, str]) -> None:
    """Add /restore for gradio_client, with hidden controls."""
    with gr.Column(visible=False):
        image, mask = SentImage(label="image", type="filepath"), SentImage(label="mask", type="filepath")
        damage = gr.Dropdown(list(get_args(Damage)), value="holes", label="damage")
        numbers = dict(size=1.6, angle=0, noise=-1, scale=2, seed=0)
        fields = [gr.Number(value, label=name) for name, value in numbers.items()]
        model = gr.Dropdown(list(models), value=next(iter(models), None), label="model")
        outputs = [gr.File(label="restored"), gr.JSON(label="facts")]
        gr.Button().click(
            repairs.api_restore,
            [image, mask, damage, *fields, model],
            outputs,
            api_name="restore",
            concurrency_id="device",
            concurrency_limit=1,
        )
