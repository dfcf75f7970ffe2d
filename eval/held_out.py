"""Choose among photograph denoisers on held-out images: PSNR under white noise, realistic noise, and on drawings.

    python eval/held_out.py --models photographs_ebt runs/photographs_colours/model \
        --data data/imagenet-photos --split validation --output runs/held_out.json

The figures of the results pages come from other images. This program is for choices before them: which weights, which
training. Columns:

    sigma N     white Gaussian noise on the photographs, not clipped
    realistic   the realistic mixture up to sigma 30 without white and processed noise (noise/realistic.py)
    processed   processed noise up to sigma 20, as JPEG of quality 80 to 95
    full size   the same on photographs that are enlarged first, as smooth as those at the full size of a camera
    JPEG 10     JPEG of quality 10, without noise; "moved": its blocks begin inside the patches of the network
    drawings    drawings of the training's program, without noise and with sigma 25
    waves       one picture of coloured waves with sigma 25, on which a denoiser loses that takes strong colours for noise

`MODEL+OTHER@0.3` mixes the weights of two models of one shape: 0.7 of MODEL and 0.3 of OTHER (Wortsman et al. 2022).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebt_vision.benchmark.options import OneLineParser, run_program
from ebt_vision.benchmark.tables import Column, markdown
from ebt_vision.core.arguments import named_path, number
from ebt_vision.core.atomic_files import write_text
from ebt_vision.core.metrics import psnr
from ebt_vision.core.provenance import provenance
from ebt_vision.core.rng import make_generator, sample_generators
from ebt_vision.data.graphics import draw_graphic
from ebt_vision.data.images import DataConfig, load_image_set
from ebt_vision.denoising.base import Denoiser, for_photographs
from ebt_vision.denoising.load import denoiser_for
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.noise.processes import add_gaussian_noise, add_jpeg
from ebt_vision.noise.realistic import RealisticNoiseConfig, add_realistic_noise, realistic_pairs

REALISTIC = RealisticNoiseConfig(gaussian_share=0.0, clean_share=0.0, processed_share=0.0, max_realistic_sigma=30.0)
JPEG_QUALITY = 10
PROCESSED = replace(REALISTIC, processed_share=1.0, max_processed_sigma=20.0, jpeg_share=1.0, jpeg_quality=(80, 95))
FULL_SIZE = replace(PROCESSED, full_size_share=1.0)
NUM_DRAWINGS = 16
_BATCH_SIZE = 8

Noise = Callable[[Tensor], Tensor]
"""Clean images (B, 3, H, W) in [0, 1] -> noisy images."""


def mixed(first: PretrainedModel, second: PretrainedModel, share: float) -> PretrainedModel:
    """Give `first` the weights (1 - share) * first + share * second. Raises ValueError for models of other shapes.

    An EBT and the regressor of the same network can be mixed; the EBT keeps its step size.
    """
    weights, others = first.state_dict(), second.state_dict()
    weights = {name: value for name, value in weights.items() if name != "log_step_size"}
    missing = [name for name in weights if name not in others or others[name].shape != weights[name].shape]
    if missing:
        raise ValueError(f"the models differ in {missing[0]}; mix two trainings of one config")
    mean = {name: (1.0 - share) * weights[name] + share * others[name] for name in weights}
    first.load_state_dict(first.state_dict() | mean)
    return first


def load(name: str) -> Denoiser:
    """Return the denoiser of MODEL, or of MODEL+OTHER@SHARE, for photographs."""
    path, plus, rest = (name, "", "") if Path(name).is_dir() else name.partition("+")
    other, at, share = rest.rpartition("@")
    if plus and not at:
        raise ValueError(f"{name} has no share; write MODEL+OTHER@0.3")
    try:
        part = number(float, 0, 1)(share) if plus else 0.0
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"the share in {name}: {error}") from None
    model = load_pretrained(path).float()
    if plus:
        model = mixed(model, load_pretrained(other).float(), part)
    return for_photographs(denoiser_for(model))


def white(sigma: float, seed: int) -> Noise:
    """White Gaussian noise of standard deviation `sigma` in 0..255 units; image i has its own numbers."""
    return lambda clean: add_gaussian_noise(clean, sigma, sample_generators(seed, range(len(clean)), round(sigma)))


def realistic(config: RealisticNoiseConfig, seed: int) -> Noise:
    """Noise of the realistic mixture."""
    return lambda clean: add_realistic_noise(clean, config, sample_generators(seed, range(len(clean))))


def waves(size: int = 64) -> Tensor:
    """Return a picture of coloured waves, (1, 3, size, size)."""
    rows, columns = torch.arange(size)[:, None] / 7.0, torch.arange(size) / 5.0
    values = torch.stack([torch.sin(rows + k) * torch.cos(columns * (1 + k / 3)) for k in range(3)])[None]
    return 0.2 + 0.6 * (values > 0).float()


def conditions(photographs: Tensor, sigmas: Sequence[float], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (clean, noisy) images of every column."""
    size = photographs.shape[-1]
    drawn = torch.stack([torch.from_numpy(draw_graphic(size, make_generator(seed, i))) for i in range(NUM_DRAWINGS)]) / 255.0

    def noisy(clean: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        return clean, noise(clean)

    return {
        **{f"sigma {sigma:g}": noisy(photographs, white(sigma, seed)) for sigma in sigmas},
        "realistic": noisy(photographs, realistic(REALISTIC, seed)),
        "processed": noisy(photographs, realistic(PROCESSED, seed)),
        "full size": realistic_pairs(photographs, FULL_SIZE, sample_generators(seed, range(len(photographs)))),
        f"JPEG {JPEG_QUALITY}": noisy(photographs, lambda clean: add_jpeg(clean, JPEG_QUALITY)),
        f"JPEG {JPEG_QUALITY}, moved": noisy(photographs, lambda clean: add_jpeg(clean, JPEG_QUALITY, origin=(4, 4))),
        "drawings": noisy(drawn, lambda clean: clean),
        "drawings, 25": noisy(drawn, white(25.0, seed)),
        "waves, 25": noisy(waves(), white(25.0, seed)),
    }


def score(denoise: Callable[[Tensor], Tensor], clean: Tensor, noisy: Tensor) -> float:
    """Mean PSNR of the images in dB; a perfect image counts 99 dB."""
    values = []
    for start in range(0, len(clean), _BATCH_SIZE):
        result = denoise(noisy[start : start + _BATCH_SIZE])
        values.append(psnr(result, clean[start : start + _BATCH_SIZE], data_range=1.0).clamp(max=99.0))
    return float(torch.cat(values).mean())


def run(settings: Any) -> None:
    """Measure every model, print a table and write the figures."""
    short_side = settings.size * 5 // 4  # the centre of a photograph that is a quarter larger, as in the trainings' validation
    config = DataConfig(
        path=settings.data, split=settings.split or None, img_size=settings.size, short_side=short_side, limit=settings.images
    )
    loaded = load_image_set(config, seed=settings.seed)
    photographs = loaded.images(range(len(loaded))).float() / 255.0
    columns = conditions(photographs, settings.sigmas, settings.seed)
    rows = {"noisy": {name: score(lambda noisy: noisy.clamp(0, 1), *pair) for name, pair in columns.items()}}
    for name in settings.models:
        denoiser = load(name)
        rows[name] = {column: score(denoiser, *pair) for column, pair in columns.items()}
        print(f"{name} is done", file=sys.stderr, flush=True)
    shown: list[Column] = [("weights", lambda record: record["weights"])]
    shown += [(column, lambda record, column=column: f"{record[column]:.2f}") for column in columns]  # type: ignore[misc]
    print(markdown(shown, [{"weights": name} | row for name, row in rows.items()]), end="")
    if settings.output:
        about = provenance("eval/held_out.py", settings.command)
        write_text(settings.output, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 bad input, 130 interrupted."""
    return run_program(_parser(), run, arguments)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="held_out", description="Choose among photograph denoisers on held-out images.")
    add = parser.add_argument
    add("--models", nargs="+", required=True, help="shipped names or folders, or MODEL+OTHER@SHARE")
    add("--data", required=True, help="photographs, as data.path of a config")
    add("--split", default="validation", help="'' for a folder without splits")
    add("--images", type=number(int, 1), default=32)
    add("--size", type=number(int, 32), default=128, help="side of the centre crops")
    add("--sigmas", type=number(float, 0, 255), nargs="*", default=[5.0, 15.0, 25.0, 50.0])
    add("--seed", type=number(int, 0), default=0)
    add("--output", type=named_path, metavar="FILE", help="where the figures are written, JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
