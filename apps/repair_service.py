"""The actions of the Repair tab and of the endpoint /restore: controls to a request, results to outputs."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import numpy as np
import torch

from apps import figures
from apps.repair import MAX_FILLINGS, Damage, Progress, Repaired, RepairRequest, repair
from apps.service import MAX_SEED, Service, pair, remove_folder, whole
from apps.sources import read_upload, reduced, to_bytes

VIEW = 1024
"""Longest side in pixels of the view that is painted on."""
NOT_RANKED = (
    "The lowest energy comes first, but the energy's value may not rank candidates: it is that of whole tiles, with "
    "the noise of the last step. Choose with your eyes."
)


class RepairService:
    """The Repair tab's actions. It shares models, the queue and the stop flags with the denoising page's Service."""

    def __init__(self, service: Service):
        self.service = service

    def view(self, path: str | None) -> Any:
        """Return the photograph, reduced to VIEW, as the background to paint on; nothing for an unreadable file."""
        if not path:
            return None
        try:
            image = to_bytes(reduced(read_upload(Path(path)).visible_pixels()[None], VIEW))
        except (ValueError, OSError, MemoryError):
            return None  # the Repair button reports the error
        return {"background": image, "layers": [], "composite": image}

    def repair(self, path: str | None, values: Sequence[Any], visitor: gr.Request) -> Iterator[tuple]:
        """Yield values for the outputs of the tab; see `_live` and `_final`."""
        request, label = read_controls(path, values)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            news = repair(request, self.service.denoiser(label), self.service.stop_of(visitor), folder)
            for found in self.service.guarded(news, path):
                yield _live(found, folder) if isinstance(found, Progress) else _final(found, folder)

    def api_restore(self, image, mask, damage, size, angle, noise, scale, seed, model):
        """Restore an image with a known damage; yield a PNG file and a dictionary of figures."""
        request = repair_request(image, damage, mask=mask, size=size, angle=angle, noise=noise, scale=scale, seed=seed)
        folder = Path(tempfile.mkdtemp())
        try:
            news = repair(request, self.service.denoiser(model), threading.Event(), folder)
            *_, answer = self.service.guarded(news, image)
            (found,) = answer.fillings
            told = {
                "energies": [frame.energy for frame in found.frames],
                "likelihoods": [frame.likelihood for frame in found.frames],
                "num_steps": len(found.frames),
                "num_forward": found.num_forward,
                "seconds": answer.seconds,
                "seed": found.seed,
            }
            yield str(found.path), told  # yield, not return: gradio copies the file before the clean-up below
        finally:
            remove_folder(folder)


def read_controls(path: str | None, values: Sequence[Any]) -> tuple[RepairRequest, str]:
    """Return the request from the controls, in their order on the page, and the label of the model."""
    damage, painting, mask, sigma, length, angle, radius, noise, scale, fillings, seed, label = values
    size = {"motion": length, "disk": radius}.get(damage, sigma)
    request = repair_request(
        path,
        damage,
        painting=painting,
        mask=mask,
        size=size,
        angle=angle,
        noise=-1 if noise is None else noise,
        scale=scale,
        seed=seed,
        fillings=fillings,
    )
    return request, label


def repair_request(
    path,
    damage,
    *,
    painting: np.ndarray | None = None,
    mask: str | None = None,
    size=1.6,
    angle=0.0,
    noise=-1.0,
    scale=2,
    seed=0,
    fillings=1,
) -> RepairRequest:
    """Check the inputs of the tab or of the endpoint. A noise below 0 is estimated."""
    if not path:
        raise gr.Error("Upload a photograph first.", title="No image", print_exception=False)
    try:
        if damage not in get_args(Damage):
            raise ValueError(f"damage={damage!r} is not known; use {', '.join(get_args(Damage))}")
        if not -360 <= float(angle) <= 360:
            raise ValueError(f"angle={angle} is out of range; use -360..360 degrees")
        return RepairRequest(
            path=path,
            damage=damage,
            painted=None if painting is None else torch.from_numpy(painting),
            mask=mask or None,
            size=float(size),
            angle=float(angle),
            noise=None if float(noise) < 0 else float(noise),
            scale=whole(scale, "scale", 2, 4),
            seed=whole(seed or 0, "seed", 0, MAX_SEED),
            num_fillings=whole(fillings, "candidates", 1, MAX_FILLINGS),
        )
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error), title="Error", print_exception=False) from None


def _live(progress: Progress, folder: Path) -> tuple:
    last = progress.frames[-1]
    parts = [f"**Step {len(progress.frames)} of {progress.num_steps}**"]
    if progress.num_fillings > 1:
        parts.insert(0, f"Candidate {progress.filling + 1} of {progress.num_fillings}")
    if last.energy is not None:
        parts.append(f"energy {last.energy:.3f}")
    chart = figures.repair_curves(progress.frames)
    shown = pair(progress.before, last.image, folder)
    return shown, " · ".join(parts), chart, "", gr.skip(), gr.update(interactive=False)


def _final(answer: Repaired, folder: Path) -> tuple:
    first = answer.fillings[0]
    parts = [f"{len(first.frames)} steps", f"{answer.seconds:.1f} s"]
    if first.energy is not None:
        parts.insert(0, f"energy **{first.frames[0].energy:.3f} → {first.energy:.3f}**")
    if answer.stopped:
        parts.insert(0, "**Stopped early**")
    several = len(answer.fillings) > 1
    gallery = [
        (str(filling.path), f"seed {filling.seed}" + ("" if filling.energy is None else f", energy {filling.energy:.4f}"))
        for filling in answer.fillings
    ]
    return (
        (_before(answer, folder), str(first.path)),
        " · ".join(parts) + (f"\n\n{NOT_RANKED}" if several else ""),
        figures.repair_curves(first.frames),
        figures.repair_filmstrip(first.frames),
        gr.update(value=gallery, visible=several),
        gr.update(value=str(first.path), interactive=True),
    )


def _before(answer: Repaired, folder: Path) -> str:
    return pair(answer.before, answer.before, folder)[0]
